"""Two hosts on one machine that share nothing but a disk: two network namespaces with a cable between them (root, Linux
and iproute2 are needed): python benchmarks/nodes.py --folder FOLDER [--reward FOLDER] [--json FILE].

The stages as on a cluster, by slurm/stage.sbatch itself, on the pocket: generate from one queue; the power of each host
failing in the midst of it, and back again; and, with the folder of one of the pocket's reward models, updates of
train-dspo, a host whose processes are killed in the midst of them, and an evaluation. Each is set beside one process.
That it works is measured here, not how fast."""
from contextlib import contextmanager, suppress
from pathlib import Path
import argparse, json, os, signal, subprocess, sys, time

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from safetensors.torch import load_file

from mhrlhf.images.metadata import read_metadata
from mhrlhf.images.pixels import read_image

ADDRESSES = "10.77.0.1", "10.77.0.2"
PATIENCE = 400  # seconds that a host may take to find that another one is gone
MHRLHF = [sys.executable, "-c", "import sys; from mhrlhf.cli import main; sys.exit(main())"]
SETTINGS = ["--settings", str(ROOT / "settings.ini")]
ENVIRONMENT = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT), PROFILE="pocket")
SLURM = dict(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="both", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1",
             SLURM_CPUS_PER_TASK="1")
COMMANDS = {  # SLURM's own, as far as the script needs them: here each host is told its number beforehand
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/bash\nprintf '%s\\n' " + " ".join(ADDRESSES) + "\n"}

# Two hosts ---------------------------------------------------------------------------------------------------

def ip(*words): subprocess.run(["ip", *words], check=True)

@contextmanager
def two_hosts():
    "Names of two namespaces and of their network cards; taken away at the end, with all that runs there."
    names = [f"mhrlhf-{os.getpid()}-{i}" for i in range(2)]
    cards = [f"mh{os.getpid() % 10**7}-{i}" for i in range(2)]
    try:
        for name in names: ip("netns", "add", name)
        ip("link", "add", cards[0], "type", "veth", "peer", "name", cards[1])
        for name, card, address in zip(names, cards, ADDRESSES):
            ip("link", "set", card, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", card)
            for device in ("lo", card): ip("-n", name, "link", "set", device, "up")
        yield list(zip(names, cards))
    finally:
        kill(*names)
        for name in names: subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)

def kill(*names):
    "All that runs on hosts ends at once."
    for name in names:
        there = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
        for pid in map(int, there.split()):
            with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)

def cut_off(host):
    "A host's power fails: it says no goodbye to the others."
    name, card = host
    ip("-n", name, "link", "set", card, "down")
    kill(name)

def switch_on(host):
    name, card = host
    ip("-n", name, "link", "set", card, "up")

def prepare(folder):
    "SLURM's commands and the environment, where the script looks for them."
    there = Path(folder) / "bin"
    there.mkdir(parents=True, exist_ok=True)
    for name, text in COMMANDS.items():
        (there / name).write_text(text)
        (there / name).chmod(0o755)
    activate = Path(folder) / ".venv/bin/activate"
    activate.parent.mkdir(parents=True, exist_ok=True)
    activate.write_text(f"PATH={Path(sys.executable).parent}:$PATH\n")

def start(rank, host, words, log):
    "The script on one of the hosts, as SLURM starts it there, in the folder that is current."
    name, card = host
    own = dict(SLURM_PROCID=str(rank), SLURM_SUBMIT_DIR=os.getcwd(), GLOO_SOCKET_IFNAME=card,
               PATH=f"{os.getcwd()}/bin:{os.environ['PATH']}")
    script = ["bash", str(ROOT / "slurm/stage.sbatch"), *words, *SETTINGS]
    return subprocess.Popen(["ip", "netns", "exec", name, *script], stdout=log, stderr=log,
                            env=ENVIRONMENT | SLURM | own, start_new_session=True)

def on_both(hosts, words, log):
    "Exit codes of a command that both hosts run; one that fails takes the other with it, as by srun."
    nodes = [start(rank, host, words, log) for rank, host in enumerate(hosts)]
    while any(node.poll() is None for node in nodes):
        if any(node.poll() for node in nodes): kill(*(name for name, _ in hosts))
        time.sleep(.1)
    return [node.returncode for node in nodes]

def alone(words, log):
    "The same by one process, which is on none of the hosts."
    subprocess.run([*MHRLHF, *words, *SETTINGS], stdout=log, stderr=log, env=ENVIRONMENT, check=True)

# What is tried -----------------------------------------------------------------------------------------------

def images_in(folder): return sorted(Path(folder).rglob("*.png"))

def same_images(*folders):
    "Whether two folders hold the same images, to the bit."
    one, other = ({p.relative_to(f): np.asarray(read_image(p)) for p in images_in(f)} for f in folders)
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)

