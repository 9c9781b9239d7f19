"""`megatron-video text build`: deterministic, repeatable, atomic, and clear about what it cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_video.errors import UserError
from megatron_video.manifest import table_from_rows, write_manifest
from megatron_video.text.build import train_wordpiece
from training.build_text_encoders import main, read_captions

CAPTIONS = ["a red circle moves left", "蓝色方块向上移动", "a blue square moves up"]
FILES = ("clip/config.json", "clip/vocab.txt", "clip/model.safetensors", "step_llm/config.json")
FILES += ("step_llm/step1_chat_tokenizer.model", "step_llm/model.safetensors", "build.json")


@pytest.fixture
def captions_file(tmp_path: Path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(CAPTIONS), encoding="utf-8")
    return path


def _contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_same_bytes_for_a_seed_in_another_process_and_other_weights_for_another(captions_file: Path) -> None:
    folder = captions_file.parent
    main(["build", "--captions", str(captions_file), "--out", str(folder / "a"), "--seed", "5"])
    shuffled = folder / "shuffled.txt"
    shuffled.write_text("\n".join([*reversed(CAPTIONS), CAPTIONS[0], ""]), encoding="utf-8")
    command = [sys.executable, "-m", "training.build_text_encoders", "build", "--captions", str(shuffled)]
    subprocess.run([*command, "--out", str(folder / "b"), "--seed", "5"], check=True, capture_output=True)
    main(["build", "--captions", str(captions_file), "--out", str(folder / "c"), "--seed", "6"])
    a, b, c = (_contents(folder / name) for name in "abc")
    assert a == b
    assert {name for name in FILES if a[name] != c[name]} == {
        "clip/model.safetensors",
        "step_llm/model.safetensors",
        "build.json",
    }


def test_wordpiece_has_all_characters_then_words_by_frequency() -> None:
    captions = ["red Red blue", "red, green zebra", "蓝色red"]
    tokens = train_wordpiece(captions, 200)
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokens[-4:] == ["red", "blue", "green", "zebra"]
    assert {"蓝", "色", ",", "z", "##z", "##9"} <= set(tokens)
    assert len(tokens) == len(set(tokens))
    # Without room for all words the rarest go first; equal ones go by the alphabet.
    assert train_wordpiece(captions, len(tokens) - 1) == tokens[:-1]


def test_second_run_changes_nothing_and_other_settings_are_refused(
    captions_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = captions_file.parent / "out"
    command = ["build", "--captions", str(captions_file), "--out", str(out)]
    main(command)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    main([*command, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["caption_channels"] == [64, 48]
    assert report["llm_captions_cut"] == report["clip_captions_with_unknown"] == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(UserError, match=r"other settings \(seed, config differ\)"):
        main([*command, "--seed", "9", "llm_hidden_size=32"])
    assert sorted(path.name for path in captions_file.parent.iterdir()) == ["captions.txt", "out"]


def test_a_folder_of_something_else_is_not_touched(captions_file: Path) -> None:
    with pytest.raises(UserError, match="was not made by"):
        main(["build", "--captions", str(captions_file), "--out", str(captions_file.parent)])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("llm_vocabulary=100", "llm_vocabulary=100 is too small"),
        ("clip_vocabulary=60", "clip_vocabulary=60 is too small"),
        ("llm_num_attention_heads=5", "num_attention_heads=5 does not divide"),
        ("clip_num_attention_heads=5", "clip_num_attention_heads=5 does not divide"),
        ("clip_width=5", "unknown field 'clip_width'"),
    ],
)
def test_impossible_sizes_are_refused_and_leave_nothing(captions_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["build", "--captions", str(captions_file), "--out", str(captions_file.parent / "out"), override])
    assert [path.name for path in captions_file.parent.iterdir()] == ["captions.txt"]


def test_captions_of_a_manifest_are_those_of_kept_clips(tmp_path: Path) -> None:
    rows = [{"clip_id": str(i), "caption": caption} for i, caption in enumerate([*CAPTIONS, None, CAPTIONS[0]])]
    rows.append({"clip_id": "dropped", "caption": "no", "dropped_by": "filter", "drop_reason": "dark"})
    write_manifest(table_from_rows(rows), tmp_path / "m.parquet")
    assert read_captions(tmp_path / "m.parquet") == sorted(CAPTIONS)


def test_unreadable_or_empty_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        read_captions(tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="holds no caption"):
        read_captions(tmp_path / "empty.txt")
