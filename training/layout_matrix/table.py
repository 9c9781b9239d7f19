"""Which layouts are compared with one process, on what work, and how far the numbers may differ: all of it data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_video.parallel import ParallelConfig

Dtype = Literal["float32", "bfloat16"]
STEPS = 3

Shape = tuple[int, int, int, int]
"""Latent frames, rows, columns; samples of the micro-batch."""

# Images beside videos, each micro-batch of another shape; tokens: 25, 16, 27, 18, 30, 35, 49, 32.
SHAPES: tuple[Shape, ...] = (
    (1, 5, 5, 2),
    (1, 4, 4, 4),
    (3, 3, 3, 2),
    (2, 3, 3, 2),
    (3, 2, 5, 2),
    (5, 1, 7, 2),
    (1, 7, 7, 2),
    (2, 4, 4, 2),
)


@dataclass(frozen=True)
class Workload:
    """What is computed: equal workloads must give equal numbers whatever the layout."""

    dtype: Dtype = "float32"
    num_layers: int = 4
    hidden_dropout: float = 0.0
    shapes: tuple[Shape, ...] = SHAPES
    """Micro-batches of one global batch."""
    all_text_visible: bool = False
    """No text is hidden; otherwise captions have different lengths."""
    seed: int = 23
    """Of the data."""
    transformer_impl: str = "local"
    """Layer spec: Transformer Engine's kernels round otherwise than torch's."""


@dataclass(frozen=True)
class LayoutCase:
    """How it is computed."""

    name: str
    parallel: dict[str, Any]
    """Fields of ParallelConfig."""
    data_parallel_size: int = 1
    single_samples: bool = False
    """Cut the micro-batches into single samples: more accumulation, the same global batch."""
    pack_positions: int | None = None
    """Join micro-batches into sequences of at most so many latent positions."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the Workload that this row needs different."""
    short: bool = False
    """Part of the short form in fp32."""
    short_bf16: bool = False
    """Part of the short form in bf16."""

    @property
    def config(self) -> ParallelConfig:
        """The layout as a run would be given it."""
        return ParallelConfig(**self.parallel)

    @property
    def ranks(self) -> int:
        """Size of its world."""
        return self.config.model_parallel_size * self.data_parallel_size

    def workload(self, dtype: Dtype) -> Workload:
        """The work of this row; what one process does with it is the reference."""
        return replace(Workload(dtype=dtype, transformer_impl=self.config.transformer_impl), **self.changes)

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """Transformer Engine's attention kernels, and with them its context parallelism, have no fp32."""
        return ("bfloat16",) if self.config.transformer_impl == "transformer_engine" else ("float32", "bfloat16")

    def is_short(self, dtype: Dtype) -> bool:
        """Whether the short form has it in this dtype."""
        return self.short if dtype == "float32" else self.short_bf16


@dataclass(frozen=True)
class Tolerance:
    """Largest relative error; of tensors ||a - b|| / ||b||, each on its own."""

    loss: float
    grad_norm: float
    gradients: float
    parameters: float
    main_parameters: float
    ema: float
    telemetry: float


# fp32 is the project's contract; the largest error measured on a CPU is 1.3e-6, in the gradient of a QK-norm, a sum of
# cancelling terms. bf16 keeps 8 bits, and another order of adding flips the last one of activations. Its limits are
# about twice the largest measured errors of all layouts (loss 1.2e-3, norm 2.5e-3, gradients 3.8e-2, parameters 1.2e-3,
# their fp32 copies 2.3e-4, EMA 1.0e-4, telemetry 3.2e-3), and below what separates bf16 from fp32 on one process
# (6.7e-3, 2.6e-2, 9.6e-2, 3.6e-3, 3.9e-3, 3.8e-3; telemetry: not asked).
TOLERANCES: dict[Dtype, Tolerance] = {
    "float32": Tolerance(
        loss=1e-5, grad_norm=1e-5, gradients=1e-5, parameters=1e-5, main_parameters=1e-5, ema=1e-5, telemetry=1e-5
    ),
    "bfloat16": Tolerance(
        loss=3e-3, grad_norm=8e-3, gradients=8e-2, parameters=3e-3, main_parameters=6e-4, ema=3e-4, telemetry=2e-2
    ),
}


