"""What people's files may hold, drawn at random: prompts, sheets, metadata, exports, settings, reward_model.json.

Nothing may end in a traceback, and nothing may be taken in silence: of a file that is read, every answer that a person
gave is found again in the store, or its line is named. `--quick` draws some hundred files, without it 10,000.

    python benchmarks/fuzz.py --json fuzz.json
"""
from collections import Counter
from contextlib import chdir
from pathlib import Path
from tempfile import mkdtemp
import argparse, csv, io, json, math, time

from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st

from mhrlhf.core.aspects import COLUMNS, NAMES
from mhrlhf.core.files import InputError, read_table
from mhrlhf.core.prompts import read_prompts
from mhrlhf.core.settings import STAGES, load_settings
from mhrlhf.images.metadata import read_metadata
from mhrlhf.ratings.exchange import import_export
from mhrlhf.ratings.sheets import import_sheet
from mhrlhf.ratings.store import RatingStore, parse_rating, rater_name
from mhrlhf.reward.model import NUMBERS as MODEL_NUMBERS, RewardModel
from mhrlhf.reward.readings import VIEWS

IMAGES = {"data/images/fox/0.png": "fox", "data/images/001/0.png": "001", "data/images/fox/1.png": "fox"}
ENCODINGS = "utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"
ENDS = "\n", "\r\n", "\r"

# What people write -------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
WORD = st.sampled_from(["fox", "a fox", "狐狸", "ثعلب", "🦊", "", " ", "#", "# no", '"', '""', ",", ";", "\t", "a, b",
                        "\u2028", "\x0b", "\x00", "a\nb", "a\rb", "\u00a0", "\ufeff", "'", "=1+1", "NaN"])
ANY = TEXT | WORD
RATING = st.sampled_from(["", "7", "0", "10", "7,5", "7.5", " 7 ", "٧", "٧٫٥", "７", "11", "-1", "1_0", "1e1", "nan",
                          "inf", "8/10", "07.Mai", "7 # nice", '"8"', "good", "²", "7.", "x" * 40]) | TEXT
PERSON = st.sampled_from(["ann", "Ann", " ann ", "Rene\u0301", "René", "J.\u00a0Doe", "", "\u200b"]) | TEXT
PATH = st.sampled_from([*IMAGES, "./data/images/fox/0.png", "data\\images\\fox\\0.png", "../x.png", "/etc/passwd", ""])
ID = st.sampled_from(["fox", "001", "1", "", "cat"]) | TEXT
NAME = st.from_regex(r"[a-z0-9_-]{1,6}", fullmatch=True)
PICTURE = NAME.map(lambda name: f"data/images/{name}/0.png")

@st.composite
def tables(draw, columns):
    "A CSV as bytes and the rows that were meant; columns: name -> what may stand there."
    names = draw(st.permutations(list(columns)))
    if draw(st.integers(0, 9)) == 0: names = names[1:]
    rows = [{n: draw(columns[n]) for n in names} for _ in range(draw(st.integers(0, 4)))]
    delimiter, end = draw(st.sampled_from(",;\t")), draw(st.sampled_from(ENDS))
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end)
    if draw(st.booleans()) and draw(st.booleans()): out.write(f"sep={delimiter}{end}")
    writer.writerow(names)
    quoted = draw(st.sampled_from([True] * 4 + [False]))
    for row in rows:
        if quoted: writer.writerow(row.values())
        else: out.write(delimiter.join(row.values()) + end)
    text = out.getvalue()
    if draw(st.integers(0, 9)) == 0: text = text[:draw(st.integers(0, len(text)))]
    content = text.encode(draw(st.sampled_from(ENCODINGS)), errors="replace")
    return content, rows if quoted else None

SHEETS = tables(dict(prompt_id=ID, image_path=PATH, rater=PERSON, note=ANY, prompt=ANY)
                | {c: RATING for c in COLUMNS[:3]})
PROMPTS = tables(dict(prompt_id=NAME, prompt=ANY, genre=ANY)) | tables(dict(prompt_id=ID, prompt=ANY))
METADATA = tables(dict(prompt_id=NAME, image_path=PICTURE, prompt=ANY, seed=RATING, status=ANY)) | tables(
    dict(prompt_id=ID, image_path=PATH, prompt=ANY))

