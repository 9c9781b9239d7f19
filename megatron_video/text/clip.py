"""The bidirectional encoder ("HunyuanClip"): a plain BertModel whose last hidden states condition the DiT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_video.errors import UserError
from megatron_video.text.weights import iterate_weights, load_into, weight_files

if TYPE_CHECKING:
    from transformers import BertModel

DEFAULT_MAX_LENGTH = 77

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
PREFIX = "bert."
# Parts of other checkpoints of this family that are none of BertModel's parameters.
OTHER_PARTS = ("cls.", "embeddings.position_ids", "logit_scale", "text_projection", "visual.")
# The pooler takes no part in the last hidden state either.
_IGNORED_PREFIXES = ("pooler.", *OTHER_PARTS)


def require_bert(config: dict[str, Any], origin: str) -> None:
    """Check that a config.json names every size of a BERT encoder.

    Raises:
        UserError: it configures another architecture, or lacks a size.
    """
    if config.get("model_type", "bert") != "bert":
        raise UserError(f"{origin}: model_type={config['model_type']!r}, expected 'bert'")
    wrong = [key for key in _REQUIRED if not isinstance(config.get(key), int)]
    if wrong:
        raise UserError(f"{origin} is not a BERT configuration: {', '.join(wrong)} missing or no whole number")


def build_clip(config: dict[str, Any], origin: str, with_pooler: bool = False) -> BertModel:
    """A BertModel in eval mode from the keys of a Hugging Face config.json.

    Args:
        config: the parsed file.
        origin: names it in errors.
        with_pooler: also build the pooler, which the released file has and whose output nobody reads.

    Raises:
        UserError: it configures another architecture, or lacks a size.
    """
    # Imported here: it takes seconds, and the decoder and the collation do not need it.
    from transformers import BertConfig, BertModel

    require_bert(config, origin)
    try:
        bert_config = BertConfig.from_dict(config)
        return BertModel(bert_config, add_pooling_layer=with_pooler).eval()
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{origin} is not a BERT configuration: {error}") from None


def encoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep what the encoder consists of, under BertModel's own names.

    In a file with the `bert.` prefix everything else belongs to other heads; in one without, only the names listed
    in this module are passed over, so that a foreign file is noticed.
    """
    # The prefix is all or nothing: a file that has it keeps every encoder weight under it.
    if any(name.startswith(PREFIX) for name in weights):
        weights = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    return {name: value for name, value in weights.items() if not name.startswith(_IGNORED_PREFIXES)}


def load_clip(folder: Path, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> BertModel:
    """The encoder of a released or built folder, without its pooler.

    Raises:
        UserError: weights that are missing, unknown, or of another shape, by name.
    """
    # Without the pooler, whose output nobody reads; its weights are among the ignored names.
    with torch.device("meta"):
        model = build_clip(config, str(folder / "config.json"))
    weights = encoder_weights(dict(iterate_weights(weight_files(folder))))
    load_into(model, iter(weights.items()), folder, device, dtype)
    # These two are in no file and would stay on the meta device.
    positions = torch.arange(model.config.max_position_embeddings, device=device)[None]
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    model.embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)
    return model.requires_grad_(False)


def clip_states(model: BertModel, token_ids: Tensor, mask: Tensor) -> Tensor:
    """token_ids [b, n] int64, mask [b, n] (1 = token, 0 = pad) -> last hidden states [b, n, hidden], pads included."""
    states: Tensor = model(input_ids=token_ids, attention_mask=mask).last_hidden_state
    return states
