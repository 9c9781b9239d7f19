"""The table of preflight's checks, and the verdict on what the nodes measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slurm.profile import Preflight

Figures = Mapping[str, Any]
Sense = Literal[">=", "<=", "none"]
_WORDS = {">=": "at least", "<=": "at most"}


@dataclass(frozen=True)
class BadNode:
    """A node that a job must not use."""

    name: str
    check: str
    """Of CHECKS, or `answer` where the node said nothing."""
    reason: str
    """What was measured, what is asked, where to set it."""
    sure: bool = True
    """False: it may be another one; left out of the run, but not drained."""


@dataclass(frozen=True)
class Check:
    """One figure of a node against one field of the profile."""

    name: str
    figure: str
    """Name in the node's answer."""
    what: str
    """What is measured, for people."""
    unit: str
    field: str
    """Of the profile's `preflight`; null or false there leaves the check out."""
    sense: Sense
    """What is asked of the figure; `none`: it lists faults, and must be empty."""
    probe: str
    """Which probe measures it: its error is the finding where it failed."""


CHECKS = (
    Check("memory", "free_memory_gib", "free memory of the host", "GiB", "min_free_memory_gib", ">=", "memory"),
    Check("local space", "local_free_gib", "free on the local disk", "GiB", "min_local_free_gib", ">=", "space"),
    Check("local write", "local_write", "writing to the local disk", "MB/s", "min_local_write", ">=", "local"),
    Check("local read", "local_read", "reading from the local disk", "MB/s", "min_local_read", ">=", "local"),
    Check("shared space", "shared_free_gib", "free in the run folder", "GiB", "min_shared_free_gib", ">=", "space"),
    Check("shared write", "shared_write", "writing the run folder", "MB/s", "min_shared_write", ">=", "shared"),
    Check("shared read", "shared_read", "reading the run folder", "MB/s", "min_shared_read", ">=", "shared"),
    Check("shared view", "visible_seconds", "a shared file seen after", "s", "max_visible_seconds", "<=", "visibility"),
    Check("clock", "skew_seconds", "clock against the batch host's", "s", "max_skew_seconds", "<=", "clock"),
    Check("fabric", "fabric_ports", "InfiniBand and RoCE ports that are up", "", "fabric_ports", ">=", "fabric"),
    Check("gpus", "gpus", "GPUs that nvidia-smi shows", "", "gpus", ">=", "gpus"),
    Check("ecc", "ecc_errors", "uncorrected memory errors", "", "ecc", "none", "gpu memory"),
    Check("row remapping", "row_failures", "memory rows not yet replaced", "", "ecc", "none", "gpu memory"),
    Check("remapped rows", "remapped_rows", "replaced rows of a GPU", "", "max_remapped_rows", "<=", "gpu memory"),
    Check("xid", "xids", "errors in the kernel's log", "", "xids", "none", "kernel log"),
    Check("throttling", "slowdowns", "GPUs slowed down", "", "throttling", "none", "gpu clocks"),
    Check("nvlink", "nvlinks", "links up on the GPU that has fewest", "", "nvlinks", ">=", "nvlink"),
    Check("leftovers", "leftovers", "processes on the GPUs", "", "leftovers", "none", "gpu processes"),
    Check("gemm", "gemm_tflops", "products on the slowest device", "TFLOP/s", "min_gemm_tflops", ">=", "burn"),
    Check("gemm results", "gemm_errors", "wrong matrix products", "", "max_gemm_errors", "<=", "burn"),
)  # fmt: skip
# Figures that must be the same everywhere.
SAME = ("driver", "kernel", "host_python", "gpu_names", "python", "packages")
_NO_GPU_CHECKS = ("ecc", "row remapping", "remapped rows", "xid", "throttling", "nvlink", "leftovers", "gpus")


def limits(preflight: Preflight, gpus: int, *, burn: bool = False, shared: bool = False) -> dict[str, Any]:
    """Name -> limit of every check that is on: those of the host, or those of the burn.

    A job that takes no GPUs is not asked about them; on nodes that it shares, other jobs may run on the GPUs.
    """
    found: dict[str, Any] = {}
    for check in CHECKS:
        if (check.probe == "burn") != burn:
            continue
        value = getattr(preflight, check.field)
        if value is None or value is False or (check.name in _NO_GPU_CHECKS and not gpus):
            continue
        if shared and check.name == "leftovers":
            continue
        found[check.name] = gpus if check.name == "gpus" else value
    return found


def judge(name: str, answer: Figures, wanted: Mapping[str, Any]) -> list[BadNode]:
    """What speaks against one node: its answer {"figures": ..., "errors": ...} against `wanted` of `limits`."""
    figures, errors = answer["figures"], answer["errors"]
    found = []
    for check in CHECKS:
        if check.name not in wanted:
            continue
        if check.figure not in figures:
            why = errors.get(check.probe, "the node did not tell it")
            found.append(BadNode(name, check.name, f"{check.what}: not measured: {why} (preflight.{check.field})"))
        elif not _passes(check.sense, figures[check.figure], wanted[check.name]):
            found.append(BadNode(name, check.name, _reason(check, figures[check.figure], wanted[check.name])))
    return found


def old_drivers(answers: Mapping[str, Figures], oldest: str | None) -> list[BadNode]:
    """Nodes whose driver is older than the profile's min_driver."""
    if oldest is None:
        return []
    drivers = {name: answer["figures"].get("driver", "") for name, answer in answers.items()}
    reason = "driver {}, at least {} is asked (preflight.min_driver)"
    return [
        BadNode(name, "driver", reason.format(driver, oldest))
        for name, driver in drivers.items()
        if driver and _version(driver) < _version(oldest)
    ]


def odd_ones_out(answers: Mapping[str, Figures]) -> list[BadNode]:
    """Nodes that differ from most in what must be the same: driver, kernel, versions, results of products."""
    found = []
    for figure in SAME:
        values = {
            name: str(answer["figures"][figure]) for name, answer in answers.items() if figure in answer["figures"]
        }
        if len(set(values.values())) > 1:
            found += _differing(figure, values)
    return found


def _differing(figure: str, values: Mapping[str, str]) -> list[BadNode]:
    (usual, count), *_ = Counter(values.values()).most_common()
    reason = (
        f"{figure.replace('_', ' ')} {{}}, but {count} of {len(values)} nodes have {usual} (preflight.same_versions)"
    )
    return [BadNode(name, figure, reason.format(value)) for name, value in values.items() if value != usual]


def _passes(sense: Sense, value: Any, limit: Any) -> bool:
    if sense == "none":
        return not value
    return bool(value >= limit if sense == ">=" else value <= limit)


def _reason(check: Check, value: Any, limit: Any) -> str:
    unit = f" {check.unit}" if check.unit else ""
    if check.sense == "none":
        listed = (
            ", ".join(f"{key}: {text}" for key, text in value.items()) if isinstance(value, dict) else ", ".join(value)
        )
        return f"{check.what}: {listed} (preflight.{check.field})"
    return f"{check.what}: {value:.4g}{unit}, {_WORDS[check.sense]} {limit:g}{unit} is asked (preflight.{check.field})"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(", ")[0].split(".") if part.isdigit())


def sorted_by_node(bad: Sequence[BadNode], nodes: Sequence[str]) -> list[BadNode]:
    """One finding a node, the first, in the order of the nodes."""
    first: dict[str, BadNode] = {}
    for finding in bad:
        first.setdefault(finding.name, finding)
    return [first[name] for name in nodes if name in first]
