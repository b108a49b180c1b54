"""L with W^T W = L L^T of a frozen head, made once: the spectrum of logits from hidden states. Imports torch alone."""

from __future__ import annotations

import weakref
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .head import Head


class HeadFactor:
    """L with L L^T = W^T W of an LM head W (V, d), plain or row-centred, (d', rank); d' = d, + 1 with a bias."""

    def __init__(self, gram: Tensor, mean: Tensor, vocabulary: int, has_bias: bool) -> None:
        self._gram, self._mean = gram, mean
        self.vocabulary = vocabulary
        self.has_bias = has_bias

    @cached_property
    def plain(self) -> Tensor:
        """(d', rank) L of the logits as they are."""
        return _square_root(self.gram())

    @cached_property
    def centered(self) -> Tensor:
        """(d', rank) L of the row-centred logits."""
        return _square_root(self.gram(centered=True))

    def gram(self, *, centered: bool = False) -> Tensor:
        """(d', d') W^T W, of the row-centred logits if `centered`."""
        return self._centered_gram if centered else self._gram

    @cached_property
    def _centered_gram(self) -> Tensor:
        return self._gram - self.vocabulary * torch.outer(self._mean, self._mean)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None, *, chunk_size: int = 16384) -> HeadFactor:
        """weight (V, d), bias (V,) or None -> factor. Reads W in chunks of `chunk_size` rows; takes no gradient."""
        vocabulary, d = weight.shape
        size = d + (bias is not None)
        gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
        total = torch.zeros(size, dtype=torch.float64, device=weight.device)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            for start in range(0, vocabulary, chunk_size):
                part = weight[start : start + chunk_size].double()
                if bias is not None:
                    part = torch.cat([part, bias[start : start + chunk_size, None].double()], dim=1)
                gram += part.T @ part
                total += part.sum(dim=0)
        return cls(gram, total / vocabulary, vocabulary, bias is not None)


def _square_root(gram: Tensor) -> Tensor:
    """L with L L^T = gram, columns of zero dropped: eigenvectors, because a centred or small head is rank-deficient."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    keep = eigenvalues > eigenvalues[-1].clamp_min(0.0) * 1e-14
    return vectors[:, keep] * eigenvalues[keep].sqrt()


class FactorCache:
    """The head's spectral factor, computed once and again only when the head changed."""

    def __init__(self) -> None:
        self._state: tuple[Any, ...] = ()
        self._sources: list[weakref.ref[Tensor]] = []
        self._factor: HeadFactor | None = None

    def get(self, head: Head) -> HeadFactor:
        """The factor of head.weight and head.bias, which must not train."""
        state: tuple[Any, ...]
        # not the data's address, which a gathered weight has anew at every step; nor, under FSDP1, the tensor, which is
        # a new view at every step of a parameter that stays
        given = [x for x in (head.sources or (head.weight, head.bias)) if x is not None]
        sources = [x if x._base is None else x._base for x in given]
        state = (head.weight.shape, head.weight.device)
        state += tuple((s._version, x.storage_offset(), x.shape) for s, x in zip(sources, given, strict=True))
        same = len(sources) == len(self._sources) and all(
            ref() is x for ref, x in zip(self._sources, sources, strict=True)
        )
        if self._factor is None or not same or state != self._state:
            self._factor = HeadFactor.from_weight(head.weight.detach(), head.bias)
            self._sources, self._state = [weakref.ref(x) for x in sources], state
        return self._factor
