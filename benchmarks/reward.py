"""The reward half: heads on 10,000 rated images, feature extraction and cache, what shuffled ratings teach: python benchmarks/reward.py [--quick] [--json FILE]

The images are drawn scenes of the pocket's world, their ratings a SIMULATED panel of four; --quick takes a fifth of them.
Seconds are of the clock with two threads, and the load of the machine stands beside them; medians of interleaved runs count."""
from pathlib import Path
from statistics import median
import argparse, json, multiprocessing, os, platform, sys, tempfile, threading, time

os.environ["OMP_NUM_THREADS"] = "2"
import numpy as np
import pandas as pd
import torch

from mhrlhf.core.aspects import NAMES
from mhrlhf.reward.features import FeatureCache, extract_arrays, preprocess, to_pixels
from mhrlhf.images.models import load_backbone
from mhrlhf.ratings.simulated import simulated_panel
from mhrlhf.reward.readings import summary
from mhrlhf.reward.train import rated_images, train
from mhrlhf.core.settings import TrainRewardSettings

BATCHES = (16, 32, 64, 128)  # of the raw forward

# The world ---------------------------------------------------------------------------------------------------

def taste(scenes):
    "Image x aspect, 0-10: five formulas of what is drawn."
    third = np.array([min(abs(f.x - 1/3), abs(f.x - 2/3)) * 12 + abs(f.size - .5) * 12 for f in scenes])
    return pd.DataFrame(dict(spatial=9 - 2 * third, iconographic=[2 + f.object % 7 for f in scenes], style=[2 + 2 * f.style for f in scenes],
                             fidelity=[9 - 6 * max(f.blur, f.noise) for f in scenes], material=[2 + 3 * f.texture + 3 * f.shadow - 2 * f.desaturation for f in scenes])).clip(0, 10)

