"""Step-LLM against its equations, the released names and sizes, and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_video.errors import UserError
from megatron_video.text.step_llm import StepLLM, StepLLMConfig, alibi_slopes, position_bias

KEYS = Path(__file__).parent.parent / "golden" / "step_llm_keys.tsv"
TINY = {
    "hidden_size": 48,
    "num_layers": 2,
    "num_attention_heads": 6,
    "num_attention_groups": 3,
    "ffn_hidden_size": 100,
    "padded_vocab_size": 64,
}


def _tiny() -> StepLLM:
    torch.manual_seed(0)
    return StepLLM(StepLLMConfig.from_json(TINY, "test")).eval()


def test_released_names_shapes_and_parameter_count() -> None:
    with torch.device("meta"):
        model = StepLLM(StepLLMConfig())
    expected = {name: json.loads(shape) for name, shape in map(str.split, _tab_lines())}
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected
    assert len(expected) == 289
    assert sum(parameter.numel() for parameter in model.parameters()) == 19_579_600_896


def _tab_lines() -> list[str]:
    # str.split splits at white space, so the shape must hold none.
    return [line.replace(", ", ",") for line in KEYS.read_text().splitlines()]


def test_slopes_of_48_heads() -> None:
    slopes = alibi_slopes(48)
    assert slopes[31] == 2.0**-8
    assert slopes[0] == pytest.approx(2 ** (-8 / 32))
    # The 16 heads beyond 32 lie half way between the first ones.
    assert slopes[32] == pytest.approx(2 ** (-4 / 32))
    assert slopes[47] == pytest.approx(2 ** (-4 * 31 / 32))
    assert len(alibi_slopes(8)) == 8


def test_bias_falls_with_the_square_root_of_the_distance_and_hides_the_future() -> None:
    bias = position_bias(4, 10)[0]
    slopes = alibi_slopes(4)
    assert torch.allclose(bias[:, 9, 0], -slopes * 3)
    assert torch.allclose(bias[:, 6, 2], -slopes * 2)
    assert (bias.diagonal(dim1=1, dim2=2) == 0).all()
    assert (bias[:, 2, 3:] == -math.inf).all()


def test_a_token_depends_on_its_past_only() -> None:
    model = _tiny()
    ids = torch.randint(0, 64, (2, 12))
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 64
    with torch.no_grad():
        first, second, short = model(ids), model(changed), model(ids[:, :7])
    assert torch.equal(first[:, :7], second[:, :7])
    assert not torch.isclose(first[:, 7:], second[:, 7:]).all(-1).any()
    torch.testing.assert_close(first[:, :7], short)


def test_order_matters_without_position_embeddings() -> None:
    model = _tiny()
    with torch.no_grad():
        states = model(torch.tensor([[1, 5, 9, 2], [1, 9, 5, 2]]))
    assert (states[0, 3] - states[1, 3]).abs().max() > 1e-3


def test_grouped_heads_equal_full_heads_with_repeated_keys() -> None:
    """Attention with G groups is attention with H groups whose key and value rows are repeated H/G times."""
    model, full = _tiny(), StepLLM(StepLLMConfig.from_json({**TINY, "num_attention_groups": 6}, "test"))
    weights = dict(model.state_dict())
    for name in [name for name in weights if "wqkv" in name]:
        query, key_value = weights[name].split([48, 48])
        repeated = key_value.view(3, 2, 8, 48).repeat_interleave(2, dim=0).reshape(96, 48)
        weights[name] = torch.cat([query, repeated])
    full.load_state_dict(weights)
    ids = torch.randint(0, 64, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), full(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads=5 does not divide hidden_size=48"),
        ({"num_attention_groups": 4}, "num_attention_groups=4 does not divide num_attention_heads=6"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"fp32_residual_connection": True}, "fp32_residual_connection=True is not supported"),
        ({"caption_max_length": 2}, "caption_max_length=2"),
    ],
)
def test_wrong_configurations_are_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StepLLMConfig.from_json({**TINY, **change}, "config.json")


def test_a_missing_size_is_not_filled_from_the_released_model() -> None:
    with pytest.raises(UserError, match="num_layers missing"):
        StepLLMConfig.from_json({key: value for key, value in TINY.items() if key != "num_layers"}, "config.json")