def _tp(size: int) -> dict[str, Any]:
    return {"tensor_model_parallel_size": size}


def _tp_sp(size: int) -> dict[str, Any]:
    return {"tensor_model_parallel_size": size, "sequence_parallel": True}


def _pp(size: int, virtual: int | None = None) -> dict[str, Any]:
    return {"pipeline_model_parallel_size": size, "virtual_pipeline_model_parallel_size": virtual}


def _cp(size: int, kind: str = "a2a") -> dict[str, Any]:
    return {"context_parallel_size": size, "cp_comm_type": kind}


GATHER = "all_gather"
ZERO1: dict[str, Any] = {"use_distributed_optimizer": True}
OVERLAP: dict[str, Any] = {"overlap_grad_reduce": True}
ZERO1_OVERLAP = ZERO1 | OVERLAP | {"overlap_param_gather": True}
FSDP: dict[str, Any] = {"use_megatron_fsdp": True}
FSDP1 = FSDP | {"data_parallel_sharding_strategy": "optim"}
FSDP2 = FSDP | {"data_parallel_sharding_strategy": "optim_grads"}
FULL: dict[str, Any] = {"recompute_granularity": "full"}
BLOCK_OF_1 = FULL | {"recompute_num_layers": 1}
SELECTIVE: dict[str, Any] = {
    "recompute_granularity": "selective",
    "recompute_modules": ["core_attn", "cross_attention", "mlp"],
}
DROPOUT: dict[str, Any] = {"hidden_dropout": 0.2}
TE: dict[str, Any] = {"transformer_impl": "transformer_engine"}

