"""A whole model in one file, as ComfyUI and A1111 use it: written here under the first release's names, and loaded."""
from pathlib import Path
import re, shutil

from safetensors.torch import load_file, save_file
import pytest
import torch

from mhrlhf.cli import main
from mhrlhf.core.files import InputError
from mhrlhf.images.memory import estimate_memory
from mhrlhf.images.models import load_pipeline
from mhrlhf.images.sampler import Sampling
from mhrlhf.proof.inference import load_adapter
from test_generate import ROOT, save_other_pipeline

FRAME = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
         "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
RESNET = dict(norm1="in_layers.0", conv1="in_layers.2", time_emb_proj="emb_layers.1", norm2="out_layers.0",
              conv2="out_layers.3", conv_shortcut="skip_connection")

def unet_name(name, layers, crossed):
    "layers: of a block; crossed: numbers of the up blocks with attention."
    place, end = name.rsplit(".", 1)
    if place in FRAME: return f"{FRAME[place]}.{end}"
    side, _, rest = name.partition("_block")
    if side == "mid":
        kind, j, inner = rest.removeprefix(".").split(".", 2)
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}.{within(kind, inner)}"
    i, kind, j, inner = rest.removeprefix("s.").split(".", 3)
    first = int(i) * (layers + 1)
    if kind == "downsamplers": return f"input_blocks.{first + layers + 1}.0.op.{end}"
    if kind == "upsamplers": return f"output_blocks.{first + layers}.{1 + (int(i) in crossed)}.conv.{end}"
    at = f"input_blocks.{first + int(j) + 1}" if side == "down" else f"output_blocks.{first + int(j)}"
    return f"{at}.{int(kind == 'attentions')}.{within(kind, inner)}"

def within(kind, inner):
    "The rest of a name, in a block of convolutions or of attention."
    layer, end = inner.rsplit(".", 1)
    return f"{RESNET.get(layer, layer)}.{end}" if kind == "resnets" else inner

ATTENTION = dict(group_norm="norm", to_q="q", to_k="k", to_v="v")

def vae_name(name, blocks):
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}", name).replace("down_blocks", "down")
    name = re.sub(r"\.(up|down)samplers\.0\.", r".\1sample.", name).replace(".resnets.", ".block.")
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if "mid_block.attentions.0" not in name: return name
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("to_out.0", "proj_out")
    return re.sub("|".join(ATTENTION), lambda m: ATTENTION[m[0]], name)

def flat(network): return {k.removeprefix("text_model."): v for k, v in network.state_dict().items()}

