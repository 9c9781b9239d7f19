"""What a run tells about itself: metrics.jsonl (every step), TensorBoard and console lines (every log_every steps).

The job may be started many times: each start is a life. Lines of all lives stay in metrics.jsonl; when a step was done
again after a crash, it has a line of each life. The identity of each life is in run_info.json.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megatron_video import __version__
from megatron_video.config_io import save_config
from megatron_video.files import appearing
from training.memory_use import MemoryUse, largest_memory_use
from training.time_bins import TIME_BINS, bin_label

if TYPE_CHECKING:
    from training.layer_norms import LayerNorms
    from training.sample_folder import SampleFolder
    from training.validation import ValidationLosses

# Those whose version can change a number.
PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "numpy", "safetensors", "webdataset", "tensorboard")


@dataclass(frozen=True)
class StepMetrics:
    """What one step did; the names are those of metrics.jsonl."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean squared velocity error of the global batch."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    step_seconds: float
    """Wall time from the end of the previous step, without checkpoints."""
    data_seconds: float
    """Of which waiting for the batch."""
    samples: int
    """Of the global batch."""
    tokens: int
    """Video tokens of the global batch."""
    flops: float
    """Forward and backward of the global batch by the cost model; recomputation is not counted."""
    refused: bool
    """Whether the update was refused because the loss or the gradient was not finite."""
    loss_by_time: list[float | None]
    """The loss apart by t, in equal parts of [0, 1); null where no sample of the batch lies."""
    positions_by_time: list[int]
    """Latent positions of the global batch in each part: what the loss is a mean over."""
    rollbacks: int = 0
    """How often the run went back behind a spike so far; the step numbers after each come again."""
    layer_norms: LayerNorms | None = None
    """Sizes of the layers, on the steps that measured them; other lines have no such entry."""
    preference: dict[str, float] | None = None
    """Of runs on preference pairs: means over the global batch of what training/preference_loss.py names."""