JSON = st.recursive(st.none() | st.booleans() | st.integers(-20, 20) | st.floats() | ANY,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)
VALUE = JSON | RATING | st.integers(0, 10) | st.floats(0, 10)
FIELD = st.sampled_from([*NAMES, "overall", "note", "flag", "beauty", ""])

def either(good, share=8): return st.integers(0, share).flatmap(lambda i: JSON if i == 0 else good)

def record(**fields): return st.fixed_dictionaries({k: either(v) for k, v in fields.items()})

RESULT = record(from_name=FIELD, to_name=st.just("image"), type=ANY, value=st.one_of(
    record(number=VALUE), record(rating=VALUE), record(choices=st.lists(VALUE, max_size=2)), record(text=VALUE)))
DATA = record(prompt_id=ID, image_path=PATH)
TASK = record(id=st.integers(0, 9), data=DATA, annotations=st.lists(record(
    id=st.integers(0, 9), completed_by=PERSON | record(email=PERSON), was_cancelled=st.booleans(), lead_time=VALUE,
    result=st.lists(RESULT, max_size=3)), max_size=2))
MINIMAL = record(id=st.integers(0, 9), annotation_id=st.integers(0, 9), annotator=PERSON, prompt_id=ID, image_path=PATH,
                 lead_time=VALUE, spatial=VALUE, style=st.lists(record(number=VALUE), max_size=2), note=ANY)
ARGILLA = record(id=ANY, metadata=DATA, responses=st.dictionaries(FIELD, either(st.lists(
    record(value=VALUE, user_id=PERSON), max_size=2)), max_size=3))
EXPORTS = either(st.lists(TASK | MINIMAL | ARGILLA, max_size=3), 30)
NUMBERS = either(st.lists(VALUE, min_size=5, max_size=5))
DESCRIPTION = either(st.fixed_dictionaries(dict(
    aspects=either(st.just(list(NAMES))), backbone=either(st.just("pocket")), backbone_identity=ANY, hidden=VALUE,
    files=either(st.dictionaries(st.sampled_from([*NAMES, "projection"]), record(file=PATH, sha256=ANY), max_size=6)),
    views=either(st.just(list(VIEWS))), soft_minimum=VALUE, **{name: NUMBERS for name in MODEL_NUMBERS})))
KNOBS = sorted({name for kind in STAGES.values() for name in kind.__dataclass_fields__})
INI = st.dictionaries(st.sampled_from(KNOBS) | TEXT, ANY | RATING, max_size=4)

# What must hold ----------------------------------------------------------------------------------------------

SEEN = Counter()

def accepted(kind, work):
    "The result of reading, or None and a message; anything but an `InputError` is a fault of ours."
    try: result = work()
    except InputError as e:
        assert str(e).strip(), "refused without a word"
        SEEN[kind, "refused"] += 1
        return None
    SEEN[kind, "read"] += 1
    return result

def rows_of(folder, name, content):
    (folder/name).write_bytes(content)
    return folder/name

def check_sheet(folder, drawn):
    content, rows = drawn
    path, store = rows_of(folder, "sheet.csv", content), RatingStore("sqlite://")
    done = accepted("sheet", lambda: import_sheet(store, path, IMAGES))
    if done is None or rows is None: return
    found = store.ratings()
    stored = {(r, p, a): v for r, p, a, v in found[["rater", "image_path", "aspect", "value"]].values}
    faulty = {int(f.removeprefix(f"{path}:").split(":")[0]) for f in done[1] if f.startswith(f"{path}:")}
    lines = accepted("sheet again", lambda: read_table(path, faults=[])) or []
    for row in lines:
        if row.line in faulty or row.get("image_path").startswith("#"): continue
        for column, name in zip(COLUMNS[:3], NAMES[:3]):
            text = row.get(column)
            if "#" in "".join(row.get(c) for c in COLUMNS[:3]) or not text: continue
            try: value = parse_rating(text)
            except ValueError: value = math.nan
            if value is None: continue
            who = rater_name(row["rater"] if "rater" in row.values else "sheet")
            image = row["image_path"].replace("\\", "/").removeprefix("./")
            assert stored.get((who, image, name)) == value, (row, stored, done[1])

