"""A global batch with more latent positions than megatron-core can count is refused before training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_video.errors import UserError
from megatron_video.flops import latent_shape
from megatron_video.parallel import ParallelConfig
from training.build_trainer import check_position_count
from training.config import DataConfig, PretrainConfig

# 75,888 positions a video: 28,299 of them are just above 2^31.
DATA = SimpleNamespace(shapes={"video": latent_shape(204, 544, 992), "image": latent_shape(1, 256, 256)})

SIZES = {"video": 1, "image": 1}


def config(samples: int, context_parallel_size: int = 1) -> PretrainConfig:
    parallel = ParallelConfig(context_parallel_size=context_parallel_size)
    return PretrainConfig(data=DataConfig(global_batch_size=samples), parallel=parallel)


def test_batches_of_the_paper_pass() -> None:
    check_position_count(config(28_298), DATA, SIZES)
    check_position_count(config(3_000, context_parallel_size=8), DATA, SIZES)


@pytest.mark.parametrize(("samples", "ranks"), [(28_299, 1), (14_150, 2)])
def test_too_many_are_refused(samples: int, ranks: int) -> None:
    with pytest.raises(UserError, match=rf"global_batch_size={samples}.*context_parallel_size={ranks}"):
        check_position_count(config(samples, ranks), DATA, SIZES)


def test_images_on_top_count_too() -> None:
    # 28,200 videos leave room for 7.4 million positions: 28,900 images of 256.
    fits, not_fits = (PretrainConfig(data=DataConfig(global_batch_size=28_200, images_per_video=n)) for n in (1.0, 1.1))
    check_position_count(fits, DATA, SIZES)
    with pytest.raises(UserError, match="global_batch_size=28200"):
        check_position_count(not_fits, DATA, SIZES)
