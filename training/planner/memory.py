"""How much memory of a device a training step takes, by part, on every pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from training.planner.activations import checkpoint_bytes, head_bytes, kept_bytes, text_bytes
from training.planner.cluster import GIB
from training.planner.job import Job
from training.planner.work import BYTES, MicroBatch

FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the fullest moment of a step."""

    weights: float
    """That the model computes with."""
    gradients: float
    """Summed in fp32."""
    optimizer: float
    """fp32 weights and two moments."""
    ema: float
    """Averaged weights."""
    activations: float
    """Kept for backward, of all micro-batches under way."""
    workspace: float
    """What the backward pass of one block holds beside: its recomputed activations, gathered tokens, gradients."""
    communication: float
    """Buffers of context-parallel exchange and of messages between stages."""

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(vars(self).values())

    @property
    def model_state(self) -> float:
        """What is there between steps."""
        return self.weights + self.gradients + self.optimizer + self.ema

    def by_part(self) -> dict[str, float]:
        """Every part under its name, in bytes."""
        return dict(vars(self))

    def in_gib(self) -> dict[str, float]:
        """The same in GiB."""
        return {name: value / GIB for name, value in self.by_part().items()}


def peak_memory(job: Job) -> list[Memory]:
    """Of every pipeline stage, with the micro-batch that takes most."""
    stages = job.parallel.pipeline_model_parallel_size
    return [max((_stage_memory(job, batch, stage) for batch in job.step), key=lambda memory: memory.total)
            for stage in range(stages)]  # fmt: skip


def layers_under_way(job: Job, stage: int) -> float:
    """Blocks of one rank whose activations are there at once, counted once for every micro-batch.

    Plain 1F1B: stage r of p starts p - r micro-batches before its first backward. Interleaved: chunks of
    2 (p - r - 1) + (chunks - 1) p + 1 (megatron-core's warm-up and the one behind it).
    """
    stages = job.parallel.pipeline_model_parallel_size
    chunks = job.chunks
    own = job.shape.num_layers / stages
    # A step of fewer micro-batches never has more under way.
    most = max(1.0, job.micro_batches)
    if chunks == 1:
        return own * min(most, stages - stage)
    return own / chunks * min(most * chunks, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1)


def _stage_memory(job: Job, batch: MicroBatch, stage: int) -> Memory:
    width, parallel = BYTES[job.precision], job.parallel
    stages = parallel.pipeline_model_parallel_size
    parameters = job.parameters_of(stage)
    weights, gradients = _sharded(job)
    # In fp32 the weights themselves are what the optimizer updates.
    state = (0 if job.optimizer_on_host else 2 * FP32) + (FP32 if job.precision == "bf16" else 0)
    kept = kept_bytes(job.shape, batch, parallel, width, job.fused)
    again = checkpoint_bytes(job.shape, batch, parallel, width)
    share = job.share_recomputed
    activations = layers_under_way(job, stage) * (share * again + (1 - share) * kept)
    activations += text_bytes(job.shape, batch, width)
    if stage == stages - 1:
        activations += head_bytes(job.shape, batch, parallel, width)
    return Memory(
        weights=parameters * width / weights,
        gradients=parameters * FP32 / gradients,
        optimizer=parameters * state / job.optimizer_shards,
        ema=parameters * FP32 / job.optimizer_shards if job.ema else 0.0,
        activations=activations,
        workspace=_workspace(job, batch, kept if share else 0.0),
        communication=_communication(job, batch),
    )


def _sharded(job: Job) -> tuple[float, float]:
    """Ranks that share weights, and gradients."""
    if not job.parallel.use_megatron_fsdp:
        return 1.0, 1.0
    strategy = job.parallel.data_parallel_sharding_strategy
    weights = job.optimizer_shards if strategy == "optim_grads_params" else 1.0
    return weights, 1.0 if strategy == "optim" else job.optimizer_shards


def _workspace(job: Job, batch: MicroBatch, recomputed: float) -> float:
    """The most that one block holds: in the feed-forward, with its input and gradient gathered, and two gradients."""
    width, parallel, shape = BYTES[job.precision], job.parallel, job.shape
    tokens = batch.samples * batch.tokens / parallel.context_parallel_size
    tp = parallel.tensor_model_parallel_size
    block = recomputed + width * tokens * (2 * shape.hidden_size + 2 * shape.ffn_size / tp)
    if not parallel.use_megatron_fsdp:
        return block
    # The weights of two blocks and the gradients of one, whole.
    return block + shape.layer_parameters.of_rank(tp) * (2 * width + FP32)


def _communication(job: Job, batch: MicroBatch) -> float:
    width, parallel = BYTES[job.precision], job.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    tokens = batch.samples * batch.tokens
    exchanged = 0.0
    if cp > 1:
        # Query, key and value as sent and as received; or all keys and values.
        tensors = 2 * tokens if parallel.cp_comm_type == "all_gather" else 2 * 3 * tokens / cp
        exchanged = tensors * job.shape.hidden_size / tp
    cut = tp if parallel.sequence_parallel else 1
    # A message received and one to send, forward and backward.
    messages = 4 * tokens * job.shape.hidden_size / (cut * cp) if parallel.pipeline_model_parallel_size > 1 else 0.0
    return width * (exchanged + messages)
