"""The shipped recipe over the demo clips: to shards that verify accepts, also when the run is killed on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from data_prep import cli, demo_clips
from data_prep.recipe import Run, plan
from megatron_video.cli import run_command
from megatron_video.shards import ShardDataset
from megatron_video.vae import VAEConfig, VideoVAE, save_vae
from training import build_text_encoders

RECIPE = Path(__file__).parents[2] / "data_prep" / "recipe_demo.yaml"
STARTED = "import sys; from data_prep.cli import main; sys.exit(main(sys.argv[1:]))"


def command(raw: Path, work: Path, *more: str) -> list[str]:
    return ["run", "--recipe", str(RECIPE), "--in", str(raw), "--work", str(work), "--workers", "1", *more]


def make_encoders(work: Path) -> None:
    """A Video-VAE and text encoders of the smallest width, where the recipe looks for them."""
    torch.manual_seed(0)
    widths = {"encoder_channels": 32, "decoder_channels": 32}
    steps = {"encoder_multipliers": (1, 1, 1, 1), "decoder_multipliers": (1, 1, 1, 1), "num_res_blocks": 1}
    save_vae(VideoVAE(VAEConfig(latent_channels=4, **widths, **steps)), work / "vae")
    filtered = str(work / "4-filter.parquet")
    assert build_text_encoders.main(["build", "--captions", filtered, "--out", str(work / "text")]) in (0, None)


def encode_command(work: Path, out: Path) -> list[str]:
    """What the recipe's encode stage runs, to another folder."""
    _, steps = plan(RECIPE, Run(source=work, work=work))
    return ["encode", "--in", str(steps[4].source), "--out", str(out), *steps[4].argv]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "report.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_shipped_recipe_makes_verified_shards_also_after_a_kill(tmp_path: Path) -> None:
    raw, work, killed = tmp_path / "raw", tmp_path / "work", tmp_path / "killed"
    demo_clips.make_demo_clips(raw, clips=24, seed=0)
    assert run_command(cli.main, command(raw, work, "--until", "filter")) == 0
    make_encoders(work)
    assert run_command(cli.main, command(raw, work)) == 0
    stages = json.loads((work / "report.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["ingest", "segment", "tag", "filter", "encode", "verify"]
    samples = stages[4]["report"]["kept"]
    assert stages[5]["report"]["samples"] == samples == len(ShardDataset(work / "5-encode")) > 20
    assert stages[5]["report"]["faults"] == []
    # Tasks of an array, one of which has nothing to do; the last one finishes the folder.
    shards = len(list((work / "5-encode").glob("*.tar")))
    assert shards > 2
    for index in (1, shards, *range(2, shards), 0):
        assert not (tmp_path / "array" / "dataset_info.json").exists()
        share = ["--shard", f"{index}/{shards + 1}"]
        assert run_command(cli.main, [*encode_command(work, tmp_path / "array"), *share]) == 0
    assert contents(tmp_path / "array") == contents(work / "5-encode")
    # The same encoders in another work folder, and a run that is killed when its first shard is there.
    killed.mkdir()
    for name in ("vae", "text"):
        (killed / name).symlink_to(work / name)
    with subprocess.Popen([sys.executable, "-c", STARTED, *command(raw, killed)], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline and not list(killed.glob("5-encode/*.tar")):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert run_command(cli.main, command(raw, killed)) == 0
    assert contents(killed / "5-encode") == contents(work / "5-encode")
    for name in ("1-ingest", "2-segment", "3-tag", "4-filter"):
        assert (killed / f"{name}.parquet").read_bytes() == (work / f"{name}.parquet").read_bytes()
