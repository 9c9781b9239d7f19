"""Which of a clip's captions is trained on, and what a row looks like once its answers are there."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from data_prep.caption_config import KINDS, Answer, Kind, original_title
from data_prep.listing import detect_language
from megatron_video.errors import UserError
from megatron_video.manifest import Row, dropped

_STAGE = "caption"


class _Wanted(Protocol):
    @property
    def kinds(self) -> Sequence[str]: ...
    @property
    def asked(self) -> Sequence[Kind]: ...
    @property
    def chosen_mix(self) -> CaptionMix: ...
    @property
    def on_missing(self) -> str: ...


class CaptionMix:
    """Shares of the kinds, as `dense` or `dense=0.6,short=0.3,title=0.1`; which a clip gets is drawn from its id."""

    def __init__(self, text: str) -> None:
        self.text = text
        pairs = [item.partition("=") for item in text.split(",")]
        try:
            self.shares = {kind.strip(): float(share) if equals else 1.0 for kind, equals, share in pairs}
        except ValueError:
            raise UserError(f"--use {text}: a share is a number, as in dense=0.6,short=0.4") from None
        wrong = [kind for kind in self.shares if kind not in KINDS]
        if wrong or len(self.shares) < len(pairs) or not all(share > 0 for share in self.shares.values()):
            raise UserError(f"--use {text}: each of {', '.join(KINDS)} at most once, with a share above 0")

    def order(self, clip_id: str) -> list[str]:
        """The kind drawn for this clip first, then the others by their shares: the first that it has is taken."""
        digest = hashlib.blake2b(clip_id.encode(), digest_size=8, person=b"caption mix").digest()
        point = int.from_bytes(digest, "big") / 2**64 * sum(self.shares.values())
        drawn = next(iter(self.shares))
        for kind, share in self.shares.items():
            drawn = kind
            point -= share
            if point < 0:
                break
        return [drawn, *sorted((kind for kind in self.shares if kind != drawn), key=lambda kind: -self.shares[kind])]


def captioned(
    row: Row, answers: Mapping[tuple[str, str], Answer], wanted: _Wanted, name: str, counts: Counter[str]
) -> Row:
    """The row with its captions, or dropped; `counts` is added to."""
    if row["dropped_by"]:
        return row
    texts = {kind: answers[row["clip_id"], kind] for kind in wanted.asked}
    row = {**row, **{f"caption_{kind}": answer.text or None for kind, answer in texts.items()}, "caption_model": name}
    if "title" in wanted.kinds:
        row["caption_title"] = original_title(row) or None
    counts["cut at the limit of tokens"] += sum(answer.cut for answer in texts.values())
    problems = [f"{kind}: {answer.problem}" for kind, answer in texts.items() if answer.problem]
    if problems and wanted.on_missing == "drop":
        return dropped(row, _STAGE, f"{_reason(texts.values())}: {'; '.join(problems)}")
    return _with_caption(row, wanted, counts)


def _with_caption(row: Row, wanted: _Wanted, counts: Counter[str]) -> Row:
    has = [kind for kind in wanted.chosen_mix.order(row["clip_id"]) if row[f"caption_{kind}"]]
    if not has:
        counts["kept as it was"] += wanted.on_missing == "keep"
        return row if wanted.on_missing == "keep" else dropped(row, _STAGE, "no caption: it has no title")
    counts[f"caption is {has[0]}"] += 1
    text = row[f"caption_{has[0]}"]
    return {**row, "caption": text, "caption_kind": has[0], "language": detect_language(text)}


def _reason(answers: Iterable[Answer]) -> str:
    return "no answer yet" if any(answer.again for answer in answers) else "no caption"
