"""The full-precision weights a quantised base was made from, read tensor by tensor from safetensors for A0 and B0."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from ...checkpoint.location import AdapterFiles
from ...pretrained.quantised import dequantised, is_quantised_linear
from ..config import BaLoraConfig
from ..delta import stored_of, target_key

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# |W - Q(W)| / |W|: about 0.1 for 4-bit, 0.01 for int8; 1.4 for a model that has nothing to do with the base
SAME_MODEL = 0.5


def full_precision_of(
    config: BaLoraConfig, base: nn.Module, layers: list[tuple[str, LoraLayer]]
) -> FullPrecisionWeights | None:
    """Returns where A0 and B0 of a base's adapted `layers` come from, if not from the base's own weights.

    Raises:
        ValueError: `start_from` over a base that is not quantised.
    """
    if config.start_from is None:
        return None
    packed = [target_key(name, layer) for name, layer in layers if stored_of(layer).how is not None]
    if packed:
        raise ValueError(
            f"start_from={config.start_from!r} gives linear layers alone their A0 and B0, but {packed[0]} is a "
            "quantised parameter (fused experts): leave start_from out, or the experts out of target_parameters."
        )
    quantised = {name: module for name, layer in layers if is_quantised_linear(module := layer.get_base_layer())}
    if not quantised:
        raise ValueError(
            f"start_from={config.start_from!r}, but no targeted layer is quantised: the base's own weights are the "
            "full-precision ones. Leave start_from out, or load the base with a BitsAndBytesConfig."
        )
    return FullPrecisionWeights(os.fspath(config.start_from), base, quantised)


class FullPrecisionWeights:
    """The weights that `start_from` names, for the quantised layers of a base model.

    Opens nothing but an index and one tensor at a time: the model is never loaded.

    Args:
        source: A directory, a .safetensors file, or a hub id. Nothing is unpickled.
        model: The base model, whose naming says which tensor of the file belongs to which layer.
        layers: Name in the base model -> its bitsandbytes layer.

    Raises:
        ValueError: no safetensors there, or a layer has no weight in them; names source and layer.
    """

    def __init__(self, source: str, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        self.source = source
        files = _files(source)
        self._layers = layers
        self._places = _places(source, files, model, layers)

    def read(self, name: str) -> Tensor | None:
        """Reads the weight (out, in) of the layer `name`, on its device in the file's dtype; None: not quantised.

        Raises:
            ValueError: another shape, a tensor that is itself quantised, or the weight of another model.
        """
        if name not in self._places:
            return None
        layer, (file, key) = self._layers[name], self._places[name]
        with safe_open(file, framework="pt") as opened:
            weight = opened.get_tensor(key)
        where = f"start_from={self.source!r}: {key}"
        if not weight.is_floating_point() or weight.element_size() == 1:
            raise ValueError(f"{where} is {weight.dtype}, itself quantised: name the full-precision model.")
        if issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D):  # (in, out) in the file
            weight = weight.T
        here = (layer.out_features, layer.in_features)
        if tuple(weight.shape) != here:
            raise ValueError(f"{where} is {tuple(weight.shape)}, but this layer is {here}: it is another model.")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{where} holds NaN or inf: check that model's files.")
        kept = dequantised(layer).float()
        weight = weight.to(kept.device)
        error = ((weight.float() - kept).norm() / kept.norm().clamp_min(1e-30)).item()
        if error > SAME_MODEL:
            raise ValueError(
                f"{where} is no full-precision version of this layer: they differ by {error:.2f} of its norm, where "
                "4-bit rounding makes about 0.1. Name the model that this base was quantised from."
            )
        return weight


def _files(source: str) -> dict[str, str]:
    """Returns tensor name -> file that holds it."""
    if os.path.isfile(source):
        if not source.endswith(".safetensors"):
            raise ValueError(f"start_from={source!r} is not a .safetensors file: nothing else is read.")
        return _names_in(source)
    try:
        files = AdapterFiles(source)
        index = files.find(INDEX)
        whole = files.find(WHOLE) if index is None else None
    except (OSError, ValueError) as error:  # no such id, or the hub could not be asked
        raise ValueError(f"start_from={source!r} is no directory here, and not found on the hub: {error}") from None
    if index is None:
        if whole is None:
            raise ValueError(
                f"start_from={source!r} holds neither {WHOLE} nor {INDEX}: save it with save_pretrained. (Other "
                "formats are not read.)"
            )
        return _names_in(whole)
    weight_map: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ValueError(f"start_from={source!r}: {INDEX} names {shard!r}, which is no file beside it.")
        found = files.find(shard)
        if found is None:
            raise ValueError(f"start_from={source!r} lacks {shard}, which its {INDEX} names.")
        shards[shard] = found
    return {name: shards[shard] for name, shard in weight_map.items()}


def _names_in(file: str) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), file)


def _places(
    source: str, files: dict[str, str], model: nn.Module, layers: dict[str, nn.Module]
) -> dict[str, tuple[str, str]]:
    """Returns layer name -> (file, tensor name in it), by the renamings with which transformers loads this model."""
    wanted = {f"{name}.weight": name for name, layer in layers.items() if is_quantised_linear(layer)}
    renamings: list[Any] = []
    converters: list[Any] = []
    prefix = None
    if isinstance(model, PreTrainedModel):
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix = model.base_model_prefix
    places: dict[str, tuple[str, str]] = {}
    for key, file in files.items():
        renamed, converted = rename_source_key(key, renamings, converters, prefix, wanted)
        if renamed not in wanted and key in wanted:
            renamed, converted = key, None
        if renamed not in wanted:
            continue
        if converted is not None:
            raise ValueError(
                f"start_from={source!r}: {key} holds {wanted[renamed]} in another layout than the model "
                f"({converted}): load that model once and save it with save_pretrained(..., save_original_format="
                "False), or leave start_from out."
            )
        places[wanted[renamed]] = (file, key)
    missing = [name for name in wanted.values() if name not in places]
    if missing:
        raise ValueError(
            f"start_from={source!r} has no weight for {missing[0]} ({len(missing)} of {len(wanted)} quantised layers): "
            "it is another model."
        )
    return places
