"""Write docs/alignment/refusals.md: what the steps of Video-DPO refuse, by asking.

python tests/write_preference_refusals.py
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from preference_refusals import REFUSALS, Refusal, make_inputs, megatron_video, own_copy, told  # noqa: E402

TARGET = ROOT / "docs" / "alignment" / "refusals.md"
HEAD = """# What the steps of Video-DPO refuse

Written by `python tests/write_preference_refusals.py`. Each is a real command in a folder of tiny inputs: `base`, a
pretraining run; `tiny.yaml`, a preset of `dpo train` that starts from it; `done`, a run that this has trained; `pairs`;
`generated`, samples with scores. A folder `run` holds the reference's errors of a run that was killed before its first
step. The exit code is 2 unless another is named, and no step was trained.

"""


def main() -> None:
    """Make every refusal come about, and write down what was said."""
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name) / "inputs"
        inputs.mkdir()
        make_inputs(inputs)
        with ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(lambda refusal: _section(refusal, inputs), REFUSALS))
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(HEAD + "\n".join(parts), encoding="utf-8")
    print(f"wrote {TARGET}: {len(parts)} refusals")


def _section(refusal: Refusal, inputs: Path) -> str:
    folder = inputs.parent / f"user{REFUSALS.index(refusal)}"
    own_copy(inputs, folder)
    if refusal.before is not None:
        refusal.before(folder)
    result = megatron_video(folder, *refusal.words, prefix=refusal.prefix)
    said = told(refusal, result.stdout, result.stderr)
    missing = [words for words in refusal.told if words not in said]
    if result.returncode != refusal.code or missing:
        print(f"{refusal.what}: exit code {result.returncode}, {missing} not told\n{result.stderr}", file=sys.stderr)
    code = "" if refusal.code == 2 else f"    (exit code {refusal.code})\n"
    return f"## {refusal.what}\n\n    $ {refusal.command()}\n" + "".join(
        f"    {line}\n" for line in said.replace(f"{folder}/", "").splitlines()
    ) + code  # fmt: skip


if __name__ == "__main__":
    main()
