"""The documentation can be made. `nbdev-docs` runs the exported cells and those with an import, and no others; what
they use must come from such cells."""
from pathlib import Path
import ast, builtins, dis

from fastcore.nbio import read_nb
import pytest

ROOT = Path(__file__).parent.parent
HIDDEN = ("_", ".")
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb")
                   if not any(part.startswith(HIDDEN) for part in p.relative_to(ROOT).parts))

def run_by_docs(cell):
    "Whether `nbdev-docs` runs a cell."
    if cell.cell_type != "code" or cell.directives.get("eval") == "false": return False
    if "nbdev_export()" in cell.source: return False
    exported = {"export", "exports", "exporti"} & set(cell.directives)
    return exported or any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(ast.parse(cell.source)))

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[str(p.relative_to(ROOT)) for p in NOTEBOOKS])
def test_cells_that_the_documentation_runs_stand_alone(notebook):
    known, faults = {*vars(builtins), "display", "get_ipython", "show_doc", "__annotations__", "__name__"}, []
    for cell in filter(run_by_docs, read_nb(notebook).cells):
        for step in dis.get_instructions(compile(cell.source, cell.id, "exec")):
            if step.opname in ("STORE_NAME", "IMPORT_NAME"): known.add(step.argval)
            if step.opname == "LOAD_NAME" and step.argval not in known:
                faults.append(f"cell {cell.id} uses {step.argval}")
    assert not faults, f"{faults[:5]}: give the import a cell of its own"
