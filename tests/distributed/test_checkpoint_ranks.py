"""Saves behind the training of several ranks: each its share, one outcome for all, and the way back to an older one."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megatron_video.errors import UserError
from training.checkpoint import TrainState, agree_on_newest, find_checkpoint, load_checkpoint, step_folder
from training.checkpoint_config import CheckpointConfig
from training.checkpoint_saver import CheckpointError, CheckpointSaver
from training.config import PretrainConfig
from training.ema import EMA, HostEMA
from training.layout_matrix.checkpoints import load_and_train
from training.layout_matrix.compare import QUANTITIES, assemble
from training.layout_matrix.runner import ONE_PROCESS
from training.layout_matrix.table import LAYOUTS, STEPS, LayoutCase, Workload
from training.layout_matrix.worker import EMA_DECAY, Report, Session, build, model_config
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed
BY_NAME = {case.name: case for case in (ONE_PROCESS, *LAYOUTS)}
# Each way in which the state is cut, and what makes the copy late: gathers that are still under way.
HEAVY = [pytest.param(name, marks=pytest.mark.heavy) for name in ("dp2", "tp2_sp")]
CASES = ["dp2_zero1_overlap", "pp2_vpp2", "tp2_sp_pp2_vpp2_dp2_zero1", "dp2_fsdp", *HEAVY]


def save(session: Session, saver: CheckpointSaver, step: int) -> Path:
    config = PretrainConfig(model=model_config(session.workload), parallel=session.layout.config)
    return saver.save(session.model, session.optimizer, TrainState(step=step), config, session.ema)


def train_on_while_saving(case: LayoutCase, folder: str) -> Report:
    """On a rank: the steps after the save are trained while its files are written."""
    session = build(case, Workload())
    saver = CheckpointSaver(Path(folder), CheckpointConfig())
    session.train(STEPS)
    save(session, saver, STEPS)
    report = session.train(1)
    saver.finish()
    return report


@pytest.mark.parametrize("name", CASES)
def test_what_was_saved_while_training_went_on_continues_bit_for_bit(
    name: str, ranks: RankPool, tmp_path: Path
) -> None:
    case = BY_NAME[name]
    unstopped = ranks.run(train_on_while_saving, case, str(tmp_path), ranks=case.ranks)
    resumed = ranks.run(load_and_train, case, Workload(), str(tmp_path), ranks=case.ranks)
    assert_same(resumed, unstopped)


def assert_same(found: list[Report], expected: list[Report]) -> None:
    assert (found[0].losses, found[0].grad_norms) == (expected[0].losses, expected[0].grad_norms)
    for quantity in QUANTITIES:
        ours, theirs = assemble(found, quantity)[0], assemble(expected, quantity)[0]
        for tensor, value in theirs.items():
            np.testing.assert_array_equal(ours[tensor], value, err_msg=f"{quantity} of {tensor}")


def go_back(case: LayoutCase, folder: str, goes_back: bool) -> Report:
    """On a rank: one more step, or three that are taken back first, with a save under way."""
    session = build(case, Workload())
    saver = CheckpointSaver(Path(folder), CheckpointConfig())
    session.train(STEPS)
    save(session, saver, STEPS)
    if goes_back:
        session.train(3)
        save(session, saver, STEPS + 3)
        earlier = find_checkpoint(step_folder(Path(folder), STEPS))
        state = load_checkpoint(earlier, session.model, session.optimizer, session.ema)
        assert state.step == STEPS
    report = session.train(1)
    saver.finish()
    return report


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_goes_back_is_where_it_was(name: str, ranks: RankPool, tmp_path: Path) -> None:
    case = BY_NAME[name]
    straight, back = (
        ranks.run(go_back, case, str(tmp_path / str(goes_back)), goes_back, ranks=case.ranks)
        for goes_back in (False, True)
    )
    assert_same(back, straight)


def test_replicas_write_equal_shares_of_what_they_hold_alike(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(train_on_while_saving, BY_NAME["dp2"], str(tmp_path), ranks=2)
    shares = [
        sum(path.stat().st_size for path in step_folder(tmp_path, STEPS).glob(f"__{rank}_*.distcp")) for rank in (0, 1)
    ]
    assert 0.8 < shares[0] / shares[1] < 1.25


def fail_on_one_rank(case: LayoutCase, folder: str, failing: int) -> str:
    """On a rank: what it is told when the disk of one rank is full."""
    session = build(case, Workload())
    saver = CheckpointSaver(Path(folder), CheckpointConfig())
    save(session, saver, 1)
    saver.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        save(session, saver, 2)
        saver.finish()
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_rank_is_one_for_all(failing: int, ranks: RankPool, tmp_path: Path) -> None:
    told = ranks.run(fail_on_one_rank, BY_NAME["dp2_zero1"], str(tmp_path), failing, ranks=2)
    assert told[0] == told[1]
    assert f"rank {failing}: cannot write" in told[0]
    assert f"__{failing}_" in told[0]
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step_00000001"]
    assert find_checkpoint(tmp_path) == step_folder(tmp_path, 1)


def look_for_newest(folder: str) -> str:
    try:
        return str(agree_on_newest(Path(folder) / "checkpoints", CheckpointConfig(verify="checksums")))
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_1.distcp"])
def test_whichever_rank_reads_the_changed_file_all_refuse_it(name: str, ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(train_on_while_saving, BY_NAME["dp2"], str(tmp_path), ranks=2)
    newest = step_folder(tmp_path, STEPS)
    assert ranks.run(look_for_newest, str(tmp_path), ranks=3) == [str(newest)] * 3
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    for told in ranks.run(look_for_newest, str(tmp_path), ranks=3):
        assert f"{newest} is damaged: {name} has checksum" in told


def average(case: LayoutCase, folder: str, kind: type[EMA]) -> Report:
    """On a rank: three steps with averages of a kind, which are saved."""
    session = build(case, Workload())
    session.ema = kind(session.optimizer, EMA_DECAY)
    report = session.train(STEPS)
    save(session, CheckpointSaver(Path(folder), CheckpointConfig(asynchronous=False)), STEPS)
    return report


@pytest.mark.parametrize("name", ["dp2_zero1", "dp2_fsdp"])
def test_averages_in_host_memory_are_the_same_and_load_into_another_layout(
    name: str, ranks: RankPool, tmp_path: Path
) -> None:
    on_device, on_host = (
        ranks.run(average, BY_NAME[name], str(tmp_path / kind.__name__), kind, ranks=2) for kind in (EMA, HostEMA)
    )
    assert_same(on_host, on_device)
    loaded = [
        ranks.run(load_and_train, BY_NAME["tp2_sp"], Workload(), str(tmp_path / kind), ranks=2)
        for kind in ("EMA", "HostEMA")
    ]
    assert_same(*loaded)
