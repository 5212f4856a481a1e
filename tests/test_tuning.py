"""A tuning is killed at ten moments, three of them in the middle of writing a checkpoint, and goes on each time by the
same command: its end is that of an undisturbed run, to the bit. The attempts are forks of one process, which has
loaded everything once."""
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
import io, itertools, json, os, random, signal, subprocess, sys, time, traceback

from safetensors.torch import load_file, save_file
import numpy as np
import pytest
import torch

from mhrlhf.core.settings import TrainDSPOSettings
from mhrlhf.images.denoiser import Denoiser, encode_texts
from mhrlhf.images.models import load_pipeline
from mhrlhf.pocket.judge import load_judge
from mhrlhf.pocket.scenes import scene_batch
from mhrlhf.reward.features import to_pixels
from mhrlhf.reward.noise import NoiseHeads, RatedLatents, save_noise_heads, save_rated, unet_identity
from mhrlhf.tuning import dspo, loop
from mhrlhf.tuning.adapters import ADAPTER_FILE

KILLS, TORN = 10, {2: 1, 5: 2, 8: 1}  # attempts that are killed; those that end while they write their n-th checkpoint
LONGEST = 300   # seconds of an attempt that hangs
PICTURES, UPDATES = 16, 8

def prepare():
    """Noise-aware heads that have learnt nothing and a few rated pictures in a folder; the pipeline, and the judge in
    the place of the heads on CLIP."""
    torch.manual_seed(0)
    pipe, judge = load_pipeline("pocket", "cpu"), load_judge()
    denoiser = Denoiser(pipe)
    scenes, truth = scene_batch(PICTURES, np.random.default_rng(0))
    texts = [f.caption for f in truth]
    scores, unique = judge.score(scenes, texts), sorted({*texts})
    names, ratings = list(scores), torch.tensor(((scores - scores.mean()) / scores.std()).values, dtype=torch.float32)
    rows = torch.tensor([unique.index(t) for t in texts])
    rated = RatedLatents(denoiser.latents(to_pixels(scenes)), unique, encode_texts(pipe, unique), rows, ratings,
                         torch.ones(PICTURES, len(names)))
    Path("reward").mkdir()
    save_noise_heads(NoiseHeads(denoiser.channels(), names, members=1), unet_identity(pipe.unet), "reward")
    save_rated(rated, "reward")
    def score(images, prompts): return judge.score(images, prompts).assign(**{f"{a}_uncertainty": .5 for a in names})
    mean, std = (torch.tensor(v.values, dtype=torch.float32) for v in (scores.mean(), scores.std()))
    return pipe, SimpleNamespace(aspects=names, score=score, mean=mean, std=std)

def settings(output):
    return TrainDSPOSettings(reward_model=Path("reward"), output=Path(output), updates=UPDATES, watch_every=1, batch=2,
                             watched=2, watch_steps=2, rank=2, lr=3e-3, balance="equal")

def torn_at(number):
    "A function that writes checkpoints, the n-th of them only by half: then its process is killed."
    written = itertools.count(1)
    def save(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if next(written) < number: return
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return save

def begin(output, torn=0):
    "A process that tunes; one that is killed while it writes its n-th checkpoint, if that is given."
    if child := os.fork(): return child
    if torn: loop.save_file = torn_at(torn)
    code = 1
    try:
        with redirect_stdout(io.StringIO()): code = dspo.run(settings(output))
    except BaseException: traceback.print_exc()
    os._exit(code)

def looked(output):
    "When the latest checkpoint was written."
    latest = Path(output, "checkpoints/latest.safetensors")
    return latest.stat().st_mtime_ns if latest.exists() else 0

def kill(child, output, looks, seconds):
    "At a moment after so many looks."
    for _ in range(looks):
        before, ends = looked(output), time.monotonic() + LONGEST
        while looked(output) == before and time.monotonic() < ends: time.sleep(.002)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)

def ended(child): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def drive():
    "Undisturbed, then disturbed."
    torch.set_num_threads(1)
    pipe, reward = prepare()
    dspo.load_pipeline = lambda *arguments: pipe  # each fork has its own
    dspo.RewardModel = SimpleNamespace(load=lambda *arguments: reward)
    began, chance = time.monotonic(), random.Random(0)
    assert ended(begin("undisturbed")) == 0
    step = (time.monotonic() - began) / UPDATES
    for number in range(KILLS):
        child = begin("disturbed", TORN.get(number, 0))
        if number not in TORN: kill(child, "disturbed", chance.choice((0, 1)), chance.uniform(0, step / 2))
        assert ended(child) == -signal.SIGKILL, f"attempt {number} was not killed"
    assert ended(begin("disturbed")) == 0

@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    place = tmp_path_factory.mktemp("tuning")
    done = subprocess.run([sys.executable, __file__], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return place

def test_a_tuning_that_is_killed_ten_times_ends_where_an_undisturbed_one_ends(driven):
    def end(name):
        about = json.loads((driven / name / "dspo.json").read_text())
        files = ADAPTER_FILE, "checkpoints/latest.safetensors", "checkpoints/best.safetensors"
        return [load_file(driven / name / file) for file in files], about["history"], about["kept_update"]
    (tensors, *told), (others, *told_other) = end("undisturbed"), end("disturbed")
    assert told == told_other and len(told[0]) == UPDATES + 1
    for some, other in zip(tensors, others):
        assert some.keys() == other.keys() and all(torch.equal(some[k], other[k]) for k in some)

def test_what_was_half_written_is_swept_away(driven):
    names = {p.name for p in (driven / "disturbed/checkpoints").iterdir()}
    assert names == {"latest.safetensors", "best.safetensors", "run.json"}

if __name__ == "__main__": drive()
