"""The reference's pages, read off the modules without importing them: every public symbol with its parameters' comments
(docments), settings from the dataclasses, commands from `--help`. What is new in a module appears by itself."""
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
import ast, io, json, os, re, tokenize

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mhrlhf"
CELL = re.compile(r"^# %% (?:\.\./)*(nbs/\S+\.ipynb) #(\w+)")   # nbdev's mark above what a cell exports
LONGEST = 88  # characters of a constant's value that are shown, and of a line of help

USUAL = {  # what a word means in every room; a comment beside the parameter comes first
    "seed": "all randomness derives from it", "rng": "where chance comes from", "generator": "where chance comes from",
    "prompt": "the text that the image is made or rated for", "prompt_id": "the prompt's safe name",
    "image_path": "the image's file, relative to the project's folder", "aspects": "names of the aspects",
    "aspect": "name of the aspect", "column": "a column's name", "name": "what it is called", "stage": "a stage's name",
    "why": "what is wrong", "folder": "where the files lie", "path": "of the file", "show": "is told each line",
    "device": "where the numbers are computed", "dtype": "how precisely", "pipe": "a diffusers pipeline",
    "model": "a torch module", "net": "a torch module", "network": "a torch module", "x": "what goes in",
    "optimizer": "one of torch's", "weight_decay": "of AdamW", "rank": "of the low-rank matrices",
    "batch": "how many at a time", "batches": "how many batches", "n": "how many", "members": "how many networks",
    "rows": "which rows", "every": "steps between two lines", "rate": "how fast", "low": "the lower limit",
    "high": "the upper limit", "noise": "of the latents' shape", "uncertainty": "how unsure the heads are",
    "tokens": "size of the vocabulary", "tokenizer": "of the text encoders", "f": "the factors of a scene",
    "text": "to be read", "texts": "the prompts", "images": "the pictures", "title": "what stands above it",
    "key": "of the keyboard", "rater": "who rates", "count": "how many", "heads": "one for each aspect",
    "p": "a probability", "parts": "what is measured apart",
    "options": "handed on", "args": "handed on", "kwargs": "handed on",
}

@dataclass
class Parameter:
    "One parameter of a function or field of a dataclass, as texts."
    name: str
    kind: str = ""       # its type
    default: str = ""
    text: str = ""       # its comment
    stars: str = ""      # * or **

@dataclass
class Symbol:
    "A public function, class, method or constant of a module."
    module: str          # such as core.settings
    name: str            # a method's begins with its class
    role: str            # function, class, method, property or data
    text: str = ""       # its docstring
    parameters: list = field(default_factory=list)
    returns: str = ""    # the type
    given: str = ""      # the comment on what is returned
    value: str = ""      # of a constant
    notebook: str = ""   # nbs/ROOM/NAME.ipynb, where it is written
    cell: str = ""       # the id of the cell there
    bases: tuple = ()    # of a class

    @property
    def full(self): return f"mhrlhf.{self.module}.{self.name}"

    @property
    def source(self): return f"cell-{self.module.replace('.', '-')}-{self.cell}"

def comments(text):
    "Line -> comment, and whether the comment has the line for itself."
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT: continue
        line, column = token.start
        found[line] = token.string[1:].strip(), not token.line[:column].strip()
    return found

def comment_at(line, said):
    "The comment on a line, or else those that stand right above it."
    if line in said and not said[line][1]: return said[line][0]
    above = []
    while (line := line - 1) in said and said[line][1]: above.insert(0, said[line][0])
    return " ".join(above)

def text_of(node): return ast.unparse(node) if node is not None else ""

