"""Both text encoders behind one call: captions in, un-padded states out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_video.errors import UserError
from megatron_video.fingerprint import fingerprint_files
from megatron_video.text.clip import DEFAULT_MAX_LENGTH, clip_states, load_clip, require_bert
from megatron_video.text.step_llm import StepLLM, StepLLMConfig
from megatron_video.text.tokenizers import (
    CLIP_VOCABULARY_FILE,
    STEP_TOKENIZER_FILE,
    ClipTokenizer,
    StepTokenizer,
    Tokens,
    pad_tokens,
)
from megatron_video.text.weights import iterate_weights, load_into, read_json, weight_files

if TYPE_CHECKING:
    from transformers import BertModel

# The released CLIP keeps its two halves in folders of these names; ours are flat.
_CLIP_MODEL_FOLDER = "clip_text_encoder"
_CLIP_TOKENIZER_FOLDER = "tokenizer"
_FOLDER_NAMES = (("clip", "hunyuan_clip"), ("step_llm",))


@dataclass(frozen=True)
class TextStates:
    """The two encoders' states of one caption, on the encoders' device and in their dtype."""

    llm: Tensor
    """[n, d_llm]: Step-LLM states of the n tokens, BOS and EOS included, no padding."""
    clip: Tensor
    """[L_clip, d_clip]: CLIP states of all slots, pads included, as the DiT attends to them."""
    llm_caption_tokens: int
    """Length of the caption in Step-LLM tokens before cutting, BOS and EOS included."""
    clip_caption_tokens: int
    """Length of the caption in CLIP tokens before cutting, [CLS] and [SEP] included."""

    @property
    def llm_truncated(self) -> bool:
        """Whether Step-LLM did not see the end of the caption."""
        return self.llm_caption_tokens > self.llm.shape[0]

    @property
    def clip_truncated(self) -> bool:
        """Whether CLIP did not see the end of the caption."""
        return self.clip_caption_tokens > self.clip.shape[0]

    @property
    def truncated(self) -> bool:
        """Whether any encoder did not see the end of the caption."""
        return self.llm_truncated or self.clip_truncated

    def to(self, device: torch.device, dtype: torch.dtype) -> TextStates:
        """The same states elsewhere or rounded."""
        return replace(self, llm=self.llm.to(device, dtype), clip=self.clip.to(device, dtype))


class TextEncoders:
    """HunyuanCLIP and Step-LLM with their tokenizers; make it with `load`."""

    def __init__(
        self, clip: BertModel, clip_tokenizer: ClipTokenizer, llm: StepLLM, llm_tokenizer: StepTokenizer
    ) -> None:
        self.clip, self.clip_tokenizer = clip, clip_tokenizer
        self.llm, self.llm_tokenizer = llm, llm_tokenizer

    @classmethod
    def load(
        cls, clip_folder: str | Path, llm_folder: str | Path, device: torch.device | str, dtype: torch.dtype
    ) -> TextEncoders:
        """Read both encoders from local folders, released or built with `megatron-video text build`.

        Args:
            clip_folder: config.json, vocab.txt and weights (or the released clip_text_encoder/ and tokenizer/).
            llm_folder: config.json, step1_chat_tokenizer.model and *.safetensors.
            device: where the encoders run.
            dtype: of the parameters and the states; torch.bfloat16 or torch.float32.

        Raises:
            UserError: a file is missing, damaged, or does not fit the others; the message names it.
        """
        device = torch.device(device)
        clip, clip_tokenizer = _load_clip_folder(Path(clip_folder), device, dtype)
        llm, llm_tokenizer = _load_llm_folder(Path(llm_folder), device, dtype)
        return cls(clip, clip_tokenizer, llm, llm_tokenizer)

    @property
    def widths(self) -> tuple[int, int]:
        """(d_llm, d_clip), the DiT's caption_channels."""
        return self.llm.config.hidden_size, int(self.clip.config.hidden_size)

    @property
    def clip_length(self) -> int:
        """Number of CLIP slots of every caption."""
        return self.clip_tokenizer.max_length

    @torch.no_grad()
    def encode(self, captions: Sequence[str], batch_size: int = 16) -> list[TextStates]:
        """States of each caption, in the order given; the empty caption is the null text of guidance.

        Args:
            captions: texts of any language; what is longer than an encoder takes is cut and says so.
            batch_size: captions per forward pass.

        Raises:
            UserError: a caption that is not valid Unicode.
        """
        _require_unicode(captions)
        llm_tokens = [self.llm_tokenizer.tokenize(caption) for caption in captions]
        clip_tokens = [self.clip_tokenizer.tokenize(caption) for caption in captions]
        # Like lengths together, so that little is computed for padding.
        order = sorted(range(len(captions)), key=lambda i: len(llm_tokens[i].ids))
        results: dict[int, TextStates] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            llm = self._llm_states([llm_tokens[i] for i in batch])
            clip = self._clip_states([clip_tokens[i] for i in batch])
            for i, llm_state, clip_state in zip(batch, llm, clip, strict=True):
                lengths = llm_tokens[i].full_length, clip_tokens[i].full_length
                results[i] = TextStates(llm_state, clip_state, *lengths)
        return [results[i] for i in range(len(captions))]

    def _llm_states(self, tokens: list[Tokens]) -> list[Tensor]:
        rows = [t.ids for t in tokens]
        # To the longest caption of the batch and not to max_length: causality makes padding harmless, and it costs.
        ids, _ = pad_tokens(rows, self.llm_tokenizer.pad_id, max(map(len, rows)))
        states = self.llm(ids.to(self.llm.tok_embeddings.word_embeddings.weight.device))
        # Copies, so that a kept state does not hold the padded batch.
        return [state[: len(row)].clone() for state, row in zip(states, rows, strict=True)]

    def _clip_states(self, tokens: list[Tokens]) -> list[Tensor]:
        # CLIP is bidirectional and the DiT sees its pads, so every caption fills all slots.
        ids, mask = pad_tokens([t.ids for t in tokens], self.clip_tokenizer.pad_id, self.clip_tokenizer.max_length)
        device = self.clip.device
        return [state.clone() for state in clip_states(self.clip, ids.to(device), mask.to(device))]


