"""The adapter: PiSSA's function and gradients, on a base that never changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import assert_base_untouched, ba_lora, base_parameters, logits, stock, train, trainable
from models import tiny_gpt2, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from balora_plugin import BaLoraConfig, get_ba_lora_model
from balora_plugin.adapter.delta import DeltaVariant, delta_layers_of, split_factors, stack_factors
from balora_plugin.pretrained.switch import TeacherSwitch

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("start", ["pissa", "pissa_fast", "pissa_exact", True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_is_the_base_model_bit_for_bit(build, start, dtype, ids):
    model = build().to(dtype).eval()
    before = logits(model, ids)
    wrapped = ba_lora(model, init_lora_weights=start, lora_dropout=0.3).eval()
    assert torch.equal(logits(wrapped, ids), before)
    wrapped.train()
    if build is tiny_llama:  # GPT-2 has dropout of its own
        assert torch.equal(logits(wrapped, ids), before)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_base_is_bit_equal_before_during_and_after_training(build, ids):
    model = build()
    before = base_parameters(model)
    wrapped = ba_lora(model, use_rslora=True)
    assert_base_untouched(wrapped, before)
    train(wrapped, ids, steps=3)
    assert_base_untouched(wrapped, before)
    with TeacherSwitch(wrapped).off():
        wrapped(input_ids=ids)
    assert_base_untouched(wrapped, before)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("alpha", [4, 10])
def test_50_steps_beside_stock_pissa_it_is_pissa(build, alpha, ids):
    bare = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    ours = ba_lora(build(**bare), lora_alpha=alpha, init_lora_weights="pissa_exact")
    theirs = stock(build(**bare), lora_alpha=alpha, init_lora_weights="pissa")
    # float64 from here on: in float32 Adam turns the rounding of W_res (1e-7) into 2e-5 after 50 steps at this rate
    ours, theirs = ours.double(), theirs.double()
    our_losses, their_losses = train(ours, ids, steps=50, lr=3e-3), train(theirs, ids, steps=50, lr=3e-3)
    assert our_losses[0] - our_losses[-1] > 0.3  # it learns: the comparison means something
    torch.testing.assert_close(torch.tensor(our_losses), torch.tensor(their_losses), rtol=0, atol=1e-5)


def test_gradients_are_stock_pissas(llama, ids):
    ours = ba_lora(copy.deepcopy(llama), init_lora_weights="pissa_exact")
    theirs = stock(llama, init_lora_weights="pissa")
    ours(input_ids=ids, labels=ids).loss.backward()
    theirs(input_ids=ids, labels=ids).loss.backward()
    pairs = list(zip(trainable(ours), trainable(theirs), strict=True))
    scale = max(p.grad.abs().max() for _, p in pairs)
    assert all((a.grad - b.grad).abs().max() <= 2e-5 * scale for a, b in pairs)


def test_delta_form_against_its_formula():
    torch.manual_seed(0)
    layer = nn.Linear(7, 5).double()
    model = get_ba_lora_model(nn.Sequential(layer), BaLoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    wrapped = model.base_model.model[0]
    a0, b0 = wrapped.frozen_A["default"].weight, wrapped.frozen_B["default"].weight
    d_a, d_b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    with torch.no_grad():
        d_a.normal_()
        d_b.normal_()
    x = torch.randn(4, 7).double()
    update = 2.0 * ((b0 + d_b) @ (a0 + d_a) - b0 @ a0)
    torch.testing.assert_close(model(x), x @ (layer.weight + update).T + layer.bias, rtol=1e-12, atol=1e-12)
    # the start: s B0 A0 is the best rank-3 part of the weight
    u, s, vh = torch.linalg.svd(layer.weight, full_matrices=False)
    torch.testing.assert_close(2.0 * b0 @ a0, u[:, :3] * s[:3] @ vh[:3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("experts", [1, 3])
def test_stacked_factors_are_the_update_and_split_exactly(experts):
    r, d_in, d_out = 2, 5, 4
    d_a, a0 = torch.randn(experts * r, d_in), torch.randn(experts * r, d_in)
    d_b, b0 = torch.randn(d_out, r * experts), torch.randn(d_out, r * experts)
    a, b = stack_factors(d_a, d_b, a0, b0, experts)
    assert a.shape == (experts * 2 * r, d_in)
    assert b.shape == (d_out, 2 * r * experts)

    def per_expert(left, right, e, rank):
        return left.reshape(d_out, rank, experts)[:, :, e] @ right.reshape(experts, rank, d_in)[e]

    for e in range(experts):
        update = per_expert(b0 + d_b, a0 + d_a, e, r) - per_expert(b0, a0, e, r)
        torch.testing.assert_close(per_expert(b, a, e, 2 * r), update)
    for got, expected in zip(split_factors(a, b, experts), (d_a, d_b, b0), strict=True):
        assert torch.equal(got, expected)


def test_a_cast_of_the_saved_layout_keeps_the_update_where_the_naive_layout_loses_it():
    a0, b0 = torch.randn(8, 64), torch.randn(48, 8)
    d_a, d_b = 0.001 * torch.randn(8, 64), 0.001 * torch.randn(48, 8)
    update = (b0 + d_b) @ (a0 + d_a) - b0 @ a0

    def error(a, b):
        return ((b.bfloat16().float() @ a.bfloat16().float() - update).norm() / update.norm()).item()

    naive = error(torch.cat([a0 + d_a, a0]), torch.cat([b0 + d_b, -b0], dim=1))
    assert error(*stack_factors(d_a, d_b, a0, b0)) < 0.005
    assert naive > 0.5  # the layout of converted PiSSA adapters


def test_the_teacher_has_no_dropout_of_the_base(ids):
    base = tiny_gpt2(attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5)
    before = logits(base.eval(), ids)
    model = ba_lora(base, lora_dropout=0.5).train()
    train(model, ids, steps=2)
    with TeacherSwitch(model).off():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.equal(logits(model, ids), logits(model, ids))  # without eval mode it would be another each time


def test_the_teacher_is_the_pretrained_model_where_disabling_stock_pissa_gives_the_residual(llama, ids):
    before = logits(llama.eval(), ids)
    ours = ba_lora(copy.deepcopy(llama)).train()
    train(ours, ids, steps=5)
    assert (logits(ours, ids) - before).abs().max() > 0.01
    with TeacherSwitch(ours).off():
        assert torch.equal(ours(input_ids=ids).logits, before)
    theirs = stock(copy.deepcopy(llama), init_lora_weights="pissa")
    with TeacherSwitch(theirs).off():
        assert (theirs(input_ids=ids).logits - before).abs().max() > 0.1  # the trap


def test_the_teacher_switch_restores_every_flag(ids):
    model = ba_lora(tiny_gpt2(), modules_to_save=["ln_f"]).train()
    model.base_model.model.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    with TeacherSwitch(model).off():
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert grads == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(getattr(module, "_disable_adapters", False) is True for module in model.modules())


def test_the_teachers_memory_is_the_frozen_factors(llama):
    """r * (in + out) numbers a layer in the adapter's dtype; no second model."""
    r = 4
    before = sum(p.numel() * p.element_size() for p in llama.parameters())
    shapes = [tuple(m.weight.shape) for n, m in llama.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    model = ba_lora(llama, r=r)
    after = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in trainable(model))
    buffers = sum(b.numel() for b in model.buffers())
    assert after - before - trained == sum(r * (o + i) * 4 for o, i in shapes)
    assert buffers == sum(b.numel() for b in tiny_llama().buffers())
    kept = ba_lora(tiny_llama(), r=r, init_lora_weights=True)
    assert sum(p.numel() * p.element_size() for p in kept.parameters()) - before == trained


