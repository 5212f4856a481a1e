"""README.md from nbs/index.ipynb: text, code and saved outputs; pictures go to nbs/images. `--check` only compares."""
from pathlib import Path
import base64, posixpath, re, sys

from fastcore.nbio import read_nb

ROOT = Path(__file__).parent.parent
NOTEBOOK, README, IMAGES = ROOT / "nbs/index.ipynb", ROOT / "README.md", ROOT / "nbs/images"
LINK = re.compile(r'(\]\(|src="|href=")(?![a-z]+:|#|/)([^)"\s]+)')

def from_root(text):
    "Links that start in nbs/ made to start in the project's folder."
    return LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), text)

def output(cell, number, out, pictures):
    "One saved output as Markdown; its picture, if it is one, is added to `pictures`."
    data = {kind: "".join(value) for kind, value in out.get("data", {}).items()}
    if "image/png" in data:
        name = f"index-{cell.id}-{number}.png"
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![]({posixpath.join('nbs/images', name)})"
    if "text/markdown" in data: return from_root(data["text/markdown"])
    text = data.get("text/plain") or "".join(out.get("text", ""))
    return f"```text\n{text.strip()}\n```"

def render():
    "The README's text and its pictures, name -> bytes."
    parts, pictures = [], {}
    for cell in read_nb(NOTEBOOK).cells:
        if "hide" in cell.directives: continue
        if cell.cell_type == "markdown":
            parts.append(from_root(cell.source))
            continue
        code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
        if cell.directives.get("echo") != "false": parts.append(f"```python\n{code}\n```")
        parts += [output(cell, number, out, pictures) for number, out in enumerate(cell.outputs)]
    return "\n\n".join(part.strip() for part in parts) + "\n", pictures

def faults():
    "What is out of step, as a list."
    text, pictures = render()
    made = {README: text.encode()} | {IMAGES / name: data for name, data in pictures.items()}
    return [str(path) for path, data in made.items() if not path.exists() or path.read_bytes() != data]

def main():
    if "--check" in sys.argv:
        sys.exit("\n".join(f"{path}: not in step with nbs/index.ipynb; make readme" for path in faults()) or None)
    text, pictures = render()
    for old in IMAGES.glob("index-*.png"): old.unlink()
    if pictures: IMAGES.mkdir(exist_ok=True)
    for name, data in pictures.items(): (IMAGES / name).write_bytes(data)
    README.write_text(text, encoding="utf-8")

if __name__ == "__main__": main()
