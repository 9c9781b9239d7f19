"""Runs that validate and make sample videos: records, pictures, other layouts, and that training does not notice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import write_tiny_text_encoders, write_tiny_vae
from tiny_shards import INFO, write_tiny_shards

from megatron_video.cli import run_command
from megatron_video.config_io import build_config, config_to_dict, load_config
from megatron_video.fingerprint import vae_fingerprint
from megatron_video.text import TextEncoders, text_fingerprint, text_folders
from training import pretrain, sample
from training.config import PretrainConfig
from training.local_ranks import RankPool
from training.pretrain import run_training

pytestmark = pytest.mark.distributed
STEPS = 4
PROMPTS = ["a red circle moves left", "蓝色方块向上移动", "a blue square moves up"]
SAMPLING = {"steps": 3, "guidance": 3.0, "time_shift": 2.0, "fps": 12.0}
# Contact sheets show three frames of a sample without loss; 1 is a pixel that was rounded otherwise.
ROUNDING = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkups")
    text, vae = write_tiny_text_encoders(root), write_tiny_vae(root)
    encoders = TextEncoders.load(*text_folders(text), torch.device("cpu"), torch.float32)
    llm_dim, clip_dim = encoders.widths
    info = replace(
        INFO,
        vae_fingerprint=vae_fingerprint(vae),
        text_fingerprint=text_fingerprint(*text_folders(text)),
        llm_dim=llm_dim,
        clip_dim=clip_dim,
        clip_tokens=len(encoders.encode([""])[0].clip),
    )
    write_tiny_shards(root / "shards", {"17x32x48": 9, "1x32x32": 9}, info=info)
    write_tiny_shards(root / "held_out", {"17x32x48": 3, "1x32x32": 3}, seed=1, source="other", info=info)
    (root / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return root


def configuration(folder: Path, name: str, *overrides: str) -> PretrainConfig:
    values: dict[str, Any] = {
        "run": {"output_dir": str(folder / name), "seed": 3},
        "model": config_to_dict(tiny_models.MODEL),
        "data": {"shards": [str(folder / "shards")], "micro_batch_size": 2, "global_batch_size": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1, "eps": 1e-4},
        "ema": {"decay": 0.5},
        "training": {"precision": "fp32", "steps": STEPS, "save_every": STEPS},
        "validation": {"every": 2, "shards": [str(folder / "held_out")], "micro_batch_size": 2, "time_quantiles": 3},
        "samples": {
            "every": STEPS,
            "prompts": str(folder / "prompts.txt"),
            "text": str(folder / "text"),
            "vae": str(folder / "vae"),
            **SAMPLING,
        },
    }
    build_config(PretrainConfig, values, origin="the test")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))  # JSON is YAML
    return load_config(PretrainConfig, path, overrides)


def train(config: PretrainConfig) -> int:
    """On a rank of a pool."""
    return run_training(config, keep_distributed=True)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    assert run_training(configuration(folder, "run")) == 0
    return folder / "run"


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def metrics(run_dir: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def sheets(folder: Path) -> list[np.ndarray]:
    found = [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("0*_sheet.png"))]
    assert len(found) == len(PROMPTS)
    return found


def test_losses_of_both_weights_at_every_quantile_and_bucket(run: Path) -> None:
    found = events(run, "validation")
    assert [event["step"] for event in found] == [2, 4]
    for event in found:
        assert event["quantiles"] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
        assert set(event["losses"]) == {"trained", "averaged"}
        for losses in event["losses"].values():
            assert set(losses["by_bucket"]) == {"17x32x48", "1x32x32"}
            assert len(losses["by_time"]) == 3
            # Positions: 3 frames of 2 x 3 against one of 2 x 2, in equally many samples.
            weights = {"17x32x48": 18, "1x32x32": 4}
            means = {bucket: np.mean(row) for bucket, row in losses["by_bucket"].items()}
            expected = sum(means[bucket] * weight for bucket, weight in weights.items()) / sum(weights.values())
            assert losses["loss"] == pytest.approx(expected)
    assert found[0]["losses"]["trained"] != found[1]["losses"]["trained"]


def test_samples_are_those_of_the_sample_command_with_the_averaged_weights(run: Path, folder: Path) -> None:
    made = run / "samples" / f"step_{STEPS:08d}"
    assert (made / "contact_sheet.png").is_file()
    lines = [json.loads(line) for line in (made / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    inputs = {"checkpoint": run, "vae": folder / "vae", "text": folder / "text", "prompts": folder / "prompts.txt"}
    inputs |= {"frames": 17, "height": 32, "width": 48, "out": folder / "again"} | SAMPLING
    for name, more in (("again", ["--ema"]), ("trained", [])):
        options = {**inputs, "out": folder / name}
        arguments = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        assert run_command(sample.main, [*arguments, *more]) == 0
    for ours, same, other in zip(sheets(made), sheets(folder / "again"), sheets(folder / "trained"), strict=True):
        assert np.abs(ours - same).max() <= ROUNDING
        assert np.abs(ours - other).max() > ROUNDING


def test_tensorboard_has_curves_and_moving_pictures(run: Path) -> None:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    samples = [name for name in tags["images"] if name.startswith("samples/")]
    assert samples == ["samples/00000", "samples/00001", "samples/00002"]
    assert board.Images("samples/00001")[0].step == STEPS
    for weights in ("trained", "averaged"):
        assert [point.step for point in board.Scalars(f"validation/{weights}")] == [2, 4]
        assert f"validation_by_time_{weights}/quantile_03" in tags["scalars"]
        assert f"validation_by_bucket_{weights}/1x32x32" in tags["scalars"]


def test_training_does_not_notice(run: Path, folder: Path) -> None:
    assert run_training(configuration(folder, "plain", "validation.every=0", "samples.every=0")) == 0
    assert metrics(folder / "plain") == metrics(run)


def test_two_replicas_of_two_stages_make_the_same(run: Path, folder: Path) -> None:
    layout = ["parallel.pipeline_model_parallel_size=2", "parallel.use_distributed_optimizer=true"]
    config = configuration(folder, "stages", *layout)
    with RankPool(4, "cpu") as pool:
        assert pool.run(train, config) == [0] * 4
    for ours, single in zip(events(folder / "stages", "validation"), events(run, "validation"), strict=True):
        for weights in ("trained", "averaged"):
            assert ours["losses"][weights]["by_time"] == pytest.approx(single["losses"][weights]["by_time"], rel=1e-5)
    place = Path("samples") / f"step_{STEPS:08d}"
    for ours, single in zip(sheets(folder / "stages" / place), sheets(run / place), strict=True):
        assert np.abs(ours - single).max() <= ROUNDING


def test_the_encoders_are_needed_once(run: Path, folder: Path) -> None:
    """A longer run goes on after they are gone, and a set of samples that is there is not made again."""
    place = run / "samples" / f"step_{STEPS:08d}"
    before = (place / "00000.mp4").stat().st_mtime_ns
    (folder / "text").rename(folder / "elsewhere")
    try:
        longer = configuration(folder, "run", f"training.steps={STEPS + 1}", "samples.limit=3")
        assert run_training(longer) == 0
    finally:
        (folder / "elsewhere").rename(folder / "text")
    assert (run / "samples" / f"step_{STEPS + 1:08d}" / "contact_sheet.png").is_file()
    assert (place / "00000.mp4").stat().st_mtime_ns == before


def test_the_next_life_makes_up_for_what_a_kill_cut_off(run: Path, folder: Path) -> None:
    """As if killed while the second of three samples was made, after the last step and its checkpoint."""
    cut = folder / "cut"
    shutil.copytree(run, cut, ignore=shutil.ignore_patterns("step_00000005"))
    (cut / "checkpoints" / "latest").write_text(f"step_{STEPS:08d}\n")
    lines = (cut / "events.jsonl").read_text().splitlines(keepends=True)
    is_cut = [json.loads(line)["event"] in ("validation", "samples") for line in lines]
    (cut / "events.jsonl").write_text("".join(line for line, gone in zip(lines, is_cut, strict=True) if not gone))
    samples = cut / "samples" / f"step_{STEPS:08d}"
    for name in ("00001.mp4", "00002.mp4", "contact_sheet.png"):
        (samples / name).unlink()
    before = (samples / "00000.mp4").stat().st_mtime_ns
    assert run_training(configuration(folder, "cut")) == 0
    assert (samples / "contact_sheet.png").is_file()
    assert (samples / "00000.mp4").stat().st_mtime_ns == before
    for ours, first in zip(sheets(samples), sheets(run / "samples" / samples.name), strict=True):
        assert np.abs(ours - first).max() <= ROUNDING
    (again,) = events(cut, "validation")
    assert again["losses"] == next(event for event in events(run, "validation") if event["step"] == STEPS)["losses"]
    # And only once.
    assert run_training(configuration(folder, "cut")) == 0
    assert len(events(cut, "validation")) == len(events(cut, "samples")) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("validation.shards=[{folder}/shards]", "of their source videos are in data.shards too"),
        ("validation.shards=[]", "every=2 needs shards"),
        ("samples.vae=null", "needs vae"),
        ("samples.vae={folder}/other_vae", "is not the VAE that data.shards were encoded with"),
        ("samples.text={folder}/nothing", "holds no text encoders"),
        ("samples.size=16x32x48", "frames=16"),
        ("samples.prompts={folder}/nothing.txt", "nothing.txt"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    if "other_vae" in override and not (folder / "other_vae").exists():
        (folder / "other_vae").mkdir()
        (folder / "other_vae" / "model.safetensors").write_bytes(b"others")
    configuration(folder, "refused")
    path = folder / "refused.json"
    (folder / "nothing").mkdir(exist_ok=True)
    arguments = ["--config", str(path), override.format(folder=folder)]
    assert run_command(pretrain.main, arguments) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "refused" / "metrics.jsonl").exists()
