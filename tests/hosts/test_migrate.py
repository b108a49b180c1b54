"""A LoRA's YAML becomes BA-LoRA's by its lines: what it means afterwards, what stays as it was, what is said."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

pytest.importorskip("pydantic")

from balora_plugin.config import RECOMMENDED, RECOMMENDED_RATE
from balora_plugin.hosts.axolotl.migrate import PLUGIN, START, migrate
from balora_plugin.hosts.axolotl.yaml_lines import YamlLines

HEAD = "base_model: some/model\nadapter: lora\nlora_r: 16\nlora_alpha: 32\n"
# what people write: {name: (YAML, what it means afterwards beside what every one becomes)}
WRITTEN = {
    "plain": (HEAD, {}),
    "qlora": (HEAD.replace("lora\n", "qlora\n") + "load_in_4bit: true\n", {"load_in_4bit": True}),
    "qlora by its name alone": (HEAD.replace(": lora", ": qlora"), {"load_in_4bit": True}),
    "8 bit": (HEAD + "load_in_8bit: true\n", {"load_in_8bit": True}),
    "quoted": (HEAD.replace("adapter: lora", 'adapter: "lora"  # a LoRA'), {}),
    "plug-ins in lines": (HEAD + "plugins:\n  - a.B  # mine\n", {"plugins": ["a.B", PLUGIN]}),
    "plug-ins at the margin": (HEAD + "plugins:\n- a.B\n\n# more\nseed: 1\n", {"plugins": ["a.B", PLUGIN]}),
    "plug-ins in brackets": (HEAD + "plugins: [a.B, c.D]  # two\n", {"plugins": ["a.B", "c.D", PLUGIN]}),
    "plug-ins left empty": (HEAD + "plugins:\nseed: 1\n", {"plugins": [PLUGIN]}),
    "cut cross-entropy": (
        HEAD + "plugins:\n  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin\nseed: 1\n",
        {"plugins": [PLUGIN]},
    ),
    "kernels": (
        HEAD + "lora_mlp_kernel: true\nlora_qkv_kernel: true  # fast\nliger_fused_linear_cross_entropy: true\n",
        dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "liger_fused_linear_cross_entropy")),
    ),
    "a rate that is text": (HEAD + "learning_rate: 2e-4 # high\n", {"learning_rate": RECOMMENDED_RATE}),
    "a rate that is low": (HEAD + "learning_rate: 0.00001\n", {"learning_rate": 1e-5}),
    "rsLoRA": (HEAD + "peft_use_rslora: true\n", {"lora_alpha": 32}),
    "a start": (HEAD + "peft_init_lora_weights: gaussian\n", {"peft_init_lora_weights": START}),
    "the ordinary start": (HEAD + "peft_init_lora_weights: true\n", {"peft_init_lora_weights": True}),
    "an output": (HEAD + "output_dir: ./out/\n", {"output_dir": "./out-ba-lora"}),
    "twice": (HEAD.replace("adapter: lora", "adapter: qlora\nadapter: lora"), {}),
    "blocks between": (
        HEAD + "datasets:\n  - path: a/b\n    type: alpaca\n\n# then\nspecial_tokens:\n  pad_token: '#'\n",
        {"special_tokens": {"pad_token": "#"}},
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_yaml_becomes(name):
    text, others = WRITTEN[name]
    before, found = yaml.safe_load(text), migrate(text)
    after = yaml.safe_load(found.text)
    every = {
        "adapter": "ba_lora",
        "ba_lora": RECOMMENDED,
        "plugins": [PLUGIN],
        "lora_alpha": 16,
        "peft_init_lora_weights": START,
    }
    expected = {**before, **every, **others}
    assert after == {key: value for key, value in expected.items() if value is not None}
    assert not found.left
    changed = {change.key.partition(":")[0] for change in found.changes}
    assert changed == {key for key in {**before, **after} if before.get(key) != after.get(key)}
    assert all(change.why for change in found.changes)


@pytest.mark.parametrize("name", WRITTEN)
def test_comments_and_order_stay(name):
    text, _ = WRITTEN[name]
    new = migrate(text).text
    assert all(line.rpartition("# ")[2] in new for line in text.splitlines() if "# " in line)
    kept = [line for line in text.splitlines() if line and line in new.splitlines()]
    assert kept == sorted(kept, key=new.splitlines().index)


def test_what_is_superseded_stays_as_a_comment_that_says_why():
    text, _ = WRITTEN["kernels"]
    lines = migrate(text).text.splitlines()
    at = lines.index("# lora_qkv_kernel: true  # fast")
    assert lines[at - 1].startswith("# superseded: the adapter's own layers")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("rl: dpo", "rl"),
        ("peft_use_dora: true", "peft_use_dora"),
        ("lora_model_dir: ./old", "lora_model_dir"),
        ("tensor_parallel_size: 2", "tensor_parallel_size"),
        ("peft: {loftq_config: {loftq_bits: 4}}", "peft.loftq_config"),
    ],
)
def test_what_would_train_something_else_is_left_and_named(line, key):
    found = migrate(HEAD + line + "\n")
    assert line in found.text.splitlines()
    assert [finding.key for finding in found.left] == [key]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base_model: a\n", "no adapter: line: migrate takes"),
        (HEAD.replace(": lora", ": ia3"), "adapter: ia3: migrate takes"),
        (HEAD.replace(": lora", ": ba_lora"), "ba_lora is there already"),
        (HEAD + "ba_lora: {}\n", "a ba_lora: block beside adapter"),
        ("- a\n", "no YAML mapping"),
        ("a: [\n", "it is no YAML"),
        ("{adapter: lora, lora_r: 8, lora_alpha: 8}\n", "adapter: has no line of its own"),
        (HEAD.replace("adapter: lora", "adapter:\n  lora"), "adapter: its value is no scalar on one line"),
        (HEAD + "plugins: &p [a.B]\nx: *p\n", "x: cannot be edited by lines here"),
        (HEAD + "plugins: a.B\n", r"plugins: a.B is no list: write plugins: \[a.B\]"),
    ],
)
def test_what_cannot_be_migrated_says_what_to_do(text, words):
    with pytest.raises(ValueError, match=words):
        migrate(text)


def test_a_comment_at_the_margin_belongs_to_what_follows_it():
    lines = YamlLines("a:\n  - b\n# of c\nc: 1\n")
    lines.add(["d: 2"], after="a")
    assert lines.text == "a:\n  - b\nd: 2\n# of c\nc: 1\n"


def installed():
    """The LoRA and QLoRA examples inside an installed Axolotl."""
    found = find_spec("axolotl")
    root = Path(next(iter(found.submodule_search_locations))) if found is not None else Path("/nowhere")
    files = [path for path in root.rglob("*.y*ml") if "adapter:" in path.read_text(encoding="utf-8")]
    values = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}
    return [path for path in files if values[path].get("adapter") in ("lora", "qlora")]


@pytest.mark.skipif(find_spec("axolotl") is None, reason="needs Axolotl")
def test_axolotls_own_examples():
    for path in installed():
        text = path.read_text(encoding="utf-8")
        after = yaml.safe_load(migrate(text).text)
        assert after["adapter"] == "ba_lora" and PLUGIN in after["plugins"], path
