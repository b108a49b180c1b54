"""What differs on a CUDA device: chunks, precisions, compiled kernels, clocks. Where there is one: pytest -m gpu

With BALORA_TEST_DEVICE=cpu what needs no function of CUDA's own runs on the CPU: so is seen, before there is a device,
that the tests themselves are right.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch
from attention_kernels import watched
from helpers import TERMS, ba_lora, quantised_layers, train, trainable
from models import VOCABULARY, load_quantised, tiny_llama
from packing import assert_same_terms, documents, leak, move

from balora_plugin.fused import HeadFactor, TopLogProbs, spectral_term, spectrum, token_terms, top_log_probs
from balora_plugin.objective.batches import counted_positions, without_crossings
from balora_plugin.objective.install import install
from balora_plugin.objective.request import StepRequest
from balora_plugin.pretrained.attention import FLASH, flash_lacks, importable, is_flash
from balora_plugin.pretrained.switch import TeacherSwitch
from balora_plugin.schedules import Lambdas
from balora_plugin.teacher.cache import TeacherCache
from balora_plugin.teacher.rows import RowChoice
from balora_plugin.training.cost import CostMeter

DEVICE = os.environ.get("BALORA_TEST_DEVICE", "cuda")
LAMBDAS = Lambdas(0.5, 0.02, 0.02)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
of_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="of CUDA's own clocks and memory")


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
    for device, precision in (("cpu", torch.float64), (DEVICE, dtype)):
        hidden, teacher, weight, labels = inputs(300, 64, 1000, device, precision)
        terms = token_terms(hidden, teacher, weight, labels, **options)
        results.append((terms.loss, torch.autograd.grad(terms.loss, hidden)[0], terms.correct))
    (loss, gradient, correct), (gpu_loss, gpu_gradient, gpu_correct) = results
    assert gpu_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert relative(gpu_gradient, gradient) < tolerance
    if dtype != torch.bfloat16:
        assert gpu_correct.item() == correct.item()


@pytest.mark.parametrize("form", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 3e-2)]
)
def test_token_terms_from_log_probabilities_are_the_cpus(dtype, tolerance, form):
    hidden, teacher, weight, labels = inputs(300, 64, 1000, "cpu", torch.float64)
    top = top_log_probs(teacher, weight, k=20, temperature=2.0)
    assert (
        relative(top_log_probs(teacher.to(DEVICE), weight.to(DEVICE), k=20, temperature=2.0).log_tail, top.log_tail)
        < 1e-12
    )
    options = {"lambda_consistency": 0.5, "lambda_diversity": 0.2, "form": form, "temperature": 2.0}
    results = []
    for device, precision in (("cpu", torch.float64), (DEVICE, dtype)):
        hidden, _, weight, labels = inputs(300, 64, 1000, device, precision)
        here = TopLogProbs(*(x.to(device) for x in top))
        terms = token_terms(hidden, None, weight, labels, teacher_top=here, **options)
        results.append((terms.loss, torch.autograd.grad(terms.loss, hidden)[0]))
    (loss, gradient), (gpu_loss, gpu_gradient) = results
    assert gpu_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert relative(gpu_gradient, gradient) < tolerance


@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=["float64", "weak float64"])
def test_the_spectrum_is_the_cpus(precision, monkeypatch):
    monkeypatch.setattr(spectrum, "product_precision", lambda device: precision)
    results = []
    for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
        hidden, _, weight, _ = inputs(200, 64, 1000, device, dtype)
        value = spectral_term(hidden, HeadFactor.from_weight(weight), k=5)
        results.append((value, torch.autograd.grad(value, hidden)[0]))
    assert results[1][0].item() == pytest.approx(results[0][0].item(), rel=2e-6)
    assert relative(results[1][1], results[0][1]) < 5e-5


@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=["float64", "weak float64"])
def test_autocast_does_not_reach_the_spectrum(precision, monkeypatch):
    monkeypatch.setattr(spectrum, "product_precision", lambda device: precision)
    hidden, _, weight, _ = inputs(200, 64, 1000, DEVICE, torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            value = spectral_term(hidden, HeadFactor.from_weight(weight), k=5)
        results.append((value.detach(), torch.autograd.grad(value, hidden)[0]))
    assert results[1][0].item() == pytest.approx(results[0][0].item(), rel=1e-6)
    assert relative(results[1][1], results[0][1]) < 1e-6


def step_inputs():
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_a_step_from_a_zero_consistency(precision, compile):
    from balora_plugin.compile import Compiled
    from balora_plugin.objective.causal_lm_terms import backbone_pass, student_pass
    from balora_plugin.objective.request import CompiledPasses

    if compile and DEVICE == "cpu" and precision != "float32":
        pytest.skip("one precision is enough to rehearse; tests/compile has the others")
    torch._dynamo.reset()
    mixed = precision == "autocast"
    model = ba_lora(tiny_llama().to(DEVICE, torch.float32 if mixed else getattr(torch, precision))).train()
    base = model.get_base_model()
    install(base)
    said = []
    passes = [Compiled(f, lambda key, message: said.append(message)) for f in (backbone_pass, student_pass)]
    request = StepRequest(
        config=TERMS.resolved("nlg"), lambdas=LAMBDAS, compiled=CompiledPasses(*passes) if compile else None
    )
    with torch.autocast(DEVICE, dtype=torch.bfloat16) if mixed else nullcontext():
        out = model(**step_inputs(), ba_lora=request)
    (out.loss + out.svd).backward()
    assert not said
    # eager passes are equal to the bit; two graphs round on their own
    tolerance = 1e-6 if not compile else 1e-5 if precision == "float32" else 1e-2
    assert out.consistency.item() == pytest.approx(0.0, abs=tolerance)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


def test_an_autocast_step_is_the_float32_step():
    """Within bfloat16's rounding; the terms' sums stay float32."""
    model = ba_lora(tiny_llama().to(DEVICE)).train()
    install(model.get_base_model())
    with torch.no_grad():
        for i, p in enumerate(trainable(model)):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(DEVICE))
    results = []
    for enabled in (False, True):
        for p in trainable(model):
            p.grad = None
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            out = model(**step_inputs(), ba_lora=StepRequest(config=TERMS.resolved("nlg"), lambdas=LAMBDAS))
        (out.loss + out.svd).backward()
        terms = {name: getattr(out, name) for name in ("task", "consistency", "diversity", "svd")}
        assert all(value.dtype == torch.float32 for value in terms.values())
        results.append((terms, torch.cat([p.grad.flatten() for p in trainable(model)])))
    (terms, gradient), (mixed_terms, mixed_gradient) = results
    for name, value in terms.items():
        assert mixed_terms[name].item() == pytest.approx(value.item(), rel=5e-2), name
        assert value.item() != 0
    assert 0 < relative(mixed_gradient, gradient) < 0.1


@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"),
    [
        ("sdpa", torch.float32, 1e-4),
        ("sdpa", torch.bfloat16, 5e-2),
        ("flash_attention_2", torch.bfloat16, 5e-2),
        ("flash_attention_3", torch.bfloat16, 5e-2),
        ("flex_attention", torch.float32, 5e-3),
    ],
)
def test_packed_documents_have_the_terms_they_have_alone(kernel, dtype, tolerance):
    """By the device's kernels, teacher and student by the same one."""
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else None
    lacks = flash_lacks(kernel, DEVICE, capability, importable)
    if is_flash(kernel) and (lacks or not importable(FLASH[kernel].module)):
        pytest.skip(f"{kernel} {lacks[0] if lacks else 'would come from the hub'}")
    if kernel == "flex_attention" and DEVICE == "cpu":
        pytest.skip("FlexAttention has no gradients on a CPU")
    base = tiny_llama(hidden_size=128, intermediate_size=128, max_position_embeddings=512).to(DEVICE, dtype)
    base.set_attn_implementation(kernel)
    model = ba_lora(base)
    install(model.get_base_model())
    move(model)
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, 90, (1, n), generator=generator) for n in (37, 64, 19, 80)]
    alone = [{"input_ids": ids.to(DEVICE), "labels": ids.to(DEVICE)} for ids in texts]
    row, positions = torch.cat(texts, 1), torch.cat([torch.arange(ids.shape[1]) for ids in texts])[None]
    packed = without_crossings({"input_ids": row, "labels": row, "position_ids": positions})
    packed = {key: value.to(DEVICE) for key, value in packed.items()}
    with watched(kernel) as calls:
        assert_same_terms(model, [packed], alone, tolerance)
        assert leak(model, packed) < (tolerance if dtype == torch.bfloat16 else 1e-5)
    assert len(calls) % 4 == 0 and set(calls) == {False, True}
    assert leak(model, {**packed, "position_ids": None}, documents(packed)) > 0.1  # as where they see each other


