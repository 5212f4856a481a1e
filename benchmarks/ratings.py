"""The rating half: statistics against references and simulated truth, speed and memory at size, the store.

    python benchmarks/ratings.py [--quick] [--json FILE]

Times are processor seconds of one process, so that other work on the machine does not change them; medians of the
runs count. Those of the panel in a browser are times on the clock (a real JupyterLab, kernel and Chromium with images
of 1024 x 1024): measure them on a machine that does nothing else. All panels are simulated and seeded."""
from pathlib import Path
from statistics import median
import argparse, json, multiprocessing, os, platform, resource, sqlite3, sys, tempfile, time, warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import pandas as pd

from mhrlhf.ratings.agreement import (
    agreement, icc_2, icc_3, intraclass, krippendorff_alpha, mean_squares, within_group_agreement,
)
from mhrlhf.core.aspects import NAMES
from mhrlhf.ratings.assignment import assign
from mhrlhf.ratings.session import RatingSession, rating_order
from mhrlhf.ratings.raters import true_scores
from mhrlhf.ratings.simulated import simulated_panel, simulated_raters
from mhrlhf.ratings.store import RatingStore

def timed(work):
    "Processor seconds of a call."
    start = time.process_time()
    work()
    return time.process_time() - start

def tidy(rows):
    "Targets x judges, None where missing, as a tidy table of one aspect."
    cells = [(i, j, v) for i, row in enumerate(rows) for j, v in enumerate(row) if v is not None]
    return pd.DataFrame([dict(rater=j, image_path=i, aspect="style", value=float(v)) for i, j, v in cells])

# Statistics --------------------------------------------------------------------------------------------------

CORRELATIONS = dict(  # of Shrout & Fleiss: estimate, lower and upper limit
    icc_1_1=(.165742, -.132932, .722560), icc_2_1=(.289764, .018787, .761084), icc_3_1=(.714841, .342465, .945858),
    icc_1_k=(.442797, -.884442, .912415), icc_2_k=(.620051, .071137, .927232), icc_3_k=(.909316, .675675, .985892))
OBSERVERS = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."]
WITHIN_GROUP = 0, 8 / 15, 19 / 30, 2 / 15, 13 / 30, 61 / 120  # published: 0, .5333, .6333, .1333, .4333, .5083

def reference_cases():
    "Largest distance to the published figures (Shrout & Fleiss 1979; Krippendorff 2011; rWG of the first table)."
    a = tidy([(9, 2, 5, 8), (6, 1, 3, 2), (8, 4, 6, 8), (7, 1, 2, 6), (10, 5, 6, 9), (6, 2, 4, 7)])
    d = tidy(zip(*[[None if v == "." else int(v) for v in row.split()] for row in OBSERVERS]))
    table = intraclass(mean_squares(a))
    found = list(within_group_agreement(a).to_numpy() - np.array(WITHIN_GROUP))
    for name, known in CORRELATIONS.items():
        found += list(np.subtract((table[name].value, table[name].low, table[name].high), known))
    for case, level, known in ((a, "ordinal", .109059), (a, "interval", .147308), (d, "nominal", .743421),
                               (d, "ordinal", .815388), (d, "interval", .849107)):
        found.append(krippendorff_alpha(case, level, draws=50).value - known)
    return max(map(abs, found))

def coverage(draws, images=60, raters=12, per_image=4, sd=(1.5, .6, 1.2)):
    "Share of the 95 % intervals of ICC(2,1) and ICC(3,1) that hold the truth, 4 of 12 raters an image."
    rng, hits = np.random.default_rng(0), np.zeros(2)
    true = sd[0] ** 2 / sum(s ** 2 for s in sd), sd[0] ** 2 / (sd[0] ** 2 + sd[2] ** 2)
    for _ in range(draws):
        y = rng.normal(0, sd[0], (images, 1)) + rng.normal(0, sd[1], (1, raters))
        y = y + rng.normal(0, sd[2], (images, raters))
        place = rng.permuted(np.tile(np.arange(raters), (images, 1)), axis=1)
        i, j = np.nonzero(place < per_image)
        ms = mean_squares(pd.DataFrame(dict(image_path=i, rater=j, value=y[i, j])))
        hits += [interval.low <= t <= interval.high for interval, t in zip((icc_2(ms), icc_3(ms)), true)]
    return hits / draws

