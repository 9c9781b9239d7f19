"""`megatron-video dpo reward`: train a reward model on preference pairs, or go on with one on fresh pairs.

Pairs of a tenth of the prompts are held out; what is reported is the share of them in which the model gives the winner
the higher reward, for every folder, before and after. The epoch with the least held-out loss is kept. Pairs are read
from their shards when they are needed, and stay in memory only as far as --memory allows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.shards import ShardDataset
from training.alignment.calibration import calibration, draw_reliability
from training.alignment.feature_files import FeatureFiles
from training.alignment.feature_latents import PairLatents
from training.alignment.features import find_features
from training.alignment.reward_data import PairFolder, PairReader, Split, feature_scale, open_pairs, split
from training.alignment.reward_fit import Fit, FitOptions, Judged, Progress, fit, judge
from training.alignment.reward_model import (
    CONFIG_FILE,
    RewardModel,
    RewardModelConfig,
    load_reward_model,
    read_record,
    save_reward_model,
)

PLOT_FILE, PROGRESS_FILE = "reliability.png", "unfinished.pt"


class Wanted(NamedTuple):
    """A folder of pairs, and what each of them counts in the loss: nothing, for those of --check."""

    folder: Path
    weight: float


@dataclass(frozen=True)
class Report:
    """What is told of a training."""

    wanted: list[Wanted]
    sides: Split
    before: Judged
    after: Judged
    on_training: Judged
    result: Fit

    @property
    def trained_on(self) -> list[int]:
        """Numbers of the folders that are not only checked."""
        return [number for number, item in enumerate(self.wanted) if item.weight > 0]

    def values(self) -> dict[str, Any]:
        """For JSON."""
        after = self.after.of(self.trained_on)
        return {
            "pairs": [str(self.wanted[number].folder) for number in self.trained_on],
            "training_pairs": len(self.on_training.rows),
            "before": self.before.of(self.trained_on).values(),
            "held_out": after.values(),
            "training": self.on_training.values(),
            "calibration": calibration(after.margins).values(),
            "folders": [self._folder(number) for number in range(len(self.wanted))],
            "best_epoch": self.result.best_epoch,
            "epochs": self.result.history,
        }

    def _folder(self, number: int) -> dict[str, Any]:
        return {
            "pairs": str(self.wanted[number].folder),
            "weight": self.wanted[number].weight,
            "training_pairs": len(self.on_training.of([number]).rows),
            "before": self.before.of([number]).values(),
            "held_out": self.after.of([number]).values(),
        }


def main(argv: Sequence[str]) -> int:
    """Train, validate and save.

    Raises:
        UserError: no pairs, none to hold out, other encoders or features than the model's, or an output that is there.
    """
    arguments = _parse(argv)
    _check(arguments)
    wanted = _wanted(arguments)
    model, folders = _open(wanted, arguments)
    reader = PairReader(folders, model.config.latents, round(arguments.memory * 2**30))
    sides = split(folders, arguments.held_out)
    if arguments.init is None and model.config.feature_size:
        model.set_feature_scale(*feature_scale(reader, (row for rows in sides.train for row in rows)))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    names = ("epochs", "patience", "batch_size", "learning_rate", "seed")
    options = FitOptions(**{name: getattr(arguments, name) for name in names})
    before = judge(model, reader, sides.held_out, options.batch_size)
    progress = Progress(arguments.out / PROGRESS_FILE, _identity(arguments, wanted, folders, model))
    result = fit(model, reader, sides, options, progress)
    after, on_training = (judge(model, reader, side, options.batch_size) for side in (sides.held_out, sides.train))
    report = Report(wanted, sides, before, after, on_training, result)
    record = {
        "init": None if arguments.init is None else str(arguments.init),
        "held_out_share": arguments.held_out,
        **report.values(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw_reliability(calibration(after.of(report.trained_on).margins), arguments.out / PLOT_FILE)
    save_reward_model(model.cpu(), arguments.out, record)
    progress.forget()
    print(json.dumps(record) if arguments.json else _table(record, arguments.out))
    return 0


def _identity(
    arguments: argparse.Namespace, wanted: Sequence[Wanted], folders: Sequence[PairFolder], model: RewardModel
) -> dict[str, Any]:
    """All that a training depends on but --epochs and --patience, with which it may go on longer."""
    return {
        "pairs": [
            f"{item.folder} {PairLatents(f.dataset).fingerprint}" for item, f in zip(wanted, folders, strict=True)
        ],
        "weights": [item.weight for item in wanted],
        "model": json.dumps(asdict(model.config)),
        "init": None if arguments.init is None else str(arguments.init),
        **{name: getattr(arguments, name) for name in ("held_out", "batch_size", "learning_rate", "seed")},
    }


def check_encoders(model: RewardModel, folder: Path, vae: str, text: str) -> None:
    """Refuse latents or text states of other encoders than those the model learnt from.

    Raises:
        UserError: names both fingerprints.
    """
    for name, ours, theirs in (
        ("Video-VAE", model.config.vae_fingerprint, vae),
        ("text encoders", model.config.text_fingerprint, text),
    ):
        if ours != theirs:
            raise UserError(
                f"the reward model {folder} was trained with the {name} {ours}; these samples have {theirs}"
            )


def _open(wanted: Sequence[Wanted], arguments: argparse.Namespace) -> tuple[RewardModel, list[PairFolder]]:
    """The model, new or that of --init, and the folders with the features that it sees."""
    datasets = [open_pairs(item.folder) for item in wanted]
    _check_same_encoders(datasets)
    model = _model(datasets[0], arguments)
    config, folders = model.config, []
    for dataset, item in zip(datasets, wanted, strict=True):
        found = None
        if config.features is not None:
            found = find_features(config.features, config.feature_model, PairLatents(dataset), arguments.features)
        folders.append(PairFolder(dataset, item.weight, found))
    return model, folders


def _model(dataset: ShardDataset, arguments: argparse.Namespace) -> RewardModel:
    info = dataset.rows.info
    if arguments.init is not None:
        model = load_reward_model(arguments.init)
        check_encoders(model, arguments.init, info.vae_fingerprint, info.text_fingerprint)
        if arguments.features and model.config.features is None:
            raise UserError(f"--features: the model {arguments.init} sees latents alone; leave --features out")
        return model
    files = None
    if arguments.features:
        first = FeatureFiles.open(arguments.features[0])
        files = find_features(first.settings, first.model, PairLatents(dataset), arguments.features)
    config = RewardModelConfig(
        info.latent_channels,
        info.llm_dim,
        info.clip_dim,
        info.vae_fingerprint,
        info.text_fingerprint,
        latents=files is None or arguments.with_latents,
        feature_size=0 if files is None else files.read([0]).features[0].numel(),
        features=None if files is None else files.settings,
        feature_model="" if files is None else files.model,
    )
    torch.manual_seed(arguments.seed)
    return RewardModel(config)


def _check_same_encoders(datasets: Sequence[ShardDataset]) -> None:
    first = datasets[0]
    for dataset in datasets:
        for name in ("vae_fingerprint", "text_fingerprint"):
            theirs = getattr(dataset.rows.info, name)
            if theirs != getattr(first.rows.info, name):
                raise UserError(
                    f"--pairs {dataset.folder} was made with other encoders than {first.folder} ({name}: {theirs})"
                )


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.out / CONFIG_FILE).is_file():
        raise UserError(f"--out {arguments.out} holds a reward model; choose another folder")
    if not 0 < arguments.held_out < 1:
        raise UserError(f"--held-out {arguments.held_out} must lie between 0 and 1")
    for name in ("epochs", "patience", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    if not (math.isfinite(arguments.learning_rate) and arguments.learning_rate > 0):
        raise UserError(f"--learning-rate {arguments.learning_rate} must be above 0")
    if not arguments.memory >= 0:
        raise UserError(f"--memory {arguments.memory} must not be negative")
    if arguments.with_latents and not arguments.features and arguments.init is None:
        raise UserError("--with-latents is for models that see --features; without those a model sees latents anyway")
    if arguments.init is not None:
        _check_share(arguments)


def _check_share(arguments: argparse.Namespace) -> None:
    share = read_record(arguments.init).get("held_out_share")
    if share is not None and arguments.held_out > share:
        raise UserError(
            f"--held-out {arguments.held_out}: the model {arguments.init} held out {share} and was trained on some of "
            f"what would be held out now, so it would look better than it is; at most --held-out {share}"
        )


def _wanted(arguments: argparse.Namespace) -> list[Wanted]:
    """--pairs with their weights, then what is only checked: --check, or what --init was trained on, if it is there."""
    wanted = [_weighted(text) for text in arguments.pairs]
    checked = arguments.check
    if checked is None:
        before = [] if arguments.init is None else map(Path, read_record(arguments.init).get("pairs", []))
        checked = [folder for folder in before if folder.is_dir()]
    known = {item.folder.resolve() for item in wanted}
    if len(known) < len(wanted):
        raise UserError(f"--pairs {' '.join(arguments.pairs)}: a folder is named twice; give it a weight instead")
    return wanted + [Wanted(folder, 0.0) for folder in checked if folder.resolve() not in known]


def _weighted(text: str) -> Wanted:
    folder, equals, number = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return Wanted(Path(text), 1.0)
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"--pairs {text}: {number!r} is no weight; give a number above 0, as in {folder}=0.5")
    return Wanted(Path(folder), weight)


def _table(record: dict[str, Any], out: Path) -> str:
    error = record["calibration"]["expected_error"]
    lines = [
        f"{out}: trained on {record['training_pairs']} pairs ({record['training']['accuracy']:.1%} right), best after "
        f"epoch {record['best_epoch']} of {len(record['epochs'])}; expected calibration error {error:.1%}, see "
        f"{PLOT_FILE}"
    ]
    for folder in record["folders"]:
        role = "only checked" if not folder["weight"] else f"{folder['training_pairs']} trained on"
        role += f" with weight {folder['weight']:g}" if folder["weight"] not in (0, 1) else ""
        lines.append(f"  {folder['pairs']} ({role}): {_change(folder)}")
    return "\n".join(lines)


def _change(folder: dict[str, Any]) -> str:
    before, after = folder["before"], folder["held_out"]
    if not after["pairs"]:
        return "no pair held out"
    low, high = after["interval_95"]
    return (
        f"held out {before['accuracy']:.1%} -> {after['accuracy']:.1%} of {after['pairs']} right (95 % interval "
        f"{low:.1%} to {high:.1%}), loss {before['loss']:.3f} -> {after['loss']:.3f}"
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video dpo reward", description=__doc__)
    add = parser.add_argument
    add(
        "--pairs",
        nargs="+",
        required=True,
        metavar="FOLDER[=WEIGHT]",
        help="folders of `megatron-video dpo pair`; WEIGHT is what each of its pairs counts in the loss (default: 1)",
    )
    add("--out", type=Path, required=True, help="folder for the model and its reliability diagram")
    add(
        "--features",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="folders of `megatron-video dpo features`: the model sees these instead of latents; those of further "
        "folders of pairs are looked for beside them",
    )
    add("--with-latents", action="store_true", help="the model sees the latents too, beside --features")
    add("--init", type=Path, help="go on with this reward model, on fresh pairs")
    add(
        "--check",
        type=Path,
        nargs="*",
        metavar="FOLDER",
        help="pairs to judge before and after, without training on them (default: those that --init was trained on)",
    )
    add("--held-out", type=float, default=0.1, help="share of the prompts to validate on (default: %(default)s)")
    add("--epochs", type=int, default=FitOptions.epochs, help="at most (default: %(default)s)")
    add(
        "--patience",
        type=int,
        default=FitOptions.patience,
        help="epochs without a gain, then stop (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=int,
        default=FitOptions.batch_size,
        help="pairs; fewer need less memory (default: %(default)s)",
    )
    add("--learning-rate", type=float, default=FitOptions.learning_rate, help="of AdamW (default: %(default)s)")
    add("--memory", type=float, default=8.0, help="GiB of pairs that may stay in memory (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    add("--json", action="store_true", help="print the record as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
