"""Times, timesteps, guidance and Euler steps against the reference scheduler."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_video.sampler import euler_step, guide
from megatron_video.scheduler import sigmas

TOLERANCE = 5e-5
_SIGMAS = re.compile(r"s(\d+)_shift([0-9.]+)_rev([01])\.(sigmas|timesteps)")
# "step.*" was recorded with these; the JSON says so in words ("50 steps, shift 13, reverse=False, cfg 9").
_STEP_WORDS = re.compile(r"(\d+) steps, shift ([0-9.]+), reverse=False, cfg ([0-9.]+)")


def run(case: dict[str, Any], tensors: dict[str, Tensor], golden_dir: Path, name: str) -> None:
    """Compare every recorded schedule, and the recorded steps if there are any."""
    schedules = [(match, value) for key, value in tensors.items() if (match := _SIGMAS.fullmatch(key))]
    assert schedules, f"{name} holds no schedule"
    for match, recorded in schedules:
        steps, shift, reverse, what = match.groups()
        times = sigmas(int(steps), float(shift), reverse=reverse == "1")
        _close(times if what == "sigmas" else times[:-1], recorded, match.group())
    if "step.sample" in tensors:
        _steps(case, tensors)


def _steps(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    words = _STEP_WORDS.search(case["meaning"]["step.*"])
    assert words, f"step.* is described in unknown words: {case['meaning']['step.*']}"
    times = sigmas(int(words[1]), float(words[2]))
    velocity = guide(tensors["step.v_cond"], tensors["step.v_uncond"], float(words[3]))
    _close(velocity, tensors["step.v_guided"], "step.v_guided")
    state = tensors["step.sample"]
    for step, key in enumerate(("step.after_1", "step.after_2")):
        state = euler_step(state, velocity, times[step], times[step + 1])
        _close(state, tensors[key], key)


def _close(actual: Tensor, recorded: Tensor, what: str) -> None:
    torch.testing.assert_close(actual, recorded, rtol=0, atol=TOLERANCE, msg=lambda text: f"{what}: {text}")
