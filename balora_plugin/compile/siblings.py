"""Graph pass: adapter layers that read the same input share one stacked down-projection.

q, k and v (or gate and up) each multiply the same x by a frozen A0 and a trained dA of a few rows: six GEMMs, each too
small to fill a GPU, become one. The pass works on dynamo's graph, so autograd differentiates what it made. Nothing
moves over a switch of grad mode or autocast; tensors that anything writes into are left alone.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from .effects import Effects

DOWN_PROJECTIONS = ("lora_a", "frozen_a")  # parts of the parameters' names, in small letters


def stack_siblings(module: GraphModule) -> int:
    """Replaces every group of at least two such layers in `module`'s graph; how many groups it replaced.

    It declines where a pattern does not hold: dropout gives every layer an input of its own; a bias, another dtype or
    another device of a factor leaves that layer alone; so does an in-place operation on input, factor or result.
    """
    effects = Effects(module)
    _drop_idle_dropout(module, effects)
    _share_casts(module, effects)
    groups: dict[Any, list[Node]] = {}
    for node in module.graph.nodes:
        weight = _down_projection(node)
        if weight is not None and effects.unwritten(node, node.args[0], weight):
            value = weight.meta["example_value"]
            groups.setdefault((node.args[0], effects.region[node], value.dtype, value.device), []).append(node)
    replaced = 0
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for (source, *_), nodes in groups.items():
        if len(nodes) < 2:
            continue
        weights = [node.args[1] for node in nodes]
        if any(order[weight] > order[nodes[0]] for weight in weights):
            continue
        _stack(module, source, nodes, weights)
        replaced += 1
    if replaced:
        module.graph.lint()
        module.recompile()
    return replaced


def _stack(module: GraphModule, source: Node, nodes: list[Node], weights: list[Any]) -> None:
    rows = [weight.meta["example_value"].shape[0] for weight in weights]
    with module.graph.inserting_before(nodes[0]):
        stacked = module.graph.call_function(torch.cat, (weights, 0))
        product = module.graph.call_function(F.linear, (source, stacked))
        parts = module.graph.call_function(torch.split, (product, rows, -1))
        for index, node in enumerate(nodes):
            part = module.graph.call_function(operator.getitem, (parts, index))
            part.meta.update(node.meta)
            node.replace_all_uses_with(part)
    for node in nodes:
        module.graph.erase_node(node)


def _down_projection(node: Node) -> Node | None:
    """The weight of a bias-free linear layer that is an adapter's A factor, else None."""
    if node.op != "call_function" or node.target not in (F.linear, torch._C._nn.linear):
        return None
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if bias is not None or len(node.args) < 2:
        return None
    weight = node.args[1]
    if not isinstance(weight, Node) or weight.op not in ("placeholder", "get_attr"):
        return None
    name = f"{weight.name} {weight.target}".lower()
    value = weight.meta.get("example_value")
    is_factor = any(part in name for part in DOWN_PROJECTIONS) and isinstance(value, torch.Tensor) and value.ndim == 2
    return weight if is_factor else None


def _drop_idle_dropout(module: GraphModule, effects: Effects) -> None:
    """Dropout that is off (evaluation, or p = 0) gives its input: take it out, so that its readers are siblings."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not F.dropout or not node.args:
            continue
        p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        if (training is False or p == 0.0) and effects.unwritten(node, node.args[0]):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _share_casts(module: GraphModule, effects: Effects) -> None:
    """One cast of a tensor to a dtype where several adapters cast it alike (float32 adapters on a bfloat16 base)."""
    seen: dict[Any, Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_method" or node.target not in ("to", "float") or node.kwargs:
            continue
        if not all(isinstance(arg, (Node, torch.dtype)) for arg in node.args):
            continue
        feeds_adapter = any(user.args[0] is node for user in node.users if _down_projection(user) is not None)
        if not feeds_adapter or not effects.unwritten(node, node.args[0]):
            continue
        key = (effects.region[node], node.target, node.args)
        if key in seen:
            node.replace_all_uses_with(seen[key])
            module.graph.erase_node(node)
        else:
            seen[key] = node
