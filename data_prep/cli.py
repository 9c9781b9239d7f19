"""`megatron-video data STAGE`: a table of stages, each a module with `main(argv)`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from megatron_video.cli import run_command
from megatron_video.errors import UserError

# stage -> (module, one line of help), in the order of a pipeline
STAGES: dict[str, tuple[str, str]] = {
    "make-demo-clips": (
        "data_prep.demo_clips",
        "write a folder of small captioned videos and images to try all this on",
    ),
    "ingest": ("data_prep.ingest", "folder, listing or tars of videos and images -> manifest (probe, hash, captions)"),
    "segment": ("data_prep.segment", "split at cuts and fades, limit lengths; a clip is a span of its file"),
    "tag": ("data_prep.tag", "borders, blur, colour, motion, text, hash; with --models scores of networks"),
    "filter": ("data_prep.filter", "thresholds (YAML) on tags: drops, named subsets, plots of what was removed"),
    "caption": ("data_prep.caption", "short and dense captions from a model, an endpoint or a file; the title"),
    "balance": ("data_prep.balance", "clusters of embeddings, outliers, near-duplicates, sampling weights"),
    "encode": ("data_prep.encode", "Video-VAE moments and text states -> webdataset shards with an index"),
    "verify": ("data_prep.verify", "check every shard against its index, checksums and manifest"),
    "inspect": (
        "data_prep.inspect_shards",
        "statistics of shards, tables and plots; latents decoded to a picture",
    ),
    "merge": ("data_prep.merge", "join folders of shards that were made with the same encoders"),
    "split": ("data_prep.split", "deal samples out over several folders, such as train and test"),
    "reshard": ("data_prep.reshard", "write shards of another size, on demand in another order"),
    "blend": ("data_prep.blend", "write or check a YAML file that names folders of shards and their weights"),
    "run": ("data_prep.run", "a whole pipeline: the stages of a recipe (YAML), or ingest to filter in one go"),
}


def main(argv: Sequence[str]) -> int | None:
    """Dispatch to the stage named first."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] not in STAGES:
        raise UserError(f"unknown stage {argv[0]!r} of `megatron-video data`; stages: {', '.join(STAGES)}")
    # Imported only now: `--help` must not wait for torch and OpenCV.
    code: int | None = importlib.import_module(STAGES[argv[0]][0]).main(argv[1:])
    return code


def _usage() -> str:
    width = max(map(len, STAGES))
    lines = [f"  {name:<{width}}  {help_line}" for name, (_, help_line) in STAGES.items()]
    head = "usage: megatron-video data STAGE ...\n\nEvery stage reads a manifest (Parquet) and writes a new one."
    return "\n".join([head, "", *lines, "", "megatron-video data STAGE --help tells more."])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
