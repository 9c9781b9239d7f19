"""Training of a reward model: Bradley-Terry loss over pairs, judged on held-out prompts after every epoch."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from megatron_video.errors import UserError
from megatron_video.files import write_atomically
from training.alignment.reward_data import PairReader, Row, Split
from training.alignment.reward_model import RewardModel
from training.proportions import wilson_interval


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


def fit(
    model: RewardModel, reader: PairReader, sides: Split, options: FitOptions, progress: Progress | None = None
) -> Fit:
    """Train in place; the model ends as it was after its best epoch, which may be the start.

    Args:
        model: with its first weights, which decide nothing where `progress` has later ones.
        reader: of the pairs.
        sides: what to train on, and what to judge.
        options: of the training.
        progress: where every epoch is kept, so that a training that is ended goes on.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.05)
    weights = [folder.weight for folder in reader.folders]
    trained_on = [number for number, weight in enumerate(weights) if weight > 0]
    state = None if progress is None else progress.load(model, optimizer)
    if state is None:
        start = judge(model, reader, sides.held_out, options.batch_size).of(trained_on).loss(weights)
        state = FitState(0, start, 0, copy.deepcopy(model.state_dict()), [])
    bar = tqdm(total=options.epochs, initial=state.epoch, desc="reward", unit="epoch", disable=None)
    while state.epoch < options.epochs and state.epoch - state.best_epoch < options.patience:
        state.epoch += 1
        _train_epoch(model, optimizer, reader, sides.train, options, state.epoch)
        found = judge(model, reader, sides.held_out, options.batch_size).of(trained_on)
        state.history.append(found.values())
        if found.loss(weights) < state.best:
            state.best, state.best_epoch = found.loss(weights), state.epoch
            state.kept = copy.deepcopy(model.state_dict())
        if progress is not None:
            progress.save(state, model, optimizer)
        bar.update()
    bar.close()
    model.load_state_dict(state.kept)
    return Fit(state.best_epoch, state.history)


def _train_epoch(
    model: RewardModel,
    optimizer: torch.optim.Optimizer,
    reader: PairReader,
    groups: Sequence[Sequence[Row]],
    options: FitOptions,
    epoch: int,
) -> None:
    weights = [folder.weight for folder in reader.folders]
    mean_weight = float(np.mean([weights[row.folder] for rows in groups for row in rows]))
    # All randomness is that of the epoch, so nothing of it has to be kept to go on.
    generator = np.random.default_rng([options.seed, epoch])
    torch.manual_seed(int(generator.integers(2**62)))
    model.train()
    for rows in _batches(groups, options.batch_size, generator):
        each = torch.tensor([weights[row.folder] for row in rows]) / mean_weight
        losses = -logsigmoid(_margins(model, reader, rows))
        optimizer.zero_grad()
        (losses * each.to(losses.device)).mean().backward()
        optimizer.step()


@dataclass
class FitState:
    """Where a training stands."""

    epoch: int
    """Epochs done."""
    best: float
    """Least held-out loss so far."""
    best_epoch: int
    kept: dict[str, Tensor]
    """Weights of that epoch."""
    history: list[dict[str, Any]]


class Progress:
    """A file beside the model-to-be with the last finished epoch.

    Args:
        path: of the file.
        identity: all that the training depends on, by name; plain values.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path, self._identity = path, identity

    def save(self, state: FitState, model: RewardModel, optimizer: torch.optim.Optimizer) -> None:
        """Write the file anew; it appears whole."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        values = {"identity": self._identity, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        content = io.BytesIO()
        # Not to the file: torch would tell of a full disk in words that nobody understands.
        torch.save({**values, **vars(state)}, content)
        write_atomically(self._path, content.getvalue())

    def load(self, model: RewardModel, optimizer: torch.optim.Optimizer) -> FitState | None:
        """Give model and optimizer their last state; None where there is none.

        Raises:
            UserError: the file is damaged, or of another training; names what differs.
        """
        if not self._path.exists():
            return None
        try:
            values = torch.load(self._path, map_location=next(model.parameters()).device, weights_only=True)
            there = values.pop("identity")
        except (OSError, RuntimeError, pickle.UnpicklingError, KeyError) as error:
            raise UserError(f"{self._path} cannot be read ({error}); delete it and train from the start") from None
        different = [name for name in self._identity if there.get(name) != self._identity[name]]
        if different:
            lines = "; ".join(f"{name}: {there.get(name)} there, {self._identity[name]} now" for name in different)
            raise UserError(
                f"{self._path} is of a training that was interrupted and was another ({lines}); give the same again, "
                "or another --out, or delete the file"
            )
        model.load_state_dict(values.pop("model"))
        optimizer.load_state_dict(values.pop("optimizer"))
        return FitState(**values)

    def forget(self) -> None:
        """The training is over."""
        self._path.unlink(missing_ok=True)


@torch.no_grad()
def judge(
    model: RewardModel, reader: PairReader, groups: Sequence[Sequence[Row]], size: int = FitOptions.batch_size
) -> Judged:
    """How the model judges pairs, given by bucket, `size` at a time."""
    model.eval()
    parts = [rows[first : first + size] for rows in groups for first in range(0, len(rows), size)]
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
