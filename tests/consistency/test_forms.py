"""Every form of the consistency term, found by itself: dense, in place and by the top K it is one formula."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import balora_plugin
from balora_plugin import consistency
from balora_plugin.fused.chunk import Rows, Weights, token_chunk
from balora_plugin.fused.loss import TermForm, TopLogProbs
from balora_plugin.fused.top import top_consistency
from balora_plugin.regularizers import FORMS, consistency_rows

# rows, columns, temperature, spread of the logits
CASES = [(1, 2, 1.0, 1.0), (5, 7, 1.0, 2.0), (4, 9, 2.5, 2.0), (3, 6, 0.5, 1.0), (6, 33, 2.0, 8.0)]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(case, seed=0):
    """Logits of student (a leaf) and teacher, and the temperature."""
    rows, columns, temperature, spread = case
    student, teacher = (spread * random(rows, columns, seed=seed + i) for i in range(2))
    return student.requires_grad_(), teacher, temperature


def close(found, expected, what):
    assert found.shape == expected.shape, what
    # what is 0 where student and teacher are one may come out as a difference of two numbers of order 1
    bound = 1e-12 * expected.abs().max().item() + 1e-13
    assert (found - expected).abs().max().item() <= bound, what


def reference(name, student, teacher, temperature):
    """Rows (C, 1) and gradient (C, V) by autograd."""
    rows = consistency_rows(student, teacher, form=name, temperature=temperature)
    return rows.detach().unsqueeze(1), torch.autograd.grad(rows.sum(), student)[0]


def pool_like(z):
    """Scratch that holds what nobody may read."""
    buffers = {}
    return lambda index: buffers.setdefault(index, torch.full_like(z, math.nan))


def check_dense(name):
    for case in CASES:
        student, teacher, temperature = pair(case)
        rows, gradient = reference(name, student, teacher, temperature)
        assert (rows > 0).all() and gradient.abs().max() > 1e-4
        own, slope = reference(name, student, student.detach(), temperature)
        close(own, torch.zeros_like(own), "a student like the teacher")
        close(slope, torch.zeros_like(slope), "a student like the teacher")
        other = consistency_rows(student, teacher, form=name, temperature=3 * temperature).detach().unsqueeze(1)
        assert FORMS[name].uses_temperature == (not torch.equal(rows, other)), "uses_temperature"
    student, teacher, _ = pair((3, 4, 1.0, 1.0))
    assert torch.autograd.gradcheck(lambda z: consistency_rows(z, teacher, form=name, temperature=1.5), (student,))


def check_in_place(name):
    """By itself, and as the passes over a block of logits use it."""
    for case in CASES:
        student, teacher, temperature = pair(case)
        expected, gradient = reference(name, student, teacher, temperature)
        for differentiate in (True, False):
            z, pool = student.detach().clone(), pool_like(teacher)
            value, slope = FORMS[name].in_place(z, teacher.clone(), temperature, pool, differentiate)
            assert torch.equal(z, student), "z is changed"
            close(value, expected, "in_place")
            if differentiate:
                close(slope, gradient, "in_place's derivative")
            block = Rows(z, torch.zeros(len(z), dtype=torch.int64), teacher.clone())
            rows = token_chunk(
                block,
                Weights(0.0, 0.7, 0.0),
                TermForm(name, temperature),
                pool=pool_like(teacher),
                differentiate=differentiate,
            )
            close(rows[:, 1:2], expected, "a block's rows")
            if differentiate:
                close(z, 0.7 * gradient, "a block's derivative")


def top_of(teacher, k, temperature):
    """The teacher's K largest log-probabilities and those of all others together, by a mask; and the columns."""
    log_p = (teacher / temperature).log_softmax(dim=1)
    log_probs, ids = log_p.topk(k, dim=1)
    log_tail = log_p.scatter(1, ids, -torch.inf).logsumexp(dim=1)
    return TopLogProbs(ids, log_probs, log_tail)


def merged(z, ids, temperature):
    """Logits (C, K + 1), or (C, K) if none is left, of which softmax gives the masses of the buckets."""
    columns, rest = [(z / temperature).gather(1, ids)], (z / temperature).scatter(1, ids, -torch.inf)
    if ids.shape[1] < z.shape[1]:
        columns.append(rest.logsumexp(dim=1, keepdim=True))
    return torch.cat(columns, dim=1)


