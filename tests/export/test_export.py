"""balora export: the algebra beside dense matrices, and what is written beside the trained model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from exporting import error_in, loaded, refused, run, trained
from helpers import ba_lora, fresh, logits, reads_experts, stock, train
from hypothesis import given, settings
from hypothesis import strategies as st
from models import character_tokenizer, tiny_gpt2, tiny_llama, tiny_mixtral
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from balora_plugin.adapter.delta import stack_factors
from balora_plugin.adapter.start.pissa import pissa_factors
from balora_plugin.export import algebra, lora_file, reduced

pytestmark = pytest.mark.hosts

# --- the algebra, beside dense matrices


def random_factors(*stack, rank=5, rows=12, columns=9, dtype=torch.float64):
    a, b = torch.randn(*stack, rank, columns), torch.randn(*stack, rows, rank)
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("rank", [2, 5, 20])
def test_norms_distances_and_singular_values_are_the_dense_ones(stack, rank):
    a, b = random_factors(*stack, rank=rank)
    other_a, other_b = random_factors(*stack, rank=3)
    dense, other = 0.7 * b @ a, 1.3 * other_b @ other_a
    torch.testing.assert_close(algebra.update_norm(a, b, 0.7), dense.norm().item())
    torch.testing.assert_close(algebra.update_distance(a, b, 0.7, other_a, other_b, 1.3), (dense - other).norm().item())
    values = algebra.singular_values(a, b, 0.7)
    torch.testing.assert_close(values, torch.linalg.svdvals(dense)[..., : values.shape[-1]])


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("rank", [1, 3, 5, 8])
def test_truncation_is_the_best_update_of_its_rank(stack, rank):
    a, b = random_factors(*stack, rank=6)
    dense = 0.7 * b @ a
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    s[..., rank:] = 0
    new_a, new_b = algebra.truncate(a, b, rank, 0.7)
    assert new_a.shape == (*stack, rank, 9) and new_b.shape == (*stack, 12, rank)
    torch.testing.assert_close(new_b @ new_a, u @ (s[..., None] * vh))


def test_a_distance_far_below_float32_is_still_right():
    """In float32 the difference of two nearly equal updates would be rounding."""
    a, b = random_factors(dtype=torch.float32)
    moved = b + 1e-6 * torch.randn_like(b)
    dense = (moved.double() @ a.double() - b.double() @ a.double()).norm().item()
    assert abs(algebra.update_distance(a, moved, 1.0, a, b, 1.0) / dense - 1) < 1e-6


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=6), min_size=1, max_size=4),
    st.floats(1e-4, 0.99),
)
@settings(max_examples=60, deadline=None)
def test_the_smallest_rank_keeps_its_promise_and_the_next_smaller_does_not(values, allowed):
    spectra = [torch.tensor(sorted(v, reverse=True), dtype=torch.float64) for v in values]

    def error(rank):
        left = sum(float(s[rank:].square().sum()) for s in spectra)
        whole = sum(float(s.square().sum()) for s in spectra)
        return (left / whole) ** 0.5 if whole else 0.0

    rank = algebra.smallest_rank(spectra, allowed)
    assert rank >= 1
    assert error(rank) <= allowed * (1 + 1e-9)
    assert rank == 1 or error(rank - 1) > allowed * (1 - 1e-9)


@pytest.mark.parametrize("moved", [0.001, 0.01, 0.05])
def test_our_layout_survives_bfloat16_where_the_usual_one_does_not(moved):
    """The same update, both layouts cast to bfloat16: [A; A0], [B, -B0] subtracts large terms."""
    weight = torch.randn(256, 192) / 14
    a0, b0 = pissa_factors(weight, 16, 1.0, method="pissa_exact")
    d_a, d_b = (moved * x.norm() * torch.randn_like(x) / x.numel() ** 0.5 for x in (a0, b0))
    ours = stack_factors(d_a, d_b, a0, b0)
    naive = torch.cat([a0 + d_a, a0]), torch.cat([b0 + d_b, -b0], dim=1)
    exact = (b0 + d_b).double() @ (a0 + d_a).double() - b0.double() @ a0.double()

    def error(a, b):
        return ((b.bfloat16().double() @ a.bfloat16().double() - exact).norm() / exact.norm()).item()

    assert error(*ours) < 0.004
    assert error(*naive) > 0.7 * {0.001: 1.64, 0.01: 0.16, 0.05: 0.03}[moved]
    # and the measure that is printed is the dense one
    cast = algebra.update_distance(*(x.bfloat16() for x in naive), 1.0, *naive, 1.0) / algebra.update_norm(*naive)
    assert abs(cast / error(*naive) - 1) < 0.05


# --- the command


@pytest.fixture
def base(tmp_path):
    """A tiny base model with a tokenizer on disk."""
    path = tmp_path / "base"
    tiny_llama().save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


VARIANTS = {
    "plain": {},
    "alpha": {"lora_alpha": 6},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "rank_pattern": {"(q_proj|c_attn)": 2, "(layers|h).1.*(down_proj|c_proj)": 6},
        "alpha_pattern": {"(k_proj|c_fc)": 9},
    },
    "rslora_patterns": {"use_rslora": True, "rank_pattern": {"(q_proj|c_attn)": 3}, "alpha_pattern": {"k_proj": 9}},
    "modules_to_save": {"modules_to_save": ["norm", "ln_f"]},
    "beyond the matrix": {"r": 40, "lora_alpha": 20, "rank_pattern": {"(k_proj|c_attn)": 70}},
}
EXPERTS = {
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "target_modules": ["q_proj"],
    "rank_pattern": {"down_proj": 2, "q_proj": 6},
}
CASES = [(build, name) for build in (tiny_llama, tiny_gpt2) for name in VARIANTS]
MODELS = {**{f"{b.__name__}-{n}": (b, VARIANTS[n]) for b, n in CASES}, "experts": (tiny_mixtral, EXPERTS)}


WITH_EXPERTS = pytest.param("experts", marks=reads_experts)


@pytest.fixture(params=[WITH_EXPERTS if name == "experts" else name for name in MODELS])
def case(request, ids, tmp_path):
    """(builder of the base, directory of a trained adapter, its logits)."""
    build, changes = MODELS[request.param]
    return build, tmp_path / "adapter", trained(ba_lora(build(), **changes), ids, tmp_path / "adapter")


def test_a_portable_adapter_gives_the_trained_logits(case, ids, tmp_path, capsys):
    build, adapter, expected = case
    code, out, _ = run(capsys, "export", adapter, "--output", tmp_path / "out")
    assert code == 0
    assert error_in(out) < 1e-6
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    model = PeftModel.from_pretrained(build(), tmp_path / "out").eval()
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)


def test_servers_that_read_r_and_alpha_alone_compute_the_same(case, tmp_path, capsys):
    """No patterns, no rsLoRA: alpha / r of the config is every layer's scaling. (In the saved file it is not.)"""
    _, adapter, _ = case
    run(capsys, "export", adapter, "--output", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    reference = lora_file.read_adapter(str(adapter))
    for name, update in reference.updates.items():
        a, b = written[f"{name}.lora_A.weight"], written[f"{name}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == config["r"] * update.experts
        a, b = algebra.by_expert(a, b, update.experts)
        exact_a, exact_b = update.factors()
        torch.testing.assert_close(config["lora_alpha"] / config["r"] * b @ a, update.scaling * exact_b @ exact_a)


def test_nothing_to_change_means_nothing_changed(ids, tmp_path, capsys):
    trained(ba_lora(tiny_llama(), lora_alpha=6), ids, tmp_path / "adapter")
    _, out, _ = run(capsys, "export", tmp_path / "adapter", "--output", tmp_path / "out")
    assert error_in(out) == 0.0
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_cut_adapter_is_the_best_of_its_rank_and_says_what_it_loses(dtype, case, ids, tmp_path, capsys):
    build, adapter, _ = case
    arguments = ["export", adapter, "--output", tmp_path / "out", "--rank", 3]
    _, out, _ = run(capsys, *arguments, *(["--dtype", dtype] if dtype else []))
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert next(iter(written.values())).dtype == (torch.bfloat16 if dtype else torch.float32)
    lost = whole = best = 0.0
    for name, update in lora_file.read_adapter(str(adapter)).updates.items():
        a, b = update.factors()
        exact = update.scaling * b.double() @ a.double()
        a, b = (written[f"{name}.lora_{x}.weight"].double() for x in "AB")
        a, b = algebra.by_expert(a, b, update.experts)
        lost += float((b @ a - exact).square().sum())
        whole += float(exact.square().sum())
        best += float(torch.linalg.svdvals(exact)[..., 3:].square().sum())
    assert abs(error_in(out) / (lost / whole) ** 0.5 - 1) < 0.06  # two digits are printed
    assert lost <= best * (1.0001 if dtype is None else 1.01)
    model = PeftModel.from_pretrained(build(), tmp_path / "out").eval()
    assert torch.isfinite(logits(model, ids)).all()


def test_rank_auto_is_the_smallest_that_meets_the_error_cast_included(ids, tmp_path, capsys):
    trained(ba_lora(tiny_llama(), r=8), ids, tmp_path / "adapter")
    export_to = ["export", tmp_path / "adapter", "--output"]
    for number, (allowed, dtype) in enumerate([(0.3, "float32"), (0.02, "float32"), (0.02, "bfloat16")]):
        arguments = ["--dtype", dtype]
        target = tmp_path / f"auto-{number}"
        code, out, _ = run(capsys, *export_to, target, *arguments, "--rank", "auto", "--max-error", allowed)
        assert code == 0
        assert error_in(out) <= allowed
        rank = json.loads((target / "adapter_config.json").read_text())["r"]
        assert rank > 1
        _, out, _ = run(capsys, *export_to, tmp_path / "x", *arguments, "--rank", rank - 1, "--dry-run")
        assert error_in(out) > allowed * 0.95
    line = refused(capsys, *export_to, tmp_path / "no", "--dtype", "bfloat16", "--rank", "auto", "--max-error", 1e-3)
    assert "max_error=0.001" in line and "bfloat16" in line and "float32" in line


def test_rank_auto_counts_what_the_cast_loses():
    """Truncation alone would do with three directions, but not beside the rounding to bfloat16."""
    values = torch.tensor([1.0, 0.1, 0.02, 0.0025, 0.0002, 0.0001], dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64)).Q for _ in range(2))
    update = lora_file.Update(v.T.float(), (u * values).float(), 1.0)
    adapter = lora_file.Adapter("made up", LoraConfig(r=6, lora_alpha=6), {"layer": update})
    for dtype, rank in ((None, 3), (torch.bfloat16, 4)):
        cut = reduced.smallest(adapter, 0.0027, dtype)
        assert (cut.rank, reduced.errors(cut, adapter).total <= 0.0027) == (rank, True)


