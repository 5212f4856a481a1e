"""What people and machines do to a run: bad input, kill -9, Ctrl-C, a damaged disk.

Afterwards the same command completes it."""
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
import csv, errno, os, random, signal, subprocess, sys, tempfile, time

import numpy as np
import pytest
from PIL import Image

from mhrlhf.cli import main
from mhrlhf.core.devices import one_thread
from mhrlhf.core.files import InputError
from mhrlhf.core.prompts import read_prompts
from mhrlhf.core.settings import GenerateSettings
from mhrlhf.images import generate, queue
from mhrlhf.images.metadata import METADATA_COLUMNS, PART, append_rows, image_row, read_metadata
from mhrlhf.images.plan import make_plan, plan_tasks

ROOT = Path(__file__).parent.parent
COMMAND = [Path(sys.executable).parent/"mhrlhf", "generate", "--profile", "pocket", "--settings", ROOT/"settings.ini",
           "--prompts", ROOT/"data/prompts.csv"]

# Bad input ---------------------------------------------------------------------------------------------------

def refusal(tmp_path, monkeypatch, capsys, *options):
    "Run the command in this process; it must end with code 2 and a message, before anything is made."
    monkeypatch.chdir(tmp_path)
    try: code = main([*map(str, COMMAND[1:]), *options])
    except SystemExit as e: code = e.code   # options are refused by who reads them
    assert code == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out and not list(tmp_path.glob("data/images/[!.]*"))
    return said.err

