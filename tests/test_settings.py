"""A setting is declared once: checks, Axolotl's block, hints, docstring and docs/settings.md are made of that."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from balora_plugin.config import PRESETS, RegularizerConfig
from balora_plugin.settings import Only, documented, setting, settings_of

ROOT = Path(__file__).parents[1]
ANCHOR = "\n    def __post_init__(self)"
ONE_MORE = """
    pooling_width: int | None = setting(
        "integer",
        None,
        minimum=2,
        presets={"paper": (3, 4), "iclr2026": (5, 6)},
        help="A setting | of a test.",
    )
    pooled: bool = setting("flag", False, help="A flag of a test.")
"""


@pytest.fixture(scope="module")
def one_more(tmp_path_factory):
    """A copy of the package and of docs/settings.py in which config.py alone declares two settings more."""
    root = tmp_path_factory.mktemp("one_more")
    shutil.copytree(ROOT / "balora_plugin", root / "balora_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "settings.py", root / "docs")
    config = root / "balora_plugin" / "config.py"
    text = config.read_text(encoding="utf-8")
    assert text.count(ANCHOR) == 1
    config.write_text(text.replace(ANCHOR, ONE_MORE + ANCHOR), encoding="utf-8")
    return root


def answers(root, questions):
    """What each expression of {name: source} gives in the package under `root`, or the error it raises, as text."""
    code = (
        "import json, sys\n"
        "def said(expression):\n"
        "    try:\n"
        "        return str(eval(expression))\n"
        "    except (ValueError, TypeError) as error:\n"
        "        return f'{type(error).__name__}: {error}'\n"
        "from balora_plugin.config import RegularizerConfig\n"
        "if sys.argv[2:]:\n"
        "    from balora_plugin.hosts.axolotl.args import BaLoraArgs, BaLoraBlock\n"
        "print('ANSWERS' + json.dumps({name: said(source) for name, source in json.loads(sys.argv[1]).items()}))\n"
    )
    needs_axolotl = ["axolotl"] if any("BaLora" in source for source in questions.values()) else []
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, json.dumps(questions), *needs_axolotl]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("ANSWERS")[2])


def test_a_new_setting_is_checked_resolved_and_documented(one_more):
    found = answers(
        one_more,
        {
            "bound": "RegularizerConfig(pooling_width=1)",
            "type": "RegularizerConfig(pooling_width=2.0)",
            "flag": "RegularizerConfig(pooled=1)",
            "unknown": "RegularizerConfig.from_dict({'pooling': 1})",
            "resolved": "[RegularizerConfig(preset=p).resolved(t).pooling_width for p in ('paper', 'iclr2026')"
            " for t in ('nlg', 'nlu')]",
            "dict": "RegularizerConfig(pooling_width=7).to_dict()['pooling_width']",
            "docstring": "RegularizerConfig.__doc__",
        },
    )
    assert found["bound"] == "ValueError: pooling_width=1 must be >= 2."
    assert found["type"] == "TypeError: pooling_width=2.0 must be a whole number, not float."
    assert found["flag"] == "TypeError: pooled=1 must be True or False."
    assert "pooling_width" in found["unknown"]
    assert (found["resolved"], found["dict"]) == ("[3, 4, 5, 6]", "7")
    assert "    pooling_width (whole number >= 2): A setting | of a test.\n" in found["docstring"]


def test_a_new_setting_is_in_the_reference_table(one_more):
    subprocess.run(
        [sys.executable, "docs/settings.py"], check=True, cwd=one_more, env={**os.environ, "PYTHONPATH": str(one_more)}
    )
    rows = (one_more / "docs" / "settings.md").read_text(encoding="utf-8").splitlines()
    assert rows[-2] == (
        "| `pooling_width` | whole number >= 2 | preset `paper`: `3`, for classifiers `4`; preset `iclr2026`: `5`, for "
        r"classifiers `6` | A setting \| of a test. |"
    )
    assert rows[-1] == "| `pooled` | true or false | `false` | A flag of a test. |"


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="needs Axolotl")
def test_a_new_setting_is_in_axolotls_block_schema_and_hints(one_more):
    found = answers(
        one_more,
        {
            "bound": "BaLoraBlock.model_validate({'pooling_width': 1})",
            "given": "BaLoraBlock.model_validate({'pooling_width': 2, 'pooled': True}).regularizers()",
            "no flag": "BaLoraBlock.model_validate({'pooling_width': True})",
            "schema": "__import__('json').dumps(BaLoraBlock.model_json_schema()['properties'])",
            "misspelt": "BaLoraBlock.model_validate({'poling_width': 3})",
            "top level": "BaLoraArgs.model_validate({'adapter': 'ba_lora', 'pooling_width': 3})",
        },
    )
    assert "greater than or equal to 2" in found["bound"]
    assert "pooling_width=2, pooled=True" in found["given"]
    assert "ba_lora.pooling_width: true is no value for it" in found["no flag"]
    schema = json.loads(found["schema"])
    assert schema["pooling_width"]["anyOf"] == [
        {"maximum": 2147483647, "minimum": 2, "type": "integer"},
        {"type": "null"},
    ]
    assert schema["pooling_width"]["description"] == "A setting | of a test."
    assert (schema["pooled"]["type"], schema["pooled"]["default"]) == ("boolean", False)
    assert "ba_lora.poling_width: 3 is not a setting: did you mean pooling_width?" in found["misspelt"]
    assert "write ba_lora.pooling_width." in found["top level"]


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="needs Axolotl")
def test_the_block_is_the_settings_and_the_hosts_own_keys():
    from balora_plugin.hosts.axolotl.block import HOST_KEYS, BaLoraBlock

    assert list(BaLoraBlock.model_fields) == [*settings_of(RegularizerConfig), *HOST_KEYS]


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="needs Axolotl")
def test_a_mapping_to_numbers_in_the_block():
    from balora_plugin.hosts.axolotl.block import BaLoraBlock, of_block

    assert BaLoraBlock(balance={"svd": 1}).regularizers().balance == {"svd": 1.0}
    wrong = {"sdv": 0.1, "svd": True}
    said = [finding.sentence() for finding in of_block({"balance": wrong}, "nlg")]
    assert said == [
        "ba_lora.balance.sdv: 0.1 is not a setting: write some of consistency, diversity, svd there.",
        "ba_lora.balance.svd: true is no value for it: write a number.",
    ]
    (finding,) = of_block({"balance": {"svd": -1}}, "nlg")
    assert "ba_lora.balance.svd: -1" in finding.sentence()


def test_the_reference_table_is_up_to_date():
    made = runpy.run_path(str(ROOT / "docs" / "settings.py"))["page"]()
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == made, "python docs/settings.py writes it anew"


def test_every_setting_is_declared_whole():
    known = settings_of(RegularizerConfig)
    assert list(known) == [field.name for field in fields(RegularizerConfig)]
    for name, each in known.items():
        assert each.help.endswith("."), name
        assert bool(each.choices) == (each.kind == "choice"), name
        assert not each.presets or (each.optional and set(each.presets) == set(PRESETS)), name
        if each.default is not None:
            assert each.checked(name, each.default) == each.default
        for values in each.presets.values():
            assert [each.checked(name, value) for value in values] == list(values)
            if each.only is not None:  # a resolved config may be resolved again
                each.check_family(name, values[each.only.task == "nlg"], "nlu" if each.only.task == "nlg" else "nlg")


@documented
@dataclass
class Sample:
    """What the method itself does not have yet.

    Raises:
        ValueError: out of range.
    """

    share: float = setting("number", 0.5, minimum=0.0, exclusive=True, help="Needed.")
    count: int = setting("integer", 3, minimum=1, exclusive=True, only=Only("nlu", "no"), help="Also needed.")
    free: float | None = setting("number", None, help="Any number.")
    plain: int = 0


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("share", None, TypeError, "share=None must be a number, not NoneType."),
        ("share", 0, ValueError, "share=0 must be a finite number > 0."),
        ("count", 1, ValueError, "count=1 must be > 1."),
        ("free", float("inf"), ValueError, "free=inf must be a finite number."),
    ],
)
def test_bounds_of_other_kinds(name, value, error, words):
    with pytest.raises(error) as caught:
        settings_of(Sample)[name].checked(name, value)
    assert str(caught.value) == words
    assert settings_of(Sample())["free"].checked("free", -1e9) == -1e9


def test_the_docstring_lists_the_settings_before_what_is_raised():
    assert Sample.__doc__ == (
        "What the method itself does not have yet.\n\nArgs:\n    share (number > 0): Needed.\n"
        "    count (whole number > 1): Classifiers only. Also needed.\n    free (number): Any number.\n\n"
        "Raises:\n    ValueError: out of range."
    )


def test_a_subclass_may_give_a_setting_another_default():
    @dataclass
    class Mine(RegularizerConfig):
        lambda_svd: float | None = 0.5
        svd_norm: str | None = None
        preset: str = "iclr2026"

    assert settings_of(Mine).keys() == settings_of(RegularizerConfig).keys()
    assert Mine().lambda_svd == 0.5
    assert Mine().resolved("nlg").svd_norm == "frobenius"
    assert Mine(lambda_svd=None).resolved("nlg").lambda_svd == 0.005
    with pytest.raises(ValueError, match=r"lambda_svd=-1 must be a finite number from 0 to 1e\+06"):
        Mine(lambda_svd=-1)
    with pytest.raises(ValueError, match=r"preset='x' is not known"):
        Mine(preset="x")
