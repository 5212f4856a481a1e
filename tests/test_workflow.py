"""What `make test-pipeline` does when it is interrupted, when a file it depends on changes, and when it is to delete
a folder. The stages are stand-ins."""
from pathlib import Path
import importlib, time

import pytest

from mhrlhf.cli import main
from mhrlhf.core.files import read_json
from mhrlhf.core.settings import MODULES, TestPipelineSettings
from mhrlhf.workflow import RESULTS, run_stages, stage_settings

ROOT = Path(__file__).parent.parent
ALL = list(RESULTS)
COMMAND = ["test-pipeline", "--profile", "pocket", "--settings", str(ROOT / "settings.ini"), "--output"]

def stand_in(stage, place, worked):
    "A stage that only writes its results, or is interrupted."
    def run(settings):
        worked.append(stage)
        time.sleep(.05)
        if stage == run.fails: raise KeyboardInterrupt
        for name in RESULTS[stage]:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(stage)
    run.fails = None
    return run

@pytest.fixture
def study(tmp_path, monkeypatch):
    "A folder, and a function that runs the stages there and tells which of them worked."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("prompts", "prompts_heldout"):
        (tmp_path / f"data/{name}.csv").write_text("prompt_id,prompt\na,a fox\n")
    worked = []
    runs = {stage: stand_in(stage, tmp_path / "run", worked) for stage in ALL}
    for stage, run in runs.items():
        monkeypatch.setattr(importlib.import_module(f"mhrlhf.{MODULES[stage]}"), "run", run)
    def go(fails=None, **changes):
        worked.clear()
        for run in runs.values(): run.fails = fails
        settings = TestPipelineSettings(output=Path("run"), **changes)
        go.seconds = run_stages(stage_settings(settings, ROOT / "settings.ini"), "run")
        return list(worked)
    return go

def test_what_is_done_is_not_done_again(study):
    assert study() == ALL and study() == []
    assert study(minutes=1) == ALL[3:], "what follows a change is done again"

@pytest.mark.parametrize("name, again", [("prompts", ALL), ("prompts_heldout", ALL[4:])])
def test_edited_prompts_are_noticed(study, name, again):
    study()
    with open(f"data/{name}.csv", "a") as f: f.write("b,a cat\n")
    assert study() == again and study() == []

@pytest.mark.parametrize("stage", ALL)
def test_deleted_results_are_noticed(study, stage):
    study()
    (Path("run") / RESULTS[stage][-1]).unlink()
    assert study() == ALL[ALL.index(stage):]

def test_all_attempts_count(study):
    with pytest.raises(KeyboardInterrupt): study(fails="train-reward")
    assert study() == ALL[2:]
    notes = read_json("run/stages.json")
    assert [n["attempts"] for n in notes.values()] == [1, 1, 2, 1, 1]
    assert study.seconds["train-reward"] > .1 > study.seconds["annotate"] and study() == []

def test_fresh_deletes_only_what_a_run_made(study, tmp_path, capsys):
    study()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path)
    here, foreign = "in which you are", "no test-pipeline made it"
    for folder, why in ((".", here), ("..", here), ("link", here), ("thesis", foreign), ("data", foreign)):
        assert main([*COMMAND, folder, "--fresh"]) == 2
        assert why in capsys.readouterr().err
    assert (tmp_path / "thesis/chapter.tex").read_text() == "years of work"
    assert (tmp_path / "data/prompts.csv").exists() and study() == []

def test_a_run_outside_of_the_project_is_refused_before_the_work(study, tmp_path, capsys):
    assert main([*COMMAND, "../elsewhere"]) == 2
    assert "lies outside of the project" in capsys.readouterr().err
    assert not (tmp_path.parent / "elsewhere").exists()
