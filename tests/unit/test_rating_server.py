"""What raters are asked, and the server of the page: fair, blind, and closed to everyone else."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from tiny_samples import make_samples
from werkzeug.test import Client, TestResponse

from megatron_video.errors import UserError
from training.alignment.generated import read_generated
from training.alignment.rating import rate
from training.alignment.rating.plan import AskedPair, make_plan, pairs_between, pairs_within, tellable
from training.alignment.rating.server import RatingServer, may_be_called
from training.alignment.rating.session import Session
from training.alignment.rating.votes import Vote, VoteFile, read_ratings

TOKEN = "a-token"
HOME = {"base_url": "http://localhost"}
OWN = {"Origin": "http://localhost"}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = {f"prompt {number}": [0.1 + 0.02 * number + 0.1 * seed for seed in range(6)] for number in range(10)}
    return make_samples(tmp_path_factory.mktemp("asked") / "samples", made)


@pytest.fixture(scope="module")
def pairs(samples: Path) -> list[AskedPair]:
    return tellable(pairs_within(read_generated(samples), most_of_prompt=9, seed=0))[0]


@pytest.fixture
def session(pairs: list[AskedPair], tmp_path: Path) -> Session:
    return Session(make_plan(pairs, "ann", seed=0, repeat=0.1), VoteFile(tmp_path / "votes.jsonl"), "ann")


@pytest.fixture
def client(session: Session) -> Client:
    return Client(RatingServer(session, TOKEN, "127.0.0.1"))


def post(client: Client, path: str, body: object, headers: dict[str, str] = OWN, token: str = TOKEN) -> TestResponse:
    return client.post(f"/{token}/{path}", json=body, headers=headers, **HOME)


def state(client: Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/{TOKEN}/state", **HOME).json
    return found


def test_every_video_of_a_prompt_is_in_equally_many_pairs(pairs: list[AskedPair]) -> None:
    used = Counter(video.sample.index for pair in pairs for video in (pair.a, pair.b))
    assert len(pairs) == 90
    assert set(used.values()) == {3}
    assert all(pair.a.sample.prompt == pair.b.sample.prompt for pair in pairs)


@pytest.mark.parametrize("videos", [2, 5, 8])
def test_all_pairs_are_asked_once_and_none_waits_long(videos: int, tmp_path: Path) -> None:
    folder = make_samples(tmp_path / "samples", {"p": [0.1 * number for number in range(videos)]})
    found = pairs_within(read_generated(folder), most_of_prompt=100, seed=0)
    assert len({pair.key for pair in found}) == len(found) == videos * (videos - 1) // 2
    for so_far in range(videos, len(found)):
        used = Counter(video.sample.index for pair in found[:so_far] for video in (pair.a, pair.b))
        assert len(used) == videos
        assert max(used.values()) - min(used.values()) <= (2 if videos % 2 else 1)


def test_raters_judge_the_same_pairs_in_their_own_order_and_sides(pairs: list[AskedPair]) -> None:
    ann, again, bob = (make_plan(pairs, rater, seed=0, repeat=0) for rater in ("ann", "ann", "bob"))
    assert [(q.pair.key, q.left) for q in ann] == [(q.pair.key, q.left) for q in again]
    assert {q.pair.key for q in ann} == {q.pair.key for q in bob}
    assert [q.pair.key for q in ann] != [q.pair.key for q in bob]
    sides = {q.pair.key: q.left for q in bob}
    # Fair coins: the chance that 90 of them fall beyond these bounds is below 1e-4.
    assert 27 < sum(q.left == "a" for q in ann) < 63
    assert 27 < sum(sides[q.pair.key] == q.left for q in ann) < 63


def test_a_repeated_pair_comes_later_with_sides_exchanged(pairs: list[AskedPair]) -> None:
    plan = make_plan(pairs, "ann", seed=0, repeat=0.2)
    places = {(q.pair.key, q.showing): (place, q.left) for place, q in enumerate(plan)}
    repeated = [key for key, showing in places if showing == 2]
    assert len(repeated) == 18
    for key in repeated:
        (first, side), (second, other) = places[key, 1], places[key, 2]
        assert second - first > 20
        assert side != other


def test_two_models_are_compared_on_the_same_noise(samples: Path, tmp_path: Path) -> None:
    other = make_samples(tmp_path / "after", {"prompt 0": [0.5, 0.6], "prompt 1": [0.7, 0.8]})
    before = make_samples(tmp_path / "before", {"prompt 0": [0.5, 0.1], "prompt 1": [0.2, 0.3]})
    found, equal = tellable(pairs_between(read_generated(before), read_generated(other)))
    # The first two videos are the same bytes.
    assert equal == 1
    assert [(pair.a.folder, pair.b.folder) for pair in found] == [(before, other)] * 3
    assert all(pair.a.sample.seed == pair.b.sample.seed for pair in found)
    with pytest.raises(UserError, match="other prompts or seeds"):
        pairs_between(read_generated(samples), read_generated(other))


def test_votes_name_the_video_that_was_on_that_side(client: Client, session: Session, tmp_path: Path) -> None:
    said = ["left", "right", "tie", "skip"] * 3
    for number, choice in enumerate(said):
        question = session.plan[number]
        assert state(client)["question"]["number"] == number
        assert post(client, "vote", {"number": number, "choice": choice, "seconds": 1.234}).status_code == 200
        shown = {side: client.get(f"/{TOKEN}/video/{number}/{side}", **HOME).data for side in ("left", "right")}
        vote = read_ratings([tmp_path / "votes.jsonl"]).votes[-1]
        assert (vote.left, vote.seconds, vote.prompt) == (question.left, 1.23, question.pair.a.sample.prompt)
        if choice in shown:
            chosen = vote.a if vote.vote == "a" else vote.b
            assert (Path(str(chosen.samples)) / str(chosen.file)).read_bytes() == shown[choice]
        else:
            assert vote.vote == choice
    assert {question.left for question in session.plan[: len(said)]} == {"a", "b"}


def test_undo_asks_the_pair_again(client: Client, tmp_path: Path) -> None:
    for number in range(3):
        post(client, "vote", {"number": number, "choice": "left", "seconds": 1})
    assert state(client)["last"] == {"number": 2, "choice": "left"}
    assert post(client, "undo", {"number": 2}).json["question"]["number"] == 2
    assert post(client, "undo", {"number": 0}).status_code == 409
    assert post(client, "undo", {"number": 1}).json["done"] == 1
    found = post(client, "vote", {"number": 1, "choice": "tie", "seconds": 1}).json
    assert (found["done"], found["last"]["choice"]) == (2, "tie")
    # Nothing that was said is lost.
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 6


def test_a_question_takes_one_vote(client: Client, tmp_path: Path) -> None:
    vote = {"number": 0, "choice": "left", "seconds": 1}
    assert post(client, "vote", vote).status_code == 200
    second = post(client, "vote", vote)
    assert (second.status_code, second.text) == (409, "this pair was rated already, in another window\n")
    assert len(read_ratings([tmp_path / "votes.jsonl"]).votes) == 1


def test_the_page_is_told_neither_model_nor_file(client: Client, session: Session, samples: Path) -> None:
    answers = [client.get(f"/{TOKEN}/{path}", **HOME) for path in ("", "state", "video/0/left")]
    told = "".join(f"{answer.headers}" for answer in answers) + answers[0].text + answers[1].text
    for secret in (str(samples), samples.name + "/", session.plan[0].at("left").sample.file.name, "checkpoint"):
        assert secret not in told


def test_videos_can_be_sought(client: Client, session: Session) -> None:
    content = session.plan[0].at("right").sample.file.read_bytes()
    part = client.get(f"/{TOKEN}/video/0/right", headers={"Range": "bytes=100-199"}, **HOME)
    assert (part.status_code, part.data) == (206, content[100:200])
    assert part.headers["Content-Range"] == f"bytes 100-199/{len(content)}"
    beyond = client.get(f"/{TOKEN}/video/0/right", headers={"Range": f"bytes={len(content)}-"}, **HOME)
    assert beyond.status_code == 416


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"/{TOKEN}/", 200),
        (f"/{TOKEN}/page.js", 200),
        ("/", 404),
        ("/state/", 404),
        ("/another-token/state", 404),
        ("/another-token/video/0/left", 404),
        (f"/{TOKEN}/../votes.jsonl", 404),
        (f"/{TOKEN}/..%2f..%2fserver.py", 404),
        (f"/{TOKEN}/video/100000/left", 404),
        (f"/{TOKEN}/video/-1/left", 404),
        (f"/{TOKEN}/video/0/settings.json", 404),
        (f"/{TOKEN}/vote", 404),
    ],
)
def test_nothing_else_is_served(path: str, status: int, client: Client) -> None:
    assert client.get(path, **HOME).status_code == status


@pytest.mark.parametrize(
    "headers", [{}, {"Origin": "null"}, {"Origin": "http://evil"}, {"Origin": "https://localhost"}]
)
def test_another_sites_votes_are_refused(headers: dict[str, str], client: Client, tmp_path: Path) -> None:
    vote = {"number": 0, "choice": "left", "seconds": 1}
    assert post(client, "vote", vote, headers).status_code == 403
    assert post(client, "vote", vote, OWN, token="guess").status_code == 404
    assert (tmp_path / "votes.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "body",
    [
        {"number": 0, "choice": "a", "seconds": 1},
        {"number": True, "choice": "left", "seconds": 1},
        {"number": 0, "choice": "left", "seconds": -1},
        {"number": 0, "choice": "left"},
        ["left"],
        {"number": 0, "choice": "left", "seconds": 1, "more": "x" * 5000},
    ],
)
def test_what_is_no_vote(body: object, client: Client, tmp_path: Path) -> None:
    assert post(client, "vote", body).status_code in (400, 413)
    assert (tmp_path / "votes.jsonl").read_text() == ""


def test_a_foreign_name_for_this_machine_is_refused(client: Client) -> None:
    assert client.get(f"/{TOKEN}/", base_url="http://rebound.example").status_code == 403
    assert client.get(f"/{TOKEN}/", base_url="http://127.0.0.1:9999").status_code == 200


@pytest.mark.parametrize(
    ("name", "bound_to", "may"),
    [
        ("localhost", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("::1", "::1", True),
        ("10.0.0.7", "127.0.0.1", False),
        ("evil.example", "127.0.0.1", False),
        ("10.0.0.7", "0.0.0.0", True),
        ("evil.example", "0.0.0.0", False),
        ("login1.cluster", "login1.cluster", True),
    ],
)
def test_names_under_which_the_server_is_called(name: str, bound_to: str, may: bool) -> None:
    assert may_be_called(name, bound_to) is may


def test_raters_write_into_one_file_at_once(pairs: list[AskedPair], tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"

    def work(rater: str) -> None:
        plan = make_plan(pairs[:25], rater, seed=0, repeat=0)
        client = Client(RatingServer(Session(plan, VoteFile(path), rater), TOKEN, "127.0.0.1"))
        for number in range(25):
            post(client, "vote", {"number": number, "choice": "left", "seconds": 1})

    threads = [Thread(target=work, args=(f"rater {number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    votes = read_ratings([path]).votes
    assert Counter(vote.rater for vote in votes) == {f"rater {number}": 25 for number in range(4)}
    assert len({(vote.rater, vote.pair) for vote in votes}) == 100


def start(samples: Path, out: Path, *options: str, **more: Any) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    words = ["--samples", str(samples), "--out", str(out), "--rater", "ann", "--port", "0", "--json", *options]
    command = [sys.executable, "-m", "training.alignment.rating.rate", *words]
    # A suite that was started in the background ignores Ctrl-C, and so would its children.
    heeds = {"preexec_fn": functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heeds, **more)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def vote_over_http(url: str, number: int) -> httpx.Response:
    origin = url.rsplit("/", 2)[0]
    body = {"number": number, "choice": "tie", "seconds": 1}
    return httpx.post(url + "vote", json=body, headers={"Origin": origin}, trust_env=False)


@pytest.fixture
def killed() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_a_killed_server_goes_on_and_ctrl_c_is_clean(
    samples: Path, tmp_path: Path, killed: list[subprocess.Popen[str]]
) -> None:
    out = tmp_path / "votes.jsonl"
    process, told = start(samples, out, "--pairs", "5", "--repeat", "0")
    killed.append(process)
    assert (told["pairs"], told["questions"], told["done"]) == (5, 5, 0)
    for number in range(3):
        assert vote_over_http(told["url"], number).status_code == 200
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again, told = start(samples, out, "--pairs", "5", "--repeat", "0")
    killed.append(again)
    assert told["done"] == 3
    assert httpx.get(told["url"] + "state", trust_env=False).json()["question"]["number"] == 3
    vote_over_http(told["url"], 3)
    again.send_signal(signal.SIGINT)
    assert again.communicate(timeout=120)[1].strip() == f"{out}: 4 of 5 rated by ann"
    assert again.returncode == 0


def test_a_vote_that_finds_no_room_is_not_taken(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    out = tmp_path / "votes.jsonl"
    plan = make_plan(tellable(pairs_within(read_generated(samples), 1, 0))[0], "ann", 0, 0)
    client = Client(RatingServer(Session(plan, VoteFile(out), "ann"), TOKEN, "127.0.0.1"))
    vote = {"number": 0, "choice": "left", "seconds": 1}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # Room for a part of the line.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        answer = post(client, "vote", vote)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert answer.status_code == 507
    assert answer.text.startswith("Not saved: ")
    assert out.read_text() == ""
    assert post(client, "vote", vote).json["done"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rater", " "], "--rater must be a name"),
        (["--repeat", "0.9"], "--repeat 0.9 must be between"),
        (["--pairs", "0"], "--pairs 0 must be"),
        (["--port", "70000"], "--port 70000 must be"),
        (["--out", "votes.csv"], "must end in .jsonl"),
        (["--out", "/nowhere/votes.jsonl"], "cannot be written: No such file"),
        (["--host", "192.0.2.1", "--port", "0"], "--host 192.0.2.1 --port 0: "),
        (["--samples", "/nowhere"], "--samples /nowhere: no settings.json"),
    ],
)
def test_bad_options(options: list[str], said: str, samples: Path, tmp_path: Path) -> None:
    given = ["--samples", str(samples), "--out", str(tmp_path / "r.jsonl"), "--rater", "ann", *options]
    with pytest.raises(UserError, match=said):
        rate.main(given)


def test_other_ratings_are_not_added_to(samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "numbers.jsonl"
    out.write_text('{"rater": "ann", "index": 0, "rating": 3}\n')
    with pytest.raises(UserError, match="holds numbers, not votes"):
        rate.main(["--samples", str(samples), "--out", str(out), "--rater", "ann", "--port", "0"])
    assert Vote.model_validate({"rater": "a", "vote": "tie"}).showing == 1
