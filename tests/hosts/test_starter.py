"""init, migrate and schema answer without Axolotl and torch, and what they write is what the plug-in takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("pydantic")
pytest.importorskip("click")

from balora_plugin import commands
from balora_plugin.adapter.config import DELTA_STARTS
from balora_plugin.config import RECOMMENDED, RECOMMENDED_RATE, RegularizerConfig
from balora_plugin.hosts.axolotl import migrate
from balora_plugin.hosts.axolotl.block import BaLoraBlock
from balora_plugin.hosts.axolotl.migrate import rate_in_yaml
from balora_plugin.training.first_norms import FAR, LORAS

LORA = "base_model: a/b\nadapter: lora  # mine\nlora_r: 8\nlora_alpha: 16\n"


def balora(*words):
    return commands.main(["axolotl", *map(str, words)])


def test_nothing_heavy_is_imported(tmp_path):
    (tmp_path / "a.yml").write_text(LORA)
    code = (
        "import sys\n"
        "from balora_plugin.commands import main\n"
        f"assert main(['axolotl', 'init', {str(tmp_path / 'b.yml')!r}]) == 0\n"
        f"assert main(['axolotl', 'migrate', {str(tmp_path / 'a.yml')!r}]) == 0\n"
        "assert main(['axolotl', 'schema']) == 0\n"
        "print([name for name in ('torch', 'axolotl', 'transformers', 'peft', 'trl') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_starter_has_the_recommended_setting_and_names_its_schema(tmp_path, capsys):
    path = tmp_path / "run.yml"
    assert balora("init", path) == 0
    values, first = yaml.safe_load(path.read_text()), path.read_text().splitlines()[0]
    block = BaLoraBlock.model_validate(values["ba_lora"])
    assert {key: getattr(block, key) for key in RECOMMENDED} == RECOMMENDED
    assert values["learning_rate"] == RECOMMENDED_RATE and values["lora_alpha"] == values["lora_r"]
    assert values["peft_init_lora_weights"] == "pissa"
    assert first == "# yaml-language-server: $schema=run.schema.json"
    schema = json.loads((tmp_path / "run.schema.json").read_text())
    assert schema["properties"]["ba_lora"]["properties"].keys() == BaLoraBlock.model_fields.keys()
    assert balora("init", path) == 2
    assert "pass --force" in capsys.readouterr().err


def test_a_schema_takes_no_file_of_the_users_place(tmp_path, capsys):
    config = tmp_path / "run.yml"
    config.write_text(LORA)
    assert balora("schema", config) == 2 and f"{config} exists" in capsys.readouterr().err
    assert config.read_text() == LORA
    config.with_suffix(".schema.json").write_text("{}")
    config.unlink()
    assert balora("init", config) == 2 and "run.schema.json exists" in capsys.readouterr().err
    assert not config.exists()
    assert balora("init", config, "--force") == 0
    config.unlink()
    assert balora("init", config) == 0  # the schema of an earlier one is nobody's work
    assert balora("schema", config, "--force") == 0 and json.loads(config.read_text())


def test_the_recommended_setting_is_one_of_ours():
    assert set(RECOMMENDED) == {name for name in RegularizerConfig().to_dict() if name.startswith("lambda_")}
    RegularizerConfig(**RECOMMENDED)


def test_migrate_writes_beside_and_says_what_it_did(tmp_path, capsys):
    path = tmp_path / "lora.yaml"
    path.write_text(LORA + "rl: dpo\n")
    assert balora("migrate", path) == 1  # what is left would train something else
    said = capsys.readouterr().out
    assert "adapter: lora -> ba_lora" in said and "lora_alpha: 16 -> 8" in said and "left to you: rl: dpo" in said
    assert path.read_text() == LORA + "rl: dpo\n"
    assert "adapter: ba_lora  # mine" in (tmp_path / "lora.ba_lora.yaml").read_text()
    path.write_text(LORA)
    assert balora("migrate", path) == 2 and "exists" in capsys.readouterr().err
    assert balora("migrate", path, "--output", tmp_path / "other.yml") == 0
    assert balora("migrate", tmp_path / "other.yml", "--force") == 2
    assert "nothing to migrate" in capsys.readouterr().err


def test_the_page_about_choosing_says_the_same():
    page = (Path(__file__).parents[2] / "docs" / "choose.md").read_text(encoding="utf-8")
    chosen = page.partition("## The setting to begin with")[2]
    for key, value in {**RECOMMENDED, "learning_rate": float(rate_in_yaml())}.items():
        row = next(line for line in chosen.splitlines() if line.startswith("| ") and f"`{key}`" in line.split("|")[1])
        assert float(row.split("|")[2].strip(" `")) == value
    assert f"{LORAS * RECOMMENDED_RATE:.0e}".replace("e-0", "e-") in page
    assert FAR == 3 and "three times the clip" in page


def test_the_starts_that_migrate_keeps_are_all_there_are():
    """It imports no torch, which the list itself comes with."""
    assert set(migrate._STARTS) == {*DELTA_STARTS, True}
