"""Our passes where inductor calls them: on its graphs of aten operators. The one file that knows its hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch._inductor.config  # noqa: F401  (custom_graph_pass does not import it itself)
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from . import narrow


class NarrowProducts(CustomGraphPass):
    """[`narrow_products`][balora_plugin.compile.narrow], then the user's own pass if there is one."""

    def __init__(self, following: Callable[[Graph], None] | None = None) -> None:
        self.following = following

    def __call__(self, graph: Graph) -> None:
        narrow.narrow_products(graph)
        if self.following is not None:
            self.following(graph)

    def uuid(self) -> Any:
        """Returns what compiled graphs are cached by, another for another version of the pass; None: not cached."""
        own = get_hash_for_files((narrow.__file__,))
        if self.following is None:
            return own
        theirs = getattr(self.following, "uuid", lambda: None)()
        return None if theirs is None else (own, theirs)