PANELS = {"4 of 12, unequal": {}, "3 of 12, unequal": dict(per_image=3), "4 of 12, 2 random": dict(random=2),
          "4 of 8, equal": dict(raters=8, bias=0, expertise=0),
          "4 of 4, equal": dict(raters=4, expertise=0, missing=0), "5 of 5, unequal": dict(raters=5, per_image=5)}

def gains(draws, raters=12, per_image=4, bias=.8, expertise=.5, missing=.05, random=0):
    "Correlation with the truth of the plain mean and of the shrunken rater model."
    found = []
    for seed in range(draws):
        drawn = np.clip(np.random.default_rng(seed).normal(5.5, 2, (150, 1)), 0, 10)
        truth = pd.DataFrame(drawn, columns=["style"], index=[f"p{i}/0.png" for i in range(150)])
        who = simulated_raters(["style"], raters, bias=bias, expertise=expertise, seed=seed)
        who.iloc[:random] = [0, .05, 3]
        panel = simulated_panel(truth, who, per_image=per_image, missing=missing, seed=seed)
        found.append([true_scores(panel, m).value["style"].corr(truth["style"]) for m in ("mean", "shrunken")])
    return np.mean(found, axis=0)

# Size --------------------------------------------------------------------------------------------------------

def large_panel(images, raters=8, per_image=4, aspects=NAMES):
    "Many ratings, quickly: a random `per_image` of the raters rate each image."
    rng = np.random.default_rng(0)
    who = np.argsort(rng.random((images, raters)), axis=1)[:, :per_image].ravel()
    image, parts = np.repeat(np.arange(images), per_image), []
    for a in aspects:
        seen = np.repeat(rng.normal(5, 2, images), per_image) + rng.normal(0, 1.3, len(who))
        parts.append(pd.DataFrame(dict(rater=who, image_path=image, aspect=a, value=np.clip(np.round(seen), 0, 10))))
    table = pd.concat(parts, ignore_index=True)
    names = np.array([f"rater {i}" for i in range(raters)])
    paths = np.array([f"data/images/p{i}/0.png" for i in range(images)])
    return table.assign(rater=names[table.rater], image_path=paths[table.image_path], prompt_id="p")

def report_alone(images, connection):
    "The agreement report in a process of its own: ratings, processor seconds, peak memory in GB."
    table = large_panel(images)
    seconds = timed(lambda: agreement(table))
    connection.send((len(table), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 ** 2))

def report(images):
    "`report_alone`, started and waited for."
    ours, theirs = multiprocessing.Pipe(False)
    process = multiprocessing.get_context("spawn").Process(target=report_alone, args=(images, theirs))
    process.start()
    found = ours.recv()
    process.join()
    return found

def mixed_model(table):
    "The same variance components by statsmodels, for comparison."
    import statsmodels.api as sm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = dict(image="0 + C(image_path)", rater="0 + C(rater)")
        data = table.assign(one=1)
        sm.MixedLM.from_formula("value ~ 1", groups="one", re_formula="0", vc_formula=parts, data=data).fit()

# Store and session -------------------------------------------------------------------------------------------

def session_times(folder, answers):
    "Seconds to open 100,000 images, and median seconds from a key to the stored answer (no browser)."
    paths = [f"data/images/{i}/0.png" for i in range(100_000)]
    images = pd.DataFrame(dict(prompt_id="p", image_path=paths, prompt="a fox"))
    store = RatingStore(f"sqlite:///{folder}/ratings.db")
    opened = timed(lambda: RatingSession(images, store, "ann"))
    session, took = RatingSession(images, store, "ann"), []
    for i in range(answers):
        start = time.perf_counter()
        session.press(str(i % 10))
        took.append(time.perf_counter() - start)
    return opened, median(took)

# The panel in a real browser ----------------------------------------------------------------------------------

