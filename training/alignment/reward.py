"""`megatron-video dpo reward`: train a reward model on preference pairs, or go on with one on fresh pairs.

Pairs of a tenth of the prompts are held out; what is reported is the share of them in which the model gives the winner
the higher reward, after every epoch, and the epoch that is kept is the one with the least held-out loss.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.shard_schema import ShardSample
from megatron_video.shards import ShardDataset
from training.alignment.reward_model import (
    CONFIG_FILE,
    RewardModel,
    RewardModelConfig,
    load_reward_model,
    save_reward_model,
)
from training.measure_shapes import wilson_interval


@dataclass(frozen=True)
class Pairs:
    """Pairs of one bucket, in memory: latents of small videos, or of those that a cluster's node holds."""

    latents: Tensor
    """[2, n, t, z, h, w] fp32, winners first."""
    llm: Tensor
    """[n, d_llm] means over tokens."""
    clip: Tensor
    """[n, d_clip]"""

    def __len__(self) -> int:
        return len(self.llm)


@dataclass(frozen=True)
class Quality:
    """How a model judges pairs."""

    pairs: int
    loss: float
    """Mean -log sigmoid of the difference of rewards; ln 2 for one that knows nothing."""
    right: int
    """Pairs whose winner has the higher reward."""

    def values(self) -> dict[str, Any]:
        """For JSON, with the 95 % interval."""
        low, high = wilson_interval(self.right, self.pairs)
        return {
            "pairs": self.pairs,
            "loss": self.loss,
            "accuracy": self.right / self.pairs,
            "interval_95": [low, high],
        }


def main(argv: Sequence[str]) -> int:
    """Train, validate and save.

    Raises:
        UserError: no pairs, none to hold out, other encoders than the model's, or an output that is there.
    """
    arguments = _parse(argv)
    if (arguments.out / CONFIG_FILE).is_file():
        raise UserError(f"--out {arguments.out} holds a reward model; choose another folder")
    if not 0 < arguments.held_out < 1 or arguments.epochs < 1 or arguments.batch_size < 1:
        raise UserError("--held-out must lie between 0 and 1, --epochs and --batch-size must be at least 1")
    datasets = [_open(folder) for folder in arguments.pairs]
    torch.manual_seed(arguments.seed)
    model = _model(datasets, arguments.init)
    train, held_out = split(datasets, arguments.held_out)
    before = quality(model, held_out)
    history = fit(model, train, held_out, arguments)
    record = {
        "pairs": [str(folder) for folder in arguments.pairs],
        "init": None if arguments.init is None else str(arguments.init),
        "training_pairs": sum(map(len, train)),
        "before": before.values(),
        "held_out": quality(model, held_out).values(),
        "training": quality(model, train).values(),
        "epochs": history,
    }
    save_reward_model(model, arguments.out, record)
    print(json.dumps(record) if arguments.json else _table(record, arguments.out))
    return 0


def split(datasets: Sequence[ShardDataset], held_out: float) -> tuple[list[Pairs], list[Pairs]]:
    """Pairs to train on and those held out, by bucket; all pairs of a prompt are on one side, in every run alike.

    Raises:
        UserError: one side would be empty.
    """
    sides: tuple[dict[str, list[ShardSample]], dict[str, list[ShardSample]]] = ({}, {})
    for dataset in datasets:
        for number in tqdm(range(len(dataset)), desc=f"read {dataset.folder}", unit="pair", disable=None):
            sample = dataset[number]
            digest = hashlib.blake2b(str(sample.metadata["caption"]).encode(), digest_size=8).digest()
            side = sides[int.from_bytes(digest, "little") / 2**64 < held_out]
            side.setdefault(str(tuple(sample.moments.shape)), []).append(sample)
    if not all(sides):
        raise UserError(f"--held-out {held_out} leaves no prompt on one side; take more prompts or another share")
    train, kept = ([_stack(samples) for samples in side.values()] for side in sides)
    return train, kept


def fit(
    model: RewardModel, train: Sequence[Pairs], held_out: Sequence[Pairs], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Train in place; the model ends as it was after its best epoch.

    Returns:
        Held-out quality after every epoch.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.05)
    generator = np.random.default_rng(arguments.seed)
    history: list[dict[str, Any]] = []
    best, kept = float("inf"), copy.deepcopy(model.state_dict())
    for _ in tqdm(range(arguments.epochs), desc="reward", unit="epoch", disable=None):
        model.train()
        for pairs, rows in _batches(train, arguments.batch_size, generator):
            loss = -logsigmoid(_margins(model, pairs, rows)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = quality(model, held_out)
        history.append(found.values())
        if found.loss < best:
            best, kept = found.loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return history


@torch.no_grad()
def quality(model: RewardModel, groups: Sequence[Pairs]) -> Quality:
    """How the model judges pairs."""
    model.eval()
    margins = torch.cat([_margins(model, pairs, torch.arange(len(pairs))) for pairs in groups])
    return Quality(len(margins), float(-logsigmoid(margins).mean()), int((margins > 0).sum()))


def _margins(model: RewardModel, pairs: Pairs, rows: Tensor) -> Tensor:
    winner, loser = (model(pairs.latents[side, rows], pairs.llm[rows], pairs.clip[rows]) for side in range(2))
    margins: Tensor = winner - loser
    return margins


def _batches(groups: Sequence[Pairs], size: int, generator: np.random.Generator) -> Iterator[tuple[Pairs, Tensor]]:
    batches = [
        (pairs, torch.from_numpy(rows))
        for pairs in groups
        for rows in np.array_split(generator.permutation(len(pairs)), -(-len(pairs) // size))
    ]
    for place in generator.permutation(len(batches)).tolist():
        yield batches[place]


def _stack(samples: Sequence[ShardSample]) -> Pairs:
    losers = [sample.loser for sample in samples if sample.loser is not None]
    return Pairs(
        torch.stack([torch.stack([sample.moments for sample in samples]), torch.stack(losers)]).float(),
        torch.stack([sample.llm.float().mean(0) for sample in samples]),
        torch.stack([sample.clip.float().mean(0) for sample in samples]),
    )


def _open(folder: Path) -> ShardDataset:
    dataset = ShardDataset(folder)
    if not dataset.rows.info.pairs:
        raise UserError(f"--pairs {folder} holds single samples; `megatron-video dpo pair` makes pairs")
    return dataset


def _model(datasets: Sequence[ShardDataset], init: Path | None) -> RewardModel:
    info = datasets[0].rows.info
    config = RewardModelConfig(
        info.latent_channels, info.llm_dim, info.clip_dim, info.vae_fingerprint, info.text_fingerprint
    )
    for dataset in datasets:
        for name in ("vae_fingerprint", "text_fingerprint"):
            theirs = getattr(dataset.rows.info, name)
            if theirs != getattr(config, name):
                first = datasets[0].folder
                raise UserError(
                    f"--pairs {dataset.folder} was made with other encoders than {first} ({name}: {theirs})"
                )
    if init is None:
        return RewardModel(config)
    model = load_reward_model(init)
    check_encoders(model, init, config.vae_fingerprint, config.text_fingerprint)
    return model


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


def _table(record: dict[str, Any], out: Path) -> str:
    held_out, training = record["held_out"], record["training"]
    low, high = held_out["interval_95"]
    return (
        f"{out}: trained on {record['training_pairs']} pairs ({training['accuracy']:.1%} right); held out: "
        f"{held_out['accuracy']:.1%} of {held_out['pairs']} right (95 % interval {low:.1%} to {high:.1%}), before "
        f"training {record['before']['accuracy']:.1%}"
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video dpo reward", description=__doc__)
    add = parser.add_argument
    add("--pairs", type=Path, nargs="+", required=True, help="folders of `megatron-video dpo pair`")
    add("--out", type=Path, required=True, help="folder for the model")
    add("--init", type=Path, help="go on with this reward model, on fresh pairs")
    add("--held-out", type=float, default=0.1, help="share of the prompts to validate on (default: %(default)s)")
    add("--epochs", type=int, default=30, help="(default: %(default)s)")
    add("--batch-size", type=int, default=16, help="pairs (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="of AdamW (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    add("--json", action="store_true", help="print the record as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
