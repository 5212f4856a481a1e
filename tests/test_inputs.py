"""What real people's files, models and names do: read as they were meant, or told with line, value and remedy."""
from pathlib import Path
import json, shutil, sys

import numpy as np
import pytest
from PIL import Image

from mhrlhf.cli import main
from mhrlhf.core.aspects import COLUMNS, NAMES
from mhrlhf.core.files import InputError
from mhrlhf.images.metadata import read_metadata
from mhrlhf.images.models import pocket_folder
from mhrlhf.images.pixels import read_image
from mhrlhf.ratings.store import RatingStore

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/"benchmarks"))
DATABASE = "sqlite:///data/annotations/ratings.db"
FOX, CAR = "data/images/p000/0.png", "data/images/p001/0.png"
HEADER = f"prompt_id,image_path,{','.join(COLUMNS)},rater,note"

def command(stage, *options):
    return main([stage, "--profile", "pocket", "--settings", str(ROOT/"settings.ini"), *options])

@pytest.fixture
def project(tmp_path, monkeypatch):
    "A folder with two images and their metadata."
    monkeypatch.chdir(tmp_path)
    for path in FOX, CAR:
        Path(path).parent.mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(path)
    Path("data/generated.csv").write_text(f"prompt_id,image_path,prompt\np000,{FOX},a fox\np001,{CAR},a car\n")
    return tmp_path

def read(capsys, *files, **names):
    "Read files with `annotate`: the exit code, the ratings by (rater, image, aspect), what was said as fault."
    code = command("annotate", "--read", *files)
    tidy, said = RatingStore(DATABASE).ratings(), capsys.readouterr()
    assert "Traceback" not in said.err
    return code, {(r, p, a): v for r, p, a, v in tidy[["rater", "image_path", "aspect", "value"]].values}, said

# Sheets ------------------------------------------------------------------------------------------------------

ROWS = [f"p000,{FOX},7.5,6,5,8,4,ann,", f"p001,{CAR},3,6,5.5,8,4,ann,"]
EXCEL = [line.replace(",", ";").replace(".5", ",5") for line in (HEADER, *ROWS)]

@pytest.mark.parametrize("content", [
    "\r\n".join(["sep=;", *EXCEL, ";;;;;;;;", ""]).encode(),
    "\r\n".join([*EXCEL, ""]).encode("utf-8-sig"),
    "\r\n".join(line.replace(";", "\t") for line in EXCEL).encode("utf-16"),
    "\r".join([HEADER, *ROWS]).encode(),
    "\n".join(["\ufeffsep=,", HEADER, *ROWS, "", "# done"]).encode(),
], ids=["sep", "semicolon", "utf-16", "cr", "sep and mark"])
def test_a_sheet_from_any_spreadsheet(content, project, capsys):
    Path("sheet.csv").write_bytes(content)
    code, found, _ = read(capsys, "sheet.csv")
    assert code == 0 and len(found) == 10
    assert (found["ann", FOX, "spatial"], found["ann", CAR, "style"]) == (7.5, 5.5)

def test_two_header_lines_are_told(project, capsys):
    Path("sheet.csv").write_text("\n".join([",,aspects,,,,,,", HEADER, *ROWS]))
    code, found, said = read(capsys, "sheet.csv")
    assert code == 2 and "sheet.csv:2: the header stands in this line; remove what is above it" in said.err

def test_numbers_of_people(project, capsys):
    rows = f"p000,{FOX},٧,٦,７．５,8,4,ann,", f"p001,{CAR},٧٫٥,7 ,1_0,8/10,07.Mai,ann,"
    Path("sheet.csv").write_text("\n".join([HEADER, *rows]))
    code, found, said = read(capsys, "sheet.csv")
    assert code == 2 and [found["ann", CAR, a] for a in NAMES[:2]] == [7.5, 7]
    assert [found["ann", FOX, a] for a in NAMES] == [7, 6, 7.5, 8, 4]
    assert all(f"value {v!r}" in said.err for v in ("1_0", "8/10", "07.Mai")) and len(found) == 7

