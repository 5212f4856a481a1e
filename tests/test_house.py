"""The house's order: notebooks, modules, README and package are one thing in step. Nothing here needs the models."""
from functools import cache
from pathlib import Path
from statistics import median
import ast, filecmp, json, os, re, shutil, subprocess, sys, tomllib, zipfile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ROOMS = ["core", "images", "pocket", "ratings", "reward", "tuning", "proof", "top"]  # in the order of their imports
LONGEST, MEDIAN = 45, 15  # lines of an exported cell, its directives counted

def hidden(path): return any(part[0] in "._" for part in path.relative_to(ROOT).parts)

def names(paths): return [str(p.relative_to(ROOT)) for p in paths]

def module_name(path): return ".".join(path.relative_to(ROOT).with_suffix("").parts)

def without_pythonpath(): return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not hidden(p))
MODULES = sorted(p for p in (ROOT / "mhrlhf").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))

@cache
def cells(notebook):
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]

def code(notebook):
    return [source for kind, source in cells(notebook) if kind == "code"]

def exported_cells(notebook):
    return [source for source in code(notebook) if source.startswith("#| export")]

def prose(notebook):
    "Its Markdown without blocks of code."
    text = "\n".join(source for kind, source in cells(notebook) if kind == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)

def outside(code, tmp_path, *arguments):
    "Run Python where nothing but the installed package can be found."
    command = [sys.executable, "-I", "-c", code, *arguments]
    return subprocess.run(command, cwd=tmp_path, env=without_pythonpath(), capture_output=True, text=True)

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the project whose modules were made anew, and whose notebooks were cleaned."
    copy = tmp_path_factory.mktemp("copy")
    left_out = shutil.ignore_patterns("weights", "__pycache__", ".ipynb_checkpoints")
    for part in ("nbs", "mhrlhf"): shutil.copytree(ROOT / part, copy / part, ignore=left_out)
    for name in ("pyproject.toml", "README.md"): shutil.copy(ROOT / name, copy / name)
    for path in MODULES + [ROOT / "mhrlhf/_modidx.py"]: (copy / path.relative_to(ROOT)).unlink()
    for command in ("nbdev-export", "nbdev-clean"):
        done = subprocess.run([BIN / command], cwd=copy, capture_output=True, text=True, env=without_pythonpath())
        assert done.returncode == 0, done.stderr
    return copy

# Notebooks and modules

def test_modules_are_what_the_notebooks_export(exported):
    made = {p.relative_to(exported) for p in (exported / "mhrlhf").rglob("*.py")}
    there = {p.relative_to(ROOT) for p in (ROOT / "mhrlhf").rglob("*.py")}
    lone = sorted(map(str, made ^ there))
    assert made == there, f"a module without a notebook or a notebook without its module: {lone}"
    stale = [str(p) for p in sorted(made) if not filecmp.cmp(exported / p, ROOT / p, shallow=False)]
    assert not stale, f"not in step with their notebooks: {stale}; nbdev-export"

def test_notebooks_are_clean(exported):
    unclean = [n for n in names(NOTEBOOKS) if not filecmp.cmp(exported / n, ROOT / n, shallow=False)]
    assert not unclean, f"{unclean}; nbdev-clean"

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_is_readable(notebook):
    assert notebook.stat().st_size < 1_000_000, "over 1 MB"
    lines = prose(notebook).splitlines()
    titles = [line for line in lines if line.startswith("# ")]
    assert len(titles) == 1 and not titles[0].startswith("# #"), f"one title is needed: {titles}"
    assert any(line.startswith("> ") for line in lines), "no one-line summary under the title"
    long = [source.splitlines()[1] for source in exported_cells(notebook) if len(source.splitlines()) > LONGEST]
    assert not long, f"exported cells over {LONGEST} lines: {long}"

def test_exported_cells_are_short():
    lengths = [len(source.splitlines()) for notebook in NOTEBOOKS for source in exported_cells(notebook)]
    assert median(lengths) <= MEDIAN, f"half of the exported cells have more than {median(lengths)} lines"

