"""The consistency term from the teacher's K most likely tokens, against the same buckets on dense logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import Largest, dense_terms, operator_inputs, random, relative_error, targets

from balora_plugin import regularizers as reg
from balora_plugin.fused import TopLogProbs, ops, token_terms, tokens, top_log_probs
from balora_plugin.fused.head import Head
from balora_plugin.fused.loss import Execution, TeacherStates, TermForm, TokenLoss, Wants
from balora_plugin.fused.project import project
from balora_plugin.fused.top import TOP_FORMS

BOTH = {"lambda_consistency": 0.7, "lambda_diversity": 0.4}


def buckets(z, ids, temperature):
    """Log-probabilities of the K tokens and of all others together, by a mask: (M, K + 1), (M, K) if none is left."""
    log_p = torch.log_softmax(z / temperature, dim=-1)
    taken = torch.zeros_like(z, dtype=torch.bool).scatter_(1, ids, True)
    columns = [log_p.gather(1, ids)]
    if ids.shape[1] < z.shape[1]:
        columns.append(log_p.masked_fill(taken, -torch.inf).logsumexp(dim=1, keepdim=True))
    return torch.cat(columns, dim=1)


def dense(z, z_t, *, k, form="kl", temperature=1.0):
    """The reference: `regularizers.consistency` on logarithms of bucket masses in the place of logits."""
    ids = z_t.topk(min(k, z_t.shape[1]), dim=1).indices
    q, p = buckets(z, ids, temperature), buckets(z_t, ids, temperature)
    return temperature**2 * reg.consistency_rows(q, p, form=form).sum()


class Case:
    """A student, a teacher with states of its own, and what is kept of it."""

    def __init__(self, m=11, vocabulary=13, d=5, *, k=3, seed=0, ignored=0.3, trains="hidden", **options):
        self.k, self.form = k, options.get("form", "kl")
        self.temperature = options.get("temperature", 1.0)
        self.labels = targets(m, vocabulary, seed, ignored)
        self.hidden = random(m, d, seed=seed + 2).requires_grad_("hidden" in trains)
        self.teacher = random(m, d, seed=seed + 3)
        self.weight = random(vocabulary, d, seed=seed + 4, scale=2 / d**0.5).requires_grad_("weight" in trains)
        if options.pop("bias", False):
            options["bias"] = random(vocabulary, seed=seed + 1).requires_grad_("bias" in trains)
        self.options = options

    @property
    def leaves(self):
        tensors = (self.hidden, self.weight, self.options.get("bias"))
        return [x for x in tensors if x is not None and x.requires_grad]

    @property
    def head(self):
        return {key: self.options[key] for key in ("bias", "scale", "softcap") if key in self.options}

    @property
    def top(self):
        return top_log_probs(self.teacher, self.weight, k=self.k, temperature=self.temperature, **self.head)

    def fused(self, **extra):
        top = {} if "teacher_top" in extra else {"teacher_top": self.top}
        return token_terms(self.hidden, None, self.weight, self.labels, **{**top, **self.options, **extra})

    def dense(self):
        """Loss and sums of the dense terms, the consistency term over the buckets."""
        consistency = self.options.get("lambda_consistency", 0.0)
        loss, sums = dense_terms(
            self.hidden, None, self.weight, self.labels, **{**self.options, "lambda_consistency": 0.0}
        )
        rows = self.labels != -100
        z, z_t = (project(x[rows], Head(self.weight, **self.head)) for x in (self.hidden, self.teacher))
        sums["consistency"] = dense(z, z_t.detach(), k=self.k, form=self.form, temperature=self.temperature)
        return loss + consistency * sums["consistency"], sums

    def to(self, dtype):
        def convert(x):
            return x.detach().to(dtype).requires_grad_(x.requires_grad) if torch.is_tensor(x) else x

        self.hidden, self.teacher, self.weight = convert(self.hidden), convert(self.teacher), convert(self.weight)
        self.options = {key: convert(value) for key, value in self.options.items()}
        return self


def check(example, tolerance, **extra):
    terms = example.fused(**extra)
    loss, sums = example.dense()
    for name, expected in sums.items():
        assert getattr(terms, name).item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance), name
    assert terms.loss.item() == pytest.approx(loss.item(), rel=tolerance, abs=tolerance)
    grads = torch.autograd.grad(terms.loss, example.leaves)
    for value, expected in zip(grads, torch.autograd.grad(loss, example.leaves), strict=True):
        assert expected.norm() > 1e-6
        assert relative_error(value, expected) < tolerance


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 12),
    vocabulary=st.integers(2, 12),
    k=st.integers(1, 14),
    seed=st.integers(0, 10**6),
    chunk_size=st.integers(1, 14),
    form=st.sampled_from(TOP_FORMS),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    top_k=st.integers(0, 13),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3]),
    softcap=st.sampled_from([None, 3.0]),
    weights=st.sampled_from([(1.0, 0.7, 0.4), (0.5, 0.7, 0.0)]),
    trains=st.sampled_from(["hidden", "hidden weight", "hidden weight bias"]),
)
def test_equals_the_dense_buckets(m, vocabulary, k, seed, chunk_size, bias, weights, trains, **options):
    options |= dict(zip(("lambda_task", "lambda_consistency", "lambda_diversity"), weights, strict=True))
    example = Case(m, vocabulary, k=k, seed=seed, ignored=0.0, bias=bias, trains=trains, **options)
    if m > 2:
        example.labels[1::3] = -100
    check(example, 1e-12, chunk_size=chunk_size)


@pytest.mark.parametrize("form", TOP_FORMS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equals_the_dense_buckets_in_float32(form, temperature):
    example = Case(
        m=40,
        vocabulary=50,
        d=16,
        k=7,
        bias=True,
        trains="hidden weight bias",
        form=form,
        temperature=temperature,
        **BOTH,
    )
    check(example.to(torch.float32), 2e-6, chunk_size=7)


@pytest.mark.parametrize("form", TOP_FORMS)
@pytest.mark.parametrize("k", [13, 100])
def test_all_tokens_kept_is_the_consistency_term_itself(form, k):
    example = Case(k=k, form=form, temperature=2.0, trains="hidden weight", **BOTH)
    whole = {**example.options, "teacher_weight": example.weight.detach().clone()}
    full = token_terms(example.hidden, example.teacher, example.weight, example.labels, **whole)
    top = example.fused()
    assert top.loss.item() == pytest.approx(full.loss.item(), rel=1e-12)
    grads = [torch.autograd.grad(terms.loss, example.leaves) for terms in (top, full)]
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b) < 1e-12


def test_the_divergence_grows_with_k_up_to_the_whole_one():
    """Merging tokens into one bucket loses information, never adds any."""
    found = []
    for k in range(1, 14):
        found.append([Case(k=k, form=form, ignored=0.0, **BOTH).fused().consistency.item() for form in TOP_FORMS])
        assert min(found[-1]) > 0
    rises = torch.tensor(found).diff(dim=0)
    # nested sets of tokens: each is a coarser view of the next
    assert (rises > -1e-12).all()
    assert (rises.sum(dim=0) > 1e-2).all()


def test_what_is_lost_is_the_divergence_inside_the_rest():
    """KL(p || q) = KL over the buckets + mass of the rest times the KL of what is likely within it."""
    example = Case(m=7, k=4, ignored=0.0, **BOTH)
    z, z_t = (project(x, Head(example.weight)).detach() for x in (example.hidden, example.teacher))
    top = example.top
    taken = torch.zeros_like(z, dtype=torch.bool).scatter_(1, top.ids.long(), True)
    inside = [x.masked_fill(taken, -torch.inf).log_softmax(dim=1) for x in (z_t, z)]
    gap = torch.where(taken, 0.0, inside[0].exp() * (inside[0] - inside[1])).sum(dim=1)
    whole = reg.consistency_rows(z, z_t).sum()
    expected = whole - (top.log_tail.exp() * gap).sum()
    assert example.fused().consistency.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("form", TOP_FORMS)
def test_a_student_equal_to_the_teacher_has_neither_loss_nor_gradient(form):
    example = Case(m=200, vocabulary=80, d=16, k=9, lambda_consistency=1.0, lambda_task=0.0, form=form, scale=3.0)
    example.teacher = example.hidden.detach().clone()
    terms = example.fused()
    (gradient,) = torch.autograd.grad(terms.loss, example.hidden)
    assert abs(terms.consistency.item()) < 1e-12
    assert gradient.norm() < 1e-12
    top = example.top
    stored = top._replace(log_probs=top.log_probs.half(), log_tail=top.log_tail.float())
    terms = example.fused(teacher_top=stored)
    assert 0 <= terms.consistency.item() / terms.count.item() < 2e-6  # what float16 takes away


def test_rounding_to_float16_leaves_less_than_rounding_hidden_states():
    """Of the term and of its gradient, where both should be 0."""
    example = Case(m=100, vocabulary=2000, d=64, k=64, lambda_consistency=1.0, lambda_task=0.0, ignored=0.0)
    example.to(torch.float32)
    example.teacher = example.hidden.detach().clone()
    exact, rounded = example.top, example.teacher.bfloat16().float()
    tops = [exact._replace(log_probs=exact.log_probs.to(kind)) for kind in (torch.float16, torch.bfloat16)]
    found = [example.fused(teacher_top=top) for top in tops]
    found.append(token_terms(example.hidden, rounded, example.weight, example.labels, **example.options))
    values = [terms.consistency.item() for terms in found]
    norms = [torch.autograd.grad(terms.loss, example.hidden)[0].norm().item() for terms in found]
    assert values[0] < 0.1 * min(values[1:])
    assert norms[0] < 0.25 * min(norms[1:])


def test_the_stored_numbers_are_taken_as_masses():
    """A common factor of a row's masses, as their rounding leaves, changes nothing; else a KL might be negative."""
    example = Case(**BOTH)
    plain = example.fused()
    top = example.top
    moved = TopLogProbs(top.ids, top.log_probs + 0.3, top.log_tail + 0.3)
    assert example.fused(teacher_top=moved).loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)


