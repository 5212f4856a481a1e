"""The reward half: heads on 10,000 rated images, feature extraction and cache, what shuffled ratings teach.

python benchmarks/reward.py [--quick] [--json FILE]

The images are drawn scenes of the pocket's world, their ratings a SIMULATED panel of four; --quick takes a fifth.
Seconds are of the clock with two threads, and the load of the machine stands beside them; medians of interleaved
runs count."""
from pathlib import Path
from statistics import median
import argparse, json, multiprocessing, os, platform, sys, tempfile, threading, time

os.environ["OMP_NUM_THREADS"] = "2"
from PIL import Image
import numpy as np
import pandas as pd
import torch

from mhrlhf.core.settings import TrainRewardSettings
from mhrlhf.images.models import load_backbone
from mhrlhf.pocket.scenes import scene_batch
from mhrlhf.ratings.simulated import simulated_panel
from mhrlhf.reward.features import FeatureCache, extract_arrays, preprocess, to_pixels
from mhrlhf.reward.readings import summary
from mhrlhf.reward.train import rated_images, train

BATCHES = (16, 32, 64, 128)  # of the raw forward
THREADS = 2

# The world -----------------------------------------------------------------------------------------------------

def taste(scenes):
    "Image x aspect, 0-10: five formulas of what is drawn."
    third = np.array([min(abs(f.x - 1/3), abs(f.x - 2/3)) * 12 + abs(f.size - .5) * 12 for f in scenes])
    return pd.DataFrame(dict(
        spatial=9 - 2 * third, iconographic=[2 + f.object % 7 for f in scenes], style=[2 + 2 * f.style for f in scenes],
        fidelity=[9 - 6 * max(f.blur, f.noise) for f in scenes],
        material=[2 + 3 * f.texture + 3 * f.shadow - 2 * f.desaturation for f in scenes])).clip(0, 10)

