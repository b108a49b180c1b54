"""Anchors beside a batch, in every arrangement that it may have, against dense logits of each document alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_kernels import install_reference_flash_attention
from helpers import TERMS, ba_lora, trainable
from models import tiny_gpt2, tiny_llama, tiny_mixtral
from packing import move

from balora_plugin import regularizers
from balora_plugin.fused import top_log_probs
from balora_plugin.objective import causal_lm
from balora_plugin.objective.install import install
from balora_plugin.objective.request import AnchorRows, StepRequest
from balora_plugin.pretrained.switch import TeacherSwitch
from balora_plugin.schedules import Lambdas

pytestmark = pytest.mark.hosts

DRAW = torch.Generator().manual_seed(5)
LAMBDAS = Lambdas(0.5, 0.02, 0.02)
LENGTHS = (5, 17, 1)  # shorter than the batch's rows and longer
WEIGHT, WHOLE = 0.7, 40  # of which these are a part
DOCUMENTS = [torch.randint(3, 90, (length,), generator=DRAW) for length in LENGTHS]


def plain():
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


def padded(left=False):
    batch = plain()
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, slice(0, 3) if left else slice(9, 12)] = 0
    batch["labels"][1, slice(0, 4) if left else slice(9, 12)] = -100
    return {**batch, "attention_mask": mask}


def packed(rows=1, numbered=False):
    """Rows of several documents; `numbered`: by a mask too."""
    batch = {key: value.reshape(1, -1)[:, :30].repeat(rows, 1) for key, value in plain().items()}
    batch["labels"][:, [0, 13]] = -100
    batch["position_ids"] = torch.cat([torch.arange(13), torch.arange(17)]).repeat(rows, 1)
    if numbered:
        batch["attention_mask"] = 1 + (torch.arange(30) >= 13).long().repeat(rows, 1)
    return batch


def with_edges():
    edges = torch.tensor([0, 13, 30], dtype=torch.int32)
    return {**packed(), "cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 17, "max_length_k": 17}


ARRANGEMENTS = {
    "plain": plain,
    "padded": padded,
    "left": lambda: padded(left=True),
    "positions": lambda: {**padded(), "position_ids": torch.arange(12).unsqueeze(0)},
    "one_row": lambda: {key: value[:1] for key, value in padded().items()},
    "packed": packed,
    "packed_rows": lambda: packed(rows=2),
    "kinds": lambda: {**padded(), "token_type_ids": torch.zeros(3, 12, dtype=torch.int64)},
}


def adapted(make=tiny_llama, **changes):
    model = move(ba_lora(make(**changes).double()))
    install(model.get_base_model())
    return model


def of_each(model, documents):
    """The teacher's final hidden states of each document alone, one after the other."""
    inner = model.get_base_model()
    with TeacherSwitch(inner).off():
        states = [inner.base_model(input_ids=ids.unsqueeze(0)).last_hidden_state[0] for ids in documents]
    return torch.cat(states).to(torch.bfloat16)


def anchors(model, top_k=0, documents=DOCUMENTS):
    teacher, head = of_each(model, documents), model.get_base_model().lm_head.weight
    longest = max(map(len, documents))
    ids = torch.stack([torch.nn.functional.pad(document, (0, longest - len(document))) for document in documents])
    counted = torch.arange(longest) < torch.tensor([[len(document)] for document in documents])
    kept = top_log_probs(teacher.double(), head.detach(), k=top_k) if top_k else teacher
    return AnchorRows(ids, counted, kept, WEIGHT, WHOLE, 4)


def dense(model, documents=DOCUMENTS):
    """The consistency over the anchors, from logits of each alone."""
    head = model.get_base_model().lm_head.weight
    student = torch.cat([model(input_ids=ids.unsqueeze(0)).logits[0] for ids in documents])
    teacher = of_each(model, documents).to(head) @ head.detach().T
    return regularizers.consistency(student, teacher) * len(student)


def step(model, batch, rows=None, **changes):
    request = StepRequest(config=TERMS.resolved("nlg"), lambdas=LAMBDAS, anchors=rows)
    return model(**batch, ba_lora=dataclasses.replace(request, **changes))


