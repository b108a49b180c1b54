"""`load_in_4bit` and `load_in_8bit` with `adapter: ba_lora`: quantised, trained, resumed and merged by Axolotl."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch

pytest.importorskip("axolotl")
pytest.importorskip("bitsandbytes")

import axolotl.loaders.model
from axolotl.cli.config import load_cfg
from axolotl.cli.main import cli
from axolotl.cli.merge_lora import do_cli as merge_lora
from axolotl.cli.utils import load_model_and_tokenizer
from axolotl.integrations.base import BasePlugin
from click.testing import CliRunner
from helpers import assert_stored_weights, logits, quantised_layers, stored_weights
from models import character_tokenizer, tiny_llama
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from balora_plugin.adapter.delta import delta_layers_of
from balora_plugin.hosts.axolotl import kbit, plugin
from balora_plugin.pretrained.switch import TeacherSwitch

from .axolotl_run import history, run

FOUR, EIGHT = {"load_in_4bit": True}, {"load_in_8bit": True}
KINDS = {"4bit": FOUR, "8bit": EIGHT}
# Axolotl turns its CUDA kernels on for its own adapters by itself
OWN = {"ba_lora": None, "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Sizes that are multiples of 64: for others bitsandbytes' CPU kernels take wrong scales."""
    path = tmp_path_factory.mktemp("quantisable")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def written(written, base):
    return partial(written, base_model=str(base))


def loaded(path):
    """The model as Axolotl loads it for a YAML, and the config it was loaded with."""
    cfg = load_cfg(str(path))
    return load_model_and_tokenizer(cfg=cfg)[0].train(), cfg


@pytest.mark.parametrize("kind", KINDS)
def test_trains_evaluates_and_saves_over_a_quantised_base(kind, written, ids):
    trainer = run(written(**KINDS[kind], val_set_size=0.25, eval_steps=1, eval_strategy="steps", max_steps=4))
    name = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[kind]
    layers = quantised_layers(trainer.model)
    assert {type(layer).__name__ for layer in layers.values()} == {name}
    assert {name for name, _ in delta_layers_of(trainer.model)} == layers.keys()
    assert len(layers) == 14
    assert history(trainer, "balora/consistency")[0] == 0
    assert history(trainer, "balora/consistency")[-1] > 1e-6
    assert history(trainer, "eval_loss")[-1] < history(trainer, "eval_loss")[0]
    fresh, _ = loaded(written(**KINDS[kind]))
    assert_stored_weights(trainer.model, stored_weights(fresh))
    model = trainer.model.train()
    with TeacherSwitch(fresh).off():
        base = logits(fresh, ids)
    with TeacherSwitch(model).off():
        assert torch.equal(logits(model, ids), base)
    assert torch.equal(logits(fresh, ids), base)  # step 0
    expected = logits(model, ids)
    assert (expected - base).abs().max() > 0.05
    output = Path(trainer.args.output_dir)
    assert json.loads((output / "ba_lora.json").read_text())["config"]["r"] == 4
    stock = PeftModel.from_pretrained(fresh.unload(), output).train()
    tolerance = 1e-5 if kind == "4bit" else 5e-3  # 8-bit on a CPU: float16 outside the adapters
    torch.testing.assert_close(logits(stock, ids), expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="session")
def biased(tmp_path_factory):
    """A base in bfloat16 whose projections have biases, which k-bit preparation raises to float32."""
    path = tmp_path_factory.mktemp("biased")
    values = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    config = Qwen2Config(vocab_size=96, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **values)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


def description(model):
    """What preparation decides: types, dtypes, what trains, hooks; by the base model's own names."""
    base = model.get_base_model()
    parameters = {
        name.replace(".base_layer", ""): (p.dtype, p.requires_grad, type(p).__name__)
        for name, p in base.named_parameters()
        if "lora_" not in name and "frozen_" not in name
    }
    settings = base.config.quantization_config.to_dict()
    hooks = len(base.get_input_embeddings()._forward_hooks)
    kinds = {name: type(m.get_base_layer()) for name, m in base.named_modules() if isinstance(m, LoraLayer)}
    return parameters, settings, kinds, base.config.dtype, hooks


