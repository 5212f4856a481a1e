"""Generation beside a plain diffusers loop: python benchmarks/generate.py [--quick] [--json FILE].

On the pocket and the CPU every side is a process that has loaded the pipeline; the sides take turns, and the medians
count. A side's work ends when its PNG files lie on the disk. Ours includes the checks before the start, the queue,
the metadata and the restart safety. SDXL's own shape on a GPU: benchmarks/full_size.py."""
from contextlib import contextmanager
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
    import torch
    from torch.distributed import TCPStore
    from mhrlhf.images.generate import share_missing
    from mhrlhf.images.queue import work
    store = TCPStore("127.0.0.1", port, is_master=False)
    plan, missing = share_missing(settings, torch.device("cpu"), store, rank, print)
    work(plan, [plan.tasks[i] for i in missing], store, rank, world)

def loaded(kind):
    "The pipeline, loaded once, as in a run; loading is not timed on either side."
    import torch
    from diffusers import StableDiffusionXLPipeline
    from mhrlhf.images import models, queue
    models.quiet_libraries()
    if kind == "ours":
        pipe = models.load_pipeline("pocket", "cpu")
        queue.load_pipeline = lambda *a: pipe
        return pipe
    pipe = StableDiffusionXLPipeline.from_pretrained(models.pocket_folder("sdxl"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def side(connection, threads, kind):
    "Load the pipeline, then do jobs as they come."
    import torch
    torch.set_num_threads(threads)
    pipe = loaded(kind)
    connection.send("ready")
    for job, arguments in iter(connection.recv, None):
        started = time.perf_counter()
        if job == "ours": ours(*arguments)
        else: plain(pipe, *arguments)
        connection.send(time.perf_counter() - started)

class Side:
    def __init__(self, kind, threads):
        spawn = multiprocessing.get_context("spawn")
        self.connection, there = spawn.Pipe()
        self.process = spawn.Process(target=side, args=(there, threads, kind), daemon=True)
        self.process.start()
    def ready(self): assert self.connection.recv() == "ready"
    def start(self, job, *arguments): self.connection.send((job, arguments))
    def wait(self): return self.connection.recv()
    def end(self):
        self.connection.send(None)
        self.process.join()

# What is measured --------------------------------------------------------------------------------------------

def seconds_plain(sides, prompts, batch, steps):
    "Each of the sides makes its share of the prompts."
    with tempfile.TemporaryDirectory() as folder:
        for i, w in enumerate(sides): w.start("plain", prompts[i::len(sides)], Path(folder), batch, steps)
        return max(w.wait() for w in sides)

def in_folder(folder, prompts=ROOT/"data/prompts.csv"):
    "Settings of a run whose files lie in one folder."
    return dict(prompts=prompts, images=Path(folder)/"images", metadata=Path(folder)/"m.csv", seeds=1)

def seconds_ours(workers, limit, steps):
    from torch.distributed import TCPStore
    from mhrlhf.core.settings import GenerateSettings
    with tempfile.TemporaryDirectory() as folder:
        server = TCPStore("127.0.0.1", 0, is_master=True)
        settings = GenerateSettings(**in_folder(folder), limit=limit, steps=steps, guidance_scale=GUIDANCE,
                                    device="cpu", batch=8)
        for rank, w in enumerate(workers): w.start("ours", settings, server.port, rank, len(workers))
        return max(w.wait() for w in workers)

def throughput(images, rounds, steps):
    "Seconds of each way in each round; the first round, of few images, warms up and does not count."
    from mhrlhf.core.prompts import read_prompts
    both = Side("plain", 2)
    plain, ours = [Side("plain", 1), Side("plain", 1)], [Side("ours", 1), Side("ours", 1)]
    every = [both, *plain, *ours]
    for s in every: s.ready()
    ways = {"plain, one prompt at a time": lambda prompts: seconds_plain([both], prompts, 1, steps)}
    for n in (8, 16, 32): ways[f"plain, batch {n}"] = lambda prompts, n=n: seconds_plain([both], prompts, n, steps)
    ways |= {"plain, one thread": lambda prompts: seconds_plain(plain[:1], prompts, 8, steps),
             "plain, two processes": lambda prompts: seconds_plain(plain, prompts, 8, steps),
             "ours, one worker": lambda prompts: seconds_ours(ours[:1], len(prompts), steps),
             "ours, two workers": lambda prompts: seconds_ours(ours, len(prompts), steps)}
    taken = {name: [] for name in ways}
    for turn in range(rounds + 1):
        prompts = read_prompts(ROOT/"data/prompts.csv", images if turn else 16)
        for name, way in ways.items(): taken[name].append(way(prompts))
    for s in every: s.end()
    return {name: seconds[1:] for name, seconds in taken.items()}

def claim_seconds(tasks):
    "Processor and waiting time of one claim and one report, with so many images queued."
    from torch.distributed import TCPStore
    from mhrlhf.images.queue import Queue
    server = TCPStore("127.0.0.1", 0, is_master=True)
    queue = Queue(TCPStore("127.0.0.1", server.port, is_master=False), tasks, 8)
    start = time.perf_counter()
    for _ in range(2000):
        queue.claim()
        queue.exhausted()
        queue.add("done/0", 8)
        queue.add("failed", 0)
    return (time.perf_counter() - start) / 2000

@contextmanager
def replaced(module, **others):
    "Other functions in a module's place."
    before = {name: getattr(module, name) for name in others}
    for name, other in others.items(): setattr(module, name, other)
    try: yield
    finally:
        for name, own in before.items(): setattr(module, name, own)

def noise():
    "Eight pictures, (8, 64, 64, 3)."
    import numpy as np
    return np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8)

def overhead_seconds(prompts):
    "What an image costs beside its sampling, with so many prompts queued: the sampler gives one and the same picture."
    from torch.distributed import HashStore
    from mhrlhf.core.settings import GenerateSettings
    from mhrlhf.images import models, queue
    from mhrlhf.images.generate import prepare
    from mhrlhf.images.plan import make_plan
    pictures, pipe = noise(), models.load_pipeline("pocket", "cpu")
    class Still:
        def __init__(self, pipe, sampling, say): self.batch, self.device = 8, pipe.device
        def __call__(self, prompts, seeds, last): return pictures[:len(prompts)], [True] * len(prompts)
    others = dict(load_pipeline=lambda *a: pipe, Sampler=Still, warn_of_long_prompts=lambda *a: None)
    with tempfile.TemporaryDirectory() as folder, replaced(queue, **others):
        path = Path(folder)/"p.csv"
        path.write_text("prompt_id,prompt\n" + "".join(f"p{i:06},a fox\n" for i in range(prompts)))
        start = time.perf_counter()
        plan = make_plan(GenerateSettings(**in_folder(folder, path)))
        queue.work(plan, [plan.tasks[i] for i in prepare(plan)], HashStore())
        return (time.perf_counter() - start) / prompts

def scan_seconds(images):
    "Looking at so many images that are there, without and with their rows."
    from mhrlhf.core.prompts import Prompt
    from mhrlhf.images.metadata import known_rows, order_metadata, write_image
    from mhrlhf.images.plan import Task
    from mhrlhf.images.queue import missing_images
    with tempfile.TemporaryDirectory() as folder:
        tasks = [Task(Prompt(f"p{i:05}", "a fox"), s, f"{folder}/images/p{i:05}/{s}.png")
                 for i in range(images // 20) for s in range(20)]
        write_image(tasks[0].path, noise()[0])
        data = Path(tasks[0].path).read_bytes()
        for t in tasks:
            Path(t.path).parent.mkdir(parents=True, exist_ok=True)
            Path(t.path).write_bytes(data)
        start = time.perf_counter()
        assert not missing_images(tasks, {})
        without = time.perf_counter() - start
        order_metadata(Path(folder)/"m.csv", tasks, [])
        start = time.perf_counter()
        assert not missing_images(tasks, known_rows(Path(folder)/"m.csv"))
        return without, time.perf_counter() - start

# The table ---------------------------------------------------------------------------------------------------

def row(figure, ours, peer, ratio, goal, runs, at_least=True):
    met = ratio >= goal if at_least else ratio <= goal
    return dict(figure=figure, ours=round(ours, 4), peer=round(peer, 4), ratio=round(ratio, 4), goal=goal,
                met=bool(met), runs=runs)

def cost(figure, ours, most, goal, runs):
    "A figure that is to stay below its goal."
    return row(figure, ours, most, ours / most, goal, runs, at_least=False)

def compare(figure, taken, one, other, goal, images):
    "How many times as fast one way is as another: the median over rounds, in each of which both ran."
    ratio = median(b / a for a, b in zip(taken[one], taken[other]))
    return row(figure, images / median(taken[one]), images / median(taken[other]), ratio, goal, len(taken[one]))

def speed_rows(taken, images):
    "Images per second of two workers beside the other ways."
    best = min((k for k in taken if k.startswith("plain, batch")), key=lambda k: median(taken[k]))
    two, one, alone = "ours, two workers", "ours, one worker", "plain, one prompt at a time"
    return [compare("images/s: two workers / plain loop, one prompt at a time, 2 threads", taken, two, alone,
                    2., images),
            compare("images/s: two workers / plain loop at its best batch, 2 threads", taken, two, best, 1.15, images),
            compare("images/s: two workers / one worker, one thread each", taken, two, one, 1.9, images),
            compare("(what the machine gives: two plain processes / one)", taken, "plain, two processes",
                    "plain, one thread", 0., images)]

def cost_rows(image, scanned):
    "What the queue, the metadata and the start cost, where an image takes a worker so many seconds."
    claim = median(claim_seconds(10_000) for _ in range(3))
    few, many = (image + median(overhead_seconds(n) for _ in range(3)) for n in (100, 10_000))
    without, known = scan_seconds(scanned)
    share = 10 * scanned / 100_000  # seconds, of ten for a hundred thousand images
    return [cost("queue's share of a worker's time", claim, 8 * image, .01, 3),
            cost("s an image at 10,000 queued prompts / at 100, all but sampling measured anew", many, few, 1.02, 3),
            cost(f"s to look at {scanned:,} images / the same share of 10 s", known, share, 1., 1),
            cost("the same without their rows, every file read", without, share, 1., 1)]

def measure(quick, steps):
    images, rounds, scanned = (32, 2, 10_000) if quick else (48, 3, 100_000)
    taken = throughput(images, rounds, steps)
    rows = speed_rows(taken, images) + cost_rows(median(taken["ours, one worker"]) / images, scanned)
    for name, t in taken.items(): print(f"{name:<32}{images / median(t):8.2f} images/s")
    return rows

# The command -------------------------------------------------------------------------------------------------

def read_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images: within three minutes")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    return parser.parse_args()

def print_table(rows):
    print(f"\n{'figure':<80}{'ours':>10}{'peer':>10}{'ratio':>9}{'goal':>7}  met")
    for r in rows:
        met = "" if not r["goal"] else "yes" if r["met"] else "NO"
        numbers = f"{r['ours']:>10.4g}{r['peer']:>10.4g}{r['ratio']:>9.3g}{r['goal'] or '':>7}"
        print(f"{r['figure']:<80}{numbers}  {met}")

def main():
    options = read_options()
    machine = dict(processor=platform.processor() or platform.machine(), cores=os.cpu_count(),
                   load=round(os.getloadavg()[0], 1), python=platform.python_version())
    print("  ".join(f"{k} {v}" for k, v in machine.items()))
    rows = measure(options.quick, options.steps)
    print_table(rows)
    if options.json: Path(options.json).write_text(json.dumps(dict(machine=machine, rows=rows), indent=1) + "\n")
    return 0

if __name__ == "__main__": sys.exit(main())
