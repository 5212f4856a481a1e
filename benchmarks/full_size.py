"""SDXL and ViT-L/14 in their own shapes, with random weights: python benchmarks/full_size.py [--json FILE].

On a GPU, in sections of falling worth, each of which may fail or be left out when the time (--seconds) is over:
images per minute beside plain diffusers and what each lossless lever buys, features, updates and pairs of the tuning
in our own loop, the tiny decoder beside the full one, and what fits into 16, 24, 48 and 80 GB. Every figure is printed
and written as it comes. --rehearse runs the same sections on the pocket and the CPU, to see that they run.

With --cpu the workflow's commands, one after the other, in full size or --thin, with the seconds and the memory that
each takes, beside the memory that the package estimates: generate, annotate (the sheet filled with RANDOM ratings),
train-reward, score, train-dspo with each objective and a resumed run, evaluate by the heads, inference at half the
tuning, export for other programs. Weights and results go to --folder, and the same call goes on after the last command
that was done; in full size 24 GB of memory and 10 GB of disk are needed."""
from contextlib import ExitStack, contextmanager, nullcontext
from ctypes import CDLL
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
import argparse, gc, json, os, platform, sys, time, traceback

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is there, as the command line does it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
import psutil
import torch

GB = 2**30
UNET_TFLOP, VAE_TFLOP = 6.761, 10.47  # of one pass at 1024 x 1024; the decoding of one image
GUIDANCE = 5.
PROMPTS = ["an oil painting of a lighthouse in a storm", "a marble bust of an old man", "a woodcut of a heron",
           "a fresco of a harvest", "an etching of a cathedral", "a watercolour of a harbour", "a mosaic of a peacock",
           "a charcoal drawing of a dancer"]
HELDOUT = ["a pastel of a bridge in the fog", "a bronze relief of a horse"]  # nothing is learned from their images

# What is found, and the sections that find it ----------------------------------------------------------------

class Report:
    "Figures, printed and written as they come."
    def __init__(self, path, seconds, only=""):
        self.path, self.seconds, self.only, self.rows, self.machine = path, seconds, only, [], {}
        self.began = time.perf_counter()

    @property
    def spent(self): return time.perf_counter() - self.began

    def add(self, figure, value, unit="", **more):
        "One figure; `more` says with what it was measured."
        value = round(value, 4) if isinstance(value, float) else value
        self.rows.append(dict(figure=figure, value=value, unit=unit, at=round(self.spent, 1), **more))
        told = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in more.items())
        print(f"[{self.spent:5.0f} s] {figure:<52}{value:>10.5g} {unit:<12}{told}" if isinstance(value, (int, float))
              else f"[{self.spent:5.0f} s] {figure:<52}{value} {unit} {told}", flush=True)
        self.write()

    def write(self):
        if not self.path: return
        part = Path(f"{self.path}.part")
        part.write_text(json.dumps(dict(machine=self.machine, rows=self.rows), indent=1) + "\n")
        part.replace(self.path)

    def section(self, name, needs, work):
        "Run a section that needs about so many seconds, if there is time; a fault is told and the next one goes on."
        if self.only and self.only not in name: return
        if self.spent + needs > self.seconds:
            print(f"[{self.spent:5.0f} s] left out, needs about {needs} s: {name}", flush=True)
            self.rows.append(dict(figure=f"left out: {name}", value=None))
            return self.write()
        start = time.perf_counter()
        print(f"[{self.spent:5.0f} s] {name}", flush=True)
        try: work()
        except Exception as e:  # a measurement must not cost the others
            print(f"FAILED {name}: {type(e).__name__}: {str(e)[:600]}", flush=True)
            print("".join(traceback.format_exc().splitlines(True)[-12:]), flush=True)
            self.rows.append(dict(figure=f"failed: {name}", value=None, error=f"{type(e).__name__}: {str(e)[:300]}"))
        freed()
        self.add(f"({name})", time.perf_counter() - start, "s in all")

# The machine -------------------------------------------------------------------------------------------------

def on_gpu(): return torch.cuda.is_available()

def synchronised():
    if on_gpu(): torch.cuda.synchronize()

def freed():
    gc.collect()
    if on_gpu(): torch.cuda.empty_cache()

def peak_gb(): return torch.cuda.max_memory_allocated() / GB if on_gpu() else float("nan")

def fresh_peak():
    if on_gpu(): torch.cuda.reset_peak_memory_stats()

def seconds_of(work, times=3, warm=1):
    "Median seconds of a piece of work."
    for _ in range(warm): work()
    taken = []
    for _ in range(times):
        synchronised()
        start = time.perf_counter()
        work()
        synchronised()
        taken.append(time.perf_counter() - start)
    return median(taken)

