"""The weights of a megatron-core distributed checkpoint, read and written without building the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from checkpoints_tools.core_contents import CoreContents, Part
from checkpoints_tools.models import kind_of, read_model
from megatron_video.errors import UserError
from megatron_video.parallel import one_process
from training.checkpoint import complete_weights, find_checkpoint, write_weights
from training.checkpoint_files import durable_file
from training.checkpoint_writer import FORMAT, FORMAT_VERSION
from training.optimizer_state import EMA_PREFIX

_EMA_PREFIX = f"{EMA_PREFIX}."
# Named as torch names the first file of the first rank.
_TENSOR_FILE = "__0_0.distcp"


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


def stream_core(
    folder: Path, config: Any, templates: Mapping[str, Tensor], tensor_of: Callable[[str], Tensor]
) -> None:
    """Write the new `folder` as `write_core` does, with one tensor in memory at a time.

    Args:
        folder: is made; what it lacks to be a complete checkpoint is written last.
        config: the model's sizes, in the dataclass of its kind.
        templates: shape and dtype of every tensor by our names, on the meta device.
        tensor_of: asked for every tensor once, when its turn has come.
    """
    folder.mkdir(parents=True)
    dcp.save(dict(templates), storage_writer=_OneByOneWriter(folder), planner=_LatePlanner(tensor_of), no_dist=True)
    # What megatron-core looks for beside the tensors: which format they have, and values of no tensor (none here).
    save_config(CheckpointingConfig(FORMAT, FORMAT_VERSION), str(folder))
    torch.save({}, folder / COMMON_STATE_FNAME)
    complete_weights(folder, config, kind_of(config).section)


class _LatePlanner(DefaultSavePlanner):
    """Makes a tensor when it is to be written."""

    def __init__(self, tensor_of: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._tensor_of = tensor_of

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._tensor_of(write_item.index.fqn).contiguous()


class _OneByOneWriter(dcp.FileSystemWriter):
    """torch's own keeps every tensor of a file until the file is written."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with durable_file(Path(self.path) / _TENSOR_FILE) as stream:
            results = [
                _write_item(
                    self.transforms,
                    stream,
                    planner.resolve_data(item),
                    item,
                    _TENSOR_FILE,
                    SerializationFormat.TORCH_SAVE,
                )
                for item in plan.items
            ]
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


def write_core(folder: Path, config: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write weights under our names as a checkpoint of step 0 that any layout can load.

    All tensors are in memory at once.
    """
    with one_process():
        sharded = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors}
        write_weights(folder, sharded, config, kind_of(config).section)