def parameters(function, said):
    "A function's parameters; those that share a line share its comment."
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    rows = [(arg, default, "") for arg, default in zip(plain, defaults)]
    if a.vararg: rows.append((a.vararg, None, "*"))
    elif a.kwonlyargs: rows.append((None, None, "*"))
    rows += [(arg, default, "") for arg, default in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: rows.append((a.kwarg, None, "**"))
    made = []
    for arg, default, stars in rows:
        if arg is None: made.append(Parameter("", stars=stars))
        elif arg.arg not in ("self", "cls"):
            line = (default or arg).end_lineno
            made.append(Parameter(arg.arg, text_of(arg.annotation), text_of(default), comment_at(line, said), stars))
    return made

def class_fields(node, said):
    "A dataclass's fields."
    rows = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    return [Parameter(n.target.id, text_of(n.annotation), text_of(n.value), comment_at(n.end_lineno, said))
            for n in rows if not n.target.id.startswith("_")]

def return_comment(function, said):
    "The comment beside a function's return type."
    last = function.returns.end_lineno if function.returns else 0
    return comment_at(last, said) if last in said else ""

def decorators(node): return {text_of(d).split("(")[0].split(".")[-1] for d in node.decorator_list}

class Module:
    "What a module offers, from its text."
    def __init__(self, path):
        self.name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        text = path.read_text(encoding="utf-8")
        self.tree, self.said, self.lines = ast.parse(text), comments(text), text.splitlines()
        self.summary = ast.get_docstring(self.tree) or ""
        lists = [n.value for n in self.tree.body if isinstance(n, ast.Assign) and text_of(n.targets[0]) == "__all__"]
        self.exports = ast.literal_eval(lists[0])
        self.symbols = [symbol for node in self.tree.body for symbol in self.read(node)]
        self.notebook = next(m[1] for line in self.lines if (m := CELL.match(line)))
        self.share_comments()

    def place(self, line):
        "The notebook and the cell in which a line was written."
        mark = next(m for text in reversed(self.lines[:line]) if (m := CELL.match(text)))
        return dict(zip(("notebook", "cell"), mark.groups()))

    def read(self, node):
        "The public symbols of one statement."
        if isinstance(node, ast.FunctionDef): return self.read_function(node)
        if isinstance(node, ast.ClassDef): return self.read_class(node) if node.name in self.exports else []
        if not isinstance(node, (ast.Assign, ast.AnnAssign)): return []
        targets = node.targets[0] if isinstance(node, ast.Assign) else node.target
        names = [text_of(n) for n in (targets.elts if isinstance(targets, ast.Tuple) else [targets])]
        values = node.value.elts if isinstance(node.value, ast.Tuple) and len(names) > 1 else [node.value] * len(names)
        said = comment_at(node.lineno, self.said) or comment_at(node.end_lineno, self.said)
        return [Symbol(self.name, name, "data", said, value=text_of(value), **self.place(node.lineno))
                for name, value in zip(names, values) if name in self.exports]

    def read_function(self, node, owner="", role="function"):
        "A function, a method, or what `@patch` makes one."
        marks, arguments = decorators(node), node.args.args
        if "patch" in marks and arguments[0].annotation is not None:
            owner, role = text_of(arguments[0].annotation), "method"
            if any("as_prop=True" in text_of(d) for d in node.decorator_list): role = "property"
            if owner not in self.exports: return []
        elif not owner and node.name not in self.exports: return []
        if node.name.startswith("_") or "overload" in marks: return []
        if "property" in marks: role = "property"
        returns = text_of(node.returns)
        return [Symbol(self.name, f"{owner}.{node.name}".lstrip("."), role, ast.get_docstring(node) or "",
                       parameters(node, self.said)[1 if "patch" in marks and arguments[0].arg != "self" else 0:],
                       returns, return_comment(node, self.said), **self.place(node.lineno))]

    def read_class(self, node):
        "A class with its fields or what it is made of, then its public methods."
        start = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        made = parameters(start, self.said) if start else class_fields(node, self.said)
        own = Symbol(self.name, node.name, "class", ast.get_docstring(node) or "", made,
                     bases=tuple(map(text_of, node.bases)), **self.place(node.lineno))
        inner = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        return [own, *(symbol for n in inner for symbol in self.read_function(n, node.name, "method"))]

    def share_comments(self):
        "A parameter is explained where it first comes up; the others of its name in the module mean the same."
        told = [p for symbol in self.symbols for p in symbol.parameters]
        known = {p.name: p.text for p in reversed(told) if p.text}
        for p in told: p.text = p.text or known.get(p.name) or USUAL.get(p.name, "")

@cache
def modules():
    "All modules in the order of their notebooks."
    paths = [p for p in PACKAGE.rglob("*.py") if not p.name.startswith("_")]
    return sorted(map(Module, paths), key=lambda m: int(Path(m.notebook).name.split("_")[0]))

@cache
def symbols():
    "All public symbols, full name -> symbol."
    return {symbol.full: symbol for module in modules() for symbol in module.symbols}

# Names in prose

SPAN = re.compile(r"(?<![`\[\w])`([A-Za-z_][\w.]*)(\(\))?`(?!`|\])")
FENCE = re.compile(r"^\s*(```+|~~~+|:::+)")

@cache
def meanings():
    "What stands in code in prose -> full name, where it can mean one symbol only."
    found = {}
    for full, symbol in symbols().items():
        for said in (symbol.name, f"{symbol.module}.{symbol.name}", full):
            found[said] = full if found.get(said, full) == full else ""
    return {said: full for said, full in found.items() if full}

def here(module, said):
    "The symbol that a name means on the page of a module; an empty text if it is none."
    own = f"mhrlhf.{module}.{said}"
    return own if own in symbols() else meanings().get(said, "")

def with_links(text, module=""):
    "Prose whose public names lead to the reference; code and headings stay as they are."
    def link(m):
        full = here(module, m[1])
        return f"{{py:obj}}`{m[1]}{m[2] or ''} <{full}>`" if full else m[0]
    lines, fenced = text.split("\n"), False
    for n, line in enumerate(lines):
        if FENCE.match(line): fenced = not fenced
        elif not fenced and not line.startswith(("#", "    ")): lines[n] = SPAN.sub(link, line)
    return "\n".join(lines)

# The symbols' pages

def shortened(text, longest=LONGEST):
    return text if len(text) <= longest else f"{text[:longest]}…"

def signature(symbol):
    "As Python writes it, without the comments."
    if symbol.role in ("property", "data"): return symbol.name
    parts = []
    for p in symbol.parameters:
        kind = f": {p.kind}" if p.kind else ""
        default = f"{' = ' if kind else '='}{p.default}" if p.default else ""
        parts.append(f"{p.stars}{p.name}{kind}{default}")
    returns = f" -> {symbol.returns}" if symbol.returns and symbol.role != "class" else ""
    return f"{symbol.name}({', '.join(parts)}){returns}"

def kinds_of(text, module):
    "The package's classes that a type names, as links."
    words = dict.fromkeys(w for w in re.findall(r"\w+", text) if w[0].isupper() and here(module, w))
    return [f"{{py:obj}}`{w} <{here(module, w)}>`" for w in words]

def told(p, module):
    "What a parameter is: its comment, or the class it is one of."
    if p.text: return with_links(p.text, module)
    kinds = kinds_of(p.kind, module)
    return f"a {' or '.join(kinds)}" if kinds else ""

def entry(symbol):
    "A symbol as a directive of Sphinx's Python domain."
    fence, lines = ":::::" if symbol.role == "class" else "::::", []
    lines += [f"{fence}{{py:{symbol.role}}} {signature(symbol)}"]
    if symbol.role == "property" and symbol.returns: lines += [f":type: {symbol.returns}"]
    if symbol.role == "data": lines += [f":value: {json.dumps(shortened(symbol.value), ensure_ascii=False)}"]
    lines += ["", with_links(symbol.text, symbol.module), ""]
    bases = [b for name in symbol.bases for b in kinds_of(name, symbol.module)]
    if bases: lines += [f"A {' and '.join(bases)}.", ""]
    lines += [f":param {p.name}: {told(p, symbol.module)}" for p in symbol.parameters if p.name]
    if symbol.given: lines += [f":returns: {with_links(symbol.given, symbol.module)}"]
    lines += ["", f"[source](#{symbol.source})", fence, ""]
    return lines

def room_of(module):
    "The room of a module; `top` for those above all rooms."
    room, dot, _ = module.name.partition(".")
    return room if dot else "top"

def rooms():
    "Room -> its modules."
    found = {}
    for module in modules(): found.setdefault(room_of(module), []).append(module)
    return found

def module_part(module):
    "One module, on its room's page."
    title = Path(module.notebook).name
    written = f"Written in [{title}](/{module.notebook.removeprefix('nbs/')})."
    lines = [f"## {module.name}", "", f"{module.summary} {written}", "",
             f":::{{py:module}} mhrlhf.{module.name}", ":::", ""]
    for symbol in module.symbols: lines += entry(symbol)
    return lines

def room_page(room, found):
    "The names of all modules of a room; one page for each module would fill the sidebar."
    title = "Above all rooms" if room == "top" else f"Room {room}"
    lines = [f"# {title}", "", "> Every public name, module by module.", ""]
    return "\n".join([*lines, *(line for module in found for line in module_part(module))])

def symbols_page():
    "All modules, room by room."
    lines = ["# Symbols", "", "> Every public name, module by module, in the order of their imports.", ""]
    for room, found in rooms().items():
        lines += [f"## [{room}]({room}.md)", ""]
        for module in found:
            named = " · ".join(f"`{s.name}`" for s in module.symbols if s.role in ("function", "class"))
            module_link = f"{{py:mod}}`{module.name} <mhrlhf.{module.name}>`"
            lines += [f"- {module_link}: {module.summary}", "", f"  {named}", ""]
    return with_links("\n".join(lines))

# Settings and commands

def described(kind):
    "Field -> comment, of a settings class and what it inherits."
    own = {s.name: s for s in next(m for m in modules() if m.name == "core.settings").symbols}
    return {p.name: p.text for c in reversed(kind.__mro__) if c.__name__ in own for p in own[c.__name__].parameters}

HEAD = """# Settings

> Every knob of every stage: in settings.ini, on the command line, in Python.

A knob stands in a profile of `settings.ini`, bare (`steps = 30`, for every stage that has it) or with its stage
(`generate.steps = 30`). The command line overrides it (`mhrlhf generate --steps 30`; `_` is `-` there), and in Python
`load_settings` does (`load_settings("generate", "sdxl", steps=30)`).
"""

def settings_page():
    "Every knob of every stage with its default and the profiles that set it."
    from mhrlhf.core.settings import STAGES, load_settings
    profiles = re.findall(r"^\[(\S+)\]", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.M)[1:]
    lines = [HEAD]
    for stage, kind in STAGES.items():
        lines += [f"## {stage}", "", (kind.__doc__ or "").strip(), ""]
        texts, plain = described(kind), kind()
        for f in fields(kind):
            default = getattr(plain, f.name)
            others = {}
            for name in profiles[:1] if stage == "test-pipeline" else profiles:  # which is the pocket's alone
                value = getattr(load_settings(stage, name, ROOT / "settings.ini"), f.name)
                if value != default and f.name != "profile": others.setdefault(str(value), []).append(name)
            sets = "".join(f"; `{v}` in {', '.join(names)}" for v, names in others.items())
            shown = default if str(default) else '""'
            lines += [f"`{f.name}` = `{shown}`", f": {texts[f.name]}{sets}", ""]
    lines += ["## settings.ini", "", "The profiles as they are shipped:", "", "```ini",
              (ROOT / "settings.ini").read_text(encoding="utf-8").strip(), "```", ""]
    return with_links("\n".join(lines))

def help_of(stage):
    "What `mhrlhf STAGE --help` prints on a machine without a GPU."
    from mhrlhf.cli import run_stage
    out = io.StringIO()
    os.environ["COLUMNS"] = str(LONGEST)
    arguments = ["--profile", "pocket", "--settings", str(ROOT / "settings.ini"), "--help"]
    try:
        with redirect_stdout(out): run_stage(stage, arguments)
    except SystemExit: pass
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())

def commands_page():
    "What the commands say of themselves."
    from mhrlhf.cli import DESCRIPTIONS, help_text
    lines = ["# Commands", "", "> `mhrlhf STAGE` and the Makefile, as they explain themselves.", "",
             "## mhrlhf", "", "```text", help_text().strip(), "```", "",
             "## make", "", "A target runs its stage in `.venv`, which it makes first.", ""]
    targets = re.findall(r"^([a-z-]+):.*?## (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for name, text in targets: lines += [f"`make {name}`", f": {text}", ""]
    for stage in DESCRIPTIONS: lines += [f"## mhrlhf {stage}", "", "```text", help_of(stage), "```", ""]
    return "\n".join(lines)

def pages():
    "All pages that are made here: name within reference/ -> Markdown."
    made = {"symbols.md": symbols_page(), "settings.md": settings_page(), "commands.md": commands_page()}
    return made | {f"{room}.md": room_page(room, found) for room, found in rooms().items()}
