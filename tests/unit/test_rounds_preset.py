"""The rounds of the demo learn from some captions and are judged by others."""

from __future__ import annotations

from pathlib import Path

from megatron_video.config_io import load_config
from training.alignment.rounds_config import PRESET_DIR, RoundsConfig
from training.sample_prompts import Prompt, read_prompts
from training.shape_ruler import parse_caption

ROOT = Path(__file__).parents[2]


def prompts(name: str) -> list[Prompt]:
    config = load_config(RoundsConfig, "demo", [], PRESET_DIR)
    return read_prompts(ROOT / getattr(config, name), 0)


def test_no_caption_and_no_noise_of_the_evaluation_is_learnt_from() -> None:
    learnt, judged = prompts("prompts"), prompts("evaluation_prompts")
    assert (len(learnt), len(judged)) == (64, 128)
    assert not {prompt.text for prompt in learnt} & {prompt.text for prompt in judged}
    assert len({(prompt.seed, prompt.noise_index) for prompt in [*learnt, *judged]}) == 64 + 128


def test_every_colour_and_direction_is_asked_for_often() -> None:
    for asked in (prompts("prompts"), prompts("evaluation_prompts")):
        requests = [parse_caption(prompt.text) for prompt in asked]
        for attribute in ("colour", "direction"):
            wanted = [getattr(request, attribute) for request in requests]
            assert min(wanted.count(value) for value in set(wanted)) * 8 >= len(wanted)
            assert len(set(wanted)) == 4
