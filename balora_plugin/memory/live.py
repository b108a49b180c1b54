"""Bytes of the tensors that live, operation by operation, of a computation on tensors with or without values."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle


class LiveBytes(TorchDispatchMode):
    """Counts, inside the block, the bytes of storages that operations make, from their making until nobody holds them.

    Attributes:
        now: Bytes that live.
        peak: The largest `now` since the last [`LiveBytes.start_phase`].
        gradients: Of `now`, those that [`LiveBytes.watch`]ed parameters have as gradients.
        gradients_at_peak: `gradients` when `peak` was reached.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.gradients = self.gradients_at_peak = 0
        self._known: dict[int, tuple[int, str]] = {}  # by a storage's address: its bytes, the kind of its maker
        self._inside: list[str] = []
        self._handles: list[RemovableHandle] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._meet(value)
        return result

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def own(self, tensors: Any) -> None:
        """Makes tensors that live already known, as none of the computation's."""
        for value in tensors:
            self._known[value.untyped_storage()._cdata] = (0, "")

    def watch(self, model: nn.Module) -> None:
        """Counts, until the block ends, what the model's modules make by their kind, and gradients as such."""
        for module in model.modules():
            name = type(module).__name__
            self._handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._inside.append(name)))
            self._handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._take_gradient))

    def start_phase(self) -> None:
        """Sets `peak` back to what lives now."""
        self.peak, self.gradients_at_peak = self.now, self.gradients

    def by_kind(self) -> dict[str, int]:
        """Returns what lives now by the class of the module that made it, largest first."""
        found: Counter[str] = Counter()
        for size, kind in self._known.values():
            found[kind] += size
        return {kind: size for kind, size in found.most_common() if size}

    def _meet(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (size, self._inside[-1] if self._inside else "between")
        weakref.finalize(storage, self._forget, key)
        self.now += size
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, (0, ""))[0]

    def _leave(self) -> None:
        self._inside.pop()

    def _take_gradient(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        self.gradients += gradient.untyped_storage().nbytes()


def bytes_of(tensors: Any) -> int:
    """Returns the bytes of the tensors' storages, each counted once; of a sharded one its part on this rank."""
    sizes: dict[int, int] = {}
    for value in tensors:
        local = value.to_local() if hasattr(value, "to_local") else value
        if local.device.type == "meta":  # a storage of no address: one a tensor
            sizes[id(value)] = local.numel() * local.element_size()
        else:
            storage = local.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def matrix_bytes(*shape: int, dtype: torch.dtype) -> int:
    """Returns the bytes of a tensor of this shape."""
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return size
