"""The recorded models as released folders, written without any code of the tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from golden_cases.vae import CONFIG_FIELDS
from golden_files import GoldenCase
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "sd."
DIT_FIELDS_OF_TESTS = ("rope_ch_split",)


def recorded_weights(*cases: GoldenCase) -> dict[str, Tensor]:
    """Released name -> value."""
    tensors = {name: value for case in cases for name, value in case.tensors().items()}
    return {name.removeprefix(WEIGHTS): value for name, value in tensors.items() if name.startswith(WEIGHTS)}


def with_weights(case: GoldenCase, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The case's tensors, with other weights of the same names."""
    tensors = case.tensors()
    return {
        name: weights[name.removeprefix(WEIGHTS)] if name.startswith(WEIGHTS) else value
        for name, value in tensors.items()
    }


def write_dit(case: GoldenCase, folder: Path) -> Path:
    """As diffusers saves a StepVideoModel."""
    values = {name: value for name, value in case.config.items() if name not in DIT_FIELDS_OF_TESTS}
    _write(folder, {"_class_name": "StepVideoModel", **values}, recorded_weights(case), "diffusion_pytorch_model")
    return folder


def write_vae(cases: list[GoldenCase], folder: Path) -> Path:
    """The encoder of one case and the decoder of the other, with the sizes that both were recorded with."""
    values = {ours: cases[0].config[theirs] for theirs, ours in CONFIG_FIELDS.items()}
    _write(folder, values, recorded_weights(*cases), "vae_v2")
    return folder


def write_llm(case: GoldenCase, folder: Path) -> Path:
    """As transformers saves a Step1Model, in two files with an index."""
    _write(folder, {"architectures": ["Step1Model"], **case.config}, {}, "model")
    (folder / "model.safetensors").unlink()
    weights = recorded_weights(case)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: names[i % 2] for i, name in enumerate(weights)}
    for file in names:
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_clip(case: GoldenCase, folder: Path) -> Path:
    """As it was released: a pickle with the prefix `bert.`, and parts of other models beside it."""
    _write(folder, {"architectures": ["BertModel"], "model_type": "bert", **case.config}, {}, "model")
    (folder / "model.safetensors").unlink()
    weights = {f"bert.{name}": value for name, value in recorded_weights(case).items()}
    others = {"logit_scale": torch.ones(()), "visual.proj": torch.ones(3, 2)}
    positions = torch.arange(case.config["max_position_embeddings"])[None]
    torch.save(weights | others | {"bert.embeddings.position_ids": positions}, folder / "pytorch_model.bin")
    return folder


def _write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], stem: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / f"{stem}.safetensors", metadata={"format": "pt"})
