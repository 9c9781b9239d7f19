"""Moving averages reconstructed from a real run's checkpoints, against the one that the run kept and torch's."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_shards import CLIP_DIM, LATENT_CHANNELS, LLM_DIM, write_tiny_shards
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from checkpoints_tools.cli import main
from checkpoints_tools.convert import convert
from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.ema_profiles import power_profile
from checkpoints_tools.weights import Weights
from megatron_video.cli import run_command
from megatron_video.config_io import build_config
from training.checkpoint import step_folder
from training.config import PretrainConfig
from training.pretrain import run_training

STEPS, DECAY = 12, 0.8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint after every step, and the average that it kept."""
    folder = tmp_path_factory.mktemp("reconstruct")
    values = {
        "run": {"output_dir": str(folder / "run")},
        "model": {
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "caption_channels": [LLM_DIM, CLIP_DIM],
        },
        "data": {
            "shards": [str(write_tiny_shards(folder / "shards", {"1x48x48": 8}))],
            "micro_batch_size": 2,
            "global_batch_size": 2,
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "decay": "constant"},
        "ema": {"decay": DECAY},
        "training": {
            "precision": "fp32",
            "steps": STEPS,
            "save_every": 1,
            "save_initial": True,
            "keep_checkpoints": 0,
        },
    }
    assert run_training(build_config(PretrainConfig, values, origin="the test")) == 0
    return folder / "run"


def average(sources: Sequence[Path], out: Path, *options: str) -> int:
    return run_command(main, ["average", *map(str, sources), "--out", str(out), *options])


def steps_of(run: Path, every: int = 1) -> list[Path]:
    return [step_folder(run, step) for step in range(0, STEPS + 1, every)]


def distance(first: Weights, second: Callable[[str], Tensor]) -> float:
    squares = [(first.tensor(name).double() - second(name).double()).square().sum() for name in first.templates]
    return float(torch.stack(squares).sum().sqrt())


def test_every_step_gives_the_average_that_the_run_kept_and_fewer_come_near(run: Path, tmp_path: Path) -> None:
    truth = CoreCheckpoint(step_folder(run, STEPS), averaged=True)
    scale = distance(CoreCheckpoint(step_folder(run, STEPS)), truth.tensor)
    errors = []
    for every in (1, 2, 4):
        # In any order: it follows from the recorded steps.
        sources = steps_of(run, every)[::-1]
        assert average(sources, tmp_path / f"every{every}", "--ema-decay", str(DECAY)) == 0
        errors.append(distance(CoreCheckpoint(tmp_path / f"every{every}"), truth.tensor) / scale)
    assert errors[0] < 1e-6
    assert sorted(errors) == errors
    assert errors[1] < 0.1
    record = json.loads((tmp_path / "every4" / "average.json").read_text())
    assert [source["step"] for source in record["sources"]] == [0, 4, 8, 12]
    assert sum(source["share"] for source in record["sources"]) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["decay", "width"])
def test_other_lengths_from_the_kept_averages(run: Path, tmp_path: Path, kind: str) -> None:
    weights = [CoreCheckpoint(folder) for folder in steps_of(run)]

    shares = power_profile(0.15, STEPS)

    def truth(name: str) -> Tensor:
        values = [checkpoint.tensor(name).double() for checkpoint in weights]
        if kind == "width":
            return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum(0)
        mean = values[0]
        for value in values[1:]:
            mean = 0.9 * mean + 0.1 * value
        return mean

    options = ["--ema", *(("--ema-decay", "0.9") if kind == "decay" else ("--ema-width", "0.15"))]
    scale = distance(weights[-1], truth)
    errors = []
    for every in (1, 2, 4):
        assert average(steps_of(run, every), tmp_path / f"every{every}", *options, "--tolerance", "1") == 0
        errors.append(distance(CoreCheckpoint(tmp_path / f"every{every}"), truth) / scale)
    assert errors[0] < 1e-5
    assert sorted(errors) == errors
    residuals = [json.loads((tmp_path / f"every{n}" / "average.json").read_text())["residual"] for n in (1, 2, 4)]
    assert sorted(residuals) == residuals
    assert residuals[0] < 1e-5


