"""How long a training step takes, by part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from training.planner.job import Job
from training.planner.stored import read_seconds
from training.planner.work import BYTES, Branch, MicroBatch, Work, backward_work, forward_work

# Bytes that AdamW reads and writes for a parameter: gradient, weight and two moments in, the last three out, in fp32;
# and the copy that the model computes with.
_ADAM_BYTES = 7 * 4
# An averaged weight in and out, the weight in.
_EMA_BYTES = 3 * 4
_GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Seconds:
    """Seconds by part. Hidden ones run beside others and do not count."""

    gemm: float = 0.0
    """Matrix products, those of recomputation included."""
    attention: float = 0.0
    """Self- and cross-attention, likewise."""
    elementwise: float = 0.0
    """Norms, modulation, residuals, activation function, likewise."""
    tensor_parallel: float = 0.0
    """Collectives of tensor and sequence parallelism, as far as they are not hidden."""
    context_parallel: float = 0.0
    """Exchange of tokens, or of keys and values."""
    pipeline: float = 0.0
    """Messages between stages."""
    bubble: float = 0.0
    """Stages that wait for others."""
    data_parallel: float = 0.0
    """Gradients reduced and weights gathered."""
    optimizer: float = 0.0
    """AdamW and averages."""
    data: float = 0.0
    """Samples from host to device, and waiting for storage."""
    hidden_tensor_parallel: float = 0.0
    """Beside matrix products."""
    hidden_context_parallel: float = 0.0
    """A ring, beside attention."""
    hidden_pipeline: float = 0.0
    """Messages of the interleaved schedule."""
    hidden_data_parallel: float = 0.0
    """Beside the first forward and the last backward pass."""
    hidden_data: float = 0.0
    """The loader, which reads the next steps' samples beside this one."""

    @property
    def total(self) -> float:
        """What counts."""
        return sum(value for name, value in self.by_part().items() if not name.startswith("hidden_"))

    @property
    def compute(self) -> float:
        """What occupies the multiprocessors and leaves the links alone."""
        return self.gemm + self.attention + self.elementwise

    @property
    def busy(self) -> float:
        """What keeps a stage busy: all that happens once for every micro-batch."""
        return self.compute + self.tensor_parallel + self.context_parallel + self.pipeline

    def by_part(self) -> dict[str, float]:
        """Every part under its name."""
        return dict(vars(self))

    def __add__(self, other: Seconds) -> Seconds:
        theirs = vars(other)
        return Seconds(**{name: value + theirs[name] for name, value in vars(self).items()})

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(**{name: value * factor for name, value in vars(self).items()})


def step_seconds(job: Job) -> Seconds:
    """Of one step of the whole job, replicas being equally loaded."""
    busy = sum(
        (micro_batch_seconds(job, batch) * (count / job.replicas) for batch, count in job.step.items()), Seconds()
    )
    step = busy + Seconds(bubble=_bubble(job, busy.busy)) + _data_parallel(job, busy.compute) + _optimizer(job)
    reading = read_seconds(job)
    hidden = min(reading, step.total)
    return step + Seconds(data=reading - hidden, hidden_data=hidden)


def forward_seconds(job: Job) -> Seconds:
    """Of the forward pass alone over the micro-batches of a step, as a reference makes it."""
    layers = job.shape.num_layers / job.parallel.pipeline_model_parallel_size
    busy = Seconds()
    for batch, count in job.step.items():
        copied = Seconds(data=_copied_bytes(job, batch) / _host_bandwidth(job))
        one = _forward(job, batch) * layers + _messages(job, batch) * 0.5 + copied
        busy += one * (count / job.replicas)
    return busy + Seconds(bubble=_bubble(job, busy.busy))


def micro_batch_seconds(job: Job, batch: MicroBatch) -> Seconds:
    """Forward and backward of one micro-batch on one pipeline rank."""
    layers = job.shape.num_layers / job.parallel.pipeline_model_parallel_size
    block = _forward(job, batch) + _backward(job, batch) + _recomputed(job, batch)
    return block * layers + _messages(job, batch) + Seconds(data=_copied_bytes(job, batch) / _host_bandwidth(job))


