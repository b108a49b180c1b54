"""LoRA options that BA-LoRA does not take, what to write instead, and values that no file would be read with."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..checkpoint.rules import OPTIONS, flaw


class Neutral(NamedTuple):
    """The value at which a LoRA option does nothing, why BA-LoRA takes no other, and what to write instead."""

    value: Any
    reason: str
    remedy: str


_ITS_START = "it is another start of the factors, and BA-LoRA's is the SVD of the weight"
_WRITE_START = "remove it, with init_lora_weights='pissa' or 'pissa_fast' (or True, for the ordinary LoRA start)"

# LoRA options that replace the function or the teacher
NEUTRAL_OPTIONS: dict[str, Neutral] = {
    "use_dora": Neutral(
        False,
        "DoRA rescales the adapted weight by trained magnitudes, which the delta form has no place for",
        "remove it (a larger r adds capacity)",
    ),
    "lora_bias": Neutral(
        False,
        "a trained bias beside the factors is no part of the update that is saved",
        "remove it; modules_to_save=[...] trains a whole module with its bias",
    ),
    "bias": Neutral(
        "none",
        "it trains the base's own biases, which the teacher shares: the pre-trained model would be gone",
        "write bias='none'; modules_to_save=[...] trains a copy of a whole module, and the teacher keeps the first",
    ),
    "layer_replication": Neutral(
        None,
        "it builds another model out of the base's layers, so the teacher is not the pre-trained one",
        "remove it, or load a base that already has those layers",
    ),
    "trainable_token_indices": Neutral(
        None,
        "it trains rows of the embedding in place, and a head that is tied to it, where the terms read the pre-trained",
        "remove it and write modules_to_save=['embed_tokens'] (and 'lm_head', where they are to be predicted), "
        "whose first copies the teacher keeps",
    ),
    "megatron_config": Neutral(
        None,
        "Megatron's parallel layers are not the linear layers that BA-LoRA factorises",
        "remove it and split the model with FSDP or DeepSpeed",
    ),
    "alora_invocation_tokens": Neutral(
        None,
        "an activated LoRA acts behind its invocation tokens alone, and the terms compare whole sequences",
        "remove it",
    ),
    "use_qalora": Neutral(
        False,
        "QALoRA pools a layer's inputs, which is another function than the saved B A",
        "remove it and load the base with a BitsAndBytesConfig",
    ),
    "use_bdlora": Neutral(
        None,
        "block-diagonal factors are not those of an SVD of the whole weight",
        "remove it (a smaller r makes smaller factors)",
    ),
    "arrow_config": Neutral(
        None,
        "Arrow routes among adapters that are trained already, so there is none to train",
        "train with BA-LoRA first, and give what it saved, a plain LoRA, to Arrow",
    ),
    "velora_config": Neutral(
        None,
        "VeLoRA compresses what the backward pass reads, so gradients are not those of the terms",
        "remove it and set gradient_checkpointing=True where memory is short",
    ),
    "monteclora_config": Neutral(
        None,
        "MonteCLoRA adds noise to the factors, so that student and teacher differ before the first step",
        "remove it",
    ),
    "kasa_config": Neutral(
        None,
        "KaSA truncates the base's weights and trains singular values, so the base is not the teacher",
        "remove it",
    ),
    "eva_config": Neutral(None, _ITS_START, _WRITE_START),
    "corda_config": Neutral(None, _ITS_START, _WRITE_START),
    "lora_ga_config": Neutral(None, _ITS_START, _WRITE_START),
    "ensure_weight_tying": Neutral(
        False,
        "it makes the head a tied copy of trained embeddings, and the terms read student's and teacher's head apart",
        "remove it and write modules_to_save=['embed_tokens', 'lm_head'], which trains both as copies of their own",
    ),
}

_REWRITES = "it rewrites the base's weights, which are the teacher's: write 'pissa', the like in delta form"
_DATA = "it needs a pass over data before training: write 'pissa', which starts from the weights"
# other values of init_lora_weights that PEFT takes: why not, and what instead
OTHER_STARTS: dict[str, str] = {
    "gaussian": "it is the ordinary start with other random numbers: write True",
    "orthogonal": "its two factors do not begin at a zero update: write True (ordinary LoRA), or 'pissa'",
    "olora": _REWRITES,
    "corda": f"{_REWRITES}; {_DATA}",
    "lora_ga": f"{_REWRITES}; {_DATA}",
    "eva": _DATA,
    "loftq": "it replaces the base by a quantised one: load the base with a BitsAndBytesConfig, write 'pissa', and "
    "name the full-precision model in start_from",
}

_CHECKED_APART = {"init_lora_weights", "task_type", "base_model_name_or_path", "regularizers", "start_from"}


def check_options(config: Any) -> None:
    """Takes numpy's numbers in a LoraConfig for Python's (in place), and refuses what its file would not be read with.

    Raises:
        ValueError: names the option, its value and what it has to be.
    """
    for key, rule in OPTIONS.items():
        if key in _CHECKED_APART:
            continue
        value = _python_value(getattr(config, key))
        setattr(config, key, value)
        names = list(value) if isinstance(value, (set, tuple)) else value
        if flaw({key: names}, {key: rule}) is not None:
            raise ValueError(f"{key}={repr(value)[:60]} must be {rule[0]}.")


def _python_value(value: Any) -> Any:
    """Returns a number of numpy's as Python's, which JSON can hold; in the values of a mapping too."""
    if isinstance(value, dict):
        return {key: _python_value(each) for key, each in value.items()}
    return value.item() if isinstance(value, np.generic) else value
