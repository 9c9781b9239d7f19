"""`megatron-video sample`: what is written, what it depends on, resuming, and refusals."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import write_tiny_models, write_tiny_run
from tiny_shards import write_tiny_shards

from megatron_video.errors import UserError
from megatron_video.fingerprint import vae_fingerprint
from megatron_video.generation import to_pixels
from megatron_video.text import text_fingerprint, text_folders
from megatron_video.video_io import probe, read_frames
from training.sample import main
from training.sample_folder import animated_gif, shrunk
from training.trained_encoders import trained_encoders

PROMPTS = ["a red circle moves left", "a blue square moves up", "蓝色方块向上移动"]
# Samples are compared by their sheets, which show three frames without loss: H.264 makes a mean difference of 2 from
# single pixels that were rounded differently.
ROUNDING = 1


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_models(folder, PROMPTS)
    return folder


def _command(models: Path, out: Path, *more: str) -> list[str]:
    inputs = {"checkpoint": "run", "vae": "vae", "text": "text", "prompts": "prompts.txt"}
    paths = [part for name, file in inputs.items() for part in (f"--{name}", str(models / file))]
    size = ["--frames", "17", "--height", "32", "--width", "48", "--steps", "3", "--fps", "12", "--guidance", "3"]
    return [*paths, "--out", str(out), *size, *more]


@pytest.fixture(scope="module")
def samples(models: Path) -> Path:
    main(_command(models, models / "samples"))
    return models / "samples"


def _sheets(folder: Path) -> list[np.ndarray]:
    assert (folder / "samples.jsonl").is_file()
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("0*_sheet.png"))]


def _assert_same_samples(first: Path, second: Path) -> None:
    for a, b in zip(_sheets(first), _sheets(second), strict=True):
        assert np.abs(a - b).max() <= ROUNDING


def _assert_different(a: np.ndarray, b: np.ndarray) -> None:
    assert np.abs(a - b).mean() > 3


def test_every_prompt_has_its_video_sheet_line_and_tensorboard_picture(samples: Path) -> None:
    lines = [json.loads(line) for line in (samples / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert [(line["seed"], line["noise_index"]) for line in lines] == [(0, 0), (0, 1), (0, 2)]
    for line in lines:
        info = probe(samples / line["file"])
        assert (info.num_frames, info.height, info.width, info.fps) == (17, 32, 48, 12)
        assert Image.open(samples / f"{line['index']:05d}_sheet.png").width > 3 * 48
    assert (samples / "contact_sheet.png").is_file()
    board = EventAccumulator(str(samples / "tensorboard"))
    board.Reload()
    assert board.Tags()["images"] == ["samples/00000", "samples/00001", "samples/00002"]
    picture = board.Images("samples/00001")[0]
    gif = Image.open(io.BytesIO(picture.encoded_image_string))
    assert (picture.step, picture.height, gif.format, gif.n_frames) == (7, 32, "GIF", 17)


def test_large_videos_are_shrunk_for_tensorboard() -> None:
    frames = np.zeros((3, 544, 992, 3), np.uint8)
    frames[:, :, 496:] = 200
    small = shrunk(frames, 384)
    assert small.shape == (3, 211, 384, 3)
    assert (small[:, :, :180] == 0).all()
    assert (small[:, :, 200:] == 200).all()
    assert shrunk(small, 384) is small


def test_prompts_and_seeds_make_different_videos(models: Path, samples: Path) -> None:
    first, second, third = _sheets(samples)
    _assert_different(first, second)
    _assert_different(second, third)
    (models / "one_noise.jsonl").write_text("".join(json.dumps({"prompt": p, "seed": 4}) + "\n" for p in PROMPTS))
    arguments = _command(models, models / "one_noise")
    arguments[arguments.index("--prompts") + 1] = str(models / "one_noise.jsonl")
    main(arguments)
    a, b, _ = _sheets(models / "one_noise")
    _assert_different(a, b)  # by the text alone


def test_batch_size_does_not_change_the_samples(models: Path, samples: Path) -> None:
    main(_command(models, models / "batched", "--batch-size", "3"))
    _assert_same_samples(samples, models / "batched")


# The default suite does it on ranks that are there already: tests/distributed/test_sample_ranks.py.
@pytest.mark.heavy
@pytest.mark.distributed
def test_launched_ranks_do_not_change_the_samples(models: Path, samples: Path, tmp_path: Path) -> None:
    """Two replicas of two tensor-parallel ranks, which share three prompts."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    layout = ["--tensor-parallel-size", "2", "--sequence-parallel"]
    command = [*torchrun, "-m", "training.sample", *_command(models, tmp_path / "out", *layout)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)
    _assert_same_samples(samples, tmp_path / "out")


