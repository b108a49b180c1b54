"""A teacher of some rows against dense logits of all: the same terms, and over all turns the gradient of all rows."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny
from helpers import ba_lora
from models import tiny_gpt2, tiny_llama
from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

from balora_plugin import RegularizerConfig
from balora_plugin.objective.classification import classification_step
from balora_plugin.objective.install import install
from balora_plugin.objective.request import Measures, StepRequest
from balora_plugin.objective.some_rows import only_rows, rows_apart
from balora_plugin.pretrained.shared_layers import SharedLayers
from balora_plugin.pretrained.switch import TeacherSwitch
from balora_plugin.regularizers import consistency_rows, entropy_rows
from balora_plugin.schedules import Lambdas
from balora_plugin.training.teacher_rows import rows_met

ROWS, LENGTH = 4, 9
TERMS = RegularizerConfig(lambda_consistency=0.5, lambda_diversity=0.0, lambda_svd=0.0, consistency="kl")
GEMMA = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 2}
KINDS = ["sliding_attention", "full_attention"] * 2
MODELS = {
    "llama": lambda: tiny_llama(num_hidden_layers=4),
    "gpt2": lambda: tiny_gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "gemma4_text": lambda: tiny("gemma4_text", num_hidden_layers=4, global_head_dim=8, layer_types=KINDS, **GEMMA),
}
TARGETS = {"gpt2": ["c_attn"]}


def moved(model, targets, **changes):
    """A model in float64 and training mode whose adapter has moved."""
    model = ba_lora(model.double(), targets=targets, regularizers=TERMS, **changes).double()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model.train()


def adapted(name="llama", **changes):
    model = moved(MODELS[name](), TARGETS.get(name, ["q_proj", "v_proj"]), **changes)
    install(model.get_base_model())
    return model


def batch():
    """Four rows of other lengths, of which other parts count."""
    torch.manual_seed(5)
    ids = torch.randint(3, 96, (ROWS, LENGTH))
    mask = (torch.arange(LENGTH) < torch.tensor([9, 6, 8, 4]).unsqueeze(1)).long()
    ids, labels = ids.masked_fill(mask == 0, 0), ids.masked_fill(mask == 0, -100)
    labels[1, :3] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def asked(model, rows, interval=1, shared=None, **changes):
    base = model.get_base_model()
    task = "nlu" if hasattr(base, "num_labels") and base.get_output_embeddings() is None else "nlg"
    return StepRequest(
        config=TERMS.resolved(task),
        lambdas=Lambdas(0.5 * interval, 0.0, 0.0),
        switch=TeacherSwitch(base),
        teacher_rows=None if rows is None or len(rows) == ROWS else rows,
        teacher_factor=interval,
        shared=shared,
        **changes,
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dense(model, inputs):
    """(student's, teacher's) logits (B, T, V) and targets (B, T)."""
    given = {key: value for key, value in inputs.items() if key != "labels"}
    student = model(**given).logits
    with TeacherSwitch(model.get_base_model()).off(), torch.no_grad():
        teacher = model(**given).logits
    targets = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    return student, teacher, targets


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rows", [(0, 2), (3,), (1, 2, 3), ()])
def test_the_chosen_rows_have_the_teacher_and_the_weight(rows, name):
    model, inputs, interval = adapted(name), batch(), 2
    weights = torch.linspace(0.5, 1.5, ROWS, dtype=torch.float64)
    measures = Measures(drift=True, entropy=True)
    out = model(**inputs, ba_lora=asked(model, rows, interval, measures=measures, task_weights=weights))
    found = gradients(model, out.loss)
    student, teacher, targets = dense(model, inputs)
    counted = targets != -100
    task = torch.nn.functional.cross_entropy(student.flatten(0, 1), targets.flatten(), reduction="none")
    distance = consistency_rows(student, teacher, form="kl") * counted
    chosen = torch.zeros(ROWS, dtype=torch.bool)
    chosen[list(rows)] = True
    loss = (task.view(ROWS, -1).sum(1) * weights).sum() + 0.5 * interval * distance[chosen].sum()
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-12, atol=0)
    for parameter, gradient in gradients(model, loss).items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-12)
    assert (out.taught.item(), out.count.item()) == (counted[chosen].sum().item(), counted.sum().item())
    torch.testing.assert_close(out.consistency.double(), distance[chosen].sum())
    if rows:
        torch.testing.assert_close(out.drift.double(), distance[chosen].sum())
        entropy = entropy_rows(teacher)[chosen][counted[chosen]].sum() / torch.tensor(96.0).log().double()
        torch.testing.assert_close(out.teacher_entropy.double(), entropy)
    elif out.drift is not None:
        assert out.drift.item() == 0


@pytest.mark.parametrize(("interval", "accumulated"), [(2, 1), (4, 1), (4, 2), (3, 1), (6, 4), (4, 4)])
def test_the_mean_over_all_turns_is_the_gradient_of_all_rows(interval, accumulated):
    model, inputs = adapted("gpt2"), batch()  # all in float64; Llama's norms are in float32
    whole = gradients(model, model(**inputs, ba_lora=asked(model, None)).loss)
    total = {name: torch.zeros_like(value) for name, value in whole.items()}
    for turn in range(interval):
        rows = rows_met(turn, ROWS, interval, accumulated)
        request = asked(model, rows, interval if rows else 0)
        for name, gradient in gradients(model, model(**inputs, ba_lora=request).loss).items():
            total[name] += gradient / interval
    for name, gradient in whole.items():
        torch.testing.assert_close(total[name], gradient, rtol=1e-9, atol=1e-12)


def test_a_share_of_some_rows_stands_for_all():
    """Rows that are alike: half of them have the share of all, at the average weight."""
    model = adapted()
    inputs = {key: value[:1].expand(ROWS, -1) for key, value in batch().items()}
    shares = [
        model(**inputs, ba_lora=asked(model, rows, interval, measure_shares=True)).shares[0]
        for rows, interval in ((None, 1), ((1, 3), 2), ((0,), 4))
    ]
    assert shares[0] > 0
    torch.testing.assert_close(shares[1], shares[0])
    torch.testing.assert_close(shares[2], shares[0])


CLASSIFIERS = {
    "decoder": lambda: LlamaForSequenceClassification(tiny_llama().config),
    "encoder": lambda: BertForSequenceClassification(
        BertConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ),
}


@pytest.mark.parametrize("kind", list(CLASSIFIERS))
def test_a_classifiers_teacher_meets_samples(kind):
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj"] if kind == "decoder" else ["query", "value"]
    model = moved(CLASSIFIERS[kind](), targets, task_type="SEQ_CLS")
    install(model.get_base_model(), classification_step)
    inputs = {**batch(), "labels": torch.tensor([0, 1, -100, 1])}
    whole = model(**inputs, ba_lora=asked(model, None, measure_shares=True, measures=Measures(drift=True)))
    full = gradients(model, whole.loss)
    total, drift, taught = {name: torch.zeros_like(g) for name, g in full.items()}, 0.0, 0
    for turn in range(2):
        rows = rows_met(turn, ROWS, 2, 1)
        out = model(**inputs, ba_lora=asked(model, rows, 2, measure_shares=True, measures=Measures(drift=True)))
        drift, taught = drift + out.drift, taught + out.taught.item()
        assert out.shares[0] > 0
        for name, gradient in gradients(model, out.loss).items():
            total[name] += gradient / 2
    none = model(**inputs, ba_lora=asked(model, (2,), 4, measure_shares=True))  # a sample that does not count
    assert (none.taught.item(), none.shares[0].item()) == (0, 0.0)
    assert whole.taught is None and taught == whole.count.item() == 3
    torch.testing.assert_close(drift, whole.drift)
    scale = max(gradient.abs().max() for gradient in full.values())
    for name, gradient in full.items():
        assert (total[name] - gradient).abs().max() < 1e-6 * scale, name  # norms and statistics are in float32


@pytest.mark.parametrize("name", ["llama", "gemma4_text"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_teacher_of_some_rows_begins_where_the_student_has_been(checkpointing, name):
    """The layers below the adapter are not computed again for it; Gemma's upper layers take keys of theirs."""
    model = adapted(name, layers_to_transform=[2, 3])
    base, inputs = model.get_base_model(), batch()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    layers = base.model.layers
    layers[0].mlp.register_forward_pre_hook(lambda mlp, given: calls.append(len(given[0])))
    shared = SharedLayers(base)
    for number, rows in enumerate([(0, 2), (1,), None, (1, 2, 3), ()]):
        calls.clear()
        expected = model(**inputs, ba_lora=asked(model, rows, 2))
        whole = calls.copy()
        calls.clear()
        found = model(**inputs, ba_lora=asked(model, rows, 2, shared))
        assert (shared.why, shared.proven, shared.passes) == ("", True, number)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
        if number:
            assert sorted(calls) == sorted(whole)[1:]  # the teacher's is not among them
            ours, theirs = gradients(model, found.loss), gradients(model, expected.loss)
            for parameter, gradient in theirs.items():
                torch.testing.assert_close(ours[parameter], gradient, rtol=1e-9, atol=1e-12)


