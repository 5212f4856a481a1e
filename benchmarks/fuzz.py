"""What people's files may hold, drawn at random: prompts, sheets, metadata, exports, settings, reward_model.json.

Nothing may end in a traceback, and nothing may be taken in silence: of a file that is read, every answer that a person
gave is found again in the store, or its line is named; so are prompts, rows of metadata, knobs and a model's numbers.
`--quick` draws some hundred files, without it 10,000.

    python benchmarks/fuzz.py --json fuzz.json
"""
from collections import Counter
from contextlib import chdir
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
import argparse, csv, io, json, math, os, platform, re, shutil, time

from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
import torch

from mhrlhf.core.aspects import COLUMNS, NAMES
from mhrlhf.core.files import InputError, read_json
from mhrlhf.core.prompts import read_prompts
from mhrlhf.core.settings import STAGES, load_settings
from mhrlhf.images.metadata import read_metadata
from mhrlhf.ratings.exchange import import_export
from mhrlhf.ratings.sheets import import_sheet
from mhrlhf.ratings.store import OVERALL, RATINGS, REMARKS, RatingStore, parse_rating, rater_name
from mhrlhf.reward.heads import Heads
from mhrlhf.reward.model import NUMBERS as MODEL_NUMBERS, UNCERTAINTY, RewardModel, save_model
from mhrlhf.reward.readings import Projection

IMAGES = {"data/images/fox/0.png": "fox", "data/images/001/0.png": "001", "data/images/fox/1.png": "fox"}
ENCODINGS = "utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"
ENDS = "\n", "\r\n", "\r"

# What people write -------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
WORD = st.sampled_from(["fox", "a fox", "狐狸", "ثعلب", "🦊", "", " ", "#", "# no", '"', '""', ",", ";", "\t", "a, b",
                        "\u2028", "\x0b", "\x00", "a\nb", "a\rb", "\u00a0", "\ufeff", "'", "=1+1", "NaN"])
ANY = TEXT | WORD

def mostly(good, other, share=5): return st.integers(0, share).flatmap(lambda i: good if i else other)

RATING = mostly(
    st.sampled_from(["", "7", "0", "10", "7.5"]),
    st.sampled_from(["7,5", " 7 ", "٧", "٧٫٥", "７", "11", "-1", "1_0", "1e1", "nan", "inf", "8/10", "07.Mai",
                     "7 # nice", '"8"', "good", "²", "7.", "x" * 40]) | TEXT)
PERSON = mostly(st.sampled_from(["ann", "bob"]),
                st.sampled_from(["Ann", " ann ", "Rene\u0301", "René", "J.\u00a0Doe", "", "\u200b"]) | TEXT)
PATH = mostly(st.sampled_from([*IMAGES]), st.sampled_from(
    ["./data/images/fox/0.png", "data\\images\\fox\\0.png", "../x.png", "/etc/passwd", ""]))
ID = mostly(st.just(""), st.sampled_from(["fox", "001", "1", "cat"]) | TEXT)
NAME = st.from_regex(r"[a-z0-9_-]{1,6}", fullmatch=True)
PICTURE = NAME.map(lambda name: f"data/images/{name}/0.png")

def lines_in(text): return len(io.StringIO(text, newline="").readlines())

@st.composite
def tables(draw, columns):
    "A CSV as bytes, and its rows as they were meant with the lines they take; columns: name -> what may stand there."
    names = draw(st.permutations(list(columns)))
    if draw(st.integers(0, 9)) == 0: names = names[1:]
    rows = [{n: draw(columns[n]) for n in names} for _ in range(draw(st.integers(0, 4)))]
    delimiter, end, encoding = (draw(st.sampled_from(choice)) for choice in (",;\t", ENDS, ENCODINGS))
    out, meant = io.StringIO(newline=""), []
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end)
    if draw(st.booleans()) and draw(st.booleans()): out.write(f"sep={delimiter}{end}")
    writer.writerow(names)
    quoted = draw(st.sampled_from([True] * 4 + [False]))
    for row in rows:
        before = lines_in(out.getvalue())
        if quoted: writer.writerow(row.values())
        else: out.write(delimiter.join(row.values()) + end)
        read_as = "utf-8" if encoding == "latin-1" else encoding  # what is no UTF-8 is refused
        cells = {n: cell.encode(encoding, "replace").decode(read_as, "replace") for n, cell in row.items()}
        meant.append((range(before + 1, lines_in(out.getvalue()) + 1), cells))
    text, whole = out.getvalue(), draw(st.integers(0, 9)) > 0
    if not whole: text = text[:draw(st.integers(0, len(text)))]
    return text.encode(encoding, errors="replace"), meant if quoted and whole else []

