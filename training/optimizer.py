"""AdamW on megatron-core: gradients reduced over replicas, optimizer state whole or sharded (ZeRO-1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_video.dit import VideoDiT
from megatron_video.parallel import ParallelConfig
from training.config import AdamWConfig

# Parameters without weight decay: everything with one dimension (norms, biases) and the adaLN tables.
_WITHOUT_DECAY = ParamKey(
    name=("*.bias", "*modulation_table*"),
    predicate=ParamPredicate(name="one_dimensional", fn=lambda parameter: parameter.dim() == 1),
)


def wrap_data_parallel(chunks: list[VideoDiT], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Give the model gradient buffers that are reduced over its replicas, and megatron-core the hooks it calls.

    Gradients are summed in fp32 whatever the parameters' type.
    """
    # bf16 gradients of many micro-batches and replicas would lose small contributions when added in bf16.
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    config = chunks[0].config
    model = [
        # Later chunks reduce while earlier ones still compute: no use in cutting them into buckets.
        DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    # Called by the schedule after the last micro-batch: reduces over replicas, sums what SP and PP replicate, divides.
    config.finalize_model_grads_func = finalize_model_grads
    # Without it, reduction would start in every micro-batch and not only in the last.
    if parallel.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in model]
        config.no_sync_func = hooks[0] if len(hooks) == 1 else hooks
    return model


def build_optimizer(
    model: list[DistributedDataParallel], config: AdamWConfig, parallel: ParallelConfig
) -> MegatronOptimizer:
    """AdamW over all parameters of this rank, with fp32 copies of bf16 ones."""
    # Of the weights; the state is fp32 in any case.
    dtype = next(model[0].parameters()).dtype
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
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    # Beside NCCL, megatron-core keeps gloo groups for collectives on CPU tensors.
    uses_nccl = torch.distributed.get_backend() == "nccl"
    return get_megatron_optimizer(
        settings,
        model,
        config_overrides={_WITHOUT_DECAY: ParamGroupOverride(wd_mult=0.0)},
        use_gloo_process_groups=uses_nccl,
    )


def learning_rate(step: int, config: AdamWConfig, total_steps: int) -> float:
    """Learning rate of `step`, from 0: warm-up that reaches the peak at step warmup_steps - 1, then decay."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps - 1, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


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
