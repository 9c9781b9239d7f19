"""`training.sample` on several ranks makes the videos of one process, in every layout of the model."""

from __future__ import annotations

import functools
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CAPTIONS, write_tiny_models

from megatron_video import parallel
from training import sample
from training.local_ranks import RankError, RankPool
from training.sample_latents import latent_file, read_latent

pytestmark = pytest.mark.distributed
# As in tests/unit/test_sample.py: sheets show three frames without loss.
ROUNDING = 1
# Two neighbouring numbers of bf16 are 1 / 128 apart at most, relative to their size.
BF16_STEP = 2**-7

TP2, PP2, CP2 = (f"--{name}-parallel-size=2" for name in ("tensor", "pipeline", "context"))
SP = "--sequence-parallel"
# name -> (ranks, options)
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "pp2_cp2": (4, [PP2, CP2]),
    "tp2_sp": (2, [TP2, SP]),
    "pp2": (2, [PP2]),
    "cp2": (2, [CP2]),
    "cp2_all_gather": (2, [CP2, "--cp-comm-type=all_gather"]),
    "tp2_cp2": (4, [TP2, CP2]),
    "tp2_sp_pp2_cp2": (8, [TP2, SP, PP2, CP2]),
    "tp2_batches_dp2": (4, [TP2, "--batch-size=2"]),
}
SHORT = ("pp2_cp2",)


def sample_on_ranks(arguments: list[str]) -> int:
    """On a rank: the command, but for the end of the process group, which is the pool's."""
    keep = functools.partial(parallel.destroy_parallel, keep_distributed=True)
    with patch.object(parallel, "destroy_parallel", keep):
        return sample.main(arguments)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_models(tmp_path_factory.mktemp("models"), CAPTIONS)


def command(models: Path, out: Path, *more: str) -> list[str]:
    inputs = {"checkpoint": "run", "vae": "vae", "text": "text", "prompts": "prompts.txt"}
    paths = [part for name, file in inputs.items() for part in (f"--{name}", str(models / file))]
    size = ["--frames", "17", "--height", "32", "--width", "48", "--steps", "3", "--guidance", "3"]
    return [*paths, *size, "--out", str(out), *more]


@pytest.fixture(scope="module")
def single(models: Path) -> Path:
    """What one process makes, with latents."""
    assert sample.main(command(models, models / "single", "--latents")) == 0
    return models / "single"


def sheets(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("0*_sheet.png"))]


def latents(folder: Path) -> torch.Tensor:
    return torch.stack([read_latent(latent_file(folder, index)).latent for index in range(len(CAPTIONS))]).float()


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHORT else (pytest.mark.heavy,)) for n in LAYOUTS])
def test_a_layout_makes_the_samples_of_one_process(
    name: str, ranks: RankPool, models: Path, single: Path, tmp_path: Path
) -> None:
    count, layout = LAYOUTS[name]
    out = tmp_path / "out"
    assert ranks.run(sample_on_ranks, command(models, out, "--latents", *layout), ranks=count) == [0] * count
    expected, actual = latents(single), latents(out)
    torch.testing.assert_close(actual, expected, rtol=BF16_STEP, atol=1e-5)
    # Rounded to bf16, all but a few numbers are the very same.
    assert (actual != expected).float().mean() < 0.01
    for alone, shared in zip(sheets(single), sheets(out), strict=True):
        assert np.abs(alone - shared).max() <= ROUNDING
    # Bounds that any two videos of these models would meet would show nothing.
    assert (expected[0] - expected[1]).abs().mean() > 0.1


def test_replicas_make_the_same_bytes(ranks: RankPool, models: Path, single: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert ranks.run(sample_on_ranks, command(models, out, "--latents"), ranks=2) == [0, 0]
    files = [
        path.name for path in sorted(single.iterdir()) if path.suffix in (".mp4", ".png", ".safetensors", ".jsonl")
    ]
    assert len(files) == 3 * len(CAPTIONS) + 3  # of all: sheet, listing, states of the empty caption
    for name in files:
        assert (out / name).read_bytes() == (single / name).read_bytes(), name
    # Both ranks decoded: each wrote an event file.
    assert len(list((out / "tensorboard").iterdir())) == 2


def test_a_replica_may_have_nothing_to_do(ranks: RankPool, models: Path, single: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert ranks.run(sample_on_ranks, command(models, out, "--latents", "--limit", "1"), ranks=2, timeout_seconds=60)
    assert latent_file(out, 0).read_bytes() == latent_file(single, 0).read_bytes()


def test_without_latents_the_writer_of_each_replica_decodes(ranks: RankPool, models: Path, tmp_path: Path) -> None:
    assert sample.main(command(models, tmp_path / "one")) == 0
    assert ranks.run(sample_on_ranks, command(models, tmp_path / "four", TP2, SP), ranks=4) == [0] * 4
    one, four = sheets(tmp_path / "one"), sheets(tmp_path / "four")
    assert len(one) == len(CAPTIONS)
    for alone, shared in zip(one, four, strict=True):
        assert np.abs(alone - shared).max() <= ROUNDING
    assert np.abs(one[0] - one[1]).mean() > 3
    assert len(list((tmp_path / "four" / "tensorboard").iterdir())) == 2


def test_what_the_writer_cannot_write_every_rank_says(ranks: RankPool, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sample.main(command(models, out, "--latents", "--limit", "1")) == 0
    latent_file(out, 1).mkdir()
    with pytest.raises(RankError) as failure:
        ranks.run(sample_on_ranks, command(models, out, "--latents", CP2), ranks=2)
    # Rank 1 did not wait for rank 0; it says what that said.
    assert "rank 1: Traceback" in str(failure.value)
    assert f"UserError: rank 0: IsADirectoryError: [Errno 21] Is a directory: '{out}" in str(failure.value)
    latent_file(out, 1).rmdir()
    assert ranks.run(sample_on_ranks, command(models, out, "--latents", CP2), ranks=2) == [0, 0]
