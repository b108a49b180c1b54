"""The chunked token terms against the dense formulas: values, gradients, memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from balora_plugin import regularizers as reg
from balora_plugin.consistency import NAMES
from balora_plugin.fused import chunk, chunk_loop, ops, token_terms, tokens, top_log_probs
from balora_plugin.fused.head import Head
from balora_plugin.fused.loss import PLAIN_TASK, Execution, TaskForm, TeacherStates, TermForm, TokenLoss, Wants
from balora_plugin.fused.project import Projection, default_chunk, project

FORMS = NAMES
SUMS = ("task", "consistency", "diversity", "entropy", "correct", "count")


def random(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(dtype)


def targets(m, vocabulary, seed=0, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, (m,), generator=generator)
    return labels.masked_fill(torch.rand(m, generator=generator) < ignored, -100)


@dataclasses.dataclass
class Case:
    """Inputs of token_terms; `leaves` are those that require a gradient."""

    hidden: torch.Tensor
    teacher_hidden: torch.Tensor | None
    weight: torch.Tensor
    labels: torch.Tensor
    options: dict

    @property
    def leaves(self):
        tensors = (self.hidden, self.weight, self.options.get("bias"))
        return [x for x in tensors if x is not None and x.requires_grad]

    def fused(self, **extra):
        return token_terms(self.hidden, self.teacher_hidden, self.weight, self.labels, **self.options, **extra)

    def dense(self):
        return dense_terms(self.hidden, self.teacher_hidden, self.weight, self.labels, **self.options)

    def to(self, dtype):
        def convert(x):
            return x.detach().to(dtype).requires_grad_(x.requires_grad) if torch.is_tensor(x) else x

        teacher = None if self.teacher_hidden is None else convert(self.teacher_hidden)
        options = {key: convert(value) for key, value in self.options.items()}
        return Case(convert(self.hidden), teacher, convert(self.weight), self.labels, options)


def case(m=11, vocabulary=13, d=5, *, seed=0, ignored=0.3, trains="hidden", teacher=True, bias=False, **options):
    """`trains`: names of the leaves; the logits have a standard deviation near 2."""
    if bias:
        options["bias"] = random(vocabulary, seed=seed + 1).requires_grad_("bias" in trains)
    return Case(
        random(m, d, seed=seed + 2).requires_grad_("hidden" in trains),
        random(m, d, seed=seed + 3) if teacher else None,
        random(vocabulary, d, seed=seed + 4, scale=2 / d**0.5).requires_grad_("weight" in trains),
        targets(m, vocabulary, seed, ignored),
        options,
    )


def dense_terms(
    hidden,
    teacher_hidden,
    weight,
    labels,
    *,
    lambda_consistency=0.0,
    lambda_diversity=0.0,
    form="kl",
    temperature=1.0,
    top_k=0,
    bias=None,
    scale=1.0,
    softcap=None,
    lambda_task=1.0,
    teacher_weight=None,
    teacher_bias=None,
    task_weights=None,
    **task_form,
):
    """The loss and the sums from all M x V logits and the functions of `regularizers`."""

    def logits(x, w, b):
        z = x @ w.T if b is None else x @ w.T + b
        z = reg.upcast(z) * scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    rows = labels != -100
    count = int(rows.sum())
    z = logits(hidden, weight, bias)[rows]
    task = reg.cross_entropy_rows(z, labels[rows], **task_form)
    sums = {
        "task": (task if task_weights is None else task * task_weights[rows]).sum(),
        "consistency": z.sum() * 0,
        "diversity": count * reg.token_entropy(z, top_k=top_k),
        "entropy": -count * reg.token_entropy(z),
        "correct": (z.argmax(-1) == labels[rows]).sum(),
        "count": torch.tensor(count),
    }
    if lambda_consistency:
        head = (weight, bias) if teacher_weight is None else (teacher_weight, teacher_bias)
        z_t = logits(teacher_hidden, *head)[rows]
        sums["consistency"] = count * reg.consistency(z, z_t, form=form, temperature=temperature)
    loss = lambda_task * sums["task"] + lambda_consistency * sums["consistency"] + lambda_diversity * sums["diversity"]
    return loss, sums


def relative_error(value, expected):
    value, expected = value.double(), expected.double()
    return ((value - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def check(example, tolerance, **extra):
    """Sums, loss and gradients of the fused function against the dense one."""
    terms = example.fused(**extra)
    loss, sums = example.dense()
    assert terms.loss.dtype == loss.dtype
    for name in SUMS:
        value = getattr(terms, name)
        assert value.shape == ()
        assert value.item() == pytest.approx(sums[name].item(), rel=tolerance, abs=tolerance), name
    assert terms.loss.item() == pytest.approx(loss.item(), rel=tolerance, abs=tolerance)
    grads = torch.autograd.grad(terms.loss, example.leaves)
    for value, expected in zip(grads, torch.autograd.grad(loss, example.leaves), strict=True):
        assert expected.norm() > 1e-6
        assert relative_error(value, expected) < tolerance


ALL = {"lambda_consistency": 0.7, "lambda_diversity": 0.4}
TASKS = ({}, {"label_smoothing": 0.1}, {"label_smoothing": 0.7}, {"dft": True})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 12),
    vocabulary=st.integers(2, 12),
    seed=st.integers(0, 10**6),
    chunk_size=st.integers(1, 14),
    form=st.sampled_from(FORMS),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    top_k=st.integers(0, 13),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3]),
    softcap=st.sampled_from([None, 3.0]),
    weights=st.sampled_from([(1.0, 0.7, 0.4), (0.0, 0.7, 0.0), (0.5, 0.0, 0.4)]),
    trains=st.sampled_from(["hidden", "hidden weight", "weight bias", "hidden weight bias"]),
    task=st.sampled_from(TASKS),
    weighted=st.booleans(),
)
def test_equals_the_dense_terms(m, vocabulary, seed, chunk_size, bias, weights, trains, task, weighted, **options):
    options |= dict(zip(("lambda_task", "lambda_consistency", "lambda_diversity"), weights, strict=True)) | task
    if weighted:
        options["task_weights"] = random(m, seed=seed + 5).abs() + 0.1
    example = case(m, vocabulary, seed=seed, ignored=0.0, bias=bias, trains=trains, **options)
    if m > 2:
        example.labels[1::3] = -100
    check(example, 1e-12, chunk_size=chunk_size)


@pytest.mark.parametrize("task", TASKS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_form_of_the_task_loss_leaves_what_it_is_given(task, dtype):
    """Nor does it write into weights; also where nothing is differentiated."""
    weights = random(11, seed=9, dtype=dtype).abs()
    before = weights.clone()
    example = case(**ALL, **task, task_weights=weights).to(dtype)
    weights = example.options["task_weights"]
    check(example, 1e-12 if dtype == torch.float64 else 2e-5, chunk_size=4)
    with torch.no_grad():
        silent = example.fused(chunk_size=4)
    assert silent.task.item() == pytest.approx(example.dense()[1]["task"].item(), rel=1e-5)
    assert torch.equal(weights, before)


@pytest.mark.parametrize("task", TASKS[1:])
def test_the_task_loss_has_its_form_beside_k_log_probabilities(task):
    example = case(m=9, vocabulary=14, ignored=0.0, trains="hidden weight", **task)
    top = top_log_probs(random(9, 5, seed=7), random(14, 5, seed=8), k=4)
    options = {"lambda_consistency": 0.7, "teacher_top": top, "chunk_size": 4}
    plain = token_terms(example.hidden, None, example.weight, example.labels, lambda_task=0.0, **options)
    loss, sums = example.dense()
    terms = token_terms(example.hidden, None, example.weight, example.labels, **options, **task)
    assert terms.task.item() == pytest.approx(sums["task"].item(), rel=1e-12)
    found, parts = (torch.autograd.grad(x, example.leaves) for x in (terms.loss, loss + plain.loss))
    for value, expected in zip(found, parts, strict=True):
        assert relative_error(value, expected) < 1e-12


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"label_smoothing": float("nan")}, "label_smoothing=nan"),
        ({"label_smoothing": 0.1, "dft": True}, "beside dft"),
    ],
)
def test_a_form_that_there_is_not_is_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        case().fused(**wrong)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("top_k", [0, 3])
def test_equals_the_dense_terms_in_float32(form, top_k):
    example = case(m=40, vocabulary=50, d=16, bias=True, trains="hidden weight bias", form=form, top_k=top_k, **ALL)
    check(example.to(torch.float32), 2e-6, chunk_size=7)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 11, 100, None])
def test_any_chunk_size_gives_the_same(chunk_size):
    check(case(ignored=0.0, trains="hidden weight", top_k=3, **ALL), 1e-12, chunk_size=chunk_size)


@pytest.mark.parametrize("trains", ["hidden", "weight", "bias", "hidden bias"])
def test_only_what_trains_gets_a_gradient(trains):
    example = case(bias=True, trains=trains, **ALL)
    example.fused().loss.backward()
    for name, tensor in (("hidden", example.hidden), ("weight", example.weight), ("bias", example.options["bias"])):
        assert (tensor.grad is not None) == (name in trains)


def test_no_gradient_reaches_the_teacher():
    example = case(trains="hidden weight", **ALL)
    example.teacher_hidden.requires_grad_()
    head = random(13, 5, seed=20).requires_grad_()
    example.fused(teacher_weight=head).loss.backward()
    assert example.teacher_hidden.grad is None
    assert head.grad is None


def test_ignored_rows_get_no_gradient_and_may_hold_anything():
    example = case(trains="hidden", **ALL)
    ignored = example.labels == -100
    assert 0 < ignored.sum() < len(ignored)
    reference = example.fused()
    with torch.no_grad():
        example.hidden[ignored] = torch.inf
        example.teacher_hidden[ignored] = torch.nan
    terms = example.fused()
    terms.loss.backward()
    assert terms.loss.item() == reference.loss.item()
    assert (example.hidden.grad[ignored] == 0).all()
    assert (example.hidden.grad[~ignored].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("m", [0, 6])
def test_nothing_counted_gives_zero_and_a_zero_gradient(m):
    example = case(m=m, bias=True, trains="hidden weight bias", **ALL)
    example.labels.fill_(-100)
    terms = example.fused()
    terms.loss.backward()
    assert [getattr(terms, name).item() for name in ("loss", *SUMS)] == [0.0] * 7
    for leaf in example.leaves:
        assert leaf.grad.shape == leaf.shape
        assert (leaf.grad == 0).all()


def test_without_a_teacher():
    check(case(teacher=False, trains="hidden weight", lambda_diversity=0.4, top_k=2), 1e-12)


def test_a_consistency_weight_of_zero_skips_the_teacher():
    terms = case(lambda_consistency=0.0).fused(teacher_weight=torch.full((13, 5), torch.nan).double())
    assert terms.consistency.item() == 0.0


@pytest.mark.parametrize("teacher_bias", [False, True])
def test_a_teacher_with_its_own_head(teacher_bias):
    own = {"teacher_weight": random(13, 5, seed=20), "teacher_bias": random(13, seed=21) if teacher_bias else None}
    example = case(bias=True, trains="hidden weight bias", **ALL, **own)
    check(example, 1e-12, chunk_size=4)
    shared = dataclasses.replace(example, options={**example.options, "teacher_weight": None, "teacher_bias": None})
    assert abs(shared.fused().consistency - example.fused().consistency) > 0.1


def test_a_student_equal_to_the_teacher_has_no_consistency_loss():
    example = case(softcap=3.0, scale=0.5, **ALL)
    example.teacher_hidden = example.hidden.detach().clone()
    assert example.fused(chunk_size=4).consistency.item() == 0.0


@pytest.mark.parametrize(
    "options",
    [
        {"form": "jsd", "top_k": 3, "temperature": 2.0},
        {"form": "mse", "softcap": 2.0, "scale": 0.5},
        {"softcap": 2.0, "label_smoothing": 0.3},
    ],
)
def test_gradcheck(options):
    example = case(m=4, vocabulary=5, d=2, ignored=0.0, bias=True, trains="hidden weight bias", **ALL, **options)

    # a fixed head for the teacher: with the student's, finite differences would move the teacher too
    fixed = {
        "teacher_weight": example.weight.detach().clone(),
        "teacher_bias": example.options["bias"].detach().clone(),
    }

    def loss(hidden, weight, bias):
        changed = {**example.options, **fixed, "bias": bias}
        return token_terms(hidden, example.teacher_hidden, weight, example.labels, chunk_size=2, **changed).loss

    assert torch.autograd.gradcheck(loss, tuple(example.leaves))


def test_the_upstream_factor_scales_every_gradient():
    example = case(bias=True, trains="hidden weight bias", **ALL)
    terms = example.fused()
    once = torch.autograd.grad(terms.loss, example.leaves, retain_graph=True)
    thrice = torch.autograd.grad(3 * terms.loss, example.leaves)
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(b, 3 * a)


def test_gradients_flow_on_to_what_made_the_inputs():
    parameter = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    example = case(**ALL)
    example.hidden = random(11, 5, seed=2) * parameter
    (expected,) = torch.autograd.grad(example.dense()[0], parameter, retain_graph=True)
    (value,) = torch.autograd.grad(example.fused().loss, parameter)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden": (2, 11, 5)}, ("hidden", "(2, 11, 5)")),
        ({"hidden": (11, 4)}, ("hidden", "weight", "(11, 4)", "(13, 5)")),
        ({"weight": (13,)}, ("weight", "(13,)")),
        ({"labels": (10,)}, ("labels", "11", "(10,)")),
        ({"labels": (11, 1)}, ("labels", "(11, 1)")),
        ({"teacher_hidden": (10, 5)}, ("teacher_hidden", "(11, 5)", "(10, 5)")),
        ({"teacher_hidden": None}, ("lambda_consistency=0.5", "teacher_hidden")),
    ],
)
def test_bad_shapes_are_named(change, named):
    shapes = {"hidden": (11, 5), "teacher_hidden": (11, 5), "weight": (13, 5), "labels": (11,), **change}
    tensors = {key: None if shape is None else torch.zeros(shape) for key, shape in shapes.items()}
    tensors["labels"] = tensors["labels"].long()
    with pytest.raises(ValueError) as caught:
        token_terms(**tensors, lambda_consistency=0.5)
    assert [part for part in named if part not in str(caught.value)] == []


@pytest.mark.parametrize("form", ["kl", "mse"])
def test_bf16_inputs_are_as_good_as_a_dense_bf16_head(form):
    errors = {"fused": [], "dense": []}
    for seed in range(4):
        example = case(m=60, vocabulary=80, d=32, seed=10 * seed, trains="hidden weight", form=form, top_k=5, **ALL)
        example = example.to(torch.bfloat16)
        exact_loss, exact_sums = (wide := example.to(torch.float64)).dense()
        exact = [exact_loss, exact_sums["consistency"], *torch.autograd.grad(exact_loss, wide.leaves)]
        terms = example.fused(chunk_size=4)
        dense_loss, dense_sums = example.dense()
        for name, loss, consistency in (
            ("fused", terms.loss, terms.consistency),
            ("dense", dense_loss, dense_sums["consistency"]),
        ):
            values = [loss, consistency, *torch.autograd.grad(loss, example.leaves)]
            errors[name].append([relative_error(value, e) for value, e in zip(values, exact, strict=True)])
        assert terms.loss.dtype == torch.float32
    fused, dense = (torch.tensor(errors[name]).mean(0) for name in ("fused", "dense"))
    assert (fused <= 1.1 * dense + 1e-6).all(), (fused, dense)
    assert (dense[2:] > 1e-3).all()  # the comparison is with bf16 errors, not with 0


def test_only_the_loss_carries_a_graph():
    terms = case(trains="hidden weight", **ALL).fused()
    assert terms.loss.requires_grad
    assert [name for name in SUMS if getattr(terms, name).requires_grad] == []


def test_a_bf16_gradient_is_scaled_by_the_exact_upstream_factor():
    """1 / 982 is 0.36 % from the nearest bf16 number: rounding it first would shrink every gradient alike."""
    example = case(m=200, vocabulary=40, d=32, ignored=0.0, **ALL).to(torch.bfloat16)
    loss = example.fused().loss
    (plain,) = torch.autograd.grad(loss, example.hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss / 982, example.hidden)
    ratio = (plain.double() * scaled.double()).sum() / plain.double().square().sum()
    assert ratio.item() * 982 == pytest.approx(1.0, abs=5e-4)


class Largest(TorchDispatchMode):
    """Records the largest number of elements that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_the_logits_are_never_held(monkeypatch):
    # an operator's inside is hidden from the recorder
    monkeypatch.setattr(tokens, "token_terms_op", torch.no_grad()(ops.compute_token_terms))
    m, vocabulary = 300, 500
    example = case(m, vocabulary, 8, ignored=0.1, bias=True, trains="hidden weight bias", top_k=20, **ALL)
    with Largest() as fused:
        example.fused(chunk_size=20)
    with Largest() as dense:
        example.dense()[0].backward()
    assert 20 * vocabulary <= fused.elements < m * vocabulary / 5
    assert dense.elements >= m * vocabulary  # the recorder sees a full matrix where there is one


