"""Raw demo clips to shards with the real encoders at small width: exactness, resume, damage, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data_prep import cli, demo_clips, encode, run, verify
from data_prep.encode import EncodeSettings
from megatron_video.buckets import CropBox, parse_buckets
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.manifest import kept_rows, read_manifest, table_from_rows, write_manifest
from megatron_video.run_lock import run_lock
from megatron_video.shards import ShardDataset
from megatron_video.text import TextEncoders, text_folders
from megatron_video.vae import VAEConfig, VideoVAE, load_vae, save_vae
from megatron_video.video_io import read_frames
from training import build_text_encoders

BUCKETS = "1x32x32,17x32x32,17x32x48"
SETTINGS = EncodeSettings(parse_buckets(BUCKETS), samples_per_shard=4, batch_size=3)


@dataclass(frozen=True)
class Prepared:
    """What encode needs, and what it made in one go."""

    folder: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "work" / run.RESULT

    @property
    def vae(self) -> Path:
        return self.folder / "vae"

    @property
    def text(self) -> Path:
        return self.folder / "text"

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    def command(self, out: Path) -> list[str]:
        arguments = {"--in": self.manifest, "--vae": self.vae, "--text": self.text, "--out": out, "--buckets": BUCKETS}
        flat = [str(part) for pair in arguments.items() for part in pair]
        return ["encode", *flat, "--samples-per-shard", "4", "--batch-size", "3", "--workers", "1"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = Prepared(tmp_path_factory.mktemp("encode"))
    demo_clips.make_demo_clips(data.folder / "raw", clips=30, seed=0)
    run.run(data.folder / "raw", data.folder / "work")
    torch.manual_seed(0)
    widths = {"encoder_channels": 32, "decoder_channels": 32}
    steps = {"encoder_multipliers": (1, 1, 1, 1), "decoder_multipliers": (1, 1, 1, 1), "num_res_blocks": 1}
    save_vae(VideoVAE(VAEConfig(latent_channels=4, **widths, **steps)), data.vae)
    build_text_encoders.main(["build", "--captions", str(data.manifest), "--out", str(data.text)])
    encode.run(data.manifest, data.shards, data.vae, data.text, SETTINGS)
    yield data
    torch.set_num_threads(threads)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is the same in every run of the same inputs."""
    timed = {"report.json", ".lock"}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in timed)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def data(*arguments: object) -> int:
    return run_command(cli.main, [str(argument) for argument in arguments])


def test_every_kept_clip_is_a_sample_and_verify_agrees(prepared: Prepared) -> None:
    dataset = ShardDataset(prepared.shards)
    rows = kept_rows(read_manifest(prepared.shards / "manifest.parquet"))
    assert sorted(dataset.index["key"].to_pylist()) == sorted(row["clip_id"] for row in rows)
    # 25 videos and 5 images; two cuts give two clips more, the truncated file one less.
    assert dataset.dataset_info.samples == 31
    assert set(dataset.dataset_info.buckets) == {"1x32x32", "17x32x32", "17x32x48"}
    report = verify.run(prepared.shards)
    assert (report.samples, report.faults) == (31, [])
    dropped = [row for row in read_manifest(prepared.shards / "manifest.parquet").to_pylist() if row["dropped_by"]]
    assert [(row["dropped_by"], Path(row["source"]).name) for row in dropped] == [("ingest", "clip_0000.mp4")]
    assert "cut short" in dropped[0]["drop_reason"]


