"""Which encoders a model's shards were made with: written into its checkpoints, compared where it is used.

A model knows the latents of one Video-VAE and the states of one pair of text encoders; with others it makes pictures
of nothing, without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_video.errors import UserError
from megatron_video.shard_schema import INFO_FILE, DatasetInfo, read_info
from training.checkpoint import read_config, read_state

# name -> (option of `sample`, what it is)
_ENCODERS = {"vae": ("--vae", "Video-VAE"), "text": ("--text", "pair of text encoders")}


def encoders_of(info: DatasetInfo) -> dict[str, str]:
    """Fingerprints of the Video-VAE ("vae") and the text encoders ("text") of a folder of shards."""
    return {"vae": info.vae_fingerprint, "text": info.text_fingerprint}


def trained_encoders(checkpoint: Path) -> dict[str, str]:
    """Fingerprints of the encoders that a model was trained with; empty where nothing tells.

    Checkpoints that are older than the record are looked up in the shards of their configuration, if those are there.
    """
    recorded = read_state(checkpoint).encoders
    shards = (read_config(checkpoint).get("data") or {}).get("shards") or []
    if recorded or not shards or not (Path(shards[0]) / INFO_FILE).is_file():
        return recorded
    # All folders of a run have the same encoders.
    return encoders_of(read_info(Path(shards[0])))


def check_encoders(checkpoint: Path, given: Mapping[str, str], paths: Mapping[str, Path]) -> str | None:
    """Compare encoders with those that the model of `checkpoint` was trained with.

    Args:
        given: their fingerprints, "vae" and "text".
        paths: where they lie.

    Returns:
        A sentence where it is not known what the model was trained with, else None.

    Raises:
        UserError: others; names both.
    """
    trained = trained_encoders(checkpoint)
    for name, (option, what) in _ENCODERS.items():
        if name in trained and trained[name] != given[name]:
            raise UserError(
                f"{option} {paths[name]} (fingerprint {given[name]}) is not the {what} that the shards of {checkpoint} "
                f"were made with ({trained[name]}), so the model does not know what it gives; name that one, or add "
                "--other-encoders to go on with these"
            )
    return None if trained else f"{checkpoint} does not say which encoders it was trained with; they were not compared"