DIRECTIVES = {"default_exp", "export", "exports", "exporti", "hide", "echo", "eval", "slow", "cuda"}
PICKLES = "(pickle|dill|joblib)"
UNPICKLES = re.compile(
    rf"\b{PICKLES}\.loads?\(|^\s*(import|from)\s+{PICKLES}\b|\btorch\.load\(|allow_pickle=True", re.M)

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_is_tidy(notebook):
    for source in code(notebook):
        assert not re.search(r"^\s*from\s+\S+\s+import\s+\*", source, re.M), "import *"
        assert not UNPICKLES.search(source), "unpickles"
        unknown = set(re.findall(r"^#\|\s*(\w+)", source, re.M)) - DIRECTIVES
        assert not unknown, f"nbdev accepts a mistyped directive in silence: {unknown}"

# Modules

PROBE = r"""
import builtins, dis, importlib, sys, types
def codes(code):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType): yield from codes(constant)
for name in sys.argv[1:]:
    for loaded in [n for n in sys.modules if n.split(".")[0] == "mhrlhf"]: del sys.modules[loaded]
    try: module = importlib.import_module(name)
    except Exception as e: print(f"{name}: {type(e).__name__}: {e}"); continue
    compiled = compile(open(module.__file__, encoding="utf-8").read(), module.__file__, "exec")
    known = set(vars(module)) | set(vars(builtins))
    for code in codes(compiled):
        for step in dis.get_instructions(code):
            if step.opname == "LOAD_GLOBAL" and step.argval not in known:
                print(f"{name}.{code.co_name} uses {step.argval}, which it does not import")
"""

@pytest.fixture(scope="module")
def from_outside(tmp_path_factory):
    "What the public names and then the modules say, in one process: to import all they need takes ten seconds."
    return outside(FACE + PROBE, tmp_path_factory.mktemp("outside"), *map(module_name, MODULES))

def test_modules_import_from_outside_and_know_every_name_they_use(from_outside):
    assert from_outside.returncode == 0 and not from_outside.stdout, from_outside.stdout + from_outside.stderr

@pytest.mark.parametrize("module", MODULES, ids=names(MODULES))
def test_module_is_tidy(module):
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = {a.name for a in node.names} | {getattr(node, "module", None) or ""}
            assert not imported & {"*", "pickle", "dill", "joblib", "shelve"}, ast.unparse(node)
        if isinstance(node, ast.Call):
            refused = ast.unparse(node.func) in ("torch.load", "torch.save", "eval", "exec")
            assert not refused, f"line {node.lineno}: {ast.unparse(node)}"

@pytest.mark.parametrize("module", MODULES, ids=names(MODULES))
def test_module_imports_only_what_it_uses(module):
    tree = ast.parse(module.read_text(encoding="utf-8"))
    imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    imported = {(a.asname or a.name).split(".")[0] for n in imports for a in n.names}
    exports = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    passed_on = {e.value for names in exports for e in names.elts}
    idle = sorted(imported - used - passed_on)
    assert not idle, f"{idle}; what only a notebook's tests use belongs into its hidden import cell"

# How the lines read: what ruff (pyproject.toml) cannot say, of modules and of every cell of the notebooks

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

def dropped_comprehensions(tree, shown=None):
    "Comprehensions that stand as a statement: a loop that hides. `shown` is a cell's last line, which shows its value."
    statements = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and n is not shown]
    return [n for n in statements if isinstance(n.value, COMPREHENSIONS)]

def depth(node):
    "How many conditional expressions stand within each other."
    return isinstance(node, ast.IfExp) + max(map(depth, ast.iter_child_nodes(node)), default=0)

def deep_conditions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.IfExp) and depth(n) >= 3]

def is_lambda(value):
    "Whether a value is a lambda, perhaps by a condition."
    if isinstance(value, ast.IfExp): return is_lambda(value.body) or is_lambda(value.orelse)
    return isinstance(value, ast.Lambda)

def named_lambdas(tree):
    "Functions that got their name by an assignment, one by one or several at once."
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)): continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        unpacked = isinstance(targets[0], ast.Tuple) and isinstance(node.value, (ast.Tuple, ast.List))
        values = node.value.elts if unpacked else [node.value]
        if isinstance(targets[0], (ast.Name, ast.Tuple)) and any(map(is_lambda, values)): found.append(node)
    return found

