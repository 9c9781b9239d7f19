"""inspect: its figures against numbers worked out another way, its pictures against the VAE; blends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from tiny_models import LATENT_CHANNELS, write_tiny_vae
from tiny_shards import write_tiny_shards

from data_prep import cli, inspect_shards
from data_prep.blend import parse_source
from megatron_video.blend import read_blend, write_blend
from megatron_video.buckets import parse_bucket
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.fingerprint import vae_fingerprint
from megatron_video.manifest import table_from_rows, write_manifest
from megatron_video.shard_schema import DatasetInfo, shard_name
from megatron_video.shards import ShardDataset, ShardSample, ShardWriter, finish_dataset, write_null_text
from megatron_video.vae import load_vae

CLIPS, FPS = 6, 25.0


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose latents a tiny VAE made, beside that VAE; one image among the clips."""
    folder = tmp_path_factory.mktemp("inspect")
    vae = load_vae(write_tiny_vae(folder))
    generator, rows = torch.Generator().manual_seed(0), []
    for number, name in enumerate(("17x32x32", "1x32x32")):
        bucket = parse_bucket(name)
        with ShardWriter(folder / "shards", shard_name(number)) as writer:
            for index in range(CLIPS if bucket.frames > 1 else 1):
                video = torch.rand(1, bucket.frames, 3, 32, 32, generator=generator) * 2 - 1
                with torch.no_grad():
                    moments = vae.encode_moments(video)[0]
                key = f"{name}{index}-0-0"
                text = torch.ones(3 + index, 8), torch.ones(5, 6)
                writer.add(ShardSample(key, moments, *text, {"caption": key, "text_truncated": index == 1}), bucket)
                fps = FPS if bucket.frames > 1 else 0.0
                rows.append({"clip_id": key, "bucket": name, "shard": shard_name(number), "fps": fps, "language": "en"})
    write_null_text(folder / "shards", torch.ones(2, 8), torch.ones(5, 6))
    finish_dataset(folder / "shards", DatasetInfo(vae_fingerprint(folder / "vae"), "t", LATENT_CHANNELS, 8, 6, 5))
    write_manifest(table_from_rows(rows), folder / "shards" / "manifest.parquet")
    return folder


