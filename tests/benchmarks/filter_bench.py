"""Filtering a manifest of ten million clips: `data filter` against the whole table in memory, and against DuckDB.

    python tests/benchmarks/filter_bench.py [--rows 10000000] [--folder FOLDER]

The manifest is synthetic: every column has values of its kind, captions of 14 words. All ways apply the same rules and
write all rows; a dry run reads the columns of the rules only. Each runs in a process of its own, for its peak memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import report
import yaml

from data_prep import filter as filter_stage
from data_prep.filter_rules import load_rules, steps_of
from data_prep.filter_verdicts import Tally, judge
from megatron_video.manifest import COLUMNS, SCHEMA, read_manifest, write_manifest

RESULTS = report.RESULTS / "filter.json"
PIECE = 250_000
WORDS = [*"a red car drives along the coast while two people walk slowly towards".split(), "camera"]  # noqa: SIM905
RULES = {
    "rules": [{"tag": "blur", "min": 5}, {"tag": "motion_mean", "min": 3}],
    "subsets": [
        {"name": "wide", "rules": [{"tag": "aesthetic", "min": 10}, {"tag": "watermark", "max": 90}]},
        {"name": "narrow", "rules": [{"tag": "aesthetic", "min": 30}, {"tag": "ocr_area", "max": 60}]},
    ],
}
LATER = ("caption", "balance", "encode", "filter", "any")
_SQL = """
copy (select * exclude (r, level) replace (
    case when level <= 1 then 'filter' else dropped_by end as dropped_by,
    case when level <= 1 then r else drop_reason end as drop_reason,
    case when level is null then 'narrow' when level = 2 then 'wide' end as subset,
    case when level >= 1 then r end as subset_reason
) from (select *,
    case when blur < 5 or motion_mean < 3 then 0
         when aesthetic < 10 or watermark > 90 then 1
         when aesthetic < 30 or ocr_area > 60 then 2 end as level,
    case when blur < 5 then 'blur: ' || round(blur, 4)
         when motion_mean < 3 then 'motion_mean: ' || round(motion_mean, 4)
         when aesthetic < 10 then 'aesthetic: ' || round(aesthetic, 4)
         when watermark > 90 then 'watermark: ' || round(watermark, 4)
         when aesthetic < 30 then 'aesthetic: ' || round(aesthetic, 4)
         when ocr_area > 60 then 'ocr_area: ' || round(ocr_area, 4) end as r
    from '{source}')) to '{out}' (format parquet, compression zstd)
