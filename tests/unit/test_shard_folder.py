"""Whose a folder of shards is: what it takes over, what it refuses, and what it says of the difference."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.shard_folder import claimed
from data_prep.stage import fingerprint_of
from data_prep.workers import Shard
from megatron_video.errors import UserError

MADE_WITH = {"samples_per_shard": 6, "buckets": (1, 48, 48), "vae": "v", "input": "manifest"}


def _claim(folder: Path, share: Shard | None = None, **changes: object) -> None:
    with claimed(folder, "encode", {**MADE_WITH, **changes}, share):
        pass


def test_a_folder_with_shards_of_other_settings_is_refused_by_name_and_value(tmp_path: Path) -> None:
    _claim(tmp_path / "out")
    (tmp_path / "out" / "shard-000000.tar").touch()
    _claim(tmp_path / "out")
    with pytest.raises(UserError, match=r"out holds shards .*\(samples_per_shard: 6 there, 7 now\); name a new folder"):
        _claim(tmp_path / "out", samples_per_shard=7)
    with (
        pytest.raises(UserError, match="holds shards made by `data encode`"),
        claimed(tmp_path / "out", "split", MADE_WITH),
    ):
        pass


def test_a_folder_without_a_shard_is_taken_over(tmp_path: Path) -> None:
    """A wrong option must not spoil the folder for the right one; but not under the feet of another task."""
    _claim(tmp_path / "out", samples_per_shard=7)
    (tmp_path / "out" / "null_text.safetensors").touch()
    (tmp_path / "out" / "parts" / "encoders.json").touch()
    with pytest.raises(UserError, match="samples_per_shard: 7 there, 6 now"):
        _claim(tmp_path / "out", Shard.parse("0/2"))
    _claim(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["parts", "plan"]


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(UserError, match=r"holds clip.mp4, not written by this command; name a new folder"):
        _claim(tmp_path)
    with pytest.raises(UserError, match=r"--out .*clip.mp4 cannot be made a folder: there is a file of that name"):
        _claim(tmp_path / "clip.mp4")


def test_a_folder_that_was_begun_before_plans_had_names_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    settings = {name: value for name, value in MADE_WITH.items() if name != "input"}
    (tmp_path / "parts" / "plan").write_text(fingerprint_of("encode", settings, "manifest"))
    (tmp_path / "shard-000000.tar").touch()
    _claim(tmp_path)
    with pytest.raises(UserError, match="holds shards of another input, other encoders or other settings; name"):
        _claim(tmp_path, vae="w")
