"""The documentation can be made, and what it says exists. `nbdev-docs` runs the exported cells and those with an
import, and no others; what they use must come from such cells. Commands, options, settings and names in prose are
looked up; nothing is run. The site itself: tests/test_site.py."""
from functools import cache
from itertools import dropwhile
from pathlib import Path
from types import SimpleNamespace
import ast, builtins, configparser, dis, re, shlex, sys

from fastcore.nbio import read_nb
import pytest

from mhrlhf import _FACE, cli
from mhrlhf.core.settings import STAGES, _known

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import reference  # noqa: E402
HIDDEN = ("_", ".")
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb")
                   if not any(part.startswith(HIDDEN) for part in p.relative_to(ROOT).parts))
PAGES = sorted((ROOT / "nbs").rglob("*.md"))
PROSE = [*PAGES, *NOTEBOOKS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]

def names(paths): return [str(p.relative_to(ROOT)) for p in paths]

def run_by_docs(cell):
    "Whether `nbdev-docs` runs a cell."
    if cell.cell_type != "code" or cell.directives.get("eval") == "false": return False
    if "nbdev_export()" in cell.source: return False
    exported = {"export", "exports", "exporti"} & set(cell.directives)
    return exported or any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(ast.parse(cell.source)))

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_cells_that_the_documentation_runs_stand_alone(notebook):
    known, faults = {*vars(builtins), "display", "get_ipython", "show_doc", "__annotations__", "__name__"}, []
    for cell in filter(run_by_docs, read_nb(notebook).cells):
        for step in dis.get_instructions(compile(cell.source, cell.id, "exec")):
            if step.opname in ("STORE_NAME", "IMPORT_NAME"): known.add(step.argval)
            if step.opname == "LOAD_NAME" and step.argval not in known:
                faults.append(f"cell {cell.id} uses {step.argval}")
    assert not faults, f"{faults[:5]}: give the import a cell of its own"

# What prose names

@cache
def text(path):
    "A page's Markdown."
    if path.suffix == ".md": return path.read_text(encoding="utf-8")
    return "\n".join(cell.source for cell in read_nb(path).cells if cell.cell_type == "markdown")

def blocks(path, *languages):
    "Fenced blocks of code."
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text(path), re.M | re.S)

def spans(path):
    "Code within a line."
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text(path), flags=re.M | re.S))

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = dict(re.findall(r"^([a-z-]+):.*##.*\n(?:\t\$\(MHRLHF\) ([a-z-]+))?", MAKEFILE, re.M))  # -> its stage
OTHERS = ("hf", "cd", ".", "export", "jupyter", "pip", "ssh", "srun", "accelerate", "nbdev-export", "nbdev-test",
          "nbdev-clean", "--machine_rank", "--mixed_precision", "}", "for")  # commands of others that pages show

def stage_runs(words, monkeypatch):
    "Read a stage's arguments as the command line does, without running it; what is wrong with them, or an empty text."
    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=lambda _: SimpleNamespace(run=lambda s: 0)))
    monkeypatch.setattr(cli, "choose_profile", lambda asked: (asked or "pocket", "in a test"))
    monkeypatch.chdir(ROOT)
    try: return "" if cli.main(words) == 0 else f"{words}: exit code"
    except SystemExit as e: return "" if e.code in (0, None) else f"{words}: refused"

def submitted(words, monkeypatch):
    "What is wrong with a job: its script must be there, and what follows it is a stage with its options."
    script, *stage = dropwhile(lambda word: word.startswith("--"), words)
    return stage_runs(stage, monkeypatch) if (ROOT / script).is_file() else f"no {script}"

