"""Generation as commands and as processes: what the notebooks of the images cannot show."""
from pathlib import Path
import gc, os, time

import numpy as np
import pytest
from PIL import Image

from mhrlhf.core.devices import one_thread
from mhrlhf.core.prompts import Prompt, image_seed, read_prompts
from mhrlhf.core.settings import GenerateSettings
from mhrlhf.images.generate import prepare, run
from mhrlhf.images.memory import estimate_memory
from mhrlhf.images.metadata import order_metadata, read_metadata, write_image
from mhrlhf.images.plan import Task, make_plan
from mhrlhf.images.queue import Queue, missing_images, work
from mhrlhf.pocket.scenes import parse_caption, unseen_captions

ROOT = Path(__file__).parent.parent

@pytest.fixture(scope="module")
def pipe():
    from mhrlhf.images.models import load_pipeline
    return load_pipeline("pocket")

def by_workers(settings, workers, pipe, monkeypatch):
    "Forked workers on a real queue, with a pipeline that is loaded already; returns path -> pixels."
    from torch.distributed import TCPStore
    monkeypatch.setattr("mhrlhf.images.queue.load_pipeline", lambda *a: pipe)
    plan = make_plan(settings)
    todo = [plan.tasks[i] for i in prepare(plan)]
    server, pids = TCPStore("127.0.0.1", 0, is_master=True), []
    for rank in range(workers):
        if pid := os.fork():
            pids.append(pid)
            continue
        try:
            store = TCPStore("127.0.0.1", server.port, is_master=False)
            with one_thread(): work(plan, todo, store, rank, workers)
        finally: os._exit(0)
    for pid in pids: os.waitpid(pid, 0)
    made = sorted(settings.images.glob("*/*.png"))
    return {p.relative_to(settings.images).as_posix(): np.asarray(Image.open(p)) for p in made}

def in_folder(folder, **options):
    return GenerateSettings(prompts=ROOT/"data/prompts.csv", images=folder/"images", metadata=folder/"generated.csv",
                            steps=2, **options)

def test_any_number_of_workers_makes_the_same_images(tmp_path, pipe, monkeypatch):
    "Equal to the bit at equal batch size: with one worker, two and four, and with a run that found some images there."
    made = {}
    for n in (1, 2, 4): made[n] = by_workers(in_folder(tmp_path/str(n), limit=9, batch=2), n, pipe, monkeypatch)
    again = in_folder(tmp_path/"4", limit=9, batch=2)
    for t in make_plan(again).tasks[1::3]: os.unlink(t.path)
    made["again"] = by_workers(again, 2, pipe, monkeypatch)
    assert len(made[1]) == 18
    for images in made.values():
        assert images.keys() == made[1].keys() and all((images[p] == made[1][p]).all() for p in images)
    table = read_metadata(tmp_path/"2"/"generated.csv")
    assert len(table) == 18 and not table.image_path.duplicated().any() and set(table.worker) <= {"0", "1"}

def test_other_batch_sizes_differ_by_rounding_only(tmp_path, pipe, monkeypatch):
    one, four = (by_workers(in_folder(tmp_path/str(b), limit=2, batch=b), 1, pipe, monkeypatch) for b in (1, 4))
    assert max(np.abs(one[p].astype(int) - four[p]).max() for p in one) <= 1

def text_encoder(cls, width):
    from transformers import CLIPTextConfig
    return cls(CLIPTextConfig(vocab_size=8192, hidden_size=width, intermediate_size=32, num_hidden_layers=2,
                              num_attention_heads=2, projection_dim=48, bos_token_id=8190, eos_token_id=8191))

def save_other_pipeline(folder):
    "A pipeline whose VAE has factor 8 and 8 latent channels, and whose text encoders have other widths."
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection
    from mhrlhf.pocket.networks import build_pipeline, build_tokenizer
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=8,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=8, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, cross_attention_dim=80, attention_head_dim=4, transformer_layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=48 + 6 * 8)
    texts = text_encoder(CLIPTextModel, 32), text_encoder(CLIPTextModelWithProjection, 48)
    build_pipeline(vae, unet, texts, build_tokenizer()).save_pretrained(folder)

def save_tiny_vae(folder):
    from diffusers import AutoencoderTiny
    AutoencoderTiny(latent_channels=8, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                    num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).save_pretrained(folder)

def test_a_pipeline_of_another_shape(tmp_path):
    "A local folder is a pipeline, and a tiny decoder of its own can replace its VAE."
    import torch
    torch.manual_seed(0)
    save_other_pipeline(tmp_path/"other")
    save_tiny_vae(tmp_path/"tiny")
    for name, options in dict(own=dict(width=96), preview=dict(vae=str(tmp_path/"tiny"))).items():
        settings = in_folder(tmp_path/name, limit=2, pipeline=str(tmp_path/"other"), batch=4, **options)
        plan = make_plan(settings)
        needed = estimate_memory(plan.sampling, 1, plan.pipeline, plan.device, plan.dtype, plan.vae)
        assert run(settings) == 0 and needed["total"] > 0
        width = 96 if name == "own" else 64
        assert {Image.open(p).size for p in settings.images.glob("*/*.png")} == {(width, 64)}
        assert set(read_metadata(settings.metadata).width) == {width}