def test_a_process_with_one_row_runs_its_passes_in_the_order_of_those_with_more():
    """A split model is gathered with each layer that runs: another order in one process would stop all of them."""
    model = adapted(layers_to_transform=[2, 3])
    base, inputs = model.get_base_model(), {key: value[:1] for key, value in batch().items()}
    shared = SharedLayers(base)
    expected = model(**inputs, ba_lora=asked(model, None, 2, shared))
    ran = []
    for index, layer in enumerate(base.model.layers):
        layer.mlp.register_forward_pre_hook(lambda mlp, _, index=index: ran.append((index, mlp.training)))
    shared.renew()
    model(**inputs, ba_lora=asked(model, None, 2, shared))  # the hooks are there when it is proven
    ran.clear()
    found = model(**inputs, ba_lora=asked(model, None, 2, shared, teacher_late=True))
    assert ran == [(0, True), (1, True), (2, True), (3, True), (2, False), (3, False)]
    assert shared.passes == 1 and torch.equal(found.loss, expected.loss)


def test_what_a_pass_that_fails_has_shown_is_not_kept():
    model = adapted(layers_to_transform=[2, 3])
    base, inputs = model.get_base_model(), batch()
    shared = SharedLayers(base)
    model(**inputs, ba_lora=asked(model, None, 2, shared))
    base.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs, ba_lora=asked(model, (0, 2), 2, shared))
    assert shared._kept is None


