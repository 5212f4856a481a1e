"""Tuning beside its peers: seconds until the judge's composite has risen by half a standard deviation, with no aspect
below its start; and until every aspect has risen, by a tenth of one at least.

python benchmarks/dspo.py --run outputs/test_pipeline [--budget 600] [--methods a,b] [--jobs N] [--json FILE]

--run is the folder of a finished test-pipeline: its rated images and the CLIP heads on them, of which every method
begins. A method's clock is the processor time of its process, which has one thread; libraries and models are loaded
before it starts, noise-aware heads are trained on it. At marks, each 1.3 times the last, the method leaves its
adapter, and other processes, outside of every clock, draw 64 development prompts with it and ask the judge: the first
mark at which the composite's gain is .5 or more and no aspect's gain is below 0 counts, and the first at which no
aspect's gain is below .1. A method that never gets there counts its whole budget. --sweep SECONDS first gives every
peer so much for each of three decades of its learning rate, outside of its clock, and goes on with the one after
which the judge's composite is best (LPO with noise-aware heads that the run left); ours keeps the profile's strength,
and one head the strength that moves the sampler as far as five. Methods whose name begins with trl are TRL's own
trainers and need trl 0.23 (--trl FOLDER: where it was unpacked, if not in this environment); peers.py says what the
others are."""
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
import argparse, json, multiprocessing, os, platform, random, subprocess, sys, tempfile, time

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
               "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parent.parent
GOAL, SHARE = .5, .2       # of the composite, in standard deviations; of the best peer's seconds
EACH = .1                  # of every aspect, in standard deviations
FIGURES = {"seconds": "composite +.5, none below its start", "each_seconds": "every aspect +.1"}
RATIO, MARKS = 1.3, 14     # between two marks, and how many there are at most
PROMPTS, STEPS = 64, 20    # of the judge's pictures
QUICK = 32, 10             # the same in a sweep

@dataclass(frozen=True)
class Method:
    "How a method is called here, in peers.py and in the table, and what was tried."
    function: str
    title: str
    kind: str        # of its adapter
    knob: str        # what was swept
    chosen: float
    tried: tuple     # in a sweep

RATES = 1e-4, 1e-3, 1e-2
METHODS = {
    "ours": Method("ours", "ours: five heads, balanced", "dora", "strength", 12., ()),
    "one-head": Method("one_head", "our loop, one head on the mean rating", "dora", "strength", 60., ()),
    "trl-ddpo": Method("trl_ddpo", "DDPO, TRL 0.23's trainer", "lora", "rate", 1e-3, RATES),
    "trl-alignprop": Method("trl_alignprop", "AlignProp, TRL 0.23's trainer", "lora", "rate", 1e-3, RATES),
    "trl-draft": Method("trl_draft", "DRaFT-1 by the same trainer", "lora", "rate", 1e-3, RATES),
    "dpo": Method("diffusion_dpo", "Diffusion-DPO, diffusers' loss, our loop", "lora", "rate", 1e-3, RATES),
    "drtune": Method("drtune", "DRTune's loss, our loop", "lora", "rate", 1e-3, RATES),
    "flowbp": Method("flowbp", "FlowBP-Sparse's loss, our loop", "lora", "rate", 1e-3, RATES),
    "lpo": Method("lpo", "LPO's loss, our loop and heads", "lora", "rate", 1e-3, RATES),
}

# A method's own process -------------------------------------------------------------------------------------------

def world(run, sweep=False):
    "The rated pictures of a run and the heads on them; in a sweep also the noise-aware heads that it left."
    import pandas as pd
    from mhrlhf.images.denoiser import Denoiser
    from mhrlhf.images.models import load_pipeline
    from mhrlhf.reward.features import read_image
    from mhrlhf.reward.model import RewardModel
    from peers import World
    made = pd.read_csv(run/"generated.csv")
    files = [run/"images"/row.prompt_id/f"{row.seed}.png" for row in made.itertuples()]
    reward = RewardModel.load(run/"multihead_reward_model", "cpu")
    it = World(Denoiser(load_pipeline("pocket", "cpu")), reward, [read_image(f) for f in files], list(made.prompt))
    if sweep: it.left = run/"multihead_reward_model"
    return it

