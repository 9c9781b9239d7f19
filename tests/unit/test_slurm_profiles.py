"""Profiles: those that come with the package, and what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_video.errors import UserError
from slurm.job import Job, environment_script, resource_options
from slurm.profile import PROFILE_DIR, ClusterProfile, load_profile

NAMES = sorted(path.stem for path in PROFILE_DIR.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_profiles_of_the_package_are_valid(name: str) -> None:
    profile = load_profile(name)
    # Of YAML, 1 would be an integer, and yes a bool.
    assert all(isinstance(value, str) for value in profile.environment.values())


def test_the_explained_profile_names_every_field() -> None:
    values = yaml.safe_load((PROFILE_DIR / "h100_pyxis.yaml").read_text())
    assert set(values) == {field.name for field in dataclasses.fields(ClusterProfile)}
    profile = ClusterProfile()
    for group in ("slurm", "software", "launch", "restarts", "heartbeat"):
        assert set(values[group]) == {field.name for field in dataclasses.fields(getattr(profile, group))}, group


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("slurm.partitions=x", "did you mean 'partition'"),
        ("slurm.gpus_per_node=-1", "gpus_per_node=-1 must not be negative"),
        ("slurm.extra=[-x]", "write every option as one word"),
        ("software.container=pyxis", "container=pyxis needs image"),
        ("software.mounts=[data]", "/SOURCE:/TARGET"),
        ("restarts.warning_seconds=0", "warning_seconds=0 must be at least 1"),
        ("environment={A-B: x}", "'A-B' in environment"),
        ("environment.PORT=1", "environment.PORT=1"),
    ],
)
def test_refused(override: str, told: str) -> None:
    with pytest.raises(UserError, match=r"(?s).*") as refusal:
        load_profile("cpu_lab", [override])
    assert told in str(refusal.value)


def test_environment_of_a_job_survives_the_shell(tmp_path: Path) -> None:
    """Values with blanks and quotes; the snapshot stands before the profile's own PYTHONPATH."""
    profile = load_profile("cpu_lab", ['environment.ODD="it\'s $HOME"', "environment.PYTHONPATH=/own"])
    job = Job("name", "command", tmp_path / "run", tmp_path / "run" / "slurm" / "0001-name", ["version"])
    script = environment_script(job, profile) + 'printf "%s|%s" "$ODD" "$PYTHONPATH"'
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said == f"it's $HOME|{job.code}:/own"


def test_resources_of_a_job() -> None:
    profile = load_profile("h100_pyxis", ["slurm.gpu_type=h100", "slurm.exclude=[n1,n2]"])
    job = Job("name", "pretrain", Path("/run"), Path("/run/f"), [], 4, 1, 8, seconds=61, after=["afterok:3"])
    options = resource_options(job, profile)
    wanted = {"--nodes=5", "--gres=gpu:h100:8", "--time=2", "--exclude=n1,n2", "--dependency=afterok:3", "--exclusive"}
    assert wanted <= set(options)
    assert "--partition=batch" in options
    assert "--partition=cpu" in resource_options(dataclasses.replace(job, gpus_per_node=0), profile)
