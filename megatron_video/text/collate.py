"""Text states of several samples as one batch for the DiT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TextBatch(NamedTuple):
    """What the DiT takes of the captions of b samples."""

    llm_states: Tensor
    """[b, n_max, d_llm], right-padded with zeros."""
    clip_states: Tensor
    """[b, L_clip, d_clip], all slots, pads included."""
    text_lengths: Tensor
    """[b] int64: visible keys, L_clip + the sample's own n. Exact, where the released pipeline sums in bf16."""


def collate_text(llm_states: Sequence[Tensor], clip_states: Sequence[Tensor]) -> TextBatch:
    """Pad the Step-LLM states of each sample [n, d_llm] to the longest, and stack the CLIP states [L_clip, d_clip].

    Raises:
        ValueError: samples of different widths or CLIP lengths, or none.
    """
    if len({(s.shape[1], c.shape) for s, c in zip(llm_states, clip_states, strict=True)}) != 1:
        shapes = [(tuple(s.shape), tuple(c.shape)) for s, c in zip(llm_states, clip_states, strict=True)]
        raise ValueError(f"text states do not fit into one batch: {shapes}")
    # Zeros, not repeats: the DiT's mask hides them, and zeros show in a debugger.
    padded = torch.nn.utils.rnn.pad_sequence(list(llm_states), batch_first=True)
    clip = torch.stack(list(clip_states))
    lengths = torch.tensor([clip.shape[1] + s.shape[0] for s in llm_states], dtype=torch.int64, device=clip.device)
    return TextBatch(padded, clip, lengths)