def marks(budget, count):
    "Seconds at which a method leaves its adapter."
    return [budget / RATIO ** k for k in range(count)][::-1]

def leave(unet, folder, about):
    "The adapter as a file, whole or not at all."
    from safetensors.torch import save_file
    tensors = {name: p.detach() for name, p in unet.named_parameters() if p.requires_grad}
    path = folder/f"{about['update']:06}.safetensors"
    save_file(tensors, path.with_suffix(".part"), metadata={"about": json.dumps(about)})
    path.with_suffix(".part").rename(path)

def work(o):
    "Tune until the budget is spent, the clock on the wall says so, or somebody wrote `stop`."
    import torch
    import peers
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    it, due = world(o.run, o.marks == 1), marks(o.budget, o.marks)
    began, wall, aside = time.process_time(), time.time(), 0.
    for update, _ in enumerate(getattr(peers, METHODS[o.work].function)(it, o.value), 1):
        spent = time.process_time() - began - aside
        ended = spent >= o.budget or time.time() > o.ends or (o.folder/"stop").exists()
        if ended or spent >= due[0]:
            leave(it.denoiser.unet, o.folder, dict(update=update, seconds=spent, wall=time.time() - wall))
            due = [mark for mark in due if mark > spent]
            aside = time.process_time() - began - spent
        if ended: return

# The judge's processes ---------------------------------------------------------------------------------------------

@cache
def drawer(kind):
    "A pipeline, with an adapter of that kind if one is named."
    import torch
    from mhrlhf.images.models import load_pipeline
    from mhrlhf.tuning.adapters import add_adapter
    from peers import LAYERS, RANK
    torch.set_num_threads(1)
    pipe = load_pipeline("pocket", "cpu")
    if kind: add_adapter(pipe.unet, kind, RANK, LAYERS)
    return pipe

def judged(kind="", path=None, quick=False):
    "What the judge says of the development prompts, drawn with an adapter that a method left, or without. (n, aspects)"
    import torch
    from safetensors.torch import load_file
    from mhrlhf.core.prompts import image_seed, read_prompts
    from mhrlhf.images.sampler import Sampling, sample_images
    from mhrlhf.pocket.judge import load_judge
    from mhrlhf.tuning.adapters import merged
    from peers import GUIDANCE
    pipe, (count, steps) = drawer(kind), QUICK if quick else (PROMPTS, STEPS)
    known = dict(pipe.unet.named_parameters())
    with torch.no_grad():
        for name, values in (load_file(path) if path else {}).items(): known[name].copy_(values)
    prompts = read_prompts(ROOT/"data/prompts_dev.csv", count)
    texts, seeds = [p.prompt for p in prompts], [image_seed(p.prompt_id, 0) for p in prompts]
    try:
        with merged(pipe.unet): images = sample_images(pipe, texts, seeds, Sampling(steps, GUIDANCE, 8))
    except RuntimeError: return None  # pictures of one colour or no number
    return load_judge().score(images, texts)

def compared(base, tuned):
    "Gains in standard deviations of the base; a method whose pictures are no pictures lost everything."
    from mhrlhf.proof.compare import add_composite
    from mhrlhf.tuning.balance import paired_gains
    if tuned is None: return dict(composite=-9., aspects=[-9.] * base.shape[1], there=False, each=False)
    gains = paired_gains(*add_composite(base, tuned)).mean
    *aspects, composite = gains.round(4).tolist()
    return dict(composite=composite, aspects=aspects, there=composite >= GOAL and min(aspects) >= 0,
                each=min(aspects) >= EACH)

# All of them together -----------------------------------------------------------------------------------------------