def test_the_default_chunk_follows_the_vocabulary():
    assert default_chunk(32) == 512
    assert default_chunk(32, "cuda") == 4096
    assert default_chunk(32_000) == 256  # 2**23 // 32_000 is 262: whole tiles
    assert default_chunk(32_000, hidden_size=2048) == 512
    assert default_chunk(128_000) == default_chunk(128_000, hidden_size=4096) == 128
    assert default_chunk(256_000) == 64  # 2**24 // 256_000 is 65
    assert default_chunk(128_000, "cuda") == 256
    assert default_chunk(10**8) == 16


def test_autocast_runs_the_product_in_its_dtype_and_widens_the_result():
    hidden, weight = random(6, 5, dtype=torch.float32), random(7, 5, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = project(hidden, Head(weight))
        wide = project(hidden.double(), Head(weight.double()))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, (hidden.bfloat16() @ weight.bfloat16().T).float())
    assert not torch.equal(logits, hidden @ weight.T)
    assert torch.equal(wide, hidden.double() @ weight.double().T)


def test_without_gradients_none_is_computed_and_the_values_are_the_same():
    example = case(trains="hidden weight", **ALL)
    with torch.no_grad():
        quiet = example.fused()
    assert not quiet.loss.requires_grad
    torch.testing.assert_close(quiet.loss, example.fused().loss.detach())


