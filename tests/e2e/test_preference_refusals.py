"""What the steps of Video-DPO refuse, as real commands: docs/alignment/refusals.md is made of the same table."""

from __future__ import annotations

from pathlib import Path

import pytest
from preference_refusals import REFUSALS, Refusal, make_inputs, megatron_video, own_copy, told


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals") / "inputs"
    folder.mkdir()
    make_inputs(folder)
    return folder


@pytest.mark.heavy
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.what.replace(" ", "_"))
def test_it_is_refused_in_these_words(refusal: Refusal, inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "user"
    own_copy(inputs, folder)
    if refusal.before is not None:
        refusal.before(folder)
    result = megatron_video(folder, *refusal.words, prefix=refusal.prefix)
    said = told(refusal, result.stdout, result.stderr)
    assert result.returncode == refusal.code, result.stderr
    assert [words for words in refusal.told if words not in said] == []
    assert "Traceback" not in result.stderr
    # Nothing was trained: no step is told, in a run that is new or in one that is not continued.
    if refusal.code:
        assert "step 1/" not in result.stdout
