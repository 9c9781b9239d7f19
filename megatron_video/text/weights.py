"""Reading encoder folders: config.json, and weights whose names and shapes are compared before any is used."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megatron_video.errors import UserError

_NAMES_SHOWN = 5


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        UserError: no such file, not JSON, or not a mapping.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: those of an index if there is one, else all *.safetensors, else pytorch_model.bin.

    Raises:
        UserError: there are none, or the index names a file that is not there.
    """
    index = folder / "model.safetensors.index.json"
    # The index decides, so that files of another model in the folder are not taken for parts of this one.
    if index.is_file():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise UserError(f"{index} names files that are not there: {', '.join(absent)}")
    else:
        pickled = folder / "pytorch_model.bin"
        files = sorted(folder.glob("*.safetensors")) or ([pickled] if pickled.is_file() else [])
    if not files:
        raise UserError(f"{folder} holds no weights: expected *.safetensors or pytorch_model.bin")
    return files


def iterate_weights(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, CPU tensor) one at a time, so that a 40 GB model needs no second copy in memory.

    Raises:
        UserError: a file is damaged or holds something else than tensors.
    """
    for file in files:
        try:
            yield from _pickled(file) if file.suffix == ".bin" else _safetensors(file)
        except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
            raise UserError(f"{file} is not readable as weights: {error}") from None


def _safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
            yield name, handle.get_tensor(name)


def _pickled(file: Path) -> Iterator[tuple[str, Tensor]]:
    # weights_only: a pickle from elsewhere must not run code.
    values = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}, not a mapping of names to tensors")
    yield from ((name, value) for name, value in values.items() if isinstance(value, Tensor))


def load_into(
    model: nn.Module, weights: Iterator[tuple[str, Tensor]], origin: Path, device: torch.device, dtype: torch.dtype
) -> None:
    """Give a model built on the meta device its weights, each cast and moved on its own.

    Raises:
        UserError: names that the model lacks, names that the file lacks, or another shape.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    unexpected: list[str] = []
    for name, tensor in weights:
        if name not in expected:
            unexpected.append(name)
            continue
        # What is left in `expected` at the end is missing.
        shape = expected.pop(name)
        if shape != tuple(tensor.shape):
            raise UserError(f"{origin}: {name} has shape {list(tensor.shape)}, config.json says {list(shape)}")
        # assign, because a meta tensor has no memory to copy into.
        model.load_state_dict({name: tensor.to(device=device, dtype=dtype)}, strict=False, assign=True)
    problems = [f"lacks {_listed(list(expected))}"] if expected else []
    problems += [f"has unknown {_listed(unexpected)}"] if unexpected else []
    if problems:
        raise UserError(f"the weights in {origin} do not fit its config.json: {'; '.join(problems)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
