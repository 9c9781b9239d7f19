"""Files of prompts: what every format says, whose noise is whose, and what is refused; reports by category."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_samples import make_samples

from megatron_video.errors import UserError
from megatron_video.flops import LatentShape
from training.alignment import score, win_rate
from training.sample_prompts import PROMPT_LISTS, Prompt, parse_categories, read_prompts, with_seeds


def _file(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _said(prompts: list[Prompt]) -> list[tuple[Any, ...]]:
    return [(prompt.text, prompt.seed, prompt.noise_index, prompt.tags) for prompt in prompts]


def test_plain_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    prompts = read_prompts(_file(tmp_path / "p.txt", 'one, "two"\n\n three \n四\n'), seed=5)
    assert _said(prompts) == [('one, "two"', 5, 0, {}), ("three", 5, 1, {}), ("四", 5, 2, {})]
    # The released list has no suffix at all.
    assert _said(read_prompts(_file(tmp_path / "Step-Video-T2V-Eval", "one\ntwo"), seed=5))[1] == ("two", 5, 1, {})


SAME = {
    "p.jsonl": '{"prompt": "一只猫, \\"a cat\\"", "seed": 9, "category": "Animals", "by": "x"}\n{"prompt": "b"}\n',
    "p.csv": 'seed,prompt,category,by\n9,"一只猫, ""a cat""",Animals,x\n,b,,\n',
    "p.tsv": 'prompt\tcategory\tseed\tby\n一只猫, "a cat"\tAnimals\t9\tx\n\nb\t\t\t\n',
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize(
    "changed", [str.encode, lambda text: text.replace("\n", "\r\n").encode("utf-8-sig")], ids=["unix", "excel"]
)
def test_lines_and_tables_say_the_same(name: str, changed: Any, tmp_path: Path) -> None:
    prompts = read_prompts(_file(tmp_path / name, changed(SAME[name])), seed=5)
    assert _said(prompts) == [('一只猫, "a cat"', 9, 0, {"category": "Animals", "by": "x"}), ("b", 5, 1, {})]


def test_a_cell_and_a_json_text_may_hold_line_separators(tmp_path: Path) -> None:
    table = read_prompts(_file(tmp_path / "p.csv", 'prompt,seed\n"one\ntwo",1\n'), seed=0)
    assert _said(table) == [("one\ntwo", 1, 0, {})]
    lines = read_prompts(_file(tmp_path / "p.jsonl", '{"prompt": "one\u2028two\x85"}\n'), seed=0)
    assert _said(lines) == [("one\u2028two\x85", 0, 0, {})]


def test_the_listing_of_a_folder_is_a_prompt_file_with_its_noise(tmp_path: Path) -> None:
    line = {"index": 7, "prompt": "a", "seed": 2, "noise_index": 3, "file": "00007.mp4", "category": "x"}
    prompts = read_prompts(_file(tmp_path / "samples.jsonl", json.dumps(line)), seed=0)
    assert _said(prompts) == [("a", 2, 3, {"category": "x"})]


def test_a_seeded_prompt_has_the_same_noise_in_any_file(tmp_path: Path) -> None:
    one = '{"prompt": "a", "seed": 9}\n'
    alone = read_prompts(_file(tmp_path / "a.jsonl", one), seed=0)[0]
    third = read_prompts(_file(tmp_path / "b.jsonl", '{"prompt": "x"}\n{"prompt": "y"}\n' + one), seed=1)
    shape = LatentShape(3, 2, 4)
    assert torch.equal(alone.noise(shape, 5), third[2].noise(shape, 5))
    assert alone.noise(shape, 5).shape == (1, 3, 5, 2, 4)
    assert not torch.equal(third[0].noise(shape, 5), third[1].noise(shape, 5))


