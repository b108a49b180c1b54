"""Graph pass: of a product only those rows or columns are taken that somebody reads.

The gradient by stacked factors [dA, A0] or [B0, dB] is one product, of which the frozen half is cut off and dropped.
Here the cut moves before the product. The pass works on aten's graphs, after autograd, where that gradient is a node.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
_TIMES = (aten.mul.Tensor, aten.mul.Scalar)


def narrow_products(graph: Graph) -> int:
    """Narrows every mm of which slices along one dimension alone are read; returns how many.

    Between product and slices may lie transpositions and products with a number. It declines where anything else reads
    the product, where slices differ in dimension, step or are not constant, and where together they are all of it.
    """
    narrowed = sum(_narrow(graph, node) for node in list(graph.nodes) if node.target is aten.mm.default)
    if narrowed:
        graph.eliminate_dead_code()
        graph.lint()
    return narrowed


def _narrow(graph: Graph, product: Node) -> bool:
    chain, swapped = [product], False
    while len(chain[-1].users) == 1 and _passes_through(user := next(iter(chain[-1].users))):
        swapped ^= user.target not in _TIMES
        chain.append(user)
    found = [_bounds(user, chain[-1]) for user in chain[-1].users]
    bounds = [b for b in found if b is not None]
    if not bounds or len(bounds) < len(found) or len({dim for dim, _, _ in bounds}) > 1:
        return False
    dim, low, high = bounds[0][0], min(b[1] for b in bounds), max(b[2] for b in bounds)
    if high - low >= chain[-1].meta["val"].shape[dim]:
        return False
    side = dim ^ swapped  # of the product itself: 0 its rows, of the first factor; 1 its columns, of the second
    operands = list(product.args)
    with graph.inserting_before(product):
        operands[side] = _value(graph.call_function(aten.slice.Tensor, (operands[side], side, low, high)))
    product.args = tuple(operands)
    for node in chain:
        _value(node)
    for user, (_, start, end) in zip(list(chain[-1].users), bounds, strict=True):
        user.args = (chain[-1], dim, start - low, end - low)
        _value(user)
    return True


def _passes_through(node: Node) -> bool:
    """Returns whether this is a transposition of a matrix, or its product with a number."""
    if node.target is aten.permute.default:
        return list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    if node.target in _TIMES:
        return isinstance(node.args[1], Real)
    return node.target is aten.t.default


def _bounds(node: Node, source: Node) -> tuple[int, int, int] | None:
    """Returns (dimension, start, end) of a slice of `source`, with step 1 and constant bounds."""
    if node.target is not aten.slice.Tensor or node.kwargs or node.args[0] is not source:
        return None
    given: tuple[Any, ...] = node.args[1:]
    dim, start, end, step = given + (0, None, None, 1)[len(given) :]
    size: Any = source.meta["val"].shape[dim]
    if not all(isinstance(x, int) for x in (dim, size, step)) or step != 1:
        return None
    if not all(x is None or isinstance(x, int) for x in (start, end)):
        return None
    low, high, _ = slice(start, end).indices(size)
    return dim % 2, low, high


def _value(node: Node) -> Node:
    """Gives a node the (fake) value of its operation on its inputs' values."""
    values: Any = map_arg(node.args, lambda arg: arg.meta["val"])
    assert callable(node.target)
    node.meta["val"] = node.target(*values, **node.kwargs)
    return node