@pytest.mark.parametrize(("form", "temperature"), [("kl", 1.0), ("reverse_kl", 2.0), ("jsd", 0.7)])
def test_gradcheck(form, temperature):
    options = {**BOTH, "form": form, "temperature": temperature, "scale": 0.5, "softcap": 3.0}
    example = Case(m=4, vocabulary=6, d=2, k=2, ignored=0.0, bias=True, trains="hidden weight bias", **options)
    top = example.top

    def loss(hidden, weight, bias):
        changed = {**example.options, "bias": bias, "teacher_top": top}
        return token_terms(hidden, None, weight, example.labels, chunk_size=3, **changed).loss

    assert torch.autograd.gradcheck(loss, tuple(example.leaves))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("form", TOP_FORMS)
def test_a_student_with_hardly_any_mass_in_the_rest(form, k):
    """As 1 - (mass of the K) it would be 0 in float32, and its logarithm infinite."""
    example = Case(m=6, vocabulary=9, d=4, k=k, form=form, **BOTH).to(torch.float32)
    example.teacher[:] = example.hidden.detach()  # the same K, with much in the rest
    example.hidden = (example.hidden.detach() * 12).requires_grad_()
    z = project(example.hidden, Head(example.weight))
    rest = buckets(z, example.top.ids.long(), 1.0)[:, -1].exp()
    assert rest.min() < 1e-7
    wide = Case(m=6, vocabulary=9, d=4, k=k, form=form, **BOTH)
    wide.hidden = example.hidden.detach().double().requires_grad_()
    wide.teacher = example.teacher.double()
    loss, _ = wide.dense()
    terms = example.fused()
    assert terms.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    (value,) = torch.autograd.grad(terms.loss, example.hidden)
    (expected,) = torch.autograd.grad(loss, wide.hidden)
    assert relative_error(value, expected) < 2e-5


