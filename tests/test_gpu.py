"""What differs on a CUDA device: chunk sizes, precisions, compiled kernels. Runs where there is one: pytest -m gpu"""

from __future__ import annotations

import pytest
import torch
from helpers import TERMS, ba_lora, quantised_layers, train
from models import load_quantised, tiny_llama

from balora_plugin.fused import HeadFactor, spectral_term, token_terms
from balora_plugin.objective import StepRequest, install
from balora_plugin.schedules import Lambdas
from balora_plugin.teacher import teacher_mode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def inputs(n, d, v, device, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(n, d, generator=generator).to(device, dtype) for _ in range(2))
    weight = (torch.randn(v, d, generator=generator) / d**0.5).to(device, dtype)
    labels = torch.randint(0, v, (n,), generator=generator).to(device)
    labels[::5] = -100
    return hidden.requires_grad_(), teacher, weight, labels


def relative(value, expected):
    value, expected = value.double().cpu(), expected.double().cpu()
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("form", ["kl", "reverse_kl", "jsd", "mse"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 3e-2)]
)
def test_token_terms_are_the_cpus(dtype, tolerance, form):
    options = {"lambda_consistency": 0.5, "lambda_diversity": 0.2, "form": form, "top_k": 5, "temperature": 2.0}
    results = []
    for device, precision in (("cpu", torch.float64), ("cuda", dtype)):
        hidden, teacher, weight, labels = inputs(300, 64, 1000, device, precision)
        terms = token_terms(hidden, teacher, weight, labels, **options)
        results.append((terms.loss, torch.autograd.grad(terms.loss, hidden)[0], terms.correct))
    (loss, gradient, correct), (gpu_loss, gpu_gradient, gpu_correct) = results
    assert gpu_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert relative(gpu_gradient, gradient) < tolerance
    if dtype != torch.bfloat16:
        assert gpu_correct.item() == correct.item()


def test_the_spectrum_is_the_cpus():
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        hidden, _, weight, _ = inputs(200, 64, 1000, device, dtype)
        value = spectral_term(hidden, HeadFactor.from_weight(weight), k=5)
        results.append((value, torch.autograd.grad(value, hidden)[0]))
    assert results[1][0].item() == pytest.approx(results[0][0].item(), rel=2e-6)
    assert relative(results[1][1], results[0][1]) < 5e-5


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_from_a_zero_consistency(dtype, compile):
    from balora_plugin.compile import Compiled
    from balora_plugin.objective import CompiledPasses, backbone_pass, student_pass

    torch._dynamo.reset()
    model = ba_lora(tiny_llama().to("cuda", dtype)).train()
    base = model.get_base_model()
    install(base)
    said = []
    passes = [Compiled(f, lambda key, message: said.append(message)) for f in (backbone_pass, student_pass)]
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1)).cuda()
    request = StepRequest(
        config=TERMS.resolved("nlg"),
        lambdas=Lambdas(0.5, 0.02, 0.02),
        compiled=CompiledPasses(*passes) if compile else None,
    )
    out = model(input_ids=ids, labels=ids, ba_lora=request)
    (out.loss + out.svd).backward()
    assert not said
    assert out.consistency.item() == pytest.approx(0.0, abs=1e-6 if not compile else 1e-2)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("kind", ["nf4_double", "int8"])
def test_a_quantised_base(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1)).cuda()
    base = load_quantised(tmp_path, kind, device="cuda")
    before = base(input_ids=ids).logits.detach()
    model = ba_lora(base, start_from=tmp_path).train()
    assert len(quantised_layers(model)) == 14
    assert torch.equal(model(input_ids=ids).logits, before)
    losses = train(model, ids, steps=4)
    assert losses[-1] < losses[0]
    with teacher_mode(model):
        assert torch.equal(model(input_ids=ids).logits, before)
