"""The documentation site as its readers meet it: built from the committed notebooks, read page by page, and opened from
the disk in a browser, without a network. MHRLHF_SCREENSHOTS names a folder for pictures of some pages."""
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
import os, re, sys

import pytest
from sphinx.util.inventory import InventoryFile

from browser import chromium

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import docs, reference  # noqa: E401, E402

WIDTHS = 380, 1280  # pixels: a phone, a laptop
LOOKED_AT = "index", "howto/raters", "core/02_settings", "reference/core", "explain/dspo"

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, built anew; a warning of Sphinx fails it."
    folder = tmp_path_factory.mktemp("site")
    assert docs.build(folder / "out", folder / "source") == 0, "Sphinx warned; see above"
    return folder / "out"

class Page(HTMLParser):
    "What is looked at of a page: its ids, links, pictures, headings, and what it loads."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.images, self.loaded, self.levels = set(), [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if a.get("id"): self.ids.add(a["id"])
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag == "img": self.images.append(a)
        if re.fullmatch("h[1-6]", tag): self.levels.append(int(tag[1]))
        if tag in ("script", "img", "iframe", "source", "video"): self.loaded.append(a.get("src") or "")
        if tag == "link" and a.get("rel") not in ("canonical", "author"): self.loaded.append(a.get("href") or "")

@cache
def page(path): return Page(path)

def pages(site): return sorted(site.rglob("*.html"))

def test_every_link_and_anchor_leads_somewhere(site):
    dead, here = [], site.resolve()
    for path in pages(site):
        for link in page(path).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            inside = target.is_relative_to(here) and target.is_file()
            if inside and (not parts.fragment or unquote(parts.fragment) in page(target).ids): continue
            if inside and target.suffix != ".html": continue
            dead.append(f"{path.relative_to(site)}: {link}")
    assert not dead, dead[:10]

def test_nothing_is_fetched_from_another_host(site):
    elsewhere = [f"{path.name}: {url}" for path in pages(site) for url in page(path).loaded
                 if urlsplit(url).netloc]
    called = re.compile(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)")
    sheets = [f"{path.name}: {url}" for path in site.rglob("*.css")
              for url in called.findall(path.read_text(encoding="utf-8"))]
    assert not elsewhere + sheets, (elsewhere + sheets)[:5]

def test_every_picture_says_what_it_shows(site):
    silent = [f"{path.relative_to(site)}: {image.get('src', '')[:60]} {image.get('alt')!r}" for path in pages(site)
              for image in page(path).images if len(image.get("alt") or "") < len("a picture")]
    assert not silent, silent[:10]

def test_headings_are_in_order(site):
    "One title a page, and no level left out below it."
    for path in pages(site):
        if path.name == "search.html": continue  # whose title a script writes
        levels = page(path).levels
        assert levels.count(1) == 1, f"{path.relative_to(site)}: {levels.count(1)} titles"
        steps = [b - a for a, b in zip(levels, levels[1:])]
        assert max(steps, default=0) <= 1, f"{path.relative_to(site)}: {levels}"

def test_every_public_name_has_its_place(site):
    held = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    there = {name for kind, found in held.data.items() if kind.startswith("py:") for name in found}
    missing = [s.full for s in reference.symbols().values() if s.full not in there]
    assert not missing, missing[:10]

def test_every_notebook_is_listed_by_its_room(site):
    listed = {Path(urlsplit(link).path).stem for link in page(site / "rooms.html").links}
    notebooks = [p.stem for p in docs.NBS.rglob("[0-9]*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    assert {name for name in notebooks if not (docs.NBS / "tutorials" / f"{name}.ipynb").exists()} <= listed

def test_home_is_one_click_from_what_a_newcomer_wants(site):
    links = {link.split("#")[0] for link in page(site / "index.html").links}
    assert {"start.html", "howto/raters.html", "howto/sdxl.html", "howto/adapters.html", "explain/dspo.html"} <= links

def test_a_language_model_finds_every_page(site):
    text = (site / "llms.txt").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(([^)]+)\)", text))
    assert text.startswith("# mhrlhf\n\n> ") and all((site / name).is_file() for name in named)
    made = {p.relative_to(site).as_posix() for p in pages(site)} - {"genindex.html", "search.html"}
    assert named == made, sorted(named ^ made)[:5]

def test_pages_lead_on_and_names_lead_to_their_source(site):
    text = (site / "core/02_settings.html").read_text(encoding="utf-8")
    assert "next-page" in text and "prev-page" in text
    entry = (site / "reference/core.html").read_text(encoding="utf-8")
    assert re.search(r'href="\.\./core/02_settings\.html#cell-core-settings-\w+"', entry)

# In a browser

@pytest.fixture(scope="module")
def browser(site):
    with chromium() as browser: yield browser

@pytest.fixture
def tab(browser):
    """A tab that writes down faults and requests to other hosts. Sphinx fetches what search has found to show some of
    its text; a browser refuses that for files, and the results stand without it."""
    tab = browser.new_page(viewport=dict(width=WIDTHS[1], height=900))
    tab.set_default_timeout(60_000)
    tab.faults = []
    tab.on("pageerror", lambda error: None if str(error) == "Failed to fetch" else tab.faults.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else tab.faults.append(r.url))
    yield tab
    assert tab.faults == []
    tab.close()

def address(site, name): return (site / f"{name}.html").resolve().as_uri()

@pytest.mark.parametrize("term, found", [
    ("neglect guard", "tuning"), ("load_settings", "reference/core"),
    ("krippendorff", "ratings/35_agreement")])
def test_search_finds(tab, site, term, found):
    tab.goto(address(site, "search") + f"?q={term}")
    tab.wait_for_selector("#search-results li a")
    tab.wait_for_function("/(found|matching|finished)/i.test(document.querySelector('#search-results').innerText)")
    links = tab.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
    assert any(found in link for link in links), links[:10]

@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit(tab, site, width):
    tab.set_viewport_size(dict(width=width, height=900))
    for name in LOOKED_AT:
        tab.goto(address(site, name))
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{name} sticks out at {width} px"
        if folder := os.environ.get("MHRLHF_SCREENSHOTS"):
            tab.screenshot(path=str(Path(folder) / f"{name.replace('/', '-')}-{width}.png"), full_page=True)

def test_the_dark_is_one_click_away(tab, site):
    tab.goto(address(site, "index"))
    bright = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    seen = [tab.evaluate(bright)]
    for _ in range(3):
        tab.locator(".theme-toggle:visible").first.click()
        seen.append(tab.evaluate(bright))
    assert min(seen) < 100 and max(seen) > 700, seen

def test_code_is_copied_by_a_button(tab, site):
    tab.goto(address(site, "start"))
    fences = re.findall("^```", (docs.NBS / "start.md").read_text(encoding="utf-8"), re.M)
    assert tab.locator("button.copybtn").count() == len(fences) // 2 > 0

@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_wcag(tab, site, scheme):
    "Contrast, names, order and landmarks, by axe: levels A and AA of WCAG 2.1."
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install -e '.[dev]'")
    tab.emulate_media(color_scheme=scheme)
    rules = dict(runOnly=dict(type="tag", values=["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]),
                 resultTypes=["violations"])  # nothing is told of what passes, which takes a quarter of the time
    for name in LOOKED_AT:
        tab.goto(address(site, name))
        found = axe.Axe().run(tab, options=rules).response["violations"]
        told = [f"{v['id']}: {v['nodes'][0]['html'][:120]} ({len(v['nodes'])})" for v in found]
        assert not told, f"{name}: {told}"
