"""The documentation site in _docs: the notebooks with their committed outputs, nbs/*.md, and the reference that
tools/reference.py reads off the modules; nothing is executed. nbdev's processors come first, Sphinx and MyST-NB draw.
`--serve` shows it on this machine."""
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import json, posixpath, re, shutil, subprocess, sys

from fastcore.nbio import read_nb
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from readme import ROOM_PAGES, SECTIONS, alternative, listed, notebooks, plain, summary
from reference import ROOT, pages, symbols, with_links

NBS, STAGED, SITE = ROOT / "nbs", ROOT / "build/site", ROOT / "_docs"
PORT = 8000
ELSEWHERE = {  # files of the project that have a page or lie beside the pages
    "settings.ini": "/reference/settings.md", "CONTRIBUTING.md": "/about/contributing.md",
    "CHANGELOG.md": "/about/changelog.md", "LICENSE": "/about/LICENSE", "README.md": "/index.ipynb",
    "mhrlhf/pocket/NOTICE.md": "/about/notice.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")

# Pages

def led_home(text, folder):
    "Links to files of the project, from a page that lies in `folder`, made to lead to their pages."
    def lead(m):
        path = posixpath.normpath(posixpath.join(folder, m[3]))
        if path in ELSEWHERE: return f"[{m[2]}]({ELSEWHERE[path]}{m[4] or ''})"
        inside = path.startswith("nbs/") and not (ROOT / path).is_dir()
        if inside and folder.startswith("nbs"): return m[0]
        return f"{m[1]}[{m[2]}](/{path.removeprefix('nbs/')}{m[4] or ''})" if inside else m[2]
    return LINK.sub(lead, text)

def toctree(targets, *options):
    "A hidden table of contents."
    return "\n".join(["", "```{toctree}", ":hidden:", *options, "", *targets, "```", ""])

def documents(pages):
    "Sphinx's names of pages: without their endings."
    return [page.rsplit(".", 1)[0] for page in pages]

def prose_page(path):
    "A page of Markdown as Sphinx reads it; a folder's index has its list as table of contents."
    text = path.read_text(encoding="utf-8")
    made = with_links(led_home(text, path.parent.relative_to(ROOT).as_posix()))
    leads = path.name == "index.md" and path.parent.name in SECTIONS
    return made + toctree(documents(listed(text))) if leads else made

# Notebooks

class Shown(FilterDefaults):
    "nbdev's processors but those that run code or hide it: what a notebook exports is what its reader came for."
    left_out = ("FrontmatterProc", "add_show_docs", "exec_show_docs", "clean_show_doc", "rm_export", "add_links",
                "insert_warning", "add_fold", "mv_exports",
                "clean_magics")  # reads pyproject.toml once for each cell; there are no magics here

    def base_procs(self): return [p for p in super().base_procs() if p.__name__ not in self.left_out]

@cache
def exported_by():
    "(notebook, cell) -> the symbols that it exports."
    found = {}
    for symbol in symbols().values(): found.setdefault((symbol.notebook, symbol.cell), []).append(symbol)
    return found

def with_alternatives(html, text):
    "The same HTML, each picture of which says what it shows."
    return re.sub(r"<img(?![^>]*\balt=)", f'<img alt="{text}"', html)

def code_cell(cell, prose):
    "A cell as MyST-NB reads it."
    metadata, text = {}, alternative(prose, cell.source)
    if cell.directives_.get("echo") == "false": metadata["tags"] = ["remove-input"]
    for out in cell.outputs:
        data = out.get("data", {})
        if any(kind.startswith("image/") for kind in data): metadata["mystnb"] = {"image": {"alt": text}}
        if "text/html" in data: data["text/html"] = with_alternatives("".join(data["text/html"]), text)
    source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
    return dict(cell_type="code", id=cell.id, metadata=metadata, source=source, outputs=cell.outputs,
                execution_count=None)

