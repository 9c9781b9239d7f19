"""Sampling inside a run: the whole model as one function, in layouts whose ranks each hold a part of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_shards import write_tiny_shards
from validation_worker import MODEL, Run

from megatron_video.generation import generate_latents
from megatron_video.scheduler import sigmas
from megatron_video.text import TextStates
from training.layout_matrix.table import LAYOUTS
from training.local_ranks import RankPool
from training.pipeline_forward import PipelineForward

pytestmark = pytest.mark.distributed
BY_NAME = {case.name: case for case in LAYOUTS}
NAMES = ("pp2", "pp2_vpp2", "pp4", "cp3_all_gather", "dp2_fsdp", "tp2_sp_pp2_cp2")
SHORT = ("pp2_vpp2", "tp2_sp_pp2_cp2", "dp2_fsdp")


def sample(parallel: dict[str, Any], shards: str) -> np.ndarray:
    """On a rank: latents of two prompts of unlike lengths, with guidance."""
    run = Run(parallel, shards, "float32", {})
    for chunk in run.model:
        chunk.eval()
    generator = torch.Generator().manual_seed(1)
    llm_width, clip_width = MODEL.caption_channels
    texts = [
        TextStates(
            torch.randn(tokens, llm_width, generator=generator), torch.randn(5, clip_width, generator=generator), 0, 0
        )
        for tokens in (4, 7, 2)
    ]
    noise = torch.randn(2, 3, MODEL.in_channels, 3, 5, generator=generator)
    with torch.no_grad():
        latents = generate_latents(PipelineForward(run.model), texts[:2], texts[2], noise, sigmas(4, 3.0), 4.0)
    assert not torch.allclose(latents, noise, atol=0.1)
    return latents.numpy()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_shards(tmp_path_factory.mktemp("shards"), {"1x48x48": 4}))


@pytest.fixture(scope="module")
def single(ranks: RankPool, shards: str) -> np.ndarray:
    return ranks.run(sample, {}, shards, ranks=1)[0]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHORT else (pytest.mark.heavy,)) for n in NAMES])
def test_every_rank_gets_the_latents_of_one_process(
    name: str, ranks: RankPool, shards: str, single: np.ndarray
) -> None:
    case = BY_NAME[name]
    for latents in ranks.run(sample, case.parallel, shards, ranks=case.ranks):
        np.testing.assert_allclose(latents, single, atol=1e-5)
