"""The delta form inside PEFT's LoRA layers. The one file that touches what PEFT calls private.

With frozen A0, B0 and trained dA, dB that start at zero,

    y = W x + s [ B0 (dA x) + dB ((A0 + dA) x) ]  =  W x + s ((B0 + dB)(A0 + dA) - B0 A0) x

is PiSSA's function of the same rank with the same gradients, and W is never touched. `lora_A` / `lora_B` hold dA / dB;
`frozen_A` / `frozen_B` hold A0 / B0 as bias-free nn.Linear modules: called as modules they stay right under FSDP and
ZeRO-3, and as parameters (not buffers) DDP does not broadcast them at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, LoraVariant, ParamWrapper
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ..pretrained.quantised import dequantised, is_quantised_linear
from ..pretrained.quantised_experts import StoredParameter, forget_cached, stored_parameter
from .guard import REMEDY, guard_layer
from .peft_releases import out_first

FROZEN = ("frozen_A", "frozen_B")
PEFT_PREFIX = "base_model.model."
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


class DeltaVariant(LoraVariant):
    """Forward and merge of one adapter of one layer in delta form."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Does nothing: [`attach_delta`] has made the factors."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Adds s [ B0 (dA x) + dB (A0 x + dA x) ] to the base layer's result (..., out); x is (..., in)."""
        frozen_a, frozen_b = module.frozen_A[active_adapter], module.frozen_B[active_adapter]
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        if frozen_a.weight.dtype != lora_a.weight.dtype and not hasattr(lora_a.weight, "full_tensor"):
            # a host cast what trains (TRL: adapters on quantised bases); but FSDP2 casts what it gathers for a forward,
            # and a cast here would keep it gathered
            frozen_a.to(lora_a.weight.dtype)
            frozen_b.to(lora_b.weight.dtype)
        x = module.lora_dropout[active_adapter](x)
        u = lora_a(x)
        if u.shape[-1] != frozen_b.in_features:
            raise ValueError(
                f"adapter {active_adapter!r} has rank {frozen_b.in_features}, but its lora_A gives {u.shape[-1]} "
                f"columns: something (prepare_model_for_compiled_hotswap?) wrote factors of another shape. {REMEDY}"
            )
        update = frozen_b(u) + lora_b(frozen_a(x) + u)
        return result + update * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns the weight with the update added, as a new tensor."""
        return orig_weight + delta_weight(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Adds the update to the weight in place."""
        orig_weight.data += delta_weight(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns the weight with the update taken off."""
        return orig_weight - delta_weight(module, active_adapter).to(orig_weight.dtype)

    def supports_lora_conversion(self) -> bool:
        """Returns False."""
        return False  # PEFT's conversion reads lora_B @ lora_A, which is not the update here


class DeltaParamWrapper(ParamWrapper):
    """PEFT's wrapper of a targeted nn.Parameter (fused experts) with the delta form's update."""

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the update of the parameter, in its own shape."""
        if adapter_name not in getattr(self, "frozen_A", {}):
            return super().get_delta_weight(adapter_name, *args, **kwargs)
        lhs, rhs, scaling = self.get_delta_factors(adapter_name)
        update = lhs @ rhs * scaling
        return update if len(stored_of(self).shape) == 3 else update.squeeze(0)

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """Returns lhs, rhs, scaling: the update is scaling * lhs @ rhs, (experts, ., .), oriented as the parameter."""
        if adapter_name not in getattr(self, "frozen_A", {}):
            return super().get_delta_factors(adapter_name)
        a, b = stack_factors(
            self.lora_A[adapter_name].weight,
            self.lora_B[adapter_name].weight,
            self.frozen_A[adapter_name].weight,
            self.frozen_B[adapter_name].weight,
            self.num_experts,
        )
        a = a.reshape(self.num_experts, -1, a.shape[-1])  # (E, 2r, in)
        b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)  # (E, out, 2r)
        param = stored_of(self)
        lhs, rhs = (b, a) if out_first(self, len(param.shape)) else (a.mT, b.mT)
        return lhs.to(param.dtype), rhs.to(param.dtype), self.scaling[adapter_name]

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Adds the update inside the block, also to a quantised parameter beside another one that is adapted."""
        with super()._activate_lora(active_adapters):
            forget_cached(self.get_base_layer(), self.parameter_name)
            try:
                yield
            finally:
                forget_cached(self.get_base_layer(), self.parameter_name)

    def _remove_parametrizations(self) -> None:
        """Takes the update off again, and leaves what the parameter was made of before (a quantised one its floats).

        PEFT 0.21 looks there for another class than it has put there, and leaves the update on.
        """
        steps = self.get_base_layer().parametrizations[self.parameter_name]
        if len(steps) > 1:
            del steps[-1]
        else:
            super()._remove_parametrizations()


# PEFT recognises its wrapper by this name when a second adapter targets the same parameters; pickle uses __qualname__
DeltaParamWrapper.__name__ = ParamWrapper.__name__


def stack_factors(d_a: Tensor, d_b: Tensor, a0: Tensor, b0: Tensor, experts: int = 1) -> tuple[Tensor, Tensor]:
    """Returns the stock rank-2r factors A = [dA; A0 + dA], B = [B0, dB], with B A = (B0 + dB)(A0 + dA) - B0 A0.

    d_a, a0 (E r, in) and d_b, b0 (out, r E) in PEFT's layout for E experts (1 for a plain layer) -> (E 2r, in),
    (out, 2r E). This layout, not [A0 + dA; A0], [B, -B0], survives a cast: no large terms cancel.
    """
    in_features, out_features = d_a.shape[1], d_b.shape[0]
    a = torch.cat([d_a.reshape(experts, -1, in_features), (a0.to(d_a) + d_a).reshape(experts, -1, in_features)], dim=1)
    b = torch.cat([b0.to(d_b).reshape(out_features, -1, experts), d_b.reshape(out_features, -1, experts)], dim=1)
    return a.reshape(-1, in_features).contiguous(), b.reshape(out_features, -1).contiguous()


def split_factors(a: Tensor, b: Tensor, experts: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Splits stock rank-2r factors (E 2r, in), (out, 2r E) into dA, dB, B0, each exactly as it was saved."""
    in_features, out_features = a.shape[1], b.shape[0]
    a3, b3 = a.reshape(experts, -1, in_features), b.reshape(out_features, -1, experts)
    rank = a3.shape[1] // 2
    d_a = a3[:, :rank].reshape(-1, in_features).contiguous()
    b0 = b3[:, :rank].reshape(out_features, -1).contiguous()
    d_b = b3[:, rank:].reshape(out_features, -1).contiguous()
    return d_a, d_b, b0