def test_only_dA_and_dB_train(llama):
    names = [name for name, p in ba_lora(llama).named_parameters() if p.requires_grad]
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)


def test_rank_and_alpha_patterns_and_regex_targets(llama, ids):
    model = ba_lora(
        llama,
        targets=r".*\.(q_proj|down_proj)",
        rank_pattern={"layers.0.*q_proj": 2},
        alpha_pattern={"down_proj": 8},
    )
    layers = dict(delta_layers_of(model))
    assert len(layers) == 4
    q0 = layers["model.layers.0.self_attn.q_proj"]
    down = layers["model.layers.1.mlp.down_proj"]
    assert q0.frozen_A["default"].weight.shape[0] == 2
    assert (q0.scaling["default"], down.scaling["default"]) == (4 / 2, 8 / 4)
    assert all(isinstance(layer.lora_variant["default"], DeltaVariant) for layer in layers.values())
    w = q0.base_layer.weight.detach()
    update = q0.scaling["default"] * q0.frozen_B["default"].weight @ q0.frozen_A["default"].weight
    u, s, vh = torch.linalg.svd(w)
    torch.testing.assert_close(update, u[:, :2] * s[:2] @ vh[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"target_modules": ["embed_tokens"]},
            ["target_modules", "embed_tokens", "Embedding", "modules_to_save=['embed_tokens']"],
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, ["target_modules", "lm_head"]),
        ({"lora_alpha": 0}, ["lora_alpha"]),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_the_model_left_as_it_was(llama, ids, changes, words):
    before, grads = logits(llama, ids), [p.requires_grad for p in llama.parameters()]
    with pytest.raises(ValueError) as caught:
        get_ba_lora_model(llama, BaLoraConfig(**{"target_modules": "all-linear", "r": 4, **changes}))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert torch.equal(logits(llama, ids), before)
    assert [p.requires_grad for p in llama.parameters()] == grads
    assert not any("lora" in name for name, _ in llama.named_parameters())


