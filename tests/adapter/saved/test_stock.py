"""Format version 1: stock LoRA of rank 2r for the original base, read back exactly by us."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import ba_lora, fresh, logits, stock, train
from models import tiny_gpt2, tiny_llama
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from balora_plugin import BaLoraConfig, BaLoraModel, RegularizerConfig, get_ba_lora_model
from balora_plugin.checkpoint.settings import write_settings

pytestmark = pytest.mark.hosts

VARIANTS = {
    "plain": {},
    "alpha": {"lora_alpha": 6},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "rank_pattern": {"(q_proj|c_attn)": 2, "(layers|h).1.*(down_proj|c_proj)": 6},
        "alpha_pattern": {"(k_proj|c_fc)": 9},
    },
    "rslora_patterns": {
        "use_rslora": True,
        "rank_pattern": {"(q_proj|c_attn)": 3},
        "alpha_pattern": {"(k_proj|c_fc)": 9},
    },
    "dropout": {"lora_dropout": 0.2},
    "modules_to_save": {"modules_to_save": ["norm", "ln_f"]},
    "fast": {"init_lora_weights": "pissa_fast"},
    "plain_lora_start": {"init_lora_weights": True},
    "iclr": {"regularizers": RegularizerConfig(preset="iclr2026", lambda_svd=0.5)},
}


def saved(model, ids, directory):
    """Trains, saves, returns the trained model's logits in eval mode."""
    train(model, ids)
    model.eval()
    model.save_pretrained(directory)
    return logits(model, ids)


def load_listening(base, directory):
    """Stock PEFT's model in eval mode, and the warnings it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(base, directory).eval()
    return loaded, {str(warning.message) for warning in caught}


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_peft_gives_the_trained_models_logits(build, variant, ids, tmp_path):
    expected = saved(ba_lora(build(), **VARIANTS[variant]), ids, tmp_path)
    base = build().eval()
    assert (logits(base, ids) - expected).abs().max() > 0.01
    stock(build(), targets=["q_proj", "c_attn"]).save_pretrained(tmp_path / "plain")
    loaded, heard = load_listening(base, tmp_path)
    assert heard <= load_listening(build(), tmp_path / "plain")[1]  # no warning that a plain LoRA does not give
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=0, atol=1e-5)
    assert type(loaded.peft_config["default"]) is LoraConfig
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_own_class_continues_exactly(variant, ids, tmp_path):
    model = ba_lora(tiny_llama(), **VARIANTS[variant])
    expected = saved(model, ids, tmp_path)
    again = BaLoraModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(again, ids), expected)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    ours, theirs = model.peft_config["default"], again.peft_config["default"]
    assert (ours.r, ours.lora_alpha, ours.regularizers) == (theirs.r, theirs.lora_alpha, theirs.regularizers)
    assert str(ours.init_lora_weights) == str(theirs.init_lora_weights)
    if "lora_dropout" not in VARIANTS[variant]:
        torch.manual_seed(5)
        first = train(model.train(), ids, steps=3)
        torch.manual_seed(5)
        assert train(again.train(), ids, steps=3) == first


def test_what_stands_in_the_directory(llama, ids, tmp_path):
    model = ba_lora(llama, r=4)
    saved(model, ids, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    side = {"ba_lora.json", "ba_lora_init.safetensors", "ba_lora_probe.safetensors"}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"} | side
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"], config["peft_type"]) == (8, 8, True, "LORA")
    assert "regularizers" not in config
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in weights)
    assert len(weights) == 2 * 14
    settings = json.loads((tmp_path / "ba_lora.json").read_text())
    assert (settings["format_version"], settings["start"], settings["delta_form"]) == (1, "pissa", True)
    assert settings["sha256"].keys() == files - {"ba_lora.json", "README.md"}
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    d_a, d_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a0, b0 = layer.frozen_A["default"].weight, layer.frozen_B["default"].weight
    assert torch.equal(weights[f"{name}.lora_A.weight"], torch.cat([d_a, a0 + d_a]))
    assert torch.equal(weights[f"{name}.lora_B.weight"], torch.cat([b0, d_b], dim=1))
    assert torch.equal(load_file(tmp_path / "ba_lora_init.safetensors")[f"{name}.lora_A0.weight"], a0)


_WITHOUT_US = """
import sys, warnings
sys.modules["balora_plugin"] = None  # importing it is an ImportError
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
heard = []
for adapter in (sys.argv[4], sys.argv[2]):  # a plain LoRA, ours
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, adapter).eval()
    heard.append({str(warning.message) for warning in caught})
