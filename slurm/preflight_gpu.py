"""What nvidia-smi and the kernel's log say of a node's GPUs.

Formats: `--query-...=FIELDS --format=csv,noheader,nounits` prints a line a GPU with the fields in their order, [N/A] or
[Not Supported] where there is none (nvidia-smi(1); `nvidia-smi --help-query-gpu`, `--help-query-remapped-rows`,
`--help-query-compute-apps`); bits of the reasons for a lower clock as in NVML (nvmlClocksEventReasons); `nvlink
--status` and the kernel's Xid lines as quoted in the tests. Not run on a machine with a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

ANSWER_SECONDS = 60.0
# A driver that does not know a field refuses the whole query, so each probe asks its own.
GPU_FIELDS = ("index", "pci.bus_id", "name", "driver_version", "memory.total", "memory.used")
ECC_FIELDS = ("pci.bus_id", "ecc.errors.uncorrected.volatile.total")
ROW_FIELDS = ("gpu_bus_id", "remapped_rows.uncorrectable", "remapped_rows.pending", "remapped_rows.failure")
APP_FIELDS = ("gpu_bus_id", "pid", "process_name", "used_memory")
# The name until driver 535, and still understood; the newer one is clocks_event_reasons.active.
CLOCK_FIELDS = ("pci.bus_id", "clocks_throttle_reasons.active")
# bit -> reason; idle clocks, power caps and settings are no faults.
SLOWDOWNS = {0x08: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}
_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
_MISSING = re.compile(r"\[.*\]|N/A|")


def probe_cards() -> dict[str, Any]:
    """How many GPUs there are, of which kind, and their driver; 0 where the driver's program is missing."""
    if not has_driver():
        return {"gpus": 0}
    cards = query("gpu", GPU_FIELDS)
    drivers = sorted({card["driver_version"] for card in cards})
    return {"gpus": len(cards), "gpu_names": sorted({card["name"] for card in cards}), "driver": ", ".join(drivers)}


def probe_memory() -> dict[str, Any]:
    """Errors of the GPUs' memory, and rows that were replaced."""
    rows = query("remapped-rows", ROW_FIELDS)
    errors = {"ecc_errors": bad_memory(query("gpu", ECC_FIELDS))}
    return errors | {"remapped_rows": max_count(rows, ROW_FIELDS[1]), "row_failures": failed_rows(rows)}


def probe_clocks() -> dict[str, Any]:
    """GPUs that are slowed down."""
    return {"slowdowns": slowdowns(query("gpu", CLOCK_FIELDS))}


def probe_processes() -> dict[str, Any]:
    """What runs on the GPUs."""
    return {"leftovers": leftovers(query("compute-apps", APP_FIELDS))}


def probe_links() -> dict[str, Any]:
    """NVLinks that are up."""
    links = active_links(_run("nvidia-smi", "nvlink", "--status"))
    return {"nvlinks": min(links.values(), default=0), "nvlinks_by_gpu": links}


def probe_kernel_log(xids: Sequence[int]) -> dict[str, Any]:
    """Errors of the driver since the boot, and whether the log could be read."""
    log = _kernel_log()
    return {"xids": xid_lines(log, xids), "kernel_log_read": bool(log)}


def has_driver() -> bool:
    """Whether this node has the driver's program."""
    return shutil.which("nvidia-smi") is not None


def query(what: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """`nvidia-smi --query-WHAT=FIELDS`: a dict a line.

    Raises:
        RuntimeError: nvidia-smi failed or did not end.
    """
    text = _run("nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits")
    return parse_csv(text, fields)


def parse_csv(text: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """Lines of values separated by commas; a line with another number of them is refused.

    Raises:
        RuntimeError: naming the line.
    """
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(fields):
            raise RuntimeError(f"nvidia-smi was asked for {', '.join(fields)} and said {line!r}")
        found.append(dict(zip(fields, values, strict=True)))
    return found


def bad_memory(cards: Iterable[dict[str, str]]) -> dict[str, int]:
    """GPUs (by bus) with uncorrected errors of their memory since the driver was loaded, and how many."""
    counts = {card["pci.bus_id"]: _count(card[ECC_FIELDS[1]]) for card in cards}
    return {bus: count for bus, count in counts.items() if count}


def failed_rows(rows: Iterable[dict[str, str]]) -> dict[str, str]:
    """GPUs whose replacement of a bad row waits for a reset, or failed since no spare row is left."""
    words = {row["gpu_bus_id"]: [what for what in ROW_FIELDS[2:] if _yes(row[what])] for row in rows}
    return {bus: ", ".join(found) for bus, found in words.items() if found}


def max_count(rows: Iterable[dict[str, str]], name: str) -> int:
    """The largest of a field's values over all GPUs."""
    return max((_count(row[name]) for row in rows), default=0)


def slowdowns(cards: Iterable[dict[str, str]]) -> dict[str, str]:
    """GPUs that are slowed down by heat or power supply, and why."""
    found = {}
    for card in cards:
        value = card[CLOCK_FIELDS[1]]
        bits = 0 if _MISSING.fullmatch(value) else int(value, 16)
        found[card["pci.bus_id"]] = ", ".join(reason for bit, reason in SLOWDOWNS.items() if bits & bit)
    return {bus: reasons for bus, reasons in found.items() if reasons}


def leftovers(apps: Iterable[dict[str, str]]) -> list[str]:
    """Processes on the GPUs: `pid 4711 python (62000 MiB)`."""
    return [f"pid {app['pid']} {app['process_name']} ({app['used_memory']} MiB)" for app in apps]


def active_links(text: str) -> dict[str, int]:
    """`nvidia-smi nvlink --status`: links of each GPU that show a rate, `Link 0: 26.562 GB/s`, not <inactive>."""
    links: dict[str, int] = {}
    gpu = ""
    for line in text.splitlines():
        if heading := re.match(r"GPU (\d+):", line):
            gpu = heading[1]
            links[gpu] = 0
        elif rate := re.match(r"\s*Link \d+: ([\d.]+) GB/s", line):
            links[gpu] += float(rate[1]) > 0
    return links


def xid_lines(log: str, codes: Sequence[int]) -> list[str]:
    """`79 on 0000:18:00` for every error of these codes in the kernel's log, once each."""
    found = {f"{code} on {bus}" for bus, code in _XID.findall(log) if int(code) in codes}
    return sorted(found)


def _kernel_log() -> str:
    # Neither may be allowed to users of a cluster; then nothing is known, and the driver's own counters must do.
    for command in (("dmesg",), ("journalctl", "--dmesg", "--boot", "--quiet", "--no-pager")):
        if shutil.which(command[0]):
            result = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, errors="replace")
            if result.returncode == 0:
                return result.stdout
    return ""


def _run(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)}: no answer within {ANSWER_SECONDS:g} s") from None
    if result.returncode:
        said = (result.stdout + result.stderr).strip()
        raise RuntimeError(f"{' '.join(command)}: {said} (exit code {result.returncode})")
    return result.stdout


def _count(value: str) -> int:
    return 0 if _MISSING.fullmatch(value) else int(value)


def _yes(value: str) -> bool:
    return value.lower() in ("yes", "1")
