"""The DiT on one process: the second implementation, the released 30B's names and sizes, initialisation, bad input."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain_dit
import pytest
import torch

from checkpoints_tools.dit_names import released_names
from megatron_video import device
from megatron_video.dit import DiTConfig, VideoDiT, build_dit
from megatron_video.errors import UserError
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel

CPU = torch.device("cpu")
SMALL = {
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 6,
    "out_channels": 6,
    "caption_channels": [24, 12],
}


@pytest.fixture
def one_process() -> Iterator[ParallelConfig]:
    parallel = ParallelConfig()
    destroy_parallel(keep_distributed=True)
    initialize_parallel(parallel, seed=1, device_info=device.initialize())
    yield parallel
    destroy_parallel(keep_distributed=True)


def randomised(config: DiTConfig, parallel: ParallelConfig) -> VideoDiT:
    """A model with no parameter at zero, so that every part shows in the output."""
    (model,) = build_dit(config, parallel, torch.float32, device=CPU)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def inputs(config: DiTConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "latents": torch.randn(2, 3, config.in_channels, 4, 6, generator=generator),
        "timestep": torch.tensor([0.13, 0.87]),
        "llm_states": torch.randn(2, 7, config.llm_channels, generator=generator),
        "clip_states": torch.randn(2, 5, config.clip_channels or 1, generator=generator),
        "text_lengths": torch.tensor([12, 8]),
    }


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("fps", [None, 24.0])
def test_additional_conditions_equal_a_second_implementation(
    one_process: ParallelConfig, patch_size: int, fps: float | None
) -> None:
    config = DiTConfig(**SMALL, patch_size=patch_size, use_additional_conditions=True)
    model = randomised(config, one_process)
    given = inputs(config)
    rate = None if fps is None else torch.tensor([fps, fps / 2])
    names = released_names(config)
    weights = {names[name]: value.detach() for name, value in model.named_parameters()}
    expected = plain_dit.forward(
        weights,
        4,
        [8, 4, 4],
        given["latents"],
        given["timestep"],
        given["llm_states"],
        given["clip_states"],
        given["text_lengths"],
        rate,
    )
    with torch.no_grad():
        actual = model(**given, fps=rate)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=5e-5)


def test_released_model_has_the_released_names_and_sizes(one_process: ParallelConfig) -> None:
    config = DiTConfig()
    (model,) = build_dit(config, one_process, torch.bfloat16, device=torch.device("meta"))
    names = released_names(config)
    shapes = {names[name]: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert len(shapes) == 785
    assert sum(parameter.numel() for parameter in model.parameters()) == 29_342_478_400
    table = Path(__file__).parent.parent / "golden" / "dit_30b_keys.tsv"
    rows = [line.split("\t") for line in table.read_text().splitlines()[1:]]
    assert shapes == {key: tuple(map(int, shape.strip("[]").split(","))) for key, shape in rows}
    # The identity by which inference tools recognise the released file: md5 over sorted names and `name:shape`s.
    entries = [*shapes, *(f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items())]
    assert hashlib.md5(",".join(sorted(entries)).encode()).hexdigest() == "5c0216a2132b082c10cb7a0e0377e681"


def test_initialisation_is_keyed_by_name_and_starts_as_documented(one_process: ParallelConfig) -> None:
    config = DiTConfig(**SMALL)
    first, second, other = (
        dict(build_dit(config, one_process, torch.float32, device=CPU, init_seed=seed)[0].named_parameters())
        for seed in (7, 7, 8)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["patch_embedding.weight"], other["patch_embedding.weight"])
    width, depth = config.hidden_size, config.num_layers
    std = (2 / (5 * width)) ** 0.5
    first = {name: parameter.detach() for name, parameter in first.items()}
    assert first["layers.0.self_attention.linear_qkv.weight"].std() == pytest.approx(std, rel=0.05)
    scaled = first["layers.1.mlp.linear_fc2.weight"].std()
    assert scaled == pytest.approx(std / (2 * depth) ** 0.5, rel=0.05)
    assert not first["layers.0.modulation_table"].any()
    assert not first["head.projection.weight"].any()


def test_new_model_predicts_zero_and_every_gate_learns(one_process: ParallelConfig) -> None:
    """adaLN-zero: the first output is exactly 0, and after one step on the head all gates get a gradient."""
    config = DiTConfig(**SMALL)
    (model,) = build_dit(config, one_process, torch.float32, device=CPU)
    given = inputs(config)
    assert not model(**given).any()
    with torch.no_grad():
        model.head.projection.weight.normal_(std=0.1)
    (model(**given) - 1).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith(("modulation_table", "cross_attention.linear_proj.weight")):
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_recompute_changes_no_number(one_process: ParallelConfig) -> None:
    # With dropout, whose masks the second forward pass must meet again.
    config, gradients = DiTConfig(**SMALL, hidden_dropout=0.2), []
    settings: list[dict[str, Any]] = [
        {},
        {"recompute_granularity": "full"},
        {"recompute_granularity": "full", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "cross_attention", "mlp"]},
    ]
    for setting in settings:
        parallel = ParallelConfig(**setting)
        (model,) = build_dit(config, parallel, torch.float32, device=CPU)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        model(**inputs(config), dropout_seeds=torch.tensor([3, 4])).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for kept, every_layer, first_layer, parts in zip(*gradients, strict=True):
        assert torch.equal(every_layer, kept)
        assert torch.equal(first_layer, kept)
        # Parts of a layer hand back their gradients in another order, and sums of three round differently.
        assert (parts - kept).norm() < 1e-6 * kept.norm()


def test_recompute_keeps_less_for_backward(one_process: ParallelConfig) -> None:
    config, kept = DiTConfig(**SMALL), {}
    for name, setting in {
        "nothing": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full"},
    }.items():
        (model,) = build_dit(config, ParallelConfig(**setting), torch.float32, device=CPU)
        kept[name] = saved_bytes(model, inputs(config))
    assert kept["full"] < 0.5 * kept["selective"] < 0.5 * kept["nothing"]


def saved_bytes(model: torch.nn.Module, given: dict[str, Any]) -> int:
    """Bytes of distinct tensors that one forward pass keeps for backward, parameters left out."""
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(**given)
    return sum(kept.values())


def test_dropout_needs_seeds(one_process: ParallelConfig) -> None:
    config = DiTConfig(**SMALL, hidden_dropout=0.1)
    model = randomised(config, one_process).train()
    with pytest.raises(ValueError, match=r"hidden_dropout=0\.1 needs dropout_seeds"):
        model(**inputs(config))
    model.eval()
    assert torch.equal(model(**inputs(config)), model(**inputs(config)))


def test_bad_sizes_are_refused_by_name(one_process: ParallelConfig) -> None:
    config = DiTConfig(**SMALL, patch_size=2)
    model = randomised(config, one_process)
    given = inputs(config)
    with pytest.raises(UserError, match="in_channels=6"):
        model(**given | {"latents": torch.zeros(2, 1, 4, 4, 4)})
    with pytest.raises(UserError, match="patch_size=2"):
        model(**given | {"latents": torch.zeros(2, 1, 6, 5, 4)})
    with pytest.raises(ValueError, match="rope_channel_split"):
        DiTConfig(attention_head_dim=12)
    with pytest.raises(UserError, match=r"nearest that work: parallel\.tensor_model_parallel_size=1, 2, 4"):
        build_dit(config, ParallelConfig(tensor_model_parallel_size=3), torch.float32, device=CPU)
    with pytest.raises(UserError, match="num_layers=2"):
        build_dit(config, ParallelConfig(pipeline_model_parallel_size=3), torch.float32, device=CPU)
    with pytest.raises(UserError, match="transformer_engine"):
        build_dit(config, ParallelConfig(transformer_impl="transformer_engine"), torch.float32, device=CPU)