WATCH = """() => {   // milliseconds from a key to the next image on the screen
  window.shown = [];
  const seen = () => [...document.querySelectorAll(".mhrlhf-panel img")].find(i => i.offsetParent);
  document.addEventListener("keydown", event => {
    const start = performance.now(), before = seen().src;
    const look = () => {
      const now = seen(), took = performance.now() - start;
      if (now && now.src !== before && now.complete) window.shown.push(took);
      else if (took < 3000) requestAnimationFrame(look);
    };
    if (event.key === "Enter") requestAnimationFrame(look);
  }, true);
}"""

def study(folder, images, real):
    "Metadata of many images; those that the rater sees first are there, 1024 x 1024."
    from PIL import Image
    paths, rng = [f"data/images/p{i}/0.png" for i in range(images)], np.random.default_rng(0)
    coarse = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(4)]
    for n, i in enumerate(rating_order(paths, "ann")[:real]):
        (folder / paths[i]).parent.mkdir(parents=True)
        picture = Image.fromarray(np.roll(coarse[n % 4], n, 1)).resize((1024, 1024), Image.BICUBIC)
        picture.save(folder / paths[i], compress_level=1)
    names = [f"p{i}" for i in range(images)]
    table = pd.DataFrame(dict(prompt_id=names, image_path=paths, prompt="a fox in the snow"))
    table.to_csv(folder / "data/generated.csv", index=False)

def keys_to_database(page, database, answers):
    "Seconds from each key to its row."
    took = []
    with sqlite3.connect(database, timeout=30) as c:
        def count(): return c.execute("select count(*) from ratings").fetchone()[0]
        for i in range(answers):
            before, start = count(), time.perf_counter()
            page.keyboard.press(str(i % 10))
            while count() == before: time.sleep(.001)
            took.append(time.perf_counter() - start)
            page.wait_for_timeout(150)
    return took

OPEN_PANEL = """import time
from mhrlhf.ratings.panel import RatingPanel
start = time.perf_counter()
panel = RatingPanel('data/generated.csv', rater='ann')
open('opened', 'w').write(str(time.perf_counter() - start))
panel"""

def write_notebook(path):
    "A notebook of one cell that opens the panel."
    cell = dict(cell_type="code", id="panel", metadata={}, execution_count=None, outputs=[], source=OPEN_PANEL)
    kernel = dict(name="python3", display_name="python3", language="python")
    notebook = dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(notebook))

def browser_and_lab():
    "Playwright's entry and the tests' JupyterLab; None and why where there is no browser."
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    try:
        from playwright.sync_api import sync_playwright
        import test_panel_browser as lab
    except BaseException as e: return None, e  # pytest's skip of the module is no Exception
    return (sync_playwright, lab) if lab.CHROMIUM else (None, "no Chromium here")

