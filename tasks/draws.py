"""Random draws that give the same values on every machine and Python version."""

import hashlib
import random
from collections.abc import MutableSequence, Sequence
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """A random stream named by its parts, e.g. ``Draws("niah_single_1", seed, length_tokens, sample)``.

    Only ``random.Random.random`` is used: it is the one method whose sequence Python promises to keep
    (library reference, "Notes on Reproducibility"); ``choice``, ``shuffle`` and ``sample`` have changed before.
    """

    def __init__(self, *parts: str | int) -> None:
        name = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
        self._next = random.Random(int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")).random

    def unit(self) -> float:
        """Return a float in [0, 1)."""
        return self._next()

    def below(self, bound: int) -> int:
        """Return an integer in [0, bound); bound must stay far under 2**53."""
        return int(self._next() * bound)

    def between(self, low: int, high: int) -> int:
        """Return an integer in [low, high], both ends included."""
        return low + int(self._next() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """Return one item."""
        return items[int(self._next() * len(items))]

    def shuffle(self, items: MutableSequence[T]) -> None:
        """Shuffle in place (Fisher-Yates)."""
        for i in range(len(items) - 1, 0, -1):
            j = int(self._next() * (i + 1))
            items[i], items[j] = items[j], items[i]

    def digits(self, count: int) -> str:
        """Return a decimal number of exactly ``count`` digits (no leading zero)."""
        low = 10 ** (count - 1)
        return str(self.between(low, 10 * low - 1))

    def uuid(self) -> str:
        """Return a version-4 UUID (RFC 9562) in lower case."""
        words = [self.below(65536) for _ in range(8)]
        words[3] = 0x4000 | (words[3] & 0x0FFF)
        words[4] = 0x8000 | (words[4] & 0x3FFF)
        h = "".join(f"{word:04x}" for word in words)
        return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


# Depth is drawn inside one of this many equal parts of the haystack, each used once per ten samples.
DEPTH_PARTS = 10


def stratified_depth(name: str, *, seed: int, length_tokens: int, sample: int) -> float:
    """Return a sample's depth in [0, 1): every ten samples of a cell cover the ten parts, in an order of their own."""
    parts = list(range(DEPTH_PARTS))
    Draws("depth", name, seed, length_tokens, sample // DEPTH_PARTS).shuffle(parts)
    inside = Draws("depth-in", name, seed, length_tokens, sample).unit()
    return (parts[sample % DEPTH_PARTS] + inside) / DEPTH_PARTS
