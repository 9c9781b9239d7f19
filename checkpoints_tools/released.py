"""The released form of the DiT: a diffusers folder with config.json and one or several safetensors files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_tools.models import KINDS
from checkpoints_tools.weights import Model
from megatron_video.config_io import build_config
from megatron_video.dit import DiTConfig
from megatron_video.errors import UserError

CONFIG_FILE = "config.json"
STEM = "diffusion_pytorch_model"
INDEX_FILE = f"{STEM}.safetensors.index.json"
GIGABYTE = 1_000_000_000
# safetensors' names of the types that weights have
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# fields of the released config.json that say what DiTConfig says, under the same name
SHARED_FIELDS = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "patch_size",
    "caption_channels",
    "use_additional_conditions",
    "norm_eps",
)
# released fields without an effect on the weights, with the values the released code has
FIXED_FIELDS: dict[str, Any] = {
    "_class_name": "StepVideoModel",
    "attention_type": "parallel",
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_single",
}


class ReleasedFolder:
    """Tensors of a released folder by our names, read one at a time."""

    def __init__(self, folder: Path) -> None:
        """Open the folder.

        Raises:
            UserError: no config.json or no weights, or a file that is not safetensors.
        """
        self.folder = folder
        self.model = KINDS["dit"].build(read_config(folder))
        ours = {theirs: ours for ours, theirs in self.model.released.items()}
        # What is unknown keeps its own name, to be refused by it.
        self._places = {
            ours.get(name, name): (path, name, template)
            for path in _weight_files(folder)
            for name, template in _templates(path).items()
        }

    @property
    def origin(self) -> Path:
        """The folder."""
        return self.folder

    @property
    def templates(self) -> Mapping[str, Tensor]:
        """Our name -> shape and dtype, on the meta device."""
        return {name: template for name, (_, _, template) in self._places.items()}

    def stored_name(self, name: str) -> str:
        """The released name."""
        return self.model.released.get(name, name)

    def tensor(self, name: str) -> Tensor:
        """One tensor, in its stored dtype."""
        path, stored, _ = self._places[name]
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
            return tensor


def read_config(folder: Path) -> DiTConfig:
    """DiTConfig of a released folder.

    Raises:
        UserError: config.json is missing, not JSON, or has a field or value this model does not know.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG_FILE}; give the folder that holds it beside the safetensors files")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    values = {name: stored[name] for name in SHARED_FIELDS if name in stored}
    for name, value in stored.items():
        if name.startswith("_") or name in SHARED_FIELDS or name == "attention_type":
            continue
        if name not in FIXED_FIELDS or value != FIXED_FIELDS[name]:
            raise UserError(f"{path}: {name}={value!r} is not a released StepVideoModel setting this model has")
    return build_config(DiTConfig, values, origin=str(path))


def write_released(folder: Path, model: Model, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write config.json and the tensors, which come under our names.

    Files have at most `shard_bytes` where single tensors allow it.

    Only the tensors of one file are in memory at a time.
    """
    folder.mkdir(parents=True)
    values = dataclasses.asdict(model.config)
    shared = {name: values[name] for name in SHARED_FIELDS}
    (folder / CONFIG_FILE).write_text(json.dumps(FIXED_FIELDS | shared, indent=2) + "\n", encoding="utf-8")
    renamed = ((model.released[name], tensor) for name, tensor in tensors)
    placed: dict[str, int] = {}
    total = count = 0
    for count, shard in enumerate(_shards(renamed, shard_bytes), start=1):
        save_file(shard, folder / f"{STEM}-{count:05d}.safetensors", metadata={"format": "pt"})
        placed |= dict.fromkeys(shard, count)
        total += sum(tensor.nbytes for tensor in shard.values())
    _name_files(folder, placed, total, count)


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _name_files(folder: Path, placed: dict[str, int], total: int, count: int) -> None:
    if count == 1:
        (folder / f"{STEM}-00001.safetensors").rename(folder / f"{STEM}.safetensors")
        return
    names = {i: f"{STEM}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    for i, name in names.items():
        (folder / f"{STEM}-{i:05d}.safetensors").rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in placed.items()}}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{index} names files that are not there: {', '.join(missing)}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no .safetensors file")
    return files


def _templates(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {
                name: torch.empty(found.get_shape(), dtype=DTYPES[found.get_dtype()], device="meta")
                for name, found in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None
