"""The documentation can be made: what `nbdev-docs` does with each notebook before Quarto draws it."""
from pathlib import Path

from fastcore.nbio import read_nb
from nbdev.processors import FilterDefaults
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(ROOT).parts))

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[str(p.relative_to(ROOT)) for p in NOTEBOOKS])
def test_documentation_of(notebook, monkeypatch):
    "nbdev runs the exported cells and those with an import, and no others: an import stands in a cell of its own."
    monkeypatch.chdir(ROOT)
    FilterDefaults()(read_nb(notebook))