def test_one_person_is_one_rater(project, capsys):
    names = "Ann", "ann", "ANN ", "Rene\u0301", "René", "J. Doe", "J.\u00a0Doe"
    Path("sheet.csv").write_text("\n".join(["prompt_id,image_path,spatial,rater"] + [
        f",{(FOX, CAR)[i % 2]},5,{name}" for i, name in enumerate(names)]))
    code, found, said = read(capsys, "sheet.csv")
    assert {r for r, *_ in found} == {"Ann", "ann", "ANN", "René", "J. Doe"} and code == 0
    assert "ANN, Ann, ann: one person?" in said.out

def test_ids_that_a_spreadsheet_changed(project, capsys):
    metadata = "prompt_id,image_path,prompt\n" + "\n".join(f"{i},{p},x" for i, p in (("001", FOX), ("1e5", CAR)))
    Path("data/generated.csv").write_text(metadata)
    Path("sheet.csv").write_text(f"prompt_id,image_path,spatial,rater\n1,{FOX},7,ann\n1.00E+05,{CAR},4,ann\n")
    code, found, _ = read(capsys, "sheet.csv")
    assert code == 0 and list(RatingStore(DATABASE).ratings().prompt_id) == ["001", "1e5"]
    Path("slip.csv").write_text(f"prompt_id,image_path,spatial,rater\n1e5,{FOX},7,bob\n")
    assert "this image belongs to prompt_id 001" in read(capsys, "slip.csv")[2].err

def test_a_file_without_answers_is_a_fault(project, capsys):
    Path("sheet.csv").write_text(f"{HEADER}\np000,{FOX},,,,,,ann,\n")
    code, found, said = read(capsys, "sheet.csv")
    assert code == 2 and "sheet.csv: nobody has rated anything in this sheet" in said.err

# Exports -----------------------------------------------------------------------------------------------------

def label_studio(*fields, image=FOX, who=1):
    results = [dict(from_name=n, to_name="image", type=k, value={k: v}) for n, k, v in fields]
    return dict(id=1, data=dict(image="x", prompt_id="p000", image_path=image),
                annotations=[dict(id=11, completed_by=who, result=results)])

@pytest.mark.parametrize("kind, value, encoding", [
    ("number", 7, "utf-8-sig"), ("rating", 7, "utf-8"), ("choices", ["7"], "utf-16")])
def test_label_studio_fields_and_encodings(kind, value, encoding, project, capsys):
    Path("export.json").write_bytes(json.dumps([label_studio(*[(a, kind, value) for a in NAMES])]).encode(encoding))
    code, found, _ = read(capsys, "export.json")
    assert code == 0 and found == {("1", FOX, a): 7 for a in NAMES}

def test_a_table_of_people_that_names_nobody_is_told(project, capsys):
    Path("export.json").write_text(json.dumps([label_studio(("style", "number", 7))]))
    for user, code in (("ann@lab.org", 2), ("1", 0)):
        Path("people.csv").write_text(f"user,rater\n{user},Ann\n")
        ended, found, said = read(capsys, "export.json", "--people", "people.csv")
        assert ended == code and ("people.csv: nobody named there has rated anything" in said.err) == bool(code)
    assert found["Ann", FOX, "style"] == 7

def test_label_studio_minimal_and_csv(project, capsys):
    cells = dict(spatial=[dict(rating=7)], style="5", material=[dict(number=0)])
    Path("min.json").write_text(json.dumps([dict(id=1, annotation_id=2, annotator=3, image_path=FOX) | cells]))
    Path("export.csv").write_text("annotation_id,annotator,id,image_path,prompt_id,spatial,style\n"
                                  f'10,1,0,{FOX},p000,"[{{""number"": 7}}]",7\n11,2,0,{FOX},p000,3,3\n')
    code, found, _ = read(capsys, "min.json", "export.csv")
    assert code == 0 and {r for r, *_ in found} == {"1", "2", "3"}
    assert (found["3", FOX, "spatial"], found["3", FOX, "material"], found["1", FOX, "spatial"]) == (7, 0, 7)

def test_an_export_that_says_nothing_or_contradicts_itself(project, capsys):
    Path("twice.json").write_text(json.dumps([label_studio(("style", "number", 7), ("spatial", "number", 3),
                                                           ("style", "number", 2))]))
    code, found, said = read(capsys, "twice.json")
    assert code == 2 and found == {("1", FOX, "spatial"): 3} and "value 2: contradicts" in said.err
    Path("none.json").write_text(json.dumps([label_studio(("quality", "choices", ["good"]))]))
    code, _, said = read(capsys, "none.json")
    assert code == 2 and "none.json: task 1, annotation 11: no answers" in said.err
    Path("empty.json").write_text("[]")
    assert read(capsys, "empty.json")[0] == 2

