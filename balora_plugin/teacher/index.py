"""Where each document of a cache is, in arrays: 21 bytes a document, looked up by bisection. Imports numpy alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

KEY_BYTES = 16
RECENT = 1 << 16  # documents added one by one before they join the arrays


class Entry(NamedTuple):
    """One document: its number in the index, and the pair of files and the entry of its index that have it."""

    number: int
    shard: str
    row: int


class Index:
    """The documents of all pairs of files, in the order in which these were added.

    Keys are kept whole, as two halves, and sorted; beside each stands the number that it was added with, which says
    shard and entry. So a key that is here is told from one that is not without a file being read.

    Args:
        shards: Name and keys (n, 16) uint8 of each; 0 for an entry that is none. Of two documents of one key the first
            is kept.
    """

    def __init__(self, shards: Sequence[tuple[str, np.ndarray]] = ()) -> None:
        self._shards = [name for name, _ in shards]
        self._begins = [0, *np.cumsum([len(keys) for _, keys in shards], dtype=np.int64).tolist()]
        halves = [_halves(keys) for _, keys in shards]
        high, low = (np.concatenate([half[i] for half in halves] or [np.empty(0, "<u8")]) for i in (0, 1))
        del halves
        order = _order(high, low)
        high = high[order]  # one after the other, so that less is held at once
        low = low[order]
        numbers = order.astype("<u4")
        del order
        again = np.zeros(len(high), bool)
        again[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        again[(high == 0) & (low == 0)] = True
        if again.any():
            high, low, numbers = high[~again], low[~again], numbers[~again]
        self._high, self._low, self._numbers = high, low, numbers
        self._verified = bytearray(self._begins[-1])
        self._forgotten: set[int] = set()  # numbers that the arrays still hold
        self._recent: dict[bytes, int] = {}

    @property
    def shards(self) -> Sequence[str]:
        """The names of all pairs, those that were dropped too."""
        return self._shards

    def __len__(self) -> int:
        return len(self._high) + len(self._recent) - len(self._forgotten)

    def __contains__(self, key: bytes) -> bool:
        return self._number(key) is not None

    def __iter__(self) -> Iterator[bytes]:
        """All keys, those that were added last in the end."""
        for high, low, number in zip(*(part.tolist() for part in (self._high, self._low, self._numbers)), strict=True):
            if number in self._forgotten:
                continue
            yield high.to_bytes(8, "big") + low.to_bytes(8, "big")
        yield from self._recent

    def find(self, key: bytes) -> Entry | None:
        """Returns where a document is; None if it is not here."""
        number = self._number(key)
        if number is None:
            return None
        shard = bisect_right(self._begins, number) - 1
        return Entry(number, self._shards[shard], number - self._begins[shard])

    def add(self, shard: str, keys: Sequence[bytes]) -> None:
        """Adds the documents of a new pair of files, in the order of its index; a key of 0 is none."""
        begin = self._begins[-1]
        self._shards.append(shard)
        self._begins.append(begin + len(keys))
        self._verified.extend(bytes(len(keys)))
        for number, key in enumerate(keys, begin):
            if any(key) and self._number(key) is None:
                self._recent[key] = number
        if len(self._recent) >= RECENT:
            self._merge()

    def drop(self, shard: str) -> None:
        """Forgets the documents of a pair of files."""
        at = self._shards.index(shard)
        begin, end = self._begins[at], self._begins[at + 1]
        kept = (self._numbers < begin) | (self._numbers >= end)
        self._high, self._low, self._numbers = self._high[kept], self._low[kept], self._numbers[kept]
        self._recent = {key: number for key, number in self._recent.items() if not begin <= number < end}
        self._forgotten = {number for number in self._forgotten if not begin <= number < end}

    def forget(self, key: bytes, number: int) -> None:
        """Forgets one document where it is; the same added later, or from another pair, is found again."""
        if self._recent.get(key) == number:
            del self._recent[key]
        else:
            self._forgotten.add(number)

    def memory(self) -> int:
        """Returns how many bytes it takes, what was added last about: 21 a document, and at most 10 MB more."""
        arrays = sum(part.nbytes for part in (self._high, self._low, self._numbers))
        return arrays + len(self._verified) + 150 * len(self._recent)

    def is_verified(self, number: int) -> bool:
        """Returns whether the rows of this document have been compared with their checksum."""
        return bool(self._verified[number])

    def verify(self, number: int) -> None:
        """Says that they have been."""
        self._verified[number] = 1

    def _number(self, key: bytes) -> int | None:
        recent = self._recent.get(key)
        if recent is not None:
            return recent
        high, low = (np.uint64(int.from_bytes(part, "big")) for part in (key[:8], key[8:]))
        at = int(self._high.searchsorted(high))
        while at < len(self._high) and self._high[at] == high:
            if self._low[at] == low and (number := int(self._numbers[at])) not in self._forgotten:
                return number
            at += 1
        return None

    def _merge(self) -> None:
        """Takes what was added into the arrays."""
        new = np.frombuffer(b"".join(self._recent), np.uint8).reshape(-1, KEY_BYTES)
        high, low = _halves(new)
        order = _order(high, low)
        high, low = high[order], low[order]
        numbers = np.fromiter(self._recent.values(), "<u4", len(new))[order]
        at = self._high.searchsorted(high)
        self._recent = {}
        self._high, self._low, self._numbers = (
            np.insert(old, at, more) for old, more in ((self._high, high), (self._low, low), (self._numbers, numbers))
        )


def _halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first and the last eight bytes of keys (n, 16) uint8 as numbers."""
    pairs = np.ascontiguousarray(keys).view(">u8")
    return pairs[:, 0].astype("<u8"), pairs[:, 1].astype("<u8")


def _order(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Returns what sorts keys, of equal ones the first first: by the first halves, which alone decide but for a few."""
    order = np.argsort(high, kind="stable")
    first = high[order]
    equal = np.zeros(len(first) + 1, bool)
    equal[1:-1] = first[1:] == first[:-1]
    tied = np.flatnonzero(equal[1:] | equal[:-1])
    among = order[tied]
    order[tied] = among[np.lexsort((low[among], first[tied]))]
    return order