def test_a_teacher_bias_alone_is_refused():
    hidden, weight = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="teacher_bias"):
        token_terms(hidden, hidden, weight, torch.tensor([1, 2]), lambda_consistency=1.0, teacher_bias=torch.ones(4))


def operator_inputs(example, teacher, form, trains, task=PLAIN_TASK):
    """What the operator is called with, chunks of 4 rows."""
    head = Head(example.weight, example.options["bias"], 0.5, 3.0)
    weights = torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64)
    wants = Wants(*(name in trains.split() for name in Wants._fields))
    loss = TokenLoss(head, teacher, TermForm(form, 2.0, 3, task), weights)
    return ops.flat(example.hidden, example.labels, loss, Execution(4, torch.float64, wants))


@pytest.mark.parametrize("trains", ["hidden", "hidden weight bias"])
@pytest.mark.parametrize("form", FORMS)
def test_the_operator_is_registered_right(trains, form):
    example = case(bias=True, trains=trains, **ALL)
    torch.library.opcheck(
        ops.token_terms_op, operator_inputs(example, TeacherStates(example.teacher_hidden), form, trains)
    )


@pytest.mark.parametrize("task", [TaskForm(0.1), TaskForm(dft=True)])
def test_the_operator_is_registered_right_for_each_form_of_the_task(task):
    example = case(bias=True, trains="hidden", **ALL)
    torch.library.opcheck(
        ops.token_terms_op, operator_inputs(example, TeacherStates(example.teacher_hidden), "kl", "hidden", task)
    )