def test_moments_and_text_are_those_of_the_encoders(prepared: Prepared) -> None:
    dataset = ShardDataset(prepared.shards)
    rows = {row["clip_id"]: row for row in kept_rows(read_manifest(prepared.shards / "manifest.parquet"))}
    vae = load_vae(prepared.vae)
    text = TextEncoders.load(*text_folders(prepared.text), "cpu", torch.float32)
    for number in range(0, len(dataset), 5):
        sample = dataset[number]
        row, meta = rows[sample.key], sample.metadata
        frames, height, width = (int(part) for part in row["bucket"].split("x"))
        crop = CropBox(*meta["crop"]) if meta["crop"] else None
        pixels = read_frames(row["source"], meta["start_frame"], frames, size=(height, width), crop=crop)
        assert row["start_frame"] <= meta["start_frame"]
        assert meta["end_frame"] == meta["start_frame"] + frames <= row["end_frame"]
        video = torch.from_numpy(pixels).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            expected = vae.encode_moments(video)[0]
        torch.testing.assert_close(sample.moments.float(), expected, rtol=1e-2, atol=1e-3)
        (states,) = text.encode([row["caption"]])
        torch.testing.assert_close(sample.llm.float(), states.llm, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(sample.clip.float(), states.clip, rtol=1e-2, atol=1e-2)
    (null,) = text.encode([""])
    torch.testing.assert_close(dataset.null_text[0].float(), null.llm, rtol=1e-2, atol=1e-2)


def test_clips_of_one_basename_both_survive_with_distinct_keys(prepared: Prepared) -> None:
    rows = kept_rows(read_manifest(prepared.shards / "manifest.parquet"))
    twins = [row for row in rows if Path(row["source"]).name == "clip_0001.mp4"]
    assert {Path(row["source"]).parent.name for row in twins} == {"clips", "more"}
    keys = {row["clip_id"] for row in twins}
    # The one in clips/ has a cut inside and gives two clips.
    assert len(keys) == len(twins) == 3
    assert keys <= set(ShardDataset(prepared.shards).index["key"].to_pylist())


def test_black_borders_are_cropped_in_encode(prepared: Prepared) -> None:
    rows = kept_rows(read_manifest(prepared.shards / "manifest.parquet"))
    bordered = {row["clip_id"]: row for row in rows if row["border_share"]}
    assert len(bordered) == 2
    dataset = ShardDataset(prepared.shards)
    crops = {s.key: s.metadata["crop"] for s in map(dataset.__getitem__, range(len(dataset))) if s.metadata["crop"]}
    assert crops == {key: [0, 12, row["width"], row["height"] - 24] for key, row in bordered.items()}
    for row in bordered.values():
        frames = read_frames(row["source"], row["start_frame"], 1, size=(32, 32), crop=CropBox(*crops[row["clip_id"]]))
        assert frames.min(axis=-1).min(axis=1).max() > 20


def test_a_killed_encode_goes_on_and_makes_the_same_bytes(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    command = [sys.executable, "-m", "data_prep.cli", *prepared.command(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        deadline = time.monotonic() + 300
        while not list(out.glob("parts/*.rows.parquet")) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*.rows.parquet")}
    assert finished
    assert not (out / "dataset_info.json").exists()
    with pytest.raises(UserError, match="did not finish"):
        ShardDataset(out)
    (out / ".shard-000005.tar.1.tmp").write_bytes(b"half a shard")
    encode.run(prepared.manifest, out, prepared.vae, prepared.text, SETTINGS)
    assert contents(out) == contents(prepared.shards)
    assert {name: (out / "parts" / name).stat().st_mtime_ns for name in finished} == finished
    assert encode.run(prepared.manifest, out, prepared.vae, prepared.text, SETTINGS).up_to_date


def test_a_clip_that_fails_in_encode_is_a_dropped_row(prepared: Prepared, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(prepared.folder / "raw", raw)
    run.run(raw, tmp_path / "work")
    (raw / "clips" / "clip_0006.mp4").write_bytes(b"replaced behind our back")
    report = encode.run(tmp_path / "work" / run.RESULT, tmp_path / "out", prepared.vae, prepared.text, SETTINGS)
    assert (report.dropped_here, report.reasons) == (1, {"unreadable": 1})
    assert report.details["samples"] == 30
    assert "clip_0006.mp4" in report.examples[0]
    assert verify.run(tmp_path / "out").faults == []


def test_clips_without_a_bucket_are_dropped_rows(prepared: Prepared, tmp_path: Path) -> None:
    settings = EncodeSettings(parse_buckets("17x32x48"), samples_per_shard=100)
    report = encode.run(prepared.manifest, tmp_path, prepared.vae, prepared.text, settings)
    assert report.reasons == {"no bucket": 5}
    assert report.details["buckets"] == {"17x32x48": 26}


def test_a_folder_of_another_run_or_in_use_is_refused(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(prepared.shards)
    other = prepared.command(prepared.shards)
    other[other.index("--batch-size") + 1] = "2"
    assert data(*other) == 2
    assert "other encoders or other settings (batch_size: 3 there, 2 now)" in capsys.readouterr().err
    assert contents(prepared.shards) == before
    with run_lock(tmp_path / ".lock", tmp_path):
        assert data(*prepared.command(tmp_path)) == 2
    assert f"another run is writing there (process {os.getpid()} on " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--buckets", "16x32x32", "17"),
        ("--vae", "nowhere", "nowhere"),
        ("--text", "nowhere", "nowhere"),
        ("--in", "nowhere.parquet", "no such manifest"),
        ("--samples-per-shard", "0", "at least 1"),
        ("--batch-size", "0", "--batch-size 0 must be at least 1"),
        ("--device", "tpu", "none of cpu, cuda and cuda:0"),
        ("--device", "cuda:99", "--device cuda:99: torch sees"),
        ("--buckets", "68x32x32", "nothing to encode among its"),
    ],
)
def test_wrong_arguments_are_refused(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, complaint: str
) -> None:
    assert data(*prepared.command(tmp_path / "out"), option, value) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tar"))


def test_clips_without_a_caption_are_dropped_and_one_of_10000_characters_is_cut(
    prepared: Prepared, tmp_path: Path
) -> None:
    rows = [dict(row) for row in kept_rows(read_manifest(prepared.manifest))[:4]]
    for row, caption in zip(rows, ["word " * 2000, None, " ", "a red circle"], strict=True):
        row["caption"] = caption
    write_manifest(table_from_rows(rows), tmp_path / "in.parquet")
    report = encode.run(tmp_path / "in.parquet", tmp_path / "out", prepared.vae, prepared.text, SETTINGS)
    assert (report.kept, report.reasons) == (2, {"no caption": 2})
    assert "no caption: `megatron-video data caption` writes them" in report.examples[0]
    dataset = ShardDataset(tmp_path / "out")
    samples = {sample.key: sample for sample in (dataset[0], dataset[1])}
    long, short = samples[rows[0]["clip_id"]], samples[rows[3]["clip_id"]]
    assert (long.metadata["text_truncated"], short.metadata["text_truncated"]) == (True, False)
    assert len(long.metadata["caption"]) == 10_000
    assert len(long.llm) > len(short.llm)


def test_a_manifest_with_a_clip_twice_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    rows = kept_rows(read_manifest(prepared.manifest))
    write_manifest(table_from_rows([*rows, rows[0]]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=f"{rows[0]['clip_id']} occurs twice"):
        encode.run(tmp_path / "twice.parquet", tmp_path / "out", prepared.vae, prepared.text, SETTINGS)


def test_verify_names_the_shard_and_key_of_a_flipped_byte(prepared: Prepared, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(prepared.shards, folder)
    row = ShardDataset(folder).index.slice(9, 1).to_pylist()[0]
    path = folder / row["shard"]
    content = bytearray(path.read_bytes())
    content[row["latent_offset"] + row["latent_size"] - 1] ^= 4
    path.write_bytes(content)
    command = [sys.executable, "-m", "data_prep.cli", "verify", "--in", str(folder), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    faults = json.loads(result.stdout)["faults"]
    assert any(row["shard"] in fault and row["key"] in fault and "checksum" in fault for fault in faults)
    assert any(row["shard"] in fault and "file changed" in fault for fault in faults)


def test_verify_finds_strays_missing_files_and_a_manifest_that_differs(prepared: Prepared, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(prepared.shards, folder)
    shutil.copy(folder / "shard-000000.tar", folder / "stray.tar")
    (folder / "shard-000001.tar").unlink()
    null_text = bytearray((folder / "null_text.safetensors").read_bytes())
    null_text[-1] ^= 1
    (folder / "null_text.safetensors").write_bytes(null_text)
    rows = read_manifest(folder / "manifest.parquet").to_pylist()
    kept = [row for row in rows if not row["dropped_by"]]
    write_manifest(table_from_rows(kept[1:]), folder / "manifest.parquet")
    faults = "\n".join(verify.run(folder).faults)
    for part in ("stray.tar", "shard-000001.tar: missing, with its", "null_text.safetensors", kept[0]["clip_id"]):
        assert part in faults


def test_what_verify_removes_is_made_again_with_the_bytes_that_it_had(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(prepared.shards, folder)
    os.truncate(folder / "shard-000000.tar", 3000)
    (folder / "shard-000001.tar").unlink()
    (folder / "null_text.safetensors").write_bytes(b"")
    (folder / "manifest.parquet").unlink()
    assert data("verify", "--in", str(folder), "--remove-damaged") == 2
    named = "removed manifest.parquet, null_text.safetensors, shard-000000.tar ...: the command that made the folder"
    assert named in capsys.readouterr().err
    assert sorted(path.name for path in folder.glob("*.tar")) == sorted(
        path.name for path in prepared.shards.glob("*.tar") if path.name[6:12] not in ("000000", "000001")
    )
    assert data(*prepared.command(folder)) == 0
    assert contents(folder) == contents(prepared.shards)
    assert data("verify", "--in", str(folder)) == 0


def test_files_that_no_command_could_make_again_are_not_removed(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(prepared.shards, folder, ignore=shutil.ignore_patterns("parts"))
    os.truncate(folder / "shard-000000.tar", 3000)
    assert data("verify", "--in", str(folder), "--remove-damaged") == 2
    assert "has no parts/plan, so no command could make its files again" in capsys.readouterr().err
    assert (folder / "shard-000000.tar").is_file()


def test_verify_finds_values_that_are_not_finite(prepared: Prepared, tmp_path: Path) -> None:
    vae = load_vae(prepared.vae)
    with torch.no_grad():
        next(vae.encoder.parameters()).fill_(float("nan"))
    save_vae(vae, tmp_path / "vae")
    report = encode.run(prepared.manifest, tmp_path / "out", tmp_path / "vae", prepared.text, SETTINGS)
    assert report.kept == 0
    assert set(report.reasons) == {"not finite"}
    assert pq.read_table(tmp_path / "out" / "index.parquet").num_rows == 0
    parts = set(os.listdir(tmp_path / "out" / "parts")) - {"plan", "encoders.json"}
    assert np.all([name.endswith(".parquet") for name in parts])
