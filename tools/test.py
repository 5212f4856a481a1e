"""`make test`: the house's order, every notebook, tests/. Every phase runs, whatever the others said; the exit code tells of all."""
from pathlib import Path
from time import monotonic
import os, shutil, subprocess, sys

BIN = Path(sys.executable).parent
WORKERS = "2"
PHASES = {  # the last one's closing line ends the run
    "the house: sync, clean, imports": [sys.executable, "-m", "pytest", "-q", "tests/test_house.py"],
    "the notebooks": [BIN / "nbdev-test", "--n-workers", WORKERS, "--timing"],
    "tests/": [sys.executable, "-m", "pytest", "-q", "--durations", "5", "tests", "--ignore", "tests/test_house.py"],
}

def browser():
    "Chromium for the panel's tests, where a CI machine has none and Debian's packages can be installed."
    if shutil.which("chromium") or not os.environ.get("CI") or os.geteuid() or not shutil.which("apt-get"): return
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]): subprocess.run(command, stdout=subprocess.DEVNULL)

def main():
    browser()
    os.chdir(Path(__file__).parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    failed, start = [], monotonic()
    for number, (name, command) in enumerate(PHASES.items(), 1):
        print(f"\n== {number}/{len(PHASES)} {name} (after {monotonic() - start:.0f} s)", flush=True)
        if subprocess.run(command, env=environment).returncode: failed.append(name)
    if failed: sys.exit(f"failed after {monotonic() - start:.0f} s: {'; '.join(failed)}")

if __name__ == "__main__": main()
