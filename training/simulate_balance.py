"""`python -m training.simulate_balance`: how unevenly a step's cost falls on replicas, dealt in turn and by cost.

Runs the plan and the dealing that training runs, on made-up groups of samples; no shards are read. The paper
(arXiv 2502.10248, section 6.2.4) gives the method and neither its numbers N, alpha, beta nor the mix of lengths: all of
it is an argument here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from megatron_video.cli import run_command
from megatron_video.config_io import load_config
from megatron_video.errors import UserError
from megatron_video.flops import training_flops
from training.balance import Floats, loads_in_turn
from training.balance_cost import Costs, read_profile
from training.config import PRESET_DIR, PretrainConfig
from training.data_config import DataConfig
from training.data_mix import is_image
from training.data_plan import BatchSizes, DataPlan
from training.run_plan import automatic_sizes, tokens_of
from training.sample_groups import GroupKey, Integers, SampleGroup
from training.simulate_balance_plot import plot

# Our assumption: the lengths of the paper's buckets equally often, most clips landscape.
ASPECT_SHARES = (0.7, 0.2, 0.1)
_GROUP_SIZE = 10_000_000


@dataclass(frozen=True)
class Scenario:
    """One way to make and deal batches."""

    name: str
    draw_size: int
    """Samples of one draw; on average, if they are sized by cost."""
    coarse: bool
    """Draws of equal cost (Eq. 12)."""
    by_cost: bool
    """Dealt by cost, images one by one, and not in turn."""
    by_seconds: bool = False
    """By measured seconds and not by FLOPs, where there are any."""


@dataclass(frozen=True)
class Outcome:
    """What came of it over all simulated steps."""

    stage: str
    scenario: str
    images_per_video: float
    judged_by: str
    """FLOP or s."""
    max_over_mean: float
    """Mean over steps of the largest replica's cost, over the mean replica's: how much longer a step takes than it had
    to."""
    worst_step: float
    samples_per_step: float
    micro_batches: tuple[int, int]
    """Fewest and most of a replica."""
    loads: list[float]
    """Of the first step: every replica's cost over the mean, ascending."""


class Numbered:
    """A group of `size` samples whose numbers are their places."""

    total_weight = None

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        """Number of samples."""
        return self._size

    def __getitem__(self, places: Integers) -> Integers:
        """The places themselves."""
        return places

    def locate(self, units: Integers) -> Integers:
        """Never called: these samples have no weights."""
        raise ValueError("these samples have no weights")


