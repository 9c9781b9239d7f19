"""Where the optimizer cannot run in host memory; rows of megatron_video.layout_rules.RULES."""

from __future__ import annotations

from megatron_video.layout import Rule

OFFLOAD = "optimizer.cpu_offload"
CUDA = "hardware.cuda"
ZERO = "parallel.use_distributed_optimizer"
FSDP = "parallel.use_megatron_fsdp"
PRECISION = "training.precision"

OFFLOAD_RULES: tuple[Rule, ...] = (
    Rule(
        name="optimizer in host memory without a device",
        fields=(OFFLOAD, CUDA),
        refuses=lambda layout: layout[OFFLOAD] and not layout[CUDA],
        reason="megatron-core moves gradients and weights between a CUDA device and the host, and torch sees no "
        "device; on a CPU the optimizer is in host memory anyway",
        example={OFFLOAD: True, ZERO: True, CUDA: False},
    ),
    Rule(
        name="optimizer in host memory under Megatron-FSDP",
        fields=(OFFLOAD, FSDP),
        refuses=lambda layout: layout[OFFLOAD] and layout[FSDP],
        reason="megatron-core's optimizer on the host takes plain tensors, not the distributed ones of Megatron-FSDP",
        example={OFFLOAD: True, FSDP: True},
    ),
    Rule(
        name="optimizer in host memory, whole on every replica",
        fields=(OFFLOAD, ZERO),
        refuses=lambda layout: layout[OFFLOAD] and not layout[ZERO],
        reason="megatron-core's plain optimizer replaces the fp32 weights behind the back of the copies on the host; "
        "the distributed one keeps them",
        example={OFFLOAD: True},
    ),
    Rule(
        name="optimizer in host memory with fp32 weights",
        fields=(OFFLOAD, PRECISION),
        refuses=lambda layout: layout[OFFLOAD] and layout[PRECISION] == "fp32",
        # megatron-core 0.16.1 (distrib_optimizer.py): "can't optimize a non-leaf Tensor".
        reason="megatron-core's optimizer on the host takes fp32 copies of 16-bit weights, not parts of the weights",
        example={OFFLOAD: True, ZERO: True, PRECISION: "fp32"},
    ),
)