SHEETS = tables(dict(prompt_id=ID, image_path=PATH, rater=PERSON, note=ANY, prompt=ANY)
                | {c: RATING for c in COLUMNS[:3]})
SAID = mostly(st.from_regex(r"[^\x00\n\r]{1,12}", fullmatch=True), WORD)
PROMPTS = tables(dict(prompt_id=mostly(NAME, ANY), prompt=SAID, genre=ANY))
METADATA = tables(dict(prompt_id=mostly(NAME, ANY), image_path=mostly(PICTURE, PATH), prompt=SAID, seed=RATING,
                       status=ANY))

JSON = st.recursive(st.none() | st.booleans() | st.integers(-20, 20) | st.floats() | ANY,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)
VALUE = mostly(st.integers(0, 10) | st.floats(0, 10), JSON | RATING)
FIELD = st.sampled_from([*NAMES, "overall", "note", "flag", "beauty", ""])

def either(good, share=12): return mostly(good, JSON, share)

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
    record(value=VALUE, user_id=PERSON), min_size=1, max_size=2)), min_size=1, max_size=3))
EXPORTS = either(st.lists(TASK | MINIMAL | ARGILLA, min_size=1, max_size=3), 30)
NUMBERS = st.lists(st.floats() | st.integers(-1, 9) | st.just(0), min_size=5, max_size=5)
PLACES = [*MODEL_NUMBERS, *UNCERTAINTY, "aspects", "backbone", "backbone_identity", "hidden", "soft_minimum", "views",
          "files", "made_up"]
CHANGES = st.dictionaries(st.sampled_from(PLACES), NUMBERS | VALUE | st.just(...), max_size=2)
KNOBS = sorted({name for kind in STAGES.values() for name in kind.__dataclass_fields__})
KNOB = st.sampled_from(KNOBS) | st.sampled_from(KNOBS) | TEXT
INI = st.dictionaries(KNOB, st.sampled_from(["1", "8", "0.5", "true", "pocket", "a|b", "16"]) | ANY | RATING,
                      max_size=3)

# What must hold ----------------------------------------------------------------------------------------------

SEEN = Counter()
STORE = RatingStore("sqlite://")

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

def emptied():
    "The store, of which nothing is left."
    with STORE.engine.begin() as connection:
        for table in RATINGS, REMARKS: connection.execute(table.delete())
    return STORE

def stored():
    "(rater, image, aspect) -> value."
    table = STORE.ratings(overall=True)[["rater", "image_path", "aspect", "value"]]
    return {(r, p, a): v for r, p, a, v in table.values}

def value_of(text):
    "The rating in a text: None if there is none, NaN if it is no rating."
    try: return parse_rating(text)
    except ValueError: return math.nan

def image_of(text): return re.sub(r"^(\./)+", "", text.strip().replace("\\", "/"))

def is_told(lines, cells):
    "Whether a row holds more than a comment."
    texts = [cell.strip() for cell in cells.values()]
    return any(texts) and not texts[0].startswith("#")

def has_comment(cells):
    "Whether one of the cells may end its row."
    return any("#" in cell for cell in cells.values())

