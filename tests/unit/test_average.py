"""Averaged checkpoints: the mean against fp64, one tensor at a time, loadable, and nothing left of a failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools import derived
from checkpoints_tools.average import Options, Source, average
from checkpoints_tools.cli import main
from checkpoints_tools.convert import convert
from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.core_writer import CoreSink
from checkpoints_tools.derived import Output
from megatron_video.cli import run_command
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.errors import UserError
from megatron_video.parallel import one_process
from training.checkpoint import TrainState, load_model_weights, save_checkpoint, step_folder
from training.config import AdamWConfig, PretrainConfig
from training.ema import EMA
from training.main_parameters import main_parameters
from training.optimizer import build_optimizer, wrap_data_parallel

MODEL: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "caption_channels": [12, 8],
}


def save(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **model: Any) -> dict[str, torch.Tensor]:
    """A checkpoint of random weights whose moving averages lie 1 above them; returns the weights."""
    config = DiTConfig(**{**MODEL, **model})
    with one_process() as parallel:
        chunks = build_dit(config, parallel, dtype, device=torch.device("cpu"), init_seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in chunks[0].parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        wrapped = wrap_data_parallel(chunks, parallel)
        optimizer = build_optimizer(wrapped, AdamWConfig(), parallel)
        ema = EMA(optimizer, 0.5)
        for mean, item in zip(ema.averages, main_parameters(optimizer), strict=True):
            assert mean is not None
            assert item.main is not None
            mean.copy_(item.main + 1)
        save_checkpoint(folder, wrapped, optimizer, TrainState(step=seed), PretrainConfig(model=config), ema=ema)
    return {name: parameter.detach().clone() for name, parameter in chunks[0].named_parameters()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("runs")
    return root, [save(root / f"run{seed}", seed) for seed in (1, 2, 3)]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    with one_process() as parallel:
        chunks = build_dit(DiTConfig(**MODEL), parallel, dtype, device=torch.device("cpu"), init_seed=9)
        load_model_weights(folder, list(chunks))
    return dict(chunks[0].named_parameters())


@pytest.mark.parametrize("ema", [False, True])
def test_the_weighted_mean_loads_like_any_checkpoint(
    runs: tuple[Path, list[dict[str, Any]]], tmp_path: Path, ema: bool
) -> None:
    root, weights = runs
    sources = [f"{root / 'run1'}", f"{root / 'run2'}=3", f"{step_folder(root / 'run3', 3)}=0.5"]
    options = ["--ema"] if ema else []
    assert run_command(main, ["average", *sources, "--out", str(tmp_path / "mean"), *options]) == 0
    found = load(tmp_path / "mean")
    for name, parameter in found.items():
        one, two, three = (each[name].double() for each in weights)
        expected = (one + 3 * two + 0.5 * three) / 4.5 + ema
        assert (parameter.double() - expected).abs().max() < 1e-6, name
    record = json.loads((tmp_path / "mean" / "average.json").read_text())
    assert [source["step"] for source in record["sources"]] == [1, 2, 3]
    assert [source["share"] for source in record["sources"]] == pytest.approx([1 / 4.5, 3 / 4.5, 0.5 / 4.5])


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    weights = [save(tmp_path / f"run{seed}", seed, torch.bfloat16) for seed in (1, 2)]
    average([Source(tmp_path / "run1"), Source(tmp_path / "run2")], Output(tmp_path / "mean"))
    found = load(tmp_path / "mean", torch.bfloat16)
    for name, parameter in found.items():
        expected = ((weights[0][name].float() + weights[1][name].float()) / 2).bfloat16()
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, expected), name
    average(
        [Source(tmp_path / "run1"), Source(tmp_path / "run2")], Output(tmp_path / "wide"), Options(dtype=torch.float32)
    )
    wide = CoreCheckpoint(tmp_path / "wide")
    assert {template.dtype for template in wide.templates.values()} == {torch.float32}


def test_another_dropout_is_the_same_model(tmp_path: Path) -> None:
    for seed, dropout in ((1, 0.0), (2, 0.1)):
        save(tmp_path / f"run{seed}", seed, hidden_dropout=dropout)
    sources = [Source(tmp_path / "run1"), Source(tmp_path / "run2")]
    assert average(sources, Output(tmp_path / "mean")).tensors == len(CoreCheckpoint(tmp_path / "mean").templates)


def test_what_cannot_be_averaged_is_refused(runs: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    root, _ = runs
    one, two = Source(root / "run1"), Source(root / "run2")
    save(tmp_path / "other", 1, num_layers=1)
    cases = [
        ([one], "two or more"),
        ([one, Source(step_folder(root / "run1", 1))], "given twice"),
        ([one, Source(tmp_path / "other")], "num_layers 1 and 2"),
        ([one, Source(tmp_path / "nothing")], "is not there"),
    ]
    for sources, message in cases:
        with pytest.raises(UserError, match=message):
            average(sources, Output(tmp_path / "out"))
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        average([one, two], Output(tmp_path / "there"))
    with pytest.raises(UserError, match="must be above 0"):
        Source.parse("run=0")
    assert not (tmp_path / "out").exists()


def test_paths_may_hold_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "lr=1e-4").mkdir()
    assert Source.parse(f"{tmp_path}/lr=1e-4") == Source(tmp_path / "lr=1e-4")
    assert Source.parse(f"{tmp_path}/lr=1e-4=2") == Source(tmp_path / "lr=1e-4", 2.0)
    assert Source.parse("runs/lr=1e-4") == Source(Path("runs/lr"), 1e-4)
    assert Source.parse("runs/lr=high") == Source(Path("runs/lr=high"))
    assert Source.parse("runs/lr=high=2") == Source(Path("runs/lr=high"), 2.0)


def test_a_damaged_result_is_not_kept(
    runs: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = runs
    transfer = derived.transfer

    def write_and_damage(sink: CoreSink, *arguments: Any) -> dict[str, str]:
        digests = transfer(sink, *arguments)
        (path,) = sink.paths()
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
        return digests

    monkeypatch.setattr(derived, "transfer", write_and_damage)
    with pytest.raises(Exception, match=r"does not hold what was written|checksum|cannot be read"):
        average([Source(root / "run1"), Source(root / "run2")], Output(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_converted_weights_load_and_averages_stay_behind(
    runs: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    root, weights = runs
    convert(root / "run1", tmp_path / "released")
    convert(tmp_path / "released", tmp_path / "back")
    found = load(tmp_path / "back")
    assert all(torch.equal(parameter, weights[0][name]) for name, parameter in found.items())
