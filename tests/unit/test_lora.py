"""Adapters merged into weights: the numbers of PEFT's own merge, and refusals by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import NamedModule, released_weights, tiny_dit, write_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoints_tools import cli
from checkpoints_tools.forms import Reading, open_weights
from checkpoints_tools.weights import Weights
from megatron_video.cli import run_command
from megatron_video.errors import UserError

peft = pytest.importorskip("peft", reason="the outside truth: pip install 'megatron-video[dev]'")

TARGETS = ["attn1.wqkv", "attn2.wkv", "ff.net.2", "caption_projection.linear_1"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"attn2.wkv": 3}, "alpha_pattern": {"ff.net.2": 5, "transformer_blocks.0.*wqkv": 2}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    """With the tiny DiT as a file of torch, fp32 and bf16."""
    write_config(tmp_path)
    torch.save(released_weights(), tmp_path / "fp32.pt")
    torch.save(released_weights(dtype=torch.bfloat16), tmp_path / "bf16.pt")
    return tmp_path


def _adapted(weights: dict[str, Tensor], seed: int, name: str, model: Any = None, **options: Any) -> Any:
    """A PEFT model over a plain module with the released names, with a random adapter."""
    module = NamedModule(weights) if model is None else model
    conv = nn.Conv2d(4, 64, 1)
    conv.load_state_dict({n: weights[f"pos_embed.proj.{n}"] for n in ("weight", "bias")})
    if isinstance(module, NamedModule):
        module.get_submodule("pos_embed").add_module("proj", conv)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False, **options}
    )
    torch.manual_seed(seed)
    if model is not None:
        model.add_adapter(name, config)
        return model
    return peft.get_peft_model(module, config, adapter_name=name)


def _merged_by_peft(model: Any, *adapters: str) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = model.merge_and_unload(adapter_names=list(adapters)).state_dict()
    return merged


def _compare(weights: Weights, expected: dict[str, Tensor], exact: bool) -> None:
    for ours, theirs in weights.model.released.items():
        found, wanted = weights.tensor(ours), expected[theirs]
        if exact:
            assert torch.equal(found, wanted.to(found.dtype)), theirs
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_peft(folder: Path, kind: str) -> None:
    model = _adapted(released_weights(), 1, "default", **KINDS[kind])
    model.save_pretrained(folder / "adapter")
    reading = Reading(loras=(str(folder / "adapter"),))
    weights = open_weights(folder / "fp32.pt", reading)
    expected = _merged_by_peft(model, "default")
    _compare(weights, expected, exact=kind != "dora")
    begin = released_weights()
    changed = {theirs for theirs in begin if not torch.equal(begin[theirs], expected[theirs])}
    assert len(changed) == 2 * 3 + 1


def test_bf16_weights_are_rounded_once(folder: Path) -> None:
    base = {name: weight.float() for name, weight in released_weights(dtype=torch.bfloat16).items()}
    model = _adapted(base, 1, "default")
    model.save_pretrained(folder / "adapter")
    weights = open_weights(folder / "bf16.pt", Reading(loras=(str(folder / "adapter"),)))
    assert {template.dtype for template in weights.templates.values()} == {torch.bfloat16}
    _compare(weights, _merged_by_peft(model, "default"), exact=True)


def test_several_adapters_with_weights_add_up(folder: Path) -> None:
    model = _adapted(released_weights(), 1, "one")
    _adapted(released_weights(), 2, "two", model, r=2, target_modules=["wqkv", "attn2.wq"])
    model.save_pretrained(str(folder), selected_adapters=["one", "two"])
    told: list[str] = []
    loras = (str(folder / "one"), f"{folder / 'two'}=-0.25")
    weights = open_weights(folder / "fp32.pt", Reading(loras=loras, tell=told.append))
    assert f"{folder / 'two'}: merged into 4 of 49 tensors, scale -0.75" in told
    model.base_model.set_adapter(["one", "two"])
    for module in model.modules():
        if "two" in getattr(module, "scaling", {}):
            module.scaling["two"] *= -0.25
    _compare(weights, _merged_by_peft(model, "one", "two"), exact=False)


def test_convolutions_too(folder: Path) -> None:
    model = _adapted(released_weights(), 1, "default", target_modules=["pos_embed.proj"])
    model.save_pretrained(folder / "adapter")
    weights = open_weights(folder / "fp32.pt", Reading(loras=(str(folder / "adapter"),)))
    _compare(weights, _merged_by_peft(model, "default"), exact=False)


def _renamed(keys: dict[str, Tensor], new: Callable[[str], str]) -> dict[str, Tensor]:
    return {new(name): tensor for name, tensor in keys.items()}


def _our_module(key: str) -> str:
    """Our name in the place of the released one."""
    ours = {
        theirs.removesuffix(".weight"): name.removesuffix(".weight") for name, theirs in tiny_dit().released.items()
    }
    module, _, end = key.removeprefix("base_model.model.").partition(".lora_")
    return f"base_model.model.{ours[module]}.lora_{end}"


LAYOUTS: dict[str, Callable[[str], str]] = {
    "diffusers": lambda key: key.replace("base_model.model.", "transformer."),
    "kohya": lambda key: key.removeprefix("base_model.model.").replace("_A", "_down").replace("_B", "_up"),
    "our names": _our_module,
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "of a compiled model": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.module."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_of_the_keys_mean_the_same(folder: Path, layout: str) -> None:
    _adapted(released_weights(), 1, "default").save_pretrained(folder / "adapter")
    expected = open_weights(folder / "fp32.pt", Reading(loras=(str(folder / "adapter"),)))
    keys = _renamed(load_file(folder / "adapter" / "adapter_model.safetensors"), LAYOUTS[layout])
    other = folder / "other"
    other.mkdir()
    # alpha and rank: in the file's header, as diffusers has them.
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.r": 4})}
    save_file(keys, other / "pytorch_lora_weights.safetensors", metadata=header)
    for path in (other, other / "pytorch_lora_weights.safetensors"):
        found = open_weights(folder / "fp32.pt", Reading(loras=(str(path),)))
        assert all(torch.equal(found.tensor(name), expected.tensor(name)) for name in expected.templates)


def test_alpha_of_every_module_counts_before_the_configuration(folder: Path) -> None:
    _adapted(released_weights(), 1, "default").save_pretrained(folder / "adapter")
    keys = load_file(folder / "adapter" / "adapter_model.safetensors")
    alphas = {f"{name.partition('.lora_A')[0]}.alpha": torch.tensor(12.0) for name in keys if "lora_A" in name}
    save_file({**keys, **alphas}, folder / "alphas.safetensors")
    twice = open_weights(folder / "fp32.pt", Reading(loras=(str(folder / "alphas.safetensors"),)))
    once = open_weights(folder / "fp32.pt", Reading(loras=(f"{folder / 'adapter'}=2",)))
    assert all(torch.equal(once.tensor(name), twice.tensor(name)) for name in once.templates)


def _with_keys(**changes: Tensor | None) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        keys = load_file(file) | changes
        save_file({name: tensor for name, tensor in keys.items() if tensor is not None}, file)

    return change


def _with_fields(**changes: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


BLOCK = "base_model.model.transformer_blocks"
QKV = f"{BLOCK}.0.attn1.wqkv"


def _pair(module: str, inputs: int, outputs: int) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": torch.ones(4, inputs), f"{module}.lora_B.weight": torch.ones(outputs, 4)}


# what is done to the adapter, what is said
BAD: list[tuple[Callable[[Path], Any], str]] = [
    (
        _with_keys(**_pair(f"{BLOCK}.0.attn1.to_q", 64, 64)),
        r"modules that this model has not: .*attn1\.to_q; the model's are called .*wqkv",
    ),
    (_with_keys(**_pair(f"{BLOCK}.2.attn1.wqkv", 64, 192)), r"has not: .*blocks\.2\.attn1\.wqkv"),
    (
        _with_keys(**{f"{QKV}.lora_A.weight": torch.ones(4, 32)}),
        r"attn1\.wqkv is for a weight of 192 x 32, .*wqkv\.weight has the shape \[192, 64\]",
    ),
    (
        _with_keys(**{f"{QKV}.lora_A.weight": torch.ones(3, 64)}),
        r"wqkv\.lora_B\.weight \[192, 4\] and .*\[3, 64\] do not multiply",
    ),
    (_with_keys(**{f"{QKV}.lora_B.weight": None}), r"attn1\.wqkv has .*lora_A\.weight without the other"),
    (_with_keys(**{f"{QKV}.bias": torch.ones(3)}), r"no parts of a low-rank adapter: .*wqkv\.bias"),
    (_with_fields(r=8), r"have rank 4, adapter_config\.json says 8"),
    (_with_fields(rank_pattern={"attn9": 4}), r"rank_pattern has 'attn9', and the adapter no such module"),
    (_with_fields(rank_pattern={"(": 4}), r"rank_pattern has '\(', which is no pattern"),
    (_with_fields(lora_alpha="big"), r"alpha of .* is 'big', not a number"),
    (_with_fields(use_dora=True), r"adapter_config\.json says use_dora, .* has"),
    (_with_fields(peft_type="LOHA"), r"peft_type='LOHA' is no plain low-rank adapter"),
    (_with_fields(fan_in_fan_out=True), "fan_in_fan_out=True"),
    (_with_fields(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    (_with_fields(modules_to_save=["proj_out"]), "modules_to_save="),
    (_with_fields(bias="all"), "bias='all'"),
    (_with_fields(of_a_later_peft=1), "of_a_later_peft=1"),
    (lambda adapter: (adapter / "adapter_config.json").write_text("{"), r"adapter_config\.json is not JSON"),
    (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "holds no adapter; looked for adapter_model"),
    (
        lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"12345678"),
        r"adapter_model\.safetensors",
    ),
    (lambda adapter: (adapter / "adapter_model.bin").write_bytes(b""), "name one of the files"),
]


@pytest.mark.parametrize(("damage", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_adapters_are_refused_by_name(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    adapter = folder / "adapter"
    _adapted(released_weights(), 1, "default").save_pretrained(adapter)
    damage(adapter)
    with pytest.raises(UserError, match=message):
        open_weights(folder / "fp32.pt", Reading(loras=(str(adapter),)))


def test_dora_is_merged_alone_and_a_weight_is_a_number(folder: Path) -> None:
    _adapted(released_weights(), 1, "default", use_dora=True).save_pretrained(folder / "dora")
    dora = str(folder / "dora")
    for loras in ((dora, dora), (f"{dora}=0.5",)):
        with pytest.raises(UserError, match=r"dora: DoRA sets the lengths.*merge it alone"):
            open_weights(folder / "fp32.pt", Reading(loras=loras))
    for weight in ("0", "nan", "inf"):
        with pytest.raises(UserError, match=f"the weight {weight} must be a number other than 0"):
            open_weights(folder / "fp32.pt", Reading(loras=(f"{dora}={weight}",)))
    with pytest.raises(UserError, match="none=x holds no adapter"):
        open_weights(folder / "fp32.pt", Reading(loras=("none=x",)))


def test_convert_merges(folder: Path) -> None:
    _adapted(released_weights(), 1, "default").save_pretrained(folder / "adapter")
    command = ["convert", "--in", str(folder / "fp32.pt"), "--out", str(folder / "core")]
    assert run_command(cli.main, [*command, "--lora", str(folder / "none")]) == 2
    assert run_command(cli.main, [*command, "--lora", f"{folder / 'adapter'}=0.5"]) == 0
    expected = open_weights(folder / "fp32.pt", Reading(loras=(f"{folder / 'adapter'}=0.5",)))
    written = open_weights(folder / "core")
    assert all(torch.equal(written.tensor(name), expected.tensor(name)) for name in expected.templates)
