"""Video-VAE: the released names and sizes, refusals, causality, chunking, and files, against facts from outside."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_video.errors import UserError
from megatron_video.vae import VAEConfig, VideoVAE, load_vae, primitives, sample_posterior, save_vae
from megatron_video.vae.config import num_latent_frames

KEYS_FILE = Path(__file__).parent.parent / "golden" / "vae_v2_keys.tsv"
# md5 over the sorted names and "name:shape" entries of the released file, by which other projects recognise it.
RELEASED_MD5 = "68beaf8429b7c11aa8ca05b1bd0058bd"
TINY = VAEConfig(
    latent_channels=2,
    num_res_blocks=1,
    encoder_multipliers=(1, 1, 1, 1),
    decoder_channels=32,
    decoder_multipliers=(1, 1, 1, 1),
)


@pytest.fixture(scope="module")
def tiny_vae() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(TINY).eval().requires_grad_(False)


def _random_video(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_released_names_shapes_and_parameter_counts() -> None:
    with torch.device("meta"):
        vae = VideoVAE(VAEConfig())
    expected = {
        name: json.loads(shape) for name, shape in (line.split("\t") for line in KEYS_FILE.read_text().splitlines())
    }
    assert {name: list(weight.shape) for name, weight in vae.state_dict().items()} == expected
    assert len(expected) == 262
    assert sum(p.numel() for p in vae.encoder.parameters()) == 109_885_696
    assert sum(p.numel() for p in vae.decoder.parameters()) == 388_933_123


def test_names_and_shapes_have_the_md5_of_the_released_file() -> None:
    with torch.device("meta"):
        weights = VideoVAE(VAEConfig()).state_dict()
    entries = [entry for name, w in weights.items() for entry in (name, f"{name}:{'_'.join(map(str, w.shape))}")]
    assert hashlib.md5(",".join(sorted(entries)).encode()).hexdigest() == RELEASED_MD5


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (4, 1), (9, 2), (12, 2), (17, 3), (26, 5), (34, 6), (204, 36)])
def test_latent_frames(frames: int, latents: int) -> None:
    assert num_latent_frames(frames) == latents


@pytest.mark.parametrize(
    ("frames", "near"), [(0, "1"), (5, "4 or 9"), (8, "4 or 9"), (13, "12 or 17"), (31, "29 or 34")]
)
def test_impossible_frame_counts_name_what_works(tiny_vae: VideoVAE, frames: int, near: str) -> None:
    with pytest.raises(UserError, match=f"{frames} frames .* Nearest that work: {near}$"):
        tiny_vae.encode_moments(torch.zeros(1, frames, 3, 16, 16))


def test_sizes_and_ranks_that_do_not_fit_are_refused(tiny_vae: VideoVAE) -> None:
    with pytest.raises(UserError, match=r"width=40 is not a multiple of 16; nearest that work: 32 or 48"):
        tiny_vae.encode_moments(torch.zeros(1, 1, 3, 32, 40))
    with pytest.raises(UserError, match=r"encodes \[B, T, 3, H, W\]"):
        tiny_vae.encode_moments(torch.zeros(1, 3, 17, 32, 32))
    with pytest.raises(UserError, match=r"decodes \[B, t, 2, h, w\]"):
        tiny_vae.decode(torch.zeros(1, 3, 4, 2, 2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder_channels": 48}, "multiples of 32"),
        ({"decoder_multipliers": (1, 2, 4)}, "4 levels"),
        ({"latent_channels": 48}, "4 \\* latent_channels = 192"),
        ({"chunk_latents": 5}, "gives 3 latents"),
    ],
)
def test_impossible_widths_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig(**values)  # type: ignore[arg-type]


def test_early_latents_do_not_see_later_frames(tiny_vae: VideoVAE) -> None:
    video = _random_video(1, 17, 3, 32, 32)
    changed = video.clone()
    changed[:, 9:] = 0
    first, second = tiny_vae.encode_moments(video), tiny_vae.encode_moments(changed)
    # The first two latents are those of 9 frames alone; the third meets the change.
    torch.testing.assert_close(first[:, :2], second[:, :2])
    torch.testing.assert_close(first[:, :2], tiny_vae.encode_moments(video[:, :9]))
    assert (first[:, 2] - second[:, 2]).abs().max() > 1e-3


def test_chunks_share_nothing_and_only_seam_frames_are_mixed(tiny_vae: VideoVAE) -> None:
    video = _random_video(1, 35, 3, 16, 16)
    moments = tiny_vae.encode_moments(video)
    torch.testing.assert_close(moments[:, 3:6], tiny_vae.encode_moments(video[:, 17:34]))
    latents = moments[:, :, :2]
    plain, mixed = tiny_vae.decode(latents, mix_seams=False), tiny_vae.decode(latents)
    assert plain.shape == mixed.shape == (1, 35, 3, 16, 16)
    differs = (plain - mixed).abs().amax(dim=(0, 2, 3, 4)) > 1e-6
    assert differs.nonzero().flatten().tolist() == [16, 17, 33, 34]
    before, after = plain[:, 16], plain[:, 17]
    torch.testing.assert_close(mixed[:, 17], 0.6 * after + 0.4 * before)
    torch.testing.assert_close(mixed[:, 16], 0.76 * before + 0.24 * after)


def test_posterior_draw_follows_its_equation_and_clamps() -> None:
    moments = torch.tensor([1.0, -2.0, 0.0, 100.0]).reshape(1, 1, 4, 1, 1)
    latents = sample_posterior(moments, torch.full((1, 1, 2, 1, 1), 0.5))
    torch.testing.assert_close(latents.flatten(), torch.tensor([1.5, -2.0 + 0.5 * torch.e**10]))


def test_convolution_in_pieces_and_of_one_frame_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = _random_video(2, 4, 9, 6, 6)
    for stride in (1, 2):
        convolution = primitives.CausalConv3d(4, 8, stride=stride)
        whole, first = convolution(x), convolution(x[:, :, :1])
        torch.testing.assert_close(first, whole[:, :, :1])
        with monkeypatch.context() as patch:
            patch.setattr(primitives, "MAX_CONV_ELEMENTS", x.numel() // 3)
            torch.testing.assert_close(convolution(x), whole)


def test_save_and_load_are_exact(tiny_vae: VideoVAE, tmp_path: Path) -> None:
    save_vae(tiny_vae, tmp_path)
    loaded = load_vae(tmp_path)
    assert loaded.config == tiny_vae.config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    for name, weight in tiny_vae.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert load_vae(tmp_path, dtype=torch.bfloat16).decode(torch.zeros(1, 1, 2, 1, 1)).dtype == torch.bfloat16


def test_released_folder_is_read_by_its_file_name(tiny_vae: VideoVAE, tmp_path: Path) -> None:
    save_vae(tiny_vae, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "vae_v2.safetensors")
    # The released folder also holds the first version's file.
    save_file({"other": torch.zeros(1)}, tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in tiny_vae.state_dict().items())
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="does not fit"):  # the released widths are not these
        load_vae(tmp_path)
    with pytest.raises(UserError, match="no Video-VAE weights at"):
        load_vae(tmp_path / "nowhere")


def test_wrong_files_are_named(tiny_vae: VideoVAE, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_vae(tmp_path)
    save_vae(tiny_vae, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["decoder.conv_out.conv.bias"] = weights.pop("decoder.conv_out.bias")
    weights["encoder.norm_out.bias"] = torch.zeros(7)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_vae(tmp_path)
    for part in ("missing keys: decoder.conv_out.bias", "unknown keys: decoder.conv_out.conv.bias"):
        assert part in str(error.value)
    assert "encoder.norm_out.bias [7], not [32]" in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_vae(tmp_path)
