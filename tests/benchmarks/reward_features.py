"""What a reward model should see: latents, features of the DiT, or both. Accuracy on pairs of prompts it never saw.

Prompts are dealt into five folds. Each fold is judged once, by a model trained on three of the others, whose epoch the
fourth chose: so no figure is of pairs that had any part in the model. All ways have the same folds, seeds and options,
those of `megatron-video dpo reward`; the ways were listed before any was tried. Trained on all pairs of the three
folds, and on those of a part of their prompts, as when labels are few.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
from torch import Tensor

from megatron_video.shards import ShardDataset
from training.alignment import features
from training.alignment.calibration import calibration
from training.alignment.feature_files import FeatureFiles, Features
from training.alignment.feature_latents import PairLatents
from training.alignment.feature_pass import pool
from training.alignment.reward_data import PairFolder, PairReader, Row, Split, feature_scale, open_pairs, place_of
from training.alignment.reward_fit import FitOptions, fit, judge
from training.alignment.reward_model import RewardModel, RewardModelConfig
from training.proportions import wilson_interval

FOLDS = 5
LAYERS, TIMES = (1, 3, 5), (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Way:
    """What a model sees."""

    name: str
    latents: bool
    layers: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    latent_statistics: bool = False
    """Whether its features are the statistics of the latents themselves: what the DiT adds is beyond these."""


class ChosenFeatures(FeatureFiles):
    """Some layers and times of features that were computed together."""

    def __init__(self, files: FeatureFiles, way: Way) -> None:
        super().__init__(files.folder, files.settings, files.data, files.count, files.model)
        self._times = [files.settings.times.index(time) for time in way.times]
        self._layers = [files.settings.layers.index(layer) for layer in way.layers]

    def read(self, numbers: Sequence[int]) -> Features:
        """As `FeatureFiles.read`, the chosen ones alone."""
        found = super().read(numbers)
        return found._replace(features=found.features[:, self._times][:, :, self._layers])


class LatentStatistics(FeatureFiles):
    """What features are, of the latents in the place of hidden states."""

    def __init__(self, files: FeatureFiles, dataset: ShardDataset) -> None:
        super().__init__(files.folder, files.settings, files.data, files.count, files.model)
        self._latents = PairLatents(dataset)

    def read(self, numbers: Sequence[int]) -> Features:
        """As `FeatureFiles.read`, with one layer and time."""
        tokens = [self._latents[number].latent.flatten(2).transpose(1, 2)[:, :, None] for number in numbers]
        statistics = torch.stack([pool(each)[0] for each in tokens])
        return super().read(numbers)._replace(features=statistics[:, None, None])


def main(argv: Sequence[str] | None = None) -> None:
    """Judge every way on every fold, and write the table, the results and the page."""
    arguments = _parse(argv)
    dataset = open_pairs(arguments.pairs)
    with tempfile.TemporaryDirectory() as scratch:
        files = _features(arguments, Path(scratch))
        rows = [
            {
                "way": way.name,
                "share": share,
                "seed": seed,
                **_judge(dataset, files, way, share, seed, arguments.epochs),
            }
            for way in _ways(arguments.layers, arguments.times)
            for share in arguments.shares
            for seed in range(arguments.seeds)
        ]
    table = _table(rows, len(dataset))
    report.print_table(table, list(table[0]))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    settings["pairs_judged"] = len(dataset)
    # A letter a pair: a line for each would make the file hard to read.
    compact = [{**row, "right": "".join("01"[right] for right in row["right"])} for row in rows]
    report.write(arguments.out, settings, compact, {"table": table})
    write_page(arguments.page, settings, table)


def _ways(layers: Sequence[int], times: Sequence[float]) -> Iterator[Way]:
    yield Way("latents", True)
    yield Way("statistics of latents, no DiT", False, latent_statistics=True)
    for layer in layers:
        for time in times:
            yield Way(f"layer {layer}, t {time:g}", False, (layer,), (time,))
    middle = (layers[len(layers) // 2],), (times[len(times) // 2],)
    yield Way("all of these layers and t", False, tuple(layers), tuple(times))
    yield Way(f"latents and layer {middle[0][0]}, t {middle[1][0]:g}", True, *middle)
    yield Way("latents and all of these", True, tuple(layers), tuple(times))


def _judge(
    dataset: ShardDataset, files: FeatureFiles, way: Way, share: float, seed: int, epochs: int
) -> dict[str, Any]:
    chosen: FeatureFiles | None = ChosenFeatures(files, way) if way.layers else None
    if way.latent_statistics:
        chosen = LatentStatistics(files, dataset)
    reader = PairReader([PairFolder(dataset, 1.0, chosen)], way.latents, 2**33)
    margins = torch.empty(len(dataset))
    for fold in range(FOLDS):
        rows, found = _judge_fold(reader, way, fold, share, seed, epochs)
        margins[[row.number for row in rows]] = found
    calibrated = calibration(margins)
    return {
        "right": [bool(right) for right in margins > 0],
        "loss": float(-torch.nn.functional.logsigmoid(margins).mean()),
        "calibration_error": calibrated.expected_error,
    }


def _judge_fold(
    reader: PairReader, way: Way, fold: int, share: float, seed: int, epochs: int
) -> tuple[list[Row], Tensor]:
    dataset = reader.folders[0].dataset
    places = [place_of(str(dataset.metadata(number)["caption"])) * FOLDS for number in range(len(dataset))]
    sides: tuple[list[Row], ...] = ([], [], [])
    for number, place in enumerate(places):
        side = {fold: 0, (fold + 1) % FOLDS: 1}.get(int(place), 2)
        # The place within its fold is as even as the fold: a share of the prompts, the same for all ways.
        if side < 2 or place % 1 < share:
            sides[side].append(Row(0, number))
    judged, choosing, train = (_by_bucket(dataset, side) for side in sides)
    torch.manual_seed(seed)
    model = _model(reader, way, train[0][0])
    if model.config.feature_size:
        model.set_feature_scale(*feature_scale(reader, itertools.chain(*train)))
    fit(model, reader, Split(train, choosing), FitOptions(epochs=epochs, seed=seed))
    found = judge(model, reader, judged)
    return found.rows, found.margins


def _by_bucket(dataset: ShardDataset, rows: Sequence[Row]) -> list[list[Row]]:
    buckets: dict[str, list[Row]] = {}
    for row in rows:
        buckets.setdefault(dataset.rows.row(row.number).bucket, []).append(row)
    return list(buckets.values())


def _model(reader: PairReader, way: Way, row: Row) -> RewardModel:
    info = reader.folders[0].dataset.rows.info
    seen = reader.read([row]).features
    size = 0 if seen is None else seen.shape[-1]
    widths = info.latent_channels, info.llm_dim, info.clip_dim
    return RewardModel(RewardModelConfig(*widths, "", "", latents=way.latents, feature_size=size))


def _features(arguments: argparse.Namespace, scratch: Path) -> FeatureFiles:
    where = ["--checkpoint", str(arguments.checkpoint), "--data", str(arguments.pairs), "--out", str(scratch / "all")]
    layers, times = (list(map(str, values)) for values in (arguments.layers, arguments.times))
    features.main([*where, "--layer", *layers, "--t", *times, "--batch-size", "16"])
    return FeatureFiles.open(scratch / "all")


def _table(rows: Sequence[dict[str, Any]], pairs: int) -> list[dict[str, Any]]:
    """Means over seeds; against latents trained on as many pairs, how many pairs each alone is right on."""
    table = []
    for share in sorted({row["share"] for row in rows}, reverse=True):
        first = [row for row in rows if row["share"] == share and row["way"] == "latents"]
        for way in dict.fromkeys(row["way"] for row in rows):
            of_way = [row for row in rows if row["share"] == share and row["way"] == way]
            accuracy = statistics.mean(sum(row["right"]) / pairs for row in of_way)
            low, high = wilson_interval(round(accuracy * pairs), pairs)
            alone = [
                [sum(a > b for a, b in zip(*sides, strict=True)) for sides in ((ours, theirs), (theirs, ours))]
                for ours, theirs in zip((r["right"] for r in of_way), (r["right"] for r in first), strict=True)
            ]
            table.append(
                {
                    "prompts": share,
                    "way": way,
                    "accuracy": accuracy,
                    "low": low,
                    "high": high,
                    "loss": statistics.mean(row["loss"] for row in of_way),
                    "calibration_error": statistics.mean(row["calibration_error"] for row in of_way),
                    "alone_right": statistics.mean(ours for ours, _ in alone),
                    "latents_alone_right": statistics.mean(theirs for _, theirs in alone),
                }
            )
    return table


def write_page(path: Path, settings: dict[str, Any], table: Sequence[dict[str, Any]]) -> None:
    """Write docs/alignment/reward_features.md."""
    text = (
        f"{settings['pairs_judged']} pairs; five folds by prompt: three train, one chooses the epoch, one is judged, "
        f"each pair once; means over {settings['seeds']} seeds, the interval is that of as many pairs. The last "
        "two columns count the pairs that this way judged right and latents wrong, and the reverse. Layers and times "
        "were listed before any was tried. Two things were changed after a look: of the three statistics that features "
        "have, the third was at first the change of the mean over a frame, which sees no motion within it (with that, "
        "no layer or time alone did better than latents), and the statistics of latents were added as a control: what "
        "the DiT is worth is beyond these."
    )
    lines = [
        "# What a reward model should see",
        "",
        f"Written by `python tests/benchmarks/reward_features.py --checkpoint {settings['checkpoint']} --pairs "
        f"{settings['pairs']}`;",
        "all figures are in `tests/benchmarks/results/reward_features.json`.",
        "",
        textwrap.fill(text, 120),
        "",
        "| prompts | sees | accuracy (95 % interval) | loss | calibration error | right, latents wrong | the reverse |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['prompts']:.0%} | {row['way']} | {row['accuracy']:.1%} ({row['low']:.1%} to "
            f"{row['high']:.1%}) | {row['loss']:.3f} | {row['calibration_error']:.1%} | {row['alone_right']:.1f} | "
            f"{row['latents_alone_right']:.1f} |"
            for row in table
        ),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="of the DiT that made the pairs")
    add("--pairs", type=Path, required=True, help="folder of `megatron-video dpo pair`")
    add("--layers", type=int, nargs="+", default=list(LAYERS), help="(default: %(default)s)")
    add("--times", type=float, nargs="+", default=list(TIMES), help="(default: %(default)s)")
    add("--shares", type=float, nargs="+", default=[1.0, 0.25], help="of the prompts to train on")
    add("--seeds", type=int, default=2, help="of weights and order (default: %(default)s)")
    add("--epochs", type=int, default=FitOptions.epochs, help="at most (default: %(default)s)")
    add("--out", type=Path, default=report.RESULTS / "reward_features.json", help="results (default: %(default)s)")
    add("--page", type=Path, default=Path("docs/alignment/reward_features.md"), help="(default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
