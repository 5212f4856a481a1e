"""Generation beside a plain diffusers loop, on the pocket and the CPU: python benchmarks/generate.py [--quick] [--json FILE]

Every side is a process that has loaded the pipeline; the sides take turns, and the medians count. A side's work ends when
its PNG files lie on the disk. Ours includes the queue, the checks, the metadata and the restart safety."""
from pathlib import Path
from statistics import median
import argparse, json, multiprocessing, os, platform, sys, tempfile, time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
GUIDANCE = 4.

# The sides, each in a process of its own ---------------------------------------------------------------------

def plain(pipe, prompts, folder, batch, steps):
    "What a researcher would write: a loop over prompts, or over batches of them."
    import torch
    for at in range(0, len(prompts), batch):
        part = prompts[at:at + batch]
        made = pipe([p.prompt for p in part], num_inference_steps=steps, guidance_scale=GUIDANCE,
                    generator=[torch.Generator().manual_seed(at + i) for i in range(len(part))]).images
        for p, image in zip(part, made): image.save(folder/f"{p.prompt_id}.png")

def ours(settings, port, rank, world):
    "One of our workers."
    from torch.distributed import TCPStore
    from mhrlhf import generate
    generate.work(settings, generate.plan_tasks(settings), TCPStore("127.0.0.1", port, is_master=False), rank, world)

def side(connection, threads):
    "Load the pipeline, then do jobs as they come."
    import torch
    from mhrlhf import models
    torch.set_num_threads(threads)
    pipe = models.load_pipeline("pocket", "cpu")
    models.load_pipeline = lambda *a: pipe   # loaded once, as in a run; loading is not timed on either side
    connection.send("ready")
    for job, arguments in iter(connection.recv, None):
        started = time.perf_counter(), time.process_time()
        ours(*arguments) if job == "ours" else plain(pipe, *arguments)
        connection.send((time.perf_counter() - started[0], time.process_time() - started[1]))

class Side:
    def __init__(self, threads):
        self.connection, there = multiprocessing.get_context("spawn").Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=side, args=(there, threads), daemon=True); self.process.start()
    def ready(self): assert self.connection.recv() == "ready"; return self
    def start(self, job, *arguments): self.connection.send((job, arguments))
    def wait(self): return self.connection.recv()

# What is measured --------------------------------------------------------------------------------------------

def seconds_plain(worker, prompts, batch, steps):
    with tempfile.TemporaryDirectory() as folder: worker.start("plain", prompts, Path(folder), batch, steps); return worker.wait()[0]

def seconds_ours(workers, limit, steps):
    from torch.distributed import TCPStore
    from mhrlhf.settings import GenerateSettings
    with tempfile.TemporaryDirectory() as folder:
        server = TCPStore("127.0.0.1", 0, is_master=True)
        settings = GenerateSettings(prompts=ROOT/"data/prompts.csv", images=Path(folder)/"images", metadata=Path(folder)/"m.csv", seeds=1, limit=limit,
                                    steps=steps, guidance_scale=GUIDANCE, device="cpu", batch=8)
        for rank, w in enumerate(workers): w.start("ours", settings, server.port, rank, len(workers))
        return max(w.wait()[0] for w in workers)

def throughput(images, rounds, steps):
    "Seconds of each way, in turns."
    from mhrlhf.generate import read_prompts
    prompts = read_prompts(ROOT/"data/prompts.csv", images)
    both, a, b = Side(2), Side(1), Side(1)
    for s in (both, a, b): s.ready()
    batches = (4, 8, 16)
    ways = {"plain, one prompt at a time": lambda: seconds_plain(both, prompts, 1, steps), **{f"plain, batch {n}": lambda n=n: seconds_plain(both, prompts, n, steps) for n in batches},
            "ours, one worker": lambda: seconds_ours([a], images, steps), "ours, two workers": lambda: seconds_ours([a, b], images, steps)}
    for way in ways.values(): way()   # warm
    taken = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items(): taken[name].append(way())
    for s in (both, a, b): s.connection.send(None); s.process.join()
    return {name: images / median(t) for name, t in taken.items()}