def test_figures_are_those_of_the_samples(encoded: Path, tmp_path: Path) -> None:
    report = inspect_shards.run(encoded / "shards", tmp_path)
    dataset = ShardDataset(encoded / "shards")
    moments = [dataset[n].moments.float() for n in range(len(dataset))]
    positions = np.concatenate([m.permute(1, 0, 2, 3).flatten(1).numpy() for m in moments], axis=1)
    mean, logvar = positions[:LATENT_CHANNELS], positions[LATENT_CHANNELS:]
    np.testing.assert_allclose(report.latents.mean, mean.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(report.latents.deviation, mean.std(axis=1), rtol=1e-4)
    np.testing.assert_allclose(report.latents.posterior_deviation, np.exp(logvar / 2).mean(axis=1), rtol=1e-4)
    assert report.latents.largest == pytest.approx(np.abs(mean).max(), abs=1e-4)
    assert report.hours == pytest.approx(CLIPS * 17 / FPS / 3600, abs=1e-4)
    assert {b.bucket: (b.samples, b.latent_tokens) for b in report.buckets} == {
        "17x32x32": (CLIPS, CLIPS * 3 * 2 * 2),
        "1x32x32": (1, 2 * 2),
    }
    tokens = [*range(3, 3 + CLIPS), 3]
    assert report.llm_tokens["mean"] == round(float(np.mean(tokens)), 2)
    assert (report.llm_tokens["p0"], report.llm_tokens["p50"], report.llm_tokens["p100"]) == (3, np.median(tokens), 8)
    assert (report.truncated, report.languages) == (1, {"en": CLIPS + 1})
    written = json.loads((tmp_path / "inspect.json").read_text())
    assert written["samples"] == CLIPS + 1
    assert cv2.imread(str(tmp_path / "statistics.png")).std() > 5
    assert not (tmp_path / "contact_sheet.png").exists()


def test_the_contact_sheet_shows_what_the_vae_decodes(
    encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, Any]] = []
    plain = inspect_shards.write_contact_sheet
    monkeypatch.setattr(
        inspect_shards, "write_contact_sheet", lambda rows, path: shown.extend(rows) or plain(rows, path)
    )
    inspect_shards.run(encoded / "shards", tmp_path, encoded / "vae", clips=3, seed=1)
    assert cv2.imread(str(tmp_path / "contact_sheet.png")) is not None
    dataset, vae = ShardDataset(encoded / "shards"), load_vae(encoded / "vae")
    numbers = inspect_shards.drawn(len(dataset), 3, seed=1)
    assert len(shown) == len(numbers) == 3
    for (caption, pixels), number in zip(shown, numbers, strict=True):
        sample = dataset[number]
        frames = vae.decode(sample.moments[None, :, :LATENT_CHANNELS])[0]
        expected = ((frames.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
        assert caption.endswith(sample.key)
        np.testing.assert_allclose(pixels, expected.detach().numpy(), atol=0.51)


def test_inspect_refuses_another_vae_and_empty_samples(encoded: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with torch.random.fork_rng():
        other = write_tiny_vae(tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="did not encode"):
        inspect_shards.run(encoded / "shards", tmp_path, other)
    with pytest.raises(UserError, match="--clips 0"):
        inspect_shards.run(encoded / "shards", tmp_path, clips=0)
    with pytest.raises(UserError, match="no finished shards"):
        inspect_shards.run(tmp_path, tmp_path)


def test_shards_without_a_manifest_have_no_hours(tmp_path: Path) -> None:
    report = inspect_shards.run(write_tiny_shards(tmp_path / "a"), tmp_path / "out", sample=5)
    assert (report.hours, report.languages, report.latents.samples) == (None, {}, 5)


def test_a_blend_is_written_read_and_noticed_when_it_is_stale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_tiny_shards(tmp_path / "a", {"17x48x48": 6}, 0)
    second = write_tiny_shards(tmp_path / "b", {"17x48x48": 2}, 1)
    path = tmp_path / "blend.yaml"
    command = ["blend", "--in", f"{first}=3", f"{second}=1", "--out", str(path), "--json"]
    assert run_command(cli.main, command) == 0
    sources = json.loads(capsys.readouterr().out)["sources"]
    assert [(s["share"], s["samples"], s["passes"]) for s in sources] == [(0.75, 6, 1.0), (0.25, 2, 1.0)]
    blend, folders = read_blend(path)
    assert (blend.shares, folders) == ([0.75, 0.25], [first, second])
    assert run_command(cli.main, ["blend", "--check", str(path)]) == 0
    assert f"data.shards=[{first},{second}]" in capsys.readouterr().out
    write_tiny_shards(tmp_path / "c", {"17x48x48": 3}, 2)
    values = yaml.safe_load(path.read_text())
    values["sources"][1]["shards"] = "c"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="c held 2 samples when the blend was written and holds 3 now"):
        read_blend(path)


def test_wrong_blends_are_refused(tmp_path: Path) -> None:
    first = write_tiny_shards(tmp_path / "a", {"17x48x48": 2}, 0)
    second = write_tiny_shards(tmp_path / "b", {"17x48x48": 2}, 1)
    out = tmp_path / "blend.yaml"
    for weights, complaint in [
        ((-1, 1), "must be a number of at least 0"),
        ((float("nan"), 1), "a number of at least 0"),
        ((0, 0), "leaves nothing to draw"),
    ]:
        with pytest.raises(UserError, match=complaint):
            write_blend(out, [first, second], weights)
    with pytest.raises(UserError, match="twice"):
        write_blend(out, [first, first], [1, 1])
    info = json.loads((second / "dataset_info.json").read_text()) | {"text_fingerprint": "other"}
    (second / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"b was encoded differently \(text_fingerprint: other, the blend has text"):
        write_blend(out, [first, second], [1, 1])
    assert not out.exists()
    out.write_text("blend_version: 2\nsources: [{shards: a, weight: 1}]\n")
    with pytest.raises(UserError, match="knows up to 1"):
        read_blend(out)
    out.write_text("sources: [{shards: a, weights: 1}]\n")
    with pytest.raises(UserError, match=r"unknown field 'sources\.0\.weights'"):
        read_blend(out)
    with pytest.raises(UserError, match="FOLDER=WEIGHT"):
        parse_source("folder")