@pytest.mark.parametrize("ties", [False, True])
def test_hits_are_argmaxs(ties):
    """The first of equal peaks, as the hosts' own accuracy counts."""
    z = random(400, 7)
    if ties:
        z = z.round()
    labels = torch.randint(0, 7, (400,), generator=torch.Generator().manual_seed(1))
    expected = (z.argmax(-1) == labels).sum().item()
    chosen = z.gather(1, labels[:, None])
    before = z.clone()
    assert chunk.hits(z, labels, chosen).sum().item() == expected
    assert torch.equal(z, before)
    at_peak = (chosen == z.amax(-1, keepdim=True)).sum().item()
    assert at_peak > expected if ties else at_peak == expected


@pytest.mark.parametrize("offset", [-500.0, -60.0, 0.0, 45.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_any_size(offset, dtype):
    """With and without the maximum taken off: exp() of these alone overflows, or leaves nothing."""
    example = case(m=20, vocabulary=30, d=8, bias=True, **ALL).to(dtype)
    shifted = case(m=20, vocabulary=30, d=8, bias=True, **ALL).to(dtype)
    shifted.options["bias"] = shifted.options["bias"] + offset
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4 * max(abs(offset), 1) / 50
    plain, moved = example.fused(chunk_size=7), shifted.fused(chunk_size=7)
    assert moved.loss.item() == pytest.approx(plain.loss.item(), rel=tolerance)
    (a,), (b,) = (torch.autograd.grad(t.loss, c.hidden) for t, c in ((plain, example), (moved, shifted)))
    assert relative_error(b, a) < tolerance + 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("diversity", [0.0, 0.4])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.3, None, True), (2.0, 3.0, True)])