def markdown_cell(source, name): return dict(cell_type="markdown", id=name, metadata={}, source=source)

def staged_cells(path):
    "A notebook's cells as MyST-NB reads them, its title first."
    where, prose, title, made = path.relative_to(ROOT).as_posix(), "", [], []
    processor = NBProcessor(path, procs=Shown().procs(), rm_directives="quarto")
    processor.process()
    module = symbols_of(where)
    for cell in processor.nb.cells:
        if not cell.source.strip(): continue
        if cell.cell_type == "markdown":
            prose = cell.source
            text = with_links(led_home(cell.source, path.parent.relative_to(ROOT).as_posix()), module)
            (made if title else title).append(markdown_cell(text, cell.id))
        elif cell.cell_type == "code":
            said = exported_by().get((where, cell.id))
            if said: made.append(markdown_cell(f"({said[0].source})=", f"{cell.id}-m"))
            made.append(code_cell(cell, prose))
    return title + made

def symbols_of(notebook):
    "The module that a notebook makes."
    return next((s.module for (where, _), found in exported_by().items() if where == notebook for s in found), "")

def notebook_page(path, more=""):
    "A notebook as a file; `more` is put at its end."
    cells = staged_cells(path) + ([markdown_cell(more, "contents")] if more else [])
    kernel = dict(name="python3", display_name="python3", language="python")
    return json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5))

# What is generated

def rooms():
    "The rooms' folders in the order of their notebooks."
    return sorted((page.parent for page in ROOM_PAGES), key=lambda room: notebooks(room)[0].name)

def title(path):
    "A notebook's title."
    prose = "\n".join(cell.source for cell in read_nb(path).cells if cell.cell_type == "markdown")
    return next(line[2:] for line in prose.splitlines() if line.startswith("# "))

TABLE = ["| notebook | in one line |", "|---|---|"]

def rooms_page():
    "All notebooks, room by room."
    lines = ["# Rooms", "", "> Seven rooms, each a folder of notebooks; a notebook builds only on those above it.", ""]
    for room in rooms():
        page = room / "index.ipynb"
        lines += [f"## [{title(page)}]({room.name}/index.ipynb)", "", summary(page), "", *TABLE]
        lines += [f"| [{title(p)}]({room.name}/{p.name}) | {summary(p)} |" for p in notebooks(room)] + [""]
    lines += ["## Above all rooms", "", *TABLE]
    above = notebooks(NBS)
    lines += [f"| [{title(p)}]({p.name}) | {summary(p)} |" for p in above]
    contents = [f"{room.name}/index" for room in rooms()] + [p.stem for p in above]
    return "\n".join(lines) + "\n" + toctree(contents)

def reference_index():
    "The reference's own page: what is generated, then what nbs/reference lists."
    page = NBS / "reference/index.md"
    text = page.read_text(encoding="utf-8")
    generated = ["symbols", "settings", "commands"]
    modules = [name.removesuffix(".md") for name in pages() if name.removesuffix(".md") not in generated]
    return prose_page(page) + toctree([*generated, *documents(listed(text)), *modules])

def about_page():
    lines = ["# About", "", "- [Contributing](contributing.md): the common changes, step by step.",
             "- [Changes](changelog.md): what is new in which version.",
             "- [Notice](notice.md): what the pocket holds of others.", "",
             "mhrlhf is under the [Apache licence 2.0](LICENSE)."]
    return "\n".join(lines) + "\n" + toctree(["contributing", "changelog", "notice"])

def home():
    "The README's notebook with the site's table of contents."
    contents = ["start", "howto/index", "explain/index", "rooms", "reference/index", "about/index"]
    return notebook_page(NBS / "index.ipynb", toctree(contents))

def room_index(path):
    "A room's page with its notebooks as table of contents."
    return notebook_page(path, toctree([p.stem for p in notebooks(path.parent)]))