def gradient(model, loss):
    found = torch.autograd.grad(loss, trainable(model), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_loss_and_gradient_are_those_of_each_document_alone(arrangement):
    model, batch = adapted(), ARRANGEMENTS[arrangement]()
    out, before = step(model, batch, anchors(model)), step(model, batch)
    expected = dense(model)
    close(out.anchors.consistency, expected.detach())
    close(out.anchors.loss, expected * WEIGHT / WHOLE)
    assert out.anchors.tokens == sum(LENGTHS) and out.anchors.part == 0.25
    close(gradient(model, out.anchors.loss), gradient(model, dense(model) * WEIGHT / WHOLE))
    for name in ("loss", "task", "consistency", "diversity", "entropy", "count", "svd", "svd_used_k"):
        close(getattr(out, name), getattr(before, name))
    together = step(model, batch, anchors(model))
    close(
        gradient(model, together.loss + LAMBDAS.svd * together.svd),
        gradient(model, before.loss + LAMBDAS.svd * before.svd),
    )


@pytest.mark.parametrize("make", [with_edges, lambda: packed(numbered=True), padded], ids=["edges", "numbered", "rows"])
def test_flash_attention_keeps_anchors_apart(make, monkeypatch):
    """By its two functions written in PyTorch; the numbered mask is Axolotl's, which its own patch reads."""
    batch = make()
    if batch.get("attention_mask") is not None and batch["attention_mask"].max() > 1:
        found = causal_lm.join(causal_lm.backbone_inputs(batch), anchors(adapted())).inputs
        assert found["attention_mask"].tolist() == [[1] * 13 + [2] * 17 + [3] * 5 + [4] * 17 + [5]]
        assert found["position_ids"][0, 30:].tolist() == [*range(5), *range(17), 0]
        return
    model = adapted()
    rows, expected = anchors(model), dense(model).detach()
    install_reference_flash_attention(monkeypatch)
    model.get_base_model().config._attn_implementation = "flash_attention_2"
    close(step(model, batch, rows).anchors.consistency, expected)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_mixtral])
def test_learned_positions_and_routers(make):
    """A router's balance is that of the batch's own tokens."""
    model, batch = adapted(make), padded()
    routed = {"output_router_logits": True} if make is tiny_mixtral else {}
    inner = model.get_base_model()
    if make is tiny_gpt2:
        model.eval()  # its own dropout
        for module in inner.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    else:
        model.float()  # experts' kernels know no float64
    tolerance = 1e-4 if routed else 1e-8
    out, before = step(model, {**batch, **routed}, anchors(model)), step(model, {**batch, **routed})
    close(out.anchors.consistency, dense(model).detach(), tolerance)
    close(out.loss, before.loss, tolerance)
    if routed:
        close(out.aux_loss, before.aux_loss, tolerance)


def test_what_a_pass_gives_back_is_of_the_batch_alone():
    model, batch = adapted(), padded()
    asked = {"return_logits": True, "return_hidden": True, "measure_shares": True}
    out, before = step(model, batch, anchors(model), **asked), step(model, batch, **asked)
    for name in ("logits", "hidden"):
        counted = batch["attention_mask"].bool()
        assert getattr(out, name).shape == getattr(before, name).shape
        close(getattr(out, name)[counted], getattr(before, name)[counted])
    close(out.shares, before.shares)
    flat = dataclasses.replace(TERMS, svd_layout="flattened", svd_top_k=2).resolved("nlg")
    close(step(model, batch, anchors(model), config=flat).svd, step(model, batch, config=flat).svd)
    weighted = {"task_weights": torch.tensor([1.0, 0.5, 2.0])}
    close(step(model, batch, anchors(model), **weighted).task, step(model, batch, **weighted).task)


def test_k_log_probabilities_of_the_teacher_are_a_lower_bound():
    model = adapted()
    whole = step(model, plain(), anchors(model)).anchors
    several, all_of_them = (step(model, plain(), anchors(model, top_k=k)).anchors for k in (8, 96))
    assert 0 < several.consistency < whole.consistency
    close(all_of_them.consistency, whole.consistency)


def test_a_micro_batch_may_have_no_anchors_or_no_teacher():
    """Its part of the step counts all the same; without the interval's teacher the anchors have theirs."""
    model, batch = adapted(), padded()
    none = anchors(model)._replace(ids=torch.zeros(0, 0, dtype=torch.int64), teacher=None)
    out, before = step(model, batch, none), step(model, batch)
    assert torch.equal(out.loss, before.loss) and out.anchors.loss == 0 and out.anchors.part == 0.25
    alone = step(model, batch, anchors(model), lambdas=LAMBDAS._replace(consistency=0.0))
    assert alone.consistency is None
    close(alone.anchors.consistency, dense(model).detach())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_mask": torch.ones(3, 1, 12, 12)}, r"attention_mask of shape \(3, 1, 12, 12\)"),
        ({"colours": torch.ones(3, 12, 2)}, r"colours of shape \(3, 12, 2\) in the batch says nothing of anchors"),
        ({"input_ids": None, "inputs_embeds": torch.ones(3, 12, 32)}, r"a batch without input_ids"),
    ],
)
def test_what_has_no_row_for_an_anchor_is_named(changes, said):
    model = adapted()
    with pytest.raises(ValueError, match=f"anchor_data: {said}"):
        step(model, {**padded(), **changes}, anchors(model), lambdas=LAMBDAS._replace(consistency=0.0))
