"""Encoding with several processes: the same bytes, kills of one worker or of all, a deadly clip, a full disk, locks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from shape_videos import draw_video
from tiny_models import write_tiny_text_encoders, write_tiny_vae

from data_prep import encode, ingest, shard_folder, verify
from data_prep.encode import EncodeSettings
from data_prep.encode_workers import MAX_DEATHS
from data_prep.stage import StageReport
from data_prep.workers import Shard
from megatron_video.buckets import parse_buckets
from megatron_video.errors import UserError
from megatron_video.manifest import read_manifest
from megatron_video.shards import ShardDataset
from megatron_video.video_io import write_mp4

SETTINGS = EncodeSettings(parse_buckets("17x32x32"), samples_per_shard=3, batch_size=2)
CLIPS = 12

# Put in front of every Python process: a file whose name says so kills the worker that opens it.
_KILLED_BY_A_FILE = """
import os, signal, av
plain_open = av.open
def deadly_open(file, *arguments, **keywords):
    if "deadly" in os.path.basename(str(file)) and os.environ.get("DEADLY"):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain_open(file, *arguments, **keywords)
av.open = deadly_open
"""

_WITH_A_LIMIT = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Prepared:
    """A manifest, encoders, and the shards that one process makes of them."""

    folder: Path
    text: Path
    vae: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "ingested.parquet"

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    def command(self, out: Path, workers: int) -> list[str]:
        arguments = {"--in": self.manifest, "--vae": self.vae, "--text": self.text, "--out": out}
        flat = [str(part) for pair in arguments.items() for part in pair]
        sizes = ["--buckets", "17x32x32", "--samples-per-shard", "3", "--batch-size", "2", "--decode-threads", "1"]
        return [sys.executable, "-m", "data_prep.cli", "encode", *flat, *sizes, "--workers", str(workers), "--json"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("workers")
    raw = folder / "raw"
    raw.mkdir()
    for number in range(CLIPS):
        name = "deadly" if number == CLIPS - 2 else f"clip_{number:02d}"
        write_mp4(raw / f"{name}.mp4", draw_video(np.random.default_rng(number), "red", "left"), fps=25)
        (raw / f"{name}.txt").write_text(f"a red shape, number {number}, moves to the left")
    ingest.run(raw, folder / "ingested.parquet")
    data = Prepared(folder, write_tiny_text_encoders(folder), write_tiny_vae(folder))
    encode.run(data.manifest, data.shards, data.vae, data.text, SETTINGS)
    return data


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is the same in every run of the same inputs."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in {"report.json", ".lock"})
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextlib.contextmanager
def started(command: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process with one thread; killed with all its children in the end."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def wait_for_half_a_shard(out: Path) -> tuple[int, str]:
    """(process id, shard name) of a worker that is writing a shard now."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for path in out.glob(".shard-*.tmp"):
            match = re.fullmatch(r"\.(shard-\d+\.tar)\.(\d+)\.tmp", path.name)
            if match:
                return int(match[2]), match[1]
        time.sleep(0.001)
    raise TimeoutError(f"no shard was begun in {out}")


def kill_half_way(out: Path) -> tuple[int, str]:
    """`wait_for_half_a_shard`, and the end of that worker while the shard is certainly half."""
    while True:
        pid, shard = wait_for_half_a_shard(out)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)
        half = (out / f".{shard}.{pid}.tmp").exists()
        os.kill(pid, signal.SIGKILL if half else signal.SIGCONT)
        if half:
            return pid, shard


def test_two_workers_make_the_bytes_of_one(prepared: Prepared, tmp_path: Path) -> None:
    report = encode.run(prepared.manifest, tmp_path, prepared.vae, prepared.text, SETTINGS, workers=2)
    assert (report.details["workers"], report.details["worker deaths"]) == (2, 0)
    assert contents(tmp_path) == contents(prepared.shards)
    assert json.loads((tmp_path / "report.json").read_text())["kept"] == CLIPS


def test_a_killed_workers_shard_is_redone_and_no_other(prepared: Prepared, tmp_path: Path) -> None:
    with started(prepared.command(tmp_path, workers=2)) as process:
        pid, shard = kill_half_way(tmp_path)
        assert pid != process.pid
        output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    details = json.loads(output)["details"]
    assert (details["worker deaths"], details["shards redone"]) == (1, [shard])
    assert f"a worker died on {shard} (exit code -9)" in errors
    assert contents(tmp_path) == contents(prepared.shards)


@pytest.mark.heavy
def test_when_all_are_killed_the_next_run_goes_on(prepared: Prepared, tmp_path: Path) -> None:
    with started(prepared.command(tmp_path, workers=2)) as process:
        while not list(tmp_path.glob("parts/*.rows.parquet")):
            wait_for_half_a_shard(tmp_path)
            time.sleep(0.001)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    # The workers are left without a parent; they end by themselves.
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*.rows.parquet")}
    assert 0 < len(finished) < CLIPS // 3
    encode.run(prepared.manifest, tmp_path, prepared.vae, prepared.text, SETTINGS, workers=1)
    assert contents(tmp_path) == contents(prepared.shards)
    assert {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in finished} == finished


