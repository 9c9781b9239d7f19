"""`megatron-video plot-density`: the density that a configuration draws t from, as a picture; every run keeps one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_video.buckets import parse_bucket
from megatron_video.cli import run_command
from megatron_video.config_io import load_config
from megatron_video.errors import UserError
from megatron_video.time_density import TimeDensity
from training.config import PRESET_DIR, PretrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from training.data_set import TrainingData
    from training.telemetry import Telemetry

Floats = npt.NDArray[np.float64]

DENSITY_FILE = "time_density.png"
# Steps in probability of a drawn curve; the density is the slope between two of them.
_STEPS = 1000
# Of a distribution that reaches far up at one end, the rest would be a flat line.
_TALLEST = 8.0


def main(argv: Sequence[str]) -> int:
    """Command line."""
    arguments = _parse(argv)
    config = load_config(PretrainConfig, arguments.config, arguments.overrides, PRESET_DIR)
    tokens = {name: parse_bucket(name).latent_shape.tokens for name in config.data.buckets or []}
    if not tokens and config.flow.shift_base_tokens is not None:
        raise UserError("data.buckets is null: with flow.shift_base_tokens the density goes by them; name them")
    densities = densities_by_tokens(config.flow, {name: n // config.model.patch_size**2 for name, n in tokens.items()})
    draw_densities(densities).savefig(arguments.out, dpi=110)
    print(f"{', '.join(densities)}: {arguments.out}")
    return 0


def show_density(config: PretrainConfig, data: TrainingData, telemetry: Telemetry) -> None:
    """Leave the picture in the run's folder and in TensorBoard."""
    if telemetry.active:
        densities = densities_by_tokens(config.flow, data.tokens(config.model))
        path = telemetry.run_dir / DENSITY_FILE
        draw_densities(densities).savefig(path, dpi=110)
        telemetry.log_picture("density_of_t", path)


def densities_by_tokens(flow: TimeDensity, tokens: Mapping[str, int]) -> dict[str, TimeDensity]:
    """The densities of buckets with so many video tokens each, under a name; buckets of one density share it."""
    if flow.shift_base_tokens is None:
        return {f"shift {flow.shift:.3g}": flow}
    names: dict[int, list[str]] = {}
    for bucket, count in sorted(tokens.items(), key=lambda item: item[1]):
        names.setdefault(count, []).append(bucket)
    densities = {count: flow.for_tokens(count) for count in names}
    return {
        f"{', '.join(buckets)}: {count:,} tokens, shift {densities[count].shift:.3g}": densities[count]
        for count, buckets in names.items()
    }


def density_curve(density: TimeDensity) -> tuple[Floats, Floats]:
    """Times, ascending, and the density at each: the probability between two quantiles over their distance."""
    probabilities = np.arange(_STEPS) / _STEPS
    times = np.array([density.quantile(float(probability)) for probability in probabilities])
    distances = np.diff(times)
    # Quantiles are fp32: where they fall together there is nothing to divide by.
    apart = distances > 0
    return (times[:-1] + 0.5 * distances)[apart], (1 / _STEPS / distances[apart])


def draw_densities(densities: Mapping[str, TimeDensity]) -> Figure:
    """Curves over t from noise to data, and the share of draws below every t."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    density_panel, share_panel = figure.subplots(1, 2)
    probabilities = np.linspace(0, 1, 201)[:-1]
    for name, density in densities.items():
        times, values = density_curve(density)
        density_panel.plot(times, values, label=name, linewidth=1.6)
        share_panel.plot([density.quantile(float(p)) for p in probabilities], probabilities, linewidth=1.6)
    kind = next(iter(densities.values())).kind
    density_panel.set(title=f"density of t ({kind})", xlabel="t (0: noise, 1: data)", ylabel="density", xlim=(0, 1))
    density_panel.set_ylim(0, min(density_panel.get_ylim()[1], _TALLEST))
    share_panel.set(title="share of draws below t", xlabel="t", xlim=(0, 1), ylim=(0, 1))
    for panel in (density_panel, share_panel):
        panel.grid(alpha=0.3)
    density_panel.legend(fontsize=7)
    return figure


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron-video plot-density", description="Draw the density of training timesteps of a configuration."
    )
    parser.add_argument("--config", required=True, help="a YAML file or a preset of pretrain")
    parser.add_argument("--out", type=Path, default=Path(DENSITY_FILE), help=f"PNG file ({DENSITY_FILE})")
    parser.add_argument("overrides", nargs="*", metavar="group.field=value", help="e.g. flow.shift=3")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
