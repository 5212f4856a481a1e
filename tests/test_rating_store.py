"""The rating store under people's worst habits: five processes write at once, and one is killed."""
import os, random, signal, subprocess, sys, time

from mhrlhf.ratings import RatingStore

WRITER = """
import sys
from mhrlhf.ratings import RatingStore
url, rater, answers = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = RatingStore(url)
for i in range(answers):
    store.add([dict(rater=rater, prompt_id="p", image_path=f"p/{i}.png", aspect="style", value=i % 11)], source="panel")
    print(i, flush=True)   # acknowledged
"""

def acknowledged(log): return [int(line) for line in log.read_text().splitlines() if line.strip()]

def test_every_acknowledged_answer_is_there(tmp_path):
    url, answers = f"sqlite:///{tmp_path}/ratings.db", 100
    logs = [tmp_path / f"rater{i}.log" for i in range(5)]
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, url, f"rater{i}", str(answers)], stdout=log.open("w")) for i, log in enumerate(logs)]
    victim = random.Random(0).randrange(5)
    end = time.monotonic() + 240
    while len(acknowledged(logs[victim])) < 20 and time.monotonic() < end: time.sleep(.01)
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

def test_two_processes_make_the_same_new_database(tmp_path):
    url = f"sqlite:///{tmp_path}/new/ratings.db"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, url, f"rater{i}", "3"], stdout=subprocess.DEVNULL) for i in range(4)]
    assert [w.wait(300) for w in writers] == [0] * 4
    assert len(RatingStore(url).ratings()) == 12
