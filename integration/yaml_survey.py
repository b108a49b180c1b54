"""Which of a folder's YAMLs train with the three lines that README asks for, and why the others do not.

    python -m integration.yaml_survey FOLDER_OR_FILE... [--from DIRECTORY]

Each LoRA or QLoRA SFT YAML that plain Axolotl validates is given `plugins`, `adapter: ba_lora` and `ba_lora:`, and goes
through register, validation and the checks before loading, on a machine that is pretended to have a GPU. No weights, no
data, no network: the models' configs are transformers' own of the same type, by the table `MODELS`. Without a folder
the examples are taken that the installed Axolotl has.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import axolotl
import torch
import yaml
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from transformers import AutoConfig

from balora_plugin.findings import Finding
from balora_plugin.hosts.axolotl import kbit, superseded
from balora_plugin.hosts.axolotl import model_config as checked
from balora_plugin.hosts.axolotl.plugin import BaLoraPlugin
from balora_plugin.pretrained import attention

PLUGIN = "balora_plugin.BaLoraPlugin"
OURS = {"adapter": "ba_lora", "ba_lora": {"preset": "paper"}}
CAPABILITIES = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}

# base_model -> the type of its config, and how its files are quantised; the first that fits is taken
MODELS: tuple[tuple[str, str, str | None], ...] = (
    (r"gpt-oss.*dequantized", "gpt_oss", None),
    (r"gpt-oss", "gpt_oss", "mxfp4"),
    (r"GPTQ", "llama", "gptq"),
    (r"MiniMax-M2", "mixtral", "fp8"),
    (r"Llama-3.1-405B-BNB", "llama", "bitsandbytes_4bit"),
    (r"Llama-4", "llama4", "bitsandbytes_4bit"),
    (r"DeepSeek-V2.5-bnb", "deepseek_v2", "bitsandbytes_4bit"),
    (r"Qwen3-Next.*NVFP4", "qwen3_next", "modelopt"),
    (r"Qwen3-30B-A3B-NVFP4", "qwen3_moe", "modelopt"),
    (r"[Gg]emma-4-26B-A4B-NVFP4", "gemma4", "modelopt"),
    (r"DeepSeek-V4", "deepseek_v3", "modelopt"),
    (r"GLM-5.2-NVFP4", "glm4_moe", "modelopt"),
    (r"Qwen3\.5-(35B|122B)", "qwen3_5_moe", None),
    (r"Qwen3\.5", "qwen3_5", None),
    (r"Qwen2\.5-VL", "qwen2_5_vl", None),
    (r"Qwen2-VL", "qwen2_vl", None),
    (r"Qwen3-VL", "qwen3_vl", None),
    (r"[Gg]emma-4", "gemma4", None),
    (r"[Gg]emma-3n", "gemma3n", None),
    (r"[Gg]emma-3-(4|12|27)b", "gemma3", None),
    (r"Ministral-3|Mistral-Small-[34]|Mistral-Medium-3\.5|Magistral-Small-2509", "mistral3", None),
    (r"Voxtral", "voxtral", None),
    (r"pixtral", "llava", None),
    (r"llava-1.5", "llava", None),
    (r"Llama-3\.2-11B-Vision", "mllama", None),
    (r"GLM-4\.6V", "glm4v", None),
    (r"InternVL", "internvl", None),
    (r"LFM2-VL", "lfm2_vl", None),
    (r"SmolVLM", "smolvlm", None),
    (r"PaddleOCR-VL", "paddleocr_vl", None),
    (r"[Mm]ixtral", "mixtral", None),
    (r"pythia|gpt-neox", "gpt_neox", None),
    (r"[Qq]wen3-(30B|Coder-30B)", "qwen3_moe", None),
    (r"[Qq]wen3-Next", "qwen3_next", None),
    (r"[Qq]wen3", "qwen3", None),
    (r"[Qq]wen", "qwen2", None),
    (r"[Gg]emma-2", "gemma2", None),
    (r"[Gg]emma-3", "gemma3_text", None),
    (r"[Gg]emma", "gemma", None),
    (r"[Mm]istral", "mistral", None),
)


class Outcome(NamedTuple):
    """What became of one YAML.

    Attributes:
        path: The file.
        state: accepted, superseded (accepted, with keys switched off), refused, or why it is not counted.
        reasons: Of a refusal all of them; of a YAML that is not counted why.
        switched_off: The keys that are.
    """

    path: Path
    state: str
    reasons: tuple[Finding, ...] = ()
    switched_off: tuple[str, ...] = ()


COUNTED = ("accepted", "superseded", "refused")


def with_our_lines(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a YAML with the three lines of README in it."""
    plugins = [name for name in values.get("plugins") or [] if name != PLUGIN]
    return {**copy.deepcopy(values), "plugins": [PLUGIN, *plugins], **OURS}