@pytest.mark.heavy
def test_a_clip_that_kills_every_worker_is_dropped(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(_KILLED_BY_A_FILE)
    out = tmp_path / "out"
    path = os.pathsep.join([str(tmp_path / "path"), *sys.path])
    with started(prepared.command(out, workers=2), PYTHONPATH=path, DEADLY="1") as process:
        output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    details = json.loads(output)["details"]
    # Twice without suspicion, twice with it: then the clip is known.
    assert details["worker deaths"] == 2 * MAX_DEATHS
    assert set(details["shards redone"]) == {"shard-000003.tar"}
    dropped = [row for row in read_manifest(out / "manifest.parquet").to_pylist() if row["dropped_by"]]
    assert [Path(row["source"]).name for row in dropped] == ["deadly.mp4"]
    assert "dies every time" in dropped[0]["drop_reason"]
    assert verify.run(out).faults == []
    assert len(ShardDataset(out)) == CLIPS - 1
    for name in ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar"):
        assert (out / name).read_bytes() == (prepared.shards / name).read_bytes()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_a_full_disk_is_one_clear_line_and_the_run_goes_on_later(
    prepared: Prepared, tmp_path: Path, workers: int
) -> None:
    # A shard is larger than any file may be: what a disk does that fills up while a shard is written.
    size = min(path.stat().st_size for path in prepared.shards.glob("*.tar"))
    others = max(path.stat().st_size for path in prepared.shards.glob("parts/*"))
    assert others < size - 4096
    limited = [sys.executable, "-c", _WITH_A_LIMIT, str(size - 4096), *prepared.command(tmp_path, workers)]
    with started(limited) as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 2, errors
    message = errors.strip().splitlines()[-1]
    assert "the limit on the size of a file is reached" in message
    assert "give the same command again" in message
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tar" or path.name.endswith(".tmp")]
    encode.run(prepared.manifest, tmp_path, prepared.vae, prepared.text, SETTINGS)
    assert contents(tmp_path) == contents(prepared.shards)


def test_a_small_file_system_fills_up_and_is_enlarged(prepared: Prepared, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    total = sum(path.stat().st_size for path in prepared.shards.rglob("*") if path.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={total // 2048}k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        with pytest.raises(UserError, match="no space left on the disk"):
            encode.run(prepared.manifest, disk, prepared.vae, prepared.text, SETTINGS)
        assert not list(disk.rglob(".*.tmp"))
        done = {path.name for path in disk.glob("*.tar")}
        for name in done:
            assert (disk / name).read_bytes() == (prepared.shards / name).read_bytes()
        assert 0 < len(done) < CLIPS // 3
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        encode.run(prepared.manifest, disk, prepared.vae, prepared.text, SETTINGS)
        assert contents(disk) == contents(prepared.shards)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_the_second_run_names_the_first(prepared: Prepared, tmp_path: Path) -> None:
    with started(prepared.command(tmp_path, workers=1)) as first:
        wait_for_half_a_shard(tmp_path)
        # It must not end while the second starts.
        first.send_signal(signal.SIGSTOP)
        with pytest.raises(UserError, match=rf"process {first.pid} on {re.escape(socket.gethostname())}, since "):
            encode.run(prepared.manifest, tmp_path, prepared.vae, prepared.text, SETTINGS)


def test_tasks_of_an_array_share_the_shards(prepared: Prepared, tmp_path: Path) -> None:
    def task(share: str) -> StageReport:
        settings = (prepared.manifest, tmp_path, prepared.vae, prepared.text, SETTINGS)
        return encode.run(*settings, share=Shard.parse(share))

    first = task("1/2")
    assert (first.kept, first.details.get("samples")) == (CLIPS // 2, None)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["shard-000001.tar", "shard-000003.tar"]
    # Another task that is at work: its lock and its half a shard are left alone, and nobody finishes.
    half = tmp_path / ".shard-000000.tar.1.tmp"
    half.write_bytes(b"half")
    made_with = json.loads((tmp_path / "parts" / "plan").read_text())["made_with"]
    with shard_folder.claimed(tmp_path, "encode", made_with, Shard.parse("0/2")):
        assert task("1/2").kept == CLIPS // 2
        with pytest.raises(UserError, match="another run is writing there"):
            task("0/2")
    assert half.exists()
    last = task("0/2")
    assert (last.kept, last.details["samples"]) == (CLIPS, CLIPS)
    assert contents(tmp_path) == contents(prepared.shards)
    assert task("1/2").up_to_date