def draw(folder, images):
    "Image files, their metadata with two images a prompt, and the truth."
    drawn, scenes = scene_batch(images, np.random.default_rng(0))
    (folder / "images").mkdir()
    paths = [f"images/{i:05}.png" for i in range(images)]
    for path, image in zip(paths, drawn): Image.fromarray(image).save(folder / path, compress_level=1)
    metadata = pd.DataFrame(dict(
        prompt_id=[f"p{i // 2:05}" for i in range(images)], image_path=paths,
        prompt=[scenes[i // 2 * 2].caption for i in range(images)], genre=[f"style {f.style}" for f in scenes]))
    metadata.to_csv(folder / "metadata.csv", index=False)
    taste(scenes).set_axis(paths).to_csv(folder / "truth.csv")
    return drawn, metadata

# Heads ---------------------------------------------------------------------------------------------------------

def memory(name):
    "GB of this process now (VmRSS, RssAnon) or at its peak (VmHWM)."
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024 ** 2

def watch_private(peak, ended):
    "The most private memory (RssAnon) seen, every hundredth of a second; what is mapped from files is not in it."
    while not ended.wait(.01): peak[0] = max(peak[0], memory("RssAnon"))

def train_alone(folder, images, shuffle, hidden, connection):
    "In a process of its own, from cached features: seconds, peak GB (added, private, all), report, epochs."
    torch.set_num_threads(THREADS)
    metadata = pd.read_csv(folder / "metadata.csv", nrows=images)
    truth = pd.read_csv(folder / "truth.csv", index_col=0, nrows=images)
    if shuffle: truth = truth.set_axis(np.random.default_rng(shuffle).permutation(truth.index))
    tidy, backbone = simulated_panel(truth, raters=4, noise=1.5), load_backbone("pocket", "cpu")
    before, private, ended = memory("VmRSS"), [0.], threading.Event()
    threading.Thread(target=watch_private, args=(private, ended), daemon=True).start()
    start = time.perf_counter()
    rated, cache = rated_images(tidy, metadata), FeatureCache(folder / "features", backbone)
    features = cache.get(rated.paths, rated.prompts, folder, summary)
    assert not cache.computed
    trained = train(rated, features, backbone, TrainRewardSettings(hidden=hidden), encode=cache.text)
    seconds = time.perf_counter() - start
    ended.set()
    peak = memory("VmHWM")
    connection.send((seconds, peak - before, private[0], peak, trained.report, len(trained.fit.curves)))

def heads(folder, images, shuffle=0, hidden=TrainRewardSettings.hidden):
    "What `train_alone` found."
    ours, theirs = multiprocessing.Pipe(False)
    arguments = (folder, images, shuffle, hidden, theirs)
    process = multiprocessing.get_context("spawn").Process(target=train_alone, args=arguments)
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found

# Features ------------------------------------------------------------------------------------------------------

def timed(work, *arguments):
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start

@torch.no_grad()
def extraction(backbone, drawn, runs):
    "Images per second, interleaved: ours from arrays in memory, and the raw forward of ready tensors."
    ours, raw = {b: [] for b in BATCHES}, {b: [] for b in BATCHES}
    ready = preprocess(backbone, to_pixels(drawn))
    def forward(b):
        for part in ready.split(b): backbone.model.encode_image(part, normalize=True)
    def extract(b):
        for i in range(0, len(drawn), b): extract_arrays(backbone, list(drawn[i:i + b]), None)
    for _ in range(runs):
        for b in BATCHES:
            raw[b].append(len(drawn) / timed(forward, b))
            ours[b].append(len(drawn) / timed(extract, b))
    return max(map(median, ours.values())), max(map(median, raw.values()))

# The table: figure, ours, peer, goal, runs, whether small is good -------------------------------------------------

def feature_rows(quick, folder, drawn, metadata):
    backbone, runs = load_backbone("pocket", "cpu"), 3 if quick else 7
    paths, prompts = list(metadata.image_path), list(metadata.prompt)
    def new_cache(): return FeatureCache(folder / "features", backbone)
    ours, raw = extraction(backbone, drawn[:512], runs)
    yield ("feature extraction, images/s, beside the raw open_clip forward at its best batch",
           ours, raw, .95 * raw, runs, False)
    cache = new_cache()
    cache.text(prompts)
    cache.get(paths[:1], prompts[:1], folder)
    took = timed(cache.get, paths, prompts, folder)
    yield ("from PNG files into the cache, images/s, beside the same raw forward",
           len(paths) / took, raw, None, 1, False)
    cache = new_cache()
    cache.get(paths, prompts, folder)
    took = median(timed(cache.get, paths, prompts, folder) for _ in range(5))
    yield "cache hits with all patches, images/s", len(paths) / took, None, 50_000., 5, False
    assert not cache.computed

def head_rows(folder, images, runs):
    found = [(heads(folder, images // 10), heads(folder, images)) for _ in range(runs)]
    small = median(f[0][0] for f in found)
    large, added, private, whole = (median(f[1][i] for f in found) for i in range(4))
    report, epochs = found[0][1][4:]
    yield (f"heads, 5 folds and floor, {images:,} images x 5 aspects x 4 raters, s ({epochs} epochs)",
           large, None, 20., runs, True)
    yield ("the same, memory added to the loaded libraries and backbone, GB at the peak",
           added, None, 1., runs, True)
    yield ("the same, private memory of the whole process, libraries included, GB at the peak",
           private, None, 1., runs, True)
    yield ("the same, all that is resident, mapped library files included, GB at the peak",
           whole, None, 1., runs, True)
    yield f"growth of the time from {images // 10:,} to {images:,} images", large / small, None, 11., runs, True
    for a, r in report.iterrows():
        beside = f"beside the linear floor [{r.plcc_low:.2f}, {r.plcc_high:.2f}]"
        yield f"held-out correlation of {a} ({r['head']}), {beside}", r.plcc, r.floor, None, 1, False

def shuffled_rows(folder, images, shuffles):
    figures = pd.concat([heads(folder, images, shuffle, 16)[4] for shuffle in range(1, shuffles + 1)])
    beyond = figures.plcc.abs() / figures.chance
    what = f"heads of {len(figures)} whose correlation is beyond its 95 % interval of 0 (see notebook 41_trust)"
    yield f"shuffled ratings: {what}", int((beyond > 1).sum()), None, 1. + len(figures) // 10, shuffles, True
    yield ("shuffled ratings: the largest correlation, in half widths of its interval",
           beyond.max(), None, 1.6, shuffles, True)
    yield "shuffled ratings: mean correlation, absolute", abs(figures.plcc.mean()), None, .05, shuffles, True

def rows_of(quick, folder):
    "All rows."
    images, runs = (2000, 1) if quick else (10_000, 3)
    drawn, metadata = draw(folder, images)
    torch.set_num_threads(THREADS)
    yield from feature_rows(quick, folder, drawn, metadata)
    yield from head_rows(folder, images, runs)
    yield from shuffled_rows(folder, min(images, 2000), 2 if quick else 4)

def row_of(figure, ours, peer, goal, runs, small):
    "A row as a machine reads it."
    def number(v): return None if v is None else float(v)
    met = None
    if goal is not None: met = bool(ours <= goal if small else ours >= goal)
    return dict(figure=figure, ours=float(ours), peer=number(peer), ratio=float(ours / peer) if peer else None,
                goal=number(goal), met=met, runs=runs, load=os.getloadavg()[0])

def line_of(row):
    "A row as people read it."
    def show(v): return "-" if v is None else f"{v:.4g}"
    said = {None: "", True: "met", False: "MISSED"}[row["met"]]
    return (f"{row['figure']:<92} ours {show(row['ours']):>8}  peer {show(row['peer']):>8}  "
            f"goal {show(row['goal']):>8}  load {row['load']:.1f}  {said}")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the images, one run; within three minutes")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options, rows = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        for figures in rows_of(options.quick, Path(folder)):
            rows.append(row_of(*figures))
            print(line_of(rows[-1]), flush=True)
    machine = dict(cpus=os.cpu_count(), machine=platform.machine(), python=platform.python_version(),
                   torch=torch.__version__)
    if options.json: options.json.write_text(json.dumps(dict(machine=machine, rows=rows), indent=1) + "\n")
    return 0 if all(r["met"] is not False for r in rows) else 1

if __name__ == "__main__": sys.exit(main())
