"""How far apart the classes lie in the last layer while a model trains: t-SNE maps and silhouette scores of runs side
by side, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from ..findings import check_extra
from ..objective.classification import features
from ..training.host import State
from .data import SampleTable

SAMPLES = 1000  # the first of a split: t-SNE's cost grows faster than their number


@dataclass(frozen=True)
class Snapshot:
    """Final hidden states that the head reads, (N, d) float32, after `step` optimizer steps, and the classes (N,)."""

    step: int
    rows: np.ndarray
    labels: np.ndarray


class FeatureTap(TrainerCallback):
    """Takes a [`Snapshot`] of a dataset after the given optimizer steps, and after the last one."""

    def __init__(self, steps: Sequence[int], rows: SampleTable, collate: Any) -> None:
        self.steps, self.rows, self.collate = set(steps), rows.select(range(min(len(rows), SAMPLES))), collate
        self.found: dict[int, Snapshot] = {}

    def on_train_begin(self, args: Any, state: State, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Takes the features before the first step, if they are asked for."""
        self._take(0, args, model)

    def on_step_end(self, args: Any, state: State, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Takes the features after the steps that were asked for, and after the last one."""
        if state.global_step >= state.max_steps:
            self.steps.add(state.global_step)
        self._take(state.global_step, args, model)

    @torch.no_grad()
    def _take(self, step: int, args: Any, model: Any) -> None:
        if step not in self.steps or step in self.found:
            return
        classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
        training = [module for module in model.modules() if module.training]
        taken = []
        try:
            model.eval()
            inputs = self.rows.remove_columns("labels")
            for start in range(0, len(inputs), args.per_device_eval_batch_size):
                stop = min(start + args.per_device_eval_batch_size, len(inputs))
                batch = self.collate([inputs[i] for i in range(start, stop)]).to(classifier.device)
                hidden = classifier.base_model(**batch)[0]
                taken.append(features(classifier, hidden, batch).float().cpu())
        finally:
            for module in training:
                module.training = True
        self.found[step] = Snapshot(step, torch.cat(taken).numpy(), np.asarray(self.rows["labels"], dtype=np.int64))


def silhouette(snapshot: Snapshot) -> float:
    """Returns the mean silhouette of the classes among the features themselves, not their map.

    From -1 to 1; NaN for a single class.
    """
    from sklearn.metrics import silhouette_score

    classes = len(set(snapshot.labels.tolist()))
    if not 2 <= classes < len(snapshot.labels):
        return float("nan")
    return float(silhouette_score(snapshot.rows, snapshot.labels))


def plane(snapshot: Snapshot, seed: int = 0) -> np.ndarray:
    """Returns a t-SNE map of the features, (N, 2)."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(snapshot.rows) - 1) / 3)
    mapped: np.ndarray = TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(snapshot.rows)
    return mapped


def figure(runs: dict[str, list[Snapshot]], path: str, title: str) -> dict[str, dict[int, float]]:
    """Writes a PNG, a row a run and a column a step; returns {run: {step: silhouette}}.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(snapshots) for snapshots in runs.values())
    drawing = Figure(figsize=(3.2 * columns, 3.2 * len(runs)), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(len(runs), columns, squeeze=False)
    scores: dict[str, dict[int, float]] = {}
    for across, (name, snapshots) in zip(axes, runs.items(), strict=True):
        scores[name] = {snapshot.step: silhouette(snapshot) for snapshot in snapshots}
        for axis in across:
            axis.set_axis_off()
        for axis, snapshot in zip(across, snapshots, strict=False):
            points = plane(snapshot)
            axis.scatter(points[:, 0], points[:, 1], c=snapshot.labels, cmap="viridis", s=6, linewidths=0)
            value = scores[name][snapshot.step]
            axis.set_title(f"{name}, step {snapshot.step}: silhouette {value:.3f}", fontsize=8)
    drawing.suptitle(title, fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)
    return scores


def check_matplotlib() -> None:
    """Raises an ImportError with the command to install it, where it is missing."""
    check_extra("glue,plots", ("matplotlib",), "--separation")


def save_snapshots(path: str, snapshots: Sequence[Snapshot]) -> None:
    """Writes snapshots of one run as one .npz of plain arrays."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"labels": snapshots[0].labels, **{f"step_{s.step}": s.rows for s in snapshots}}
    np.savez_compressed(path, **arrays)


def load_snapshots(path: str) -> list[Snapshot]:
    """Reads what [`save`] wrote, in the order of the steps."""
    with np.load(path, allow_pickle=False) as file:
        steps = sorted(int(name.removeprefix("step_")) for name in file.files if name != "labels")
        return [Snapshot(step, file[f"step_{step}"], file["labels"]) for step in steps]