def in_browser(images=100_000, answers=60, moves=30):
    "Seconds: the kernel opens the panel, key to stored answer, key to next image (medians); None without a browser."
    start_playwright, lab = browser_and_lab()
    if start_playwright is None:
        print(f"no figures of the panel in a browser: {lab}")
        return None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study(folder, images, answers // 5 + moves + 8)
        write_notebook(folder / "rate.ipynb")
        with lab.running_lab(folder, folder / "home") as url, start_playwright() as p:
            browser = p.chromium.launch(executable_path=lab.CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport=dict(width=1280, height=900))
            page.set_default_timeout(120_000)
            lab.open_panel(page, url)
            page.wait_for_timeout(2000)
            stored = keys_to_database(page, folder / "data/annotations/ratings.db", answers)
            page.evaluate(WATCH)
            for _ in range(moves):
                page.keyboard.press("Enter")
                page.wait_for_timeout(600)
            shown = page.evaluate("window.shown")
            browser.close()
        return float((folder / "opened").read_text()), median(stored), median(shown) / 1000, len(shown)

# The table ----------------------------------------------------------------------------------------------------
# A row: figure, ours, peer, goal, runs, whether small is good.

def statistics_rows(quick):
    draws, runs = (100, 8) if quick else (500, 40)
    yield "reference cases A, D, G: largest error", reference_cases(), None, 1e-6, 1, True
    for name, share in zip(("ICC(2,1)", "ICC(3,1)"), coverage(draws)):
        figure = f"coverage of the 95 % interval of {name}: distance from 0.95"
        yield figure, abs(share - .95), None, .05 if quick else .02, draws, True
    for name, settings in PANELS.items():
        plain, ours = gains(runs, **settings)
        more = .02 if name.startswith("4 of 12, unequal") else -.002
        figure = f"correlation with the truth, {name}: shrunken model beside the plain mean"
        yield figure, ours, plain, plain + more, runs, False

def size_rows(quick):
    small = large_panel(60, aspects=("style",))
    ours = median(timed(lambda: icc_2(mean_squares(small))) for _ in range(5))
    figure = "variance components, 240 ratings, s: ours beside statsmodels"
    yield figure, ours, timed(lambda: mixed_model(small)), None, 5, True
    sizes, runs = ((5_000, 50_000), 1) if quick else ((20_000, 200_000), 3)
    small, large = ([report(n) for _ in range(runs)] for n in sizes)
    few, short = small[0][0], median(r[1] for r in small)
    many, long, memory = large[0][0], median(r[1] for r in large), max(r[2] for r in large)
    what = f"({sizes[1]:,} images x 5 aspects x 4 raters)"
    yield f"agreement report, {many:,} ratings {what}, processor s", long, None, 20., runs, True
    yield f"agreement report, {many:,} ratings, peak GB", memory, None, 2., runs, True
    yield f"growth of the time from {few:,} to {many:,} ratings", long / short, None, 11., runs, True

def panel_rows(quick):
    answers = 100 if quick else 500
    with tempfile.TemporaryDirectory() as folder: opened, stored = session_times(folder, answers)
    yield "a session with 100,000 images opens, processor s", opened, None, 1., 1, True
    yield "key to stored answer without a browser, s", stored, None, .05, answers, True
    paths = [f"{i}.png" for i in range(2_000 if quick else 20_000)]
    where, raters = pd.DataFrame(dict(prompt_id="p", image_path=paths)), {f"r{i}": NAMES for i in range(12)}
    seconds = timed(lambda: assign(where, raters, 3))
    yield f"{len(where):,} images shared among 12 raters, 3 each, processor s", seconds, None, None, 1, True
    answers, moves = (30, 12) if quick else (60, 30)
    if found := in_browser(answers=answers, moves=moves):
        opened, stored, shown, n = found
        figure = "browser: the panel opens with 100,000 images (metadata CSV, database, widgets), s on the clock"
        yield figure, opened, None, 1., 1, True
        yield "browser: key to stored answer, median s", stored, None, .05, answers, True
        yield "browser: key to next image of 1024 x 1024 on the screen, median s", shown, None, .15, n, True

def as_row(figure, ours, peer, goal, runs, small):
    "A row of the JSON file."
    met = None if goal is None else bool(ours <= goal if small else ours >= goal)
    return dict(figure=figure, ours=float(ours), peer=None if peer is None else float(peer),
                ratio=float(ours / peer) if peer else None, goal=None if goal is None else float(goal), met=met,
                runs=runs)

def print_row(row):
    "A row as people read it."
    ours, peer, goal = ("-" if row[c] is None else f"{row[c]:.4g}" for c in ("ours", "peer", "goal"))
    met = {None: "", True: "met", False: "MISSED"}[row["met"]]
    print(f"{row['figure']:<92} ours {ours:>10}  peer {peer:>8}  goal {goal:>8}  {met}", flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true",
                        help="fewer draws and a tenth of the size; ends within three minutes")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options, rows = parser.parse_args(), []
    for part in (statistics_rows, size_rows, panel_rows):
        for row in part(options.quick):
            rows.append(as_row(*row))
            print_row(rows[-1])
    machine = dict(cpus=os.cpu_count(), machine=platform.machine(), python=platform.python_version())
    if options.json: options.json.write_text(json.dumps(dict(machine=machine, rows=rows), indent=1) + "\n")
    return 0 if all(r["met"] is not False for r in rows) else 1

if __name__ == "__main__": sys.exit(main())
