"""Captions from an endpoint, against a real server that fails, waits, lies and counts."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caption_server import SLOW_SECONDS, Asked, answer_about, serving
from made_clips import write_clips

from data_prep import caption
from data_prep.caption_config import DEFAULT_PROMPTS, CaptionConfig
from data_prep.caption_endpoint import EndpointCaptioner, EndpointSettings, _retry_after
from data_prep.cli import main
from data_prep.parts import output_lock
from data_prep.stage import StageReport
from data_prep.workers import Shard
from megatron_video.config_io import load_config
from megatron_video.errors import UserError
from megatron_video.manifest import Row, kept_rows, read_manifest

KEY = "sk-not-to-be-seen-123"
# Steps of 30: apart by more than what JPEG and rounding move.
COLOURS = [(30 * n + 30, 210 - 30 * n, 90) for n in range(6)]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of one colour each."""
    flat = [np.full((12, 48, 64, 3), colour, np.uint8) for colour in COLOURS]
    clips = {f"{number}.mp4": (frames, f"title {number}") for number, frames in enumerate(flat)}
    return write_clips(tmp_path_factory.mktemp("clips"), clips)


def asked_of(
    manifest: Path,
    out: Path,
    url: str,
    kinds: str = "short",
    on_missing: str = "drop",
    max_failures: int = 20,
    shard: Shard | None = None,
    **options: Any,
) -> StageReport:
    config = load_config(CaptionConfig, DEFAULT_PROMPTS, ["frames=3"])
    captioner = EndpointCaptioner(EndpointSettings(url, "tiny", **{"timeout": SLOW_SECONDS - 1, **options}), config)
    settings = caption.CaptionSettings(tuple(kinds.split(",")), on_missing=on_missing, max_failures=max_failures)  # type: ignore[arg-type]
    try:
        return caption.run(manifest, out, captioner, settings, config, workers=2, shard=shard)
    finally:
        captioner.close()


def rows_of(path: Path) -> list[Row]:
    rows: list[Row] = read_manifest(path).to_pylist()
    return rows


def choice(content: str | None, reason: str = "stop", **message: Any) -> dict[str, Any]:
    return {"message": {"content": content, **message}, "finish_reason": reason}