def _forward(job: Job, batch: MicroBatch) -> Seconds:
    works = forward_work(job.shape, batch, job.parallel, BYTES[job.precision])
    return _timed(job, works.values()) + _exchange(job, batch, forward=True)


def _backward(job: Job, batch: MicroBatch) -> Seconds:
    works = backward_work(job.shape, batch, job.parallel, BYTES[job.precision])
    return _timed(job, works.values()) + _exchange(job, batch, forward=False)


def _recomputed(job: Job, batch: MicroBatch) -> Seconds:
    """What backward runs again of a block, on average over the blocks."""
    if job.parallel.recompute_granularity != "selective":
        return _forward(job, batch) * job.share_recomputed
    works = forward_work(job.shape, batch, job.parallel, BYTES[job.precision])
    again: list[Branch] = list(job.parallel.recompute_modules)
    seconds = _timed(job, [works[branch] for branch in again])
    return seconds + _exchange(job, batch, forward=True) if "core_attn" in again else seconds


def _timed(job: Job, works: Iterable[Work]) -> Seconds:
    work = sum(works, Work())
    cluster, reached = job.cluster, job.cluster.efficiency
    gemm = work.gemm_flops * (1 - job.fp8_share) / cluster.gemm_flops_per_second(job.precision)
    if job.fp8_share:
        gemm += work.gemm_flops * job.fp8_share / cluster.gemm_flops_per_second("fp8")
    gathers = cluster.gather_seconds(work.gathered_bytes, job.parallel.tensor_model_parallel_size, stride=1)
    hidden = min(gathers * cluster.hidden_tensor_parallel, gemm)
    return Seconds(
        gemm=gemm,
        attention=work.attention_flops / (cluster.peak(job.precision) * reached.attention),
        elementwise=work.moved_bytes / cluster.hbm_bytes_per_second,
        tensor_parallel=gathers - hidden,
        hidden_tensor_parallel=hidden,
    )


def _exchange(job: Job, batch: MicroBatch, forward: bool) -> Seconds:
    """Context-parallel traffic of one block."""
    parallel, cluster = job.parallel, job.cluster
    ranks, stride = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if ranks == 1:
        return Seconds()
    # One tensor of all heads of this tensor-parallel rank and of all tokens.
    tensor = batch.samples * batch.tokens * job.shape.hidden_size * BYTES[job.precision] / stride
    if parallel.cp_comm_type == "a2a":
        # Queries, keys, values, and the result; their gradients back.
        return Seconds(context_parallel=cluster.exchange_seconds(4 * tensor / ranks, ranks, stride))
    if parallel.cp_comm_type == "all_gather":
        return Seconds(context_parallel=cluster.gather_seconds(2 * tensor, ranks, stride))
    if parallel.cp_comm_type == "a2a+p2p":
        assert parallel.hierarchical_context_parallel_sizes is not None
        inner, outer = parallel.hierarchical_context_parallel_sizes
        inside = cluster.exchange_seconds(4 * tensor / ranks, inner, stride)
        return Seconds(context_parallel=inside) + _ring(job, batch, tensor / inner, outer, stride * inner, forward)
    return _ring(job, batch, tensor, ranks, stride, forward)


def _ring(job: Job, batch: MicroBatch, tensor: float, ranks: int, stride: int, forward: bool) -> Seconds:
    """Keys and values go round beside attention; in backward once more, and their gradients with them."""
    traffic = job.cluster.gather_seconds((2 if forward else 4) * tensor, ranks, stride)
    work = (forward_work if forward else backward_work)(job.shape, batch, job.parallel)["core_attn"]
    hidden = min(traffic, _timed(job, [work]).attention)
    return Seconds(context_parallel=traffic - hidden, hidden_context_parallel=hidden)


