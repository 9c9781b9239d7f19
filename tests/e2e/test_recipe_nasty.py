"""A recipe over a folder of nasty files: the fate of each is known, and Ray and an array give the local run's bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from nasty_folder import Fate, make_nasty_folder
from tiny_pipeline import data

from megatron_video.manifest import read_manifest

STAGES = ("1-ingest", "2-segment", "3-tag", "4-filter")


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nasty")
    (folder / "recipe.yaml").write_text("stages:\n  - ingest\n  - segment\n  - tag\n  - filter: {rules: rules.yaml}\n")
    (folder / "rules.yaml").write_text("rules: [{tag: brightness, min: 20}]")
    fates = make_nasty_folder(folder / "raw")
    run(folder, folder / "local")
    check(fates, folder / "local" / "2-segment.parquet")
    return folder


def run(folder: Path, work: Path, *more: object) -> None:
    recipe = ("run", "--recipe", folder / "recipe.yaml", "--in", folder / "raw", "--work", work)
    assert data(*recipe, "--workers", 2, *more) == 0


def check(fates: dict[str, Fate], manifest: Path) -> None:
    """Every file's clips and reason are those that the table of nasty files states."""
    rows = read_manifest(manifest).to_pylist()
    for source, fate in fates.items():
        mine = [row for row in rows if row["source"] == source]
        kept = tuple((row["start_frame"], row["end_frame"]) for row in mine if not row["dropped_by"])
        if fate.clips:
            assert kept == fate.clips, source
        if fate.dropped_by:
            assert {row["dropped_by"] for row in mine} == {fate.dropped_by}, source
        else:
            assert kept, source


def same(one: Path, other: Path) -> None:
    for stage in STAGES:
        assert (one / f"{stage}.parquet").read_bytes() == (other / f"{stage}.parquet").read_bytes(), stage


@pytest.mark.heavy
def test_an_array_gives_the_same_bytes(nasty: Path, tmp_path: Path) -> None:
    for stage in STAGES[:3]:
        for index in (2, 0, 1):
            run(nasty, tmp_path, "--only", stage, "--shard", f"{index}/3")
    run(nasty, tmp_path)
    same(nasty / "local", tmp_path)


@pytest.mark.heavy
def test_ray_gives_the_same_bytes(nasty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is in the extra `data`")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        run(nasty, tmp_path, "--engine", "ray")
    finally:
        ray.shutdown()
    same(nasty / "local", tmp_path)
