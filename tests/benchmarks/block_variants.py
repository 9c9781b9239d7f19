"""What `block_bench` times: our block under each layer spec and FP8 recipe, and the plain PyTorch block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import plain_torch_dit
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_video.dit import DiTConfig, fused
from megatron_video.dit.build import transformer_config
from megatron_video.dit.context_parallel import TokenLayout
from megatron_video.dit.embedders import padded_text
from megatron_video.dit.layer import DiTLayer
from megatron_video.dit.rope import build_rope
from megatron_video.dit.specs import get_layer_spec
from megatron_video.fp8 import Fp8Config, building_layer, running_layer, running_layers, token_multiple
from megatron_video.layout import Hardware, Layout
from megatron_video.layout_rules import check_layout
from megatron_video.parallel import ParallelConfig

INIT_STD = 0.02


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    variant: str
    part: Literal["block", "linears"]
    shard: int
    """Tensor-parallel size whose local part is computed."""
    layers: int
    tokens: int
    hidden: int
    head_dim: int
    text_tokens: int
    hidden_text: int
    """How many text tokens are padding; 0 for no mask."""
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def heads(self) -> int:
        """Attention heads of this shard."""
        return self.hidden // self.head_dim // self.shard

    @property
    def feed_forward(self) -> int:
        """Feed-forward width of this shard."""
        return 4 * self.hidden // self.shard

    @property
    def rope_split(self) -> tuple[int, int, int]:
        """Channels of a head rotated by (frame, row, column)."""
        return self.head_dim // 2, self.head_dim // 4, self.head_dim // 4

    def random(self, *shape: int) -> Tensor:
        """Normal numbers that want a gradient, as activations do."""
        return torch.randn(shape, dtype=self.dtype, device=self.device).requires_grad_()

    def text_lengths(self) -> Tensor | None:
        """Visible text tokens of every sample, int64 [b]; None without a mask."""
        if not self.hidden_text:
            return None
        return torch.full((self.batch,), self.text_tokens - self.hidden_text, device=self.device)


@dataclass(frozen=True)
class Workload:
    """Forward and backward of modules on fixed random inputs."""

    forward: Callable[[], list[Tensor]]
    inputs: list[Tensor]
    parameters: list[nn.Parameter]

    def run(self, mark: Callable[[], None]) -> None:
        """Forward, `mark()`, backward; gradients of the last repetition are dropped first."""
        for tensor in (*self.inputs, *self.parameters):
            tensor.grad = None
        outputs = self.forward()
        mark()
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])


@dataclass(frozen=True)
class Variant:
    """A way to compute a DiT block."""

    build: Callable[[Case], Workload]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Entered around building and running."""


def build_ours(case: Case, impl: Literal["local", "transformer_engine"], recipe: Any = None) -> Workload:
    """Our block on megatron-core.

    Raises:
        UserError: this machine lacks what the layer spec or the recipe needs.
    """
    parallel, fp8 = ParallelConfig(transformer_impl=impl), Fp8Config(recipe=recipe)
    # Of the whole model: a shard is made of it below.
    dit = DiTConfig(
        num_layers=case.layers,
        num_attention_heads=case.hidden // case.head_dim,
        attention_head_dim=case.head_dim,
    )
    precision = "bf16" if case.dtype == torch.bfloat16 else "fp32"
    check_layout(Layout(parallel, dit, precision, fp8, hardware=Hardware.detect()))
    config = transformer_config(dit, parallel, case.dtype, fp8)
    config.num_attention_heads = config.num_query_groups = case.heads
    config.ffn_hidden_size = case.feed_forward
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "cp"])
    spec = get_layer_spec(impl)
    layers = []
    for number in range(case.layers):
        with torch.device(case.device), building_layer(config, number):
            layers.append(DiTLayer(config, spec, number + 1, groups))
    modules = nn.ModuleList(layers)
    _initialise(modules)
    return _our_linears(case, config, layers[0]) if case.part == "linears" else _our_blocks(case, config, layers)