def generating(name, count):
    return ["generate", "--prompts", str(ROOT / "data/prompts.csv"), "--limit", str(count // 2), "--seeds", "2",
            "--steps", "8", "--batch", "4", "--images", name, "--metadata", f"{name}.csv"]

def try_generate(hosts, log, count):
    alone(generating("alone", count), log)
    codes = on_both(hosts, generating("both", count), log)
    each = read_metadata("both.csv").worker.value_counts().sort_index().to_dict()
    return dict(images_by_host=each, exit_codes=codes, as_by_one_process=same_images("alone", "both"))

def try_death(hosts, log, count, dying):
    "The power of one host fails after a quarter of the images; what the other one does; then both are started again."
    name = f"host-{dying}-dies"
    nodes = [start(rank, host, generating(name, count), log) for rank, host in enumerate(hosts)]
    while len(images_in(name)) < count // 4 and all(node.poll() is None for node in nodes): time.sleep(.02)
    cut_off(hosts[dying])
    died = time.perf_counter()
    try: code = nodes[1 - dying].wait(PATIENCE)
    except subprocess.TimeoutExpired: code = "none"
    waited, left = time.perf_counter() - died, len(images_in(name))
    kill(hosts[1 - dying][0])  # as SLURM does when a node is gone
    for node in nodes: node.wait()
    switch_on(hosts[dying])
    codes = on_both(hosts, generating(name, count), log)
    return dict(images=count, there_after_the_death=left, other_ends_with=code, after_s=round(waited, 1),
                exit_codes=codes, as_by_one_process=same_images("alone", name))

UPDATES, LOOKS = 4, 2  # of the tuning; updates between two looks, after which a run goes on

def tuning(reward, output):
    return ["train-dspo", "--reward-model", reward, "--output", output, "--updates", str(UPDATES), "--watched", "4",
            "--watch-steps", "2", "--watch-every", str(LOOKS), "--batch", "4", "--rank", "4"]

def difference(*folders):
    "Of two adapters, as a share of the second one's size."
    one, other = (load_file(f"{folder}/checkpoints/latest.safetensors") for folder in folders)
    names = [name for name in other if name.startswith("parameter")]
    wrong, size = sum((one[n] - other[n]).norm() ** 2 for n in names), sum(other[n].norm() ** 2 for n in names)
    return (wrong / size).sqrt().item()

def try_tuning(hosts, log, reward):
    "The adapter that two hosts tune, beside the one of one process."
    alone(tuning(reward, "tuned-alone"), log)
    codes = on_both(hosts, tuning(reward, "tuned-by-both"), log)
    return dict(updates=UPDATES, exit_codes=codes, differs_by=difference("tuned-by-both", "tuned-alone"))

def try_death_of_tuning(hosts, log, reward):
    "The processes of one host are killed after the first look; both are started again."
    command, checkpoint = tuning(reward, "tuned-again"), Path("tuned-again/checkpoints/latest.safetensors")
    nodes = [start(rank, host, command, log) for rank, host in enumerate(hosts)]
    while not checkpoint.exists() and all(node.poll() is None for node in nodes): time.sleep(.02)
    died = time.perf_counter()
    kill(hosts[1][0])
    code = nodes[0].wait()
    waited = time.perf_counter() - died
    codes = on_both(hosts, command, log)
    return dict(updates=UPDATES, other_ends_with=code, after_s=round(waited, 1), exit_codes=codes,
                differs_by=difference("tuned-again", "tuned-alone"))

def evaluating(output):
    return ["evaluate", "--model", "tuned-alone", "--output", output, "--limit", "4", "--steps", "2",
            "--prompts", str(ROOT / "data/prompts_heldout.csv"), "--batch", "2", "--cache", f"{output}-features"]

def try_evaluation(hosts, log):
    codes = on_both(hosts, evaluating("evaluated-by-both"), log)
    alone(evaluating("evaluated-alone"), log)
    same = same_images("evaluated-by-both", "evaluated-alone")
    return dict(images=len(images_in("evaluated-by-both")), exit_codes=codes, as_by_one_process=same)

# The command -------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="written; log.txt is what the commands said")
    parser.add_argument("--reward", default="", help="folder of a pocket's reward model, to tune by")
    parser.add_argument("--json", default="", help="also write what was found here")
    parser.add_argument("--images", type=int, default=48, help="of generate")
    options = parser.parse_args()
    target, reward = (path and str(Path(path).absolute()) for path in (options.json, options.reward))
    prepare(options.folder)
    os.chdir(options.folder)
    found = {}
    def tell(name, result):
        found[name] = result
        print(f"{name}: ", *(f"{k} {v}" for k, v in result.items()), sep="  ", flush=True)
        if target: Path(target).write_text(json.dumps(found, indent=1) + "\n")
    with two_hosts() as hosts, open("log.txt", "a") as log:
        tell("generate", try_generate(hosts, log, options.images))
        for dying in (1, 0):
            tell(f"generate, host {dying} loses power and comes back", try_death(hosts, log, options.images, dying))
        if not reward: return 0
        tell("train-dspo", try_tuning(hosts, log, reward))
        tell("train-dspo, host 1 is killed and comes back", try_death_of_tuning(hosts, log, reward))
        tell("evaluate", try_evaluation(hosts, log))
    return 0

if __name__ == "__main__": sys.exit(main())
