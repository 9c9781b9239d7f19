"""How many programs a kernel that loops over tokens is started with."""

from __future__ import annotations

from functools import lru_cache

import torch

# Triton's interpreter runs on the CPU, one program after the other: a few show that partial sums are added up.
_INTERPRETED_PROCESSORS = 2


def token_groups(tokens: int, device: torch.device, programs_per_processor: int, other_programs: int) -> int:
    """Groups into which the tokens are dealt, each with its own partial sums, so that the device is full but not more.

    Args:
        tokens: what is dealt.
        device: whose multiprocessors are counted.
        programs_per_processor: how many programs one multiprocessor should get in all.
        other_programs: programs per group, over the other axes of the grid.
    """
    wanted = programs_per_processor * _processors(device) // other_programs
    return max(1, min(tokens, wanted))


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
