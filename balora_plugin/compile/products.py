"""Graph pass: the two up-projections of the delta form are one product that accumulates into the base layer's output.

    y + s (B0 u + dB v), v = A0 x + u    becomes    addmm(y, [u, v], [B0, dB]^T, alpha = s)

and stock LoRA's y + s B u becomes addmm(y, u, B^T, alpha = s). Two small GEMMs, their sum, its scaling and the sum with
y, each a pass over as much memory as y has, become one GEMM with an epilogue. The pass works on dynamo's graph, so
autograd differentiates what it made; that a gradient of B0 is not needed is left to
[`narrow_products`][balora_plugin.compile.narrow].
"""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from .effects import Effects
from .siblings import adapter_weight

FROZEN, TRAINED = ("frozen_b",), ("lora_b",)
_ADD = (operator.add, torch.add, "add")
_MULTIPLY = (operator.mul, torch.mul, "mul")


class _Update(NamedTuple):
    """result = base + scale * (the sum of `products`, linear layers of adapters); `inner`: what it takes besides.

    `scale` is a node where dynamo has made it an input: layers that share a graph differ in it.
    """

    base: Node
    products: tuple[Node, ...]
    scale: float | Node
    inner: tuple[Node, ...]


def accumulate_products(module: GraphModule) -> int:
    """Replaces every such update in `module`'s graph; returns how many it replaced.

    It declines where the pattern does not hold: another reader of a part of it, a part that is written into, a switch
    of grad mode or autocast in between, shapes that broadcast, a scale that is no number.
    """
    effects = Effects(module)
    replaced = 0
    for node in list(module.graph.nodes):
        update = _match(node)
        if update is None or not _holds(effects, node, update):
            continue
        _accumulate(module, node, update)
        replaced += 1
    if replaced:
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    return replaced


def _accumulate(module: GraphModule, node: Node, update: _Update) -> None:
    base, products, scale, _ = update
    dtype = products[0].meta["example_value"].dtype
    with module.graph.inserting_before(node):
        call, method = module.graph.call_function, module.graph.call_method
        inputs, weights = ([product.args[i] for product in products] for i in range(2))
        stacked = inputs[0] if len(products) == 1 else call(torch.cat, (inputs, -1))
        weight = weights[0] if len(products) == 1 else call(torch.cat, (weights, 1))
        if base.meta["example_value"].dtype != dtype:  # as the sum would have widened it
            base = method("to", (base, dtype))
        rows, columns = method("flatten", (base, 0, -2)), method("t", (weight,))
        if isinstance(scale, Node):  # addmm takes numbers alone: on the few columns that go in
            stacked, scale = call(operator.mul, (stacked, scale)), 1.0
        product = call(torch.addmm, (rows, method("flatten", (stacked, 0, -2)), columns), {"alpha": scale})
        result = method("view_as", (product, base))
    result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    module.graph.erase_node(node)


def _match(node: Node) -> _Update | None:
    """Finds an update: base + scale * (linear(u, frozen) + linear(v, trained)) in PEFT's order.

    Stock LoRA's is base + scale * linear(u, trained).
    """
    if not _is(node, _ADD):
        return None
    base: Any
    update: Any
    base, update = node.args
    inner: list[Any] = [update]
    scale: Any = 1.0
    if _is(update, _MULTIPLY, number=True):
        update, scale = update.args
        inner.append(update)
    products: tuple[Any, ...] = (update,)
    if _is(update, _ADD):
        products = tuple(update.args)
        inner += products
    names = (FROZEN, TRAINED)[-len(products) :]
    if any(adapter_weight(product, name) is None for product, name in zip(products, names, strict=True)):
        return None
    if adapter_weight(base, FROZEN + TRAINED) is not None:  # the inner sum of a pattern that did not hold
        return None
    return _Update(base, products, scale if isinstance(scale, Node) else float(scale), tuple(inner))


def _is(node: Any, targets: tuple[Any, ...], *, number: bool = False) -> bool:
    """Returns whether a node is a call of one of these on two nodes.

    `number`: on a node and a real number, which may be a node itself.
    """
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method") or node.target not in targets:
        return False
    if len(node.args) != 2 or node.kwargs or not isinstance(node.args[0], Node):
        return False
    other = node.args[1]
    if not number:
        return isinstance(other, Node)
    value = other.meta.get("example_value") if isinstance(other, Node) else other
    return isinstance(value, (Real, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool)


def _holds(effects: Effects, node: Node, update: _Update) -> bool:
    base, products, _, inner = update
    values: list[Any] = [part.meta.get("example_value") for part in (node, base, *products)]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return False
    result, before, *added = values
    if before.ndim < 2 or any(value.shape != result.shape for value in (before, *added)):
        return False
    if any(value.dtype != result.dtype for value in added) or before.device != result.device:
        return False
    if any(len(part.users) != 1 for part in inner):
        return False
    factors: list[Any] = [argument for product in products for argument in product.args[:2]]
    return len({effects.region[part] for part in (node, *inner)}) == 1 and effects.unwritten(
        node, base, *inner, *factors
    )