def test_a_second_run_makes_only_what_is_missing(models: Path, tmp_path: Path, samples: Path) -> None:
    arguments = _command(models, tmp_path / "out", "--batch-size", "2")
    main([*arguments, "--limit", "2"])
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.mp4")}
    assert len(times) == 2
    next(iter(times)).unlink()
    main(arguments)
    kept = [path for path, before in times.items() if path.stat().st_mtime_ns == before]
    assert len(kept) == 1
    # Made in other batches, and in two runs, they are the samples of one run.
    _assert_same_samples(samples, tmp_path / "out")
    main([*arguments, "--limit", "1"])
    assert len(json.loads((tmp_path / "out" / "settings.json").read_text())["prompts"]) == 3


def test_a_latent_without_its_video_is_decoded_and_not_sampled_again(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = _command(models, out, "--latents", "--json")
    main(arguments)
    latents = {path: path.stat().st_mtime_ns for path in out.glob("*.latent.safetensors")}
    assert len(latents) == 3
    before = (out / "00001.mp4").read_bytes()
    # As a run leaves it that is killed between sampling and decoding; the third has nothing at all.
    for name in ("00001.mp4", "00002.mp4", "00002.latent.safetensors"):
        (out / name).unlink()
    capsys.readouterr()
    main(arguments)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["made"], report["kept"], report["from_kept_latents"]) == (2, 1, 1)
    changed = [path.name for path, time in latents.items() if path.stat().st_mtime_ns != time]
    assert changed == ["00002.latent.safetensors"]
    assert (out / "00001.mp4").read_bytes() == before


def test_what_a_prompt_file_says_is_in_the_listing(models: Path, tmp_path: Path) -> None:
    table = f"prompt,seed,category,by\n{PROMPTS[0]},3,Sports,me\n{PROMPTS[1]},,,\n"
    (tmp_path / "p.csv").write_text(table)
    arguments = _command(models, tmp_path / "out", "--frames", "1")
    arguments[arguments.index("--prompts") + 1] = str(tmp_path / "p.csv")
    main(arguments)
    first, second = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert (first["category"], first["by"], first["seed"]) == ("Sports", "me", 3)
    assert "category" not in second
    # Categories change no sample, so others may be given.
    (tmp_path / "p.csv").write_text(table.replace("Sports", "Food"))
    main(arguments)
    assert json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[0])["category"] == "Food"


def test_other_settings_prompts_or_models_are_refused_by_name(models: Path, samples: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"steps: 3 there, 4 now"):
        main(_command(models, samples, "--steps", "4"))
    with pytest.raises(UserError, match=r"other prompts \(number 0"):
        main(_command(models, samples, "--seed", "1"))
    other = write_tiny_run(tmp_path, seed=1)
    arguments = _command(models, samples)
    arguments[arguments.index("--checkpoint") + 1] = str(other)
    with pytest.raises(UserError, match=r"checkpoint: step_00000007 \w+ there, step_00000007 \w+ now"):
        main(arguments)
    with pytest.raises(UserError, match="was not made by"):
        main(_command(models, models))


