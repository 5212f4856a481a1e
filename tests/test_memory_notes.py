"""What train-reward and train-dspo say of a GPU's memory, on shapes alone: the GPU is only made believe."""
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from mhrlhf.core.group import Team
from mhrlhf.core.settings import TrainDSPOSettings, TrainRewardSettings
from mhrlhf.images.models import load_pipeline
from mhrlhf.reward import train
from mhrlhf.tuning import dspo

GB = 2**30

@pytest.fixture
def gpu(monkeypatch):
    "Says how much of a GPU that is not there is free."
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GB)
    monkeypatch.setattr(torch.random, "fork_rng", lambda *devices, **options: nullcontext())
    monkeypatch.setattr(train, "choose_device", lambda name: torch.device("cuda"))
    return lambda free: monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))

@pytest.mark.parametrize("free, hopeless", [(GB, False), (2**20, True)])
def test_train_reward_says_what_it_needs(free, hopeless, gpu):
    gpu(free)
    said = train._memory(TrainRewardSettings())
    assert "batch of 32" in said and ("a smaller --width and --height" in said) == hopeless

@pytest.mark.parametrize("free, hopeless", [(GB, False), (2**20, True)])
def test_train_dspo_says_what_updates_and_looks_need(free, hopeless, gpu):
    gpu(free)
    pipe = load_pipeline("pocket", "cpu", "float32")
    run = SimpleNamespace(
        settings=TrainDSPOSettings(), team=Team(), rated=SimpleNamespace(latents=torch.empty(1, 4, 16, 16)),
        denoiser=SimpleNamespace(unet=pipe.unet, pipe=pipe, device=torch.device("cuda")),
        watch=SimpleNamespace(sampling=SimpleNamespace(batch=8), prompts=["a fox"] * 4))
    said = dspo._memory(run)
    assert "1.0 GB are loaded" in said and " a look 0.0 GB" in said and ("--adapter lora" in said) == hopeless
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())
