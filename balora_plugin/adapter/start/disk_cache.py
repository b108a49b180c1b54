"""Factors of the PiSSA start kept on disk by the weight's hash, so that a second run starts at once.

An optimisation: where the directory cannot be had a run goes on without it. A file, whoever wrote it, is used only if
it holds the leading singular triples of this weight.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...atomic import replacing
from .agreement import are_leading_triples
from .pissa import TOLERANCES, pissa_factors, started_rank
from .subspace import SEED, VERSION

logger = logging.getLogger(__name__)

VARIABLE = "BALORA_CACHE"  # a directory; "off" keeps nothing
SMALLEST = 2**14  # entries of a matrix: below, its SVD takes no longer than a file
ABANDONED = 24 * 3600  # seconds after which nobody writes a temporary file any more
LARGEST = 32 * 2**30  # bytes of all files; the least recently used go first


def cache_directory() -> Path | None:
    """Returns $BALORA_CACHE, or balora_plugin below the user's cache directory.

    None if it is "off", or if it stands below the home of a user who has none here: said once.
    """
    given = os.environ.get(VARIABLE, "")
    if given.lower() in ("off", "0", "false"):
        return None
    try:
        if given:
            return Path(given).expanduser() / "starts"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "balora_plugin" / "starts"
    except RuntimeError as error:  # no home directory
        _warn_once(f"{VARIABLE}={given!r}: {error}")
        return None


@cache
def _warn_once(why: str) -> None:
    logger.warning(
        f"BA-LoRA: A0 and B0 are neither read from the disk nor kept for the next run: {why}. Set {VARIABLE} to a "
        "directory that can be read and written, or to off."
    )


class StartCache:
    """pissa_factors, whose results (but of tiny matrices) are kept in `directory` and found by the weight's bytes.

    Attributes:
        computed, found: How many matrices were factorised, and how many read.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.computed = self.found = 0

    def factors(self, weight: Tensor, rank: int, scaling: float, *, method: str) -> tuple[Tensor, Tensor]:
        """Returns A0 (k, in) and B0 (out, k) as [`pissa_factors`], on the weight's device."""
        name = None
        rank = started_rank(rank, *weight.shape[-2:])
        if self.directory is not None and weight.numel() >= SMALLEST:
            name = f"{_key(weight, rank, scaling, method)}.safetensors"
            kept = self._read(name, weight, rank)
            if kept is not None and are_leading_triples(weight, *kept, scaling, method=method):
                self.found += 1
                return kept
        a, b = pissa_factors(weight, rank, scaling, method=method)
        self.computed += 1
        if name is not None and self.directory is not None:
            self._write(self.directory / name, a, b)
        return a, b

    def _read(self, name: str, weight: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
        """Returns A0 and B0 of a file, on the weight's device, if it is whole and has their shapes and dtype."""
        assert self.directory is not None
        path = self.directory / name
        try:
            if not path.is_file():
                return None
            tensors, said = _tensors(path)
        except SafetensorError:  # damaged
            return None
        except OSError as error:
            self._give_up("read", error)
            return None
        with suppress(OSError):  # another user's file: of use all the same
            os.utime(path)
        *batch, out_features, in_features = weight.shape
        shapes = {"A0": (*batch, rank, in_features), "B0": (*batch, out_features, rank)}
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if any((tuple(tensors[key].shape), tensors[key].dtype) != (shape, dtype) for key, shape in shapes.items()):
            return None
        if said != _digest(tensors):
            return None
        return tensors["A0"].to(weight.device), tensors["B0"].to(weight.device)

    def _give_up(self, what: str, error: Exception) -> None:
        _warn_once(f"{self.directory} cannot be {what} ({error})")
        self.directory = None

    def _write(self, path: Path, a: Tensor, b: Tensor) -> None:
        tensors = {"A0": a.cpu().contiguous(), "B0": b.cpu().contiguous()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:  # whole or not there, also beside another job
                save_file(tensors, temporary, {"sha256": _digest(tensors)})
        except (OSError, SafetensorError) as error:
            self._give_up("written", error)

    def prune(self) -> None:
        """Removes what killed runs left half-written, and the least recently used files over LARGEST bytes."""
        if self.directory is None or not self.computed:
            return
        files = []
        try:
            entries = list(self.directory.iterdir())
        except OSError:  # gone, or written and not listed
            return
        for entry in entries:
            with suppress(OSError):  # another job removes as well
                stat = entry.stat()
                if entry.suffix == ".safetensors":
                    files.append((stat, entry))
                elif entry.suffix == ".tmp" and stat.st_mtime < time.time() - ABANDONED:
                    entry.unlink()
        total = sum(stat.st_size for stat, _ in files)
        for stat, entry in sorted(files, key=lambda pair: pair[0].st_mtime):
            if total <= LARGEST:
                return
            with suppress(OSError):  # gone already, or another user's
                entry.unlink()
                total -= stat.st_size


def _key(weight: Tensor, rank: int, scaling: float, method: str) -> str:
    tolerance = TOLERANCES[method]
    how = ("exact",) if tolerance is None else ("subspace", VERSION, SEED, tolerance)
    digest = hashlib.sha256(repr((1, str(weight.dtype), tuple(weight.shape), rank, scaling, how)).encode())
    digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Returns A0 and B0 of a file, and the hash of both that stands in it."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in ("A0", "B0")}, (file.metadata() or {}).get("sha256")
