"""How much of what an adapter says is lost in another: KL of next-token predictions, on fixed tokens or a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..pretrained import probe
from ..pretrained.quantised import quantised_layers_stay_in_training_mode
from ..pretrained.switch import TeacherSwitch
from .algebra import relative
from .attach import exchange
from .lora_file import Adapter
from .reduced import Errors

WINDOW = 256  # tokens a forward pass
WINDOWS = 4  # of a text: a vocabulary of 128k takes half a GB of kept predictions

MUCH = 0.05  # of what training did


@dataclass(frozen=True)
class Sample:
    """Tokens to compare predictions on: `windows` (1, n) int64; None for positions or columns: all of them."""

    name: str
    windows: tuple[Tensor, ...]
    positions: tuple[int, ...] | None = None
    columns: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """KL(exact || other) a token in nats, and what training moved: KL(exact || base), on the same tokens."""

    kl: float
    moved: float
    sample: str

    @property
    def relative(self) -> float:
        """Returns the loss as a part of what training moved."""
        return relative(self.kl, self.moved)

    def __str__(self) -> str:
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
    """Returns the log-probabilities (positions, columns) float32 of each window, on the CPU."""
    device = model.get_input_embeddings().weight.device
    found = []
    for ids in sample.windows:
        with torch.autocast(device.type, enabled=False), quantised_layers_stay_in_training_mode(model):
            logits = model(input_ids=ids.to(device), use_cache=False).logits[0]
        logits = logits if sample.positions is None else logits[list(sample.positions)]
        logits = logits.float().cpu()
        found.append((logits if sample.columns is None else logits[:, sample.columns]).log_softmax(-1))
    return found


def mean_kl(exact: list[Tensor], other: list[Tensor]) -> float:
    """Returns KL(exact || other) a position, in nats, summed in float64."""
    total = sum(float((p.double().exp() * (p.double() - q.double())).sum()) for p, q in zip(exact, other, strict=True))
    return max(0.0, total / sum(p.shape[0] for p in exact))


def from_stored(model: Any, stored: probe.Probe | None) -> Loss | None:
    """Returns how far `model` is from the trained model by the logits that were stored with it; None without them."""
    if stored is None or stored.base is None or stored.adapted is None:
        return None
    sample = probe_sample(model)
    if sample is None or stored.vocabulary != probe.vocabulary_of(model):
        return None
    exact, before = ([logits.log_softmax(-1)] for logits in (stored.adapted, stored.base))
    return Loss(mean_kl(exact, predictions(model, sample)), mean_kl(exact, before), "the stored probe")


@dataclass(frozen=True)
class Lost:
    """What an exported adapter or merged model loses: of its weights and, where they were measured, of predictions."""

    errors: Errors
    loss: Loss | None = None

    @property
    def much(self) -> bool:
        """Returns whether it is worth a word."""
        return (self.errors.total if self.loss is None else self.loss.relative) > MUCH


class Yardstick:
    """What an adapter says on a sample, and how far training moved it; `model` is a PeftModel that holds it."""

    def __init__(self, model: PeftModel, sample: Sample) -> None:
        self._model, self.sample = model, sample
        self._exact = predictions(model, sample)
        with TeacherSwitch(model).off():
            self._moved = mean_kl(self._exact, predictions(model, sample))

    def loss_of(self, adapter: Adapter) -> Loss:
        """Returns what another adapter of the same layers loses; it stays in the model."""
        exchange(self._model, adapter)
        return self.loss(self._model)

    def relative_loss(self, adapter: Adapter) -> float:
        """Returns [`loss_of`] as a part of what training moved."""
        return self.loss_of(adapter).relative

    def loss(self, model: Any) -> Loss:
        """Returns what another model loses."""
        return Loss(mean_kl(self._exact, predictions(model, self.sample)), self._moved, self.sample.name)
