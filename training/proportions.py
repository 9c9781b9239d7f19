"""Intervals of counted shares."""

from __future__ import annotations

import math

# 97.5th percentile of the normal distribution: two-sided 95 %.
Z_95 = 1.959963984540054


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion (E. B. Wilson, 1927)."""
    share, shift = correct / total, Z_95**2 / total
    centre = (share + shift / 2) / (1 + shift)
    half = Z_95 / (1 + shift) * math.sqrt(share * (1 - share) / total + shift / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)
