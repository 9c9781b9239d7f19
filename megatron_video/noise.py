"""All randomness of a training sample, as a pure function of who the sample is.

A draw depends on (seed, stage, epoch, sample index, purpose) and on nothing else: not on the call order, the batch,
the rank, the device, the number of workers, or any default generator. So a run is the same in every layout, and can
be resumed at any step without storing a generator's state.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from megatron_video.flow_matching import TimeDensity

# Part of every key. Changing what a draw means requires a new number, so that old runs are not silently continued.
_SCHEME = "megatron-video-noise-1"


class NoiseSource:
    """Timesteps, noise, posterior draws, kinds of captions and text dropout of the samples of one training stage.

    Args:
        seed: the run's seed.
        stage: the stage's name; two stages with one seed draw differently.
    """

    def __init__(self, seed: int, stage: str) -> None:
        # operator.index takes numpy's integers and refuses 1.0, which would print, and so key, differently.
        self.seed = operator.index(seed)
        self.stage = stage

    def timestep(self, epoch: int, sample: int, density: TimeDensity) -> float:
        """Time t in [0, 1) distributed by `density`; the value is exactly representable in fp32."""
        return density.quantile(self.generator("timestep", epoch, sample).random())

    def noise(self, epoch: int, sample: int, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal fp32 CPU tensor of `shape`: the t=0 end of the sample's path."""
        return self._normal("noise", epoch, sample, shape)

    def posterior(self, epoch: int, sample: int, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal fp32 CPU tensor of `shape`: the draw from the VAE posterior, mean + std * this."""
        return self._normal("posterior", epoch, sample, shape)

    def drop_text(self, epoch: int, sample: int, probability: float) -> bool:
        """Whether this draw of the sample trains without its caption (for classifier-free guidance)."""
        return self.generator("drop_text", epoch, sample).random() < probability

    def caption(self, epoch: int, sample: int, shares: Mapping[str, float]) -> str:
        """Which kind of its captions this draw of the sample trains with, by their `shares`, which sum to anything."""
        kinds = sorted(shares)
        ends = np.cumsum([shares[kind] for kind in kinds])
        place = self.generator("caption", epoch, sample).random() * ends[-1]
        # The last with a share, should rounding put the place at the very end.
        return kinds[min(int(np.searchsorted(ends, place, side="right")), len(kinds) - 1)]

    def dropout_seed(self, epoch: int, sample: int) -> int:
        """Seed in [0, 2^63) of the dropout masks of one draw of one sample (`megatron_video.dit.dropout`)."""
        return int(self.generator("dropout", epoch, sample).integers(2**63))

    def generator(self, purpose: str, epoch: int, sample: int) -> np.random.Generator:
        """A fresh Philox generator for one `purpose` of one draw of one sample.

        Args:
            purpose: names the use, so that uses are independent of each other.
            epoch: how often the sample has been drawn before, from 0.
            sample: global index of the sample in the data set.

        Raises:
            ValueError: a negative epoch or sample.
        """
        epoch, sample = operator.index(epoch), operator.index(sample)
        if epoch < 0 or sample < 0:
            raise ValueError(f"epoch={epoch} and sample={sample} count from 0")
        # JSON keeps the fields apart whatever characters the stage's name has.
        identity = json.dumps([_SCHEME, self.seed, self.stage, purpose, epoch, sample])
        key = hashlib.blake2b(identity.encode(), digest_size=16).digest()
        # Philox is counter-based: any 128-bit key starts an independent stream, without a state to keep.
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))

    def _normal(self, purpose: str, epoch: int, sample: int, shape: Sequence[int]) -> torch.Tensor:
        # numpy and not torch: torch's CPU and CUDA generators give different values for one seed.
        values = self.generator(purpose, epoch, sample).standard_normal(tuple(shape), dtype=np.float32)
        return torch.from_numpy(values)
