"""The section of a model card (README.md) that says what a BA-LoRA adapter is, for which base, and what to do with it.

A marked block of text: hosts write cards of their own and update each other's, so the rest of the file, its metadata
included, is left as it stands, but for the tag `ba-lora`.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import BitsAndBytesConfig

from ...pretrained.backbone import is_multimodal_class
from ...weights.in_words import terms_in_words
from ..config import BaLoraConfig
from ..delta import delta_layers_of
from ..kinds import names_of, what_is_adapted
from . import provenance

TAG = "ba-lora"
CITATION = """```bibtex
@inproceedings{chang2026balora,
  title = {{BA-LoRA}: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance
           in Large Language Models},
  author = {Chang, Yupeng and Chang, Yi and Wu, Yuan},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year = {2026},
  url = {https://arxiv.org/abs/2408.04556},
}
```"""
START, END = "<!-- ba-lora -->", "<!-- /ba-lora -->"
VLLM_DEFAULT_RANK = 16
_HUB_LINK = re.compile(r"\[([^\]\n]*)\]\(https://huggingface\.co/([^)\n]*)\)")


def update(directory: str, model: PeftModel) -> None:
    """Writes or replaces the section in `directory`'s README.md, and tags it; none without a BA-LoRA adapter."""
    ours = {name: config for name, config in model.peft_config.items() if isinstance(config, BaLoraConfig)}
    path = Path(directory, "README.md")
    if not ours or not path.exists():
        return
    parts = [section(model, name, config, heading=len(ours) > 1) for name, config in ours.items()]
    base = next(iter(ours.values())).base_model_name_or_path
    text = naming_a_local_base(path.read_text(encoding="utf-8"), base)
    parts += _measured(model)
    text = with_section(text, "\n\n".join(["## BA-LoRA adapter", *parts, f"### Cite the method\n\n{CITATION}"]))
    path.write_text(text, encoding="utf-8")
    add_tags(directory, [TAG])


def _measured(model: PeftModel) -> list[str]:
    """Returns what the run of this model has measured last, as a part of the section; nothing before it has."""
    found = provenance.known(model)
    if found is None or not found.measured:
        return []
    rows = [f"| `{key}` | {value:.6g} |" for key, value in found.measured.items()]
    return ["\n".join(["### Measured last in training", "", "| log key | value |", "|---|---|", *rows])]


def tags_of(directory: str) -> list[str]:
    """Returns the tags of `directory`'s README.md, none if there is no such file."""
    path = Path(directory, "README.md")
    return list(ModelCard.load(path).data.tags or []) if path.exists() else []


def add_tags(directory: str, tags: list[str]) -> None:
    """Puts back what PEFT leaves out when it updates a host's card: it keeps the model's own tags alone."""
    path = Path(directory, "README.md")
    found = ModelCard.load(path)
    missing = [tag for tag in tags if tag not in (found.data.tags or [])]
    if missing:
        found.data.tags = sorted({*(found.data.tags or []), *missing})
        found.save(path)


def naming_a_local_base(card: str, base: str | None) -> str:
    """Returns a host's `card` with the base that is no repository of the hub named, not linked to a page of None.

    TRL writes `[None](https://huggingface.co/None)` for a directory, other hosts a link to its path.
    """

    def named(link: re.Match[str]) -> str:
        text, target = link.groups()
        if text != target or not (text == "None" or os.path.isdir(text)):
            return link[0]
        return f"`{base}`" if base else "a model without a name"

    return _HUB_LINK.sub(named, card)


def with_section(card: str, section: str) -> str:
    """Returns `card` with our block: in the place of an earlier one, else before its first second-level heading."""
    block = f"{START}\n{section}\n{END}"
    present = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    if present.search(card):
        return present.sub(lambda _: block, card, count=1)
    lines = card.splitlines()
    at = _first_heading(lines)
    before, after = lines[:at], lines[at:]
    return "\n".join([*before, *([""] if before and before[-1] else []), block, "", *after]).rstrip("\n") + "\n"


def _first_heading(lines: list[str]) -> int:
    """Returns the line of the first `## ` heading outside front matter, code and comments; the end if there is none."""
    fenced = comment = False
    front = bool(lines) and lines[0].strip() == "---"
    for number, line in enumerate(lines):
        if front:
            front = number == 0 or line.strip() != "---"
            continue
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if "<!--" in line and not fenced:
            comment = True
        if not fenced and not comment and line.startswith("## "):
            return number
        if "-->" in line:
            comment = False
    return len(lines)


