"The reward model's faults: what is said, and that a sound model stays in place."
# Small heads on made-up features; the pocket's backbone only where files are read.
from contextlib import chdir
from dataclasses import replace
from types import SimpleNamespace
import json, multiprocessing, os, signal, time

from PIL import Image
import numpy as np
import pandas as pd
import pytest
import torch

from mhrlhf.core.aspects import NAMES
from mhrlhf.core.files import InputError, read_json, write_csv
from mhrlhf.core.settings import EvaluateSettings, ScoreSettings, TrainRewardSettings
from mhrlhf.images.models import load_backbone
from mhrlhf.proof.evaluate import choose_judge
from mhrlhf.proof.monitor import latest_figures
from mhrlhf.ratings.simulated import simulated_panel
from mhrlhf.ratings.store import RatingStore
from mhrlhf.reward import features as features_module, model as model_module, train as train_module
from mhrlhf.reward.features import FeatureCache, Features, extract_arrays
from mhrlhf.reward.heads import KINDS, prompt_folds
from mhrlhf.reward.model import RewardModel, save_model
from mhrlhf.reward.score import run as run_score
from mhrlhf.reward.train import oldest_counting, rated_images, run, train
from mhrlhf.reward.trust import leakage
from mhrlhf.reward.weights import combination_weights, read_choices

# made-up features know no phrases, and no image model is asked: notebook 46 tests the noise-aware heads
SETTINGS = TrainRewardSettings(hidden=8, epochs=6, patience=3, opposites="", draws=0)
BACKBONE = SimpleNamespace(name="made-up", identity="made-up-1", device=torch.device("cpu"))
OTHER = SimpleNamespace(name="other", identity="other-2", device=torch.device("cpu"))

