"""How far what the ranks of a layout hold is from what one process holds, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from training.layout_matrix.table import Tolerance
from training.layout_matrix.worker import Piece, Report

QUANTITIES = ("gradients", "parameters", "main_parameters", "ema")


@dataclass(frozen=True)
class TensorError:
    """The worst tensor of a quantity."""

    error: float
    """||a - b|| / ||b||; infinite where a tensor lacks, or where a value is not finite."""
    name: str


@dataclass(frozen=True)
class Errors:
    """Largest relative errors of one layout."""

    loss: float
    grad_norm: float
    gradients: TensorError
    parameters: TensorError
    main_parameters: TensorError
    ema: TensorError
    telemetry: TensorError
    unequal_copies: tuple[str, ...]
    """Tensors of which two ranks hold copies that are not bit for bit equal."""

    def value(self, quantity: str) -> float:
        """The error of a quantity as a number."""
        found = getattr(self, quantity)
        return float(found.error if isinstance(found, TensorError) else found)

    def above(self, tolerance: Tolerance) -> list[str]:
        """What is wrong: quantities above their tolerance, and copies that differ."""
        names = [item.name for item in fields(tolerance)]
        wrong = [name for name in names if not self.value(name) <= getattr(tolerance, name)]
        return wrong + (["unequal copies"] if self.unequal_copies else [])


def compare(reports: list[Report], reference: Report) -> Errors:
    """Errors of the ranks' reports against the one of a single process."""
    unequal: list[str] = []
    worst = {}
    for quantity in QUANTITIES:
        found, differing = assemble(reports, quantity)
        expected, _ = assemble([reference], quantity)
        worst[quantity] = worst_tensor(found, expected)
        unequal += [f"{quantity} of {name}" for name in differing]
    return Errors(
        loss=max(_numbers_error(report.losses, reference.losses) for report in reports),
        grad_norm=max(_numbers_error(report.grad_norms, reference.grad_norms) for report in reports),
        telemetry=max(
            (worst_tensor(_arrays(report.telemetry), _arrays(reference.telemetry)) for report in reports),
            key=lambda worst: worst.error,
        ),
        unequal_copies=tuple(unequal),
        **worst,
    )


def worst_tensor(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> TensorError:
    """The tensor that is farthest off; one that only one side has counts as infinitely far."""
    errors = {name: float("inf") for name in found.keys() ^ expected.keys()}
    errors |= {name: relative_error(found[name], expected[name]) for name in found.keys() & expected.keys()}
    name = max(errors, key=errors.__getitem__)
    return TensorError(errors[name], name)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """||a - b|| / ||b|| in fp64."""
    if found.shape != expected.shape:
        return float("inf")
    difference = float(np.linalg.norm(found.astype(np.float64) - expected))
    size = float(np.linalg.norm(expected.astype(np.float64)))
    error = difference / size if size else (0.0 if difference == 0 else float("inf"))
    return error if np.isfinite(error) else float("inf")


def assemble(reports: list[Report], quantity: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Whole tensors by name, put together from every rank's pieces, and the names of those whose copies differ.

    Values that no rank holds become NaN.
    """
    by_name: dict[str, dict[int, list[Piece]]] = {}
    for report in reports:
        for name, piece in report.tensors[quantity].items():
            by_name.setdefault(name, {}).setdefault(report.tensor_rank, []).append(piece)
    whole, differing = {}, []
    for name, by_rank in by_name.items():
        pairs = [_join(by_rank[rank]) for rank in sorted(by_rank)]
        dimension = by_rank[min(by_rank)][0].partition_dim
        cuts, equal = [cut for cut, _ in pairs], all(equal for _, equal in pairs)
        if dimension < 0:
            equal = equal and all(np.array_equal(cut, cuts[0], equal_nan=True) for cut in cuts)
        whole[name] = cuts[0] if dimension < 0 else np.concatenate(cuts, axis=dimension)
        if not equal:
            differing.append(name)
    return whole, differing


def _join(pieces: list[Piece]) -> tuple[np.ndarray, bool]:
    """One tensor-parallel cut from the pieces of its holders, and whether those agree where they overlap."""
    cut = np.full(int(np.prod(pieces[0].shape)), np.nan, dtype=np.float32)
    equal = True
    for piece in pieces:
        place = cut[piece.start : piece.start + piece.values.size]
        known = ~np.isnan(place)
        equal = equal and np.array_equal(place[known], piece.values[known], equal_nan=True)
        place[:] = piece.values
    return cut.reshape(pieces[0].shape), equal


def _arrays(numbers: dict[str, float]) -> dict[str, np.ndarray]:
    return {name: np.asarray(number) for name, number in numbers.items()}


def _numbers_error(found: list[float], expected: list[float]) -> float:
    errors = [abs(a - b) / abs(b) if b else float("inf") for a, b in zip(found, expected, strict=True)]
    return max(error if np.isfinite(error) else float("inf") for error in errors)