def test_encoders_that_the_shards_were_not_made_with_are_refused_unless_asked_for(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prints = {"vae": vae_fingerprint(models / "vae"), "text": text_fingerprint(*text_folders(models / "text"))}

    def run(name: str, *more: str, **encoders: str) -> None:
        arguments = _command(models, tmp_path / name, "--frames", "1", "--limit", "1", *more)
        run_folder = write_tiny_run(tmp_path / f"{name}_model", encoders=encoders)
        arguments[arguments.index("--checkpoint") + 1] = str(run_folder)
        main(arguments)

    run("same", **prints)
    assert "not compared" not in capsys.readouterr().err
    with pytest.raises(UserError, match=rf"--vae .*\(fingerprint {prints['vae']}\) is not the Video-VAE .*\(other\)"):
        run("vae", **prints | {"vae": "other"})
    with pytest.raises(UserError, match=r"--text .*text \(fingerprint .*\) is not the pair of text encoders"):
        run("text", **prints | {"text": "other"})
    run("asked", "--other-encoders", **prints | {"vae": "other"})
    run("unknown")
    assert "does not say which encoders it was trained with; they were not compared" in capsys.readouterr().err


def test_an_older_checkpoint_is_compared_with_the_shards_of_its_configuration(tmp_path: Path) -> None:
    write_tiny_shards(tmp_path / "shards")
    run = write_tiny_run(tmp_path)
    checkpoint = next((run / "checkpoints").glob("step_*"))
    config = (checkpoint / "config.yaml").read_text()
    assert trained_encoders(checkpoint) == {}
    (checkpoint / "config.yaml").write_text(config.replace("- none", f"- {tmp_path / 'shards'}"))
    assert trained_encoders(checkpoint) == {"vae": "vae", "text": "text"}


def test_images_and_runs_without_guidance(models: Path, tmp_path: Path) -> None:
    arguments = _command(models, tmp_path / "out", "--frames", "1", "--guidance", "1", "--limit", "1")
    main(arguments)
    assert read_frames(tmp_path / "out" / "00000.png").shape == (1, 32, 48, 3)


def test_negative_prompt_counts(models: Path, samples: Path, tmp_path: Path) -> None:
    main(_command(models, tmp_path / "out", "--negative-prompt", "a blue square moves up"))
    _assert_different(_sheets(samples)[0], _sheets(tmp_path / "out")[0])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--frames", "16", "frames=16"),
        ("--height", "40", "height=40"),
        ("--guidance", "nan", "guidance=nan"),
        ("--steps", "0", "steps=0"),
        ("--batch-size", "0", "--batch-size 0"),
        ("--tensor-parallel-size", "3", "nearest that work: --tensor-parallel-size 1"),
        ("--vae", "/nowhere", "--vae /nowhere"),
        ("--text", "/nowhere", "/nowhere holds no text encoders"),
        ("--checkpoint", "/nowhere", "/nowhere is not a folder"),
        ("--prompts", "/nowhere", "--prompts /nowhere"),
    ],
)
def test_bad_arguments_are_refused_by_name(models: Path, tmp_path: Path, option: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([*_command(models, tmp_path / "out"), option, value])


def test_wrong_vae_or_encoders_are_refused(models: Path, tmp_path: Path) -> None:
    from megatron_video.vae import VAEConfig, VideoVAE, save_vae

    ones = (1, 1, 1, 1)
    config = VAEConfig(latent_channels=2, encoder_multipliers=ones, decoder_channels=32, decoder_multipliers=ones)
    save_vae(VideoVAE(config), tmp_path / "vae")
    with pytest.raises(UserError, match=r"latent_channels=2, the model of .* out_channels=4"):
        main([*_command(models, tmp_path / "out"), "--vae", str(tmp_path / "vae")])
    from training.build_text_encoders import main as build

    build(["build", "--captions", str(models / "captions.txt"), "--out", str(tmp_path / "text"), "llm_hidden_size=32"])
    with pytest.raises(UserError, match=r"width 32 .* caption_channels=\[64, 48\]"):
        main([*_command(models, tmp_path / "out2"), "--text", str(tmp_path / "text")])


def test_pixels_are_rounded_and_clamped() -> None:
    video = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).view(1, 1, 2, 3).expand(2, 3, 2, 3)
    pixels = to_pixels(video)
    assert pixels.shape == (2, 2, 3, 3)
    assert pixels[0, :, :, 0].flatten().tolist() == [0, 0, 128, 255, 255, 255]


def test_gif_keeps_every_frame() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 16, 24, 3), dtype=np.uint8)
    gif = Image.open(io.BytesIO(animated_gif(frames, 10)))
    assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (5, (24, 16), 100, 0)
