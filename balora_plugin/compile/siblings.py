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

TRAINED, FROZEN = "lora_a", "frozen_a"  # parts of the parameters' names, in small letters
DOWN_PROJECTIONS = (TRAINED, FROZEN)
LINEAR = (F.linear, torch._C._nn.linear)


def stack_siblings(module: GraphModule) -> int:
    """Replaces every group of at least two such layers in `module`'s graph; returns how many groups.

    It declines where a pattern does not hold: dropout gives every layer an input of its own, as casts do that
    [`share_casts`][balora_plugin.compile.casts] left; a bias, another dtype or another device of a factor leaves that
    layer alone; so does an in-place operation on input, factor or result, and a result that leaves the graph.
    """
    effects = Effects(module)
    groups: dict[Any, list[Node]] = {}
    for node in module.graph.nodes:
        weight = _down_projection(node)
        # what leaves the graph keeps strides, and requires_grad, of its own
        leaves = any(user.op == "output" for user in node.users)
        if weight is not None and not leaves and effects.unwritten(node, node.args[0], weight):
            value = weight.meta["example_value"]
            groups.setdefault((node.args[0], effects.region[node], value.dtype, value.device), []).append(node)
    replaced = 0
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for (source, *_), nodes in groups.items():
        if len(nodes) < 2:
            continue
        first = nodes[0]
        nodes.sort(key=_is_frozen)  # what trains comes first, so that its gradients lie side by side
        weights = [node.args[1] for node in nodes]
        if any(order[weight] > order[first] for weight in weights):
            continue
        _stack(module, source, first, nodes, weights)
        replaced += 1
    if replaced:
        module.graph.lint()
        module.recompile()
    return replaced


def _stack(module: GraphModule, source: Node, first: Node, nodes: list[Node], weights: list[Any]) -> None:
    rows = [weight.meta["example_value"].shape[0] for weight in weights]
    with module.graph.inserting_before(first):
        stacked = module.graph.call_function(torch.cat, (weights, 0))
        product = module.graph.call_function(F.linear, (source, stacked))
        parts = module.graph.call_function(torch.split, (product, rows, -1))
        # passes that follow ask every node for its value; that of a product under autocast is known from its parts
        stacked.meta["example_value"] = torch.cat([weight.meta["example_value"] for weight in weights])
        product.meta["example_value"] = torch.cat([node.meta["example_value"] for node in nodes], -1)
        parts.meta["example_value"] = product.meta["example_value"].split(rows, -1)
        for index, node in enumerate(nodes):
            part = module.graph.call_function(operator.getitem, (parts, index))
            part.meta.update(node.meta)
            node.replace_all_uses_with(part)
    for node in nodes:
        module.graph.erase_node(node)


def adapter_weight(node: Any, parts: tuple[str, ...]) -> Node | None:
    """Returns the weight of a bias-free linear layer if it is a parameter with one of these parts in its name.

    None of any other node.
    """
    if not isinstance(node, Node) or node.op != "call_function" or node.target not in LINEAR:
        return None
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if bias is not None or len(node.args) < 2:
        return None
    weight = node.args[1]
    if not isinstance(weight, Node) or weight.op not in ("placeholder", "get_attr"):
        return None
    name = f"{weight.name} {weight.target}".lower()
    value = weight.meta.get("example_value")
    is_factor = any(part in name for part in parts) and isinstance(value, torch.Tensor) and value.ndim == 2
    return weight if is_factor else None


def _down_projection(node: Node) -> Node | None:
    return adapter_weight(node, DOWN_PROJECTIONS)


def _is_frozen(node: Node) -> bool:
    return adapter_weight(node, (FROZEN,)) is not None
