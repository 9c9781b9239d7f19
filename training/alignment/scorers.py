"""What gives a generated video a number: a table of rewards, and how a user's own joins it.

A scorer is called with every sample once and returns a finite number, larger for better. `package.module:name` names
any such function that Python can import, `reward:FOLDER` a reward model of `megatron-video dpo reward`,
`ratings:FILE[,FILE]` what people said.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_video.errors import UserError
from megatron_video.video_io import read_frames
from training.alignment.generated import Generated, Sample
from training.shape_ruler import observe, parse_caption

Scorer = Callable[[Sample], float]


class UnratedError(UserError):
    """Nobody rated this sample."""


def shape_motion(sample: Sample) -> float:
    """Fast, smooth motion of a large shape: distance covered, in shares of the side, times the root of its area.

    By the ruler of `megatron-video measure`. Flow is summed from frame to frame, so that motion back and forth counts
    for nothing; a video that shows no shape scores 0.
    """
    seen = observe(read_frames(sample.file))
    return float(np.hypot(*seen.flow)) * math.sqrt(seen.foreground_area)


def shape_as_asked(sample: Sample) -> float:
    """Share of colour and direction that are as the prompt asks, by the ruler of `megatron-video measure`."""
    asked, seen = parse_caption(sample.prompt), observe(read_frames(sample.file))
    wanted = [(asked.colour, seen.colour), (asked.direction, seen.direction)]
    right = [wish == found for wish, found in wanted if wish is not None]
    return sum(right) / len(right) if right else 0.0


def brightness(sample: Sample) -> float:
    """Mean of all pixels in [0, 1]: a reward anyone can check by eye."""
    return float(read_frames(sample.file).mean()) / 255


def learned_reward(folder: Path, generated: Generated) -> Scorer:
    """The reward that a model of `megatron-video dpo reward` gives to latents, or to features of the DiT.

    Raises:
        UserError: no such model, one of other encoders than the samples', or there are no features of them.
    """
    # Here: other scorers do without torch.
    import torch

    from training.alignment.feature_latents import SampleLatents
    from training.alignment.features import find_features
    from training.alignment.reward import check_encoders
    from training.alignment.reward_model import load_reward_model
    from training.sample_latents import read_latent

    model = load_reward_model(folder)
    config, files = model.config, None
    check_encoders(model, folder, generated.settings["vae"], generated.settings["text"])
    if config.features is not None:
        files = find_features(config.features, config.feature_model, SampleLatents(generated), [])

    @torch.no_grad()
    def score(sample: Sample) -> float:
        latent = features = None
        if files is not None:
            features, llm, clip = (tensor.flatten(1) for tensor in files.read([sample.index]))
        if config.latents:
            latent, *text = (tensor.float() for tensor in read_latent(sample.latent_file))
            latent, llm, clip = latent[None], *(states.mean(0)[None] for states in text)
        return float(model(latent, llm, clip, features))

    return score


# name -> scorer
SCORERS: dict[str, Scorer] = {
    "shape_motion": shape_motion,
    "shape_as_asked": shape_as_asked,
    "brightness": brightness,
}


def find_scorer(name: str, generated: Generated) -> Scorer:
    """A scorer of the table, a reward model, or a function that `package.module:name` names.

    Raises:
        UserError: none of these, or a reward model of other encoders than the samples'.
    """
    if name in SCORERS:
        return SCORERS[name]
    module, colon, attribute = name.partition(":")
    if module == "reward" and colon:
        return learned_reward(Path(attribute), generated)
    if module == "ratings" and colon:
        from training.alignment.rating.strength import rating_scorer

        return rating_scorer(rating_files(attribute), generated)
    if not colon:
        raise UserError(
            f"--with {name}: known are {', '.join(SCORERS)}; your own is package.module:function, "
            "a model reward:FOLDER, people's ratings:FILE"
        )
    try:
        scorer: Scorer = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--with {name}: cannot be imported: {error}") from None
    if not callable(scorer):
        raise UserError(f"--with {name}: is not a function, but {scorer!r}")
    return scorer


def rating_files(given: str) -> list[Path]:
    """The files of `ratings:FILE,FILE`."""
    return [Path(name) for name in given.split(",")]


def scorer_label(name: str) -> str:
    """What a file of scores calls a scorer: files of ratings grow, so their content is part of the name."""
    kind, _, given = name.partition(":")
    if kind != "ratings":
        return name
    contents = b"".join(path.read_bytes() for path in rating_files(given))
    return f"{name} ({hashlib.blake2b(contents, digest_size=4).hexdigest()})"
