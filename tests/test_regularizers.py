"""The dense formulas against published numbers, against plain-Python loops, and against the traps they must avoid."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from balora_plugin import regularizers as reg
from balora_plugin.consistency import NAMES

FORMS = NAMES  # every form there is
WITH_A_LOOP = ("kl", "reverse_kl", "jsd", "mse")
NORMS = ("nuclear", "frobenius", "none")
RANDOM = settings(max_examples=25, deadline=None, derandomize=True)
SHAPES = {"rows": st.integers(1, 6), "columns": st.integers(2, 6), "seed": st.integers(0, 10**6)}


def double(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- plain-Python references: lists of floats in, a float out ----


def softmax_list(z, temperature=1.0):
    weights = [math.exp((x - max(z)) / temperature) for x in z]
    return [w / math.fsum(weights) for w in weights]


def kl_list(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def unit_list(z):
    length = math.sqrt(math.fsum(x * x for x in z))
    return [x / length for x in z]


def consistency_loop(student, teacher, form, temperature):
    total = 0.0
    for z_s, z_t in zip(student, teacher, strict=True):
        if form == "mse":
            pairs = zip(unit_list(z_s), unit_list(z_t), strict=True)
            total += math.fsum((a - b) ** 2 for a, b in pairs) / len(z_s)
            continue
        p_s, p_t = softmax_list(z_s, temperature), softmax_list(z_t, temperature)
        middle = [(a + b) / 2 for a, b in zip(p_s, p_t, strict=True)]
        divergence = {
            "kl": kl_list(p_t, p_s),
            "reverse_kl": kl_list(p_s, p_t),
            "jsd": (kl_list(p_t, middle) + kl_list(p_s, middle)) / 2,
        }[form]
        total += temperature**2 * divergence
    return total / len(student)


def negative_entropy_loop(student, top_k):
    total = 0.0
    for z in student:
        kept = sorted(z, reverse=True)[: top_k or len(z)]
        total += math.fsum(p * math.log(p) for p in softmax_list(kept))
    return total / len(student)


def covariance_loop(z):
    n, d = len(z), len(z[0])
    means = [math.fsum(row[i] for row in z) / n for i in range(d)]
    total = 0.0
    for i in range(d):
        for j in range(d):
            if i != j:
                total += (math.fsum((row[i] - means[i]) * (row[j] - means[j]) for row in z) / (n - 1)) ** 2
    return total / d


def singular_values_loop(z):
    """One-sided Jacobi: rotate pairs of columns until all are orthogonal; their lengths are the singular values."""
    columns = [list(column) for column in zip(*z, strict=True)]
    for _ in range(30):
        for i in range(len(columns)):
            for j in range(i + 1, len(columns)):
                a, b = columns[i], columns[j]
                cross = math.fsum(x * y for x, y in zip(a, b, strict=True))
                if abs(cross) < 1e-300:
                    continue
                difference = math.fsum(y * y for y in b) - math.fsum(x * x for x in a)
                angle = 0.5 * math.atan2(2 * cross, difference)
                c, s = math.cos(angle), math.sin(angle)
                columns[i] = [c * x - s * y for x, y in zip(a, b, strict=True)]
                columns[j] = [s * x + c * y for x, y in zip(a, b, strict=True)]
    lengths = sorted((math.sqrt(math.fsum(x * x for x in column)) for column in columns), reverse=True)
    return lengths[: min(len(z), len(z[0]))]


def spectral_loop(z, k, norm, centered):
    if centered:
        z = [[x - math.fsum(row) / len(row) for x in row] for row in z]
    s = singular_values_loop(z)
    below = {"nuclear": math.fsum(s), "frobenius": math.sqrt(math.fsum(x * x for x in s)), "none": 1.0}[norm]
    return -math.fsum(s[:k]) / below


# ---- published numbers ----

NLU_STUDENT = torch.tensor([[1, 0, -1], [0, 2, 1], [-1, 0, 3], [2, 1, 0]], dtype=torch.float64)
NLU_TEACHER = torch.tensor([[1, 1, 0], [1, 1, 1], [0, -1, 2], [1, 0, 0]], dtype=torch.float64)


def nlg_rows(shifted=True):
    """(6, 6) student and teacher logits of the counted positions; not `shifted` = those of the response tokens."""
    b, t, v = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (2, 5, 6)), indexing="ij")
    student, teacher = 2 * torch.sin(1 + 10 * b + 3 * t + 1.7 * v), 2 * torch.cos(10 * b + 3 * t + 1.1 * v)
    labels = torch.tensor([[-100, -100, 3, 1, 2], [-100, 4, 0, 2, -100]])
    if shifted:
        student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
    return student[labels != -100], teacher[labels != -100]


def close(value, expected):
    assert value.item() == pytest.approx(expected, rel=0, abs=1e-8)


@pytest.mark.parametrize(
    ("form", "temperature", "expected"),
    [("mse", 1.0, 0.16374133), ("kl", 2.0, 0.20821914), ("reverse_kl", 2.0, 0.18874623)],
)
def test_nlu_consistency_oracle(form, temperature, expected):
    close(reg.consistency(NLU_STUDENT, NLU_TEACHER, form=form, temperature=temperature), expected)


def test_nlu_covariance_oracle():
    close(reg.covariance(NLU_STUDENT), 2.26388889)


@pytest.mark.parametrize(
    ("norm", "k", "expected"),
    [
        ("none", 1, 3.64661931),
        ("none", 2, 3.64661931 + 2.66782494),
        ("none", 3, 3.64661931 + 2.66782494 + 1.25891925),
        ("nuclear", 1, 0.48150591),
        ("nuclear", 2, 0.83377013),
        ("nuclear", 3, 1.0),
    ],
)
def test_nlu_spectral_oracle(norm, k, expected):
    tolerance = 1e-8 * (k if norm == "none" else 1)  # the sum of k numbers that are printed to 8 places
    assert reg.spectral(NLU_STUDENT, k=k, norm=norm).item() == pytest.approx(-expected, rel=0, abs=tolerance)


@pytest.mark.parametrize(("form", "expected"), [("kl", 0.98839275), ("reverse_kl", 0.98715919)])
def test_nlg_consistency_oracle(form, expected):
    student, teacher = nlg_rows()
    assert student.shape == (6, 6)
    close(reg.consistency(student, teacher, form=form, temperature=2.0), expected)


def test_nlg_oracle_needs_the_shifted_mask():
    student, teacher = nlg_rows(shifted=False)
    assert student.shape == (6, 6)
    assert abs(reg.consistency(student, teacher, temperature=2.0).item() - 0.98839275) > 0.01


@pytest.mark.parametrize(("top_k", "expected"), [(3, -0.89638111), (0, -1.19093155), (6, -1.19093155)])
def test_nlg_entropy_oracle(top_k, expected):
    close(reg.token_entropy(nlg_rows()[0], top_k=top_k), expected)


@pytest.mark.parametrize(
    ("k", "centered", "expected"), [(1, False, 0.92713324), (2, False, 1.30186508), (1, True, 0.92612552)]
)
def test_nlg_spectral_oracle(k, centered, expected):
    close(reg.spectral(nlg_rows()[0], k=k, norm="frobenius", centered=centered), -expected)


# ---- loops ----


@RANDOM
@given(**SHAPES, form=st.sampled_from(WITH_A_LOOP), temperature=st.sampled_from([0.5, 1.0, 2.0, 3.7]))
def test_consistency_equals_the_loop(rows, columns, seed, form, temperature):
    student, teacher = double(rows, columns, seed=seed, scale=2.0), double(rows, columns, seed=seed + 1, scale=2.0)
    expected = consistency_loop(student.tolist(), teacher.tolist(), form, temperature)
    value = reg.consistency(student, teacher, form=form, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-11, abs=1e-13)


@RANDOM
@given(**SHAPES, top_k=st.integers(0, 8))
def test_entropy_equals_the_loop(rows, columns, seed, top_k):
    student = double(rows, columns, seed=seed, scale=2.0)
    value = reg.token_entropy(student, top_k=top_k)
    assert value.item() == pytest.approx(negative_entropy_loop(student.tolist(), top_k), rel=1e-11, abs=1e-13)


@RANDOM
@given(**{**SHAPES, "rows": st.integers(2, 6)})
def test_covariance_equals_the_loop(rows, columns, seed):
    z = double(rows, columns, seed=seed, scale=2.0)
    assert reg.covariance(z).item() == pytest.approx(covariance_loop(z.tolist()), rel=1e-11)


@RANDOM
@given(**SHAPES, k=st.integers(1, 7), norm=st.sampled_from(NORMS), centered=st.booleans())
def test_spectral_equals_the_loop(rows, columns, seed, k, norm, centered):
    z = double(rows, columns, seed=seed, scale=2.0)
    value = reg.spectral(z, k=k, norm=norm, centered=centered)
    assert value.item() == pytest.approx(spectral_loop(z.tolist(), k, norm, centered), rel=1e-10)


@RANDOM
@given(**SHAPES, form=st.sampled_from(FORMS), top_k=st.integers(0, 8))
def test_the_row_variants_average_to_the_terms(rows, columns, seed, form, top_k):
    student, teacher = double(rows, columns, seed=seed), double(rows, columns, seed=seed + 1)
    per_row = reg.consistency_rows(student, teacher, form=form, temperature=2.0)
    entropy = reg.entropy_rows(student, top_k=top_k)
    assert per_row.shape == entropy.shape == (rows,)
    torch.testing.assert_close(per_row.mean(), reg.consistency(student, teacher, form=form, temperature=2.0))
    torch.testing.assert_close(-entropy.mean(), reg.token_entropy(student, top_k=top_k))


# ---- gradients and dtypes ----

TERMS = {
    **{
        f"consistency-{f}": lambda z, f=f: reg.consistency(z, double(4, 5, seed=9), form=f, temperature=2)
        for f in FORMS
    },
    "entropy": lambda z: reg.token_entropy(z),
    "entropy-top-2": lambda z: reg.token_entropy(z, top_k=2),
    "covariance": reg.covariance,
    **{f"spectral-{n}": lambda z, n=n: reg.spectral(z, k=2, norm=n) for n in NORMS},
    "spectral-centered": lambda z: reg.spectral(z, k=2, centered=True),
}


@pytest.mark.parametrize("name", TERMS)
def test_gradcheck(name):
    z = double(4, 5, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(TERMS[name], (z,))
    assert torch.autograd.grad(TERMS[name](z), z)[0].norm() > 1e-3  # a zero gradient would pass as well


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_result_dtype(name, given_dtype, expected):
    z = double(4, 5).to(given_dtype).requires_grad_()
    if "consistency" in name:
        teacher = double(4, 5, seed=9).to(given_dtype)
        value = reg.consistency(z, teacher, form=name.removeprefix("consistency-"), temperature=2)
    else:
        value = TERMS[name](z)
    assert value.shape == ()
    assert value.dtype == expected
    value.backward()
    assert z.grad.dtype == given_dtype
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_reaches_the_teacher(form):
    student, teacher = double(3, 4, seed=1).requires_grad_(), double(3, 4, seed=2).requires_grad_()
    reg.consistency(student, teacher, form=form).backward()
    assert teacher.grad is None
    assert student.grad.norm() > 0


@pytest.mark.parametrize("form", ["kl", "reverse_kl", "mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_identical_outputs_cost_exactly_nothing(form, dtype):
    z = double(5, 7, scale=5.0).to(dtype)
    assert reg.consistency(z, z.clone(), form=form, temperature=2.0).item() == 0.0


def test_jsd_is_symmetric_and_at_most_ln_2():
    a, b = double(5, 7, seed=1, scale=30.0), double(5, 7, seed=2, scale=30.0)
    value = reg.consistency(a, b, form="jsd")
    torch.testing.assert_close(value, reg.consistency(b, a, form="jsd"))
    assert 0.5 * math.log(2) < value <= math.log(2)
    assert reg.consistency(a, a, form="jsd").abs() < 1e-15


@pytest.mark.parametrize("name", [name for name in TERMS if name != "covariance"])
def test_no_rows_give_zero_with_a_zero_gradient(name):
    z = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    if "consistency" in name:
        value = reg.consistency(z, z.detach(), form=name.removeprefix("consistency-"))
    else:
        value = TERMS[name](z)
    value.backward()
    assert value.item() == 0.0
    assert z.grad.shape == (0, 5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_give_nan_as_in_the_other_terms(value):
    """torch's SVD raises at a NaN."""
    z = torch.randn(4, 3)
    z[1, 2] = value
    z.requires_grad_()
    spectral = reg.spectral(z, k=2)
    assert spectral.isnan() and reg.covariance(z).isnan()
    spectral.backward()
    assert z.grad.isnan().all()


