"""Videos of moving shapes drawn for tests, apart from whatever makes the training clips."""

from __future__ import annotations

import cv2
import numpy as np

from training.shape_ruler import DIRECTION_VECTORS

PAINT = {"red": (220, 40, 40), "yellow": (230, 210, 40), "green": (40, 180, 70), "blue": (50, 80, 220)}
OVERSAMPLE = 4


def draw_frame(
    shape: str, colour: np.ndarray, centre: np.ndarray, radius: float, grey: float, size: tuple[int, int]
) -> np.ndarray:
    height, width = size
    image = np.full((height * OVERSAMPLE, width * OVERSAMPLE, 3), grey, np.float32)
    (x, y), r, paint = centre * OVERSAMPLE, radius * OVERSAMPLE, [float(c) for c in colour]
    if shape == "circle":
        cv2.circle(image, (round(x), round(y)), round(r), paint, -1)
    elif shape == "square":
        cv2.rectangle(image, (round(x - r), round(y - r)), (round(x + r), round(y + r)), paint, -1)
    else:
        cv2.fillPoly(image, [np.array([[x, y - r], [x - r, y + r], [x + r, y + r]]).round().astype(int)], paint)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def draw_video(
    rng: np.random.Generator,
    colour: str,
    direction: str,
    size: tuple[int, int] = (48, 48),
    contrast: float = 1.0,
    blur: float = 0.0,
    noise: float = 0.0,
    travel: float = 0.4,
) -> np.ndarray:
    """uint8 [17, H, W, 3]; `travel` is the way in shares of the picture's side, `blur` a sigma in pixels."""
    grey, radius = rng.uniform(20, 235), rng.uniform(0.12, 0.2) * size[0]
    start = np.array([rng.uniform(0.4, 0.6) * size[1], rng.uniform(0.4, 0.6) * size[0]])
    step = np.array(DIRECTION_VECTORS[direction]) * np.array([size[1], size[0]]) * travel
    paint = np.clip(np.array(PAINT[colour]) + rng.integers(-20, 21, 3), 0, 255)
    shape = str(rng.choice(["circle", "square", "triangle"]))
    frames = []
    for time in np.linspace(-0.5, 0.5, 17):
        frame = grey + contrast * (draw_frame(shape, paint, start + time * step, radius, grey, size) - grey)
        frame = cv2.GaussianBlur(frame, (0, 0), blur) if blur else frame
        frames.append(frame + noise * rng.normal(size=frame.shape))
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)
