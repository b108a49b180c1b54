"""Factors of the PiSSA start kept on disk by the weight's hash, so that a second run starts at once."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...atomic import replacing
from .pissa import FAST_ITERATIONS, FAST_SEED, pissa_factors

logger = logging.getLogger(__name__)

VARIABLE = "BALORA_CACHE"  # a directory; "off" keeps nothing
SMALLEST = 2**20  # entries of a matrix: below, its SVD takes a fraction of a second
ABANDONED = 24 * 3600  # seconds after which nobody writes a temporary file any more
LARGEST = 32 * 2**30  # bytes of all files; the least recently used go first


def cache_directory() -> Path | None:
    """Returns $BALORA_CACHE, or balora_plugin below the user's cache directory; None if it is "off"."""
    given = os.environ.get(VARIABLE, "")
    if given.lower() in ("off", "0", "false"):
        return None
    if given:
        return Path(given).expanduser() / "starts"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "balora_plugin" / "starts"


class StartCache:
    """pissa_factors, whose results for large matrices are kept in `directory` and found again by the weight's bytes.

    Attributes:
        computed, found: How many matrices were factorised, and how many read.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.computed = self.found = 0

    def factors(self, weight: Tensor, rank: int, scaling: float, *, fast: bool) -> tuple[Tensor, Tensor]:
        """Returns A0 (r, in) and B0 (out, r) as [`pissa_factors`], on the weight's device."""
        path = None
        if self.directory is not None and weight.numel() >= SMALLEST:
            path = self.directory / f"{_key(weight, rank, scaling, fast)}.safetensors"
            kept = _read(path, weight, rank)
            if kept is not None:
                self.found += 1
                return kept[0].to(weight.device), kept[1].to(weight.device)
        a, b = pissa_factors(weight, rank, scaling, fast=fast)
        self.computed += 1
        if path is not None:
            self._write(path, a, b)
        return a, b

    def _write(self, path: Path, a: Tensor, b: Tensor) -> None:
        tensors = {"A0": a.cpu().contiguous(), "B0": b.cpu().contiguous()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:  # whole or not there, also beside another job
                save_file(tensors, temporary, {"sha256": _digest(tensors)})
        except (OSError, SafetensorError) as error:
            self.directory = None
            logger.warning(
                f"BA-LoRA: A0 and B0 are not kept for the next run: {path.parent} cannot be written ({error}). Set "
                f"{VARIABLE} to a directory that can, or to off."
            )

    def prune(self) -> None:
        """Removes what killed runs left half-written, and the least recently used files over LARGEST bytes."""
        if self.directory is None or not self.computed:
            return
        files = []
        for entry in self.directory.glob("*"):
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


def _key(weight: Tensor, rank: int, scaling: float, fast: bool) -> str:
    how = ("fast", FAST_SEED, FAST_ITERATIONS) if fast else ("exact",)
    digest = hashlib.sha256(repr((1, str(weight.dtype), tuple(weight.shape), rank, scaling, how)).encode())
    digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, weight: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Returns what stands in the file if it is whole; a damaged one is as good as none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("A0", "B0")}
            said = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    with suppress(OSError):  # another user's file: of use all the same
        os.utime(path)
    *batch, out_features, in_features = weight.shape
    shapes = (*batch, rank, in_features), (*batch, out_features, rank)
    if (tuple(tensors["A0"].shape), tuple(tensors["B0"].shape)) != shapes or said != _digest(tensors):
        return None
    return tensors["A0"], tensors["B0"]
