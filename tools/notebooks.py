"""Every notebook by nbdev's own test of it, as `nbdev-test` runs them, but the longest first, so that no worker waits
at the end, and with the libraries that nearly all need imported once, before the workers fork."""
from pathlib import Path
from time import monotonic
import os, sys

from fastcore.parallel import parallel
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb

ROOT = Path(__file__).parent.parent
LONGEST = (  # by processor time; they are half of it
    "tuning/56_dspo", "tuning/55_loop", "tutorials/01_whole_workflow", "images/16_generate", "tuning/54_guide",
    "pocket/28_train", "reward/47_train", "images/11_sampler", "reward/46_noise", "pocket/27_second_judge",
    "ratings/35_agreement")

def in_order(notebooks):
    "The longest first, the others by their names."
    first = {f"{name}.ipynb": place for place, name in enumerate(LONGEST)}
    def place(path): return first.get(path.relative_to(ROOT / "nbs").as_posix(), len(first)), path
    return sorted(notebooks, key=place)

def timed(notebook, **options):
    "Whether a notebook passed, and its line."
    start, cpu = monotonic(), os.times()
    passed, _ = test_nb(notebook, **options)
    spent = sum(os.times()[:4]) - sum(cpu[:4])
    return passed, f"{notebook.relative_to(ROOT)}: {monotonic() - start:.0f} s, {spent:.0f} s of a processor"

def main(workers):
    from diffusers import StableDiffusionXLPipeline  # noqa: F401
    config, notebooks = get_config(ROOT), in_order(Path(p).absolute() for p in nbglob(ROOT / "nbs"))
    options = dict(skip_flags=config.tst_flags.split(), basepath=ROOT, cell_timeout=config.cell_timeout)
    from notebooks import timed as work  # by a name of its own: `__main__` becomes the notebook
    results = parallel(work, notebooks, n_workers=workers, **options)
    for _, line in results: print(line)
    failed = [line for passed, line in results if not passed]
    if failed: sys.exit("\n".join(["these notebooks failed:", *failed]))

if __name__ == "__main__": main(int(sys.argv[1]))
