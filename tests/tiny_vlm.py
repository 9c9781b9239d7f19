"""A small LLaVA with random weights in a folder, as transformers writes and reads it: picture and text go through."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PICTURE = 32
_SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_tiny_vlm(folder: Path, seed: int = 0) -> Path:
    """Tokens are bytes, so that any prompt has some; 4 tokens a picture."""
    torch.manual_seed(seed)
    vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PICTURE,
        patch_size=PICTURE // 2,
    )
    language = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=vocabulary["<image>"], vision_feature_layer=-1
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    _processor(vocabulary).save_pretrained(folder)
    return folder


def _processor(vocabulary: dict[str, int]) -> LlavaProcessor:
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    pad, begin, end, image = _SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=begin, eos_token=end, additional_special_tokens=[image]
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": PICTURE}, crop_size={"height": PICTURE, "width": PICTURE}
        ),
        tokenizer=tokenizer,
        patch_size=PICTURE // 2,
        vision_feature_select_strategy="default",
        chat_template=_TEMPLATE,
        image_token=image,
        num_additional_image_tokens=1,
    )
