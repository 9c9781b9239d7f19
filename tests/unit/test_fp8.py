"""FP8 as far as it shows without a GPU: settings, padding, and which part of the model it covers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_video import device, fp8
from megatron_video.config_io import load_config
from megatron_video.dit import DiTConfig, VideoDiT, build_dit, transformer_config
from megatron_video.dit.context_parallel import attend_in_ring
from megatron_video.dit.embedders import padded_text
from megatron_video.errors import UserError
from megatron_video.fp8 import RECIPES, Fp8Config, set_parameter, token_multiple
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel
from training.config import PretrainConfig

SMALL = DiTConfig(
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=6,
    out_channels=6,
    caption_channels=[24, 12],
)
ENGINE = ParallelConfig(transformer_impl="transformer_engine")


@pytest.fixture
def one_process() -> Iterator[ParallelConfig]:
    parallel = ParallelConfig()
    destroy_parallel(keep_distributed=True)
    initialize_parallel(parallel, seed=1, device_info=device.initialize())
    yield parallel
    destroy_parallel(keep_distributed=True)


def small_model(parallel: ParallelConfig) -> VideoDiT:
    (model,) = build_dit(SMALL, parallel, torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def inputs(text_lengths: Tensor | None) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(5)
    return {
        "latents": torch.randn(2, 3, 6, 3, 5, generator=generator),
        "timestep": torch.tensor([0.13, 0.87]),
        "llm_states": torch.randn(2, 7, 24, generator=generator),
        "clip_states": torch.randn(2, 4, 12, generator=generator),
        "text_lengths": text_lengths,
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_reach_megatron_core(recipe: str) -> None:
    delayed = recipe == "delayed"
    settings = Fp8Config(
        recipe=recipe,  # type: ignore[arg-type]
        format="e4m3",
        first_layers_bf16=0 if delayed else 1,
        last_layers_bf16=0 if delayed else 2,
        param_gather=True,
        dot_product_attention=True,
        amax_history_len=16,
        amax_compute_algo="most_recent",
        margin=2,
    )
    config = transformer_config(SMALL, ENGINE, torch.bfloat16, settings)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("e4m3", recipe, True)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo, config.fp8_margin) == (16, "most_recent", 2)
    assert config.fp8_dot_product_attention
    assert config.first_last_layers_bf16 is not delayed
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == ((0, 0) if delayed else (1, 2))
    assert token_multiple(config) == {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}[recipe]


def test_without_a_recipe_nothing_is_in_fp8() -> None:
    config = transformer_config(SMALL, ENGINE, torch.bfloat16)
    assert config.fp8 is None
    assert not config.fp8_param
    assert token_multiple(config) == 1


@pytest.mark.parametrize("field", ["first_layers_bf16", "last_layers_bf16", "margin"])
def test_negative_numbers_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=-1"):
        Fp8Config(**{field: -1})


def test_run_configuration_is_judged_with_its_fp8_settings() -> None:
    chosen = ["fp8.recipe=tensorwise", "fp8.last_layers_bf16=1"]
    config = load_config(PretrainConfig, None, ["parallel.transformer_impl=transformer_engine", *chosen])
    assert (config.fp8.recipe, config.fp8.last_layers_bf16) == ("tensorwise", 1)
    with pytest.raises(UserError, match="transformer_impl=transformer_engine"):
        load_config(PretrainConfig, None, chosen)


@pytest.mark.parametrize("text_lengths", [None, torch.tensor([11, 6])], ids=["all visible", "some hidden"])
@pytest.mark.parametrize("multiple", [16, 32, 128])
def test_padding_changes_no_number(one_process: ParallelConfig, multiple: int, text_lengths: Tensor | None) -> None:
    model = small_model(one_process)
    target = torch.randn(2, 3, 6, 3, 5, generator=torch.Generator().manual_seed(8))
    results = []
    for used in (1, multiple):
        model.token_multiple = used
        assert model.padded_tokens(3 * 3 * 5) == -(-45 // used) * used
        model.zero_grad()
        output = model(**inputs(text_lengths))
        (output - target).square().mean().backward()
        results.append((output.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (plain, gradients), (padded, padded_gradients) = results
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        error = (padded_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-5, f"{name}: {error:.3g}"


def test_padded_text_is_hidden_text() -> None:
    text, hidden = padded_text(torch.ones(5, 2, 4), None, 8)
    assert text.shape == (8, 2, 4)
    assert not text[5:].any()
    assert hidden is not None
    assert hidden[:, 0, 0].tolist() == [[False] * 5 + [True] * 3] * 2
    same, hidden = padded_text(torch.ones(8, 2, 4), None, 8)
    assert same.shape == (8, 2, 4)
    assert hidden is None


class Contexts:
    """Stands where Transformer Engine's contexts would be entered, and notes the layer of the innermost."""

    def __init__(self) -> None:
        self.open: list[int] = []

    @contextmanager
    def __call__(self, config: Any, layer_no: int = -1, is_init: bool = False) -> Iterator[None]:
        self.open.append(layer_no)
        yield
        self.open.pop()