def delta_weight(module: LoraLayer, adapter_name: str) -> Tensor:
    """Returns the update of a linear layer's weight, in the base weight's own orientation and at least float32."""
    a, b = stack_factors(
        module.lora_A[adapter_name].weight.detach(),
        module.lora_B[adapter_name].weight.detach(),
        module.frozen_A[adapter_name].weight,
        module.frozen_B[adapter_name].weight,
    )
    wide = torch.promote_types(a.dtype, torch.float32)
    update = b.to(wide) @ a.to(wide) * module.scaling[adapter_name]
    return update.T if getattr(module, "fan_in_fan_out", False) else update


def not_linears_own(layer: type[nn.Module]) -> str | None:
    """Returns why a class of LoRA layers cannot carry the delta form, in words; None if it can.

    What the form replaces is called by PEFT's own linear layer, in these methods.
    """
    if not (isinstance(layer, type) and issubclass(layer, Linear)):
        return "is no subclass of peft.tuners.lora.Linear"
    for name in ("forward", "merge", "unmerge", "get_delta_weight", "update_layer", "resolve_lora_variant"):
        if getattr(layer, name) is not getattr(Linear, name):
            return f"has a {name} of its own"
    return None


def fill_empty(model: Any, adapter_name: str, start: bool | str, *, autocast: bool) -> None:
    """Gives a stock adapter that was injected on the meta device (low_cpu_mem_usage) the values that it has otherwise.

    `start`: its init_lora_weights. Every number is drawn as PEFT draws it, so that random states go on alike too.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        for factors in (layer.lora_A, layer.lora_B):
            factors[adapter_name].to_empty(device="cpu").reset_parameters()
        layer.reset_lora_parameters(adapter_name, start)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
    model.base_model._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=autocast)


def is_supported_layer(layer: LoraLayer) -> bool:
    """Returns whether this is a linear layer, Conv1D, one of bitsandbytes, or a targeted parameter (fused experts)."""
    return isinstance(layer, (Linear, ParamWrapper)) or type(layer).__name__ in ("Linear4bit", "Linear8bitLt")


def is_delta(layer: nn.Module, adapter_name: str) -> bool:
    """Returns whether this layer carries `adapter_name` in delta form."""
    return isinstance(layer, LoraLayer) and adapter_name in getattr(layer, "frozen_A", {})


def delta_layers_of(model: nn.Module, adapter_name: str = "default") -> list[tuple[str, LoraLayer]]:
    """Returns (module name in the base model, layer) of every layer with this adapter in delta form."""
    found = []
    for name, layer in model.named_modules():
        if is_delta(layer, adapter_name):
            found.append((unwrapped_name(name).removeprefix(PEFT_PREFIX), layer))
    return found


def split_name(name: str) -> tuple[str, str]:
    """Splits a name behind its last index: `model.layers.3.mlp.gate` -> (`model.layers.*`, `mlp.gate`)."""
    parts = unwrapped_name(name).split(".")
    last = max((i for i, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
    return ".".join("*" if part.isdigit() else part for part in parts[: last + 1]), ".".join(parts[last + 1 :])


def refused_by_peft(model: nn.Module) -> list[str]:
    """Returns the last names of linear layers that PEFT adapts in no model of this type.

    Mamba's kernels read the weight of such a layer (`out_proj`), and would leave an adapter out.
    """
    found = []
    for leaf in sorted(
        {name.rpartition(".")[2] for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    ):
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model, leaf)
        except ValueError:
            found.append(leaf)
    return found


def unwrapped_name(name: str) -> str:
    """Returns a module's or parameter's name as state dicts have it: without what FSDP1, torch.compile and activation
    checkpointing put into it.
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def target_key(name: str, layer: LoraLayer) -> str:
    """Returns what PEFT matches rank and alpha patterns against: the module's name, or the targeted parameter's."""
    return f"{name.replace('.base_layer', '')}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name


