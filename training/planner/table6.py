"""Table 6 of the paper (arXiv 2502.10248, section 8): its pretraining stages, and what else it tells of their cost."""

from __future__ import annotations

from dataclasses import dataclass

# The 540P stages, measured (6.2.2).
MEASURED_MFU = 0.32


@dataclass(frozen=True)
class Row:
    """One stage as printed."""

    steps: int
    """Iterations."""
    samples_per_node: int
    """Batch of a node."""
    seen: float
    """Samples."""
    table_3: tuple[float, float] | None = None
    """TFLOP of its cheapest and its dearest sample by Table 3; None: it has none of this size."""
    measured_mfu: float | None = None


_VIDEO_192 = (475.87, 1592.61)
_IMAGE_256 = (44.99, 44.99)

# By run.stage of the presets.
ROWS = {
    "t2i_256_s1": Row(53_000, 40, 0.8e9, _IMAGE_256),
    "t2i_256_s2": Row(200_000, 40, 3e9, _IMAGE_256),
    "t2vi_192_s1": Row(171_000, 4, 256e6, _VIDEO_192),
    "t2vi_192_s2": Row(101_000, 4, 151e6, _VIDEO_192),
    "t2vi_192_s3": Row(158_000, 4, 237e6, _VIDEO_192),
    "t2vi_540_s1": Row(23_000, 2, 17.3e6, measured_mfu=MEASURED_MFU),
    "t2vi_540_s2": Row(17_000, 2, 8.5e6, measured_mfu=MEASURED_MFU),
    "t2vi_540_s3": Row(6_000, 1, 1.5e6, measured_mfu=MEASURED_MFU),
}