def seconds_of_a_claim(tasks):
    "Processor time of one claim of so many tasks."
    from torch.distributed import TCPStore
    server = TCPStore("127.0.0.1", 0, is_master=True)
    queue = Queue(TCPStore("127.0.0.1", server.port, is_master=False), tasks, 8)
    queue.claim()
    start = time.process_time()
    for _ in range(1000): queue.claim()
    return (time.process_time() - start) / 1000

def test_growth():
    "A claim costs the same at ten thousand batches as at a hundred."
    few, many = (min(seconds_of_a_claim(n) for _ in range(3)) for n in (800, 80_000))
    # the pocket needs 0.1 s an image, so less than one per cent, and two thousandths of that apart
    assert many < 1e-3 and many < few + 2e-4

class Stopwatch:
    "Seconds of processor time of a block, as in a process that holds nothing of other tests' to collect."
    def __enter__(self):
        gc.collect()
        gc.freeze()
        self.start = time.process_time()
        return self
    def __exit__(self, *error):
        self.seconds = time.process_time() - self.start
        gc.unfreeze()

def write_everywhere(tasks):
    "One and the same picture in the place of every task; returns the file's bytes."
    write_image(tasks[0].path, np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = Path(tasks[0].path).read_bytes()
    for t in tasks:
        Path(t.path).parent.mkdir(parents=True, exist_ok=True)
        Path(t.path).write_bytes(data)
    return data

def test_the_start_of_a_large_run(tmp_path, monkeypatch):
    "10,000 prompts, two images each: what is looked at before the first image, when none and when all are there."
    monkeypatch.chdir(tmp_path)
    Path("p.csv").write_text("prompt_id,prompt\n" + "".join(f"p{i:05},a fox\n" for i in range(10_000)))
    settings = GenerateSettings(prompts=Path("p.csv"), images=Path("images"), metadata=Path("m.csv"))
    with Stopwatch() as none:
        plan = make_plan(settings)
        missing = prepare(plan)
    assert len(missing) == 20_000
    write_everywhere(plan.tasks)
    assert prepare(plan) == []
    with Stopwatch() as known: assert prepare(make_plan(settings)) == []
    print(f"100,000 images: {5 * none.seconds:.1f} s when none is there, {5 * known.seconds:.1f} s when all are")
    assert none.seconds < 2 and known.seconds < 2

def test_start_looks_at_100_000_images_in_seconds(tmp_path):
    "10,000 here, in less than a second of processor time."
    tasks = [Task(Prompt(f"p{i:05}", "a fox"), s, f"{tmp_path}/images/p{i:05}/{s}.png")
             for i in range(500) for s in range(20)]
    data = write_everywhere(tasks)
    with Stopwatch() as unknown: assert missing_images(tasks, {}) == []
    order_metadata(tmp_path/"m.csv", tasks, [])
    rows = {r["image_path"]: r for r in read_metadata(tmp_path/"m.csv").astype(str).to_dict("records")}
    gone, cut_off, wrong = (Path(t.path) for t in tasks[7:10])
    gone.unlink()
    cut_off.write_bytes(data[:-1])
    wrong.write_bytes(data[:-5] + b"wrong")
    with Stopwatch() as known: assert missing_images(tasks, rows) == [7, 8, 9]
    print(f"100,000 images: {10 * known.seconds:.1f} s with their rows, {10 * unknown.seconds:.1f} s without")
    assert known.seconds < 1 and unknown.seconds < 2

def test_shipped_prompts():
    names = "prompts", "prompts_dev", "prompts_heldout"
    train, dev, held_out = (read_prompts(ROOT/f"data/{name}.csv") for name in names)
    texts, chosen_on, other = ({p.prompt for p in prompts} for prompts in (train, dev, held_out))
    assert (len(texts), len(chosen_on), len(other)) == (720, 128, 512)
    assert not texts & other and not texts & chosen_on and not chosen_on & other, "closing figures are of other prompts"
    unseen = set(unseen_captions())
    assert not texts & unseen and len(chosen_on & unseen) == 64 and len(other & unseen) == 51
    for prompts in (train, dev, held_out):
        for part, kinds in ((1, 4), (2, 8)):
            counts = np.bincount([parse_caption(p.prompt)[part] for p in prompts])
            assert counts.min() == counts.max() and len(counts) == kinds
    for name in ("prompts_art", "prompts_art_heldout"):
        assert len({p.genre for p in read_prompts(ROOT/f"data/{name}.csv")}) >= 4

def test_a_seed_stays_what_it_was():
    "Images of earlier runs can be made again: the hash never changes."
    assert image_seed("p000", 0) == 5705806347791850835
