"""Checks of the nodes before a job starts on them: who is bad, and why.

    check_nodes(job, profile, nodes, attempt)     called by the batch process of a job, and by `slurm preflight`

Three stages, each on those that are left: what a node says of itself, matrix products on its devices, an all-reduce
over all. All nodes are asked at once, with a limit in time: one that does not answer is bad too. What was measured is
kept in ATTEMPT/preflight/report.json and in the nodes' scores.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_video.files import write_atomically
from slurm import node_scores, preflight_network
from slurm.job import Job
from slurm.preflight_checks import BadNode, judge, limits, odd_ones_out, old_drivers, sorted_by_node
from slurm.preflight_requests import BurnRequest, HostRequest, write_request
from slurm.preflight_steps import Outcome, Steps, clock_offsets, read_answers
from slurm.profile import ClusterProfile, Preflight
from slurm.scheduler import SlurmError, ask, compress
from slurm.scheduler import nodes as node_records

FOLDER, REPORT = "preflight", "report.json"
GEMM_SIZE_GPU, GEMM_SIZE_CPU = 8192, 1024
# States in which SLURM itself knows that nothing runs on a node.
_GONE = ("DOWN", "POWERED_DOWN", "POWERING_DOWN", "FAIL")
# Times that the all-reduce is measured again without those that it showed to be bad.
_NETWORK_ROUNDS = 3


@dataclass
class Findings:
    """What is known so far."""

    nodes: list[str]
    """All that are checked."""
    bad: list[BadNode] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each node measured."""
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[str]:
        """Nodes against which nothing speaks."""
        named = {finding.name for finding in self.bad}
        return [name for name in self.nodes if name not in named]


def check_nodes(job: Job, profile: ClusterProfile, nodes: Sequence[str], attempt: Path) -> list[BadNode]:
    """Check `nodes` of the allocation around this process; the bad ones, one finding each, in the order of `nodes`.

    Bad nodes are drained where the profile says so; leaving them out is the caller's.

    Raises:
        OSError: the attempt's folder cannot be written to.
    """
    if not profile.preflight.enabled or not nodes:
        return []
    start, steps = time.time(), Steps(job, profile, attempt).within(FOLDER)
    say(f"checking {compress(nodes)}")
    findings = Findings(list(nodes))
    for stage in (ask_hosts, burn_devices, measure_network):
        stage(steps, findings)
    bad = sorted_by_node(findings.bad, nodes)
    _keep(steps, findings, bad, start)
    for note in findings.notes:
        say(note)
    for finding in bad:
        say(f"{finding.name} is bad: {finding.check}: {finding.reason}")
    if profile.preflight.action == "drain":
        drain(bad)
    say(f"good: {len(nodes) - len(bad)} of {len(nodes)}, after {time.time() - start:.1f} s")
    return bad


def ask_hosts(steps: Steps, findings: Findings) -> None:
    """What each node measures of itself."""
    findings.bad += gone(findings.nodes)
    here = steps.within("hosts")
    path = write_request(_host_request(here))
    nodes = findings.left
    outcome = here.run(nodes, here.host_command("slurm.preflight_probes", str(path)), steps.profile.preflight.seconds)
    answers = _collect(here, nodes, outcome, findings, "preflight.seconds")
    for name, offset in clock_offsets(outcome.lines).items():
        if name in answers:
            answers[name]["figures"] |= {"clock_offset": offset, "skew_seconds": abs(offset)}
    _judge(here, answers, findings, burn=False)
    findings.bad += old_drivers(answers, steps.profile.preflight.min_driver)


def burn_devices(steps: Steps, findings: Findings) -> None:
    """Matrix products on all devices of the nodes that are left."""
    preflight, nodes = steps.profile.preflight, findings.left
    if not nodes or (preflight.min_gemm_tflops is None and preflight.max_gemm_errors is None):
        return
    here = steps.within("burn")
    gpus = steps.job.gpus_per_node
    size = preflight.gemm_size or (GEMM_SIZE_GPU if gpus else GEMM_SIZE_CPU)
    path = write_request(BurnRequest(str(here.folder), gpus, preflight.gemm_seconds, size))
    outcome = here.run(nodes, here.task_command("slurm.burn", str(path)), preflight.burn_seconds)
    _judge(here, _collect(here, nodes, outcome, findings, "preflight.burn_seconds"), findings, burn=True)