PREPARED = {
    "4bit": FOUR,
    "8bit": EIGHT,
    "checkpointing": {**FOUR, "gradient_checkpointing": True},
    "half": {**FOUR, "bfloat16": True},
    "half_8bit": {**EIGHT, "bfloat16": True},
    "skip_upcast": {**FOUR, "bfloat16": True, "embeddings_skip_upcast": True},
    "options": {
        **FOUR,
        "bnb_config_kwargs": {
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_has_fp16_weight": False,
        },
    },
}


@pytest.mark.parametrize("case", PREPARED)
def test_the_base_is_prepared_as_for_axolotls_own_adapter(case, written, biased, monkeypatch):
    """Quantisation settings, dtypes and hooks: all that qlora (4-bit) and lora (8-bit) get, and once."""
    changes = {"base_model": str(biased), **PREPARED[case]}
    calls = []
    prepare = axolotl.loaders.model.prepare_model_for_kbit_training

    def counted(*args, **kwargs):
        calls.append(args)
        return prepare(*args, **kwargs)

    monkeypatch.setattr(axolotl.loaders.model, "prepare_model_for_kbit_training", counted)
    monkeypatch.setattr(plugin, "check_head", lambda model: None)  # at a forward bitsandbytes casts biases in place
    ours, cfg = loaded(written(**changes))
    assert len(calls) == 1 or case == "skip_upcast"  # there Axolotl puts a preparation of its own in the place
    assert cfg.adapter == "ba_lora"
    own = "qlora" if changes.get("load_in_4bit") else "lora"
    theirs, _ = loaded(written(**changes, **OWN, adapter=own, lora_target_linear=True))
    (*got, hooks), (*expected, _) = description(ours), description(theirs)
    assert got == expected
    assert hooks == 1  # of Axolotl's own there are three with checkpointing
    q_proj = quantised_layers(ours)["model.layers.0.self_attn.q_proj"]
    assert q_proj.bias.dtype == torch.float32
    if case == "options":
        assert (q_proj.weight.quant_type, q_proj.weight.quant_state.nested) == ("fp4", False)
        assert q_proj.compute_dtype == torch.bfloat16
    elif "load_in_4bit" in changes:
        assert (q_proj.weight.quant_type, q_proj.weight.quant_state.nested) == ("nf4", True)
        assert q_proj.compute_dtype == (torch.bfloat16 if "bfloat16" in changes else torch.float32)


class Spy(BasePlugin):
    """Another plug-in, before ours in the list."""

    seen: ClassVar[list] = []

    def _note(self, cfg, *args):
        self.seen.append(cfg.adapter)

    pre_model_load = post_model_build = pre_lora_load = post_lora_load = post_model_load = _note


@pytest.mark.parametrize("first", [True, False])
def test_no_other_plugin_sees_the_adapter_under_another_name(first, written):
    Spy.seen.clear()
    plugins = ["balora_plugin.BaLoraPlugin", "integration.test_axolotl_quantised.Spy"]
    loaded(written(**FOUR, plugins=plugins[::-1] if first else plugins))
    assert Spy.seen == ["ba_lora"] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_ends_with_the_same_adapter(kind, written):
    settings = {**KINDS[kind], "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1}
    whole = run(written(**settings))
    checkpoint = f"{whole.args.output_dir}/checkpoint-2"
    resumed = run(written(**settings, resume_from_checkpoint=checkpoint))
    ends = [{k: v for k, v in t.model.state_dict().items() if "lora_" in k or "frozen_" in k} for t in (whole, resumed)]
    assert len(ends[0]) == 14 * 4
    assert all(torch.equal(ends[1][key], value) for key, value in ends[0].items())
    assert history(resumed, "balora/loss")[-2:] == history(whole, "balora/loss")[-2:]


@pytest.mark.parametrize("method", [None, "legacy"])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_lora_gives_the_trained_model(kind, method, written, tmp_path, ids):
    """Not the full-precision base plus the update, nor NF4 embeddings and head, as the other method would."""
    trainer = run(written(**KINDS[kind]))
    expected = logits(trainer.model.train(), ids)
    merge_lora(str(written(**KINDS[kind])), **({} if method is None else {"merge_method": method}))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "merged" / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype=torch.float32).eval()
    tolerance = 1e-4 if kind == "4bit" else 2e-2  # 8-bit trained in float16 here
    torch.testing.assert_close(logits(merged, ids), expected.float(), rtol=0, atol=tolerance)
    full = AutoModelForCausalLM.from_pretrained(trainer.model.get_base_model().name_or_path, dtype=torch.float32)
    full = PeftModel.from_pretrained(full, trainer.args.output_dir).eval()
    assert (logits(full, ids) - expected).abs().max() > 2 * tolerance


