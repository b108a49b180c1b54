"""What an adapter stands on, by kind; what "all linear" leaves out of today's architectures, and how to take it in."""

from __future__ import annotations

import pytest
import torch
from architectures import FALCON_H1, LEFT_OUT, tiny
from helpers import ba_lora, fresh, logits, reads_experts, train
from models import tiny_llama, tiny_mixtral
from peft import PeftModel

from balora_plugin.adapter.delta import DeltaParamWrapper, delta_layers_of, refused_by_peft
from balora_plugin.adapter.kinds import what_is_adapted

pytestmark = pytest.mark.hosts


@reads_experts
@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=[] if name in ("gpt_oss", "llama4_text") else pytest.mark.slow) for name in LEFT_OUT],
)
def test_experts_that_all_linear_leaves_out_are_named_as_target_parameters_takes_them(model_type, ids, tmp_path):
    changes, names = LEFT_OUT[model_type]
    base = tiny(model_type, **changes)
    found = what_is_adapted(ba_lora(fresh(base), init_lora_weights=True))
    assert found.target_parameters == sorted(names)
    assert f"target_parameters=[{', '.join(sorted(names))}]" in str(found)
    # the remedy is one: all of them are adapted, and train
    model = ba_lora(fresh(base), target_parameters=found.target_parameters).eval()
    assert what_is_adapted(model).left_out == ()
    layers = [layer for _, layer in delta_layers_of(model) if isinstance(layer, DeltaParamWrapper)]
    assert {layer.parameter_name for layer in layers} == {name.rpartition(".")[2] for name in names}
    torch.testing.assert_close(logits(model, ids), logits(base, ids), rtol=0, atol=1e-6)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.lora_B["default"].weight.grad.any() for layer in layers if layer.num_experts > 1)
    if model_type == "llama4_text":  # one of them to the end: its router is a layer that PEFT takes as parameter alone
        train(model.train(), ids, steps=2)
        model.save_pretrained(tmp_path)
        plain = PeftModel.from_pretrained(fresh(base), tmp_path).eval()
        torch.testing.assert_close(logits(plain, ids), logits(model.eval(), ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("falcon_h1", FALCON_H1),
        ("mamba", {"state_size": 4}),
    ],
)
@pytest.mark.parametrize("excluded", [None, ["dt_proj", "q_proj"], r".*\.(dt|q)_proj"])
def test_all_linear_on_a_hybrid_is_all_that_peft_adapts(model_type, changes, excluded, ids, tmp_path):
    base = tiny(model_type, **changes)
    assert refused_by_peft(base) == ["out_proj"] and refused_by_peft(tiny_llama()) == []
    model = ba_lora(fresh(base), exclude_modules=excluded)
    without = {"out_proj"} if excluded is None else {"out_proj", "dt_proj", "q_proj"}
    linear = {name for name, each in base.named_modules() if isinstance(each, torch.nn.Linear)} - {"lm_head"}
    assert {name for name, _ in delta_layers_of(model)} == {
        name for name in linear if name.rpartition(".")[2] not in without
    }
    left = {kind.name.rpartition(".")[2] for kind in what_is_adapted(model).left_out}
    assert left == without & {name.rpartition(".")[2] for name in linear}
    if excluded is None and model_type == "mamba":
        train(model, ids, steps=1)
        model.save_pretrained(tmp_path)
        plain = PeftModel.from_pretrained(fresh(base), tmp_path).eval()
        torch.testing.assert_close(logits(plain, ids), logits(model.eval(), ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (tiny_llama, {}),
        (tiny_llama, {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}}),
        (tiny_llama, {"init_lora_weights": True}),
        (tiny_llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (tiny_llama, {"r": 40}),
        (tiny_mixtral, {}),
        pytest.param(
            tiny_mixtral, {"target_modules": None, "target_parameters": ["mlp.experts.down_proj"]}, marks=reads_experts
        ),
    ],
)
def test_numbers_and_matrices_are_those_of_the_model(build, changes):
    base = build()
    numbers = sum(p.numel() for p in base.parameters())
    matrices = sum(p.numel() for name, p in base.named_parameters() if p.ndim > 1 and "embed" not in name)
    matrices -= base.lm_head.weight.numel()
    model = ba_lora(base, **changes)
    found = what_is_adapted(model)
    assert found.base == numbers
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.frozen == sum(p.numel() for name, p in model.named_parameters() if "frozen_" in name)
    assert sum(kind.numbers for kind in (*found.kinds, *found.left_out)) == matrices
    assert found.whole == (("model.embed_tokens", "lm_head") if "modules_to_save" in changes else ())
    assert {kind.stack for kind in (*found.kinds, *found.left_out)} == {"model.layers.*"}


def test_a_router_that_gives_more_than_a_product_is_reached_by_its_parameter_alone():
    base = tiny("llama4_text", intermediate_size_mlp=48)
    with pytest.raises(ValueError, match=r"Llama4Router.*target_parameters=\['feed_forward.router.weight'\]"):
        ba_lora(base, targets=["q_proj", "router"])


def test_in_one_line():
    found = what_is_adapted(ba_lora(tiny_mixtral(), r=6, targets=["q_proj", "k_proj"]))
    assert found.in_short() == (
        f"{found.trained:,} of 49,568 numbers: self_attn.q_proj, self_attn.k_proj; left out, 81 % of the base: "
        "self_attn.v_proj, self_attn.o_proj, mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj; to take "
        "experts and routers in: target_parameters=[mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate.weight] "
        "(Axolotl: lora_target_parameters)"
    )


def test_in_words():
    model = ba_lora(tiny_mixtral(), r=6, targets=["q_proj", "k_proj"], rank_pattern={"k_proj": 20})
    numbers = 2 * (6 * 64 + 20 * 48)
    assert str(what_is_adapted(model)).splitlines() == [
        f"BA-LoRA trains {numbers:,} numbers at rank 6; the base has 49,568, A0 and B0 hold {numbers:,} more.",
        "  Adapted in model.layers.*: 2 self_attn.q_proj (32 x 32), 2 self_attn.k_proj (16 x 32) at rank 20 of which "
        "16 train",
        "  Not adapted in model.layers.*: 2 self_attn.v_proj (16 x 32), 2 self_attn.o_proj (32 x 32), "
        "2 mlp.gate.weight (4 x 32), 2 mlp.experts.gate_up_proj (4 experts of 96 x 32), 2 mlp.experts.down_proj "
        "(4 experts of 32 x 48)",
        "  What is not adapted is 81 % of the base. To adapt its experts and routers too: "
        "target_parameters=[mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate.weight] "
        "(Axolotl: lora_target_parameters).",
    ]
