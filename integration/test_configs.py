"""Every YAML of example_configs/: Axolotl's validation as on a GPU, its keys, two steps on a tiny model of its kind.

A sample runs in `make test`; all of them in `make test-configs`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("axolotl")
pytest.importorskip("PIL")
pytest.importorskip("jsonschema")
import jsonschema
from axolotl.integrations.base import PluginManager
from axolotl.utils.schemas.config import AxolotlInputConfig
from multimodal import FAMILIES
from pydantic.json_schema import GenerateJsonSchema

from balora_plugin.hosts.axolotl import starter

from . import yaml_survey
from .axolotl_run import history, run
from .configs import page
from .configs.bases import BASES, config_of
from .configs.tiny import FIRST, QUESTIONS, ROWS, script_of, swapped

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "example_configs"
SAMPLE = ("paper/mistral-7b", "today/llama3.1-8b_qlora", "today/qwen3-8b_chinese")  # in `make test` too


def yamls():
    """The YAMLs for Axolotl by their names; the quickstart's own is trained by `make quickstart`."""
    found = {}
    for path in sorted(EXAMPLES.rglob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "base_model" in values and path.name != "quickstart.yaml":
            found[path.relative_to(EXAMPLES).with_suffix("").as_posix()] = values
    return found


YAMLS = yamls()
EACH = [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.configs) for name in YAMLS]


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch):
    """The manager is a singleton that keeps every plug-in it has seen."""
    monkeypatch.setattr("sys.argv", ["axolotl"])
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", type(PluginManager.get_instance().plugins)())


def test_every_base_model_has_its_shapes():
    assert {values["base_model"] for values in YAMLS.values()} == BASES.keys()
    for values in YAMLS.values():
        assert config_of(values).model_type == BASES[values["base_model"]].kind


class ByName(GenerateJsonSchema):
    """Enumerations of Axolotl's that JSON has no values for (torch's dtypes), by their names."""

    def enum_schema(self, schema):
        return {"enum": [*(str(member.value) for member in schema["members"]), *schema["cls"].__members__]}


def test_the_list_has_every_yaml_as_it_is():
    """`python -m integration.configs` writes it; what was counted is not counted again here."""
    text = page.PAGE.read_text(encoding="utf-8")
    for name, values in page.trainings().items():
        assert page.row(name, values, None).removesuffix(" |") in text, name
    for name, first in page.others().items():
        assert f"| [`{name}`]({name}) | {first} |" in text, name


@pytest.fixture(scope="module")
def schema():
    """Axolotl's own schema with `balora axolotl schema`; no object takes a key that it does not name."""
    known, named = (AxolotlInputConfig.model_json_schema(alias, schema_generator=ByName) for alias in (True, False))
    known["properties"] |= named["properties"]  # it takes a key by either
    for part in (known, *known["$defs"].values()):
        if "properties" in part:
            part["additionalProperties"] = False
    ours = json.loads(starter.schema())["properties"]
    assert not ours.keys() & known["properties"].keys()
    known["properties"] |= ours
    return jsonschema.Draft202012Validator(known)


@pytest.mark.parametrize("name", YAMLS)
def test_every_key_is_one_that_the_schema_names(name, schema):
    assert [error.message for error in schema.iter_errors(YAMLS[name])] == []


@pytest.mark.parametrize("name", ["paper/llama2-7b", "today/llama3.3-70b_fsdp2"])
def test_an_unknown_key_is_refused(name, schema):
    values = YAMLS[name]
    datasets = [{**values["datasets"][0], "splitt": "train"}]
    for key, wrong in (
        ("learning_rat", {**values, "learning_rat": 1e-4}),
        ("lambda_consistenci", {**values, "ba_lora": {**values["ba_lora"], "lambda_consistenci": 1}}),
        ("splitt", {**values, "datasets": datasets}),
    ):
        (error,) = schema.iter_errors(wrong)
        assert key in str(error), key


@pytest.mark.parametrize("name", YAMLS)
def test_it_is_valid_on_a_machine_with_a_gpu(name, monkeypatch):
    monkeypatch.setattr(yaml_survey, "config_of", config_of)
    with yaml_survey.pretended(ROOT):
        cfg = yaml_survey.validated(YAMLS[name])
    assert YAMLS[name].keys() - {"model_type"} <= cfg.keys()  # which becomes type_of_model


@pytest.mark.parametrize("name", EACH)
def test_two_steps_on_a_tiny_model_of_its_kind(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = YAMLS[name]
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(swapped(values, tmp_path), allow_unicode=True), encoding="utf-8")
    if BASES[values["base_model"]].kind in FAMILIES and "processor_type" not in values:
        # Axolotl loads a processor for text too, and most of them need torchvision
        monkeypatch.setattr("axolotl.train.load_processor", lambda cfg, tokenizer: tokenizer)
    trainer = run(path)
    assert trainer.state.global_step == 2
    assert trainer.model.get_base_model().config.model_type == BASES[values["base_model"]].kind
    cached = "teacher_cache" in values["ba_lora"]  # in bfloat16
    assert history(trainer, "balora/consistency")[0] <= (1e-5 if cached else 0)  # the model is the pre-trained one
    assert history(trainer, "balora/task") and all(map(torch.isfinite, map(torch.tensor, history(trainer, "loss"))))
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_" in name}
    assert trained and max(p.abs().max().item() for p in trained.values()) > 0
    if "processor_type" not in values and "num_labels" not in values:
        assert_the_response_alone_is_learned(trainer, values)


def assert_the_response_alone_is_learned(trainer, values):
    """Of the first N rows, in any script: the labels spell the answers, and nothing of the questions."""
    rows, tokenizer = trainer.train_dataset, trainer.processing_class
    learned = "".join(tokenizer.decode([i for i in row["labels"] if i != -100]) for row in rows)
    question, answer = QUESTIONS[script_of(values)]
    assert not any(question.format(i) in learned for i in range(ROWS))
    first = FIRST if "[:" in str(values["datasets"][0].get("split")) else ROWS
    held_out = 2 if values.get("val_set_size") else 0
    assert sum(answer.format(i, 2 * i) in learned for i in range(ROWS)) == first - held_out
