"""`training.sample` on several ranks makes the videos of one process."""

from __future__ import annotations

import functools
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image
from tiny_models import CAPTIONS, write_tiny_run, write_tiny_text_encoders, write_tiny_vae

from megatron_video import parallel
from training import sample
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed
# As in tests/unit/test_sample.py: sheets show three frames without loss.
ROUNDING = 1


def sample_on_ranks(arguments: list[str]) -> int:
    """On a rank: the command, but for the end of the process group, which is the pool's."""
    keep = functools.partial(parallel.destroy_parallel, keep_distributed=True)
    with patch.object(parallel, "destroy_parallel", keep):
        return sample.main(arguments)


def sheets(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("0*_sheet.png"))]


def test_two_replicas_of_two_tensor_parallel_ranks_share_three_prompts(ranks: RankPool, tmp_path: Path) -> None:
    models = {"vae": write_tiny_vae(tmp_path), "text": write_tiny_text_encoders(tmp_path)}
    models |= {"checkpoint": write_tiny_run(tmp_path), "prompts": tmp_path / "captions.txt"}
    inputs = [part for name, path in models.items() for part in (f"--{name}", str(path))]
    size = ["--frames", "17", "--height", "32", "--width", "48", "--steps", "3", "--guidance", "3"]
    command = [*inputs, *size, "--out"]
    assert sample.main([*command, str(tmp_path / "one")]) == 0
    layout = ["--tensor-parallel-size", "2", "--sequence-parallel"]
    assert ranks.run(sample_on_ranks, [*command, str(tmp_path / "four"), *layout], ranks=4) == [0] * 4
    one, four = sheets(tmp_path / "one"), sheets(tmp_path / "four")
    assert len(one) == len(CAPTIONS)
    for alone, shared in zip(one, four, strict=True):
        assert np.abs(alone - shared).max() <= ROUNDING
    # Bounds that any two videos of these models would meet would show nothing.
    assert np.abs(one[0] - one[1]).mean() > 3
