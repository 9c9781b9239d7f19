"""Weights that other trainers wrote with torch: one file of `torch.save`, or a folder of its distributed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from checkpoints_tools.core_contents import METADATA_FILE, CoreContents
from checkpoints_tools.torch_pickles import Unpicklable, read_structure, tensors_in
from megatron_video.errors import UserError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


class Inert:
    """Stands for an object of another program: takes what its pickle gives it, and does nothing with it."""

    def __init__(self, *values: Any, **named: Any) -> None:
        """Take anything."""

    def __setstate__(self, state: Any) -> None:
        """Take anything."""


# What training scripts put beside the weights; none of it is looked at.
HARMLESS: tuple[Unpicklable, ...] = (
    (Inert, "argparse.Namespace"),
    (Inert, "pathlib.PosixPath"),
    (Inert, "pathlib._local.PosixPath"),
    # Random states and numbers of numpy, whose core was renamed with version 2.
    *((Inert, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    (Inert, "numpy.dtype"),
    (Inert, "numpy.ndarray"),
)


class StoredTensors(Protocol):
    """Tensors by the names they are stored under, whatever model they belong to."""

    @property
    def origin(self) -> Path:
        """File or folder, for messages."""

    @property
    def templates(self) -> Mapping[str, Tensor]:
        """Stored name -> shape and dtype on the meta device, without reading any."""

    def tensor(self, name: str) -> Tensor:
        """One whole tensor in host memory, in its stored dtype."""


class TorchFile:
    """The tensors of one file of `torch.save`; those in nested dicts have the names of the dicts before theirs."""

    def __init__(self, path: Path, trust_pickle: bool = False) -> None:
        """Read the file's pickle, and no tensor.

        Raises:
            UserError: it is damaged, asks to run anything, or holds no tensor by name.
        """
        self.origin = path
        self._stored = dict(tensors_in(read_structure(path, trust_pickle, HARMLESS)))
        if not self._stored:
            raise UserError(f"{path} holds no tensors by name; wanted is a state_dict, alone or within a dict")

    @property
    def templates(self) -> Mapping[str, Tensor]:
        """Dotted name -> shape and dtype."""
        return {name: stored.template for name, stored in self._stored.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor, in its stored dtype."""
        return self._stored[name].read()


class TorchDistributedCheckpoint:
    """The tensors of a folder of `torch.distributed.checkpoint`, whole, over however many ranks they were cut."""

    def __init__(self, folder: Path) -> None:
        """Read the folder's metadata.

        Raises:
            UserError: it is damaged, or a file it names is not there.
        """
        self.origin = folder
        self._contents = CoreContents(folder)
        self._entries = {fqn: entry for fqn, entry in self._contents.entries.items() if entry.dtype is not None}
        files = {chunk.file for entry in self._entries.values() for chunk in entry.chunks}
        missing = sorted(file for file in files if not (folder / file).is_file())
        if missing:
            raise UserError(f"{folder} lacks files that its {METADATA_FILE} names: {', '.join(missing[:5])}")

    @property
    def templates(self) -> Mapping[str, Tensor]:
        """Stored name -> shape and dtype."""
        return {fqn: entry.template for fqn, entry in self._entries.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor, put together from its cuts, in its stored dtype."""
        return self._contents.tensor(name)
