"""The optimizer step against torch's own AdamW, and the refusal of non-finite steps."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, _get_param_groups

from megatron_video import device
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel, one_process
from training.config import AdamWConfig
from training.data import Batch
from training.optimizer import WITHOUT_DECAY, build_optimizer, set_learning_rate, wrap_data_parallel
from training.train_step import train_step

MODEL = DiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, caption_channels=[12, 8]
)
SETTINGS = AdamWConfig(learning_rate=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.3, clip_grad_norm=0.05)


@pytest.fixture
def model() -> Iterator[list[DistributedDataParallel]]:
    info = device.initialize()
    initialize_parallel(ParallelConfig(), 0, info)
    chunks = build_dit(MODEL, ParallelConfig(), torch.float32, device=info.device, init_seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in chunks[0].parameters():
        # The initialisation's zeros would keep most gradients at zero.
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    yield wrap_data_parallel(chunks, ParallelConfig())
    destroy_parallel()


def make_batch(seed: int, samples: int, frames: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latents, target = (torch.randn(samples, frames, 4, 2, 3, generator=generator) for _ in range(2))
    return Batch(
        latents=latents,
        timestep=torch.rand(samples, generator=generator),
        llm_states=torch.randn(samples, 5, 12, generator=generator),
        clip_states=torch.randn(samples, 3, 8, generator=generator),
        text_lengths=torch.tensor([4 + i % 4 for i in range(samples)]),
        target=target,
    )


def mean_loss(module: torch.nn.Module, batches: list[Batch]) -> torch.Tensor:
    """Mean over all elements of all micro-batches, written down directly."""
    errors = [
        (module(b.latents, b.timestep, b.llm_states, b.clip_states, b.text_lengths) - b.target).square().flatten()
        for b in batches
    ]
    return torch.cat(errors).mean()


def test_steps_equal_torch_adamw_with_clipping_and_decay_groups(model: list[DistributedDataParallel]) -> None:
    module = model[0].module
    batches = [make_batch(1, 3, 3), make_batch(2, 2, 1)]
    names = [name for name, _ in module.named_parameters()]
    without_decay = {name for name, p in module.named_parameters() if p.dim() == 1 or "modulation_table" in name}
    assert any(name.endswith("modulation_table") for name in without_decay)
    ours = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    reference = torch.optim.AdamW(
        [
            {"params": [ours[n] for n in names if n not in without_decay], "weight_decay": 0.3},
            {"params": [ours[n] for n in names if n in without_decay], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-6,
    )
    optimizer = build_optimizer(model, SETTINGS, ParallelConfig())
    for _ in range(3):
        set_learning_rate(optimizer, 1e-2, SETTINGS.weight_decay)
        result = train_step(model, optimizer, batches)
        loss = torch.func.functional_call(_Loss(module, batches), {f"module.{n}": p for n, p in ours.items()}, ())
        reference.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(ours.values(), SETTINGS.clip_grad_norm)
        reference.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert not result.refused
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, ours[name], rtol=1e-4, atol=1e-5, msg=name)


class _Loss(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, batches: list[Batch]) -> None:
        super().__init__()
        self.module, self.batches = module, batches

    def forward(self) -> torch.Tensor:
        return mean_loss(self.module, self.batches)


# Every parameter of the 30B, its number over all layers, and whether its weights decay.
GROUPS_30B = {
    "patch_embedding.weight": (1, True),
    "patch_embedding.bias": (1, False),
    "time_conditioning.time_embedder.linear_1.weight": (1, True),
    "time_conditioning.time_embedder.linear_1.bias": (1, False),
    "time_conditioning.time_embedder.linear_2.weight": (1, True),
    "time_conditioning.time_embedder.linear_2.bias": (1, False),
    "time_conditioning.modulation_linear.weight": (1, True),
    "time_conditioning.modulation_linear.bias": (1, False),
    "text_projection.llm_linear_1.weight": (1, True),
    "text_projection.llm_linear_1.bias": (1, False),
    "text_projection.llm_linear_2.weight": (1, True),
    "text_projection.llm_linear_2.bias": (1, False),
    "text_projection.clip_linear.weight": (1, True),
    "text_projection.clip_linear.bias": (1, False),
    "layers.*.modulation_table": (48, False),
    "layers.*.norm1.weight": (48, False),
    "layers.*.norm1.bias": (48, False),
    "layers.*.self_attention.linear_qkv.weight": (48, True),
    "layers.*.self_attention.linear_proj.weight": (48, True),
    "layers.*.self_attention.q_layernorm.weight": (48, False),
    "layers.*.self_attention.k_layernorm.weight": (48, False),
    "layers.*.cross_attention.linear_q.weight": (48, True),
    "layers.*.cross_attention.linear_kv.weight": (48, True),
    "layers.*.cross_attention.linear_proj.weight": (48, True),
    "layers.*.cross_attention.q_layernorm.weight": (48, False),
    "layers.*.cross_attention.k_layernorm.weight": (48, False),
    "layers.*.norm2.weight": (48, False),
    "layers.*.norm2.bias": (48, False),
    "layers.*.mlp.linear_fc1.weight": (48, True),
    "layers.*.mlp.linear_fc2.weight": (48, True),
    "head.modulation_table": (1, False),
    "head.projection.weight": (1, True),
    "head.projection.bias": (1, False),
}


def test_weight_decay_of_every_parameter_of_the_30b() -> None:
    with one_process() as parallel:
        chunks = build_dit(DiTConfig(), parallel, torch.bfloat16, device=torch.device("meta"))
        names = {id(parameter): name for name, parameter in chunks[0].named_parameters()}
        # What get_megatron_optimizer makes its groups with.
        groups = _get_param_groups(chunks, OptimizerConfig(weight_decay=0.01), WITHOUT_DECAY)
    found: Counter[tuple[str, bool]] = Counter()
    for group in groups:
        assert group["wd_mult"] in (0.0, 1.0)
        for parameter in group["params"]:
            found[re.sub(r"(?<=\.)\d+(?=\.)", "*", names.pop(id(parameter))), group["wd_mult"] == 1.0] += 1
    assert names == {}
    assert found == {(name, decays): count for name, (count, decays) in GROUPS_30B.items()}


@pytest.mark.parametrize("where", ["target", "latents"])
def test_a_non_finite_step_is_refused_and_leaves_no_trace(model: list[DistributedDataParallel], where: str) -> None:
    optimizer = build_optimizer(model, SETTINGS, ParallelConfig())
    set_learning_rate(optimizer, 1e-2, SETTINGS.weight_decay)
    good = make_batch(1, 2, 3)
    broken = getattr(good, where).clone()
    broken[0, 0, 0, 0, 0] = float("nan")
    before = {name: p.detach().clone() for name, p in model[0].named_parameters()}
    assert train_step(model, optimizer, [dataclasses.replace(good, **{where: broken})]).refused
    for name, parameter in model[0].named_parameters():
        assert torch.equal(parameter, before[name]), name
    result = train_step(model, optimizer, [good])
    assert not result.refused
    assert all(parameter.isfinite().all() for parameter in model[0].parameters())


def test_a_stop_request_is_reported(model: list[DistributedDataParallel]) -> None:
    optimizer = build_optimizer(model, SETTINGS, ParallelConfig())
    set_learning_rate(optimizer, 1e-2, SETTINGS.weight_decay)
    assert train_step(model, optimizer, [make_batch(1, 2, 3)], stop_flags=[False, True]).stop_reason == "wall time"
    assert train_step(model, optimizer, [make_batch(1, 2, 3)]).stop_reason is None
