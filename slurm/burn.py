"""What preflight measures with torch, run by the Python of the tasks, in their container if there is one:

    python -m slurm.burn REQUEST

One task a node: rate and results of matrix products on all its devices. Only this module and slurm.allreduce import
torch, and neither is imported by the others. Its CPU side is run by the tests; the GPU side was not run.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_video.files import write_atomically
from slurm.preflight_probes import node_name
from slurm.preflight_requests import BurnRequest, read_request

PACKAGES = ("torch", "megatron-core", "transformer-engine", "nvidia-dali-cuda130", "numpy", "megatron-video")
# Products between two looks at the clock and the results.
BATCH = {"cuda": 20, "cpu": 2}


def main(argv: Sequence[str]) -> int:
    """Measure, and write FOLDER/NODE.json as the probes do."""
    request = read_request(BurnRequest, Path(argv[0]))
    answer: dict[str, dict[str, Any]] = {"figures": {**versions()}, "errors": {}}
    try:
        answer["figures"] |= burn(request)
    except Exception as error:
        answer["errors"]["burn"] = f"{type(error).__name__}: {error}"
    write_atomically(Path(request.folder) / f"{node_name()}.json", json.dumps(answer).encode())
    return 0


def versions() -> dict[str, str]:
    """Python and packages of the tasks."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found.append(f"CUDA {torch.version.cuda}")
    return {"python": platform.python_version(), "packages": ", ".join(found)}


def burn(request: BurnRequest) -> dict[str, Any]:
    """Rate of the slowest device and wrong elements of all of them, while all work at once."""
    devices = [torch.device("cuda", index) for index in range(request.gpus)] or [torch.device("cpu")]
    found: dict[str, tuple[float, int]] = {}
    failed: list[BaseException] = []

    def work(device: torch.device) -> None:
        try:
            found[str(device)] = burn_device(device, request.size, request.seconds)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(device,)) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return {
        "gemm_tflops": min(rate for rate, _ in found.values()),
        "gemm_tflops_by_device": {device: rate for device, (rate, _) in found.items()},
        "gemm_errors": sum(errors for _, errors in found.values()),
    }


def burn_device(device: torch.device, size: int, seconds: float) -> tuple[float, int]:
    """Rate in TFLOP/s of products [size, size] x [size, size] over `seconds`, and how many elements were wrong.

    The operands are normal numbers, whose bits keep the units busy. A device gives the same bits for the same product,
    so every batch's last result must equal the first; and products of small integers must be exact, before and after.
    """
    generator = torch.Generator(device).manual_seed(1)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    first = a @ b
    errors = exact_errors(device, size, dtype)
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while not spent or time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        for _ in range(BATCH[device.type]):
            product = a @ b
        _wait(device)
        spent.append(time.perf_counter() - start)
        errors += int((product != first).sum())
    errors += exact_errors(device, size, dtype)
    # The later half: caches and clocks have settled by then. Its sum, so that pauses count.
    settled = spent[len(spent) // 2 :]
    return 2 * size**3 * BATCH[device.type] * len(settled) / sum(settled) / 1e12, errors


def exact_errors(device: torch.device, size: int, dtype: torch.dtype) -> int:
    """Rows of a product of integers that are not exact: 0 on any sound device, whatever order it sums in.

    Factors of -1, 0 and 1, mostly 0, give sums far below 256, which bfloat16 holds exactly. The product C = A B is
    compared through random integer vectors x, C x against A (B x) in float64, where all of these are exact too
    (Freivalds' check): a wrong row is seen with a probability of 0.999.
    """
    generator = torch.Generator(device).manual_seed(2)
    draws = (torch.randint(0, 8, (size, size), device=device, generator=generator) for _ in range(2))
    a, b = ((draw == 1).to(dtype) - (draw == 0).to(dtype) for draw in draws)
    x = torch.randint(1, 1000, (size, 1), device=device, generator=generator).double()
    product = (a @ b).double()
    return int((product @ x != a.double() @ (b.double() @ x)).sum())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
