"The pocket can be built anew: a throw-away one loads and samples, and the same recipe gives the same weights."
from dataclasses import replace
import os, subprocess, sys

import pytest
import torch

from mhrlhf.images.models import load_pipeline, pocket_folder
from mhrlhf.pocket.train import RECIPES, main, train_judge

SHIPPED = ("sdxl/unet/diffusion_pytorch_model.safetensors", "openclip/open_clip_model.safetensors",
           "tiny_vae/diffusion_pytorch_model.safetensors", "judge.safetensors", "second_judge.safetensors",
           "recipe.json", "log.jsonl")


def build(recipe, folder):
    "`make pocket` as a shell runs it."
    env = {k: v for k, v in os.environ.items() if k != "MHRLHF_POCKET"}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mhrlhf.pocket.train", "--recipe", recipe, "--output", folder]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_fast_recipe_builds_a_pocket_that_loads_and_samples(tmp_path, capsys):
    out = build("fast", tmp_path / "pocket")
    assert out.returncode == 0, out.stderr[-2000:]
    assert "it loads and samples" in out.stdout
    assert not list((tmp_path / "pocket").rglob("*.bin"))
    assert (tmp_path / "pocket/sdxl/unet/diffusion_pytorch_model.safetensors").exists()
    assert main(["--recipe", "cpu", "--output", str(tmp_path / "pocket")]) == 2
    assert "another recipe" in capsys.readouterr().out


def test_same_recipe_same_weights(tmp_path):
    torch.set_num_threads(1)
    r, pipe = replace(RECIPES["fast"], judge_steps=3, bank=32), load_pipeline("pocket")
    one, two = (train_judge(r, pipe, tmp_path / "log").state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    other = train_judge(replace(r, seed=1), pipe, tmp_path / "log").state_dict()
    assert any(not torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("part", SHIPPED)
def test_what_ships_is_complete(part):
    assert (pocket_folder() / part).stat().st_size > 100


def test_what_ships_is_small():
    assert sum(p.stat().st_size for p in pocket_folder().rglob("*") if p.is_file()) < 40e6