def test_logits_that_differ_by_hundreds():
    example = Case(m=6, vocabulary=9, d=4, **BOTH).to(torch.float32)
    example.hidden = (example.hidden.detach() * 60).requires_grad_()
    check(example, 2e-5)


def test_ignored_rows_may_hold_anything():
    example = Case(trains="hidden", **BOTH)
    ignored = example.labels == -100
    assert 0 < ignored.sum() < len(ignored)
    top = example.top
    reference = example.fused()
    for x in top:
        x[ignored] = -(10**6)
    terms = example.fused(teacher_top=top)
    terms.loss.backward()
    assert terms.loss.item() == reference.loss.item()
    assert (example.hidden.grad[ignored] == 0).all()


@pytest.mark.parametrize("m", [0, 6])
def test_nothing_counted_gives_zero_and_a_zero_gradient(m):
    example = Case(m=m, bias=True, trains="hidden weight bias", **BOTH)
    example.labels.fill_(-100)
    terms = example.fused(teacher_top=TopLogProbs(torch.zeros(m, 3).int(), torch.zeros(m, 3), torch.zeros(m)))
    terms.loss.backward()
    assert (terms.loss.item(), terms.consistency.item(), terms.count.item()) == (0.0, 0.0, 0)
    assert all((leaf.grad == 0).all() for leaf in example.leaves)


