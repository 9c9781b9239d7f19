"""Balance: planted clusters, copies and outliers are found; keepers, weights and reports are what they should be."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted_vectors import Planted, plant, purity

from data_prep import balance
from data_prep.balance_report import SIMILARITY_PLOT, SIZES_PLOT
from data_prep.balance_steps import BalanceSettings
from data_prep.cli import main
from data_prep.embeddings import open_vectors
from data_prep.near_duplicates import cosine_keepers, final_keepers, hash_keepers
from data_prep.sampling_weights import cluster_weights
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.manifest import Row, read_manifest, table_from_rows, write_manifest

# More clusters than concepts, as anybody has who does not know them.
CLIPS, CONCEPTS, CLUSTERS, WIDTH = 3000, 8, 24, 32
SETTINGS = BalanceSettings(clusters=CLUSTERS, duplicate_similarity=0.97, outlier_deviations=6.0)


def rows_of(path: Path) -> list[Row]:
    rows: list[Row] = read_manifest(path).to_pylist()
    return rows


def write_rows(folder: Path, rows: list[Row]) -> Path:
    defaults = {"source": "x.mp4", "width": 64, "height": 64, "start_frame": 0, "end_frame": 20}
    write_manifest(table_from_rows({**defaults, **row} for row in rows), folder / "in.parquet")
    return folder / "in.parquet"


def write_vectors(folder: Path, vectors: np.ndarray, ids: list[str]) -> Path:
    np.save(folder / "v.npy", vectors)
    (folder / "v.ids.txt").write_text("\n".join(ids) + "\n")
    return folder / "v.npy"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Planted]:
    """Manifest, vectors and the truth about them; noise is long enough for clusters to touch."""
    folder = tmp_path_factory.mktemp("planted")
    truth = plant(folder / "v.npy", CLIPS, WIDTH, CONCEPTS, seed=5, copies=0.08, outliers=0.01)
    ids = [f"c{number:05d}" for number in range(CLIPS)]
    (folder / "v.ids.txt").write_text("\n".join(ids))
    quality = np.random.default_rng(0).permutation(CLIPS)
    rows = [{"clip_id": name, "aesthetic": float(q)} for name, q in zip(ids, quality, strict=True)]
    return write_rows(folder, rows), folder / "v.npy", truth


def test_planted_clusters_copies_and_outliers_are_found(planted: tuple[Path, Path, Planted], tmp_path: Path) -> None:
    manifest, vectors, truth = planted
    report = balance.run(manifest, tmp_path / "out.parquet", vectors, SETTINGS)
    rows = rows_of(tmp_path / "out.parquet")
    cluster = np.array([row["cluster"] for row in rows])
    assert purity(cluster, truth.label) > 0.97
    _check_copies(rows, truth)
    _check_outliers(rows, truth)
    counts = np.bincount(cluster)
    data = np.load(vectors)
    for row, vector in zip(rows[:200], data[:200], strict=True):
        assert row["cluster_count"] == counts[row["cluster"]]
        # The centre is near the mean of its cluster, and the cosine with it near the one stored.
        mean = data[cluster == row["cluster"]].mean(axis=0)
        assert row["center_similarity"] == pytest.approx(vector @ mean / np.linalg.norm(mean), abs=0.02)
    assert report.details["sum of weights"] == pytest.approx(report.kept, rel=1e-6)
    assert sum(row["weight"] for row in rows if not row["dropped_by"]) == pytest.approx(report.kept, rel=1e-4)
    assert all(row["weight"] is None for row in rows if row["dropped_by"])


def _check_copies(rows: list[Row], truth: Planted) -> None:
    copies = np.flatnonzero(truth.copy_of >= 0)
    assert len(copies) > 100
    by_id = {row["clip_id"]: row for row in rows}
    found = 0
    for number in copies:
        # Two copies of one clip are near to each other too; at most one of each pair is left.
        pair = rows[number], rows[truth.copy_of[number]]
        found += any(row["duplicate_of"] for row in pair)
    assert found / len(copies) > 0.98
    named = [row for row in rows if row["duplicate_of"]]
    # Of two vectors of a concept that are no copies the cosine is some 0.74 +- 0.05: none reaches 0.97.
    family = np.where(truth.copy_of >= 0, truth.copy_of, np.arange(len(rows)))
    for row in named:
        keeper = by_id[row["duplicate_of"]]
        assert keeper["dropped_by"] is None
        assert keeper["aesthetic"] > row["aesthetic"]
        assert family[int(row["clip_id"][1:])] == family[int(keeper["clip_id"][1:])]
        assert row["drop_reason"] == f"duplicate by embedding: of {keeper['clip_id']}"


def _check_outliers(rows: list[Row], truth: Planted) -> None:
    outlier = np.array([str(row["drop_reason"]).startswith("outlier: ") for row in rows])
    real = truth.label < 0
    assert real.sum() > 15
    assert outlier[real].mean() > 0.8
    assert outlier[~real].mean() < 0.005


def test_the_same_seed_gives_the_same_bytes_and_a_finished_run_is_not_redone(
    planted: tuple[Path, Path, Planted], tmp_path: Path
) -> None:
    manifest, vectors, _ = planted
    for name in ("a", "b"):
        balance.run(manifest, tmp_path / f"{name}.parquet", vectors, SETTINGS)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert balance.run(manifest, tmp_path / "a.parquet", vectors, SETTINGS).up_to_date
    assert not list(tmp_path.glob(".*"))
    other = BalanceSettings(clusters=CLUSTERS, seed=1)
    assert not balance.run(manifest, tmp_path / "a.parquet", vectors, other).up_to_date


def test_a_stopped_run_does_not_train_again(
    planted: tuple[Path, Path, Planted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, vectors, _ = planted
    balance.run(manifest, tmp_path / "whole.parquet", vectors, SETTINGS)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.balance_steps.find_outliers", stop)
        with pytest.raises(KeyboardInterrupt):
            balance.run(manifest, tmp_path / "out.parquet", vectors, SETTINGS)
    monkeypatch.setattr("data_prep.balance_steps.train_centers", stop)
    balance.run(manifest, tmp_path / "out.parquet", vectors, SETTINGS)
    assert rows_of(tmp_path / "out.parquet") == rows_of(tmp_path / "whole.parquet")


def test_a_killed_run_leaves_nothing_half_written_and_the_next_gives_the_same_bytes(
    planted: tuple[Path, Path, Planted], tmp_path: Path
) -> None:
    manifest, vectors, _ = planted
    balance.run(manifest, tmp_path / "whole.parquet", vectors, SETTINGS)
    out = tmp_path / "out.parquet"
    command = [sys.executable, "-m", "data_prep.cli", "balance", "--in", str(manifest), "--out", str(out)]
    options = ["--embeddings", str(vectors), "--clusters", str(CLUSTERS), "--duplicate-similarity", "0.97"]
    with subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob(".out.parquet.parts-*/centers.npy")) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert main([*command[3:], *options]) == 0
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_the_report_has_a_row_a_cluster_and_plots_with_something_in_them(
    planted: tuple[Path, Path, Planted], tmp_path: Path
) -> None:
    manifest, vectors, _ = planted
    out = tmp_path / "out.parquet"
    options = ["--clusters", str(CLUSTERS), "--duplicate-similarity", "0.97", "--json"]
    assert main(["balance", "--in", str(manifest), "--out", str(out), "--embeddings", str(vectors), *options]) == 0
    folder = tmp_path / "out.report"
    table = pq.read_table(folder / "clusters.parquet").to_pydict()
    rows = rows_of(out)
    assert sum(table["before"]) == CLIPS
    assert sum(table["after"]) == sum(row["dropped_by"] is None for row in rows)
    assert [
        b - o - d for b, o, d in zip(table["before"], table["outliers"], table["duplicates"], strict=True)
    ] == table["after"]
    # Flattened: the largest cluster gives way to the smallest, and in order.
    assert table["weight_of_a_clip"][np.argmax(table["after"])] < 1 < max(table["weight_of_a_clip"])
    assert json.loads((folder / "report.json").read_text())["settings"]["clusters"] == CLUSTERS
    for name in (SIZES_PLOT, SIMILARITY_PLOT):
        picture = cv2.imread(str(folder / name))
        assert picture.shape[0] > 400
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


# --- duplicates -----------------------------------------------------------------------------------------------------


def plain_keepers(unit: np.ndarray, members: np.ndarray, threshold: float) -> dict[int, int]:
    """Greedy, one by one: the definition."""
    kept: list[int] = []
    keeper = {}
    for clip in members:
        cosines = [float(unit[clip] @ unit[other]) for other in kept]
        if cosines and max(cosines) >= threshold:
            keeper[int(clip)] = kept[int(np.argmax(cosines))]
        else:
            kept.append(int(clip))
    return keeper


def test_cosine_duplicates_are_those_of_the_plain_greedy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.near_duplicates._BLOCK", 32)
    monkeypatch.setattr("data_prep.near_duplicates._KEPT_BLOCK", 48)
    rng = np.random.default_rng(3)
    base = rng.standard_normal((60, 6))
    # Many chains: a near b, b near c, but c not near a.
    unit = base[rng.integers(60, size=300)] + 0.25 * rng.standard_normal((300, 6))
    unit = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).astype(np.float32)
    members = rng.permutation(300)
    for threshold in (0.8, 0.95, 0.99):
        keeper, nearest = cosine_keepers(lambda clips: unit[clips], members, threshold)
        expected = plain_keepers(unit, members, threshold)
        assert {int(m): int(k) for m, k in zip(members, keeper, strict=True) if k >= 0} == expected
        assert ((nearest >= threshold) == (keeper >= 0)).all()
        assert len(expected) > 5


@pytest.mark.parametrize(("size", "radius"), [(8, 0), (8, 1), (8, 3), (8, 4), (8, 6), (8, 9), (2, 3), (32, 5)])
def test_hash_duplicates_are_those_of_the_plain_greedy_loop(size: int, radius: int) -> None:
    rng = np.random.default_rng(radius)
    base = rng.integers(0, 256, (40, size), np.uint8)
    bits = np.unpackbits(base[rng.integers(40, size=400)], axis=1)
    flips = rng.random(bits.shape) < 1.5 * (radius + 0.5) / bits.shape[1] * rng.random((400, 1))
    hashes = np.packbits(bits ^ flips, axis=1)
    distance = (np.unpackbits(hashes[:, None] ^ hashes[None], axis=2)).sum(axis=2)
    kept: list[int] = []
    dropped = set()
    for number in range(400):
        near = [other for other in kept if distance[number, other] <= radius]
        dropped |= {number} if near else set()
        kept += [] if near else [number]
    keeper = hash_keepers(hashes, radius)
    assert set(np.flatnonzero(keeper >= 0).tolist()) == dropped
    assert len(dropped) > 10
    for number in dropped:
        assert keeper[number] in kept
        assert keeper[number] < number
    # Equal hashes go to the first of them, whose keeper may be a little further off.
    assert max(distance[number, keeper[number]] for number in dropped) <= radius


def test_keepers_of_keepers_are_followed() -> None:
    assert final_keepers(np.array([-1, 0, 1, 2, -1, 4])).tolist() == [-1, 0, 0, 0, -1, 4]


def test_a_hash_duplicate_in_another_cluster_is_dropped_and_the_better_clip_stays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = np.repeat(np.eye(4, dtype=np.float32)[:2], 30, axis=0) + 0.3 * rng.standard_normal((60, 4)).astype("f4")
    rows: list[Row] = [{"clip_id": f"c{n}", "phash": f"{int(rng.integers(1, 2**62)):016x}"} for n in range(60)]
    # One bit apart, in two clusters; the second is larger. Two black clips have no hash to speak of.
    rows[3]["phash"], rows[40]["phash"] = "00ff00ff00ff00ff", "00ff00ff00ff00fe"
    rows[40]["width"] = 128
    rows[5]["phash"] = rows[6]["phash"] = "0" * 16
    rows[7]["phash"] = None
    manifest = write_rows(tmp_path, rows)
    settings = BalanceSettings(clusters=2, duplicate_similarity=1.1, outlier_deviations=None)
    ids = [row["clip_id"] for row in rows]
    report = balance.run(manifest, tmp_path / "o.parquet", write_vectors(tmp_path, vectors, ids), settings)
    out = rows_of(tmp_path / "o.parquet")
    assert out[3]["cluster"] != out[40]["cluster"]
    assert (out[3]["duplicate_of"], out[3]["drop_reason"]) == ("c40", "duplicate by hash: of c40")
    assert (report.kept, report.reasons) == (59, {"duplicate by hash": 1})


def test_the_order_of_quality_is_the_one_asked_for(tmp_path: Path) -> None:
    quality = [(5.0, 0.1), (5.0, 0.9), (None, 0.0), (7.0, 0.5)]
    rows: list[Row] = [{"clip_id": f"c{n}", "aesthetic": a, "watermark": w} for n, (a, w) in enumerate(quality)]
    rows[0] |= {"crop_width": 10, "crop_height": 10}
    table = read_manifest(write_rows(tmp_path, rows))
    assert balance.best_first(table, ("aesthetic", "-watermark")).tolist() == [3, 0, 1, 2]
    assert balance.best_first(table, ("-watermark",)).tolist() == [2, 0, 3, 1]
    # Equal in everything: the smallest clip_id. Black borders are no pixels.
    assert balance.best_first(table, ("pixels", "frames")).tolist() == [1, 2, 3, 0]
    with pytest.raises(UserError, match="keep-best caption"):
        balance.best_first(table, ("caption",))


def test_a_rare_concept_in_a_cluster_of_another_one_is_no_outlier_and_an_odd_clip_is(tmp_path: Path) -> None:
    """One cluster of 300 clips of a concept, 12 of another, and 4 that are like nothing."""
    rng = np.random.default_rng(0)
    kinds = np.repeat([0, 1], [300, 12])
    vectors = np.eye(64)[kinds] + 0.08 * rng.standard_normal((312, 64))
    vectors = np.concatenate([vectors, rng.standard_normal((4, 64))]).astype(np.float32)
    names = [f"c{number}" for number in range(len(vectors))]
    manifest = write_rows(tmp_path, [{"clip_id": name} for name in names])
    file = write_vectors(tmp_path, vectors, names)

    def outliers(neighbours: int) -> list[int]:
        settings = BalanceSettings(clusters=1, duplicate_similarity=1.1, outlier_neighbours=neighbours)
        balance.run(manifest, tmp_path / "o.parquet", file, settings)
        return [n for n, row in enumerate(rows_of(tmp_path / "o.parquet")) if row["dropped_by"]]

    assert outliers(0) == list(range(300, 316))
    assert outliers(5) == list(range(312, 316))
    # Twelve clips have eleven others like them.
    assert outliers(12) == list(range(300, 316))


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, 100.0])
@pytest.mark.parametrize("cap", [1.0, 1.3, 5.0, 1e9])
def test_weights_keep_their_sum_and_their_cap(temperature: float, cap: float) -> None:
    counts = np.array([1000, 300, 0, 50, 2, 1])
    weights = cluster_weights(counts, temperature, cap)
    assert (weights * counts).sum() == pytest.approx(counts.sum())
    assert weights.max() <= cap * (1 + 1e-12)
    assert weights[2] == 0
    free = np.flatnonzero((weights < cap * (1 - 1e-9)) & (counts > 0))
    # Of the clusters that the cap leaves alone, the draws are as n^(1/temperature).
    draws = weights[free] * counts[free] / counts[free] ** (1 / temperature)
    assert np.allclose(draws, draws[:1])
    if temperature == 1:
        assert weights[counts > 0] == pytest.approx(1)


def test_wrong_weights_are_refused() -> None:
    for temperature, cap in ((0.5, 2.0), (2.0, 0.5)):
        with pytest.raises(UserError, match="at least 1"):
            cluster_weights(np.array([1]), temperature, cap)
        with pytest.raises(UserError, match="at least 1"):
            BalanceSettings(temperature=temperature, max_weight=cap)


# --- embeddings -----------------------------------------------------------------------------------------------------


def test_parquet_and_numpy_embeddings_in_any_order_give_the_same(
    planted: tuple[Path, Path, Planted], tmp_path: Path
) -> None:
    manifest, vectors, _ = planted
    data = np.load(vectors)
    shuffled = np.random.default_rng(1).permutation(CLIPS)
    ids = [f"c{number:05d}" for number in shuffled]
    table = pa.table({"clip_id": ids, "embedding": pa.array(list(data[shuffled] * 3), pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=700)
    balance.run(manifest, tmp_path / "plain.parquet", vectors, SETTINGS)
    balance.run(manifest, tmp_path / "shuffled.parquet", tmp_path / "e.parquet", SETTINGS)
    plain, other = rows_of(tmp_path / "plain.parquet"), rows_of(tmp_path / "shuffled.parquet")
    # Vectors three times as long have the same directions; sums differ in their last bits.
    assert [row["cluster"] for row in plain] == [row["cluster"] for row in other]
    assert [row["drop_reason"] for row in plain] == [row["drop_reason"] for row in other]


def test_clips_without_a_sound_vector_are_dropped_and_missing_ones_named(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float16)
    vectors[3], vectors[4], vectors[5] = 0, np.nan, np.inf
    names = [f"c{number}" for number in range(20)]
    file = write_vectors(tmp_path, vectors, names)
    settings = BalanceSettings(clusters=2, duplicate_similarity=1.1)
    rows: list[Row] = [{"clip_id": name} for name in [*names, "lost"]]
    rows[0] |= {"dropped_by": "filter", "drop_reason": "dark"}
    manifest = write_rows(tmp_path, rows)
    with pytest.raises(UserError, match="has none for 1 of 20 kept clips, such as lost"):
        balance.run(manifest, tmp_path / "o.parquet", file, settings)
    report = balance.run(manifest, tmp_path / "o.parquet", file, settings, on_missing="drop")
    out = rows_of(tmp_path / "o.parquet")
    gone = [row["clip_id"] for row in out if str(row["drop_reason"]).startswith("no embedding")]
    assert gone == ["c3", "c4", "c5", "lost"]
    assert (out[0]["dropped_by"], out[0]["drop_reason"], out[0]["cluster"]) == ("filter", "dark", None)
    assert (report.dropped_before, report.kept) == (1, 16)


def test_wrong_embeddings_are_refused(tmp_path: Path) -> None:
    ids = pa.chunked_array([["a", "b"]])
    good = np.ones((2, 3), np.float32)
    for vectors, names, complaint in (
        (good, ["a"], "1 clip_ids for 2 vectors"),
        (good, ["a", "a"], "2 vectors for 1 different clip_ids"),
        (good[0], ["a"], r"not floats \[N, D\]"),
        (good.astype(int), ["a", "b"], r"not floats \[N, D\]"),
    ):
        with pytest.raises(UserError, match=complaint):
            open_vectors(write_vectors(tmp_path, vectors, names), ids, tmp_path)
    (tmp_path / "v.ids.txt").unlink()
    with pytest.raises(UserError, match=r"needs v\.ids\.txt beside it"):
        open_vectors(tmp_path / "v.npy", ids, tmp_path)
    for column, complaint in (([[1.0], [1.0, 2.0]], "vectors of 1 and of 2"), ([None, None], "no clip has")):
        table = pa.table({"clip_id": ["a", "b"], "embedding": pa.array(column, pa.list_(pa.float32()))})
        pq.write_table(table, tmp_path / "e.parquet")
        with pytest.raises(UserError, match=complaint):
            open_vectors(tmp_path / "e.parquet", ids, tmp_path)
    pq.write_table(pa.table({"clip_id": ["a"]}), tmp_path / "e.parquet")
    with pytest.raises(UserError, match="no column embedding"):
        open_vectors(tmp_path / "e.parquet", ids, tmp_path)
    with pytest.raises(UserError, match="no such file"):
        open_vectors(tmp_path / "gone.npy", ids, tmp_path)


def test_wrong_numbers_of_clusters_and_no_source_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_vectors(tmp_path, np.eye(3, dtype=np.float32), ["a", "b", "c"])
    manifest = write_rows(tmp_path, [{"clip_id": name} for name in "abc"])
    common = ["balance", "--in", str(manifest), "--out", str(tmp_path / "o.parquet")]
    assert run_command(main, [*common, "--embeddings", str(file), "--clusters", "9"]) == 2
    assert "--clusters 9 must be between 1 and the 3 clips" in capsys.readouterr().err
    assert run_command(main, common) == 2
    assert "--embeddings FILE or --clip FOLDER" in capsys.readouterr().err
    for option, value, complaint in (
        ("--clusters", "0", "--clusters 0 must be at least 1"),
        ("--seed", "-1", "--seed -1 must be at least 0"),
        ("--min-center-similarity", "7", "--min-center-similarity 7.0 is a cosine"),
        ("--outlier-deviations", "-1", "--outlier-deviations -1.0 must be above 0; 0 = off"),
        ("--keep-best", "pixels,caption", "--keep-best caption: a number is needed"),
        ("--batch-size", "0", "--batch-size 0"),
    ):
        assert run_command(main, [*common, "--embeddings", str(file), option, value]) == 2
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "o.parquet").exists()
