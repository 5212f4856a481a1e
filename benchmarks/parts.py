"""What each part of the tuning buys: the same pictures, heads and number of updates, one thing changed at a time.

python benchmarks/parts.py --run outputs/test_pipeline [--updates 80] [--parts default,equal] [--jobs 2] [--json FILE]

--run is the folder of a finished test-pipeline in a checkout. Every part tunes in a process of its own with one
thread; then the judge compares 64 development prompts, on which settings may be chosen, with the model before tuning.
The parts named in HEADS first train noise-aware heads of their own, those in SIZES a whole reward model from fewer
rated images."""
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
import argparse, json, os, platform, shutil, sqlite3, sys, time

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
               "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parent.parent
PROMPTS = 64
PARTS = {  # name -> title, settings that differ from the profile's
    "default": ("multi-head DSPO", {}),
    "equal": ("equal weights", dict(balance="equal")),
    "min-norm": ("minimum-norm weights", dict(balance="min-norm")),
    "no-anchor": ("no anchor", dict(anchor=0.)),
    "all-levels": ("all noise levels", dict(min_timestep=20)),
    "ratings": ("heads from the panel's ratings alone, no copies", {}),
    "no-copies": ("heads from the labels of the heads on CLIP, no copies", {}),
    "images-100": ("100 rated images instead of all", {}),
    "images-200": ("200 rated images", {}),
    "images-400": ("400 rated images", {}),
    "images-800": ("800 rated images", {}),
    "lora": ("LoRA instead of DoRA", dict(adapter="lora")),
    "samples": ("fresh samples too, labelled by the heads on CLIP",
                dict(source="samples", sampled=96, watch_every=20)),
    "dpo": ("Diffusion-DPO on pairs", dict(objective="dpo", lr=1e-3)),
    "dspo-pairs": ("DSPO on pairs", dict(objective="dspo-pairs", lr=1e-3)),
    "sft": ("supervised on the better ones", dict(objective="sft", lr=1e-3)),
}
HEADS = "ratings", "no-copies"
SIZES = {f"images-{n}": n for n in (100, 200, 400, 800)}

def standardised_ratings(run):
    "The panel's mean ratings of the rated pictures, in standard deviations. (n, aspects)"
    import torch
    from mhrlhf.images.metadata import read_metadata
    from mhrlhf.ratings.store import RatingStore
    from mhrlhf.reward.train import rated_images
    store = RatingStore(f"sqlite:///{run/'ratings.db'}")
    given = rated_images(store.ratings(overall=True), read_metadata(run/"generated.csv")).ratings
    return torch.tensor(((given - given.mean()) / given.std()).to_numpy(), dtype=torch.float32)

def own_heads(tuning, ratings):
    "Noise-aware heads from the rated pictures themselves."
    import torch
    from mhrlhf.core.settings import load_settings
    from mhrlhf.reward.noise import NoiseHeads, draw, fit_noise_heads
    from mhrlhf.tuning.adapters import reference_of
    s, known, denoiser = load_settings("train-reward", "pocket"), tuning.rated, tuning.denoiser
    if ratings is not None: known = replace(known, ratings=ratings)
    generator = torch.Generator().manual_seed(s.seed)
    with reference_of(denoiser.unet): draws = draw(denoiser, known, s.draws, generator)
    torch.manual_seed(s.seed)
    heads = NoiseHeads(denoiser.channels(), tuning.heads.aspects, s.members)
    for _ in fit_noise_heads(heads, draws, known.ratings, known.weights, known.prompt % s.members, s.noise_epochs): pass
    return heads

def fewer_images(run, count, folder):
    "A reward model from the first so many rated images; its folder."
    from mhrlhf.core.settings import load_settings
    from mhrlhf.images.metadata import read_metadata
    from mhrlhf.reward.train import run as train_reward
    folder.mkdir(parents=True)
    some = read_metadata(run/"generated.csv").head(count)
    some.to_csv(folder/"generated.csv", index=False)
    shutil.copy(run/"ratings.db", folder/"ratings.db")
    with sqlite3.connect(folder/"ratings.db") as ratings:
        marks = ",".join("?" * count)
        ratings.execute(f"DELETE FROM ratings WHERE image_path NOT IN ({marks})", list(some.image_path))
    train_reward(load_settings("train-reward", "pocket", metadata=folder/"generated.csv", output=folder/"reward",
                               cache=run/"features", database=f"sqlite:///{folder/'ratings.db'}"))
    return folder/"reward"

def prepared(run, name, updates, folder):
    "A tuning before its first update, with what the part changes."
    import torch
    from mhrlhf.core.group import Team
    from mhrlhf.core.settings import load_settings
    from mhrlhf.tuning.dspo import prepare
    model = fewer_images(run, SIZES[name], folder) if name in SIZES else run/"multihead_reward_model"
    settings = load_settings("train-dspo", "pocket", reward_model=model, updates=updates, **PARTS[name][1])
    tuning = prepare(settings, torch.device("cpu"), Team())
    if name in HEADS: tuning.heads = own_heads(tuning, standardised_ratings(run) if name == "ratings" else None)
    return tuning

def trial(run, updates, name):
    "Tune with one thing changed, and ask the judge."
    import torch
    from mhrlhf.core.prompts import read_prompts
    from mhrlhf.core.settings import load_settings
    from mhrlhf.proof.evaluate import evaluate_pipeline
    from mhrlhf.tuning.loop import tune
    os.chdir(run.parent.parent)  # to which the images' paths are relative
    torch.set_num_threads(1)
    began = time.process_time()
    with TemporaryDirectory() as folder: tuning = prepared(run, name, updates, Path(folder)/"fewer")
    for _ in tune(tuning): pass
    seconds, prompts = time.process_time() - began, read_prompts(ROOT/"data/prompts_dev.csv", PROMPTS)
    judged = evaluate_pipeline(tuning.denoiser.pipe, prompts, load_settings("evaluate", "pocket"),
                               show=lambda figures: None)
    row = judged.table.loc["composite"]
    return dict(part=PARTS[name][0], **judged.table.gain.drop("composite").round(2), composite=round(row.gain, 2),
                win=round(row.win, 3), win_low=round(row.win_low, 3), win_high=round(row.win_high, 3),
                seconds=round(seconds))

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=ROOT/"outputs/test_pipeline", help="a finished test-pipeline")
    parser.add_argument("--updates", type=int, default=80, help="of every part")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them")
    parser.add_argument("--jobs", type=int, default=1, help="parts side by side")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    o = parser.parse_args()
    names = o.parts.split(",")
    if unknown := set(names) - set(PARTS): sys.exit(f"no part {unknown}; there are: {', '.join(PARTS)}")
    rows = {}
    with ProcessPoolExecutor(o.jobs, get_context("spawn")) as pool:
        asked = {pool.submit(partial(trial, o.run.resolve(), o.updates), name): name for name in names}
        for done in as_completed(asked):
            rows[asked[done]] = done.result()
            print(json.dumps(done.result()), flush=True)
            about = dict(updates=o.updates, prompts=PROMPTS, cpus=os.cpu_count(), machine=platform.machine(),
                         rows=[rows[name] for name in names if name in rows])
            if o.json: o.json.write_text(json.dumps(about, indent=1) + "\n")

if __name__ == "__main__": main()
