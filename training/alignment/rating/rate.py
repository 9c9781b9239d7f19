"""`megatron-video dpo rate`: a local web page on which a person compares generated videos, two at a time.

Keys: left or right arrow for the better one, down for a tie, S for both bad or cannot say, R plays both again, Space
stops them, U takes the last vote back. Sides are random, and nothing tells which model made a video. Every vote is on
the disk before the next pair is shown; the same command goes on where the rater stopped. Several raters, each with a
server of their own, may share --out.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import waitress

from megatron_video.cli import run_command
from megatron_video.errors import UserError
from training.alignment.generated import read_generated
from training.alignment.rating.plan import AskedPair, make_plan, pairs_between, pairs_within, tellable
from training.alignment.rating.server import RatingServer, bind
from training.alignment.rating.session import Session, check_rater
from training.alignment.rating.votes import VoteFile

_THREADS = 8


def main(argv: Sequence[str]) -> int:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: nothing to compare, a file that cannot be written, or a port that is taken.
    """
    arguments = _parse(argv)
    _check(arguments)
    rater = check_rater(arguments.rater)
    pairs, equal = tellable(_pairs(arguments))
    if not pairs:
        way_out = "the two folders hold the same files" if arguments.against else "generate with --seeds 2"
        raise UserError(f"--samples {arguments.samples}: no two different videos to compare; {way_out}")
    session = Session(make_plan(pairs, rater, arguments.seed, arguments.repeat), VoteFile(arguments.out), rater)
    listening = bind(arguments.host, arguments.port)
    token = secrets.token_urlsafe(16)
    server = waitress.create_server(
        RatingServer(session, token, arguments.host), sockets=[listening], threads=_THREADS, ident=None
    )
    url = f"http://{_in_url(arguments.host)}:{listening.getsockname()[1]}/{token}/"
    _tell(session, url, len(pairs), equal, arguments)
    if arguments.open:
        webbrowser.open(url)
    server.run()  # until Ctrl-C
    print(f"\n{arguments.out}: {len(session.answers())} of {len(session.plan)} rated by {rater}", file=sys.stderr)
    return 0


def _pairs(arguments: argparse.Namespace) -> list[AskedPair]:
    generated = read_generated(arguments.samples)
    if arguments.against:
        found = pairs_between(generated, read_generated(arguments.against))
    else:
        found = pairs_within(generated, arguments.pairs_per_prompt, arguments.seed)
    # A random part that is the same for all raters, so that they agree or disagree on something.
    found.sort(key=lambda pair: pair.draw(arguments.seed, "part"))
    return found[: arguments.pairs]


def _tell(session: Session, url: str, pairs: int, equal: int, arguments: argparse.Namespace) -> None:
    done = len(session.answers())
    if arguments.json:
        report = {"url": url, "pairs": pairs, "questions": len(session.plan), "done": done, "equal": equal}
        print(json.dumps(report), flush=True)
        return
    print(f"{pairs} pairs, {len(session.plan) - pairs} of them twice; {done} rated by {session.rater} already")
    if equal:
        print(f"{equal} pairs of equal files are left out")
    if others := session.others():
        print(f"{arguments.out} has {others} votes of other raters or on other pairs besides")
    print(f"open {url}\nCtrl-C ends; the same command goes on", flush=True)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _check(arguments: argparse.Namespace) -> None:
    if arguments.pairs_per_prompt < 1:
        raise UserError(f"--pairs-per-prompt {arguments.pairs_per_prompt} must be at least 1")
    if arguments.pairs is not None and arguments.pairs < 1:
        raise UserError(f"--pairs {arguments.pairs} must be at least 1")
    if not 0 <= arguments.repeat <= 0.5:
        raise UserError(f"--repeat {arguments.repeat} must be between 0 and 0.5")
    if not 0 <= arguments.port < 65536:
        raise UserError(f"--port {arguments.port} must be between 0 and 65535")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video dpo rate", description=__doc__)
    add = parser.add_argument
    add("--samples", type=Path, required=True, help="folder of `megatron-video dpo generate`")
    add("--against", type=Path, help="the same prompts and seeds by another model: each pair has one video of both")
    add("--out", type=Path, required=True, help=".jsonl file that votes are added to; see also --rater")
    add("--rater", required=True, help="who rates; votes of several raters may be in one file")
    add("--pairs-per-prompt", type=int, default=4, help="at most, without --against (default: %(default)s)")
    add("--pairs", type=int, help="at most, over all prompts: a random part, the same for all raters")
    add("--repeat", type=float, default=0.05, help="share of pairs that is shown twice (default: %(default)s)")
    add("--seed", type=int, default=0, help="which pairs, in which order, on which side (default: %(default)s)")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: this machine alone; from another one: ssh -L 8765:127.0.0.1:8765 HERE)",
    )
    add("--port", type=int, default=8765, help="0: any free one (default: %(default)s)")
    add("--open", action="store_true", help="open the page in the browser of this machine")
    add("--json", action="store_true", help="print address and number of pairs as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
