"""Tags that a trained model gives: aesthetic, NSFW, watermark, OCR text area, text-video score.

One module a tag; each has a class with `column`, `fingerprint` and `score(batch)`. Weights are local files named in a
YAML (`megatron-video data tag --models models.yaml`). All five tags must be there, with files or with `skip: true`:
what is not configured is an error, and what is skipped stays null.
"""

from data_prep.model_tags.base import ModelTag, TagBatch
from data_prep.model_tags.config import ModelsConfig, load_models_config
from data_prep.model_tags.registry import check_files, load_models, model_fingerprints

__all__ = [
    "ModelTag",
    "ModelsConfig",
    "TagBatch",
    "check_files",
    "load_models",
    "load_models_config",
    "model_fingerprints",
]