@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (4, 1)])
def test_covariance_refuses_what_has_none(shape):
    with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]}"):
        reg.covariance(torch.ones(shape))


def test_unknown_choices_are_named():
    with pytest.raises(ValueError, match="form='l2'"):
        reg.consistency(double(2, 3), double(2, 3), form="l2")
    with pytest.raises(ValueError, match="norm='l1'"):
        reg.spectral(double(2, 3), k=1, norm="l1")


# ---- traps ----


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 120.0), (torch.float16, 20.0)])
def test_a_large_logit_gap_stays_finite(dtype, gap):
    peaked = torch.tensor([[0.0, -gap]], dtype=dtype, requires_grad=True)
    flat = torch.zeros(1, 2, dtype=dtype)
    assert peaked.softmax(-1).log()[0, 1] == -math.inf  # the naive formula: KL = inf, entropy = nan
    expected = 0.5 * (gap - math.log(2)) - 0.5 * math.log(2)
    value = reg.consistency(peaked, flat, form="kl")
    assert value.item() == pytest.approx(expected, rel=1e-6)
    value.backward()
    assert peaked.grad.tolist()[0] == pytest.approx([0.5, -0.5], abs=1e-3)
    for form, limit in (("reverse_kl", math.log(2)), ("jsd", 0.75 * math.log(4 / 3))):
        assert reg.consistency(peaked, flat, form=form).item() == pytest.approx(limit, rel=1e-6)
    assert reg.token_entropy(peaked).item() == pytest.approx(0.0, abs=1e-6)


