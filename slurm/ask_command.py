"""Asking a command of this package on the login node, as a user would, what it says before anything is submitted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from megatron_video.errors import UserError
from slurm.snapshot import source_root


def ask_json(*words: str) -> Any:
    """The JSON that `python -m WORDS` prints; the process that asks needs no torch for it.

    Raises:
        UserError: in the command's own words.
    """
    # The code that will be frozen, even where another version is installed.
    environment = os.environ | {"PYTHONPATH": str(source_root()), "PYTHONSAFEPATH": "1"}
    result = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=environment)
    if result.returncode:
        said = (result.stderr.strip() or f"exit code {result.returncode}, without a word").splitlines()
        start = next((number for number, line in enumerate(said) if "error: " in line), len(said) - 1)
        raise UserError("\n".join([said[start].partition("error: ")[2] or said[start], *said[start + 1 :]]))
    return json.loads(result.stdout)


def given(option: str, words: Sequence[str]) -> str | None:
    """Value of an option among words, as `--out X` or `--out=X`; None if it is not there."""
    for number, word in enumerate(words):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and number + 1 < len(words):
            return words[number + 1]
    return None