@pytest.mark.parametrize("task", TASKS)
def test_base_2_and_base_e_are_the_same(scale, softcap, bias, diversity, dtype, task, monkeypatch):
    """Where exponentials are cheaper to the base 2 logits are counted in units of log 2; both ways are the formulas."""
    options = {"lambda_consistency": 0.7, "lambda_diversity": diversity, "scale": scale, "softcap": softcap, **task}
    example = case(m=9, vocabulary=13, d=5, trains=("hidden", "weight", "bias"), bias=bias, **options).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    units = []
    plain = chunk_loop.token_chunk
    monkeypatch.setattr(chunk_loop, "token_chunk", lambda *a, **k: units.append(k["unit"]) or plain(*a, **k))
    check(example, tolerance, chunk_size=4)
    assert set(units) == {chunk_loop.LOG_2}
    monkeypatch.setattr(chunk_loop, "in_base_2", lambda *_: False)
    units.clear()
    check(example, tolerance, chunk_size=4)
    assert set(units) == {1.0}


def test_logits_that_differ_by_hundreds():
    """softmax().log() is infinite at a gap of 120 in float32."""
    example = case(m=6, vocabulary=9, d=4, **ALL).to(torch.float32)
    example.hidden = (example.hidden.detach() * 60).requires_grad_()
    check(example, 2e-5)


