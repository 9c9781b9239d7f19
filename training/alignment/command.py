"""`megatron-video dpo STEP`: a table of the steps of the loop, each a module with `main(argv)`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from megatron_video.cli import run_command
from megatron_video.errors import UserError

# step -> (module, one line of help), in the order of the loop
STEPS: dict[str, tuple[str, str]] = {
    "generate": (
        "training.alignment.generate",
        "prompts x seeds -> videos with their latents (torchrun for several ranks)",
    ),
    "score": ("training.alignment.score", "a number for every video: rewards, your own function, a reward model"),
    "rate": ("training.alignment.rating.rate", "a local web page: people compare videos, two at a time"),
    "agreement": ("training.alignment.rating.agreement", "how far raters agree, with each other and with themselves"),
    "pair": ("training.alignment.pair", "scored videos -> shards of preference pairs, with statistics"),
    "features": (
        "training.alignment.features",
        "what the DiT makes of latents, for a reward model (torchrun for several ranks)",
    ),
    "reward": ("training.alignment.reward", "train a reward model on pairs, validated on held-out prompts"),
    "train": ("training.dpo", "train on the pairs (torchrun for several ranks)"),
    "win-rate": (
        "training.alignment.win_rate",
        "two models on the same prompts and noise: how often one beats the other",
    ),
    "rounds": ("training.alignment.rounds", "generate, score, pair, train, judge, again and again, from one YAML file"),
}


def main(argv: Sequence[str]) -> int | None:
    """Dispatch to the step named first."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] not in STEPS:
        raise UserError(f"unknown step {argv[0]!r} of `megatron-video dpo`; steps: {', '.join(STEPS)}")
    code: int | None = importlib.import_module(STEPS[argv[0]][0]).main(argv[1:])
    return code


def _usage() -> str:
    width = max(map(len, STEPS))
    lines = [f"  {name:<{width}}  {help_line}" for name, (_, help_line) in STEPS.items()]
    return "\n".join(
        ["usage: megatron-video dpo STEP ...", "", *lines, "", "megatron-video dpo STEP --help tells more."]
    )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