def fault(command, monkeypatch):
    "What is wrong with a command that a page shows, or an empty text."
    words = [w for w in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=(?!\S* )\S*$", w)]
    arguments = next((w.removeprefix("ARGS=") for w in words if w.startswith("ARGS=")), "").split()
    if not words: return ""
    if words[0] == "make":
        target = words[1] if len(words) > 1 else "help"
        if target not in TARGETS: return f"no target {target}"
        stage = TARGETS[target]
        return stage_runs([stage, *arguments], monkeypatch) if stage and arguments else ""
    if words[0] == "mhrlhf": return stage_runs(words[1:], monkeypatch) if words[1:] != ["STAGE", "--help"] else ""
    if words[0] == "sbatch": return submitted(words[1:], monkeypatch)
    if words[:2] == ["python", "inference.py"]: return stage_runs(["inference", *words[2:]], monkeypatch)
    if words[0] == "python": return "" if (ROOT / words[1]).exists() or words[1] in ("-m", "-c") else f"no {words[1]}"
    return "" if words[0] in OTHERS or words[0].startswith("#") else f"unknown command {words[0]}"

def is_known(span):
    "Whether a command within a line names a stage and options that exist; its values may be left out."
    _, stage, *_ = span.split()
    options = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", span)) - GENERAL
    if stage.isupper(): return options <= OPTIONS
    return stage in STAGES and options <= options_of(STAGES[stage])

def options_of(kind): return {f"--{name.replace('_', '-')}" for name in kind.__dataclass_fields__}

OPTIONS = {option for kind in STAGES.values() for option in options_of(kind)}
GENERAL = {"--profile", "--variant", "--settings", "--help"}

@pytest.mark.parametrize("path", PROSE, ids=names(PROSE))
def test_commands_in_prose_are_understood(path, monkeypatch):
    lines = [line for block in blocks(path, "sh", "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [span for span in spans(path) if span.startswith("make ")]
    faults = [(line, why) for line in lines if (why := fault(line, monkeypatch))]
    faults += [span for span in spans(path) if span.startswith("mhrlhf ") and not is_known(span)]
    assert not faults, faults

@pytest.mark.parametrize("command, good", [
    ("make test", True), ("make tset", False), ('make annotate ARGS="--serve"', True),
    ('make annotate ARGS="--server x"', False), ("mhrlhf generate --steps 3", True),
    ("mhrlhf generate --stepps 3", False), ("mhrlhf generat", False),
    ("mhrlhf train-dspo --objective none", False), ("PROFILE=sdxl mhrlhf generate", True),
    ('python inference.py --model x --prompt "a b"', True), ("python missing.py", False), ("rm -rf x", False),
    ("mhrlhf generate --steps 0", False), ("# a remark", True),
    ("sbatch --nodes=2 slurm/stage.sbatch generate --steps 3", True), ("sbatch slurm/stage.sbatch generat", False),
    ("sbatch slurm/none.sbatch generate", False),
])
def test_a_wrong_command_is_seen(command, good, monkeypatch, capsys):
    assert (fault(command, monkeypatch) == "") == good

OF_OTHERS = {"--do-print", "--save", "--timing", "--flags", "--check", "--json", "--quick", "--num_processes", "--cpu"}

@pytest.mark.parametrize("path", PAGES + [ROOT / "README.md"], ids=names(PAGES + [ROOT / "README.md"]))
def test_options_and_settings_in_prose_exist(path):
    said = {option for span in spans(path) for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert said <= OPTIONS | GENERAL | OF_OTHERS, said - OPTIONS - GENERAL - OF_OTHERS
    knobs = {m[1] for span in spans(path) if (m := re.fullmatch(r"([a-z][\w.-]*) = \S+", span))}
    for block in blocks(path, "ini"):
        parser = configparser.ConfigParser(inline_comment_prefixes=("#",))
        parser.read_string(block)
        knobs |= {key for section in parser.sections() for key in parser[section]} - {"inherits"}
    assert knobs <= _known(), knobs - _known()

def called(tree, found):
    "Keywords that are given to what was imported from the package: (name, keyword)."
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in found: continue
        yield from ((node.func.id, k.arg) for k in node.keywords if k.arg)

@pytest.mark.parametrize("path", PROSE, ids=names(PROSE))
def test_python_in_prose_names_what_exists(path):
    for block in blocks(path, "python"):
        tree, found = ast.parse(block), {}
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("mhrlhf"): continue
            for a in node.names:
                elsewhere = node.module.removeprefix("mhrlhf."), a.name
                room, there = _FACE[a.name] if node.module == "mhrlhf" else elsewhere
                found[a.asname or a.name] = reference.symbols()[f"mhrlhf.{room}.{there}"]
        for name, keyword in called(tree, found):
            assert keyword in {p.name for p in found[name].parameters}, f"{name} has no {keyword}"

# What every name says of itself

SYMBOLS = [s for s in reference.symbols().values() if s.role != "data"]

def test_every_public_function_and_class_is_explained():
    assert [s.full for s in SYMBOLS if s.role in ("function", "class") and not s.text] == []

def test_every_parameter_is_explained():
    "Of functions and classes; a method of another library's interface has that library's parameters."
    silent = [f"{s.full}: {p.name}" for s in SYMBOLS if s.role in ("function", "class") for p in s.parameters
              if p.name and not reference.told(p, s.module)]
    assert not silent, f"{silent}: a comment beside the parameter says what it is"

def test_every_exported_name_is_in_the_reference():
    for module in reference.modules():
        assert set(module.exports) <= {s.name for s in module.symbols}, module.name

def test_comments_of_a_signature_are_read():
    source = ('def f(\n    a: int,  # first\n    # above\n    b="x, y",\n    *, c, d=3,  # both\n    **more,\n'
              ') -> int:  # what\n    "Text."')
    function, said = ast.parse(source).body[0], reference.comments(source)
    found = {p.name: (p.kind, p.default, p.text) for p in reference.parameters(function, said) if p.name}
    assert found == dict(a=("int", "", "first"), b=("", "'x, y'", "above"), c=("", "", "both"), d=("", "3", "both"),
                         more=("", "", ""))
    assert reference.return_comment(function, said) == "what"

def test_formats_name_every_column():
    columns = [reference.symbols()[f"mhrlhf.{name}"].value
               for name in ("images.metadata.METADATA_COLUMNS", "ratings.store.ASSIGNED")]
    page = set(spans(ROOT / "nbs/reference/formats.md"))
    assert {c for value in columns for c in ast.literal_eval(value)} <= page
    assert set(cli.importlib.import_module("mhrlhf.core.aspects").COLUMNS) <= page
