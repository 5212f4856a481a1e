"""Generation beside a plain diffusers loop: python benchmarks/generate.py [--quick] [--json FILE], or with --sdxl on a GPU.

On the pocket and the CPU every side is a process that has loaded the pipeline; the sides take turns, and the medians count.
A side's work ends when its PNG files lie on the disk. Ours includes the checks before the start, the queue, the metadata and the restart safety.
With --sdxl both sides run SDXL's own shape, with random weights from its published configuration, in this process."""
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
    from torch.distributed import TCPStore
    from mhrlhf import generate
    store = TCPStore("127.0.0.1", port, is_master=False)
    generate.work(settings, generate._share_missing(store, rank, settings, print), store, rank, world)

def side(connection, threads, kind):
    "Load the pipeline, then do jobs as they come."
    import torch
    from diffusers import StableDiffusionXLPipeline
    from mhrlhf import models
    torch.set_num_threads(threads)
    models._quiet()
    if kind == "ours": pipe = models.load_pipeline("pocket", "cpu"); models.load_pipeline = lambda *a: pipe   # loaded once, as in a run; loading is not timed on either side
    else: pipe = StableDiffusionXLPipeline.from_pretrained(models.pocket_folder("sdxl"), dtype=torch.float32); pipe.set_progress_bar_config(disable=True)
    connection.send("ready")
    for job, arguments in iter(connection.recv, None):
        started = time.perf_counter()
        ours(*arguments) if job == "ours" else plain(pipe, *arguments)
        connection.send(time.perf_counter() - started)

class Side:
    def __init__(self, kind, threads):
        self.connection, there = multiprocessing.get_context("spawn").Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=side, args=(there, threads, kind), daemon=True); self.process.start()
    def ready(self): assert self.connection.recv() == "ready"; return self
    def start(self, job, *arguments): self.connection.send((job, arguments))
    def wait(self): return self.connection.recv()

# What is measured --------------------------------------------------------------------------------------------

def seconds_plain(sides, prompts, batch, steps):
    "Each of the sides makes its share of the prompts."
    with tempfile.TemporaryDirectory() as folder:
        for i, w in enumerate(sides): w.start("plain", prompts[i::len(sides)], Path(folder), batch, steps)
        return max(w.wait() for w in sides)

def seconds_ours(workers, limit, steps):
    from torch.distributed import TCPStore
    from mhrlhf.core.settings import GenerateSettings
    with tempfile.TemporaryDirectory() as folder:
        server = TCPStore("127.0.0.1", 0, is_master=True)
        settings = GenerateSettings(prompts=ROOT/"data/prompts.csv", images=Path(folder)/"images", metadata=Path(folder)/"m.csv", seeds=1, limit=limit,
                                    steps=steps, guidance_scale=GUIDANCE, device="cpu", batch=8)
        for rank, w in enumerate(workers): w.start("ours", settings, server.port, rank, len(workers))
        return max(w.wait() for w in workers)

def throughput(images, rounds, steps):
    "Seconds of each way in each round; the first round, of few images, warms up and does not count."
    from mhrlhf.core.prompts import read_prompts
    both, plain, ours = Side("plain", 2), [Side("plain", 1), Side("plain", 1)], [Side("ours", 1), Side("ours", 1)]
    for s in (every := [both, *plain, *ours]): s.ready()
    ways = {"plain, one prompt at a time": lambda prompts: seconds_plain([both], prompts, 1, steps), **{f"plain, batch {n}": lambda prompts, n=n: seconds_plain([both], prompts, n, steps) for n in (8, 16, 32)},
            "plain, one thread": lambda prompts: seconds_plain(plain[:1], prompts, 8, steps), "plain, two processes": lambda prompts: seconds_plain(plain, prompts, 8, steps),
            "ours, one worker": lambda prompts: seconds_ours(ours[:1], len(prompts), steps), "ours, two workers": lambda prompts: seconds_ours(ours, len(prompts), steps)}
    taken = {name: [] for name in ways}
    for turn in range(rounds + 1):
        prompts = read_prompts(ROOT/"data/prompts.csv", images if turn else 16)
        for name, way in ways.items(): taken[name].append(way(prompts))
    for seconds in taken.values(): del seconds[0]
    for s in every: s.connection.send(None); s.process.join()
    return taken

def claim_seconds(tasks):
    "Processor and waiting time of one claim and one report, with so many images queued."
    from torch.distributed import TCPStore
    from mhrlhf.images.queue import Queue
    server = TCPStore("127.0.0.1", 0, is_master=True); queue = Queue(TCPStore("127.0.0.1", server.port, is_master=False), tasks, 8)
    start = time.perf_counter()
    for _ in range(2000): queue.claim(); queue.exhausted(); queue.add("done/0", 8); queue.add("failed", 0)
    return (time.perf_counter() - start) / 2000

