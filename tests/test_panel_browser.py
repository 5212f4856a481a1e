"""The rating panel as an expert meets it: a real JupyterLab, a real kernel, a real browser, keys and mouse."""
from contextlib import contextmanager
from pathlib import Path
import json, os, socket, sqlite3, statistics, subprocess, sys, time, urllib.request

import numpy as np
import pytest

from browser import needs_browser, opened

pytestmark = needs_browser

IMAGES = 14
CODE = """from mhrlhf.ratings.panel import RatingPanel
RatingPanel("data/generated.csv", rater="ann")"""
FIVE = CODE.replace(')', ', database="sqlite:///five.db", scale="1-5")')

def make_project(folder):
    "A small study: pictures of the pocket's world, their metadata, and notebooks with one cell."
    from PIL import Image
    from mhrlhf.pocket.scenes import draw_factors, render
    rng, lines = np.random.default_rng(1), ["prompt_id,image_path,prompt"]
    for i, factors in enumerate(draw_factors(IMAGES, rng)):
        path = folder / f"data/images/p{i}/0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.asarray(render(factors, rng))).save(path)
        lines.append(f"p{i},data/images/p{i}/0.png,{factors.caption}")
    (folder / "data/generated.csv").write_text("\n".join(lines) + "\n")
    kernel = dict(name="python3", display_name="python3", language="python")
    for name, source in (("rate", CODE), ("five", FIVE)):
        cell = dict(cell_type="code", id="panel", metadata={}, execution_count=None, outputs=[], source=source)
        notebook = dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
        (folder / f"{name}.ipynb").write_text(json.dumps(notebook))

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def at_home(home):
    "An environment in which Jupyter keeps its things in a folder of its own."
    return os.environ | {k: str(home / k) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "HOME")}

def without_announcements(home):
    "JupyterLab's question about news would lie over the panel."
    quiet = home / "JUPYTER_CONFIG_DIR/labconfig/page_config.json"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps(dict(disabledExtensions={"@jupyterlab/apputils-extension:announcements": True})))

@contextmanager
def running_lab(folder, home):
    "A JupyterLab on this machine only, in a folder of its own; yields its address."
    port, log = free_port(), folder / "lab.log"
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=",
               "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={folder}"]
    without_announcements(home)
    with log.open("w") as out: server = subprocess.Popen(command, cwd=folder, env=at_home(home), stdout=out, stderr=out)
    try:
        wait_for(lambda: answers(f"{url}/api/status") and server.poll() is None, 120, log.read_text)
        yield url
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A study's folder and the address of the JupyterLab in it."
    folder = tmp_path_factory.mktemp("study")
    make_project(folder)
    with running_lab(folder, tmp_path_factory.mktemp("home")) as url: yield folder, url

def answers(url, **options):
    request = urllib.request.Request(url, **options)
    try:
        with urllib.request.urlopen(request, timeout=10) as r: return json.loads(r.read() or b"true")
    except OSError: return None

def wait_for(true, seconds=60, why=lambda: ""):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"waited {seconds} s in vain {why()[-2000:]}"
        time.sleep(.02)
    return found

@pytest.fixture(scope="module")
def page(lab):
    with opened() as page: yield page

def is_ready(url, notebook):
    "Whether the notebook's own kernel waits for work."
    sessions = answers(f"{url}/api/sessions") or []
    return any(s["path"] == notebook and s["kernel"]["execution_state"] == "idle" for s in sessions)

def open_panel(page, url, name="rate"):
    "Open the notebook afresh and run its cell."
    page.goto(f"{url}/lab/tree/{name}.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell .cm-content")
    wait_for(lambda: is_ready(url, f"{name}.ipynb"), 120)
    page.click(".jp-Notebook .jp-CodeCell .cm-content")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".mhrlhf-panel[tabindex='0'] img")

def asked(folder, query, database="data/annotations/ratings.db"):
    "Rows of the study's database."
    with sqlite3.connect(folder / database) as c: return c.execute(query).fetchall()

def stored(folder):
    "Entries of the history as (path, aspect, value)."
    return asked(folder, "select image_path, aspect, value from ratings order by id")

