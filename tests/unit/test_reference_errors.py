"""The folder of the reference's errors: what it gives back, what is damaged, what belongs to something else."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_video.errors import UserError
from training.reference_errors import ErrorFiles, ReferenceErrors, Table

IDENTITY = {"reference": "step_00000003 abc", "seed": 3}


def table(*draws: tuple[int, int]) -> Table:
    """Errors that tell their draw."""
    keys = np.array(draws, np.int64)
    return keys, (keys / 1000 + 0.5).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = ErrorFiles(tmp_path / "errors", IDENTITY)
    files.add(49, table((5, 0), (2, 1), (2, 0)))
    files.add(99, table((9, 3)))
    return files.folder


def read(folder: Path) -> ReferenceErrors:
    errors = ReferenceErrors(folder)
    errors.take(ErrorFiles(folder, IDENTITY).read())
    return errors


def test_errors_come_back_by_draw(folder: Path) -> None:
    found = read(folder).errors([9, 2, 5], [3, 1, 0])
    torch.testing.assert_close(found, torch.tensor([[0.509, 0.502, 0.505], [0.503, 0.501, 0.5]]))


def test_a_draw_without_an_error_is_named(folder: Path) -> None:
    errors = read(folder)
    assert errors.has(2, 1)
    assert not errors.has(2, 2)
    assert not errors.has(3, 0)
    with pytest.raises(UserError, match=r"no reference error for draw 2 of pair 2; start the same command again"):
        errors.errors([2, 2], [1, 2])
    with pytest.raises(UserError, match="draw 0 of pair 4"):
        ReferenceErrors(folder).errors([4], [0])


def test_other_draws_of_the_same_steps_are_kept_beside_them(folder: Path) -> None:
    # Another batch size: step 99 has other draws.
    ErrorFiles(folder, IDENTITY).add(99, table((9, 3), (7, 0)))
    errors = read(folder)
    assert all(errors.has(*draw) for draw in ((5, 0), (9, 3), (7, 0)))


@pytest.mark.parametrize("length", [0, 60, -10])
def test_a_truncated_file_is_named(length: int, folder: Path) -> None:
    path = folder / "steps-to-00000050.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"steps-to-00000050.safetensors: damaged: .*; delete it, and the next start"):
        read(folder)


def test_one_flipped_bit_is_seen(folder: Path) -> None:
    path = folder / "steps-to-00000100.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged: its checksum is another"):
        read(folder)


def test_errors_of_something_else_are_refused_with_every_difference(folder: Path) -> None:
    with pytest.raises(UserError, match=r"reference: step_00000003 abc there, x here; seed: 3 there, 4 here.*Restore"):
        ErrorFiles(folder, {"reference": "x", "seed": 4})
    (folder / "identity.json").write_text("{")
    with pytest.raises(UserError, match=r"identity.json: damaged"):
        ErrorFiles(folder, IDENTITY)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As `ulimit -f`: writing beyond it fails as a full disk does."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_what_was_there(folder: Path) -> None:
    before = sorted(os.listdir(folder))
    with (
        largest_file(100),
        pytest.raises(UserError, match=r"cannot be written: .*Make room and start the same command"),
    ):
        ErrorFiles(folder, IDENTITY).add(149, table(*((sample, 4) for sample in range(500))))
    assert sorted(os.listdir(folder)) == before
    assert read(folder).has(9, 3)
