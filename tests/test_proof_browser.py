"""The report and the blind comparison as people meet them: a real browser; the panel served by a real Voilà."""
from pathlib import Path
import os, signal, sqlite3, statistics, subprocess, sys, time

import numpy as np
import pytest

pytest.importorskip("voila", reason="voila is not installed: pip install -e '.[dev]'")
from browser import needs_browser, opened
from test_panel_browser import at_home, free_port, shot, wait_for

pytestmark = needs_browser
PAIRS = 8
SERVE = """
import sys
from pathlib import Path
from mhrlhf.core.settings import ChooseSettings
from mhrlhf.proof.blind import run
sys.exit(run(ChooseSettings(evaluation=Path("evaluation"), checks=1, panel_port=int(sys.argv[1]))))
"""

@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A folder with an evaluation of some pairs."
    from mhrlhf.core.files import write_json
    from mhrlhf.core.prompts import Prompt
    from mhrlhf.core.settings import EvaluateSettings
    from mhrlhf.pocket.scenes import scene_batch
    from mhrlhf.proof.evaluate import judged, write_evaluation
    from mhrlhf.tuning.watch import keep_pictures
    folder = tmp_path_factory.mktemp("study")
    scenes, truth = scene_batch(PAIRS, np.random.default_rng(0))
    noisy = np.clip(scenes + np.random.default_rng(1).integers(-60, 60, scenes.shape), 0, 255).astype(np.uint8)
    prompts = [Prompt(f"p{i}", f.caption, "even" if i % 2 else "odd") for i, f in enumerate(truth)]
    for update, pictures in ((0, noisy), (40, scenes)):
        keep_pictures(dict(enumerate(pictures)), [p.prompt for p in prompts], folder / "model", update)
    looks = [dict(update=update, gains=[gain] * 5, errors=[.1] * 5) for update, gain in ((0, 0.), (40, .5))]
    write_json(folder / "model/dspo.json", dict(history=looks))
    settings = EvaluateSettings(reward_model=folder, model=folder / "model")
    write_evaluation(judged(noisy, scenes, prompts, settings), folder / "evaluation")
    return folder

def test_the_report_is_one_file_that_asks_no_host(study):
    from mhrlhf.core.settings import ReportSettings
    from mhrlhf.proof.report import run
    places = dict(metadata=study / "none.csv", reward_model=study / "none", model=study / "none")
    run(ReportSettings(database=f"sqlite:///{study}/none.db", evaluation=study / "evaluation",
                       output=study / "report.html", **places))
    with opened() as page:
        asked, said = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.goto((study / "report.html").as_uri())
        pictures = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
        assert len(pictures) >= 4 and all(pictures), pictures
        assert page.locator("img[alt=along_run]").count() == 1
        assert all(url.startswith(("file:", "data:")) for url in asked) and not said, (asked, said)
        assert page.locator("h2").first.inner_text() == "What was asked"
        assert page.evaluate("document.documentElement.scrollWidth <= 1280"), "wider than the window"
        page.set_viewport_size(dict(width=390, height=844))
        assert page.evaluate("document.documentElement.scrollWidth <= 390"), "wider than a phone"
        page.set_viewport_size(dict(width=1280, height=900))
        shot(page, "report.png", "body")

@pytest.fixture(scope="module")
def page_of(study, tmp_path_factory):
    "The address of the served blind comparison."
    home, port, log = tmp_path_factory.mktemp("home"), free_port(), study / "page.log"
    with log.open("w") as out:
        server = subprocess.Popen([sys.executable, "-c", SERVE, str(port)], cwd=study, env=at_home(home), stdout=out,
                                  stderr=out, start_new_session=True)
    try:
        wait_for(lambda: "running at" in log.read_text() or server.poll() is not None, 240, log.read_text)
        yield f"http://127.0.0.1:{port}/"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(20)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)

def votes(folder):
    with sqlite3.connect(Path(folder) / "data/annotations/ratings.db") as c:
        return c.execute("select image_path, value, source from choices order by id").fetchall()

def status(page): return page.locator("[role=status]").first.inner_text()

def test_people_choose_and_come_back(study, page_of):
    with opened() as page:
        page.goto(page_of + "?rater=ann")
        page.wait_for_selector(".mhrlhf-panel[tabindex='0'] img:visible")
        assert "tuned" not in page.content() and "evaluation/images" not in page.content(), "not blind"
        stored, shown = [], []
        for i, key in enumerate(["ArrowLeft", "ArrowRight", "ArrowDown", "ArrowLeft"]):
            began = time.perf_counter()
            page.keyboard.press(key)
            wait_for(lambda i=i: len(votes(study)) == i + 1)
            stored.append(time.perf_counter() - began)
            wait_for(lambda i=i: f"pair {i + 2} of" in status(page))
            shown.append(time.perf_counter() - began)
        print(f"\nfrom key to database: median {1000 * statistics.median(stored):.0f} ms, to the next pair: "
              f"{1000 * statistics.median(shown):.0f} ms")
        pictures = page.locator(".mhrlhf-picture img:visible")
        names = [pictures.nth(i).get_attribute("alt") for i in range(2)]
        pictures.first.click()
        boxes = [pictures.nth(i).bounding_box() for i in range(2)]
        assert names == ["the left image", "the right image"]
        assert [(box["x"], box["width"]) for box in boxes] == [(0, 640), (640, 640)], "each fills its half"
        page.keyboard.press("Escape")
        assert votes(study)[2][1] == "tie" and {v for _, v, _ in votes(study)} <= {"first", "second", "tie"}
        shot(page, "blind.png")
        page.goto(page_of + "?rater=ann")
        page.wait_for_selector(".mhrlhf-panel[tabindex='0'] img:visible")
        wait_for(lambda: f"pair 5 of {PAIRS + 1}" in status(page) and "4 done" in status(page))
