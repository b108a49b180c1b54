"""Pictures of what was logged over the steps: losses, terms, shares, weights, learning rate, gradient norm, cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import TERMS
from .drawing import Look, Picture
from .groups import Group
from .runs import Curve, Run, clipped

NEGLIGIBLE = 1e-3  # a share below it hardly acts: as a run says itself
PARTS = {"teacher": "teacher", "student": "student", "token_terms": "terms", "spectrum": "spectrum", "rest": "rest"}

Read = Callable[[Run], Curve]


@dataclass(frozen=True)
class Curves:
    """How curves are shown. `points`: a key that is drawn as points beside them; `bar`: a dotted line at this value."""

    name: str
    title: str
    caption: str
    points: str = ""
    bar: float | None = None
    logarithmic: bool = False


def losses(groups: Sequence[Group]) -> Iterator[Picture]:
    """The task's loss in training and held out, and drift against it."""
    training = Curves("task_loss", "Task loss in training", "The loss without the terms.")
    yield from _lines(training, groups, _logged("balora/task", "loss"))
    held_out = Curves("held_out_loss", "Task loss held out", "Of the evaluations of a run.")
    yield from _lines(held_out, groups, _logged("eval_loss"))
    drift = "KL from the model that training began with, in nats a counted token or sample, held out (monitor: true)."
    found = [*_lines(Curves("drift", "Drift from the model before", drift), groups, _logged("eval_balora/drift"))]
    yield from found
    if found:
        yield Picture(
            "drift_against_loss",
            "Drift against task loss",
            "One point an evaluation, the last one large, a ring before the first step. Left: learnt more of the task. "
            "Low: stayed nearer to the model before on these rows; on other text nothing was measured.",
            lambda figure, look: _drift_against_loss(figure, look, groups),
        )
    entropy = Curves("entropy", "Entropy of the predictions", "In nats, held out.")
    yield from _lines(entropy, groups, _logged("eval_balora/entropy", "eval_entropy"))


def term_curves(groups: Sequence[Group]) -> Iterator[Picture]:
    """Each term, its share of the gradient, its weight."""
    words = {
        "consistency": "Distance from the teacher's predictions, unweighted: 0 at the start.",
        "diversity": "Minus the entropy of the predictions (of classifiers: their covariance), unweighted.",
        "svd": "Minus the share of the leading singular values, unweighted.",
    }
    share = f"Norm of the weighted term's gradient over the task's; below {NEGLIGIBLE:g} (dotted) it hardly acts."
    for name in TERMS:
        of_term = Curves(name, f"Term: {name}", words[name], points=f"eval_balora/{name}")
        yield from _lines(of_term, groups, _logged(f"balora/{name}"))
    for name in TERMS:
        of_share = Curves(f"share_{name}", f"Share of the gradient: {name}", share, bar=NEGLIGIBLE, logarithmic=True)
        yield from _lines(of_share, groups, _logged(f"balora/share_{name}"))
    for name in TERMS:
        of_weight = Curves(f"lambda_{name}", f"Weight: {name}", "As it was logged, or as the run's schedule says.")
        yield from _lines(of_weight, groups, _weight(name))


def optimisation(groups: Sequence[Group]) -> Iterator[Picture]:
    """Learning rate, and gradient norm with what was clipped."""
    yield from _lines(Curves("learning_rate", "Learning rate", ""), groups, _logged("learning_rate"))
    runs = [run for group in groups for run in group.runs if run.curve("grad_norm")]
    if not runs:
        return
    said = [f"{run.name}: {_clipped_in_words(run)}" for run in runs[:8]]
    more = f"; and {len(runs) - 8} more runs" if len(runs) > 8 else ""
    yield Picture(
        "gradient_norm",
        "Gradient norm",
        "Before clipping; the dashed line is max_grad_norm, a ring is a logged step that was clipped. Clipped steps: "
        f"{'; '.join(said)}{more}.",
        lambda figure, look: _gradient_norm(figure, look, groups),
    )


def cost(groups: Sequence[Group]) -> Iterator[Picture]:
    """Seconds of an optimizer step by part."""
    runs = [run for group in groups for run in group.runs if run.cost.get("seconds_per_step")]
    if runs:
        yield Picture(
            "cost",
            "Cost of an optimizer step",
            "Mean seconds by part, of each run.",
            lambda figure, look: _cost(figure, look, runs),
            height=1.4 + 0.32 * len(runs),
        )


