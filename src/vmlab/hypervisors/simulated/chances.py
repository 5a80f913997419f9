"""Randomness from one seed, as a function of names and not of the order of draws.

A draw is named ("latency", machine, count): the same seed and name give the same number, however
many other draws there were before it, so that one machine's luck does not disturb another's.
"""

from __future__ import annotations

from hashlib import blake2b


class Chances:
    """Random numbers by name, from one seed."""

    __slots__ = ("_key", "seed")

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._key = blake2b(str(seed).encode(), digest_size=32).digest()

    def unit(self, *name: str | int) -> float:
        """A number of [0, 1), evenly distributed."""
        text = "/".join(map(str, name)).encode()
        digest = blake2b(text, key=self._key, digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) / (1 << 53)

    def raw(self, length: int, *name: str | int) -> bytes:
        """`length` random bytes, at most 64."""
        return blake2b(
            "/".join(map(str, name)).encode(), key=self._key, digest_size=length
        ).digest()
