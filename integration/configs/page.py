"""example_configs/README.md: every YAML, with its model, data, method, hardware, and bytes that were counted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .bases import BASES
from .counted import Counted, rounded_up

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "example_configs"
PAGE = EXAMPLES / "README.md"
_INTRODUCTION = """# Examples

One command each: `axolotl train FILE`, or what its first lines say. Data come from the hub; a local copy takes its
place with `path: FILE.jsonl` and `ds_type: json`. Every YAML here is held against Axolotl's own schema and validation,
and trained for two steps with a tiny model of the same architecture over a few rows of the same columns
(`make test-configs`). None but the quickstart's has been run at full size.

*Memory* is what tensors take on one GPU at the fullest moment of a step, counted from the model's shapes by
`balora doctor --config FILE --gpu NAME`'s own estimator (`python -m integration.configs` writes this page), with every
row as long as `sequence_len`; CUDA's own part and fragments (2 to 4 GiB) come on top. Of a base that FSDP or ZeRO-3
splits it is each GPU's part, with two whole layers. Shapes are written from memory; a † says that one of them is not
certain. Images are not counted, and an empty cell was not.
"""
_SECTIONS = {
    "paper": "The paper's models",
    "today": "What people train today",
    ".": "First steps",
    "multi_gpu": "One engine each",
}
_REST = """
## Not for `axolotl train`

| file | what |
|---|---|
| [`paper/with_trl.py`](paper/with_trl.py) | the paper's YAMLs with TRL, methods and ablations by an option |
| [`paper/deepseek_moe_as_native.py`](paper/deepseek_moe_as_native.py) | DeepSeek-MoE-16B as a native class |
| [`trl_llama2_7b_metamath.py`](trl_llama2_7b_metamath.py) | LLaMA-2-7B with TRL, its settings in Python |
"""


def readable(path: Path) -> dict[str, Any]:
    """Returns a YAML's values."""
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def trainings() -> dict[str, dict[str, Any]]:
    """Returns {path below example_configs: values} of the YAMLs that train by themselves."""
    found = {path.relative_to(EXAMPLES).as_posix(): readable(path) for path in sorted(EXAMPLES.rglob("*.yaml"))}
    return {name: values for name, values in found.items() if "base_model" in values}


def others() -> dict[str, str]:
    """Returns {path: first line} of the other YAMLs: sweeps, recipes of GLUE, launch configs."""
    known = trainings()
    found = {}
    for path in sorted(EXAMPLES.rglob("*.yaml")):
        name = path.relative_to(EXAMPLES).as_posix()
        if name not in known:
            found[name] = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    return found


def data_of(values: Mapping[str, Any]) -> str:
    """Returns the names of its datasets, and how many rows of them."""
    cut = re.compile(r"\[:(\d+%?)\]")
    words = []
    for entry in values["datasets"]:
        first = cut.search(str(entry.get("split")))
        part = f" ({entry['name']})" if "name" in entry else ""
        words.append(f"{entry['path']}{part}" + (f", first {first[1]}" if first else ""))
    return "; ".join(words)


def method_of(values: Mapping[str, Any]) -> str:
    """Returns the adapter and what of it is unusual."""
    words = [f"BA-LoRA, r {values['lora_r']}"]
    words += ["4-bit base"] if values.get("load_in_4bit") else []
    words += ["anchors"] if (values.get("ba_lora") or {}).get("anchor_data") else []
    words += [engine for key, engine in (("fsdp_config", "FSDP2"), ("use_ray", "Ray")) if values.get(key)]
    words += [f"ZeRO-{str(values['deepspeed'])[-6]}"] if values.get("deepspeed") else []
    return ", ".join(words)


def hardware_of(name: str) -> str:
    """Returns what the YAML's own header says."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    found = re.search(r"^# Hardware: (.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def page(counts: Mapping[str, Counted | None]) -> str:
    """Returns the page; `counts`: by path, None where nothing was counted."""
    lines = [_INTRODUCTION]
    for folder, title in _SECTIONS.items():
        lines += [
            f"## {title}",
            "",
            "| YAML | model | data | method | hardware | memory |",
            "|---|---|---|---|---|---|",
        ]
        for name, values in trainings().items():
            if (Path(name).parent.as_posix()) == folder:
                lines.append(row(name, values, counts.get(name)))
        lines.append("")
    lines += ["## Sweeps, recipes and launch configs", "", "| YAML | what |", "|---|---|"]
    lines += [f"| [`{name}`]({name}) | {first} |" for name, first in others().items()]
    return "\n".join(lines) + "\n" + _REST


def row(name: str, values: Mapping[str, Any], count: Counted | None) -> str:
    """Returns one line of the table."""
    base = BASES.get(values["base_model"])
    memory = "" if count is None else f"{rounded_up(count.gib)} GiB{'' if base is None or base.certain else ' †'}"
    cells = [f"[`{name}`]({name})", values["base_model"], data_of(values), method_of(values), hardware_of(name), memory]
    return f"| {' | '.join(cells)} |"
