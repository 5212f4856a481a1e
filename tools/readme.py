"""README.md from nbs/index.ipynb: text, code and saved outputs; pictures go to nbs/images. And in each room's page,
nbs/ROOM/index.ipynb, the list of its notebooks, from their own summaries; and the documentation's sidebar, in the
order of the rooms. `--check` only compares."""
from pathlib import Path
import base64, json, posixpath, re, sys

from fastcore.nbio import read_nb

ROOT = Path(__file__).parent.parent
NOTEBOOK, README, IMAGES = ROOT / "nbs/index.ipynb", ROOT / "README.md", ROOT / "nbs/images"
SIDEBAR = ROOT / "nbs/sidebar.yml"
ROOM_PAGES = sorted(ROOT.glob("nbs/*/index.ipynb"))
LIST = "## Its notebooks"
SECTIONS = ("howto", "explain")  # folders of Markdown, each with an index that lists its pages in order
LONGEST_ALTERNATIVE = 240       # characters of what a screen reader says of a picture
LISTED = re.compile(r"^- \[[^\]]*\]\(([^)#:\s]+)\)", re.M)
LINK = re.compile(r'(\]\(|src="|href=")(?![a-z]+:|#|/)([^)"\s]+)')

def from_root(text):
    "Links that start in nbs/ made to start in the project's folder."
    return LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), text)

def plain(text):
    "A line of Markdown as a screen reader should say it."
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"[`*$\"\n|<>{}\\]+", " ", text).split())

def alternative(prose, code):
    "What a picture shows: what is said above it, and the call that drew it."
    lines = [line for line in prose.splitlines() if line and not line.startswith(("#", ">", "|", "```", "- "))]
    said, calls = plain(" ".join(lines)), re.findall(r"\b([a-z]\w+)\(", code.split("\n")[-1])
    if len(said) > LONGEST_ALTERNATIVE: said = said[-LONGEST_ALTERNATIVE:].split(". ", 1)[-1]
    said = said.rstrip(".:") or "Picture"
    return f"{said} ({calls[0]})" if calls else said

def output(cell, prose, number, out, pictures):
    "One saved output as Markdown; its picture, if it is one, is added to `pictures`."
    data = {kind: "".join(value) for kind, value in out.get("data", {}).items()}
    if "image/png" in data:
        name = f"index-{cell.id}-{number}.png"
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![{alternative(prose, cell.source)}]({posixpath.join('nbs/images', name)})"
    if "text/markdown" in data: return from_root(data["text/markdown"])
    text = data.get("text/plain") or "".join(out.get("text", ""))
    return f"```text\n{text.strip()}\n```"

def notebooks(folder):
    "Those with a number, in order."
    return sorted(folder.glob("[0-9]*.ipynb"))

def summary(notebook):
    "The line under a notebook's title."
    prose = [cell.source for cell in read_nb(notebook).cells if cell.cell_type == "markdown"]
    return next(line[2:] for line in "\n".join(prose).splitlines() if line.startswith("> "))

def room_page(page):
    "A room's page with the list of the notebooks that lie beside it, as the text of its file."
    notebook = json.loads(page.read_text(encoding="utf-8"))
    lines = [LIST, "", *(f"- [{p.stem}]({p.name}): {summary(p)}" for p in notebooks(page.parent))]
    for cell in notebook["cells"]:
        if cell["source"][0].strip() == LIST: cell["source"] = "\n".join(lines).splitlines(keepends=True)
    return json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"  # as nbdev-clean writes it

def listed(text):
    "The pages that a page lists, in order."
    return LISTED.findall(text)

def section(name):
    "A folder of Markdown in Quarto's sidebar."
    pages = listed((ROOT / f"nbs/{name}/index.md").read_text(encoding="utf-8"))
    lines = [f"      - section: {name}", f"        href: {name}/index.md", "        contents:"]
    return lines + [f"          - {name}/{page}" for page in pages]

def sidebar():
    "Quarto's sidebar: the rooms by their numbers, then what stands above them; nbdev's own goes by the alphabet."
    lines = ["website:", "  sidebar:", "    contents:", "      - index.ipynb", "      - start.md"]
    for name in SECTIONS: lines += section(name)
    rooms = sorted((page.parent for page in ROOM_PAGES), key=lambda room: notebooks(room)[0].name)
    for room in [*rooms, ROOT / "nbs", ROOT / "nbs/tutorials"]:
        name = room.relative_to(ROOT / "nbs").as_posix()
        if room in rooms: lines += [f"      - section: {name}", f"        href: {name}/index.ipynb"]
        else: lines += [f"      - section: {'top' if name == '.' else name}"]
        lines += ["        contents:"]
        lines += [f"          - {p.relative_to(ROOT / 'nbs').as_posix()}" for p in notebooks(room)]
    lines += section("reference")
    return "\n".join(lines) + "\n"

def render():
    "The README's text and its pictures, name -> bytes."
    parts, pictures, prose = [], {}, ""
    for cell in read_nb(NOTEBOOK).cells:
        if "hide" in cell.directives: continue
        if cell.cell_type == "markdown":
            prose = cell.source
            parts.append(from_root(prose))
            continue
        code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
        if cell.directives.get("echo") != "false": parts.append(f"```python\n{code}\n```")
        parts += [output(cell, prose, number, out, pictures) for number, out in enumerate(cell.outputs)]
    return "\n\n".join(part.strip() for part in parts) + "\n", pictures

def files():
    "All that is made here: path -> bytes."
    text, pictures = render()
    pages = {page: room_page(page).encode() for page in ROOM_PAGES}
    images = {IMAGES / name: data for name, data in pictures.items()}
    return {README: text.encode(), SIDEBAR: sidebar().encode()} | images | pages

def faults():
    "What is out of step, as a list."
    made = files()
    return [str(path) for path, data in made.items() if not path.exists() or path.read_bytes() != data]

def main():
    if "--check" in sys.argv: sys.exit("\n".join(f"{path}: not in step; make readme" for path in faults()) or None)
    for old in IMAGES.glob("index-*.png"): old.unlink()
    for path, data in files().items(): path.write_bytes(data)

if __name__ == "__main__": main()
