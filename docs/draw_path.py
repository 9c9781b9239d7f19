"""Draws docs/path.png, the picture of the path in README.md: python docs/draw_path.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

# folder -> colour of its boxes; what is written to disk is grey
COLOURS = {
    "data_prep": "#cfe8d5",
    "training": "#cfdcf4",
    "checkpoints_tools": "#f6dfc0",
    "files": "#ededed",
}
# name -> (x, y, width, height, folder, title, second line)
BOXES: dict[str, tuple[float, float, float, float, str, str, str]] = {
    "raw": (0, 4.4, 2.3, 1, "files", "raw videos, captions", "any folder or listing"),
    "stages": (3, 4.4, 3.0, 1, "data_prep", "ingest, segment, tag, filter", "megatron-video data ..."),
    "manifest": (6.7, 4.4, 2.3, 1, "files", "manifest", "Parquet, a row a clip"),
    "vae": (9.7, 5.7, 2.6, 1, "training", "train the Video-VAE", "megatron-video vae train"),
    "text": (9.7, 4.4, 2.6, 1, "training", "build text encoders", "megatron-video text build"),
    "encode": (9.7, 2.6, 2.6, 1, "data_prep", "encode, verify", "megatron-video data ..."),
    "shards": (6.7, 2.6, 2.3, 1, "files", "shards", "webdataset tars + index"),
    "pretrain": (3, 2.6, 3.0, 1, "training", "pretrain the DiT", "torchrun -m training.pretrain"),
    "checkpoints": (0, 2.6, 2.3, 1, "files", "checkpoints", "megatron-core, any layout"),
    "convert": (0, 0.8, 2.3, 1, "checkpoints_tools", "convert, compare", "megatron-video ckpt ..."),
    "released": (0, -1.0, 2.3, 1, "files", "released weights", "Hugging Face names"),
    "sample": (3, 0.8, 3.0, 1, "training", "sample", "megatron-video sample"),
    "videos": (6.7, 0.8, 2.3, 1, "files", "mp4, contact sheets", "TensorBoard"),
    "measure": (9.7, 0.8, 2.6, 1, "training", "measure", "megatron-video measure"),
}
# from, to, sides (l, r, t, b) of the two boxes
ARROWS = [
    ("raw", "stages", "rl"),
    ("stages", "manifest", "rl"),
    ("manifest", "vae", "rl"),
    ("manifest", "text", "rl"),
    ("manifest", "encode", "rl"),
    ("encode", "shards", "lr"),
    ("shards", "pretrain", "lr"),
    ("pretrain", "checkpoints", "lr"),
    ("checkpoints", "convert", "bt"),
    ("convert", "checkpoints", "tb"),
    ("convert", "released", "bt"),
    ("released", "convert", "tb"),
    ("checkpoints", "sample", "rl"),
    ("sample", "videos", "rl"),
    ("videos", "measure", "rl"),
]


def main() -> None:
    """Write the picture beside this file."""
    figure = Figure(figsize=(12.6, 7.6), dpi=110)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(-0.3, 13.6), ylim=(-1.3, 7.1))
    axes.axis("off")
    for box in BOXES.values():
        draw_box(axes, *box)
    for source, target, sides in ARROWS:
        axes.annotate("", side(target, sides[1]), side(source, sides[0]), arrowprops={"arrowstyle": "-|>", "lw": 1.4})
    draw_weights_line(axes)
    draw_legend(axes)
    figure.savefig(Path(__file__).with_name("path.png"))


def draw_box(axes: Axes, x: float, y: float, width: float, height: float, folder: str, title: str, line: str) -> None:
    """One box with two lines of text."""
    style = "round,pad=0,rounding_size=0.12" if folder != "files" else "square,pad=0"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=COLOURS[folder], edgecolor="#444"))
    axes.text(x + width / 2, y + 0.64, title, ha="center", va="center", fontsize=10.5, weight="bold")
    axes.text(x + width / 2, y + 0.29, line, ha="center", va="center", fontsize=8.5, color="#333")


def side(name: str, letter: str) -> tuple[float, float]:
    """Middle of one side of a box."""
    x, y, width, height, *_ = BOXES[name]
    middle = {"l": (x, y + height / 2), "r": (x + width, y + height / 2)}
    return {**middle, "t": (x + width / 2, y + height), "b": (x + width / 2, y)}[letter]


def draw_weights_line(axes: Axes) -> None:
    """The VAE and the text encoders are used by encode and by sample: one line down the right margin."""
    right, line = 12.3, {"color": "#4a6fb5", "lw": 1.4}
    for name in ("vae", "text"):
        _, y = side(name, "r")
        axes.plot([right, 13.1], [y, y], **line)
    axes.plot([13.1, 13.1], [side("vae", "r")[1], 0.2], **line)
    axes.annotate("", side("encode", "r"), (13.1, side("encode", "r")[1]), arrowprops={"arrowstyle": "-|>", **line})
    x, _ = side("sample", "b")
    axes.plot([13.1, x], [0.2, 0.2], **line)
    axes.annotate("", side("sample", "b"), (x, 0.2), arrowprops={"arrowstyle": "-|>", **line})
    axes.text(9.2, 0.02, "the same VAE and text encoders", ha="center", va="top", fontsize=8.5, color="#4a6fb5")


def draw_legend(axes: Axes) -> None:
    """Which colour is which folder."""
    titles = {"data_prep": "data_prep/", "training": "training/", "checkpoints_tools": "checkpoints_tools/"}
    for number, (folder, title) in enumerate({**titles, "files": "files on disk"}.items()):
        x = 3.0 + 2.3 * number
        axes.add_patch(
            FancyBboxPatch((x, -0.95), 0.3, 0.3, boxstyle="square,pad=0", facecolor=COLOURS[folder], edgecolor="#444")
        )
        axes.text(x + 0.42, -0.8, title, va="center", fontsize=9)
    axes.text(3.0, -1.2, "all of it is built on the library in megatron_video/", fontsize=9, color="#333")


if __name__ == "__main__":
    main()
