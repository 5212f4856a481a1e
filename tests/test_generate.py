"""Generation as commands and as processes: what the notebook 10_generate cannot show."""
from pathlib import Path
import os, time

import numpy as np
import pytest
from PIL import Image

from mhrlhf.generate import (Prompt, Queue, Task, image_seed, missing_images, one_thread, order_metadata, plan_tasks, prepare, read_metadata,
                             read_prompts, work, write_image)
from mhrlhf.pocket.scenes import parse_caption, unseen_captions
from mhrlhf.settings import GenerateSettings

ROOT = Path(__file__).parent.parent

@pytest.fixture(scope="module")
def pipe():
    from mhrlhf.models import load_pipeline
    return load_pipeline("pocket")

def by_workers(settings, workers, pipe, monkeypatch):
    "Forked workers on a real queue, with a pipeline that is loaded already; returns path -> pixels."
    from torch.distributed import TCPStore
    monkeypatch.setattr("mhrlhf.models.load_pipeline", lambda *a: pipe)
    tasks, missing = prepare(settings)
    server, pids = TCPStore("127.0.0.1", 0, is_master=True), []
    for rank in range(workers):
        if pid := os.fork(): pids.append(pid); continue
        try:
            with one_thread(): work(settings, [tasks[i] for i in missing], TCPStore("127.0.0.1", server.port, is_master=False), rank, workers)
        finally: os._exit(0)
    for pid in pids: os.waitpid(pid, 0)
    return {p.relative_to(settings.images).as_posix(): np.asarray(Image.open(p)) for p in sorted(settings.images.glob("*/*.png"))}

def in_folder(folder, **options):
    return GenerateSettings(prompts=ROOT/"data/prompts.csv", images=folder/"images", metadata=folder/"generated.csv", steps=2, **options)

def test_any_number_of_workers_makes_the_same_images(tmp_path, pipe, monkeypatch):
    "Equal to the bit at equal batch size: with one worker, two and four, and with a run that found some images there."
    made = {n: by_workers(in_folder(tmp_path/str(n), limit=9, batch=2), n, pipe, monkeypatch) for n in (1, 2, 4)}
    again = in_folder(tmp_path/"4", limit=9, batch=2)
    for t in plan_tasks(again)[1::3]: os.unlink(t.path)
    made["again"] = by_workers(again, 2, pipe, monkeypatch)
    assert len(made[1]) == 18
    for images in made.values(): assert images.keys() == made[1].keys() and all((images[p] == made[1][p]).all() for p in images)
    table = read_metadata(tmp_path/"2"/"generated.csv")
    assert len(table) == 18 and not table.image_path.duplicated().any() and set(table.worker) <= {"0", "1"}

def test_other_batch_sizes_differ_by_rounding_only(tmp_path, pipe, monkeypatch):
    one, four = (by_workers(in_folder(tmp_path/str(b), limit=2, batch=b), 1, pipe, monkeypatch) for b in (1, 4))
    assert max(np.abs(one[p].astype(int) - four[p]).max() for p in one) <= 1

def test_growth():
    "A claim costs the same at ten thousand batches as at a hundred."
    from torch.distributed import TCPStore
    def seconds(tasks):
        server = TCPStore("127.0.0.1", 0, is_master=True); queue = Queue(TCPStore("127.0.0.1", server.port, is_master=False), tasks, 8)
        queue.claim(); start = time.process_time()
        for _ in range(1000): queue.claim()
        return (time.process_time() - start) / 1000
    assert min(seconds(80_000) for _ in range(3)) < 1e-3  # the pocket needs 0.1 s an image, so less than one per cent

def test_start_looks_at_100_000_images_in_seconds(tmp_path):
    "10,000 here, in less than a second of processor time."
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    tasks = [Task(Prompt(f"p{i:05}", "a fox"), s, f"{tmp_path}/images/p{i:05}/{s}.png") for i in range(500) for s in range(20)]
    write_image(tasks[0].path, image); data = Path(tasks[0].path).read_bytes()
    for t in tasks: Path(t.path).parent.mkdir(parents=True, exist_ok=True); Path(t.path).write_bytes(data)
    start = time.process_time(); assert missing_images(tasks, {}) == []; unknown = time.process_time() - start
    order_metadata(tmp_path/"m.csv", tasks, [])
    rows = {r["image_path"]: r for r in read_metadata(tmp_path/"m.csv").astype(str).to_dict("records")}
    Path(tasks[7].path).unlink(); Path(tasks[8].path).write_bytes(data[:-1]); Path(tasks[9].path).write_bytes(data[:-5] + b"wrong")
    start = time.process_time(); assert missing_images(tasks, rows) == [7, 8, 9]; known = time.process_time() - start
    print(f"100,000 images: {10 * known:.1f} s with their rows, {10 * unknown:.1f} s without")
    assert known < 1 and unknown < 2

def test_shipped_prompts():
    train, held_out = read_prompts(ROOT/"data/prompts.csv"), read_prompts(ROOT/"data/prompts_heldout.csv")
    texts, other = {p.prompt for p in train}, {p.prompt for p in held_out}
    assert (len(texts), len(other)) == (720, 128) and not texts & other
    assert not texts & unseen_captions() and len(other & unseen_captions()) == 64
    for prompts in (train, held_out):
        counts = np.bincount([parse_caption(p.prompt)[1] for p in prompts]); assert counts.min() == counts.max() and len(counts) == 4
        counts = np.bincount([parse_caption(p.prompt)[2] for p in prompts]); assert counts.min() == counts.max() and len(counts) == 8
    for name in ("prompts_art", "prompts_art_heldout"): assert len({p.genre for p in read_prompts(ROOT/f"data/{name}.csv")}) >= 4

def test_a_seed_stays_what_it_was():
    "Images of earlier runs can be made again: the hash never changes."
    assert image_seed("p000", 0) == 5705806347791850835
