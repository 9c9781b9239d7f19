"""A shard's tar against the standard library's, byte for byte."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_video.shard_tar import ShardTar, is_intact

# Around one block, around one record of twenty blocks (the end of a tar is padded to it), and many writes.
SIZES = [[1], [0, 512, 513], [9216 - 512], [8192, 1024], list(range(0, 90_000, 3_001))]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("sizes", SIZES)
def test_bytes_positions_and_checksum_are_those_of_tarfile(tmp_path: Path, sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    # A name beyond 100 bytes goes into two fields of the header.
    members = [("é" * 20 + "/") * (3 * (n % 2)) + f"k{n}.json" for n in range(len(sizes))]
    contents = [rng.bytes(size) for size in sizes]
    ours = ShardTar(tmp_path / "ours.tar")
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as theirs:
        for name, content in zip(members, contents, strict=True):
            offset = ours.append(name, content)
            header = tarfile.TarInfo(name)
            header.size, header.mode = len(content), 0o644
            theirs.addfile(header, io.BytesIO(content))
            assert theirs.offset - (-(-len(content) // 512) * 512) == offset
    checksum = ours.finish()
    ours.close()
    written = (tmp_path / "ours.tar").read_bytes()
    assert written == (tmp_path / "theirs.tar").read_bytes()
    assert (checksum, ours.size) == (xxhash.xxh3_128_hexdigest(written), len(written))


@pytest.mark.parametrize(("name", "of"), [("xxh3_128", xxhash.xxh3_128_hexdigest), ("sha256", _sha256)])
def test_a_changed_byte_is_noticed_by_the_checksum_of_today_and_of_older_shards(
    tmp_path: Path, name: str, of: Callable[[bytes], str]
) -> None:
    content = bytearray(np.random.default_rng(0).bytes(3_000_000))
    (tmp_path / "shard.tar").write_bytes(content)
    record = {"name": "shard.tar", name: of(bytes(content))}
    assert is_intact(tmp_path / "shard.tar", record)
    content[2_999_999] ^= 1
    (tmp_path / "shard.tar").write_bytes(content)
    assert not is_intact(tmp_path / "shard.tar", record)
