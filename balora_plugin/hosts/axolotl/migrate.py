"""A LoRA or QLoRA YAML rewritten for BA-LoRA by its lines: what was changed and why, and what is left to decide."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...config import RECOMMENDED, RECOMMENDED_RATE
from ...findings import Finding
from .block import ADAPTER
from .refusals import refused
from .superseded import CUT_CROSS_ENTROPY, asked
from .yaml_lines import YamlLines

PLUGIN = "balora_plugin.BaLoraPlugin"
START = "pissa"
_STARTS = (START, "pissa_fast", "pissa_exact", True)


class Change(NamedTuple):
    """One key that was changed: what it was, what it is now, and why."""

    key: str
    old: Any
    new: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}  ({self.why})"


@dataclass
class Migrated:
    """A migrated YAML.

    Attributes:
        text: What to write.
        changes: What was changed, in order.
        left: What still would not train, or would train something else: yours to decide.
    """

    text: str
    changes: list[Change] = field(default_factory=list)
    left: list[Finding] = field(default_factory=list)


def migrate(text: str) -> Migrated:
    """Returns a LoRA or QLoRA YAML with BA-LoRA's adapter, plug-in, start, terms, alpha and learning rate.

    Raises:
        ValueError: it is no YAML of such a run, already one of BA-LoRA's, or written so that lines cannot be edited.
    """
    yaml = YamlLines(text)
    _check(yaml.values)
    changes: list[Change] = []
    for step in (_adapter, _plugins, _scale, _rate, _start, _superseded, _terms, _output):
        changes += step(yaml)
    found = yaml.meaning()
    _check_meaning(yaml.values, found, changes)
    return Migrated(yaml.text, changes, list(_left(found)))


def _check(values: dict[str, Any]) -> None:
    adapter = values.get("adapter")
    if adapter == ADAPTER:
        raise ValueError("adapter: ba_lora is there already: nothing to migrate.")
    if adapter not in ("lora", "qlora"):
        said = f"adapter: {adapter}" if adapter else "no adapter: line"
        raise ValueError(f"{said}: migrate takes a LoRA or QLoRA YAML (adapter: lora or qlora). Start from init.")
    if "ba_lora" in values:
        raise ValueError("a ba_lora: block beside adapter: lora or qlora: write adapter: ba_lora by hand.")


def _adapter(yaml: YamlLines) -> list[Change]:
    old = yaml.values["adapter"]
    yaml.replace("adapter", ADAPTER)
    why = "LoRA in delta form, with the terms"
    changes = [Change("adapter", old, ADAPTER, f"{why}; 4 bit stays by load_in_4bit" if old == "qlora" else why)]
    if old == "qlora" and not yaml.values.get("load_in_4bit"):
        if "load_in_4bit" in yaml.values:
            yaml.replace("load_in_4bit", "true")
        else:
            yaml.add(["load_in_4bit: true"], after="adapter")
        changes.append(Change("load_in_4bit", yaml.values.get("load_in_4bit"), True, "what adapter: qlora meant"))
    return changes


def _plugins(yaml: YamlLines) -> list[Change]:
    old = yaml.values.get("plugins")
    if isinstance(old, str):
        raise ValueError(f"plugins: {old} is no list: write plugins: [{old}].")
    if PLUGIN in (old or []):
        return []
    if "plugins" in yaml.values:
        yaml.append_to_list("plugins", PLUGIN)
    else:
        yaml.add(["plugins:", f"  - {PLUGIN}"], after="adapter")
    return [Change("plugins", old, [*(old or []), PLUGIN], "Axolotl discovers no plug-ins by itself")]


def _scale(yaml: YamlLines) -> list[Change]:
    rank, alpha = yaml.values.get("lora_r"), yaml.values.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or alpha == rank:
        return []
    if yaml.values.get("peft_use_rslora"):  # whose scaling is another one
        return []
    yaml.replace("lora_alpha", str(rank))
    why = f"alpha = r as in the paper; with {alpha} each step moves the weights {(alpha / rank) ** 0.5:.2g} x as far"
    return [Change("lora_alpha", alpha, rank, why)]


def _rate(yaml: YamlLines) -> list[Change]:
    try:  # YAML reads 2e-4 as text, and Axolotl as a number
        rate = float(yaml.values.get("learning_rate") or 0)
    except (TypeError, ValueError):
        return []
    if rate <= RECOMMENDED_RATE:
        return []
    yaml.replace("learning_rate", rate_in_yaml(), f"was {yaml.values['learning_rate']}, a LoRA's")
    why = "a PiSSA start moves the weights further at the same rate (docs/choose.md)"
    return [Change("learning_rate", yaml.values["learning_rate"], RECOMMENDED_RATE, why)]


def rate_in_yaml() -> str:
    """Returns the recommended learning rate as YAML reads a number: 5e-05 would be text."""
    return f"{RECOMMENDED_RATE:.10f}".rstrip("0")


def _start(yaml: YamlLines) -> list[Change]:
    old = yaml.values.get("peft_init_lora_weights")
    if old in _STARTS:
        return []
    if "peft_init_lora_weights" in yaml.values:
        yaml.replace("peft_init_lora_weights", START)
    else:
        yaml.add([f"peft_init_lora_weights: {START}"], after="lora_alpha" if "lora_alpha" in yaml.values else "adapter")
    why = "starts at the leading singular directions, found by an iteration: minutes on large models"
    return [Change("peft_init_lora_weights", old, START, why)]


def _superseded(yaml: YamlLines) -> list[Change]:
    changes = []
    for key, value, instead in asked(yaml.values):
        if key.startswith("plugins: "):
            yaml.drop_item("plugins", CUT_CROSS_ENTROPY, f"superseded: {instead}")
        else:
            yaml.comment_out(key, f"superseded: {instead}")
        changes.append(Change(key, value, None, f"superseded: {instead}"))
    return changes


def _terms(yaml: YamlLines) -> list[Change]:
    yaml.add(["ba_lora:", *(f"  {key}: {value:g}" for key, value in RECOMMENDED.items())], after="adapter")
    return [Change("ba_lora", None, dict(RECOMMENDED), "the terms; 0 switches one off (docs/choose.md)")]


def _output(yaml: YamlLines) -> list[Change]:
    old = yaml.values.get("output_dir")
    if not isinstance(old, str):
        return []
    new = f"{old.rstrip('/')}-ba-lora"
    yaml.replace("output_dir", new)
    return [Change("output_dir", old, new, "the earlier run's checkpoints are of another adapter")]


def _check_meaning(before: dict[str, Any], after: dict[str, Any], changes: list[Change]) -> None:
    """Refuses an edit that the YAML's own form has made something else of: an anchor, a second line of a key."""
    expected = dict(before)
    for key, _, new, _ in changes:
        if key.startswith("plugins: "):
            expected["plugins"] = [name for name in expected["plugins"] if not str(name).endswith(CUT_CROSS_ENTROPY)]
        elif new is None:
            expected.pop(key)
        else:
            expected[key] = new
    wrong = [key for key in {**expected, **after} if expected.get(key) != after.get(key)]
    if wrong:
        raise ValueError(f"{wrong[0]}: cannot be edited by lines here (an anchor, or a key twice): change it by hand.")


def _left(values: dict[str, Any]) -> list[Finding]:
    found = list(refused(values))
    if values.get("lora_model_dir"):
        why = "holds a LoRA, and BA-LoRA goes on from an adapter of its own alone"
        found.append(Finding("lora_model_dir", values["lora_model_dir"], why, "merge it into the base first", True))
    for key in ("lora_r", "lora_alpha"):
        if not values.get(key):
            found.append(Finding(key, None, "is missing, adapter: ba_lora needs it", f"write for example {key}: 16"))
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "(none)"
    return str(value).lower() if isinstance(value, bool) else str(value)
