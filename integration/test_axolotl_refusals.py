"""Axolotl's settings: what is refused, all at once, before any weight is read; what is superseded, and does not act."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("axolotl")

import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from balora_plugin.doctor.requested import problems
from balora_plugin.hosts.axolotl import checks, model_config, refusals, superseded
from balora_plugin.hosts.axolotl.block import of_block
from balora_plugin.hosts.axolotl.errors import SettingError
from balora_plugin.hosts.axolotl.injection import target_modules
from balora_plugin.hosts.axolotl.plugin import BaLoraPlugin

from . import yaml_survey
from .axolotl_run import history, run

ROOT = Path(__file__).parent.parent
OURS = "balora_plugin.BaLoraPlugin"
CCE = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
LIGER = "axolotl.integrations.liger.LigerPlugin"
LORA = {"adapter": "ba_lora", "lora_r": 4, "lora_alpha": 4, "lora_target_modules": ["q_proj"]}


def test_anchor_data_is_looked_at_with_the_yaml(tmp_path):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"question": "x"}')
    for path, said in (
        ("missing.jsonl", "there is no such file"),
        (str(wrong), "row 0 has no text, messages or prompt"),
    ):
        values = {**LORA, "base_model": "x", "ba_lora": {"anchor_data": path}}
        (found,) = [each for each in BaLoraPlugin.findings(values) if "anchor_data" in str(each)]
        assert str(found).startswith(f"ba_lora.anchor_data='{path}': {said}")
    (number,) = of_block({"anchor_fraction": 2}, "nlg")
    assert number.key == "ba_lora.anchor_fraction"


# --- superseded


@pytest.mark.parametrize("key", superseded.SUPERSEDED)
def test_what_changes_speed_or_memory_alone_is_switched_off_and_said_in_one_line(key, caplog):
    checks.check_raw({**LORA, key: True})
    cfg = DictDefault({**LORA, key: True})
    assert [finding.key for finding in superseded.still_on(cfg)] == [key]
    with caplog.at_level(logging.WARNING, "axolotl.balora_plugin"):
        superseded.switch_off(cfg)
    assert cfg[key] is False and not list(superseded.still_on(cfg))
    assert len(caplog.records) == 1 and f"{key} ({superseded.SUPERSEDED[key]})" in caplog.text
    superseded.switch_off(cfg)
    assert len(caplog.records) == 1


KERNELS = [
    {"use_scattermoe": True},
    {"use_sonicmoe": True},
    {"expert_backend": "sonicmoe"},
    {"experts_implementation": "scattermoe"},
    {"experts_implementation": "deep_ep_sonicmoe"},
]


@pytest.mark.parametrize("adapter", [{}, {"adapter": "lora", "ba_lora": {"apply_to": "lora"}}])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "-".join(map(str, kernel.items())))
def test_kernels_that_read_the_adapter_of_experts_give_way_to_grouped_mm(kernel, adapter):
    for targets in ({"lora_target_parameters": ["mlp.experts.gate_up_proj"]}, {"lora_target_modules": ["w1"]}):
        cfg = DictDefault({**LORA, **adapter, **kernel, **targets})
        superseded.switch_off(cfg)
        assert cfg.experts_implementation == "grouped_mm"
        assert not (cfg.use_scattermoe or cfg.use_sonicmoe or cfg.expert_backend)
    cfg = DictDefault({**LORA, **adapter, **kernel})  # adapters elsewhere are none of its business
    superseded.switch_off(cfg)
    assert {key: cfg[key] for key in kernel} == kernel


@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
def test_superseded_plugins_do_not_act_and_the_rest_of_liger_does(first, written, llama_code):
    """By a key, and where the plug-in itself turns it on; whichever is listed first."""
    others = [CCE, LIGER]
    losses = {"chunked_cross_entropy": True, "liger_fused_linear_cross_entropy": True}
    path = written(plugins=[OURS, *others] if first else [*others, OURS], liger_rms_norm=True, **losses)
    cfg = load_cfg(str(path))
    assert not any(cfg[key] for key in ("cut_cross_entropy", *losses))
    forward, norm = llama_code.LlamaForCausalLM.forward, llama_code.LlamaRMSNorm
    for plugin in PluginManager.get_instance().plugins.values():
        plugin.pre_model_load(cfg)
    assert llama_code.LlamaForCausalLM.forward is forward
    assert llama_code.LlamaRMSNorm is not norm and "Liger" in llama_code.LlamaRMSNorm.__name__


def test_for_adapter_lora_axolotl_cannot_turn_its_kernels_on(written):
    cfg = load_cfg(str(written(adapter="lora", ba_lora={"apply_to": "lora"}, bf16=None, fp16=None)))
    assert not any(cfg[key] for key in superseded.DEFAULTS_ON)


# --- refused


@pytest.mark.parametrize("key", [*refusals.REFUSED, *refusals.SPLITS])
def test_every_refused_key_is_named_with_what_its_remedy_changes(key):
    value = 2 if key in refusals.SPLITS else True
    with pytest.raises(SettingError, match=rf"^{key}: .*: .*\((trains the same|changes what is trained)\)") as caught:
        checks.check_raw({**LORA, key: value})
    assert [finding.key for finding in caught.value.findings] == [key]
    assert not list(refusals.refused({key: False}))


# another loss, another trainer, weights shared with the teacher: never superseded
FOR_GOOD_REASONS = {
    **{key: {key: True} for key in ("rl", "reward_model", "process_reward_model", "kd_trainer", "orpo_alpha")},
    **{key: {key: True} for key in ("use_eaft", "liger_use_token_scaling", "trainer_cls", "relora", "qat")},
    **{key: {key: True} for key in ("lisa_n_layers", "peft_layer_replication", "peft_trainable_token_indices")},
    **{key: {key: True} for key in ("unfrozen_parameters", "use_onebitllms", "peft_use_dora", "gptq")},
    "peft_ensure_weight_tying": {"peft_ensure_weight_tying": True},
    "diffusion": {"plugins": [OURS, "axolotl.integrations.diffusion.DiffusionPlugin"]},
    "spectrum, behind ours": {"plugins": [OURS, "axolotl.integrations.spectrum.SpectrumPlugin"]},
    "hatchery": {"plugins": [OURS, "axolotl.integrations.hatchery.HatcheryPlugin"]},
    "loftq": {"peft": {"loftq_config": {"loftq_bits": 4}}},
    "packed": {"model_quantization_config": "Mxfp4Config"},
    "fp8 base": {"model_quantization_config": "FineGrainedFP8Config"},
    "head": {"lora_target_modules": ["lm_head"]},
    "mutating": {"adapter": "lora", "ba_lora": {"apply_to": "lora"}, "peft_init_lora_weights": "pissa"},
    "full without a teacher": {"adapter": None, "ba_lora": {"apply_to": "full"}},
}


@pytest.mark.parametrize("case", FOR_GOOD_REASONS)
def test_what_would_train_something_else_stays_refused(case):
    with pytest.raises(SettingError):
        checks.check_raw({**LORA, **FOR_GOOD_REASONS[case]})
    assert not set(FOR_GOOD_REASONS) & set(superseded.SUPERSEDED)


@pytest.mark.parametrize("method", [{"adapter": "lora", "peft_init_lora_weights": "pissa"}, {"adapter": None}])
def test_a_baseline_of_any_start_is_monitored(method):
    off = {"lambda_consistency": 0, "lambda_diversity": 0, "lambda_svd": 0}
    target = "full" if method["adapter"] is None else "lora"
    checks.check_raw({**LORA, **method, "ba_lora": {"apply_to": target, **off, "monitor": True}})


class BringsATrainer(BasePlugin):
    def get_trainer_cls(self, cfg):
        return SimpleNamespace


@pytest.mark.parametrize("first", [True, False])
def test_another_plugins_trainer_is_found_before_the_model_loads(first, written):
    other = "integration.test_axolotl_refusals.BringsATrainer"
    load_cfg(str(written(plugins=[OURS, other] if first else [other, OURS])))
    plugins = PluginManager.get_instance().plugins
    cfg = load_cfg(str(written(plugins=[OURS, other] if first else [other, OURS])))
    with pytest.raises(SettingError, match="brings a trainer of its own"):
        plugins[OURS].pre_model_load(cfg)


def test_all_refusals_come_at_once_in_the_command_line_and_in_doctor(written):
    from axolotl.cli.main import cli
    from click.testing import CliRunner

    wrong = {"rl": "dpo", "lora_r": 0, "expert_parallel_size": 2, "ba_lora": {"lambda_svd": -1, "temperature": 0}}
    path = written(**wrong)
    result = CliRunner().invoke(cli, ["train", str(path), "--launcher", "python"])
    error = result.output.rpartition("Error: ")[2]
    assert error.startswith("5 settings cannot be trained as they stand:\n")
    keys = ["rl", "expert_parallel_size", "lora_r", "ba_lora.lambda_svd", "ba_lora.temperature"]
    assert re.findall(r"^  - ([\w.]+): ", error, re.MULTILINE) == keys
    machine = SimpleNamespace(
        has=lambda name: True,
        device="cpu",
        modules=frozenset(),
        bitsandbytes=None,
        capability=None,
        compiler="g++",
        backends=("inductor", "ba_lora"),
        bf16=True,
        name="here",
    )
    found = {finding.key: finding for finding in problems(yaml.safe_load(path.read_text()), machine)}
    assert set(keys) <= set(found)
    assert (found["rl"].changes_training, found["expert_parallel_size"].changes_training) == (True, False)


def test_nothing_is_left_for_another_round():
    """Two values of one key, and what is wrong in a block beside what is misspelt in it."""
    with pytest.raises(SettingError, match="2 settings") as caught:
        checks.check_raw({**LORA, "lora_target_modules": ["lm_head", "embed_tokens"]})
    assert [finding.value for finding in caught.value.findings] == ["lm_head", "embed_tokens"]
    keys = [finding.key for finding in of_block({"lamda_svd": 1, "temperature": 0, "lambda_svd": -1}, "nlg")]
    assert keys == ["ba_lora.lamda_svd", "ba_lora.lambda_svd", "ba_lora.temperature"]


OF_ANOTHER_KIND = {
    **dict.fromkeys(checks._BLOCKS, (True, "x", 3, ["x"])),
    **dict.fromkeys(checks._LISTS, (True, 3, "x", {"path": "x"})),
    "lora_target_modules": (True, 3, [3], {"x": 1}),
    "adapter": (3, ["ba_lora"], {"ba_lora": 1}),
    "plugins": (True, 3, {"x": 1}),
}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lora_dropout", 2, "lora_dropout: 2 must be a number from 0 to 1"),
        ("lora_r", 10**40, "lora_r: 10**20 or more must be a whole number from 1 to 2147483647"),
        ("lora_r", 0, "lora_r: 0 must be a whole number from 1 to"),
        (
            "lora_target_modules",
            "q_proj(",
            "lora_target_modules: 'q_proj(' is no regular expression: write a list of names",
        ),
        (
            "peft_layers_to_transform",
            [-1],
            "peft_layers_to_transform: [-1] must be a whole number >= 0 (the first layer is 0)",
        ),
        ("lora_rank_pattern", {"q_(": 4}, "lora_rank_pattern: {'q_(': 4} must be ranks from 1 to"),
        ("lora_alpha_pattern", {"q": -4}, "lora_alpha_pattern: {'q': -4} must be numbers > 0"),
    ],
)
def test_a_value_that_peft_cannot_work_with_is_one_line_before_loading(key, value, said):
    (found,) = list(checks.findings_of({**LORA, key: value}, model=False))
    assert str(found).startswith(said)


def test_a_flag_in_the_place_of_a_value_is_told_what_the_value_is():
    block = {"drift_target": True, "teacher_cache": True, "svd_norm": True, "start_from": True, "apply_to": True}
    found = {finding.key: str(finding) for finding in of_block(block, "nlg")}
    assert found["ba_lora.drift_target"].endswith("true is no value for it: write a number from 1e-06 to 100")
    assert found["ba_lora.teacher_cache"].endswith("write a path")
    assert found["ba_lora.svd_norm"].endswith("write nuclear, frobenius or none")
    assert found["ba_lora.start_from"].endswith("write a name")
    assert found["ba_lora.apply_to"].endswith("write lora or full")
    too_large = {finding.key: str(finding) for finding in of_block({"svd_top_k": 2**63, "lambda_svd": 1e30}, "nlg")}
    assert too_large["ba_lora.svd_top_k"].endswith("write a whole number >= 1 and <= 2147483647")
    assert too_large["ba_lora.lambda_svd"].endswith("write a number from 0 to 1e+06")


def test_anchor_data_of_another_kind_is_a_finding_and_no_traceback():
    values = {**LORA, "base_model": "x", "ba_lora": {"anchor_data": 5}}
    (found,) = [each for each in BaLoraPlugin.findings(values) if "anchor_data" in str(each)]
    assert str(found) == "ba_lora.anchor_data: 5 is no value for it: write a file or data set"


@pytest.mark.parametrize("key", OF_ANOTHER_KIND)
def test_a_value_of_another_kind_is_a_finding_and_no_traceback(key):
    kind = {"model_type": "AutoModelForSequenceClassification", "num_labels": 2}
    for value in OF_ANOTHER_KIND[key]:
        for values in ({**LORA, key: value}, {**LORA, **kind, key: value}):
            found = list(checks.findings_of(values, model=False))
            assert [finding.key for finding in found] == [key], value
            assert "must be a" in str(found[0])


@pytest.mark.parametrize(
    ("base", "lines", "words"),
    [
        ("TheBloke/Llama-2-7B-GPTQ", {}, "is stored as gptq"),
        ("openai/gpt-oss-20b", {}, "is stored as mxfp4"),
        (
            "openai/gpt-oss-20b",
            {
                "model_quantization_config": "Mxfp4Config",
                "model_quantization_config_kwargs": {"dequantize": True},
            },
            "",
        ),
        ("nvidia/Qwen3-30B-A3B-NVFP4", {}, "is stored as modelopt"),
        ("meta-llama/Llama-3.2-1B", {}, ""),
    ],
)
def test_the_models_config_is_asked_before_its_weights(base, lines, words, monkeypatch):
    monkeypatch.setattr(model_config, "load_model_config", yaml_survey.config_of)
    found = [str(finding) for finding in BaLoraPlugin.findings({**LORA, "base_model": base, **lines})]
    assert len(found) == bool(words) and all(f"base_model: {base} {words}" in line for line in found)


def test_a_config_that_cannot_be_read_is_left_to_axolotl():
    assert list(model_config.of_model({"base_model": "there/is no such model"})) == []


def test_the_head_of_a_neox_is_left_out_by_what_it_is():
    """Axolotl's table of heads' names is older than transformers 5."""
    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    found = target_modules(DictDefault({"lora_target_linear": True}), GPTNeoXForCausalLM(config))
    assert set(found) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


# --- the table in the docs


def rows():
    """{key: what happens} of the table in docs/design/hosts.md."""
    text = (ROOT / "docs" / "design" / "hosts.md").read_text(encoding="utf-8")
    table = text.partition("### Speed and memory")[2].partition("\n### ")[0]
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[1] in ("passed", "superseded", "refused"):
            found |= dict.fromkeys(re.findall(r"`([\w]+)`", cells[0]), cells[1])
    return found


def test_the_docs_table_is_the_codes_mapping():
    table = rows()
    of = {state: {key for key, found in table.items() if found == state} for state in table.values()}
    assert of["superseded"] == {*superseded.SUPERSEDED, *superseded.CHOOSING_EXPERTS, superseded.CUT_CROSS_ENTROPY}
    assert of["refused"] <= {*refusals.REFUSED, *refusals.SPLITS}
    for key in of["passed"]:
        values = {**LORA, "load_in_4bit": True, key: True}
        assert not list(superseded.asked(values)), key
        assert not list(BaLoraPlugin.findings(values)), key
    # every switch of Axolotl's schema that is of speed or memory by its name
    names = re.compile(r"kernel|liger|cross_entropy|tiled|offload|fuse|compile|parallel|_checkpointing$")
    switches = {key for key in AxolotlInputConfig.model_fields if names.search(key)}
    settings_of_another = re.compile(r"dpo_|relora|_kwargs$|_num_|_backend$|_options$|_mode$|_original_mlp$|fsdp")
    assert {key for key in switches if not settings_of_another.search(key)} <= set(table)


# --- the survey


def test_the_survey_counts_our_examples_and_yamls_of_every_kind(tmp_path):
    base = {"base_model": "meta-llama/Llama-3.2-1B", "datasets": [{"path": "a/b", "type": "alpaca"}]}
    base |= {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1, "learning_rate": 1e-4}
    base |= {"optimizer": "adamw_torch", "sequence_len": 64, "lora_r": 8, "lora_alpha": 8, "lora_target_linear": True}
    lora = {**base, "adapter": "lora"}
    written = {
        "plain": lora,
        "off": {**lora, "plugins": [CCE], "bf16": "auto", "lora_mlp_kernel": True},
        "wrong": {**lora, "relora": True, "jagged_restart_steps": 5, "peft_use_dora": True},
        "full": base,
        "dpo": {**lora, "rl": "dpo"},
        "invalid": {**lora, "micro_batch_size": "many"},
    }
    for name, values in written.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    outcomes = {each.path.stem: each for each in yaml_survey.survey([tmp_path])}
    assert {name: each.state for name, each in outcomes.items()} == {
        "plain": "accepted",
        "off": "superseded",
        "wrong": "refused",
        "full": "no LoRA",
        "dpo": "no SFT",
        "invalid": "invalid in plain Axolotl",
    }
    assert outcomes["off"].switched_off == ("lora_mlp_kernel", f"plugins: {superseded.CUT_CROSS_ENTROPY}")
    assert [reason.key for reason in outcomes["wrong"].reasons] == ["relora", "peft_use_dora"]
    ours = yaml_survey.survey([ROOT / "example_configs"], ROOT)
    counted = [each for each in ours if each.state in yaml_survey.COUNTED]
    assert counted and all(each.state == "accepted" for each in counted)
    text = yaml_survey.report(list(outcomes.values()) + ours)
    assert f"{len(counted) + 2} of {len(counted) + 3} work" in text


def test_a_run_with_everything_superseded_trains_as_one_without(written, llama_code):
    on = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True, "chunked_cross_entropy": True}
    runs = [run(written(max_steps=2)), run(written(max_steps=2, plugins=[CCE, OURS], cut_cross_entropy=True, **on))]
    for key in ("loss", "grad_norm", "balora/consistency", "balora/svd"):
        first, second = (history(trainer, key) for trainer in runs)
        assert len(first) == 2 and first == second, key