def overhead_seconds(prompts):
    "What an image costs beside its sampling, with so many prompts queued: a worker whose sampler gives one and the same picture."
    import numpy as np
    from torch.distributed import HashStore
    from mhrlhf import generate, models
    from mhrlhf.core.settings import GenerateSettings
    picture = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8)
    class Still:
        def __init__(self, pipe, settings, say): self.settings, self.batch, self.device, self.slowest = settings, 8, "cpu", 0.
        def __call__(self, prompts, seeds, last): return picture[:len(prompts)], [True] * len(prompts)
    before = models.load_pipeline, generate.Sampler, generate.warn_of_long_prompts
    pipe = models.load_pipeline("pocket", "cpu")
    models.load_pipeline, generate.Sampler, generate.warn_of_long_prompts = lambda *a: pipe, Still, lambda *a: None
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder)/"p.csv").write_text("prompt_id,prompt\n" + "".join(f"p{i:06},a fox\n" for i in range(prompts)))
            settings = GenerateSettings(prompts=Path(folder)/"p.csv", images=Path(folder)/"images", metadata=Path(folder)/"m.csv", seeds=1)
            start = time.perf_counter(); tasks, missing = generate.prepare(settings); generate.work(settings, [tasks[i] for i in missing], HashStore())
            return (time.perf_counter() - start) / prompts
    finally: models.load_pipeline, generate.Sampler, generate.warn_of_long_prompts = before

def scan_seconds(images):
    "Looking at so many images that are there, without and with their rows."
    import numpy as np
    from mhrlhf.core.prompts import Prompt
    from mhrlhf.images.metadata import _known_rows, order_metadata, write_image
    from mhrlhf.images.queue import Task, missing_images
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

def compare(figure, taken, one, other, goal, images):
    "How many times as fast one way is as another: the median over rounds, in each of which both ran."
    ratio = median(b / a for a, b in zip(taken[one], taken[other]))
    return row(figure, images / median(taken[one]), images / median(taken[other]), ratio, goal, len(taken[one]))

def measure(quick, steps):
    images, rounds, scanned = (32, 2, 10_000) if quick else (48, 3, 100_000)
    taken = throughput(images, rounds, steps)
    best = min((k for k in taken if k.startswith("plain, batch")), key=lambda k: median(taken[k]))
    claim, beside = median(claim_seconds(10_000) for _ in range(3)), {n: median(overhead_seconds(n) for _ in range(3)) for n in (100, 10_000)}
    image = median(taken["ours, one worker"]) / images
    without, known = scan_seconds(scanned)
    two, one = "ours, two workers", "ours, one worker"
    rows = [compare("images/s: two workers / plain loop, one prompt at a time, 2 threads", taken, two, "plain, one prompt at a time", 2., images),
            compare("images/s: two workers / plain loop at its best batch, 2 threads", taken, two, best, 1.15, images),
            compare("images/s: two workers / one worker, one thread each", taken, two, one, 1.9, images),
            compare("(what the machine gives: two plain processes / one)", taken, "plain, two processes", "plain, one thread", 0., images),
            row("queue's share of a worker's time", claim, 8 * image, claim / (8 * image), .01, 3, False),
            row("s an image at 10,000 queued prompts / at 100, all but sampling measured anew", image + beside[10_000], image + beside[100], (image + beside[10_000]) / (image + beside[100]), 1.02, 3, False),
            row(f"s to look at {scanned:,} images / the same share of 10 s", known, 10 * scanned / 100_000, known / (10 * scanned / 100_000), 1., 1, False),
            row("the same without their rows, every file read", without, 10 * scanned / 100_000, without / (10 * scanned / 100_000), 1., 1, False)]
    for name, t in taken.items(): print(f"{name:<32}{images / median(t):8.2f} images/s")
    return rows

# SDXL's shape ------------------------------------------------------------------------------------------------

TFLOP, RATE = 416., 790.   # of an image at 1024 x 1024, 30 steps, with guidance; per second, of an H200 in bfloat16

def sdxl_shape(device):
    "SDXL base 1.0 as its configuration describes it, with random weights."
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    from mhrlhf.images.models import load_pipeline
    before = torch.get_default_dtype(); torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            unet = UNet2DConditionModel(sample_size=128, block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
            vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=1024, scaling_factor=.13025,
                down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
            one = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768))
            two = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280, hidden_act="gelu"))
    finally: torch.set_default_dtype(before)
    tokenizer, scheduler = load_pipeline("pocket", "cpu").tokenizer, EulerDiscreteScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
    pipe = StableDiffusionXLPipeline(vae, one, two, tokenizer, tokenizer, unet, scheduler, add_watermarker=False); pipe.set_progress_bar_config(disable=True)
    return pipe

