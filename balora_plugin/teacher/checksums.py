"""CRC-32 of many rows of bytes at once, as zlib has it of each. Imports numpy alone."""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np


def crc_of_rows(rows: np.ndarray) -> np.ndarray:
    """Returns the CRC-32 (n,) uint32 of each row of (n, size) uint8.

    Of one length a CRC is the exclusive or of what each byte at its place adds.
    """
    size = rows.shape[1]
    found = np.full(len(rows), zlib.crc32(bytes(size)), "<u4")
    for added, column in zip(_added(size), np.ascontiguousarray(rows.T), strict=True):
        found ^= added[column]
    return found


@lru_cache(maxsize=1)
def _added(size: int) -> np.ndarray:
    """Returns what a byte adds to the CRC-32 of so many bytes, by its place and value, (size, 256)."""
    zeros = zlib.crc32(bytes(size))
    rows = [
        [zlib.crc32(bytes(place) + bytes([value]) + bytes(size - 1 - place)) ^ zeros for value in range(256)]
        for place in range(size)
    ]
    return np.array(rows, "<u4")
