"""Features of the DiT are those of one process in every layout, and replicas share the latents."""

from __future__ import annotations

import functools
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tiny_features import tiny_pairs, tiny_run

from megatron_video import parallel
from training.alignment import features
from training.alignment.feature_files import FeatureFiles, Features
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed
TP, SP = "--tensor-parallel-size 2", "--sequence-parallel"
PP, CP = "--pipeline-parallel-size 2", "--context-parallel-size 2"
# options -> ranks
LAYOUTS = {
    f"{TP} {SP} {PP}": 4,
    CP: 4,
    f"{TP} {SP}": 2,
    TP: 2,
    PP: 2,
    f"{CP} --cp-comm-type all_gather": 2,
    "": 2,
    f"{TP} {SP} {PP} {CP}": 8,
}
SHORT = list(LAYOUTS)[:2]


def compute(arguments: list[str]) -> int:
    """On a rank: the command, but for the end of the process group, which is the pool's."""
    keep = functools.partial(parallel.destroy_parallel, keep_distributed=True)
    with patch.object(parallel, "destroy_parallel", keep):
        return features.main(arguments)


def everything(folder: Path) -> Features:
    files = FeatureFiles.open(folder)
    assert not files.missing()
    return files.read(range(files.count))


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("features")
    run, pairs = tiny_run(folder), tiny_pairs(folder)
    # Padded under context parallelism: 3 x 3 x 5 and 3 x 3 x 3 tokens.
    return ["--checkpoint", str(run), "--data", str(pairs), "--layer", "0", "1", "--t", "0.3", "0.8"]


@pytest.fixture(scope="module")
def single(ranks: RankPool, command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Features:
    out = tmp_path_factory.mktemp("single") / "out"
    ranks.run(compute, [*command, "--out", str(out)], ranks=1)
    return everything(out)


@pytest.mark.parametrize(
    "options", [pytest.param(name, marks=() if name in SHORT else (pytest.mark.heavy,)) for name in LAYOUTS]
)
def test_features_are_those_of_one_process(
    options: str, ranks: RankPool, command: list[str], single: Features, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # Two to a batch here, one there; two blocks, so that two replicas have one each.
    given = [*command, *options.split(), "--batch-size", "2", "--out", str(out)]
    assert ranks.run(compute, given, ranks=LAYOUTS[options]) == [0] * LAYOUTS[options]
    for one, cut in zip(single, everything(out), strict=True):
        torch.testing.assert_close(cut, one, atol=1e-5, rtol=1e-5)
    # Bounds that any two latents would meet would show nothing.
    first, second = single.features[0], single.features[1]
    assert (first - second).abs().mean() > 1e-2
