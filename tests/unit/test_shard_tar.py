"""A shard's tar against the standard library's, byte for byte."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megatron_video.shard_tar import ShardTar

# Around one block, around one record of twenty blocks (the end of a tar is padded to it), and many writes.
SIZES = [[1], [0, 512, 513], [9216 - 512], [8192, 1024], list(range(0, 90_000, 3_001))]


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
    assert (checksum, ours.size) == (hashlib.sha256(written).hexdigest(), len(written))
