"""Keyed dropout: the share, the scale, and masks that depend on identity alone."""

from __future__ import annotations

import numpy as np
import torch

from megatron_video.dit.dropout import keyed_dropout

SEEDS = torch.tensor([2**62 + 7, 5])


def dropped(probability: float, place: int = 4, seeds: torch.Tensor = SEEDS) -> torch.Tensor:
    return keyed_dropout(torch.ones(600, 2, 96), probability, seeds, place, first_token=0)


def test_share_and_scale() -> None:
    for probability in (0.05, 0.5, 0.9):
        out = dropped(probability)
        share = (out == 0).double().mean().item()
        # Six standard deviations of a binomial share.
        assert abs(share - probability) < 6 * np.sqrt(probability * (1 - probability) / out.numel())
        assert torch.allclose(out[out != 0], torch.tensor(1 / (1 - probability)))


def test_every_part_of_the_tokens_meets_the_same_mask() -> None:
    x = torch.randn(37, 2, 48)
    whole = keyed_dropout(x, 0.3, SEEDS, 9, first_token=100)
    parts = [keyed_dropout(x[i : i + 5], 0.3, SEEDS, 9, first_token=100 + i) for i in range(0, 37, 5)]
    assert torch.equal(torch.cat(parts), whole)
    # A batch is cut, too, when the data-parallel size changes.
    assert torch.equal(keyed_dropout(x[:, 1:], 0.3, SEEDS[1:], 9, first_token=100), whole[:, 1:])


def test_masks_of_samples_places_tokens_and_channels_are_independent() -> None:
    kept = (dropped(0.5) != 0).double() * 2 - 1
    other_place = (dropped(0.5, place=5) != 0).double() * 2 - 1
    other_seed = (dropped(0.5, seeds=SEEDS + 1) != 0).double() * 2 - 1
    pairs = {
        "samples": (kept[:, 0], kept[:, 1]),
        "places": (kept, other_place),
        "seeds": (kept, other_seed),
        "tokens": (kept[1:], kept[:-1]),
        "channels": (kept[..., 1:], kept[..., :-1]),
    }
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean().item()) < 6 / np.sqrt(a.numel()), name