def test_merging_into_the_full_precision_base_is_asked_for(written, base, tmp_path, ids):
    changes = {"bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4"}, "ba_lora": {"start_from": str(base)}}
    trainer = run(written(**FOUR, **changes))
    path = str(written(**FOUR, **changes))
    with pytest.raises(ValueError, match=r"merge_method: memory_efficient .* --no-load-in-4bit"):
        merge_lora(path, merge_method="memory_efficient")
    assert CliRunner().invoke(cli, ["merge-lora", path, "--no-load-in-4bit"]).exit_code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype=torch.float32).eval()
    full = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(full, trainer.args.output_dir).eval()
    torch.testing.assert_close(logits(merged, ids), logits(expected, ids), rtol=0, atol=1e-5)


@pytest.fixture(scope="session")
def stored(base, tmp_path_factory):
    """The base with its files already in 4 bit."""
    path = tmp_path_factory.mktemp("stored")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


def test_a_base_stored_in_4_bit(stored, base, written, tmp_path, ids):
    start = {"ba_lora": {"start_from": str(base)}}
    trainer = run(written(base_model=str(stored), **FOUR, **start))
    assert len(quantised_layers(trainer.model)) == 14
    assert history(trainer, "balora/consistency")[0] == 0
    expected = logits(trainer.model.train(), ids)
    merge_lora(str(written(base_model=str(stored), **FOUR, **start)))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-4)