def test_a_plain_lora_is_read_too(ids, tmp_path, capsys):
    changes = {"use_rslora": True, "alpha_pattern": {"k_proj": 9}, "init_lora_weights": False}
    expected = trained(stock(tiny_llama(), **changes), ids, tmp_path / "adapter")
    code, out, _ = run(capsys, "export", tmp_path / "adapter", "--output", tmp_path / "out")
    assert code == 0 and "plain LoRA" in out
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)


# --- merging


@pytest.mark.parametrize(
    "name", ["tiny_llama-rslora_patterns", "tiny_llama-modules_to_save", "tiny_gpt2-plain", WITH_EXPERTS]
)
def test_a_merged_model_gives_the_trained_logits(name, ids, tmp_path, capsys):
    build, changes = MODELS[name]
    build().save_pretrained(tmp_path / "base")
    expected = trained(ba_lora(loaded(tmp_path / "base"), **changes), ids, tmp_path / "adapter")
    arguments = ["export", tmp_path / "adapter", "--merge", "--base", tmp_path / "base", "--output"]
    code, out, err = run(capsys, *arguments, tmp_path / "out")
    assert code == 0, err
    assert "the one it was trained on" in out
    assert error_in(out) < 1e-5
    torch.testing.assert_close(logits(loaded(tmp_path / "out"), ids), expected, rtol=0, atol=1e-5)
    _, out, _ = run(capsys, *arguments, tmp_path / "bf16", "--dtype", "bfloat16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto").eval()
    assert half.dtype == torch.bfloat16
    # the printed error, measured on the files
    before = loaded(tmp_path / "base").state_dict()
    exact = loaded(tmp_path / "out").state_dict()
    adapted = [
        key for key in before if not torch.equal(before[key], exact[key]) and "norm" not in key and "ln_f" not in key
    ]
    lost = whole = 0.0
    for key in adapted:
        update = exact[key].double() - before[key].double()
        held = half.state_dict()[key].double() - before[key].bfloat16().double()
        lost, whole = lost + float((held - update).square().sum()), whole + float(update.square().sum())
    assert abs(error_in(out) / (lost / whole) ** 0.5 - 1) < 0.06


