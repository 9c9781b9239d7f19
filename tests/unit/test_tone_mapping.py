"""HDR to SDR against figures of the standards, light of known strength, and libav's own conversion."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph

from megatron_video.tone_mapping import ToneMap, compressed_nits, hlg_light, pq_codes, pq_nits
from megatron_video.video_io import read_frames
from megatron_video.video_probe import probe

HEIGHT, WIDTH, PATCH = 32, 256, 32
MASTERED = "hdr10=1:master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L({}0000,1)"
SCALER = "flags=bicubic+accurate_rnd+full_chroma_int+bitexact"
NITS = np.array([0, 0.1, 1, 5, 10, 50, 100, 203, 400, 1000, 4000, 10_000.0])


def write_hdr(path: Path, rgb: np.ndarray, transfer: str, more: str = "") -> Path:
    """Patches of R'G'B' of BT.2020, float [N, 3] from 0 to 1, side by side in a 10-bit HEVC file."""
    red, green, blue = rgb.T
    luma = 0.2627 * red + 0.6780 * green + 0.0593 * blue
    planes = [64 + 876 * luma, 512 + 896 * (blue - luma) / 1.8814, 512 + 896 * (red - luma) / 1.4746]
    frame = av.VideoFrame(PATCH * len(rgb), HEIGHT, "yuv420p10le")
    for plane, values in zip(frame.planes, planes, strict=True):
        row = np.repeat(np.round(values).astype(np.uint16), plane.width // len(rgb))
        padded = np.zeros((plane.height, plane.line_size // 2), np.uint16)
        padded[:, : plane.width] = row
        plane.update(padded.tobytes())
    parameters = f"pools=none:log-level=none:lossless=1:colorprim=bt2020:colormatrix=bt2020nc:transfer={transfer}{more}"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx265", rate=24, options={"x265-params": parameters})
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p10le"
        for number in range(4):
            frame.pts, frame.time_base = number, Fraction(1, 24)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def patches(frame: np.ndarray) -> np.ndarray:
    return frame[HEIGHT // 2, PATCH // 2 :: PATCH].astype(int)


def by_libav(path: Path, intent: str) -> np.ndarray:
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        graph = Graph()
        place = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/24"
        nodes = [graph.add("buffer", f"{place}:colorspace={int(frame.colorspace)}:range={int(frame.color_range)}")]
        nodes += [graph.add("scale", f"{SCALER}:out_transfer=bt709:out_primaries=bt709:intent={intent}")]
        nodes += [graph.add("format", "rgb24"), graph.add("buffersink")]
        graph.link_nodes(*nodes)
        graph.configure()
        graph.vpush(frame)
        return patches(graph.vpull().to_ndarray())


def test_transfer_functions_have_the_values_of_the_standards() -> None:
    # BT.2408, tables 1 and 2: 203 cd/m2 are 58 % in PQ and 75 % in HLG of 1000 cd/m2, whose gamma is 1.2.
    assert pq_codes(np.array([0.0, 100, 203, 1000, 10_000])) == pytest.approx([0, 0.508, 0.581, 0.752, 1], abs=5e-4)
    assert pq_nits(pq_codes(NITS)) == pytest.approx(NITS, rel=1e-6, abs=1e-9)
    assert 1000 * hlg_light(np.array([0.5, 0.75, 1])) ** 1.2 == pytest.approx([50.7, 203, 1000], rel=0.001)


@pytest.mark.parametrize("peak", [400.0, 1000.0, 4000.0, 10_000.0])
def test_the_curve_is_bt2390s(peak: float) -> None:
    nits = np.linspace(0, peak, 500)
    mapped = compressed_nits(nits, peak)
    # In units of the source's PQ range: as it was below the knee, the target's peak at the source's, slope 1 and smooth
    # where they meet.
    top = pq_codes(203) / pq_codes(peak)
    low = nits < pq_nits((1.5 * top - 0.5) * pq_codes(peak))
    assert mapped[low] == pytest.approx(nits[low], rel=1e-6)
    assert mapped[-1] == pytest.approx(203)
    assert (np.diff(mapped) > 0).all()
    assert compressed_nits(np.array([2 * peak]), peak) == pytest.approx(203)


def test_a_display_that_is_no_brighter_than_sdr_needs_no_curve() -> None:
    assert compressed_nits(np.array([10.0, 150, 180]), 150) == pytest.approx([10, 150, 150])


def test_light_below_the_knee_is_as_it_was(tmp_path: Path) -> None:
    # Colours of BT.709's gamut up to 40 cd/m2, by BT.2087 in BT.2020: what comes out is the light that went in.
    light = np.random.default_rng(0).uniform(0.5, 40, (8, 3))
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    path = write_hdr(tmp_path / "hdr.mp4", pq_codes(light @ to_2020.T), "smpte2084", ":" + MASTERED.format(1000))
    ours = patches(read_frames(path, 0, 1)[0])
    assert ours == pytest.approx(255 * (light / 203) ** (1 / 2.4), abs=2)
    # libav's table of colours is coarser in the dark.
    assert np.abs(ours - by_libav(path, "relative_colorimetric")).mean() < 4


@pytest.mark.parametrize(("transfer", "peak"), [("smpte2084", 1000), ("smpte2084", 4000), ("arib-std-b67", 1000)])
def test_greys_run_from_black_to_white(tmp_path: Path, transfer: str, peak: int) -> None:
    codes = np.linspace(0, float(pq_codes(peak)) if transfer == "smpte2084" else 1, 12)
    more = ":" + MASTERED.format(peak) if transfer == "smpte2084" else ""
    path = write_hdr(tmp_path / "hdr.mp4", np.repeat(codes[:, None], 3, axis=1), transfer, more)
    assert probe(path).hdr
    grey = patches(read_frames(path, 0, 1)[0])
    assert np.ptp(grey, axis=1).max() <= 1
    assert grey[0].tolist() == [0] * 3
    assert grey[-1].min() >= 254
    assert (np.diff(grey[:, 1]) > 0).all()


@pytest.mark.heavy
def test_the_curve_is_near_libavs_own(tmp_path: Path) -> None:
    codes = np.repeat(np.linspace(0, float(pq_codes(1000)), 12)[:, None], 3, axis=1)
    path = write_hdr(tmp_path / "hdr.mp4", codes, "smpte2084", ":" + MASTERED.format(1000))
    ours, theirs = patches(read_frames(path, 0, 1)[0]), by_libav(path, "perceptual")
    # Another curve, which darkens the middle more.
    assert np.abs(ours - theirs).max() < 75
    assert np.corrcoef(ours[:, 1], theirs[:, 1])[0, 1] > 0.97


def test_the_mastering_display_decides_and_1000_stands_in_for_it(tmp_path: Path) -> None:
    rgb = np.repeat(pq_codes(np.array([300.0, 900]))[:, None], 3, axis=1)
    bright = write_hdr(tmp_path / "4000.mp4", rgb, "smpte2084", ":" + MASTERED.format(4000))
    usual = write_hdr(tmp_path / "1000.mp4", rgb, "smpte2084", ":" + MASTERED.format(1000))
    silent = write_hdr(tmp_path / "none.mp4", rgb, "smpte2084")
    found = [patches(read_frames(path, 0, 1)[0]) for path in (bright, usual, silent)]
    assert (found[0] < found[1] - 5).all()
    assert np.array_equal(found[1], found[2])


def test_sdr_in_a_10_bit_file_is_not_toned(tmp_path: Path) -> None:
    path = write_hdr(tmp_path / "sdr.mp4", np.array([[0.5] * 3, [1.0] * 3]), "bt2020-10")
    assert patches(read_frames(path, 0, 1)[0])[:, 0].tolist() == pytest.approx([128, 255], abs=1)


def test_saturated_colours_keep_their_hue_and_are_clipped_to_the_gamut() -> None:
    red = np.array([[[float(pq_codes(100)), 0, 0]]])
    picture = ToneMap("pq", 1000).convert(np.round(red * 65535).astype(np.uint16))
    assert picture[0, 0, 0] > 200
    assert picture[0, 0, 1:].tolist() == [0, 0]