@pytest.mark.parametrize(("recipe", "layers"), [("delayed", {-1}), ("tensorwise", {0, 1, 2})])
def test_only_blocks_run_in_fp8(
    one_process: ParallelConfig, monkeypatch: pytest.MonkeyPatch, recipe: str, layers: set[int]
) -> None:
    model, contexts = small_model(one_process), Contexts()
    monkeypatch.setattr(fp8, "get_fp8_context", contexts)
    model.config.fp8, model.config.fp8_recipe = "hybrid", recipe
    seen: dict[str, list[int]] = {}
    names = {module: name for name, module in model.named_modules() if not list(module.children())}
    for module in names:
        module.register_forward_pre_hook(lambda module, _: seen.update({names[module]: list(contexts.open)}))
    model(**inputs(None))
    inside = {name for name, depth in seen.items() if depth}
    assert inside == {name for name in seen if name.startswith("layers.")}
    assert {depth[-1] for depth in seen.values() if depth} == layers
    if recipe == "tensorwise":
        assert all(seen[name] == [int(name.split(".")[1])] for name in inside)
    outside = {name.split(".")[0] for name in seen if name not in inside}
    assert {"patch_embedding", "time_conditioning", "text_projection", "head"} >= outside >= {"time_conditioning"}


def test_only_blocks_are_built_with_fp8_weights(one_process: ParallelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts, built = Contexts(), {}
    monkeypatch.setattr(fp8, "get_fp8_context", contexts)
    plain = nn.Module.__init__

    def note(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        plain(module, *args, **kwargs)
        built[id(module)] = list(contexts.open)

    monkeypatch.setattr(nn.Module, "__init__", note)
    (model,) = build_dit(SMALL, one_process, torch.float32, device=torch.device("cpu"), init_seed=None)
    for name, module in model.named_modules():
        expected = [int(name.split(".")[1])] if name.count(".") >= 1 and name.startswith("layers.") else []
        assert built[id(module)] == expected, name


def test_writing_a_weight_reaches_the_copy_for_the_optimizer() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    set_parameter(parameter, torch.full((2, 3), 0.5))
    assert parameter.eq(0.5).all()
    assert not hasattr(parameter, "_high_precision_init_val")
    parameter._high_precision_init_val = torch.zeros(2, 3, dtype=torch.bfloat16)  # type: ignore[attr-defined]
    set_parameter(parameter, torch.full((2, 3), 0.25))
    assert parameter._high_precision_init_val.eq(0.25).all()  # type: ignore[attr-defined]


def test_ring_refuses_padding(one_process: ParallelConfig) -> None:
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group()
    tokens = torch.randn(6, 1, 2, 8)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query + key + value).flatten(2)

    assert torch.equal(attend_in_ring(attend, tokens, tokens, tokens, 6, group), (3 * tokens).flatten(2))
    with pytest.raises(UserError, match=r"5 video tokens had to be padded to 6 .*cp_comm_type=a2a"):
        attend_in_ring(attend, tokens, tokens, tokens, 5, group)
