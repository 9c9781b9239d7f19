"""The table of models against the released files' lists of tensors and their config.json, and what is refused.

Outside truth: tests/golden/*_keys.tsv; step_llm_config.json as on huggingface.co/stepfun-ai/stepvideo-t2v, and
clip_config.json as on huggingface.co/Tencent-Hunyuan/HunyuanDiT, from where that model took it; the sizes of files
that the hub lists; the md5 by which DiffSynth-Studio recognises the files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_tools.clip_config import ClipConfig
from checkpoints_tools.models import KINDS, shard_limit
from checkpoints_tools.released import ReleasedFolder, released_config
from checkpoints_tools.safetensors_files import plan_files
from checkpoints_tools.weights import Model, check_tensors
from megatron_video.dit import DiTConfig
from megatron_video.errors import UserError
from megatron_video.vae import VAEConfig

GOLDEN = Path(__file__).parent.parent / "golden"
TABLES = {"dit": "dit_30b", "vae": "vae_v2", "clip": "clip_bert", "llm": "step_llm"}
MD5 = {"dit": "5c0216a2132b082c10cb7a0e0377e681", "vae": "68beaf8429b7c11aa8ca05b1bd0058bd"}
RELEASED_DTYPES = {"dit": torch.bfloat16, "vae": torch.float32, "clip": torch.float32, "llm": torch.bfloat16}
# Bytes of transformer/config.json that the hub lists.
DIT_CONFIG_BYTES = 439
SMALL_DIT: dict[str, Any] = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16}


@cache
def released_model(kind: str) -> Model:
    return KINDS[kind].build(KINDS[kind].config())


def templates(model: Model, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in model.shapes.items()}


def silent(line: str) -> None:
    """Takes what is told."""


@pytest.mark.parametrize("kind", KINDS)
def test_default_sizes_are_the_released_tensors_by_name_and_shape(kind: str) -> None:
    model = released_model(kind)
    prefix = KINDS[kind].prefix
    ours = {model.released[name].removeprefix(prefix): list(shape) for name, shape in model.shapes.items()}
    lines = (GOLDEN / f"{TABLES[kind]}_keys.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    assert ours == {name: json.loads(shape) for name, shape in rows}
    if kind == "dit":  # its order decides which tensors share a file
        assert list(model.released.values()) == [name for name, _ in rows]
    assert KINDS[kind].signature in ours
    entries = [*ours, *(f"{name}:{'_'.join(map(str, shape))}" for name, shape in ours.items())]
    if kind in MD5:
        assert hashlib.md5(",".join(sorted(entries)).encode()).hexdigest() == MD5[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_kind_has_the_signature(kind: str) -> None:
    for key, other in KINDS.items():
        released = {name.removeprefix(other.prefix) for name in released_model(key).released.values()}
        assert (KINDS[kind].signature in released) == (key == kind)


@pytest.mark.parametrize("kind", ["clip", "llm"])
def test_config_of_the_released_sizes_is_the_released_file(kind: str) -> None:
    model = released_model(kind)
    written = json.loads(released_config(model, templates(model, RELEASED_DTYPES[kind]), silent))
    stored = json.loads((GOLDEN / f"{TABLES[kind].removesuffix('_bert')}_config.json").read_text())
    assert stored.pop("_name_or_path")
    assert written == stored


def test_config_of_the_released_dit_has_the_bytes_of_the_released_file() -> None:
    model = released_model("dit")
    text = released_config(model, templates(model), silent)
    assert len(text) == DIT_CONFIG_BYTES
    assert json.loads(text)["caption_channels"] == [6144, 1024]


@pytest.mark.parametrize(
    ("kind", "last", "sizes"),
    [
        ("dit", "diffusion_pytorch_model-00006-of-00006.safetensors", [9.97] * 5 + [8.85]),
        ("llm", "model-00009-of-00009.safetensors", [4.98] + [4.79] * 7 + [0.623]),
        ("vae", "vae_v2.safetensors", [2.0]),
    ],
)
def test_weights_are_cut_into_the_files_that_are_released(kind: str, last: str, sizes: list[float]) -> None:
    """Names and sizes in GB as the hub lists them; our order of the tensors must be the released one for that."""
    model = released_model(kind)
    shapes = templates(model, RELEASED_DTYPES[kind])
    held = {name: shapes[name] for name in model.released}
    files = plan_files(held, KINDS[kind].stem, shard_limit(KINDS[kind], None))
    found = [sum(held[name].nbytes for name in names) / 1e9 for names in files.values()]
    assert list(files)[-1] == last
    assert found == pytest.approx(sizes, abs=0.006)


@pytest.mark.parametrize("kind", KINDS)
def test_every_size_has_its_place_in_the_tables(kind: str) -> None:
    """A field that is added to a dataclass must be decided upon: kept, implied by the released code, or told."""
    table = KINDS[kind].fields
    placed = [*table.shared, *table.own, *table.unkept]
    assert len(placed) == len(set(placed))
    implied = {"dit": {"ffn_multiplier", "rope_channel_split"}}.get(kind, set())
    assert {each.name for each in fields(KINDS[kind].config)} == {*placed, *implied}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ffn_multiplier": 2}, r"ffn_multiplier=2 \(it means 4\)"),
        ({"rope_channel_split": [4, 6, 6]}, r"rope_channel_split=\[4, 6, 6\] \(it means \[8, 4, 4\]\)"),
    ],
)
def test_dit_that_the_released_form_cannot_hold_is_refused_by_field(changed: dict[str, Any], message: str) -> None:
    model = KINDS["dit"].build(DiTConfig(**SMALL_DIT, **changed))
    with pytest.raises(UserError, match=f"no place for {message}"):
        released_config(model, templates(model), silent)


def test_sizes_of_training_are_told_and_left_out() -> None:
    told: list[str] = []
    model = KINDS["dit"].build(DiTConfig(**SMALL_DIT, hidden_dropout=0.1))
    released_config(model, templates(model), told.append)
    assert len(told) == 1
    assert "hidden_dropout=0.1" in told[0]
    assert "init_std" not in told[0]


def save(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None, stem: str) -> Path:
    folder.mkdir()
    save_file(tensors, folder / f"{stem}.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


TINY_CLIP = ClipConfig(
    vocab_size=9,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=4,
)


def clip_tensors(**changes: Any) -> tuple[Model, dict[str, Tensor]]:
    model = KINDS["clip"].build(ClipConfig(**(vars(TINY_CLIP) | changes)))
    return model, {model.released[name]: torch.ones(shape) for name, shape in model.shapes.items()}


def clip_config() -> dict[str, Any]:
    model, _ = clip_tensors()
    values: dict[str, Any] = json.loads(released_config(model, templates(model, torch.float32), silent))
    return values


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("prefixed", [True, False])
def test_clip_with_and_without_prefix_and_pooler(tmp_path: Path, pooler: bool, prefixed: bool) -> None:
    model, tensors = clip_tensors(pooler=pooler)
    if not prefixed:
        tensors = {name.removeprefix("bert."): value for name, value in tensors.items()}
    told: list[str] = []
    found = ReleasedFolder(save(tmp_path / "clip", tensors, clip_config(), "model"), tell=told.append)
    check_tensors(found)
    assert found.model == model
    assert not told


def test_parts_of_other_models_are_left_out_and_counted(tmp_path: Path) -> None:
    model, tensors = clip_tensors()
    others = {"cls.predictions.bias": torch.ones(9), "logit_scale": torch.ones(()), "visual.proj": torch.ones(2)}
    positions = {"bert.embeddings.position_ids": torch.arange(4)[None]}
    told: list[str] = []
    folder = save(tmp_path / "clip", tensors | others | positions, clip_config(), "model")
    found = ReleasedFolder(folder, tell=told.append)
    check_tensors(found)
    assert found.templates.keys() == model.shapes.keys()
    assert len(told) == 1
    assert "left out: 4 tensors" in told[0]
    assert all(name in told[0] for name in (*others, *positions))


def test_unknown_fields_of_a_bert_are_told(tmp_path: Path) -> None:
    told: list[str] = []
    folder = save(tmp_path / "clip", clip_tensors()[1], clip_config() | {"embedding_strategy": "mean"}, "model")
    check_tensors(ReleasedFolder(folder, tell=told.append))
    assert "left out: fields of which nothing is known here: embedding_strategy" in told[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"is_decoder": True}, r"is_decoder=True \(released: False\)"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_another_bert_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = save(tmp_path / "clip", clip_tensors()[1], clip_config() | config, "model")
    with pytest.raises(UserError, match=message):
        ReleasedFolder(folder, tell=silent)


def test_bare_file_is_taken_to_have_the_released_sizes(tmp_path: Path) -> None:
    tiny = KINDS["vae"].build(VAEConfig(latent_channels=2, num_res_blocks=1, encoder_multipliers=(1, 1, 1, 1)))
    told: list[str] = []
    folder = save(tmp_path / "vae", {name: torch.ones(s) for name, s in tiny.shapes.items()}, None, "vae_v2")
    found = ReleasedFolder(folder / "vae_v2.safetensors", tell=told.append)
    assert found.model == released_model("vae")
    assert "Video-VAE of the released sizes" in told[0]
    with pytest.raises(UserError, match=r"lacks tensors|does not fit its config"):
        check_tensors(found)
    # With the sizes beside it, the same file is what it is.
    (folder / "config.json").write_text(released_config(tiny, templates(tiny), silent))
    check_tensors(ReleasedFolder(folder / "vae_v2.safetensors", tell=silent))


def test_file_that_stands_alone_says_its_sizes(tmp_path: Path) -> None:
    model, tensors = clip_tensors()
    config = released_config(model, templates(model, torch.float32), silent)
    save_file(tensors, tmp_path / "alone.safetensors", metadata={"format": "pt", "config.json": config})
    told: list[str] = []
    found = ReleasedFolder(tmp_path / "alone.safetensors", tell=told.append)
    check_tensors(found)
    assert (found.model, told) == (model, [])
    save_file(tensors, tmp_path / "broken.safetensors", metadata={"config.json": "{"})
    with pytest.raises(UserError, match=r"in the header of .* is not JSON"):
        ReleasedFolder(tmp_path / "broken.safetensors", tell=silent)
    with pytest.raises(UserError, match=r"elsewhere.json cannot be read"):
        ReleasedFolder(tmp_path / "alone.safetensors", config=tmp_path / "elsewhere.json", tell=silent)


def test_old_vae_beside_the_new_one_is_passed_over(tmp_path: Path) -> None:
    """The released folder holds vae.safetensors, of another architecture, and vae_v2.safetensors."""
    tiny = KINDS["vae"].build(VAEConfig(latent_channels=2, num_res_blocks=1, encoder_multipliers=(1, 1, 1, 1)))
    folder = save(tmp_path / "vae", {name: torch.ones(s) for name, s in tiny.shapes.items()}, None, "vae_v2")
    save_file({"encoder.other": torch.ones(2)}, folder / "vae.safetensors")
    (folder / "config.json").write_text(released_config(tiny, templates(tiny), silent))
    check_tensors(ReleasedFolder(folder, tell=silent))


def test_what_cannot_be_told_names_the_option(tmp_path: Path) -> None:
    unknown = save(tmp_path / "unknown", {"something.weight": torch.ones(2)}, None, "model")
    with pytest.raises(UserError, match=r"what model is it\? no config.json.*--kind: dit \(video DiT\)"):
        ReleasedFolder(unknown, tell=silent)
    both = {"adaln_single.linear.weight": torch.ones(2), "tok_embeddings.word_embeddings.weight": torch.ones(2)}
    with pytest.raises(UserError, match="names say dit or llm"):
        ReleasedFolder(save(tmp_path / "both", both, None, "model"), tell=silent)
    # A config.json of one model beside the weights of another.
    with pytest.raises(UserError, match=r"config.json says clip, the tensors' names say dit or llm"):
        ReleasedFolder(save(tmp_path / "crossed", both, clip_config(), "model"), tell=silent)
    found = ReleasedFolder(unknown, kind="vae", tell=silent)
    with pytest.raises(UserError, match="lacks tensors"):
        check_tensors(found)


def test_several_models_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "two", {"a": torch.ones(2)}, None, "model")
    save_file({"b": torch.ones(2)}, folder / "vae_v2.safetensors")
    with pytest.raises(UserError, match="several models: model, vae_v2"):
        ReleasedFolder(folder, tell=silent)


def test_closed_config_refuses_unknown_fields(tmp_path: Path) -> None:
    model = KINDS["dit"].build(DiTConfig(**SMALL_DIT, caption_channels=[8, 8]))
    values = json.loads(released_config(model, templates(model), silent))
    tensors = {model.released[name]: torch.ones(shape) for name, shape in model.shapes.items()}
    folder = save(tmp_path / "dit", tensors, values | {"motion_score": True}, "diffusion_pytorch_model")
    with pytest.raises(UserError, match="no released video DiT has: motion_score"):
        ReleasedFolder(folder, tell=silent)
