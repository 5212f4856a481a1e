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
