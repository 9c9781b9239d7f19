"""The cross-load table: a checkpoint of any layout, with its optimizer and EMA, goes on in any other unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_video.errors import UserError
from training.checkpoint import TrainState, load_checkpoint, save_checkpoint, step_folder
from training.config import PretrainConfig
from training.layout_matrix.compare import Errors, compare
from training.layout_matrix.report import failure_lines, markdown_table, text_table
from training.layout_matrix.runner import ONE_PROCESS
from training.layout_matrix.table import (
    LAYOUTS,
    STEPS,
    TOLERANCES,
    LayoutCase,
    Workload,
)
from training.layout_matrix.worker import Report, Session, build, model_config
from training.local_ranks import RankError, RankPool
from training.optimizer_state import count_updates

# A reader starts from other weights: what the checkpoint does not bring shows.
OTHER_SEED = 99
MORE_STEPS = 1

# Worlds of one to eight ranks; each kind of cut and of optimizer state at least once.
CHECKPOINT_LAYOUTS = (
    "one_process",
    "dp2",
    "dp2_zero1",
    "dp2_zero1_overlap",
    "tp2_sp",
    "pp2",
    "pp2_vpp2",
    "cp2_a2a",
    "cp3_all_gather",
    "tp4_sp",
    "dp4_zero1_overlap",
    "tp2_sp_dp2_zero1",
    "pp2_dp2_zero1_overlap",
    "dp8_zero1",
    "dp2_fsdp",
    "tp2_sp_dp2_fsdp",
    "tp2_sp_pp2_cp2",
    "tp2_sp_pp2_vpp2_dp2_zero1",
)
SHORT_WRITERS = ("tp2_sp_dp2_zero1", "pp2_vpp2")
SHORT_READERS = ("one_process", "dp2_zero1", "tp2_sp", "pp2_vpp2", "cp2_a2a", "pp2_dp2_zero1_overlap")


@dataclass(frozen=True)
class CrossLoad:
    """One cell: written in one layout, continued in another."""

    writer: str
    reader: str
    errors: Errors | None
    """None where a rank failed."""
    failure: str = ""

    @property
    def wrong(self) -> list[str]:
        """What is above the fp32 tolerance."""
        return ["failed"] if self.errors is None else self.errors.above(TOLERANCES["float32"])

    @property
    def largest(self) -> float:
        """Of all errors."""
        if self.errors is None:
            return float("inf")
        return max(self.errors.value(name) for name in ("loss", "grad_norm", "gradients", "parameters", "ema"))


def checkpoint_cases(
    short: bool = False, max_ranks: int = 8, names: Sequence[str] = ()
) -> tuple[list[LayoutCase], list[LayoutCase]]:
    """Rows of the table that write and that read, those of more ranks left out; one process is among them.

    `names`: these instead, whichever there are.

    Raises:
        UserError: a name that is not in the table.
    """
    known = {case.name: case for case in (ONE_PROCESS, *LAYOUTS)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--layouts {' '.join(unknown)}: not in the table; --list shows the names")
    every = names or CHECKPOINT_LAYOUTS
    groups: tuple[Sequence[str], Sequence[str]] = (every, every)
    if short and not names:
        groups = SHORT_WRITERS, SHORT_READERS
    writers, readers = ([known[name] for name in group if known[name].ranks <= max_ranks] for group in groups)
    return writers, readers


def train_and_save(case: LayoutCase, workload: Workload, folder: str, more: int = MORE_STEPS) -> Report:
    """On a rank: train, save, go on; the report of the steps after the save."""
    session = build(case, workload)
    session.train(STEPS)
    _save(session, folder)
    return session.train(more)


def load_and_train(case: LayoutCase, workload: Workload, folder: str, more: int = MORE_STEPS) -> Report:
    """On a rank: take a checkpoint over into a model of other weights, and go on."""
    session = build(case, workload, init_seed=OTHER_SEED)
    state = load_checkpoint(step_folder(Path(folder), STEPS), session.model, session.optimizer, session.ema)
    if (state.step, count_updates(session.optimizer)) != (STEPS, STEPS):
        raise AssertionError(f"step {state.step} and {count_updates(session.optimizer)} updates, not {STEPS}")
    return session.train(more)


def cross_load(
    pool: RankPool,
    folder: Path,
    writers: Sequence[LayoutCase],
    readers: Sequence[LayoutCase],
    tell: Callable[[str], None] = lambda _: None,
) -> list[CrossLoad]:
    """Every reader with every writer's checkpoint, compared with a process that was never stopped.

    `tell` gets one line a cell.
    """
    workload = Workload()
    reference = pool.run(train_and_save, ONE_PROCESS, workload, str(folder / "reference"), ranks=1)[0]
    cells = []
    for writer in writers:
        place = str(folder / writer.name)
        try:
            pool.run(train_and_save, writer, workload, place, ranks=writer.ranks)
        except RankError as error:
            cells += [CrossLoad(writer.name, reader.name, None, str(error)) for reader in readers]
            continue
        for reader in readers:
            cells.append(_read(pool, writer, reader, place, workload, reference))
            count = f"[{len(cells):3}/{len(writers) * len(readers)}]"
            tell(f"{count} saved in {writer.name}, loaded in {reader.name}: {_cell(cells[-1])}")
    return cells


def cross_load_table(cells: Sequence[CrossLoad], markdown: bool = False) -> str:
    """Writers down, readers across, the largest relative error in each cell; readers are numbered like the writers."""
    readers = list(dict.fromkeys(cell.reader for cell in cells))
    writers = list(dict.fromkeys(cell.writer for cell in cells))
    by_place = {(cell.writer, cell.reader): cell for cell in cells}
    numbers = {name: str(index + 1) for index, name in enumerate(dict.fromkeys((*writers, *readers)))}
    header = ["saved in \\ loaded in", *(numbers[name] for name in readers)]
    rows = [
        [f"{numbers[writer]:>2} {writer}", *(_cell(by_place[writer, reader]) for reader in readers)]
        for writer in writers
    ]
    only_readers = [f"{numbers[name]} {name}" for name in readers if name not in writers]
    table = (markdown_table if markdown else text_table)(header, rows)
    return table + (f"\n\nonly loaded: {', '.join(only_readers)}" if only_readers else "")


def cross_load_summary(cells: Sequence[CrossLoad]) -> str:
    """How many pairs agree, and what is wrong with each that does not."""
    wrong = [cell for cell in cells if cell.wrong]
    lines = [f"{len(cells) - len(wrong)} of {len(cells)} pairs go on like one process"]
    for cell in wrong:
        lines.append(f"saved in {cell.writer}, loaded in {cell.reader}: {', '.join(cell.wrong)}")
        lines += [f"  {line}" for line in failure_lines(cell.failure)] if cell.failure else []
    return "\n".join(lines)


def _save(session: Session, folder: str) -> None:
    config = PretrainConfig(model=model_config(session.workload), parallel=session.layout.config)
    save_checkpoint(Path(folder), session.model, session.optimizer, TrainState(step=STEPS), config, ema=session.ema)


def _read(
    pool: RankPool, writer: LayoutCase, reader: LayoutCase, place: str, workload: Workload, reference: Report
) -> CrossLoad:
    try:
        reports: list[Any] = pool.run(load_and_train, reader, workload, place, ranks=reader.ranks)
    except RankError as error:
        return CrossLoad(writer.name, reader.name, None, str(error))
    return CrossLoad(writer.name, reader.name, compare(reports, reference))


def _cell(cell: CrossLoad) -> str:
    if cell.errors is None:
        return "fail"
    # Two digits are enough to see that it is rounding, and let fifteen readers stand on a line.
    return f"{cell.largest:.0e}".replace("e-0", "e-") + ("!" if cell.wrong else "")