def test_a_merged_model_carries_a_tokenizer_and_the_bases_dtype(ids, tmp_path, capsys):
    tiny_llama().bfloat16().save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    trained(ba_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), ids, tmp_path / "adapter")
    code, out, _ = run(
        capsys, "export", tmp_path / "adapter", "--merge", "--base", tmp_path / "base", "--output", tmp_path / "out"
    )
    assert code == 0 and "bfloat16" in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert "ba-lora" in (tmp_path / "out" / "README.md").read_text()


def test_merging_into_a_quantised_base_is_refused(base, ids, tmp_path, capsys):
    trained(ba_lora(tiny_llama()), ids, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    line = refused(capsys, "export", tmp_path / "adapter", "--merge", "--base", base, "--output", tmp_path / "out")
    assert f"--base {base}" in line and "swallow" in line and "full-precision" in line


def test_merging_into_another_base_is_refused(base, ids, tmp_path, capsys):
    trained(ba_lora(tiny_llama()), ids, tmp_path / "adapter")
    changed = tiny_llama()
    changed.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    changed.save_pretrained(tmp_path / "changed")
    for extra in (["--merge"], []):
        arguments = [
            "export",
            tmp_path / "adapter",
            *extra,
            "--base",
            tmp_path / "changed",
            "--output",
            tmp_path / "out",
        ]
        assert "is not the base" in refused(capsys, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_merge_and_unload_over_a_quantised_base_is_what_stock_peft_does(bits, ids, tmp_path):
    """The delta form merges there too, with stock's rounding: which swallows most of a small update."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    chosen = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}

    def build():
        values = {"quantization_config": BitsAndBytesConfig(**chosen), "device_map": {"": "cpu"}}
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **values).train()

    model = ba_lora(build()).train()
    train(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model.train(), ids)
    theirs = PeftModel.from_pretrained(build(), tmp_path / "adapter").merge_and_unload().train()
    ours = model.merge_and_unload().train()
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=0, atol=1e-4)
    spread = (expected - expected.mean()).norm()
    assert (logits(ours, ids) - expected).norm() / spread < 0.5


# --- raw PiSSA


def raw_pissa(build, ids, directory, steps=5, **changes):
    """What PEFT alone writes: the adapter before and after training; returns it, and the residual model's logits."""
    model = stock(build(), **{"init_lora_weights": "pissa", **changes})
    config = model.peft_config["default"]
    start, config.init_lora_weights = config.init_lora_weights, True  # as PEFT's documentation saves it
    model.save_pretrained(directory / "initial")
    config.init_lora_weights = start
    train(model, ids, steps=steps)
    model.eval()
    model.save_pretrained(directory / "raw")
    return model, logits(model, ids)


RAW = {
    "pissa": {},
    "alpha": {"lora_alpha": 9},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "c_attn": 2}, "alpha_pattern": {"k_proj": 9, "c_fc": 9}},
    "niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
}


