"""What an update of the tuning costs: its parts, and the ratios that decide a setting.

python benchmarks/update.py --run outputs/test_pipeline [--updates 6] [--rounds 5] [--json FILE]

--run is the folder of a finished test-pipeline. Five heads beside one and DoRA beside LoRA: processor seconds of one
thread, in turns, so that a busy machine slows both. Two processes beside one: seconds on the clock, for which two free
cores are needed. Of every ratio the median over the rounds is told, with the smallest and the largest."""
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
import argparse, json, os, platform, socket

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
               "TOKENIZERS_PARALLELISM": "false"}

import torch

from mhrlhf.core.group import Team
from mhrlhf.core.settings import load_settings
from mhrlhf.tuning.dspo import prepare
from mhrlhf.tuning.loop import draw_batch, step, targets
from mhrlhf.tuning.objectives import match

ROOT = Path(__file__).resolve().parent.parent

def begun(run, team=Team(), **changes):
    "A tuning after its first update, whose reach is not measured."
    settings = load_settings("train-dspo", "pocket", ROOT/"settings.ini", reward_model=run/"multihead_reward_model",
                             balance="equal", **changes)
    tuning = prepare(settings, torch.device("cpu"), team)
    step(tuning)
    return tuning

def with_one_head(tuning):
    "The same tuning, whose heads say one number."
    for net in tuning.heads.nets:
        last = net.out[-1]
        one = torch.nn.Linear(last.in_features, 1).requires_grad_(False)
        one.weight.copy_(last.weight[:1])
        one.bias.copy_(last.bias[:1])
        net.out[-1] = one
    tuning.weights = tuning.weights[:1]
    return tuning

def seconds(tuning, updates, clock=process_time):
    "Of an update."
    began = clock()
    for _ in range(updates): step(tuning)
    return (clock() - began) / updates

def in_turns(first, second, updates, rounds):
    "The ratio first / second in each round."
    return [seconds(first, updates) / seconds(second, updates) for _ in range(rounds)]

def parts(tuning, rounds):
    "Processor seconds of what an update consists of."
    found = {"reference and the heads' gradient": [], "prediction": [], "backward": []}
    for _ in range(rounds):
        batch, times = draw_batch(tuning), [process_time()]
        _, target = targets(tuning, batch)
        times.append(process_time())
        said = tuning.denoiser(batch.noisy.detach(), batch.timestep, batch.text)
        times.append(process_time())
        match(said, target, torch.ones(len(said))).mean().backward()
        times.append(process_time())
        for values, start, end in zip(found.values(), times, times[1:]): values.append(end - start)
    return {part: round(median(values), 3) for part, values in found.items()}

def _rank(rank, world, port, run, updates, path):
    "One of the processes; the first writes the seconds on the clock of an update."
    torch.set_num_threads(1)
    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    os.environ |= address
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    tuning = begun(run, Team(rank, world))
    torch.distributed.barrier()
    took = seconds(tuning, updates, perf_counter)
    if rank == 0: Path(path).write_text(str(took))
    torch.distributed.destroy_process_group()

def by_processes(world, run, updates, path):
    "Seconds on the clock of an update by so many processes."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (world, port, run, updates, str(path)), world)
    return float(path.read_text())

def summary(name, ratios, goal):
    row = dict(figure=name, ratio=round(median(ratios), 3), low=round(min(ratios), 3), high=round(max(ratios), 3),
               goal=goal)
    print(f"{name:<48}{row['ratio']:6.2f}  [{row['low']:.2f}, {row['high']:.2f}]  goal {goal}", flush=True)
    return row

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=ROOT/"outputs/test_pipeline", help="a finished test-pipeline")
    parser.add_argument("--updates", type=int, default=6, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    o = parser.parse_args()
    torch.set_num_threads(1)
    run = o.run.resolve()
    dora, lora, one = begun(run), begun(run, adapter="lora"), with_one_head(begun(run))
    spent = parts(dora, o.rounds)
    print("processor seconds of an update's parts:", ", ".join(f"{k} {v:.2f}" for k, v in spent.items()), flush=True)
    rows = [summary("five heads / one head, an update", in_turns(dora, one, o.updates, o.rounds), "<= 1.1"),
            summary("DoRA / LoRA, an update", in_turns(dora, lora, o.updates, o.rounds), "<= 1.3")]
    note = run/"seconds-of-an-update"
    ratios = [by_processes(1, run, o.updates, note) / by_processes(2, run, o.updates, note) for _ in range(o.rounds)]
    note.unlink()
    rows.append(summary("one process / two, seconds on the clock", ratios, ">= 1.8"))
    about = dict(cpus=os.cpu_count(), machine=platform.machine(), torch=torch.__version__, parts=spent, rows=rows)
    if o.json: o.json.write_text(json.dumps(about, indent=1) + "\n")

if __name__ == "__main__": main()
