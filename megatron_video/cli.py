"""The `megatron-video` command: a table of subcommands, each a module with `main(argv) -> int | None`.

The table holds module names, not imports: `megatron_video` depends on no other folder, and `--help` stays fast.
"""

from __future__ import annotations

import importlib
import os
import select
import sys
from collections.abc import Callable, Sequence

from megatron_video import __version__
from megatron_video.errors import BAD_INPUT_EXIT_CODE, FULL_DISK, UserError

# command -> (module, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("training.demo", "the whole path at small size: raw videos -> trained model -> generated videos"),
    "data": ("data_prep.cli", "raw videos -> manifest -> pre-encoded webdataset shards, stage by stage"),
    "text": ("training.build_text_encoders", "build small text encoders and their tokenizers from captions"),
    "vae": ("training.train_vae", "train the Video-VAE on clips"),
    "pretrain": ("training.pretrain", "train the DiT (under torchrun for several ranks)"),
    "curriculum": ("training.curriculum", "train the DiT in stages, each from the weights of the one before"),
    "dpo": ("training.alignment.command", "Video-DPO: generate, score, pair, train on preferences"),
    "plan": ("training.planner.command", "memory, time, MFU and cost of a run, in one layout or all; FLOPs of samples"),
    "watch": ("training.watch", "how running jobs stand, on a terminal that is kept up to date"),
    "report": ("training.report", "what a run did, with plots: one HTML file, or Markdown"),
    "plot-density": ("training.density_plot", "the density that a configuration draws timesteps from, as a picture"),
    "ckpt": ("checkpoints_tools.cli", "convert, look at, compare, verify, average, reshape checkpoints"),
    "slurm": ("slurm.command", "submit, follow, cancel and resume jobs on a SLURM cluster"),
    "sample": ("training.sample", "prompts -> mp4 videos and contact sheets"),
    "measure": ("training.measure_shapes", "colour and direction of generated shape videos against their prompts"),
    "test-layouts": (
        "training.layout_matrix.command",
        "train a small model in every parallel layout and compare it with one process",
    ),
    "doctor": ("megatron_video.doctor", "what is installed, which backends work, and what to do about what is missing"),
}

# What a shell reports for a process that SIGPIPE ended.
CLOSED_PIPE_EXIT_CODE = 141


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Call a command's `main`; bad input or a full disk becomes one line and exit code 2, Ctrl-C exit code 130.

    Where its output goes into a pipe that is closed before the end, as by `head`, it stops without a word, with 141.
    """
    try:
        code = main(argv) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT_EXIT_CODE
    except BrokenPipeError:
        if not _reader_left():
            raise
        return CLOSED_PIPE_EXIT_CODE
    except OSError as error:
        # Stages that know their folder say more; others must not end with a traceback either.
        if error.errno not in FULL_DISK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; make room and give the same command again", file=sys.stderr)
        return BAD_INPUT_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def _reader_left() -> bool:
    """Whether nobody reads our output any more; what is left of it is then thrown away."""
    # The broken pipe may be another one, such as a worker's.
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    left = any(event & select.POLLERR for _, event in watch.poll(0))
    if left:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def main() -> None:
    """Entry point of the `megatron-video` console script."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if arguments else BAD_INPUT_EXIT_CODE)
    if arguments[0] == "--version":
        print(f"megatron-video {__version__}")
        sys.exit(0)
    if arguments[0] not in COMMANDS:
        print(f"error: unknown command {arguments[0]!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(BAD_INPUT_EXIT_CODE)
    module = importlib.import_module(COMMANDS[arguments[0]][0])
    sys.exit(run_command(module.main, arguments[1:]))


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_line}" for name, (_, help_line) in COMMANDS.items()]
    return "\n".join(
        ["usage: megatron-video COMMAND ...", "", *lines, "", "megatron-video COMMAND --help tells more; --version."]
    )
