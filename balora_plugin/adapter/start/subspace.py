"""The r leading singular triples of a matrix to a stated share of their energy, by a block Krylov iteration.

Imports torch alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SEED = 20240808  # fixed: two builds of the same weight give the same factors on one machine
VERSION = 3  # of what is found: part of the key of kept starts
_ORTHOGONAL, _NEARLY = 1e-6, 0.1
_PASSES = 4
_CONFIRMED = 2  # steps with fresh vectors
_LEAST, _MOST, _WAITED = 0.2, 0.3, 0.6  # until the next look: shares of the basis, and of what is left
_SAFETY, _SPREAD = 4.0, 8.0  # measured: see docs/benchmarks.md, "The start"


def largest_entry(w: Tensor) -> Tensor:
    """Returns the largest magnitude of each matrix of (..., m, n), or 1 of one that is 0, as (..., 1, 1)."""
    largest = torch.maximum(w.amax(dim=(-2, -1), keepdim=True), -w.amin(dim=(-2, -1), keepdim=True))  # no copy of w
    return torch.where(largest > 0, largest, 1.0)


@dataclass(frozen=True)
class Leading:
    """U (..., m, r), S (..., r), V^T (..., r, n) of matrices (..., m, n), and what they cost.

    Attributes:
        converged: Of each matrix (...): whether the energy it lacks was estimated to be within the tolerance.
        columns: With how many vectors every matrix was multiplied, from either side.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    converged: Tensor
    columns: int


