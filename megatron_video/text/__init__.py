"""Text encoders of the model: HunyuanCLIP (BERT) and Step-LLM, with their tokenizers."""

from megatron_video.text.collate import TextBatch, collate_text
from megatron_video.text.encoders import TextEncoders, TextStates, text_fingerprint, text_folders
from megatron_video.text.step_llm import StepLLM, StepLLMConfig

__all__ = [
    "StepLLM",
    "StepLLMConfig",
    "TextBatch",
    "TextEncoders",
    "TextStates",
    "collate_text",
    "text_fingerprint",
    "text_folders",
]
