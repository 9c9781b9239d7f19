"""The weights of a megatron-core distributed checkpoint, read without building the model; core_writer writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from checkpoints_tools.core_contents import CoreContents, Part
from checkpoints_tools.models import read_model
from megatron_video.errors import UserError
from training.checkpoint import find_checkpoint
from training.optimizer_state import EMA_PREFIX

_EMA_PREFIX = f"{EMA_PREFIX}."


class CoreCheckpoint:
    """Tensors of a checkpoint by our names, each assembled from its cuts, read one at a time."""

    def __init__(self, path: Path, averaged: bool = False) -> None:
        """Open a run folder (its newest checkpoint) or one step's folder; `averaged`: the averages of the weights.

        Raises:
            UserError: nothing there, half written, or damaged; no averages in it.
        """
        self.folder = find_checkpoint(path)
        self.model = read_model(self.folder)
        self.config = self.model.config
        self.contents = CoreContents(self.folder)
        self._prefix = _EMA_PREFIX if averaged else ""
        part: Part = "averages" if averaged else "weights"
        self._stored = {entry.name: entry for entry in self.contents.of_part(part).values()}
        if averaged and not self._stored:
            raise UserError(f"{self.folder} holds no averaged weights; train with ema.decay, or leave out --ema")

    @property
    def origin(self) -> Path:
        """The step's folder."""
        return self.folder

    @property
    def templates(self) -> Mapping[str, Tensor]:
        """Our name -> shape and dtype, on the meta device."""
        return {name: entry.template for name, entry in self._stored.items()}

    def stored_name(self, name: str) -> str:
        """With the prefix that averages have."""
        return self._prefix + name

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, in its stored dtype."""
        return self.contents.tensor(self._stored[name].fqn)