class Trial:
    "A method at one value of its knob: its process, its folder, and what the judge said so far."
    def __init__(self, name, value, folder, budget, count=MARKS):
        self.name, self.value, self.budget, self.marks = name, value, budget, count
        self.folder, self.process, self.code = folder/f"{name}-{value:g}-{count}", None, None
        self.asked, self.seen, self.why = {}, [], ""
        self.folder.mkdir(parents=True)

    def begin(self, options, ends):
        path = [str(options.trl)] if options.trl and self.name.startswith("trl") else []
        paths = os.pathsep.join([*path, str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-W", "ignore", __file__, "--run", options.run, "--work", self.name,
                   "--value", self.value, "--folder", self.folder, "--budget", self.budget, "--marks", self.marks,
                   "--ends", ends]
        with open(self.folder/"log", "w") as log:
            self.process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log,
                                            env=os.environ | {"PYTHONPATH": paths})

    def running(self):
        if self.process and self.code is None: self.code = self.process.poll()
        return self.process is not None and self.code is None

    def ask(self, pool):
        "Hand new adapters to the judge."
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self.asked: continue
            self.asked[path] = pool.apply_async(judged, (METHODS[self.name].kind, path, self.marks == 1))

    def hear(self, base):
        "What the judge has said since; True if there is something new."
        from safetensors import safe_open
        ready = [path for path, said in self.asked.items() if said and said.ready()]
        for path in ready:
            with safe_open(path, "np") as file: about = json.loads(file.metadata()["about"])
            self.seen.append(about | compared(base, self.asked[path].get()))
            self.asked[path] = None
            path.write_bytes(b"")
            if self.seen[-1]["there"] and self.seen[-1]["each"] and self.marks > 1: (self.folder/"stop").touch()
        self.seen.sort(key=lambda s: s["update"])
        return bool(ready)

    def waits(self): return any(self.asked.values())

    def result(self):
        "Seconds that count, and the best look."
        there, each = ([s for s in self.seen if s[figure]] for figure in ("there", "each"))
        best = there[0] if there else max(self.seen, key=lambda s: s["composite"], default=None)
        if self.code and not self.why:
            self.why = " ".join((self.folder/"log").read_text().split()[-30:])
        return dict(method=self.name, knob=METHODS[self.name].knob, value=self.value, tried=METHODS[self.name].tried,
                    there=bool(there), seconds=round(there[0]["seconds"], 1) if there else self.budget, best=best,
                    each=bool(each), each_seconds=round(each[0]["seconds"], 1) if each else self.budget,
                    fault=self.why if self.code else "", seen=self.seen)

def line_of(r):
    "A method's row for people."
    m, best = METHODS[r["method"]], r["best"]
    if r["fault"] and not best: return f"{m.title:<42} did not run: {r['fault']}"
    if not best: return f"{m.title:<42} nothing judged yet"
    took = f"{r['seconds']:.0f} s" if r["there"] else f"never in {r['seconds']:.0f} s"
    took += f", each aspect {r['each_seconds']:.0f} s" if r["each"] else ", each aspect never"
    gains = " ".join(f"{g:+.2f}" for g in best["aspects"])
    return (f"{m.title:<42} {took:<36} {m.knob} {r['value']:<7g} composite {best['composite']:+.2f} "
            f"({gains}) at {best['seconds']:.0f} s, update {best['update']}")

def rows_of(results):
    "Ours beside each peer, and beside the best of them, by both figures."
    known = {r["method"]: r for r in results}
    if "ours" not in known: return []
    ours, peers = known.pop("ours"), [r for r in known.values() if r["best"]]
    return [row for figure in FIGURES for row in rows_by(figure, ours, peers)]

def rows_by(figure, ours, peers):
    "Ours beside each peer by one figure, the best peer last with the goal."
    flag, rows = "there" if figure == "seconds" else "each", []
    for r in sorted(peers, key=lambda r: r[figure]):
        title = METHODS[r["method"]].title + ("" if r[flag] else " (never: its budget)")
        rows.append(dict(figure=f"seconds to {FIGURES[figure]}: ours / {title}", ours=ours[figure], peer=r[figure],
                         ratio=round(ours[figure] / r[figure], 3), goal=None, met=None, runs=1))
    if not rows: return []
    met = bool(ours[flag] and rows[0]["ratio"] <= SHARE)
    return [*rows, rows[0] | dict(figure=f"seconds to {FIGURES[figure]}: ours / the best peer", goal=SHARE, met=met)]