CLIP = {"encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj", "final_layer_norm": "ln_final",
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding"}

def open_clip_weights(network):
    "Query, key and value lie in one matrix, and the projection is turned."
    found, held = {}, flat(network)
    for name, value in held.items():
        if ".k_proj." in name or ".v_proj." in name: continue
        if ".q_proj." in name:
            value = torch.cat([held[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for theirs, ours in CLIP.items(): name = name.replace(theirs, ours)
        if name == "text_projection.weight": name, value = "text_projection", value.T
        found[name] = value.contiguous()
    return found

def first_release(pipe):
    "All weights of a pipeline under the names of SDXL's first release."
    crossed = {i for i, block in enumerate(pipe.unet.up_blocks) if hasattr(block, "attentions")}
    layers, blocks = pipe.unet.config.layers_per_block, len(pipe.vae.config.block_out_channels)
    unet = {unet_name(k, layers, crossed): v for k, v in pipe.unet.state_dict().items()}
    vae = {vae_name(k, blocks): v for k, v in pipe.vae.state_dict().items()}
    vae = {k: v[..., None, None] if "attn_1" in k and v.dim() == 2 else v for k, v in vae.items()}
    one = {f"text_model.{k}": v for k, v in flat(pipe.text_encoder).items()}
    parts = {"model.diffusion_model.": unet, "first_stage_model.": vae, "conditioner.embedders.0.transformer.": one,
             "conditioner.embedders.1.model.": open_clip_weights(pipe.text_encoder_2)}
    return {at + name: value.contiguous() for at, part in parts.items() for name, value in part.items()}

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A pipeline's folder without its weights, and beside it one file with all of them; the pipeline."
    folder = tmp_path_factory.mktemp("single")/"mine"
    torch.manual_seed(0)
    save_other_pipeline(folder)
    pipe = load_pipeline(str(folder))
    file = folder.with_suffix(".safetensors")
    save_file(first_release(pipe), file)
    for weights in folder.rglob("*.safetensors"): weights.unlink()
    return file, pipe

def test_it_is_the_same_model(model):
    file, pipe = model
    alone = load_pipeline(str(file))
    for part in "unet", "vae", "text_encoder", "text_encoder_2":
        ours, theirs = getattr(pipe, part).state_dict(), getattr(alone, part).state_dict()
        assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours), part
    folder = str(file.with_suffix(""))
    asked = Sampling(steps=1, guidance_scale=1., batch=1)
    assert estimate_memory(asked, 1, str(file)) == estimate_memory(asked, 1, folder)

def test_a_stage_works_with_it(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "--pipeline", str(model[0]), "--limit", "1", "--seeds", "1", "--steps", "1"
    assert main(["generate", "--profile", "pocket", "--settings", str(ROOT/"settings.ini"), "--prompts",
                 str(ROOT/"data/prompts.csv"), *options]) == 0
    assert len(list(Path("data/images").glob("*/*.png"))) == 1

def test_what_is_missing_is_told(model, tmp_path):
    file, pipe = model
    def said(name):
        with pytest.raises(InputError) as refused: load_pipeline(str(tmp_path/name))
        assert "\n" not in str(refused.value)
        return str(refused.value)
    shutil.copy(file, tmp_path/"alone.safetensors")
    assert "a folder of the same name beside it may hold the model's configuration" in said("alone.safetensors")
    held, names = load_file(file), ("less", "lost", "half", "cut")
    for name in names: shutil.copytree(file.with_suffix(""), tmp_path/name)
    lost = dict(less="middle_block.0.in_layers.2.weight", lost="text_model.final_layer_norm.bias", half="first_stage")
    for name, part in lost.items():
        save_file({k: v for k, v in held.items() if part not in k}, tmp_path/f"{name}.safetensors")
    for name in "less", "lost": assert "is not in it; get the file again" in said(f"{name}.safetensors")
    assert "half.safetensors: " in said("half.safetensors")
    (tmp_path/"cut.safetensors").write_bytes(file.read_bytes()[:5000])
    assert "cut.safetensors: cannot be loaded as a whole model in one file" in said("cut.safetensors")
    with pytest.raises(InputError, match="is a whole model, no adapter; name it with --pipeline"):
        load_adapter(pipe, file)

def test_names_of_sdxl_for_other_programs():
    "Of all layers of SDXL's UNet: what is written here and in the export, diffusers reads back as it was."
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from mhrlhf.pocket.full_shape import read_shape
    from mhrlhf.proof.export import original_name
    config = read_shape("sdxl")["unet"]
    with torch.device("meta"): unet = UNet2DConditionModel.from_config(config)
    names = [name for name, _ in unet.named_parameters()]
    crossed = {i for i, block in enumerate(unet.up_blocks) if hasattr(block, "attentions")}
    written = {f"model.diffusion_model.{unet_name(k, 2, crossed)}": k for k in names}
    assert convert_ldm_unet_checkpoint(written, config) == {k: k for k in names}
    adapted = [k for k in names if re.search(r"resnets\.\d\.conv.*weight|attentions\.\d\..*(to_|proj|net).*weight", k)]
    assert len(adapted) > 700
    for k in adapted: assert f"{original_name(k.removesuffix('.weight'), 2)}.weight" == unet_name(k, 2, crossed)
