"""Writes pages of docs/checkpoints from commands that are really run: inspect.md and refusals.md.

    python docs/checkpoint_pages.py refusals
    python docs/checkpoint_pages.py inspect --shards FOLDER [--work FOLDER]

`inspect` trains for some steps on two ranks (a minute on two cores) on shards such as the demo's, runs/demo/shards,
and looks at what that run saved. `refusals` runs every command of tests/ckpt_refusals.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "unit")]

from ckpt_refusals import REFUSALS, make_inputs, run_refusal  # noqa: E402

from training.layout_matrix.report import markdown_table  # noqa: E402

FOLDER = ROOT / "docs" / "checkpoints"
TRAINING = (
    "torchrun --standalone --nproc-per-node 2 -m training.pretrain --config demo run.output_dir=run "
    "data.shards=[shards] ema.decay=0.99 training.steps=60 training.save_every=20 optimizer.warmup_steps=5"
)
# (what it shows, command, lines that are kept: None is all)
INSPECTIONS = (
    ("The run", "inspect run", None),
    ("One checkpoint", "inspect run/checkpoints/step_00000060", None),
    (
        "The figures of some of its tensors",
        "inspect run --stats --sort norm --filter 'layers.0.*' --filter 'ema.layers.0.mlp*' --filter '*_sq.head*'",
        "tensor ",
    ),
    ("Where its tensors lie", "inspect run --tensors --part averages --filter 'ema.layers.0.*'", "tensor "),
    ("Is it whole?", "verify run", None),
    ("Is it the model of the 30B's configuration?", "verify run --quick --config step_video_30b_sft", None),
    (
        "What twenty steps changed, weights and optimizer",
        "diff run/checkpoints/step_00000040 run/checkpoints/step_00000060 --optimizer",
        None,
    ),
    (
        "How far the average is from the weights it follows",
        "diff run averages --tolerance 0.5 --filter '*.weight'",
        None,
    ),
)
SHOWN_LINES = 76
SHOWN_FAULTS = 6
# Of reports of differences: lines before the numbers.
HEADERS = ("first:", "second:", "---", "module ", "tensor ")


def main() -> None:
    """Write one of the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=["inspect", "refusals"])
    parser.add_argument("--shards", type=Path, help="encoded samples to train on, for inspect")
    parser.add_argument("--work", type=Path, help="an empty folder (default: a temporary one, removed afterwards)")
    arguments = parser.parse_args()
    if arguments.page == "inspect" and arguments.shards is None:
        parser.error("inspect needs --shards")
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        text = refusals(work) if arguments.page == "refusals" else inspections(work, arguments.shards.absolute())
    FOLDER.mkdir(exist_ok=True)
    page = FOLDER / f"{arguments.page}.md"
    page.write_text(text, encoding="utf-8")
    print(f"-> {page}")


def refusals(work: Path) -> str:
    """A table of every command of every group."""
    make_inputs(work)
    os.chdir(work)
    count = sum(map(len, REFUSALS.values()))
    parts = [
        "# What the checkpoint commands refuse",
        "Written by `python docs/checkpoint_pages.py refusals`: every command was run, on small inputs that "
        "`tests/ckpt_refusals.py` makes, and this is what it said. Exit code 2 is bad input, and nothing is written; 1 "
        "is what `diff` and `verify` find. The same table is a test.",
    ]
    written = 0
    for group, members in REFUSALS.items():
        rows = []
        for refusal in members:
            code, message = run_refusal(refusal)
            as_expected = code == refusal.code and refusal.says in message and not Path("out").exists()
            written += as_expected
            rows.append(
                [f"`{refusal.command}`", str(code), _one_line(message.replace(f"{work}/", "").replace(str(work), "."))]
            )
            print(f"{'ok' if as_expected else 'OTHER THAN EXPECTED'}  {refusal.command}", flush=True)
        parts += [f"## {group}", markdown_table(["`megatron-video ckpt ...`", "exit code", "message"], rows)]
    parts.append(f"{written} of {count} commands said what the table in `tests/ckpt_refusals.py` expects.")
    return "\n\n".join(parts) + "\n"


def _one_line(message: str) -> str:
    # Tables of differences have many lines; the others are one, after lines on progress.
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.startswith(HEADERS)]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    shown = told or " / ".join(lines[:SHOWN_FAULTS]) + (" / ..." if len(lines) > SHOWN_FAULTS else "")
    return shown.replace("<", "&lt;").replace("*", r"\*")


def inspections(work: Path, shards: Path) -> str:
    """A page of commands and what they print about a run that is trained here."""
    (work / "shards").symlink_to(shards)
    _run(shlex.split(TRAINING), work)
    _run(_ckpt("average run/checkpoints/step_00000040 run/checkpoints/step_00000060 --ema --out averages"), work)
    parts = [
        "# Looking at checkpoints",
        "Written by `python docs/checkpoint_pages.py inspect --shards runs/demo/shards`. The run is that of the demo's "
        "preset, cut short, on two tensor-parallel ranks over gloo, with averages:",
        f"    {TRAINING}",
        "`averages` is the mean of the averages in its last two checkpoints, by `ckpt average --ema`.",
    ]
    for title, command, first in INSPECTIONS:
        code, text = _run(_ckpt(command), work, (0, 1))
        lines = text.splitlines()
        start = next((i for i, line in enumerate(lines) if first and line.startswith(first)), 0)
        shown = lines[start : start + SHOWN_LINES]
        more = [f"... {len(lines) - start - len(shown)} more lines"] if start + len(shown) < len(lines) else []
        block = "\n".join([f"$ megatron-video ckpt {command}", *(["..."] if start else []), *shown, *more])
        parts += [f"## {title}", f"```\n{block}\n```", f"Exit code {code}."]
    return "\n\n".join(parts) + "\n"


def _ckpt(command: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "megatron_video", "ckpt", *shlex.split(command)]


def _run(command: list[str], work: Path, codes: tuple[int, ...] = (0,)) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        raise SystemExit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr}")
    print(f"{done.returncode}  {shlex.join(command)}", flush=True)
    return done.returncode, done.stdout


if __name__ == "__main__":
    main()