def draw(folder, images):
    "Image files, their metadata with two images a prompt, and the truth."
    from PIL import Image
    from mhrlhf.pocket.scenes import scene_batch
    drawn, scenes = scene_batch(images, np.random.default_rng(0))
    (folder / "images").mkdir(); paths = [f"images/{i:05}.png" for i in range(images)]
    for path, image in zip(paths, drawn): Image.fromarray(image).save(folder / path, compress_level=1)
    metadata = pd.DataFrame(dict(prompt_id=[f"p{i // 2:05}" for i in range(images)], image_path=paths, prompt=[scenes[i // 2 * 2].caption for i in range(images)], genre=[f"style {f.style}" for f in scenes]))
    metadata.to_csv(folder / "metadata.csv", index=False); taste(scenes).set_axis(paths).to_csv(folder / "truth.csv")
    return drawn, metadata

# Heads -------------------------------------------------------------------------------------------------------

def memory(name):
    "GB of this process now (VmRSS, RssAnon) or at its peak (VmHWM)."
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)).split()[1]) / 1024 ** 2

def watch_private(peak, ended):
    "The most private memory (RssAnon) seen, every hundredth of a second; what is mapped from the libraries' files can be let go and is not in it."
    while not ended.wait(.01): peak[0] = max(peak[0], memory("RssAnon"))

def train_alone(folder, images, shuffle, hidden, connection):
    "Heads, folds and floor from cached features in a process of its own: seconds, peak GB (added to the loaded libraries, private in all, all), report, epochs."
    torch.set_num_threads(2)
    metadata, truth = pd.read_csv(folder / "metadata.csv", nrows=images), pd.read_csv(folder / "truth.csv", index_col=0, nrows=images)
    if shuffle: truth = truth.set_axis(np.random.default_rng(shuffle).permutation(truth.index))
    tidy = simulated_panel(truth, raters=4, noise=1.5); backbone = load_backbone("pocket", "cpu")
    before, private, ended = memory("VmRSS"), [0.], threading.Event(); threading.Thread(target=watch_private, args=(private, ended), daemon=True).start()
    start = time.perf_counter()
    rated = rated_images(tidy, metadata); cache = FeatureCache(folder / "features", backbone)
    features = cache.get(rated.paths, rated.prompts, folder, summary); assert not cache.computed
    trained = train(rated, features, backbone, TrainRewardSettings(hidden=hidden), encode=cache.text)
    seconds = time.perf_counter() - start; ended.set()
    connection.send((seconds, memory("VmHWM") - before, private[0], memory("VmHWM"), trained.report, len(trained.fit.curves)))

def heads(folder, images, shuffle=0, hidden=TrainRewardSettings.hidden):
    ours, theirs = multiprocessing.Pipe(False)
    process = multiprocessing.get_context("spawn").Process(target=train_alone, args=(folder, images, shuffle, hidden, theirs)); process.start(); theirs.close()
    found = ours.recv(); process.join()
    return found

# Features ----------------------------------------------------------------------------------------------------

def timed(work):
    start = time.perf_counter(); work()
    return time.perf_counter() - start

def extraction(backbone, drawn, runs):
    "Images per second: ours from arrays in memory, and the raw forward of ready tensors at its best batch; interleaved."
    rates = {("raw", b): [] for b in BATCHES} | {("ours", b): [] for b in BATCHES}
    with torch.no_grad():
        ready = preprocess(backbone, to_pixels(drawn))
        for _ in range(runs):
            for b in BATCHES:
                rates["raw", b].append(len(drawn) / timed(lambda: [backbone.model.encode_image(part, normalize=True) for part in ready.split(b)]))
                rates["ours", b].append(len(drawn) / timed(lambda: [extract_arrays(backbone, list(drawn[i:i + b]), None) for i in range(0, len(drawn), b)]))
    best = lambda who: max(median(rates[who, b]) for b in BATCHES)
    return best("ours"), best("raw")

def rows_of(quick, folder):
    "The table's rows: figure, ours, peer, goal, runs, whether small is good."
    images, runs = (2000, 1) if quick else (10_000, 3)
    drawn, metadata = draw(folder, images); backbone = load_backbone("pocket", "cpu"); torch.set_num_threads(2)
    paths, prompts = list(metadata.image_path), list(metadata.prompt)
    ours, raw = extraction(backbone, drawn[:512], 3 if quick else 7)
    yield "feature extraction, images/s, beside the raw open_clip forward at its best batch", ours, raw, .95 * raw, 3 if quick else 7, False
    cache = FeatureCache(folder / "features", backbone); cache.get(paths[:1], prompts, folder)
    took = timed(lambda: cache.get(paths, prompts, folder))
    yield "from PNG files into the cache, images/s, beside the same raw forward", images / took, raw, None, 1, False
    cache = FeatureCache(folder / "features", backbone); cache.get(paths, prompts, folder)
    yield "cache hits with all patches, images/s", images / median(timed(lambda: cache.get(paths, prompts, folder)) for _ in range(5)), None, 50_000., 5, False
    assert not cache.computed; del cache
    found = [(heads(folder, images // 10), heads(folder, images)) for _ in range(runs)]
    (small, *_), (large, added, private, whole, report, epochs) = [[median(f[k][i] for f in found) if i < 4 else found[0][k][i] for i in range(6)] for k in range(2)]
    yield f"heads, 5 folds and floor, {images:,} images x 5 aspects x 4 raters, s ({epochs} epochs)", large, None, 20., runs, True
    yield "the same, memory added to the loaded libraries and backbone, GB at the peak", added, None, 1., runs, True
    yield "the same, private memory of the whole process, libraries included, GB at the peak", private, None, 1., runs, True
    yield "the same, all that is resident, mapped library files included, GB at the peak", whole, None, 1., runs, True
    yield f"growth of the time from {images // 10:,} to {images:,} images", large / small, None, 11., runs, True
    for a, r in report.iterrows(): yield f"held-out correlation of {a} ({r['head']}), beside the linear floor [{r.plcc_low:.2f}, {r.plcc_high:.2f}]", r.plcc, r.floor, None, 1, False
    shuffled = [heads(folder, min(images, 2000), shuffle, 16)[4] for shuffle in range(1, 3 if quick else 5)]
    figures = pd.concat(shuffled); beyond = figures.plcc.abs() / figures.chance
    yield f"shuffled ratings: heads of {len(figures)} whose correlation is beyond its 95 % interval of 0 (see notebook 40_trust)", int((beyond > 1).sum()), None, 1. + len(figures) // 10, len(shuffled), True
    yield "shuffled ratings: the largest correlation, in half widths of its interval", beyond.max(), None, 1.6, len(shuffled), True
    yield "shuffled ratings: mean correlation, absolute", abs(figures.plcc.mean()), None, .05, len(shuffled), True

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the images, one run; ends within three minutes")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options, rows = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        for figure, ours, peer, goal, runs, small in rows_of(options.quick, Path(folder)):
            met = None if goal is None else bool(ours <= goal if small else ours >= goal)
            rows.append(dict(figure=figure, ours=float(ours), peer=None if peer is None else float(peer), ratio=None if not peer else float(ours / peer), goal=None if goal is None else float(goal), met=met, runs=runs, load=os.getloadavg()[0]))
            show = lambda v: "-" if v is None else f"{v:.4g}"
            print(f"{figure:<92} ours {show(rows[-1]['ours']):>8}  peer {show(rows[-1]['peer']):>8}  goal {show(rows[-1]['goal']):>8}  load {rows[-1]['load']:.1f}  {'' if met is None else 'met' if met else 'MISSED'}", flush=True)
    machine = dict(cpus=os.cpu_count(), machine=platform.machine(), python=platform.python_version(), torch=torch.__version__)
    if options.json: options.json.write_text(json.dumps(dict(machine=machine, rows=rows), indent=1) + "\n")
    return 0 if all(r["met"] is not False for r in rows) else 1

if __name__ == "__main__": sys.exit(main())
