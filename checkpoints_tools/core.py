"""The weights of a megatron-core distributed checkpoint, read and written without building the model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_video.dit import DiTConfig
from megatron_video.parallel import one_process
from training.checkpoint import find_checkpoint, read_model_config, write_weights


class CoreCheckpoint:
    """Tensors of a checkpoint by our names, each assembled from its cuts, read one at a time."""

    def __init__(self, path: Path) -> None:
        """Open a run folder (its newest checkpoint) or one step's folder.

        Raises:
            UserError: nothing there, half written, or damaged.
        """
        self.folder = find_checkpoint(path)
        self.config = read_model_config(self.folder)
        metadata = dcp.FileSystemReader(str(self.folder)).read_metadata()
        self._stored = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }

    @property
    def names(self) -> set[str]:
        """Our names of the weights present."""
        return set(self._stored)

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, in its stored dtype."""
        entry = self._stored[name]
        state = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        dcp.load(state, storage_reader=dcp.FileSystemReader(str(self.folder)), no_dist=True)
        return state[name]


def write_core(folder: Path, config: DiTConfig, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write weights under our names as a checkpoint of step 0 that any layout can load.

    All tensors are in memory at once.
    """
    with one_process():
        sharded = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors}
        write_weights(folder, sharded, config)