# message -> (name of the file, what is in it)
REFUSED: dict[str, tuple[str, str | bytes]] = {
    "holds no prompt": ("p.jsonl", "\n"),
    "p.csv holds no prompt": ("p.csv", "prompt,seed\n"),
    "line 2 is not JSON": ("p.jsonl", '{"prompt": "a"}\nprompt\n'),
    "line 1: expected": ("p.jsonl", '{"caption": "a"}\n'),
    "seed='x' must be a whole number": ("p.jsonl", '{"prompt": "a", "seed": "x"}\n'),
    "line 3: seed='1.5' must be a whole number": ("p.csv", "prompt,seed\na,1\nb,1.5\n"),
    "seed=True must be": ("p.jsonl", '{"prompt": "a", "seed": true}\n'),
    "line 2: the prompt is empty": ("p.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n'),
    "line 3: the prompt is empty": ("p.csv", "prompt,seed\na,1\n ,2\n"),
    r"line 3: 'a' with seed 4 is there already \(--prompts .*p.jsonl, line 1\)": (
        "p.jsonl",
        '{"prompt": "a", "seed": 4}\n{"prompt": "b", "seed": 4}\n{"prompt": "a", "seed": 4}\n',
    ),
    "line 2: 'a' with seed 0 is there already": ("p.txt", "a\na\n"),
    "line 1: unknown field 'seeds'; did you mean 'seed'": ("p.csv", "prompt,seeds\na,1\n"),
    "line 1: unknown field 'Prompt'; did you mean 'prompt'": ("p.tsv", "Prompt\na\n"),
    "unknown field 'catagory'; did you mean 'category'": ("p.jsonl", '{"prompt": "a", "catagory": "x"}\n'),
    "no column is called 'prompt'; the first line names the columns, here a cat": ("p.csv", "a cat\na dog\n"),
    "no column is called 'prompt'.*here prompt;seed": ("p.csv", "prompt;seed\na;1\n"),
    "line 2 has 3 cells, the header names 2": ("p.csv", "prompt,seed\na, b,1\n"),
    "a column 'by' is there twice": ("p.csv", "prompt,by,by\na,1,2\n"),
    "a column has no name": ("p.csv", "prompt,,by\na,1,2\n"),
    "line 2: unexpected end of data; .* a quote is never closed": ("p.csv", 'prompt,seed\n"a,1\n'),
    "line 2 is not UTF-8": ("p.txt", b"a cat\n" + "雪山下的湖面上有一只船".encode("gb18030")),
    "line 1 is not UTF-8": ("p.tsv", "prompt\na".encode("utf-16")),
    "holds zero bytes": ("p.txt", "a cat".encode("utf-16-le")),
    "looks like JSON; name a file of one object a line .jsonl": ("p.txt", '{"prompt": "a"}\n'),
    "p.json looks like JSON": ("p.json", '[{"prompt": "a"}]'),
    "category=3 must be a text": ("p.jsonl", '{"prompt": "a", "category": 3}\n'),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_wrong_is_refused_by_line(message: str, tmp_path: Path) -> None:
    name, content = REFUSED[message]
    with pytest.raises(UserError, match=message):
        read_prompts(_file(tmp_path / name, content), seed=0)


def test_seeds_of_the_file_and_of_the_option_must_not_meet(tmp_path: Path) -> None:
    prompts = read_prompts(_file(tmp_path / "p.csv", "prompt,seed\na,1\na,3\n"), seed=0)
    assert [prompt.seed for prompt in with_seeds(prompts, 2)] == [1, 2, 3, 4]
    with pytest.raises(UserError, match=r"--seeds 3: 'a' would have seed 3 twice, .* less than 3 apart"):
        with_seeds(prompts, 3)


def test_the_released_list_has_its_categories_by_order(tmp_path: Path) -> None:
    # arXiv 2502.10248: 128 prompts of 11 categories.
    path = _file(tmp_path / "Step-Video-T2V-Eval", "".join(f"提示 {number}\n" for number in range(128)))
    categories = parse_categories("step-video-t2v-eval")
    prompts = read_prompts(path, 0, 30, categories)
    assert len(categories) == 11
    assert [prompts[index].tags["category"] for index in (0, 11, 12, 22, 23)] == [
        *("Sports", "Sports", "Food", "Food", "Scenery")
    ]
    assert len(prompts) == 30
    with pytest.raises(UserError, match=r"count 128 prompts \(11 categories\), --prompts .* holds 2"):
        read_prompts(_file(tmp_path / "two.txt", "a\nb"), 0, None, categories)


def test_categories_by_counts(tmp_path: Path) -> None:
    path = _file(tmp_path / "p.txt", "a\nb\nc\n")
    tags = [prompt.tags for prompt in read_prompts(path, 0, None, parse_categories("Sports=1, 3D Animation=2"))]
    assert tags == [{"category": "Sports"}, {"category": "3D Animation"}, {"category": "3D Animation"}]
    with pytest.raises(UserError, match=r"p\.csv, line 2 brings a category of its own"):
        read_prompts(_file(tmp_path / "p.csv", "prompt,category\na,x\n"), 0, None, {"y": 1})
    for wrong in ("Sports", "Sports=0", "=1", "a=1,a=2", "a=1,", next(iter(PROMPT_LISTS)) + "x"):
        with pytest.raises(UserError, match="is not NAME=COUNT"):
            parse_categories(wrong)


@pytest.fixture
def compared(tmp_path: Path) -> tuple[Path, Path]:
    """Scored folders of four prompts of two categories and one of none."""
    categories = {"a": "Sports", "b": "Food", "c": "Sports"}
    before = make_samples(tmp_path / "before", {"a": [0.2, 0.6], "b": [0.5], "c": [0.3], "d": [0.1]}, categories)
    after = make_samples(tmp_path / "after", {"a": [0.4, 0.8], "b": [0.2], "c": [0.1], "d": [0.9]}, categories)
    for folder in (before, after):
        assert score.main(["--samples", str(folder), "--with", "brightness"]) == 0
    return before, after


def test_scores_are_told_by_category(compared: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before, _ = compared
    arguments = ["--samples", str(before), "--with", "brightness"]
    score.main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["by_category"]
    assert {name: part["samples"] for name, part in report.items()} == {"Sports": 3, "Food": 1, "(none)": 1}
    assert report["Sports"]["mean"] == pytest.approx((0.2 + 0.6 + 0.3) / 3, abs=0.01)
    score.main(arguments)
    assert "  Sports      3 samples, mean 0.36" in capsys.readouterr().out


def test_the_win_rate_is_told_by_category(compared: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before, after = compared
    arguments = ["--before", str(before), "--after", str(after)]
    win_rate.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["wins"], found["losses"]) == (3, 2)
    sports = found["by_category"]["Sports"]
    assert (sports["wins"], sports["losses"], sports["win_rate"]) == (2, 1, pytest.approx(2 / 3))
    assert [part["wins"] for part in found["by_category"].values()] == [2, 0, 1]
    win_rate.main(arguments)
    assert "\n  Food    win rate 0.0%" in capsys.readouterr().out


def test_without_categories_reports_are_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_samples(tmp_path / "samples", {"a": [0.2, 0.6]})
    score.main(["--samples", str(folder), "--with", "brightness", "--json"])
    win_rate.main(["--before", str(folder), "--after", str(folder), "--json"])
    assert "category" not in capsys.readouterr().out
