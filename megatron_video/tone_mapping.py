"""HDR pictures as SDR: PQ or HLG light of BT.2020 -> BT.709, with the tone curve of ITU-R BT.2390 (5.4.1, "EETF").

libav's own mapping (its scaler's perceptual intent) is as good, but takes four seconds for each file that is opened;
its `tonemap` filter needs zscale, which PyAV's wheels do not have.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, Literal

import cv2
import numpy as np
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import ColorTrc

Transfer = Literal["pq", "hlg"]
# By their numbers in ITU-T H.273.
HDR_TRANSFERS: dict[int, Transfer] = {int(ColorTrc.SMPTE2084): "pq", int(ColorTrc.ARIB_STD_B67): "hlg"}

# BT.2408: where graphics and paper are white in HDR, which is the white of SDR.
_WHITE_NITS = 203.0
# What most HDR video is graded for, and the nominal peak of HLG; for PQ where the file does not say it.
_PEAK_NITS = 1000.0
_PQ_NITS = 10_000.0
_HLG_GAMMA = 1.2
_DISPLAY_GAMMA = 2.4
_LUMINANCE_2020 = np.array([[0.2627, 0.6780, 0.0593]], np.float32)
# BT.2087: linear BT.2020 -> linear BT.709.
_TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)
_GAIN_STEPS = 8192


class ToneMap:
    """From one kind of HDR to SDR."""

    def __init__(self, transfer: Transfer, peak_nits: float) -> None:
        """Args: peak_nits: brightest light that the video was graded for; what is above becomes white."""
        self._transfer = transfer
        codes = np.linspace(0, 1, 65536)
        self._light = (pq_nits(codes) if transfer == "pq" else hlg_light(codes)).astype(np.float32)
        # By the square root of the light: its dark half has most of the steps.
        nits = np.linspace(0, np.sqrt(_PQ_NITS), _GAIN_STEPS) ** 2
        self._gain = (compressed_nits(nits, peak_nits) / np.maximum(nits, 1e-9) / _WHITE_NITS).astype(np.float32)
        self._gain[0] = self._gain[1]

    def convert(self, codes: np.ndarray) -> np.ndarray:
        """uint16 [H, W, 3], full-range R'G'B' of BT.2020 -> uint8 [H, W, 3], R'G'B' of BT.709."""
        light = self._light[codes]
        if self._transfer == "hlg":
            # BT.2100: the scene's light becomes the display's, by a gamma on the luminance of the whole pixel.
            luminance = np.maximum(cv2.transform(light, _LUMINANCE_2020), 1e-9)
            light *= (_PEAK_NITS * luminance ** (_HLG_GAMMA - 1))[..., None]
        # One factor for the three colours of a pixel keeps its hue.
        brightest = cv2.max(cv2.max(light[..., 0], light[..., 1]), light[..., 2])
        steps = np.sqrt(brightest) * ((_GAIN_STEPS - 1) / np.sqrt(_PQ_NITS))
        light *= self._gain[steps.astype(np.int32)][..., None]
        linear = np.clip(cv2.transform(light, _TO_709), 0, 1)
        return cv2.convertScaleAbs(cv2.pow(linear, 1 / _DISPLAY_GAMMA), alpha=255)


def tone_map_of(frame: VideoFrame) -> ToneMap | None:
    """The mapping that a frame needs; None for SDR."""
    transfer = HDR_TRANSFERS.get(int(frame.color_trc))
    if transfer is None:
        return None
    return _cached(transfer, (_mastering_peak(frame) if transfer == "pq" else None) or _PEAK_NITS)


def pq_nits(codes: np.ndarray) -> np.ndarray:
    """BT.2100 PQ EOTF: 0 to 1 -> cd/m2."""
    power = np.maximum(codes, 0) ** (32 / 2523)
    ratio = np.maximum(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)
    return _PQ_NITS * ratio ** (16384 / 2610)


def pq_codes(nits: np.ndarray | float) -> np.ndarray:
    """Inverse of `pq_nits`."""
    power = (np.maximum(nits, 0) / _PQ_NITS) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg_light(codes: np.ndarray) -> np.ndarray:
    """BT.2100 HLG inverse OETF: 0 to 1 -> light of the scene, 0 to 1."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(codes <= 0.5, codes**2 / 3, (np.exp((codes - c) / a) + b) / 12)


def compressed_nits(nits: np.ndarray, peak_nits: float) -> np.ndarray:
    """BT.2390 EETF from a display of `peak_nits` to one of SDR's white: equal below a knee, a Hermite spline above."""
    whole = pq_codes(peak_nits)
    codes = np.minimum(pq_codes(nits) / whole, 1)
    top = float(min(pq_codes(_WHITE_NITS) / whole, 1))
    knee = 1.5 * top - 0.5
    if knee >= 1:
        return np.minimum(nits, peak_nits)
    t = (np.maximum(codes, knee) - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    return pq_nits(np.where(codes < knee, codes, spline) * whole)


@lru_cache(maxsize=16)
def _cached(transfer: Transfer, peak_nits: float) -> ToneMap:
    return ToneMap(transfer, peak_nits)


def _mastering_peak(frame: VideoFrame) -> float | None:
    """cd/m2 of the display that the video was graded on, where the file says it."""
    entries: list[Any] = list(frame.side_data)
    for entry in entries:
        if entry.type == Type.MASTERING_DISPLAY_METADATA:
            # AVMasteringDisplayMetadata: eight fractions of colours, least and most luminance, two flags.
            numbers = struct.unpack("=22i", bytes(entry))
            top, bottom, has_luminance = numbers[18], numbers[19], numbers[21]
            return top / bottom if has_luminance and bottom and top > 0 else None
    return None
