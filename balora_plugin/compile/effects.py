"""What nodes of dynamo's graph do beside giving results: write into tensors, switch modes. It is not functionalised."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_IN_PLACE = ("add", "and", "concat", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub")
_WRITING_OPERATORS = {"setitem", "delitem", "itruediv", "ixor", *(f"i{name}" for name in _IN_PLACE)}
_KNOWN = ("torch", "_operator", "builtins", "math")  # libraries whose names say what writes


class Effects:
    """Taken of a graph before it is changed: what may move or be merged without a change of values or gradients.

    Attributes:
        region: For each node how many times grad mode, autocast or the like was switched before it.
    """

    def __init__(self, module: GraphModule) -> None:
        self.region: dict[Node, int] = {}
        self._written: set[int] = set()
        region = 0
        for node in module.graph.nodes:
            self.region[node] = region
            # what gives neither tensor nor number is called for its effect
            if node.op == "call_function" and node.meta.get("example_value") is None:
                region += 1
            if _writes(module, node):
                self._written |= _storages([source.meta.get("example_value") for source in node.all_input_nodes])

    def unwritten(self, *nodes: Node) -> bool:
        """Returns whether no node of the graph writes into memory of these results, be it through a view."""
        return self._written.isdisjoint(_storages([node.meta.get("example_value") for node in nodes]))


def _writes(module: GraphModule, node: Node) -> bool:
    """Returns whether a node may write into one of its inputs; which one is not asked."""
    if node.op == "call_method":
        return _says_in_place(str(node.target))
    if node.op != "call_function":
        return node.op == "call_module"
    target: Any = node.target
    if isinstance(target, HigherOrderOperator):
        inner = _graphs_called(module, node)
        return not inner or any(_writes(graph, child) for graph in inner for child in graph.graph.nodes)
    if node.kwargs.get("out") is not None:
        return True
    if isinstance(target, OpOverloadPacket):
        target = getattr(target, "default", None)
    if isinstance(target, OpOverload):
        return target._schema.is_mutable
    known = (getattr(target, "__module__", None) or "torch").split(".")[0] in _KNOWN
    return not known or _says_in_place(getattr(target, "__name__", "_")) or _argument(node, "inplace") is True


def _says_in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name.strip("_") in _WRITING_OPERATORS


def _argument(node: Node, name: str) -> Any:
    """Returns what a function is given under a name, by position too; None where it has no such argument."""
    if name in node.kwargs or not callable(node.target):
        return node.kwargs.get(name)
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get(name)
    except (TypeError, ValueError):  # built-in functions tell no signature; their names say it
        return None


def _graphs_called(module: GraphModule, node: Node) -> list[GraphModule]:
    found = (getattr(module, str(source.target), None) for source in node.all_input_nodes if source.op == "get_attr")
    return [graph for graph in found if isinstance(graph, GraphModule)]


def _storages(value: Any) -> set[int]:
    """Returns where the memory lies of a (fake) tensor, of all in a tuple or inside a subclass such as DTensor."""
    if isinstance(value, (tuple, list)):
        return {storage for item in value for storage in _storages(item)}
    if not isinstance(value, torch.Tensor):
        return set()
    if is_traceable_wrapper_subclass(value):
        return {storage for name in value.__tensor_flatten__()[0] for storage in _storages(getattr(value, name))}
    return {value.untyped_storage()._cdata}
