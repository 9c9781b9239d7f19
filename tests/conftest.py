"""What all tests share: the `--golden-dir` option and its cases, one torch thread a process, and several processes.

The whole default suite runs in as many processes as there are cores; chosen files, tests or marks run in one.
A golden case is a JSON file with a `kind` (and, for most kinds, a `config`) beside `<stem>.safetensors`. A test that
takes `golden_case` is run once for each case found, with the file's stem as its id.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import find_golden_cases

# Beyond that the tests on pools of ranks, which stay together, last longer than all others.
MAX_PROCESSES = 4
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
    # torch asks the name server for the address of every connection between ranks: 5 s where none answers.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


def pytest_collection_finish() -> None:
    # What was imported stays; collections need not look through half a million objects of it.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """What `-n auto` means: 0, this process alone, unless the whole default suite is run."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    folders = {config.rootpath, config.rootpath / "tests"}
    chosen = {(config.invocation_params.dir / argument).resolve() for argument in config.args}
    whole = chosen <= folders and "not heavy" in config.option.markexpr and not config.option.keyword
    processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    return processes if whole and processes > 1 else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A module stays in one process, for its fixtures, and so do all modules that share one pool of ranks.

    The first process begins with those and goes on with other tests of several processes; all others begin with unit
    tests, so that seldom more processes work than there are cores.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ModuleScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.split("::")[0]
            return "tests/distributed" if module.startswith("tests/distributed/") else module

        def _assign_work_unit(self, node: Any) -> None:
            if node is not self.nodes[0]:
                self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
            super()._assign_work_unit(node)

    config.option.loadscopereorder = False
    return ModuleScheduling(config, log)


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
