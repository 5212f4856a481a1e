"""`make test`: lint, the house's order, every notebook, tests/. Every phase runs, whatever the others said; the exit
code tells of all. `tools/test.py lint types` (`make lint`) runs these."""
from pathlib import Path
from time import monotonic
import os, shutil, subprocess, sys

BIN = Path(sys.executable).parent
PYTEST = [sys.executable, "-m", "pytest", "-q"]
WORKERS = "2"
PHASES = {  # the last one's closing line ends the run
    "lint": [BIN / "ruff", "check", "."],
    "types": [BIN / "mypy"],
    "house": [*PYTEST, "tests/test_house.py"],
    "notebooks": [BIN / "nbdev-test", "--n-workers", WORKERS, "--timing"],
    "tests": [*PYTEST, *f"-n {WORKERS} --dist loadfile --durations 9 tests --ignore tests/test_house.py".split()],
}
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

def browser():
    "Chromium for the panel's tests, where a CI machine has none and Debian's packages can be installed."
    if shutil.which("chromium") or not os.environ.get("CI") or os.geteuid() or not shutil.which("apt-get"): return
    for command in ("update -qq", "install -y -qq --no-install-recommends chromium"):
        subprocess.run(["apt-get", *command.split()], stdout=subprocess.DEVNULL)

def main():
    os.chdir(Path(__file__).parent.parent)
    chosen = sys.argv[1:] or list(PHASES)
    if unknown := set(chosen) - set(PHASES): sys.exit(f"no phase {unknown}; there are: {', '.join(PHASES)}")
    if "tests" in chosen: browser()
    environment = os.environ | QUIET | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    failed, start = [], monotonic()
    for number, name in enumerate(chosen, 1):
        print(f"\n== {number}/{len(chosen)} {name} (after {monotonic() - start:.0f} s)", flush=True)
        if subprocess.run(PHASES[name], env=environment).returncode: failed.append(name)
    if failed: sys.exit(f"failed after {monotonic() - start:.0f} s: {'; '.join(failed)}")

if __name__ == "__main__": main()