class Telemetry:
    """Writes the metrics of one life of a run; does nothing on other ranks than 0.

    Args:
        run_dir: the run's folder; made if it is not there.
        config: the resolved configuration, saved beside the metrics.
        first_step: steps done before this life.
        total_steps: of the whole run.
        log_every: steps between console lines.
        peak_flops: FLOP/s of all devices together, or None to leave MFU out.
        active: whether this rank reports.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Any,
        first_step: int,
        total_steps: int,
        log_every: int,
        peak_flops: float | None,
        active: bool,
    ) -> None:
        self.active, self.total_steps, self.log_every, self.peak_flops = active, total_steps, log_every, peak_flops
        self.run_dir = run_dir
        # Steps since the last console line; its figures are means over them, not the last step's.
        self._window: list[StepMetrics] = []
        if active:
            # Here, as only rank 0 needs it: the import takes a second.
            from torch.utils.tensorboard import SummaryWriter

            run_dir.mkdir(parents=True, exist_ok=True)
            # Whole at any moment: `watch` reads it while the job starts again.
            with appearing(run_dir / "config.yaml") as temporary:
                save_config(config, temporary)
            write_json(run_dir / "status.json", {"state": "running", "step": first_step})
            self.life = record_life(run_dir, first_step)
            self._lines = open_lines(run_dir / "metrics.jsonl")
            # Steps that this life will do again are hidden in TensorBoard; metrics.jsonl keeps them.
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def log_step(self, metrics: StepMetrics) -> None:
        """Record one step; all ranks call it, as those that are shown measure the memory of all of them."""
        is_shown = metrics.step % self.log_every == 0 or metrics.step == self.total_steps
        memory = largest_memory_use() if is_shown else None
        if not self.active:
            return
        line: dict[str, Any] = {**vars(metrics), "life": self.life, "time": time.time()}
        # Seldom there, and then large: a line without them is as short as it can be.
        line["layer_norms"] = None if metrics.layer_norms is None else asdict(metrics.layer_norms)
        line["memory"] = None if memory is None else asdict(memory)
        line = {name: value for name, value in line.items() if value is not None}
        # A line is whole on disk before the next step starts, so a killed job leaves every finished step.
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        self._window.append(metrics)
        if metrics.layer_norms is not None:
            self._board_layers(metrics.layer_norms, metrics.step)
        if memory is not None:
            self._report(memory)

    def log_validation(
        self, step: int, losses: Mapping[str, ValidationLosses], seconds: float, drift: ValidationLosses | None = None
    ) -> None:
        """Show the losses on held-out samples, by the name of the weights; events.jsonl has every figure.

        `drift`: of a run on preference pairs, the distance from its reference.
        """
        if not self.active:
            return
        for weights, found in losses.items():
            self._board.add_scalar(f"validation/{weights}", found.loss, step)
            for number, loss in enumerate(found.by_time, 1):
                self._board.add_scalar(f"validation_by_time_{weights}/quantile_{number:02d}", loss, step)
            for bucket, row in found.by_bucket.items():
                self._board.add_scalar(f"validation_by_bucket_{weights}/{bucket}", sum(row) / len(row), step)
        self._board.flush()
        shown = ", ".join(f"{found.loss:.4f} ({weights} weights)" for weights, found in losses.items())
        if drift is not None:
            self._board.add_scalar("preference/drift", drift.loss, step)
            shown += f", drift from the reference {drift.loss:.6f}"
        self.say(f"step {step}: validation loss {shown} in {seconds:.1f} s")

    def log_samples(self, step: int, folder: SampleFolder, fps: float, seconds: float) -> None:
        """Show sample videos in TensorBoard."""
        if not self.active:
            return
        # Here, as for the board: they take a second to import.
        from megatron_video.video_io import read_frames
        from training.sample_folder import BOARD_PIXELS, shrunk, video_summary

        writer: Any = self._board.file_writer
        for prompt in folder.prompts:
            # As they lie on disk: other ranks made some of them.
            frames = shrunk(read_frames(folder.file(prompt)), BOARD_PIXELS)
            writer.add_summary(video_summary(f"samples/{prompt.index:05d}", frames, fps, prompt.text), step)
        self._board.flush()
        self.say(f"step {step}: {len(folder.prompts)} samples in {folder.path} in {seconds:.1f} s")

    def log_picture(self, name: str, path: Path) -> None:
        """Show a PNG file in TensorBoard, before the first step."""
        if self.active:
            import numpy as np
            from PIL import Image

            picture = np.asarray(Image.open(path).convert("RGB"))
            self._board.add_image(name, picture, global_step=0, dataformats="HWC")

    def say(self, text: str) -> None:
        """One line on the console, with the time."""
        if self.active:
            print(f"[{datetime.now():%H:%M:%S}] {text}", flush=True)

    def close(self, state: str, step: int) -> None:
        """Flush everything and leave the verdict in status.json: launchers do not pass exit codes on."""
        if self.active:
            self.say(f"{state} at step {step}/{self.total_steps}")
            write_json(self.run_dir / "status.json", {"state": state, "step": step})
            self._lines.close()
            self._board.close()

    def _board_layers(self, norms: LayerNorms, step: int) -> None:
        for kind, parts in asdict(norms).items():
            for part, value in parts.items():
                # Zero-padded, so that TensorBoard sorts layer 10 behind layer 9.
                name = f"layers.{int(part.removeprefix('layers.')):03d}" if part.startswith("layers.") else part
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def _report(self, memory: MemoryUse) -> None:
        window, last = self._window, self._window[-1]
        self._window = []
        # Rates are totals over totals: steps of other sizes weigh right.
        seconds = sum(metrics.step_seconds for metrics in window)
        scalars = {
            "loss": sum(metrics.loss for metrics in window) / len(window),
            "grad_norm": last.grad_norm,
            "learning_rate": last.learning_rate,
            "seconds per step": seconds / len(window),
            "data wait share": sum(metrics.data_seconds for metrics in window) / seconds,
            "tokens per second": sum(metrics.tokens for metrics in window) / seconds,
        }
        pairs: dict[str, float] = {}
        if last.preference is not None:
            for name in last.preference:
                values = [metrics.preference[name] for metrics in window if metrics.preference is not None]
                pairs[name] = sum(values) / len(values)
                self._board.add_scalar(f"preference/{name}", pairs[name], last.step)
        if self.peak_flops is not None:
            scalars["MFU"] = sum(metrics.flops for metrics in window) / seconds / self.peak_flops
        for name, value in scalars.items():
            self._board.add_scalar(f"train/{name.replace(' ', '_')}", value, last.step)
        for name, value in asdict(memory).items():
            self._board.add_scalar(f"memory/{name}_GiB", value / 2**30, last.step)
        for index, loss in enumerate(window_loss_by_time(window)):
            if loss is not None:
                self._board.add_scalar(f"loss_by_time/{bin_label(index)}", loss, last.step)
        self.say(self._console_line(last.step, scalars, pairs))

    def _console_line(self, step: int, scalars: dict[str, float], pairs: dict[str, float]) -> str:
        left = timedelta(seconds=round((self.total_steps - step) * scalars["seconds per step"]))
        parts = [
            f"step {step}/{self.total_steps}",
            f"loss {scalars['loss']:.4f}",
            f"grad {scalars['grad_norm']:.3f}",
            f"lr {scalars['learning_rate']:.2e}",
            f"{scalars['seconds per step']:.3f} s/step",
            f"{scalars['tokens per second']:,.0f} tokens/s",
            f"data {scalars['data wait share']:.1%}",
        ]
        if pairs:
            parts.append(f"margin {pairs['reward_margin']:+.4f} accuracy {pairs['reward_accuracy']:.1%}")
        if "MFU" in scalars:
            parts.append(f"MFU {scalars['MFU']:.1%}")
        return " | ".join([*parts, f"left {left}"])


def window_loss_by_time(window: Sequence[StepMetrics]) -> list[float | None]:
    """Mean loss of each part of t over several steps, each latent position counting alike; None without any."""
    means: list[float | None] = []
    for index in range(TIME_BINS):
        pairs = [(step.loss_by_time[index], step.positions_by_time[index]) for step in window]
        count = sum(positions for _, positions in pairs)
        means.append(sum((loss or 0.0) * positions for loss, positions in pairs) / count if count else None)
    return means


def open_lines(path: Path) -> TextIO:
    """Open a file of lines to add to; a line that a kill left torn is ended, so that it does not spoil the next one."""
    lines = path.open("a", encoding="utf-8")
    if path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        lines.write("\n" if torn else "")
    return lines


def record_life(run_dir: Path, first_step: int) -> int:
    """Append this start of the job to run_info.json: code, packages, machine, command.

    Returns:
        The number of this life, from 1.
    """
    path = run_dir / "run_info.json"
    lives: list[dict[str, Any]] = json.loads(path.read_text())["lives"] if path.exists() else []
    lives.append(
        {
            "life": len(lives) + 1,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "first_step": first_step,
            "command": sys.argv,
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
            "host": platform.node(),
            "git_revision": git_revision(),
            "megatron_video": __version__,
            "python": platform.python_version(),
            "packages": package_versions(),
        }
    )
    write_json(path, {"lives": lives})
    return len(lives)


def git_revision() -> str | None:
    """Commit of the code, with `-dirty` when files differ from it; None outside a git checkout."""
    # --dirty: a revision alone would claim to be the code that ran.
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    # An installed package has no checkout; that is not worth ending a run for.
    except (OSError, subprocess.SubprocessError):
        return None


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that decide the numbers; None for what is not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    # A reader never sees half of it.
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(temporary, path)


class Stopwatch:
    """Seconds between calls of `lap`."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the start."""
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return passed
