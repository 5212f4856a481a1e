"""Two hosts on one machine, as two network namespaces that share nothing but a disk; needs root:
python benchmarks/nodes.py --folder FOLDER [--reward FOLDER] [--json FILE].

The stages as on a cluster, through accelerate's own multi-node launch with the words of slurm/*.sbatch: generate from
one queue, its images beside those of one process; a host that is killed in the midst of it, and comes back; and, with
the folder of a reward model of the pocket, an update of train-dspo and a small evaluation beside one process. Two hosts
on one machine say that it works, not how fast."""
from contextlib import contextmanager
from pathlib import Path
import argparse, json, os, signal, subprocess, sys, time

ROOT = Path(__file__).resolve().parent.parent
HOSTS, PORT = ("10.77.0.1", "10.77.0.2"), 29531
MHRLHF = [sys.executable, "-c", "import sys; from mhrlhf.cli import main; sys.exit(main())"]
CHOSEN = ["--profile", "pocket", "--settings", str(ROOT / "settings.ini")]

# Two hosts ---------------------------------------------------------------------------------------------------

def ip(*words): subprocess.run(["ip", *words], check=True)

@contextmanager
def two_hosts():
    "Two namespaces and a cable between them, taken away at the end."
    names = [f"mhrlhf-{os.getpid()}-{i}" for i in range(2)]
    ends = [f"mh{os.getpid() % 100000}-{i}" for i in range(2)]
    for name in names: ip("netns", "add", name)
    try:
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, HOSTS):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for device in ("lo", end): ip("-n", name, "link", "set", device, "up")
        yield list(zip(names, ends))
    finally:
        for name in names: ip("netns", "del", name)

def launch(rank, host, words, log):
    "A command on one of the hosts, as a node of the group."
    name, end = host
    flags = ["--multi_gpu", "--num_machines=2", "--num_processes=2", f"--machine_rank={rank}",
             f"--main_process_ip={HOSTS[0]}", f"--main_process_port={PORT}", "--rdzv_backend=static",
             "--mixed_precision=no", "--dynamo_backend=no", "--no_python"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, *MHRLHF, *words, *CHOSEN]
    environment = os.environ | dict(GLOO_SOCKET_IFNAME=end, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.Popen(["ip", "netns", "exec", name, *command], stdout=log, stderr=log, env=environment,
                            start_new_session=True)

def on_both(hosts, words, log):
    "Exit codes of a command that both hosts run, and its seconds."
    start = time.perf_counter()
    nodes = [launch(rank, host, words, log) for rank, host in enumerate(hosts)]
    return [node.wait() for node in nodes], time.perf_counter() - start

def alone(words, log):
    "The same by one process on no host at all."
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    subprocess.run([*MHRLHF, *words, *CHOSEN], stdout=log, stderr=log, env=environment, check=True)

def kill(host, process):
    "All that runs on a host ends at once."
    there = subprocess.run(["ip", "netns", "pids", host[0]], capture_output=True, text=True).stdout
    for pid in map(int, there.split()): os.kill(pid, signal.SIGKILL)
    process.wait()

# What is tried -----------------------------------------------------------------------------------------------

def pixels(folder):
    import numpy as np
    from mhrlhf.images.pixels import read_image
    return {str(p.relative_to(folder)): np.asarray(read_image(p)) for p in sorted(Path(folder).rglob("*.png"))}

def same(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)

def generating(name, images):
    return ["generate", "--prompts", str(ROOT / "data/prompts.csv"), "--limit", str(images // 2), "--steps", "8",
            "--batch", "4", "--images", name, "--metadata", f"{name}.csv"]

def try_generate(hosts, log, images):
    alone(generating("alone", images), log)
    codes, seconds = on_both(hosts, generating("both", images), log)
    return dict(codes=codes, seconds=seconds, same_images=same(pixels("alone"), pixels("both")))

def try_death(hosts, log, images):
    "Host 1 is killed after some images; what host 0 does; the same command on both goes on."
    start = time.perf_counter()
    nodes = [launch(rank, host, generating("killed", images), log) for rank, host in enumerate(hosts)]
    while len(list(Path("killed").rglob("*.png"))) < images // 4 and nodes[1].poll() is None: time.sleep(.05)
    kill(hosts[1], nodes[1])
    killed_at, died = len(list(Path("killed").rglob("*.png"))), time.perf_counter()
    code, ended = nodes[0].wait(), time.perf_counter()
    left = len(list(Path("killed").rglob("*.png")))
    codes, seconds = on_both(hosts, generating("killed", images), log)
    return dict(images_when_killed=killed_at, other_host_ends_with=code, after_s=ended - died, images_then=left,
                of=images, codes_when_back=codes, seconds=time.perf_counter() - start,
                same_images=same(pixels("alone"), pixels("killed")))

def tuning(reward, output, updates):
    return ["train-dspo", "--reward-model", reward, "--output", output, "--updates", str(updates), "--watched", "4",
            "--watch-steps", "2", "--watch-every", str(updates), "--batch", "4", "--rank", "4"]

def try_tuning(hosts, log, reward, updates=2):
    "The adapter that two hosts tune, beside the one of one process."
    from safetensors.torch import load_file
    codes, seconds = on_both(hosts, tuning(reward, "dspo-both", updates), log)
    alone(tuning(reward, "dspo-alone", updates), log)
    both, one = (load_file(f"dspo-{name}/checkpoints/latest.safetensors") for name in ("both", "alone"))
    differs = max(((both[k] - one[k]).norm() / one[k].norm().clamp(min=1e-6)).item()
                  for k in one if k.startswith("parameter"))
    return dict(codes=codes, seconds=seconds, updates=updates, adapters_differ=differs)

def evaluating(output):
    return ["evaluate", "--model", "dspo-alone", "--output", output, "--limit", "4", "--steps", "2",
            "--prompts", str(ROOT / "data/prompts_heldout.csv"), "--batch", "2", "--cache", f"cache-{output}"]

def try_evaluation(hosts, log):
    codes, seconds = on_both(hosts, evaluating("evaluation-both"), log)
    alone(evaluating("evaluation-alone"), log)
    found = [pixels(f"evaluation-{name}/images") for name in ("both", "alone")]
    return dict(codes=codes, seconds=seconds, images=len(found[0]), same_images=same(*found))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="written")
    parser.add_argument("--reward", default="", help="folder of a pocket's reward model, to tune by")
    parser.add_argument("--json", default="", help="also write what was found here")
    parser.add_argument("--images", type=int, default=48, help="of generate")
    options = parser.parse_args()
    target, reward = (path and str(Path(path).absolute()) for path in (options.json, options.reward))
    os.makedirs(options.folder, exist_ok=True)
    os.chdir(options.folder)
    sys.path.insert(0, str(ROOT))
    found = {}
    def tell(name, result):
        found[name] = result
        print(name, result, flush=True)
        if target: Path(target).write_text(json.dumps(found, indent=1) + "\n")
    with two_hosts() as hosts, open("log.txt", "a") as log:
        tell("generate", try_generate(hosts, log, options.images))
        tell("generate, a host dies and comes back", try_death(hosts, log, options.images))
        if not reward: return 0
        tell("train-dspo", try_tuning(hosts, log, reward))
        tell("evaluate", try_evaluation(hosts, log))
    return 0

if __name__ == "__main__": sys.exit(main())
