"""What a LLaMA-Factory YAML is refused for, and what is made of it; LLaMA-Factory itself is not needed."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from balora_plugin import commands
from balora_plugin.commands import llamafactory as command
from balora_plugin.config import RECOMMENDED, RECOMMENDED_RATE, RegularizerConfig
from balora_plugin.hosts.llamafactory import train
from balora_plugin.hosts.llamafactory.block import ADAPTER_KEYS, SHARED_NAMES
from balora_plugin.hosts.llamafactory.checks import findings_of_base, findings_of_yaml, planned, start_of
from balora_plugin.hosts.llamafactory.keys import MAPPED_KEYS, REFUSED_KEYS, REFUSED_VARIABLES, SUPERSEDED_KEYS
from balora_plugin.hosts.llamafactory.starter import llamafactory_starter
from balora_plugin.hosts.llamafactory.train import NotTrainable, refuse_findings, start_training
from balora_plugin.settings import settings_of

PLAIN = {
    "model_name_or_path": "a/b",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "loraplus_lr_ratio": 16.0,
    "template": "llama3",
    "quantization_bit": 4,
}
YAML = {**PLAIN, "ba_lora": {"lambda_consistency": 0.3}}
OTHER = {  # a value of each key that is refused
    "stage": "dpo",
    "finetuning_type": "oft",
    "mixture_of_depths": "convert",
    "add_tokens": "<a>",
    "add_special_tokens": "<a>",
    "new_special_tokens_config": "a.yaml",
}


def found(**changes):
    return {finding.key: finding for finding in findings_of_yaml({**YAML, **changes}, {})}


def test_a_working_yaml_with_two_more_lines_is_taken():
    assert found() == {}
    assert found(stage=None, use_dora=False, mixture_of_depths=None, ba_lora=None) == {}
    plan = planned(YAML)
    assert plan.arguments == PLAIN
    assert (plan.terms, plan.said) == ({"lambda_consistency": 0.3}, ())
    assert YAML["ba_lora"] == {"lambda_consistency": 0.3}


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_what_would_not_train_is_refused_with_its_remedy(key):
    value = OTHER.get(key, True)
    (finding,) = found(**{key: value}).values()
    assert (finding.key, finding.value) == (key, value)
    assert finding.why and finding.remedy
    for allowed in REFUSED_KEYS[key].allowed:
        assert found(**{key: allowed}) == {}


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"ba_lora": {"lambda_svdd": 0.1}}, "ba_lora.lambda_svdd", "is not a setting: did you mean"),
        ({"ba_lora": {"r": 8}}, "ba_lora.r", "write lora_rank at top level"),
        ({"ba_lora": {"lora_rank": 8}}, "ba_lora.lora_rank", "write lora_rank at top level"),
        ({"ba_lora": {"pissa_init": True}}, "ba_lora.pissa_init", "write pissa_init at top level"),
        (
            {"ba_lora": {"anchor_data": "none.jsonl"}},
            "ba_lora.anchor_data='none.jsonl'",
            "ba_lora.anchor_data='none.jsonl'",
        ),
        ({"ba_lora": {"teacher_cache": "c"}, "streaming": True}, "ba_lora.teacher_cache", "streaming: true has none"),
        ({"ba_lora": {"compile": True}}, "ba_lora.compile", "disable_gradient_checkpointing: true"),
        ({"ba_lora": {"start_from": 3}}, "ba_lora.start_from", "is no path"),
        ({"lora_target": "q_proj, lm_head"}, "lora_target", "lm_head cannot be adapted"),
        ({"ba_lora": {"start_from": "x"}, "adapter_name_or_path": "y"}, "ba_lora.start_from", "create_new_adapter"),
        ({"pissa_init": False, "adapter_name_or_path": "y"}, "pissa_init", "create_new_adapter: true"),
        ({"ba_lora": {"lambda_svd": "x"}}, "", "ba_lora.lambda_svd='x'"),
        ({"ba_lora": {"task": "nlu"}}, "ba_lora.task", "classifiers"),
        ({"ba_lora": {"compile": "yes"}}, "ba_lora.compile", "write true, false or layers"),
        *(({"ba_lora": value}, "ba_lora", "must be a block") for value in (3, 0, False, "", [], "yes")),
        ({"ba_lora": {"start_from": "x"}, "quantization_bit": None}, "ba_lora.start_from", "quantization_bit: 4"),
        ({"ba_lora": {"start_from": "x"}, "pissa_init": False}, "ba_lora.start_from", "pissa_init: false"),
        ({"lambda_svd": 0.1}, "lambda_svd", "write ba_lora.lambda_svd"),
        ({"quantization_method": "hqq"}, "quantization_method", "layers that BA-LoRA does not adapt"),
        ({"quantization_method": "bitsandbytes"}, "quantization_method", "not known to LLaMA-Factory"),
        ({"quantization_method": None}, "quantization_method", "write quantization_method: bnb"),
        ({"quantization_bit": 2}, "quantization_bit", "write 4 or 8"),
    ],
)
def test_a_wrong_block_or_base_names_key_and_remedy(changes, key, words):
    (finding,) = found(**changes).values()
    assert finding.key == key and words in str(finding)


def test_every_wrong_setting_of_the_block_is_named():
    block = {"lambda_svdd": 1, "lambda_svd": "x", "r": 8, "temperature": -1, "anchor_data": "none.txt", "task": "nlu"}
    with pytest.raises(NotTrainable, match=r"^7 settings ") as caught:
        refuse_findings(findings_of_yaml({**YAML, "ba_lora": {**block, "compile": 1}}, {}))
    assert all(f"\n  - ba_lora.{key}" in str(caught.value) for key in (*block, "compile"))
    assert planned({**YAML, "ba_lora": None}).terms == {}


def test_what_is_llamafactorys_own_at_top_level_stays_there():
    assert found(temperature=0.7) == {}
    assert found(disable_gradient_checkpointing=True, ba_lora={"compile": True}) == {}
    assert found(ba_lora={"compile": "layers"}) == {}


def test_keys_are_those_of_its_argument_classes():
    """What of the block's is LLaMA-Factory's too, and whether each key that is looked for is one of its own."""
    pytest.importorskip("llamafactory")
    from llamafactory.hparams.parser import _TRAIN_ARGS

    theirs = {field.name for arguments in _TRAIN_ARGS for field in dataclasses.fields(arguments)}
    assert theirs & {*settings_of(RegularizerConfig), *ADAPTER_KEYS} == set(SHARED_NAMES)
    assert {*REFUSED_KEYS, *SUPERSEDED_KEYS, *MAPPED_KEYS} <= theirs


def test_without_its_block_a_yaml_is_not_trained_under_our_name():
    (missing,) = findings_of_yaml(PLAIN, {})
    assert missing.key == "ba_lora" and "llamafactory-cli" in missing.remedy
    (near,) = findings_of_yaml({**PLAIN, "ba_loraa": {}}, {})
    assert str(near).startswith("ba_loraa: ") and near.remedy == "did you mean ba_lora?"


@pytest.mark.parametrize("name", REFUSED_VARIABLES)
def test_ways_around_the_run_function_are_refused(name):
    (finding,) = findings_of_yaml(YAML, {name: "1"})
    assert finding.key == name
    assert list(findings_of_yaml(YAML, {name: "0"})) == []


def test_everything_is_said_at_once():
    with pytest.raises(
        NotTrainable, match=r"^3 settings .*\n  - stage: dpo .*\n  - use_unsloth: true .*\n  - use_dora"
    ):
        refuse_findings(findings_of_yaml({**YAML, "stage": "dpo", "use_unsloth": True, "use_dora": True}, {}))


@pytest.mark.parametrize(
    ("written", "start", "said"),
    [
        ({}, "pissa", False),
        ({"pissa_init": True, "pissa_iter": -1}, "pissa", False),
        ({"pissa_init": True, "pissa_iter": 16}, "pissa_fast", True),
        ({"pissa_init": True}, "pissa_fast", True),
        ({"pissa_init": False}, True, False),
        ({"pissa_iter": 16}, "pissa", False),
    ],
)
def test_the_start_is_what_pissa_init_and_pissa_iter_ask(written, start, said):
    assert start_of(written)[0] == start
    assert len(planned({**YAML, **written, "adapter_name_or_path": "a", "create_new_adapter": True}).said) == said
    assert planned({**YAML, **written, "adapter_name_or_path": "a"}).said == ()  # it brings its own
    plan = planned({**YAML, **written, "pissa_convert": True, "ba_lora": {"compile": "layers", "svd_top_k": 4}})
    assert plan.adapter == {"init_lora_weights": start, "compile": "layers"}
    assert plan.terms == {"svd_top_k": 4}
    assert plan.arguments == PLAIN
    assert len(plan.said) == 1 + said and plan.said[0].startswith("pissa_convert: switched off, ")


def test_a_base_that_is_stored_quantised_is_refused_by_its_config(tmp_path, monkeypatch):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = {**YAML, "model_name_or_path": str(tmp_path)}
    (finding,) = findings_of_base(data)
    assert finding.key == "model_name_or_path" and "stored in gptq" in finding.why
    monkeypatch.setattr(train, "read_yaml", lambda words: data)
    with pytest.raises(NotTrainable, match="stored in gptq"):  # before any launcher
        start_training(["x.yaml"])
    for dequantised in ("mxfp4", "fp8"):  # while LLaMA-Factory loads it
        config = {"model_type": "llama", "quantization_config": {"quant_method": dequantised}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert list(findings_of_base(data)) == []
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert list(findings_of_base(data)) == []
    assert list(findings_of_base({**YAML, "model_name_or_path": str(tmp_path / "none")})) == []


def test_the_starter_is_taken_and_has_the_recommended_setting(tmp_path, capsys):
    values = yaml.safe_load(llamafactory_starter("run.yaml"))
    assert list(findings_of_yaml(values, {})) == []
    assert values["ba_lora"] == RECOMMENDED and values["learning_rate"] == RECOMMENDED_RATE
    assert values["dataset_dir"] == "ONLINE" and "/" in values["dataset"]  # no file that pip does not install
    plan = planned(values)
    assert plan.adapter == {"init_lora_weights": "pissa"} and plan.said == ()
    path = tmp_path / "run.yaml"
    assert commands.main(["llamafactory", "init", str(path)]) == 0
    assert path.read_text() == llamafactory_starter(str(path))
    assert commands.main(["llamafactory", "init", str(path)]) == 2
    assert "pass --force" in capsys.readouterr().err
    assert commands.main(["llamafactory", "init", str(path), "--force"]) == 0
    assert commands.main(["llamafactory", "tune", str(path)]) == 2


def test_nothing_heavy_is_imported_for_what_is_refused():
    code = (
        "import sys\n"
        "from balora_plugin.hosts.llamafactory.train import refuse_findings\n"
        "from balora_plugin.hosts.llamafactory.checks import findings_of_yaml\n"
        "list(findings_of_yaml({'stage': 'dpo', 'ba_lora': {'lambda_svd': 1}}))\n"
        "print([name for name in ('torch', 'llamafactory', 'transformers', 'peft', 'trl') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_error_of_a_training_says_where_and_one_of_ours_does_not(capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: name)

    def failing(words):
        raise RuntimeError("no kernel image")

    assert commands.main(["llamafactory", "train", "x.json"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: x.json is no YAML") and "Traceback" not in said
    monkeypatch.setattr(train, "start_training", failing)
    assert commands.main(["llamafactory", "train", "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "in failing" in said and said.endswith("RuntimeError: no kernel image\n")


@pytest.mark.parametrize(("words", "said"), [(["x.json"], "is no YAML"), (["x.yaml", "--lora_rank", "8"], "key=value")])
def test_a_command_line_that_llamafactory_reads_otherwise_is_refused(words, said):
    with pytest.raises(ValueError, match=said):
        start_training(words)


def test_the_table_of_the_docs_has_every_key():
    page = (Path(__file__).parents[2] / "docs" / "llamafactory.md").read_text(encoding="utf-8")
    rows = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 3:
            rows |= dict.fromkeys(re.findall(r"`(?:ba_lora\.)?([A-Za-z0-9_]+)`", cells[0]), cells[1])
    for keys, standing in (
        (REFUSED_KEYS, "refused"),
        (REFUSED_VARIABLES, "refused"),
        (SUPERSEDED_KEYS, "superseded"),
        (MAPPED_KEYS, "mapped"),
    ):
        assert {rows.get(key) for key in keys} == {standing}, [key for key in keys if rows.get(key) != standing]
    assert {key for key, standing in rows.items() if standing == "refused"} == {
        *REFUSED_KEYS,
        *REFUSED_VARIABLES,
        "quantization_method",
        "compile",
    }