def world(images=160, noise=1., seed=0):
    "Features, the metadata of their images, and the ratings of a SIMULATED panel whose taste lies in the features."
    rng = torch.Generator().manual_seed(seed)
    def unit(*shape): return torch.nn.functional.normalize(torch.randn(*shape, generator=rng), dim=-1)
    image, text = unit(images, 16), unit(images // 2, 16).repeat_interleave(2, 0)
    features = Features(image, text, torch.randn(images, 9, 4, generator=rng))
    paths = [f"images/p{i // 2:03}/{i % 2}.png" for i in range(images)]
    ids, prompts = [f"p{i // 2:03}" for i in range(images)], [f"prompt {i // 2}" for i in range(images)]
    metadata = pd.DataFrame(dict(prompt_id=ids, image_path=paths, prompt=prompts))
    truth = pd.DataFrame(5 + 6 * features.image[:, :len(NAMES)].numpy(), paths, list(NAMES))
    return features, metadata, simulated_panel(truth, raters=4, noise=noise)

def learned(features, metadata, tidy, settings=SETTINGS):
    return train(rated_images(tidy, metadata), features, BACKBONE, settings)

def shuffled(tidy, seed):
    "The same ratings, of other images."
    paths = sorted(set(tidy.image_path))
    other = dict(zip(paths, np.random.default_rng(seed).permutation(paths)))
    return tidy.assign(image_path=tidy.image_path.map(other))

def table_of(tidy): return tidy.pivot_table(index="image_path", columns="aspect", values="value")

@pytest.fixture(scope="module")
def trained(): return learned(*world())

@pytest.fixture
def folder(trained, tmp_path):
    save_model(trained.model, tmp_path / "model")
    return tmp_path / "model"

def load(folder, backbone=BACKBONE): return RewardModel.load(folder, "cpu", backbone)

def rewrite(folder, change):
    "Change what `reward_model.json` says."
    path = folder / "reward_model.json"
    path.write_text(json.dumps(change(read_json(path))))

def never(*_): raise AssertionError("a forward pass")

def no_forward_pass(monkeypatch):
    for name in ("_see", "encode_prompts"): monkeypatch.setattr(features_module, name, never)

# What is learned, and what is not there to be learned

def test_heads_learn_what_the_features_hold(trained):
    assert trained.report.plcc_low.min() > .5, trained.report

def test_shuffled_ratings_teach_nothing():
    features, metadata, tidy = world()
    report = pd.concat([learned(features, metadata, shuffled(tidy, seed)).report for seed in range(1, 5)])
    beyond = report.plcc.abs() / report.chance  # one of twenty may be above 1; a leak would lift nearly all
    assert (beyond > 1).sum() <= 3 and beyond.max() < 1.6, report[["plcc", "chance"]]
    assert abs(report.plcc.mean()) < .08 and report.chance.max() < .35, report[["plcc", "chance"]]

def test_a_leak_would_be_seen():
    features, metadata, tidy = world()
    rated = rated_images(shuffled(tidy, 1), metadata)
    answers = torch.tensor(rated.ratings[list(NAMES)].fillna(5).values, dtype=torch.float) - 5
    told = torch.nn.functional.normalize(torch.cat([features.image, answers], 1), dim=-1)
    text = torch.nn.functional.pad(features.text, (0, len(NAMES)))
    report = train(rated, Features(told, text, features.patches), BACKBONE, SETTINGS).report
    assert (report.plcc > 1.6 * report.chance).all(), report[["plcc", "chance"]]

def test_a_rating_that_is_missing_touches_only_its_own_head(trained):
    features, metadata, tidy = world()
    gone = (tidy.aspect == "style") & tidy.image_path.isin(sorted(set(tidy.image_path))[:60])
    fewer = learned(features, metadata, tidy[~gone], replace(SETTINGS, hidden=0)).predicted
    complete = learned(features, metadata, tidy, replace(SETTINGS, hidden=0)).predicted
    same = [a for a in NAMES if a != "style"]
    assert np.allclose(fewer[same], complete[same], atol=1e-3)
    assert not np.allclose(fewer["style"], complete["style"], atol=1e-3)

def test_each_head_keeps_what_it_has_earned(trained):
    kinds, heads, plain = trained.fit.kinds, trained.model.heads, trained.model.projection.plain
    assert list(trained.report["head"]) == kinds == trained.model.info["kinds"] and set(kinds) <= set(KINDS)
    for a, kind in enumerate(kinds):
        assert (kind == "hidden") == bool(heads.out[:, a].any())
        assert (kind == "floor") == (not heads.line[:, a, plain:].any())

def test_a_floor_that_does_is_kept_and_what_it_lacks_is_earned():
    features, metadata, tidy = world(400, noise=.5)
    z = (features.patches - features.patches.mean(1, keepdim=True)).std(1)[:, 0]  # what only the patches know
    style = tidy.aspect == "style"
    tidy.loc[style, "value"] += 20 * (z - z.mean()).numpy()[pd.factorize(tidy[style].image_path)[0]]
    kinds = dict(zip(NAMES, learned(features, metadata, tidy, replace(SETTINGS, hidden=0)).fit.kinds))
    assert kinds["style"] == "line" and [kinds[a] for a in NAMES if a != "style"].count("floor") >= 3, kinds

# What is said about the heads

def test_stated_errors_cover_the_ratings_of_folds_they_were_not_fitted_on(trained):
    u = trained.trust.uncertainty
    assert (u.covers_95_low <= .95).all() and (u.covers_95_high >= .95).all() and (u.spread_covers_95 < .8).all(), u

def test_stated_errors_cover_new_images():
    features, metadata, tidy = world(400)
    old, new = set(metadata.image_path[:320]), slice(320, 400)
    result = train(rated_images(tidy[tidy.image_path.isin(old)], metadata[:320]), features[:320], BACKBONE, SETTINGS)
    table, rated = result.model.table(features[new]), table_of(tidy).loc[metadata.image_path[new]]
    within = [np.abs(table[a].values - rated[a].values) <= 1.96 * table[f"{a}_uncertainty"].values for a in NAMES]
    assert .9 < np.mean(within) < .99, np.mean(within)

def test_a_model_on_disk_states_the_same_errors_and_composite(trained, folder):
    features, *_ = world()
    pd.testing.assert_frame_equal(load(folder).table(features[:9]), trained.model.table(features[:9]))

def test_a_head_that_learned_another_aspect_is_found_out():
    _, metadata, tidy = world(400, noise=.5)
    rated = rated_images(tidy, metadata)
    ratings = rated.ratings
    borrowed = ratings.assign(style=ratings["material"] + .1 * np.random.default_rng(0).normal(size=400))
    sees, _ = leakage(borrowed, ratings, rated.prompt_ids)
    assert sees.borrows_from["style"] == "material" and sees.leak_low["style"] > .5
    assert sees.sees["style"] != "its own aspect"

def test_the_composites_weights_follow_choices(trained, tmp_path):
    features, metadata, tidy = world()
    truth, rng = table_of(tidy), np.random.default_rng(0)
    rows = []
    for a, b in rng.permutation(truth.index)[:160].reshape(80, 2):
        winner, loser = (a, b) if truth["style"][a] > truth["style"][b] else (b, a)
        rows.append(dict(winner=winner, loser=loser))
    write_csv(tmp_path / "choices.csv", rows, ["winner", "loser"])
    choices = read_choices(tmp_path / "choices.csv", set(truth.index))
    result = train(rated_images(tidy, metadata), features, BACKBONE, SETTINGS, choices=choices)
    w = result.report
    assert w.weight["style"] == w.weight.max() and w.weight["style"] > .4
    assert (w.weight_low >= 0).all() and (w.weight_low <= w.weight_high).all()
    assert "80 pairwise choices" in result.weights_from

def test_faulty_choices_are_named_by_line(tmp_path):
    pairs = [("a.png", "b.png"), ("a.png", "z.png"), ("b.png", "b.png")]
    write_csv(tmp_path / "c.csv", [dict(winner=a, loser=b) for a, b in pairs], ["winner", "loser"])
    says = ("c.csv:3: column loser, value 'z.png': not a rated image(.|\n)*"
            "c.csv:4: column loser, value 'b.png': is the winner too")
    with pytest.raises(InputError, match=says): read_choices(tmp_path / "c.csv", {"a.png", "b.png"})

# Ratings that cannot be learned from

def test_too_few_and_constant_ratings_cost_only_their_own_head():
    features, metadata, tidy = world()
    few = (tidy.aspect == "style") & ~tidy.image_path.isin(sorted(set(tidy.image_path))[:12])
    tidy = tidy[~few]
    tidy.loc[tidy.aspect == "material", "value"] = 7.
    rated = rated_images(tidy, metadata)
    assert "12 rated images of 6 prompts" in rated.left_out["style"]
    assert "all 160 images are rated 7" in rated.left_out["material"]
    result = train(rated, features, BACKBONE, SETTINGS)
    assert result.model.aspects == ["spatial", "iconographic", "fidelity"] and np.isfinite(result.report.plcc).all()

def test_no_head_left_is_a_fault():
    _, metadata, tidy = world()
    four = tidy[tidy.image_path.isin(sorted(set(tidy.image_path))[:4])]
    with pytest.raises(InputError, match="no aspect has enough ratings(.|\n)*spatial: 4 rated images"):
        rated_images(four, metadata)

def test_opposites_that_are_no_pairs_are_refused():
    with pytest.raises(InputError, match="opposites = tiny/huge, sharp: write pairs"):
        learned(*world(), replace(SETTINGS, opposites="tiny/huge, sharp"))

def test_images_that_nobody_knows_are_named():
    _, metadata, tidy = world()
    with pytest.raises(InputError, match="2 rated images are not in the metadata .images/p000/0.png"):
        rated_images(tidy, metadata[2:])

@pytest.mark.parametrize("part", ["image", "text", "patches"])
def test_features_that_are_no_numbers_are_refused(part):
    features, metadata, tidy = world()
    getattr(features, part)[3] = float("nan")
    with pytest.raises(InputError, match="not finite numbers"): learned(features, metadata, tidy)

# A model on disk

def test_another_backbone_is_refused(folder):
    with pytest.raises(InputError, match="made-up-1.*not on other .other-2."): load(folder, OTHER)

def test_a_model_of_another_version_is_refused(folder):
    rewrite(folder, lambda info: info | dict(views=["pooled", "layout"]))
    with pytest.raises(InputError, match="another version of mhrlhf.*train again"): load(folder)

def test_a_model_for_other_aspects_is_refused(folder):
    rewrite(folder, lambda info: info | dict(aspects=[*NAMES[:4], "charm"]))
    with pytest.raises(InputError, match="rates charm, but the aspects here are spatial.*train again"): load(folder)

def without(info, key): return {k: v for k, v in info.items() if k != key}

def outside(info):
    style = info["files"]["style"] | dict(file="../../style.safetensors")
    return info | dict(files=info["files"] | dict(style=style))

@pytest.mark.parametrize("change, says", [
    (lambda i: [], "damaged, no description"),
    (lambda i: without(i, "weights"), "damaged, weights not in it"),
    (lambda i: i | dict(mean=["five"] * 5), "damaged, mean = "),
    (lambda i: i | dict(weights=[1.]), "damaged, weights = "),
    (lambda i: i | dict(std=[float("nan")] * 5), "damaged, std = "),
    (lambda i: i | dict(soft_minimum=-1), "soft_minimum = -1 must be 0 or above"),
    (lambda i: i | dict(hidden=3), "do not fit together"),
    (lambda i: i | dict(files=without(i["files"], "style")), "no file of style"),
    (outside, "path leaves")],
    ids=["no dict", "no weights", "text", "one weight", "nan", "soft minimum", "width", "no file", "outside"])
def test_a_damaged_description_is_refused(folder, change, says):
    rewrite(folder, change)
    with pytest.raises(InputError, match=says): load(folder)

def test_ratings_that_are_no_numbers_are_refused(trained):
    features, *_ = world()
    features.image[3] = float("nan")
    with pytest.raises(InputError, match="not finite numbers"): trained.model.table(features)
    with pytest.raises(InputError, match="p.png: its features are not finite numbers"):
        features_module._finite(dict(image=features.image[3:4]), ["p.png"])

BLACK = np.zeros((8, 8, 3), np.uint8)

@pytest.mark.parametrize("images, prompts, says", [
    ([BLACK] * 3, "fox", "3 images but one text"), ([BLACK], ["a", "b"], "1 images but 2"), ([], [], "no images"),
    ([BLACK[..., 0]], ["a"], "uint8 .8, 8.; PIL"), ([np.zeros((8, 8, 4), np.uint8)], ["a"], "8, 4"),
    ([BLACK.astype(float)], ["a"], "float64")])
def test_what_is_no_image_or_no_list_of_prompts_is_refused(trained, images, prompts, says):
    with pytest.raises(InputError, match=says): trained.model.score(images, prompts)

@pytest.mark.parametrize("how, says", [
    ("style=1,style=3", "each aspect's weight once"), ("charm=1", "no head for charm"),
    ("style=-1", "none may be negative"), ("style", "write auto, equal")])
def test_weights_that_cannot_be_are_refused(trained, how, says):
    def weights(how):
        rated = trained.rated
        return combination_weights(how, trained.report, trained.predicted, rated.overall, rated.prompt_ids)
    with pytest.raises(InputError, match=says): weights(how)
    table, source = weights("style=3,spatial=1")
    assert source == "set by hand" and table.weight["style"] == .75
    assert weights("equal")[0].weight.eq(.2).all()

def test_one_text_under_two_names_stays_on_one_side_of_the_split():
    _, metadata, tidy = world()
    metadata.loc[metadata.prompt_id == "p001", "prompt"] = "prompt 0"
    rated = rated_images(tidy, metadata)
    folds = prompt_folds(rated.prompt_ids, 5)
    assert pd.Series(folds).groupby(rated.prompts).nunique().max() == 1 and len(set(rated.prompt_ids)) == 79

def test_two_trainings_into_one_folder_leave_a_whole_model(folder, trained):
    children, line = [], trained.model.heads.line
    for _ in range(2):
        if not (child := os.fork()):
            for _ in range(12): save_model(trained.model, folder)
            os._exit(0)
        children.append(child)
    for _ in range(40): assert torch.equal(load(folder).heads.line, line)  # read meanwhile
    assert [os.waitpid(c, 0)[1] for c in children] == [0, 0] and torch.equal(load(folder).heads.line, line)

def test_a_remade_image_is_not_saved_by_one_new_rating(tmp_path):
    store = RatingStore(f"sqlite:///{tmp_path}/r.db")
    def rate(rater, value):
        store.add([dict(rater=rater, image_path="a.png", prompt_id="p0", aspect="style", value=value)])
    rate("ann", 5)
    rate("bob", 5)
    first = store.history().created_at.iloc[0]
    rate("bob", 6)
    assert oldest_counting(store)["a.png"] == first  # ann has not seen the new one

def flip_last_bit(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

@pytest.mark.parametrize("spoil, says", [
    (lambda p: p.write_bytes(p.read_bytes()[:-40]), "damaged"),
    (lambda p: p.write_bytes(b"no weights"), "damaged"),
    (flip_last_bit, "checksum differs"),
    (lambda p: p.unlink(), "no such file")], ids=["cut", "text", "one bit", "gone"])
@pytest.mark.parametrize("name", ["fidelity", "projection"])
def test_damaged_weights_are_refused(folder, name, spoil, says):
    spoil(folder / read_json(folder / "reward_model.json")["files"][name]["file"])
    with pytest.raises(InputError, match=f"{name}.safetensors: .*{says}.*train again"): load(folder)

def test_no_model_is_said(tmp_path):
    with pytest.raises(InputError, match="no reward model here; train one first"): load(tmp_path)

def test_a_model_that_could_not_be_written_leaves_the_old_one(folder, trained, monkeypatch):
    before, save = load(folder), model_module.save_file
    def full(tensors, path):
        if "fidelity" in str(path): raise OSError("no space left on device")
        save(tensors, path)
    monkeypatch.setattr(model_module, "save_file", full)
    with pytest.raises(OSError): save_model(trained.model, folder)
    after = load(folder)
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values()))

