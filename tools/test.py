"""`make test`: lint, every notebook, tests/. Every phase runs, whatever the others said; the exit code tells of all.
`tools/test.py lint types` (`make lint`) runs these, `tools/test.py house` the house's order alone."""
from pathlib import Path
from time import monotonic
import os, shutil, subprocess, sys

BIN = Path(sys.executable).parent
PYTEST = [sys.executable, "-m", "pytest", "-q"]
WORKERS = "2"
LONGEST = "faults site panel_browser pocket reward tuning house panel_app proof_browser".split()  # by processor time

def in_order():
    "The files of tests, the longest first: no worker waits at the end."
    names = [path.stem.removeprefix("test_") for path in (Path(__file__).parent.parent / "tests").glob("test_*.py")]
    return [f"tests/test_{name}.py" for name in [*LONGEST, *sorted({*names} - {*LONGEST})]]

PHASES = {  # the last one's closing line ends the run
    "lint": [BIN / "ruff", "check", "."],
    "types": [BIN / "mypy"],
    "notebooks": [sys.executable, "tools/notebooks.py", WORKERS],
    "tests": [*PYTEST, *f"-n {WORKERS} --dist loadfile --no-loadscope-reorder --durations 9".split(), *in_order()],
}
ALONE = {"house": [*PYTEST, "tests/test_house.py"]}  # a part of the tests
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# glibc gives large blocks back to the system and takes them again, page by page; kept, a fifth of a training is saved.
KEPT = {"MALLOC_MMAP_THRESHOLD_": f"{2**30}", "MALLOC_TRIM_THRESHOLD_": f"{2**32}", "MALLOC_TOP_PAD_": f"{2**26}"}

def browser():
    "Chromium for the panel's tests, where a CI machine has none and Debian's packages can be installed."
    if shutil.which("chromium") or not os.environ.get("CI") or os.geteuid() or not shutil.which("apt-get"): return
    for command in ("update -qq", "install -y -qq --no-install-recommends chromium"):
        subprocess.run(["apt-get", *command.split()], stdout=subprocess.DEVNULL)

def main():
    os.chdir(Path(__file__).parent.parent)
    chosen = sys.argv[1:] or list(PHASES)
    phases = PHASES | ALONE
    if unknown := set(chosen) - set(phases): sys.exit(f"no phase {unknown}; there are: {', '.join(phases)}")
    if "tests" in chosen: browser()
    environment = os.environ | QUIET | KEPT | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # each of a hundred processes would compile its imports anew
    failed, start = [], monotonic()
    for number, name in enumerate(chosen, 1):
        print(f"\n== {number}/{len(chosen)} {name} (after {monotonic() - start:.0f} s)", flush=True)
        if subprocess.run(phases[name], env=environment).returncode: failed.append(name)
    if failed: sys.exit(f"failed after {monotonic() - start:.0f} s: {'; '.join(failed)}")

if __name__ == "__main__": main()
