"""Two hosts on one machine, as two network namespaces that share nothing but a disk: the script for a cluster."""
from pathlib import Path
import os, shutil, subprocess

import pytest

from benchmark import the_benchmark

ROOT = Path(__file__).parent.parent
IMAGES = 16

def has_namespaces():
    "Whether network namespaces can be made here: by root on Linux, with iproute2."
    if os.geteuid() or not shutil.which("ip"): return False
    name = f"mhrlhf-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made: subprocess.run(["ip", "netns", "delete", name])
    return made

def test_the_script_for_a_cluster_is_sound():
    subprocess.run(["bash", "-n", ROOT / "slurm/stage.sbatch"], check=True)

@pytest.mark.skipif(not has_namespaces(), reason="network namespaces cannot be made here")
def test_two_hosts_make_the_images_of_one_process(tmp_path, monkeypatch):
    nodes = the_benchmark("nodes")
    nodes.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    with nodes.two_hosts() as hosts, open("log.txt", "w") as log:
        found = nodes.try_generate(hosts, log, IMAGES)
    assert found["exit_codes"] == [0, 0], Path("log.txt").read_text()
    assert found["as_by_one_process"] and sum(found["images_by_host"].values()) == IMAGES
