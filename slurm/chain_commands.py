"""What `megatron-video slurm status | resume | cancel | logs` do where a chain is meant."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_video.errors import UserError
from megatron_video.files import write_atomically
from megatron_video.run_lock import run_lock
from slurm import scheduler
from slurm.chain_record import ChainRecord
from slurm.chain_status import HELD, StageState, chain_states, chain_verdict, describe_chain, states_as_json
from slurm.chain_submit import Submission, units_left
from slurm.job import PROFILE_FILE, SLURM_FOLDER, STOP
from slurm.profile import ClusterProfile, load_profile
from slurm.submit_chain import refuse, tell

_LOCK = ".submit.lock"
_TAIL_LINES = 20
_PATIENCE_SECONDS = 10.0
UNKNOWN_EXIT_CODE = 3
_BEGUN = ("running", "stopped", "done")


def show_chain(record: ChainRecord, as_json: bool) -> int:
    """Print how a chain stands; 1 if it is over without being done, 3 if that is not known, else 0.

    Raises:
        SlurmError: the queue cannot be read.
    """
    states = chain_states(record, patience=_PATIENCE_SECONDS)
    if as_json:
        print(json.dumps(states_as_json(record, states), indent=1))
    else:
        print("\n".join([describe_chain(record, states), *_progress_of_trainings(record, states)]))
    return {"failed": 1, "stopped": 1, "unknown": UNKNOWN_EXIT_CODE}.get(chain_verdict(states), 0)


def resume_chain(record: ChainRecord, arguments: argparse.Namespace) -> int:
    """Submit what is left of a chain: the units that are not done, and the stages behind them.

    Raises:
        UserError: a stage that failed in part is still at work, or what the checks found.
    """
    with run_lock(record.folder / _LOCK, record.folder):
        states = chain_states(record)
        _refuse_unknown(states)
        todo = units_left(record, states)
        held = [state.jobs[-1] for state in states if state.live and state.why == HELD]
        if not todo and not held:
            print(f"chain {record.chain.name}: {chain_verdict(states)}; nothing to submit")
            return 0
        submission = Submission(
            record,
            profile_of(record, arguments.profile, arguments.set),
            code_of=_newest_folder(record) if arguments.same_code else None,
            # The run's folder was accepted when the chain was submitted.
            local_run_folder=True,
            resuming=True,
            live={state.name: state.jobs[-1] for state in states if state.live},
            done=frozenset(state.name for state in states if state.state == "done"),
            held=held,
        )
        requests = submission.requests(todo)
        problems, notes = submission.problems(requests)
        refuse(problems)
        if arguments.dry_run:
            lines = [f"{stage.name}: {len(units)} of {stage.units} units" for stage, units in todo]
            print("\n".join([*lines, "nothing was submitted (--dry-run)"]))
            return 0
        numbers = submission.submit(todo, requests)
    tell(record, numbers, notes, arguments)
    return 0


def cancel_chain(record: ChainRecord) -> list[str]:
    """Cancel all of a chain that is in the queue; the numbers.

    Raises:
        SlurmError: SLURM refused, or the controller is away.
    """
    states = chain_states(record)
    _refuse_unknown(states)
    live = [state for state in states if state.live]
    trainings = [state for state in live if record.chain.stage(state.name).is_training and state.state == "running"]
    for state in trainings:
        # It saves and leaves; nothing starts it again but `resume`.
        stage = record.chain.stage(state.name)
        why = f"cancelled with chain {record.chain.name}\n"
        write_atomically(record.cwd / str(stage.run_dir) / SLURM_FOLDER / STOP, why.encode())
        scheduler.ask("scancel", "--batch", "--signal=USR1", state.jobs[-1])
    at_once = [state.jobs[-1] for state in live if state not in trainings]
    if at_once:
        scheduler.ask("scancel", *at_once)
    return [state.jobs[-1] for state in live]


def show_chain_logs(record: ChainRecord, stage: str | None, unit: int | None, lines: int = _TAIL_LINES) -> int:
    """Print the ends of logs: of one unit, of a stage, or of all that failed or are at work.

    Raises:
        UserError: no such stage, or nothing of it was begun.
    """
    names = [one.name for one in record.chain.stages]
    if stage is not None and stage not in names:
        raise UserError(f"{stage}: no stage of chain {record.chain.name}; there are {', '.join(names)}")
    wanted = _logs(record, stage, unit)
    if not wanted:
        where = stage or f"chain {record.chain.name}"
        raise UserError(f"{where}: no log yet; see megatron-video slurm status {record.folder}")
    for path in wanted:
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"==> {path}\n" + "\n".join(text[-lines:]))
    return 0


def profile_of(record: ChainRecord, source: str | None, overrides: Sequence[str]) -> ClusterProfile:
    """The profile that a chain was submitted with, or another one.

    Raises:
        UserError: it is not usable.
    """
    return load_profile(source or _newest_folder(record) / PROFILE_FILE, overrides)


def _progress_of_trainings(record: ChainRecord, states: Sequence[StageState]) -> list[str]:
    """The table of `slurm status` for the stages that are trainings and have begun."""
    # That module asks this one first whether a chain is meant.
    from slurm.run_state import Queue, job_numbers, run_state
    from slurm.status import describe

    begun = [state for state in states if record.chain.stage(state.name).is_training and state.state in _BEGUN]
    folders = [Path(newest.folder) for state in begun if (newest := record.newest(state.name)) is not None]
    if not folders:
        return []
    queue = Queue.read(job_numbers(folders), _PATIENCE_SECONDS)
    return ["", describe([run_state(folder, queue) for folder in folders])]


def _refuse_unknown(states: Sequence[StageState]) -> None:
    if any(state.state == "unknown" for state in states):
        raise UserError("SLURM does not answer, so nobody knows what is in the queue; try again when it does")


def _newest_folder(record: ChainRecord) -> Path:
    folders = [Path(job.folder) for jobs in record.jobs.values() for job in jobs]
    there = [folder for folder in folders if (folder / PROFILE_FILE).exists()]
    if not there:
        raise UserError(f"{record.folder}: the folders of its jobs are gone; submit the chain anew")
    return max(there, key=lambda folder: (folder / PROFILE_FILE).stat().st_mtime)


def _logs(record: ChainRecord, stage: str | None, unit: int | None) -> list[Path]:
    if stage is None and unit is None:
        states: list[StageState] = chain_states(record)
        return [Path(path) for state in states for path in state.logs.values() if path and Path(path).exists()]
    stages = [stage] if stage else [one.name for one in record.chain.stages if one.array]
    name = "*.log" if unit is None else f"{unit:06d}.log"
    return [path for one in stages for path in sorted((record.stage_dir(one) / "logs").glob(name))]
