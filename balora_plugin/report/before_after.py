"""What a model says before and after: spectra of its logits, classes in its last layer, answers. Loads models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..samples.jsonl import Samples
from ..samples.models import load_model, load_tokenizer
from ..samples.rendering import is_plain, question_of, text_of
from .drawing import Look, Picture
from .groups import Group
from .runs import Run

ROWS = 16  # of --data for the logits' spectrum, at most so many tokens of each
TOKENS = 64
SAMPLES = 500  # of --data for the map of classes
NEW_TOKENS = 60


@dataclass(frozen=True)
class AskedOfModels:
    """What of models is asked for. `base`: the pre-trained one; `samples`: rows of --data; `prompts`: questions."""

    base: str
    samples: Samples | None = None
    prompts: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the rows are plain text, so that questions are asked without a chat template too."""
        return self.samples is not None and self.samples.task == "lm" and any(map(is_plain, self.samples.rows[:1]))


@dataclass
class Seen:
    """What one model gave: logits (M, V), features (N, d) with classes (N,), an answer to each question."""

    logits: Any = None
    features: Any = None
    labels: Any = None
    answers: list[str] = field(default_factory=list)


@dataclass
class Compared:
    """What the models gave: the pre-trained one and, by their groups' labels, those after training; and what failed."""

    before: Seen
    after: dict[str, Seen] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def compared_models(asked: AskedOfModels, groups: Sequence[Group]) -> Compared:
    """Runs the pre-trained model and that of each group's first run over what is asked.

    Raises:
        ValueError: the base does not load.
    """
    tokenizer = load_tokenizer(asked.base)
    samples = asked.samples or Samples("lm", [], "")
    found = Compared(_seen(load_model(asked.base, samples, tokenizer), tokenizer, asked))
    if asked.prompts and asked.plain and tokenizer.chat_template is not None:
        found.notes.append(
            "The questions are asked as the rows are written: as text, without the model's chat template."
        )
    for group in groups:
        run = group.runs[0]
        try:
            model = _trained(asked.base, samples, tokenizer, run)
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            found.notes.append(f"{run.name}: {' '.join(str(error).split())[:300]}")
            continue
        found.after[group.label] = _seen(model, tokenizer, asked)
    return found


def _trained(base: str, samples: Samples, tokenizer: Any, run: Run) -> Any:
    """A run's model: its adapter on the base, or what full fine-tuning saved."""
    from peft import PeftModel

    if run.adapter is not None:
        return PeftModel.from_pretrained(load_model(base, samples, tokenizer), str(run.adapter))
    if not (run.path / "config.json").is_file():
        raise ValueError("holds no adapter and no model")
    return load_model(str(run.path), samples, tokenizer)


def _seen(model: Any, tokenizer: Any, asked: AskedOfModels) -> Seen:
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = model.eval().to(device)
    found = Seen()
    with torch.no_grad():
        if asked.samples is not None and asked.samples.task == "classification":
            found.features, found.labels = _features(model, tokenizer, asked.samples)
        elif asked.samples is not None:
            found.logits = _logits(model, tokenizer, asked.samples)
        if asked.samples is None or asked.samples.task == "lm":
            found.answers = [_answer(model, tokenizer, prompt, plain=asked.plain) for prompt in asked.prompts]
    return found


def _logits(model: Any, tokenizer: Any, samples: Samples) -> Any:
    """The logits of the first rows, in float32 on the CPU."""
    import torch

    rows = []
    for row in samples.rows[:ROWS]:
        ids = tokenizer(text_of(row, tokenizer), truncation=True, max_length=TOKENS, return_tensors="pt")["input_ids"]
        if ids.numel():
            rows.append(model(input_ids=ids.to(model.device)).logits[0].float().cpu())
    return torch.cat(rows)


def _features(model: Any, tokenizer: Any, samples: Samples) -> tuple[Any, Any]:
    """The final hidden states that the head reads (N, d), and the classes (N,)."""
    import numpy as np
    import torch

    from ..objective.classification import features

    classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
    rows, found = samples.rows[:SAMPLES], []
    for start in range(0, len(rows), 16):
        texts = [[row[column] for row in rows[start : start + 16]] for column in samples.columns]
        batch = tokenizer(*texts, truncation=True, max_length=256, padding=True, return_tensors="pt").to(model.device)
        found.append(features(classifier, classifier.base_model(**batch)[0], batch).float().cpu())
    return torch.cat(found).numpy(), np.asarray([row["label"] for row in rows])


def _answer(model: Any, tokenizer: Any, prompt: str, *, plain: bool) -> str:
    templated = tokenizer.chat_template is not None and not plain  # a template writes the special tokens itself
    question = question_of(prompt, tokenizer, plain=plain)
    asked = tokenizer(question, return_tensors="pt", add_special_tokens=not templated)
    asked = asked["input_ids"].to(model.device)
    out = model.generate(
        input_ids=asked,
        attention_mask=asked.new_ones(asked.shape),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(out[0, asked.shape[1] :], skip_special_tokens=True)).strip()


def pictures(found: Compared, samples: Samples | None) -> Iterator[Picture]:
    """Spectra of logits, or the map of classes, where there are such."""
    if found.before.logits is not None:
        yield _of_logits(found)
    if samples is not None and samples.classes:
        for place, (name, seen) in enumerate({"before": found.before, **found.after}.items()):
            yield _of_classes(f"classes_{place}", name, seen, samples.classes)


def _of_logits(found: Compared) -> Picture:
    import torch

    every = {"before": found.before, **found.after}
    spectra = {name: torch.linalg.svdvals(seen.logits.double())[:64].tolist() for name, seen in every.items()}

    def draw(figure: Any, look: Look) -> None:
        axes = figure.subplots()
        for place, (name, values) in enumerate(spectra.items()):
            colour = look.text if not place else look.colour(place - 1)
            axes.plot(range(1, len(values) + 1), values, label=name, color=colour, ls="--" if not place else "-")
        axes.set_yscale("log")
        axes.set_xlabel("place")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("singular value")
        axes.legend()

    return Picture(
        "logits",
        "Spectra of the logits",
        f"Singular values of the logits of {len(found.before.logits)} tokens of the data, the 64 largest.",
        draw,
    )


def _of_classes(file: str, name: str, seen: Seen, classes: Sequence[str]) -> Picture:
    from ..glue.separation import Snapshot, plane, silhouette

    snapshot = Snapshot(0, seen.features, seen.labels)
    points, score = plane(snapshot), silhouette(snapshot)

    def draw(figure: Any, look: Look) -> None:
        axes = figure.subplots()
        axes.set_axis_off()
        for place, label in enumerate(classes[:12]):
            of_class = points[snapshot.labels == place]
            if len(of_class):
                axes.scatter(*of_class.T, s=10, color=look.colour(place), label=label, linewidths=0)
        axes.legend()

    return Picture(
        file,
        f"Classes in the last layer: {name}",
        f"t-SNE of what the head reads, {len(points)} samples. Silhouette: {score:.3f} (1: classes apart, 0: mixed).",
        draw,
    )