def hard_to_read(source, cell=False):
    "What is wrong with a module or a cell, as texts."
    tree = ast.parse(source)
    shown = tree.body[-1] if cell and tree.body else None
    found = {"a comprehension for its side effect; a loop says so": dropped_comprehensions(tree, shown),
             "a conditional expression three deep; if-statements or a dict": deep_conditions(tree),
             "a lambda with a name; def": named_lambdas(tree)}
    return [f"{why}: {ast.unparse(node)[:80]}" for why, nodes in found.items() for node in nodes]

@pytest.mark.parametrize("source, cell, faults", [
    ("[print(x) for x in y]", False, 1), ("[print(x) for x in y]", True, 0), ("[print(x) for x in y]\ny", True, 1),
    ("def f(y):\n    {x.close() for x in y}", True, 1), ("z = [x for x in y]", False, 0),
    ("a if b else c if d else e", False, 0), ("a if b else c if d else e if f else g", False, 1),
    ("(a if b else c) if (d if e else f) else g", False, 0),
    ("x = a if b else (lambda: c if d else e if f else g)", False, 2),
    ("f = lambda: 0", False, 1), ("f, g = lambda: 0, 1", False, 1), ("f: object = (lambda: 0) if a else b", False, 1),
    ("sort(key=lambda x: x)", False, 0), ("table = {'a': lambda: 0}", False, 0),
    ("if (f := lambda: 0): pass", False, 1),
])
def test_these_rules_see_what_they_say(source, cell, faults):
    assert len(hard_to_read(source, cell)) == faults

@pytest.mark.parametrize("path", MODULES + NOTEBOOKS, ids=names(MODULES + NOTEBOOKS))
def test_lines_are_easy_to_read(path):
    notebook = path.suffix == ".ipynb"
    sources = code(path) if notebook else [path.read_text(encoding="utf-8")]
    faults = [fault for source in sources for fault in hard_to_read(source, notebook)]
    assert not faults, "\n".join(faults)

# The order of the rooms

PACKAGE = {module_name(m): m for m in MODULES}
NUMBERED = [n for n in NOTEBOOKS if re.match(r"\d", n.name) and n.parent.name != "tutorials"]  # those with a module

def room(path):
    "The room of a notebook or module; `top` for those above all rooms."
    parts = path.relative_to(ROOT).parts
    return parts[1] if len(parts) > 2 else "top"

def number(notebook):
    return int(notebook.name.split("_")[0])

PLACES = {".".join(["mhrlhf", *n.relative_to(ROOT / "nbs").parts[:-1], n.stem.split("_", 1)[1]]):
          (ROOMS.index(room(n)), number(n)) for n in NUMBERED if room(n) in ROOMS}

def imported_modules(source, module, package=PACKAGE):
    "Modules of this package that a module imports, also inside of its functions; `mhrlhf` for the public face."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if not isinstance(node, ast.ImportFrom): continue
        above = module.split(".")[:-node.level] if node.level else []
        target = ".".join([*above, *filter(None, [node.module])])
        inner = {f"{target}.{a.name}" for a in node.names}  # from . import files
        found |= (inner & set(package)) or {target}
    return {name for name in found if name.split(".")[0] == "mhrlhf"}

def against_the_stream(source, module, places):
    "What a module imports although it stands beside or behind it."
    imported = imported_modules(source, module, places)
    return sorted(name for name in imported if name not in places or places[name] >= places[module])

@pytest.mark.parametrize("source, faults", [
    ("from ..core.files import inside", []), ("from .b import x", []), ("from . import b", []), ("import torch", []),
    ("from .d import x", ["mhrlhf.images.d"]), ("def f():\n    from mhrlhf.tuning.e import x", ["mhrlhf.tuning.e"]),
    ("from mhrlhf import run", ["mhrlhf"]), ("import mhrlhf.tuning.e", ["mhrlhf.tuning.e"]),
    ("from .c import itself", ["mhrlhf.images.c"]), ("from ..tuning import e", ["mhrlhf.tuning.e"]),
])
def test_the_order_is_seen(source, faults):
    places = {"mhrlhf.core.files": (0, 1), "mhrlhf.images.b": (1, 10), "mhrlhf.images.c": (1, 11),
              "mhrlhf.images.d": (1, 12), "mhrlhf.tuning.e": (5, 50)}
    assert against_the_stream(source, "mhrlhf.images.c", places) == faults

