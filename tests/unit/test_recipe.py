"""A recipe is checked before it runs, runs any stage of the table, and tells in one report what happened."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
from tiny_pipeline import data, make_raw

from data_prep.cli import STAGES
from data_prep.recipe import Run, plan
from data_prep.stage import checked_parser
from megatron_video.errors import UserError
from megatron_video.manifest import read_manifest
from megatron_video.run_lock import run_lock

ROOT = Path(__file__).parents[2]
RECIPE = """
stages:
  - ingest:
  - segment: {min_frames: 8, no_fades: true}
  - tag:
  - filter: {rules: rules.yaml}
  - caption: {kinds: [title], on_missing: keep}
  - filter: {rules: rules.yaml}
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_raw(tmp_path_factory.mktemp("raw") / "in")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "rules.yaml").write_text("rules: [{tag: brightness, min: 124}]")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def run(recipe: Path, raw: Path, work: Path, *more: object) -> int:
    return data("run", "--recipe", recipe, "--in", raw, "--work", work, "--workers", 1, *more)


def test_a_recipe_runs_its_stages_in_order_and_reports(
    recipe: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    assert run(recipe, raw, work, "--json") == 0
    runs = json.loads(capsys.readouterr().out)
    names = ["1-ingest", "2-segment", "3-tag", "4-filter", "5-caption", "6-filter"]
    assert [one["name"] for one in runs] == names
    assert sorted(path.stem for path in work.glob("*.parquet")) == names
    # Each stage gets what the one before it made: the copy and the broken file are dropped once and stay dropped.
    first, second = runs[0]["report"], runs[1]["report"]
    assert (first["rows_in"], first["kept"], first["reasons"]) == (7, 5, {"copy": 1, "unreadable": 1})
    assert (second["rows_in"], second["dropped_before"]) == (7, 2)
    assert read_manifest(work / "2-segment.parquet")["start_frame"].to_pylist()[0] == 3
    text = (work / "report.md").read_text()
    table = [line for line in text.splitlines() if re.match(r"\| \d-", line)]
    assert [line.split("|")[1].strip() for line in table] == names
    assert [cell.strip() for cell in table[0].split("|")[2:6]] == ["7", "5", "2", "0"]
    assert "copy 1, unreadable 1" in table[0]
    assert json.loads((work / "report.json").read_text())["stages"][0]["report"] == first
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (work / link).is_file(), link
    assert any(link.endswith(".png") for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text))