def claim_seconds(tasks):
    "Processor and waiting time of one claim and one report, with so many images queued."
    from torch.distributed import TCPStore
    from mhrlhf.generate import Queue
    server = TCPStore("127.0.0.1", 0, is_master=True); queue = Queue(TCPStore("127.0.0.1", server.port, is_master=False), tasks, 8)
    start = time.perf_counter()
    for _ in range(2000): queue.claim(); queue.exhausted(); queue.add("done/0", 8); queue.add("failed", 0)
    return (time.perf_counter() - start) / 2000

def scan_seconds(images):
    "Looking at so many images that are there, without and with their rows."
    import numpy as np
    from mhrlhf.generate import Prompt, Task, _known_rows, missing_images, order_metadata, write_image
    with tempfile.TemporaryDirectory() as folder:
        tasks = [Task(Prompt(f"p{i:05}", "a fox"), s, f"{folder}/images/p{i:05}/{s}.png") for i in range(images // 20) for s in range(20)]
        write_image(tasks[0].path, np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)); data = Path(tasks[0].path).read_bytes()
        for t in tasks: Path(t.path).parent.mkdir(parents=True, exist_ok=True); Path(t.path).write_bytes(data)
        start = time.perf_counter(); assert not missing_images(tasks, {}); without = time.perf_counter() - start
        order_metadata(Path(folder)/"m.csv", tasks, [])
        start = time.perf_counter(); assert not missing_images(tasks, _known_rows(Path(folder)/"m.csv")); return without, time.perf_counter() - start

# The table ---------------------------------------------------------------------------------------------------

def row(figure, ours, peer, ratio, goal, runs, at_least=True):
    return dict(figure=figure, ours=round(ours, 4), peer=round(peer, 4), ratio=round(ratio, 4), goal=goal, met=bool(ratio >= goal if at_least else ratio <= goal), runs=runs)

def measure(quick, steps):
    images, rounds, scanned = (32, 3, 10_000) if quick else (64, 7, 100_000)
    speed = throughput(images, rounds, steps)
    two, one, single = speed["ours, two workers"], speed["ours, one worker"], speed["plain, one prompt at a time"]
    best = max(v for k, v in speed.items() if k.startswith("plain, batch"))
    claims = {n: median(claim_seconds(n) for _ in range(3)) for n in (100, 10_000)}
    batch = 8 / one
    without, known = scan_seconds(scanned)
    return speed, [
        row("images/s: two workers / plain loop, one prompt at a time, 2 threads", two, single, two / single, 2., rounds),
        row("images/s: two workers / plain loop at its best batch, 2 threads", two, best, two / best, 1.15, rounds),
        row("images/s: two workers / one worker, one thread each", two, one, two / one, 1.9, rounds),
        row("queue's share of a worker's time", claims[10_000], batch, claims[10_000] / batch, .01, 3, False),
        row("s a batch at 10,000 queued images / at 100", batch + claims[10_000], batch + claims[100], (batch + claims[10_000]) / (batch + claims[100]), 1.02, 3, False),
        row(f"s to look at {scanned:,} images / the same share of 10 s", known, 10 * scanned / 100_000, known / (10 * scanned / 100_000), 1., 1, False),
        row(f"the same without their rows, every file read", without, 10 * scanned / 100_000, without / (10 * scanned / 100_000), 1., 1, False)]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images: within three minutes"); parser.add_argument("--json", help="also write the figures here"); parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    options = parser.parse_args()
    speed, rows = measure(options.quick, options.steps)
    machine = dict(processor=platform.processor() or platform.machine(), cores=os.cpu_count(), load=round(os.getloadavg()[0], 1), python=platform.python_version())
    print("  ".join(f"{k} {v}" for k, v in machine.items()))
    for name, value in speed.items(): print(f"{name:<32}{value:8.2f} images/s")
    print(f"\n{'figure':<72}{'ours':>10}{'peer':>10}{'ratio':>9}{'goal':>7}  met")
    for r in rows: print(f"{r['figure']:<72}{r['ours']:>10.4g}{r['peer']:>10.4g}{r['ratio']:>9.3g}{r['goal']:>7}  {'yes' if r['met'] else 'NO'}")
    if options.json: Path(options.json).write_text(json.dumps(dict(machine=machine, rows=rows), indent=1) + "\n")
    return 0

if __name__ == "__main__": sys.exit(main())
