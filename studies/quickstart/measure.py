"""Measures a fine-tuned model on held-out pairs: task loss, drift from the pre-trained model, entropy, effective rank.

All quantities are taken over the counted tokens, those of the completions with the end-of-sequence token; logits come
from float32 models and are normalised in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .corpus import Instruction

RANK_TOKENS = 512  # several times the hidden size, which bounds the rank of the logits


@dataclass(frozen=True)
class HeldOutBatch:
    """Right-padded sequences: `input_ids` and `attention_mask` [batch, length], `counted` [batch, length] (bool).

    `counted` marks the completion tokens themselves; each is predicted from the position before it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    counted: Tensor

    def targets(self) -> Tensor:
        """The counted token ids, row by row: [tokens]."""
        return self.input_ids[:, 1:][self.counted[:, 1:]]


@dataclass(frozen=True)
class Measurement:
    """One row of the results.

    task_loss: cross-entropy of the held-out completions, nats per token
    drift: KL(P_pretrained || P_finetuned), mean over the counted tokens, nats
    entropy: entropy of the output distribution, mean over the counted tokens, nats
    effective_rank: effective rank of the logits of the first counted tokens (see `effective_rank`)
    tokens: number of counted tokens
    """

    task_loss: float
    drift: float
    entropy: float
    effective_rank: float
    tokens: int

    def as_dict(self) -> dict[str, float | int]:
        """The row as plain numbers."""
        return asdict(self)


def encode(pair: Instruction, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], int]:
    """(token ids of prompt + completion + end of sequence, length of the prompt), cut as TRL cuts them."""
    prompt = tokenizer(pair.prompt)["input_ids"]
    ids = tokenizer(pair.prompt + pair.completion + tokenizer.eos_token)["input_ids"]
    return ids[:max_length], len(prompt)


def held_out_batches(
    pairs: Sequence[Instruction], tokenizer: PreTrainedTokenizerBase, max_length: int = 256, batch_size: int = 32
) -> list[HeldOutBatch]:
    """The pairs in their given order as padded batches."""
    encoded = [encode(pair, tokenizer, max_length) for pair in pairs]
    batches = []
    for start in range(0, len(encoded), batch_size):
        rows = encoded[start : start + batch_size]
        length = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        counted = torch.zeros(len(rows), length, dtype=torch.bool)
        for row, (ids, prompt) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
            counted[row, prompt : len(ids)] = True
        batches.append(HeldOutBatch(input_ids, attention_mask, counted))
    return batches


@torch.no_grad()
def counted_logits(model: nn.Module, batch: HeldOutBatch) -> Tensor:
    """Logits that predict the counted tokens of one batch: [tokens, vocabulary], as the model gives them."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits[:, :-1][batch.counted[:, 1:]]


def iterate_logits(model: nn.Module, batches: Sequence[HeldOutBatch]) -> Iterator[Tensor]:
    """`counted_logits` of every batch with the model in evaluation mode; its mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            yield counted_logits(model, batch)
    finally:
        model.train(was_training)


def token_losses(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood per token, nats: [tokens] from [tokens, vocabulary] and [tokens]."""
    return -log_probs.gather(1, targets[:, None]).squeeze(1)


def token_divergences(reference: Tensor, log_probs: Tensor) -> Tensor:
    """KL(reference || model) per token, nats: [tokens] from two log-probabilities [tokens, vocabulary]."""
    return (reference.exp() * (reference - log_probs)).sum(dim=-1)


def token_entropies(log_probs: Tensor) -> Tensor:
    """Entropy of each output distribution, nats: [tokens] from [tokens, vocabulary]."""
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def effective_rank(logits: Tensor) -> float:
    """Effective rank of a matrix [tokens, vocabulary] after Roy and Vetterli (2007).

    The exponential of the entropy of the singular values normalised to sum 1. It lies between 1 (one direction
    carries everything) and the rank (all directions equally strong), and it falls as the spectrum concentrates. Only
    matrices of the same tokens can be compared.
    """
    values = torch.linalg.svdvals(logits.double())
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()


def reference_logits(model: nn.Module, batches: Sequence[HeldOutBatch]) -> list[Tensor]:
    """The pre-trained model's counted logits, one [tokens, vocabulary] per batch, for `measure`."""
    return list(iterate_logits(model, batches))


def measure(model: nn.Module, batches: Sequence[HeldOutBatch], reference: Sequence[Tensor]) -> Measurement:
    """Measures `model` against the pre-trained model's `reference` logits on the same batches."""
    return measure_logits(iterate_logits(model, batches), batches, reference)


def measure_logits(
    found: Iterable[Tensor], batches: Sequence[HeldOutBatch], reference: Sequence[Tensor]
) -> Measurement:
    """Measures a model by its counted logits, one [tokens, vocabulary] per batch."""
    sums = {"task_loss": 0.0, "drift": 0.0, "entropy": 0.0}
    tokens = 0
    head: list[Tensor] = []
    for batch, before, logits in zip(batches, reference, found, strict=True):
        log_probs = logits.double().log_softmax(dim=-1)
        sums["task_loss"] += token_losses(log_probs, batch.targets()).sum().item()
        sums["drift"] += token_divergences(before.double().log_softmax(dim=-1), log_probs).sum().item()
        sums["entropy"] += token_entropies(log_probs).sum().item()
        if tokens < RANK_TOKENS:
            head.append(logits[: RANK_TOKENS - tokens])
        tokens += len(logits)
    means = {name: total / tokens for name, total in sums.items()}
    return Measurement(**means, effective_rank=effective_rank(torch.cat(head)), tokens=tokens)


def max_logit_difference(one: nn.Module, other: nn.Module, batch: HeldOutBatch) -> float:
    """Largest absolute difference between the counted logits of two models on one batch."""
    pairs = zip(iterate_logits(one, [batch]), iterate_logits(other, [batch]), strict=True)
    return max((first - second).abs().max().item() for first, second in pairs)
