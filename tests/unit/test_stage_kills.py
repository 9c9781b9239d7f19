"""Every row stage killed in the middle, and out of disk: the same command then makes the same manifest."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import killed_items
import pytest
from killed_items import die, die_once, kill_batch_reader, kill_reader
from tiny_pipeline import STAGES, Pipeline, data, make_pipeline

from data_prep.model_tagging import redo_one_by_one
from data_prep.stage import execution_of, run_rows, stage_parser
from data_prep.workers import parallel_map
from megatron_video.errors import UserError
from megatron_video.manifest import read_manifest, table_from_rows, write_manifest

HAS_FAISS = find_spec("faiss") is not None
NEEDS_FAISS = pytest.mark.skipif(not HAS_FAISS, reason="balance needs faiss, of the extra `data`")

# SIGKILL at the given rename: everything that is written for good is renamed, so these are the worst moments.
KILLED = """
import os, signal, sys
from data_prep import cli, stage
stage.PART_ROWS = 2
rename, left = os.replace, [int(sys.argv[1])]
def replace(*names):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*names)
os.replace = replace
sys.exit(cli.main(sys.argv[2:]))
"""
# Files may have 2 kB: a manifest does not fit, a lock does.
FULL = """
import resource, sys
from data_prep import cli
from megatron_video.cli import run_command
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
sys.exit(run_command(cli.main, sys.argv[1:]))
"""
# Imported by every Python process: the first one that opens clip3 dies.
DEADLY_ONCE = """
import os, signal, av
plain_open = av.open
def deadly_open(file, *arguments, **keywords):
    mark = os.environ["DEADLY_MARK"]
    if "clip3" in str(file) and not os.path.exists(mark):
        open(mark, "x").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain_open(file, *arguments, **keywords)
av.open = deadly_open
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return make_pipeline(tmp_path_factory.mktemp("pipeline"), STAGES if HAS_FAISS else STAGES[:-1])


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize(
    ("stage", "rename"),
    [
        ("ingest", 2),
        ("ingest", 5),
        ("segment", 2),
        ("tag", 2),
        ("filter", 1),
        ("caption", 1),
        pytest.param("balance", 1, marks=NEEDS_FAISS),
    ],
)
def test_a_killed_stage_goes_on_to_the_same_manifest(
    pipeline: Pipeline, tmp_path: Path, stage: str, rename: int
) -> None:
    out = tmp_path / pipeline.manifest(stage).name
    arguments = pipeline.arguments(stage, out)
    killed = python(KILLED, rename, *arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    assert data(*arguments) == 0
    assert out.read_bytes() == pipeline.manifest(stage).read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("stage", ["ingest", "segment", "tag"])
def test_a_stage_whose_worker_is_killed_makes_the_same_manifest(pipeline: Pipeline, tmp_path: Path, stage: str) -> None:
    out, mark = tmp_path / pipeline.manifest(stage).name, tmp_path / "killed"
    (tmp_path / "sitecustomize.py").write_text(DEADLY_ONCE)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}", "DEADLY_MARK": str(mark)}
    command = [sys.executable, "-m", "data_prep.cli", *pipeline.arguments(stage, out), "--workers", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert mark.exists()
    assert out.read_bytes() == pipeline.manifest(stage).read_bytes()


@pytest.mark.parametrize("stage", ["ingest", "tag", "filter"])
def test_a_full_disk_is_a_clear_error_and_can_be_gone_on_from(pipeline: Pipeline, tmp_path: Path, stage: str) -> None:
    out = tmp_path / pipeline.manifest(stage).name
    arguments = pipeline.arguments(stage, out)
    full = python(FULL, *arguments)
    assert full.returncode == 2, full.stderr
    assert "Traceback" not in full.stderr
    assert str(tmp_path) in full.stderr
    assert "same command again" in full.stderr
    assert not out.exists()
    assert data(*arguments) == 0
    assert out.read_bytes() == pipeline.manifest(stage).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_worker_had_under_way_is_done_again(tmp_path: Path) -> None:
    function = functools.partial(die_once, tmp_path / "killed")
    assert list(parallel_map(function, range(12), workers=2)) == list(range(12))
    assert (tmp_path / "killed").exists()


# Its parent tells who works, and waits; the workers sleep.
SLEEPING = """
import signal, sys, time
from data_prep.workers import Execution, parallel_map
from killed_items import sleep_and_tell
if __name__ == "__main__":
    # A test run in the background of a shell passes on that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    list(parallel_map(sleep_and_tell, [sys.argv[1]] * 4, Execution(2)))
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_a_stage_that_is_killed_or_interrupted(tmp_path: Path, sent: signal.Signals) -> None:
    command = [sys.executable, "-c", SLEEPING, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(killed_items.__file__).parent), *sys.path])}
    stage = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    stage.send_signal(sent)
    assert stage.wait(120) != 0
    wait_until(lambda: not any(Path(f"/proc/{path.name}").exists() for path in tmp_path.iterdir()))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.heavy
def test_an_item_that_kills_every_worker_is_lost_alone() -> None:
    assert list(parallel_map(die, range(12), workers=2, lost=lambda number: -number)) == [0, 1, 2, -3, *range(4, 12)]
    with pytest.raises(UserError, match="3 killed 3 worker processes"):
        list(parallel_map(die, range(6), workers=2))


def test_one_worker_of_the_command_line_is_a_process_too() -> None:
    arguments = stage_parser("tag", None, spread=True).parse_args(["--in", "a", "--out", "b", "--workers", "1"])
    assert list(parallel_map(die, range(2, 5), execution_of(arguments), lost=lambda number: -number)) == [2, -3, 4]
    assert list(parallel_map(die, [3], execution_of(arguments), lost=lambda number: -number)) == [-3]


def test_of_a_batch_that_crashes_one_clip_is_dropped() -> None:
    rows = [{"source": f"/videos/{name}.mp4"} for name in ("a", "crash", "b")]
    found = redo_one_by_one(kill_batch_reader, rows)
    assert [row["source"] for row in found] == [row["source"] for row in rows]
    assert [row.get("dropped_by") for row in found] == [None, "tag", None]


@pytest.mark.heavy
def test_a_clip_that_crashes_its_reader_is_a_dropped_row(tmp_path: Path) -> None:
    rows = [{"source": f"/videos/{name}.mp4", "clip_id": name} for name in ("a", "b", "crash", "c", "d", "e")]
    write_manifest(table_from_rows(rows), tmp_path / "in.parquet")
    report = run_rows("tag", tmp_path / "in.parquet", tmp_path / "out.parquet", kill_reader, {}, workers=2)
    assert (report.kept, report.reasons) == (5, {"crash": 1})
    (lost,) = [row for row in read_manifest(tmp_path / "out.parquet").to_pylist() if row["dropped_by"]]
    assert lost["clip_id"] == "crash"
