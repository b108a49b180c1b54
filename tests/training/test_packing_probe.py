"""Packed documents that see each other are named once, with both losses; those that do not are left in peace."""

from __future__ import annotations

import re

import pytest
import torch
from models import VOCABULARY, tiny_llama
from torch.nn import functional as F

from balora_plugin.training.packing_probe import PackingProbe

pytestmark = pytest.mark.hosts

LIKE_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
STATE_SPACE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0}
JAMBA = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "use_mamba_kernels": False,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
}
OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}
LEAKY = {
    "gpt-oss": ("GptOss", {**LIKE_LLAMA, **EXPERTS, "attn_implementation": "eager"}),
    "minimax": ("MiniMax", {**LIKE_LLAMA, **EXPERTS, "block_size": 8}),
    "jamba": ("Jamba", {**LIKE_LLAMA, **JAMBA}),
    "mpt": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY, "max_seq_len": 64}),
    "falcon_mamba": ("FalconMamba", STATE_SPACE),
    "rwkv": ("Rwkv", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}),
    "bloom": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("OPT", {"vocab_size": VOCABULARY, **OPT, "pad_token_id": 0}),
}
APART = {
    "llama": ("Llama", LIKE_LLAMA),
    "llama, eager": ("Llama", {**LIKE_LLAMA, "attn_implementation": "eager"}),
    "gemma2": ("Gemma2", {**LIKE_LLAMA, "head_dim": 8}),
    "mixtral": ("Mixtral", {**LIKE_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {**LIKE_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
}


def build(prefix, values, dtype=torch.float32):
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{prefix}Config")(**values)
    return getattr(transformers, f"{prefix}ForCausalLM")(config).to(dtype)


def packed(*lengths, seed=3):
    ids = torch.randint(3, VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }


def said_of(model, *batches):
    said = []
    probe = PackingProbe(model, lambda key, message: said.append((key, message)))
    for batch in batches:
        probe.look(batch)
    return [message for key, message in said if key == "packing"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEAKY)
def test_an_architecture_whose_documents_see_each_other_is_named(name, dtype):
    prefix, values = LEAKY[name]
    model = build(prefix, values, dtype)
    (line,) = said_of(model, packed(21, 30))
    assert type(model).__name__ in line
    assert all(word in line for word in ("packing=False", "sample_packing: false", "behind another one and"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", APART)
def test_nothing_is_said_where_they_do_not(name, dtype):
    prefix, values = APART[name]
    assert said_of(build(prefix, values, dtype), packed(21, 30), packed(40, 9, 2)) == []


def test_both_losses_are_the_models_own():
    model, batch = build(*LEAKY["opt"]).eval(), packed(20, 19)  # a third of the row is 13 tokens
    (line,) = said_of(model, batch)
    first, second = batch["input_ids"][:, :13], batch["input_ids"][:, 20:33]
    with torch.no_grad():
        row = packed(13, 13, 13)
        row["input_ids"] = torch.cat([first, second, first.flip(1)], dim=1)
        behind = model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits[0, 13:25]
        alone = model(input_ids=second, position_ids=torch.arange(13)[None], use_cache=False).logits[0, :12]
    expected = [F.cross_entropy(logits, second[0, 1:]).item() for logits in (behind, alone)]
    found = [float(value) for value in re.findall(r"(\d+\.\d+) (?:behind|alone)", line)]
    assert found == pytest.approx(expected, rel=1e-5) and found[0] != found[1]


@pytest.mark.parametrize("mode", [True, False])
def test_it_is_done_once_and_leaves_nothing_behind(mode):
    model = tiny_llama(attention_dropout=0.5).train(mode)
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    state = torch.get_rng_state()
    probe = PackingProbe(model, lambda *_: pytest.fail("documents do not see each other"))
    probe.look({"input_ids": torch.ones(1, 8, dtype=torch.int64)})  # no positions
    probe.look(packed(30))
    assert not passes
    probe.look(packed(21, 30))
    assert passes == [False] * 3
    probe.look(packed(21, 30))
    assert len(passes) == 3
    assert torch.equal(torch.get_rng_state(), state) and model.training is mode


def test_batches_of_one_document_are_not_looked_at_for_ever():
    model = tiny_llama()
    probe = PackingProbe(model, lambda *_: None)
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(20):
        probe.look(packed(12))
    probe.look(packed(21, 30))
    assert not passes


def test_padding_is_no_document():
    """Axolotl pads positions with 0, which look like documents of one token."""
    batch = packed(21, 1, 1, 1, 1, 1)
    assert said_of(build(*LEAKY["opt"]), batch) == []


@pytest.mark.parametrize("numbered", [True, False])
def test_the_row_says_where_documents_begin_as_the_batch_does(numbered):
    model, seen = tiny_llama(), []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    batch = packed(30, 30)
    edges = torch.tensor([0, 30, 60], dtype=torch.int32)
    batch |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 30, "max_length_k": 30}
    batch["seq_idx"] = torch.tensor([0] * 30 + [1] * 30)[None].to(torch.int32)
    model.model.forward = lambda **kwargs: type("Out", (), {"last_hidden_state": torch.zeros(1, 60, 32)})()
    if numbered:
        batch["attention_mask"] = torch.tensor([1] * 30 + [2] * 30)[None]
    said_of(model, batch)
    row = seen[0]
    assert row["cu_seq_lens_q"].tolist() == row["cu_seq_lens_k"].tolist() == [0, 20, 40, 60]
    assert row["cu_seq_lens_q"].dtype == torch.int32 and row["max_length_q"] == row["max_length_k"] == 20
    assert row["seq_idx"].tolist() == [[0] * 20 + [1] * 20 + [2] * 20]
    assert row["position_ids"].tolist() == [list(range(20)) * 3]
    assert ("attention_mask" in row) == numbered
    if numbered:
        assert row["attention_mask"].tolist() == [[1] * 20 + [2] * 20 + [3] * 20]


def test_a_sharded_model_is_not_asked():
    model = build(*LEAKY["opt"])
    next(model.parameters()).ds_id = 0
    assert said_of(model, packed(21, 30)) == []
