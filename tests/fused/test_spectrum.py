"""The singular-value term from hidden states against the SVD of the dense logits, down to degenerate input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from balora_plugin import regularizers as reg
from balora_plugin.fused import (
    HeadFactor,
    head_spectral_term,
    matrix_spectral_term,
    spectral_ratio,
    spectral_term,
    spectrum,
)

NORMS = ("nuclear", "frobenius", "none")
RANDOM = settings(max_examples=30, deadline=None, derandomize=True)
DRAWN = {
    "m": st.integers(1, 9),
    "vocabulary": st.integers(2, 12),
    "d": st.integers(1, 6),
    "seed": st.integers(0, 10**6),
    "bias": st.booleans(),
    "centered": st.booleans(),
    "norm": st.sampled_from(NORMS),
    "data": st.data(),
}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def conditioned(m, d, condition, seed=0):
    """(m, d) with singular values falling geometrically from 1 to 1 / condition."""
    size = min(m, d)
    left, right = torch.linalg.qr(random(m, size, seed=seed)).Q, torch.linalg.qr(random(d, size, seed=seed + 1)).Q
    return left * condition ** -torch.linspace(0, 1, size, dtype=torch.float64) @ right.T


def inputs(m, vocabulary, d, seed, bias):
    """hidden, weight, bias or None, all differentiable."""
    tensors = (random(m, d, seed=seed), random(vocabulary, d, seed=seed + 1), random(vocabulary, seed=seed + 2))
    hidden, weight, offset = (x.requires_grad_() for x in tensors)
    return hidden, weight, offset if bias else None


def dense_logits(hidden, weight, bias=None, scale=1.0, softcap=None):
    z = (hidden @ weight.T if bias is None else hidden @ weight.T + bias) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def relative_error(value, expected):
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def check(value, expected, leaves, tolerance):
    assert value.shape == ()
    assert value.item() == pytest.approx(expected.item(), rel=tolerance)
    leaves = [x for x in leaves if x is not None]
    for gradient, wanted in zip(
        torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves, retain_graph=True), strict=True
    ):
        # absolute where the term is constant (k at the limit of the nuclear ratio) and the gradient zero
        assert (gradient - wanted).norm() <= tolerance * max(wanted.norm().item(), 1.0)


def draw_k(data, logits, rank, centered):
    """Any k up to the limit, for logits whose non-zero singular values are clear of zero."""
    s = torch.linalg.svdvals(logits - logits.mean(-1, keepdim=True) if centered else logits)
    assume(rank > 0 and s[rank - 1] > 1e-2 * s[0])
    return data.draw(st.integers(1, min(logits.shape)))


# ---- a fixed head, by its factor ----


@RANDOM
@given(**DRAWN)
def test_factor_term_equals_the_dense_term(m, vocabulary, d, seed, bias, centered, norm, data):
    hidden, weight, offset = inputs(m, vocabulary, d, seed, bias)
    logits = dense_logits(hidden, weight, offset)
    k = draw_k(data, logits, min(m, vocabulary - centered, d + bias), centered)
    value = spectral_term(hidden, HeadFactor.from_weight(weight, offset), k=k, norm=norm, centered=centered)
    check(value, reg.spectral(logits, k=k, norm=norm, centered=centered), [hidden], 1e-9)


@pytest.mark.parametrize("k", range(1, 8))
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(20, 30, 7), (7, 30, 20), (20, 7, 12)])
def test_every_k(shape, norm, k):
    hidden, weight, _ = inputs(*shape, seed=5, bias=False)
    value = spectral_term(hidden, HeadFactor.from_weight(weight), k=k, norm=norm)
    check(value, reg.spectral(dense_logits(hidden, weight), k=k, norm=norm), [hidden], 1e-9)


@pytest.mark.parametrize("shape", [(30, 60, 8), (8, 60, 30)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_float32_and_bf16_inputs(shape, bias, norm):
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.bfloat16, 5e-3)):  # bf16: only the gradient is rounded
        tensors = [None if x is None else x.detach().to(dtype) for x in inputs(*shape, seed=3, bias=bias)]
        hidden = tensors[0].requires_grad_()
        exact_hidden = hidden.detach().double().requires_grad_()
        exact = dense_logits(exact_hidden, *[None if x is None else x.double() for x in tensors[1:]])
        value = spectral_term(hidden, HeadFactor.from_weight(*tensors[1:]), k=3, norm=norm)
        expected = reg.spectral(exact, k=3, norm=norm)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected.item(), rel=3e-7)
        gradients = torch.autograd.grad(value, hidden), torch.autograd.grad(expected, exact_hidden)
        assert relative_error(gradients[0][0], gradients[1][0]) < tolerance


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocabulary", [3, 23])
def test_factor_is_a_root_of_the_heads_gram_matrix(vocabulary, bias, centered):
    _, weight, offset = inputs(1, vocabulary, 5, seed=1, bias=bias)
    head = (weight if offset is None else torch.cat([weight, offset[:, None]], 1)).detach()
    if centered:
        head = head - head.mean(0)
    for chunk_size in (4, 100):
        factor = HeadFactor.from_weight(weight, offset, chunk_size=chunk_size)
        root = factor.centered if centered else factor.plain
        torch.testing.assert_close(root @ root.T, head.T @ head)
        assert root.shape == (5 + bias, min(5 + bias, vocabulary - centered))  # columns of zero dropped
        assert not root.requires_grad


def test_factor_of_a_bf16_head_is_float64():
    weight = random(50, 5, dtype=torch.bfloat16)
    root = HeadFactor.from_weight(weight).plain
    assert root.dtype == torch.float64
    torch.testing.assert_close(root @ root.T, weight.double().T @ weight.double())


def test_cost_does_not_depend_on_the_vocabulary(monkeypatch):
    # an operator's inside is hidden from the counter
    monkeypatch.setattr(spectrum, "spectral_ratio_op", spectrum.compute_spectral_ratio)
    hidden, flops = random(30, 6), []
    for vocabulary in (50, 5000):
        factor = HeadFactor.from_weight(random(vocabulary, 6))
        assert factor.plain.shape == (6, 6)
        with FlopCounterMode(display=False) as counter:
            spectral_term(hidden, factor, k=2)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_scale_matters_without_a_norm_only():
    hidden, weight, _ = inputs(6, 12, 5, seed=0, bias=False)
    factor = HeadFactor.from_weight(weight)
    for norm in NORMS:
        values = [spectral_term(hidden, factor, k=2, norm=norm, scale=scale).item() for scale in (1.0, 0.25)]
        assert values[1] == pytest.approx(values[0] * (0.25 if norm == "none" else 1.0))


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_autocast_changes_nothing(precision, monkeypatch):
    monkeypatch.setattr(spectrum, "product_precision", lambda device: precision)
    hidden = random(8, 5, dtype=torch.float32).requires_grad_()
    weight = random(20, 5, dtype=torch.float32).requires_grad_()
    for term, leaves in (
        (lambda: spectral_term(hidden, HeadFactor.from_weight(weight), k=2), [hidden]),
        (lambda: head_spectral_term(hidden, weight, k=2), [hidden, weight]),
        (lambda: head_spectral_term(hidden, weight, k=2, softcap=2.0), [hidden, weight]),
    ):
        plain = term()
        expected = torch.autograd.grad(plain, leaves)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = term()
        assert mixed == plain
        for a, b in zip(torch.autograd.grad(mixed, leaves), expected, strict=True):
            assert torch.equal(a, b)


# ---- flattened: one row a sample ----


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("samples", [4, 40])
def test_flattened_equals_the_dense_layout(samples, k, norm):
    hidden, weight = random(samples, 6, 3).requires_grad_(), random(10, 3, seed=1)
    counted = torch.rand(samples, 6, 1, generator=torch.Generator().manual_seed(2)) < 0.7
    value = spectral_term(hidden * counted, HeadFactor.from_weight(weight), k=k, norm=norm)
    logits = (hidden @ weight.T).masked_fill(~counted, 0.0)
    check(value, reg.spectral(logits.flatten(1), k=k, norm=norm), [hidden], 1e-9)
    (gradient,) = torch.autograd.grad(spectral_term(hidden * counted, HeadFactor.from_weight(weight), k=k), hidden)
    assert (gradient.masked_select(~counted) == 0).all()


def test_flattened_refuses_what_masking_would_break():
    hidden, weight = random(2, 4, 3), random(10, 3)
    with pytest.raises(ValueError, match="bias"):
        spectral_term(hidden, HeadFactor.from_weight(weight, random(10)), k=1)
    with pytest.raises(ValueError, match="centered"):
        spectral_term(hidden, HeadFactor.from_weight(weight), k=1, centered=True)


# ---- the matrix as it stands ----


@RANDOM
@given(m=DRAWN["m"], d=DRAWN["d"], seed=DRAWN["seed"], norm=DRAWN["norm"], data=DRAWN["data"])
def test_matrix_term_equals_the_dense_term(m, d, seed, norm, data):
    matrix = random(m, d, seed=seed).requires_grad_()
    k = draw_k(data, matrix, min(m, d), False)
    check(matrix_spectral_term(matrix, k=k, norm=norm), reg.spectral(matrix, k=k, norm=norm), [matrix], 1e-9)


def test_result_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        hidden, weight = random(6, 4, dtype=dtype).requires_grad_(), random(9, 4, dtype=dtype)
        for value in (
            matrix_spectral_term(hidden, k=2),
            spectral_term(hidden, HeadFactor.from_weight(weight), k=2),
            head_spectral_term(hidden, weight, k=2),
        ):
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.autograd.grad(value, hidden)[0].dtype == dtype


# ---- a head that trains, or is softcapped ----


@RANDOM
@given(
    **DRAWN,
    scale=st.sampled_from([1.0, 0.3]),
    softcap=st.sampled_from([None, 2.0]),
    chunk_size=st.integers(1, 13),
)
def test_head_term_equals_the_dense_term(
    m, vocabulary, d, seed, bias, centered, norm, data, scale, softcap, chunk_size
):
    hidden, weight, offset = inputs(m, vocabulary, d, seed, bias)
    logits = dense_logits(hidden, weight, offset, scale, softcap)
    rank = min(m, vocabulary - centered, m if softcap else d + bias)
    k = draw_k(data, logits, rank, centered)
    value = head_spectral_term(
        hidden,
        weight,
        k=k,
        norm=norm,
        centered=centered,
        bias=offset,
        scale=scale,
        softcap=softcap,
        chunk_size=chunk_size,
    )
    # an M x M Gram matrix of lower rank holds M - rank eigenvalues of rounding, 1e-8 of the largest singular value
    check(
        value,
        reg.spectral(logits, k=k, norm=norm, centered=centered),
        [hidden, weight, offset],
        1e-9 if rank == m else 1e-6,
    )


def test_head_term_of_a_linear_head_is_the_factor_term():
    hidden, weight, offset = inputs(5, 40, 6, seed=2, bias=True)
    by_factor = spectral_term(hidden, HeadFactor.from_weight(weight, offset), k=2, centered=True)
    check(head_spectral_term(hidden, weight, k=2, bias=offset, centered=True), by_factor, [hidden], 1e-9)


def test_softcap_is_not_linear():
    hidden, weight, _ = inputs(5, 40, 6, seed=2, bias=False)
    values = [head_spectral_term(hidden, weight, k=1, softcap=cap).item() for cap in (None, 1e6, 1.0)]
    assert values[1] == pytest.approx(values[0], rel=1e-9)
    assert abs(values[2] - values[0]) > 0.01


def test_head_term_gives_no_gradient_to_a_frozen_head():
    hidden, weight, offset = inputs(5, 9, 4, seed=1, bias=True)
    weight.requires_grad_(False)
    head_spectral_term(hidden, weight, k=2, bias=offset).backward()
    assert weight.grad is None
    assert hidden.grad.norm() > 0
    assert offset.grad.norm() > 0


# ---- gradients in general ----


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm):
    hidden, weight, offset = inputs(4, 6, 3, seed=0, bias=True)
    factor = HeadFactor.from_weight(weight, offset)

    def head_term(hidden, weight, offset):
        options = {"centered": True, "scale": 0.5, "softcap": 2.0, "chunk_size": 4}
        return head_spectral_term(hidden, weight, k=2, norm=norm, bias=offset, **options)

    assert torch.autograd.gradcheck(lambda x: matrix_spectral_term(x, k=2, norm=norm), (hidden,))
    assert torch.autograd.gradcheck(lambda x: spectral_term(x, factor, k=2, norm=norm, centered=True), (hidden,))
    assert torch.autograd.gradcheck(head_term, (hidden, weight, offset))


def test_the_upstream_factor_scales_every_gradient():
    hidden, weight, offset = inputs(4, 6, 3, seed=0, bias=True)
    factor = HeadFactor.from_weight(weight, offset)
    for term, leaves in (
        (lambda: matrix_spectral_term(hidden, k=2), [hidden]),
        (lambda: spectral_term(hidden, factor, k=2), [hidden]),
        (lambda: head_spectral_term(hidden, weight, k=2, bias=offset, softcap=2.0), [hidden, weight, offset]),
    ):
        once, thrice = torch.autograd.grad(term(), leaves), torch.autograd.grad(3 * term(), leaves)
        for a, b in zip(once, thrice, strict=True):
            assert a.norm() > 1e-3
            torch.testing.assert_close(b, 3 * a)


# ---- degenerate input ----

WEIGHT = random(12, 5, seed=7)
TERMS = {
    "matrix": lambda x, **options: matrix_spectral_term(x, **options),
    "factor": lambda x, **options: spectral_term(x, HeadFactor.from_weight(WEIGHT), **options),
    "head": lambda x, **options: head_spectral_term(x, WEIGHT, **options),
}


def logits_of(name, hidden):
    return hidden if name == "matrix" else hidden @ WEIGHT.T


@pytest.mark.parametrize("name", TERMS)
def test_no_rows_give_zero_with_a_zero_gradient(name):
    hidden = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    value = TERMS[name](hidden, k=2)
    value.backward()
    assert value.item() == 0.0
    assert hidden.grad.shape == (0, 5)


@pytest.mark.parametrize("name", ["matrix", "factor", "head"])
def test_all_zero_rows_give_zero_with_a_zero_gradient(name):
    for norm in NORMS:
        hidden = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
        value = TERMS[name](hidden, k=2, norm=norm)
        value.backward()
        assert value.item() == 0.0
        assert (hidden.grad == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [4, 9])
@pytest.mark.parametrize("name", [*TERMS, "training head", "flattened"])
def test_what_is_not_finite_gives_nan_with_a_nan_gradient(name, m, bad):
    """As the token terms do, for the loss scaler and the guard to see; eigh would raise an error of its own."""
    hidden, weight = random(m, 5), WEIGHT.clone().requires_grad_(name == "training head")
    hidden[1, 2] = bad
    hidden = (hidden.unsqueeze(1) if name == "flattened" else hidden).requires_grad_()
    term = TERMS.get(name, TERMS["factor"])
    if name == "training head":
        term = lambda x, **options: head_spectral_term(x, weight, **options)  # noqa: E731
    with torch.no_grad():
        assert term(hidden, k=2).isnan()
    value = term(hidden, k=2)
    assert value.isnan()
    value.backward()
    assert hidden.grad.isnan().all()
    assert weight.grad is None or weight.grad.isnan().all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("m", [4, 9])
@pytest.mark.parametrize("name", TERMS)
def test_rank_deficient_rows_have_a_finite_gradient(name, m, norm):
    hidden = (random(m, 2, seed=1) @ random(2, 5, seed=2)).requires_grad_()
    value = TERMS[name](hidden, k=2, norm=norm)
    (gradient,) = torch.autograd.grad(value, hidden)
    dense = reg.spectral(logits_of(name, hidden), k=2, norm=norm)
    assert value.item() == pytest.approx(dense.item(), rel=1e-6)
    assert gradient.isfinite().all()
    if norm == "nuclear":  # k = rank: moving inside the rank changes nothing, and no other direction is chosen
        assert gradient.norm() < 1e-6
    else:  # differentiable there: the dense gradient is the only one
        assert relative_error(gradient, torch.autograd.grad(dense, hidden)[0]) < 1e-6


def test_autograd_through_the_gram_matrix_would_not_be_finite():
    """What the tests of zero rows protect from: d sqrt(x) / dx at an eigenvalue of zero."""
    hidden = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    naive = torch.linalg.eigvalsh(hidden @ hidden.T).clamp_min(0).sqrt().sum()
    assert not torch.autograd.grad(naive, hidden)[0].isfinite().any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", TERMS)
def test_repeated_singular_values(name, norm):
    root = torch.linalg.inv(torch.linalg.cholesky(WEIGHT.T @ WEIGHT).T)  # WEIGHT @ root has orthonormal columns
    rows = torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    rows = torch.linalg.qr(random(7, 5, seed=3)).Q @ rows
    hidden = (rows if name == "matrix" else rows @ root.T).requires_grad_()
    logits = logits_of(name, hidden)
    assert torch.linalg.svdvals(logits)[:5].tolist() == pytest.approx([2, 2, 1, 1, 1])
    for k in (1, 2, 3):
        value, dense = TERMS[name](hidden, k=k, norm=norm), reg.spectral(logits, k=k, norm=norm)
        (gradient,) = torch.autograd.grad(value, hidden)
        (expected,) = torch.autograd.grad(dense, hidden, retain_graph=True)
        assert value.item() == pytest.approx(dense.item(), rel=1e-6)
        assert gradient.isfinite().all()
        if k == 2:  # between the groups: differentiable
            assert relative_error(gradient, expected) < 1e-6
        else:  # inside a group: any choice of vectors, all of the same length
            assert gradient.norm().item() < 3 * expected.norm().item()


# ---- precision ----


def gram_in_float32(hidden, weight, k, norm):
    logits = hidden @ weight.T
    gram = logits @ logits.T if len(hidden) <= len(weight) else logits.T @ logits
    s = torch.linalg.eigvalsh(gram).flip(0).clamp_min(1e-30).sqrt()
    return -reg.singular_value_ratio(s, k, norm)


@pytest.mark.parametrize(("m", "vocabulary", "d"), [(24, 200, 24), (24, 200, 40), (64, 200, 24), (64, 32, 32)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["factor", "head"])
def test_float32_rows_of_condition_1e4(name, norm, m, vocabulary, d):
    hidden = conditioned(m, d, 1e4).float().requires_grad_()
    weight = conditioned(vocabulary, d, 3.0, seed=5).float()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = reg.spectral(exact_hidden @ weight.double().T, k=5, norm=norm)
    (exact_gradient,) = torch.autograd.grad(exact, exact_hidden)

    if name == "factor":
        value = spectral_term(hidden, HeadFactor.from_weight(weight), k=5, norm=norm)
    else:
        value = head_spectral_term(hidden, weight, k=5, norm=norm)
    assert value.item() == pytest.approx(exact.item(), rel=2e-6)
    assert relative_error(torch.autograd.grad(value, hidden)[0], exact_gradient) < 5e-5


def test_a_float32_gram_matrix_is_not_enough():
    """The bounds of the test above are out of its reach by a wide margin."""
    hidden = conditioned(24, 40, 1e4).float().requires_grad_()
    weight = conditioned(200, 40, 3.0, seed=5).float()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = reg.spectral(exact_hidden @ weight.double().T, k=5)
    (exact_gradient,) = torch.autograd.grad(exact, exact_hidden)
    (gradient,) = torch.autograd.grad(gram_in_float32(hidden, weight, 5, "nuclear"), hidden)
    assert relative_error(gradient, exact_gradient) > 1e-2


def test_what_is_not_counted_does_not_exist():
    """Masked rows give the value and the gradient of the selected rows, in both layouts."""
    hidden, weight = random(12, 6), random(30, 6, seed=1)
    factor = HeadFactor.from_weight(weight).plain
    counted = torch.tensor([True, False, True, True, False, True, True, True, False, True, True, True])
    hidden[~counted] = torch.nan
    hidden.requires_grad_()
    masked = spectral_ratio(hidden, counted, factor, k=2)
    (gradient,) = torch.autograd.grad(masked.value, hidden)
    rows = hidden.detach()[counted].requires_grad_()
    expected = -reg.singular_value_ratio(torch.linalg.svdvals(rows @ weight.T), 2, "nuclear")
    (reference,) = torch.autograd.grad(expected, rows)
    torch.testing.assert_close(masked.value, expected)
    torch.testing.assert_close(gradient[counted], reference)
    assert (gradient[~counted] == 0).all()
    flat = random(4, 3, 6).requires_grad_()
    mask = counted.view(4, 3)
    value = spectral_ratio(flat, mask, factor, k=2).value
    dense = (flat.masked_fill(~mask[..., None], 0.0) @ weight.T).flatten(1)
    expected = -reg.singular_value_ratio(torch.linalg.svdvals(dense), 2, "nuclear")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, flat)[0], torch.autograd.grad(expected, flat)[0])


@pytest.mark.parametrize(
    ("rows", "k", "norm", "used"),
    [(0, 2, "nuclear", 0), (1, 2, "nuclear", 0), (1, 2, "none", 2), (3, 9, "nuclear", 2), (9, 9, "nuclear", 3)],
)
def test_a_constant_ratio_is_clamped_or_left_out(rows, k, norm, used):
    ratio = spectral_ratio(random(rows, 4), None, None, k=k, norm=norm, clamp=True)
    assert ratio.used_k.item() == used
    if used == 0:
        assert ratio.value.item() == 0.0


def test_too_many_rows_are_drawn_by_the_seed():
    hidden = random(40, 5).requires_grad_()
    values = []
    for seed in (1, 1, 2):
        value = spectral_ratio(hidden, None, None, k=2, max_rows=10, seed=torch.tensor(seed)).value
        (gradient,) = torch.autograd.grad(value, hidden)
        drawn = gradient.abs().sum(-1) > 0
        assert drawn.sum() == 10
        torch.testing.assert_close(value, spectral_ratio(hidden[drawn], None, None, k=2).value)
        values.append(value.item())
    assert values[0] == values[1] != values[2]
    assert spectral_ratio(hidden, None, None, k=2, max_rows=40).value == spectral_ratio(hidden, None, None, k=2).value


LAYOUTS = {
    "rows": lambda: random(8, 4),
    "transposed": lambda: random(4, 8).T,
    "strided": lambda: random(8, 8)[:, ::2],
    "float16": lambda: random(8, 4, dtype=torch.float16),
    "flattened": lambda: random(8, 3, 4),
    "flattened, transposed": lambda: random(8, 4, 3).transpose(1, 2),
}


@pytest.mark.parametrize("want", [True, False])
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operator_is_registered_right(layout, some, want):
    hidden = LAYOUTS[layout]().requires_grad_(want)
    bias = hidden.ndim == 2
    head = HeadFactor.from_weight(random(20, 4), random(20, seed=1) if bias else None)
    counted = (torch.arange(hidden[..., 0].numel()) % 3 > 0).view(hidden.shape[:-1]) if some else None
    options = (bias, 0.5, 2, "nuclear", True, 4 if some else 0, torch.tensor(3), want)  # 4 rows: fewer than d'
    for gram in (None, head.gram()):
        torch.library.opcheck(spectrum.spectral_ratio_op, (hidden, counted, head.plain, gram, *options))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "vocabulary"), [(4, 30), (6, 30), (9, 30), (4, 5), (6, 4)])
def test_by_the_gram_matrix_or_by_its_root(m, vocabulary, bias, centered, norm):
    """Few rows: one product with G; many, or a head of lower rank: two with L. Both are the dense formula."""
    hidden, weight, offset = inputs(m, vocabulary, 5, seed=m, bias=bias)
    factor = HeadFactor.from_weight(weight, offset)
    root = factor.centered if centered else factor.plain
    logits = 0.7 * (hidden @ weight.T if offset is None else hidden @ weight.T + offset)
    expected = reg.spectral(logits, k=2, norm=norm, centered=centered)
    (reference,) = torch.autograd.grad(expected, hidden)
    for gram in (None, factor.gram(centered=centered)):
        value = spectral_ratio(hidden, None, root, gram=gram, bias=bias, scale=0.7, k=2, norm=norm).value
        (gradient,) = torch.autograd.grad(value, hidden)
        assert value.item() == pytest.approx(expected.item(), rel=1e-9)
        assert relative_error(gradient, reference) < 1e-6


def test_few_rows_take_one_product_with_the_heads_matrix(monkeypatch):
    """At d = 4096 the products with it are two thirds of the whole."""
    monkeypatch.setattr(spectrum, "spectral_ratio_op", spectrum.compute_spectral_ratio)
    m, d = 4, 64
    factor, flops = HeadFactor.from_weight(random(200, d)), []
    for gram in (None, factor.gram()):
        with FlopCounterMode(display=False) as counter:
            spectral_ratio(random(m, d).requires_grad_(), None, factor.plain, gram=gram, k=2)
        flops.append(counter.get_total_flops())
    assert flops[0] - flops[1] == 2 * m * d * d


def test_a_float16_gradient_survives_until_the_loss_scale():
    hidden = (random(64, 16) * 3e3).half()  # gradients about 1e-7: float16's smallest number is 6e-8
    exact = hidden.double().requires_grad_()
    factor = HeadFactor.from_weight(random(40, 16))
    scaled = hidden.clone().requires_grad_()
    (spectral_term(scaled, factor, k=2) * 2.0**16).backward()
    (spectral_term(exact, factor, k=2) * 2.0**16).backward()
    assert (exact.grad / 2.0**16).abs().max() < 1e-6
    assert relative_error(scaled.grad, exact.grad) < 1e-3


def test_a_head_that_trains_costs_its_gradient_in_float32(monkeypatch):
    """And no second copy of it: the head of a large vocabulary is the largest matrix there is."""
    from balora_plugin.fused import saved_gradients

    monkeypatch.setattr(saved_gradients, "PIECE", 1024)  # this one is small
    hidden = random(6, 16, dtype=torch.float32).requires_grad_()
    weight = random(5000, 16, dtype=torch.bfloat16).requires_grad_()
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == weight.shape and not out._is_view():
                sizes.append(out.dtype)
            return out

    with Sizes():
        value = head_spectral_term(hidden, weight, k=2)
        assert set(sizes) == {torch.float32}
        sizes.clear()
        value.backward()
    assert set(sizes) <= {torch.bfloat16}
    assert weight.grad.dtype == torch.bfloat16
    exact = weight.detach().double().requires_grad_()
    reg.spectral(hidden.detach().double() @ exact.T, k=2).backward()
    assert relative_error(weight.grad, exact.grad) < 5e-3


PRECISE = {
    "factor": lambda x, w: spectral_term(x, HeadFactor.from_weight(w), k=5),
    "head": lambda x, w: head_spectral_term(x, w, k=5),
    "centered": lambda x, w: head_spectral_term(x, w, k=5, centered=True),
    "softcap": lambda x, w: head_spectral_term(x, w, k=5, softcap=3.0),
}


@pytest.mark.parametrize("name", PRECISE)
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_products_in_float32_are_accurate_enough(condition, name, monkeypatch):
    """Where a GPU has little float64; the Gram matrix and its eigenvalues stay in it."""
    hidden, weight = conditioned(64, 48, condition).float(), random(200, 48, seed=3, dtype=torch.float32)
    results = []
    for precision in (torch.float64, torch.float32):
        monkeypatch.setattr(spectrum, "product_precision", lambda device, precision=precision: precision)
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = PRECISE[name](leaf, head)
        results.append((value.item(), *torch.autograd.grad(value, [leaf, head], allow_unused=True)))
    (exact, *references), (value, *gradients) = results
    assert value == pytest.approx(exact, rel=2e-6)
    assert value != exact or not torch.equal(gradients[0], references[0])  # the path was taken
    for gradient, reference, bound in zip(gradients, references, (5e-5, 2e-4), strict=True):
        if reference is not None:  # a factor gives the head no gradient
            assert (gradient - reference).norm() < bound * reference.norm()