# Metadata, settings, databases -------------------------------------------------------------------------------

@pytest.mark.parametrize("text, said", [
    (f"prompt_id,image_path,prompt\np000,{FOX},a fox\np001,{CAR},a dog, in snow\n",
     "m.csv:3: 4 cells where"),
    (f"prompt_id,image_path,prompt\np000,{FOX},a fox\np001,{FOX},a dog\n", "m.csv:3: column image_path"),
    (f"prompt_id,image_path,prompt\n,{FOX},a fox\n", "m.csv:2: column prompt_id, value '': must not be empty"),
])
def test_metadata_of_ones_own_that_is_wrong(text, said, project, capsys):
    Path("m.csv").write_text(text)
    assert command("annotate", "--metadata", "m.csv") == 2 and said in capsys.readouterr().err

def test_metadata_of_ones_own(project):
    for text in (f"prompt_id;image_path;prompt\np000;{FOX};a fox, in snow\np001;{CAR};a dog\u2028at night\n",
                 f"prompt_id,image_path,prompt\np000,{FOX},\"a fox, in snow\"\np001,{CAR},a dog\u2028at night"):
        Path("m.csv").write_text(text)
        assert list(read_metadata("m.csv").prompt) == ["a fox, in snow", "a dog\u2028at night"]

def test_settings_as_people_save_them(project, capsys):
    text = (ROOT/"settings.ini").read_text() + "# für Änne\n"
    def said(content):
        Path("own.ini").write_bytes(content)
        code = main(["annotate", "--profile", "pocket", "--settings", "own.ini"])
        return code, capsys.readouterr().err
    for encoding in "utf-8-sig", "utf-16": assert said(text.encode(encoding)) == (0, "")
    code, message = said(text.encode("latin-1", "ignore"))
    assert code == 2 and "own.ini:" in message and "not UTF-8 text; save the file as UTF-8" in message
    assert main(["annotate", "--settings", "."]) == 2 and "is a folder" in capsys.readouterr().err

@pytest.mark.parametrize("url, said", [
    ("postgresql+psycopg://ann:s3@cr@et@db/study", "an @, : or / in the user's name or password must be written as"),
    ("sqlite:///data/generated.csv/ratings.db", "no folder data/generated.csv"),
    ("postgresql+psycopg://ann:s3?cr@et@db/study", "an @, : or / in the user's name or password must be written as"),
    ("sqlite://", "is in memory, and gone when this ends"), ("sqlite:///a\0b", "cannot be opened (embedded null byte)"),
    ("mongodb://ann:s3cr@db", "not a database URL")])
def test_databases_that_cannot_be(url, said, project, capsys):
    assert command("annotate", "--database", url) == 2
    shown = capsys.readouterr()
    assert said in shown.err and not any(part in shown.err + shown.out for part in ("s3", "cr@", "et@"))

@pytest.mark.parametrize("options, said", [
    (["train-reward", "--dropout", "1"], "dropout 1.0: 0.95 or less"),
    (["generate", "--steps", "5000"], "steps 5000: 1000 or less"),
    (["generate", "--guidance-until", "1.5"], "guidance-until 1.5: 1 or less"),
    (["annotate", "--repeats", "2"], "repeats 2.0: 1 or less"),
    (["train-dspo", "--anchor", "1"], "anchor 1.0: 0.95 or less"), (["monitor", "--port", "70000"], "65535 or less"),
    (["train-dspo", "--lr", "inf"], "a number with an end"), (["annotate", "--icc", "0"], "icc 0.0: 0.01 or more")])
def test_upper_limits(options, said, project, capsys):
    with pytest.raises(SystemExit) as ended: command(*options)
    assert ended.value.code == 2 and said in capsys.readouterr().err

