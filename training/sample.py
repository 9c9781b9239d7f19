"""`megatron-video sample`, or for several ranks `torchrun ... -m training.sample`: prompts -> videos.

What is done stays: the same command continues where it was interrupted, and refuses to mix settings. A video depends
on its prompt, seed and settings only: not on the number of replicas, which share the prompts among them, nor, beyond
rounding, on the layout and the batch size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_video.cli import run_command
from training.sample_options import parse_arguments

if TYPE_CHECKING:
    from megatron_video.device import DeviceInfo
    from training.sample_job import Job


def main(argv: Sequence[str]) -> int:
    """Check everything that can be checked before anything big is loaded, then sample."""
    return run(parse_arguments(argv, "megatron-video sample", str(__doc__)))


def run(arguments: argparse.Namespace) -> int:
    """Sample as the options say, on all ranks.

    Raises:
        UserError: an argument that cannot work, or a file that cannot be read or written.
    """
    # The device comes first: it decides what the imports below may assume.
    from megatron_video.device import initialize

    device = initialize()
    from megatron_video import parallel

    parallel.start_distributed(device)
    try:
        job = _sample_on_ranks(arguments, device)
        if dist.get_rank() == 0:
            _report(job)
    except BaseException:
        # A tidy end would wait for ranks that are inside of a collective; the launcher ends them after this process.
        if dist.get_world_size() == 1:
            parallel.destroy_parallel()
        raise
    parallel.destroy_parallel()
    return 0


def _sample_on_ranks(arguments: argparse.Namespace, device: DeviceInfo) -> Job:
    from megatron_video.parallel import initialize_parallel
    from training.sample_job import prepare
    from training.sample_ranks import Crew, complete_folder
    from training.sample_work import Work

    crew = Crew()
    # One rank looks: with shared file systems ranks may see different files, and then wait for each other forever.
    job, folder = crew.by_rank_0(lambda: prepare(arguments, device))
    initialize_parallel(job.parallel, seed=0, device_info=device)
    crew.divide(job.parallel)
    sources = {name: str(getattr(arguments, name).resolve()) for name in ("checkpoint", "vae", "text")}
    complete_folder(folder, sources, Work(job, folder, crew, device.device).run, crew.job)
    return job


def _report(job: Job) -> None:
    out, total = job.arguments.out, len(job.prompts)
    decoded, made = len(job.undecoded), len(job.undecoded) + len(job.unsampled)
    if job.arguments.json:
        report = {"out": str(out), "samples": total, "made": made, "kept": total - made, "from_kept_latents": decoded}
        print(json.dumps(report))
        return
    of_latents = f" ({decoded} of these from latents that were there)" if decoded else ""
    print(f"{out}: {total} samples, {made} of them made now{of_latents}; look at contact_sheet.png")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