def test_kl_of_bf16_logits_is_not_computed_in_bf16():
    naive, ours, exact = [], [], []
    for seed in range(6):
        teacher = double(64, 64, seed=seed).bfloat16()
        student = (teacher.double() + double(64, 64, seed=seed + 100, scale=0.01)).bfloat16()
        log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
        naive.append((log_t.exp() * (log_t - log_s)).sum(-1).mean().item())
        ours.append(reg.consistency(student, teacher).item())
        exact.append(consistency_loop(student.tolist(), teacher.tolist(), "kl", 1.0))
    assert min(naive) < 0 < min(exact)  # a negative divergence
    assert max(abs(n / e - 1) for n, e in zip(naive, exact, strict=True)) > 5
    assert min(ours) >= -1e-7
    assert ours == pytest.approx(exact, rel=1e-2)


def test_a_constant_per_row_changes_spectral_unless_centered():
    z, constant = double(6, 5), double(6, 1, seed=1, scale=20.0)
    torch.testing.assert_close((z + constant).softmax(-1), z.softmax(-1))
    for norm in NORMS:
        plain = [reg.spectral(x, k=2, norm=norm).item() for x in (z, z + constant)]
        centered = [reg.spectral(x, k=2, norm=norm, centered=True).item() for x in (z, z + constant)]
        assert abs(plain[1] - plain[0]) > 0.05
        assert centered[1] == pytest.approx(centered[0], abs=1e-12)