# Places and pixels -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["link", "relative", "absolute"])
def test_images_on_another_disk(how, tmp_path, monkeypatch, capsys):
    "What generate writes, sheet, panel and score read."
    from mhrlhf.ratings.panel import RatingPanel
    home, disk = tmp_path/"home", tmp_path/"disk"
    for folder in home, disk: folder.mkdir()
    (home/"data").mkdir()
    monkeypatch.chdir(home)
    Path("p.csv").write_text("prompt_id,prompt\nfox,a fox\n")
    if how == "link": Path("data/images").symlink_to(disk)
    images = dict(link="data/images", relative="../disk", absolute=str(disk))[how]
    asked = "--prompts", "p.csv", "--images", images, "--steps", "1", "--seeds", "1"
    assert command("generate", *asked) == 0
    table = read_metadata("data/generated.csv")
    path = table.image_path[0]
    assert (disk/"fox/0.png").exists()
    Path("s.csv").write_text(f"prompt_id,image_path,spatial,rater\nfox,{path},7,ann\n")
    assert read(capsys, "s.csv")[1] == {("ann", path, "spatial"): 7}
    panel = RatingPanel(table, "bob", "sqlite://")
    assert panel.pictures[0].value == Path(path).read_bytes() and not panel.problem.value
    from mhrlhf.reward.score import find_items
    assert [str(i.file) for i in find_items(["data/generated.csv"])] == [path]

def test_one_way_to_pixels(tmp_path):
    "What the panel shows is what the heads see: sixteen bits, fractions, a transparent ground."
    import io
    from mhrlhf.ratings.panel import _read_image
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    white = np.dstack([ramp] * 3)
    white[:16] = 255
    hole = np.dstack([ramp] * 3 + [np.full_like(ramp, 255)])
    hole[:16] = 0
    made = {"8.png": ramp, "16.png": ramp.astype(np.uint16) * 257, "hole.png": hole,
            "f.tiff": (ramp / 255).astype(np.float32)}
    for name, pixels in made.items():
        Image.fromarray(pixels).save(tmp_path/name)
        seen, problem = _read_image(tmp_path, name)
        expected = white if name == "hole.png" else np.dstack([ramp] * 3)
        assert not problem and (np.asarray(Image.open(io.BytesIO(seen)).convert("RGB")) == expected).all(), name
        assert (read_image(tmp_path/name) == expected).all(), name

# Models ------------------------------------------------------------------------------------------------------

def edit(path, **values): path.write_text(json.dumps(json.loads(path.read_text()) | values))

def half(folder):
    for f in list(folder.rglob("*.safetensors")): f.rename(f.with_name(f.name.replace(".safe", ".fp16.safe")))

VARIANTS = {
    "plain": lambda f: None, "half": half,
    "velocity": lambda f: edit(f/"scheduler/scheduler_config.json", prediction_type="v_prediction"),
    "shifted latents": lambda f: edit(f/"vae/config.json", latents_mean=[.5, -.3, .2, .1],
                                      latents_std=[1.5, .7, 1.2, .8]),
    "empty text encoded": lambda f: edit(f/"model_index.json", force_zeros_for_empty_prompt=False)}
PROMPT, STEPS, GUIDANCE = "a 3d render of a fox in the snow", 2, 4.

