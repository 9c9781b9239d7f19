"""Weights in DeepSpeed's universal checkpoints: a folder of every parameter, with its fp32 weight and its moments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.deepspeed_files import (
    DEEPSPEED_HARMLESS,
    LATEST,
    Pieces,
    Run,
    Values,
    model_files,
    refuse_mixed_steps,
    tag_folder,
    untrained,
)
from checkpoints_tools.torch_pickles import StoredTensor, read_structure
from megatron_video.errors import UserError

LATEST_UNIVERSAL = "latest_universal"
_PARAMETERS, _WEIGHT, _STEP = "zero", "fp32.pt", "step.pt"


class UniversalCheckpoint:
    """The tensors of a checkpoint that ds_to_universal.py wrote, by the module's names."""

    def __init__(self, path: Path, values: Values = "fp32", trust_pickle: bool = False) -> None:
        """Open a checkpoint, or the folder in which `latest_universal` names the newest.

        Raises:
            UserError: a parameter's file is missing, damaged, of another shape or step; `values` are the module's.
        """
        self.origin = path if (path / _PARAMETERS).is_dir() else tag_folder(path, LATEST_UNIVERSAL)
        if values != "fp32":
            raise UserError(f"{self.origin} is a universal checkpoint, which is fp32; leave out --deepspeed-weights")
        self._trust = trust_pickle
        models = model_files(self.origin, trust_pickle)
        shapes = {name: tuple(shape) for group in models[0].get("param_shapes") for name, shape in group.items()}
        folders = {file.parent.name: file.parent for file in (self.origin / _PARAMETERS).glob(f"*/{_WEIGHT}")}
        missing = sorted(shapes.keys() - folders.keys())
        if missing:
            raise UserError(f"{self.origin} lacks {', '.join(f'{_PARAMETERS}/{n}/{_WEIGHT}' for n in missing[:5])}")
        self._stored = untrained(models)
        self._stored |= {name: self._parameter(folder / _WEIGHT, shapes.get(name)) for name, folder in folders.items()}
        for name, other in (models[0].find("shared_params") or {}).items():
            self._stored[name] = self._stored[other]
        refuse_mixed_steps(self.origin, self._steps(folders))

    @property
    def templates(self) -> Mapping[str, Tensor]:
        """Name in the module -> shape and dtype."""
        return {
            name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for name, stored in self._stored.items()
        }

    def tensor(self, name: str) -> Tensor:
        """One whole tensor."""
        return self._stored[name].read()

    def _parameter(self, path: Path, shape: tuple[int, ...] | None) -> Pieces:
        found: Any = read_structure(path, self._trust, DEEPSPEED_HARMLESS)
        # From ZeRO 3 a file holds the flattened tensor alone.
        found = found.get("param") if isinstance(found, dict) else found
        if not isinstance(found, StoredTensor):
            raise UserError(f"{path} holds no tensor")
        shape = found.shape if shape is None else shape
        if found.elements != torch.Size(shape).numel():
            raise UserError(f"{path} holds {found.elements} values, its shape is {list(shape)}")
        return Pieces(shape, found.dtype, (Run(found, 0, found.elements),))

    def _steps(self, folders: Mapping[str, Path]) -> dict[str, int | None]:
        """File -> step, of the parameters that say it."""
        found: dict[str, int | None] = {}
        for name, folder in sorted(folders.items()):
            if (folder / _STEP).is_file():
                step = read_structure(folder / _STEP, self._trust, DEEPSPEED_HARMLESS)
                found[f"{name}/{_STEP}"] = int(step.read().item() if isinstance(step, StoredTensor) else step)
        return found


def is_universal(path: Path) -> bool:
    """Whether a folder has parameters in folders of their own, or names such a one in `latest_universal`, and no other.

    Where `latest` is too, the checkpoint it names is meant, from which the universal one was made.
    """
    pointed = (path / LATEST_UNIVERSAL).is_file() and not (path / LATEST).is_file()
    folder = tag_folder(path, LATEST_UNIVERSAL) if pointed else path
    return any((folder / _PARAMETERS).glob(f"*/{_WEIGHT}"))
