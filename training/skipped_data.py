"""Data that a run leaves out: windows of data steps, so that step k trains on the k-th data step that is in none.

The order of the data stays what it was; only the numbers move. The windows are kept in the training state, so a resume,
on any number of ranks, goes on with the same data.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import Dataset

from megatron_video.errors import UserError
from training.data import StepData

Windows = Sequence[Sequence[int]]


def data_step(step: int, skipped: Windows) -> int:
    """The data step that training step `step` uses, both from 0; `skipped`: windows [first, end) of data steps."""
    for first, end in merged(skipped):
        if step < first:
            break
        # Windows lie in order, so each one met moves this and all later data.
        step += end - first
    return step


def merged(windows: Windows) -> list[tuple[int, int]]:
    """The same windows in order, those that touch or overlap as one."""
    found: list[tuple[int, int]] = []
    for first, end in sorted((int(first), int(end)) for first, end in windows):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((first, end))
    return found


def add_windows(wanted: Windows, skipped: Windows, step: int) -> list[list[int]]:
    """`skipped` with the `wanted` windows, before training step `step`, from 0.

    Raises:
        UserError: a window that is not yet left out begins in data that was trained on: all data after it would move.
    """
    position = data_step(step, skipped)
    known = merged(skipped)
    for first, end in wanted:
        inside = any(start <= first and end <= stop for start, stop in known)
        if not inside and first < position:
            raise UserError(
                f"faults.skip_data_steps=[{first}, {end}] begins before data step {position}, where the run stands; "
                f"windows can be left out from there on"
            )
    return [list(window) for window in merged([*skipped, *wanted])]


class RemainingSteps(Dataset[StepData]):
    """Item k: the data of training step k, taken from `steps` with the windows left out."""

    def __init__(self, steps: Dataset[StepData], skipped: Windows) -> None:
        self.steps, self.skipped = steps, [list(window) for window in skipped]

    def __getitem__(self, step: int) -> StepData:
        return self.steps[data_step(step, self.skipped)]
