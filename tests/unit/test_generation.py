"""Guided generation with the real model: rows of a batch are independent, and guidance is the formula."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import CAPTIONS, LATENT_CHANNELS, MODEL, write_tiny_run, write_tiny_text_encoders

from megatron_video import device
from megatron_video.dit import VideoDiT, build_dit
from megatron_video.generation import generate_latents, velocity_function
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel
from megatron_video.sampler import guide, sample_latents
from megatron_video.scheduler import sigmas
from megatron_video.text import TextEncoders, TextStates, text_folders
from training.checkpoint import find_checkpoint, load_model_weights

TIMES = sigmas(3, 13.0)
NOISE = torch.randn(3, 3, LATENT_CHANNELS, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VideoDiT]:
    run, parallel = write_tiny_run(tmp_path_factory.mktemp("run")), ParallelConfig()
    initialize_parallel(parallel, seed=0, device_info=device.initialize())
    (model,) = build_dit(MODEL, parallel, torch.float32, device=torch.device("cpu"), init_seed=None)
    load_model_weights(find_checkpoint(run), [model])
    yield model.eval()
    destroy_parallel()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[TextStates]:
    folder: Path = write_tiny_text_encoders(tmp_path_factory.mktemp("text"))
    encoders = TextEncoders.load(*text_folders(folder), "cpu", torch.float32)
    return encoders.encode([*CAPTIONS, ""])


def test_a_row_does_not_depend_on_its_batch(model: VideoDiT, states: list[TextStates]) -> None:
    """Captions have different lengths, so this also says that padding is not seen."""
    *prompts, null = states
    together = generate_latents(model, prompts, null, NOISE, TIMES, 3.0)
    for row, prompt in enumerate(prompts):
        alone = generate_latents(model, [prompt], null, NOISE[row : row + 1], TIMES, 3.0)
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=5e-5)


def test_guidance_mixes_the_model_with_and_without_the_caption(model: VideoDiT, states: list[TextStates]) -> None:
    prompt, null = states[0], states[-1]
    with_caption, without = (velocity_function(model, [text], null) for text in (prompt, null))
    expected = sample_latents(lambda x, t: guide(with_caption(x, t), without(x, t), 4.0), NOISE[:1], TIMES, 1.0)
    actual = generate_latents(model, [prompt], null, NOISE[:1], TIMES, 4.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)
    unguided = generate_latents(model, [prompt], null, NOISE[:1], TIMES, 1.0)
    assert (actual - unguided).abs().mean() > 0.01
