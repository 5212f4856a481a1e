"""The commands as a shell sees them: start-up time, help, refusals, and the Makefile's lines."""
from dataclasses import fields
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
import os, re, subprocess, sys

import pytest

from mhrlhf.cli import DESCRIPTIONS, main
from mhrlhf.core.settings import STAGES, choose_profile, load_settings

ROOT = Path(__file__).parent.parent
MHRLHF = Path(sys.executable).parent / "mhrlhf"
TARGETS = {"generate-images-dual": "generate", "generate-images-single": "generate", "annotate": "annotate",
           "train-reward": "train-reward", "train-dspo": "train-dspo", "monitor-training": "monitor",
           "evaluate": "evaluate", "next-round": "next-round", "report": "report", "runs": "runs",
           "test-pipeline": "test-pipeline"}
LEFT_OUT = ("PYTHONPATH", "PROFILE", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in LEFT_OUT} | {"COLUMNS": "200"}

def run(*command, **more):
    words = [str(c) for c in command]
    return subprocess.run(words, cwd=ROOT, env=ENVIRONMENT | more, capture_output=True, text=True, timeout=120)

@pytest.fixture
def here(monkeypatch, capsys):
    "The command in this process, without the seconds that a Python takes to start: exit code, output, errors."
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", ENVIRONMENT["COLUMNS"])
    monkeypatch.setenv("PROFILE", "pocket")
    def run_here(*arguments):
        try: code = main([str(a) for a in arguments])
        except SystemExit as e: code = e.code  # options are refused by who reads them
        return code or 0, *capsys.readouterr()
    return run_here

