"""What an evaluation refuses before anything is loaded, and which of the base model's images it makes again."""
from pathlib import Path
from types import SimpleNamespace
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mhrlhf.cli import main
from mhrlhf.core.files import InputError
from mhrlhf.core.group import Team
from mhrlhf.core.settings import EvaluateSettings
from mhrlhf.proof import evaluate
from mhrlhf.reward.noise import RATED_FILE

SETTINGS = Path(__file__).parent.parent / "settings.ini"

@pytest.fixture
def sampled(monkeypatch):
    "The prompts for which an image was made; each image is of one grey."
    made = []
    def stand_in(pipe, prompts, seeds, settings):
        made.extend(prompts)
        return np.stack([np.full((8, 8, 3), seed, np.uint8) for seed in seeds])
    monkeypatch.setattr(evaluate, "sample_images", stand_in)
    return made

def base(folder, prompts=("a", "b", "c")):
    pipe, settings = SimpleNamespace(device=torch.device("cpu")), EvaluateSettings(batch=2)
    return evaluate._base(pipe, list(prompts), list(range(len(prompts))), settings, Team(), lambda done: None, folder)

def test_images_of_the_base_model_are_made_once(tmp_path, sampled):
    first = base(tmp_path)
    assert sampled == ["a", "b", "c"] and (first[:, 0, 0, 0] == [0, 1, 2]).all()
    assert (base(tmp_path) == first).all() and sampled == ["a", "b", "c"]
    min(tmp_path.glob("*.png")).unlink()
    assert (base(tmp_path) == first).all() and len(sampled) == 4, "only the missing one"
    base(tmp_path, ("a", "b", "c", "d"))
    assert sampled[4:] == ["d"], "prompts that are new"

def test_a_damaged_image_is_told(tmp_path, sampled):
    base(tmp_path)
    file = min(tmp_path.glob("*.png"))
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(InputError, match=f"{file.name}: damaged; delete it"): base(tmp_path)

def run(tmp_path, *more):
    return main(["evaluate", "--profile", "pocket", "--settings", str(SETTINGS), "--model", str(tmp_path / "model"),
                 "--reward-model", str(tmp_path / "heads"), "--prompts", str(tmp_path / "prompts.csv"),
                 "--output", str(tmp_path / "evaluation"), *more])

@pytest.fixture
def study(tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt_id,prompt\nh0,a fox in the snow\nh1,a rose in a meadow\n")
    (tmp_path / "heads").mkdir()
    texts = {"prompts": json.dumps(["A rose  in a meadow"])}
    save_file(dict(latents=torch.zeros(1)), tmp_path / "heads" / RATED_FILE, metadata=texts)
    return tmp_path

def test_prompts_that_were_trained_on_are_refused(study, capsys):
    assert run(study) == 2
    said = capsys.readouterr().err
    assert "prompts.csv:3: column prompt, value 'a rose in a meadow': the heads learnt from images of this" in said
    assert not (study / "evaluation").exists()

def test_another_evaluation_is_not_written_over(study, capsys):
    (study / "evaluation").mkdir()
    (study / "evaluation/evaluation.json").write_text('{"mark": "of another run"}')
    assert run(study, "--limit", "1") == 2
    refused = "another evaluation is here; choose another --output, or write over it with --force"
    assert refused in capsys.readouterr().err
    assert run(study, "--limit", "1", "--force") == 2  # goes on to the model, which is not there
    assert "no tuned model here" in capsys.readouterr().err
    assert (study / "evaluation/evaluation.json").read_text() == '{"mark": "of another run"}'

def command(stage, folder, *more): return main([stage, "--profile", "pocket", "--settings", str(SETTINGS), *more,
                                                "--database", f"sqlite:///{folder}/ratings.db"])

@pytest.mark.parametrize("about, said", [
    ('{"pairs": 3', "evaluation.json: not JSON"),
    ('{"pairs": 3}', "evaluation.json lacks prompts, judged_by, table, together, conclusion: half an evaluation"),
    (json.dumps(dict.fromkeys(("prompts", "judged_by", "table", "together", "conclusion"), 0) | dict(pairs=3)),
     "1 of 3 pairs in pairs.csv: half an evaluation"),
])
def test_half_an_evaluation_gives_no_report_and_asks_nobody(about, said, tmp_path, capsys):
    folder, report = tmp_path / "evaluation", tmp_path / "report.html"
    folder.mkdir()
    (folder / "evaluation.json").write_text(about)
    (folder / "pairs.csv").write_text("pair,prompt_id,genre,prompt,base,tuned\n0,h0,a,a fox,0,1\n")
    report.write_text("<html><meta name='generator' content='mhrlhf report'>the last one")
    places = "--reward-model", str(tmp_path), "--model", str(tmp_path), "--output", str(report)
    for stage, more in (("report", places), ("choose", ())):
        assert command(stage, tmp_path, "--evaluation", str(folder), *more) == 2
        told = capsys.readouterr().err
        assert said in told and len(told.splitlines()) == 1 and "the last one" in report.read_text()

def test_votes_for_pairs_that_are_gone_end_in_one_line(tmp_path, capsys):
    from mhrlhf.proof.choices import FIRST, pair_name
    from mhrlhf.ratings.store import OVERALL, RatingStore
    store = RatingStore(f"sqlite:///{tmp_path}/ratings.db")
    for i in range(3): store.add_choice("ann", f"p{i}", pair_name(f"{i}a.png", f"{i}b.png"), OVERALL, FIRST)
    assert command("choose", tmp_path, "--results") == 2
    told = capsys.readouterr().err
    assert "3 votes are for pairs that no longer do" in told and len(told.splitlines()) == 1

def test_a_damaged_run_gives_no_report(tmp_path, capsys):
    (tmp_path / "dspo.json").write_text('{"aspects": ["style"]}')
    report = "--output", str(tmp_path / "report.html")
    places = [f"--{name}={tmp_path}" for name in ("reward-model", "model", "evaluation")]
    assert command("report", tmp_path, *places, *report) == 2
    told = capsys.readouterr().err
    assert "dspo.json: lacks history, stopped, kept_update: half a run" in told and len(told.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()