# PEFT's OLoRA cannot run on Conv1D
@pytest.mark.parametrize(
    ("name", "build"), [(n, b) for n in RAW for b in (tiny_llama, tiny_gpt2) if (n, b) != ("olora", tiny_gpt2)]
)
def test_a_raw_pissa_adapter_becomes_one_for_the_original_base(name, build, ids, tmp_path, capsys):
    build().save_pretrained(tmp_path / "base")
    _, expected = raw_pissa(build, ids, tmp_path, **RAW[name])
    arguments = ["export", tmp_path / "raw", "--output"]
    line = refused(capsys, *arguments, tmp_path / "out")
    assert "residual base" in line and "--initial DIR" in line
    code, _, err = run(
        capsys, *arguments, tmp_path / "out", "--initial", tmp_path / "initial", "--base", tmp_path / "base"
    )
    assert code == 0, err
    model = PeftModel.from_pretrained(build(), tmp_path / "out").eval()
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["base_model_name_or_path"]) == (True, str(tmp_path / "base"))


def test_a_raw_pissa_adapter_merges_into_the_original_base(base, ids, tmp_path, capsys):
    _, expected = raw_pissa(lambda: loaded(base), ids, tmp_path)
    arguments = ["--initial", tmp_path / "initial", "--merge", "--base", base, "--output", tmp_path / "out"]
    assert run(capsys, "export", tmp_path / "raw", *arguments)[0] == 0
    torch.testing.assert_close(logits(loaded(tmp_path / "out"), ids), expected, rtol=0, atol=1e-5)