def num_experts(layer: LoraLayer) -> int:
    """Returns how many experts' factors the layer holds, 1 for a plain one."""
    return getattr(layer, "num_experts", 1) if isinstance(layer, ParamWrapper) else 1


def attach_delta(layer: LoraLayer, adapter_name: str) -> None:
    """Puts a freshly injected stock adapter in delta form: all four factors 0 until [`start_layers`] or a load."""
    if not hasattr(layer, FROZEN[0]):
        guard_layer(layer)
    for name, trained in zip(FROZEN, (layer.lora_A[adapter_name], layer.lora_B[adapter_name]), strict=True):
        if not hasattr(layer, name):
            setattr(layer, name, nn.ModuleDict())
        frozen = nn.Linear(
            trained.in_features, trained.out_features, bias=False, device="meta", dtype=trained.weight.dtype
        )
        if trained.weight.device.type != "meta":
            frozen = frozen.to_empty(device=trained.weight.device)
            nn.init.zeros_(frozen.weight)
            nn.init.zeros_(trained.weight)
        frozen.requires_grad_(False)
        getattr(layer, name)[adapter_name] = frozen
    if isinstance(layer, ParamWrapper):
        layer.__class__ = DeltaParamWrapper
    else:
        layer.lora_variant[adapter_name] = DeltaVariant()


def stored_of(layer: LoraLayer) -> StoredParameter:
    """Returns the base weight that this layer adapts, as it is stored, and its shape and dtype on access."""
    return stored_parameter(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))


def base_parameter(layer: LoraLayer) -> Tensor:
    """Returns the base weight that this layer adapts, as it is stored."""
    return stored_of(layer).original


def base_matrix(layer: LoraLayer) -> Tensor:
    """Returns the weight as (out, in), or (experts, out, in), dequantised."""
    if isinstance(layer, ParamWrapper):
        param = layer.get_param().data
        return param if out_first(layer, param.ndim) else param.mT
    base = layer.get_base_layer()
    if is_quantised_linear(base):
        return dequantised(base)
    weight = dequantize_module_weight(base).data
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight
