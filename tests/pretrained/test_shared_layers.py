"""Layers below the adapter computed once: the same terms and gradients, bit for bit, and less work."""

from __future__ import annotations

import pytest
import torch
from architectures import LINEAR_ATTENTION, tiny
from helpers import TERMS, ba_lora
from models import tiny_gpt2, tiny_llama, tiny_mixtral
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from balora_plugin.objective.install import install
from balora_plugin.objective.request import StepRequest
from balora_plugin.pretrained.shared_layers import SharedLayers
from balora_plugin.pretrained.switch import TeacherSwitch
from balora_plugin.schedules import Lambdas

LAYERS, FIRST = 4, 2
GEMMA = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
ATTENTION = ["q_proj", "v_proj"]
MODELS = {
    "llama": lambda: tiny_llama(num_hidden_layers=LAYERS),
    "qwen3": lambda: tiny("qwen3", num_hidden_layers=LAYERS),
    "qwen3_5_text": lambda: tiny(
        "qwen3_5_text",
        num_hidden_layers=LAYERS,
        **{**LINEAR_ATTENTION, "layer_types": LINEAR_ATTENTION["layer_types"] * 2},
    ),
    "gemma2": lambda: tiny("gemma2", num_hidden_layers=LAYERS),
    "gemma3n_text": lambda: tiny("gemma3n_text", num_hidden_layers=LAYERS, laurel_rank=4, **GEMMA),
    "gemma4_text": lambda: tiny("gemma4_text", num_hidden_layers=LAYERS, global_head_dim=8, **GEMMA),
    "mixtral": lambda: tiny_mixtral(num_hidden_layers=LAYERS),
    "qwen3_moe": lambda: tiny("qwen3_moe", num_hidden_layers=LAYERS),
    "gpt2": lambda: tiny_gpt2(n_layer=LAYERS, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
}
OTHERS = {"gpt2": ["c_attn"], "qwen3_5_text": ["up_proj", "out_proj"]}


def adapted(name, **changes):
    """A model in training mode whose upper layers have an adapter that has moved."""
    targets = OTHERS.get(name, ATTENTION)
    changes = {"layers_to_transform": list(range(FIRST, LAYERS)), **changes}
    model = ba_lora(MODELS[name](), targets=targets, regularizers=TERMS, **changes)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    install(model.get_base_model())
    return model.train()


def batch(packed=False):
    torch.manual_seed(5)
    ids = torch.randint(3, 96, (1, 24) if packed else (2, 12))
    labels = ids.clone()
    labels[:, :3] = -100
    if packed:
        positions = torch.cat([torch.arange(10), torch.arange(14)]).unsqueeze(0)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    return {"input_ids": ids, "labels": labels.masked_fill(mask == 0, -100), "attention_mask": mask}


def forward(model, shared=None, **inputs):
    base = model.get_base_model()
    request = StepRequest(
        config=TERMS.resolved("nlg"), lambdas=Lambdas(0.5, 0.02, 0.02), switch=TeacherSwitch(base), shared=shared
    )
    return model(**(inputs or batch()), ba_lora=request)


def step(model, shared=None, seed=7, **inputs):
    """Every sum of one micro-batch, and the gradients."""
    torch.manual_seed(seed)
    out = forward(model, shared, **inputs)
    model.zero_grad()
    (out.loss + 0.02 * out.svd).backward()
    sums = {key: out[key].detach() for key in ("loss", "task", "consistency", "diversity", "svd", "entropy", "correct")}
    return sums | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def shared_by(model):
    return SharedLayers(model.get_base_model())


@pytest.mark.parametrize("name", MODELS)
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


CHECKPOINTING = {"reentrant": {"use_reentrant": True}, "not_reentrant": {"use_reentrant": False}}


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
