"""`torch.compile(backend="ba_lora")`: our passes on dynamo's graph, then inductor."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch._functorch import config as functorch_config
from torch._inductor import list_mode_options
from torch.fx import GraphModule

from .casts import share_casts
from .dropout import drop_idle_dropout
from .products import accumulate_products
from .siblings import stack_siblings

logger = logging.getLogger(__name__)
HOOK = "post_grad_custom_pre_pass"  # inductor's setting for a pass on each graph of aten, forward and backward
# in this order: each makes patterns of the next
PASSES: tuple[Callable[[GraphModule], int], ...] = (drop_idle_dropout, share_casts, stack_siblings, accumulate_products)


def transform(module: GraphModule) -> Counter[str]:
    """Runs every pass on a graph and the graphs inside it (checkpointed layers); returns what each replaced."""
    graphs = [child for child in module.modules() if isinstance(child, GraphModule)]
    return Counter({apply.__name__: sum(apply(graph) for graph in graphs) for apply in PASSES})


def ba_lora(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Compiles a graph as a dynamo backend, which PyTorch finds by the entry point `torch_dynamo_backends`.

    Args:
        module: Dynamo's graph of torch calls, before autograd: what the passes change gets its gradients from autograd.
        example_inputs: As dynamo gives them.
        mode: Inductor's, as in torch.compile(..., mode=...): a set of its options.
        options: Inductor's own, as in torch.compile(..., options=...).
    """
    settings = dict(list_mode_options(mode)) if mode else {}
    settings |= {key.replace("-", "_"): value for key, value in (options or {}).items()}
    replaced = transform(module)
    logger.debug("ba_lora: %s", ", ".join(f"{name} {count}" for name, count in replaced.items()))
    return lower(module, list(example_inputs), settings)


def lower(module: GraphModule, example_inputs: list[Any], options: dict[str, Any]) -> Any:
    """Hands a graph to inductor, with our pass before the one that `options`, or its config, may name."""
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx

    from .inductor import NarrowProducts

    patches = {**options, HOOK: NarrowProducts(options.get(HOOK, getattr(inductor_config, HOOK)))}
    return compile_fx(module, example_inputs, config_patches=patches)


def with_backward(module: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None) -> Any:
    """Runs [`ba_lora`] with the backward pass compiled at once: at its first call it is too late to go on without."""
    name = "force_non_lazy_backward_lowering"
    if not hasattr(functorch_config, name):  # older PyTorch: errors of the backward pass end the run there
        return ba_lora(module, example_inputs, mode=mode)
    with functorch_config.patch(name, True):
        return ba_lora(module, example_inputs, mode=mode)