def test_a_model_killed_while_it_is_written_is_the_old_or_the_new_one(folder, trained):
    info = trained.model.info | dict(weights=[0., 0., 0., 0., 1.])
    other = RewardModel(BACKBONE, trained.model.projection, trained.fit.heads, info)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(25):
        if not (child := os.fork()):
            while True:
                for model in (other, trained.model): save_model(model, folder)
        time.sleep(rng.uniform(.02, .2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        now = load(folder)
        seen.add(float(now.weights[-1]))
        assert torch.equal(now.heads.line, trained.model.heads.line)
        assert float(now.weights[-1]) in (1., float(trained.model.weights[-1]))
    save_model(trained.model, folder)
    assert len(seen) == 2 and len(list(folder.glob("heads-*"))) == 1

def test_a_model_opens_elsewhere(folder, trained, tmp_path):
    features, *_ = world()
    for name in ("another machine", "here"): (tmp_path / name).mkdir()
    moved = folder.rename(tmp_path / "another machine/model")
    assert str(tmp_path) not in "".join(p.read_text() for p in moved.glob("*.json"))
    with chdir(tmp_path / "here"): table = load("../another machine/model").table(features[:9])
    pd.testing.assert_frame_equal(table, trained.model.table(features[:9]))

# Images

def fill(folder, images, connection):
    "In a process of its own: all images, from a random one on."
    torch.set_num_threads(1)
    cache = FeatureCache(folder / "cache", load_backbone("pocket", "cpu"), batch=4, shard=8)
    order = np.roll(np.arange(images), np.random.default_rng(os.getpid()).integers(images))
    connection.send("ready")
    connection.recv()
    features = cache.get([f"{i}.png" for i in order], [f"prompt {i}" for i in order], folder)
    connection.send((cache.computed, features.image[np.argsort(order)].numpy()))

def test_several_processes_fill_one_cache_and_then_nothing_is_computed(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(255, size=(40, 64, 64, 3)).astype(np.uint8)
    paths, prompts = [f"{i}.png" for i in range(40)], [f"prompt {i}" for i in range(40)]
    for path, image in zip(paths, images): Image.fromarray(image).save(tmp_path / path)
    context, ends = multiprocessing.get_context("fork"), []  # what is imported, ten seconds' work, they have
    for _ in range(2):
        ours, theirs = context.Pipe()
        context.Process(target=fill, args=(tmp_path, 40, theirs), daemon=True).start()
        ends.append(ours)
    for end in ends: assert end.recv() == "ready"
    for end in ends: end.send("go")
    results = [end.recv() for end in ends]
    backbone = load_backbone("pocket", "cpu")
    direct = extract_arrays(backbone, list(images), None).image
    no_forward_pass(monkeypatch)
    cache = FeatureCache(tmp_path / "cache", backbone)
    again = cache.get(paths, prompts, tmp_path)
    assert cache.computed == 0
    assert all(40 >= n > 0 and np.allclose(image, again.image, atol=1e-5) for n, image in results)
    assert torch.allclose(again.image, direct, atol=1e-5)

@pytest.fixture
def project(tmp_path):
    "A folder with images, metadata and a SIMULATED panel."
    from mhrlhf.pocket.scenes import scene_batch
    images, scenes = scene_batch(40, np.random.default_rng(0))
    rows = []
    for i, (image, f) in enumerate(zip(images, scenes)):
        path = f"images/p{i}/0.png"
        (tmp_path / path).parent.mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / path)
        rows.append(dict(prompt_id=f"p{i}", image_path=path, prompt=f.caption, genre=""))
    write_csv(tmp_path / "data/generated.csv", rows, list(rows[0]))
    ratings = np.random.default_rng(1).uniform(2, 8, (40, len(NAMES)))
    truth = pd.DataFrame(ratings, [r["image_path"] for r in rows], list(NAMES))
    store_of(tmp_path).add(simulated_panel(truth, raters=2))
    return tmp_path

@pytest.fixture
def undrawn(monkeypatch):
    "Trainings that leave out the pictures of their report, which cost more than they."
    for name in ("pictures", "extreme_pictures"): monkeypatch.setattr(train_module, name, lambda trained: {})
    monkeypatch.setattr(train_module, "save_figure", lambda figure, path: path)

def store_of(project): return RatingStore(f"sqlite:///{project}/data/annotations/ratings.db")

def test_images_missing_or_corrupt_are_all_named_and_nothing_is_written(project):
    spoiled = [project / f"images/{name}/0.png" for name in ("p3", "p4")]
    for path in spoiled: path.unlink()
    with chdir(project), pytest.raises(InputError, match="p3/0.png: no such image(.|\n)*p4/0.png: no such image"):
        run(SETTINGS)
    for path in spoiled: path.write_bytes(b"no image")
    says = "p3/0.png: not a readable image(.|\n)*p4/0.png: not a readable image"
    with chdir(project), pytest.raises(InputError, match=says): run(SETTINGS)
    assert not (project / "outputs/multihead_reward_model/reward_model.json").exists()

def test_images_made_again_or_changed_since_they_were_rated_are_refused(project, undrawn, monkeypatch):
    quick, output = replace(SETTINGS, epochs=1, hidden=0), project / "outputs/multihead_reward_model"
    with chdir(project): run(quick)
    before = (output / "reward_model.json").read_bytes()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(project / "images/p3/0.png")
    says = "images/p3/0.png: has another content .hash. than when it was rated; rate it again"
    with chdir(project), pytest.raises(InputError, match=says): run(quick)
    table = pd.read_csv(project / "data/generated.csv")
    table["created_at"], table["status"] = "", "ok"
    table.loc[4, "created_at"] = "2099-01-01T00:00:00+00:00"
    table.to_csv(project / "data/generated.csv", index=False)
    with chdir(project), pytest.raises(InputError, match="images/p4/0.png: was made again after it was rated"):
        run(quick)
    assert (output / "reward_model.json").read_bytes() == before
    store = store_of(project)
    store.add(store.ratings().query("image_path == 'images/p3/0.png'"))
    table["created_at"] = ""
    table.to_csv(project / "data/generated.csv", index=False)
    monkeypatch.undo()
    with chdir(project): run(quick)
    metrics = read_json(output / "metrics.json")
    assert {"plcc", "plcc_low", "plcc_high", "ceiling"} <= set(metrics["aspects"]["style"])
    assert {"calibration", "reliability", "uncertainty", "matrices", "sees", "genres"} <= set(metrics)
    names = ("scatter", "correlations", "residuals", "reliability", "aspects", "images")
    assert all((output / f"{n}.png").stat().st_size > 1000 for n in names)
    with chdir(project): run_score(ScoreSettings(files=("data/generated.csv",)))
    scores = pd.read_csv(project / "outputs/scores.csv")
    assert len(scores) == 40 and scores[[*NAMES, "composite"]].notna().all().all()
    assert (scores[[f"{a}_uncertainty" for a in NAMES]] > 0).all().all()

def test_a_second_training_makes_no_forward_pass(project, undrawn, monkeypatch):
    quick = replace(SETTINGS, epochs=1, hidden=0, opposites="tiny/huge")
    with chdir(project): run(quick)
    no_forward_pass(monkeypatch)
    for module in (model_module, train_module): monkeypatch.setattr(module, "encode_prompts", never)
    with chdir(project):
        run(quick)
        run_score(ScoreSettings(files=("data/generated.csv",)))  # what was seen in training is rated without a look

def test_an_evaluation_by_the_heads_rates_as_the_model_does_and_looks_once(project, undrawn, monkeypatch):
    rows = pd.read_csv(project / "data/generated.csv")
    texts, images = list(rows.prompt), np.stack([np.asarray(Image.open(project / p)) for p in rows.image_path])
    settings = EvaluateSettings(judged_by="heads", device="cpu")
    with chdir(project):
        run(replace(SETTINGS, epochs=1, hidden=0, opposites="tiny/huge"))
        name, score, weights = choose_judge(settings, texts, (64, 64))
        first, model = score(images, texts), RewardModel.load(settings.reward_model, "cpu")
        scores = model.score(images, texts)[list(NAMES)]
        np.testing.assert_allclose(first, scores, atol=.05)  # the cache keeps half precision
        no_forward_pass(monkeypatch)
        pd.testing.assert_frame_equal(choose_judge(settings, texts, (64, 64))[1](images, texts), first)
    assert name == "heads" and list(first) == list(NAMES) and np.isclose(sum(weights), 1)

def test_a_rated_image_put_in_another_ones_place_is_refused_at_the_first_training(project):
    rows = pd.read_csv(project / "data/generated.csv")
    rows["bytes"] = [(project / p).stat().st_size for p in rows.image_path]
    rows.to_csv(project / "data/generated.csv", index=False)
    path = rows.image_path[3]
    Image.new("RGB", (64, 64)).save(project / path)
    says = f"{path}: has another size than when it was made; rate it again"
    with chdir(project), pytest.raises(InputError, match=says): run(SETTINGS)

@pytest.mark.parametrize("setting, says", [
    (dict(weights="charm=1"), "no head for charm"), (dict(opposites="sharp"), "opposites"),
    (dict(output="data/generated.csv"), "generated.csv")])
def test_a_slip_is_told_before_any_image_is_seen(project, monkeypatch, setting, says):
    monkeypatch.setattr(train_module, "load_backbone", lambda *_: pytest.fail("the work began"))
    with chdir(project), pytest.raises(InputError, match=says): run(replace(SETTINGS, **setting))

def test_a_run_is_followed_live(project, monkeypatch):
    def half_way(rated, features, backbone, settings, ceilings, watch, *_):
        for epoch, share in enumerate((.1, .2)): watch(epoch, torch.tensor([share] * len(NAMES)))
        seen = latest_figures("outputs")
        raise InputError(f"seen {len(seen)} of step {set(seen.step)}: {seen.value.iloc[0]}")
    monkeypatch.setattr(train_module, "train", half_way)
    with chdir(project), pytest.raises(InputError, match="seen 5 of step .1.: 0.2"): run(SETTINGS)

@pytest.mark.parametrize("arguments, says", [
    ([], "nothing to rate: name images"),
    (["no.png", "--prompt", "a fox"], "no.png: no such image"),
    (["images/p1/0.png"], "no prompt is kept in this image"),
    (["images"], "images: is a folder"),
    (["bad.csv"], "bad.csv:3: column prompt, value '': is empty"),
    (["--prompt", "a fox", "images/p1/0.png", "--output", "s.csv"], "no reward model here; train one first")])
def test_the_score_command_says_what_is_wrong_and_ends_with_2(project, arguments, says, capsys):
    from mhrlhf.cli import main
    rows = [dict(image_path="images/p1/0.png", prompt="a fox"), dict(image_path="images/p2/0.png", prompt="")]
    write_csv(project / "bad.csv", rows, ["image_path", "prompt"])
    (project / "settings.ini").write_text("[pocket]\npipeline = pocket\n")
    with chdir(project): assert main(["score", "--profile", "pocket", *arguments]) == 2
    assert says in capsys.readouterr().err and not (project / "outputs/scores.csv").exists()
