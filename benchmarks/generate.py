"""Generation beside a plain diffusers loop: python benchmarks/generate.py [--quick] [--json FILE], on a GPU --sdxl.

On the pocket and the CPU every side is a process that has loaded the pipeline; the sides take turns, and the medians
count. A side's work ends when its PNG files lie on the disk. Ours includes the checks before the start, the queue,
the metadata and the restart safety. With --sdxl both sides run SDXL's own shape, with random weights from its
published configuration, in this process."""
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

# SDXL's shape ------------------------------------------------------------------------------------------------

TFLOP, RATE = 416., 790.   # of an image at 1024 x 1024, 30 steps, with guidance; per second, of an H200 in bfloat16

def sdxl_networks(device):
    "UNet, VAE and text encoders of SDXL base 1.0 as its configuration describes them, with random weights."
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=1024,
            scaling_factor=.13025, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
        one = CLIPTextModel(CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768))
        two = CLIPTextModelWithProjection(CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
            projection_dim=1280, hidden_act="gelu"))
    return unet, vae, one, two

def sdxl_shape(device):
    "A pipeline of SDXL's shape in bfloat16."
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from mhrlhf.images.models import load_pipeline
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try: unet, vae, one, two = sdxl_networks(device)
    finally: torch.set_default_dtype(before)
    tokenizer = load_pipeline("pocket", "cpu").tokenizer
    scheduler = EulerDiscreteScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear",
                                       steps_offset=1, timestep_spacing="leading")
    pipe = StableDiffusionXLPipeline(vae, one, two, tokenizer, tokenizer, unet, scheduler, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe

@contextmanager
def memory(device, found):
    "The most GB that were held at once."
    import torch
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    yield
    if gpu: torch.cuda.synchronize()
    found.append(torch.cuda.max_memory_allocated() / 2**30 if gpu else float("nan"))

def timed(way, batch, device, rounds=3):
    "Images per minute and GB of one way: the median of some rounds after a first one."
    taken, held = [], []
    for _ in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder, memory(device, held):
            start = time.perf_counter()
            way(batch, folder)
            taken.append(time.perf_counter() - start)
    return 60 * 2 * batch / median(taken[1:]), max(held)

def sdxl_ways(pipe, side, steps, most):
    "Two batches by the plain pipeline and by ours, each a function of the batch and a folder."
    import torch
    from torch.distributed import HashStore
    from mhrlhf.core.prompts import read_prompts
    from mhrlhf.core.settings import GenerateSettings
    from mhrlhf.images.plan import make_plan
    from mhrlhf.images.queue import work
    prompts = read_prompts(ROOT/"data/prompts.csv", 2 * most)
    def plain_way(batch, folder):
        for at in range(0, 2 * batch, batch):
            texts = [p.prompt for p in prompts[at:at + batch]]
            generators = [torch.Generator().manual_seed(i) for i in range(batch)]
            made = pipe(texts, num_inference_steps=steps, guidance_scale=5., width=side, height=side,
                        generator=generators).images
            for i, image in enumerate(made): image.save(Path(folder)/f"{at + i}.png")
    def our_way(batch, folder):
        plan = make_plan(GenerateSettings(**in_folder(folder), limit=2 * batch, steps=steps, guidance_scale=5.,
                                          width=side, height=side, batch=batch))
        work(plan, plan.tasks, HashStore())
    return plain_way, our_way

def print_sdxl(rows, device, side, steps):
    import torch
    def share(per_minute): return per_minute * TFLOP * (side / 1024) ** 2 * (steps / 30) / 60 / RATE
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{gpu}, {side} x {side}, {steps} steps")
    heads = f"{'batch':>5}{'plain/min':>11}{'ours/min':>10}{'ratio':>7}{'of 790 TFLOP/s':>16}"
    print(heads + f"{'plain GB':>10}{'ours GB':>9}")
    for r in rows:
        (p, pm), (o, om) = r["plain"], r["ours"]
        print(f"{r['batch']:>5}{p:>11.2f}{o:>10.2f}{o / p:>7.2f}{share(o):>16.1%}{pm:>10.1f}{om:>9.1f}", flush=True)

def measure_sdxl(side, steps, batches):
    "Images per minute of SDXL's shape at each batch, plain diffusers beside ours, in turns."
    from mhrlhf.core.devices import choose_device
    from mhrlhf.images import queue, sampler
    device = choose_device()
    pipe = sdxl_shape(device)
    queue.load_pipeline = lambda *a: pipe
    queue.memory_note = lambda *a: ""             # it would read the pocket's configuration
    sampler.image_is_sound = lambda image: True   # random weights draw nothing that could be judged
    sampler.Sampler.release_text = lambda self: None   # once in a run of thousands, not in each of these small ones
    plain_way, our_way = sdxl_ways(pipe, side, steps, max(batches))
    # all plain ones first: compiled blocks stay compiled
    rows = [dict(batch=batch, plain=timed(plain_way, batch, device)) for batch in batches]
    if device.type == "cuda": pipe.unet.compile_repeated_blocks(fullgraph=True)
    for r in rows: r["ours"] = timed(our_way, r["batch"], device)
    print_sdxl(rows, device, side, steps)
    figures = []
    for r in rows:
        ours, plain = r["ours"][0], r["plain"][0]
        name = f"SDXL's shape, images/min at batch {r['batch']}: ours / plain"
        figures.append(row(name, ours, plain, ours / plain, 1., 3))
    top = max(r["ours"][0] for r in rows)
    return [*figures, row("SDXL's shape, images/min at the best batch / 65", top, 65., top / 65, 1., 3)]

# The command -------------------------------------------------------------------------------------------------

def read_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images: within three minutes")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--steps", type=int, default=0, help="denoising steps; default: 20, with --sdxl 30")
    parser.add_argument("--sdxl", action="store_true",
                        help="SDXL's shape on this machine's GPU, random weights, instead of the pocket on the CPU")
    parser.add_argument("--side", type=int, default=1024, help="pixels, of --sdxl")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of --sdxl")
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
    if options.sdxl: rows = measure_sdxl(options.side, options.steps or 30, options.batches)
    else: rows = measure(options.quick, options.steps or 20)
    print_table(rows)
    if options.json: Path(options.json).write_text(json.dumps(dict(machine=machine, rows=rows), indent=1) + "\n")
    return 0

if __name__ == "__main__": sys.exit(main())
