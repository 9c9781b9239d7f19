"""Figures of one tensor, and of the difference of two, summed in fp64 over blocks that take little memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Values at a time: 32 MiB in fp64.
_BLOCK = 1 << 22
# Floating-point types whose bits, as integers of this type, are in the order of the values (for each sign).
_BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorStats:
    """Norm (L2), mean, standard deviation (of the population), extrema and zeros of the values that are finite."""

    norm: float | None
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    zeros: float | None
    """Share of all values; like the others, None where there is nothing to measure."""
    nan: int
    inf: int


def measure(tensor: Tensor) -> TensorStats:
    """The figures of a tensor of any real type."""
    nan = inf = count = zeros = 0
    mean = moment = squares = 0.0
    low, high = math.inf, -math.inf
    for block in _blocks(tensor):
        values = block.double()
        finite = torch.isfinite(values)
        if not finite.all():
            nan += int(torch.isnan(values).sum())
            inf += int(torch.isinf(values).sum())
            values = values[finite]
        if not values.numel():
            continue
        # Blocks are merged by their means (Chan et al. 1979): a difference of sums would lose small deviations.
        variance, centre = torch.var_mean(values, correction=0)
        shift, share = float(centre) - mean, values.numel() / (count + values.numel())
        moment += float(variance) * values.numel() + shift**2 * count * share
        mean += shift * share
        count += values.numel()
        squares += float(values.square().sum())
        zeros += values.numel() - int(values.count_nonzero())
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    if not count:
        return TensorStats(None, None, None, None, None, None, nan, inf)
    return TensorStats(math.sqrt(squares), mean, math.sqrt(moment / count), low, high, zeros / tensor.numel(), nan, inf)


@dataclass(frozen=True)
class Difference:
    """How far two tensors of one shape are apart."""

    values: int
    differing: int
    """Values whose bits differ (0 and -0 do); of tensors of two types, those that are not equal."""
    max_abs: float
    """Largest absolute difference; infinite where one is NaN or infinite and the other is not."""
    gap: float
    """L2 norm of the difference."""
    norm: float
    """L2 norm of the first tensor, of the second where the first is zero; without values that are not finite."""
    cosine: float | None
    """Of the angle between them; None where one is zero."""
    max_ulp: int | None
    """Most representable numbers between two values; None for other types than floating-point ones of one kind."""

    @property
    def relative(self) -> float:
        """Norm of the difference over that of the first tensor."""
        return relative(self.gap, self.norm)


def relative(gap: float, norm: float) -> float:
    """`gap` over `norm`, where there is a gap."""
    return 0.0 if gap == 0 else gap / norm if norm else math.inf


def compare(first: Tensor, second: Tensor) -> Difference:
    """The difference of two tensors of one shape; types may differ."""
    sums = torch.zeros(4, dtype=torch.float64)
    differing, largest, ulp = 0, 0.0, 0
    bits = _BITS.get(first.dtype) if first.dtype == second.dtype else None
    for a, b in zip(_blocks(first), _blocks(second), strict=True):
        # Conversions and copies are compared most: twenty times as fast.
        if (square := _square_if_same(a, b)) is not None:
            sums[1:] += square
            continue
        x, y, unequal = a.double(), b.double(), _unequal(a, b)
        if unequal.any():
            differing += int(unequal.sum())
            gap = torch.where(unequal & ~(x.isnan() & y.isnan()), x - y, 0.0)
            # NaN against a number: no distance is large enough.
            gap = gap.abs().nan_to_num(math.inf, math.inf)
            largest = max(largest, float(gap.max()))
            sums[0] += gap.square().sum()
            ulp = max(ulp, _ulp(a, b, bits, unequal) if bits is not None else 0)
        x, y = (torch.where(values.isfinite(), values, 0.0) for values in (x, y))
        sums[1:] += torch.stack([x.square().sum(), y.square().sum(), (x * y).sum()])
    gap_norm, norm, other = sums[:3].sqrt().tolist()
    cosine = max(-1.0, min(1.0, float(sums[3]) / norm / other)) if norm and other else None
    max_ulp = None if bits is None else ulp
    return Difference(first.numel(), differing, largest, gap_norm, norm or other, cosine, max_ulp)


def _square_if_same(first: Tensor, second: Tensor) -> float | None:
    """The squared L2 norm of two tensors with the same bits, all finite; else None."""
    if first.dtype != second.dtype:
        return None
    bits = _INTEGERS[first.element_size()]
    if not torch.equal(first.view(bits), second.view(bits)):
        return None
    square = float(torch.linalg.vector_norm(first.double())) ** 2
    return square if math.isfinite(square) else None


def _unequal(first: Tensor, second: Tensor) -> Tensor:
    if first.dtype != second.dtype:
        return (first != second) & ~(first.isnan() & second.isnan())
    return first.view(_INTEGERS[first.element_size()]) != second.view(_INTEGERS[first.element_size()])


def _ulp(first: Tensor, second: Tensor, bits: torch.dtype, unequal: Tensor) -> int:
    chosen = unequal & first.isfinite() & second.isfinite()
    if not chosen.any():
        return 0
    x, y = (_ordered(values[chosen].view(bits).long(), bits) for values in (first, second))
    return int((x - y).abs().max())


def _ordered(number: Tensor, bits: torch.dtype) -> Tensor:
    """Bits of floating-point numbers as integers that grow as the numbers do; 0 and -0 are both 0."""
    return torch.where(number >= 0, number, torch.iinfo(bits).min - number)


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.reshape(-1).split(_BLOCK) if tensor.numel() else ()
