"""The released form of the DiT: a diffusers folder with config.json and one or several safetensors files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints_tools.models import KINDS
from checkpoints_tools.safetensors_files import SafetensorsFiles, SafetensorsSink, find_weight_files
from checkpoints_tools.weights import Model
from megatron_video.config_io import build_config
from megatron_video.dit import DiTConfig
from megatron_video.errors import UserError

CONFIG_FILE = "config.json"
STEM = "diffusion_pytorch_model"
GIGABYTE = 1_000_000_000

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
        self._files = SafetensorsFiles(find_weight_files(folder))
        # What is unknown keeps its own name, to be refused by it.
        self._stored = {ours.get(name, name): name for name in self._files.templates}

    @property
    def origin(self) -> Path:
        """The folder."""
        return self.folder

    @property
    def templates(self) -> Mapping[str, Tensor]:
        """Our name -> shape and dtype, on the meta device."""
        return {name: self._files.templates[stored] for name, stored in self._stored.items()}

    def stored_name(self, name: str) -> str:
        """The released name."""
        return self.model.released.get(name, name)

    def tensor(self, name: str) -> Tensor:
        """One tensor, in its stored dtype."""
        return self._files.tensor(self._stored[name])


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


def write_config(folder: Path, model: Model) -> None:
    """Write the config.json that the released code reads."""
    values = dataclasses.asdict(model.config)
    shared = {name: values[name] for name in SHARED_FIELDS}
    (folder / CONFIG_FILE).write_text(json.dumps(FIXED_FIELDS | shared, indent=2) + "\n", encoding="utf-8")


def write_released(folder: Path, model: Model, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write config.json and the tensors, which come under our names; all of them are in memory at once."""
    folder.mkdir(parents=True)
    held = dict(tensors)
    sink = SafetensorsSink(folder, held, STEM, shard_bytes, model.released)
    for name in sink.names:
        sink.write(name, held[name])
    sink.finish()
    write_config(folder, model)
