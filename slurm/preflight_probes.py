"""What preflight measures on a node, run there: `python -m slurm.preflight_probes REQUEST`, one task a node.

The request is a JSON file (`HostRequest`), the answer FOLDER/NODE.json: {"figures": {name: value}, "errors": {probe:
why}}. Only the standard library is needed, so that it runs with the Python of any node. While it works it prints the
node's clock, which the batch host compares with its own as the lines arrive.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_video.files import write_atomically
from slurm import preflight_gpu
from slurm.preflight_requests import TOKEN_FILE, HostRequest, read_request

Figures = dict[str, Any]
MIB, GIB, MB = 1 << 20, 1 << 30, 1_000_000
CLOCK_MARK = "clock"
CLOCK_LINES, CLOCK_INTERVAL = 10, 0.05


def main(argv: list[str]) -> int:
    """Measure everything and write the answer; 0 also where a probe failed: the batch host judges."""
    request = read_request(HostRequest, Path(argv[0]))
    clock = threading.Thread(target=_tell_clock, daemon=True)
    clock.start()
    answer = measure(request, PROBES)
    clock.join()
    write_atomically(Path(request.folder) / f"{node_name()}.json", json.dumps(answer).encode())
    return 0


def measure(request: HostRequest, probes: Mapping[str, Callable[[HostRequest], Figures]]) -> dict[str, Figures]:
    """All probes' figures; of those that failed, why."""
    figures: Figures = {}
    errors: Figures = {}
    for name, probe in probes.items():
        try:
            figures |= probe(request)
        except Exception as error:
            # Whatever it is, it is the finding: an answer must reach the batch host.
            errors[name] = f"{type(error).__name__}: {error}"
    return {"figures": figures, "errors": errors}


def node_name() -> str:
    """The node as SLURM calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


def probe_versions(request: HostRequest) -> Figures:
    """Python that supervises, kernel."""
    return {"host_python": platform.python_version(), "kernel": platform.release()}


def probe_memory(request: HostRequest) -> Figures:
    """Memory of the host that a job could have, GiB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"free_memory_gib": kib["MemAvailable"] * 1024 / GIB}


def probe_space(request: HostRequest) -> Figures:
    """Room on the node's own disk, and in the run's folder seen from here."""
    return {
        "local_free_gib": _free_gib(Path(request.local_folder)),
        "shared_free_gib": _free_gib(Path(request.folder)),
    }


def probe_local_disk(request: HostRequest) -> Figures:
    """Speed of the node's own disk."""
    return _probe_disk("local", Path(request.local_folder), request.local_probe_mib)


def probe_shared_disk(request: HostRequest) -> Figures:
    """Speed of the run's folder, seen from here."""
    return _probe_disk("shared", Path(request.folder), request.shared_probe_mib)


def probe_visibility(request: HostRequest) -> Figures:
    """Seconds until the batch host's file was seen here, with its content."""
    path, start = Path(request.folder) / TOKEN_FILE, time.monotonic()
    while time.monotonic() - start < request.visible_seconds:
        if path.is_file() and path.read_text() == request.token:
            return {"visible_seconds": time.monotonic() - start}
        time.sleep(0.1)
    raise TimeoutError(f"{path}, written by the batch host, was not seen within {request.visible_seconds:g} s")


def probe_fabric(request: HostRequest, root: Path = Path("/sys/class/infiniband")) -> Figures:
    """Ports of InfiniBand and RoCE, by the kernel's files: DEVICE/ports/N/state holds `4: ACTIVE`."""
    states = {f"{path.parts[-4]}:{path.parts[-2]}": path.read_text().strip() for path in root.glob("*/ports/*/state")}
    down = {port: state for port, state in sorted(states.items()) if not state.endswith("ACTIVE")}
    return {"fabric_ports": len(states) - len(down), "fabric_down": down}


def _free_gib(folder: Path) -> float:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize / GIB


def _probe_disk(which: str, folder: Path, mib: int) -> Figures:
    if not mib:
        return {}
    path = folder / f".preflight-{node_name()}-{os.getpid()}"
    try:
        return {f"{which}_write": _write_speed(path, mib), f"{which}_read": _read_speed(path)}
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} at {folder} while {mib} MiB were written and read") from None
    finally:
        path.unlink(missing_ok=True)


def _write_speed(path: Path, mib: int) -> float:
    # Random, since some file systems compress.
    block, start = os.urandom(MIB), time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(mib):
            file.write(block)
        os.fsync(file.fileno())
    return mib * MIB / MB / (time.perf_counter() - start)


def _read_speed(path: Path) -> float:
    with open(path, "rb", buffering=0) as file:
        # Out of this node's memory, so that the disk is read.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start, size = time.perf_counter(), 0
        while block := file.read(MIB):
            size += len(block)
    return size / MB / (time.perf_counter() - start)


def _tell_clock() -> None:
    for _ in range(CLOCK_LINES):
        print(CLOCK_MARK, node_name(), f"{time.time():.6f}", flush=True)
        time.sleep(CLOCK_INTERVAL)


def _of_gpus(probe: Callable[[], Figures]) -> Callable[[HostRequest], Figures]:
    # Of a node without a driver there is nothing to tell but that it has no GPU.
    return lambda request: probe() if preflight_gpu.has_driver() else {}


PROBES: dict[str, Callable[[HostRequest], Figures]] = {
    "versions": probe_versions,
    "memory": probe_memory,
    "visibility": probe_visibility,
    "space": probe_space,
    "local": probe_local_disk,
    "shared": probe_shared_disk,
    "fabric": probe_fabric,
    "gpus": lambda request: preflight_gpu.probe_cards(),
    "gpu memory": _of_gpus(preflight_gpu.probe_memory),
    "gpu clocks": _of_gpus(preflight_gpu.probe_clocks),
    "gpu processes": _of_gpus(preflight_gpu.probe_processes),
    "nvlink": _of_gpus(preflight_gpu.probe_links),
    "kernel log": lambda request: preflight_gpu.probe_kernel_log(request.xids) if preflight_gpu.has_driver() else {},
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