def press(page, folder, key):
    "Press a key that answers; seconds until the answer is in the database."
    before, start = len(stored(folder)), time.perf_counter()
    page.keyboard.press(key)
    wait_for(lambda: len(stored(folder)) > before)
    return time.perf_counter() - start

def shot(page, name, part=".mhrlhf-panel"):
    "Keep a picture of a part of the page where MHRLHF_SCREENSHOTS says."
    if folder := os.environ.get("MHRLHF_SCREENSHOTS"):
        page.locator(part).screenshot(path=str(Path(folder) / name))

def status(page): return page.locator(".mhrlhf-panel [role=status]").inner_text()

def test_an_expert_rates_by_keyboard(page, lab):
    folder, url = lab
    open_panel(page, url)
    seconds = []
    for n in range(10):
        for key in "7", "8", str(n), "x", "0": seconds.append(press(page, folder, key))
    rows = stored(folder)
    assert len(rows) == 50 and len({path for path, _, _ in rows}) == 10
    assert [v for _, _, v in rows[:5]] == [7, 8, 0, 10, 0]
    wait_for(lambda: "image 11 of 14 · 10 done" in status(page))
    print(f"\nfrom key to database: median {1000 * statistics.median(seconds):.0f} ms")

def test_no_key_reaches_jupyterlab(page, lab):
    for key in (*"abddmyzcvj", "ArrowUp", "ArrowDown"): page.keyboard.press(key)
    page.wait_for_timeout(500)
    assert page.locator(".jp-Notebook .jp-Cell").count() == 1
    assert page.locator(".jp-Notebook .jp-CodeCell").count() == 1
    assert not page.locator(".jp-Dialog").count()

def test_undo_takes_back_and_returns(page, lab):
    folder, _ = lab
    last = stored(folder)[-1]
    press(page, folder, "u")
    assert stored(folder)[-1] == (last[0], last[1], None)
    wait_for(lambda: "image 10 of 14 · 9 done" in status(page))
    press(page, folder, "3")
    assert stored(folder)[-1] == (last[0], last[1], 3)
    wait_for(lambda: "image 11 of 14 · 10 done" in status(page))

def test_the_mouse_works_and_gives_the_keyboard_back(page, lab):
    folder, _ = lab
    before = len(stored(folder))
    page.locator(".mhrlhf-aspect").nth(1).get_by_role("button", name="6", exact=True).click()
    wait_for(lambda: len(stored(folder)) > before)
    assert stored(folder)[-1][1:] == ("iconographic", 6)
    press(page, folder, "4")
    assert stored(folder)[-1][1:] == ("style", 4)
    first = page.locator(".mhrlhf-aspect").nth(0)
    assert first.locator(".mod-active").count() == 0, "an unanswered aspect shows an answer"
    pressed = page.locator(".mhrlhf-aspect [aria-pressed=true]")   # for a screen reader
    wait_for(lambda: pressed.all_inner_texts() == ["6", "4"])
    assert page.locator(".mhrlhf-aspect[role=group]").count() == 5

def test_a_note_is_typed_without_rating(page, lab):
    folder, _ = lab
    before = len(stored(folder))
    page.keyboard.press("n")
    page.keyboard.type("79 foxes, u and x")
    page.keyboard.press("Enter")
    def notes(): return asked(folder, "select value from remarks where aspect = 'note'")
    wait_for(notes)
    assert notes() == [("79 foxes, u and x",)] and len(stored(folder)) == before
    page.wait_for_function("document.activeElement.classList.contains('mhrlhf-panel')")  # Enter gives the keys back
    page.keyboard.press("s")
    press(page, folder, "9")
    assert stored(folder)[-1][1:] == ("spatial", 9)

def test_a_click_enlarges_the_image(page, lab):
    picture = page.locator(".mhrlhf-panel img:visible")
    small = picture.bounding_box()["width"]
    picture.click()
    assert picture.bounding_box()["width"] > 1.5 * small
    page.keyboard.press("Escape")
    assert picture.bounding_box()["width"] == small

