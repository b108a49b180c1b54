"""Whether teacher and student of a run share the layers below its adapter, and what that has saved."""

from __future__ import annotations

from typing import Any

from ..pretrained.shared_layers import SharedLayers
from .acting import model_dropout
from .run_state import RunState


def layers_to_share(run: RunState, args: Any) -> SharedLayers | None:
    """Returns the layers that teacher and student may compute once, or why they may not; None: no teacher runs.

    `args`: the host's.
    """
    if not run.config.lambda_consistency:
        return None
    return SharedLayers(run.model, _reason(run, args))


def _reason(run: RunState, args: Any) -> str:
    """What of the settings keeps teacher and student apart; "" for nothing."""
    compiled = run.compiled is not None and run.compiled.student is not None
    reasons = {
        f"teacher_pass={run.config.teacher_pass!r}": run.config.teacher_pass == "whole",
        "the teacher is a model of its own": run.teacher is not None,
        "the teacher's outputs come from teacher_cache": run.cache is not None,
        "anchor rows are the student's alone": run.anchors is not None,
        "compile: true makes one graph of all layers (compile: layers does not)": compiled,
        "torch_compile: graphs of the host's may leave hooks out": bool(getattr(args, "torch_compile", False)),
        "the model has dropout of its own": bool(model_dropout(run.model)),
    }
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