def check_top(name):
    """K = V is the dense form itself; fewer are the dense form of the buckets."""
    for case in CASES:
        student, teacher, temperature = pair(case)
        for k in (1, teacher.shape[1] // 2, teacher.shape[1]):
            top = top_of(teacher, k, temperature)
            if k == teacher.shape[1]:
                expected, gradient = reference(name, student, teacher, temperature)
            else:
                buckets = [merged(z, top.ids, temperature) for z in (student, teacher)]
                rows = temperature**2 * consistency_rows(*buckets, form=name)
                expected, gradient = rows.detach().unsqueeze(1), torch.autograd.grad(rows.sum(), student)[0]
            for differentiate in (True, False):
                value, slope = top_consistency(
                    student.detach(),
                    top,
                    TermForm(name, temperature),
                    out=torch.empty_like(teacher),
                    differentiate=differentiate,
                )
                close(value, expected, f"top {k}")
                if differentiate:
                    close(slope, gradient, f"derivative of top {k}")


def check(name):
    check_dense(name)
    check_in_place(name)
    if FORMS[name].buckets is not None:
        check_top(name)


@pytest.mark.parametrize("name", consistency.NAMES)
def test_the_versions_of_a_form_are_one(name):
    check(name)


def test_names():
    """The order in which messages and Axolotl's schema give them."""
    assert consistency.NAMES[:4] == ("kl", "reverse_kl", "jsd", "mse")
    assert list(consistency.NAMES[4:]) == sorted(consistency.NAMES[4:])
    files = {path.stem for path in Path(consistency.__file__).parent.glob("*.py") if path.stem[0] != "_"}
    assert set(consistency.NAMES) == files == set(FORMS)


def scaled(function, index):
    """`function` with one of its two results doubled."""

    def wrong(*arguments):
        results = list(function(*arguments))
        results[index] = 2 * results[index]
        return tuple(results)

    return wrong


def without_temperature(z, z_t, temperature, pool, differentiate):
    return FORMS["kl"].in_place(z, z_t, 1.0, pool, differentiate)


def writing_into_z(z, z_t, temperature, pool, differentiate):
    value, slope = FORMS["kl"].in_place(z, z_t, temperature, pool, differentiate)
    return value, z.copy_(slope)


WRONG = {
    "another formula": ("kl", lambda: {"dense": FORMS["reverse_kl"].dense}, "in_place"),
    "in place": ("jsd", lambda: {"in_place": FORMS["kl"].in_place}, "in_place"),
    "value in place": ("mse", lambda: {"in_place": scaled(FORMS["mse"].in_place, 0)}, "in_place"),
    "derivative in place": ("mse", lambda: {"in_place": scaled(FORMS["mse"].in_place, 1)}, "in_place's derivative"),
    "T in place": ("kl", lambda: {"in_place": without_temperature}, "in_place"),
    "z in place": ("kl", lambda: {"in_place": writing_into_z}, "z is changed"),
    "top K": ("kl", lambda: {"buckets": FORMS["jsd"].buckets}, "top 1"),
    "derivative of top K": ("jsd", lambda: {"buckets": scaled(FORMS["jsd"].buckets, 1)}, "derivative of top 1"),
    "joint": ("reverse_kl", lambda: {"joint": FORMS["kl"].joint}, "a block's rows"),
    "temperature": ("mse", lambda: {"uses_temperature": True}, "uses_temperature"),
}


@pytest.mark.parametrize(("right", "changes", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_form_is_caught(right, changes, said, monkeypatch):
    monkeypatch.setitem(FORMS, "wrong", FORMS[right])
    check("wrong")
    monkeypatch.setitem(FORMS, "wrong", FORMS[right]._replace(**changes()))
    with pytest.raises(AssertionError, match=said):
        check("wrong")


NEW_FORM = "from .jsd import FORM as FORM\n"
USES_IT = """
import sys

from balora_plugin import config, consistency
from balora_plugin.settings import settings_of

choices = settings_of(config.RegularizerConfig)["consistency"].choices
assert consistency.NAMES == choices and "dummy" in choices, choices
assert choices[:4] == ("kl", "reverse_kl", "jsd", "mse"), choices
assert "torch" not in sys.modules
config.RegularizerConfig(consistency="dummy", teacher_cache="here", teacher_cache_top_k=4)
try:
    config.RegularizerConfig(consistency="other")
except ValueError as error:
    assert "'dummy'" in str(error), error

import torch
from balora_plugin import regularizers
from balora_plugin.fused import token_terms, top_log_probs
from balora_plugin.teacher.rows import RowChoice, TopRows
import test_forms

hidden, teacher, weight = torch.randn(6, 4), torch.randn(6, 4), torch.randn(9, 4)
top, labels = top_log_probs(teacher, weight, k=3), torch.arange(6)
for states, kept in ((teacher, None), (None, top)):
    found = [
        token_terms(hidden, states, weight, labels, lambda_consistency=1.0, teacher_top=kept, form=form).loss
        for form in ("dummy", "jsd", "kl")
    ]
    assert found[0] == found[1] != found[2]
assert isinstance(RowChoice(4096, 32000, form="dummy").by_size(10**9)[0], TopRows)
test_forms.check("dummy")
"""


def test_a_new_form_is_one_new_file(tmp_path):
    """Dropped into a copy of the package, it is known everywhere."""
    package, tests = Path(balora_plugin.__file__).parent, Path(__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dummy", "another"):  # beside it a second one, which changes nothing for it
        (tmp_path / package.name / "consistency" / f"{name}.py").write_text(NEW_FORM)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{tests}"}
    found = subprocess.run(
        [sys.executable, "-c", USES_IT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
