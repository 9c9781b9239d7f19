"""Dropout whose mask is a pure function of the sample, the place in the model, the token and the channel.

A generator's state would give other masks under every layout (each rank draws for its own tokens) and would have to be
saved, restored for recomputation and resharded. Here every element hashes its own identity, so that the mask is the
same however the tokens are cut, and a recomputed forward pass meets it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014), as signed 64-bit numbers.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_SHIFTS = (30, 27)


def keyed_dropout(x: Tensor, probability: float, seeds: Tensor, place: int, first_token: int) -> Tensor:
    """Zero elements of `x` with `probability` and scale the others by 1 / (1 - probability).

    Args:
        x: [s, b, D], consecutive tokens.
        probability: in [0, 1).
        seeds: int64 [b], one a sample and step (`NoiseSource.dropout_seed`).
        place: number of the branch in the whole model.
        first_token: index of x's first token in the whole sequence.
    """
    dropped = _uniform_bits(x.shape, seeds, place, first_token) < int(probability * 2**32)
    return x.masked_fill(dropped, 0.0) / (1.0 - probability)


def _uniform_bits(shape: torch.Size, seeds: Tensor, place: int, first_token: int) -> Tensor:
    """Uniform int64 in [0, 2^32), [s, b, D]."""
    tokens, _, channels = shape
    token = torch.arange(first_token, first_token + tokens, device=seeds.device)
    # Two small hashes name the row; only the last one runs over all elements.
    branch = torch.full((), place, device=seeds.device) * _INCREMENT
    rows = _mix(_mix(seeds + branch)[None, :] + token[:, None] * _INCREMENT)
    channel = torch.arange(channels, device=seeds.device) * _INCREMENT
    return _mix(rows[:, :, None] + channel) & 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 arithmetic wraps, and a mask makes the arithmetic shift a logical one."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