def seconds(*command, times=3):
    """Median processor time of a command, after one run that warms the disk; wall time would measure the machine's
    other work."""
    def once():
        before = getrusage(RUSAGE_CHILDREN)
        assert run(*command).returncode == 0
        after = getrusage(RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    once()
    return median(once() for _ in range(times))

def test_import_is_quick(): assert seconds(sys.executable, "-c", "import mhrlhf") < .3

def test_help_is_quick(): assert seconds(MHRLHF, "--help") < 1

@pytest.mark.parametrize("code", [
    "import mhrlhf", "from mhrlhf.cli import main; main(['--help'])",
    "from mhrlhf.core.settings import choose_profile; choose_profile()",
])
def test_start_up_needs_no_torch(code):
    heavy = "import sys; sys.exit([m for m in ('torch', 'numpy', 'pandas', 'matplotlib') if m in sys.modules] or None)"
    done = run(sys.executable, "-c", f"{code}; {heavy}")
    assert done.returncode == 0, done.stderr

def test_help_lists_every_stage():
    assert set(DESCRIPTIONS) == set(STAGES)
    text = run(MHRLHF, "--help").stdout
    assert all(f"  {stage} " in text for stage in STAGES)

@pytest.mark.parametrize("stage", STAGES)
def test_help_of_a_stage_shows_its_knobs_and_the_profiles_values(stage, here):
    code, shown_text, errors = here(stage, "--help", "--profile", "pocket")
    assert code == 0, errors
    text = re.sub(r"[│\s]+", " ", shown_text)
    settings = load_settings(stage, "pocket", ROOT / "settings.ini")
    for field in fields(STAGES[stage]):
        assert f"--{field.name.replace('_', '-')}" in text
        value = getattr(settings, field.name)
        if value in ("", ()) or isinstance(value, bool): continue
        shown = {f"(default: {value})", f"(default: {value!r})"}  # a text with spaces stands in quotes
        assert shown & set(re.findall(r"\(default: [^)]*\)", text)), field.name

@pytest.mark.parametrize("arguments, said", [
    (["no-such-stage"], "no stage 'no-such-stage'"),
    (["generate", "--profile", "no-such"], "no profile [no-such]"),
    (["generate", "--settings", "no-such.ini"], "no-such.ini: no such file"),
    (["generate", "--no-such-knob", "3"], "no-such-knob"),
    (["generate", "--steps", "many"], "many"),
    (["train-reward", "--folds", "1"], "folds 1: 2 or more is needed"),
    (["train-dspo", "--watched", "1"], "watched 1: 2 or more is needed"),
    (["evaluate", "--seeds", "0"], "seeds 0: 1 or more is needed"),
    (["annotate", "--sitting", "0"], "sitting 0: 1 or more is needed"),
])
def test_bad_arguments_end_with_code_2_and_one_clear_message(arguments, said, here):
    code, out, errors = here(*arguments)
    assert code == 2
    assert said in errors + out and "Traceback" not in errors

def test_a_shell_sees_the_same():
    shown = run(MHRLHF, "generate", "--help", "--profile", "pocket")
    assert shown.returncode == 0 and "--guidance-scale" in shown.stdout
    for option, said in (("--profile", "no profile [no-such]"), ("--no-such-knob", "no-such-knob")):
        done = run(MHRLHF, "generate", option, "no-such", PROFILE="pocket")
        assert done.returncode == 2
        assert said in done.stderr + done.stdout and "Traceback" not in done.stderr

def test_profile_comes_from_the_environment():
    done = run(MHRLHF, "generate", "--help", PROFILE="sdxl")
    assert "stable-diffusion-xl-base-1.0" in done.stdout
    done = run(MHRLHF, "generate", "--variant", "dual", "--help", PROFILE="sdxl")
    assert "generated_dual_gpu.csv" in done.stdout

# The Makefile

def make(*arguments, **more):
    return run("make", "--no-print-directory", "--assume-old=.venv/ready", *arguments, **more)

@pytest.mark.parametrize("target, stage", TARGETS.items())
def test_target_is_one_line(target, stage):
    lines = make("--dry-run", target, "ARGS=--limit 3").stdout.splitlines()
    assert len(lines) == 1 and re.fullmatch(rf"\.venv/bin/mhrlhf {stage} .*--limit 3", lines[0]), lines

def test_dual_starts_two_processes():
    assert "--processes 2" in make("--dry-run", "generate-images-dual").stdout

def test_make_alone_lists_the_targets():
    text = make().stdout
    others = ["setup", "test", "pocket", "readme", "notebooks", "clean", "help"]
    assert all(f"make {target} " in text for target in [*TARGETS, *others])

@pytest.mark.skipif(not (ROOT / ".venv/bin/mhrlhf").exists(), reason="this environment was not made by make setup")
def test_profile_passes_through_make():
    by_make, by_environment = "PROFILE=no-such", dict(PROFILE="no-such")
    for done in (make("generate-images-single", by_make), make("generate-images-single", **by_environment)):
        assert "no profile [no-such]" in done.stderr and done.returncode == 2

NO_GPU, SMALL_GPU = ("pocket", "no CUDA GPU here"), ("pocket", "a GPU with only 8 GB")
TWO_GPUS = "0, GPU-aa1, 8192\n1, GPU-bb2, 81559"
BROKEN = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."

@pytest.mark.parametrize("answer, visible, chosen", [
    ("0, GPU-aa1, 24564", None, ("sdxl", "a CUDA GPU with 24 GB")),
    ("0, GPU-aa1, 8192", None, SMALL_GPU),
    (TWO_GPUS, None, ("sdxl", "a CUDA GPU with 80 GB")),
    (TWO_GPUS, "0", SMALL_GPU),
    (TWO_GPUS, "GPU-bb", ("sdxl", "a CUDA GPU with 80 GB")),
    ("0, GPU-aa1, 24564", "", NO_GPU),
    ("0, GPU-aa1, 24564", "-1", NO_GPU),
    (BROKEN, None, NO_GPU),
    ("0, GPU-aa1, [N/A]", None, NO_GPU),
])
def test_the_machine_chooses_the_profile(answer, visible, chosen, tmp_path, monkeypatch):
    "By what nvidia-smi says; here a script says it in its place."
    smi = tmp_path/"nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("PROFILE", raising=False)
    if visible is None: monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert choose_profile() == chosen