def text_folders(folder: str | Path) -> tuple[Path, Path]:
    """(CLIP folder, Step-LLM folder) below `folder`, under the names given here or the released ones.

    Raises:
        UserError: one of them is not there.
    """
    folder = Path(folder)
    found = [next((folder / name for name in names if (folder / name).is_dir()), None) for names in _FOLDER_NAMES]
    for names, path in zip(_FOLDER_NAMES, found, strict=True):
        if path is None:
            raise UserError(f"{folder} holds no text encoders: no folder {' or '.join(names)} in it")
    clip, llm = found
    assert clip is not None
    assert llm is not None
    return clip, llm


def text_fingerprint(clip_folder: str | Path, llm_folder: str | Path) -> str:
    """Tells encoder folders apart; see `fingerprint_files`.

    Raises:
        UserError: a folder holds no weights.
    """
    return fingerprint_files(_identifying_files(Path(clip_folder), Path(llm_folder)))


def _identifying_files(clip_folder: Path, llm_folder: Path) -> Iterator[Path]:
    # The tokenizers belong to it: the same weights under another vocabulary mean another thing.
    model_folder, tokenizer_folder = _clip_folders(clip_folder)
    yield from (model_folder / "config.json", tokenizer_folder / CLIP_VOCABULARY_FILE, *weight_files(model_folder))
    yield from (llm_folder / "config.json", llm_folder / STEP_TOKENIZER_FILE, *weight_files(llm_folder))


def _load_clip_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[BertModel, ClipTokenizer]:
    model_folder, tokenizer_folder = _clip_folders(folder)
    config_file = model_folder / "config.json"
    config = read_json(config_file)
    max_length = _clip_max_length(config, config_file)
    # The tokenizer first: a wrong one is noticed before gigabytes are read.
    tokenizer = ClipTokenizer.load(tokenizer_folder, config["vocab_size"], max_length)
    return load_clip(model_folder, config, device, dtype), tokenizer


def _clip_max_length(config: dict[str, Any], origin: Path) -> int:
    require_bert(config, str(origin))
    max_length, most = config.get("caption_max_length", DEFAULT_MAX_LENGTH), config["max_position_embeddings"]
    if not isinstance(max_length, int) or not 3 <= max_length <= most:
        raise UserError(f"{origin}: caption_max_length={max_length!r} is outside 3 to max_position_embeddings={most}")
    return max_length


def _load_llm_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[StepLLM, StepTokenizer]:
    config_file = folder / "config.json"
    config = StepLLMConfig.from_json(read_json(config_file), str(config_file))
    tokenizer = StepTokenizer.load(folder / STEP_TOKENIZER_FILE, config.padded_vocab_size, config.caption_max_length)
    # Built without memory; `load_into` then gives it one tensor at a time, on its device and in its dtype.
    with torch.device("meta"):
        model = StepLLM(config)
    load_into(model, iterate_weights(weight_files(folder)), folder, device, dtype)
    return model.eval().requires_grad_(False), tokenizer


def _clip_folders(folder: Path) -> tuple[Path, Path]:
    if (folder / _CLIP_MODEL_FOLDER).is_dir():
        return folder / _CLIP_MODEL_FOLDER, folder / _CLIP_TOKENIZER_FOLDER
    return folder, folder


def _require_unicode(captions: Sequence[str]) -> None:
    for number, caption in enumerate(captions):
        try:
            caption.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"caption {number} ({caption!r:.80}) is not valid Unicode: {error.reason}") from None
