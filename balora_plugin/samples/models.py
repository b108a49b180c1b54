"""The model and the tokenizer that a user's samples are read with."""

from __future__ import annotations

from typing import Any

from .jsonl import Samples


def load_tokenizer(name: str) -> Any:
    """Loads a tokenizer that pads: with its end of sequence where it has no token of its own for it.

    Raises:
        ValueError: names --model and what was wrong.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name} has no tokenizer that loads: {_first_line(error)}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, samples: Samples, tokenizer: Any) -> Any:
    """Loads the model for the samples' task, in float32 (bfloat16 on an accelerator): a classifier with their classes.

    Raises:
        ValueError: names --model and what was wrong.
    """
    import torch
    import transformers

    dtype = torch.bfloat16 if torch.accelerator.is_available() and samples.task == "lm" else torch.float32
    # a head for other classes that is in its files gives way to a new one
    of_classes = {"num_labels": samples.outputs, "ignore_mismatched_sizes": True}
    extra = of_classes if samples.task == "classification" else {}
    kind = "AutoModelForSequenceClassification" if extra else "AutoModelForCausalLM"
    try:
        model = getattr(transformers, kind).from_pretrained(name, dtype=dtype, **extra)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name} does not load by {kind}: {_first_line(error)}") from None
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
