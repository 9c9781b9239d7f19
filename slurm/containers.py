"""How a task of srun enters the container of a profile: options of srun for pyxis, words before the command else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from slurm.profile import ClusterProfile


def container_words(profile: ClusterProfile, folders: Iterable[Path], cwd: Path, *, gpus: bool) -> list[str]:
    """Words between srun's own options and the command; none without a container.

    Args:
        folders: what the container sees besides the profile's mounts, under the same names.
        cwd: where the command starts, inside one of them.
        gpus: whether it needs the driver's libraries.
    """
    software = profile.software
    own = [f"{folder}:{folder}" for folder in dict.fromkeys(map(str, folders))]
    mounts = [*own, *software.mounts]
    if software.container == "pyxis":
        names = [f"--container-env={','.join(profile.pass_environment)}"] if profile.pass_environment else []
        image = [f"--container-image={software.image}", f"--container-mounts={','.join(mounts)}"]
        return [*image, f"--container-workdir={cwd}", "--no-container-mount-home", *names]
    if software.container == "apptainer":
        binds = [word for mount in mounts for word in ("--bind", mount)]
        return ["apptainer", "exec", *(["--nv"] if gpus else []), *binds, "--pwd", str(cwd), str(software.image)]
    return []


def with_setup(profile: ClusterProfile, command: Sequence[str]) -> list[str]:
    """A command after the profile's lines of setup."""
    if not profile.software.setup:
        return list(command)
    return ["bash", "-c", "\n".join(["set -e", *profile.software.setup, 'exec "$@"']), "task", *command]
