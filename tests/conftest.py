"""What all tests share: the `--golden-dir` option and its cases, and one torch thread a process.

A golden case is a JSON file with a `kind` (and, for most kinds, a `config`) beside `<stem>.safetensors`. A test that
takes `golden_case` is run once for each case found, with the file's stem as its id.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

DEFAULT_GOLDEN_DIR = Path(__file__).parent / "golden"
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=DEFAULT_GOLDEN_DIR,
        help="folder with golden cases (NAME.json beside NAME.safetensors); default: tests/golden",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Ranks that a test starts inherit one thread each: two ranks of two threads on two cores only wait on each other.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" in metafunc.fixturenames:
        cases = find_golden_cases(metafunc.config.getoption("--golden-dir"))
        metafunc.parametrize("golden_case", cases, ids=[case.name for case in cases])


@pytest.fixture(autouse=True, scope="module")
def no_process_groups_left() -> Iterator[None]:
    """megatron-core's groups are global: one module's tests must not leave them to the next's."""
    yield
    if "megatron.core.parallel_state" in sys.modules:
        from megatron_video.parallel import destroy_parallel

        destroy_parallel()


@pytest.fixture(scope="session")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    """The folder given by `--golden-dir`."""
    folder: Path = request.config.getoption("--golden-dir")
    return folder
