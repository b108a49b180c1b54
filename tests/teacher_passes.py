"""Models whose layers an adapter stands on, and one micro-batch of them by any way of the teacher's pass."""

from __future__ import annotations

import torch
from architectures import LINEAR_ATTENTION, tiny
from helpers import TERMS, ba_lora
from models import tiny_gpt2, tiny_llama, tiny_mixtral

from balora_plugin.objective.install import install
from balora_plugin.objective.request import StepRequest
from balora_plugin.pretrained.switch import TeacherSwitch
from balora_plugin.schedules import Lambdas

LAYERS, FIRST = 4, 2
CHECKPOINTING = {"reentrant": {"use_reentrant": True}, "not_reentrant": {"use_reentrant": False}}
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


def adapted(name, make=ba_lora, **changes):
    """A model in training mode whose upper layers have an adapter that has moved."""
    changes = {"layers_to_transform": list(range(FIRST, LAYERS)), **changes}
    targets = changes.pop("target_modules", OTHERS.get(name, ATTENTION))
    changes |= {"regularizers": TERMS} if make is ba_lora else {}
    model = make(MODELS[name](), targets=targets, **changes)
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


def forward(model, shared=None, by_layer=None, anchors=None, **inputs):
    request = StepRequest(
        config=TERMS.resolved("nlg"),
        lambdas=Lambdas(0.5, 0.02, 0.02),
        switch=TeacherSwitch(model.get_base_model()),
        shared=shared,
        by_layer=by_layer,
        anchors=anchors,
    )
    return model(**(inputs or batch()), ba_lora=request)


def step(model, shared=None, seed=7, **more):
    """Every sum of one micro-batch, the gradients, and where the random numbers are then."""
    torch.manual_seed(seed)
    out = forward(model, shared, **more)
    model.zero_grad()
    loss = out.loss + 0.02 * out.svd
    for also in (out.aux_loss, None if out.anchors is None else out.anchors.loss):
        loss = loss if also is None else loss + also
    loss.backward()
    names = ("loss", "task", "consistency", "diversity", "svd", "entropy", "correct", "aux_loss")
    sums = {key: getattr(out, key).detach() for key in names if getattr(out, key) is not None}
    if out.anchors is not None:
        sums["anchors"] = out.anchors.consistency
    sums["random"] = torch.get_rng_state()
    return sums | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def noisy(model):
    """As NEFTune does it: noise on the embeddings in training."""
    embeddings = model.get_base_model().get_input_embeddings()
    embeddings.register_forward_hook(lambda m, _, out: out + 0.1 * torch.rand_like(out) if m.training else out)
    return model


def with_router(model):
    model.get_base_model().config.output_router_logits = True
    return model