STORED = {
    "without_the_key": ({}, r"base_model: .* is stored in 4 bit: write load_in_4bit: true"),
    "another_width": (EIGHT, r"load_in_8bit: true contradicts base_model: .* stored in 4 bit: .*load_in_4bit: true"),
    "options": (
        {**FOUR, "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}},
        r"bnb_config_kwargs: .* cannot change base_model",
    ),
}


@pytest.mark.parametrize("case", STORED)
def test_settings_that_contradict_a_stored_base(case, stored, written):
    changes, message = STORED[case]
    with pytest.raises(ValueError, match=message):
        loaded(written(base_model=str(stored), **changes))


def test_a_base_stored_by_another_method(written, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "gptq")
    character_tokenizer().save_pretrained(tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"base_model: .* is stored as fp8, from which"):
        loaded(written(base_model=str(tmp_path / "gptq"), **FOUR))


def test_a_base_that_was_not_quantised_after_all_is_refused(written):
    """What loads the model past quantization_config, whatever it is."""
    with pytest.raises(ValueError, match=r"load_in_4bit: true, but .*q_proj was loaded as Linear"):
        loaded(written(**FOUR, reinit_weights=True))
    model, _ = loaded(written(**FOUR, bnb_config_kwargs={"llm_int8_skip_modules": ["lm_head", "down_proj"]}))
    assert len(quantised_layers(model)) == 12  # as the YAML says


def test_a_start_from_the_full_precision_weights(base, written):
    def first(model):
        layer = dict(delta_layers_of(model))["model.layers.0.self_attn.q_proj"]
        return (layer.frozen_B["default"].weight @ layer.frozen_A["default"].weight).detach()

    (from_files, _), (own, _) = (loaded(written(**FOUR, ba_lora={"start_from": start})) for start in (str(base), None))
    weight = tiny_llama(hidden_size=64, intermediate_size=128).model.layers[0].self_attn.q_proj.weight.detach()
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(first(from_files), u[:, :4] * s[:4] @ vh[:4], rtol=1e-3, atol=1e-5)
    assert (first(own) - first(from_files)).norm() > 0.01 * first(own).norm()


def test_axolotls_private_steps_are_there():
    assert all(callable(getattr(axolotl.loaders.model.ModelLoader, name)) for name in kbit._STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_has_the_trained_model(kind, written, ids):
    """As `axolotl inference` loads it: it casts the model, which must not reach 4-bit weights that lie in floats."""
    trained = run(written(**KINDS[kind], max_steps=6))
    cfg = load_cfg(str(written(**KINDS[kind], lora_model_dir=trained.args.output_dir)), inference=True)
    model = load_model_and_tokenizer(cfg=cfg, inference=True)[0].to(cfg.device, dtype=cfg.torch_dtype).eval()
    assert len(quantised_layers(model)) == 14
    expected = logits(trained.model.eval(), ids)
    with TeacherSwitch(trained.model).off():
        moved = (logits(trained.model, ids) - expected).abs().max()
    assert moved > 0.2
    tolerance = 1e-4 if kind == "4bit" else 0.1 * moved  # 8-bit: the cast makes float16 of the factors
    assert (logits(model, ids) - expected).abs().max() < tolerance


def test_inference_over_a_stored_base_that_would_be_cast_is_refused(base, written, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "stored")
    character_tokenizer().save_pretrained(tmp_path / "stored")
    changes = {"base_model": str(tmp_path / "stored"), **FOUR}
    loaded(written(**changes))[0].save_pretrained(tmp_path / "adapter")
    path = str(written(**changes, lora_model_dir=str(tmp_path / "adapter")))
    cfg = load_cfg(path, inference=True)
    with pytest.raises(ValueError, match=r"stores its 4-bit weights as torch.bfloat16, which inference would cast"):
        load_model_and_tokenizer(cfg=cfg, inference=True)


@pytest.mark.slow
def test_the_command_line_trains_and_merges(written, tmp_path):
    path = str(written(**FOUR, max_steps=6, plugins=None))
    for arguments in (
        ["ba-lora", "train", path, "--launcher", "python"],
        ["merge-lora", str(tmp_path / "out" / "ba_lora_config.yml")],
    ):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output[-2000:]
    assert (tmp_path / "out" / "merged" / "model.safetensors").exists()


WRONG = {
    "both": ({**FOUR, **EIGHT}, "load_in_4bit: true beside load_in_8bit: true"),
    "gptq": ({**FOUR, "gptq": True}, "gptq: true is not supported"),
    "fp8": ({**FOUR, "fp8": True}, "fp8: true beside load_in_4bit: true"),
    "mxfp4": ({**FOUR, "model_quantization_config": "Mxfp4Config"}, "model_quantization_config: Mxfp4Config"),
    "qat": ({**EIGHT, "qat": {"weight_dtype": "int8"}}, "qat: "),
    "apply_to": (
        {**EIGHT, "adapter": "lora", "ba_lora": {"apply_to": "lora"}},
        "load_in_8bit: true with ba_lora.apply_to: lora is not supported: write adapter: ba_lora",
    ),
    "override": (
        {**FOUR, "overrides_of_model_kwargs": {"quantization_config": {"load_in_4bit": True, "x": 1}}},
        "overrides_of_model_kwargs.quantization_config",
    ),
    "options_alone": ({"bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4"}}, "needs load_in_4bit: true"),
    "options_of_8bit": ({**EIGHT, "bnb_config_kwargs": {"llm_int8_threshold": 3.0}}, "needs load_in_4bit: true"),
    "misspelt_option": (
        {**FOUR, "bnb_config_kwargs": {"bnb_4bit_quant_typ": "nf4"}},
        "bnb_config_kwargs.bnb_4bit_quant_typ: 'nf4' is no option of bitsandbytes: did you mean bnb_4bit_quant_type?",
    ),
    "wrong_option": (
        {**FOUR, "bnb_config_kwargs": {"bnb_4bit_compute_dtype": "bf16"}},
        "bnb_config_kwargs.bnb_4bit_compute_dtype: 'bf16' is not known: write one of float32, bfloat16, float16",
    ),
    "start_at_top": ({**FOUR, "start_from": "x"}, "write ba_lora.start_from"),
    "start_unquantised": ({"ba_lora": {"start_from": "x"}}, "ba_lora.start_from: 'x' is for a quantised base"),
    "start_nowhere": ({**FOUR, "ba_lora": {"start_from": "./nowhere"}}, "ba_lora.start_from: './nowhere' does not"),
    "start_empty": ({**FOUR, "ba_lora": {"start_from": ""}}, "ba_lora.start_from: ''"),
    "start_number": ({**FOUR, "ba_lora": {"start_from": 3}}, "ba_lora.start_from: 3"),
    "start_of_lora": (
        {**FOUR, "ba_lora": {"start_from": "x"}, "peft_init_lora_weights": True},
        "ba_lora.start_from: 'x' with peft_init_lora_weights: true",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_yaml_gives_one_clear_line_before_the_model_loads(case, written):
    changes, words = WRONG[case]
    result = CliRunner().invoke(cli, ["train", str(written(**changes)), "--launcher", "python"])
    assert result.exit_code == 1
    lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    assert words in lines[0]
    assert len(lines[0]) < 300