assert heard[1] <= heard[0], heard[1] - heard[0]
data = torch.load(sys.argv[3], weights_only=True)
with torch.no_grad():
    error = (model(input_ids=data["ids"]).logits - data["expected"]).abs().max().item()
assert "balora_plugin" not in [name for name, module in sys.modules.items() if module is not None]
print("error", error)
"""


def test_loads_in_a_process_that_has_never_heard_of_us(llama, ids, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = ba_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    expected = saved(model, ids, tmp_path / "adapter")
    torch.save({"ids": ids, "expected": expected}, tmp_path / "data.pt")
    stock(llama).save_pretrained(tmp_path / "plain")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "data.pt", "plain")]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_US, *paths],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 1e-5


def test_bf16_adapters_save_and_reload_exactly(ids, tmp_path):
    config = BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_ba_lora_model(tiny_llama().bfloat16(), config, autocast_adapter_dtype=False)
    expected = saved(model, ids, tmp_path)
    again = BaLoraModel.from_pretrained(tiny_llama().bfloat16(), tmp_path, autocast_adapter_dtype=False).eval()
    assert torch.equal(logits(again, ids), expected)
    assert load_file(tmp_path / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16


def test_several_adapters_save_into_their_own_directories(llama, ids, tmp_path):
    model = ba_lora(llama)
    model.add_adapter("second", BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    expected = {}
    for name in ("default", "second", "plain"):
        model.set_adapter(name)
        train(model, ids)
        expected[name] = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    ours = BaLoraModel.from_pretrained(tiny_llama(), tmp_path)
    for name in ("second", "plain"):
        loaded.load_adapter(tmp_path / name, name)
        ours.load_adapter(str(tmp_path / name), name)
    for name, value in expected.items():
        for reloaded in (loaded, ours):
            reloaded.set_adapter(name)
            torch.testing.assert_close(logits(reloaded, ids), value, rtol=0, atol=1e-5)
    assert not (tmp_path / "plain" / "ba_lora.json").exists()


def test_resuming_onto_another_start_is_restored_from_the_file(llama, ids, tmp_path):
    """A0, B0 come from the checkpoint: a model built with other factors takes them over bit for bit."""
    model = ba_lora(fresh(llama))
    expected = saved(model, ids, tmp_path)
    other = ba_lora(fresh(llama))
    for name, p in other.named_parameters():
        if "frozen_" in name:
            p.data.neg_()  # another SVD: signs are free
    other.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(logits(other.eval(), ids), expected)
    assert all(torch.equal(p, other.state_dict()[n]) for n, p in model.named_parameters())
    assert [n for n, p in other.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def test_config_round_trip_and_no_silent_fallback(llama, tmp_path):
    config = BaLoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], regularizers={"preset": "iclr2026"})
    config.save_pretrained(tmp_path / "ours")
    assert BaLoraConfig.from_pretrained(tmp_path / "ours") == config
    assert LoraConfig.from_pretrained(tmp_path / "ours").r == 8
    stock(llama).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"ba_lora\.json"):
        BaLoraConfig.from_pretrained(tmp_path / "plain")


def test_processes_may_write_the_config_of_one_run_at_once(tmp_path):
    """Axolotl does, on every rank: through one temporary file of both, one would rename it away from the other."""
    child = os.fork()
    code = 1
    try:
        for _ in range(300):
            BaLoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
        code = 0
    finally:
        if not child:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert BaLoraConfig.from_pretrained(tmp_path).r == 4
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "ba_lora.json"}


def test_wrong_files_are_refused(llama, ids, tmp_path):
    model = ba_lora(fresh(llama))
    saved(model, ids, tmp_path / "a")
    with pytest.raises(ValueError, match="r=2 here"):
        ba_lora(fresh(llama), r=2).load_adapter(str(tmp_path / "a"), "default")
    with pytest.raises(ValueError, match="does not target"):
        ba_lora(fresh(llama), targets=["q_proj"]).load_adapter(str(tmp_path / "a"), "default")
    saved(ba_lora(fresh(llama), targets=["q_proj"]), ids, tmp_path / "q")
    with pytest.raises(ValueError, match="other target modules"):
        ba_lora(fresh(llama)).load_adapter(str(tmp_path / "q"), "default")
    stock(fresh(llama)).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="not a BA-LoRA adapter in delta form"):
        ba_lora(fresh(llama)).load_adapter(str(tmp_path / "plain"), "default")
    (tmp_path / "a" / "ba_lora_init.safetensors").unlink()
    with pytest.raises(ValueError, match=r"ba_lora_init\.safetensors"):
        ba_lora(fresh(llama)).load_adapter(str(tmp_path / "a"), "default")
    settings = json.loads((tmp_path / "a" / "ba_lora.json").read_text())
    (tmp_path / "a" / "ba_lora.json").write_text(json.dumps({**settings, "format_version": 99}))
    with pytest.raises(ValueError, match="format_version=99"):
        BaLoraModel.from_pretrained(fresh(llama), tmp_path / "a")


def test_an_incomplete_state_dict_is_completed_or_refused_never_half_written(llama, ids, tmp_path):
    model = ba_lora(llama)
    expected = saved(model, ids, tmp_path / "whole")
    without_frozen = {k: v for k, v in model.state_dict().items() if "frozen_" not in k and "base_layer" not in k}
    model.save_pretrained(tmp_path / "completed", state_dict=without_frozen)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "completed").eval()
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=0, atol=1e-5)
    key = next(k for k in without_frozen if "lora_A" in k)
    for broken in (
        {k: v for k, v in without_frozen.items() if k != key},
        {**without_frozen, key: torch.empty(0)},  # what ZeRO-3 leaves of a partitioned parameter
    ):
        with pytest.raises(ValueError, match="state dict"):
            model.save_pretrained(tmp_path / "refused", state_dict=broken)
    assert not (tmp_path / "refused" / "adapter_model.safetensors").exists()


def test_unsupported_ways_to_save_are_refused(llama, tmp_path):
    model = ba_lora(llama)
    with pytest.raises(ValueError, match="safe_serialization"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path))


def test_files_of_two_runs_are_not_mixed(llama, ids, tmp_path):
    for name, steps in (("a", 2), ("b", 4)):
        model = ba_lora(fresh(llama))
        if name == "b":
            for key, p in model.named_parameters():
                if "frozen_" in key:
                    p.data.neg_()
        train(model, ids, steps=steps)
        model.save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / "b" / "ba_lora_init.safetensors", tmp_path / "a")
    with pytest.raises(ValueError, match=r"ba_lora_init\.safetensors is not the file"):
        BaLoraModel.from_pretrained(fresh(llama), tmp_path / "a")
    stock(fresh(llama), r=8).save_pretrained(tmp_path / "b")  # a baseline into a used directory
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not the file"):
        BaLoraModel.from_pretrained(fresh(llama), tmp_path / "b")


@pytest.mark.parametrize(("key", "value"), [("lora_alpha", 16), ("use_rslora", True), ("r", 2)])
def test_loading_into_another_scaling_is_refused_by_key(key, value, llama, ids, tmp_path):
    saved(ba_lora(fresh(llama)), ids, tmp_path)
    with pytest.raises(ValueError, match=f"{key}={value!r} here"):
        ba_lora(fresh(llama), **{key: value}).load_adapter(str(tmp_path), "default")


def test_settings_of_a_newer_peft_are_named(llama, ids, tmp_path):
    saved(ba_lora(llama), ids, tmp_path)
    path = tmp_path / "ba_lora.json"
    settings = json.loads(path.read_text())
    assert settings["config"].keys() <= {"r", "lora_alpha", "target_modules", "task_type", "base_model_name_or_path"}
    settings["config"]["use_something_new"] = True
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="use_something_new=True"):
        BaLoraConfig.from_pretrained(tmp_path)


def test_ranks_that_write_nothing_may_pass_an_empty_state_dict(llama, tmp_path):
    ba_lora(llama).save_pretrained(tmp_path / "nothing", is_main_process=False, state_dict={})
    assert not list((tmp_path / "nothing").glob("*.safetensors"))


def test_overlapping_patterns_survive_the_files_sorting(llama, ids, tmp_path):
    patterns = {"q_proj": 2, "layers.0.self_attn.q_proj": 6}
    model = ba_lora(fresh(llama), rank_pattern=patterns, use_rslora=True)
    expected = saved(model, ids, tmp_path)
    loaded = PeftModel.from_pretrained(fresh(llama), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=0, atol=1e-5)
    again = BaLoraModel.from_pretrained(fresh(llama), tmp_path).eval()
    assert torch.equal(logits(again, ids), expected)


def test_an_unreachable_hub_is_not_a_missing_file(monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fail(error):
        def download(*args, **kwargs):
            raise error("no")

        monkeypatch.setattr("balora_plugin.checkpoint.location.hf_hub_download", download)

    fail(LocalEntryNotFoundError)
    with pytest.raises(ValueError, match="could not be reached"):
        BaLoraModel.from_pretrained(tiny_llama(), "somebody/adapter")
    fail(EntryNotFoundError)
    with pytest.raises(ValueError, match="not a BA-LoRA adapter"):
        BaLoraModel.from_pretrained(tiny_llama(), "somebody/adapter")


def test_a_leaked_frozen_factor_is_noticed(llama, ids, tmp_path):
    from balora_plugin.adapter.saved.stock import check_stock_file

    model = ba_lora(llama)
    saved(model, ids, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.frozen_A.weight"
    save_file({**load_file(path), name: torch.zeros(1)}, path)
    with pytest.raises(RuntimeError, match="frozen_A"):
        check_stock_file(str(tmp_path), model, "default")


def test_a_config_saved_before_training_leaves_a_finished_adapter_as_it_is(llama, ids, tmp_path):
    """Axolotl does so; the run may fail before it has an adapter of its own."""
    expected = saved(ba_lora(llama), ids, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    config = BaLoraConfig(r=2, lora_alpha=16, target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.equal(logits(BaLoraModel.from_pretrained(tiny_llama(), tmp_path).eval(), ids), expected)
    (tmp_path / "adapter_model.safetensors").unlink()  # nothing left to keep
    config.save_pretrained(tmp_path)
    assert BaLoraConfig.from_pretrained(tmp_path).r == 2


def test_an_adapter_does_not_choose_where_a_teacher_cache_is_written(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    terms = RegularizerConfig(teacher_cache=str(place))
    BaLoraConfig(target_modules=["q_proj"], regularizers=terms).save_pretrained(tmp_path / "a")
    assert BaLoraConfig.from_pretrained(tmp_path / "a").regularizers.teacher_cache is None
    (place / "cache.json").write_text("{}")  # one that is there
    assert BaLoraConfig.from_pretrained(tmp_path / "a").regularizers.teacher_cache == str(place)


def test_two_nodes_with_equal_process_numbers_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    names = []
    original = Path.write_text
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(
        Path, "write_text", lambda path, *args, **kw: names.append(path.name) or original(path, *args, **kw)
    )
    for _ in range(2):
        write_settings(str(tmp_path), BaLoraConfig(target_modules=["q_proj"]).to_settings())
    assert len(set(names)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["ba_lora.json"]