def section(model: PeftModel, adapter_name: str, config: BaLoraConfig, *, heading: bool = False) -> str:
    """Returns the section's text for one adapter."""
    from ..._version import __version__

    found = provenance.known(model)
    identity = None if found is None else found.identity
    base = config.base_model_name_or_path or "BASE"
    ranks = sorted({layer.r[adapter_name] for _, layer in delta_layers_of(model, adapter_name)}) or [config.r]
    factor = 2 if config.delta else 1
    rank = factor * ranks[-1]
    start = f"start `{config.init_lora_weights}`, in delta form" if config.delta else "ordinary LoRA start"
    file_rank = f"{rank}, twice the trained rank {ranks[-1]}" if config.delta else f"{rank}"
    if len(ranks) > 1:
        file_rank += f" (smallest layer: {factor * ranks[0]})"
    trained = type(model.get_base_model()).__name__
    adapted = what_is_adapted(model, adapter_name)
    rows = [
        ("base model", f"`{base}`"),
        ("class", f"`{trained}`, whose names the adapter's layers have"),
        ("SHA-256 of the base", "not recorded" if identity is None else f"`{identity.sha256}` ({identity.dtype})"),
        ("quantised in training", quantisation_in_words(identity.quantization if identity else None)),
        ("method", f"BA-LoRA, {start} (balora-plugin {__version__})"),
        ("terms in force", terms_in_words(config.regularizers.resolved(config.family))),
        ("teacher", (found.teacher if found else None) or "the base itself, adapter switched off"),
        ("rank of the file", file_rank),
        ("adapts", names_of(adapted.kinds)),
        ("leaves out", names_of(adapted.left_out) or "no linear layer but the head"),
    ]
    labels = model.get_base_model().config.num_labels if config.family == "nlu" else None
    place = "." if adapter_name == "default" else adapter_name
    flag = f"`max_lora_rank` >= {rank} (vLLM: `--max-lora-rank {rank}`; its default is {VLLM_DEFAULT_RANK})"
    smaller = f"--rank {VLLM_DEFAULT_RANK}" if rank > VLLM_DEFAULT_RANK else "--rank auto --max-error 0.05"
    commands = [f"balora export {place} --output smaller {smaller}"]
    if labels is None:  # these run a causal language model
        on_base = f"--base {shlex.quote(base)}"
        commands = [
            f"balora verify {place} {on_base}    # is this the base it was trained on?",
            f"{commands[0]} {on_base}    # prints what is lost",
            f"balora export {place} --output merged --merge {on_base}",
        ]
    return "\n".join(
        [
            *([f"### Adapter `{adapter_name}`, in `{place}`", ""] if heading else []),
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "This is an ordinary LoRA for the *original* base model, whose weights were not changed. "
            f"Servers need {flag}.",
            "",
            *loading_snippet(base, place, labels, identity.quantization if identity else None, trained),
            "",
            "```",
            *commands,
            "```",
        ]
    )


def loader_of(trained: str | None) -> str:
    """Returns the auto class that gives a language model of the class `trained`, None where that is not recorded."""
    return "AutoModelForImageTextToText" if is_multimodal_class(trained) else "AutoModelForCausalLM"


def loading_snippet(
    base: str,
    place: str,
    labels: int | None = None,
    quantization: dict[str, Any] | None = None,
    trained: str | None = None,
) -> list[str]:
    """Returns how unmodified PEFT loads an adapter, in lines.

    `labels`: of a classifier with so many outputs. `quantization`: of the base that was trained on, as
    `base_quantization` of ba_lora.json has it: the adapter belongs to those weights. `trained`: the class of the base.
    """
    loader = loader_of(trained) if labels is None else "AutoModelForSequenceClassification"
    settings = _bitsandbytes_settings(quantization)
    arguments = [f'"{base}"', *([] if labels is None else [f"num_labels={labels}"])]
    if settings is None:
        imports, made = loader, []
    else:
        imports, made = f"{loader}, BitsAndBytesConfig", [f"quantization = BitsAndBytesConfig({settings})"]
        arguments.append("quantization_config=quantization")
    if quantization is not None and quantization.get("experts"):
        made.append("# training had its fused experts quantised too; full-precision ones are near, not the same")
    return [
        "```python",
        "from peft import PeftModel",
        f"from transformers import {imports}",
        "",
        *made,
        f"base = {loader}.from_pretrained({', '.join(arguments)})",
        f'model = PeftModel.from_pretrained(base, "{place}")  # this directory',
        "```",
    ]


def _bitsandbytes_settings(quantization: dict[str, Any] | None) -> str | None:
    """Returns the arguments of BitsAndBytesConfig that are not at their default; None for what it does not make."""
    if quantization is None or quantization.get("quant_method") != "bitsandbytes":
        return None
    neutral = BitsAndBytesConfig().to_dict()
    chosen = {key: value for key, value in quantization.items() if key in neutral and neutral[key] != value}
    return ", ".join(f"{key}={value!r}" for key, value in sorted(chosen.items()) if not key.startswith("_"))


def quantisation_in_words(values: dict[str, Any] | None) -> str:
    """Returns a quantisation in words."""
    if values is None:
        return "no"
    experts = values.get("experts")
    beside = "" if experts is None else f"; fused experts {_bits_in_words(**experts)}"
    if values.get("load_in_4bit"):
        linear = _bits_in_words(4, values.get("bnb_4bit_quant_type"), values.get("bnb_4bit_use_double_quant"))
        return f"bitsandbytes {linear}{beside}"
    if values.get("load_in_8bit"):
        return f"bitsandbytes {_bits_in_words(8)}{beside}"
    return f"{values.get('quant_method', 'yes')}{beside}"


def _bits_in_words(bits: int, quant_type: str | None = None, double_quant: bool | None = None) -> str:
    double = ", double quantisation" if double_quant else ""
    return "8-bit" if bits == 8 else f"4-bit ({quant_type}{double})"