def own_sampling(pipe, noise_seed):
    "A picture from the tuning's own parts: its texts, its noise predictions, its way to pixels."
    import torch
    from mhrlhf.images.denoiser import Denoiser, encode_texts
    denoiser, scheduler = Denoiser(pipe), pipe.scheduler
    text, empty = encode_texts(pipe, [PROMPT]), denoiser.empty
    shape = (1, pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
    scheduler.set_timesteps(STEPS)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(noise_seed)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given, at = scheduler.scale_model_input(z, t), t.long().view(1)
        with torch.no_grad(): asked, free = denoiser(given, at, text), denoiser(given, at, empty)
        said = free + GUIDANCE * (asked - free)
        if denoiser.predicts == "v_prediction":
            alpha = denoiser.alpha(at)
            clean = (given - (1 - alpha).sqrt() * said) / alpha.sqrt()
            said = alpha.sqrt() * said - (1 - alpha).sqrt() * clean
        z = scheduler.step(said, t, z).prev_sample
    with torch.no_grad(): seen = denoiser.pixels(z)
    return (seen[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()

@pytest.mark.parametrize("name", VARIANTS)
def test_stock_diffusers_generate_and_tuning_draw_the_same_picture(name, tmp_path, monkeypatch):
    from diffusers import StableDiffusionXLPipeline
    import torch
    from mhrlhf.core.prompts import image_seed
    from mhrlhf.images.models import load_pipeline
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pocket_folder("sdxl"), tmp_path/"model")
    VARIANTS[name](tmp_path/"model")
    seed = image_seed("fox", 0)
    options = dict(variant="fp16") if name == "half" else {}
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path/"model", dtype=torch.float32,
                                                      add_watermarker=False, **options)
    stock.set_progress_bar_config(disable=True)
    drawn = stock(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np",
                  generator=torch.Generator().manual_seed(seed)).images[0]
    expected = (drawn * 255).round().astype(int)
    Path("p.csv").write_text(f"prompt_id,prompt\nfox,{PROMPT}\n")
    assert command("generate", "--prompts", "p.csv", "--pipeline", "model", "--steps", str(STEPS), "--seeds", "1",
                   "--guidance-scale", str(GUIDANCE)) == 0
    for made in read_image("data/images/fox/0.png"), own_sampling(load_pipeline("model"), seed):
        assert np.abs(made.astype(int) - expected).max() <= 2

@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_a_perfect_model_has_no_error_at_any_noise_level(predicts):
    "The pair losses compare noise with noise, whatever the model predicts."
    from types import SimpleNamespace
    import torch
    from mhrlhf.images.denoiser import Denoiser, Text
    from mhrlhf.images.models import load_pipeline
    from mhrlhf.tuning.objectives import Pair
    denoiser = Denoiser(load_pipeline("pocket"))
    denoiser.predicts = predicts
    n = len(denoiser.alphas)
    clean, noise, timestep = torch.randn(2, n, 4, 4, 4), torch.randn(n, 4, 4, 4), torch.arange(n)
    alpha, text = denoiser.alpha(timestep), Text(torch.zeros(n, 1, 1), torch.zeros(n, 1))
    def perfect(noisy, timestep, embeds, added_cond_kwargs):
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * (noisy - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        return SimpleNamespace(sample=noise if predicts == "epsilon" else velocity)
    denoiser.unet = perfect
    perfect.dtype, denoiser.conditions = torch.float32, lambda text: {}
    said = torch.stack([denoiser(denoiser.noised(z, timestep, noise), timestep, text) for z in clean])
    assert Pair(said, said, noise).errors(said).max() < 1e-4

def test_whether_anybody_can_judge_is_seen_before_the_work(tmp_path):
    from mhrlhf.core.settings import EvaluateSettings
    from mhrlhf.proof.evaluate import check_judge
    with pytest.raises(InputError, match="the judge sees only"):
        check_judge(EvaluateSettings(judged_by="judge"), ["the birth of Venus"], 64)
    with pytest.raises(InputError, match="no reward model here"):
        check_judge(EvaluateSettings(reward_model=tmp_path), ["the birth of Venus"], 64)
    check_judge(EvaluateSettings(), [PROMPT], 64)

def test_a_moved_run_is_the_same_run(tmp_path):
    from mhrlhf.core.settings import TrainDSPOSettings
    from mhrlhf.reward.noise import NOISE_FILE
    from mhrlhf.tuning.dspo import run_mark
    marks = []
    for place in "here", "there":
        (tmp_path/place/"reward").mkdir(parents=True)
        (tmp_path/place/"model").mkdir()
        (tmp_path/place/"reward"/NOISE_FILE).write_bytes(b"heads")
        marks.append(run_mark(TrainDSPOSettings(output=tmp_path/place/"out", reward_model=tmp_path/place/"reward",
                                                pipeline=str(tmp_path/place/"model"))))
    assert marks[0] == marks[1] != run_mark(TrainDSPOSettings(reward_model=tmp_path/"here/reward", lr=.5))

# Drawn at random ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, count", [("sheet", 20), ("prompts", 30), ("metadata", 30), ("export", 40),
                                         ("settings", 10), ("description", 15)])
def test_inputs_drawn_at_random(kind, count):
    "A small part of benchmarks/fuzz.py: no traceback, nothing taken or left in silence."
    pytest.importorskip("hypothesis")
    import fuzz
    check = getattr(fuzz, f"check_{kind}")
    fuzz.run(check, fuzz.KINDS[check], count, number=7)
