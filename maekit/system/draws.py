"""Random numbers as a pure function of where they are used, whichever process draws them.

A counter-based generator (Philox 4x64, Salmon et al. 2011) is keyed by (seed, salt) and started at a counter made of
(purpose, epoch, position). Any worker on any rank gets the same numbers for a position, so resuming in the middle of a
run is arithmetic. Only the raw bits of the generator are used: NumPy promises those for ever, while the methods of
`Generator` may change between versions (NEP 19).
"""

import enum

import numpy as np
from numpy.typing import NDArray

_MASK64 = (1 << 64) - 1
_WORDS_PER_BLOCK = 4  # of Philox 4x64


class Purpose(enum.IntEnum):
    """What the random numbers are for; two purposes never share a stream."""

    SHARD_ORDER = 1
    SAMPLE_ORDER = 2
    CROP = 3
    FLIP = 4
    MASK = 5
    SUBSTITUTE = 6
    PICTURE = 7
    VALIDATION = 8
    JITTER = 9
    POLICY = 10
    STEP = 11


def random_bits(
    count: int, purpose: Purpose, *, seed: int, salt: int = 0, epoch: int = 0, position: int = 0
) -> NDArray[np.uint64]:
    """Return `count` random 64-bit words, uint64 `[count]`."""
    # The generator itself counts in the first word.
    return _philox(count, [0, position, epoch, purpose], seed=seed, salt=salt)


def uniforms(
    count: int, purpose: Purpose, *, seed: int, salt: int = 0, epoch: int = 0, position: int = 0
) -> NDArray[np.float64]:
    """Return `count` uniform numbers in [0, 1), float64 `[count]`, with 53 random bits each."""
    return _uniforms_of(random_bits(count, purpose, seed=seed, salt=salt, epoch=epoch, position=position))


def uniform_rows(
    rows: int, count: int, purpose: Purpose, *, seed: int, salt: int = 0, epoch: int = 0, position: int = 0
) -> NDArray[np.float64]:
    """Return `count` uniform numbers in [0, 1) for `rows` positions from `position` on, float64 `[rows, count]`.

    Each position has its own stretch of one stream. A row therefore depends on its position alone, and many rows cost
    one call.
    """
    blocks = -(-count // _WORDS_PER_BLOCK)
    bits = _philox(rows * blocks * _WORDS_PER_BLOCK, [position * blocks, 0, epoch, purpose], seed=seed, salt=salt)
    return _uniforms_of(bits.reshape(rows, -1)[:, :count])


def _philox(count: int, counter: list[int], *, seed: int, salt: int) -> NDArray[np.uint64]:
    key = np.array([seed & _MASK64, salt & _MASK64], np.uint64)
    bits: NDArray[np.uint64] = np.random.Philox(key=key, counter=np.array(counter, np.uint64)).random_raw(count)
    return bits


def _uniforms_of(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(
    count: int, purpose: Purpose, *, seed: int, salt: int = 0, epoch: int = 0, position: int = 0
) -> NDArray[np.int64]:
    """Return a random permutation of `range(count)`, int64 `[count]`."""
    bits = random_bits(count, purpose, seed=seed, salt=salt, epoch=epoch, position=position)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)