def test_a_second_run_does_nothing_and_keeps_what_the_first_took(
    recipe: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    assert run(recipe, raw, work, "--until", "tag") == 0
    took = json.loads((work / "report.json").read_text())["stages"][2]["report"]["seconds"]
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("*.parquet")}
    capsys.readouterr()
    assert len(before) == 3
    assert run(recipe, raw, work, "--json") == 0
    runs = json.loads(capsys.readouterr().out)
    assert {name: (work / name).stat().st_mtime_ns for name in before} == before
    assert [one["report"]["up_to_date"] for one in runs[:4]] == [True, True, True, False]
    assert runs[2]["seconds_earlier"] == took
    assert f"{took:.1f} (earlier)" in (work / "report.md").read_text()


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        ("- ingset:", "stage 1 (ingset): no such stage, did you mean 'ingest'?; stages: ingest, segment"),
        ("- run:", "no such stage"),
        (
            "- ingest:\n- segment: {min_frame: 8}",
            "stage 2 (segment): unknown option 'min_frame', did you mean 'min_frames'?",
        ),
        ("- ingest:\n- segment: {min_frames: many}", "stage 2 (segment): argument --min-frames: invalid int"),
        ("- ingest:\n- segment: {min_frames: {a: 1}}", "must be a number, a text or a list"),
        ("- ingest: {uncaptioned: 3}", "uncaptioned=3 must be true or false"),
        ("- ingest: {out: elsewhere.parquet}", "unknown option 'out'"),
        ("- {ingest: {}, tag: {}}", "entry 1 is the name of a stage, or one name with its options"),
        ("- ingest:\n- segment: [min_frames]", "entry 2 is the name of a stage, or one name with its options"),
        # What the stages themselves would find, hours later.
        ("- ingest:\n- segment: {max_seconds: -1}", "stage 2 (segment): --max-seconds -1.0 must be above"),
        ("- ingest:\n- filter: {rules: gone.yaml}", "stage 2 (filter): .*gone.yaml: no such file"),
        ("- ingest:\n- tag: {models: gone.yaml}", "stage 2 (tag): .*gone.yaml: no such file"),
        ("- ingest: {workers: 0}", "stage 1 (ingest): --workers 0 must be at least 1"),
        ("- ingest: {shard: 2/2}", "stage 1 (ingest): --shard 2/2"),
        ("- ingest:\n- encode: {buckets: 1x32x32}", "stage 2 (encode): the following arguments are required: --vae"),
        ("[]", "at least one is needed"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(
    tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str], stages: str, complaint: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages:\n" + "\n".join(f"  {line}" for line in stages.splitlines()))
    assert run(recipe, raw, tmp_path / "work") == 2
    pattern = re.escape(complaint).replace(r"\.\*", ".*")
    assert re.search(pattern, capsys.readouterr().err)
    assert not (tmp_path / "work").exists()


def test_source_and_work_stand_in_the_recipe_or_on_the_command_line(recipe: Path, raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="source"):
        plan(recipe, Run(work=tmp_path))
    with pytest.raises(UserError, match="work"):
        plan(recipe, Run(source=raw))
    recipe.write_text(f"source: clips\nwork: made\n{RECIPE}")
    work, steps = plan(recipe, Run())
    assert (work, steps[0].source) == (tmp_path / "made", tmp_path / "clips")
    assert f"--rules={tmp_path / 'rules.yaml'}" in steps[3].argv
    assert plan(recipe, Run(source=raw))[1][0].source == raw


def test_one_stage_alone_and_its_shards(recipe: Path, raw: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert run(recipe, raw, work, "--until", "segment") == 0
    for index in (0, 1):
        assert not (work / "3-tag.parquet").exists()
        assert run(recipe, raw, work, "--only", "tag", "--shard", f"{index}/2") == 0
    assert run(recipe, raw, tmp_path / "plain", "--until", "tag") == 0
    assert (work / "3-tag.parquet").read_bytes() == (tmp_path / "plain" / "3-tag.parquet").read_bytes()


def test_options_that_contradict_each_other_are_refused(
    recipe: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, complaint in (
        (["--shard", "0/2"], "--shard needs --only"),
        (["--only", "filter"], "--only filter fits 2 of the recipe's stages"),
        (["--until", "encode"], "--until encode fits 0"),
        (["--only", "tag", "--until", "tag"], "exclude each other"),
        (["--only", "4-filter", "--shard", "0/2"], "--shard 0/2: 4-filter has no shards"),
        (["--min-frames", "3"], "stand in the recipe"),
        (["--rules", "rules.yaml"], "stand in the recipe"),
    ):
        assert run(recipe, raw, tmp_path / "work", *more) == 2
        assert complaint in capsys.readouterr().err
    assert data("run", "--in", raw, "--work", tmp_path / "work", "--only", "tag") == 2
    assert data("run", "--in", raw) == 2
    assert "--work" in capsys.readouterr().err


def test_two_runs_on_one_work_folder(
    recipe: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    with run_lock(work / ".run.lock", work):
        assert run(recipe, raw, work) == 2
    assert re.search(r"another run is writing there \(process \d+ on", capsys.readouterr().err)
    assert not list(work.iterdir())


def test_every_stage_of_the_table_can_be_in_a_recipe(tmp_path: Path) -> None:
    for stage in sorted(STAGES.keys() - {"make-demo-clips", "blend", "run"}):
        parser = checked_parser(importlib.import_module(STAGES[stage][0]).main, None)
        assert {"--in", "--json"} <= {name for action in parser._actions for name in action.option_strings}, stage


def test_what_only_looks_is_passed_over(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages: [encode: {vae: v, text: t, buckets: 1x32x32}, inspect, verify]")
    _, (encode, inspect, verify) = plan(recipe, Run(source=tmp_path / "m.parquet", work=tmp_path))
    assert inspect.source == verify.source == encode.out


@pytest.mark.parametrize("recipe_file", sorted((ROOT / "data_prep").glob("recipe_*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_right(recipe_file: Path, tmp_path: Path) -> None:
    # As its head says: copied, with weights of one's own, here none.
    shutil.copytree(recipe_file.parent, tmp_path / "mine", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (tmp_path / "mine" / "models").mkdir()
    shutil.copy(recipe_file.with_name("tag_models.yaml"), tmp_path / "mine" / "models" / "tags.yaml")
    _, steps = plan(tmp_path / "mine" / recipe_file.name, Run(source=tmp_path, work=tmp_path / "work"))
    assert steps[0].stage == "ingest"