def look_at(path: Path) -> Outcome:
    """Returns what becomes of one YAML."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    reason = "no LoRA" if not isinstance(values, dict) else _not_counted(values)
    if reason:
        return Outcome(path, reason)
    if values["adapter"] != "ba_lora":
        try:
            validated(values)
        except Exception as error:
            return Outcome(path, "invalid in plain Axolotl", (_other(error),))
        values = with_our_lines(values)
    off = tuple(key for key, _, _ in superseded.asked(values))
    try:
        validated(values)
    except Exception as error:
        found = getattr(error, "findings", ())
        return Outcome(path, "refused", found or (_other(error),), off)
    return Outcome(path, "superseded" if off else "accepted", (), off)


def _not_counted(values: dict[str, Any]) -> str:
    if values.get("adapter") not in ("lora", "qlora", "ba_lora"):
        return "no LoRA"
    kind = str(values.get("model_type") or values.get("type_of_model") or "")
    if any(values.get(key) for key in ("rl", "reward_model", "process_reward_model")) or "Classification" in kind:
        return "no SFT"
    return ""


def validated(values: dict[str, Any]) -> DictDefault:
    """Returns what Axolotl's own steps make of a YAML: register, validation, what comes before loading.

    Raises:
        ValueError: of Axolotl's validation, or of ours.
    """
    manager = PluginManager.get_instance()
    cfg = DictDefault(copy.deepcopy(values))
    with mock.patch.object(manager, "plugins", type(manager.plugins)()):
        for name in cfg.get("plugins") or []:
            manager.register(name)
        for plugin in manager.plugins.values():
            plugin.register(cfg)
        version = str(torch.__version__).partition("+")[0]
        cfg = validate_config(cfg, capabilities=CAPABILITIES, env_capabilities={"torch_version": version})
        cfg.output_dir = None  # no run is begun there
        cfg.bf16 = True if cfg.get("bf16") == "auto" else cfg.get("bf16")
        for plugin in manager.plugins.values():
            if isinstance(plugin, BaLoraPlugin):
                plugin.pre_model_load(cfg)
    return cfg


def _other(error: BaseException) -> Finding:
    """An error of another part as a finding: its kind, and the line that tells most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower() and not line.startswith(("For further", "1 validation"))]
    return Finding(type(error).__name__, None, (told or lines or [""])[0][:200])


def config_of(cfg: Any) -> Any:
    """A config of the same type as the base model's; a plain decoder's where the table has none."""
    name = str(cfg.get("base_model_config") or cfg.get("base_model"))
    kind, quantised = next(((kind, how) for pattern, kind, how in MODELS if re.search(pattern, name)), ("llama", None))
    config = AutoConfig.for_model(kind)
    if quantised:
        method, _, bits = quantised.partition("_")
        config.quantization_config = {"quant_method": method, **({f"load_in_{bits}": True} if bits else {})}
    return config


@contextlib.contextmanager
def pretended(directory: Path) -> Iterator[None]:
    """A machine with a GPU and every package, in `directory`, from which relative paths count."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        with (
            mock.patch.object(attention, "accelerator", return_value="cuda"),
            mock.patch.object(attention, "importable", return_value=True),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
            mock.patch.object(kbit, "load_model_config", config_of),
            mock.patch.object(checked, "load_model_config", config_of),
            mock.patch.object(sys, "argv", ["axolotl"]),
        ):
            yield
    finally:
        os.chdir(before)


def yamls(places: list[Path]) -> list[Path]:
    """Returns the YAML files that are named, or lie anywhere below a named folder."""
    found = [[place] if place.is_file() else sorted(place.rglob("*.y*ml")) for place in places]
    return [path.resolve() for paths in found for path in paths]


def survey(places: list[Path], directory: Path | None = None) -> list[Outcome]:
    """Looks at every YAML of `places`; relative paths in them count from `directory` (theirs, if it is None)."""
    outcomes = []
    for path in yamls(places):
        with pretended(directory or path.parent):
            outcomes.append(look_at(path))
    return outcomes


def report(outcomes: list[Outcome]) -> str:
    """Returns a line for each YAML, the reasons with how many YAMLs have them, and the counts."""
    counted = [outcome for outcome in outcomes if outcome.state in COUNTED]
    lines = []
    for outcome in counted:
        lines.append(f"{outcome.state:10} {outcome.path}")
        lines += [f"{'':11}{key} is switched off" for key in outcome.switched_off]
        lines += [f"{'':11}{reason.sentence()}" for reason in outcome.reasons]
    lines += ["", "reasons of refusals:"]
    reasons = Counter(reason for outcome in counted for reason in set(map(_reason, outcome.reasons)))
    lines += [f"{count:5} {key}" for key, count in reasons.most_common()]
    lines += ["", "switched off:"]
    lines += [f"{n:5} {key}" for key, n in Counter(k for o in counted for k in o.switched_off).most_common()]
    rest = Counter(outcome.state for outcome in outcomes if outcome.state not in COUNTED)
    lines += ["", "not counted: " + (", ".join(f"{state} {count}" for state, count in rest.items()) or "none")]
    by_state = Counter(outcome.state for outcome in counted)
    works = by_state["accepted"] + by_state["superseded"]
    lines += [f"{works} of {len(counted)} work: " + ", ".join(f"{state} {by_state[state]}" for state in COUNTED)]
    return "\n".join(lines)


def _reason(finding: Finding) -> str:
    """What several YAMLs have in common: the key, of a base model what is wrong with it."""
    return (
        f"base_model {finding.why.partition(', ')[0].partition(' (')[0]}"
        if finding.key == "base_model"
        else finding.key
    )


def main(arguments: list[str] | None = None) -> None:
    """Prints the survey of the folders and files that are named."""
    parser = argparse.ArgumentParser(prog="python -m integration.yaml_survey", description=__doc__.split("\n")[0])
    parser.add_argument("places", nargs="*", type=Path, default=[Path(axolotl.__file__).parent])
    parser.add_argument("--from", dest="directory", type=Path, help="where relative paths in the YAMLs count from")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    print(report(survey(options.places, options.directory)))


if __name__ == "__main__":
    main()
