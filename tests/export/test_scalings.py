"""What adapter_config.json says of the tensors: mixtures of experts by bare names, edits, whole lora_alphas."""

from __future__ import annotations

import json
import math

import pytest
import torch
from exporting import error_in, loaded, refused, run, trained
from helpers import ba_lora, logits, reads_experts, stock
from models import VOCABULARY, tiny_gpt2, tiny_llama, tiny_mixtral
from peft import PeftModel
from safetensors.torch import load_file

from balora_plugin.export import lora_file

pytestmark = pytest.mark.hosts


# --- all-linear mixtures of experts: PEFT writes bare names in target_parameters


def tiny_moe(name, **changes):
    """A mixture of experts of transformers, by the stem of its classes."""
    import transformers

    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "initializer_range": 0.1,
        "pad_token_id": 0,
    }
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**{**values, **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config)


def tiny_qwen3_moe():
    return tiny_moe("Qwen3Moe")


def tiny_olmoe():
    return tiny_moe("Olmoe")


MIXTURES = (tiny_mixtral, tiny_qwen3_moe, tiny_olmoe)
ADAPTERS = {
    "ours": (ba_lora, {}),
    "rslora": (ba_lora, {"use_rslora": True, "lora_alpha": 5}),
    "stock": (stock, {"init_lora_weights": False, "lora_alpha": 6}),
    "stock rslora": (stock, {"init_lora_weights": False, "use_rslora": True}),
}


@reads_experts
@pytest.mark.parametrize("build", MIXTURES)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_all_linear_mixture_of_experts_is_exported_to_one_rank_and_merged(build, kind, ids, tmp_path, capsys):
    build().save_pretrained(tmp_path / "base")
    make, changes = ADAPTERS[kind]
    expected = trained(make(loaded(tmp_path / "base"), **changes), ids, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "down_proj" in saved["target_parameters"]  # bare
    assert any(rank > saved["r"] for rank in saved["rank_pattern"].values())
    code, _, err = run(capsys, "export", tmp_path / "adapter", "--output", tmp_path / "out")
    assert code == 0, err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == max(saved["rank_pattern"].values()) and config["rank_pattern"] == {}
    model = PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "out").eval()
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
    arguments = ["--merge", "--base", tmp_path / "base", "--output", tmp_path / "merged"]
    code, out, err = run(capsys, "export", tmp_path / "adapter", *arguments)
    assert code == 0, err
    assert error_in(out) < 1e-5
    torch.testing.assert_close(logits(loaded(tmp_path / "merged"), ids), expected, rtol=0, atol=1e-5)


def tiny_longcat():
    """Four experts and two zero experts, whose rows gate_up_proj has and down_proj has not."""
    widths = {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "q_lora_rank": 16, "kv_lora_rank": 8}
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
    return tiny_moe("LongcatFlash", moe_topk=2, n_routed_experts=4, num_layers=1, zero_expert_num=2, **widths, **heads)


def test_parameters_of_one_module_may_have_other_numbers_of_experts(ids, tmp_path, capsys):
    tiny_longcat().save_pretrained(tmp_path / "base")
    experts = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    expected = trained(ba_lora(loaded(tmp_path / "base"), targets=["q_a_proj"], **experts), ids, tmp_path / "adapter")
    read = lora_file.read_adapter(tmp_path / "adapter").updates
    assert {update.experts for name, update in read.items() if "experts" in name} == {4, 6}
    code, out, err = run(
        capsys, "export", tmp_path / "adapter", "--merge", "--base", tmp_path / "base", "--output", tmp_path / "merged"
    )
    assert code == 0 and error_in(out) < 1e-5, err
    torch.testing.assert_close(logits(loaded(tmp_path / "merged"), ids), expected, rtol=0, atol=1e-5)


# --- an adapter_config.json that was edited


def edit(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


EDITS = {
    "lora_alpha": 80,
    "use_rslora": True,
    "r": 16,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 80},
    "fan_in_fan_out": True,
    "target_modules": ["q_proj"],
}


@pytest.mark.parametrize("key", EDITS)
@pytest.mark.parametrize("merge", [False, True])
def test_an_edited_config_is_refused_by_key_and_both_values(key, merge, ids, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    trained(ba_lora(loaded(tmp_path / "base")), ids, tmp_path / "adapter")
    before = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[key]
    edit(tmp_path / "adapter", **{key: EDITS[key]})
    extra = ["--merge", "--base", tmp_path / "base"] if merge else []
    line = refused(capsys, "export", tmp_path / "adapter", "--output", tmp_path / "out", *extra)
    assert f"{key}={EDITS[key]!r}" in line and "edited" in line
    shown = {"rank_pattern": "rank 8", "alpha_pattern": "scaling 1"}
    assert shown.get(key, repr(sorted(before) if isinstance(before, list) else before)) in line
    assert not (tmp_path / "out").exists()


PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 3, "layers.1.*": 6}, "alpha_pattern": {"k_proj": 9}}


@pytest.mark.parametrize(
    ("build", "changes"), [(tiny_llama, {}), (tiny_llama, PATTERNS), (tiny_gpt2, {}), (tiny_mixtral, {})]
)
def test_a_base_that_moved_may_be_named(build, changes, ids, tmp_path, capsys):
    trained(ba_lora(build(), **changes), ids, tmp_path / "adapter")
    edit(
        tmp_path / "adapter",
        base_model_name_or_path="elsewhere",
        revision="main",
        peft_version="0.1",
        inference_mode=True,
    )
    code, _, err = run(capsys, "export", tmp_path / "adapter", "--output", tmp_path / "out")
    assert code == 0, err


def test_an_edited_export_is_refused_too(ids, tmp_path, capsys):
    trained(ba_lora(tiny_llama()), ids, tmp_path / "adapter")
    run(capsys, "export", tmp_path / "adapter", "--output", tmp_path / "out")
    edit(tmp_path / "out", base_model_name_or_path="elsewhere")
    assert run(capsys, "export", tmp_path / "out", "--output", tmp_path / "again")[0] == 0
    edit(tmp_path / "out", lora_alpha=80)
    line = refused(capsys, "export", tmp_path / "out", "--output", tmp_path / "third")
    assert "lora_alpha=80" in line and "lora_alpha=8:" in line


# --- a whole lora_alpha


@pytest.mark.parametrize("make", [ba_lora, stock])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{"use_rslora": True, "r": 8, "lora_alpha": 16}, {"lora_alpha": 0.7}])
def test_an_export_has_a_whole_alpha_and_one_rounding(make, dtype, changes, ids, tmp_path, capsys):
    trained(make(tiny_llama(), **changes), ids, tmp_path / "adapter")
    code, _, err = run(capsys, "export", tmp_path / "adapter", "--output", tmp_path / "out", "--dtype", dtype)
    assert code == 0, err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert isinstance(config["lora_alpha"], int) and config["use_rslora"] is False
    scaling = config["lora_alpha"] / config["r"]
    assert math.frexp(scaling)[0] == 0.5  # a power of two: it rounds nothing
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, update in lora_file.read_adapter(str(tmp_path / "adapter")).updates.items():
        kind = getattr(torch, dtype)
        assert torch.equal(written[f"{name}.lora_A.weight"], update.a.to(kind))
        exact = (update.b.double() * update.scaling / scaling).to(kind)
        assert torch.equal(written[f"{name}.lora_B.weight"], exact)


def test_a_whole_alpha_changes_nothing(ids, tmp_path, capsys):
    trained(ba_lora(tiny_llama(), lora_alpha=6), ids, tmp_path / "adapter")
    run(capsys, "export", tmp_path / "adapter", "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 12
