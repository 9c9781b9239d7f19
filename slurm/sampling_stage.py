"""Whether a stage that samples gets ranks for whole copies of the model."""

from __future__ import annotations

import math

from slurm.ask_command import given
from slurm.chain import ChainStage

# Options whose product is the ranks of a copy, and the commands that have them.
_SIZES = ("--tensor-parallel-size", "--pipeline-parallel-size", "--context-parallel-size")
_COMMANDS = (["sample"], ["dpo", "generate"], ["dpo", "features"])


def copy_problems(stage: ChainStage) -> list[str]:
    """Why the ranks of a stage hold no whole copies of the model; [] if they do, or if it does not sample."""
    if not any(stage.command[: len(words)] == words for words in _COMMANDS):
        return []
    sizes = {option: given(option, stage.command) or "1" for option in _SIZES}
    wrong = [f"{option} {size}: not a number above 0" for option, size in sizes.items() if not size.isdecimal()]
    copy, ranks = math.prod(int(size) for size in sizes.values() if size.isdecimal()), stage.nodes * (stage.ranks or 1)
    if not wrong and (copy < 1 or ranks % copy):
        asked = ", ".join(f"{option} {size}" for option, size in sizes.items() if size != "1")
        said = f"nodes={stage.nodes} x ranks={stage.ranks}" if stage.ranks else "no ranks, so one process"
        wrong = [f"{asked}: a copy of the model takes {copy} ranks, which do not divide {ranks} ({said})"]
    return wrong
