"""`training.pretrain` with faults planted as FAULTS says: run it under torchrun in place of the module.

FAULTS, in the environment, is a JSON list of objects: `kind` (a name of KINDS), `rank` (null for all), `step` (data
step, from 0, whose batch is being built when it strikes), `last` (last such step, for kinds that strike again and
again; without it the fault strikes once in the whole run, over all restarts) and the kind's own values. Product code
knows nothing of it. The kind `slow_forward` needs no step: `rank`'s forward passes `after` so many
take `seconds` more.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_video.cli import run_command
from training import train_step
from training.data import Batch, StepBatches, StepData
from training.pretrain import main

Fault = dict[str, Any]


def sleep(data: StepData, fault: Fault) -> StepData:
    """The loader takes `seconds` more."""
    time.sleep(fault["seconds"])
    return data


def send(data: StepData, fault: Fault) -> StepData:
    """The process, or the loader's worker if that builds the batch, gets `signal`."""
    os.kill(os.getpid(), signal.Signals[fault["signal"]])
    # A signal to oneself may be handled by another thread.
    time.sleep(1)
    return data


def scale(data: StepData, fault: Fault) -> StepData:
    """What is to be predicted is `factor` times too large; NaN makes the loss NaN."""
    return replace(data, batches=[_scaled(batch, float(fault["factor"])) for batch in data.batches])


def _scaled(batch: Batch, factor: float) -> Batch:
    return replace(batch, target=batch.target * factor)


KINDS: dict[str, Callable[[StepData, Fault], StepData]] = {"sleep": sleep, "send": send, "scale": scale}


def slow_down_forward(seconds: float, after: int = 0) -> None:
    """Every forward pass of this rank, or every one `after` so many, takes `seconds` more."""
    forward, passes = train_step.forward_step, itertools.count()

    def forward_slowly(*args: Any, **kwargs: Any) -> Any:
        if next(passes) >= after:
            time.sleep(seconds)
        return forward(*args, **kwargs)

    train_step.forward_step = forward_slowly


def strikes(fault: Fault, step: int) -> bool:
    if int(os.environ["RANK"]) != fault["rank"] and fault["rank"] is not None:
        return False
    if "last" in fault:
        return bool(fault["step"] <= step <= fault["last"])
    if step != fault["step"]:
        return False
    mark = Path(os.environ["FAULT_MARKS"]) / f"{fault['kind']}_{fault['rank']}_{step}"
    if mark.exists():
        return False
    # Before the fault: afterwards there may be nobody left to write it.
    mark.touch()
    return True


def plant(faults: list[Fault]) -> None:
    for fault in faults:
        if fault["kind"] == "slow_forward" and fault["rank"] == int(os.environ["RANK"]):
            slow_down_forward(fault["seconds"], fault.get("after", 0))
    faults = [fault for fault in faults if fault["kind"] in KINDS]
    build = StepBatches.__getitem__

    def build_with_faults(self: StepBatches, step: int) -> StepData:
        data = build(self, step)
        for fault in faults:
            if strikes(fault, step):
                data = KINDS[fault["kind"]](data, fault)
        return data

    StepBatches.__getitem__ = build_with_faults  # type: ignore[method-assign]


if __name__ == "__main__":
    plant(json.loads(os.environ["FAULTS"]))
    sys.exit(run_command(main, sys.argv[1:]))