def write(trials, options):
    "The figures so far, so that an end before time loses nothing."
    results = [t.result() for t in trials]
    machine = dict(cpus=os.cpu_count(), machine=platform.machine(), python=platform.python_version(),
                   torch=version("torch"), load=os.getloadavg()[0])
    about = dict(machine=machine, budget=options.budget, rows=rows_of(results), methods=results, sweep=options.swept)
    part = options.json.with_name(options.json.name + ".part")
    part.write_text(json.dumps(about, indent=1) + "\n")
    part.rename(options.json)

def side_by_side(trials, options, pool, ends):
    "Run the trials, so many at once, and let the judge look at what they leave."
    waiting, base = list(trials), pool.apply_async(judged, ("", None, trials[0].marks == 1))
    while any(t.running() or t.waits() for t in trials) or waiting:
        if time.time() > ends + options.grace: break
        while waiting and sum(t.running() for t in trials) < options.jobs: waiting.pop(0).begin(options, ends)
        for t in trials: t.ask(pool)
        heard = [t for t in trials if base.ready() and t.hear(base.get())]
        for t in heard: print(f"{time.strftime('%H:%M:%S')} {line_of(t.result())}", flush=True)
        if heard and options.json: write(trials, options)
        time.sleep(.5)
    for t in trials:
        if t.running(): t.process.kill()

def best_values(names, options, pool, folder, ends):
    "The value of each method's knob, swept if that is asked for."
    values = {name: METHODS[name].chosen for name in names}
    trials = [Trial(n, v, folder, options.sweep, 1) for n in names for v in METHODS[n].tried] if options.sweep else []
    if not trials: return values
    side_by_side(trials, options, pool, ends)
    options.swept = [t.result() for t in trials]
    found = [r for r in options.swept if r["best"]]
    for r in sorted(found, key=lambda r: r["best"]["composite"]): values[r["method"]] = r["value"]
    return values

def compare_all(options):
    "The whole comparison, and its table."
    cores, ends = os.cpu_count(), time.time() + options.within
    names = options.methods.split(",") if options.methods else list(METHODS)
    if unknown := set(names) - set(METHODS): sys.exit(f"no method {unknown}; there are: {', '.join(METHODS)}")
    judges = options.judges or max(cores - options.jobs, 1)
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(judges) as pool:
        values = best_values(names, options, pool, Path(folder), ends)
        trials = [Trial(name, values[name], Path(folder), options.budget) for name in names]
        side_by_side(trials, options, pool, ends)
        if options.json: write(trials, options)
    print(f"\n{options.budget:g} s a method, {options.jobs} side by side, one thread each, {cores} cores; judged on "
          f"{PROMPTS} development prompts: spatial, iconographic, style, fidelity, material in brackets\n")
    results = [t.result() for t in trials]
    for r in sorted(results, key=lambda r: r["seconds"]): print(line_of(r))
    for row in rows_of(results):
        print(f"{row['figure']:<112} {row['ours']:7.0f} {row['peer']:7.0f}  ratio {row['ratio']:.2f}")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=ROOT/"outputs/test_pipeline", help="a finished test-pipeline")
    parser.add_argument("--budget", type=float, default=600., help="a method's clock, seconds")
    parser.add_argument("--methods", default="", help=f"some of {','.join(METHODS)}")
    parser.add_argument("--jobs", type=int, default=1, help="methods side by side")
    parser.add_argument("--judges", type=int, default=0, help="processes that judge; 0: the other cores")
    parser.add_argument("--within", type=float, default=1e6, help="seconds on the wall after which methods end")
    parser.add_argument("--grace", type=float, default=600., help="seconds more in which the judge may end")
    parser.add_argument("--trl", type=Path, help="folder in which TRL 0.23 was unpacked")
    parser.add_argument("--sweep", type=float, default=0., help="seconds for each value that METHODS names, beforehand")
    parser.add_argument("--quick", action="store_true", help="half a minute a method: whether everything runs")
    parser.add_argument("--json", type=Path, help="also write the figures to this file, again and again")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--value", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--marks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work: return work(options)
    options.swept = []
    if options.quick: options.budget = 30.
    with suppress(KeyboardInterrupt): compare_all(options)

if __name__ == "__main__": main()
