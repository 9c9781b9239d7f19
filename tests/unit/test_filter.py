"""Filter: subsets, reasons, counts and plots against a plain row-by-row reading of the rules."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path
from typing import Any

import filter_bench
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from data_prep import cli, filter_report
from data_prep import filter as filter_stage
from data_prep.filter_report import Histograms
from data_prep.filter_rules import load_rules, steps_of
from data_prep.manifest_stream import iter_manifest
from data_prep.model_tags import load_models_config, model_fingerprints
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.manifest import (
    SCHEMA,
    VERSION_1_COLUMNS,
    Row,
    kept_rows,
    read_manifest,
    table_from_rows,
    write_manifest,
)

RULES: dict[str, Any] = {
    "rules": [{"tag": "blur", "min": 20}, {"tag": "motion_mean", "min": 5, "max": 95, "media": "videos"}],
    "subsets": [
        {"name": "wide", "rules": [{"tag": "aesthetic", "min": 20}, {"tag": "clip_seconds", "min": 2}]},
        {"name": "narrow", "rules": [{"tag": "aesthetic", "min": 50}, {"tag": "source", "exclude": "[05].mp4$"}]},
        {"name": "best", "rules": [{"tag": "nsfw", "max": 0.4}, {"tag": "watermark", "max": 0.5, "missing": "keep"}]},
    ],
}


def random_rows(count: int, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        row: Row = {
            "clip_id": f"clip-{number}",
            "source": f"/raw/{number}.mp4",
            "is_image": bool(rng.random() < 0.2),
            "blur": float(np.float32(rng.uniform(0, 100))),
            "aesthetic": float(np.float32(rng.uniform(0, 100))),
            "nsfw": float(np.float32(rng.uniform(0, 1))),
            "watermark": None if rng.random() < 0.3 else float(np.float32(rng.uniform(0, 1))),
            "start_time": 1.5,
            "end_time": 1.5 + float(rng.integers(1, 8)),
        }
        row["motion_mean"] = None if row["is_image"] else float(np.float32(rng.uniform(0, 100)))
        if rng.random() < 0.1:
            row |= {"dropped_by": "ingest", "drop_reason": "copy: of another", "blur": None, "aesthetic": None}
        rows.append(row)
    return rows


def written(path: Path, rows: list[Row]) -> Path:
    write_manifest(table_from_rows(rows), path)
    return path


def rules_file(path: Path, rules: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(rules))
    return path


def failing(row: Row, rule: dict[str, Any]) -> bool:
    """The rule's meaning in plain words of Python, apart from the stage's columns."""
    if rule.get("media") == "videos" and row["is_image"]:
        return False
    if rule["tag"] == "source":
        return row["source"].endswith(("0.mp4", "5.mp4"))
    value = row["end_time"] - row["start_time"] if rule["tag"] == "clip_seconds" else row[rule["tag"]]
    return value is not None and not rule.get("min", -np.inf) <= value <= rule.get("max", np.inf)


def expected(row: Row, cut: int) -> tuple[str | None, str | None, str | None, str | None]:
    """dropped_by, tag of the drop reason, subset, tag of the subset reason."""
    if row.get("dropped_by"):
        return "ingest", "copy", None, None
    levels = [(0, None, RULES["rules"])] + [(n, s["name"], s["rules"]) for n, s in enumerate(RULES["subsets"], 1)]
    inside = None
    for level, name, rules in levels:
        tag = next((rule["tag"] for rule in rules if failing(row, rule)), None)
        if tag:
            dropped = level <= cut
            return "filter" if dropped else None, tag if dropped else None, inside, tag if level else None
        inside = name
    return None, None, inside, None


def found_in(row: Row) -> tuple[str | None, str | None, str | None, str | None]:
    reasons = [row[name].split(":")[0] if row[name] else None for name in ("drop_reason", "subset_reason")]
    return row["dropped_by"], reasons[0], row["subset"], reasons[1]


@pytest.mark.parametrize(("subset", "cut"), [(None, 1), ("wide", 1), ("narrow", 2), ("best", 3)])
def test_subsets_and_reasons_equal_a_row_by_row_reading(tmp_path: Path, subset: str | None, cut: int) -> None:
    rows = random_rows(1500)
    source = written(tmp_path / "in.parquet", rows)
    report = filter_stage.run(source, tmp_path / "out.parquet", rules_file(tmp_path / "r.yaml", RULES), subset)
    result = read_manifest(tmp_path / "out.parquet").to_pylist()
    assert [found_in(row) for row in result] == [expected(row, cut) for row in rows]
    by = [row["dropped_by"] for row in result]
    assert (report.kept, report.dropped_here, report.dropped_before) == (
        by.count(None),
        by.count("filter"),
        by.count("ingest"),
    )
    assert report.rows_in == 1500
    assert min(by.count(None), by.count("filter"), by.count("ingest")) > 30
    untouched = [name for name in SCHEMA.names if name not in ("dropped_by", "drop_reason", "subset", "subset_reason")]
    assert pa.Table.from_pylist(result, SCHEMA).select(untouched).equals(read_manifest(source).select(untouched))


def test_each_rule_counts_what_it_finds_and_what_it_was_first_to_remove(tmp_path: Path) -> None:
    rows = random_rows(800, seed=1)
    source = written(tmp_path / "in.parquet", rows)
    report = filter_stage.run(source, tmp_path / "out.parquet", rules_file(tmp_path / "r.yaml", RULES))
    alive = [row for row in rows if not row.get("dropped_by")]
    everybody, left = list(alive), len(alive)
    rules = RULES["rules"] + [rule for subset in RULES["subsets"] for rule in subset["rules"]]
    for rule, line in zip(rules, report.details["removed"], strict=True):
        assert line["fails"] == sum(failing(row, rule) for row in everybody)
        assert line["removed"] == sum(failing(row, rule) for row in alive)
        alive = [row for row in alive if not failing(row, rule)]
        left -= line["removed"]
        assert line["left"] == left == len(alive)


def test_reasons_say_value_bounds_and_subset(tmp_path: Path) -> None:
    rows = [{"source": "a.mp4", "is_image": False, "blur": 30.0, "aesthetic": 31.25, "start_time": 0, "end_time": 4}]
    rows[0] |= {"motion_mean": 9.0, "nsfw": 0.1}
    filter_stage.run(
        written(tmp_path / "in.parquet", rows), tmp_path / "o.parquet", rules_file(tmp_path / "r.yaml", RULES)
    )
    (row,) = kept_rows(read_manifest(tmp_path / "o.parquet"))
    assert (row["subset"], row["subset_reason"]) == ("wide", "aesthetic: 31.25 is outside [50..] (subset narrow)")


def test_a_subset_without_rules_holds_what_the_one_before_it_does(tmp_path: Path) -> None:
    rows: list[Row] = [{"source": f"{blur}.mp4", "is_image": False, "blur": float(blur)} for blur in (1, 5, 9)]
    levels = [("all", []), ("sharp", [{"tag": "blur", "min": 4}]), ("same", []), ("best", [{"tag": "blur", "min": 8}])]
    rules = {"subsets": [{"name": name, "rules": tests} for name, tests in levels]}
    source = written(tmp_path / "in.parquet", rows)
    for subset, kept in (("all", 3), ("sharp", 2), ("same", 2), ("best", 1)):
        report = filter_stage.run(source, tmp_path / "o.parquet", rules_file(tmp_path / "r.yaml", rules), subset)
        assert report.kept == kept
        found = [row["subset"] for row in read_manifest(tmp_path / "o.parquet").to_pylist()]
        assert found == ["all", "same", "best"]


def test_a_second_filter_leaves_the_first_ones_verdicts_on_dropped_clips(tmp_path: Path) -> None:
    source = written(tmp_path / "in.parquet", random_rows(400))
    rules = rules_file(tmp_path / "r.yaml", RULES)
    filter_stage.run(source, tmp_path / "1.parquet", rules, "narrow")
    later = rules_file(tmp_path / "later.yaml", {"subsets": [{"name": "x", "rules": [{"tag": "blur", "min": 60}]}]})
    filter_stage.run(tmp_path / "1.parquet", tmp_path / "2.parquet", later)
    first, second = (read_manifest(tmp_path / f"{n}.parquet").to_pylist() for n in (1, 2))
    for before, after in zip(first, second, strict=True):
        if before["dropped_by"]:
            assert after == before
        else:
            assert after["subset"] == ("x" if before["blur"] >= 60 else None)
    assert {row["subset"] for row in first if row["dropped_by"]} == {None, "wide"}


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    source = written(tmp_path / "in.parquet", random_rows(20))
    (tmp_path / ".out.parquet.12345.tmp").write_bytes(b"half a manifest")
    filter_stage.run(source, tmp_path / "out.parquet", rules_file(tmp_path / "r.yaml", RULES))
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_missing_value_is_an_error_or_what_the_rule_says(tmp_path: Path, value: float | None) -> None:
    rows: list[Row] = [{"source": "a.mp4", "is_image": False, "nsfw": value}, {"source": "b.mp4", "nsfw": 0.2}]
    source = written(tmp_path / "in.parquet", rows)
    outcomes = {}
    for missing in ("keep", "drop"):
        rules = rules_file(tmp_path / "r.yaml", {"rules": [{"tag": "nsfw", "max": 0.5, "missing": missing}]})
        outcomes[missing] = filter_stage.run(source, tmp_path / f"{missing}.parquet", rules).kept
    assert outcomes == {"keep": 2, "drop": 1}
    reasons = [row["drop_reason"] for row in read_manifest(tmp_path / "drop.parquet").to_pylist()]
    assert reasons == ["nsfw: no value is outside [..0.5]", None]
    rules = rules_file(tmp_path / "r.yaml", {"rules": [{"tag": "nsfw", "max": 0.5}]})
    with pytest.raises(UserError, match=r"clips without nsfw, such as a\.mp4.*--models"):
        filter_stage.run(source, tmp_path / "error.parquet", rules)
    assert not [path for path in tmp_path.iterdir() if "error" in path.name and "lock" not in path.name]


def test_text_that_a_file_does_not_say_matches_nothing(tmp_path: Path) -> None:
    transfers = [None, "bt709", "smpte2084"]
    source = written(tmp_path / "in.parquet", [{"source": f"{name}.mp4", "color_transfer": name} for name in transfers])
    rule = {"tag": "color_transfer", "exclude": "smpte2084|arib"}
    filter_stage.run(source, tmp_path / "out.parquet", rules_file(tmp_path / "r.yaml", {"rules": [rule]}))
    assert read_manifest(tmp_path / "out.parquet")["dropped_by"].to_pylist() == [None, None, "filter"]


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        ({}, "neither rules nor subsets"),
        ({"subsets": [{"name": "a", "rules": []}, {"name": "a", "rules": []}]}, "names of their own"),
        ({"rules": [{"tag": "blurr", "min": 1}]}, "'blurr' is none .* did you mean 'blur'"),
        ({"rules": [{"tag": "blur", "min": float("nan")}]}, "must be numbers"),
        ({"subsets": [{"name": "a", "rule": []}]}, "unknown field 'subsets.0.rule'; did you mean 'rules'"),
        ({"rules": [{"tag": "source", "min": 1}]}, "takes `exclude`"),
        ({"rules": [{"tag": "blur", "exclude": "x"}]}, "columns of text"),
        ({"rules": [{"tag": "source", "exclude": "("}]}, "no regular expression"),
        ({"rules": [{"tag": "blur", "min": 1, "missing": "maybe"}]}, "missing"),
    ],
)
def test_rules_that_contradict_themselves(tmp_path: Path, rules: dict[str, Any], complaint: str) -> None:
    source = written(tmp_path / "in.parquet", random_rows(5))
    with pytest.raises(UserError, match=complaint):
        filter_stage.run(source, tmp_path / "out.parquet", rules_file(tmp_path / "r.yaml", rules))
    assert not (tmp_path / "out.parquet").exists()


def test_an_unknown_subset_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "in.parquet", random_rows(5))
    rules = rules_file(tmp_path / "r.yaml", RULES)
    command = ["filter", "--in", source, "--out", tmp_path / "o.parquet", "--rules", rules, "--subset", "finest"]
    assert run_command(cli.main, list(map(str, command))) == 2
    assert "'finest': no such subset in the rules; there are: wide, narrow, best" in capsys.readouterr().err


def test_pieces_of_any_size_make_the_same_table(tmp_path: Path) -> None:
    source = written(tmp_path / "in.parquet", random_rows(100))
    for rows in (1, 7, 1000):
        assert pa.concat_tables(iter_manifest(source, rows=rows)).equals(read_manifest(source))
    narrow = pa.concat_tables(iter_manifest(source, ["blur", "source"], rows=30))
    assert narrow.equals(read_manifest(source).select(["blur", "source"]))


def test_reading_holds_a_few_pieces_and_not_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "in.parquet"
    piece = table_from_rows({"caption": rng.bytes(2000).hex()} for _ in range(1000))
    with pq.ParquetWriter(source, SCHEMA) as writer:
        for _ in range(16):
            writer.write_table(piece)
    held = []
    start = pa.total_allocated_bytes()
    for table in iter_manifest(source, rows=500):
        held.append(pa.total_allocated_bytes() - start)
        assert table.num_rows == 500
    # Two pieces of 2 MB and a row group of 4 MB being decoded; the whole is 64 MB.
    assert len(held) == 32
    assert max(held) < 24e6
    assert max(held[24:]) < 1.5 * max(held[:8])


@pytest.mark.parametrize(("count", "group"), [(0, 1), (1, 1), (300, 7), (300, 299), (300, 1000)])
def test_row_groups_of_any_size_are_filtered_alike(tmp_path: Path, count: int, group: int) -> None:
    rules = rules_file(tmp_path / "r.yaml", RULES)
    table = table_from_rows(random_rows(count))
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=group)
    report = filter_stage.run(tmp_path / "in.parquet", tmp_path / "out.parquet", rules)
    found = read_manifest(tmp_path / "out.parquet")
    assert (report.rows_in, report.kept) == (count, found["dropped_by"].null_count)
    rows = found.to_pylist()
    assert [found_in(row) for row in rows] == [expected(row, 1) for row in table.to_pylist()]
    filled = {"dropped_by", "drop_reason", "subset", "subset_reason"}
    kept_as_they_were = [name for name in SCHEMA.names if name not in filled]
    assert found.select(kept_as_they_were).equals(table.select(kept_as_they_were))


def test_a_manifest_of_version_1_is_filtered(tmp_path: Path) -> None:
    table = table_from_rows(random_rows(20)).select([name for name, *_ in VERSION_1_COLUMNS])
    pq.write_table(table.replace_schema_metadata({"megatron_video.manifest_version": "1"}), tmp_path / "in.parquet")
    rules = rules_file(tmp_path / "r.yaml", {"rules": [{"tag": "blur", "min": 50}]})
    report = filter_stage.run(tmp_path / "in.parquet", tmp_path / "out.parquet", rules)
    assert 0 < report.kept < 20
    assert read_manifest(tmp_path / "out.parquet").num_rows == 20


def test_a_dry_run_reports_the_same_and_writes_nothing(tmp_path: Path) -> None:
    source = written(tmp_path / "in.parquet", random_rows(300))
    rules = rules_file(tmp_path / "r.yaml", RULES)
    before = set(tmp_path.iterdir())
    tried = filter_stage.run(source, tmp_path / "out.parquet", rules, dry_run=True)
    assert set(tmp_path.iterdir()) == before
    done = filter_stage.run(source, tmp_path / "out.parquet", rules)
    again = filter_stage.run(source, tmp_path / "out.parquet", rules)
    assert (tried.details, tried.kept, tried.reasons, tried.examples) == (
        done.details,
        done.kept,
        done.reasons,
        done.examples,
    )
    assert (again.up_to_date, again.details, again.kept) == (True, done.details, done.kept)


def test_the_report_has_a_table_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = random_rows(600)
    source = written(tmp_path / "in.parquet", rows)
    rules = rules_file(tmp_path / "r.yaml", RULES)
    out, folder = tmp_path / "out.parquet", tmp_path / "report"
    command = ["filter", "--in", source, "--out", out, "--rules", rules, "--report", folder]
    assert run_command(cli.main, list(map(str, command))) == 0
    printed = capsys.readouterr().out
    with (folder / filter_report.TABLE_FILE).open() as file:
        lines = list(csv.DictReader(file))
    assert [line["subset"] for line in lines] == ["", "", "wide", "wide", "narrow", "narrow", "best", "best"]
    assert int(lines[-1]["left"]) == sum(row["subset"] == "best" for row in read_manifest(out).to_pylist())
    assert all(f"{line['rule']}" in printed and f"{int(line['removed']):,}" in printed for line in lines)
    for name in (filter_report.HISTOGRAMS_FILE, filter_report.FUNNEL_FILE):
        picture = np.asarray(Image.open(folder / name).convert("RGB"))
        # Bars, axes and text: more than one colour, in many places.
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_histograms_count_every_clip_once(tmp_path: Path) -> None:
    rows = random_rows(500)
    rows[0] |= {"blur": 1e9, "dropped_by": None}
    source = written(tmp_path / "in.parquet", rows)
    steps = steps_of(load_rules(rules_file(tmp_path / "r.yaml", RULES)))
    histograms = Histograms.of(source, steps)
    for table in iter_manifest(source, rows=50):
        histograms.add(table)
    kept = [row for row in rows if not row.get("dropped_by")]
    assert histograms.counts["blur"].sum() == len(kept)
    assert histograms.counts["motion_mean"].sum() == sum(not row["is_image"] for row in kept)
    # The outlier is in the last bar and does not stretch the axis; the thresholds are inside it.
    assert histograms.edges["blur"][0] < 20 < histograms.edges["blur"][-1] < 1e7


def test_the_papers_rules_have_six_subsets_each_stricter(tmp_path: Path) -> None:
    path = filter_stage.DEFAULT_RULES.with_name("filter_paper.yaml")
    config = load_rules(path)
    assert [subset.name[:5] for subset in config.subsets] == [f"step{n}" for n in range(1, 7)]
    rng = np.random.default_rng(3)
    tags = sorted({step.rule.tag for step in steps_of(config)} - {"source", "clip_seconds"})
    integers = {"short_side": (32, 1100), "cluster_count": (1, 100)}
    scales = {"aesthetic": 10, "motion_mean": 25, "motion_max": 50, "blur": 300, "saturation_mean": 255}
    rows: list[Row] = []
    for number in range(4000):
        row: Row = {"source": f"{number}.mp4", "is_image": False, "start_time": 0.0, "end_time": rng.uniform(1, 20)}
        row |= {tag: float(rng.uniform(0, scales.get(tag, 1))) for tag in tags if tag not in integers}
        row |= {tag: int(rng.integers(*bounds)) for tag, bounds in integers.items()} | {"border_share": 0.0}
        rows.append(row)
    report = filter_stage.run(written(tmp_path / "in.parquet", rows), tmp_path / "out.parquet", path)
    left = {line["subset"]: line["left"] for line in report.details["removed"]}
    sizes = list(left.values())
    assert all(wide > narrow for wide, narrow in pairwise(sizes))
    assert report.kept == left["step1_duration_alignment"]


def test_the_benchmarks_ways_make_the_same_table(tmp_path: Path) -> None:
    source, rules = tmp_path / "source.parquet", rules_file(tmp_path / "rules.yaml", filter_bench.RULES)
    filter_bench.write_source(source, 3000)
    kept = {filter_bench.run_ours(source, tmp_path / "a.parquet", rules)}
    kept |= {filter_bench.run_whole_table(source, tmp_path / "b.parquet", rules)}
    kept |= {filter_bench.run_dry(source, tmp_path / "c.parquet", rules)}
    assert read_manifest(tmp_path / "a.parquet").equals(read_manifest(tmp_path / "b.parquet"))
    assert len(kept) == 1
    assert 1000 < kept.pop() < 3000


def test_the_template_of_model_tags_is_valid_and_skips_all() -> None:
    config = load_models_config(filter_stage.DEFAULT_RULES.with_name("tag_models.yaml"))
    assert model_fingerprints(config) == {}
