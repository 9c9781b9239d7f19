"""Writes megatron-core distributed checkpoints (torch_dist) tensor by tensor, cut and shared over files in any way."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoints_tools.core_contents import METADATA_FILE
from checkpoints_tools.growing_file import FileSet
from checkpoints_tools.journal import Journal
from checkpoints_tools.models import KINDS
from checkpoints_tools.transfer import transfer
from checkpoints_tools.weights import Model
from megatron_video.config_io import config_to_dict
from training.checkpoint import TrainState
from training.checkpoint_files import CONFIG_FILE, WRITTEN, stored_file, write_state
from training.checkpoint_writer import FORMAT, FORMAT_VERSION

# (offsets of its first element, sizes, number of the file that it goes to), of a box of a tensor.
Cut = tuple[tuple[int, ...], tuple[int, ...], int]
Cuts = Mapping[str, Sequence[Cut]]


@dataclass(frozen=True)
class Beside:
    """What a checkpoint holds beside its tensors."""

    config: Mapping[str, Any]
    """All of config.yaml, as plain values."""
    state: Mapping[str, Any] = field(default_factory=lambda: asdict(TrainState()))
    """What train_state.json says: the fields of TrainState."""
    common: Mapping[str, Any] = field(default_factory=dict)
    """Values of no tensor, as "optimizer updates"."""
    objects: Mapping[str, bytes] = field(default_factory=dict)
    """Stored name -> bytes of what is pickled there, such as settings of FP8; they are copied, not opened."""

    @staticmethod
    def of_model(model: Model) -> Beside:
        """Of weights alone: a checkpoint of step 0."""
        return Beside({KINDS[model.kind].section: config_to_dict(model.config)})


def write_core(
    folder: Path,
    model: Model,
    templates: Mapping[str, Tensor],
    tensor_of: Callable[[str], Tensor],
    *,
    cuts: Cuts | None = None,
    beside: Beside | None = None,
    journal: Journal | None = None,
    title: str = "write",
) -> dict[str, str]:
    """Write a complete checkpoint that any layout can load, with at most two tensors in memory.

    Args:
        folder: made unless it is there; with a journal, the journal's.
        model: whose sizes config.yaml gets, unless `beside` says all of it.
        templates: stored name -> shape and dtype of every tensor, on the meta device. The names are ours for weights;
            for the optimizer's state and averages with their prefix (core_contents.PREFIXES).
        tensor_of: asked once for every tensor, in a thread of its own, in the order of `templates`; gives it in the
            template's shape and dtype.
        cuts: stored name -> the boxes that a tensor is stored as; together they are all of it. One that is not named,
            as by default all of them, is stored whole in file 0. File n is called `__n_0.distcp`, as that of rank n.
        beside: what the checkpoint holds beside its tensors; by default nothing but the model's sizes.
        journal: of a command that can be continued; None: of one that starts anew.
        title: of the progress bar.

    Returns:
        Stored name -> digest of every tensor (weights.digest), for `transfer.verify_digests`.

    Raises:
        OSError: naming the file that could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sink = CoreSink(folder, templates, beside or Beside.of_model(model), cuts)
    return transfer(sink, tensor_of, journal, title)


