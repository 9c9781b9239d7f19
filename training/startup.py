"""What a run prints before its first step: every derived quantity with its arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from megatron_video.config_io import config_to_dict
from megatron_video.shard_schema import DamagedSampleError
from training.balance import loads_in_turn
from training.balance_cost import Costs
from training.checkpoint import TrainState, read_config
from training.config import PretrainConfig, RunConfig
from training.data_config import DataConfig
from training.data_mix import group_size
from training.data_plan import DataPlan
from training.data_set import TrainingData
from training.optimizer import describe_adam
from training.run_plan import mean_flops

# Steps whose shares are averaged over for the line about balance.
_BALANCE_STEPS = 8


def describe_run(
    config: PretrainConfig, data: TrainingData, plan: DataPlan, model: list[DistributedDataParallel]
) -> Iterator[str]:
    """Lines about ranks, model, batches, buckets and cost. Counting parameters takes part of all ranks."""
    world = torch.distributed.get_world_size()
    replicas = config.data_parallel_size(world)
    yield f"run {config.run.output_dir}: stage {config.run.stage!r}, seed {config.run.seed}"
    yield _ranks(config, world, replicas)
    yield _model(config, count_parameters(model))
    yield from _precision(config)
    flops = mean_flops(config.model, data)
    yield _batch(config, plan)
    yield _balance(plan, flops, replicas)
    yield from _data(config.data, data)
    yield from _buckets(config, data, plan, flops)
    yield from _cost(config, data, plan, flops, world)
    # Told by one rank, read by one.
    if torch.distributed.get_rank() == 0:
        yield _latents(data)


def describe_changes(config: PretrainConfig, checkpoint: Path | None, state: TrainState) -> Iterator[str]:
    """Lines about where the run starts, and what was changed in the configuration since."""
    if checkpoint is None:
        yield _origin(config.run)
        return
    yield f"continuing from {checkpoint}: step {state.step}, {sum(state.consumed_samples.values()):,} samples consumed"
    before, now = _flatten(read_config(checkpoint)), _flatten(config_to_dict(config))
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield f"  changed since that checkpoint: {name}: {before.get(name)} -> {now.get(name)}"


def _origin(run: RunConfig) -> str:
    if run.initial_weights is None:
        return "new run: weights initialised at random"
    what = "averaged weights" if run.initial_from_ema else "weights"
    return f"new run: {what}{' and optimizer' if run.initial_optimizer else ''} from {run.initial_weights}"


def count_parameters(model: list[DistributedDataParallel]) -> int:
    """Parameters of the whole model, each counted once over tensor- and pipeline-parallel ranks."""
    # Copies (norms under TP, embedders on later stages) are marked; each is counted where it is first.
    own = sum(
        # Megatron-FSDP's own tensors tell the size over all tensor-parallel ranks.
        getattr(parameter, "orig_param", parameter).numel()
        for chunk in model
        for parameter in chunk.parameters()
        if param_is_not_tensor_parallel_duplicate(parameter) and not getattr(parameter, "shared", False)
    )
    # NCCL reduces on the GPU only.
    device = next(model[0].parameters()).device
    total = torch.tensor(own, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return int(total)


def _ranks(config: PretrainConfig, world: int, replicas: int) -> str:
    parallel, device = config.parallel, "CUDA" if torch.cuda.is_available() else "CPU"
    # Only what is switched on: the line is read at a glance.
    extras = [
        name
        for name in ("sequence_parallel", "use_distributed_optimizer", "use_megatron_fsdp")
        if getattr(parallel, name)
    ]
    return (
        f"ranks: world {world} = TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size}"
        f" x CP {parallel.context_parallel_size} x DP {replicas}"
        + "".join(f", {name}" for name in extras)
        + f"; {device} and {torch.distributed.get_backend()}, layers {parallel.transformer_impl}"
    )


def _model(config: PretrainConfig, parameters: int) -> str:
    model = config.model
    return (
        f"model: {model.num_layers} layers, width {model.hidden_size} = {model.num_attention_heads} heads x "
        f"{model.attention_head_dim}, {parameters:,} parameters in {config.training.precision}"
    )


def _precision(config: PretrainConfig) -> Iterator[str]:
    fp8 = config.fp8
    if fp8.recipe is not None:
        last = config.model.num_layers - fp8.last_layers_bf16
        yield (
            f"FP8: {fp8.recipe}, {fp8.format}, linear layers of blocks {fp8.first_layers_bf16} to {last - 1}; "
            f"weights kept in {'FP8' if fp8.param_gather else 'bf16'}"
        )
    yield f"optimizer: {describe_adam(config.optimizer)}"


def _batch(config: PretrainConfig, plan: DataPlan) -> str:
    data = config.data
    images = f" + {data.images_per_video} images for every video" if data.images_per_video else ""
    parts, size = data.micro_batches_per_step, data.samples_dealt_together
    sizes = "draws of equal cost" if plan.sizes.whole_draws else f"micro-batches of {size}"
    return (
        f"global batch: {parts} {sizes}{images} = {plan.samples_per_step():,.1f} samples on average "
        f"(data.global_batch_size={data.global_batch_size}); {data.samples_per_draw} samples of one bucket at a time"
        f"{f', packed into sequences of {data.pack_tokens:,} video tokens' if data.pack_tokens else ''}"
    )


def _balance(plan: DataPlan, flops: Mapping[str, float], replicas: int) -> str:
    """Of the first steps, by the same functions that share out every step."""
    if plan.costs is None:
        steps = [plan.step(step) for step in range(_BALANCE_STEPS)]
        loads = [loads_in_turn(batches, replicas, Costs.of_flops(flops)) for batches in steps]
        counts, how, unit = np.array([len(steps[0]) // replicas]), "in turn", "FLOP"
    else:
        dealings = [plan.dealing(step, replicas) for step in range(_BALANCE_STEPS)]
        loads, counts = [dealing.loads for dealing in dealings], np.stack([d.micro_batches for d in dealings])
        how, unit = "by cost", {"FLOP": "FLOP", "s": "measured seconds"}[plan.costs.unit]
    many = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    uneven = np.mean([load.max() / load.mean() for load in loads])
    return f"replicas: DP {replicas}, dealt {how}: {many} micro-batches each, max / mean of {unit} {uneven:.3f}"


def _data(config: DataConfig, data: TrainingData) -> Iterator[str]:
    """Where the samples come from, what of them is used, and what becomes of those that cannot be read."""
    groups, weights = data.groups(), data.source_weights
    used = {source: sum(len(group) for (name, _), group in groups.items() if name == source) for source in data.sources}
    weighted = any(group.total_weight is not None for group in groups.values())
    yield (
        f"data: {len(data):,} samples in {len(data.datasets)} folder(s), {sum(used.values()):,} of them used"
        f"{', drawn by their weights' if weighted else ''}; data.max_corrupt_samples={config.max_corrupt_samples}"
    )
    for source, weight in zip(data.sources, weights or [], strict=False):
        yield f"  source {source}: {used[source]:,} samples, {weight / sum(weights or [1]):.1%} of those drawn"
    for kind, weight in data.caption_weights.items():
        having = sum(dataset.rows.header["kinds"].get(kind, 0) for dataset in data.datasets)
        share = weight / sum(data.caption_weights.values())
        yield f"  caption {kind}: {share:.1%} of the draws of samples that have all kinds; {having:,} samples have it"


def _buckets(config: PretrainConfig, data: TrainingData, plan: DataPlan, flops: Mapping[str, float]) -> Iterator[str]:
    tokens, shares = data.tokens(config.model), plan.sample_shares()
    patch = config.model.patch_size
    for name, group in data.buckets.items():
        shape = data.shapes[name]
        cut = f" / {patch}^2" if patch > 1 else ""
        drawn = shares[name] * plan.samples_per_step()
        # After so many steps every sample of the bucket has been drawn once on average.
        epoch = f"epoch every {group_size(group) / drawn:,.1f} steps" if drawn else "never drawn"
        draw, most = plan.sizes.draw[name], plan.sizes.micro_batch[name]
        sizes = f"micro-batches of {min(draw, most)}" if draw <= most else f"draws of {draw} by up to {most}"
        yield (
            f"  bucket {name}: {len(group):,} samples, {shape.frames} x {shape.height} x {shape.width}{cut} = "
            f"{tokens[name]:,} tokens, {_scaled(flops[name])}FLOP a sample, {sizes}, "
            f"{shares[name]:.1%} of the samples, {epoch}"
        )
    if data.absent_buckets:
        yield f"  not in the shards (data.buckets): {', '.join(data.absent_buckets)}"
    if data.unused_buckets:
        yield f"  not used (data.buckets): {', '.join(data.unused_buckets)}"


def _cost(
    config: PretrainConfig, data: TrainingData, plan: DataPlan, flops: Mapping[str, float], world: int
) -> Iterator[str]:
    tokens, shares, count = data.tokens(config.model), plan.sample_shares(), plan.samples_per_step()
    # Expected over the mix of buckets; metrics.jsonl has the exact figure of every step.
    rows, what = (1, "samples") if config.dpo is None else (2, "pairs of two videos")
    step_flops = rows * count * sum(shares[name] * flops[name] for name in shares)
    step_tokens = rows * count * sum(shares[name] * tokens[name] for name in shares)
    steps = config.training.steps
    yield (
        f"step: {count:,.1f} {what}, {step_tokens:,.0f} tokens, {_scaled(step_flops)}FLOP forward and backward; "
        f"{steps} steps = {count * steps:,.0f} {what}, {_scaled(step_flops * steps)}FLOP"
    )
    peak = config.training.peak_tflops
    # 30 % is about what the paper reached (32 % at 540P), a first guess at the real step time.
    if peak is not None:
        seconds = step_flops / (peak * 1e12 * world)
        yield f"peak: {world} x {peak} TFLOP/s; a step at 100 % MFU: {seconds:.3g} s, at 30 %: {seconds / 0.3:.3g} s"


def _latents(data: TrainingData) -> str:
    """Mean and spread of what the model learns to make, beside those of the noise it starts from."""
    groups = list(data.buckets.values())
    # Spread over the data set, few enough to be read at every start.
    most = max(1, 64 // len(groups))
    places = [np.unique(np.linspace(0, len(group) - 1, most).astype(np.int64)) for group in groups]
    chosen = np.concatenate([group[place] for group, place in zip(groups, places, strict=True)])
    # [positions, sum of means, of their squares, of variances]: of long videos, 64 samples at once are gigabytes.
    sums, read = torch.zeros(4, dtype=torch.float64), 0
    for sample in chosen:
        try:
            mean, deviation = data[int(sample)].mean_and_deviation
        except DamagedSampleError:
            # What becomes of it is decided when it is drawn.
            continue
        count = torch.tensor(float(mean.numel()))
        sums += torch.stack([count, mean.sum(), mean.square().sum(), deviation.square().sum()])
        read += 1
    _, mean_value, square, variance = (sums / sums[0]).tolist()
    spread = math.sqrt(max(0.0, square - mean_value**2) + variance)
    return (
        f"latents: mean {mean_value:.3f}, standard deviation {spread:.3f} over {read} samples "
        "(noise: 0 and 1; latents far from that want another VAE or flow.shift)"
    )


def _scaled(value: float) -> str:
    for factor, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{value / factor:,.1f} {prefix}"
    return f"{value / 1e6:,.1f} M"


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
