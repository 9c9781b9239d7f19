"""Velocity errors of the reference on the draws of a run, in RUN/reference_errors: computed once, read by every life.

An error belongs to a draw of a pair, (sample, epoch), which by the run's seed and stage also is its timestep and noise;
nothing here depends on the layout, the batch size or the number of replicas.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from megatron_video.errors import UserError
from megatron_video.files import appearing, write_atomically

FOLDER = "reference_errors"
_IDENTITY_FILE = "identity.json"


class ReferenceErrors:
    """The errors in a folder, one file a block of steps.

    Args:
        folder: of the run's reference errors; made if it is not there.
        identity: all that the errors depend on: reference, data, noise.

    Raises:
        UserError: the folder holds errors of another reference, seed or data set; names every difference.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, identity
        _check_identity(folder, identity)
        self._keys: npt.NDArray[np.int64] = np.empty((0, 2), np.int64)
        self._errors: npt.NDArray[np.float32] = np.empty((0, 2), np.float32)
        self.reload()

    @property
    def steps_done(self) -> int:
        """Steps, from the first, whose draws all have errors."""
        done = 0
        for first, end in self._blocks():
            # A hole would be a file that somebody deleted: what follows it is computed again.
            if first > done:
                break
            done = max(done, end)
        return done

    def add(self, first: int, end: int, keys: npt.NDArray[np.int64], errors: npt.NDArray[np.float32]) -> None:
        """Store the errors of the steps [first, end); on one rank. The file appears whole.

        Args:
            first: step.
            end: step.
            keys: [n, 2] sample, epoch.
            errors: [n, 2] of winner and loser.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _IDENTITY_FILE
        if not path.exists():
            write_atomically(path, (json.dumps(self._identity, indent=1, sort_keys=True) + "\n").encode())
        with appearing(self.folder / f"steps-{first:08d}-{end:08d}.safetensors") as temporary:
            save_file({"keys": np.ascontiguousarray(keys), "errors": np.ascontiguousarray(errors)}, temporary)

    def reload(self) -> None:
        """Read what is on disk."""
        tables = [load_file(self._block(first, end)) for first, end in self._blocks()]
        if not tables:
            return
        keys = np.concatenate([table["keys"] for table in tables])
        # Blocks may overlap where a run was prolonged; equal draws have equal errors.
        self._keys, places = np.unique(keys, axis=0, return_index=True)
        self._errors = np.concatenate([table["errors"] for table in tables])[places]

    def errors(self, samples: list[int], epochs: list[int]) -> Tensor:
        """Errors of draws, [2, b] fp32, winners first.

        Raises:
            UserError: a draw has none; names it.
        """
        rows = [self._row(sample, epoch) for sample, epoch in zip(samples, epochs, strict=True)]
        return torch.from_numpy(self._errors[rows].T.copy())

    def _row(self, sample: int, epoch: int) -> int:
        first, end = np.searchsorted(self._keys[:, 0], [sample, sample + 1])
        row = int(first + np.searchsorted(self._keys[first:end, 1], epoch))
        if row == end or self._keys[row, 1] != epoch:
            raise UserError(
                f"{self.folder}: no reference error for draw {epoch} of pair {sample}; delete the folder, "
                "and the next start computes all of them again"
            )
        return row

    def _blocks(self) -> list[tuple[int, int]]:
        names = (path.stem.split("-")[1:] for path in self.folder.glob("steps-*.safetensors"))
        return sorted((int(first), int(end)) for first, end in names)

    def _block(self, first: int, end: int) -> Path:
        return self.folder / f"steps-{first:08d}-{end:08d}.safetensors"


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