def test_the_cache_gives_the_device_what_it_was_given(tmp_path):
    """Cold, warm and reopened: the same loss and gradients to the bit; the teacher runs in the first step alone."""
    model = ba_lora(tiny_llama().to(DEVICE)).train()
    install(model.get_base_model())
    with torch.no_grad():
        trainable(model)[0].add_(0.05)
        trainable(model)[1].add_(0.05)

    def open_cache():
        cache = TeacherCache(tmp_path, RowChoice(32, VOCABULARY), base="a" * 64)
        cache.settle(torch.device(DEVICE))
        return cache

    def step(cache):
        for p in trainable(model):
            p.grad = None
        request = StepRequest(config=TERMS.resolved("nlg"), lambdas=LAMBDAS, cache=cache)
        out = model(**step_inputs(), ba_lora=request)
        (out.loss + out.svd).backward()
        return torch.stack([out.loss, out.consistency, out.svd]).detach(), [p.grad.clone() for p in trainable(model)]

    live = step(None)[0]
    cold = open_cache()
    results = [step(cold)]
    runs = cold.runs
    cold.flush()
    results.append(step(cold))
    warm, reopened = open_cache(), open_cache()
    reopened.frozen = "the teacher may not run"
    results += [step(warm), step(reopened)]
    assert (cold.runs, warm.runs, reopened.runs) == (runs, 0, 0)
    for losses, gradients in results:
        assert torch.equal(losses, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1], strict=True))
    torch.testing.assert_close(results[0][0], live, rtol=2e-2, atol=1e-3)  # the cache rounds to bfloat16
    assert live[1] > 0
    given = step_inputs()
    needed = counted_positions(given)
    states = warm.states({"input_ids": given["input_ids"]}, needed, None)
    assert (states.device.type, states.dtype) == (DEVICE, torch.bfloat16)
    assert (states[~needed] == 0).all() and (states[needed] != 0).any(-1).all()