@contextmanager
def memory(device, found):
    "The most GB that were held at once."
    import torch
    if device.type == "cuda": torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
    yield
    if device.type == "cuda": torch.cuda.synchronize()
    found.append(torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan"))

def measure_sdxl(side, steps, batches):
    "Images per minute of SDXL's shape at each batch, plain diffusers beside ours, in turns."
    import torch
    from torch.distributed import HashStore
    from mhrlhf import generate, models
    from mhrlhf.core.settings import GenerateSettings
    device = models.choose_device(); pipe = sdxl_shape(device); prompts = generate.read_prompts(ROOT/"data/prompts.csv", 2 * max(batches))
    models.load_pipeline = lambda *a: pipe
    generate.image_is_sound = lambda image: True   # random weights draw nothing that could be judged
    generate.memory_note = lambda settings: ""     # it would read the pocket's configuration
    generate.Sampler.release_text = lambda self: None   # once in a run of thousands, not in each of these small ones
    def plain_way(batch, folder):
        for at in range(0, 2 * batch, batch):
            made = pipe([p.prompt for p in prompts[at:at + batch]], num_inference_steps=steps, guidance_scale=5., width=side, height=side, generator=[torch.Generator().manual_seed(i) for i in range(batch)]).images
            for i, image in enumerate(made): image.save(Path(folder)/f"{at + i}.png")
    def our_way(batch, folder):
        settings = GenerateSettings(prompts=ROOT/"data/prompts.csv", images=Path(folder)/"images", metadata=Path(folder)/"m.csv", seeds=1, limit=2 * batch, steps=steps, guidance_scale=5., width=side, height=side, batch=batch)
        generate.work(settings, generate.plan_tasks(settings), HashStore())
    rows, gpu = [], torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    for batch in batches:   # all plain ones first: compiled blocks stay compiled
        rows.append(dict(batch=batch, plain=timed(plain_way, batch, device)))
    if device.type == "cuda": pipe.unet.compile_repeated_blocks(fullgraph=True)
    for r in rows: r["ours"] = timed(our_way, r["batch"], device)
    share = lambda minute: minute * TFLOP * (side / 1024) ** 2 * (steps / 30) / 60 / RATE
    print(f"{gpu}, {side} x {side}, {steps} steps\n{'batch':>5}{'plain/min':>11}{'ours/min':>10}{'ratio':>7}{'of 790 TFLOP/s':>16}{'plain GB':>10}{'ours GB':>9}")
    for r in rows:
        (p, pm), (o, om) = r["plain"], r["ours"]
        print(f"{r['batch']:>5}{p:>11.2f}{o:>10.2f}{o / p:>7.2f}{share(o):>16.1%}{pm:>10.1f}{om:>9.1f}", flush=True)
    top = max(r["ours"][0] for r in rows)
    return [row(f"SDXL's shape, images/min at batch {r['batch']}: ours / plain", r["ours"][0], r["plain"][0], r["ours"][0] / r["plain"][0], 1., 3) for r in rows] + [
        row("SDXL's shape, images/min at the best batch / 65", top, 65., top / 65, 1., 3)]

def timed(way, batch, device, rounds=3):
    "Images per minute and GB of one way: the median of some rounds after a first one."
    taken, held = [], []
    for _ in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder, memory(device, held): start = time.perf_counter(); way(batch, folder); taken.append(time.perf_counter() - start)
    return 60 * 2 * batch / median(taken[1:]), max(held)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images: within three minutes"); parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--steps", type=int, default=0, help="denoising steps; default: 20, with --sdxl 30"); parser.add_argument("--sdxl", action="store_true", help="SDXL's shape on this machine's GPU, random weights, instead of the pocket on the CPU")
    parser.add_argument("--side", type=int, default=1024, help="pixels, of --sdxl"); parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of --sdxl")
    options = parser.parse_args()
    machine = dict(processor=platform.processor() or platform.machine(), cores=os.cpu_count(), load=round(os.getloadavg()[0], 1), python=platform.python_version())
    print("  ".join(f"{k} {v}" for k, v in machine.items()))
    rows = measure_sdxl(options.side, options.steps or 30, options.batches) if options.sdxl else measure(options.quick, options.steps or 20)
    print(f"\n{'figure':<80}{'ours':>10}{'peer':>10}{'ratio':>9}{'goal':>7}  met")
    for r in rows: print(f"{r['figure']:<80}{r['ours']:>10.4g}{r['peer']:>10.4g}{r['ratio']:>9.3g}{r['goal'] or '':>7}  {'' if not r['goal'] else 'yes' if r['met'] else 'NO'}")
    if options.json: Path(options.json).write_text(json.dumps(dict(machine=machine, rows=rows), indent=1) + "\n")
    return 0

if __name__ == "__main__": sys.exit(main())