def measure_network(steps: Steps, findings: Findings) -> None:
    """The all-reduce over the nodes that are left, until those that are then left reach the floor."""
    floor = steps.profile.preflight.min_allreduce_gb_s
    if floor is None:
        return
    network = preflight_network.Network(steps.within("allreduce"))
    for _ in range(_NETWORK_ROUNDS):
        nodes = findings.left
        if network.ranks(nodes) < 2:
            return
        verdict = preflight_network.find_slow_nodes(nodes, network.measure, floor)
        findings.bad += verdict.bad
        for name in nodes:
            findings.figures[name]["allreduce_gb_s"] = verdict.gb_s
        say(f"all-reduce over {network.ranks(nodes)} ranks: bus bandwidth {verdict.gb_s:.4g} GB/s (floor {floor:g})")
        if not verdict.bad:
            findings.notes += verdict.notes
            return


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
        if any(word.rstrip("*") in _GONE for word in node.state.split("+"))
    ]


def drain(bad: Sequence[BadNode]) -> None:
    """Take nodes out of service for everyone; where that is not allowed, say so: the run avoids them in any case."""
    for finding in (finding for finding in bad if finding.sure):
        reason = f"preflight {finding.check}: {finding.reason}"
        try:
            ask("scontrol", "update", f"nodename={finding.name}", "state=drain", f"reason={reason[:250]}")
            say(f"{finding.name} is drained")
        except SlurmError as error:
            say(f"{finding.name} could not be drained: {error}")


def say(text: str) -> None:
    """A line in the job's log."""
    print(f"preflight: {text}", file=sys.stderr, flush=True)


def _collect(
    steps: Steps, nodes: Iterable[str], outcome: Outcome, findings: Findings, limit: str
) -> dict[str, dict[str, Any]]:
    """Answers of `nodes`; those without one are bad."""
    nodes = list(nodes)
    answers = read_answers(steps.folder, nodes)
    silent = [name for name in nodes if name not in answers]
    findings.bad += [BadNode(name, "answer", outcome.why_silent(name, limit)) for name in silent]
    return answers


def _judge(steps: Steps, answers: dict[str, dict[str, Any]], findings: Findings, *, burn: bool) -> None:
    preflight = steps.profile.preflight
    gpus = steps.job.gpus_per_node
    wanted = limits(preflight, gpus, burn=burn, shared=gpus < steps.profile.slurm.gpus_per_node)
    for name, answer in answers.items():
        findings.figures.setdefault(name, {}).update(answer["figures"])
        findings.bad += judge(name, answer, wanted)
    if preflight.same_versions:
        findings.bad += odd_ones_out(answers)


def _keep(steps: Steps, findings: Findings, bad: Sequence[BadNode], start: float) -> None:
    report = {
        "time": start,
        "seconds": time.time() - start,
        "nodes": findings.figures,
        "bad": [asdict(finding) for finding in bad],
        "notes": findings.notes,
    }
    write_atomically(steps.folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    node_scores.append(steps.job, steps.profile, findings.figures, bad)


def _host_request(steps: Steps) -> HostRequest:
    preflight = steps.profile.preflight
    return HostRequest(
        folder=str(steps.folder),
        token=secrets.token_hex(16),
        local_folder=preflight.local_folder,
        local_probe_mib=preflight.local_probe_mib if _speed_is_asked(preflight, "local") else 0,
        shared_probe_mib=preflight.shared_probe_mib if _speed_is_asked(preflight, "shared") else 0,
        visible_seconds=preflight.max_visible_seconds or 0.0,
        xids=preflight.xids or [],
    )


def _speed_is_asked(preflight: Preflight, disk: str) -> bool:
    return any(getattr(preflight, f"min_{disk}_{way}") is not None for way in ("write", "read"))