def test_the_next_image_is_there_before_it_is_needed(page, lab):
    hidden = page.locator(".mhrlhf-panel img").filter(visible=False)
    wait_for(lambda: hidden.evaluate("img => img.complete && img.naturalWidth") == 64)
    assert hidden.get_attribute("alt")
    waiting = hidden.get_attribute("src")
    page.keyboard.press("Enter")
    wait_for(lambda: page.locator(".mhrlhf-panel img:visible").get_attribute("src") == waiting)
    page.keyboard.press("Backspace")
    wait_for(lambda: "image 11 of 14" in status(page))

def test_a_locked_database_is_told_and_the_answer_kept(page, lab):
    folder, _ = lab
    before = len(stored(folder))
    with sqlite3.connect(folder / "data/annotations/ratings.db") as holder:
        holder.execute("BEGIN IMMEDIATE")
        page.keyboard.press("s")
        page.keyboard.press("9")
        wait_for(lambda: "NOT SAVED YET" in status(page))
        shot(page, "panel-locked.png")
        assert len(stored(folder)) == before
        holder.rollback()
    wait_for(lambda: len(stored(folder)) == before + 1)   # without another key: the panel tries again by itself
    wait_for(lambda: "NOT SAVED YET" not in status(page))

def test_it_fits_narrow_and_wide_windows(page, lab):
    shot(page, "panel.png")
    for width in 800, 1280:
        page.set_viewport_size(dict(width=width, height=900))
        page.wait_for_timeout(400)
        shot(page, f"panel-{width}.png")
        panel = page.locator(".mhrlhf-panel")
        box = panel.bounding_box()
        for button in panel.get_by_role("button").all():
            b = button.bounding_box()
            inside = b["x"] >= box["x"] and b["x"] + b["width"] <= box["x"] + box["width"] + 1
            assert inside, f"{button.inner_text()!r} sticks out at {width} px"

def test_reloading_the_page_resumes(page, lab):
    folder, url = lab
    before = len(stored(folder))
    open_panel(page, url)
    wait_for(lambda: "image 11 of 14 · 10 done" in status(page))
    assert page.locator(".mhrlhf-aspect .mod-active").all_inner_texts() == ["9", "6", "4"]
    assert len(stored(folder)) == before

def test_restarting_the_kernel_resumes(page, lab):
    folder, url = lab
    press(page, folder, "5")
    before = len(stored(folder))
    for kernel in answers(f"{url}/api/kernels"):
        answers(f"{url}/api/kernels/{kernel['id']}/restart", method="POST")
    page.keyboard.press("6")   # into a panel whose kernel has forgotten it
    page.wait_for_selector(".mhrlhf-lost")
    shot(page, "panel-lost.png")
    assert len(stored(folder)) == before
    open_panel(page, url)
    assert not page.locator(".mhrlhf-lost").count()
    given = page.locator(".mhrlhf-aspect .mod-active")
    wait_for(lambda: given.all_inner_texts() == ["9", "6", "4", "5"])
    press(page, folder, "u")   # what was answered before the restart
    wait_for(lambda: given.all_inner_texts() == ["9", "6", "4"])
    press(page, folder, "5")
    press(page, folder, "2")
    wait_for(lambda: "image 12 of 14 · 11 done" in status(page))
    assert page.locator(".jp-Notebook .jp-Cell").count() == 1

def test_another_scale_has_its_own_buttons_and_keys(page, lab):
    folder, url = lab
    open_panel(page, url, "five")
    aspects = page.locator(".mhrlhf-aspect")
    for row in aspects.all():
        assert [text for text in row.get_by_role("button").all_inner_texts() if text.isdigit()] == list("12345")
    def given(): return asked(folder, "select value from ratings order by id", "five.db")
    for key in "670x": page.keyboard.press(key)  # no ratings here
    for done, key in enumerate("54321", 1):
        page.keyboard.press(key)
        wait_for(lambda done=done: len(given()) == done)
    assert [v for v, in given()] == [5, 4, 3, 2, 1]
    wait_for(lambda: "image 2 of 14 · 1 done" in status(page))
    shot(page, "panel-five.png")
