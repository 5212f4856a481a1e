"""The ways to tune that benchmarks/dspo.py sets side by side. Each is a generator that yields after every update.

All begin with the same pocket, the same rated pictures and CLIP heads on them, and one number that was tried over
decades. TRL's two trainers are TRL 0.23's own, around SDXL's networks in the interface that it asks for; the others are
their papers' losses in our loop, written anew after the sources that stand beside them: diffusers' script takes its
pictures from a data set on the hub and its pairs from people, DRTune's and FlowBP's code is for flow models of billions
of parameters, LPO's for CUDA and its own reward model of SDXL's size."""
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
import random

import torch
import torch.nn.functional as F

from mhrlhf.core.settings import load_settings
from mhrlhf.images.denoiser import Denoiser, Text, encode_texts, join_texts
from mhrlhf.images.sampler import Sampling
from mhrlhf.reward.noise import NoiseHeads, draw, fit_noise_heads, load_noise_heads, load_rated, rated_latents
from mhrlhf.tuning.adapters import add_adapter, reference_of
from mhrlhf.tuning.loop import rated_pairs, start, tune
from mhrlhf.tuning.objectives import Pair, dpo
from mhrlhf.tuning.watch import Watch

SETTINGS = Path(__file__).resolve().parent.parent/"settings.ini"
RANK, LAYERS = 16, "all"   # of everybody's adapter
GUIDANCE, STEPS = 4., 10   # of those who sample
PICTURES = 8               # that a chain, an epoch's batch or a step of LPO draws at once

@dataclass
class World:
    "What every method begins with."
    denoiser: Denoiser
    reward: object    # the `RewardModel` of the CLIP heads
    pictures: list    # arrays (h, w, 3) uint8 that were rated
    prompts: list     # their texts
    left: Path = None  # in a sweep: folder of noise-aware heads that are there

    def __post_init__(self):
        self.texts = sorted(set(self.prompts))
        self.encoded = encode_texts(self.denoiser.pipe, self.texts)

    def wish(self, pixels, prompts):
        "One reward a picture: the mean of the heads' ratings in standard deviations; differentiable. (n,)"
        ratings = self.reward(pixels.clamp(0, 1), list(prompts))
        return ((ratings - self.reward.mean) / self.reward.std).mean(1)

    def some(self, count):
        "A few prompts by chance and what the UNet is told of them."
        rows = torch.randint(len(self.texts), (count,))
        return [self.texts[i] for i in rows], self.encoded[rows]

def low_rank(world):
    "LoRA on the world's UNet: what is trained."
    return add_adapter(world.denoiser.unet, "lora", RANK, LAYERS)

def updates(parameters, rate, loss, **adam):
    "AdamW with the gradient's norm cut at one, which all of these scripts share."
    optimizer = torch.optim.AdamW(parameters, rate, **adam)
    while True:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.)
        optimizer.step()
        yield

# Ours -------------------------------------------------------------------------------------------------------------

def learnt_heads(world, together=False):
    "Rated latents and the noise-aware heads on them, as `mhrlhf train-reward` has it; or one head for the mean."
    s, denoiser = load_settings("train-reward", "pocket", SETTINGS), world.denoiser
    if world.left: return load_rated(world.left, denoiser), load_noise_heads(world.left, denoiser)
    known = rated_latents(denoiser, world.reward, world.pictures, world.prompts, s.copies)
    aspects = list(world.reward.aspects)
    if together:
        aspects = ["mean"]
        known = replace(known, ratings=known.ratings.mean(1, keepdim=True), weights=known.weights[:, :1])
    draws = draw(denoiser, known, s.draws, torch.Generator().manual_seed(s.seed))
    heads, folds = NoiseHeads(denoiser.channels(), aspects, s.members), known.prompt % s.members
    for _ in fit_noise_heads(heads, draws, known.ratings, known.weights, folds, s.noise_epochs): pass
    return known[:len(world.pictures)], heads