class CoreSink(FileSet):
    """Takes tensors, one after the other, into a checkpoint; a transfer.Sink. See `write_core`."""

    def __init__(self, folder: Path, templates: Mapping[str, Tensor], beside: Beside, cuts: Cuts | None = None) -> None:
        super().__init__(folder)
        self._templates, self._beside = templates, beside
        self._cuts = {name: list((cuts or {}).get(name) or [_whole(each)]) for name, each in templates.items()}
        for name, boxes in self._cuts.items():
            _check_cover(name, templates[name], boxes)
        # Tensor -> per cut the first byte and the number of bytes in its file.
        self._places: dict[str, list[list[int]]] = {}

    @property
    def names(self) -> Sequence[str]:
        """Tensors in the order in which they must come."""
        return list(self._templates)

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(template.nbytes for template in self._templates.values())

    def write(self, name: str, tensor: Tensor) -> None:
        """Add the next tensor."""
        template = self._templates[name]
        assert (tensor.dtype, tensor.shape) == (template.dtype, template.shape), name
        places = []
        for offsets, sizes, number in self._cuts[name]:
            box = tensor[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))]
            file = self.file(_file_name(number))
            start = file.tell()
            _save(_alone(box), file)
            places.append([start, file.tell() - start])
        self._places[name] = places

    def position(self) -> Any:
        """Where it stands, as JSON keeps it."""
        return {"files": super().position(), "places": dict(self._places)}

    def go_on(self, position: Any) -> None:
        """Go on behind a position of an earlier process."""
        super().go_on(position["files"])
        self._places = dict(position["places"])

    def finish(self) -> None:
        """Write objects, metadata, configuration and state; everything is on the disk when this returns."""
        metadata = self._metadata()
        self.end_all()
        with open(self.folder / METADATA_FILE, "wb") as file:
            pickle.dump(metadata, file)
        # What megatron-core looks for beside the tensors: which format they have, and values of no tensor.
        save_config(CheckpointingConfig(FORMAT, FORMAT_VERSION), str(self.folder))
        torch.save(dict(self._beside.common), self.folder / COMMON_STATE_FNAME)
        text = yaml.safe_dump(dict(self._beside.config), sort_keys=False)
        (self.folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        small = [METADATA_FILE, "metadata.json", COMMON_STATE_FNAME, CONFIG_FILE]
        files = self.stored | {name: stored_file(self.folder / name) for name in small}
        # A checkpoint that is written anew is as old as it was: runs delete them by age.
        write_state(self.folder, {WRITTEN: time.time(), **self._beside.state}, files)

    def _metadata(self) -> Metadata:
        entries: dict[str, STORAGE_TYPES] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for name, template in self._templates.items():
            chunks = []
            for index, (cut, (start, length)) in enumerate(zip(self._cuts[name], self._places[name], strict=True)):
                offsets, sizes, number = cut
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                storage[MetadataIndex(name, offsets, index)] = _StorageInfo(_file_name(number), start, length)
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=template.dtype), template.shape, chunks)
        for name, content in self._beside.objects.items():
            file = self.file(_file_name(0))
            storage[MetadataIndex(name)] = _StorageInfo(_file_name(0), file.tell(), len(content))
            file.write(content)
            entries[name] = BytesStorageMetadata()
        paths = {name: (name,) for name in entries}
        return Metadata(entries, paths, storage, StorageMeta(), CURRENT_DCP_VERSION)


def _whole(template: Tensor) -> Cut:
    return (0,) * template.dim(), tuple(template.shape), 0


def _file_name(number: int) -> str:
    # As torch names the first file of a rank.
    return f"__{number}_0.distcp"


def _check_cover(name: str, template: Tensor, cuts: Sequence[Cut]) -> None:
    # A gap would be loaded as whatever the memory held.
    covered = sum(torch.Size(sizes).numel() for _, sizes, _ in cuts)
    inside = all(
        first >= 0 and first + size <= length
        for offsets, sizes, _ in cuts
        for first, size, length in zip(offsets, sizes, template.shape, strict=True)
    )
    if covered != template.numel() or not inside:
        raise ValueError(f"{name}: the cuts hold {covered} of {template.numel()} values, or lie outside of it")


def _alone(box: Tensor) -> Tensor:
    """A box with memory of its own: torch.save writes all the memory that a view looks into."""
    return (
        box
        if box.is_contiguous() and box.untyped_storage().nbytes() == box.nbytes
        else box.clone(memory_format=torch.contiguous_format)
    )


def _save(tensor: Tensor, file: Any) -> None:
    try:
        torch.save(tensor, cast(io.BytesIO, file))
    except RuntimeError:
        # It puts an error of its own in the place of that of the disk.
        if file.error is None:
            raise
        raise file.error from None
