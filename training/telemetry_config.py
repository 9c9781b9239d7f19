"""What a run measures of itself beside its steps."""

from __future__ import annotations

from megatron_video.config_io import config_dataclass


@config_dataclass
class TelemetryConfig:
    """Measurements that are made seldom."""

    activation_norms_every: int = 100
    """Steps between measurements of every layer: RMS of its output, norms of its gradient and weights; 0 for none. A
    step without one costs nothing more."""

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing.

        Raises:
            ValueError: naming the field and the value.
        """
        if self.activation_norms_every < 0:
            raise ValueError(f"activation_norms_every={self.activation_norms_every} must not be negative")

    def measures_layers(self, step: int) -> bool:
        """Whether `step`, counted from 1, is one that measures the layers."""
        return self.activation_norms_every > 0 and step % self.activation_norms_every == 0
