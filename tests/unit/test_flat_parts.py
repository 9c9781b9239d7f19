"""Runs of flattened elements as boxes: together they are the run, in order, and few."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from training.flat_parts import boxes


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (1, 5), (2, 3, 4), (2, 1, 3, 2)])
def test_every_run_of_every_shape_is_its_boxes(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for start, stop in itertools.combinations(range(whole.numel() + 1), 2):
        found = list(boxes(shape, start, stop))
        pieces = [whole[tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape, strict=True))] for box in found]
        assert torch.cat([piece.flatten() for piece in pieces]).tolist() == list(range(start, stop))
        assert [tuple(piece.shape) for piece in pieces] == [box.shape for box in found]
        assert len(found) <= max(1, 2 * len(shape) - 1)


def test_an_empty_run_has_no_box() -> None:
    assert not list(boxes((3, 4), 5, 5))