def test_nan_in_the_base_is_named(llama):
    llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        ba_lora(llama)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True, "init_lora_weights": True},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa_niter_x"},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 2]]},
        {"r": 0},
        {"r": 2.5},
        {"regularizers": {"lambda_svdd": 1.0}},
    ],
)
def test_config_refuses_by_name(changes):
    key = next(iter(changes))
    word = "lambda_svdd" if key == "regularizers" else key
    with pytest.raises(ValueError, match=word):
        BaLoraConfig(**changes)


def test_config_is_copied_and_takes_a_dict(llama):
    config = BaLoraConfig(r=4, target_modules=["q_proj"], regularizers={"preset": "iclr2026"})
    before = copy.deepcopy(config)
    model = get_ba_lora_model(llama, config)
    assert config == before
    assert model.peft_config["default"] is not config
    assert model.peft_config["default"].regularizers.preset == "iclr2026"
    assert (config.init_lora_weights, config.peft_type, config.compile) == ("pissa", "LORA", False)


def test_plain_get_peft_model_refuses_naming_the_remedy(llama, ids):
    before = base_parameters(llama)
    with pytest.raises(TypeError, match="get_ba_lora_model"):
        get_peft_model(llama, BaLoraConfig(target_modules="all-linear"))
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


def test_adding_to_a_stock_model_refuses_too(llama):
    model = stock(llama)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    with pytest.raises(TypeError, match="get_ba_lora_model"):
        model.add_adapter("second", BaLoraConfig(r=4, target_modules="all-linear"))
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_isinstance_deepcopy_and_pickle_hold(llama, ids):
    model = ba_lora(llama)
    train(model, ids, steps=2)
    assert isinstance(model, PeftModel)
    expected = logits(model, ids)
    copies = [copy.deepcopy(model)]
    try:
        pickle.dumps(tiny_llama())
    except AttributeError:  # with the `kernels` package transformers' own models cannot be pickled
        pass
    else:
        copies.append(pickle.loads(pickle.dumps(model)))
    for copied in copies:
        assert type(copied) is type(model)
        assert torch.equal(logits(copied, ids), expected)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unmerge(build, safe, ids):
    model = ba_lora(build()).eval()
    train(model, ids)
    expected = logits(model, ids)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    after = dict(model.named_parameters())
    assert all((after[n] - p).abs().max() < 1e-6 for n, p in before.items())
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-5)


def test_several_adapters(llama, ids):
    model = ba_lora(llama).eval()
    base = logits(model, ids)
    train(model, ids)
    first = logits(model, ids)
    model.add_adapter("second", BaLoraConfig(r=2, lora_alpha=2, target_modules="all-linear"))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    assert torch.equal(logits(model, ids), base)
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)
    model.delete_adapter("second")
    assert not any(".second." in name for name in model.state_dict())


def test_added_adapters_keep_the_dtype_asked_for(ids):
    config = BaLoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_ba_lora_model(tiny_llama().bfloat16(), config, autocast_adapter_dtype=False)
    model.add_adapter("second", config, autocast_adapter_dtype=False)
    model.add_adapter("third", config)
    dtypes = {
        name: {p.dtype for key, p in model.named_parameters() if f".{name}." in key} for name in ("second", "third")
    }
    assert dtypes == {"second": {torch.bfloat16}, "third": {torch.float32}}


def test_factors_travel_on_a_device_the_process_group_can_carry(monkeypatch):
    """Plain NCCL has no backend for the CPU, where TRL builds the model before it moves it."""
    from balora_plugin import distributed

    cpu, cuda = torch.device("cpu"), torch.device("cuda", 3)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    for backends, expected in (("cuda:nccl", cuda), ("cpu:gloo,cuda:nccl", cpu)):
        monkeypatch.setattr(torch.distributed, "get_backend_config", lambda backends=backends: backends)
        assert distributed.collective_device(cpu) == expected
        assert distributed.collective_device(cuda) == cuda


def test_what_would_be_silently_wrong_is_refused(llama):
    model = ba_lora(llama)
    with pytest.raises(NotImplementedError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert not model.supports_lora_conversion()


def test_bf16_adapters_follow_float32_where_stock_pissa_stalls(ids):
    def run(wrap, dtype):
        model = wrap(tiny_llama().to(dtype))
        for p in model.parameters():
            p.data = p.data.to(dtype)
        return train(model, ids, steps=40, lr=1e-4)[-1]

    def delta(base):
        return get_ba_lora_model(
            base,
            BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"),
            autocast_adapter_dtype=False,
        )

    def pissa(base):
        config = LoraConfig(
            r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="pissa"
        )
        return get_peft_model(base, config, autocast_adapter_dtype=False)

    reference = run(delta, torch.float32)
    start = train(ba_lora(tiny_llama()), ids, steps=1)[0]
    ours, theirs = run(delta, torch.bfloat16), run(pissa, torch.bfloat16)
    gained = start - reference
    assert gained > 0.02
    assert abs(ours - reference) < 0.25 * gained, (start, reference, ours, theirs)
    assert theirs - reference > 0.6 * gained, (start, reference, ours, theirs)