@pytest.fixture
def small_blocks(monkeypatch):
    """Compiled blocks of 3 rows, traced but not lowered: what the loops are is the compiler's business."""
    monkeypatch.setattr(chunk, "BACKEND", "aot_eager")
    monkeypatch.setattr(chunk_loop, "block_rows", lambda vocabulary, device, compiled=False: 3 if compiled else 2)
    chunk.compiled_chunk.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    chunk.compiled_chunk.cache_clear()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("temperature", "top_k", "softcap", "diversity", "task"),
    [
        (1.0, 0, None, 0.3, {}),
        (2.0, 4, 3.0, 0.3, {"label_smoothing": 0.2}),
        (1.0, 4, None, 0.0, {"dft": True}),
    ],
)
def test_compiled_passes_are_the_eager_ones(form, temperature, top_k, softcap, diversity, task, small_blocks):
    torch.manual_seed(3)
    m, d, v = 11, 5, 17  # three whole blocks and a rest
    hidden, teacher = torch.randn(2, m, d, dtype=torch.float64)
    weight, bias = torch.randn(v, d, dtype=torch.float64), torch.randn(v, dtype=torch.float64)
    labels = torch.randint(0, v, (m,))
    found = []
    for compiled in (False, True):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        terms = token_terms(
            leaves[0],
            teacher,
            leaves[1],
            labels,
            lambda_consistency=0.7,
            lambda_diversity=diversity,
            form=form,
            temperature=temperature,
            top_k=top_k,
            softcap=softcap,
            bias=leaves[2],
            compiled=compiled,
            task_weights=None if softcap else torch.linspace(0.1, 2.0, m, dtype=torch.float64),
            **task,
        )
        terms.loss.backward()
        values = [getattr(terms, name) for name in ("loss", "task", "consistency", "diversity", "entropy", "correct")]
        found.append([*values, *(x.grad for x in leaves)])
    assert small_blocks["stats"]["unique_graphs"] == 1 and not small_blocks["graph_break"]
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)