@pytest.mark.parametrize("content, said", [
    ("", "p.csv:1: missing column prompt_id, prompt; the header has: nothing"),
    ("prompt_id,prompt\n", "p.csv:1: no prompts; add a line for each"),
    ("prompt_id,text\na,b\n", "p.csv:1: missing column prompt; the header has: prompt_id, text"),
    ("prompt_id,prompt\na,\n", "p.csv:2: column prompt, value '': is empty; write what the image shows"),
    ("prompt_id,prompt\na,   \n", "p.csv:2: column prompt, value '': is empty"),
    ("prompt_id,prompt\n,a fox\n", "p.csv:2: column prompt_id, value '': is empty"),
    ("prompt_id,prompt\na,a fox\na,a cat\n", "p.csv:3: column prompt_id, value 'a': stands in line 2 already"),
    ("prompt_id,prompt\na,a fox\nA,a cat\n", "p.csv:3: column prompt_id, value 'A': stands in line 2 already"),
    ("prompt_id,prompt\n../a,a fox\n", "p.csv:2: column prompt_id, value '../a': is no safe file name; use letters"),
    ("prompt_id,prompt\n..,a fox\n", "value '..': is no safe file name"),
    ("prompt_id,prompt\na/b,a fox\n", "value 'a/b': is no safe file name"),
    ("prompt_id,prompt\n/etc,a fox\n", "value '/etc': is no safe file name"),
    ("prompt_id,prompt\na\0b,a fox\n", r"value 'a\x00b': is no safe file name"),
    ("prompt_id,prompt\na,a \0 fox\n", "column prompt, value 'a \\x00 fox': holds a NUL byte"),
    ("prompt_id,prompt\n" + "a" * 300 + ",a fox\n", "has 300 characters; 100 are allowed"),
    ('prompt_id,prompt\na,"a fox\nb,a cat\nc,a dog\n', "p.csv:2: cannot be read as CSV; is a quote not closed?"),
    ('prompt_id,prompt\na,"a fox\nin the snow"\nc,a dog\n',
     "holds a line break; write it in one line, and see whether a quote was not closed"),
    ('prompt_id,prompt\na,fine\nb,"a fox\n' + "c,a dog\n" * 20_000, "p.csv:3: cannot be read as CSV"),
    ("prompt_id,prompt\na,a fox, in snow\n", "p.csv:2: 3 cells where the header has 2; quote text that holds commas"),
    (b"prompt_id,prompt\na,a caf\xe9\n", "p.csv:2: not UTF-8 text; save the file as UTF-8"),
])
def test_bad_prompts(content, said, tmp_path, monkeypatch, capsys):
    (tmp_path/"p.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refusal(tmp_path, monkeypatch, capsys, "--prompts", "p.csv")

def test_all_bad_lines_are_told_at_once(tmp_path, monkeypatch, capsys):
    (tmp_path/"p.csv").write_text("prompt_id,prompt\na,\nb/c,a fox\nd,a cat, black\ne,fine\ne,twice\n")
    said = refusal(tmp_path, monkeypatch, capsys, "--prompts", "p.csv")
    assert all(f"p.csv:{line}: " in said for line in (2, 3, 4, 6)) and "p.csv:5: " not in said

def test_prompts_as_people_save_them(tmp_path):
    "A byte-order mark, other line ends, semicolons, quotes and commas, columns in any order."
    text = '\ufeffGenre;Prompt;Prompt_ID\r\nportrait;"a ""wise"" owl, old; grey";a-1\r\n;ein Fuchs für Änne;b_2\r\n'
    (tmp_path/"p.csv").write_bytes(text.encode())
    first, second = read_prompts(tmp_path/"p.csv")
    assert (first.prompt_id, first.prompt, first.genre) == ("a-1", 'a "wise" owl, old; grey', "portrait")
    assert (second.prompt, second.genre) == ("ein Fuchs für Änne", "")

def test_missing_files_and_wrong_places(tmp_path, monkeypatch, capsys):
    assert "none.csv: no such file" in refusal(tmp_path, monkeypatch, capsys, "--prompts", "none.csv")
    assert "is a folder" in refusal(tmp_path, monkeypatch, capsys, "--prompts", ".")
    (tmp_path/"file").write_text("kept")
    said = refusal(tmp_path, monkeypatch, capsys, "--images", "file")
    assert "a file is in the place of a folder; move it away" in said
    assert "a file is in the place of a folder" in refusal(tmp_path, monkeypatch, capsys, "--images", "file/images")
    assert (tmp_path/"file").read_text() == "kept"

def test_weights_and_numbers_that_will_not_do(tmp_path, monkeypatch, capsys):
    def said(*options): return refusal(tmp_path, monkeypatch, capsys, *options)
    nowhere = "--limit", "1", "--pipeline", "nowhere"
    assert "weights of 'nowhere' are not on this machine" in said(*nowhere)
    assert "weights of 'nowhere' are not on this machine" in said(*nowhere, "--processes", "2")
    (tmp_path/"empty").mkdir()
    assert "empty: cannot be loaded, or a part of it is not there" in said("--limit", "1", "--pipeline", "empty")
    assert "weights of 'nobody/vae' are not on this machine" in said("--limit", "1", "--vae", "nobody/vae")
    assert "width 500: a multiple of 8 is needed" in said("--width", "500")
    for option in ("steps", "seeds", "batch", "processes"): assert f"{option} 0" in said(f"--{option}", "0")

def test_an_evaluation_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    from mhrlhf.proof import evaluate
    command = ["evaluate", "--profile", "pocket", *map(str, COMMAND[4:6]),
               "--prompts", str(ROOT/"data/prompts_heldout.csv"), "--output"]
    def full(*a): raise OSError(errno.ENOSPC, "No space left on device", "a.png")
    loaded = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(sample_size=8)), vae_scale_factor=8)
    for name in ("load_pipeline", "load_adapter"): monkeypatch.setattr(evaluate, name, lambda *a: loaded)
    monkeypatch.setattr(evaluate, "base_folder", lambda *a: None)
    monkeypatch.setattr(evaluate, "evaluate_pipeline", full)
    (tmp_path/"file").write_text("kept")
    assert main([*command, str(tmp_path/"file")]) == 2
    moved = "file: a file is in the place of a folder; move it away, then the same command goes on"
    assert moved in capsys.readouterr().err
    assert main([*command, str(tmp_path/"new/folder")]) == 2 and (tmp_path/"new/folder").is_dir()
    assert "a.png: the disk is full; free some space, then the same command goes on" in capsys.readouterr().err

# One worker, in this process ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pipe():
    from mhrlhf.images.models import load_pipeline
    return load_pipeline("pocket")

@pytest.fixture
def loaded(pipe, monkeypatch):
    "The stage with a pipeline that is loaded already."
    monkeypatch.setattr(queue, "load_pipeline", lambda *a: pipe)
    return pipe

def small(folder, prompts=8, **options):
    return GenerateSettings(prompts=ROOT/"data/prompts.csv", images=folder/"images", metadata=folder/"generated.csv",
                            limit=prompts, steps=1, batch=2, **options)

def pixels(folder):
    return {f"{p.parent.name}/{p.name}": np.asarray(Image.open(p)) for p in Path(folder).glob("images/*/*.png")}

