"""`megatron-video slurm preflight`: the checks of nodes that every job makes before its start, by hand.

Takes the nodes for itself in an allocation of its own (salloc), or those of the allocation it is called in. Exit code 0
where all are good, 1 where one is bad.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_video.errors import UserError
from slurm import scheduler
from slurm.bad_nodes import forgive_node, read_bad_nodes
from slurm.job import SLURM_FOLDER, Job, load_job, newest_folder, resource_options
from slurm.preflight import FOLDER, REPORT, check_nodes
from slurm.profile import ClusterProfile
from slurm.snapshot import source_root
from slurm.submission import PROFILE_VARIABLE, read_profile

NAME = "preflight"
# Waiting for busy nodes would look like a hang.
WAIT_SECONDS = 60
# Where a job's folder begins a file of its own, in the allocation's part of this command.
_INSIDE = "MV_PREFLIGHT_FOLDER"


def main(argv: Sequence[str]) -> int:
    """Check nodes and tell what was found."""
    arguments = _parse(argv)
    if inside := os.environ.get(_INSIDE):
        job, profile = load_job(Path(inside))
        check_nodes(job, profile, job.options["nodes"], job.folder)
        return 0
    profile, run_dir = _profile_and_run(arguments)
    nodes = _nodes(arguments, run_dir)
    _refuse_unusable(nodes)
    folder = _folder(arguments, run_dir)
    job = _job(profile, nodes, run_dir or folder, folder)
    _check_in_allocation(job, profile)
    return _tell(arguments, job, run_dir)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video slurm preflight", description=__doc__)
    parser.add_argument(
        "--nodes", help="host list, such as node[3,7-9] (default with --run: those that the run avoids)"
    )
    parser.add_argument("--run", type=Path, help="folder of a run: its profile, its scores, its list of bad nodes")
    parser.add_argument(
        "--profile",
        default=os.environ.get(PROFILE_VARIABLE),
        help=f"cluster profile: a YAML file or a name in slurm/profiles (default: the run's, or ${PROFILE_VARIABLE})",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="GROUP.FIELD=VALUE",
        help="override a field of the profile, e.g. preflight.gemm_seconds=60",
    )
    parser.add_argument(
        "--folder", type=Path, help="where results go, seen by all nodes (default: RUN/slurm/preflight, ./preflight)"
    )
    parser.add_argument("--forgive", action="store_true", help="take good nodes off the run's list of bad ones")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(argv)


def _profile_and_run(arguments: argparse.Namespace) -> tuple[ClusterProfile, Path | None]:
    run_dir = arguments.run.absolute() if arguments.run else None
    if arguments.forgive and run_dir is None:
        raise UserError("--forgive needs --run: the list of bad nodes is a run's")
    if run_dir is not None and arguments.profile is None:
        arguments.profile = str(newest_folder(run_dir) / "profile.yaml")
    return read_profile(arguments), run_dir


def _nodes(arguments: argparse.Namespace, run_dir: Path | None) -> list[str]:
    if arguments.nodes:
        return scheduler.expand(arguments.nodes)
    if run_dir is None:
        raise UserError("--nodes is missing: name the nodes to check, such as --nodes 'node[1-4]', or a run by --run")
    bad = sorted(read_bad_nodes(run_dir / SLURM_FOLDER))
    if not bad:
        raise UserError(f"{run_dir} avoids no node at present; name the nodes to check with --nodes")
    return bad


def _refuse_unusable(nodes: Sequence[str]) -> None:
    """SLURM allocates no node that is drained or down.

    Raises:
        UserError: naming them, and why they are.
    """
    records = scheduler.nodes(scheduler.compress(nodes))
    unusable = [node for node in records if "DRAIN" in node.state or "DOWN" in node.state]
    if unusable and "SLURM_JOB_ID" not in os.environ:
        told = ", ".join(f"{node.name} ({node.state}: {node.reason or 'no reason given'})" for node in unusable)
        names = ",".join(node.name for node in unusable)
        way = (
            f"leave them out, or `scontrol update nodename={names} state=resume` and check them before others use them"
        )
        raise UserError(f"--nodes: SLURM allocates no node that is drained or down: {told}; {way}")


def _folder(arguments: argparse.Namespace, run_dir: Path | None) -> Path:
    base = arguments.folder or (run_dir / SLURM_FOLDER / NAME if run_dir else Path(NAME))
    folder: Path = base.absolute() / time.strftime("%Y%m%d-%H%M%S")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--folder {folder}: {error.strerror}; name a folder that you may write to") from None
    return folder


def _job(profile: ClusterProfile, nodes: Sequence[str], run_dir: Path, folder: Path) -> Job:
    job = Job(
        name=NAME,
        kind="command",
        run_dir=run_dir,
        folder=folder,
        command=[],
        nodes=len(nodes),
        gpus_per_node=profile.slurm.gpus_per_node,
        options={"nodes": list(nodes)},
    )
    job.code.symlink_to(source_root())
    job.save(profile)
    return job


def _check_in_allocation(job: Job, profile: ClusterProfile) -> None:
    inside = [sys.executable, "-m", "slurm.preflight_command"]
    listed = scheduler.compress(job.options["nodes"])
    if "SLURM_JOB_ID" not in os.environ:
        options = [*resource_options(job, profile), f"--nodelist={listed}", f"--immediate={WAIT_SECONDS}", "--quiet"]
        inside = ["salloc", *options, *inside]
    variables = {_INSIDE: str(job.folder), "PYTHONPATH": str(source_root()), **profile.environment}
    said = _run_shown(inside, {**os.environ, **variables})
    if not (job.folder / FOLDER / REPORT).is_file():
        shutil.rmtree(job.folder)
        busy = f"nodes that jobs use are not free within {WAIT_SECONDS} s"
        raise UserError(f"nodes {listed} could not be checked: {said}; {busy} (squeue -w {listed})")


def _run_shown(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run a command whose complaints are shown as they come; the last of them."""
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
    assert process.stderr is not None
    last = "no word"
    try:
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
    except BaseException:
        # Interrupted: the allocation must not outlive this command.
        process.terminate()
        raise
    finally:
        process.wait()
    return last


def _tell(arguments: argparse.Namespace, job: Job, run_dir: Path | None) -> int:
    path = job.folder / FOLDER / REPORT
    report = json.loads(path.read_text(encoding="utf-8"))
    bad = {finding["name"] for finding in report["bad"]}
    if arguments.forgive and run_dir is not None:
        forgiven = [name for name in job.options["nodes"] if name not in bad and forgive_node(job.slurm_dir, name)]
        report["forgiven"] = forgiven
        print(f"off the run's list: {', '.join(forgiven) or 'none'}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"report: {path}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
