"""Which base an adapter belongs to: taken from the weights, written beside every adapter, compared on loading."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from ..distributed import is_sharded
from .fingerprint import combine, weight_digests
from .quantised_experts import how_experts_are_stored


@dataclass(frozen=True)
class BaseIdentity:
    """A base model's digests (SHA-256, hex), dtypes and quantisation."""

    sha256: str  # weights and the part of the config that shapes hidden states: `fingerprint.model_fingerprint`
    weights: str  # the weights alone, whatever a release of transformers calls them
    bfloat16: str  # the same, rounded to bfloat16: equal for a float32 and a bfloat16 copy
    dtype: str
    dtypes: dict[str, int] = field(default_factory=dict)  # how many tensors of each
    quantization: dict[str, Any] | None = None

    def to_settings(self) -> dict[str, Any]:
        """Returns its keys in ba_lora.json."""
        return {
            "base_sha256": self.sha256,
            "base_dtype": self.dtype,
            "base_quantization": self.quantization,
            "base_digests": {"weights": self.weights, "bfloat16": self.bfloat16, "dtypes": self.dtypes},
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any] | None) -> BaseIdentity | None:
        """Returns what ba_lora.json recorded; None where it recorded nothing."""
        if settings is None or not settings.get("base_sha256"):
            return None
        digests = settings["base_digests"]
        return cls(
            settings["base_sha256"],
            digests["weights"],
            digests["bfloat16"],
            settings["base_dtype"],
            digests["dtypes"],
            settings["base_quantization"],
        )

    def __str__(self) -> str:
        return f"{self.sha256[:12]} ({self.dtype}{', quantised' if self.quantization else ''})"


def base_identity(model: nn.Module) -> BaseIdentity:
    """Takes the identity of a base model, adapters inside it left out.

    Every byte is read once. All processes must call this if the model is sharded.

    Raises:
        ValueError: weights that are not loaded (meta device).
    """
    config = getattr(model, "config", None)
    digests = weight_digests(model, bfloat16=True)
    stored = {name: digest.stored for name, digest in digests.items()}
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    experts = how_experts_are_stored(model)
    if experts is not None:  # which no config of transformers says
        quantization = {**(quantization or {}), "experts": experts}
    return BaseIdentity(
        sha256=combine(config, stored),
        weights=_of_all(stored.values()),
        bfloat16=_of_all(digest.bfloat16 for digest in digests.values()),
        dtype=dtype_of(model),
        dtypes=dict(sorted(Counter(digest.dtype for digest in digests.values()).items())),
        quantization=None if quantization is None else {key: _plain(value) for key, value in quantization.items()},
    )


def _of_all(digests: Iterable[str]) -> str:
    """Returns a digest of digests, in no order; tied tensors count once."""
    return hashlib.sha256("\n".join(sorted(set(digests))).encode()).hexdigest()


def compare(recorded: BaseIdentity | None, here: BaseIdentity | None) -> str:
    """Returns what the digests of two bases say.

    "same"; "config": the same weights under another config, or under other names (a release of transformers); "dtype":
    the same weights in another dtype; "other": another model; "unclear": digests cannot tell (a quantised base beside
    another form of it, float16 beside another dtype); "unknown": there is nothing to compare.
    """
    if recorded is None or here is None:
        return "unknown"
    if recorded.sha256 == here.sha256:
        return "same"
    if recorded.weights == here.weights:
        return "config"
    dtypes_differ = recorded.dtypes != here.dtypes
    if dtypes_differ and recorded.bfloat16 == here.bfloat16:
        return "dtype"
    half = "float16" in recorded.dtypes or "float16" in here.dtypes
    if recorded.quantization or here.quantization or (dtypes_differ and half):
        return "unclear"
    return "other"


def why_not_readable(model: nn.Module) -> str | None:
    """Returns why this process alone cannot read the base's weights (or run the model), or None if it can."""
    if is_sharded(model):
        return "the model is sharded over processes"
    if any(p.device.type == "meta" for p in model.parameters()):
        return "some of its weights are not loaded on this process"
    if any(isinstance(module, LoraLayer) and module.merged for module in model.modules()):
        return "an adapter is merged into the base"
    return None


def dtype_of(model: nn.Module) -> str:
    """Returns the dtype a model says it has ("float32"), or that of its first parameter."""
    dtype = getattr(model, "dtype", None)
    if dtype is None:
        first = next(model.parameters(), None)
        dtype = "none" if first is None else first.dtype
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """Makes a value JSON-ready: enumerations and dtypes by their value."""
    value = getattr(value, "value", value)
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)
