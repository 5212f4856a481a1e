"""The house's order: notebooks, modules, README and package are one thing in step. Nothing here needs the models."""
from functools import cache
from pathlib import Path
import ast, filecmp, importlib.util, json, os, re, shutil, subprocess, sys, zipfile

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(ROOT).parts))
MODULES = sorted(p for p in (ROOT / "mhrlhf").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
names = lambda paths: [str(p.relative_to(ROOT)) for p in paths]
module_name = lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts)

@cache
def cells(notebook):
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]

def code(notebook):
    return [source for kind, source in cells(notebook) if kind == "code"]

def outside(code, tmp_path, *arguments):
    "Run Python where nothing but the installed package can be found."
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-I", "-c", code, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the project whose modules were made anew, and whose notebooks were cleaned."
    copy = tmp_path_factory.mktemp("copy")
    for part in ("nbs", "mhrlhf"): shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("weights", "__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "README.md"): shutil.copy(ROOT / name, copy / name)
    for path in MODULES + [ROOT / "mhrlhf/_modidx.py"]: (copy / path.relative_to(ROOT)).unlink()
    for command in ("nbdev-export", "nbdev-clean"):
        done = subprocess.run([BIN / command], cwd=copy, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
        assert done.returncode == 0, done.stderr
    return copy

# Notebooks and modules

def test_modules_are_what_the_notebooks_export(exported):
    made = {p.relative_to(exported) for p in (exported / "mhrlhf").rglob("*.py")}
    there = {p.relative_to(ROOT) for p in (ROOT / "mhrlhf").rglob("*.py")}
    assert made == there, f"a module without a notebook or a notebook without its module: {sorted(map(str, made ^ there))}"
    stale = [str(p) for p in sorted(made) if not filecmp.cmp(exported / p, ROOT / p, shallow=False)]
    assert not stale, f"not in step with their notebooks: {stale}; nbdev-export"

def test_notebooks_are_clean(exported):
    unclean = [name for name in names(NOTEBOOKS) if not filecmp.cmp(exported / name, ROOT / name, shallow=False)]
    assert not unclean, f"{unclean}; nbdev-clean"

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_is_readable(notebook):
    assert notebook.stat().st_size < 1_000_000, "over 1 MB"
    prose = "\n".join(source for kind, source in cells(notebook) if kind == "markdown")
    lines = re.sub(r"^```.*?^```", "", prose, flags=re.M | re.S).splitlines()
    titles = [line for line in lines if line.startswith("# ")]
    assert len(titles) == 1 and not titles[0].startswith("# #"), f"one title is needed: {titles}"
    assert any(line.startswith("> ") for line in lines), "no one-line summary under the title"
    long = [source.splitlines()[1] for source in code(notebook) if source.startswith("#| export") and len(source.splitlines()) > 45]
    assert not long, f"exported cells over 45 lines: {long}"

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_is_tidy(notebook):
    for source in code(notebook):
        assert not re.search(r"^\s*from\s+\S+\s+import\s+\*", source, re.M), "import *"
        assert not re.search(r"\b(pickle|dill|joblib)\.loads?\(|^\s*(import|from)\s+(pickle|dill|joblib)\b|\btorch\.load\(|allow_pickle=True", source, re.M), "unpickles"
        unknown = set(re.findall(r"^#\|\s*(\w+)", source, re.M)) - {"default_exp", "export", "exports", "exporti", "hide", "echo", "eval", "slow", "cuda"}
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
            if step.opname == "LOAD_GLOBAL" and step.argval not in known: print(f"{name}.{code.co_name} uses {step.argval}, which it does not import")
"""

def test_modules_import_from_outside_and_know_every_name_they_use(tmp_path):
    done = outside(PROBE, tmp_path, *map(module_name, MODULES))
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr

def room_number(module):
    "The number of the notebook that a module comes from."
    return int(re.search(r"(\d+)_\w+\.ipynb", module.read_text(encoding="utf-8")).group(1))

def test_data_flows_one_way():
    numbers = {module_name(m): room_number(m) for m in MODULES}
    for module in MODULES:
        package = module_name(module).rsplit(".", 1)[0]
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom): continue
            target = importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            within = ".pocket." in target  # the pocket is a house of its own, that any room may use
            if target in numbers and not (within and package == "mhrlhf"):
                assert numbers[target] <= numbers[module_name(module)], f"{module_name(module)} imports from {target}, which comes after it"

@pytest.mark.parametrize("module", MODULES, ids=names(MODULES))
def test_module_is_tidy(module):
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = {a.name for a in node.names} | {getattr(node, "module", None) or ""}
            assert not imported & {"*", "pickle", "dill", "joblib", "shelve"}, ast.unparse(node)
        if isinstance(node, ast.Call): assert ast.unparse(node.func) not in ("torch.load", "torch.save", "eval", "exec"), f"line {node.lineno}: {ast.unparse(node)}"

@pytest.mark.parametrize("module", MODULES, ids=names(MODULES))
def test_module_imports_only_what_it_uses(module):
    tree = ast.parse(module.read_text(encoding="utf-8"))
    imported = {(a.asname or a.name).split(".")[0] for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    passed_on = {e.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__" for e in n.value.elts}
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | passed_on
    assert not imported - used, f"{sorted(imported - used)}; what only a notebook's tests use belongs into its hidden import cell"

# README, package, settings

def test_readme_is_in_step_with_the_index():
    done = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_readme_lists_every_notebook():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in names(NOTEBOOKS) if f"({name})" not in text and name != "nbs/index.ipynb"]
    assert not missing, f"{missing}; make readme"

def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []

def test_documents_name_only_commands_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    texts = [source for n in NOTEBOOKS for kind, source in cells(n) if kind == "markdown"] + [(ROOT / "settings.ini").read_text()]
    named = {target for text in texts for target in re.findall(r"(?:`|^)make ([a-z][a-z-]+)", text, re.M)}
    assert named and named <= targets, sorted(named - targets)

MACHINE_PATH = re.compile(r"(?<![\w.:/~*{}$-])/(tmp|home|root|work|Users|mnt|scratch|var/folders)/[\w.-]+")
EXAMPLES = ("/tmp/pocket",)  # in commands that the documents show
TEXTS = sorted(p for part in ("mhrlhf", "nbs", "data") for p in (ROOT / part).rglob("*") if p.suffix in (".py", ".json", ".ipynb", ".yml", ".csv", ".txt", ".md") and not any(q[0] in "._" for q in p.relative_to(ROOT / part).parts[:-1]))

@pytest.mark.parametrize("path", TEXTS + [ROOT / name for name in ("README.md", "settings.ini", "pyproject.toml", "Makefile", "requirements.txt")], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_knows_the_machine_that_made_it(path):
    found = [m[0] for m in MACHINE_PATH.finditer(path.read_text(encoding="utf-8")) if m[0] not in EXAMPLES]
    assert not found, f"{found[:3]}: paths are relative to the project, also in weights and outputs"

def test_requirements_are_pinned_and_name_no_place():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.match(r"[a-z0-9-]+==[^ /]+( ; .+)?$", line)] == []

def test_wheel_holds_the_pocket_and_its_licences(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "mhrlhf", source / "mhrlhf", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = set(zipfile.ZipFile(next(tmp_path.glob("mhrlhf-*.whl"))).namelist())
    needed = {str(p.relative_to(ROOT)) for p in (ROOT / "mhrlhf").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert needed <= held, sorted(needed - held)
    assert any(name.endswith("licenses/LICENSE") for name in held)
