"""Text states of the prompts that a run samples: encoded once, before the model is there, and kept with the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_video.errors import UserError
from megatron_video.files import appearing
from megatron_video.text import TextEncoders, TextStates, text_fingerprint, text_folders
from training.sample_prompts import Prompt, read_prompts
from training.sample_ranks import decided_by_rank_0
from training.sample_videos_config import SampleVideosConfig

STATES_FILE = "prompt_states.safetensors"


@dataclass(frozen=True)
class PromptStates:
    """Prompts with what the model is told of them."""

    prompts: list[Prompt]
    states: list[TextStates]
    """bf16 on the CPU, as shards hold them."""
    negative: TextStates


def prepare_prompts(config: SampleVideosConfig, folder: Path, device: torch.device, fingerprint: str) -> PromptStates:
    """Read or encode the prompts on rank 0, and give them to all ranks.

    Args:
        config: with prompts and text.
        folder: where the states are kept.
        device: to encode on; nothing of the encoders stays there.
        fingerprint: of the encoders that the training shards were made with.

    Raises:
        UserError: on all ranks, if rank 0 cannot read the prompts or the encoders are others than the shards'.
    """
    return decided_by_rank_0(lambda: _read_or_encode(config, folder, device, fingerprint))


def _read_or_encode(config: SampleVideosConfig, folder: Path, device: torch.device, fingerprint: str) -> PromptStates:
    assert config.prompts is not None
    assert config.text is not None
    prompts = read_prompts(Path(config.prompts), config.seed, config.limit)
    texts = [*(prompt.text for prompt in prompts), config.negative_prompt]
    path = folder / STATES_FILE
    # Not a hash of the encoders: later lives of the run need them no more.
    identity = {"texts": json.dumps(texts), "shards": fingerprint, "text": str(Path(config.text).resolve())}
    states = _read(path, identity, len(texts))
    if states is None:
        check_encoders(config.text, fingerprint)
        states = encode_texts(config.text, texts, device)
        _write(path, identity, states)
    return PromptStates(prompts, states[:-1], states[-1])


def check_encoders(text: str, fingerprint: str) -> None:
    """Refuse other text encoders than those of the training shards.

    Raises:
        UserError: nothing there, or others.
    """
    found = text_fingerprint(*text_folders(text))
    if found != fingerprint:
        raise UserError(
            f"samples.text={text} holds other text encoders ({found}) than data.shards were encoded with "
            f"({fingerprint}); the model does not know their states"
        )


def encode_texts(
    text: str | Path,
    texts: Sequence[str],
    device: torch.device,
    check: Callable[[TextEncoders], None] = lambda encoders: None,
) -> list[TextStates]:
    """States of `texts` as shards hold them, bf16 on the CPU; nothing of the encoders stays on the device.

    Args:
        text: folder of the encoders.
        texts: to encode.
        device: to encode on.
        check: may refuse the encoders before they are used.
    """
    # The released pipeline runs the encoders in bf16 on GPUs; on CPUs bf16 is slower.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoders = TextEncoders.load(*text_folders(text), device, dtype)
    check(encoders)
    states = [encoded.to(torch.device("cpu"), torch.bfloat16) for encoded in encoders.encode(list(texts))]
    del encoders
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return states


def _read(path: Path, identity: dict[str, str], count: int) -> list[TextStates] | None:
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        if file.metadata() != identity:
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    lengths = tensors["caption_tokens"].tolist()
    return [TextStates(tensors[f"llm.{i}"], tensors[f"clip.{i}"], *lengths[i]) for i in range(count)]


def _write(path: Path, identity: dict[str, str], states: Sequence[TextStates]) -> None:
    tensors = {f"llm.{i}": state.llm.contiguous() for i, state in enumerate(states)}
    tensors |= {f"clip.{i}": state.clip.contiguous() for i, state in enumerate(states)}
    lengths = [[state.llm_caption_tokens, state.clip_caption_tokens] for state in states]
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as temporary:
        save_file(tensors | {"caption_tokens": torch.tensor(lengths)}, temporary, identity)
