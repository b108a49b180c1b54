"""Graph pass: casts around adapters that are repeated or do nothing (float32 adapters on a bfloat16 base).

PEFT casts the input of every adapter by itself: q, k and v read three copies of one tensor, and what was wide already
is cast to what it is. One cast for all of them is also what makes them siblings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from .effects import Effects
from .siblings import DOWN_PROJECTIONS, adapter_weight

_BY_NAME = {"float": torch.float32, "double": torch.float64, "bfloat16": torch.bfloat16, "half": torch.float16}


def share_casts(module: GraphModule) -> int:
    """Takes out casts that feed an adapter and that another one, or none, does as well; returns how many.

    It declines where a switch of grad mode or autocast lies between two casts, and where anything writes into source or
    result.
    """
    effects = Effects(module)
    seen: dict[Any, Node] = {}
    removed = 0
    for node in list(module.graph.nodes):
        dtype = cast_to(node)
        if dtype is None or not _feeds_adapter(node) or not effects.unwritten(node, node.args[0]):
            continue
        same = node.args[0] if _dtype(node.args[0]) == dtype else seen.get((effects.region[node], node.args[0], dtype))
        if same is None:
            seen[(effects.region[node], node.args[0], dtype)] = node
            continue
        node.replace_all_uses_with(same)
        module.graph.erase_node(node)
        removed += 1
    if removed:
        module.recompile()
    return removed


def cast_to(node: Node) -> torch.dtype | None:
    """Returns the dtype that a node casts a tensor to, and does nothing else; None for any other node."""
    if node.op != "call_method" or not node.args or not isinstance(node.args[0], Node):
        return None
    if node.target in _BY_NAME:
        return _BY_NAME[str(node.target)] if len(node.args) == 1 and not node.kwargs else None
    if node.target != "to":
        return None
    given = [*node.args[1:], *([node.kwargs["dtype"]] if set(node.kwargs) == {"dtype"} else [])]
    whole = not node.kwargs or set(node.kwargs) == {"dtype"}
    return given[0] if whole and len(given) == 1 and isinstance(given[0], torch.dtype) else None


def _dtype(node: Any) -> torch.dtype | None:
    return getattr(node.meta.get("example_value"), "dtype", None) if isinstance(node, Node) else None


def _feeds_adapter(node: Node) -> bool:
    return any(adapter_weight(user, DOWN_PROJECTIONS) is not None and user.args[0] is node for user in node.users)
