"""Files that appear whole: what a power loss may leave, by the order of what the operating system is asked for."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_video.buckets import parse_bucket
from megatron_video.cli import run_command
from megatron_video.files import appearing, file_sha256, write_atomically
from megatron_video.shard_schema import ShardSample, index_part
from megatron_video.shards import ShardWriter


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(what, file name) of every sync and rename, in order."""
    made: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        made.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        made.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return made


def test_content_is_on_the_disk_before_the_name_and_the_name_when_it_returns(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    write_atomically(tmp_path / "file", b"content")
    assert calls == [("sync", f".file.{os.getpid()}.tmp"), ("rename", "file"), ("sync", tmp_path.name)]


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")

    def fail() -> None:
        with appearing(tmp_path / "file") as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_shards_tar_is_on_the_disk_with_its_name_before_its_index_has_one(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    bucket = parse_bucket("1x48x48")
    sample = ShardSample("a", torch.zeros(1, 8, 3, 3), torch.zeros(2, 16), torch.zeros(5, 8), {})
    with ShardWriter(tmp_path, "shard-000000.tar") as writer:
        writer.add(sample, bucket)
    index = index_part(tmp_path, "shard-000000.tar")
    named = [name for _, name in calls]
    tar_named, index_named = named.index("shard-000000.tar"), named.index(index.name)
    assert calls[tar_named - 1] == ("sync", f".shard-000000.tar.{os.getpid()}.tmp")
    assert calls[tar_named + 1] == ("sync", tmp_path.name)
    assert tar_named + 1 < index_named


def test_file_sha256(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_ends_any_command_with_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: Sequence[str]) -> int:
        raise OSError(number, os.strerror(number), "out/file")

    assert run_command(command, []) == 2
    assert capsys.readouterr().err == (
        f"error: out/file: {os.strerror(number)}; make room and give the same command again\n"
    )


def test_other_errors_of_the_operating_system_are_not_hidden() -> None:
    def command(argv: Sequence[str]) -> int:
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        run_command(command, [])