def test_passes_that_cannot_be_compiled_run_eagerly_and_say_so_once(small_blocks, monkeypatch, caplog):
    def refuse(module, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(chunk, "BACKEND", refuse)
    hidden, weight, labels = torch.randn(9, 3), torch.randn(5, 3), torch.tensor([0, 1, 2] * 3)
    found = [
        token_terms(hidden, hidden + 0.1, weight, labels, lambda_consistency=1.0, compiled=compiled).loss
        for compiled in (False, True, True)
    ]
    torch.testing.assert_close(found[1:], found[:1] * 2)
    assert caplog.text.count("could not be compiled") == 1


@pytest.mark.slow
def test_compiled_passes_through_inductor(monkeypatch):
    chunk.compiled_chunk.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setattr(chunk_loop, "block_rows", lambda vocabulary, device, compiled=False: 8 if compiled else 2)
    torch.manual_seed(4)
    hidden, teacher, weight = torch.randn(20, 16), torch.randn(20, 16), torch.randn(300, 16)
    labels = torch.randint(0, 300, (20,))
    found = []
    for compiled in (False, True):
        h = hidden.clone().requires_grad_()
        terms = token_terms(h, teacher, weight, labels, lambda_consistency=0.7, lambda_diversity=0.3, compiled=compiled)
        terms.loss.backward()
        found.append((terms.loss, terms.consistency, terms.entropy, terms.correct, h.grad))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_ties_are_counted_alike_when_compiled():
    z = torch.tensor([[1.0, 2.0, 2.0], [3.0, 0.0, 3.0], [0.0, 0.0, 1.0]])
    for labels in ([1, 0, 2], [2, 2, 2], [0, 1, 0]):
        labels = torch.tensor(labels)
        chosen = z.gather(1, labels.unsqueeze(1))
        expected = z.argmax(-1) == labels
        compiled = torch.compile(chunk.hits, backend="eager", fullgraph=True)(z, labels, chosen)
        assert torch.equal(compiled[:, 0], expected)
        assert torch.equal(chunk.hits(z, labels, chosen)[:, 0], expected)


def test_float16_keeps_a_small_term_alone():
    """Its gradient is below float16's range before the host's loss scale comes: naive casts lose it."""
    torch.manual_seed(5)
    m, d, v = 6, 32, 4000
    weight = torch.randn(v, d) / d**0.5
    hidden = torch.randn(m, d)
    teacher = hidden + 0.1 * torch.randn(m, d)
    labels = torch.randint(0, v, (m,))
    settings = {"lambda_consistency": 1e-4, "lambda_task": 0.0}
    exact = hidden.half().double().requires_grad_()
    token_terms(exact, teacher.half().double(), weight.half().double(), labels, **settings).loss.backward()
    ours = hidden.half().requires_grad_()
    scale = 2.0**16 / m
    (token_terms(ours, teacher.half(), weight.half(), labels, **settings).loss * scale).backward()
    error = (ours.grad.double() / scale - exact.grad).norm() / exact.grad.norm()
    assert error < 0.02
    head = weight.half().requires_grad_()
    (token_terms(hidden.half(), teacher.half(), head, labels, **settings).loss * scale).backward()
    wide = weight.half().double().requires_grad_()
    token_terms(
        hidden.half().double(), teacher.half().double(), wide, labels, teacher_weight=wide.detach(), **settings
    ).loss.backward()
    assert (head.grad.double() / scale - wide.grad).norm() / wide.grad.norm() < 0.02


def test_large_gradients_are_scaled_in_pieces(monkeypatch):
    from balora_plugin.fused import saved_gradients

    torch.manual_seed(6)
    hidden = torch.randn(10, 8, dtype=torch.bfloat16)
    weight, labels = torch.randn(20, 8, dtype=torch.bfloat16), torch.randint(0, 20, (10,))
    found = []
    for piece in (2**22, 24):
        monkeypatch.setattr(saved_gradients, "PIECE", piece)
        leaf = hidden.clone().requires_grad_()
        loss = token_terms(leaf, None, weight, labels).loss / 7
        loss.backward(retain_graph=True)
        once = leaf.grad.clone()
        loss.backward()
        torch.testing.assert_close(leaf.grad, 2 * once, rtol=0, atol=0)  # what was kept is left as it was
        found.append(once)
    assert torch.equal(*found)


def test_one_head_under_two_names_is_one(monkeypatch):
    made = []
    monkeypatch.setattr(chunk_loop, "Projection", lambda *args: made.append(args) or Projection(*args))
    hidden, weight, labels = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])
    token_terms(hidden, hidden, weight, labels, lambda_consistency=1.0, teacher_weight=weight.detach())
    assert len(made) == 1
    token_terms(hidden, hidden, weight, labels, lambda_consistency=1.0, teacher_weight=weight.clone())
    assert len(made) == 3


