"""A causal language model without its LM head."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """Returns the module whose final hidden states the LM head reads; the model itself where it is not separate.

    That is transformers' `base_model`. Classes whose prefix names a module that they do not have (Llama 4's and
    Mllama's text models) give themselves there: then `get_decoder()`, or their only child that is a model.
    """
    base = model.base_model
    if base is not model:
        return base
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder is not model and isinstance(decoder, PreTrainedModel):
        return decoder
    children = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return children[0] if len(children) == 1 else model


def possible_backbones(model: PreTrainedModel) -> list[nn.Module]:
    """Returns [`backbone_of`] and the decoder inside it, which some classes call past it (OPT, BART)."""
    base = backbone_of(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else base
    return [base, decoder] if isinstance(decoder, PreTrainedModel) and decoder not in (base, model) else [base]
