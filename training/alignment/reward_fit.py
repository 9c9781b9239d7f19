"""Training of a reward model: Bradley-Terry loss over pairs, judged on held-out prompts after every epoch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from training.alignment.reward_data import PairReader, Row, Split
from training.alignment.reward_model import RewardModel
from training.measure_shapes import wilson_interval

# Pairs judged together: as many as a batch of training usually has.
_JUDGED_TOGETHER = 16


@dataclass(frozen=True)
class FitOptions:
    """How a reward model is trained."""

    epochs: int = 60
    """At most."""
    patience: int = 10
    """Epochs without a lower held-out loss after which it ends."""
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Judged:
    """How a model judges pairs."""

    rows: list[Row]
    margins: Tensor
    """Rewards of winners less those of losers, [n] on the CPU."""

    def of(self, folders: Sequence[int]) -> Judged:
        """The pairs of these folders alone."""
        places = [place for place, row in enumerate(self.rows) if row.folder in folders]
        return Judged([self.rows[place] for place in places], self.margins[places])

    def loss(self, weights: Sequence[float]) -> float:
        """Mean -log sigmoid of the margins, weighted by folder; ln 2 for a model that knows nothing."""
        each = torch.tensor([weights[row.folder] for row in self.rows])
        return float((-logsigmoid(self.margins) * each).sum() / each.sum())

    def values(self) -> dict[str, Any]:
        """For JSON, every pair counting alike; a folder may have no pair on a side."""
        count = len(self.rows)
        if not count:
            return {"pairs": 0, "loss": None, "accuracy": None, "interval_95": None}
        right = int((self.margins > 0).sum())
        return {
            "pairs": count,
            "loss": float(-logsigmoid(self.margins).mean()),
            "accuracy": right / count,
            "interval_95": list(wilson_interval(right, count)),
        }


@dataclass(frozen=True)
class Fit:
    """How a training went."""

    best_epoch: int
    """From 1; 0 where no epoch was better than the start."""
    history: list[dict[str, Any]]
    """Held-out pairs of the folders trained on, after every epoch."""


def fit(model: RewardModel, reader: PairReader, sides: Split, options: FitOptions) -> Fit:
    """Train in place; the model ends as it was after its best epoch, which may be the start."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.05)
    generator = np.random.default_rng(options.seed)
    weights = [folder.weight for folder in reader.folders]
    trained_on = [number for number, weight in enumerate(weights) if weight > 0]
    mean_weight = float(np.mean([weights[row.folder] for rows in sides.train for row in rows]))
    history: list[dict[str, Any]] = []
    best, best_epoch = judge(model, reader, sides.held_out).of(trained_on).loss(weights), 0
    kept = copy.deepcopy(model.state_dict())
    for epoch in tqdm(range(1, options.epochs + 1), desc="reward", unit="epoch", disable=None):
        model.train()
        for rows in _batches(sides.train, options.batch_size, generator):
            each = torch.tensor([weights[row.folder] for row in rows]) / mean_weight
            losses = -logsigmoid(_margins(model, reader, rows))
            optimizer.zero_grad()
            (losses * each.to(losses.device)).mean().backward()
            optimizer.step()
        found = judge(model, reader, sides.held_out).of(trained_on)
        history.append(found.values())
        if found.loss(weights) < best:
            best, best_epoch, kept = found.loss(weights), epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= options.patience:
            break
    model.load_state_dict(kept)
    return Fit(best_epoch, history)


@torch.no_grad()
def judge(model: RewardModel, reader: PairReader, groups: Sequence[Sequence[Row]]) -> Judged:
    """How the model judges pairs, given by bucket."""
    model.eval()
    parts = [
        rows[first : first + _JUDGED_TOGETHER] for rows in groups for first in range(0, len(rows), _JUDGED_TOGETHER)
    ]
    margins = [_margins(model, reader, rows).cpu() for rows in parts]
    return Judged([row for rows in parts for row in rows], torch.cat(margins))


def _margins(model: RewardModel, reader: PairReader, rows: Sequence[Row]) -> Tensor:
    device = next(model.parameters()).device
    pairs = reader.read(rows)
    llm, clip = pairs.llm.to(device), pairs.clip.to(device)
    winners, losers = (
        model(
            None if pairs.latents is None else pairs.latents[side].to(device),
            llm,
            clip,
            None if pairs.features is None else pairs.features[side].to(device),
        )
        for side in range(2)
    )
    margins: Tensor = winners - losers
    return margins


def _batches(groups: Sequence[Sequence[Row]], size: int, generator: np.random.Generator) -> Iterator[list[Row]]:
    batches = [
        [rows[place] for place in places]
        for rows in groups
        for places in np.array_split(generator.permutation(len(rows)), -(-len(rows) // size))
    ]
    for number in generator.permutation(len(batches)).tolist():
        yield batches[number]
