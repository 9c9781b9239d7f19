"""Velocity errors of the reference on the draws of a run, in RUN/reference_errors: computed once, read by every life.

An error belongs to a draw of a pair, (sample, epoch), which by the run's seed and stage also is its timestep and noise;
nothing here depends on the layout, the batch size or the number of replicas. Rank 0 alone reads and writes the folder:
a network file system may show what one node wrote to the others seconds later.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from megatron_video.errors import FULL_DISK, UserError
from megatron_video.files import write_atomically

FOLDER = "reference_errors"
_IDENTITY_FILE = "identity.json"

# Keys [n, 2] (sample, epoch) and errors [n, 2] (winner, loser).
Table = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


class ReferenceErrors:
    """The errors of all draws of a run in memory, 24 bytes each.

    Args:
        folder: where they are kept, for messages.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.take(_no_errors())

    def take(self, table: Table) -> None:
        """Hold these errors; a draw may be there several times, with equal errors."""
        keys, errors = table
        self._keys, places = np.unique(keys, axis=0, return_index=True)
        self._errors = errors[places]

    def has(self, sample: int, epoch: int) -> bool:
        """Whether there is an error of a draw."""
        return self._row(sample, epoch) is not None

    def errors(self, samples: list[int], epochs: list[int]) -> Tensor:
        """Errors of draws, [2, b] fp32, winners first.

        Raises:
            UserError: a draw has none; names it.
        """
        rows: list[Any] = [self._row(sample, epoch) for sample, epoch in zip(samples, epochs, strict=True)]
        if None in rows:
            first = rows.index(None)
            raise UserError(
                f"{self.folder}: no reference error for draw {epochs[first]} of pair {samples[first]}; start the same "
                "command again, which computes those that are missing"
            )
        return torch.from_numpy(self._errors[rows].T.copy())

    def _row(self, sample: int, epoch: int) -> int | None:
        first, end = np.searchsorted(self._keys[:, 0], [sample, sample + 1])
        row = int(first + np.searchsorted(self._keys[first:end, 1], epoch))
        return row if row < end and self._keys[row, 1] == epoch else None


class ErrorFiles:
    """The folder of the errors, one file a block of steps; for rank 0.

    Args:
        folder: of the run's reference errors; made when the first are written.
        identity: all that the errors depend on: reference, data, noise.

    Raises:
        UserError: the folder holds errors of another reference, seed or data set; names every difference.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, identity
        _check_identity(folder, identity)

    def read(self) -> Table:
        """All errors on disk.

        Raises:
            UserError: a file is damaged.
        """
        tables = [_read(path) for path in sorted(self.folder.glob("steps-*.safetensors"))]
        keys, errors = zip(*(tables or [_no_errors()]), strict=True)
        return np.concatenate(keys), np.concatenate(errors)

    def add(self, last: int, table: Table) -> None:
        """Store the errors of a block of data steps that ends with `last`. The file appears whole.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._write(f"steps-to-{last + 1:08d}", table)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise UserError(
                f"{self.folder}: the reference's errors cannot be written: {FULL_DISK[error.errno]}. Make room and "
                "start the same command again, which goes on behind those that are there"
            ) from None

    def _write(self, name: str, table: Table) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _IDENTITY_FILE
        if not path.exists():
            write_atomically(path, (json.dumps(self._identity, indent=1, sort_keys=True) + "\n").encode())
        keys, errors = (np.ascontiguousarray(values) for values in table)
        content = {"keys": keys, "errors": errors, "checksum": _checksum(keys, errors)}
        write_atomically(self._free(name), save(content))

    def _free(self, name: str) -> Path:
        """Another batch size has other draws in the same steps, and both are kept."""
        path, number = self.folder / f"{name}.safetensors", 1
        while path.exists():
            path, number = self.folder / f"{name}.{number}.safetensors", number + 1
        return path


def _no_errors() -> Table:
    return np.empty((0, 2), np.int64), np.empty((0, 2), np.float32)


def _checksum(keys: npt.NDArray[Any], errors: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    digest = hashlib.blake2b(keys.tobytes() + errors.tobytes(), digest_size=16).digest()
    return np.frombuffer(digest, np.uint8)


def _read(path: Path) -> Table:
    try:
        table = load(path.read_bytes())
        keys, errors = table["keys"], table["errors"]
        if not np.array_equal(table["checksum"], _checksum(keys, errors)):
            raise ValueError("its checksum is another")
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: damaged: {error}; delete it, and the next start computes these errors again"
        ) from None
    return keys, errors


def _check_identity(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / _IDENTITY_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; delete {folder}, and the errors are computed again") from None
    ours = json.loads(json.dumps(identity))
    names = sorted(name for name in {*stored, *ours} if stored.get(name) != ours.get(name))
    if names:
        lines = "; ".join(f"{name}: {stored.get(name)} there, {ours.get(name)} here" for name in names)
        raise UserError(
            f"the reference errors in {folder} were computed for something else: {lines}. Restore these values, or "
            "start another run.output_dir"
        )
