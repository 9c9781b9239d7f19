"""`megatron-video ckpt prune`: finished checkpoints without their optimizer state, their averages, or both."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoints_tools.core_contents import Entry
from checkpoints_tools.core_rewrite import Rewrite, Rewriting, Selection, add_output_options, write_rewritten
from checkpoints_tools.core_writer import Cut, Cuts
from checkpoints_tools.journal import JOURNAL_FILE, Journal
from checkpoints_tools.verify import checkpoints_of
from checkpoints_tools.wording import bytes_text
from megatron_video.errors import UserError
from megatron_video.files import sync
from training.checkpoint_files import STATE_FILE
from training.checkpoint_folders import find_checkpoint, replace_folder, restore_replaced

RECORD = "prune.json"
# Beside the step's folder until it takes its place; no run looks at folders of this name.
IN_PLACE_SUFFIX = ".pruned"


def prune(
    folder: Path, output: Path | None, selection: Selection, *, verify: bool = True, dry_run: bool = False
) -> Rewriting:
    """Write a checkpoint without some of its tensors, cut as it was.

    Args:
        folder: of one step.
        output: folder to create; None: the result takes the place of `folder`, which is there until then.
        selection: what is kept.
        verify: read it back and compare.
        dry_run: check and count only.

    Raises:
        UserError: the output exists, or the checkpoint is damaged.
    """
    rewrite = Rewrite(folder, selection)
    if not rewrite.dropped_bytes:
        raise UserError(f"{folder} holds nothing of what is to be left out")

    def take_the_place(journal: Journal) -> None:
        journal.complete = True
        (journal.folder / JOURNAL_FILE).unlink()
        for path in journal.folder.iterdir():
            sync(path)
        replace_folder(journal.folder, folder)

    return write_rewritten(
        rewrite,
        output or folder.with_name(folder.name + IN_PLACE_SUFFIX),
        _cuts_as_they_are(rewrite),
        {"command": "prune"},
        RECORD,
        verify=verify,
        dry_run=dry_run,
        publish=Journal.publish if output else take_the_place,
        told_output=output or folder,
    )


def prune_in_place(
    path: Path, selection: Selection, keep_whole: int = 1, *, verify: bool = True, dry_run: bool = False
) -> Iterator[Rewriting]:
    """Prune one checkpoint, or those of a run but for the newest, one after the other; no run may be writing there.

    Checkpoints that hold nothing to be dropped are passed over.

    Args:
        path: step's folder, or a run's.
        selection: what is kept.
        keep_whole: newest checkpoints of a run that stay as they are, so that it can resume from them.
        verify: read each back and compare before it takes the old one's place.
        dry_run: check and count only.

    Raises:
        UserError: one of them is damaged; those before it are done.
    """
    single = (path / STATE_FILE).exists() or path.name.startswith("step_")
    inside = path / "checkpoints"
    if not dry_run:
        # A kill between the two renames of a step leaves it under another name.
        restore_replaced(path.parent if single else inside if inside.is_dir() else path)
    folders = checkpoints_of(path, every=True)
    for folder in folders if single else folders[: max(len(folders) - keep_whole, 0)]:
        found = find_checkpoint(folder)
        if single or Rewrite(found, selection).dropped_bytes:
            yield prune(found, None, selection, verify=verify, dry_run=dry_run)


def _cuts_as_they_are(rewrite: Rewrite) -> Cuts:
    files = {chunk.file for entry in rewrite.contents.entries.values() for chunk in entry.chunks}
    # __10_0 behind __9_0.
    ordered = sorted(files, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    numbers = {name: number for number, name in enumerate(ordered)}

    def cuts_of(entry: Entry) -> list[Cut]:
        return [(chunk.offsets, chunk.sizes, numbers[chunk.file]) for chunk in entry.chunks]

    return rewrite.cuts(cuts_of)


def add_command(commands: Any) -> None:
    """The subcommand `prune`."""
    command = commands.add_parser(
        "prune",
        help="leave the optimizer's state (and EMA) of finished checkpoints out, to save room",
        description="A pruned checkpoint can be sampled from, converted, averaged, and start another run "
        "(run.initial_weights); no run can resume from it. What stays is equal bit for bit and cut as it was.",
    )
    add = command.add_argument
    add("--in", dest="source", type=Path, required=True, metavar="RUN_OR_STEP", help="run or step folder")
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder to create; of a run, its newest checkpoint is taken")
    where.add_argument(
        "--in-place",
        action="store_true",
        help="replace the checkpoint; of a run, all but the newest. Each stays until its smaller one is complete and "
        "verified. No run may be writing there",
    )
    add("--optimizer", action="store_true", help="leave the optimizer's state out (so without any of these two)")
    add("--ema", action="store_true", help="leave the moving averages out")
    add(
        "--keep-whole",
        type=int,
        default=1,
        metavar="N",
        help="with --in-place: newest checkpoints of a run that stay as they are, to resume from (default 1)",
    )
    add_output_options(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.keep_whole < 0:
        raise UserError(f"--keep-whole {arguments.keep_whole}: a number of checkpoints is at least 0")
    optimizer = arguments.optimizer or not arguments.ema
    selection = Selection(optimizer=not optimizer, averages="drop" if arguments.ema else "keep")
    options = {"verify": not arguments.no_verify, "dry_run": arguments.dry_run}
    reports: Iterable[Rewriting]
    if arguments.out:
        reports = [prune(find_checkpoint(arguments.source), arguments.out, selection, **options)]
    else:
        reports = prune_in_place(arguments.source, selection, arguments.keep_whole, **options)
    done = []
    for report in reports:
        done.append(report)
        if not arguments.json:
            print(report, flush=True)
    if arguments.json:
        print(json.dumps([asdict(report) for report in done]))
    elif not done:
        print("nothing to prune: all but the newest checkpoints are pruned already, or there are none")
    elif len(done) > 1:
        total = sum(report.dropped_bytes for report in done)
        print(f"{len(done)} checkpoints, {bytes_text(total)} {'saved' if done[0].written else 'would be saved'}")
    return 0