def test_what_is_of_no_row_keeps_a_batch_whole():
    inputs = batch()
    assert rows_apart(inputs) == rows_apart({**inputs, "use_cache": False, "token_type_ids": None}) == ROWS
    positions = torch.arange(LENGTH)
    assert rows_apart({**inputs, "position_ids": positions.unsqueeze(0)}) == ROWS
    assert rows_apart({**inputs, "pixel_values": torch.zeros(ROWS, 3, 8, 8)}) == 1
    assert rows_apart({**inputs, "cu_seq_lens_q": torch.tensor([0, 3, 9])}) == 1
    assert rows_apart({**inputs, "attention_mask": {"full_attention": inputs["attention_mask"]}}) == 1
    assert rows_apart({**inputs, "position_ids": positions.expand(3, 2, -1)}) == 1  # of another number of rows
    assert rows_apart({key: value[:1] for key, value in inputs.items()}) == 1


def test_each_row_keeps_what_it_had():
    inputs = {**batch(), "use_cache": False, "position_ids": torch.arange(LENGTH).expand(3, ROWS, -1) + 1}
    inputs["attention_mask"] = torch.rand(ROWS, 1, LENGTH, LENGTH)
    found = only_rows(inputs, torch.tensor([1, 3]))
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(found[name], inputs[name][[1, 3]])
    assert torch.equal(found["position_ids"], inputs["position_ids"][:, [1, 3]])
    assert found["use_cache"] is False
    shared = only_rows({**inputs, "position_ids": inputs["position_ids"][:, :1]}, torch.tensor([2]))
    assert torch.equal(shared["position_ids"], inputs["position_ids"][:, :1])