def _messages(job: Job, batch: MicroBatch) -> Seconds:
    """Hidden states to the next stage and gradients back, for every chunk of this rank."""
    parallel = job.parallel
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if stages == 1:
        return Seconds()
    cut = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    tensor = batch.samples * batch.tokens * job.shape.hidden_size * BYTES[job.precision]
    distance = int(job.cluster.gpus / stages)
    one = job.cluster.send_seconds(tensor / (cut * parallel.context_parallel_size), stages, distance)
    # The interleaved schedule sends while the next chunk is computed, the plain one waits.
    return Seconds(hidden_pipeline=2 * chunks * one) if chunks else Seconds(pipeline=2 * one)


def _bubble(job: Job, busy: float) -> float:
    """Stages that are not yet, or no more, busy: (stages - 1) / (micro-batches x chunks) of their work."""
    stages = job.parallel.pipeline_model_parallel_size
    return busy * (stages - 1) / (job.micro_batches * job.chunks)


def _data_parallel(job: Job, compute: float) -> Seconds:
    parallel = job.parallel
    # Gradients are summed over context-parallel ranks too.
    ranks = round(job.replicas * parallel.context_parallel_size)
    if ranks <= 1:
        return Seconds()
    if parallel.use_megatron_fsdp:
        return _fully_sharded(job, compute, ranks)
    stride = parallel.tensor_model_parallel_size
    reduced = job.cluster.gather_seconds(job.stage_parameters * _GRADIENT_BYTES, ranks, stride)
    gathered = job.cluster.gather_seconds(job.stage_parameters * BYTES[job.precision], ranks, stride)
    if not parallel.use_distributed_optimizer:
        # All-reduce of the gradients: reduce-scatter and all-gather.
        reduced, gathered = 2 * reduced, 0.0
    # Forward takes about a third of a micro-batch: the first one's hides the gather, the last one's rest the reduction.
    one = compute / job.micro_batches
    hidden = min(reduced, one * 2 / 3) if parallel.overlap_grad_reduce else 0.0
    hidden += min(gathered, one / 3) if parallel.overlap_param_gather else 0.0
    return Seconds(data_parallel=reduced + gathered - hidden, hidden_data_parallel=hidden)


def _fully_sharded(job: Job, compute: float, ranks: int) -> Seconds:
    """Megatron-FSDP: weights gathered for forward and for backward, gradients reduced, in every micro-batch."""
    parallel = job.parallel
    stride, strategy = parallel.tensor_model_parallel_size, parallel.data_parallel_sharding_strategy
    gathers = 2 * job.micro_batches if strategy == "optim_grads_params" else 1
    reductions = 1 if strategy == "optim" else job.micro_batches
    weights = job.stage_parameters * BYTES[job.precision] * gathers
    gradients = job.stage_parameters * _GRADIENT_BYTES * reductions
    traffic = job.cluster.gather_seconds(weights + gradients, ranks, stride)
    # Layer by layer, one layer ahead.
    hidden = min(traffic, compute)
    return Seconds(data_parallel=traffic - hidden, hidden_data_parallel=hidden)


def _optimizer(job: Job) -> Seconds:
    own = job.stage_parameters / job.optimizer_shards
    moved = own * ((_ADAM_BYTES + BYTES[job.precision]) + (_EMA_BYTES if job.ema else 0))
    seconds = moved / job.cluster.hbm_bytes_per_second
    if job.optimizer_on_host:
        seconds += own * (_GRADIENT_BYTES + BYTES[job.precision]) / _host_bandwidth(job)
    return Seconds(optimizer=seconds)


def _copied_bytes(job: Job, batch: MicroBatch) -> float:
    """Noised latents, target and text of a micro-batch, as the loader hands them over in fp32."""
    text = batch.text_tokens * (job.shape.llm_channels + (job.shape.clip_channels or 0))
    return 4.0 * batch.samples * (batch.tokens * (job.shape.in_channels + job.shape.out_channels) + text)


def _host_bandwidth(job: Job) -> float:
    return job.cluster.host_gbps * 1e9
