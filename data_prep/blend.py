"""`megatron-video data blend`: write a YAML file of shard folders and their weights, or check one.

Writing: --in FOLDER=WEIGHT ... --out BLEND.yaml. Checking: --check BLEND.yaml, which prints the shares, how often a
sample of each folder comes for one pass over the whole, and the folders as `data.shards`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_video.blend import Blend, read_blend, write_blend
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.shards import read_info


def main(argv: Sequence[str]) -> int:
    """Command line of the command."""
    parser = argparse.ArgumentParser(prog="megatron-video data blend", description=__doc__)
    parser.add_argument("--in", dest="sources", nargs="+", metavar="FOLDER=WEIGHT", help="folders of shards")
    parser.add_argument("--out", type=Path, help="YAML file to write")
    parser.add_argument("--check", type=Path, metavar="BLEND", help="YAML file to check instead")
    parser.add_argument("--json", action="store_true", help="print the blend as JSON")
    arguments = parser.parse_args(argv)
    if (arguments.check is None) == (arguments.sources is None) or (arguments.sources and arguments.out is None):
        raise UserError("give either --in FOLDER=WEIGHT ... --out BLEND.yaml, or --check BLEND.yaml")
    if arguments.sources:
        folders, weights = zip(*map(parse_source, arguments.sources), strict=True)
        write_blend(arguments.out, folders, weights)
    path = arguments.check or arguments.out
    blend, found = read_blend(path)
    _print(path, describe(blend, found), arguments.json)
    return 0


def parse_source(text: str) -> tuple[Path, float]:
    """Read "FOLDER=WEIGHT"; the weight stands behind the last "=".

    Raises:
        UserError: another form.
    """
    folder, _, weight = text.rpartition("=")
    try:
        return Path(folder or "missing"), float(weight if folder else "missing")
    except ValueError:
        raise UserError(f"--in {text!r} is not FOLDER=WEIGHT, such as shards/films=0.7") from None


def describe(blend: Blend, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """For every source: folder, share, samples, and how often each comes while as many are drawn as there are."""
    counts = [read_info(folder).samples for folder in folders]
    return [
        {
            "shards": str(folder),
            "share": round(share, 6),
            "samples": count,
            "passes": round(share * sum(counts) / count, 4) if count else None,
        }
        for folder, share, count in zip(folders, blend.shares, counts, strict=True)
    ]


def _print(path: Path, sources: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"blend": str(path), "sources": list(sources)}, ensure_ascii=False))
        return
    print(f"blend: {path}\n{'share':>9}{'samples':>10}{'passes':>9}  shards")
    for source in sources:
        passes = "-" if source["passes"] is None else f"{source['passes']:.2f}"
        print(f"{source['share']:>9.4f}{source['samples']:>10}{passes:>9}  {source['shards']}")
    print(f"for training without weights: data.shards=[{','.join(source['shards'] for source in sources)}]")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