def assert_whole(settings, reference=None):
    "Every image decodes, has exactly one row, and nothing else lies about."
    tasks = plan_tasks(settings)
    table = read_metadata(settings.metadata)
    assert list(table.image_path) == [t.path for t in tasks] and (table.status == "ok").all()
    with open(settings.metadata, newline="") as f: widths = [len(r) for r in csv.reader(f)]
    assert widths == [len(METADATA_COLUMNS)] * (len(tasks) + 1)
    assert sorted(p.name for p in Path(settings.images).glob("*/*")) == sorted(Path(t.path).name for t in tasks)
    made = pixels(settings.images.parent)
    assert len(made) == len(tasks)
    if reference: assert all((made[p] == reference[p]).all() for p in made)
    return made

def test_a_disk_that_fills_up(tmp_path, loaded, monkeypatch, capsys):
    settings, replace, count = small(tmp_path), os.replace, iter(range(100))
    def full(a, b):
        if str(b).endswith(".png") and next(count) >= 5: raise OSError(errno.ENOSPC, "No space left on device", str(b))
        replace(a, b)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="the disk is full; free some space, then the same command goes on"):
        generate.run(settings)
    monkeypatch.setattr(os, "replace", replace)
    there = pixels(tmp_path)
    assert len(there) == 5 == len(read_metadata(settings.metadata))
    assert generate.run(settings) == 0
    assert_whole(settings, there | {p: i for p, i in pixels(tmp_path).items() if p not in there})

def test_a_disk_that_fills_up_while_a_row_is_written(tmp_path, loaded, monkeypatch):
    "What is left of the metadata may be nothing or half a header."
    settings = small(tmp_path, 2)
    def full(*a): raise OSError(errno.ENOSPC, "No space left on device", str(settings.metadata))
    monkeypatch.setattr(queue, "append_rows", full)
    with pytest.raises(InputError, match="the disk is full"): generate.run(settings)
    monkeypatch.undo()
    monkeypatch.setattr(queue, "load_pipeline", lambda *a: loaded)
    for left in b"", b"prompt_id,se":
        settings.metadata.write_bytes(left)
        Path(plan_tasks(settings)[0].path).unlink(missing_ok=True)
        assert generate.run(settings) == 0
        assert_whole(settings)
    torn = tmp_path/"torn.csv"
    torn.write_bytes(b"prompt_id,se")
    row = dict(prompt_id="p", image_path="a.png", prompt="a fox")
    append_rows(torn, [dict.fromkeys(METADATA_COLUMNS, "") | row])
    assert list(read_metadata(torn).image_path) == ["a.png"]

def test_a_folder_that_is_read_only(tmp_path, loaded, monkeypatch):
    "Even root cannot write to a file system that is mounted read-only; its answer is played here."
    settings = small(tmp_path, 2)
    def refuse(*a, dir=None, **k): raise OSError(errno.EROFS, "Read-only file system", str(dir))
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match="images: is on a read-only disk; choose another folder"):
        generate.run(settings)
    assert not pixels(tmp_path) and not settings.metadata.exists()

def test_metadata_that_somebody_edited(tmp_path, loaded):
    "Other columns, another order, no newline at the end: put in order before rows are appended."
    settings = small(tmp_path, 2)
    assert generate.run(settings) == 0
    table = read_metadata(settings.metadata)
    table[["image_path", "prompt_id", "prompt"]].assign(mine="x").to_csv(settings.metadata, index=False)
    settings.metadata.write_bytes(settings.metadata.read_bytes().rstrip(b"\n"))
    assert len(read_metadata(settings.metadata)) == 4   # the last line counts without its newline
    Path(table.image_path[1]).unlink()
    assert generate.run(settings) == 0
    assert_whole(settings)

def test_ctrl_c_in_one_worker(tmp_path, loaded, monkeypatch):
    settings, sample, count = small(tmp_path), queue.sample_tasks, iter(range(100))
    def interrupted(*a):
        if next(count) == 3: raise KeyboardInterrupt
        return sample(*a)
    monkeypatch.setattr(queue, "sample_tasks", interrupted)
    with pytest.raises(KeyboardInterrupt): generate.run(settings)
    assert len(pixels(tmp_path)) == 6 == len(read_metadata(settings.metadata))
    assert generate.run(settings) == 0
    assert_whole(settings)