LAYOUTS: tuple[LayoutCase, ...] = (
    # One axis at a time.
    LayoutCase("tp2", _tp(2), short=True),
    LayoutCase("tp4", _tp(4)),
    LayoutCase("tp2_sp", _tp_sp(2), short=True, short_bf16=True),
    LayoutCase("tp4_sp", _tp_sp(4)),
    LayoutCase("pp2", _pp(2), short=True),
    LayoutCase("pp4", _pp(4)),
    LayoutCase("pp2_vpp2", _pp(2, 2), short=True),
    LayoutCase("pp4_vpp2", _pp(4, 2), changes={"num_layers": 8}),
    LayoutCase("cp2_a2a", _cp(2), short=True),
    LayoutCase("cp2_all_gather", _cp(2, GATHER), short=True, short_bf16=True),
    LayoutCase("cp3_all_gather", _cp(3, GATHER), short=True),
    LayoutCase("cp4_a2a", _cp(4)),
    LayoutCase("cp4_all_gather", _cp(4, GATHER)),
    LayoutCase("cp8_all_gather", _cp(8, GATHER)),
    LayoutCase("dp2", {}, 2, short=True),
    LayoutCase("dp4", {}, 4),
    LayoutCase("dp8", {}, 8),
    LayoutCase("dp2_overlap", OVERLAP, 2, short=True),
    LayoutCase("dp2_zero1", ZERO1, 2, short=True, short_bf16=True),
    LayoutCase("dp2_zero1_overlap", ZERO1_OVERLAP, 2, short=True),
    LayoutCase("dp4_zero1_overlap", ZERO1_OVERLAP, 4),
    LayoutCase("dp8_zero1", ZERO1, 8),
    # Replicas with different numbers of micro-batches.
    LayoutCase("dp3", {}, 3),
    LayoutCase("dp3_overlap", OVERLAP, 3),
    LayoutCase("dp3_zero1_overlap", ZERO1_OVERLAP, 3, short=True),
    LayoutCase("dp5_zero1_overlap", ZERO1_OVERLAP, 5),
    LayoutCase("dp2_fsdp", FSDP, 2, short=True, short_bf16=True),
    LayoutCase("dp2_fsdp_optim", FSDP1, 2, short=True),
    LayoutCase("dp2_fsdp_optim_grads", FSDP2, 2, short=True),
    LayoutCase("dp4_fsdp", FSDP, 4),
    # On one rank: what must not change the numbers either.
    LayoutCase("accumulation", {}, single_samples=True, short=True),
    LayoutCase("recompute_full", FULL, short=True),
    LayoutCase("recompute_block1", BLOCK_OF_1),
    LayoutCase("recompute_selective", SELECTIVE, short=True),
    # Products of two axes.
    LayoutCase("tp2_pp2", _tp(2) | _pp(2)),
    LayoutCase("tp2_sp_pp2", _tp_sp(2) | _pp(2)),
    LayoutCase("tp2_sp_pp2_vpp2", _tp_sp(2) | _pp(2, 2)),
    LayoutCase("tp2_cp2_a2a", _tp(2) | _cp(2)),
    LayoutCase("tp2_sp_cp2_a2a", _tp_sp(2) | _cp(2), short=True),
    LayoutCase("tp2_sp_cp2_all_gather", _tp_sp(2) | _cp(2, GATHER)),
    LayoutCase("tp4_cp2_all_gather", _tp(4) | _cp(2, GATHER)),
    LayoutCase("tp4_sp_cp2_all_gather", _tp_sp(4) | _cp(2, GATHER)),
    LayoutCase("tp2_sp_cp3_all_gather", _tp_sp(2) | _cp(3, GATHER)),
    LayoutCase("tp2_sp_cp4_all_gather", _tp_sp(2) | _cp(4, GATHER)),
    LayoutCase("pp2_cp2_a2a", _pp(2) | _cp(2)),
    LayoutCase("pp2_vpp2_cp2_all_gather", _pp(2, 2) | _cp(2, GATHER), short=True),
    LayoutCase("tp2_sp_dp2_zero1", _tp_sp(2) | ZERO1, 2, short=True),
    LayoutCase("tp2_sp_dp2_fsdp", _tp_sp(2) | FSDP, 2, short=True),
    LayoutCase("tp2_dp4_fsdp_optim_grads", _tp(2) | FSDP2, 4),
    LayoutCase("cp2_fsdp", _cp(2, GATHER) | FSDP),
    LayoutCase("cp2_dp2_fsdp_optim", _cp(2) | FSDP1, 2),
    LayoutCase("pp2_dp2_overlap", _pp(2) | OVERLAP, 2),
    LayoutCase("pp2_dp2_zero1_overlap", _pp(2) | ZERO1_OVERLAP, 2, short=True),
    LayoutCase("pp2_dp3_zero1_overlap", _pp(2) | ZERO1_OVERLAP, 3, short=True),
    LayoutCase("tp2_sp_dp3_zero1_overlap", _tp_sp(2) | ZERO1_OVERLAP, 3),
    LayoutCase("cp2_dp2_zero1", _cp(2) | ZERO1, 2),
    LayoutCase("cp2_dp4_zero1_overlap", _cp(2, GATHER) | ZERO1_OVERLAP, 4),
    # Products of three and more, eight ranks.
    LayoutCase("tp2_pp2_cp2", _tp(2) | _pp(2) | _cp(2)),
    LayoutCase("tp2_sp_pp2_cp2", _tp_sp(2) | _pp(2) | _cp(2), short=True, short_bf16=True),
    LayoutCase("tp2_cp2_dp2", _tp(2) | _cp(2), 2),
    LayoutCase("tp2_sp_cp2_dp2_zero1_overlap", _tp_sp(2) | _cp(2) | ZERO1_OVERLAP, 2),
    LayoutCase("tp2_sp_cp2_dp2_fsdp", _tp_sp(2) | _cp(2) | FSDP, 2),
    LayoutCase("tp2_sp_pp2_dp2_zero1", _tp_sp(2) | _pp(2) | ZERO1, 2),
    LayoutCase("tp2_pp2_vpp2_dp2", _tp(2) | _pp(2, 2), 2),
    LayoutCase("tp2_sp_pp2_vpp2_dp2_zero1", _tp_sp(2) | _pp(2, 2) | ZERO1_OVERLAP, 2),
    LayoutCase("pp2_cp2_dp2_zero1_overlap", _pp(2) | _cp(2) | ZERO1_OVERLAP, 2),
    LayoutCase("pp4_dp2_zero1", _pp(4) | ZERO1, 2, short=True),
    LayoutCase("pp4_cp2_a2a", _pp(4) | _cp(2)),
    # Recomputation and dropout inside products.
    LayoutCase("tp2_sp_recompute_full", _tp_sp(2) | FULL),
    LayoutCase("pp2_vpp2_recompute_block1", _pp(2, 2) | BLOCK_OF_1),
    LayoutCase("tp2_sp_cp2_recompute_sel", _tp_sp(2) | _cp(2) | SELECTIVE),
    LayoutCase("tp2_sp_pp2_cp2_recompute_full", _tp_sp(2) | _pp(2) | _cp(2) | FULL),
    LayoutCase("accumulation_pp2_cp2", _pp(2) | _cp(2, GATHER), single_samples=True),
    LayoutCase("dp2_fsdp_recompute_full", FSDP | FULL, 2),
    LayoutCase("cp2_dp2_fsdp_recompute_sel", _cp(2) | FSDP | SELECTIVE, 2),
    LayoutCase("dropout_recompute_full", FULL, changes=DROPOUT),
    LayoutCase("dropout_tp2_sp", _tp_sp(2), changes=DROPOUT),
    LayoutCase("dropout_cp3_all_gather", _cp(3, GATHER), changes=DROPOUT),
    LayoutCase("dropout_pp2_vpp2_recompute_sel", _pp(2, 2) | SELECTIVE, changes=DROPOUT),
    LayoutCase("dropout_tp2_sp_pp2_cp2", _tp_sp(2) | _pp(2) | _cp(2) | FULL, changes=DROPOUT, short=True),
    LayoutCase("dropout_tp2_sp_cp2_dp2_zero1", _tp_sp(2) | _cp(2) | ZERO1_OVERLAP, 2, changes=DROPOUT),
    LayoutCase("dropout_tp2_sp_dp2_fsdp_recompute_full", _tp_sp(2) | FSDP | FULL, 2, changes=DROPOUT),
    LayoutCase("dropout_accumulation_dp2", {}, 2, single_samples=True, changes=DROPOUT),
    # Several micro-batches in one sequence: all eight of 496 positions, or up to three.
    LayoutCase("packed", {}, pack_positions=500, short=True, short_bf16=True),
    LayoutCase("packed_recompute_full", FULL, pack_positions=150),
    LayoutCase("packed_recompute_sel", SELECTIVE, pack_positions=500),
    LayoutCase("packed_tp2_sp", _tp_sp(2), pack_positions=150, short=True),
    LayoutCase("packed_tp4_sp", _tp_sp(4), pack_positions=500),
    LayoutCase("packed_pp2", _pp(2), pack_positions=150, short=True),
    LayoutCase("packed_cp2_a2a", _cp(2), pack_positions=500, short=True),
    LayoutCase("packed_dp3_zero1_overlap", ZERO1_OVERLAP, 3, pack_positions=150),
    LayoutCase("packed_tp2_sp_pp2_cp2", _tp_sp(2) | _pp(2) | _cp(2), pack_positions=150),
    LayoutCase("packed_tp2_sp_pp2_dp2_zero1", _tp_sp(2) | _pp(2) | ZERO1, 2, pack_positions=150, short=True),
    # Transformer Engine, where there are GPUs enough; compared with Transformer Engine on one GPU.
    LayoutCase("te_recompute_full", TE | FULL),
    LayoutCase("te_offload", TE | {"fine_grained_activation_offloading": True}),
    LayoutCase("te_tp2_sp", TE | _tp_sp(2)),
    LayoutCase("te_pp2_vpp2", TE | _pp(2, 2)),
    LayoutCase("te_dp2_zero1_overlap", TE | ZERO1_OVERLAP, 2),
    LayoutCase("te_cp2_a2a", TE | _cp(2)),
    LayoutCase("te_cp2_all_gather", TE | _cp(2, GATHER)),
    LayoutCase("te_cp2_p2p", TE | _cp(2, "p2p")),
    LayoutCase("te_cp4_p2p", TE | _cp(4, "p2p")),
    LayoutCase("te_cp4_a2a_p2p", TE | _cp(4, "a2a+p2p") | {"hierarchical_context_parallel_sizes": [2, 2]}),
    LayoutCase("te_tp2_sp_cp2_p2p_dp2_zero1", TE | _tp_sp(2) | _cp(2, "p2p") | ZERO1_OVERLAP, 2),
    LayoutCase("te_tp2_sp_pp2_cp2_p2p", TE | _tp_sp(2) | _pp(2) | _cp(2, "p2p")),
)
