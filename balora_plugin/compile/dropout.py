"""Graph pass: dropout that is off gives its input, and its readers become siblings."""

from __future__ import annotations

from torch.fx import GraphModule
from torch.nn import functional as F

from .effects import Effects


def drop_idle_dropout(module: GraphModule) -> int:
    """Takes dropout out where it is off (evaluation, or p = 0); returns how many nodes.

    It declines where a result is written into.
    """
    effects = Effects(module)
    dropped = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not F.dropout or not node.args:
            continue
        p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        if (training is False or p == 0.0) and effects.unwritten(node, node.args[0]):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            dropped += 1
    if dropped:
        module.recompile()
    return dropped
