"""What is found in ms-swift's arguments, as plain dictionaries: ms-swift itself is not needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import TERMS

from balora_plugin.config import RegularizerConfig
from balora_plugin.hosts.swift import keys
from balora_plugin.hosts.swift.block import of_settings, read_block, terms_and_source
from balora_plugin.hosts.swift.checks import findings_in, findings_of_run
from balora_plugin.hosts.swift.errors import WrongArguments, refuse_arguments
from balora_plugin.hosts.swift.multimodal import trained_encoders
from balora_plugin.hosts.swift.names import PLUGIN_FILE
from balora_plugin.hosts.swift.saved import as_stock, write_as_stock
from balora_plugin.hosts.swift.starter import swift_starter
from balora_plugin.hosts.swift.starts import swift_start

GOOD = {"tuner_type": "ba_lora", "lora_rank": 16, "lora_alpha": 16, "model": "m", "dataset": ["d"]}


def found(block=None, **changes):
    return list(findings_in({**GOOD, **changes}, block))


def test_a_working_lora_with_two_lines_changed_has_nothing_wrong():
    assert found() == [] and found({"lambda_consistency": 0.3, "preset": "iclr2026"}) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tuner_backend", "unsloth"),
        ("use_swift_lora", True),
        ("lora_bias", "all"),
        ("lora_dtype", "float32"),
        ("lorap_lr_ratio", 16.0),
        ("use_dora", True),
        ("trainable_parameters", ["model.embed_tokens"]),
        ("trainable_parameters_regex", ".*embed.*"),
        ("new_special_tokens", ["<new>"]),
        ("enable_dft_loss", True),
        ("enable_channel_loss", True),
        ("loss_type", "focal"),
        ("use_galore", True),
        ("lisa_activated_layers", 2),
        ("optimizer", "muonclip"),
        ("predict_with_generate", True),
        ("quant_method", "hqq"),
        ("sequence_parallel_size", 2),
        ("deepspeed_autotp_size", 2),
        ("use_ray", True),
        ("use_flash_ckpt", True),
        ("safe_serialization", False),
        ("mrl_dims", {"32": 1.0}),
    ],
)
def test_what_would_be_ignored_or_replace_the_loss_is_refused(key, value):
    (finding,) = found(**{key: value})
    assert finding.key == key and finding.remedy and finding.changes_training in (True, False, None)
    assert found(**{key: None}) == []


def test_every_refusal_of_a_key_is_tried_here():
    tried = {mark.args[1][i][0] for mark in test_what_would_be_ignored_or_replace_the_loss_is_refused.pytestmark
             for i in range(len(mark.args[1]))}  # fmt: skip
    assert tried == set(keys.REFUSED)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task_type": "embedding"}, "task_type: embedding is not trained by BA-LoRA"),
        ({"rlhf_type": "dpo"}, "rlhf_type: dpo trains with another loss"),
        ({"task_type": "seq_cls", "packing": True}, "packing: true does not work with task_type: seq_cls"),
        ({"lora_rank": 0}, "lora_rank: 0 must be a whole number"),
        ({"lora_alpha": 0.5}, "lora_alpha: 0.5 must be a whole number"),
        ({"target_modules": ["all-linear", "lm_head"]}, "target_modules: lm_head cannot be adapted"),
        ({"target_regex": "lm_head", "target_modules": "lm_head"}, "target_regex: 'lm_head' matches lm_head"),
        ({"target_regex": ".*embed_tokens|.*proj"}, "matches model.embed_tokens, which cannot be adapted"),
        ({"target_regex": "(q_proj"}, "target_regex: '(q_proj' is no regular expression"),
        ({"callbacks": ["lisa"]}, "callbacks: lisa is for another tuner"),
        ({"label_smoothing_factor": 2}, "label_smoothing_factor=2 is the part of each target"),
        ({"init_weights": "olora"}, "init_weights: olora is not a start of BA-LoRA (it rewrites the base's weights"),
        ({"init_weights": False}, "init_weights: false is not a start of BA-LoRA"),
        ({"init_weights": "pissa_niter_x"}, "names no number of iterations"),
    ],
)
def test_what_does_not_go_together_is_said(changes, said):
    assert [finding for finding in found(**changes) if said in str(finding)]


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"lambda_svdd": 0.1}, "BA_LORA.lambda_svdd: 0.1 is not a setting: did you mean lambda_svd?"),
        ({"r": 8}, "write lora_rank beside tuner_type"),
        ({"compile": True}, "BA_LORA.compile: true is not supported in ms-swift"),
        ({"lambda_svd": -1}, "BA_LORA.lambda_svd=-1 must be a finite number"),
        ({"lambda_svd": "1e-4"}, "YAML reads 1e-4 as text"),
        ({"preset": "papr"}, "BA_LORA.preset='papr' is not known"),
        ({"start_from": ""}, "BA_LORA.start_from: '' is no path"),
        ({"head_warmup_steps": 3}, "head_warmup_steps=3 with task='nlg'"),
        ({"anchor_data": "/nowhere/at/all.jsonl"}, "BA_LORA.anchor_data"),
    ],
)
def test_wrong_settings_of_the_terms_are_said(block, said):
    assert [finding for finding in found(block) if said in str(finding)]


def base_at(path, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return str(path)


def test_a_source_of_the_start_needs_a_quantised_base_and_a_start_from_it(tmp_path):
    block = {"start_from": "m"}
    plain = base_at(tmp_path / "plain")
    stored = base_at(tmp_path / "stored", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert found(block, model=stored) == found(block, model=plain, quant_method="bnb", quant_bits=4) == []
    (finding,) = found(block, model=plain)
    assert finding.key == "BA_LORA.start_from" and "write quant_method: bnb" in finding.remedy
    (finding,) = found(block, model=plain, quant_method="bnb", quant_bits=4, init_weights="lora")
    assert "beside init_weights: lora, which has no A0 and B0" in str(finding)
    assert found(target_regex=".*layers.*q_proj") == []


def test_a_variable_that_is_no_mapping_is_found_with_the_rest():
    wrong = list(findings_of_run({**GOOD, "use_dora": True}, "0.3"))
    assert [finding.key for finding in wrong] == ["BA_LORA", "use_dora"]
    assert "'0.3' must be a mapping" in str(wrong[0])
    (other,) = findings_of_run({"tuner_type": "lora"}, "0.3")
    assert other.key == "tuner_type" and list(findings_of_run({"tuner_type": "lora"}, None)) == []


ADAPTER = Path(__file__).parents[1] / "data" / "before_layout" / "causal_lm" / "checkpoint-2"  # in delta form


@pytest.mark.parametrize("block", [None, {}])
def test_a_tuner_that_comes_from_the_adapters_arguments_is_refused(tmp_path, block):
    for file in ADAPTER.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "args.json").write_text('{"tuner_type": "lora"}')
    values = {"tuner_type": "lora", "adapters": [str(tmp_path)]}  # as ms-swift has left the values
    (finding,) = findings_in({**values, "load_args": True}, block)
    assert finding.key == "load_args" and f"tuner_type: lora from {tmp_path}/args.json" in finding.why
    assert list(findings_in(values, None)) == []
    (tmp_path / "ba_lora.json").write_text("{}")
    (damaged,) = found(block, adapters=[str(tmp_path)])
    assert damaged.key == "adapters" and "ba_lora.json" in damaged.why
    (tmp_path / "ba_lora.json").unlink()
    assert list(findings_in({**values, "load_args": True}, None)) == []


def test_a_models_own_args_json_does_not_decide_the_tuner_in_silence(tmp_path, monkeypatch):
    """ms-swift writes one beside every model that it merges or trains whole, and load_args reads it."""
    (tmp_path / "args.json").write_text('{"tuner_type": "full"}')
    values = {"tuner_type": "full", "model": str(tmp_path), "load_args": True}  # as ms-swift has left the values
    (finding,) = findings_in(values, {"lambda_consistency": 0.3})
    assert finding.key == "load_args" and f"tuner_type: full from {tmp_path}/args.json" in finding.why
    assert list(findings_in(values, None)) == []
    for words in (["--tuner_type", "ba_lora"], ["--tuner_type=ba_lora"]):
        monkeypatch.setattr("sys.argv", ["sft.py", *words])
        assert [finding.key for finding in findings_in(values, None)] == ["load_args"]
    assert list(findings_in({**values, "load_args": False}, None)) == []


def wrapped_llava(**options):
    from types import SimpleNamespace

    from multimodal import tiny_multimodal
    from peft import LoraConfig, get_peft_model

    base = tiny_multimodal("llava")
    arch = SimpleNamespace(vision_tower=["model.vision_tower"], aligner=["model.multi_modal_projector"])
    base.model_meta = SimpleNamespace(is_multimodal=True, model_arch=arch)
    targets = options.pop("target_modules", ".*language_model.*q_proj")
    return get_peft_model(base, LoraConfig(target_modules=targets, r=2, **options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, []),
        ({"modules_to_save": ["lm_head", "input_layernorm"]}, []),
        ({"modules_to_save": ["language_model.embed_tokens"]}, ["modules_to_save: match model.language_model.embed"]),
        ({"modules_to_save": ["layer_norm1"]}, ["modules_to_save: match model.vision_tower."]),
        ({"modules_to_save": ["multi_modal_projector"]}, ["modules_to_save: match model.multi_modal_projector, which"]),
        ({"target_modules": ["q_proj"]}, ["target_modules: match model.vision_tower."]),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "layer_norm1"]},
            ["target_modules: match model.vision_tower.", "modules_to_save: match model.v", "which embeds tokens"],
        ),
    ],
)
def test_nothing_trains_that_encodes_for_the_teacher_too(options, said):
    found = sorted(map(str, trained_encoders(wrapped_llava(**options))))
    assert len(found) == len(said) and all(any(part in text for text in found) for part in said), found


def test_everything_is_found_at_once():
    wrong = found({"lambda_svdd": 0.1, "preset": "x"}, enable_dft_loss=True, lora_dtype="bfloat16", init_weights="eva")
    assert len(wrong) == 5
    with pytest.raises(WrongArguments, match="5 settings cannot be trained as they stand") as raised:
        refuse_arguments([*wrong, wrong[0]])
    assert raised.value.findings == tuple(wrong)


def test_what_ms_swift_derives_itself_is_not_said_twice():
    assert [finding.key for finding in found(lorap_lr_ratio=16, optimizer="lorap")] == ["lorap_lr_ratio"]


def test_another_tuner_is_left_alone_and_terms_beside_it_are_not():
    wrong = {"tuner_type": "lora", "enable_dft_loss": True, "lora_dtype": "float32"}
    assert list(findings_in(wrong, None)) == []
    assert [finding.key for finding in findings_in(wrong, {})] == ["tuner_type"]


@pytest.mark.parametrize(
    "text",
    [
        str({"lambda_svd": 0.5, "monitor": True, "teacher_cache": None}),  # as ms-swift writes a mapping of the YAML
        json.dumps({"lambda_svd": 0.5, "monitor": True, "teacher_cache": None}),
        "{lambda_svd: 0.5, monitor: true, teacher_cache: null}",
    ],
)
def test_the_variable_is_read_as_yaml_json_and_python_write_it(text):
    assert read_block(text) == {"lambda_svd": 0.5, "monitor": True, "teacher_cache": None}


def test_a_variable_that_is_not_set_is_the_preset_and_one_that_is_no_mapping_is_refused():
    assert read_block(None) is None and read_block("  ") is None
    assert terms_and_source(None) == (RegularizerConfig(), None)
    assert terms_and_source({"start_from": "m", "lambda_svd": 0.0}) == (RegularizerConfig(lambda_svd=0.0), "m")
    for text in ("lambda_svd", "[1, 2]", "{a: b"):
        with pytest.raises(ValueError, match=r"BA_LORA: .* must be a mapping"):
            read_block(text)


def test_every_setting_of_the_method_is_a_setting_here():
    assert list(of_settings(TERMS.to_dict(), "nlg")) == []
    assert list(of_settings(RegularizerConfig(task="nlu").to_dict(), "nlu")) == []


@pytest.mark.parametrize(
    ("written", "start"),
    [
        (True, "pissa"),
        (None, "pissa"),
        ("true", "pissa"),
        ("pissa", "pissa"),
        ("pissa_exact", "pissa_exact"),
        ("pissa_niter_16", "pissa_niter_16"),  # BaLoraConfig makes pissa_fast of it
        ("lora", True),
    ],
)
def test_the_hosts_default_start_means_pissa(written, start):
    assert swift_start(written) == start and found(init_weights=written) == []


def test_what_is_saved_names_a_lora_and_no_plugin_of_ours(tmp_path):
    arguments = {
        "tuner_type": "ba_lora",
        "external_plugins": [str(PLUGIN_FILE), "mine.py"],
        "custom_register_path": [str(PLUGIN_FILE.parent / ".." / "plugin" / PLUGIN_FILE.name)],
        "lora_rank": 4,
    }
    expected = {"tuner_type": "lora", "external_plugins": ["mine.py"], "custom_register_path": [], "lora_rank": 4}
    assert as_stock(arguments) == expected
    assert as_stock({"tuner_type": "full"}) == {"tuner_type": "full"}
    (tmp_path / "args.json").write_text(json.dumps(arguments))
    write_as_stock(tmp_path)
    assert json.loads((tmp_path / "args.json").read_text()) == expected
    write_as_stock(tmp_path / "nowhere")


def test_the_plugins_directory_holds_the_plugin_alone():
    """ms-swift puts it first on sys.path: anything else there would be found before what others import."""
    assert [path.name for path in PLUGIN_FILE.parent.iterdir() if path.name != "__pycache__"] == [PLUGIN_FILE.name]


def test_the_starter_is_a_yaml_with_nothing_wrong():
    import yaml

    values = yaml.safe_load(swift_starter("x.yaml"))
    block = read_block(str(values.pop("ENV")["BA_LORA"]))
    assert list(findings_in(values, block)) == [] and Path(values["external_plugins"][0]) == PLUGIN_FILE
    assert set(values) <= keys.PASSED | set(keys.MAPPED) | {
        "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
        "learning_rate", "weight_decay", "logging_steps", "save_steps",
    }  # fmt: skip


def test_the_pages_checkpoints_lie_where_the_starter_puts_them(tmp_path):
    import yaml

    from balora_plugin import commands

    path = tmp_path / "new" / "folder" / "x.yaml"
    assert commands.main(["swift", str(path)]) == 0
    values = yaml.safe_load(path.read_text())
    page = (Path(__file__).parents[2] / "docs" / "swift.md").read_text(encoding="utf-8")
    steps = 1980 // (values["per_device_train_batch_size"] * values["gradient_accumulation_steps"])
    assert values["add_version"] is False and values["save_steps"] <= steps
    checkpoint = f"{values['output_dir']}/checkpoint-{values['save_steps']}"
    assert set(re.findall(r"output/ba-lora/checkpoint-\d+", page)) == {checkpoint}


def test_a_key_stands_in_one_table():
    tables = [set(keys.REFUSED), set(keys.SUPERSEDED), set(keys.MAPPED), keys.PASSED, keys.UNREAD]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set(keys.NOT_ONE) <= set(keys.REFUSED)


def test_the_page_names_every_key_that_is_not_plainly_passed():
    page = (Path(__file__).parents[2] / "docs" / "swift.md").read_text(encoding="utf-8")
    said: dict[str, set[str]] = {}
    for row in re.findall(r"^\| (`.+?) \| (\w+) \|", page, re.MULTILINE):
        said.setdefault(row[1], set()).update(re.findall(r"`(\w+)", row[0]))
    assert said["refused"] == set(keys.REFUSED) and said["superseded"] == set(keys.SUPERSEDED)
    assert said["mapped"] == set(keys.MAPPED)
    assert not said["passed"] & (set(keys.SUPERSEDED) | set(keys.MAPPED))