def block_of(rank: int) -> int:
    """Returns how many vectors the basis grows by at a time.

    Few, as the rank is reached with fewer products then; not one, as a product with a few vectors takes as long as one
    with 16, and multiple singular values are found as often as there are vectors in a block.
    """
    return max(16, rank // 4)


def is_worth_it(rank: int, m: int, n: int) -> bool:
    """Returns whether a basis is expected to end well below the matrix's dimensions: else its SVD costs no more."""
    return 6 * (rank + block_of(rank)) <= min(m, n)


def leading_triples(w: Tensor, rank: int, tolerance: float) -> Leading:
    """Iterates until the r triples hold at least 1 - `tolerance` of the sum of the r largest squared singular values.

    A random block and its images under W W^T, kept orthogonal, span a basis U. Its Ritz values theta_i, the eigenvalues
    of (W^T U)^T (W^T U), only grow with it. What theta_i lacks of its singular value squared is at most the residual
    |e_i| of its vector, and about |e_i|^2 / (theta_i - c) where the values that are not yet found lie below c, for
    which the (r + block)-th Ritz value is taken; the residuals are known before the next product. The estimate is the
    sum of the smaller of both, with a factor of 8 for the one and 4 for the other.

    It is blind for directions that no vector of the basis has a part in: one block holds a singular value, or a tight
    cluster of them, only as often as it has vectors. So where the estimate is within the tolerance, as many
    fresh random vectors join the block for two steps: if the r values grow by more than the tolerance, the iteration
    goes on with twice the block. Else it ends. It gives up (`converged` is False) where the basis has three quarters of
    the dimensions.

    Matrices of a batch share the random block and go on until each of them is done, so that what is found for one does
    not depend on the others but for the number of steps.

    Args:
        w: (..., m, n), float32 or float64, finite.
        rank: r >= 1 for which [`is_worth_it`].
        tolerance: Share of the optimal energy that may be missing; what float32 can tell is about 1e-7.
    """
    turned = w.shape[-2] > w.shape[-1]  # the basis stands on the shorter side
    operator = w.mT if turned else w
    found = _leading(operator.reshape(-1, *operator.shape[-2:]), rank, tolerance)
    u, vh = (found.vh.mT, found.u.mT) if turned else (found.u, found.vh)
    batch = w.shape[:-2]
    return Leading(
        u.reshape(*batch, *u.shape[-2:]),
        found.s.reshape(*batch, rank),
        vh.reshape(*batch, *vh.shape[-2:]),
        found.converged.reshape(batch),
        found.columns,
    )


def _leading(w: Tensor, rank: int, tolerance: float) -> Leading:
    search = _Search(w, rank)
    within, converged = search.grow_until(tolerance)
    u, s, vh = search.triples()
    columns = search.columns
    if not bool(converged.all()) and bool(within.any()) and not bool(within.all()):  # without those that hold them up
        rest = _leading(w[within], rank, tolerance)
        u[within], s[within], vh[within], converged[within] = rest.u, rest.s, rest.vh, rest.converged
        columns += rest.columns
    return Leading(u, s, vh, converged, columns)


class _Columns:
    """Columns (E, rows, count) that others are appended to, in memory that is taken ahead of them."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self._store = like.new_empty(like.shape[0], rows, 0)
        self.count = 0

    @property
    def value(self) -> Tensor:
        return self._store[..., : self.count]

    def append(self, columns: Tensor) -> None:
        count = self.count + columns.shape[-1]
        if count > self._store.shape[-1]:
            store = self._store.new_empty(*self._store.shape[:-1], count + count // 2)
            store[..., : self.count] = self.value
            self._store = store
        self._store[..., self.count : count] = columns
        self.count = count


class _Search:
    """The growing basis of matrices (E, m, n), m <= n: U (E, m, k), its images Z = W^T U (E, n, k), Z^T Z (E, k, k)."""

    def __init__(self, w: Tensor, rank: int) -> None:
        self._w, self._rank = w, rank
        self._scale = largest_entry(w)  # else squares of small weights are 0
        self._random = torch.Generator(device="cpu").manual_seed(SEED)
        self._basis, self._images = _Columns(w.shape[-2], w), _Columns(w.shape[-1], w)
        self._gram = self._vectors = w.new_zeros(w.shape[0], 0, 0, dtype=torch.float64)
        self._found: Tensor | None = None  # the leading Ritz vectors when fresh vectors joined
        self._new, _ = self._orthogonal(w @ self._drawn(w.shape[-1], block_of(rank)) / self._scale)  # not in U yet
        self.columns = block_of(rank)

    def grow_until(self, tolerance: float) -> tuple[Tensor, Tensor]:
        """Grows the basis; returns of each matrix (E,) whether its estimate is within the tolerance, and confirmed."""
        rank, limit = self._rank, 3 * min(self._w.shape[-2:]) // 4
        look = max(2 * rank, rank + 2 * self._new.shape[-1])
        earlier: tuple[int, float] | None = None  # the look before
        before: Tensor | None = None  # the energy when fresh vectors joined
        while True:
            coupling = self._grow()
            size, width = self._basis.count, self._new.shape[-1]
            last = size + width > limit
            if size < look and not last:
                continue
            if before is None and not last:
                lost = float((self._look(coupling, self._w.dtype)[1]).max())
                if not lost <= tolerance:
                    look, earlier = size + max(width, _until(tolerance, (size, lost), earlier)), (size, lost)
                    continue
            energy, estimate = self._look(coupling, torch.float64)
            within = estimate <= tolerance
            ready = bool(within.all())
            if ready and before is not None and size >= look:
                energy = torch.linalg.eigvalsh(self._gram)[:, -rank:].sum(-1)
                confirmed = energy - before <= tolerance * energy
                if last or bool(confirmed.all()):
                    return within, confirmed
            if last:
                return within, torch.zeros_like(within)
            if ready:
                before, self._found = energy, self._vectors[..., : rank + width]
                self._widen()
                look = size + _CONFIRMED * self._new.shape[-1]
            else:
                before, self._found = None, None
                look = size + width

    def _grow(self) -> Tensor:
        """Takes the new block into the basis; returns what (1 - U U^T) W W^T has of it (E, width, width)."""
        new = self._new
        image = self._w.mT @ new / self._scale
        beside, own = (self._images.value.mT @ image).double(), (image.mT @ image).double()
        above, below = torch.cat([self._gram, beside], -1), torch.cat([beside.mT, own], -1)
        self._gram = torch.cat([above, below], -2)
        self._basis.append(new)
        self._images.append(image)
        direction, length = torch.linalg.qr(image)  # a product of what is not orthonormal loses the short ones
        self._new, left = self._orthogonal(self._w @ direction / self._scale)
        self.columns += 2 * new.shape[-1]
        return left @ length

    def _widen(self) -> None:
        """Lets as many fresh random vectors join the new block."""
        fresh = self._drawn(self._w.shape[-2], self._new.shape[-1]).expand(self._w.shape[0], -1, -1)
        basis = torch.cat([self._basis.value, self._new], -1)
        self._new = torch.cat([self._new, _orthogonal_to(basis, fresh)[0]], -1)

    def _orthogonal(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns Q orthonormal and orthogonal to the basis, and S with (1 - U U^T) y = Q S.

        Where nothing is left of y (a flat spectrum, a matrix of low rank), Q is random.
        """
        length = y.flatten(-2).norm(dim=-1)[:, None, None] / y.shape[-2] ** 0.5
        basis = self._basis.value
        y = y - basis @ (basis.mT @ y)
        return _orthogonal_to(basis, y + 1e-8 * torch.where(length > 0, length, 1.0) * self._drawn(*y.shape[-2:]))

    def _drawn(self, rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=self._random, dtype=self._w.dtype)
        return drawn.to(self._w.device)

    def _look(self, coupling: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Takes the Ritz vectors; returns their energy, and the estimated share of the optimal one that it lacks.

        float32 is enough for how far there is to go; the vectors of small values need float64.
        """
        frame = self._frame(dtype)
        gram = self._gram.to(dtype)
        values, vectors = torch.linalg.eigh(gram if frame is None else frame.mT @ gram @ frame)
        values, vectors = values.flip(-1), vectors.flip(-1)
        self._vectors = vectors = vectors if frame is None else frame @ vectors
        rank, width, tiny = self._rank, coupling.shape[-1], torch.finfo(dtype).tiny
        found, beyond = values[:, :rank], values[:, min(rank + width, values.shape[-1] - 1), None]
        residual = (coupling.to(dtype) @ vectors[:, -width:, :rank]).norm(dim=-2)
        by_gap = _SAFETY * residual.square() / (found - beyond).clamp_min(tiny)
        energy = found.sum(-1)
        return energy, torch.minimum(_SPREAD * residual, by_gap).sum(-1) / energy.clamp_min(tiny)

    def _frame(self, dtype: torch.dtype) -> Tensor | None:
        """Returns what was found when fresh vectors joined, and what came into the basis since (E, k, fewer).

        The eigenvectors of all of the basis would cost as much as the steps; its eigenvalues tell whether those found
        more, and among these are what they found.
        """
        if self._found is None:
            return None
        size, (count, found) = self._basis.count, self._found.shape[-2:]
        frame = self._found.new_zeros(self._found.shape[0], size, found + size - count)
        frame[:, :count, :found] = self._found
        frame[:, count:, found:] = torch.eye(size - count, dtype=frame.dtype, device=frame.device)
        return frame.to(dtype)

    def triples(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns U (E, m, r), S (E, r), V^T (E, r, n): the leading ones of U U^T W."""
        chosen = self._vectors[..., : self._rank].to(self._w.dtype)
        right, s, turn = torch.linalg.svd(self._images.value @ chosen, full_matrices=False)
        return self._basis.value @ (chosen @ turn.mT), s * self._scale[:, 0], right.mT


def _until(tolerance: float, now: tuple[int, float], earlier: tuple[int, float] | None) -> int:
    """Returns after how many vectors to look again, of two looks: vectors of the basis, and the share they lacked.

    The share falls faster and faster, so a part of what is left at the pace of the two is waited for, within bounds: a
    look costs as much as some products, and so does a basis beyond need.
    """
    size, lost = now
    least, most = int(_LEAST * size), int(_MOST * size)
    if earlier is None or not 0 < lost < earlier[1]:
        return least
    left = math.log(lost / tolerance) * (size - earlier[0]) / math.log(earlier[1] / lost)
    return min(max(int(_WAITED * left), 1), most)


def _orthogonal_to(basis: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns Q orthonormal and orthogonal to the orthonormal basis, and S with y = Q S but for what lies within it."""
    q, s = torch.linalg.qr(y)
    for _ in range(_PASSES):  # twice is enough, but where next to nothing is left
        inside = basis.mT @ q
        if bool((inside.abs() <= _ORTHOGONAL).all()):
            break
        q, more = torch.linalg.qr(q - basis @ inside)
        s = more @ s
        if bool((inside.norm(dim=-2) <= _NEARLY).all()):  # what such a pass leaves is rounding
            break
    return q, s