def test_frobenius_ratio_reaches_the_root_of_k():
    equal = torch.eye(4, 6, dtype=torch.float64)
    assert reg.spectral(equal, k=4, norm="frobenius").item() == pytest.approx(-2.0)
    assert reg.spectral(equal, k=3, norm="frobenius").item() == pytest.approx(-1.5)
    assert reg.spectral(equal, k=3, norm="nuclear").item() == pytest.approx(-0.75)


@pytest.mark.parametrize("shape", [(8, 3), (3, 8)])
def test_nuclear_ratio_with_k_at_the_limit_trains_nothing(shape):
    """GLUE has at most 3 classes and the paper takes k = 5: this is why callers clamp k to min(N, D) - 1."""
    z = double(*shape).requires_grad_()
    for k in (3, 5):
        value = reg.spectral(z, k=k)
        (gradient,) = torch.autograd.grad(value, z)
        assert value.item() == pytest.approx(-1.0, abs=1e-14)
        assert gradient.abs().max() < 1e-14
    (gradient,) = torch.autograd.grad(reg.spectral(z, k=2), z)
    assert gradient.abs().max() > 1e-3


def test_the_mean_over_rows_does_not_grow_with_length():
    token_s, token_t = double(1, 1, 8, seed=1), double(1, 1, 8, seed=2)
    ours, batchmean = [], []
    for length in (16, 64, 256):
        student, teacher = token_s.expand(2, length, 8), token_t.expand(2, length, 8)
        ours.append(reg.consistency(student.reshape(-1, 8), teacher.reshape(-1, 8)).item())
        batchmean.append(F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean").item())
    assert ours == pytest.approx([ours[0]] * 3, rel=1e-12)
    assert batchmean == pytest.approx([length * ours[0] for length in (16, 64, 256)], rel=1e-12)


# ---- the task term ----


def cross_entropy_loop(student, labels, smoothing=0.0, dft=False):
    total, count = 0.0, 0
    for z, label in zip(student, labels, strict=True):
        if label == -100:
            continue
        p = softmax_list(z)
        even = -math.fsum(math.log(x) for x in p) / len(p)
        row = (1 - smoothing) * -math.log(p[label]) + smoothing * even
        total, count = total + (p[label] * row if dft else row), count + 1
    return total / max(count, 1)


TASKS = ({}, {"label_smoothing": 0.1}, {"label_smoothing": 1.0}, {"dft": True})


def labels_of(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, columns, (rows,), generator=generator)
    return labels.masked_fill(torch.rand(rows, generator=generator) < 0.3, -100)


@RANDOM
@given(**SHAPES, task=st.sampled_from(TASKS))
def test_the_task_term_is_its_definition(rows, columns, seed, task):
    z, labels = double(rows, columns, seed=seed, scale=3.0).requires_grad_(), labels_of(rows, columns, seed)
    value = reg.cross_entropy(z, labels, **task)
    expected = cross_entropy_loop(
        z.tolist(), labels.tolist(), task.get("label_smoothing", 0.0), dft=task.get("dft", False)
    )
    assert value.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    (gradient,) = torch.autograd.grad(value, z)
    p, counted, s = z.detach().softmax(-1), labels != -100, task.get("label_smoothing", 0.0)
    onehot = F.one_hot(labels.clamp(min=0), columns).double()
    by_hand = p - ((1 - s) * onehot + s / columns)
    if task.get("dft"):
        by_hand = (p * onehot).sum(-1, keepdim=True) * (p - onehot)
    by_hand = by_hand * counted.unsqueeze(1) / counted.sum().clamp(min=1)
    torch.testing.assert_close(gradient, by_hand, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_smoothed_task_terms_gradient_is_its_values(smoothing):
    z = double(4, 5, seed=3).requires_grad_()
    labels = torch.tensor([0, -100, 4, 2])
    assert torch.autograd.gradcheck(lambda z: reg.cross_entropy(z, labels, label_smoothing=smoothing), (z,))


def test_the_task_term_of_nothing_counted_is_0_with_a_gradient_of_0():
    z = double(3, 4).requires_grad_()
    for task in TASKS:
        value = reg.cross_entropy(z, torch.full((3,), -100), **task)
        assert value.item() == 0.0 and not torch.autograd.grad(value, z)[0].any()


@pytest.mark.parametrize("task", [{"label_smoothing": 1.5}, {"label_smoothing": 0.1, "dft": True}])
def test_a_form_of_the_task_term_that_there_is_not_is_named(task):
    with pytest.raises(ValueError, match=f"label_smoothing={task['label_smoothing']}"):
        reg.cross_entropy(double(2, 3), torch.tensor([0, 1]), **task)
