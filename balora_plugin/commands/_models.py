"""What the subcommands share: loading a base model, sizes for people."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
CLASSES = {  # by an adapter's task type; of others the head is new, and no part of the base
    "CAUSAL_LM": ("AutoModelForCausalLM", "causal language model"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "model for sequence classification"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "sequence-to-sequence model"),
    "FEATURE_EXTRACTION": ("AutoModel", "model"),
}
MULTIMODAL = ("AutoModelForImageTextToText", "multimodal language model")


def torch_dtype(name: str) -> Any:
    """Returns torch's dtype of this name: "bfloat16" -> torch.bfloat16."""
    import torch

    return getattr(torch, name)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' warnings from a user, who reads our own lines; errors of theirs still show."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def load_base(
    name: str,
    dtype: str,
    quantization: dict[str, Any] | None = None,
    task: str = "CAUSAL_LM",
    instead: str = "compare with the full-precision base by --dtype float32",
    trained: str | None = None,
) -> Any:
    """Loads the base model `name` (a directory or a hub id) on the CPU or, if quantised, where it loads.

    `dtype`: of DTYPES, or "auto": as its files are. `quantization`: a recorded quantisation to load it with. `task`: of
    CLASSES. `instead`: what to do where that quantisation is not installed. `trained`: the class that was trained, by
    ba_lora.json: a multimodal one has other names for its layers than the text-only class of the same files.

    Raises:
        ValueError: names --base and what was wrong.
    """
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoConfig

    from ..pretrained.backbone import is_multimodal_class
    from ..pretrained.quantised_experts import quantise_experts

    check_place(name)
    class_name, what = MULTIMODAL if is_multimodal_class(trained) else CLASSES[task]
    try:
        config = AutoConfig.from_pretrained(name)
        settings: dict[str, Any] = {"dtype": dtype if dtype == "auto" else torch_dtype(dtype)}
        if quantization is not None and getattr(config, "quantization_config", None) is None:
            settings |= _as_quantised(quantization, instead)
        model = getattr(transformers, class_name).from_pretrained(name, **settings).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"--base {name} does not load as a {what}: {error}") from None
    if quantization is not None and quantization.get("experts"):
        quantise_experts(model, quantization["experts"])
    return model


def check_place(name: str, option: str = "--base") -> None:
    """Refuses an adapter, and what is neither a directory nor a possible name on the hub, before anybody asks there.

    Raises:
        ValueError: names the option and its value.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if not os.path.isdir(name):
            validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"{option} {name} is no directory here, and no name on the hub either.") from None
    if os.path.isfile(os.path.join(name, "adapter_config.json")) and not os.path.isfile(f"{name}/config.json"):
        raise ValueError(f"{option} {name} is an adapter: give the model it was trained on.")


def is_quantised(name: str) -> bool:
    """Returns whether the model's files are a quantised one's."""
    from transformers import AutoConfig

    check_place(name)
    try:
        return getattr(AutoConfig.from_pretrained(name), "quantization_config", None) is not None
    except (OSError, ValueError) as error:
        raise ValueError(f"--base {name} is no model: {error}") from None


def _as_quantised(values: dict[str, Any], instead: str) -> dict[str, Any]:
    """Returns what loads a model quantised by bitsandbytes as ba_lora.json recorded it; nothing for other methods."""
    from importlib.util import find_spec

    import torch
    from transformers import BitsAndBytesConfig

    if values.get("quant_method") != "bitsandbytes":
        return {}
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "the adapter was trained on a base quantised by bitsandbytes, which is not installed: pip install "
            f"bitsandbytes, or {instead}."
        )
    known = {
        key: value
        for key, value in values.items()
        if not key.startswith("_") and key not in ("quant_method", "experts")
    }
    device = {"": torch.accelerator.current_device_index()} if torch.accelerator.is_available() else {"": "cpu"}
    return {"quantization_config": BitsAndBytesConfig.from_dict(known), "device_map": device}


def size(count: int) -> str:
    """Returns a number of bytes for people, such as "1.2 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