def describe(report, device):
    import diffusers, transformers
    name = torch.cuda.get_device_name() if on_gpu() else platform.processor() or platform.machine()
    memory = torch.cuda.get_device_properties(0).total_memory / GB if on_gpu() else psutil.virtual_memory().total / GB
    report.machine = dict(device=name, memory_gb=round(memory, 1), cores=os.cpu_count(), torch=torch.__version__,
                          diffusers=diffusers.__version__, transformers=transformers.__version__,
                          python=platform.python_version())
    print("  ".join(f"{k} {v}" for k, v in report.machine.items()), flush=True)

def measure_rates(report, device, small):
    "What this chip gives: matrix products on random data, and copies."
    n = 512 if small else 8192
    dtype = torch.float32 if small else torch.bfloat16
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    rate = 2 * n**3 / seconds_of(lambda: a @ b, 20, 5) / 1e12
    report.add("matrix products, bfloat16", rate, "TFLOP/s", side=n)
    source = torch.empty(n * n * 8, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes / 1e9
    report.add("copies, bytes read and written", moved / seconds_of(lambda: target.copy_(source)), "GB/s")
    return rate

# Generation --------------------------------------------------------------------------------------------------

class Generation:
    "One pipeline of SDXL's shape, and the ways to draw with it."
    def __init__(self, report, device, options):
        self.report, self.device, self.side, self.steps = report, device, options.side, options.steps
        self.thin, self.pocket, self.rate = options.thin, options.rehearse, 790.
        self.dtype = torch.float32 if options.rehearse else torch.bfloat16
        self.compiling = dict(backend="eager") if options.rehearse else {}

    def load(self):
        from mhrlhf.pocket.full_shape import full_pipeline
        start = time.perf_counter()
        from mhrlhf.images.models import load_pipeline
        self.pipe = load_pipeline("pocket") if self.pocket else full_pipeline(self.device, self.thin)
        self.pipe.vae.enable_slicing()
        self.report.add("the pipeline, made of random weights", time.perf_counter() - start, "s")

    def limit(self):
        "Images per minute at the matrix rate of this chip."
        return 60 / ((2 * self.steps * UNET_TFLOP + VAE_TFLOP) * (self.side / 1024) ** 2 / self.rate)

    def plain_images(self, batch, steps):
        texts = (PROMPTS * 2)[:batch]
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        return self.pipe(texts, num_inference_steps=steps, guidance_scale=GUIDANCE, width=self.side, height=self.side,
                         generator=generators).images

    def plain(self, batch, times=1):
        "Plain diffusers: bfloat16, otherwise its defaults; more than four images are decoded one by one."
        if batch <= 4: self.pipe.vae.disable_slicing()
        try:
            self.plain_images(batch, 2)
            fresh_peak()
            seconds = seconds_of(lambda: self.plain_images(batch, self.steps), times, 0)
        finally: self.pipe.vae.enable_slicing()
        rate = 60 * batch / seconds
        self.report.add(f"plain diffusers, batch {batch}", rate, "images/min", images=batch * times, peak_gb=peak_gb(),
                        of_the_limit=rate / self.limit())

    def plain_half(self):
        "As most scripts do it: float16, whose VAE diffusers takes to float32; one prompt at a time."
        self.pipe.to(torch.float16)
        try:
            self.plain_images(1, 2)
            fresh_peak()
            seconds = seconds_of(lambda: self.plain_images(1, self.steps), 2, 0)
            self.report.add("plain diffusers, float16, batch 1", 60 / seconds, "images/min", images=2,
                            peak_gb=peak_gb())
        finally: self.pipe.to(self.dtype)

    def sampler(self, batch, steps):
        from mhrlhf.images.sampler import Sampler, Sampling
        return Sampler(self.pipe, Sampling(steps, GUIDANCE, batch, self.side, self.side))

    def ours(self, batch, times=2, how=""):
        "Our sampler, as a worker uses it: texts encoded, images as bytes in the CPU's memory."
        texts, seeds = (PROMPTS * 2)[:batch], list(range(batch))
        start = time.perf_counter()
        self.sampler(batch, 2)(texts, seeds)
        synchronised()
        first, sampler = time.perf_counter() - start, self.sampler(batch, self.steps)
        fresh_peak()
        seconds = seconds_of(lambda: sampler(texts, seeds), times, 0)
        self.report.add(f"ours{how}, batch {batch}", 60 * batch / seconds, "images/min", images=batch * times,
                        peak_gb=peak_gb(), first_batch_s=first,
                        of_the_limit=60 * batch / seconds / self.limit())

# What each lever buys, on one pass of the UNet -----------------------------------------------------------------

def unet_inputs(pipe, latents, side):
    "Arguments of a pass, for so many latents."
    width, given = pipe.unet.config.cross_attention_dim, dict(device=pipe.device, dtype=pipe.unet.dtype)
    def draw(*shape): return torch.randn(shape, **given)
    conditions = dict(text_embeds=draw(latents, pipe.text_encoder_2.config.projection_dim),
                      time_ids=torch.tensor([[side, side, 0, 0, side, side]] * latents, **given))
    return dict(sample=draw(latents, 4, side // 8, side // 8), timestep=torch.tensor(500., device=pipe.device),
                encoder_hidden_states=draw(latents, 77, width), added_cond_kwargs=conditions, return_dict=False)

def uncompiled(pipe):
    "As it was before `compile_blocks`, but for the order of values in memory."
    for network in (pipe.unet, pipe.vae.decoder):
        for module in network.modules(): module._compiled_call_impl = None
    torch._dynamo.reset()

@contextmanager
def channels_last(network):
    network.to(memory_format=torch.channels_last)
    try: yield
    finally: network.to(memory_format=torch.contiguous_format)

@contextmanager
def convolutions_tried():
    "cuDNN tries its algorithms at the first pass."
    torch.backends.cudnn.benchmark = True
    try: yield
    finally: torch.backends.cudnn.benchmark = False

def attention_by_cudnn():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)

@contextmanager
def fused_projections(unet):
    unet.fuse_qkv_projections()
    try: yield
    finally:
        unet.unfuse_qkv_projections()
        for module in unet.modules():  # diffusers leaves the joined weights behind
            for name in ("to_qkv", "to_kv"): module._modules.pop(name, None)
            if hasattr(module, "fused_projections"): module.fused_projections = False

class Levers:
    "One pass of the UNet, as it is and with one lever at a time; the same values each time."
    def __init__(self, generation, batch):
        g = generation
        self.g, self.pipe, self.unet, self.batch = g, g.pipe, g.pipe.unet, batch
        torch.manual_seed(0)
        self.inputs = unet_inputs(g.pipe, 2 * batch, g.side)
        self.plain = self.reference = None
        self.helping = {}

    @torch.no_grad()
    def pass_of(self, name, state=nullcontext(), times=5):
        with state:
            start = time.perf_counter()
            said = self.unet(**self.inputs)[0].float()
            synchronised()
            first = time.perf_counter() - start
            seconds = seconds_of(lambda: self.unet(**self.inputs), times, 1)
        if self.plain is None: self.plain, self.reference = seconds, said
        error = ((said - self.reference).norm() / self.reference.norm()).item()
        rate = 2 * self.batch * UNET_TFLOP * (self.g.side / 1024) ** 2 / seconds
        self.g.report.add(f"UNet, batch {self.batch}: {name}", 1000 * seconds, "ms a pass", tflops=rate,
                          times_as_fast=self.plain / seconds, first_s=first, differs=error)
        return self.plain / seconds

    def eager(self):
        self.pass_of("as diffusers runs it")
        self.try_out("attention by cuDNN", attention_by_cudnn)
        self.pass_of("q, k, v in one product", fused_projections(self.unet))
        self.pass_of("channels last", channels_last(self.unet))
        self.try_out("convolutions tried out", convolutions_tried)

    def try_out(self, name, lever):
        "A lever that the compiled runs pull as well, if it helps."
        if self.pass_of(name, lever()) > 1.01: self.helping[name] = lever

    @contextmanager
    def pulled(self):
        "Inside the block, what has helped."
        with ExitStack() as stack:
            for lever in self.helping.values(): stack.enter_context(lever())
            yield

    @property
    def names(self): return "".join(f", {name}" for name in self.helping)

    def compiled(self):
        "The transformer blocks alone, as diffusers offers it, and all repeated blocks, as `generate --compile` does."
        from mhrlhf.images.models import compile_blocks
        torch._dynamo.config.recompile_limit = 64
        self.unet.compile_repeated_blocks(fullgraph=True, dynamic=False, **self.g.compiling)
        self.pass_of("transformer blocks compiled")
        uncompiled(self.pipe)
        compile_blocks(self.pipe, **self.g.compiling)
        try: self.pass_of("all repeated blocks compiled, channels last" + self.names, self.pulled())
        except Exception:  # the images after this are made with what did compile
            uncompiled(self.pipe)
            self.unet.compile_repeated_blocks(fullgraph=True, dynamic=False, **self.g.compiling)
            raise

# The decoder -------------------------------------------------------------------------------------------------

@torch.no_grad()
def measure_decoders(g, name):
    "Seconds and memory to decode one image after the other."
    latents = torch.randn(4, 4, g.side // 8, g.side // 8, device=g.device, dtype=g.dtype)
    fresh_peak()
    seconds = seconds_of(lambda: g.pipe.vae.decode(latents), 2) / len(latents)
    g.report.add(f"decoder: {name}", 1000 * seconds, "ms an image", peak_gb=peak_gb(),
                 tflops=VAE_TFLOP * (g.side / 1024) ** 2 / seconds)

@torch.no_grad()
def measure_tiny(g):
    from diffusers import AutoencoderTiny
    tiny = AutoencoderTiny().to(g.device, g.dtype).eval()
    latents = torch.randn(4, 4, g.side // 8, g.side // 8, device=g.device, dtype=g.dtype)
    seconds = seconds_of(lambda: [tiny.decode(part) for part in latents.split(1)], 3) / len(latents)
    g.report.add("decoder: TAESD's shape", 1000 * seconds, "ms an image")

# Features ----------------------------------------------------------------------------------------------------

class FeatureRates:
    "ViT-L/14's features of tensors, in several precisions, beside single precision."
    def __init__(self, report, device, thin, small):
        from mhrlhf.images.models import load_backbone
        from mhrlhf.pocket.full_shape import full_backbone
        self.report, self.device, self.exact = report, device, None
        self.backbone = load_backbone("pocket") if small else full_backbone(device, thin)

    def look(self, pixels, text, state):
        from mhrlhf.reward.features import extract
        with torch.no_grad(), state: return extract(self.backbone, pixels, text)

    def rate(self, name, pixels, text, state, times=3):
        "Images per second, and how far the features are from the first ones."
        fresh_peak()
        seconds = seconds_of(lambda: self.look(pixels, text, state()), times)
        peak, seen = peak_gb(), self.look(pixels, text, state())
        if self.exact is None: self.exact = seen
        pairs = (("image", seen.image, self.exact.image), ("patches", seen.patches, self.exact.patches))
        differs = {f"{k}_differ": ((a.float() - b).norm() / b.norm()).item() for k, a, b in pairs if a.shape == b.shape}
        self.report.add(f"features: {name}", len(pixels) / seconds, "images/s", peak_gb=peak, **differs)

    def half(self):
        return torch.autocast(self.device.type, torch.float16 if self.device.type == "cuda" else torch.bfloat16)

    def measure(self, n, large, side):
        text = torch.nn.functional.normalize(torch.randn(n, self.backbone.model.visual.output_dim, device=self.device))
        pixels = torch.rand(n, 3, 224, 224, device=self.device)
        self.rate("float32", pixels, text, nullcontext, 1)
        self.rate("float16 products", pixels, text, self.half)
        self.rate("bfloat16 products", pixels, text, lambda: torch.autocast(self.device.type, torch.bfloat16))
        torch.backends.cuda.matmul.allow_tf32 = True
        self.rate("TF32 products", pixels, text, nullcontext)
        torch.backends.cuda.matmul.allow_tf32 = False
        pixels = torch.rand(large, 3, side, side, device=self.device)
        self.exact = None
        self.rate(f"float16 products, of {side} x {side}", pixels, text[:large], self.half)

def measure_features(report, device, thin, small):
    FeatureRates(report, device, thin, small).measure(*(1, 1, 64) if small else (256, 64, 1024))

# Tuning ------------------------------------------------------------------------------------------------------

class Tunings:
    "Runs of our own loop on rated latents of noise."
    def __init__(self, generation):
        from mhrlhf.core.aspects import NAMES
        from mhrlhf.images.denoiser import Denoiser, encode_texts
        from mhrlhf.reward.noise import NoiseHeads, RatedLatents
        g, n = generation, 32
        self.g, self.denoiser = g, Denoiser(g.pipe, g.side, g.side)
        torch.manual_seed(0)
        self.heads = NoiseHeads(self.denoiser.channels(), list(NAMES)).to(g.device).eval().requires_grad_(False)
        self.rated = RatedLatents(torch.randn(n, 4, g.side // 8, g.side // 8), PROMPTS, encode_texts(g.pipe, PROMPTS),
                                  torch.arange(n) % len(PROMPTS), torch.randn(n, len(NAMES)), torch.ones(n, len(NAMES)))

    @contextmanager
    def run(self, batch, checkpointing=True, **knobs):
        "A run with a fresh adapter, taken off again at the end."
        from mhrlhf.core.settings import TrainDSPOSettings
        from mhrlhf.tuning.loop import start
        settings = TrainDSPOSettings(batch=batch, rank=16, lr=1e-4, guidance_scale=GUIDANCE, width=self.g.side,
                                     height=self.g.side, **knobs)
        run = start(self.denoiser, self.heads, self.rated, None, settings)
        if not checkpointing: run.denoiser.unet.disable_gradient_checkpointing()
        try: yield run
        finally:
            self.denoiser.unet.disable_gradient_checkpointing()
            self.denoiser.unet.unload_lora()
            del run
            freed()

    def updates(self, batch, times=3, checkpointing=True, warm=2, **knobs):
        "Seconds of an update, and how much memory it took."
        from mhrlhf.tuning.loop import step
        fresh_peak()
        with self.run(batch, checkpointing, **knobs) as run:
            seconds = seconds_of(lambda: step(run), times, warm)
            return seconds, peak_gb()

    def report_updates(self, name, batch, **knobs):
        seconds, peak = self.updates(batch, **knobs)
        self.g.report.add(f"{name}, batch {batch}", seconds, "s an update", latents_a_second=batch / seconds,
                          peak_gb=peak)
        return seconds

    def kinds(self, batch):
        taken = {kind: self.report_updates(f"dspo, {kind}", batch, adapter=kind) for kind in ("lora", "dora")}
        self.g.report.add(f"DoRA / LoRA, batch {batch}", taken["dora"] / taken["lora"], "times as long")

    def tf32(self, batch):
        "The adapter is single precision; its products may be TF32's."
        torch.backends.cuda.matmul.allow_tf32 = True
        try: self.report_updates("dspo, lora, TF32", batch, adapter="lora")
        finally: torch.backends.cuda.matmul.allow_tf32 = False

    def parts(self, batch):
        "What of an update is the reference's pass with the heads' gradient."
        from mhrlhf.tuning.loop import draw_batch, targets
        with self.run(batch, adapter="lora") as run:
            seconds = seconds_of(lambda: targets(run, draw_batch(run)), 3)
            self.g.report.add(f"dspo, batch {batch}: reference and heads' gradient", seconds, "s of an update")

    def pairs(self, batch, checkpointing=True):
        "A pair objective on cached latents; a batch of 2 is a pair."
        seconds, peak = self.updates(batch, checkpointing=checkpointing, objective="dpo", adapter="lora")
        how = "" if checkpointing else ", activations kept"
        self.g.report.add(f"dpo, lora, {batch // 2} pairs an update{how}", batch / 2 / seconds, "pairs/s",
                          updates_a_second=1 / seconds, peak_gb=peak)

    def flat(self, batch, updates):
        "Whether memory grows from update to update."
        from mhrlhf.tuning.loop import step
        with self.run(batch) as run:
            held = []
            for _ in range(updates):
                step(run)
                held.append(torch.cuda.memory_allocated() / GB if on_gpu() else 0.)
            self.g.report.add(f"dspo, batch {batch}: GB held after update 3", held[2], "GB")
            self.g.report.add(f"dspo, batch {batch}: GB held after update {updates}", held[-1], "GB",
                              most=max(held[2:]))

# What fits ---------------------------------------------------------------------------------------------------

@contextmanager
def capped(gb):
    "Inside the block the allocator gives no more."
    freed()
    total = torch.cuda.get_device_properties(0).total_memory / GB
    torch.cuda.set_per_process_memory_fraction(min(gb / total, 1.))
    try: yield
    finally: torch.cuda.set_per_process_memory_fraction(1.)

def largest(batches, attempt):
    "The first batch that fits; 0 if none does."
    from mhrlhf.core.files import InputError
    for batch in batches:
        try:
            attempt(batch)
            return batch
        except (torch.OutOfMemoryError, InputError): pass
        freed()
    return 0

def measure_caps(g, tunings, gb):
    with capped(gb):
        texts = PROMPTS * 4
        fits = largest((32, 16, 8, 4, 2, 1), lambda n: g.sampler(n, 1)(texts[:n], list(range(n))))
        g.report.add(f"fits into {gb} GB: generate, batch", fits, "images")
        fits = largest((16, 8, 4, 2, 1), lambda n: tunings.updates(n, 1, warm=0))
        g.report.add(f"fits into {gb} GB: train-dspo, dora of rank 16, batch", fits, "latents")

# All sections ------------------------------------------------------------------------------------------------

def measure_gpu(report, options):
    device, small = torch.device("cuda" if on_gpu() else "cpu"), options.rehearse
    describe(report, device)
    g = Generation(report, device, options)
    def rates(): g.rate = measure_rates(report, device, small)
    report.section("rates of the chip", 10, rates)
    g.load()
    b = 1 if small else 8
    levers = Levers(g, b)
    report.section("plain diffusers, one prompt at a time", 30, lambda: g.plain(1, 1 if small else 2))
    report.section(f"plain diffusers, batch {b}", 25, lambda: g.plain(b))
    report.section("levers without compiling", 30, levers.eager)
    report.section("the decoder as it is", 5, lambda: measure_decoders(g, "as diffusers runs it"))
    report.section("levers with compiling", 120, levers.compiled)
    def ours(n, times):
        with levers.pulled(): g.ours(n, times, levers.names)
    report.section(f"ours, batch {b}", 40, lambda: ours(b, 2))
    report.section("the compiled decoder", 5, lambda: measure_decoders(g, "compiled, channels last"))
    uncompiled(g.pipe)
    for network in (g.pipe.unet, g.pipe.vae): network.to(memory_format=torch.contiguous_format)
    report.section("features", 25, lambda: measure_features(report, device, options.thin, small))
    tunings = Tunings(g)
    measure_tuning(report, tunings, small)
    report.section("the tiny decoder", 5, lambda: measure_tiny(g))
    report.section("plain diffusers in float16", 20, g.plain_half)
    compiled_anew(report, g, ours, 2 if small else 16)
    measure_more_tuning(report, g, tunings, small)
    for n in (() if small else (4, 16)): report.section(f"plain diffusers, batch {n}", 2 * n, lambda n=n: g.plain(n))
    for n in (() if small else (4, 1)): compiled_anew(report, g, ours, n)

def compiled_anew(report, g, ours, batch):
    from mhrlhf.images.models import compile_blocks
    def work():
        compile_blocks(g.pipe, **g.compiling)
        try: ours(batch, 1)
        finally:
            uncompiled(g.pipe)
            for network in (g.pipe.unet, g.pipe.vae): network.to(memory_format=torch.contiguous_format)
    report.section(f"ours, batch {batch}, compiled anew", 100, work)

def measure_tuning(report, tunings, small):
    n = 2 if small else 4
    report.section("updates, LoRA and DoRA", 25, lambda: tunings.kinds(n))
    report.section("updates in TF32", 10, lambda: tunings.tf32(n))
    report.section("parts of an update", 8, lambda: tunings.parts(n))
    report.section("pairs", 15, lambda: [tunings.pairs(2), tunings.pairs(4 if small else 16)])
    report.section("pairs, activations kept", 12, lambda: [tunings.pairs(2, False), tunings.pairs(4, False)])

def measure_more_tuning(report, g, tunings, small):
    for n in (1,) if small else (1, 8): report.section(f"updates of batch {n}", 20, lambda n=n: tunings.kinds(n))
    report.section("memory of 20 updates", 20, lambda: tunings.flat(2 if small else 4, 4 if small else 20))
    total = torch.cuda.get_device_properties(0).total_memory / GB if on_gpu() else 0
    for gb in (16, 24, 48, 80):
        if gb < total: report.section(f"what fits into {gb} GB", 25, lambda gb=gb: measure_caps(g, tunings, gb))

# The workflow on a CPU ---------------------------------------------------------------------------------------

OBJECTIVES = "dspo", "dspo-pairs", "dpo", "sft"
SETTINGS = """[shapes]
pipeline = {pipeline}
backbone = {backbone}
device = cpu
dtype = {dtype}
steps = {steps}
guidance_scale = 5.0
width = {side}
height = {side}
batch = {batch}
prompts = prompts.csv
generate.seeds = 3
metadata = generated.csv
images = images
annotations = sheet.csv
database = sqlite:///ratings.db
reward_model = reward
train-reward.output = reward
cache = features
score.output = scores.csv
opposites = none
folds = 2
epochs = 4
draws = 12
members = 1
noise_epochs = 1
copies = 0
updates = 2
train-dspo.batch = {rows}
watched = 2
watch_every = 2
watch_steps = 1
model = dspo
judged_by = heads
evaluate.prompts = heldout.csv
evaluate.output = evaluation
evaluate.batch = 2
inference.output = pictures
"""

def how_to(thin):
    "Settings that differ between the shapes. A CPU without products in bfloat16 takes a hundred times as long in it."
    if thin: return dict(dtype="float32", steps=1, batch=12, rows=2)
    quick = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dict(dtype="bfloat16" if quick else "float32", steps=2, batch=4, rows=1)

def prepare_study(folder, side, thin):
    "Weights, prompts and settings in a folder."
    from mhrlhf.pocket.full_shape import full_shape
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline, backbone = full_shape(folder / "weights", thin)
    for name, prompts in (("prompts", PROMPTS[:4]), ("heldout", HELDOUT)):
        table = pd.DataFrame(dict(prompt_id=[f"{name[0]}{i}" for i in range(len(prompts))], prompt=prompts))
        table.to_csv(folder / f"{name}.csv", index=False)
    places = dict(pipeline=pipeline.absolute(), backbone=backbone.absolute())
    settings = SETTINGS.format(side=side, **places, **how_to(thin))
    (folder / "settings.ini").write_text(settings)

IMAGES = 12  # rated ones; below 40 no heads are trained, but these are of no use anyway
RATED = "spatial_rating", "style_rating"  # two heads show what five would

def rate_at_random(sheet="sheet.csv"):
    "Fill two aspects of a sheet with RANDOM ratings: nothing that is learned from them means anything."
    table, draw = pd.read_csv(sheet), np.random.default_rng(0)
    for column in RATED: table[column] = draw.integers(1, 8, len(table))
    table.assign(rater="RANDOM").to_csv(sheet, index=False)

def spare(put=setattr):
    "Heads are trained of few images and looked at under one level of noise; `put` sets a module's attribute."
    from mhrlhf.reward import train
    put(train, "FEWEST", IMAGES)
    put(train, "correlation_by_noise", partial(train.correlation_by_noise, levels=(500,)))

def workflow_commands():
    "The user's commands in their order; a function stands for what a person does between them."
    tune = ["train-dspo", "--output"]
    others = [[*tune, f"dspo-{name}", "--objective", name, "--adapter", "lora"] for name in OBJECTIVES[1:]]
    return [["generate"], ["annotate"], rate_at_random, ["annotate"], ["train-reward"], ["score", "generated.csv"],
            [*tune, "dspo"], *others, [*others[1], "--updates", "3"], ["evaluate"],
            ["inference", "--prompt", HELDOUT[0], "--strength", "0.5", "--batch", "1"],
            ["export", "--output", "kohya.safetensors"]]

CHOSEN = ["--profile", "shapes", "--settings", "settings.ini"]
LIBRARIES = ("mhrlhf.tuning.dspo", "mhrlhf.proof.evaluate", "mhrlhf.cli", "open_clip",
             "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl")

def expected_memory(options):
    "GB of each command, by the estimates that they print on a GPU, and what a CPU holds beside."
    from mhrlhf.images.memory import estimate_features, estimate_memory, estimate_update
    from mhrlhf.images.sampler import Sampling
    from mhrlhf.pocket.full_shape import full_backbone, full_networks
    from mhrlhf.tuning.adapters import add_adapter
    meta, cpu, side, how = torch.device("meta"), torch.device("cpu"), options.side, how_to(options.thin)
    kind = getattr(torch, how["dtype"])
    clip = estimate_features(full_backbone(meta, options.thin).model, IMAGES)
    def unet(): return full_networks(meta, options.thin, kind)["unet"]
    def sampling(n, guidance=GUIDANCE):
        return estimate_memory(Sampling(1, guidance, n, side, side), n, "weights/sdxl", cpu, kind)
    kept, looks = adapted_gb(unet()), sampling(2)["total"]  # of the weights that an adapter is merged into
    def tuning(adapter, n):
        update = estimate_update(unet(), lambda copy: add_adapter(copy, adapter), n, side // 8, side // 8, kind, False)
        return clip["weights"] + max(kept + looks, sampling(1)["weights"] + update)
    return {"generate": sampling(how["batch"])["total"], "score": clip["total"],
            "train-reward": clip["weights"] + sampling(IMAGES, 1.)["total"],
            "train-dspo": tuning("dora", how["rows"]), "train-dspo of pairs": tuning("lora", 2),
            "evaluate": clip["weights"] + kept + looks, "inference": kept + sampling(1)["total"],
            "export": sampling(1)["weights"]}

def adapted_gb(unet):
    "The weights of the layers that an adapter changes: while it is merged into them, they are kept as they were."
    from peft.tuners.tuners_utils import BaseTunerLayer
    from mhrlhf.tuning.adapters import add_adapter
    add_adapter(unet, "lora")
    layers = [m.get_base_layer().weight for m in unet.modules() if isinstance(m, BaseTunerLayer)]
    return sum(weight.numel() * weight.element_size() for weight in layers) / GB

def give_back(from_bytes=2**16):
    "Let glibc give freed blocks back: between small ones it keeps them, 4 GB after an adapter has been made."
    mmap_threshold = -3  # of mallopt(3)
    CDLL(None).mallopt(mmap_threshold, from_bytes)

GLANCE = .05  # seconds between two looks at a process

def held_gb(process):
    "Memory that a process holds; pages of files do not count, for the system may drop them (Linux)."
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / GB

def peak_of(log, work, *arguments):
    "Work in a process of its own: exit code, seconds of the clock and of all processors, the most memory held, in GB."
    sys.stdout.flush()
    start, child = time.perf_counter(), os.fork()
    if not child: _end_with(log, work, *arguments)
    ended = most = 0
    while not ended:
        most = max(most, held_gb(child))
        time.sleep(GLANCE)
        ended, status, used = os.wait4(child, os.WNOHANG)
    return dict(code=os.waitstatus_to_exitcode(status), seconds=time.perf_counter() - start,
                cpu_seconds=used.ru_utime + used.ru_stime, peak_gb=most, with_files_gb=used.ru_maxrss * 1024 / GB)

def _end_with(log, work, *arguments):
    "Work, and end this process; what it says goes into the log."
    code = 1
    for stream in (1, 2): os.dup2(log.fileno(), stream)
    try: code = work(*arguments) or 0
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)

class Rehearsal:
    "The workflow's commands, each in a process of its own; what is done is kept, and the same call goes on from there."
    def __init__(self, report, options):
        if options.side == LARGE: options.side = 32 if options.thin else 256
        self.report, self.options = report, options
        os.makedirs(options.folder, exist_ok=True)
        os.chdir(options.folder)
        self.place = Path("done.json")
        self.done = json.loads(self.place.read_text()) if self.place.exists() else {}

    def begin(self, log):
        "Weights and settings, what the imports alone hold, and what the commands should need."
        assert peak_of(log, prepare_study, ".", self.options.side, self.options.thin)["code"] == 0, "see log.txt"
        for name in LIBRARIES: import_module(name)
        spare()
        give_back()
        if not self.options.thin: torch.set_num_threads = int  # all cores for a command, where it takes one
        self.imports = peak_of(log, int)
        place = Path("expected.json")
        def estimate(): place.write_text(json.dumps(expected_memory(self.options)))
        if not place.exists(): assert peak_of(log, estimate)["code"] == 0, "see log.txt"
        self.expected = json.loads(place.read_text())

    def keep(self, name, row):
        self.done[name] = row
        self.place.write_text(json.dumps(self.done, indent=1) + "\n")

    def estimate(self, command):
        pairs = command[0] == "train-dspo" and "--objective" in command
        return self.expected.get(f"{command[0]} of pairs" if pairs else command[0])

    def run(self, log, command):
        "One command: its row."
        row = peak_of(log, import_module("mhrlhf.cli").main, [*command, *CHOSEN])
        row["own_gb"], estimate = row["peak_gb"] - self.imports["peak_gb"], self.estimate(command)
        return row | (dict(estimate_gb=estimate, ratio=row["own_gb"] / estimate) if estimate else {})

    def all(self, log):
        "Every command that is not done yet; the exit code."
        for i, command in enumerate(workflow_commands()):
            name = f"{i} {command.__name__ if callable(command) else ' '.join(command)}"
            if name not in self.done:
                row = command() or {} if callable(command) else self.run(log, command)
                if row.get("code"): return self.tell(name, row)
                self.keep(name, row)
            self.tell(name, self.done[name])
        return 0

    def tell(self, name, row):
        if row: self.report.add(name[:50], row["seconds"], "s", **{k: v for k, v in row.items() if k != "seconds"})
        return row.get("code", 0)

def measure_cpu(report, options):
    "The workflow's commands on the CPU, with the memory of each beside what the package estimates."
    describe(report, torch.device("cpu"))
    rehearsal = Rehearsal(report, options)
    with open("log.txt", "a") as log:  # nothing is computed in this process: its threads would not be in the others
        rehearsal.begin(log)
        report.add("weights, imports and estimates", report.spent, "s", imports_gb=rehearsal.imports["peak_gb"],
                   dtype=how_to(options.thin)["dtype"])
        return rehearsal.all(log)

# The command -------------------------------------------------------------------------------------------------

LARGE = 1024  # pixels, SDXL's own size

def read_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the figures here, as they come")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no section that would end later")
    parser.add_argument("--only", default="", help="sections whose names hold this")
    parser.add_argument("--thin", action="store_true", help="an eighth of the width")
    parser.add_argument("--rehearse", action="store_true", help="the GPU's sections on the pocket, wherever this runs")
    parser.add_argument("--cpu", action="store_true", help="the workflow's commands on the CPU")
    parser.add_argument("--folder", default="outputs/full_size", help="of --cpu: written")
    parser.add_argument("--side", type=int, default=LARGE, help="pixels")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    options = parser.parse_args()
    if options.rehearse: options.side, options.steps = 64, 3
    return options

def main():
    options = read_options()
    report = Report(options.json and str(Path(options.json).absolute()), options.seconds, options.only)
    if options.cpu: return measure_cpu(report, options)
    measure_gpu(report, options)
    return 0

if __name__ == "__main__": sys.exit(main())