@pytest.mark.parametrize("trains", ["hidden", "hidden weight bias"])
@pytest.mark.parametrize(
    "options", [{}, {"form": "jsd", "temperature": 2.0, "top_k": 3}, {"softcap": 3.0, "scale": 0.5}]
)
def test_weights_of_rows_are_factors_of_their_cross_entropy(options, trains):
    """Against the dense terms of each row alone; a loss that weighed another term would differ."""
    example = case(
        m=9,
        bias="bias" in trains,
        trains=trains,
        lambda_consistency=0.7,
        lambda_diversity=0.4,
        lambda_task=0.8,
        **options,
    )
    factors = random(9, seed=21).abs()
    loss, task = 0.0, 0.0
    for row in range(9):
        if example.labels[row] != -100:
            one, sums = dense_terms(
                example.hidden[row : row + 1],
                example.teacher_hidden[row : row + 1],
                example.weight,
                example.labels[row : row + 1],
                **{**example.options, "lambda_task": 0.8 * factors[row].item()},
            )
            loss, task = loss + one, task + factors[row] * sums["task"].detach()
    expected = torch.autograd.grad(loss, example.leaves)
    for chunk_size in (2, 100):
        terms = example.fused(task_weights=factors, chunk_size=chunk_size)
        torch.testing.assert_close(terms.loss, loss)
        torch.testing.assert_close(terms.task, task)
        torch.testing.assert_close(torch.autograd.grad(terms.loss, example.leaves), expected)
        even = example.fused(chunk_size=chunk_size)
        assert all(
            torch.equal(getattr(terms, name), getattr(even, name)) for name in ("consistency", "entropy", "correct")
        )


def test_weights_of_rows_in_compiled_loops(monkeypatch):
    example = case(m=24, vocabulary=16, lambda_consistency=0.7, lambda_diversity=0.4)
    factors = random(24, seed=21).abs()
    monkeypatch.setattr(chunk, "BACKEND", "aot_eager")
    monkeypatch.setattr(chunk_loop, "block_rows", lambda vocabulary, device, compiled=False: 4)
    chunk.compiled_chunk.cache_clear()
    results = []
    for compiled in (False, True):
        terms = example.fused(task_weights=factors, compiled=compiled)
        results.append((terms.loss, *torch.autograd.grad(terms.loss, example.leaves)))
    chunk.compiled_chunk.cache_clear()
    torch.testing.assert_close(results[1], results[0])


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"task_weights must be like labels \(11,\), got \(3,\)"):
        case().fused(task_weights=torch.ones(3))
