"""Every refusal of tests/ckpt_refusals.py: exit code, message, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from ckpt_refusals import REFUSALS, Refusal, make_inputs, run_refusal


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.mark.parametrize("refusal", [each for group in REFUSALS.values() for each in group], ids=lambda r: r.command)
def test_bad_input_is_refused_by_name(refusal: Refusal, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)
    before = sorted(path.name for path in inputs.iterdir())
    code, message = run_refusal(refusal)
    assert refusal.says in message
    assert code == refusal.code
    assert [name for name in sorted(path.name for path in inputs.iterdir()) if name not in before] in (
        [],
        ["out.partial"],
    )