def sources():
    "All pages: path within the site's source -> text."
    made = {"index.ipynb": home(), "rooms.md": rooms_page(), "about/index.md": about_page()}
    for path in sorted(p for p in NBS.rglob("*") if p.suffix in (".ipynb", ".md")):
        name = path.relative_to(NBS).as_posix()
        if any(part[0] in "._" for part in path.relative_to(NBS).parts) or name in made: continue
        if path.suffix == ".md": made[name] = prose_page(path)
        else: made[name] = room_index(path) if path in ROOM_PAGES else notebook_page(path)
    made["start.md"] += toctree([f"tutorials/{p.stem}" for p in notebooks(NBS / "tutorials")])
    made["reference/index.md"] = reference_index()
    made |= {f"reference/{name}": text for name, text in pages().items()}
    for file, page in ELSEWHERE.items():
        if not page.startswith("/about/"): continue
        made[page[1:]] = prose_page(ROOT / file) if page.endswith(".md") else (ROOT / file).read_text(encoding="utf-8")
    return made

def stage(folder=STAGED):
    "Write the site's source into a folder."
    for name, text in sources().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copytree(NBS / "images", folder / "images", dirs_exist_ok=True,
                    ignore=lambda _, names: [n for n in names if not n.endswith(".png")])
    return folder

# The site

def build(
    out=SITE,       # folder of the site, made anew
    staged=STAGED,  # folder of its source, made anew
    jobs=2,         # processes
):
    "Draw the site. A warning is an error, but the site is there to look at."
    drawn = staged.with_name("html")  # MyST-NB puts the pictures that it takes out of notebooks beside it
    for folder in (out, staged, drawn): shutil.rmtree(folder, ignore_errors=True)
    stage(staged)
    command = [sys.executable, "-m", "sphinx", "-c", ROOT / "tools/site", "-j", str(jobs), "-q", "-W", "-E",
               "-d", staged.with_name("doctrees"), staged, drawn]
    done = subprocess.run(command)
    (drawn / "llms.txt").write_text(llms(staged), encoding="utf-8")
    shutil.move(drawn, out)
    return done.returncode

# llms.txt

def heading(text):
    "A page's title and its one line, from its Markdown."
    lines = text.splitlines()
    found = [next((line[len(mark):] for line in lines if line.startswith(mark)), "") for mark in ("# ", "> ")]
    return [plain(line) for line in found]

def text_of(path):
    "The Markdown of a staged page."
    if path.suffix == ".md": return path.read_text(encoding="utf-8")
    return "\n".join(cell.source for cell in read_nb(path).cells if cell.cell_type == "markdown")

def llms(staged):
    "The site for a language model (https://llmstxt.org): what it is, and every page with its line."
    name, about = heading(text_of(staged / "index.ipynb"))
    lines, parts = [f"# {name}", "", f"> {about}", ""], {}
    for path in sorted(p for p in staged.rglob("*") if p.suffix in (".md", ".ipynb")):
        page = path.relative_to(staged)
        title, line = heading(text_of(path))
        part = page.parts[0] if len(page.parts) > 1 else "start"
        parts.setdefault(part, []).append(f"- [{title}]({page.with_suffix('.html').as_posix()}): {line}".rstrip(": "))
    order = ["start", "howto", "explain", *(room.name for room in rooms()), "tutorials", "reference", "about"]
    for part in order: lines += [f"## {part}", "", *parts[part], ""]
    return "\n".join(lines)

def serve():
    "Show the site on this machine, until Ctrl-C."
    if not (SITE / "index.html").exists(): sys.exit("no site yet: make docs")
    print(f"http://127.0.0.1:{PORT} (Ctrl-C ends it)", flush=True)
    try: ThreadingHTTPServer(("127.0.0.1", PORT), partial(SimpleHTTPRequestHandler, directory=SITE)).serve_forever()
    except KeyboardInterrupt: return 0

if __name__ == "__main__": sys.exit(serve() if "--serve" in sys.argv else build())
