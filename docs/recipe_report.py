"""Runs a whole recipe over the tests' folder of nasty files and writes docs/recipe_report.md with what happened.

    python docs/recipe_report.py [--work FOLDER]

Every stage is also killed in the middle (SIGKILL) and run again, the recipe is run on Ray and as an array of three
tasks, and all that they made is compared byte by byte with the plain run. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "unit"), str(ROOT / "tests" / "e2e")]

from nasty_folder import Fate, make_nasty_folder  # noqa: E402
from test_nasty_recipe import make_encoders  # noqa: E402
from test_stage_kills import KILLED  # noqa: E402

from data_prep.run_report import read_runs, stage_table  # noqa: E402
from megatron_video.manifest import Row, kept_rows, read_manifest  # noqa: E402
from megatron_video.video_io import read_frames  # noqa: E402

PAGE = ROOT / "docs" / "recipe_report.md"
PICTURES = ROOT / "docs" / "recipe_report"
RECIPE = """\
stages:
  - ingest:
  - segment: {max_seconds: 4}
  - tag:
  - filter: {rules: rules.yaml}
  - caption: {captions: captions.jsonl, on_missing: keep}
  - balance: {embeddings: vectors.parquet, clusters: 4, duplicate_similarity: 0.9}
  - encode:
      vae: encoders/vae
      text: encoders/text
      buckets: [1x48x64, 17x48x64, 17x64x48]
      samples_per_shard: 8
  - verify:
  - inspect: {vae: encoders/vae, clips: 12}
"""
RULES = """\
rules:
  - {tag: brightness, min: 20, max: 235}
  - {tag: blur, min: 16}
  - {tag: motion_mean, max: 20, media: videos}
subsets:
  - name: wide
    rules: [{tag: short_side, min: 64}, {tag: saturation_mean, min: 40}]
  - name: sharp
    rules: [{tag: blur, min: 30}]
  - name: sharpest
    rules: [{tag: blur, min: 60}, {tag: color_transfer, exclude: "smpte2084|arib"}]
"""
# stage -> which of its renames (everything that is written for good is renamed) is its last moment
KILLS = {
    "1-ingest": 3,
    "2-segment": 5,
    "3-tag": 4,
    "4-filter": 1,
    "5-caption": 1,
    "6-balance": 1,
    "7-encode": 6,
}
ARRAYS = ("1-ingest", "2-segment", "3-tag", "5-caption", "7-encode")
TASKS = 3
OUTPUTS = [f"{stage}.parquet" for stage in list(KILLS)[:-1]] + ["7-encode"]
PROOFS = [
    ("every file ends as a sample or as a row with its reason", "tests/e2e/test_nasty_recipe.py"),
    (
        "each file's clips and reason, as the file was made",
        "tests/unit/test_bad_videos.py, tests/e2e/test_recipe_nasty.py",
    ),
    (
        "a killed stage goes on to the same bytes",
        "tests/unit/test_stage_kills.py, tests/e2e/test_data_encode_workers.py",
    ),
    ("a killed worker costs no clip; a clip that kills is a dropped row", "the same two"),
    ("an array and Ray give the same bytes", "tests/unit/test_array_shards.py, tests/e2e/test_recipe_nasty.py"),
    ("a full disk, two runs on one output", "tests/unit/test_stage_kills.py, tests/unit/test_run_lock.py"),
    ("a wrong recipe is refused before its first stage", "tests/unit/test_recipe.py"),
    ("a manifest of a newer version is refused", "tests/unit/test_manifest.py"),
    ("a video of four hours takes the memory of a minute", "tests/unit/test_segment.py"),
]


def main() -> None:
    """Run everything in a fresh folder and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="an empty folder (default: a temporary one, removed afterwards)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.work or Path(temporary)).absolute()
        fates = prepare(folder)
        run(folder, "local", "--workers", "2")
        kills = list(kill_and_resume(folder))
        run(folder, "ray", "--engine", "ray", "--workers", "2", "--until", "encode")
        array(folder)
        same = {name: compare(folder, name) for name in ("killed", "ray", "array")}
        copy_pictures(folder / "local")
        PAGE.write_text(page(folder, fates, kills, same), encoding="utf-8")
    print(f"-> {PAGE}")


