"""Context parallelism of the video tokens: who holds which, and how attention sees those of the other ranks.

Tokens are padded at the end to a multiple of the ranks that cut them and cut contiguously, over context-parallel ranks
first and, under sequence parallelism, over tensor-parallel ranks inside. Full attention needs no balanced order, and
padding is never a key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_video.dit.packing import Packing
from megatron_video.dit.rope import Rope
from megatron_video.errors import UserError


@dataclass(frozen=True)
class TokenLayout:
    """Which tokens of a sequence this rank works on."""

    rope: Rope
    """Rotary tables of this context-parallel rank's tokens, padding included."""
    count: int
    """Real tokens over all ranks."""
    first: int
    """Index of this rank's first token in the whole sequence (under sequence parallelism, of its own part)."""
    packing: Packing | None = None
    """Where the samples are, if several share the sequence."""


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query [sq, b, heads, d], key and value [sk, b, heads, d]) -> [sq, b, heads * d]."""


def attend_to_all_tokens(attend: Attend, query: Tensor, key: Tensor, value: Tensor, num_tokens: int) -> Tensor:
    """Attention without context parallelism: this rank holds all tokens.

    Args:
        attend: attention over the tokens it is given.
        query: [s, b, heads, d] like `key` and `value`; s is the padded number of tokens.
        num_tokens: real tokens, which come first.

    Returns:
        [s, b, heads * d], zero at padding.
    """
    padding = len(query) - num_tokens
    if not padding:
        return attend(query, key, value)
    out = attend(query[:num_tokens], key[:num_tokens], value[:num_tokens])
    return F.pad(out, (0, 0, 0, 0, 0, padding))


def attend_by_all_to_all(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, num_tokens: int, group: ProcessGroup
) -> Tensor:
    """Every rank exchanges its tokens of all heads for all tokens of its share of the heads (Ulysses).

    Args:
        attend: attention over the tokens it is given.
        query: [s / cp, b, heads, d] like `key` and `value`; cp divides heads.
        num_tokens: real tokens of the whole sequence.
        group: the context-parallel group of cp ranks.

    Returns:
        [s / cp, b, heads * d].
    """
    # One exchange for the three: fewer, larger messages.
    all_tokens = _tokens_for_heads(torch.stack((query, key, value), dim=2), group)
    query, key, value = all_tokens.unbind(2)
    out = attend_to_all_tokens(attend, query, key, value, num_tokens)
    return _heads_for_tokens(out, group)


def attend_to_gathered_keys(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, num_tokens: int, group: ProcessGroup
) -> Tensor:
    """Every rank keeps its queries and collects the keys and values of all ranks; shapes as in `attend_by_all_to_all`.

    Queries at padding attend too; their output is never read.
    """
    gathered = gather_from_sequence_parallel_region(torch.stack((key, value), dim=1), group=group)
    all_keys, all_values = gathered[:num_tokens].unbind(1)
    return attend(query, all_keys, all_values)


def attend_in_ring(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, num_tokens: int, group: ProcessGroup
) -> Tensor:
    """`attend` itself sends keys and values round (Transformer Engine); shapes as in `attend_by_all_to_all`.

    Raises:
        UserError: there is padding. The ring counts tokens in another order than ours and would attend to it.
    """
    padded = len(query) * group.size()
    if padded != num_tokens:
        raise UserError(
            f"{num_tokens} video tokens had to be padded to {padded} for context_parallel_size={group.size()}, and "
            "cp_comm_type p2p and a2a+p2p cannot leave padding out; use cp_comm_type=a2a or all_gather, or shapes "
            "whose number of tokens needs no padding"
        )
    return attend(query, key, value)


# cp_comm_type whose communication is inside Transformer Engine's attention.
RINGS = ("p2p", "a2a+p2p")
# By ParallelConfig.cp_comm_type.
CONTEXT_PARALLEL = {
    "a2a": attend_by_all_to_all,
    "all_gather": attend_to_gathered_keys,
    **dict.fromkeys(RINGS, attend_in_ring),
}


def _tokens_for_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """[s / cp, b, 3, heads, d] -> [s, b, 3, heads / cp, d]."""
    tokens, batch, three, heads, width = x.shape
    size = group.size()
    sent = x.view(tokens, batch, three, size, heads // size, width).permute(3, 0, 1, 2, 4, 5)
    return all_to_all(group, sent.contiguous()).flatten(0, 1)


def _heads_for_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """[s, b, heads / cp * d] -> [s / cp, b, heads * d]."""
    size = group.size()
    received = all_to_all(group, x.view(size, len(x) // size, *x.shape[1:]))
    return received.permute(1, 2, 0, 3).flatten(2)
