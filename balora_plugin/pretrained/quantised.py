"""bitsandbytes layers: which they are, their weights as floats, and what keeps those weights as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers import PreTrainedModel

from .quantised_experts import dequantise_experts


def is_quantised_linear(module: nn.Module) -> bool:
    """Returns whether this is a linear layer of bitsandbytes, 4-bit or 8-bit."""
    return isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes.")


def dequantised(layer: nn.Module) -> Tensor:
    """Returns the weight (out, in) of a bitsandbytes layer as its forward pass in training mode uses it.

    Not by PEFT's `dequantize_module_weight`: that puts a new weight into the module, and an int8 layer that has run
    before loses its scales by it.
    """
    return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None)).data


def as_floats(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a quantised model as the floats it computes with: merged into it, an adapter gives the trained model.

    Merged into the quantised model itself, a small update would be rounded away.

    Raises:
        ValueError, NotImplementedError, AttributeError: its method of quantisation has no way back.
    """
    model = model.dequantize()
    dequantise_experts(model)
    # of files that were stored quantised transformers keeps the reader, and fails to reverse it when the model is saved
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [
            entry
            for entry in conversions
            if not any(
                type(operation).__module__.startswith("transformers.integrations.")
                for operation in getattr(entry, "operations", None) or ()
            )
        ]
    return model


def protect_weights(model: nn.Module) -> None:
    """Keeps 4-bit weights of a CPU as they are, in eval mode too.

    On a CPU with AVX512-BF16 bitsandbytes repacks a weight in place, with bfloat16 scales, at its first eval-mode
    forward. Gradients, merged and dequantised weights are wrong from then on, silently.

    Raises:
        ValueError: it has happened to this model already.
    """
    for name, layer in model.named_modules():
        if not is_quantised_linear(layer):
            continue
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"{name.removesuffix('.base_layer')} is a 4-bit layer that has run in eval mode on this CPU, by which "
                "bitsandbytes repacked its weight for inference: load the base model again, and before the adapter is "
                "added run it in training mode only."
            )
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


@contextmanager
def quantised_layers_stay_in_training_mode(model: nn.Module) -> Iterator[None]:
    """Keeps bitsandbytes layers in training mode inside the block, for a forward before or between training steps.

    On a CPU an int8 layer in eval mode rounds its input too, so that it is another function than in training; a 4-bit
    layer repacks its weight unless [`protect_weights`] was called.
    """
    changed = [m for m in model.modules() if is_quantised_linear(m) and not m.training]
    for module in changed:
        module.training = True
    try:
        yield
    finally:
        for module in changed:
            module.training = False
