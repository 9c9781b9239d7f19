"""The device that a stage's networks run on, as the user names it."""

from __future__ import annotations

import torch

from megatron_video.errors import UserError


def find_device(name: str) -> torch.device:
    """The device called "cpu", "cuda" or "cuda:N".

    Raises:
        UserError: no such device on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is none of cpu, cuda and cuda:0, cuda:1, ...")
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"--device {name}: torch sees {gpus} CUDA GPUs on this machine; use --device cpu")
    return device