@pytest.mark.parametrize("module", MODULES, ids=names(MODULES))
def test_data_flows_one_way(module):
    """A module imports only from rooms before its own and, within its room, from notebooks with a smaller number;
    imports inside of functions count too. The pocket stands before the ratings although data reaches it last: it is
    the world that stands in for people and pictures, and annotate, evaluate and the workflow ask its scenes and its
    judge."""
    faults = against_the_stream(module.read_text(encoding="utf-8"), module_name(module), PLACES)
    assert not faults, f"{module_name(module)} imports what comes after it: {faults}"

def test_stages_are_the_one_late_binding():
    "A module that is named by a text is a stage, and `core.settings.MODULES` names it."
    from mhrlhf.core.settings import MODULES as stages
    assert {f"mhrlhf.{name}" for name in stages.values()} <= set(PACKAGE)
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call): continue
            call = ast.unparse(node)
            late = ast.unparse(node.func).endswith(("import_module", "__import__"))
            assert not late or "MODULES[" in call, f"{module_name(module)}: {call}"

def test_rooms_are_the_same_in_notebooks_and_modules():
    assert set(PLACES) == set(PACKAGE), sorted(set(PLACES) ^ set(PACKAGE))
    packages = {p.parent.name for p in (ROOT / "mhrlhf").glob("*/__init__.py")}
    assert {room(n) for n in NUMBERED} == set(ROOMS) and packages == set(ROOMS) - {"top"}
    for name in packages:
        assert not (ROOT / f"mhrlhf/{name}/__init__.py").read_text(), f"{name}: a room's face is its modules"

def test_numbers_follow_the_rooms():
    numbers = [number(n) for n in NUMBERED]
    assert len(set(numbers)) == len(numbers), sorted(n for n in set(numbers) if numbers.count(n) > 1)
    rooms = [ROOMS.index(room(n)) for n in sorted(NUMBERED, key=number)]
    assert rooms == sorted(rooms), "a number that belongs into another room"

# The public face

FACE = """
import mhrlhf, sys
assert mhrlhf.__all__ == list(mhrlhf._FACE) and set(mhrlhf.__all__) <= set(dir(mhrlhf)) and "torch" not in sys.modules
for name, (module, there) in mhrlhf._FACE.items():
    assert getattr(mhrlhf, name) is getattr(sys.modules[f"mhrlhf.{module}"], there), name
from mhrlhf import *
"""

def test_every_public_name_is_there(from_outside):
    assert from_outside.returncode == 0, from_outside.stderr

def test_public_names_are_the_same_for_type_checkers():
    tree = ast.parse((ROOT / "mhrlhf/__init__.py").read_text(encoding="utf-8"))
    said = {n.asname or n.name: (f.module, n.name) for f in ast.walk(tree) if isinstance(f, ast.ImportFrom) and f.level
            for n in f.names}
    table = next(n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_FACE")
    assert said == ast.literal_eval(table.value)

def test_an_unknown_public_name_is_told(tmp_path):
    done = outside("import mhrlhf; mhrlhf.no_such_name", tmp_path)
    assert "module 'mhrlhf' has no attribute 'no_such_name'" in done.stderr

# README, package, settings

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
DOOR = ("settings.ini", "pyproject.toml", "Makefile", "requirements.txt")

def test_readme_is_in_step_with_the_index():
    done = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_every_notebook_is_found_from_the_readme():
    "The README leads to the rooms and to what stands above them, a room's page to its notebooks, a page to tutorials."
    start = [ROOT / "README.md", *(ROOT / "nbs").glob("*.md"), *(ROOT / "nbs").glob("*/index.ipynb")]
    texts = {p: prose(p) if p.suffix == ".ipynb" else p.read_text(encoding="utf-8") for p in start}
    found = {(p.parent / link).resolve() for p, text in texts.items()
             for link in re.findall(r"\]\(([^)#\s]+\.ipynb)\)", text)}
    readme = {(ROOT / link).resolve() for link in re.findall(r"\]\(([^)#\s]+\.ipynb)\)", texts[ROOT / "README.md"])}
    assert {p.resolve() for p in (ROOT / "nbs").glob("*/index.ipynb")} <= readme
    missing = [n for n in NOTEBOOKS if n.resolve() not in found and n != ROOT / "nbs/index.ipynb"]
    assert not missing, f"{names(missing)}; make readme"

def dead_links(text, folder):
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text)
    return [link for link in links if not (folder / link).exists()]

