"""Random numbers of a sequence, each by its position: the same whatever the batch, and after a resume."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

UIntArray = npt.NDArray[np.uint64]

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


def random_stream(seed: int, index: int) -> np.uint64:
    """The state from which the `index`-th sequence of a request of this seed draws."""
    keys = np.array([seed & (2**64 - 1), index], dtype=np.uint64)
    mixed = _mix(keys + _GOLDEN)
    return np.uint64(_mix(mixed[:1] ^ (mixed[1:] * _GOLDEN))[0])


def uniforms_at(streams: UIntArray, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each stream: SplitMix64's, at its position."""
    steps = positions.astype(np.uint64) + np.uint64(1)
    return (_mix(streams + steps * _GOLDEN) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: UIntArray) -> UIntArray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
