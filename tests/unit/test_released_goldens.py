"""Recorded models -> released folder -> megatron-core -> released: unchanged, and still computing what was recorded."""

from __future__ import annotations

import importlib
from pathlib import Path

import golden_released
import pytest
import torch
from golden_cases.dit import ABSOLUTE_FP32, assert_close, read_inputs
from golden_files import GoldenCase, find_golden_cases
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_tools import cli
from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.forms import open_weights
from checkpoints_tools.weights import digest
from megatron_video import device
from megatron_video.cli import run_command
from megatron_video.dit import build_dit
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel
from training.checkpoint import load_model_weights, read_model_config

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = {case.name: case for case in find_golden_cases(GOLDEN)}
DITS = [name for name in CASES if name.startswith("dit_")]
OTHERS = {
    "vae": ("vae", ["vae_enc_a", "vae_dec_a"], lambda cases, folder: golden_released.write_vae(cases, folder)),
    "clip": ("clip", ["clip_bert_tiny"], lambda cases, folder: golden_released.write_clip(cases[0], folder)),
    "llm": ("stepllm", ["stepllm_h6g2"], lambda cases, folder: golden_released.write_llm(cases[0], folder)),
}


def convert(source: Path, output: Path) -> Path:
    assert run_command(cli.main, ["convert", "--in", str(source), "--out", str(output)]) == 0
    return output


def round_trip(released: Path, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The megatron-core checkpoint, and what came back from it under released names; equal to what went in."""
    core = convert(released, folder / "core")
    returned = convert(core, folder / "returned")
    before, after = open_weights(released), open_weights(returned)
    assert before.model == after.model == CoreCheckpoint(core).model
    assert {name: digest(before.tensor(name)) for name in before.templates} == {
        name: digest(after.tensor(name)) for name in after.templates
    }
    files = returned.glob("*.safetensors")
    return core, {name: value for file in files for name, value in load_file(file).items()}


def run_case(case: GoldenCase, module: str, weights: dict[str, Tensor]) -> None:
    tensors = golden_released.with_weights(case, weights)
    importlib.import_module(f"golden_cases.{module}").run(case.meta, tensors, case.folder, case.name)


@pytest.mark.parametrize("name", DITS)
def test_dit_computes_the_recorded_output_after_conversion(name: str, tmp_path: Path) -> None:
    assert len(DITS) == 4
    case = CASES[name]
    core, returned = round_trip(golden_released.write_dit(case, tmp_path / "in"), tmp_path)
    recorded = golden_released.recorded_weights(case)
    assert returned.keys() == recorded.keys()
    assert all(digest(returned[name]) == digest(recorded[name]) for name in recorded)
    assert_close(dit_output(core, case), case.tensors()["out"], ABSOLUTE_FP32, name)


def dit_output(core: Path, case: GoldenCase) -> Tensor:
    """Of the model that training and sampling make of the checkpoint."""
    parallel = ParallelConfig()
    initialize_parallel(parallel, seed=1, device_info=device.initialize())
    try:
        config = read_model_config(core)
        (model,) = build_dit(config, parallel, torch.float32, device=torch.device("cpu"), init_seed=None)
        load_model_weights(core, [model])
        with torch.no_grad():
            output: Tensor = model.eval()(**read_inputs(case.tensors()))
        return output
    finally:
        destroy_parallel()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_compute_the_recorded_output_after_conversion(kind: str, tmp_path: Path) -> None:
    module, names, write = OTHERS[kind]
    cases = [CASES[name] for name in names]
    _, returned = round_trip(write(cases, tmp_path / "in"), tmp_path)
    recorded = golden_released.recorded_weights(*cases)
    prefix = "bert." if kind == "clip" else ""
    returned = {name.removeprefix(prefix): value for name, value in returned.items()}
    assert returned.keys() == recorded.keys()
    assert all(digest(returned[name]) == digest(recorded[name]) for name in recorded)
    for case in cases:
        run_case(case, module, returned)


@pytest.mark.parametrize("name", ["dit_patch2_h3d16", "stepllm_h6g2"])
def test_one_file_alone_and_bf16_come_back(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    write = golden_released.write_dit if name in DITS else golden_released.write_llm
    released = write(case, tmp_path / "in")
    for file in released.glob("*.safetensors"):
        save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    core, _ = round_trip(released, tmp_path)
    file = convert(core, tmp_path / "alone.safetensors")
    first, second = CoreCheckpoint(core), CoreCheckpoint(convert(file, tmp_path / "core_again"))
    assert first.model == second.model
    assert {template.dtype for template in second.templates.values()} == {torch.bfloat16}
    assert all(digest(first.tensor(each)) == digest(second.tensor(each)) for each in first.model.shapes)
