"""Small encoders in the released folder form: tokenizers trained on captions, weights drawn so that tokens show.

Untrained encoders are of use only if different captions give clearly different states. So each output state is about
the token's own embedding (unit variance) plus a smaller share of what the layers mixed in from the other tokens.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn

from megatron_video.errors import UserError
from megatron_video.noise import NoiseSource
from megatron_video.text.clip import build_clip
from megatron_video.text.step_llm import StepLLM, StepLLMConfig
from megatron_video.text.tokenizers import (
    BOS_ID,
    CLIP_SPECIAL_TOKENS,
    CLIP_VOCABULARY_FILE,
    EOS_ID,
    STEP_TOKENIZER_FILE,
    bert_normalizer,
)

# Standard deviation of what all layers together add to a state of standard deviation 1.
_LAYERS_SHARE = 0.5
# Of BERT's position embeddings: word order shows, the word shows more.
_POSITION_SHARE = 0.3
_ROWS_MULTIPLE = 64
_BYTE_PIECES = 256
_WORD_PIECE_PREFIX = "##"
_BASIC_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

# A private-use character that ends no word of a caption: pieces do not grow over it in training.
_BOUNDARY = "\ue000"
_IDEOGRAPH = re.compile(r"([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


def build_step_llm_folder(
    folder: Path, captions: Sequence[str], vocabulary_size: int, sizes: dict[str, Any], seed: int
) -> None:
    """Write config.json, step1_chat_tokenizer.model and model.safetensors (fp32).

    Args:
        folder: is created.
        captions: what the tokenizer is trained on; anything else is spelled in bytes, never unknown.
        vocabulary_size: most pieces.
        sizes: the fields of StepLLMConfig but for the vocabulary.
        seed: of the weights.

    Raises:
        UserError: a vocabulary too small for the characters of the captions, or contradicting sizes.
    """
    folder.mkdir(parents=True)
    model_file = train_sentencepiece(captions, vocabulary_size)
    (folder / STEP_TOKENIZER_FILE).write_bytes(model_file)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model_file).get_piece_size()
    values = {**sizes, "padded_vocab_size": -(-pieces // _ROWS_MULTIPLE) * _ROWS_MULTIPLE, "layernorm_epsilon": 1e-5}
    model = StepLLM(StepLLMConfig.from_json(values, "the Step-LLM sizes"))
    initialise_step_llm(model, seed)
    _write(folder, {"architectures": ["Step1Model"], "model_type": "step1", **values}, model)


def build_clip_folder(
    folder: Path, captions: Sequence[str], vocabulary_size: int, sizes: dict[str, Any], seed: int
) -> None:
    """Write config.json, vocab.txt and model.safetensors (fp32, with the pooler that the released file has).

    Args:
        folder: is created.
        captions: what the vocabulary is made from; words with other characters are [UNK].
        vocabulary_size: most tokens.
        sizes: hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, caption_max_length.
        seed: of the weights.

    Raises:
        UserError: contradicting sizes.
    """
    folder.mkdir(parents=True)
    vocabulary = train_wordpiece(captions, vocabulary_size)
    (folder / CLIP_VOCABULARY_FILE).write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
    values = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": len(vocabulary),
        "max_position_embeddings": sizes["caption_max_length"],
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        **sizes,
    }
    model = build_clip(values, "the CLIP sizes", with_pooler=True)
    initialise_clip(model, seed)
    _write(folder, values, model)


def train_sentencepiece(captions: Sequence[str], vocabulary_size: int) -> bytes:
    """A byte-pair sentencepiece model with ids 0 unknown, 1 BOS, 2 EOS; Chinese characters stay single pieces.

    Raises:
        UserError: `vocabulary_size` does not hold the bytes and the captions' characters.
    """
    # unknown, BOS, EOS, the bytes, every character, and the word-start mark.
    needed = EOS_ID + 1 + _BYTE_PIECES + len(set("".join(captions))) + 1
    if vocabulary_size < needed:
        raise UserError(
            f"llm_vocabulary={vocabulary_size} is too small for these captions; at least {needed} is needed"
        )
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(_IDEOGRAPH.sub(rf"{_BOUNDARY}\1{_BOUNDARY}", caption) for caption in captions),
        model_writer=output,
        model_type="bpe",
        vocab_size=vocabulary_size,
        # Few captions have fewer pieces than asked for, which is no error.
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        pretokenization_delimiter=_BOUNDARY,
        unk_id=0,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=-1,
        max_sentence_length=4 * max(map(len, captions)) * 4 + 1,
        # The order of equal counts must not depend on threads.
        num_threads=1,
        minloglevel=2,
    )
    return output.getvalue()


def train_wordpiece(captions: Sequence[str], vocabulary_size: int) -> list[str]:
    """WordPiece tokens: special ones, all characters, then the captions' words from the most frequent on.

    A word that finds no room, or comes later, is spelled in characters; Latin letters and digits are always there.

    Raises:
        UserError: `vocabulary_size` does not hold the characters.
    """
    words = _words(captions)
    characters = set(_BASIC_CHARACTERS).union(*words)
    continued = set(_BASIC_CHARACTERS).union(*(word[1:] for word in words))
    spelling = [*CLIP_SPECIAL_TOKENS, *sorted(characters), *(_WORD_PIECE_PREFIX + c for c in sorted(continued))]
    if len(spelling) > vocabulary_size:
        raise UserError(
            f"clip_vocabulary={vocabulary_size} is too small for these captions; their characters take {len(spelling)}"
        )
    # Not the trainer of the tokenizers library: it breaks ties at random, and the same captions must give the same
    # tokens, or states in old shards would mean other words.
    by_frequency = sorted(words.keys() - characters, key=lambda word: (-words[word], word))
    return [*spelling, *by_frequency[: vocabulary_size - len(spelling)]]


def _words(captions: Sequence[str]) -> Counter[str]:
    # Normalised and split as when the tokenizer is used, so that the words counted are the words met.
    normalizer, splitter = bert_normalizer({}), pre_tokenizers.BertPreTokenizer()
    texts = (normalizer.normalize_str(caption) for caption in captions)
    return Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))


@torch.no_grad()
def initialise_step_llm(model: StepLLM, seed: int) -> None:
    """Embeddings of variance 1, unit norms, and output projections that together add variance _LAYERS_SHARE^2."""
    share = _LAYERS_SHARE / math.sqrt(2 * model.config.num_layers)
    scales = {"tok_embeddings": 1.0, "wo.weight": share, "w2.weight": share}
    _draw(model, seed, "text/step_llm", scales)


@torch.no_grad()
def initialise_clip(model: nn.Module, seed: int) -> None:
    """Word embeddings of variance 1, smaller position and segment embeddings, small output projections, no biases."""
    layers = model.config.num_hidden_layers  # type: ignore[union-attr]
    share = _LAYERS_SHARE / math.sqrt(2 * layers)  # type: ignore[operator]
    scales = {
        "word_embeddings": 1.0,
        "position_embeddings": _POSITION_SHARE,
        "token_type_embeddings": _POSITION_SHARE,
        "output.dense.weight": share,
    }
    _draw(model, seed, "text/clip", scales)


def _draw(model: nn.Module, seed: int, stage: str, scales: dict[str, float]) -> None:
    source = NoiseSource(seed, stage)
    for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        # Inputs of every other matrix have variance 1, so 1 / fan_in keeps it.
        scale = next((value for part, value in scales.items() if part in name), 1.0)
        fan_in = 1 if "embeddings" in name else parameter.shape[1]
        parameter.copy_(source.noise(0, index, parameter.shape) * (scale / math.sqrt(fan_in)))


def _write(folder: Path, config: dict[str, Any], model: nn.Module) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weights: dict[str, Tensor] = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
