"""Captions from a vision-language model in a local folder, through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from data_prep.caption_config import Answer, CaptionConfig, Clip, Kind, prompt_text
from data_prep.devices import find_device
from megatron_video.errors import UserError
from megatron_video.fingerprint import fingerprint_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class VlmCaptioner:
    """A model that takes pictures in a chat (LLaVA, Qwen-VL, SmolVLM, InternVL ...), several clips a pass."""

    concurrency = 1
    looks = True

    def __init__(self, folder: Path, config: CaptionConfig, device: str, dtype: str, batch_size: int) -> None:
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size} must be at least 1")
        self._config, self.batch_size = config, batch_size
        self._device = find_device(device)
        self._processor, self._model = _load(folder, self._device, DTYPES[dtype])
        # Two snapshots under one folder name are two models.
        weights = fingerprint_files([*sorted(folder.glob("*.safetensors")), folder / "config.json"])[:8]
        self.name = f"transformers:{folder.resolve().name}-{weights}-{dtype}/{config.fingerprint}"

    def ask(self, kind: Kind, clips: Sequence[Clip]) -> list[Answer]:
        """One pass over all clips; the likeliest tokens, or drawn ones where the temperature is above 0."""
        prompt = self._config.prompts[kind]
        texts = [self._chat(prompt.system, prompt_text(prompt, clip.row), len(clip.frames)) for clip in clips]
        pictures = [[Image.fromarray(frame) for frame in clip.frames] for clip in clips]
        tokens = self._generate(texts, pictures, prompt.max_tokens)
        answers = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [Answer(text, cut=not self._ended(row)) for text, row in zip(answers, tokens, strict=True)]

    def figures(self) -> dict[str, int]:
        """Nothing to add."""
        return {}

    def close(self) -> None:
        """Nothing is held but memory."""

    def _chat(self, system: str, question: str, num_frames: int) -> str:
        content = [{"type": "image"}] * num_frames + [{"type": "text", "text": question}]
        messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        messages.append({"role": "user", "content": content})
        text: str = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    @torch.inference_mode()
    def _generate(self, texts: list[str], pictures: list[list[Image.Image]], max_tokens: int) -> torch.Tensor:
        """The new tokens, int64 [clips, at most max_tokens]."""
        temperature = self._config.temperature
        drawing = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        try:
            inputs = self._processor(text=texts, images=pictures, padding=True, return_tensors="pt")
            inputs = inputs.to(self._device, self._model.dtype)
            tokens: torch.Tensor = self._model.generate(**inputs, max_new_tokens=max_tokens, **drawing)
        except torch.OutOfMemoryError as error:
            raise UserError(f"--batch-size {self.batch_size} with these frames does not fit: {error}") from None
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--vlm cannot answer {len(texts)} clips of {len(pictures[0])} frames: {error}") from None
        return tokens[:, inputs["input_ids"].shape[1] :]

    def _ended(self, tokens: torch.Tensor) -> bool:
        ends = self._model.generation_config.eos_token_id
        if ends is None:
            return False
        known = torch.tensor(ends if isinstance(ends, list) else [ends], device=tokens.device)
        return bool(torch.isin(tokens, known).any())


def _load(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise UserError(f"--vlm {folder}: no model folder (config.json, weights, processor); nothing is downloaded")
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        loader: Any = AutoModelForImageTextToText
        model, report = loader.from_pretrained(folder, local_files_only=True, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"--vlm {folder} cannot be loaded: {error}") from None
    # transformers fills what a file lacks with random numbers and a warning.
    if lacking := sorted(map(str, report["missing_keys"])):
        raise UserError(f"--vlm {folder}: the weights lack {len(lacking)} tensors, such as {lacking[0]}")
    if not getattr(processor, "chat_template", None):
        raise UserError(f"--vlm {folder}: its processor has no chat template, so how to ask it is not known")
    # Generation goes on at the right; padding there would come between question and answer.
    processor.tokenizer.padding_side = "left"
    return processor, model.to(device).eval()