def test_readme_links_lead_somewhere():
    for name in DOCUMENTS: assert dead_links((ROOT / name).read_text(encoding="utf-8"), ROOT) == [], name
    for page in (ROOT / "nbs").rglob("*.md"):
        assert dead_links(page.read_text(encoding="utf-8"), page.parent) == [], page

@pytest.mark.parametrize("name", ROOMS[:-1])
def test_a_rooms_page_shows_its_notebooks_and_names_what_is_there(name):
    page = ROOT / f"nbs/{name}/index.ipynb"
    text = prose(page)
    listed = re.findall(r"\]\((\d+_\w+\.ipynb)\)", text)
    assert listed == [n.name for n in NUMBERED if room(n) == name], "make readme"
    assert dead_links(text, page.parent) == []
    for module, there in re.findall(rf"`((?:{'|'.join(ROOMS)})\.\w+)\.(\w+)", text):
        tree = ast.parse(PACKAGE[f"mhrlhf.{module}"].read_text(encoding="utf-8"))
        exports = next(n.value for n in tree.body if ast.unparse(n).startswith("__all__"))
        assert there in ast.literal_eval(exports), f"{module} has no {there}"

@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "README.md"])
def test_documents_name_files_that_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"(?:nbs|tests|tools|data)/[\w/]*\.\w+", text)
    assert named and [n for n in named if not (ROOT / n).exists()] == []

def test_documents_name_only_commands_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    texts = [source for n in NOTEBOOKS for kind, source in cells(n) if kind == "markdown"]
    texts += [(ROOT / name).read_text(encoding="utf-8") for name in ("settings.ini", *DOCUMENTS)]
    texts += [page.read_text(encoding="utf-8") for page in (ROOT / "nbs").rglob("*.md")]
    named = {target for text in texts for target in re.findall(r"(?:`|^)make ([a-z][a-z-]+)", text, re.M)}
    assert named and named <= targets, sorted(named - targets)

MACHINE_PATH = re.compile(r"(?<![\w.:/~*{}$-])/(tmp|home|root|work|Users|mnt|scratch|var/folders)/[\w.-]+")
EXAMPLES = ("/tmp/pocket",)  # in commands that the documents show
KINDS = (".py", ".json", ".ipynb", ".yml", ".csv", ".txt", ".md")

def shipped_texts():
    "Files of the package, the notebooks and the data that hold text, and those at the door."
    paths = [p for part in ("mhrlhf", "nbs", "data", ".github") for p in (ROOT / part).rglob("*") if p.suffix in KINDS]
    own = [p for p in paths if not any(part[0] in "._" for part in p.relative_to(ROOT).parts[1:-1])]
    return sorted(own) + [ROOT / name for name in (*DOCUMENTS, *DOOR)]

@pytest.mark.parametrize("path", shipped_texts(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_knows_the_machine_that_made_it(path):
    found = [m[0] for m in MACHINE_PATH.finditer(path.read_text(encoding="utf-8")) if m[0] not in EXAMPLES]
    assert not found, f"{found[:3]}: paths are relative to the project, also in weights and outputs"

def test_every_dependency_has_a_lower_bound_that_the_pinned_version_keeps():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(r) for r in (*project["dependencies"], *project["optional-dependencies"]["dev"])]
    lines = [line.split(" ;")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert [r.name for r in asked if not any(s.operator == ">=" for s in r.specifier)] == []
    assert [r.name for r in asked if pinned[canonicalize_name(r.name)] not in r.specifier] == []

def test_requirements_are_pinned_and_name_no_place():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.match(r"[a-z0-9-]+==[^ /]+( ; .+)?$", line)] == []

def test_wheel_holds_the_pocket_and_its_licences(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "mhrlhf", source / "mhrlhf", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path]
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = set(zipfile.ZipFile(next(tmp_path.glob("mhrlhf-*.whl"))).namelist())
    files = [p for p in (ROOT / "mhrlhf").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    needed = set(names(files))
    assert needed <= held, sorted(needed - held)
    assert any(name.endswith("licenses/LICENSE") for name in held)