def test_the_converted_adapter_survives_bfloat16_better_than_pefts_own(ids, tmp_path, capsys):
    model, _ = raw_pissa(tiny_llama, ids, tmp_path, steps=1)
    model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    run(capsys, "export", tmp_path / "raw", "--initial", tmp_path / "initial", "--output", tmp_path / "ours")
    errors = {}
    for name in ("ours", "theirs"):
        adapter = lora_file.read_adapter(str(tmp_path / name))
        errors[name] = reduced.errors(reduced.one_rank(adapter, dtype=torch.bfloat16), adapter).total
    ours, theirs = (lora_file.read_adapter(str(tmp_path / name)) for name in ("ours", "theirs"))
    assert reduced.errors(ours, theirs).total < 1e-4  # the same update
    assert errors["ours"] < 0.004
    assert errors["theirs"] > 3 * errors["ours"]


def test_an_initial_adapter_that_is_not_its_own_is_refused(ids, tmp_path, capsys):
    raw_pissa(tiny_llama, ids, tmp_path)
    tiny_llama().save_pretrained(tmp_path / "base")
    cases = {
        "rank": stock(tiny_llama(), r=2, lora_alpha=2),
        "scaling": stock(tiny_llama(), lora_alpha=9),
        "shape": stock(tiny_llama(intermediate_size=40)),
        "adapts other layers": stock(tiny_llama(), targets=["q_proj", "k_proj"]),
    }
    for word, model in cases.items():
        model.save_pretrained(tmp_path / word)
        arguments = ["export", tmp_path / "raw", "--output", tmp_path / "out", "--initial", tmp_path / word]
        line = refused(capsys, *arguments)
        assert word in line and str(tmp_path / word) in line
    # the right shapes of another base: seen when the base is given
    other = tiny_llama()
    for p in other.parameters():
        p.data = torch.randn_like(p) * 0.1
    raw_pissa(lambda: other, ids, tmp_path / "elsewhere")
    initial = tmp_path / "elsewhere" / "initial"
    arguments = ["export", tmp_path / "raw", "--output", tmp_path / "out", "--initial", initial]
    assert "no singular directions of this base" in refused(capsys, *arguments, "--base", tmp_path / "base")
    _, out, _ = run(capsys, *arguments, "--dry-run")
    assert "warning: that is far" in out


