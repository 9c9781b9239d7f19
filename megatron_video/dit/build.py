"""From a DiT's sizes and a layout to this rank's modules."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig

from megatron_video.dit.config import DiTConfig
from megatron_video.dit.init import initialize_parameters
from megatron_video.dit.model import VideoDiT
from megatron_video.dit.specs import get_layer_spec
from megatron_video.dit.stage import stages_of_rank
from megatron_video.fp8 import Fp8Config
from megatron_video.layout import Hardware, Layout, Precision
from megatron_video.layout_rules import check_layout
from megatron_video.parallel import ParallelConfig


def build_dit(
    dit: DiTConfig,
    parallel: ParallelConfig,
    params_dtype: torch.dtype,
    *,
    device: torch.device,
    init_seed: int | None = 0,
    fp8: Fp8Config | None = None,
) -> list[VideoDiT]:
    """This rank's part of the model: one module, or one per chunk under the interleaved schedule.

    `initialize_parallel` must have been called. With `init_seed=None`, or on the meta device, parameters are left
    unset, to be loaded.

    Raises:
        UserError: the layout cannot work for this model, or on this machine.
    """
    check_layout(_layout(dit, parallel, params_dtype, fp8 or Fp8Config()))
    config = transformer_config(dit, parallel, params_dtype, fp8)
    config.init_model_with_meta_device = device.type == "meta"  # Transformer Engine names its device itself
    names = ["tp", "pp", "cp", *(["hcp"] if parallel.hierarchical_context_parallel_sizes else [])]
    groups = ProcessGroupCollection.use_mpu_process_groups(names)
    spec = get_layer_spec(parallel.transformer_impl)
    chunks = []
    for stage in stages_of_rank(dit.num_layers, parallel, parallel_state.get_pipeline_model_parallel_rank()):
        with torch.device(device):
            model = VideoDiT(dit, config, spec, stage, groups)
        _mark_cut_weights(model)
        if init_seed is not None and device.type != "meta":
            initialize_parameters(model, config, init_seed, groups.tp.rank(), groups.tp.size())
        chunks.append(model)
    return chunks


def transformer_config(
    dit: DiTConfig, parallel: ParallelConfig, params_dtype: torch.dtype, fp8: Fp8Config | None = None
) -> TransformerConfig:
    """megatron-core's configuration for this model under this layout."""
    pipelined = parallel.pipeline_model_parallel_size > 1
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    config = TransformerConfig(
        num_layers=dit.num_layers,
        hidden_size=dit.hidden_size,
        num_attention_heads=dit.num_attention_heads,
        kv_channels=dit.attention_head_dim,
        ffn_hidden_size=dit.ffn_multiplier * dit.hidden_size,
        layernorm_epsilon=1e-6,  # of QK-norm; the blocks' LayerNorms set their own
        qk_layernorm=True,
        add_bias_linear=False,
        activation_func=partial(F.gelu, approximate="tanh"),
        attention_dropout=0.0,
        hidden_dropout=dit.hidden_dropout,
        init_method_std=dit.init_std or (2 / (5 * dit.hidden_size)) ** 0.5,
        perform_initialization=False,  # megatron_video.dit.init does it, equal under every layout
        use_cpu_initialization=parallel.transformer_impl == "local",
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        pipeline_dtype=params_dtype,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        hierarchical_context_parallel_sizes=parallel.hierarchical_context_parallel_sizes,
        sequence_parallel=parallel.sequence_parallel,
        calculate_per_token_loss=True,
        variable_seq_lengths=pipelined,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths asks for it, experts or not
        # With two stages, batched point-to-point would pair two messages to one peer wrongly.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # gloo sends read the output's storage after the schedule would have freed it.
        deallocate_pipeline_outputs=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,  # training.optimizer switches it on, where there are main gradients
        **(fp8 or Fp8Config()).megatron_settings(),
    )
    config.has_cond_embedder = True  # sum the embedders' gradients over pipeline stages
    # After its own check, which knows the names of a language model's modules only.
    config.fine_grained_activation_offloading = parallel.fine_grained_activation_offloading
    config.offload_modules = list(parallel.offload_modules)
    return config


def _mark_cut_weights(model: VideoDiT) -> None:
    """Say which weights are cut over tensor-parallel ranks; megatron-core's linears say so only when they initialise.

    The gradient norm counts weights without this mark once, on the first tensor-parallel rank.
    """
    for linear, dimension in ((ColumnParallelLinear, 0), (RowParallelLinear, 1)):
        for module in model.modules():
            if isinstance(module, linear):
                set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dimension, stride=1)


def _layout(dit: DiTConfig, parallel: ParallelConfig, params_dtype: torch.dtype, fp8: Fp8Config) -> Layout:
    precision: Precision = "bf16" if params_dtype == torch.bfloat16 else "fp32"
    return Layout(parallel, dit, precision, fp8, hardware=Hardware.detect())