def test_the_plain_mean_is_that_of_torchs_averaged_model(run: Path, tmp_path: Path) -> None:
    sources = steps_of(run, 4)
    assert average(sources, tmp_path / "mean") == 0
    found = CoreCheckpoint(tmp_path / "mean")
    module = torch.nn.ParameterDict({name.replace(".", "/"): found.tensor(name) for name in found.templates})
    averaged = AveragedModel(copy.deepcopy(module))
    for source in map(CoreCheckpoint, sources):
        for name in found.templates:
            module[name.replace(".", "/")].data.copy_(source.tensor(name))
        averaged.update_parameters(module)
    expected = dict(averaged.module.named_parameters())
    for name in found.templates:
        torch.testing.assert_close(found.tensor(name), expected[name.replace(".", "/")].data, rtol=1e-6, atol=1e-7)


def test_sources_may_be_of_any_form(run: Path, tmp_path: Path) -> None:
    convert(step_folder(run, 4), tmp_path / "released")
    assert average([tmp_path / "released", step_folder(run, 8)], tmp_path / "mixed") == 0
    assert average([step_folder(run, 4), step_folder(run, 8)], tmp_path / "core", "--to", "released") == 0
    assert run_command(main, ["diff", str(tmp_path / "mixed"), str(tmp_path / "core")]) == 0


@pytest.fixture
def others(run: Path, tmp_path: Path) -> dict[str, Path]:
    """Checkpoints that do not belong to the run's others, by what is wrong with them."""
    convert(step_folder(run, 4), tmp_path / "released")
    shutil.copytree(step_folder(run, 8), tmp_path / "copy" / "step_00000008")
    other = shutil.copytree(step_folder(run, 4), tmp_path / "other" / "step_00000004")
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["ema"]["decay"] = 0.5
    text = yaml.safe_dump(config)
    # A file of another size would be taken for damage.
    size = (other / "config.yaml").stat().st_size
    (other / "config.yaml").write_text(text + "#" * (size - len(text)))
    return {"released": tmp_path / "released", "copy": tmp_path / "copy", "decay": other}


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (["released", 8], ["--ema-decay", "0.8"], "does not say after which step"),
        (["copy", 8], ["--ema-decay", "0.8"], "are both after update 8"),
        (["decay", 8], ["--ema", "--ema-decay", "0.8"], "ema.decay=0.8"),
        (["released", 8], ["--ema"], "only those keep averages"),
        ([4, 8], ["--ema-decay", "1"], "must lie between 0 and 1"),
        ([4, 8], ["--ema-width", "0.5"], "relative width 0.5 must lie between"),
        ([8, 12], ["--ema-decay", "0.9"], "59% of the wanted average lie before the first checkpoint"),
        ([0, 12], ["--ema", "--ema-decay", "0.5"], "misses"),
        (["4=2", 8], ["--ema-decay", "0.9"], "leave the =WEIGHT"),
        ([4, 8], ["--ema-decay", "0.9", "--tolerance", "1.5"], "--tolerance 1.5 is a share"),
        ([4, 8], ["--tolerance", "0.5"], "a mean leaves nothing open"),
    ],
)
def test_what_gives_no_moving_average_is_refused(
    run: Path,
    others: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sources: list[str | int],
    options: list[str],
    message: str,
) -> None:
    weighted = {"4=2": Path(f"{step_folder(run, 4)}=2")}
    paths = [step_folder(run, each) if isinstance(each, int) else (others | weighted)[each] for each in sources]
    assert average(paths, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_on_other_data_have_no_common_average(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from checkpoints_tools import reconstruct

    read = reconstruct.read_state
    plans = itertools.count()

    def other_plan(folder: Path) -> object:
        state = read(folder)
        state.data_plan = {"seed": next(plans)}
        return state

    monkeypatch.setattr(reconstruct, "read_state", other_plan)
    assert average(steps_of(run, 6), tmp_path / "out", "--ema-decay", "0.8") == 2
    assert "runs on other data" in capsys.readouterr().err


def test_a_dry_run_shows_shares_and_errors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ema", "--ema-width", "0.15", "--dry-run"]
    assert average(steps_of(run, 4), tmp_path / "out", *options) == 0
    told = capsys.readouterr().out
    assert "of the wanted profile is out of reach" in told
    assert "would be written" in told
    assert average(steps_of(run)[4:], tmp_path / "out", "--ema-decay", "0.8", "--json", "--dry-run") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["before_first"] == pytest.approx(0.8**9)
    assert np.sum([source["share"] for source in report["sources"]]) == pytest.approx(1)
    assert not list(tmp_path.iterdir())
