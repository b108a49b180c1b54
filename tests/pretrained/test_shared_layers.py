"""Layers below the adapter computed once: the same terms and gradients, bit for bit, and less work."""

from __future__ import annotations

import pytest
import torch
from helpers import TERMS, ba_lora, fresh, stock
from models import tiny_llama
from teacher_passes import (
    ATTENTION,
    CHECKPOINTING,
    FIRST,
    LAYERS,
    MODELS,
    adapted,
    assert_same,
    batch,
    forward,
    noisy,
    step,
    with_router,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaForSequenceClassification

from balora_plugin.objective.classification import classification_step
from balora_plugin.objective.install import install
from balora_plugin.objective.request import StepRequest
from balora_plugin.pretrained.shared_layers import SharedLayers
from balora_plugin.pretrained.switch import TeacherSwitch
from balora_plugin.schedules import Lambdas


def shared_by(model):
    return SharedLayers(model.get_base_model())


@pytest.mark.parametrize("name", list(MODELS))
def test_the_terms_and_gradients_are_those_of_two_whole_passes(name):
    model = adapted(name)
    whole = step(model)
    assert whole["consistency"] > 0
    shared = shared_by(model)
    for passes in (0, 1, 2):  # the first proves it
        assert_same(step(model, shared), whole)
        assert (shared.why, shared.passes, shared.proven) == ("", passes, True)
    assert (shared.first, shared.total) == (FIRST, LAYERS)


def proven(model, **inputs):
    shared = shared_by(model)
    step(model, shared, **inputs)
    return shared


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("how", [None, *CHECKPOINTING])
def test_with_checkpointing_and_dropout_of_the_adapter(how, packed):
    model = adapted("llama", lora_dropout=0.2)
    plain = step(model, **batch(packed))
    if how:
        model.get_base_model().gradient_checkpointing_enable(CHECKPOINTING[how])
        model.enable_input_require_grads()
        assert_same(step(model, **batch(packed)), plain)
    shared = shared_by(model)
    for _ in range(3):
        assert_same(step(model, shared, **batch(packed)), plain)
    assert shared.passes == 2


class Counted(TorchDispatchMode):
    """Counts FLOP of products by kind of pass, and the operators of the terms."""

    def __init__(self):
        super().__init__()
        self.flop = 0
        self.terms = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flop += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        self.terms += str(func).startswith("balora.")
        return out


def counted(call):
    with Counted() as found:
        call()
    return found


def backbone_flop(model, first=0):
    """FLOP of the adapted layers from `first` on, forward; and what the adapter's own products are of it."""
    base = model.get_base_model()
    layers = base.model.layers
    base.model.layers = torch.nn.ModuleList(list(layers)[first:])
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    try:
        with torch.no_grad():
            student = counted(lambda: base.model(**inputs, use_cache=False)).flop
            with TeacherSwitch(base).off():
                return student, counted(lambda: base.model(**inputs, use_cache=False)).flop
    finally:
        base.model.layers = layers


@pytest.mark.parametrize("how", [None, *CHECKPOINTING])
def test_the_work_saved_is_that_of_the_layers_below(how):
    """Counted products: half of the teacher's; with inputs that require gradients the student's backward pass too."""
    model = adapted("llama")
    if how:
        model.get_base_model().gradient_checkpointing_enable(CHECKPOINTING[how])
        model.enable_input_require_grads()
    shared = proven(model)
    whole, once = counted(lambda: step(model)), counted(lambda: step(model, shared))
    _, all_layers = backbone_flop(model)
    _, upper = backbone_flop(model, FIRST)
    below = all_layers - upper
    # with checkpointing the layers below were computed again, and differentiated by what goes in, for nothing
    assert whole.flop - once.flop >= below * (2 if how else 1) > 0
    assert whole.terms == once.terms
    if not how:
        assert whole.flop - once.flop == below


def with_dropout(model):
    model.get_base_model().transformer.h[0].mlp.dropout.p = 0.1
    return model


def asks_for_its_layers(model):
    """A model whose states are others where a layer is not itself."""
    inner = model.get_base_model().model
    kind, norm = type(inner.layers[0]), inner.norm.forward
    inner.norm.forward = lambda hidden: norm(hidden + isinstance(inner.layers[0], kind))
    return model


APART = {
    "first_layer": (lambda: adapted("llama", layers_to_transform=[0, 3]), "the first layer is adapted"),
    "embedding_adapter": (
        lambda: adapted("llama", stock, target_modules=r".*embed_tokens|.*[23]\..*_proj", layers_to_transform=None),
        "embed_tokens is adapted or trained",
    ),
    "new_tokens": (
        lambda: adapted("llama", stock, trainable_token_indices=[5, 6]),
        "embed_tokens is adapted or trained",
    ),
    "modules_to_save": (lambda: adapted("llama", modules_to_save=["embed_tokens"]), "embed_tokens is adapted or"),
    "dropout": (lambda: with_dropout(adapted("gpt2")), "differ below the adapter"),
    "noise": (lambda: noisy(adapted("llama")), "differ below the adapter"),
    "router": (lambda: with_router(adapted("mixtral")), "a router's balance"),
    "asks": (lambda: asks_for_its_layers(adapted("llama")), "others without the layers below"),
}


@pytest.mark.parametrize("case", APART)
def test_what_is_not_one_below_the_adapter_is_computed_twice(case):
    make, why = APART[case]
    model = make()
    whole = step(model)
    shared = shared_by(model)
    for _ in range(2):
        assert_same(step(model, shared), whole)
    assert why in shared.why
    assert shared.passes == 0


def test_a_head_of_its_own_may_train():
    model = adapted("llama", modules_to_save=["lm_head"])
    whole = step(model)
    shared = proven(model)
    assert_same(step(model, shared), whole)
    assert shared.passes == 1


def test_evaluation_proves_nothing_and_uses_what_is_proven():
    model = adapted("llama").eval()
    shared = shared_by(model)
    with torch.no_grad():
        whole = forward(model)
        forward(model, shared)
    assert not shared.proven
    step(model.train(), shared)
    assert shared.proven
    with torch.no_grad():
        again = forward(model.eval(), shared)
    assert shared.passes == 1
    assert torch.equal(again.loss, whole.loss)


def test_layers_are_back_after_a_pass_that_fails():
    model = adapted("llama")
    shared = proven(model)
    layers = list(model.get_base_model().model.layers)
    failing = layers[FIRST].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(model, shared)
    failing.remove()
    assert list(model.get_base_model().model.layers) == layers
    assert_same(step(model, shared), step(model))


def test_a_copy_of_the_model_is_no_part_of_it():
    model = adapted("llama")
    shared, copied = proven(model), fresh(model)
    assert_same(step(copied, shared), step(model))
    assert shared.passes == 0


def test_a_classifier_shares_too():
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_llama(num_hidden_layers=LAYERS).config)
    model = ba_lora(model, targets=ATTENTION, task_type="SEQ_CLS", layers_to_transform=[2, 3], regularizers=TERMS)
    base = model.get_base_model()
    install(base, classification_step)
    shared = SharedLayers(base)
    inputs = {"input_ids": batch()["input_ids"], "labels": torch.tensor([0, 1])}
    found = []
    for given in (None, shared, shared):
        request = StepRequest(TERMS.resolved("nlu"), Lambdas(0.5, 0.02, 0.02), switch=TeacherSwitch(base), shared=given)
        model.zero_grad()
        out = model.train()(**inputs, ba_lora=request)
        out.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": out.loss.detach(), "consistency": out.consistency, **gradients})
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
    assert (shared.passes, shared.why) == (1, "")


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("once", [False, True], ids=["whole", "shared"])
def test_a_recomputed_layer_runs_no_teacher_and_no_terms(how, once):
    """Counted products: checkpointing adds the student's layers once more, and nothing of the teacher or the terms."""
    model = adapted("llama")
    model.enable_input_require_grads()
    layers = model.get_base_model().model.layers
    calls, backward = [], False
    for layer in layers:
        # inside: newer releases call a layer's own hooks outside what is checkpointed
        layer.mlp.register_forward_pre_hook(lambda mlp, _: calls.append((mlp.training, backward)))
    shared = proven(model) if once else None  # a hook that comes later ends it

    def counts():
        nonlocal backward
        calls.clear()
        out = forward(model, shared)
        loss, backward = out.loss + 0.02 * out.svd, True
        found, backward = counted(loss.backward), False
        return found

    plain = counts()
    assert {when for _, when in calls} == {False}
    teacher = calls.count((False, False))
    model.get_base_model().gradient_checkpointing_enable(CHECKPOINTING[how])
    saved = counts()
    assert calls.count((False, False)) == teacher == LAYERS
    assert calls.count((False, True)) == 0
    student = LAYERS - FIRST if once else LAYERS
    assert calls.count((True, False)) == calls.count((True, True)) == student
    assert saved.terms == plain.terms
    again, _ = backbone_flop(model, FIRST if once else 0)
    assert 0.7 * again < saved.flop - plain.flop <= again  # the other kind ends before the layer's last product