def main(argv: Sequence[str]) -> None:
    """Simulate, print a table, write JSON and a plot.

    Raises:
        UserError: an unknown preset, a preset without videos, or a bad mix or profile.
    """
    arguments = _parser().parse_args(argv)
    outcomes = [
        outcome
        for preset in arguments.config
        for outcome in simulate_preset(
            load_config(PretrainConfig, preset, arguments.overrides, PRESET_DIR),
            arguments.replicas,
            arguments.steps,
            arguments.images_per_video,
            read_mix(arguments.mix),
            lambda flops: _judge(flops, arguments.profile, arguments.jitter),
        )
    ]
    print(table(outcomes))
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(outcome)) for outcome in outcomes)
    (arguments.out / f"{arguments.name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    plot(outcomes, arguments.out / f"{arguments.name}.png")


def simulate_preset(
    config: PretrainConfig,
    replicas: int,
    steps: int,
    images_per_video: Sequence[float],
    mix: dict[str, float] | None,
    judge: Callable[[Costs], Costs] = lambda flops: flops,
) -> list[Outcome]:
    """All scenarios of one stage.

    Args:
        config: of the stage: model, buckets, samples of a global batch.
        replicas: data-parallel replicas.
        steps: simulated.
        images_per_video: ratios to try.
        mix: shares of the buckets of videos; None for equal lengths and ASPECT_SHARES.
        judge: from costs in FLOPs to those by which replicas are compared, such as seconds.

    Raises:
        UserError: the stage has no buckets of videos, or the mix does not fit them.
    """
    buckets = list(config.data.buckets or [])
    videos = [name for name in buckets if not is_image(name)]
    if not videos:
        raise UserError(f"{config.run.stage}: data.buckets={buckets} holds no videos; there is nothing to balance")
    shares = mix_of(videos, mix)
    flops = flops_of(config, buckets)
    costs = (flops, judge(flops))
    per_replica = max(1, config.data.global_batch_size // replicas)
    return [
        run_scenario(config, scenario, replicas, steps, ratio, shares, costs)
        for ratio in images_per_video
        for scenario in scenarios(per_replica, costs[1].unit == "s")
    ]


def scenarios(per_replica: int, with_seconds: bool = False) -> list[Scenario]:
    """Dealing with one draw of videos a replica, as the paper has it, and with single videos."""
    fine = "draws of equal cost, images one by one"
    rows = [
        Scenario(f"draws of {per_replica}, in turn", per_replica, coarse=False, by_cost=False),
        Scenario("draws of equal cost, in turn", per_replica, coarse=True, by_cost=False),
        Scenario(fine, per_replica, coarse=True, by_cost=True),
    ]
    timed = Scenario(f"{fine}, by seconds", per_replica, coarse=True, by_cost=True, by_seconds=True)
    single = [
        Scenario("single videos, in turn", 1, coarse=False, by_cost=False),
        Scenario("single videos by cost, images one by one", 1, coarse=False, by_cost=True),
    ]
    return [*(rows if per_replica > 1 else []), *([timed] if with_seconds else []), *single]


def run_scenario(
    config: PretrainConfig,
    scenario: Scenario,
    replicas: int,
    steps: int,
    images_per_video: float,
    shares: dict[str, float],
    costs: tuple[Costs, Costs],
) -> Outcome:
    """Plan and deal `steps` steps; `costs`: in FLOPs, and those by which replicas are compared."""
    flops, judging = costs
    plan = _plan(config, scenario, images_per_video, shares, judging if scenario.by_seconds else flops)
    loads, counts = [], []
    for step in range(steps):
        if scenario.by_cost:
            dealing = plan.dealing(step, replicas)
            loads.append(dealing.loads_by(judging))
            counts.append(dealing.micro_batches)
        else:
            batches = plan.step(step)
            loads.append(loads_in_turn(batches, replicas, judging))
            counts.append(np.bincount(np.arange(len(batches)) % replicas, minlength=replicas))
    ratios = [float(load.max() / load.mean()) for load in loads]
    return Outcome(
        stage=config.run.stage,
        scenario=scenario.name,
        images_per_video=images_per_video,
        judged_by=judging.unit,
        max_over_mean=round(float(np.mean(ratios)), 4),
        worst_step=round(max(ratios), 4),
        samples_per_step=round(plan.samples_per_step(), 1),
        micro_batches=(int(np.min(counts)), int(np.max(counts))),
        loads=_sorted_ratios(loads[0]),
    )


def made_up_seconds(flops: Costs, jitter: float, overhead: float = 0.03) -> Costs:
    """Seconds as a machine might have them: FLOPs at 32 % of eight times 989 TFLOP/s (the paper's MFU, a node of H800),
    every bucket faster or slower by a random factor, and a fixed time for every micro-batch.

    Args:
        flops: costs in FLOPs.
        jitter: standard deviation of the logarithm of the factors.
        overhead: seconds of a micro-batch.
    """
    random = np.random.default_rng(0)
    factors = {name: math.exp(jitter * random.standard_normal()) for name in sorted(flops.sample)}
    seconds = {name: value / (0.32 * 8 * 989e12) * factors[name] for name, value in flops.sample.items()}
    return Costs("s", seconds, dict.fromkeys(seconds, overhead))


def _plan(
    config: PretrainConfig,
    scenario: Scenario,
    images_per_video: float,
    shares: dict[str, float],
    costs: Costs,
) -> DataPlan:
    images = [name for name in config.data.buckets or [] if is_image(name)] if images_per_video else []
    weights = dict(shares)
    # In turn, images are draws among the others; as many as there are videos times the ratio.
    owed = math.fsum(shares.values()) * images_per_video / math.fsum(ASPECT_SHARES[: len(images)] or (1.0,))
    weights.update({name: share * owed for name, share in zip(images, ASPECT_SHARES, strict=False)})
    size = scenario.draw_size
    data: DataConfig = replace(
        config.data,
        bucket_weights=weights,
        draw_size=None,
        micro_batch_size=size,
        bucket_micro_batch_sizes={},
        global_batch_size=config.data.global_batch_size // size * size,
        images_per_video=images_per_video if images and scenario.by_cost else None,
    )
    groups: dict[GroupKey, SampleGroup] = {("made up", name): Numbered(_GROUP_SIZE) for name in weights}
    fitting = replace(data, micro_batch_size=1, draw_size=size)
    sizes = automatic_sizes(config.model, sorted(weights), shares, fitting)[0]
    draws = sizes.draw if scenario.coarse else dict.fromkeys(weights, size)
    # Dealt in turn, a draw is one micro-batch; images that are placed one by one are collated as everywhere.
    one_each = {name: size for name, size in draws.items() if not (scenario.by_cost and name in images)}
    if not (scenario.coarse and scenario.by_cost):
        sizes = BatchSizes(draws, {**sizes.micro_batch, **one_each})
    return DataPlan(groups, data, config.run.seed, config.run.stage, None, sizes, costs)


def flops_of(config: PretrainConfig, buckets: Sequence[str]) -> Costs:
    """Costs by the cost model, with the text length that the paper's Table 3 counts with."""
    model = config.model
    return Costs.of_flops(
        {
            name: float(training_flops(model.num_layers, model.hidden_size, count))
            for name, count in tokens_of(model, buckets).items()
        }
    )


def mix_of(videos: Sequence[str], mix: dict[str, float] | None) -> dict[str, float]:
    """Share of the drawn videos by bucket.

    Raises:
        UserError: the mix names other buckets.
    """
    if mix is not None:
        unknown = sorted(set(mix) - set(videos))
        if unknown:
            raise UserError(f"--mix names {unknown}; the stage has {list(videos)}")
        return {name: mix.get(name, 0.0) for name in videos}
    lengths = sorted({name.split("x")[0] for name in videos})
    by_length = {length: [name for name in videos if name.split("x")[0] == length] for length in lengths}
    return {
        name: share
        for names in by_length.values()
        for name, share in zip(names, ASPECT_SHARES[: len(names)], strict=True)
    }


def read_mix(path: Path | None) -> dict[str, float] | None:
    """Shares from a YAML file {bucket: share}, or None without one.

    Raises:
        UserError: not such a file.
    """
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {str(name): float(share) for name, share in values.items()}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"--mix {path}: must map buckets to shares: {error}") from None


def table(outcomes: Sequence[Outcome]) -> str:
    """As Markdown."""
    lines = [
        "| stage | images per video | batches | samples a step | micro-batches a replica | max / mean | worst step |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        low, high = outcome.micro_batches
        lines.append(
            f"| {outcome.stage} | {outcome.images_per_video:g} | {outcome.scenario} | {outcome.samples_per_step:,.0f} "
            f"| {low if low == high else f'{low} to {high}'} | {outcome.max_over_mean:.3f} | {outcome.worst_step:.3f} |"
        )
    return "\n".join(lines)


def _judge(flops: Costs, profile: Path | None, jitter: float) -> Costs:
    if profile is not None:
        return read_profile(profile, list(flops.sample))
    return made_up_seconds(flops, jitter) if jitter else flops


def _sorted_ratios(loads: Floats) -> list[float]:
    return [round(float(value), 4) for value in np.sort(loads / loads.mean())]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.simulate_balance", description=__doc__)
    parser.add_argument(
        "--config",
        nargs="+",
        default=["step_video_30b_t2vi_192_s1", "step_video_30b_t2vi_540_s1"],
        help="presets or YAML files of stages with videos",
    )
    parser.add_argument("--replicas", type=int, default=375, help="data-parallel replicas")
    parser.add_argument("--steps", type=int, default=50, help="steps that are simulated")
    parser.add_argument(
        "--images-per-video", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.9], help="ratios to try; 0: videos only"
    )
    parser.add_argument("--mix", type=Path, help="YAML file of shares of the buckets of videos")
    parser.add_argument("--profile", type=Path, help="compare replicas by measured seconds (data.cost_profile)")
    parser.add_argument(
        "--jitter",
        type=float,
        default=0.0,
        help="compare by made-up seconds: spread of the buckets' speeds, such as 0.1",
    )
    parser.add_argument("--name", default="balance_simulation", help="of the JSON file and the plot")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the JSON file and the plot")
    parser.add_argument("overrides", nargs="*", default=[], help="group.field=value")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
