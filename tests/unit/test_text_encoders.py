"""Encoder folders: what is built can be read, states mean what they should, and wrong files are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel, BertTokenizer

from megatron_video.errors import UserError
from megatron_video.text import TextEncoders, collate_text, text_fingerprint
from megatron_video.text.clip import build_clip, encoder_weights
from training.build_text_encoders import main

GOLDEN = Path(__file__).parent.parent / "golden"
CAPTIONS = [
    "a red circle moves left",
    "a blue square moves up",
    "the green triangle is moving right",
    "蓝色方块向上移动",
    "一个红色的圆形正在向左移动",
]
STRANGE = [
    "",
    "Ünïcödé, 100% – “x”",
    "混合 mixed 文本!",
    "[SEP] <s> </s> [MASK]",
    "a\u0000b\tc\n",
    "𠀀🙂",
    "UPPER Case",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    main(["build", "--captions", str(folder / "captions.txt"), "--out", str(folder / "encoders"), "--seed", "3"])
    return folder / "encoders"


@pytest.fixture(scope="module")
def encoders(built: Path) -> TextEncoders:
    return _load(built)


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> TextEncoders:
    return TextEncoders.load(folder / "clip", folder / "step_llm", "cpu", dtype)


def test_states_have_the_true_lengths_and_all_clip_slots(encoders: TextEncoders) -> None:
    for caption, states in zip(CAPTIONS, encoders.encode(CAPTIONS), strict=True):
        pieces = encoders.llm_tokenizer.processor.encode(caption)
        assert states.llm.shape == (len(pieces) + 2, 64)
        assert states.clip.shape == (16, 48)
        assert states.llm.dtype == states.clip.dtype == torch.float32
        assert not states.truncated


def test_a_caption_does_not_depend_on_its_batch(encoders: TextEncoders) -> None:
    texts = [*CAPTIONS, *STRANGE]
    together = encoders.encode(texts, batch_size=5)
    for text, states in zip(texts, together, strict=True):
        alone = encoders.encode([text])[0]
        torch.testing.assert_close(states.llm, alone.llm, rtol=0, atol=2e-5)
        torch.testing.assert_close(states.clip, alone.clip, rtol=0, atol=2e-5)


def test_the_empty_caption_is_bos_and_eos(encoders: TextEncoders) -> None:
    assert encoders.llm_tokenizer.tokenize("").ids == [1, 2]
    assert encoders.encode([""])[0].llm.shape[0] == 2
    assert encoders.encode([]) == []


def test_one_changed_word_changes_its_own_state_most(encoders: TextEncoders) -> None:
    red, blue = encoders.encode(["a red circle moves left", "a blue circle moves left"])
    similarity = torch.cosine_similarity(red.llm, blue.llm)
    assert similarity[2] < 0.6
    assert similarity[[0, 1, 3, 4, 5]].min() > 0.9
    clip = torch.cosine_similarity(red.clip, blue.clip)
    assert clip[2] < 0.6
    assert clip.mean() > 0.85


def test_states_have_about_unit_variance(encoders: TextEncoders) -> None:
    states = encoders.encode(CAPTIONS)
    assert 0.8 < torch.cat([s.llm for s in states]).std() < 1.3
    assert 0.8 < torch.cat([s.clip for s in states]).std() < 1.3


def test_long_captions_are_cut_and_say_so(encoders: TextEncoders) -> None:
    states = encoders.encode(["red " * 50])[0]
    assert states.llm.shape[0] == 32
    assert states.llm_truncated
    assert states.clip_truncated
    assert states.llm_caption_tokens == 52
    assert states.clip_caption_tokens == 52
    assert encoders.llm_tokenizer.tokenize("red " * 50).ids[-1] == 2
    # 14 words fit CLIP's 16 slots exactly.
    assert not encoders.encode(["red " * 14])[0].truncated


def test_no_text_is_unknown_to_the_llm_tokenizer(encoders: TextEncoders) -> None:
    processor = encoders.llm_tokenizer.processor
    for text in STRANGE:
        assert processor.unk_id() not in processor.encode(text)
        assert not {1, 2} & set(processor.encode(text))


def test_clip_tokens_equal_transformers_bert_tokenizer(built: Path, encoders: TextEncoders) -> None:
    reference = BertTokenizer.from_pretrained(str(built / "clip"))
    for text in [*CAPTIONS, *STRANGE]:
        expected = reference(text, max_length=16, truncation=True)["input_ids"]
        assert encoders.clip_tokenizer.tokenize(text).ids == expected, text


def test_clip_states_equal_transformers_from_the_same_folder(built: Path, encoders: TextEncoders) -> None:
    tokenizer, model = (
        BertTokenizer.from_pretrained(str(built / "clip")),
        BertModel.from_pretrained(str(built / "clip")),
    )
    batch = tokenizer(CAPTIONS, max_length=16, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
    actual = torch.stack([states.clip for states in encoders.encode(CAPTIONS)])
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_bf16_states_are_near_fp32(built: Path, encoders: TextEncoders) -> None:
    exact, rounded = encoders.encode(CAPTIONS), _load(built, torch.bfloat16).encode(CAPTIONS)
    for a, b in zip(exact, rounded, strict=True):
        assert b.llm.dtype == b.clip.dtype == torch.bfloat16
        assert (a.llm - b.llm.float()).abs().max() < 0.1
        assert (a.clip - b.clip.float()).abs().max() < 0.1


def test_collated_batch_has_exact_visible_lengths(encoders: TextEncoders) -> None:
    states = encoders.encode(CAPTIONS[:3])
    batch = collate_text([s.llm for s in states], [s.clip for s in states])
    assert batch.text_lengths.tolist() == [16 + s.llm.shape[0] for s in states]
    assert batch.clip_states.shape == (3, 16, 48)
    for row, s in enumerate(states):
        assert torch.equal(batch.llm_states[row, : s.llm.shape[0]], s.llm)
        assert not batch.llm_states[row, s.llm.shape[0] :].any()
    with pytest.raises(ValueError, match="do not fit"):
        collate_text([states[0].llm, states[1].llm[:, :3]], [states[0].clip, states[1].clip])


def test_clip_released_names_shapes_and_parameter_count() -> None:
    config = {
        "vocab_size": 47020,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 512,
    }
    with torch.device("meta"):
        model = build_clip(config, "test", with_pooler=True)
    lines = (line.split("\t") for line in (GOLDEN / "clip_bert_keys.tsv").read_text().splitlines())
    expected = {name: json.loads(shape) for name, shape in lines}
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected
    assert len(expected) == 391
    assert sum(parameter.numel() for parameter in model.parameters()) == 352_035_840


def test_prefixed_pickled_weights_with_heads_give_the_same_states(copy: Path, encoders: TextEncoders) -> None:
    """The released file is pytorch_model.bin with `bert.` before the names and other heads beside them."""
    weights = {f"bert.{name}": value for name, value in load_file(copy / "clip/model.safetensors").items()}
    weights |= {"cls.predictions.bias": torch.zeros(7), "bert.embeddings.position_ids": torch.arange(16)[None]}
    (copy / "clip/model.safetensors").unlink()
    torch.save(weights, copy / "clip/pytorch_model.bin")
    for a, b in zip(_load(copy).encode(CAPTIONS), encoders.encode(CAPTIONS), strict=True):
        assert torch.equal(a.clip, b.clip)


def test_released_clip_subfolders_and_sharded_llm_are_read(copy: Path, encoders: TextEncoders) -> None:
    clip, llm = copy / "clip", copy / "step_llm"
    (clip / "clip_text_encoder").mkdir()
    (clip / "tokenizer").mkdir()
    (clip / "vocab.txt").rename(clip / "tokenizer/vocab.txt")
    for name in ("config.json", "model.safetensors"):
        (clip / name).rename(clip / "clip_text_encoder" / name)
    weights = load_file(llm / "model.safetensors")
    (llm / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, llm / file)
    (llm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for a, b in zip(_load(copy).encode(CAPTIONS), encoders.encode(CAPTIONS), strict=True):
        assert torch.equal(a.clip, b.clip)
        assert torch.equal(a.llm, b.llm)


def _edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer is no sentencepiece": (
        lambda f: (f / "step_llm/step1_chat_tokenizer.model").write_text("hello"),
        "step1_chat_tokenizer.model is not a sentencepiece model",
    ),
    "empty tokenizer": (
        lambda f: (f / "step_llm/step1_chat_tokenizer.model").write_bytes(b""),
        "step1_chat_tokenizer.model is not a sentencepiece model",
    ),
    "no tokenizer": (
        lambda f: (f / "step_llm/step1_chat_tokenizer.model").unlink(),
        "chat_tokenizer.model does not exist",
    ),
    "more pieces than rows": (
        lambda f: _edit_json(f / "step_llm/config.json", padded_vocab_size=64),
        r"has \d+ pieces, the embedding only 64 rows",
    ),
    "vocabulary of another size": (
        lambda f: (f / "clip/vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n"),
        r"vocab.txt has 6 tokens, the embedding \d+ rows",
    ),
    "no special tokens": (lambda f: (f / "clip/vocab.txt").write_text("a\nb\n"), r"vocab.txt .*\[PAD\].* missing"),
    "binary vocabulary": (
        lambda f: (f / "clip/vocab.txt").write_bytes(b"\xff\xfe\x00"),
        "vocab.txt is not a vocabulary",
    ),
    "config is no JSON": (lambda f: (f / "clip/config.json").write_text("{"), "config.json is not readable as JSON"),
    "config of another model": (lambda f: _edit_json(f / "clip/config.json", model_type="t5"), "model_type='t5'"),
    "caption length too long": (
        lambda f: _edit_json(f / "clip/config.json", caption_max_length=99),
        "caption_max_length=99 is outside 3 to max_position_embeddings=16",
    ),
    "config lacks a size": (
        lambda f: (f / "step_llm/config.json").write_text("{}"),
        "not a Step-LLM configuration: hidden_size",
    ),
    "no weights": (lambda f: (f / "clip/model.safetensors").unlink(), "clip holds no weights"),
    "cut weights": (
        lambda f: (f / "step_llm/model.safetensors").write_bytes((f / "clip/model.safetensors").read_bytes()[:500]),
        "model.safetensors is not readable as weights",
    ),
    "missing weight": (
        lambda f: _edit_weights(
            f / "step_llm/model.safetensors", lambda w: w.pop("transformer.layers.1.ffn_norm.weight")
        ),
        "lacks transformer.layers.1.ffn_norm.weight",
    ),
    "unknown weight": (
        lambda f: _edit_weights(f / "clip/model.safetensors", lambda w: w.update({"encoder.extra": torch.zeros(1)})),
        "has unknown encoder.extra",
    ),
    "another shape": (
        lambda f: _edit_json(f / "step_llm/config.json", ffn_hidden_size=700),
        r"feed_forward.w\d.weight has shape .* config.json says",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_wrong_folders_are_refused_by_name(damage: str, copy: Path) -> None:
    edit, message = DAMAGE[damage]
    edit(copy)
    with pytest.raises(UserError, match=message):
        _load(copy)


def test_pickled_code_is_not_run(copy: Path) -> None:
    (copy / "clip/model.safetensors").unlink()
    torch.save({"bert.x": print}, copy / "clip/pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is not readable as weights"):
        _load(copy)


def test_invalid_unicode_is_refused(encoders: TextEncoders) -> None:
    with pytest.raises(UserError, match=r"caption 1 .*not valid Unicode"):
        encoders.encode(["fine", "broken \ud800"])


def test_ignored_names_are_a_list_not_everything() -> None:
    kept = encoder_weights({"embeddings.x": torch.zeros(1), "cls.y": torch.zeros(1), "stranger": torch.zeros(1)})
    assert set(kept) == {"embeddings.x", "stranger"}


def test_fingerprint_tells_encoders_apart(built: Path, copy: Path) -> None:
    original = text_fingerprint(built / "clip", built / "step_llm")
    assert text_fingerprint(copy / "clip", copy / "step_llm") == original
    _edit_weights(copy / "clip/model.safetensors", lambda w: w["embeddings.word_embeddings.weight"].mul_(1.01))
    assert text_fingerprint(copy / "clip", copy / "step_llm") != original