def all_bytes(folder: Path) -> Iterable[bytes]:
    return (path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_every_failure_is_tried_again_and_every_caption_is_of_its_clip(manifest: Path, tmp_path: Path) -> None:
    failures = ["500", "ok", "half", "slow", "ok", "short", "429", "ok", "500"]
    with serving(lambda n, _: failures[n - 1] if n <= len(failures) else "ok") as server:
        report = asked_of(manifest, tmp_path / "out.parquet", server.url, "short,dense,title", concurrency=3)
    rows = rows_of(tmp_path / "out.parquet")
    failed = sum(plan != "ok" for plan in failures)
    assert len(server.asked) == 2 * len(COLOURS) + failed
    assert (report.details["requests"], report.details["retries"]) == (len(server.asked), failed)
    assert server.most_at_once <= 3
    for number, row in enumerate(rows):
        # Three frames of this clip, in this kind's words.
        assert row["caption_short"] == f"3 frames of colour {COLOURS[number]}: These"
        assert row["caption_dense"] == row["caption_short"] == row["caption"]
        assert (row["caption_title"], row["caption_kind"], row["language"]) == (f"title {number}", "dense", "en")
        assert row["caption_model"].startswith("endpoint:tiny/")
    titles = {text.rsplit(": ", 1)[1] for text in (a.text for a in server.asked) if "uploader" in text}
    assert titles == {f"title {number}" for number in range(len(COLOURS))}
    assert not list(tmp_path.glob(".*"))


def test_a_server_that_asks_for_a_pause_gets_it(manifest: Path, tmp_path: Path) -> None:
    with serving(lambda n, _: "429" if n == 1 else "ok") as server:
        asked_of(manifest, tmp_path / "out.parquet", server.url, concurrency=1)
    times = [asked.time for asked in server.asked]
    assert 0.4 <= times[1] - times[0] < 1.5
    assert _retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(30, abs=2)
    assert _retry_after({"retry-after": "soon"}) is None


def test_requests_a_minute_are_kept(manifest: Path, tmp_path: Path) -> None:
    with serving(lambda n, _: "500" if n == 2 else "ok") as server:
        asked_of(manifest, tmp_path / "out.parquet", server.url, concurrency=6, requests_per_minute=600)
    times = sorted(asked.time for asked in server.asked)
    assert len(times) == 7
    # 600 a minute are 0.1 s apart; the retry is one of them.
    assert times[-1] - times[0] > 0.55


def test_tries_are_bounded_and_the_next_run_asks_for_the_rest_only(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"

    def plan(_: int, asked: Asked) -> str:
        return "500" if asked.colour in COLOURS[:2] else "ok"

    with serving(plan) as server:
        report = asked_of(manifest, out, server.url, retries=1)
    assert Counter(asked.colour for asked in server.asked) == {c: 2 if c in COLOURS[:2] else 1 for c in COLOURS}
    assert (report.kept, report.reasons) == (4, {"no answer yet": 2})
    assert rows_of(out)[0]["drop_reason"].startswith("no answer yet: short: HTTP 500: ")
    with serving(lambda n, _: "ok") as server:
        report = asked_of(manifest, out, server.url, retries=1)
    assert {asked.colour for asked in server.asked} == set(COLOURS[:2])
    assert (len(server.asked), report.kept, report.up_to_date) == (2, 6, False)
    with serving(lambda n, _: "ok") as server:
        assert asked_of(manifest, out, server.url, retries=1).up_to_date
    assert not server.asked


def test_a_server_that_never_works_stops_the_run(manifest: Path, tmp_path: Path) -> None:
    with serving(lambda n, _: "500") as server, pytest.raises(UserError, match=r"3 clips in a row.*HTTP 500"):
        asked_of(manifest, tmp_path / "out.parquet", server.url, retries=0, max_failures=3)
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(UserError, match=r"2 clips in a row.*ConnectError"):
        asked_of(manifest, tmp_path / "out.parquet", server.url, retries=0, max_failures=2)


def test_the_key_is_sent_and_written_nowhere(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPTION_KEY", KEY)
    out = tmp_path / "out.parquet"
    common = ["caption", "--in", str(manifest), "--out", str(out), "--kinds", "short", "--model", "tiny"]
    with serving(lambda n, _: "500" if n == 1 else "ok") as server:
        assert main([*common, "--endpoint", server.url, "--api-key-env", "CAPTION_KEY", "--json"]) == 0
    assert {asked.authorization for asked in server.asked} == {f"Bearer {KEY}"}
    with serving(lambda n, _: "400" if n == 1 else "401") as server, pytest.raises(UserError) as stopped:
        asked_of(manifest, tmp_path / "other.parquet", server.url, api_key_env="CAPTION_KEY", concurrency=1)
    assert "HTTP 401, the key is refused" in str(stopped.value)
    # The server repeats the key in its message, and the first answer is in the journal.
    assert "***" in str(stopped.value)
    written = [*all_bytes(tmp_path), str(stopped.value).encode(), "".join(capsys.readouterr()).encode()]
    assert any(b"told to fail Bearer ***" in content for content in written)
    assert not any(KEY.encode() in content for content in written)


def test_answers_that_are_no_captions(manifest: Path, tmp_path: Path) -> None:
    long = "很长的描述 " * 2000
    answers = {
        COLOURS[0]: choice("  "),
        COLOURS[1]: choice("I’m sorry, but I can't help with that."),
        COLOURS[2]: choice(None, "content_filter"),
        COLOURS[3]: choice(None, refusal="not allowed"),
        COLOURS[4]: choice(long, "length"),
        COLOURS[5]: "400",
    }
    with serving(lambda _, asked: answers[asked.colour]) as server:
        report = asked_of(manifest, tmp_path / "drop.parquet", server.url)
        kept = asked_of(manifest, tmp_path / "keep.parquet", server.url, on_missing="keep")
    assert len(server.asked) == 2 * len(COLOURS)
    reasons = [row["drop_reason"] for row in rows_of(tmp_path / "drop.parquet")]
    assert reasons[:3] == [
        "no caption: short: empty answer",
        "no caption: short: refused: I’m sorry, but I can't help with that.",
        "no caption: short: refused: content filter",
    ]
    assert reasons[3] == "no caption: short: refused: not allowed"
    assert reasons[5].startswith("no caption: short: HTTP 400: ")
    (whole,) = kept_rows(read_manifest(tmp_path / "drop.parquet"))
    assert (whole["caption_short"], whole["caption"]) == (long.strip(), long.strip())
    assert (report.details["cut at the limit of tokens"], whole["language"]) == (1, "zh")
    rows = rows_of(tmp_path / "keep.parquet")
    assert kept.kept == 6
    assert [row["caption"] for row in rows if not row["caption_short"]] == [f"title {n}" for n in (0, 1, 2, 3, 5)]
    assert [row["caption_kind"] for row in rows] == [None, None, None, None, "short", None]


def test_a_killed_run_asks_for_nothing_twice(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"

    def plan(number: int, _: Asked) -> str:
        # The last two are under way when the kill comes.
        return "ok" if number <= 3 else "slow"

    options = ["--kinds", "short", "--model", "tiny", "--concurrency", "2", "--workers", "1"]
    with serving(plan) as server:
        command = [sys.executable, "-m", "data_prep.cli", "caption", "--in", str(manifest), "--out", str(out)]
        process = subprocess.Popen([*command, "--endpoint", server.url, *options], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while len(server.asked) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        first = [asked.colour for asked in server.asked[:3]]
        before = len(server.asked)
        assert before == 5
        assert not out.exists()
        journal = tmp_path / ".out.parquet.answers.jsonl"
        # A kill may also come in the middle of a line.
        journal.write_bytes(journal.read_bytes() + b'{"clip_id": "ha')
        server.plan = lambda number, asked: "ok"
        assert main(["caption", "--in", str(manifest), "--out", str(out), "--endpoint", server.url, *options]) == 0
    assert not set(first) & {asked.colour for asked in server.asked[before:]}
    assert len(server.asked) == before + len(COLOURS) - 3
    captions = {row["caption_short"] for row in rows_of(out)}
    assert captions == {answer_about(asked) for asked in server.asked}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"url": "localhost:8000"}, "no http address"),
        ({"url": "http://me:secret@host/v1"}, "use --api-key-env"),
        ({"concurrency": 0}, "concurrency 0"),
        ({"retries": -1}, "retries -1"),
        ({"requests_per_minute": 0.0}, "requests-per-minute"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as refused:
        EndpointSettings(**{"url": "http://host/v1", "model": "m", **settings})
    assert "secret" not in str(refused.value)


def test_a_named_key_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAPTION_KEY", raising=False)
    config = load_config(CaptionConfig, DEFAULT_PROMPTS)
    with pytest.raises(UserError, match="CAPTION_KEY: this environment variable is not set"):
        EndpointCaptioner(EndpointSettings("http://host/v1", "m", api_key_env="CAPTION_KEY"), config)


def test_waits_grow(monkeypatch: pytest.MonkeyPatch, manifest: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("data_prep.caption_endpoint._FIRST_WAIT_SECONDS", 0.1)
    with serving(lambda n, _: "500") as server, pytest.raises(UserError, match="1 clips in a row"):
        asked_of(manifest, tmp_path / "out.parquet", server.url, retries=3, max_failures=1, concurrency=1)
    gaps = [b.time - a.time for a, b in itertools.pairwise(server.asked[:4])]
    # Between half of the wait and the whole wait, which doubles: 0.1, 0.2, 0.4 s.
    assert [gap >= 0.05 * 2**n for n, gap in enumerate(gaps)] == [True] * 3


def test_shares_of_an_array_ask_once_and_the_last_one_joins(manifest: Path, tmp_path: Path) -> None:
    with serving(lambda n, _: "ok") as server:
        asked_of(manifest, tmp_path / "whole.parquet", server.url, "short,dense")
        shares = []
        for index in (1, 0, 2):
            assert not (tmp_path / "out.parquet").exists()
            shard = Shard(index, 3)
            shares.append(asked_of(manifest, tmp_path / "out.parquet", server.url, "short,dense", shard=shard))
    assert [share.details["requests"] for share in shares] == [4, 4, 4]
    assert [share.details["joined"] for share in shares] == [False, False, True]
    assert rows_of(tmp_path / "out.parquet") == rows_of(tmp_path / "whole.parquet")
    assert not list(tmp_path.glob(".*"))


def test_a_second_run_on_one_output_is_refused(manifest: Path, tmp_path: Path) -> None:
    with output_lock(tmp_path / "out.parquet"), serving(lambda n, _: "ok") as server:
        with pytest.raises(UserError, match="another run is writing there"):
            asked_of(manifest, tmp_path / "out.parquet", server.url)
        assert not server.asked