def check_prompts(folder, drawn):
    path = rows_of(folder, "prompts.csv", drawn[0])
    found = accepted("prompts", lambda: read_prompts(path))
    if found is None or drawn[1] is None: return
    assert all(p.prompt and p.prompt_id.isascii() for p in found)

def check_metadata(folder, drawn):
    path = rows_of(folder, "generated.csv", drawn[0])
    found = accepted("metadata", lambda: read_metadata(path))
    if found is not None: assert found.image_path.ne("").all() and not found.image_path.duplicated().any()

def plain_answers(entries):
    "(person, image, aspect, value) of JSON exports as far as they are in order, whatever stands beside them."
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict) or "responses" in entry: continue
        if not isinstance(entry.get("annotations"), list): continue
        for a in entry["annotations"]:
            if not isinstance(a, dict) or not isinstance(a.get("result"), list): continue
            yield entry, a

def check_export(folder, entries):
    path, store = folder/"export.json", RatingStore("sqlite://")
    path.write_text(json.dumps(entries))
    done = accepted("export", lambda: import_export(store, path, {}, IMAGES))
    if done is None: return
    stored, faults = done
    history, text = store.history(), "\n".join(faults)
    assert stored == len(history) and history.value.between(0, 10).all()
    said = sum(len(a["result"]) for _, a in plain_answers(entries) if not a.get("was_cancelled"))
    if said and not stored and not faults: assert len(store.remarks()) or silent(entries), (entries, text)

def silent(entries):
    "Whether all that was said is empty."
    values = [r.get("value") for _, a in plain_answers(entries) for r in a["result"] if isinstance(r, dict)]
    return all(not v or isinstance(v, dict) and all(x in (None, "", []) for x in v.values()) for v in values)

def check_settings(folder, knobs):
    path = folder/"settings.ini"
    lines = [f"{k} = {v}" for k, v in knobs.items()]
    path.write_bytes("\n".join(["[common]", *lines, "[pocket]", ""]).encode())
    for stage in STAGES:
        found = accepted("settings", lambda stage=stage: load_settings(stage, "pocket", path))
        for value in vars(found).values() if found else ():
            assert not isinstance(value, float) or math.isfinite(value)

def check_description(folder, description):
    model = folder/"model"
    model.mkdir(exist_ok=True)
    (model/"reward_model.json").write_text(json.dumps(description))
    accepted("reward_model.json", lambda: RewardModel.load(model))

KINDS = {check_sheet: SHEETS, check_prompts: PROMPTS, check_metadata: METADATA, check_export: EXPORTS,
         check_settings: INI, check_description: DESCRIPTION}

def run(check, drawn_from, count, number=0):
    "Draw so many inputs and check each; raises what a check raises, with the smallest input that does it."
    folder = Path(mkdtemp())
    with chdir(folder):
        for image in IMAGES:
            Path(image).parent.mkdir(parents=True, exist_ok=True)
            Path(image).touch()
        @seed(number)
        @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
                  suppress_health_check=list(HealthCheck))
        @given(drawn_from)
        def one(drawn): check(folder, drawn)
        one()

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    count, began, rows = (600 if asked.quick else asked.inputs) // len(KINDS), time.time(), []
    for check, drawn_from in KINDS.items():
        start = time.time()
        try: run(check, drawn_from, count, asked.seed)
        except Exception as e: trouble = f"{type(e).__name__}: {e}"
        else: trouble = ""
        name = check.__name__.removeprefix("check_")
        rows.append(dict(figure=f"faults in {count} drawn inputs: {name}", ours=int(bool(trouble)), goal=0,
                         met=not trouble, runs=1))
        found = trouble or "no traceback, nothing in silence"
        print(f"{name:<12} {count} inputs in {time.time() - start:4.0f} s  {found}")
    print(dict(SEEN), f"{time.time() - began:.0f} s")
    if asked.json: Path(asked.json).write_text(json.dumps(dict(machine={}, rows=rows), indent=1))
    return int(any(not r["met"] for r in rows))

if __name__ == "__main__": raise SystemExit(main())