def check_sheet(folder, drawn):
    content, rows = drawn
    path, store = rows_of(folder, "sheet.csv", content), emptied()
    done = accepted("sheet", lambda: import_sheet(store, path, IMAGES))
    if done is None: return
    named, found, said = lines_named(path, done[1]), stored(), {r[0]: r[1] for r in remarks()}
    for lines, cells in rows:
        if not is_told(lines, cells) or named & {*lines}: continue
        who = rater_name(cells.get("rater", "sheet")), image_of(cells["image_path"])
        for column, text in rated_cells(cells):
            if (value := value_of(text)) is None: continue
            SEEN["sheet", "stored"] += 1
            assert found.get((*who, dict(zip(COLUMNS, NAMES))[column])) == value, (cells, found, done[1])
        if has_comment(cells) or not cells.get("note", "").strip(): continue
        assert who in said, (cells, said, done[1])

def rated_cells(cells):
    "The cells with ratings; a # ends the row."
    for column, text in cells.items():
        if column in COLUMNS:
            yield column, text.partition("#")[0].strip()
            if "#" in text: return

def remarks(): return [((r, p), t) for r, p, t in STORE.remarks()[["rater", "image_path", "text"]].values]

def lines_named(path, faults):
    "The lines that messages name, also those that another line contradicts."
    text = "\n".join(faults)
    found = re.findall(rf"^{re.escape(str(path))}:(\d+):|contradicts line (\d+) ", text, re.M)
    return {int(number) for pair in found for number in pair if number}

def check_prompts(folder, drawn):
    path = rows_of(folder, "prompts.csv", drawn[0])
    found = accepted("prompts", lambda: read_prompts(path))
    if found is None: return
    assert all(p.prompt and p.prompt_id.isascii() for p in found)
    known = {p.prompt_id: p.prompt for p in found}
    for lines, cells in drawn[1]:
        if not is_told(lines, cells) or has_comment(cells): continue
        assert known[cells["prompt_id"].strip()] == " ".join(cells["prompt"].split()), (cells, found)

def check_metadata(folder, drawn):
    path = rows_of(folder, "generated.csv", drawn[0])
    found = accepted("metadata", lambda: read_metadata(path, failed=True))
    if found is None: return
    assert found.image_path.ne("").all() and not found.image_path.duplicated().any()
    newest = {cells.get("image_path", "").strip(): cells for lines, cells in drawn[1] if is_told(lines, cells)}
    if any(map(has_comment, newest.values())): return
    for image, cells in newest.items():
        row = found[found.image_path == image].iloc[0]
        for column in {*cells} & {"prompt_id", "prompt"}: assert row[column] == cells[column].strip(), (cells, row)
        assert row["seed"] == float(cells.get("seed", "").strip() or 0)

def said_in(entry):
    "(place, person, image, field, value) of what an entry of an export says, as far as it is in order."
    if not isinstance(entry, dict): return
    held = entry.get("metadata" if "responses" in entry else "data")
    image = held.get("image_path") if isinstance(held, dict) else None
    if isinstance(responses := entry.get("responses"), dict):
        for field, answers in responses.items():
            for a in answers: yield f"record {entry.get('id')}", a.get("user_id"), image, field, a.get("value")
    elif "responses" not in entry and "annotations" in entry:
        for a in entry["annotations"]:
            if a.get("was_cancelled"): continue
            place = f"task {entry.get('id')}, annotation {a.get('id')}"
            for r in a.get("result", []): yield place, a.get("completed_by"), image, r.get("from_name"), r.get("value")
    elif "responses" not in entry:
        place = f"row {entry.get('id')}, annotation {entry.get('annotation_id')}"
        for field in NAMES: yield place, entry.get("annotator"), entry.get("image_path"), field, entry.get(field)

def parts_of(value):
    "The single values in a field, however deep they lie."
    if isinstance(value, dict): value = list(value.values())
    if not isinstance(value, list): return [] if value in (None, "") else [value]
    return [part for inner in value for part in parts_of(inner)]

def check_export(folder, entries):
    path, store = folder/"export.json", emptied()
    path.write_text(json.dumps(entries))
    done = accepted("export", lambda: import_export(store, path, {}, IMAGES))
    if done is None: return
    history, text, found = store.history(), "\n".join(done[1]), stored()
    assert done[0] == len(history) and history.value.between(0, 10).all()
    assert done[0] or len(remarks()) or text, "an import of nothing, without a word"
    for number, entry in enumerate(read_json(path), 1):
        if f"{path}: entry {number}: " not in text: check_entry(entry, found, text)