def _clipped_in_words(run: Run) -> str:
    unsaid = "" if run.clip[1] else f" (if clipped at {run.clip[0]:g})"
    return f"{len([*clipped(run)])} of {len(run.curve('grad_norm'))}{unsaid}"


def _logged(*keys: str) -> Read:
    """Reads the first of these keys that a run has logged."""

    def read(run: Run) -> Curve:
        return next((curve for key in keys if (curve := run.curve(key))), [])

    return read


def _weight(term: str) -> Read:
    """Reads a term's weight; nothing where it is 0 all along."""

    def read(run: Run) -> Curve:
        curve = run.weights(term)
        return curve if any(value for _, value in curve) else []

    return read


def _lines(kind: Curves, groups: Sequence[Group], read: Read) -> Iterator[Picture]:
    """A picture of one curve a run, coloured by group; nothing where no run has it."""
    points = _logged(kind.points) if kind.points else _nothing
    runs = [run for group in groups for run in group.runs]
    if not any(read(run) or points(run) for run in runs):
        return
    caption = f"{kind.caption} Points: held out." if any(points(run) for run in runs) else kind.caption

    def draw(figure: Any, look: Look) -> None:
        axes = figure.subplots()
        for place, group in enumerate(groups):
            label = group.label
            for run in group.runs:
                label = _plot(axes, read(run), look.line_of(place), label)
                if points(run):
                    axes.plot(*zip(*points(run), strict=True), "o", ms=4, color=look.colour(place), label=label or "_")
                    label = ""
        if kind.logarithmic:
            _logarithmic(axes)
        if kind.bar is not None:
            axes.axhline(kind.bar, color=look.text, lw=0.8, ls=":")
        _finish(axes, len(groups))

    yield Picture(kind.name, kind.title, caption, draw)


def _nothing(run: Run) -> Curve:
    return []


def _plot(axes: Any, curve: Curve, style: dict[str, Any], label: str) -> str:
    """Draws a curve; returns the label that is left for the next one."""
    curve = [(step, value) for step, value in curve if math.isfinite(value)]
    if not curve:
        return label
    marker = "o" if len(curve) < 12 else ""
    axes.plot(*zip(*curve, strict=True), marker=marker, ms=3.5, alpha=0.85, label=label or "_", **style)
    return ""


def _logarithmic(axes: Any) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _finish(axes: Any, groups: int) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if groups > 1:
        axes.legend()


def _drift_against_loss(figure: Any, look: Look, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    before = None
    for place, group in enumerate(groups):
        label = group.label
        for run in group.runs:
            loss = dict(run.curve("eval_loss"))
            both = [(loss[step], value) for step, value in run.curve("eval_balora/drift") if step in loss]
            if both:
                axes.plot(*zip(*both, strict=True), "-", lw=0.8, marker=".", ms=4, color=look.colour(place), alpha=0.6)
                axes.plot(*both[-1], "o", ms=8, color=look.colour(place), label=label or "_")
                label = ""
            if both and 0.0 in loss:
                before = both[0]
    if before is not None:
        axes.plot(*before, "o", ms=9, mfc="none", color=look.text, label="before")
    axes.set_xlabel("held-out task loss")
    axes.set_ylabel("drift, nats")
    if len(groups) > 1:
        axes.legend()


def _gradient_norm(figure: Any, look: Look, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    for place, group in enumerate(groups):
        label = group.label
        for run in group.runs:
            label = _plot(axes, run.curve("grad_norm"), look.line_of(place), label)
            above = [*clipped(run)]
            if above:
                axes.plot(*zip(*above, strict=True), "o", ms=7, mfc="none", mew=1.2, color=look.colour(place))
    for limit in sorted({run.clip[0] for group in groups for run in group.runs}):
        if math.isfinite(limit):
            axes.axhline(limit, color=look.text, lw=0.8, ls="--")
    _logarithmic(axes)
    _finish(axes, len(groups))


def _cost(figure: Any, look: Look, runs: Sequence[Run]) -> None:
    axes = figure.subplots()
    names = [run.name for run in runs]
    left = [0.0] * len(runs)
    for place, (part, words) in enumerate(PARTS.items()):
        widths = [float(run.cost["seconds_per_step"].get(part) or 0.0) for run in runs]
        if any(widths):
            axes.barh(names, widths, left=left, height=0.6, color=look.colour(place), label=words)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    figure.legend(loc="outside upper center", ncols=5)
