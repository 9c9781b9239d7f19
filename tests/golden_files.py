"""Golden cases: recorded outputs of the reference implementation, as found in a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

MANIFEST_NAME = "MANIFEST.json"


@dataclass(frozen=True)
class GoldenCase:
    """One recorded output of the reference implementation."""

    name: str
    folder: Path
    meta: dict[str, Any]

    @property
    def kind(self) -> str:
        """What was recorded, in the words of the JSON file."""
        return str(self.meta["kind"])

    @property
    def config(self) -> dict[str, Any]:
        """The sizes of the model that was recorded; empty for kinds that have none."""
        return dict(self.meta.get("config", {}))

    def tensors(self, part: str = "") -> dict[str, torch.Tensor]:
        """All tensors of `<name>[.part].safetensors`, e.g. part="grads"."""
        from safetensors.torch import load_file

        return load_file(self.path(part))

    def path(self, part: str = "") -> Path:
        """Path of `<name>[.part].safetensors`, whether it is there or not."""
        return self.folder / ".".join(filter(None, (self.name, part, "safetensors")))


def find_golden_cases(folder: Path) -> list[GoldenCase]:
    """Every `*.json` with a `kind` in `folder`, by name."""
    if not folder.is_dir():
        raise pytest.UsageError(f"--golden-dir {folder} is not a folder")
    cases = []
    for path in sorted(folder.glob("*.json")):
        meta = json.loads(path.read_text(encoding="utf-8"))
        if path.name != MANIFEST_NAME and isinstance(meta, dict) and "kind" in meta:
            cases.append(GoldenCase(path.stem, folder, meta))
    if not cases:
        raise pytest.UsageError(f"--golden-dir {folder} holds no case: a case is NAME.json with a `kind` field")
    return cases
