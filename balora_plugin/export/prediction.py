"""How much of what an adapter says is lost in another: KL of next-token predictions, on fixed tokens or a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..pretrained import probe
from ..pretrained.quantised import is_quantised_linear, quantised_layers_stay_in_training_mode
from ..pretrained.switch import TeacherSwitch
from .algebra import relative
from .attach import exchange
from .lora_file import Adapter
from .reduced import Errors

WINDOW = 256  # tokens a forward pass
WINDOWS = 4  # of a text: a vocabulary of 128k takes half a GB of kept predictions

MUCH = 0.05  # of what training did
CLEAR = 30.0  # times what rounding does: so far training has to move predictions for a part of it to mean anything
_ROWS = 64  # positions at once in float64


@dataclass(frozen=True)
class Sample:
    """Tokens to compare predictions on: `windows` (1, n) int64; None for positions or columns: all of them."""

    name: str
    windows: tuple[Tensor, ...]
    positions: tuple[int, ...] | None = None
    columns: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """KL(exact || other) a token in nats, and what training moved: KL(exact || base), on the same tokens.

    `noise`: what rounding alone makes of it.
    """

    kl: float
    moved: float
    sample: str
    noise: float = 0.0

    @property
    def clear(self) -> bool:
        """Returns whether training moved predictions further than rounding does: else no part of it says a thing."""
        return self.moved > CLEAR * self.noise

    @property
    def relative(self) -> float:
        """Returns the loss as a part of what training moved."""
        return relative(self.kl, self.moved)

    def __str__(self) -> str:
        if not self.clear:
            return (
                f"not measurable on {self.sample}: training moved it by {self.moved:.2g}, and rounding alone by "
                f"{self.noise:.2g}"
            )
        return f"{self.kl:.2g} on {self.sample}, {self.relative:.2g} of the {self.moved:.2g} that training moved it"


def probe_sample(model: Any) -> Sample | None:
    """Returns the probe's tokens, which every adapter of ours stores logits of; None for no causal language model."""
    vocabulary = probe.vocabulary_of(model)
    if vocabulary is None:
        return None
    return Sample("the probe", (probe.token_ids(vocabulary),), probe.POSITIONS, probe.columns(vocabulary))


def text_sample(path: str, tokenizer: Any) -> Sample:
    """Returns the first tokens of a text file, WINDOWS x WINDOW at most.

    Raises:
        ValueError: the file is no text, or has less than two tokens.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--data {path} is no UTF-8 text: give a file of text like the training data's.") from None
    ids = tokenizer(text, truncation=True, max_length=WINDOW * WINDOWS, return_tensors="pt")["input_ids"]
    if ids.shape[1] < 2:
        raise ValueError(f"--data {path} has less than two tokens: give a file of text like the training data's.")
    return Sample(path, tuple(ids.split(WINDOW, dim=1)))


@torch.no_grad()
def predictions(model: Any, sample: Sample) -> list[Tensor]:
    """Returns the logits (positions, columns) float32 of each window, on the CPU."""
    device = model.get_input_embeddings().weight.device
    found = []
    for ids in sample.windows:
        with torch.autocast(device.type, enabled=False), quantised_layers_stay_in_training_mode(model):
            logits = model(input_ids=ids.to(device), use_cache=False).logits[0]
        logits = logits if sample.positions is None else logits[list(sample.positions)]
        logits = logits.float().cpu()
        found.append(logits if sample.columns is None else logits[:, sample.columns])
    return found


def mean_kl(exact: list[Tensor], other: list[Tensor]) -> float:
    """Returns KL(exact || other) a position, in nats, of logits (positions, columns).

    In float64: normalised in float32, the sums of probabilities would differ by more than a short training moves.
    """
    total = 0.0
    for p, q in zip(exact, other, strict=True):
        for one, two in zip(p.split(_ROWS), q.split(_ROWS), strict=True):
            left, right = one.double().log_softmax(-1), two.double().log_softmax(-1)
            total += float((left.exp() * (left - right)).sum())
    return max(0.0, total / sum(p.shape[0] for p in exact))


def rounding(exact: list[Tensor], eps: float) -> float:
    """Returns the KL a position that logits (positions, columns) have from themselves rounded to a relative `eps`.

    To its second order: half the variance of the error, by the predictions' own probabilities.
    """
    total = 0.0
    for logits in exact:
        z = logits.double()
        total += float(((z.softmax(-1) * z.square().nan_to_num(posinf=0.0)).sum()) * eps**2 / 2)
    return total / sum(logits.shape[0] for logits in exact)


def _resolution(model: Any) -> float:
    """Returns the relative step of the coarsest numbers that a model computes with."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    kinds |= {m.compute_dtype for m in model.modules() if is_quantised_linear(m) and getattr(m, "compute_dtype", None)}
    return max(torch.finfo(kind).eps for kind in kinds)


def from_stored(model: Any, stored: probe.Probe | None) -> Loss | None:
    """Returns how far `model` is from the trained model by the logits that were stored with it; None without them."""
    if stored is None or stored.base is None or stored.adapted is None:
        return None
    sample = probe_sample(model)
    if sample is None or stored.vocabulary != probe.vocabulary_of(model):
        return None
    exact = [stored.adapted]
    return Loss(mean_kl(exact, predictions(model, sample)), mean_kl(exact, [stored.base]), "the stored probe")


@dataclass(frozen=True)
class Lost:
    """What an exported adapter or merged model loses: of its weights and, where they were measured, of predictions."""

    errors: Errors
    loss: Loss | None = None

    @property
    def much(self) -> bool:
        """Returns whether it is worth a word."""
        measured = self.loss is not None and self.loss.clear
        return (self.loss.relative if self.loss is not None and measured else self.errors.total) > MUCH


class Yardstick:
    """What an adapter says on a sample, and how far training moved it; `model` is a PeftModel that holds it.

    Attributes:
        clear: Whether training moved predictions further than rounding does.
    """

    def __init__(self, model: PeftModel, sample: Sample) -> None:
        self._model, self.sample = model, sample
        self._exact = predictions(model, sample)
        with TeacherSwitch(model).off():
            self._moved = mean_kl(self._exact, predictions(model, sample))
        self._noise = rounding(self._exact, _resolution(model))
        self.clear = self.loss(model).clear

    def loss_of(self, adapter: Adapter) -> Loss:
        """Returns what another adapter of the same layers loses; it stays in the model."""
        exchange(self._model, adapter)
        return self.loss(self._model)

    def relative_loss(self, adapter: Adapter) -> float:
        """Returns [`loss_of`] as a part of what training moved."""
        return self.loss_of(adapter).relative

    def loss(self, model: Any) -> Loss:
        """Returns what another model loses."""
        return Loss(mean_kl(self._exact, predictions(model, self.sample)), self._moved, self.sample.name, self._noise)
