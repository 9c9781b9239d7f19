"""Another type for a tensor, refused where values would change and nobody said that they may."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from checkpoints_tools.weights import is_finite
from megatron_video.errors import UserError


def checked_cast(tensor: Tensor, dtype: torch.dtype, name: str, where: str, allow_lossy: Sequence[str]) -> Tensor:
    """The tensor in another type, with the values that it had.

    Args:
        tensor: of finite values.
        dtype: to cast to.
        name: ours, of the parameter.
        where: file or folder and stored name, for messages.
        allow_lossy: patterns of the names of parameters whose values may be rounded.

    Raises:
        UserError: values change that may not, or become infinite.
    """
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    what = f"{where} ({_name(tensor.dtype)}) as {_name(dtype)}"
    if not is_finite(cast):
        raise UserError(f"{what}: its largest value {float(tensor.abs().max()):.4g} becomes infinite")
    if any(fnmatchcase(name, pattern) for pattern in allow_lossy):
        return cast
    if changed := int((cast.to(tensor.dtype) != tensor).sum()):
        raise UserError(
            f"{what} changes {changed} of {tensor.numel()} values; --allow-lossy '{name}' permits it for this tensor, "
            "--allow-lossy '*' for all"
        )
    return cast


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
