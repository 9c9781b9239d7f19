"""Binds a rank to the CPUs beside its GPU, so that host memory and copies stay on one socket."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_DEVICES = Path("/sys/bus/pci/devices")
_NODES = Path("/sys/devices/system/node")


def bind_to_gpu(local_rank: int, devices: Path = _DEVICES, nodes: Path = _NODES) -> list[int]:
    """Restrict this process, and what it starts, to the CPUs of the NUMA node of its GPU.

    Memory follows: Linux takes it from the node of the CPU that touches it first. Nothing changes where there is no
    GPU, the machine has one node, or the job was given no CPU there.

    Args:
        local_rank: number of the GPU among those this process sees.
        devices: sysfs folder of PCI devices.
        nodes: sysfs folder of NUMA nodes.

    Returns:
        The CPUs of this process.
    """
    allowed = os.sched_getaffinity(0)
    addresses = gpu_addresses()
    if local_rank < len(addresses):
        near = allowed & cpus_near(addresses[local_rank], devices, nodes)
        if near and near != allowed:
            os.sched_setaffinity(0, near)
            allowed = near
    return sorted(allowed)


def gpu_addresses() -> list[str]:
    """PCI addresses of the GPUs this process may use, in CUDA's order; none where there is no nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line.count(",") == 2]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [address for _, _, address in rows]
    named = {key: address for index, uuid, address in rows for key in (index, uuid)}
    return [named[name] for name in visible.split(",") if name in named]


def cpus_near(address: str, devices: Path = _DEVICES, nodes: Path = _NODES) -> set[int]:
    """CPUs of the NUMA node of a PCI device; none where that is not known."""
    # nvidia-smi writes the domain with eight digits, sysfs with four.
    domain, rest = address.lower().split(":", 1)
    try:
        node = int((devices / f"{domain[-4:]}:{rest}" / "numa_node").read_text())
        return parse_cpus((nodes / f"node{node}" / "cpulist").read_text()) if node >= 0 else set()
    except OSError:
        return set()


def parse_cpus(text: str) -> set[int]:
    """Numbers of a list as Linux writes it: 0-3,8."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return found