def prepare(folder: Path) -> dict[str, Fate]:
    """The raw files, recipe and rules; captions, vectors and encoders that the later stages need."""
    fates = make_nasty_folder(folder / "raw")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "rules.yaml").write_text(RULES)
    lines = [{"path": path, "short": "a texture", "dense": f"a texture moves, {Path(path).stem}"} for path in fates]
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    for stand_in in ("vae", "text"):
        (folder / "encoders" / stand_in).mkdir(parents=True)
    run(folder, "local", "--workers", "2", "--until", "caption")
    captioned = folder / "local" / "5-caption.parquet"
    write_vectors(captioned, folder / "vectors.parquet")
    shutil.rmtree(folder / "encoders")
    make_encoders(folder / "encoders", captioned)
    return fates


def write_vectors(manifest: Path, path: Path) -> None:
    """A clip's embedding: its middle frame, very small."""
    rows = kept_rows(read_manifest(manifest))
    middles = [(row["start_frame"] + row["end_frame"]) // 2 for row in rows]
    frames = [read_frames(row["source"], middle, 1)[0] for row, middle in zip(rows, middles, strict=True)]
    vectors = [cv2.resize(frame, (8, 6), interpolation=cv2.INTER_AREA).reshape(-1) for frame in frames]
    centred = np.asarray(vectors, np.float32) - np.mean(vectors)
    pq.write_table(pa.table({"clip_id": [row["clip_id"] for row in rows], "embedding": list(centred)}), path)


def command(folder: Path, work: str, *more: str) -> list[str]:
    """`data run` with the recipe."""
    return ["run", "--recipe", f"{folder}/recipe.yaml", "--in", f"{folder}/raw", "--work", f"{folder}/{work}", *more]


def run(folder: Path, work: str, *more: str) -> None:
    """Run the recipe, or a part of it, in a process of its own."""
    print("data", *command(folder, work, *more), flush=True)
    subprocess.run(
        [sys.executable, "-m", "data_prep.cli", *command(folder, work, *more)], check=True, env=environment()
    )


def environment() -> dict[str, str]:
    """Without a Ray cluster, and with this checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def kill_and_resume(folder: Path) -> Iterator[tuple[str, str]]:
    """Each stage killed and run again; what was there when it died."""
    for stage, rename in KILLS.items():
        alone = command(folder, "killed", "--only", stage, "--workers", "1")
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(rename), *alone], env=environment(), capture_output=True, check=False
        )
        if killed.returncode != -signal.SIGKILL:
            raise RuntimeError(f"{stage} was not killed: {killed.stderr.decode()[-2000:]}")
        yield stage, left_behind(folder / "killed", stage)
        run(folder, "killed", "--only", stage, "--workers", "1")


def left_behind(work: Path, stage: str) -> str:
    """Finished pieces of a killed stage."""
    parts = len(list(work.glob(f".{stage}.parquet.parts-*/part-*.parquet")))
    shards = len(list(work.glob(f"{stage}/*.tar")))
    if (work / f"{stage}.parquet").exists():
        raise RuntimeError(f"{stage} had ended before it was killed")
    return f"parts: {parts}" if parts else f"shards: {shards}" if shards else "nothing with a final name"


def array(folder: Path) -> None:
    """Stage by stage: as three tasks, the last one first, where the stage has shards."""
    for stage in (*KILLS,):
        tasks = [f"{index}/{TASKS}" for index in reversed(range(TASKS))] if stage in ARRAYS else [None]
        for task in tasks:
            run(folder, "array", "--only", stage, "--workers", "1", *(["--shard", task] if task else []))


def compare(folder: Path, work: str) -> dict[str, bool]:
    """Which outputs are the plain run's, byte by byte."""
    return {name: content(folder / work / name) == content(folder / "local" / name) for name in OUTPUTS}


def content(path: Path) -> dict[str, str]:
    """sha256 of every file of an output, but the report, which has times."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if file.name != "report.json"]
    return {str(file.relative_to(path.parent)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def copy_pictures(work: Path) -> None:
    """The stages' own plots, under their stage's name."""
    shutil.rmtree(PICTURES, ignore_errors=True)
    PICTURES.mkdir()
    # Not the contact sheet: the Video-VAE is a random one, and decodes to noise.
    for path in sorted([*work.glob("*.report/*.png"), *work.glob("9-inspect/statistics.png")]):
        shutil.copyfile(path, PICTURES / f"{path.parent.name.removesuffix('.report')}-{path.name}")


def page(
    folder: Path, fates: dict[str, Fate], kills: Sequence[tuple[str, str]], same: dict[str, dict[str, bool]]
) -> str:
    """The page."""
    work = folder / "local"
    runs = read_runs(work)
    rows = read_manifest(work / "7-encode" / "manifest.parquet").to_pylist()
    verified = next(one.report for one in runs if one.stage == "verify")
    plain = {key: value for key, value in verified.items() if not isinstance(value, dict | list)}
    sections = [
        "# A recipe over nasty files\n\nWritten by `python docs/recipe_report.py`, which made the files "
        "(`tests/nasty_folder.py`), ran everything below and\ncompared it; nothing here is typed by hand.",
        f"```yaml\n{RECIPE}```",
        "\n".join(stage_table(runs)),
        "Ingest counts files, the stages behind it clips and files without one. The encoders are small and random.\n"
        "(earlier): made by an earlier run of the same recipe, up to `caption`, and found finished.",
        "## What became of each file\n\n" + "\n".join(fate_table(folder, fates, rows)),
        f"## verify\n\n```json\n{json.dumps(plain, indent=1)}\n```\n\nFaults: {len(verified.get('faults', []))}.",
        "## Killed and gone on with\n\nSIGKILL in each stage, then the same command again.\n\n"
        + "\n".join(kill_table(kills, same["killed"])),
        f"## Ray, and an array of {TASKS} tasks\n\n" + "\n".join(engine_table(same)),
        "## Plots of the stages\n\n" + "\n\n".join(f"![{p.name}](recipe_report/{p.name})" for p in pictures()),
        "## Which test holds it\n\n| what | where |\n|---|---|\n" + "\n".join(f"| {a} | {b} |" for a, b in PROOFS),
    ]
    return "\n\n".join(sections).replace(f"{folder}/", "") + "\n"


def pictures() -> list[Path]:
    """The copied plots."""
    return sorted(PICTURES.glob("*.png"))


def fate_table(folder: Path, fates: dict[str, Fate], rows: Sequence[Row]) -> Iterator[str]:
    """One line a file, as the last manifest tells it."""
    yield "| file | codec, pixels | encoded | dropped, and why |"
    yield "|---|---|--:|---|"
    for source in fates:
        mine = [row for row in rows if row["source"] == source]
        kept = sum(not row["dropped_by"] for row in mine)
        told = Counter(f"{row['dropped_by']}: {row['drop_reason']}" for row in mine if row["dropped_by"])
        reasons = "; ".join(f"{count} x {reason}" if count > 1 else reason for reason, count in told.items())
        kind = ", ".join(str(mine[0][name]) for name in ("codec", "pixel_format") if mine[0][name])
        short = reasons.replace(f"{source}: ", "").replace(source, "it").replace("|", "\\|")
        yield f"| {source.removeprefix(str(folder / 'raw') + '/')} | {kind} | {kept or ''} | {short} |"


def kill_table(kills: Sequence[tuple[str, str]], same: dict[str, bool]) -> Iterator[str]:
    """One line a stage."""
    yield "| stage | there when it died | its output after the second run |"
    yield "|---|---|---|"
    for (stage, left), name in zip(kills, OUTPUTS, strict=True):
        yield f"| {stage} | {left} | {verdict(same[name])} |"


def engine_table(same: dict[str, dict[str, bool]]) -> Iterator[str]:
    """One line an output."""
    yield "| output | `--engine ray` | `--shard I/3` |"
    yield "|---|---|---|"
    for name in OUTPUTS:
        yield f"| {name} | {verdict(same['ray'][name])} | {verdict(same['array'][name])} |"


def verdict(same: bool) -> str:
    """In a word."""
    return "identical" if same else "**differs**"


if __name__ == "__main__":
    main()