def test_a_weight_of_zero_leaves_the_term_out():
    assert Case(lambda_consistency=0.0).fused().consistency.item() == 0.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"form": "mse"}, ["form='mse'", "teacher_hidden"]),
        (
            {"teacher_top": TopLogProbs(torch.zeros(10, 3).int(), torch.zeros(10, 3), torch.zeros(10))},
            ["(11, K)", "(10, 3)"],
        ),
        ({"teacher_top": TopLogProbs(torch.zeros(11, 3).int(), torch.zeros(11, 2), torch.zeros(11))}, ["(11, 2)"]),
        ({"teacher_top": TopLogProbs(torch.zeros(11, 3).int(), torch.zeros(11, 3), torch.zeros(11, 1))}, ["(11, 1)"]),
        ({"teacher_weight": torch.zeros(13, 5)}, ["teacher_top", "teacher_weight"]),
        ({"teacher_top": None}, ["lambda_consistency=0.7", "teacher_hidden"]),
    ],
)
def test_what_does_not_fit_is_named(change, named):
    with pytest.raises(ValueError) as caught:
        Case(**BOTH).fused(**change)
    assert [part for part in named if part not in str(caught.value)] == []


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, 30, 99])
def test_top_log_probs(k, temperature):
    hidden, weight, bias = random(23, 6), random(30, 6, seed=1), random(30, seed=2)
    log_p = (project(hidden, Head(weight, bias, 0.5, 4.0)) / temperature).log_softmax(dim=-1)
    top = top_log_probs(hidden, weight, k=k, temperature=temperature, bias=bias, scale=0.5, softcap=4.0, chunk_size=7)
    assert [(x.dtype, tuple(x.shape)) for x in top] == [
        (torch.int32, (23, min(k, 30))),
        (torch.float64, (23, min(k, 30))),
        (torch.float64, (23,)),
    ]
    sorted_p = log_p.sort(dim=-1, descending=True).values
    torch.testing.assert_close(top.log_probs, sorted_p[:, :k])
    torch.testing.assert_close(log_p.gather(1, top.ids.long()), top.log_probs)
    torch.testing.assert_close(top.log_tail.exp(), sorted_p[:, k:].exp().sum(-1))
    assert not any(x.requires_grad for x in top[1:])


def test_logits_are_never_held(monkeypatch):
    monkeypatch.setattr(tokens, "token_terms_op", torch.no_grad()(ops.compute_token_terms))
    m, vocabulary = 300, 500
    example = Case(m, vocabulary, 8, k=20, ignored=0.1, bias=True, trains="hidden", **BOTH)
    top = example.top
    with Largest() as fused:
        example.fused(chunk_size=20, teacher_top=top)
    with Largest() as stored:
        top_log_probs(example.teacher, example.weight, k=20, chunk_size=20)
    for seen in (fused, stored):
        assert 20 * vocabulary <= seen.elements < m * vocabulary / 5


def test_the_teacher_needs_no_product():
    """One product for the logits and one for the gradient: the teacher's has gone."""
    from torch.utils.flop_counter import FlopCounterMode

    example = Case(m=40, vocabulary=64, d=16, ignored=0.0, **BOTH)
    top = example.top
    weights = torch.tensor([1.0, BOTH["lambda_consistency"], BOTH["lambda_diversity"]], dtype=torch.float64)
    execution = Execution(40, torch.float64, Wants(True, False, False))
    counts = []
    for teacher in (top, TeacherStates(example.teacher)):
        loss = TokenLoss(Head(example.weight), teacher, TermForm(), weights)
        with FlopCounterMode(display=False) as counter:
            ops.compute_token_terms(*ops.flat(example.hidden.detach(), example.labels, loss, execution))
        counts.append(counter.get_total_flops() / (2 * 40 * 64 * 16))
    assert counts == [2, 3]


@pytest.mark.parametrize("trains", ["hidden", "hidden weight bias"])
@pytest.mark.parametrize("form", TOP_FORMS)
def test_the_operator_is_registered_right(trains, form):
    example = Case(bias=True, trains=trains, **BOTH)
    torch.library.opcheck(ops.token_terms_op, operator_inputs(example, example.top, form, trains))
