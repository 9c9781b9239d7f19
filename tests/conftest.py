"""What all tests share: the `--golden-dir` option and its cases, and one torch thread a process.

A golden case is a JSON file with a `kind` (and, for most kinds, a `config`) beside `<stem>.safetensors`. A test that
takes `golden_case` is run once for each case found, with the file's stem as its id.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden_files import find_golden_cases

DEFAULT_GOLDEN_DIR = Path(__file__).parent / "golden"


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
