"""The workflow's commands on SDXL and ViT-L/14 in their own shapes, with random weights and an eighth of the width:
what only holds for the pocket shows itself here. The ratings are RANDOM; no figure means anything."""
from pathlib import Path
import importlib, json

from matplotlib.figure import Figure
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
import pandas as pd
import pytest
import torch

from benchmark import the_benchmark
from mhrlhf.cli import main
from mhrlhf.images.models import load_backbone, load_pipeline
from mhrlhf.proof.inference import load_adapter
from mhrlhf.tuning.adapters import ADAPTER_FILE, LAYERS, merged, reference_of

ROOT = Path(__file__).parent.parent
SIDE = 32  # pixels
FEW = ("attn2.to_v",)  # layers with an adapter, for all objectives but the first: 70 of 560

def the_reader():
    "What notebook 69 reads kohya's format with, as ComfyUI does and apart from what writes it."
    cells = json.loads((ROOT / "nbs/proof/69_export.ipynb").read_text())["cells"]
    [source] = [text for cell in cells if "def comfy_names" in (text := "".join(cell["source"]))]
    exec(source, found := {})
    return found["comfy_names"], found["comfy_weight"]

class Held:
    "Weights and adapters are read once: 3,000 modules take a process longer to make than to run."
    def __init__(self): self.loaded, self.adapter = {}, None

    def backbone(self, name, *options):
        if name not in self.loaded: self.loaded[name] = load_backbone(name, "cpu")
        return self.loaded[name]

    def pipeline(self, name, *options):
        if name not in self.loaded: self.loaded[name] = load_pipeline(name, "cpu")
        return self.loaded[name]

    def untuned(self, name, *options):
        pipe, self.adapter = self.pipeline(name), None
        if getattr(pipe.unet, "peft_config", None): pipe.unet.unload_lora()
        return pipe

    def tuned(self, pipe, model):
        if self.adapter is None: load_adapter(pipe, model)
        assert self.adapter in (None, model)
        self.adapter = model
        return pipe

@pytest.fixture
def held(monkeypatch):
    "The commands share what they load; pictures, which no shape changes, are not drawn."
    held = Held()
    def put(name, value, *modules):
        for module in modules: monkeypatch.setattr(importlib.import_module(f"mhrlhf.{module}"), name, value)
    put("load_backbone", held.backbone, "reward.train", "reward.model")
    put("load_pipeline", held.untuned, "images.queue", "reward.train", "tuning.dspo", "proof.evaluate")
    put("load_pipeline", held.pipeline, "proof.inference", "proof.export")
    put("load_adapter", held.tuned, "proof.evaluate", "proof.inference", "proof.export")
    put("pictures", lambda trained: {}, "reward.train")
    put("extreme_pictures", lambda trained: Figure(), "reward.train")
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).touch())
    return held

def said_of(unet):
    "What the UNet sees in one and the same noise."
    draw, c = torch.Generator().manual_seed(0), unet.config
    def noise(*shape): return torch.randn(1, *shape, generator=draw).to(unet.dtype)
    summary = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    given = dict(text_embeds=noise(summary), time_ids=torch.tensor([[SIDE, SIDE, 0., 0., SIDE, SIDE]]))
    latent, text = noise(4, SIDE // 8, SIDE // 8), noise(77, c.cross_attention_dim)
    with torch.no_grad(): return unet(latent, torch.tensor(500.), text, added_cond_kwargs=given).sample.float()

def shake(folder):
    "Let an adapter change the model: the best of a run with RANDOM heads may be its start."
    file, draw = Path(folder) / ADAPTER_FILE, torch.Generator().manual_seed(0)
    with safe_open(file, "pt") as f:
        about, tensors = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}
    for name, v in tensors.items():
        if "lora_B" in name: v.normal_(std=.05, generator=draw)
    save_file(tensors, file, about)

def check_layers(unet, file):
    "That a kohya file, read as ComfyUI reads it, gives the layers into which peft merges the adapter."
    names_of, weight_of = the_reader()
    names, held = names_of(unet), {}
    adapted = {n: m for n, m in unet.named_modules() if isinstance(m, BaseTunerLayer)}
    before = {n: m.get_base_layer().weight.detach().clone() for n, m in adapted.items()}
    for key, value in load_file(file).items():
        name, _, part = key.partition(".")
        held.setdefault(names[name], {})[part] = value
    assert held.keys() == adapted.keys() and len(held) == 560
    with merged(unet):
        for name, layer in adapted.items():
            after = layer.get_base_layer().weight
            wrong, moved = (weight_of(held[name], before[name]) - after).norm(), (after - before[name]).norm()
            assert wrong < 1e-4 * moved, f"{name}: {wrong:.2g} of {moved:.2g}"

def check_merges(pipe):
    "That the adapter in the weights, ours and diffusers', does what it does beside them, and bfloat16 nearly so."
    unet = pipe.unet
    with reference_of(unet): without = said_of(unet)
    beside = said_of(unet)
    with merged(unet): within = said_of(unet)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused, moved = said_of(unet), (beside - without).norm()
    assert moved > .01 * without.norm()
    for other in (within, fused): assert (other - beside).norm() < .01 * moved
    assert (said_of(unet.to(torch.bfloat16)) - beside).norm() < .1 * beside.norm()

def test_every_command_on_the_full_shapes_made_thin(tmp_path, monkeypatch, capsys, held):
    bench = the_benchmark("full_size")
    bench.spare(monkeypatch.setattr)
    bench.prepare_study(tmp_path, SIDE, thin=True)
    monkeypatch.chdir(tmp_path)
    def run(command):
        assert main([*command, *bench.CHOSEN]) == 0, f"{command}: {capsys.readouterr().err}"
    for command in bench.workflow_commands():
        if callable(command):
            command()
            continue
        if "--objective" in command: monkeypatch.setitem(LAYERS, "attention", FEW)
        if command[0] == "evaluate": shake("dspo")
        run(command)
    said = capsys.readouterr().out
    assert "going on from update 2 of 3" in said
    assert len(pd.read_csv("generated.csv")) == len(list(Path("images").rglob("*.png"))) == bench.IMAGES
    assert len(pd.read_csv("scores.csv")) == bench.IMAGES
    folders = ["dspo", *(f"dspo-{name}" for name in bench.OBJECTIVES[1:])]
    tuned = [json.loads((Path(folder) / "dspo.json").read_text()) for folder in folders]
    assert [t["settings"]["objective"] for t in tuned] == list(bench.OBJECTIVES)
    assert [t["history"][-1]["update"] for t in tuned] == [2, 2, 3, 2]
    for folder, about in zip(folders, tuned):
        latest = load_file(Path(folder) / "checkpoints/latest.safetensors")
        assert latest["optimizer.0.step"] == about["history"][-1]["update"]
        assert any(v.any() for k, v in latest.items() if k.endswith("exp_avg")), f"{folder}: no gradient"
    assert list(Path("pictures").rglob("*.png")) and (Path("evaluation") / "evaluation.json").is_file()
    pipe = held.pipeline(str(tmp_path / "weights/sdxl"))
    check_layers(pipe.unet, "kohya.safetensors")
    check_merges(pipe)
