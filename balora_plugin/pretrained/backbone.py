"""A language model without its LM head, also inside a multimodal one; and what of that is no language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """Returns the module whose final hidden states the LM head reads; the model itself where it is not separate.

    That is transformers' `base_model`. Classes whose prefix names a module that they do not have (Llama 4's and
    Mllama's text models) give themselves there: then `get_decoder()`, or their only child that is a model. Where that
    has the head in it, it is asked in turn. Pixels reach such a backbone through [`run_backbone`] alone.
    """
    base = model.base_model
    if base is not model:
        return base
    inside = _whole_model_inside(model)
    if inside is not None:
        return backbone_of(inside)
    decoder = _decoder_of(model)
    if decoder is not model and isinstance(decoder, PreTrainedModel):
        return decoder
    children = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return children[0] if len(children) == 1 else model


def possible_backbones(model: PreTrainedModel) -> list[nn.Module]:
    """Returns [`backbone_of`] and the decoder inside it, which some classes call past it (OPT, BART)."""
    base, decoder = backbone_of(model), _decoder_of(model)
    other = isinstance(decoder, PreTrainedModel) and decoder not in (base, model)
    return [base, decoder] if other and not _has_head(decoder) else [base]


def run_backbone(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    """Runs the model up to its head: the backbone's output, with `last_hidden_state` (B, T, d).

    inputs: the keywords of the model's own forward without labels; pixels and what belongs to them are among them.

    A model that has a whole language model inside (Llama 4's multimodal class) puts the images' features in place in
    its own forward. That runs, with the head on the last token alone, whose logits nobody reads.
    """
    if _whole_model_inside(model) is None:
        return backbone_of(model)(**inputs)
    seen: list[Any] = []
    handles = [
        backbone_of(model).register_forward_hook(lambda module, args, output: seen.append(output)),
        model.get_output_embeddings().register_forward_pre_hook(_last_token_alone),
    ]
    try:
        type(model).forward(model, **inputs)  # not a host's or our own in its place
    finally:
        for handle in handles:
            handle.remove()
    return seen[-1]


def is_multimodal(model: Any) -> bool:
    """Returns whether a model is a decoder that reads more than text: its config has a part of its own for the text."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "sub_configs", None) or getattr(config, "is_encoder_decoder", False):
        return False
    return config.get_text_config() is not config


def is_multimodal_class(name: str | None) -> bool:
    """Returns whether transformers has a class of this name that AutoModelForImageTextToText gives."""
    return name is not None and name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()


def beside_the_language_model(model: PreTrainedModel) -> list[str]:
    """Returns the names of a multimodal model's modules outside its language model and head: towers and projectors.

    Each is the outermost such module; a text-only model has none.
    """
    if not is_multimodal(model):
        return []
    decoder, head = _decoder_of(model), model.get_output_embeddings()
    if decoder is model:
        return []
    kept = {id(decoder), id(head)}
    holders = {id(module) for module in model.modules() if any(id(inner) in kept for inner in module.modules())}
    inside = {id(module) for module in decoder.modules()}
    return [
        name
        for parent_name, parent in model.named_modules()
        if id(parent) in holders and id(parent) not in inside
        for child_name, child in parent.named_children()
        if id(child) not in holders
        for name in [f"{parent_name}.{child_name}" if parent_name else child_name]
    ]


def language_model_of(model: PreTrainedModel) -> nn.Module:
    """Returns the language model of a multimodal one, any other model as it is."""
    return _decoder_of(model) if is_multimodal(model) else model


def _decoder_of(model: PreTrainedModel) -> nn.Module:
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def _has_head(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None


def _whole_model_inside(model: PreTrainedModel) -> PreTrainedModel | None:
    """The language model with the head in it that a model without a backbone of its own calls; None elsewhere."""
    decoder = _decoder_of(model)
    if model.base_model is not model or decoder is model or not isinstance(decoder, PreTrainedModel):
        return None
    return decoder if _has_head(decoder) else None


def _last_token_alone(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0][:, -1:], *args[1:])
