"""Terms of a batch document by document, however its rows are made up: what packed and unpacked batches share."""

from __future__ import annotations

from itertools import pairwise

import torch
from helpers import TERMS, trainable

from balora_plugin.objective.request import StepRequest
from balora_plugin.schedules import Lambdas

SUMS = ("task", "consistency", "diversity")
TOKEN_TERMS = Lambdas(0.5, 0.02, 0.0)


def move(model):
    """Away from the start, so that every term has a gradient; the same for models of one shape."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
                p.add_(0.05 * noise.to(p))
    return model.train()


def step(model, batch):
    """One micro-batch, as a trainer's `ba_lora_run.inputs` made it, through the model's forward."""
    return model(**batch, ba_lora=StepRequest(config=TERMS.resolved("nlg"), lambdas=TOKEN_TERMS))


def documents(batch):
    """(row, start, stop) of every document: by position_ids, else by attention_mask, else whole rows."""
    ids, positions, mask = batch["input_ids"], batch.get("position_ids"), batch.get("attention_mask")
    found = []
    for row in range(len(ids)):
        if positions is None or (positions[row] == 0).sum() == 1:
            length = ids.shape[1] if mask is None else int(mask[row].sum())
            found.append((row, 0, length))
            continue
        edges = [*(positions[row] == 0).nonzero().flatten().tolist(), ids.shape[1]]
        found += [(row, start, stop) for start, stop in pairwise(edges)]
    return [(row, start, stop) for row, start, stop in found if (batch["labels"][row, start:stop] != -100).any()]


def only(batch, document):
    """The batch with nothing counted outside one document."""
    row, start, stop = document
    labels = torch.full_like(batch["labels"], -100)
    labels[row, start:stop] = batch["labels"][row, start:stop]
    return {**batch, "labels": labels}


def sums_by_document(model, batch):
    """{tokens of a document: (count, sums of task, consistency, diversity)}."""
    found = {}
    for row, start, stop in documents(batch):
        with torch.no_grad():
            out = step(model, only(batch, (row, start, stop)))
        key = tuple(batch["input_ids"][row, start:stop].tolist())
        found[key] = torch.stack([out.count.double(), *(getattr(out, name).double() for name in SUMS)])
    return found


def gradient(model, batches):
    """Of the sum of the token terms over all batches."""
    parameters = trainable(model)
    total = [torch.zeros_like(p) for p in parameters]
    for batch in batches:
        for sum_, part in zip(total, torch.autograd.grad(step(model, batch).loss, parameters), strict=True):
            sum_ += part
    return torch.cat([part.flatten() for part in total])


def assert_same_terms(model, packed, alone, tolerance):
    """Count, each term's sum for each document, and gradients of two arrangements of the same documents."""
    theirs, ours = (
        {key: sums for batch in batches for key, sums in sums_by_document(model, batch).items()}
        for batches in (alone, packed)
    )
    assert ours.keys() == theirs.keys() and len(ours) > 2
    for key, expected in theirs.items():
        assert ours[key][0] == expected[0]
        torch.testing.assert_close(ours[key], expected, rtol=tolerance, atol=tolerance)
    a, b = gradient(model, packed), gradient(model, alone)
    assert ((a - b).norm() / b.norm()).item() < tolerance


def leak(model, batch, inside=None):
    """How far the second document's terms move when the first one's tokens change: 0 without a leak.

    `inside`: where the documents are, for a batch that does not say so.
    """
    first, second, *_ = inside or documents(batch)
    changed = batch["input_ids"].clone()
    row, start, stop = first
    assert row == second[0]  # of one row
    changed[row, start + 1 : stop] = 3 + (changed[row, start + 1 : stop] + 7) % 80
    results = []
    for ids in (batch["input_ids"], changed):
        out = step(model, only({**batch, "input_ids": ids}, second))
        (grad,) = torch.autograd.grad(out.loss, trainable(model)[:1])
        results.append(torch.cat([torch.stack([getattr(out, name) for name in SUMS]).detach(), grad.flatten()]))
    assert results[0][:3].abs().min() > 1e-4  # each term says something
    return (results[0] - results[1]).abs().max().item()