def test_damage_is_mended(tmp_path, loaded):
    "Images that were truncated, overwritten, emptied or removed, and metadata that was torn or deleted."
    settings = small(tmp_path)
    assert generate.run(settings) == 0
    reference = assert_whole(settings)
    a, b, c, d, *_ = (Path(t.path) for t in plan_tasks(settings))
    a.write_bytes(a.read_bytes()[:-20])
    b.write_bytes(b"not a picture")
    c.write_bytes(b"")
    d.unlink()
    (a.parent/f".{a.name}.1{PART}").write_bytes(b"half")
    settings.metadata.write_bytes(settings.metadata.read_bytes()[:-30])
    assert generate.run(settings) == 0
    assert_whole(settings, reference)
    before = read_metadata(settings.metadata)
    settings.metadata.unlink()
    assert generate.run(settings) == 0
    assert_whole(settings, reference)
    assert read_metadata(settings.metadata)["seconds"].equals(before["seconds"])  # the rows came out of the images

def test_another_run_in_the_same_folder_is_told_to_wait(tmp_path, monkeypatch):
    from filelock import FileLock
    monkeypatch.setattr("filelock.FileLock", lambda path, timeout: FileLock(path, timeout=.1))
    settings = small(tmp_path)
    settings.images.mkdir()
    with FileLock(settings.images/".lock", is_singleton=False):
        with pytest.raises(InputError, match="another run is making images here"): generate.run(settings)

def test_worker_0_hangs(tmp_path, loaded, monkeypatch):
    "It has taken a batch: the other worker makes the rest, waits, says so, and the same command goes on."
    from torch.distributed import HashStore
    monkeypatch.setattr(queue, "PATIENCE", .3)
    monkeypatch.setattr(queue, "_PATIENT_BATCHES", 0)
    settings, store = small(tmp_path, 4), HashStore()
    plan = make_plan(settings)
    generate.prepare(plan)
    queue.Queue(store, len(plan.tasks), plan.sampling.batch).claim()
    with pytest.raises(RuntimeError, match="hangs or is gone: nothing for 0 s, 2 images of 8 are missing"):
        queue.work(plan, plan.tasks, store, rank=1, world=2)
    assert len(pixels(tmp_path)) == 6
    assert generate.run(settings) == 0
    assert_whole(settings)

# kill -9 at random moments -----------------------------------------------------------------------------------

def start_workers(settings):
    "Two forked workers: a real queue, real files, a pipeline that the parent has loaded."
    from torch.distributed import TCPStore
    plan = make_plan(settings)
    missing = generate.prepare(plan, say=lambda _: None)
    server, pids = TCPStore("127.0.0.1", 0, is_master=True), []
    for rank in range(2):
        if pid := os.fork():
            pids.append(pid)
            continue
        try:
            store = TCPStore("127.0.0.1", server.port, is_master=False)
            with one_thread(): queue.work(plan, [plan.tasks[i] for i in missing], store, rank, 2)
        finally: os._exit(0)
    return server, pids, missing

def kill_somewhen(pids, rng, pace):
    "One worker or both, at a random moment; a little later what is left of them."
    time.sleep(rng.uniform(0, 5 * pace))
    for pid in pids if rng.random() < .5 else pids[:1]: os.kill(pid, signal.SIGKILL)
    time.sleep(rng.uniform(0, pace))
    for pid in pids: os.kill(pid, signal.SIGKILL)

def count_whole(settings):
    "Images that are there, all of them whole, and their rows too, at once, before any repair."
    rows = read_metadata(settings.metadata)
    files = set(settings.images.glob("*/*.png"))
    assert not rows.image_path.duplicated().any() and {*map(Path, rows.image_path)} <= files
    assert all(image_row(p) is not None for p in files)
    assert len(files) - len(rows) <= 4   # at most one batch of each worker has no row yet
    return len(files)

def test_kill_at_twenty_random_moments(tmp_path, loaded):
    "Whatever the moment, what is there is whole, and the end is the same set of images."
    reference = small(tmp_path/"reference", 120)
    generate.run(reference)
    wanted = assert_whole(reference)
    settings, rng, kills, seen = small(tmp_path/"killed", 120), random.Random(0), 0, 0
    began = time.time()
    generate.run(small(tmp_path/"timing", 4))
    pace = (time.time() - began) / 8
    for _ in range(60):
        server, pids, missing = start_workers(settings)
        if kills < 20 and missing:
            kill_somewhen(pids, rng, pace)
            kills += 1
        for pid in pids: os.waitpid(pid, 0)
        if not settings.metadata.exists(): continue
        there = count_whole(settings)
        assert there >= seen   # nothing is lost
        seen = there
        if not missing: break
    assert kills == 20, f"only {kills} kills before the work was done"
    assert generate.run(settings) == 0
    assert_whole(settings, wanted)

# kill -9 and Ctrl-C of real processes ------------------------------------------------------------------------

