"""Megatron-Video: the model library (DiT, Video-VAE, text encoders, flow matching, parallel building blocks)."""

import warnings
from pathlib import Path

__version__ = (Path(__file__).parent / "VERSION").read_text().strip()

# megatron-core repeats these in every process, on import or per module; `megatron-video doctor` says what is missing.
_REPEATED = (
    "(Transformer Engine and )?Apex (is|are) not installed",
    "full scope is deprecated",
    ".*tp_group is None",
    "`torch.distributed.[a-z_]+` is deprecated",
    "`load_state_dict` is deprecated",
)
for _message in _REPEATED:
    warnings.filterwarnings("ignore", message=_message)
