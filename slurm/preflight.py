"""Checks of the nodes before a job starts on them: who is bad, and why.

    check_nodes(job, profile, nodes, attempt)     called by the batch process of a job, and by `slurm preflight`

All nodes are asked at once, one task a node, with a limit in time: one that does not answer is bad too. What every node
measured is kept in ATTEMPT/preflight/report.json and in the nodes' scores.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_video.files import write_atomically
from slurm.job import Job
from slurm.preflight_checks import BadNode, judge, limits, odd_ones_out, old_drivers, sorted_by_node
from slurm.preflight_probes import Request, write_request
from slurm.preflight_steps import Steps, clock_offsets, read_answers
from slurm.profile import ClusterProfile
from slurm.scheduler import SlurmError, ask, compress
from slurm.scheduler import nodes as node_records

FOLDER, REPORT = "preflight", "report.json"
# States in which SLURM itself knows that nothing runs on a node.
_GONE = ("DOWN", "NOT_RESPONDING", "POWERED_DOWN", "POWERING_DOWN", "FAIL")

Answers = dict[str, dict[str, Any]]


def check_nodes(job: Job, profile: ClusterProfile, nodes: Sequence[str], attempt: Path) -> list[BadNode]:
    """Check `nodes` of the allocation around this process; the bad ones, one finding each, in the order of `nodes`.

    Bad nodes are drained where the profile says so; leaving them out is the caller's.

    Raises:
        OSError: the attempt's folder cannot be written to.
    """
    if not profile.preflight.enabled or not nodes:
        return []
    start, folder = time.time(), attempt / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{len(nodes)} nodes are checked: {compress(nodes)}")
    answers, bad = ask_nodes(Steps(job, profile, folder), nodes)
    bad = sorted_by_node(bad, nodes)
    report = {"time": start, "seconds": time.time() - start, "nodes": answers, "bad": [asdict(b) for b in bad]}
    write_atomically(folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    for finding in bad:
        say(f"{finding.name} is bad: {finding.check}: {finding.reason}")
    if profile.preflight.action == "drain":
        drain(bad)
    say(f"{len(nodes) - len(bad)} of {len(nodes)} nodes are good, after {time.time() - start:.1f} s")
    return bad


def ask_nodes(steps: Steps, nodes: Sequence[str]) -> tuple[Answers, list[BadNode]]:
    """What each node measured about itself, and what speaks against some."""
    preflight = steps.profile.preflight
    bad = gone(nodes)
    alive = [name for name in nodes if name not in {finding.name for finding in bad}]
    wanted = limits(preflight, steps.job.gpus_per_node)
    path = steps.folder / "request.json"
    write_request(_request(steps), path)
    outcome = steps.run(alive, steps.host_command("slurm.preflight_probes", str(path)), preflight.seconds)
    answers = read_answers(steps.folder, alive)
    for name, offset in clock_offsets(outcome.lines).items():
        if name in answers:
            answers[name]["figures"] |= {"clock_offset": offset, "skew_seconds": abs(offset)}
    bad += [BadNode(name, "answer", outcome.why_silent(name)) for name in alive if name not in answers]
    for name, answer in answers.items():
        bad += judge(name, answer, wanted)
    bad += old_drivers(answers, preflight.min_driver)
    if preflight.same_versions:
        bad += odd_ones_out(answers)
    return answers, bad


def gone(nodes: Sequence[str]) -> list[BadNode]:
    """Nodes of which SLURM knows that they do not answer."""
    try:
        records = node_records(compress(nodes))
    except SlurmError as error:
        say(f"states of the nodes are unknown: {error}")
        return []
    reason = "SLURM has it as {}{}"
    return [
        BadNode(node.name, "state", reason.format(node.state, f": {node.reason}" if node.reason else ""))
        for node in records
        if node.state.endswith("*") or any(word in node.state.split("+") for word in _GONE)
    ]


def drain(bad: Sequence[BadNode]) -> None:
    """Take nodes out of service for everyone; where that is not allowed, say so: the run avoids them in any case."""
    for finding in bad:
        reason = f"preflight {finding.check}: {finding.reason}"
        try:
            ask("scontrol", "update", f"nodename={finding.name}", "state=drain", f"reason={reason[:250]}")
            say(f"{finding.name} is drained")
        except SlurmError as error:
            say(f"{finding.name} could not be drained: {error}")


def say(text: str) -> None:
    """A line in the job's log."""
    print(f"preflight: {text}", file=sys.stderr, flush=True)


def _request(steps: Steps) -> Request:
    preflight = steps.profile.preflight
    return Request(
        folder=str(steps.folder),
        token=secrets.token_hex(16),
        local_folder=preflight.local_folder,
        local_probe_mib=preflight.local_probe_mib,
        shared_probe_mib=preflight.shared_probe_mib,
        visible_seconds=preflight.max_visible_seconds or 0.0,
        xids=preflight.xids or [],
    )


def figures_of(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Numbers that a node measured, for its scores."""
    return {
        name: {key: value for key, value in answer["figures"].items() if isinstance(value, int | float)}
        for name, answer in answers.items()
    }
