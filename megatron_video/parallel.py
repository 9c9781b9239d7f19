"""Process groups: which rank does what.

The rank grid is one picture, megatron-core's own default order: `arange(world).view(pp, dp, cp, tp)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from megatron_video.config_io import config_dataclass
from megatron_video.device import DeviceInfo, initialize
from megatron_video.errors import UserError


@config_dataclass
class ParallelConfig:
    """How one model is laid out over ranks; the data-parallel size is what is left of the world size.

    Which layouts cannot work, and why: megatron_video/layout_rules.py.
    """

    tensor_model_parallel_size: int = 1
    """Ranks over which every weight matrix, and with it the attention heads, is split."""
    sequence_parallel: bool = False
    """Split the tokens between the tensor-parallel regions over the same ranks."""
    pipeline_model_parallel_size: int = 1
    """Stages into which the layers are cut."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers per stage for the interleaved schedule; null for plain 1F1B."""
    context_parallel_size: int = 1
    """Ranks over which the tokens of one sample are split through the whole model."""
    cp_comm_type: Literal["a2a", "all_gather", "p2p", "a2a+p2p"] = "a2a"
    """How attention sees the tokens of the other context-parallel ranks: `a2a` exchanges tokens for heads (Ulysses),
    `all_gather` collects keys and values, `p2p` sends them round a ring, `a2a+p2p` does the first inside groups and the
    second between them. The last two need transformer_impl=transformer_engine."""
    hierarchical_context_parallel_sizes: list[int] | None = None
    """For cp_comm_type a2a+p2p: [ranks of one all-to-all group, ranks of one ring]; null for the other types."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass of the last micro-batch."""
    overlap_param_gather: bool = False
    """Gather parameters during the forward pass of the first micro-batch (needs use_distributed_optimizer)."""
    use_megatron_fsdp: bool = False
    """Cut the model over the data- and context-parallel ranks (Megatron-FSDP), in place of the three fields above."""
    data_parallel_sharding_strategy: Literal["optim", "optim_grads", "optim_grads_params"] = "optim_grads_params"
    """What Megatron-FSDP cuts: optimizer state, gradients too, weights too (ZeRO-1, -2, -3)."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activations that backward computes again instead of keeping them: `full` whole layers, `selective` the parts of
    every layer named by recompute_modules; null keeps all."""
    recompute_num_layers: int | None = None
    """For `full`: how many layers of each stage (or chunk of it), counted from its first; null for all of them."""
    recompute_modules: list[Literal["core_attn", "cross_attention", "mlp"]] = field(
        default_factory=lambda: ["core_attn", "mlp"]
    )
    """For `selective`: `core_attn` is self-attention between its projections."""
    fine_grained_activation_offloading: bool = False
    """Keep activations for backward in the host's memory; needs CUDA and the package transformer-engine."""
    offload_modules: list[Literal["self_attention", "cross_attention", "mlp"]] = field(
        default_factory=lambda: ["self_attention", "cross_attention", "mlp"]
    )
    """Branches of every layer whose activations go there."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Layer spec: torch on any device, or Transformer Engine (CUDA)."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


def initialize_parallel(parallel: ParallelConfig, seed: int, device_info: DeviceInfo) -> None:
    """Start torch.distributed (one process without torchrun too) and build megatron-core's process groups.

    `seed` seeds megatron-core's tensor-parallel RNG tracker. Nothing of ours draws from it: dropout masks are keyed by
    sample (megatron_video/dit/dropout.py), because a tracker's would differ from layout to layout.

    Raises:
        UserError: the layout cannot work on this number of ranks.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_video.layout import Layout
    from megatron_video.layout_rules import check_layout

    check_layout(Layout(parallel, world_size=launched_ranks()))
    start_distributed(device_info)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        hierarchical_context_parallel_sizes=parallel.hierarchical_context_parallel_sizes,
        create_gloo_process_groups=device_info.backend != "gloo",
    )
    model_parallel_cuda_manual_seed(seed)


def launched_ranks() -> int:
    """Ranks of this job, also before they know of each other: torchrun has told each of them."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def start_distributed(device_info: DeviceInfo) -> None:
    """Start torch.distributed if it is not running: with torchrun's ranks, or with this process alone."""
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=30)
    if "RANK" in os.environ:
        rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        store = _store_of_this_start(timeout)
        if store is None:
            dist.init_process_group(device_info.backend, timeout=timeout)
        else:
            dist.init_process_group(device_info.backend, store=store, rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(device_info.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _store_of_this_start(timeout: timedelta) -> dist.Store | None:
    """A part of torchrun's store that no earlier start of these ranks has used; None: torch's own choice is right.

    torchrun keeps one store for all starts of a job, and gives restarted ranks the addresses of the dead ones to read
    (pytorch issue 135712).

    Raises:
        UserError: several nodes, whose launchers count restarts each for itself.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or restarts == 0:
        return None
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        raise UserError(
            f"torchrun --max-restarts={restarts} on several nodes would hand the keys of a dead start to the next one; "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment and use --rdzv-backend=c10d, or leave "
            "restarts to the scheduler"
        )
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore(
        f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", dist.TCPStore(address, port, timeout=timeout)
    )


@contextmanager
def one_process() -> Iterator[ParallelConfig]:
    """megatron-core's groups for a tool that needs the model, but no other rank; torn down at the end."""
    parallel = ParallelConfig()
    initialize_parallel(parallel, seed=0, device_info=initialize())
    try:
        yield parallel
    finally:
        destroy_parallel()


def destroy_parallel(keep_distributed: bool = False) -> None:
    """Tear the process groups down; with `keep_distributed` another layout can be built in the same processes."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if not keep_distributed and dist.is_initialized():
        dist.destroy_process_group()


def data_parallel_rank() -> int:
    """This rank's place among the model's replicas."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_rank())


def data_parallel_size() -> int:
    """Number of replicas of the model."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_world_size())


def rank_grid(parallel: ParallelConfig, world_size: int) -> torch.Tensor:
    """Ranks as a grid [pp, dp, cp, tp]."""
    shape = (parallel.pipeline_model_parallel_size, -1, parallel.context_parallel_size)
    return torch.arange(world_size).view(*shape, parallel.tensor_model_parallel_size)
