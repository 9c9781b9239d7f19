"""The page of `megatron-video dpo rate` in a real browser: keys, videos that play, undo, reload, two raters, the end.

    MEGATRON_VIDEO_SCREENSHOT=docs/alignment/rate.png python -m pytest tests/e2e/test_rating_page.py

writes the picture of the documentation; MEGATRON_VIDEO_SAMPLES names the samples that it shows.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Page, Playwright, expect, sync_playwright
from tiny_samples import make_samples

from megatron_video.video_io import write_mp4
from training.alignment.rating.votes import Vote, read_ratings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FRAMES, FPS = 17, 8.0
SCREENSHOT, SHOWN = (os.environ.get(f"MEGATRON_VIDEO_{name}") for name in ("SCREENSHOT", "SAMPLES"))
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; tests/apt-packages.txt says what is needed")


@dataclass
class Rater:
    """A rater's server."""

    name: str
    url: str
    out: Path
    process: subprocess.Popen[str]

    def votes(self) -> list[Vote]:
        return [vote for vote in read_ratings([self.out]).votes if vote.rater == self.name]


def moving_bar(step: int, shade: int) -> np.ndarray:
    frames = np.full((FRAMES, 96, 160, 3), shade, np.uint8)
    for number, frame in enumerate(frames):
        frame[:, number * step : number * step + 20] = 255 - shade
    return frames


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = ["a bar moves right", "a bar <b>moves</b> & stops", "a dark bar"]
    folder = make_samples(tmp_path_factory.mktemp("rated") / "samples", {prompt: [0.1, 0.9] for prompt in prompts})
    for index in range(6):
        write_mp4(folder / f"{index:05d}.mp4", moving_bar(1 + index, 20 * index), FPS)
    return folder


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def browser(playwright: Playwright, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    profile = tmp_path_factory.mktemp("profile")
    # Five seconds, the library's own, are short where other tests have all cores.
    expect.set_options(timeout=30_000)
    context = playwright.chromium.launch_persistent_context(profile, executable_path=CHROMIUM, args=FLAGS)
    yield context
    context.close()


@pytest.fixture
def page(browser: BrowserContext) -> Iterator[Page]:
    found = browser.new_page()
    errors: list[str] = []
    found.on("pageerror", lambda error: errors.append(str(error)))
    found.on("console", lambda message: errors.append(message.text) if "Security Policy" in message.text else None)
    yield found
    found.close()
    assert errors == []


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(processes: list[subprocess.Popen[str]], samples: Path, out: Path, name: str, *options: str) -> Rater:
    words = ["--samples", str(samples), "--out", str(out), "--rater", name, "--port", "0", "--json", *options]
    command = [sys.executable, "-m", "training.alignment.rating.rate", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    processes.append(process)
    assert process.stdout is not None
    return Rater(name, json.loads(process.stdout.readline())["url"], out, process)


def ready(page: Page) -> None:
    expect(page.locator("#votes button").first).to_be_enabled()


def press(page: Page, key: str, count: str) -> str:
    """Press a key, wait for the count that follows, and return the prompt that was shown before."""
    ready(page)
    prompt = page.locator("#prompt").inner_text()
    page.keyboard.press(key)
    expect(page.locator("#count")).to_have_text(count)
    return prompt


def wait_until(page: Page, condition: str) -> None:
    # `wait_for_function` evaluates inside the page, whose content security policy forbids that.
    deadline = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"not within 30 s: {condition}; {played(page)}"
        page.wait_for_timeout(20)


def played(page: Page) -> list[dict[str, float]]:
    found: list[dict[str, float]] = page.evaluate(
        "videos().map((v) => ({ time: v.currentTime, width: v.videoWidth, length: v.duration, paused: +v.paused,"
        " frames: v.getVideoPlaybackQuality().totalVideoFrames }))"
    )
    return found


def test_both_videos_play_in_step_and_loop(
    page: Page, samples: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    rater = start(started, samples, tmp_path / "votes.jsonl", "ann")
    page.goto(rater.url)
    ready(page)
    first = played(page)
    assert [video["width"] for video in first] == [160, 160]
    assert [video["length"] for video in first] == pytest.approx([FRAMES / FPS] * 2)
    wait_until(page, "videos().every((v) => v.currentTime > 0.5)")
    left, right = played(page)
    assert abs(left["time"] - right["time"]) < 2 / FPS
    assert min(left["frames"], right["frames"]) > 2
    # What is seen changes: the bar moves.
    pictures = [page.locator("figure video").first.screenshot() for _ in range(2) if not page.wait_for_timeout(200)]
    assert pictures[0] != pictures[1]
    page.keyboard.press("Space")
    stopped = played(page)
    page.wait_for_timeout(200)
    assert [video["time"] for video in played(page)] == [video["time"] for video in stopped]
    assert [video["paused"] for video in stopped] == [1, 1]
    page.keyboard.press("r")
    wait_until(page, "videos().every((v) => !v.paused && v.currentTime < 0.5)")
    page.evaluate("videos().forEach((v) => (v.currentTime = v.duration - 0.1))")
    wait_until(page, "videos().every((v) => !v.ended && v.currentTime > 0.05 && v.currentTime < 1)")
    assert rater.out.read_text() == ""


def test_keys_vote_undo_and_a_reload_keeps_the_place(
    page: Page, samples: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    rater = start(started, samples, tmp_path / "votes.jsonl", "ann", "--repeat", "0.34")
    page.goto(rater.url)
    expect(page.locator("#count")).to_have_text("0 of 4")
    shown = [press(page, "ArrowLeft", "1 of 4"), press(page, "ArrowRight", "2 of 4")]
    said = [vote.left if vote.vote == vote.left else "other" for vote in rater.votes()]
    assert said == [rater.votes()[0].left, "other"]
    assert all(vote.seconds is not None and 0 < vote.seconds < 300 for vote in rater.votes())
    page.reload()
    expect(page.locator("#count")).to_have_text("2 of 4")
    prompt = page.locator("#prompt").inner_text()
    press(page, "ArrowDown", "3 of 4")
    press(page, "u", "2 of 4")
    expect(page.locator("#prompt")).to_have_text(prompt)
    # Alt and an arrow leave the page in many browsers; they are no vote.
    page.keyboard.press("Control+ArrowRight")
    shown += [press(page, "s", "3 of 4"), press(page, "ArrowDown", "4 of 4")]
    # One of them has what would be tags.
    assert [vote.prompt for vote in rater.votes()] == shown
    assert any("<b>" in prompt for prompt in shown)
    expect(page.locator("h1")).to_have_text("All pairs are rated.")
    assert not page.locator("video").count()
    assert [vote.vote for vote in rater.votes()][2:] == ["skip", "tie"]
    assert sum(vote.showing == 2 for vote in rater.votes()) == 1
    page.keyboard.press("Backspace")
    ready(page)
    expect(page.locator("#count")).to_have_text("3 of 4")
    page.get_by_text("tie", exact=False).first.click()
    expect(page.locator("#finished")).to_be_visible()


def test_two_raters_and_two_windows(
    page: Page, browser: BrowserContext, samples: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    out = tmp_path / "votes.jsonl"
    ann, bob = (start(started, samples, out, name, "--repeat", "0") for name in ("ann", "bob"))
    page.goto(ann.url)
    second = browser.new_page()
    second.goto(ann.url)
    ready(second)
    press(page, "ArrowLeft", "1 of 3")
    second.keyboard.press("ArrowRight")
    expect(second.locator("#message")).to_contain_text("rated already, in another window")
    expect(second.locator("#count")).to_have_text("1 of 3")
    second.goto(bob.url)
    expect(second.locator("#count")).to_have_text("0 of 3")
    press(second, "ArrowRight", "1 of 3")
    # Killed while the page is open: the vote is told to be lost, and taken when the server is back.
    ann.process.send_signal(signal.SIGKILL)
    ann.process.wait()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#message")).to_contain_text("The server does not answer")
    back = start(started, samples, out, "ann", "--repeat", "0")
    page.goto(back.url)
    expect(page.locator("#count")).to_have_text("1 of 3")
    press(page, "ArrowRight", "2 of 3")
    assert (len(back.votes()), len(bob.votes())) == (2, 1)
    second.close()


def test_pictures_and_a_video_that_is_damaged(
    page: Page, samples: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    images = Path(shutil.copytree(samples, tmp_path / "images"))
    lines = [json.loads(line) for line in (images / "samples.jsonl").read_text().splitlines()]
    for values in lines[:4]:
        values["file"] = f"{values['index']:05d}.png"
        Image.fromarray(moving_bar(1, 30 * values["index"])[0]).save(images / values["file"])
    (images / "samples.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    (images / "00004.mp4").write_bytes(b"no video")
    rater = start(started, images, tmp_path / "votes.jsonl", "ann", "--repeat", "0")
    page.goto(rater.url)
    for done in range(3):
        expect(page.locator("#count")).to_have_text(f"{done} of 3")
        if page.locator("#prompt").inner_text() == "a dark bar":
            expect(page.locator("figure p")).to_contain_text("video cannot be shown")
            page.keyboard.press("ArrowLeft")
            page.keyboard.press("s")
        else:
            ready(page)
            assert page.evaluate("document.images.length") == 2
            page.keyboard.press("ArrowDown")
    expect(page.locator("#finished")).to_be_visible()
    assert sorted(vote.vote for vote in rater.votes()) == ["skip", "tie", "tie"]


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (390, 760)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_fits_into_the_window(
    page: Page,
    samples: Path,
    tmp_path: Path,
    started: list[subprocess.Popen[str]],
    width: int,
    height: int,
    scheme: str,
) -> None:
    rater = start(started, Path(SHOWN or samples), tmp_path / "votes.jsonl", "ann", "--seed", "3")
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(rater.url)
    ready(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.scrollHeight") <= height
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(ground.split("(")[1].split(",")[0]) < 128) == (scheme == "dark")
    if SCREENSHOT and (width, scheme) == (1280, "light"):
        # This machine may have no font for others.
        while not page.locator("#prompt").inner_text().isascii():
            done, _, total = page.locator("#count").inner_text().partition(" of ")
            press(page, "ArrowDown", f"{int(done) + 1} of {total}")
        ready(page)
        wait_until(page, "videos().every((v) => v.currentTime > 1)")
        Path(SCREENSHOT).parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOT)
