"""Where the teacher's pass is saved in part: what a run lets it share with the student's, and what that has saved."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..distributed import is_sharded
from ..pretrained.by_layer import ByLayer
from ..pretrained.shared_layers import SharedLayers
from .acting import model_dropout
from .run_state import RunState
from .teacher_rows import apart_in_words


def layers_to_share(run: RunState, args: Any) -> SharedLayers | None:
    """Returns the layers that teacher and student may compute once, or why they may not; None: no teacher runs.

    `args`: the host's.
    """
    if not run.config.lambda_consistency:
        return None
    reasons = {
        "teacher_pass='whole'": run.config.teacher_pass == "whole",
        "anchor rows are the student's alone": run.anchors is not None,
        "the model has dropout of its own": bool(model_dropout(run.model)),
    }
    return SharedLayers(run.model, _first(reasons) or _needs_a_pass(run, args))


def teacher_by_layer(run: RunState, args: Any) -> ByLayer | None:
    """Returns what lets the teacher run inside the student's pass, or says why it may not; None: nobody asks for it."""
    if not run.config.lambda_consistency or run.config.teacher_pass != "by_layer":
        return None
    layered = run.compiled is not None and run.compiled.layers is not None
    why = _needs_a_pass(run, args) or ("compile: layers compiles the layers' own forward" if layered else "")
    why = why or apart_in_words(run.config.teacher_interval, args.gradient_accumulation_steps)
    return ByLayer(run.model, why, partial(_say, run))


def _say(run: RunState, why: str) -> None:
    run.warn("by_layer", f"teacher_pass: by_layer does not act, the teacher runs in a pass of its own: {why}.")


def _needs_a_pass(run: RunState, args: Any) -> str:
    """What of the settings keeps teacher and student apart, whichever the way; "" for nothing."""
    compiled = run.compiled is not None and run.compiled.student is not None
    return _first(
        {
            "the teacher is a model of its own": run.teacher is not None,
            "the teacher's outputs come from teacher_cache": run.cache is not None,
            "compile: true makes one graph of all layers (compile: layers does not)": compiled,
            "torch_compile: graphs of the host's may leave hooks out": bool(getattr(args, "torch_compile", False)),
        }
    )


def _first(reasons: dict[str, bool]) -> str:
    return next((reason for reason, holds in reasons.items() if holds), "")


def sharing_report(run: RunState) -> dict[str, Any] | None:
    """Returns what was shared, JSON-ready: `layers` of `of`, in `passes` student's passes, or `why` not."""
    shared = run.shared
    if shared is None:
        return None
    return {
        "layers": shared.first if shared.proven else 0,
        "of": shared.total,
        "passes": shared.passes,
        "why": shared.why,
    }


def by_layer_report(run: RunState) -> dict[str, Any] | None:
    """Returns how the teacher ran inside the student's pass, JSON-ready; None where nobody asked for it.

    `layers` in `passes`, or `why` not; `gathered_less_gib`: the weights, as loaded, that were gathered once less, where
    an engine has split them.
    """
    by_layer = run.by_layer
    if by_layer is None:
        return None
    saved = by_layer.bytes_once if is_sharded(run.model) else 0
    return {
        "layers": by_layer.total,
        "passes": by_layer.passes,
        "gathered_less_gib": saved / 2**30,
        "why": by_layer.why,
    }
