"""`megatron-video doctor` on this machine, and on requirements that are missing, out of range or broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_video import doctor


def only(requirement: str) -> doctor.Check:
    (check,) = doctor.check_packages([requirement])
    return check


def test_this_environment_passes_and_the_report_is_json() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "megatron_video", "doctor", "--json"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
    report = json.loads(result.stdout)
    assert report["cpu_path_works"] is True
    status = {check["name"]: check["status"] for check in report["checks"]}
    assert status["torch"] == status["megatron-core"] == status["gloo self-test"] == status["codecs"] == "ok"
    assert "transformer-engine" in status


def test_out_of_range_is_a_failure_with_the_way_out() -> None:
    check = only("numpy<1")
    assert check.status == "failed"
    assert "out of range" in check.detail
    assert check.advice == 'pip install "numpy<1"'


def test_missing_is_a_failure_unless_it_belongs_to_an_extra() -> None:
    assert only("surely-not-installed>=1").status == "failed"
    check = only('deepspeed<0.1 ; extra == "vae"')
    assert check.status in ("note", "warning")
    assert check.advice


def test_developer_tools_are_not_asked_of_users() -> None:
    (check,) = doctor.check_packages(['surely-not-installed>=1 ; extra == "dev"', "numpy"])
    assert (check.name, check.status) == ("numpy", "ok")


def test_uninstalled_package_is_a_failure() -> None:
    (check,) = doctor.check_packages([])
    assert (check.name, check.status) == ("megatron-video", "failed")


def test_a_module_that_crashes_the_interpreter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing_module.py").write_text("import os\nos._exit(139)\n")
    (tmp_path / "raising_module.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    errors = doctor._import_errors(["json", "crashing_module", "raising_module"])
    assert set(errors) == {"crashing_module", "raising_module"}
    assert "died with code 139" in errors["crashing_module"]
    assert "libGL.so.1" in errors["raising_module"]


def test_table_names_what_is_failed_and_what_to_do() -> None:
    table = doctor.format_checks([doctor.Check("packages", "numpy", "failed", "missing", 'pip install "numpy"')])
    assert "FAILED numpy" in table
    assert '-> pip install "numpy"' in table


def test_every_runtime_requirement_has_a_role() -> None:
    from packaging.requirements import Requirement

    names = {r.name for r in map(Requirement, doctor.installed_requirements()) if r.marker is None}
    assert names <= set(doctor.PACKAGES)