"""


def piece_of(rng: np.random.Generator, start: int, count: int) -> pa.Table:
    """Rows `start` on of the synthetic manifest."""
    digits = rng.bytes(16 * count).hex()
    hashes = pa.array([digits[32 * n : 32 * n + 24] for n in range(count)])
    numbers = pa.array(np.arange(start, start + count)).cast(pa.string())
    words = [pa.array(WORDS).take(pa.array(rng.integers(0, len(WORDS), count))) for _ in WORDS]
    columns: dict[str, Any] = {
        "content_hash": hashes,
        "clip_id": pc.binary_join_element_wise(hashes, "000003", "000140", "-"),
        "source": pc.binary_join_element_wise("/data/raw/videos/part-00123/", numbers, ".mp4", ""),
        "caption": pc.binary_join_element_wise(*words, " "),
        "phash": pc.utf8_slice_codeunits(hashes, 0, 16),
    }
    stages = {name: stage for name, _, stage, _ in COLUMNS}
    for name in SCHEMA.names:
        if name not in columns:
            columns[name] = _values(rng, SCHEMA.field(name).type, count, stages[name] in LATER)
    return pa.table(columns).select(SCHEMA.names).cast(SCHEMA)


def _values(rng: np.random.Generator, kind: pa.DataType, count: int, empty: bool) -> pa.Array:
    if empty:
        return pa.nulls(count, kind)
    if pa.types.is_string(kind):
        return pa.array(["h264", "vp9"]).take(pa.array(rng.integers(0, 2, count)))
    if pa.types.is_boolean(kind):
        return pa.array(np.zeros(count, bool))
    if pa.types.is_integer(kind):
        return pa.array(rng.integers(64, 2000, count)).cast(kind)
    return pa.array(rng.uniform(0, 100, count).astype(np.float32)).cast(kind)


def write_source(path: Path, rows: int) -> None:
    """The synthetic manifest."""
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for start in range(0, rows, PIECE):
            writer.write_table(piece_of(rng, start, min(PIECE, rows - start)))


def run_ours(source: Path, out: Path, rules: Path) -> int:
    """Clips kept by the stage."""
    return filter_stage.run(source, out, rules).kept


def run_dry(source: Path, out: Path, rules: Path) -> int:
    """Clips that the stage would keep."""
    return filter_stage.run(source, out, rules, dry_run=True).kept


def run_whole_table(source: Path, out: Path, rules: Path) -> int:
    """The same verdicts on the whole table in memory."""
    table = read_manifest(source)
    config = load_rules(rules)
    steps = steps_of(config)
    tally = Tally(steps, [subset.name for subset in config.subsets])
    verdicts = judge(table, steps, 1, tally)
    for name in verdicts.schema.names:
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), verdicts[name])
    write_manifest(table, out)
    return tally.kept


def run_duckdb(source: Path, out: Path, rules: Path) -> int:
    """The same rules as one SQL statement; 2 GB for its buffers."""
    import duckdb

    connection = duckdb.connect()
    connection.execute("set memory_limit = '2GB'")
    connection.execute(_SQL.format(source=source, out=out))
    (kept,) = connection.execute(f"select count(*) from '{out}' where dropped_by is null").fetchone()
    return int(kept)


WAYS: dict[str, Callable[[Path, Path, Path], int]] = {
    "data filter": run_ours,
    "data filter --dry-run": run_dry,
    "whole table, pyarrow": run_whole_table,
    "duckdb, one statement": run_duckdb,
}


def measured(way: str, folder: Path) -> dict[str, Any] | None:
    """One way in a process of its own; None if its library is not installed."""
    command = [sys.executable, __file__, "--folder", str(folder), "--way", way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named 'duckdb'" in done.stderr:
        print(f"{way}: not measured, duckdb is not installed")
        return None
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run_one(way: str, folder: Path) -> dict[str, Any]:
    """Seconds, seconds of CPU, and peak memory, beside that of the imports."""
    before = peak_mb()
    started, cpu = time.perf_counter(), time.process_time()
    kept = WAYS[way](folder / "source.parquet", folder / "out.parquet", folder / "rules.yaml")
    return {
        "way": way,
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_rss_mb": peak_mb(),
        "imports_mb": before,
        "kept": kept,
    }


def peak_mb() -> int:
    """Peak resident memory of this process, by the kernel; `getrusage` would count the parent's before the start."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def compare(folder: Path, count: int, ways: list[str]) -> list[dict[str, Any]]:
    """Write a manifest of `count` clips and measure every way on it; all must keep the same number of clips."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source.parquet"
    # Ten million rows take minutes to make; those of an earlier run are the same.
    if not source.is_file() or pq.read_metadata(source).num_rows != count:
        write_source(source, count)
    (folder / "rules.yaml").write_text(yaml.safe_dump(RULES))
    rows: list[dict[str, Any]] = []
    for way in ways:
        (folder / "out.parquet").unlink(missing_ok=True)
        found = measured(way, folder)
        if found:
            rows.append({"rows": count, "source_mb": source.stat().st_size // 2**20, **found})
            print(json.dumps(rows[-1]), flush=True)
    if len({row["kept"] for row in rows}) > 1:
        raise RuntimeError(f"the ways do not agree: {[(row['way'], row['kept']) for row in rows]}")
    return rows


def main() -> None:
    """Measure at every size, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/filter_bench"), help="for the manifests")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--whole-table-up-to", type=int, default=2_000_000, help="rows; it takes a GB for each million")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(run_one(arguments.way, arguments.folder)))
        return
    rows = []
    for count in arguments.rows:
        allowed = [way for way in arguments.ways if not way.startswith("whole") or count <= arguments.whole_table_up_to]
        rows += compare(arguments.folder / str(count), count, allowed)
    report.print_table(rows, ["rows", "way", "seconds", "cpu_seconds", "peak_rss_mb", "imports_mb", "kept"])
    report.write(arguments.out, {"piece_rows": PIECE, "source": "synthetic"}, rows, {})


if __name__ == "__main__":
    main()