def _our_blocks(case: Case, config: Any, layers: list[DiTLayer]) -> Workload:
    multiple = token_multiple(config)
    padded = -(-case.tokens // multiple) * multiple
    text, hidden_text = padded_text(
        case.random(case.text_tokens, case.batch, case.hidden).detach(), case.text_lengths(), multiple
    )
    rope = build_rope((case.tokens, 1, 1), case.rope_split, case.dtype, case.device, False).of_rank(padded, 0, 1)
    tokens = TokenLayout(rope, case.tokens, 0)
    text.requires_grad_()
    x, modulation = case.random(padded, case.batch, case.hidden), case.random(case.batch, 6, case.hidden)

    def forward() -> list[Tensor]:
        out = x
        _weights_changed(layers)
        with running_layers(config):
            for number, layer in enumerate(layers):
                with running_layer(config, number):
                    out = layer(out, modulation, text, hidden_text, None, tokens)
        return [out]

    return Workload(forward, [x, modulation, text], _parameters(layers))


def _our_linears(case: Case, config: Any, layer: DiTLayer) -> Workload:
    attention, cross, mlp = layer.self_attention, layer.cross_attention, layer.mlp
    linears = [attention.linear_qkv, attention.linear_proj, cross.linear_q, cross.linear_proj]
    linears += [mlp.linear_fc1, mlp.linear_fc2]
    tokens = -(-case.tokens // token_multiple(config)) * token_multiple(config)
    inputs = _linear_inputs(case, tokens)

    def forward() -> list[Tensor]:
        _weights_changed([layer])
        with running_layers(config), running_layer(config, 0):
            return [linear(x)[0] for linear, x in zip(linears, inputs, strict=True)]

    return Workload(forward, inputs, _parameters(linears))


def build_plain(case: Case, compiled: bool = False) -> Workload:
    """The block of `plain_torch_dit`."""
    sizes = plain_torch_dit.Sizes(
        case.layers, case.heads, case.head_dim, case.hidden, case.feed_forward, channels=0, llm_channels=0,
        clip_channels=0,
    )  # fmt: skip
    blocks = nn.ModuleList(plain_torch_dit.Block(sizes) for _ in range(case.layers)).to(case.device, case.dtype)
    _initialise(blocks)
    if case.part == "linears":
        return _plain_linears(case, blocks[0])
    lengths = case.text_lengths()
    positions = torch.arange(case.text_tokens, device=case.device)
    visible = None if lengths is None else (positions < lengths[:, None])[:, None, None]
    rope = plain_torch_dit.rope_tables((case.tokens, 1, 1), case.rope_split, case.device, case.dtype)
    x, modulation = case.random(case.batch, case.tokens, case.hidden), case.random(case.batch, 6, case.hidden)
    text = case.random(case.batch, case.text_tokens, case.hidden)
    if compiled:
        torch._dynamo.reset()
    functions = [torch.compile(block, dynamic=False) if compiled else block for block in blocks]

    def forward() -> list[Tensor]:
        out = x
        for function in functions:
            out = function(out, modulation, text, visible, rope)
        return [out]

    return Workload(forward, [x, modulation, text], _parameters(blocks))


def _plain_linears(case: Case, block: plain_torch_dit.Block) -> Workload:
    linears = [block.attn1.wqkv, block.attn1.wo, block.attn2.wq, block.attn2.wo]
    linears += [block.ff.net[0].proj, block.ff.net[2]]
    inputs = _linear_inputs(case, case.tokens)
    return Workload(
        lambda: [linear(x) for linear, x in zip(linears, inputs, strict=True)], inputs, _parameters(linears)
    )


def _weights_changed(layers: list[DiTLayer]) -> None:
    """Have FP8 linears cast their weights anew, as in the first micro-batch of every step."""
    for layer in layers:
        layer.set_is_first_microbatch()


def _linear_inputs(case: Case, tokens: int) -> list[Tensor]:
    inner = case.heads * case.head_dim
    widths = (case.hidden, inner, case.hidden, inner, case.hidden, case.feed_forward)
    return [case.random(tokens, case.batch, width) for width in widths]


def _parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters()]


@torch.no_grad()
def _initialise(modules: nn.Module) -> None:
    for parameter in modules.parameters():
        parameter.normal_(std=INIT_STD)


_te = partial(build_ours, impl="transformer_engine")
VARIANTS = {
    "local": Variant(partial(build_ours, impl="local")),
    "local_without_kernels": Variant(partial(build_ours, impl="local"), fused.without_kernels),
    "te": Variant(_te),
    **{f"te_fp8_{recipe}": Variant(partial(_te, recipe=recipe)) for recipe in ("delayed", "tensorwise", "blockwise")},
    "te_fp8_mxfp8": Variant(partial(_te, recipe="mxfp8")),
    "plain": Variant(build_plain),
    "plain_compiled": Variant(partial(build_plain, compiled=True)),
}
