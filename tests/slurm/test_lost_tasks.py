"""A node that goes down in the middle of a data stage's task: another does it, to the bytes of one process."""

from __future__ import annotations

import json
import time
from pathlib import Path

from conftest import Cluster
from data_runs import write_clips

from data_prep import ingest
from megatron_video.cli import run_command
from slurm.chain_record import ChainRecord, find_chain
from slurm.chain_status import chain_states
from slurm.command import main as slurm_command
from slurm.results import read_results

# In front of every Python process of a task: the first one that opens a video waits there, holding its shard's lock.
_HELD = """
import os, time, av
plain_open = av.open
def held_open(file, *arguments, **keywords):
    try:
        os.mkdir(os.environ["HELD"])
    except FileExistsError:
        return plain_open(file, *arguments, **keywords)
    time.sleep(900)
av.open = held_open
"""


def test_the_task_of_a_lost_node_is_done_by_another(cluster: Cluster, tmp_path: Path) -> None:
    raw, out, alone, held = (
        write_clips(tmp_path / "raw", 4),
        tmp_path / "m.parquet",
        tmp_path / "a.parquet",
        tmp_path / "h",
    )
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(_HELD)
    setup = [f"export HELD={held} PYTHONPATH={tmp_path / 'path'}:$PYTHONPATH"]
    slurm = {"partition": "gpu", "gpus_per_node": 0, "cpus_per_node": 2, "memory_per_node": "2G"}
    values = {"slurm": slurm, "software": {"setup": setup}, "shared_folders": ["/tmp"]}
    (tmp_path / "profile.yaml").write_text(json.dumps(values))
    words = [
        "submit",
        "data",
        f"--profile={tmp_path / 'profile.yaml'}",
        "--shards=2",
        "ingest",
        f"--in={raw}",
        f"--out={out}",
    ]
    assert run_command(slurm_command, [*words, "--workers=1"]) == 0
    record = find_chain(str(out))
    assert record is not None
    node = node_of_the_held_task(record, held)
    assert list(tmp_path.glob(".m.parquet.lock.*-of-2"))
    cluster.node("crash", node)
    try:
        for number in record.numbers():
            cluster.wait(number, 300)
    finally:
        cluster.node("start", node)
    states = chain_states(record)
    assert [state.state for state in states] == ["done", "done"], states
    # SLURM put the task back itself: nothing was submitted again.
    assert {name: len(jobs) for name, jobs in record.jobs.items()} == {"shards": 1, "join": 1}
    logs = "\n".join(path.read_text() for path in Path(record.jobs["shards"][0].folder).glob("slurm-*.out"))
    assert f"removed; it was held on {node} by a task of this chain that is over" in logs
    ingest.run(raw, alone)
    assert out.read_bytes() == alone.read_bytes()


def node_of_the_held_task(record: ChainRecord, held: Path) -> str:
    """Where the task waits when the other one is done."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        results = read_results(record.stage_dir("shards") / "results", 2)
        waiting = [result for result in results.values() if result.state == "running"]
        if held.exists() and len(results) == 2 and len(waiting) == 1:
            return waiting[0].host
        time.sleep(0.5)
    raise TimeoutError(f"no task is held: {chain_states(record)}")
