"""`megatron-video ckpt reshard`: a megatron-core checkpoint cut anew for the ranks of another layout."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints_tools.convert import DTYPES
from checkpoints_tools.core_contents import Entry
from checkpoints_tools.core_layout import CoreLayout
from checkpoints_tools.core_rewrite import Rewrite, Rewriting, Selection, add_output_options, write_rewritten
from checkpoints_tools.core_writer import Cut
from megatron_video.parallel import ParallelConfig
from training.checkpoint import find_checkpoint, read_config

RECORD = "reshard.json"
_DESCRIPTION = """\
Any layout loads any checkpoint of this program as it is: nothing has to be resharded to train, sample or convert.
What this is for is loading time where many ranks read from a slow or distant disk. A stored piece is read as a whole,
however little of it a rank needs; cut for the layout, every rank reads what it needs, from a file of its own and in
the order in which it lies there (what ranks hold alike lies with the first of them). There are fewer and larger files.
Tensors stay equal bit for bit, and a run resumes from the result exactly as from the source.
"""


@dataclass(frozen=True)
class Target:
    """The layout to cut for."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    """Chunks of layers per stage."""
    context: int = 1
    data: int = 1
    """Replicas."""
    zero1: bool = False
    """Replicas and context-parallel ranks share out optimizer state and averages."""

    def parallel(self, overlap_grad_reduce: bool = False) -> ParallelConfig:
        """As a run would be given it; ZeRO-1 cuts large models in other places if gradients are reduced early."""
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual,
            context_parallel_size=self.context,
            # The weights lie alike under every type; this one takes any number of heads.
            cp_comm_type="all_gather",
            use_distributed_optimizer=self.zero1,
            overlap_grad_reduce=overlap_grad_reduce,
        )

    def describe(self) -> dict[str, int | bool]:
        """By the names that people use."""
        sizes = {"tp": self.tensor, "pp": self.pipeline, "vpp": self.virtual or 1, "cp": self.context, "dp": self.data}
        return {**sizes, "zero1": self.zero1}


def reshard(
    source: Path,
    output: Path,
    target: Target,
    selection: Selection | None = None,
    *,
    verify: bool = True,
    dry_run: bool = False,
) -> Rewriting:
    """Write a checkpoint of a run (its newest) or of one step as ranks of another layout would have saved it.

    Raises:
        UserError: no complete checkpoint there, the output exists, the layout cannot work, or see `Selection`.
    """
    folder = find_checkpoint(source)
    rewrite = Rewrite(folder, selection or Selection())
    overlap = bool(read_config(folder).get("parallel", {}).get("overlap_grad_reduce", False))
    layout = CoreLayout(rewrite.dit, target.parallel(overlap), rewrite.model.shapes, target.data)

    def cuts_of(entry: Entry) -> list[Cut]:
        stays_weight = entry.part == "weights" or rewrite.selection.averages == "replace-weights"
        cuts = layout.weight(entry.name) if stays_weight else layout.state(entry.name)
        return [(cut.offsets, cut.sizes, cut.rank) for cut in cuts]

    return write_rewritten(
        rewrite,
        output,
        rewrite.cuts(cuts_of),
        {"command": "reshard", "layout": target.describe()},
        RECORD,
        verify=verify,
        dry_run=dry_run,
        layout=target.describe(),
    )


def add_command(commands: Any) -> None:
    """The subcommand `reshard`."""
    command = commands.add_parser(
        "reshard",
        help="cut a training checkpoint anew for the ranks of another layout, optimizer and EMA included",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--in", dest="source", type=Path, required=True, metavar="RUN_OR_STEP", help="run (its newest) or step folder")
    add("--out", type=Path, required=True, help="folder to create; an existing one is refused")
    add("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks (default 1)")
    add("--pp", type=int, default=1, metavar="N", help="pipeline stages (default 1)")
    add("--vpp", type=int, metavar="N", help="chunks of layers per stage, for the interleaved schedule (default: none)")
    add("--cp", type=int, default=1, metavar="N", help="context-parallel ranks; they hold the same weights (default 1)")
    add("--dp", type=int, default=1, metavar="N", help="replicas; they hold the same weights (default 1)")
    add("--zero1", action="store_true", help="replicas share out optimizer state and EMA (use_distributed_optimizer)")
    add("--drop-optimizer", action="store_true", help="leave the optimizer's state out; no run can resume from that")
    add(
        "--ema",
        choices=("keep", "drop", "replace-weights"),
        default="keep",
        help="the moving averages (default keep); replace-weights: they become the weights, in fp32 unless --dtype",
    )
    add("--dtype", choices=sorted(DTYPES), help="of the weights (default: as they are); state and EMA stay fp32")
    add(
        "--allow-lossy",
        action="append",
        default=[],
        metavar="PATTERN",
        help="weights (our names, as 'layers.*') that --dtype may round; others whose values would change are refused",
    )
    add_output_options(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    target = Target(arguments.tp, arguments.pp, arguments.vpp, arguments.cp, arguments.dp, arguments.zero1)
    dtype = DTYPES.get(arguments.dtype)
    selection = Selection(not arguments.drop_optimizer, arguments.ema, dtype, tuple(arguments.allow_lossy))
    report = reshard(
        arguments.source,
        arguments.out,
        target,
        selection,
        verify=not arguments.no_verify,
        dry_run=arguments.dry_run,
    )
    print(json.dumps(asdict(report)) if arguments.json else report)
    return 0