def ours(world, strength, together=False):
    "`mhrlhf train-dspo` as the pocket's profile has it, heads' training included."
    s = load_settings("train-dspo", "pocket", SETTINGS, strength=strength, updates=200)
    if together: s = replace(s, balance="equal")
    known, heads = learnt_heads(world, together)
    watched = world.texts[::max(len(world.texts) // s.watched, 1)][:s.watched]
    watch = Watch(world.denoiser, world.reward, watched, Sampling(s.watch_steps, GUIDANCE, s.batch))
    for state in tune(start(world.denoiser, heads, known, watch, s)):
        if "loss" in state: yield

one_head = partial(ours, together=True)

# Diffusion-DPO ------------------------------------------------------------------------------------------------------

def diffusion_dpo(world, rate):
    """Wallace et al., CVPR 2024, with the numbers of diffusers' examples/research_projects/diffusion_dpo/
    train_diffusion_dpo_sdxl.py: beta 5000, four pairs an update, all timesteps alike, constant learning rate."""
    known = rated_latents(world.denoiser, world.reward, world.pictures, world.prompts, copies=0)
    pairs = rated_pairs(known, torch.ones(known.ratings.shape[1]) / known.ratings.shape[1])
    denoiser = world.denoiser
    def loss():
        rows = pairs[torch.randperm(len(pairs))[:4]]
        at, noise = torch.randint(0, 1000, (4,)), torch.randn_like(known.latents[:4])
        given = [(denoiser.noised(known.latents[r], at, noise), at, known.texts(r)) for r in rows.T]
        with torch.no_grad(), reference_of(denoiser.unet): reference = torch.stack([denoiser(*g) for g in given])
        return dpo(Pair(torch.stack([denoiser(*g) for g in given]), reference, noise), 5000.).mean()
    yield from updates(low_rank(world), rate, loss, weight_decay=1e-2)

# Chains of the sampler with one summed reward ------------------------------------------------------------------------

class Chain:
    "The sampler's Euler steps on y = z / √ᾱ, in which the predicted noise is the velocity and σ the time."
    def __init__(self, world, steps=STEPS):
        self.denoiser = world.denoiser
        self.timesteps = torch.arange(steps).flip(0) * (1000 // steps) + 1
        alpha = self.denoiser.alphas[self.timesteps]
        self.sigma = torch.cat([((1 - alpha) / alpha).sqrt(), torch.zeros(1)])

    def begin(self, text):
        return torch.randn(len(text), 4, *[self.denoiser.unet.config.sample_size] * 2) * (1 + self.sigma[0] ** 2).sqrt()

    def noise(self, y, i, text):
        "The guided prediction at step i."
        return guided(self.denoiser, y / (1 + self.sigma[i] ** 2).sqrt(), self.timesteps[i].expand(len(y)), text)

    def step(self, i): return self.sigma[i + 1] - self.sigma[i]

def guided(denoiser, noisy, timestep, text):
    "Classifier-free guidance."
    both = join_texts(denoiser.empty[[0] * len(text)], text)
    without, asked = denoiser(torch.cat([noisy] * 2), torch.cat([timestep] * 2), both).chunk(2)
    return without + GUIDANCE * (asked - without)

def drtune(world, rate):
    """DRTune (Wu et al., 2405.00760) as FlowBP's repository has it (flowbp/trainers/sd35/drtune.py): inputs cut off,
    three spaced steps trained, an early stop in the last .4 of the steps, the reward of the clean estimate there."""
    chain = Chain(world)
    def loss():
        prompts, text = world.some(PICTURES)
        stop = STEPS - random.randint(1, round(.4 * STEPS))
        stride = (stop + 1) // 3
        first = random.randint(0, stop - 2 * stride)
        y = chain.begin(text)
        for i in range(stop + 1):
            with torch.set_grad_enabled((i - first) % stride == 0 and 0 <= i - first <= 2 * stride):
                velocity = chain.noise(y.detach(), i, text)
            y = y - chain.sigma[i] * velocity if i == stop else y + chain.step(i) * velocity
        return -world.wish(world.denoiser.pixels(y), prompts).mean()
    yield from updates(low_rank(world), rate, loss, weight_decay=1e-4)

def flowbp(world, rate):
    """FlowBP-Sparse (2606.11075; flowbp/trainers/sd35/flowbp_sparse.py): a cached rollout, four steps asked again with
    gradient, late ones more often, their gradient scaled half way to what all steps would give."""
    chain, active = Chain(world), 4
    def loss():
        prompts, text = world.some(PICTURES)
        y, seen = chain.begin(text), []
        with torch.no_grad():
            for i in range(STEPS):
                seen.append((y, chain.noise(y, i, text)))
                y = y + chain.step(i) * seen[-1][1]
        chosen = torch.multinomial(torch.arange(1., STEPS + 1), active).tolist()
        lengths = chain.sigma.diff().abs()
        scale = 1 + .5 * (lengths.sum() / lengths[chosen].sum() - 1)
        for i in chosen:
            again = chain.noise(seen[i][0], i, text)
            y = y + chain.step(i) * scale * (again - again.detach())
        return -world.wish(world.denoiser.pixels(y), prompts).mean()
    yield from updates(low_rank(world), rate, loss, weight_decay=1e-4)

# Preferences at every step -------------------------------------------------------------------------------------------

def step_moments(denoiser, noise, timestep, noisy, before):
    "Mean and standard deviation of DDIM's step from one timestep to the one before, with eta 1."
    a, b = denoiser.alpha(timestep), denoiser.alpha(before)
    deviation = ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
    clean = (noisy - (1 - a).sqrt() * noise) / a.sqrt()
    return b.sqrt() * clean + (1 - b - deviation ** 2).clamp(min=0).sqrt() * noise, deviation

def lpo(world, rate):
    """LPO (Zhang et al., 2502.01051; Kwai-Kolors/LPO, lpo/train_scripts/train_lpo_sdxl.py): four candidates at every
    step, the best and the worst by a reward model on noisy latents, beta 500, ratios within .1 of one. The reward
    model: our noise-aware heads, summed; of the pairs the half that is further apart, for our units are not theirs."""
    known, heads = learnt_heads(world)
    parameters, denoiser = low_rank(world), world.denoiser
    timesteps = torch.arange(STEPS).flip(0) * (1000 // STEPS) + 1
    @torch.no_grad()
    def pairs():
        _, text = world.some(PICTURES)
        noisy, found = torch.randn(PICTURES, *known.latents.shape[1:]), []
        for t, before in zip(timesteps, timesteps[1:]):
            at, then = t.expand(PICTURES), before.expand(PICTURES)
            mean, deviation = step_moments(denoiser, guided(denoiser, noisy, at, text), at, noisy, then)
            many = mean + deviation * torch.randn(4, *mean.shape)  # (candidates, n, c, h, w)
            with reference_of(denoiser.unet):
                seen = denoiser.features(many.flatten(0, 1), then.repeat(4), text[list(range(PICTURES)) * 4])
            score = heads(seen, then.repeat(4)).mean(1).view(4, PICTURES)
            best, worst = score.argmax(0), score.argmin(0)
            wide = (score.max(0).values - score.min(0).values).argsort()[PICTURES // 2:]
            all_of = torch.arange(PICTURES)
            found += [(noisy[i], t, before, text[i:i + 1], many[best[i], i], many[worst[i], i]) for i in wide.tolist()]
            noisy = many[torch.randint(4, (PICTURES,)), all_of]
        random.shuffle(found)
        return found
    waiting = []
    def loss():
        if len(waiting) < PICTURES: waiting.extend(pairs())
        noisy, t, before, text, better, worse = zip(*[waiting.pop() for _ in range(PICTURES)])
        noisy, t, before, text = torch.stack(noisy), torch.stack(t), torch.stack(before), join_texts(*text)
        def chances():
            mean, deviation = step_moments(denoiser, guided(denoiser, noisy, t, text), t, noisy, before)
            return [-((torch.stack(z) - mean) ** 2 / (2 * deviation ** 2)).mean((1, 2, 3)) for z in (better, worse)]
        with torch.no_grad(), reference_of(denoiser.unet): reference = chances()
        good, bad = [(now - then).exp().clamp(.9, 1.1).log() for now, then in zip(chances(), reference)]
        return -F.logsigmoid(500. * (good - bad)).mean()
    yield from updates(parameters, rate, loss, weight_decay=1e-4)

# TRL's own trainers -----------------------------------------------------------------------------------------------

class PackedText(torch.nn.Module):
    "Both of SDXL's text encoders as one that gives a single tensor: the pooled text is a 78th token."
    def __init__(self, world):
        super().__init__()
        pipe = world.denoiser.pipe
        def packed(text):
            last = F.pad(text.pooled, (0, text.embeds.shape[2] - text.pooled.shape[1]))
            return torch.cat([text.embeds, last[:, None]], 1)
        rows = torch.cat([packed(world.encoded), packed(world.denoiser.empty)])
        ids = pipe.tokenizer([*world.texts, ""], padding="max_length", truncation=True, return_tensors="pt",
                             max_length=pipe.tokenizer.model_max_length).input_ids
        self.known = {tuple(i): row for i, row in zip(ids.tolist(), rows)}
        self.dtype, self.device = rows.dtype, rows.device

    def forward(self, ids): return (torch.stack([self.known[tuple(i)] for i in ids.tolist()]),)

def unpack_text(denoiser):
    "Let the UNet take the packed text, as Stable Diffusion's UNet takes its text."
    unet, width, plain = denoiser.unet, denoiser.empty.pooled.shape[1], denoiser.unet.forward
    def forward(sample, timestep, encoder_hidden_states, cross_attention_kwargs=None, return_dict=True):
        text = Text(encoder_hidden_states[:, :-1], encoder_hidden_states[:, -1, :width])
        return plain(sample, timestep, text.embeds, added_cond_kwargs=denoiser.conditions(text),
                     return_dict=return_dict)
    unet.forward = forward

def for_trl(world):
    "The pocket in the interface of TRL's diffusion trainers."
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from trl.models.modeling_sd_base import DefaultDDPOStableDiffusionPipeline
    pipe = world.denoiser.pipe
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    low_rank(world)
    unpack_text(world.denoiser)
    class SDXL(DefaultDDPOStableDiffusionPipeline):
        def __init__(self):
            self.sd_pipeline = StableDiffusionPipeline(
                vae=pipe.vae, text_encoder=PackedText(world), tokenizer=pipe.tokenizer, unet=pipe.unet,
                scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
            self.use_lora = True
        def get_trainable_layers(self): return pipe.unet
        def set_progress_bar_config(self, **options): self.sd_pipeline.set_progress_bar_config(disable=True)
    return SDXL()

def trained_by_trl(world, trainer, config):
    "The epochs of one of TRL's trainers."
    from accelerate import Accelerator
    def prompt(): return random.choice(world.texts), {}
    def reward(images, prompts, metadata): return world.wish(images, prompts), {}
    Accelerator(cpu=True)  # before the first line that the trainer logs
    it, done = trainer(config, reward, prompt, for_trl(world)), 0
    for epoch in range(10_000):
        done = it.step(epoch, done)
        yield

SHARED = dict(mixed_precision="no", allow_tf32=False, save_freq=10 ** 9, accelerator_kwargs=dict(cpu=True),
              sample_num_steps=STEPS, sample_guidance_scale=GUIDANCE)  # of TRL's configurations

def trl_ddpo(world, rate):
    "Black et al., ICLR 2024: TRL 0.23's DDPOTrainer; 16 pictures an epoch, two updates of eight."
    from trl import DDPOConfig, DDPOTrainer
    config = DDPOConfig(**SHARED, train_learning_rate=rate, sample_batch_size=PICTURES, train_batch_size=PICTURES,
                        sample_num_batches_per_epoch=2)
    yield from trained_by_trl(world, DDPOTrainer, config)

def trl_alignprop(world, rate, last=False):
    "Prabhudesai et al., 2310.03739: TRL 0.23's AlignPropTrainer, its chain cut at a random step."
    from trl import AlignPropConfig, AlignPropTrainer
    cut = dict(truncated_backprop_rand=not last, truncated_backprop_timestep=STEPS - 1,
               truncated_rand_backprop_minmax=(0, STEPS))
    config = AlignPropConfig(**SHARED, **cut, train_learning_rate=rate, train_batch_size=PICTURES)
    yield from trained_by_trl(world, AlignPropTrainer, config)

trl_draft = partial(trl_alignprop, last=True)
