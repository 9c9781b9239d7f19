"""Sampling on the ranks of a job: who does what, what one rank tells the others, and a batch's latents on all of them.

For `megatron-video sample` and for samples inside of a run alike; the ranks of a replica compute every batch together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_video.dit import VideoDiT
from megatron_video.errors import UserError
from megatron_video.flops import LatentShape
from megatron_video.generation import generate_latents
from megatron_video.parallel import ParallelConfig, rank_grid
from megatron_video.text import TextStates
from training.optimizer import WrappedChunk
from training.pipeline_forward import PipelineForward
from training.sample_folder import SampleFolder
from training.sample_prompts import Prompt

T = TypeVar("T")
# One replica may have a batch less than another, and a large video takes a quarter of an hour.
_PATIENCE = timedelta(days=2)


def writes_for_replica() -> bool:
    """Whether this rank is the first of its replica, which writes for all of it."""
    return not (
        parallel_state.get_tensor_model_parallel_rank()
        or parallel_state.get_context_parallel_rank()
        or parallel_state.get_pipeline_model_parallel_rank()
    )


def share(items: Sequence[T], rank: int, size: int) -> Sequence[T]:
    """The part of `items` that is `rank`'s of `size`: neighbours together, the first parts the longer ones by one.

    Neighbours are seeds of one prompt, whose text is then encoded on few replicas.
    """
    part, longer = divmod(len(items), size)
    first = rank * part + min(rank, longer)
    return items[first : first + part + (rank < longer)]


def told_by(source: int, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What `work` returns on rank `source`, on every rank of the group; what it raises there is raised on all of them.

    So no rank waits for one that has given up.

    Raises:
        UserError: on the other ranks, whatever was raised.
    """
    failure: Exception | None = None
    answer: list[Any] = [None, None]
    if dist.get_rank() == source:
        try:
            answer = [work(), None]
        except Exception as error:
            failure = error
            said = str(error) if isinstance(error, UserError) else f"rank {source}: {type(error).__name__}: {error}"
            answer = [None, said]
    dist.broadcast_object_list(answer, src=source, group=group)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise UserError(answer[1])
    result: T = answer[0]
    return result


def decided_by_rank_0(decide: Callable[[], T]) -> T:
    """On a shared file system other ranks may see other files, and then wait for each other forever."""
    return told_by(0, decide)


class Crew:
    """Groups over which ranks talk and wait, beside those that compute: through the host, and with patience.

    A collective of the computing groups that has to wait for a rank that decodes, or for a slower replica, would be
    ended as hung.
    """

    def __init__(self) -> None:
        self.job = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._replica = self.job
        self.ranks = list(range(dist.get_world_size()))

    def divide(self, parallel: ParallelConfig) -> None:
        """Give every replica its group, once the layout is known; all ranks call it together."""
        grid = rank_grid(parallel, dist.get_world_size())
        for replica in range(grid.shape[1]):
            ranks = grid[:, replica].flatten().tolist()
            group = dist.new_group(ranks, backend="gloo", timeout=_PATIENCE)
            if dist.get_rank() in ranks:
                self._replica, self.ranks = group, ranks

    def wait(self) -> None:
        """Until every rank of the job is here."""
        dist.barrier(group=self.job)

    def by_rank_0(self, work: Callable[[], T]) -> T:
        """`told_by` rank 0, for the whole job."""
        return told_by(0, work, self.job)

    def by_writer(self, work: Callable[[], T]) -> T:
        """`told_by` the replica's first rank, for the replica."""
        return told_by(self.ranks[0], work, self._replica)


@dataclass(frozen=True)
class Sampler:
    """How latents come from text and noise."""

    shape: LatentShape
    times: Tensor
    """[steps + 1] fp32."""
    guidance: float
    fps: float | None
    """What the model is told of the frame rate; None if it has no such condition."""
    round_noise_to_bf16: bool = False

    def latents(
        self,
        model: Sequence[WrappedChunk | VideoDiT],
        prompts: Sequence[Prompt],
        texts: Sequence[TextStates],
        negative: TextStates,
        device: torch.device,
    ) -> Tensor:
        """Latents [b, T, C, h, w] fp32 of `prompts`, on every rank of the replica; all of them call it together.

        Args:
            model: this rank's chunks, in eval mode.
            prompts: of the batch; the noise is drawn on each rank, being a function of the prompt.
            texts: states of each of them.
            negative: states of what guidance moves away from.
            device: to compute on.
        """
        whole = PipelineForward(model)
        channels = whole.dit_config.in_channels
        return generate_latents(
            whole,
            [states.to(device, torch.bfloat16) for states in texts],
            negative.to(device, torch.bfloat16),
            torch.cat([prompt.noise(self.shape, channels) for prompt in prompts]).to(device),
            self.times,
            self.guidance,
            fps=self.fps,
            round_initial_to_bf16=self.round_noise_to_bf16,
        )


def complete_folder(
    folder: SampleFolder, sources: Mapping[str, str], make: Callable[[], None], group: dist.ProcessGroup | None = None
) -> None:
    """Claim a folder, let `make` write what is missing there, and list it; all ranks call it together.

    Args:
        folder: of the samples.
        sources: where the models were read from.
        make: writes this rank's part.
        group: of all ranks, to wait over.
    """
    # Nobody may find the folder half made: by now every rank has looked at it.
    dist.barrier(group=group)
    told_by(0, lambda: folder.claim(dict(sources)), group)
    make()
    # Every replica's files are there from here on.
    dist.barrier(group=group)
    told_by(0, folder.finish, group)
