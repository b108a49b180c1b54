"""Vision-language models: text and images through the objective, against a dense reference from their own logits."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import TERMS, ba_lora
from multimodal import FAMILIES, image_batch, skip_where_broken, text_batch, tiny_multimodal
from peft import PeftModel
from torch.nn import functional as F

from balora_plugin import regularizers
from balora_plugin.objective.install import install
from balora_plugin.objective.request import StepRequest
from balora_plugin.pretrained.lm_head import check_head
from balora_plugin.schedules import Lambdas
from balora_plugin.training.checks.model import resolve

pytestmark = pytest.mark.hosts

CONFIG = TERMS.resolved("nlg")
CASES = [(name, kind) for name in FAMILIES for kind in ("text", "images")]


def batch_of(name, kind):
    """In float64, as the models are here."""
    batch = text_batch() if kind == "text" else image_batch(name)
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def without_labels(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


def gradients(loss, parameters):
    """Zero where nothing depends on a parameter: Mllama leaves its cross-attention out where there is no image."""
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def step(model, batch):
    request = StepRequest(config=CONFIG, lambdas=Lambdas(0.5, 0.02, 0.02))
    return model(**copy.copy(batch), ba_lora=request)


def dense(model, teacher, batch):
    """(task, consistency, negative entropy, spectral term) of the model's own logits, the first three sums."""
    rows = batch["labels"][:, 1:] != -100
    student = model(**without_labels(batch), use_cache=False).logits[:, :-1][rows]
    with torch.no_grad():
        reference = teacher(**without_labels(batch), use_cache=False).logits[:, :-1][rows]
    task = F.cross_entropy(student, batch["labels"][:, 1:][rows], reduction="sum")
    count = len(student)
    consistency = regularizers.consistency(student, reference, form=CONFIG.consistency)
    entropy = regularizers.token_entropy(student, top_k=CONFIG.diversity_top_k)
    spectral = regularizers.spectral(student, k=CONFIG.svd_top_k, norm=CONFIG.svd_norm)
    return task, consistency * count, entropy * count, spectral


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_terms_are_those_of_the_models_own_logits(name, kind, tmp_path):
    """From step 0, where nothing differs, over three steps, to the saved adapter in plain PEFT."""
    skip_where_broken(name)
    base = tiny_multimodal(name).double()
    pretrained = copy.deepcopy(base).eval()
    batch = batch_of(name, kind)
    resolve(base, TERMS, adapter_follows=True)
    check_head(base)
    before = base.eval()(**without_labels(batch)).logits
    model = ba_lora(base, r=2, targets="all-linear")
    assert torch.equal(model(**without_labels(batch)).logits, before)
    install(base)
    out = step(model.train(), batch)
    stock = pretrained(**batch).loss
    torch.testing.assert_close((out.task / out.count).float(), stock.float(), rtol=1e-5, atol=1e-5)
    assert out.consistency.item() == 0.0
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():  # away from the start, so that every term has a gradient
        for p in parameters:
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())))
    out = step(model, batch)
    ours = gradients(out.loss + 0.02 * out.svd, parameters)
    task, consistency, entropy, spectral = dense(model, pretrained, batch)
    expected = task + 0.5 * consistency + 0.02 * entropy
    theirs = gradients(expected + 0.02 * spectral, parameters)
    torch.testing.assert_close(
        torch.stack([out.loss, out.task, out.consistency, out.svd]),
        torch.stack([expected, task, consistency, spectral]).detach(),
        rtol=1e-9,
        atol=1e-9,
    )
    scale = max(g.abs().max() for g in theirs)
    assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < 1e-8 * scale
    assert any(g.abs().max() > 1e-3 * scale for g in ours)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(copy.deepcopy(pretrained), tmp_path).eval()
    torch.testing.assert_close(
        plain(**without_labels(batch)).logits, model.eval()(**without_labels(batch)).logits, rtol=0, atol=1e-5
    )
