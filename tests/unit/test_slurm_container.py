"""The recipe of the container: every version is pinned once, in the ranges of setup.py, and its scripts are sound."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "slurm" / "container"
sys.path.insert(0, str(RECIPE))

import check_versions  # noqa: E402

# Of NVIDIA's base image, and its own torch is why.
FROM_BASE = {"torch", "apex"}
WANTED_EXTRAS = check_versions.EXTRAS


def requirements_of_the_image() -> list[Requirement]:
    """What setup.py asks of an image with those extras."""
    lines = importlib.metadata.requires("megatron-video") or []
    wanted = [Requirement(line) for line in lines]
    return [
        r for r in wanted if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in WANTED_EXTRAS)
    ]


def test_every_pin_lies_in_the_range_of_setup_py() -> None:
    pins = {
        canonicalize_name(name): version
        for name, version in check_versions.read_pins(RECIPE / "requirements.txt").items()
    }
    wanted = {canonicalize_name(r.name): r for r in requirements_of_the_image()}
    assert set(pins) == set(wanted) - FROM_BASE
    for name, version in pins.items():
        assert wanted[name].specifier.contains(version), (
            f"{name}=={version}: setup.py asks for {wanted[name].specifier}"
        )


def test_the_base_is_one_image_and_its_torch_is_in_range() -> None:
    docker = re.search(r"^ARG BASE=(\S+)$", (RECIPE / "Dockerfile").read_text(), re.MULTILINE)
    apptainer = re.search(r"^From: (\S+)$", (RECIPE / "megatron-video.def").read_text(), re.MULTILINE)
    assert docker is not None
    assert apptainer is not None
    assert docker[1] == apptainer[1] == "nvcr.io/nvidia/pytorch:25.12-py3"
    (torch,) = [r for r in requirements_of_the_image() if r.name == "torch"]
    # docs.nvidia.com/deeplearning/frameworks/pytorch-release-notes/rel-25-12.html
    assert torch.specifier.contains("2.10.0a0+b4e4ee81d3", prereleases=True)


def test_what_the_build_copies_is_there() -> None:
    kept = [line[1:] for line in (RECIPE / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    (listed,) = re.findall(r"^%files\n((?: +.*\n)+)", (RECIPE / "megatron-video.def").read_text(), re.MULTILINE)
    files = [line.split()[0] for line in listed.splitlines()]
    assert kept
    assert files
    for name in (*kept, *files):
        assert (ROOT / name).exists(), name


def test_differences_are_named() -> None:
    pins = {"packaging": importlib.metadata.version("packaging"), "numpy": "0.1", "no-such-package": "1"}
    found = list(check_versions.differences(pins, ["packaging<1", "no-such-other; extra == 'dev'"]))
    assert [line.split(":")[0] for line in found] == ["numpy", "no-such-package", "packaging"]


def test_pins_must_be_exact(tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text("numpy>=2  # why\n")
    with pytest.raises(ValueError, match="pins no exact version"):
        check_versions.read_pins(path)


@pytest.mark.parametrize("name", ["build.sh", "check.sh", "install.sh"])
def test_without_arguments_the_scripts_tell_their_use(name: str) -> None:
    result = subprocess.run([RECIPE / name], capture_output=True, text=True)
    assert result.returncode == 2
    assert name in result.stderr


def test_shell_scripts_are_sound() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [*ROOT.glob("slurm/*.sh"), *ROOT.glob("slurm/*.sbatch"), *ROOT.glob("slurm/container/*.sh")]
    lab = [*ROOT.glob("tests/slurm/*.sh"), *ROOT.glob("tests/slurm/lab/*.sh"), ROOT / "tests/slurm/lab/bin/nvidia-smi"]
    result = subprocess.run(["shellcheck", *scripts, *lab], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