def check_entry(entry, found, text):
    for place, person, image, field, value in said_in(entry):
        if field not in (*NAMES, OVERALL) or f"{place}: " in text or f"contradicts {place} " in text: continue
        if isinstance(person, dict): person = person.get("email") or person.get("id")
        key = rater_name("" if person is None else person), image_of(str(image)), field
        for part in parts_of(value):
            number = part if type(part) in (int, float) else value_of(str(part))
            if number is None: continue
            SEEN["export", "stored"] += 1
            assert found.get(key) == number, (entry, found, text)

def check_settings(folder, knobs):
    path = folder/"settings.ini"
    lines = [f"{k} = {v}" for k, v in knobs.items()]
    path.write_bytes("\n".join(["[common]", *lines, "[pocket]", ""]).encode())
    for stage, kind in STAGES.items():
        found = accepted("settings", lambda stage=stage: load_settings(stage, "pocket", path))
        for name, value in vars(found).items() if found else ():
            assert not isinstance(value, float) or math.isfinite(value)
            asked = knobs.get(name, "")
            if re.fullmatch("[a-z]+", asked) and name in kind.__dataclass_fields__:
                assert str(value).strip("(),'").lower() == asked.lower(), (name, asked, value)
            if re.fullmatch("[0-9]+", asked) and isinstance(value, (int, float)): assert value == float(asked)

MODEL = SimpleNamespace(name="pocket", identity="made-up", device=torch.device("cpu"))
NINE, ONE, NONE = [9.] * len(NAMES), [1.] * len(NAMES), [0.] * len(NAMES)
SOUND = dict(aspects=list(NAMES), backbone="pocket", backbone_identity="made-up", hidden=2, rating_mean=NINE,
             rating_std=ONE, mean=NINE, std=ONE, weights=ONE, uncertainty_base=NONE, uncertainty_factor=ONE)

def check_description(folder, changes):
    model = folder/"model"
    if not model.exists():
        save_model(RewardModel(MODEL, Projection(dict(scale=torch.ones(3))), Heads(1, NAMES, 3, 2), SOUND), model)
        shutil.copy(model/"reward_model.json", folder/"sound.json")
    info = {k: v for k, v in (read_json(folder/"sound.json") | changes).items() if v is not ...}
    (model/"reward_model.json").write_text(json.dumps(info))
    loaded = accepted("description", lambda: RewardModel.load(model, "cpu", MODEL))
    if loaded is None: return
    assert loaded.composite(torch.rand(4, len(NAMES)) * 10).isfinite().all(), info
    for name in (*MODEL_NUMBERS, *UNCERTAINTY):
        if name in info: assert torch.equal(getattr(loaded, name), torch.tensor(info[name], dtype=torch.float))

KINDS = {check_sheet: SHEETS, check_prompts: PROMPTS, check_metadata: METADATA, check_export: EXPORTS,
         check_settings: INI, check_description: CHANGES}

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

def measured(check, drawn_from, count, number):
    "A row of the table: what became of so many inputs of a kind."
    start, name, trouble = time.process_time(), check.__name__.removeprefix("check_"), ""
    try: run(check, drawn_from, count, number)
    except Exception as e: trouble = f"{type(e).__name__}: {e}"
    row = dict(kind=name, inputs=count) | {what: SEEN[name, what] for what in ("read", "refused", "stored")}
    return row | dict(seconds=round(time.process_time() - start, 1), faults=int(bool(trouble))), trouble

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    count, rows = math.ceil((600 if asked.quick else asked.inputs) / len(KINDS)), []
    for check, drawn_from in KINDS.items():
        row, trouble = measured(check, drawn_from, count, asked.seed)
        rows.append(row)
        print(row, trouble or "no traceback, nothing in silence", flush=True)
    machine = dict(cpus=os.cpu_count(), machine=platform.machine(), python=platform.python_version())
    if asked.json: Path(asked.json).write_text(json.dumps(machine | dict(seed=asked.seed, rows=rows), indent=1))
    return int(any(r["faults"] for r in rows))

if __name__ == "__main__": raise SystemExit(main())