# --- what is refused, and where it writes


def files_below(path):
    return {str(p.relative_to(path)): (p.read_bytes() if p.is_file() else None) for p in path.rglob("*")}


def test_a_dry_run_writes_nothing_and_says_the_same(base, ids, tmp_path, capsys):
    trained(ba_lora(loaded(base)), ids, tmp_path / "adapter")
    for extra in (["--rank", 2], ["--dtype", "bfloat16"], ["--merge", "--base", base]):
        before = files_below(tmp_path)
        target = tmp_path / f"out{extra[0]}"
        code, dry, _ = run(capsys, "export", tmp_path / "adapter", "--output", target, *extra, "--dry-run")
        assert code == 0 and "nothing was written" in dry
        assert files_below(tmp_path) == before
        _, wet, _ = run(capsys, "export", tmp_path / "adapter", "--output", target, *extra)
        assert wet.splitlines() == dry.splitlines()[:-1]
        after = files_below(tmp_path)
        assert {name for name in after if name not in before and not name.startswith(target.name)} == set()


def test_an_existing_output_is_replaced_whole_or_kept(ids, tmp_path, capsys, monkeypatch):
    trained(ba_lora(tiny_llama()), ids, tmp_path / "adapter")
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("mine")
    arguments = ["export", tmp_path / "adapter", "--output", target]
    line = refused(capsys, *arguments)
    assert f"--output {target} is not empty" in line and "--overwrite" in line

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("balora_plugin.export.card.exported", fail)
        assert "disk full" in refused(capsys, *arguments, "--overwrite")
    assert (target / "precious").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert not (target / "precious").exists() and (target / "adapter_config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}


@pytest.fixture
def adapters(ids, tmp_path):
    """Directories that are no adapter to export, by what is wrong with them."""
    good = tmp_path / "good"
    trained(ba_lora(tiny_llama()), ids, good)
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-3" / "adapter_config.json").write_text("{}")
    plain = stock(tiny_llama())
    plain.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
    for name in ("nan", "short", "shape", "dora", "loftq"):
        plain.save_pretrained(tmp_path / name)
    weights = load_file(tmp_path / "nan" / "adapter_model.safetensors")
    key = next(iter(weights))
    save_file({**weights, key: weights[key] * float("nan")}, tmp_path / "nan" / "adapter_model.safetensors")
    data = (tmp_path / "short" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "short" / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    for name, change in (("shape", {"r": 3}), ("dora", {"use_dora": True}), ("loftq", loftq)):
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    shutil.copytree(good, tmp_path / "lost")
    (tmp_path / "lost" / "ba_lora.json").unlink()
    values = {"target_modules": ["k_proj"], "feedforward_modules": [], "task_type": "CAUSAL_LM"}
    get_peft_model(tiny_llama(), IA3Config(**values)).save_pretrained(tmp_path / "ia3")
    ba_lora(tiny_llama()).save_pretrained(tmp_path / "mixed")
    (tmp_path / "mixed" / "adapter_model.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes())
    return tmp_path


REFUSED = {
    "no adapter": (["run"], ["adapter_config.json", "checkpoint-3"]),
    "not there": (["nowhere"], ["nowhere"]),
    "pickle": (["pickled"], ["adapter_model.bin", "safetensors"]),
    "nan": (["nan"], ["NaN or inf", "lora_"]),
    "cut short": (["short"], ["not a whole safetensors file"]),
    "config of another": (["shape"], ["r=3", "do not belong together"]),
    "dora": (["dora"], ["use_dora=True"]),
    "ia3": (["ia3"], ["peft_type='IA3'"]),
    "loftq": (["loftq"], ["loftq", "quantised"]),
    "settings lost": (["lost"], ["ba_lora_init.safetensors", "no ba_lora.json", "without all its files"]),
    "files of two saves": (["mixed"], ["is not the file"]),
    "rank too large": (["good", "--rank", "9"], ["--rank 9", "8"]),
    "rank no number": (["good", "--rank", "1.5"], ["--rank", "'1.5'", "auto"]),
    "auto without error": (["good", "--rank", "auto"], ["--rank auto", "--max-error"]),
    "error without auto": (["good", "--max-error", "0.1"], ["--max-error 0.1", "--rank auto"]),
    "error out of range": (["good", "--rank", "auto", "--max-error", "2"], ["--max-error", "'2'", "between 0 and 1"]),
    "dtype": (["good", "--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
    "merge without base": (["good", "--merge"], ["--merge", "--base"]),
    "merge with rank": (["good", "--merge", "--base", "x", "--rank", "2"], ["--rank 2", "--merge"]),
    "base is an adapter": (["good", "--base", "good"], ["--base", "is an adapter"]),
    "base is nothing": (["good", "--merge", "--base", "./nothing"], ["--base ./nothing"]),
    "initial for ours": (["good", "--initial", "nan"], ["--initial", "BA-LoRA adapter"]),
    "unknown option": (["good", "--ranks", "2"], ["--ranks", "--help"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_one_line(name, adapters, capsys, monkeypatch):
    monkeypatch.chdir(adapters)
    arguments, words = REFUSED[name]
    line = refused(capsys, "export", *arguments, "--output", "out")
    assert all(word in line for word in words), line
    assert not os.path.exists("out")


@pytest.mark.parametrize("output", ["good", ".", "good/adapter_config.json"])
def test_an_output_that_would_destroy_something_is_refused(output, adapters, capsys, monkeypatch):
    monkeypatch.chdir(adapters)
    before = files_below(adapters)
    assert "--output" in refused(capsys, "export", "good", "--output", output, "--overwrite")
    assert files_below(adapters) == before


def test_float16_that_overflows_is_refused(ids, tmp_path, capsys):
    model = stock(tiny_llama(), init_lora_weights=False)
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight.data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "adapter")
    arguments = ["export", tmp_path / "adapter", "--output", tmp_path / "out", "--dtype", "float16"]
    line = refused(capsys, *arguments)
    assert "overflows in float16" in line and "q_proj" in line


def test_the_module_runs_as_a_command(tmp_path):
    def call(*arguments):
        command = [sys.executable, "-m", "balora_plugin.commands", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )

    done = call("--help")
    assert done.returncode == 0 and "export" in done.stdout and "verify" in done.stdout
    done = call("export", str(tmp_path), "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("Error: ") and "Traceback" not in done.stderr


def test_configs_that_only_say_how_a_start_was_found_are_read(ids, tmp_path):
    """An EVA start leaves the base alone: its file is a plain LoRA's."""
    model = stock(tiny_llama())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "init_lora_weights": "eva", "eva_config": {"rho": 2.0}})
    )
    assert lora_file.read_adapter(str(tmp_path)).rank == 4
    assert isinstance(lora_file.read_adapter(str(tmp_path)).config, LoraConfig)


def test_a_fresh_copy_of_the_model_is_not_needed(ids, tmp_path, capsys):
    """The error is that of the factors: the same whether or not the base is there."""
    model = ba_lora(fresh(tiny_llama()))
    trained(model, ids, tmp_path / "adapter")
    adapter = lora_file.read_adapter(str(tmp_path / "adapter"))
    cut = reduced.one_rank(adapter, 2)
    by_layer = reduced.errors(cut, adapter).by_layer
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    from balora_plugin.adapter.delta import delta_weight

    exact = delta_weight(layer, "default").detach().double()
    name = "model.layers.0.self_attn.q_proj"
    held = cut.updates[f"base_model.model.{name}"]
    error = (held.scaling * held.b.double() @ held.a.double() - exact).norm() / exact.norm()
    assert abs(by_layer[name] / error.item() - 1) < 1e-4
