"""The workflow's commands on SDXL and ViT-L/14 in their own shapes, with random weights and an eighth of the width:
what only holds for the pocket shows itself here. The ratings are RANDOM; no figure means anything."""
from pathlib import Path
import importlib.util, json

from safetensors.torch import load_file
import pandas as pd

from mhrlhf.cli import main

SIDE = 32  # pixels

def the_benchmark():
    "`benchmarks/full_size.py`, whose commands these are."
    path = Path(__file__).parent.parent / "benchmarks/full_size.py"
    spec = importlib.util.spec_from_file_location("full_size", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_every_command_on_the_full_shapes_made_thin(tmp_path, monkeypatch, capsys):
    bench = the_benchmark()
    bench.prepare_study(tmp_path, SIDE, thin=True)
    monkeypatch.chdir(tmp_path)
    for command in bench.workflow_commands():
        if callable(command): command()
        else: assert main([*command, *bench.CHOSEN]) == 0, f"{command}: {capsys.readouterr().err}"
    said = capsys.readouterr().out
    assert "going on from update 2 of 3" in said
    assert len(pd.read_csv("generated.csv")) == len(list(Path("images").rglob("*.png"))) == 40
    assert len(pd.read_csv("outputs/scores.csv")) == 40
    assert json.loads(Path("dspo/dspo.json").read_text())["settings"]["updates"] == 3
    folders = ["dspo", *(f"dspo-{name}" for name in bench.OBJECTIVES[1:])]
    moved = {folder: load_file(next(Path(folder).glob("*.safetensors"))) for folder in folders}
    assert all(any(v.abs().max() > 0 for k, v in tensors.items() if "lora_B" in k) for tensors in moved.values())
    assert list(Path("pictures").rglob("*.png")) and (Path("evaluation") / "evaluation.json").is_file()
