"""README and the user pages name commands, files and links that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_prep.cli import STAGES
from megatron_video.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "slurm" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    for command, stage in re.findall(
        r"megatron-video ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?", page.read_text(encoding="utf-8")
    ):
        assert command in COMMANDS
        assert command != "data" or stage in {"", *STAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_modules_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for module in re.findall(r"-m (training(?:\.[a-z_]+)+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for path in re.findall(r"`((?:training|megatron_video|data_prep|checkpoints_tools)/[^`*]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_command_is_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in COMMANDS if f"megatron-video {name}" not in text and f"training.{name}" not in text] == [
        "demo"  # is `make demo`
    ]
