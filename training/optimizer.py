"""AdamW on megatron-core: gradients reduced over replicas; optimizer state whole, sharded (ZeRO-1) or FSDP's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import Adam, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_video.dit import VideoDiT
from megatron_video.parallel import ParallelConfig
from training.fsdp import FullyShardedDiT
from training.gradient_fusion import fuse_gradient_accumulation
from training.optimizer_config import AdamWConfig

WrappedChunk: TypeAlias = DistributedDataParallel | FullyShardedDiT

# Parameters without weight decay: everything with one dimension (norms, biases) and the adaLN tables.
WITHOUT_DECAY = {
    ParamKey(
        name=("*.bias", "*modulation_table*"),
        predicate=ParamPredicate(name="one_dimensional", fn=lambda parameter: parameter.dim() == 1),
    ): ParamGroupOverride(wd_mult=0.0)
}

# Share of the way between lowest and peak learning rate that is left, by the share of the fall that is done.
DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "one_minus_sqrt": lambda done: 1 - math.sqrt(done),
}


def wrap_data_parallel(chunks: list[VideoDiT], parallel: ParallelConfig) -> list[WrappedChunk]:
    """Give the model gradient buffers that are reduced over its replicas, and megatron-core the hooks it calls.

    Gradients are summed in fp32 whatever the parameters' type.
    """
    config = chunks[0].config
    if parallel.use_megatron_fsdp:
        model = [FullyShardedDiT(chunk, parallel) for chunk in chunks]
    else:
        model = _wrap_replicated(chunks, parallel)
    # Called by the schedule after the last micro-batch: reduces over replicas, sums what SP and PP replicate, divides.
    config.finalize_model_grads_func = finalize_model_grads
    # Without it, reduction would start in every micro-batch and not only in the last.
    if model[0].ddp_config.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in model]
        config.no_sync_func = hooks[0] if len(hooks) == 1 else hooks
    return model


def _wrap_replicated(chunks: list[VideoDiT], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    # bf16 gradients of many micro-batches and replicas would lose small contributions when added in bf16.
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_param_gather=chunks[0].config.fp8_param,
    )
    model = [
        # Later chunks reduce while earlier ones still compute: no use in cutting them into buckets.
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in chunks:
        fuse_gradient_accumulation(chunk)
    return model


def build_optimizer(model: list[WrappedChunk], config: AdamWConfig, parallel: ParallelConfig) -> MegatronOptimizer:
    """AdamW over all parameters of this rank, with fp32 copies of bf16 ones."""
    # Of the weights; the state is fp32 in any case.
    dtype = model[0].config.params_dtype
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=config.min_learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.clip_grad_norm,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.use_distributed_optimizer or parallel.use_megatron_fsdp,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_recipe=model[0].config.fp8_recipe if model[0].config.fp8 else None,
        optimizer_cpu_offload=config.cpu_offload,
        # All of it: one kind of state to save and load.
        optimizer_offload_fraction=1.0 if config.cpu_offload else 0.0,
        # A parameter's weights travel back while the next one's are updated.
        overlap_cpu_optimizer_d2h_h2d=config.cpu_offload,
    )
    # Beside NCCL, megatron-core keeps gloo groups for collectives on CPU tensors.
    uses_nccl = torch.distributed.get_backend() == "nccl"
    optimizer = get_megatron_optimizer(
        settings,
        model,
        config_overrides=WITHOUT_DECAY,
        use_gloo_process_groups=uses_nccl,
    )
    # Only under Megatron-FSDP it comes bare.
    return optimizer if isinstance(optimizer, ChainedOptimizer) else ChainedOptimizer([optimizer])


def describe_adam(config: AdamWConfig) -> str:
    """Which implementation of AdamW megatron-core picked: Transformer Engine's, else Apex's, else torch's."""
    if config.cpu_offload:
        return "AdamW of torch, in host memory"
    return f"{Adam.__name__} of {Adam.__module__.partition('.')[0]}"


def learning_rate(step: int, config: AdamWConfig, total_steps: int) -> float:
    """Learning rate of `step`, from 0, in a run of `total_steps`.

    The warm-up reaches the peak at step warmup_steps - 1, a decay reaches min_learning_rate at the last step.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    fall = config.fall_steps(total_steps)
    first = total_steps - fall
    if step < first or config.decay == "constant":
        return config.learning_rate
    if config.decay == "cosine":
        share = DECAY_SHAPES["cosine"](min((step - first) / max(fall - 1, 1), 1.0))
    else:
        # The stable steps all have the peak, so the first step of the fall lies below it already.
        share = DECAY_SHAPES[config.decay_shape or "linear"](min((step - first + 1) / fall, 1.0))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * share


def set_learning_rate(optimizer: MegatronOptimizer, rate: float, weight_decay: float) -> None:
    """Set this step's learning rate, and each group's weight decay, which megatron-core leaves to its scheduler."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


@dataclass(frozen=True)
class ReadyGradients:
    """Gradients of one step, reduced and in fp32, with their global norm before clipping."""

    optimizer: MegatronOptimizer
    norm: float

    @staticmethod
    @torch.no_grad()
    def prepare(optimizer: MegatronOptimizer) -> ReadyGradients:
        """Copy gradients to the fp32 parameters and take their norm over all ranks of a replica."""
        # Its non-finite check exists for fp16 loss scaling only; the norm shows every NaN and infinity.
        optimizer.prepare_grads()
        return ReadyGradients(optimizer, float(optimizer.get_grad_norm()))

    @torch.no_grad()
    def apply(self) -> None:
        """Clip by the global norm and update the weights."""
        # optimizer.step() would do these two parts without a place to stop between norm and update.
        for single in self.optimizer.chained_optimizers:
            parameters = single.get_parameters()
            if parameters and single.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=single.config.clip_grad, total_norm=self.norm)
        self.optimizer.step_with_ready_grads()