@of_cuda
def test_the_cost_of_parts_is_the_devices(monkeypatch):
    """Kernels run after the host has left the part that launched them; within a step nothing waits for them."""
    meter = CostMeter(torch.device(DEVICE))

    def refuse(*_):
        raise AssertionError("a part waits for the device")

    for _ in range(3):
        meter.begin()
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "synchronize", refuse)
            patched.setattr(torch.cuda.Event, "synchronize", refuse)
            for _ in range(2):
                with meter.part("micro"):
                    with meter.part("teacher"):
                        torch.cuda._sleep(40_000_000)
                    torch.cuda._sleep(20_000_000)
                    with meter.part("token_terms"):
                        torch.ones(1, device=DEVICE)
        meter.step()
    seconds = meter.report()["seconds_per_step"]
    assert seconds["teacher"] > seconds["student"] > 10 * seconds["token_terms"]  # the host spends the same on each
    assert seconds["teacher"] == pytest.approx(2 * seconds["student"], rel=0.2)
    assert sum(value for name, value in seconds.items() if name != "step") == pytest.approx(seconds["step"], rel=0.01)


@of_cuda
def test_the_clock_stands_when_the_device_has_finished():
    """What the last step launched, its optimizer above all, is its own and not the evaluation's."""
    meter = CostMeter(torch.device(DEVICE))
    for _ in range(2):
        meter.begin()
        with meter.part("micro"):
            torch.ones(1, device=DEVICE)
        torch.cuda._sleep(40_000_000)
        meter.step()
        meter.pause()
        assert torch.cuda.current_stream().query()
        meter.resume()


@of_cuda
def test_memory_of_parts_is_the_devices():
    meter = CostMeter(torch.device(DEVICE))
    for _ in range(3):
        meter.begin()
        with meter.part("micro"):
            with meter.part("teacher"):
                torch.ones(1, device=DEVICE)
            with meter.part("token_terms"):
                torch.ones(64 << 20, device=DEVICE)  # 256 MiB
            torch.ones(1, device=DEVICE)
        meter.step()
    report = meter.report()
    assert report["memory"] == "device memory"
    peaks = report["peak_gib"]
    assert peaks["token_terms"] - peaks["teacher"] == pytest.approx(0.25, abs=0.01)
    assert peaks["token_terms"] - peaks["student"] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("kind", ["nf4_double", "int8"])
def test_a_quantised_base(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    base = load_quantised(tmp_path, kind, device=DEVICE)
    before = base(input_ids=ids).logits.detach()
    model = ba_lora(base, start_from=tmp_path).train()
    assert len(quantised_layers(model)) == 14
    assert torch.equal(model(input_ids=ids).logits, before)
    losses = train(model, ids, steps=4)
    assert losses[-1] < losses[0]
    with TeacherSwitch(model).off():
        assert torch.equal(model(input_ids=ids).logits, before)
