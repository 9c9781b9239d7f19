"""Hashes that tell models apart: of all bytes for a Video-VAE, of the edges of each file for the large text encoders.

A Video-VAE is trained in phases that freeze parts of it, so its first and last tensors may be equal in two of them;
shards, blends and samples name it by the same hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from megatron_video.errors import UserError
from megatron_video.files import file_sha256

_EDGE_BYTES = 1 << 20


def fingerprint_files(files: Iterable[Path]) -> str:
    """Hash of each file's name, size and first and last MiB, as 32 hex digits; small files count whole.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        # The name and not the path: a folder that was moved is still the same model.
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_EDGE_BYTES))
            # A safetensors file begins with its names and shapes and ends with its last tensor's values.
            handle.seek(max(size - _EDGE_BYTES, 0))
            digest.update(handle.read())
    return digest.hexdigest()


def vae_fingerprint(path: Path) -> str:
    """Hash over all bytes of a Video-VAE's files: 16 hex digits each of its configuration, if it has one, and weights.

    Args:
        path: folder (config.json, *.safetensors) or a released .safetensors file, as `load_vae` takes.

    Raises:
        UserError: nothing there.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    weights = [file for file in files if file.suffix == ".safetensors" and file.is_file()]
    if not weights:
        raise UserError(f"--vae {path}: no Video-VAE there (a folder with model.safetensors, or a .safetensors file)")
    # The configuration first: the same weights under other sizes are another model.
    named = [file for file in files if file.name == "config.json"] + weights
    return "-".join(file_sha256(file)[:16] for file in named)