def processes():
    "All processes, as pid -> parent, command line, state."
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit(): continue
        try:
            state, parent = (entry/"stat").read_text().rsplit(")", 1)[1].split()[:2]
            found[int(entry.name)] = int(parent), (entry/"cmdline").read_text().replace("\0", " "), state
        except (OSError, IndexError): continue
    return found

def children(pid):
    "All processes below one, as pid -> command line."
    there, family, grown = processes(), {pid}, True
    while grown:
        more = {p for p, (parent, _, _) in there.items() if parent in family} - family
        family |= more
        grown = bool(more)
    return {p: there[p][1] for p in family - {pid} if there[p][2] != "Z"}

def workers(pid):
    return [p for p, command in children(pid).items() if "launched_worker" in command and "accelerate" not in command]

def heed_ctrl_c():
    "A shell in the background hands down an ignored Ctrl-C."
    signal.signal(signal.SIGINT, signal.SIG_DFL)

class Run:
    "The command with two workers, in a folder of its own."
    def __init__(self, folder):
        self.images = folder/"data/images"
        # some seconds of work: it must not end before it is killed
        options = ["--limit", "32", "--steps", "12", "--batch", "2", "--processes", "2"]
        self.process = subprocess.Popen([*map(str, COMMAND), *options], cwd=folder, text=True, start_new_session=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c)
    def count(self): return len(list(self.images.glob("*/*.png")))
    def wait_for(self, more):
        "Until so many more images are there."
        wanted, until = self.count() + more, time.time() + 400
        while self.count() < wanted and self.process.poll() is None:
            assert time.time() < until, "no images came"
            time.sleep(.03)
    def end(self):
        out, err = self.process.communicate(timeout=400)
        return self.process.returncode, out, err

def kill_at_random_moments(folder):
    "From the start-up on: the command alone, whose workers end by themselves, or all at once, as a power cut does."
    rng = random.Random(1)
    for alone in (True, False, True):
        run = Run(folder)
        time.sleep(rng.uniform(0, 12))
        family = children(run.process.pid)
        for pid in [run.process.pid] if alone else (run.process.pid, *family):
            with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        run.end()
        gone(family)
        assert all(image_row(p) is not None for p in run.images.glob("*/*.png"))

def interrupt(folder):
    "Ctrl-C, after some images."
    run = Run(folder)
    run.wait_for(4)
    family = children(run.process.pid)
    run.process.send_signal(signal.SIGINT)
    code, out, err = run.end()
    assert code == 130 and "stopped; nothing finished is lost" in err and "Traceback" not in err + out
    gone(family)

def kill_launcher_and_worker(folder):
    "accelerate's launcher; in the same run new workers are started, and one of them is killed. It makes all images."
    run = Run(folder)
    run.wait_for(4)
    family = children(run.process.pid)
    os.kill(next(p for p, command in family.items() if "accelerate" in command), signal.SIGKILL)
    while not (new := set(workers(run.process.pid)) - set(family)):
        assert run.process.poll() is None
        time.sleep(.1)
    run.wait_for(2)
    os.kill(min(new), signal.SIGKILL)
    code, out, err = run.end()
    assert code == 0, out + err
    assert out.count("starting workers again for the") == 2 and "64 of 64 images are in data/images" in out
    assert "Traceback" not in err + out
    gone(family)

def test_processes_are_killed_and_the_command_goes_on(tmp_path, monkeypatch):
    "One folder through it all, as every start of real processes takes half a minute of processor time."
    for disturb in (kill_at_random_moments, interrupt, kill_launcher_and_worker): disturb(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert_whole(GenerateSettings(prompts=ROOT/"data/prompts.csv", images=Path("data/images"), limit=32))

def test_workers_that_always_die_end_the_run(tmp_path, monkeypatch, capsys):
    "A clear message and a code that is not zero, instead of starting again for ever."
    start = subprocess.Popen
    def die(command, **options): return start(["sh", "-c", "echo bad luck >&2; exit 9"], **options)
    monkeypatch.setattr(subprocess, "Popen", die)
    assert generate.run(small(tmp_path, 2, processes=2)) == 1
    said = capsys.readouterr().out
    assert "4 images are missing: a worker or its launcher died" in said
    assert "The same command makes them" in said and "0 of 4 images" in said

def gone(family):
    "No orphan goes on working."
    until = time.time() + 15
    while left := [p for p in family if p in (there := processes()) and there[p][2] != "Z"]:
        assert time.time() < until, f"still running: {left}"
        time.sleep(.1)
