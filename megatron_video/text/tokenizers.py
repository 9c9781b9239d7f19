"""Captions to token ids for the two encoders; nothing is cut without being counted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from torch import Tensor

from megatron_video.errors import UserError

STEP_TOKENIZER_FILE = "step1_chat_tokenizer.model"
CLIP_VOCABULARY_FILE = "vocab.txt"

BOS_ID, EOS_ID = 1, 2
CLIP_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Tokens(NamedTuple):
    """Token ids of one caption with its special tokens, cut to the maximum length, without padding."""

    ids: list[int]
    full_length: int
    """Length before cutting, special tokens included."""

    @property
    def truncated(self) -> bool:
        """Whether the end of the caption was cut."""
        return self.full_length > len(self.ids)


def pad_tokens(rows: list[list[int]], pad_id: int, length: int) -> tuple[Tensor, Tensor]:
    """Right-pad to `length`: (ids [b, length], mask [b, length] with 1 for tokens), both int64."""
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        mask[row, : len(tokens)] = 1
    return ids, mask


@dataclass
class StepTokenizer:
    """The sentencepiece tokenizer of Step-LLM: BOS, the pieces, EOS; the pad id is EOS."""

    processor: Any
    max_length: int
    pad_id: int = EOS_ID

    @classmethod
    def load(cls, path: Path, embedding_rows: int, max_length: int) -> StepTokenizer:
        """Read a sentencepiece model and check that it can belong to the weights.

        Raises:
            UserError: not a sentencepiece model, more pieces than embeddings, or ids 1 and 2 are not BOS and EOS.
        """
        if not path.is_file():
            raise UserError(f"{path} does not exist; Step-LLM needs its sentencepiece model")
        try:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path} is not a sentencepiece model: {error}") from None
        pieces = processor.get_piece_size()
        if pieces > embedding_rows:
            raise UserError(
                f"{path} has {pieces} pieces, the embedding only {embedding_rows} rows (padded_vocab_size): "
                "it belongs to another model"
            )
        if pieces <= EOS_ID or not (processor.is_control(BOS_ID) and processor.is_control(EOS_ID)):
            # The ids are fixed in the released code, whatever the model file calls them.
            found = [processor.id_to_piece(i) for i in (BOS_ID, EOS_ID) if i < pieces]
            raise UserError(f"{path}: ids 1 and 2 must be the control symbols BOS and EOS; found {found}")
        return cls(processor, max_length)

    def tokenize(self, caption: str) -> Tokens:
        """[BOS] + pieces + [EOS]; of a long caption the last pieces go, never EOS."""
        # Control symbols spelled out in a caption ("<s>") are ordinary text to sentencepiece.
        pieces: list[int] = self.processor.encode(caption)
        return Tokens([BOS_ID, *pieces[: self.max_length - 2], EOS_ID], len(pieces) + 2)


@dataclass
class ClipTokenizer:
    """The WordPiece tokenizer of BERT: [CLS], the words, [SEP]."""

    tokenizer: Tokenizer
    max_length: int
    pad_id: int
    cls_id: int
    sep_id: int

    @classmethod
    def load(cls, folder: Path, embedding_rows: int, max_length: int) -> ClipTokenizer:
        """Read vocab.txt, and tokenizer_config.json where there is one.

        Raises:
            UserError: no vocabulary, another size than the embedding, or special tokens that are missing.
        """
        path = folder / CLIP_VOCABULARY_FILE
        vocabulary = _read_vocabulary(path)
        absent = [token for token in CLIP_SPECIAL_TOKENS if token not in vocabulary]
        if absent:
            raise UserError(
                f"{path} is not a BERT vocabulary: {', '.join(absent)} missing among {len(vocabulary)} lines"
            )
        # Fewer lines are as wrong as more: ids would name other words than in training.
        if len(vocabulary) != embedding_rows:
            raise UserError(
                f"{path} has {len(vocabulary)} tokens, the embedding {embedding_rows} rows (vocab_size): "
                "it belongs to another model"
            )
        tokenizer = build_wordpiece({token: index for index, token in enumerate(vocabulary)}, _options(folder))
        pad_id, cls_id, sep_id = (tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]"))
        return cls(tokenizer, max_length, pad_id, cls_id, sep_id)

    def tokenize(self, caption: str) -> Tokens:
        """[CLS] + word pieces + [SEP]; of a long caption the last pieces go, never [SEP]."""
        pieces = self.tokenizer.encode(caption, add_special_tokens=False).ids
        return Tokens([self.cls_id, *pieces[: self.max_length - 2], self.sep_id], len(pieces) + 2)


def build_wordpiece(vocabulary: dict[str, int], options: dict[str, Any]) -> Tokenizer:
    """WordPiece as transformers' BertTokenizer does it: cleaned text, Chinese characters apart, greedy word pieces.

    Args:
        vocabulary: token -> id, with the special tokens.
        options: `do_lower_case`, `strip_accents`, `tokenize_chinese_chars` as in tokenizer_config.json.
    """
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    # transformers' class is not used because its constructor changed between versions 4 and 5.
    tokenizer.normalizer = bert_normalizer(options)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # As there, a special token written out in a caption is that token.
    tokenizer.add_special_tokens(list(CLIP_SPECIAL_TOKENS))
    return tokenizer


def bert_normalizer(options: dict[str, Any]) -> normalizers.Normalizer:
    """The text cleaning that comes before WordPiece."""
    return normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
        strip_accents=options.get("strip_accents"),
        lowercase=options.get("do_lower_case", True),
    )


def _options(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        options: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON: {error}") from None
    return options


def _read_vocabulary(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the CLIP encoder needs its WordPiece vocabulary") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not a vocabulary of one token a line: {error}") from None
    # The newline at the end of the file ends a token; it does not begin an empty one.
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
