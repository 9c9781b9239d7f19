"""Two runs on one output: the second is refused and told by whom; what a dead run held is free."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_prep.parts import output_lock
from data_prep.workers import Shard
from megatron_video.run_lock import LockedError, holder_of, run_lock

HOLD = """
import sys
from pathlib import Path
from megatron_video.run_lock import run_lock
with run_lock(Path(sys.argv[1]), "out"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_second_run_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with holder(lock) as process:
        found = holder_of(lock)
        assert found is not None
        assert (found.pid, found.host) == (process.pid, socket.gethostname())
        refusal = (
            f"--out shards: another run .*process {process.pid} on {socket.gethostname()}, since 2.*kill {process.pid}"
        )
        with pytest.raises(LockedError, match=refusal), run_lock(lock, "shards"):
            pass
        process.kill()
        process.wait()
        # The file still names the dead process.
        assert json.loads(lock.read_text())["pid"] == process.pid
        assert holder_of(lock) is None
        with run_lock(lock, "shards"):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()


def test_a_holder_on_another_host_is_believed(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"pid": 1, "host": "node-of-yesterday", "since": "2026-01-01T00:00:00+00:00"}))
    with pytest.raises(LockedError, match=rf"node-of-yesterday.*remove {lock}"), run_lock(lock, "out"):
        pass
    assert lock.exists()
    lock.unlink()
    with run_lock(lock, "out"):
        pass


@pytest.mark.parametrize("content", ["", '{"pid": 1, "ho', "[]", '{"pid": 1}'])
def test_a_half_written_lock_is_free(tmp_path: Path, content: str) -> None:
    lock = tmp_path / ".lock"
    lock.write_text(content)
    with run_lock(lock, "out"):
        found = holder_of(lock)
        assert found is not None
        assert found.pid == os.getpid()


def test_shards_share_an_output_that_a_whole_run_does_not(tmp_path: Path) -> None:
    out = tmp_path / "m.parquet"
    with output_lock(out, Shard(0, 2)):
        with output_lock(out, Shard(1, 2)):
            pass
        for other in (None, Shard(0, 2)):
            with pytest.raises(LockedError), output_lock(out, other):
                pass
    with output_lock(out), pytest.raises(LockedError), output_lock(out, Shard(0, 2)):
        pass
    assert not list(tmp_path.iterdir())
