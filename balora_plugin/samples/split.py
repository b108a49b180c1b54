"""A held-out part of rows by a fixed rule: the same rows for every method, machine and order of the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from .jsonl import Samples


def digest_of(row: Any) -> str:
    """Returns the SHA-256 of a row's canonical JSON, hex."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def split(samples: Samples, share: float) -> tuple[Samples, Samples]:
    """Returns (training rows, held-out rows): the `share` of distinct rows whose digests are the smallest is held out.

    At least one row, and equal rows are on one side. Of classes each that has two rows or more gives its own share.

    Raises:
        ValueError: too few distinct rows to hold one out and train on another.
    """
    groups: dict[Any, list[str]] = {}
    for row in samples.rows:
        key = row["label"] if samples.classes else None
        found = digest_of(row)
        if found not in groups.setdefault(key, []):
            groups[key].append(found)
    if sum(map(len, groups.values())) < 2:
        raise ValueError(f"{samples.where} has one distinct row: two at least are needed, one of them to be held out.")
    held = {digest for digests in groups.values() for digest in _smallest(digests, share)}
    if not held:
        held = {min(digest for digests in groups.values() for digest in digests)}
    rest = [row for row in samples.rows if digest_of(row) not in held]
    return samples.with_rows(rest), samples.with_rows([row for row in samples.rows if digest_of(row) in held])


def _smallest(digests: Sequence[str], share: float) -> list[str]:
    count = min(max(1, round(share * len(digests))), len(digests) - 1)
    return sorted(digests)[:count]
