"""The sections: each is given the device and yields tables. Large shapes on a GPU, small ones elsewhere."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import Tensor

from balora_plugin import BaLoraConfig, RegularizerConfig, get_ba_lora_model
from balora_plugin.objective.batches import without_crossings
from balora_plugin.objective.install import install
from balora_plugin.objective.request import StepRequest
from balora_plugin.pretrained.attention import FLASH, flash_lacks, importable
from balora_plugin.schedules import Lambdas

from .. import backend as backends
from .. import loss as losses
from .. import start as starts
from .. import step as steps
from ..measuring import Measured, measure, synchronize
from .report import Cell, Table

COMPILED = ("ours, compiled passes", "dense, torch.compile")
FLOOR = ("bare GEMMs", "ours")
KERNELS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


# --- tests


def tests(device: torch.device) -> Iterator[Table]:
    """pytest -m gpu. Without a GPU what needs none of its own functions runs on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        environment = {**os.environ, "BALORA_TEST_DEVICE": device.type}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", f"--junitxml={report}"]
        ended = subprocess.run(command, env=environment, check=False).returncode
        if not report.exists():
            raise RuntimeError(f"pytest ended with code {ended} and no report: is it installed?")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    outcomes = {case.get("name", ""): _outcome(case) for case in cases}
    kinds = [kind for kind, _ in outcomes.values()]
    counted = {kind: kinds.count(kind) for kind in ("passed", "failed", "skipped")}
    yield Table("Outcomes", tuple(counted), [tuple(counted.values())])
    others = [(name, kind, why) for name, (kind, why) in outcomes.items() if kind != "passed"]
    if others:
        yield Table("Not passed", ("test", "", "why"), list(others))


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for kind, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            message = (found.get("message") or "").replace("|", "/").splitlines()
            return outcome, message[0][:120] if message else ""
    return "passed", ""


# --- the loss


def loss_of_large_vocabulary(device: torch.device) -> Iterator[Table]:
    yield from _loss(device, (4096, 4096, 128256) if is_gpu(device) else (64, 32, 512))


def loss_of_many_rows(device: torch.device) -> Iterator[Table]:
    yield from _loss(device, (8192, 4096, 32000) if is_gpu(device) else (128, 32, 256))


def _loss(device: torch.device, shape: tuple[int, int, int]) -> Iterator[Table]:
    """What is not compiled first: compiling takes most of the time."""
    case = losses.Case(shape, device, torch.bfloat16)
    plain = {name: make for name, make in losses.CONTENDERS.items() if name not in COMPILED}
    compiled = {name: losses.CONTENDERS[name] for name in (*FLOOR, *COMPILED)}
    for which, contenders in (("", plain), (", compiled", compiled)):
        made = {name: losses.prepare(make, case) for name, make in contenders.items()}
        found = measure(made, 5, device)
        floor = found["bare GEMMs"].seconds
        rows = [(name, *_times(result, floor), result.note) for name, result in found.items()]
        n, d, v = shape
        title = f"N = {n}, d = {d}, V = {v}, bfloat16, chunks of {case.chunk} rows{which}"
        yield Table(title, ("", "ms", "to the GEMMs", "peak MiB", "note"), rows)


def _times(result: Measured, unit: float) -> tuple[Cell, ...]:
    return result.seconds * 1000, result.seconds / unit, result.peak_mib


# --- layers and steps


def _settings(device: torch.device) -> argparse.Namespace:
    """What benchmarks.backend and benchmarks.step read of their command lines."""
    gpu = is_gpu(device)
    return argparse.Namespace(
        batch=4 if gpu else 2,
        length=1024 if gpu else 32,
        rank=128 if gpu else 8,
        layers=2 if gpu else 1,
        checkpointing=False,
        interval=1,
        compile=False,
    )


def _compared(title: str, made: dict[str, Callable[[], None]], device: torch.device) -> Table:
    found = backends.compared(made, 5, device)
    first = next((way.measured.seconds for way in found if not way.measured.note), float("nan"))
    rows: list[tuple[Cell, ...]] = [
        (
            way.name,
            *_times(way.measured, first),
            way.counts.products,
            way.counts.kernels,
            way.compiling if way.compiling > 0 else 0.0,
            way.measured.note,
        )
        for way in found
    ]
    kernels = sorted({name for way in found for name in way.counts.attention})
    header = ("", "ms", f"to {found[0].name}", "peak MiB", "products", "kernels", "first call, s", "note")
    return Table(title, header, rows, f"Attention by {', '.join(kernels)}." if kernels else "")


def layers(device: torch.device) -> Iterator[Table]:
    settings = _settings(device)
    made = backends.layer_steps(device, settings.rank, settings)
    fused = made.pop("inductor, its batch fusions")
    tokens = f"{settings.batch} x {settings.length} tokens, rank {settings.rank}"
    title = f"{settings.layers} layer(s) of {_widths(device)}, {tokens}, forward and backward"
    yield _compared(title, made, device)
    if is_gpu(device):
        torch._dynamo.reset()
        yield _compared(f"{title}: inductor's own fusions", {"eager": made["eager"], "batch fusions": fused}, device)


def _widths(device: torch.device) -> str:
    shape = backends.GPU_SHAPE if is_gpu(device) else backends.CPU_SHAPE
    return f"{shape['hidden_size']} and {shape['intermediate_size']}"


def compiled_step(device: torch.device) -> Iterator[Table]:
    settings = _settings(device)
    with tempfile.TemporaryDirectory() as folder:
        bench = steps.Bench(settings, device, Path(folder), layers=settings.layers)
        made = backends.whole_steps(bench)
        by_layer = {name: made.pop(name) for name in list(made) if "by layer" in name}
        title = f"TRL's step, {settings.layers} layer(s), {settings.batch} x {settings.length} tokens"
        yield _compared(title, made, device)
        torch._dynamo.reset()
        yield _compared(f"{title}: by layer", {"eager": made["eager"], **by_layer}, device)


def step(device: torch.device) -> Iterator[Table]:
    settings = _settings(device)
    with tempfile.TemporaryDirectory() as folder:
        bench = steps.Bench(settings, device, Path(folder), layers=settings.layers)
        floor = bench.floor()
        found = measure(bench.contenders(), 5, device)
    pissa = found["PiSSA, TRL's loss"]
    rows: list[tuple[Cell, ...]] = [
        (name, *_times(result, pissa.seconds), result.peak_mib / max(pissa.peak_mib, 1.0), result.note)
        for name, result in found.items()
    ]
    title = f"{settings.layers} layer(s), {settings.batch} x {settings.length} tokens, rank {settings.rank}"
    header = ("", "ms", "time to PiSSA", "peak MiB", "memory to PiSSA", "note")
    yield Table(title, header, rows, f"FLOP of a BA-LoRA step with the teacher live: {floor:.2f} x PiSSA.")


# --- attention


def attention(device: torch.device) -> Iterator[Table]:
    """Documents in one packed row and padded one a row, by each kernel; loss and gradients as the padded ones'."""
    settings = _settings(device)
    model = get_ba_lora_model(
        steps.build_model(is_gpu(device), settings.layers),
        BaLoraConfig(
            r=settings.rank,
            lora_alpha=settings.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            init_lora_weights="pissa_fast",
        ),
        autocast_adapter_dtype=False,
    ).train()
    base = model.get_base_model()
    install(base)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p) * 1e-3)
    request = StepRequest(config=RegularizerConfig(**steps.TERMS).resolved("nlg"), lambdas=Lambdas(0.5, 0.02, 0.0))
    packed, padded = _documents(base.config.vocab_size, settings.length, device)
    reference: list[Tensor] = []

    def passes(batch: dict[str, Tensor]) -> list[Tensor]:
        loss = model(**batch, ba_lora=request).loss
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    rows: list[tuple[Cell, ...]] = []
    for kernel in KERNELS:
        lacks = _lacks(kernel, device)
        if lacks:
            rows.append((kernel, *[float("nan")] * 6, lacks))
            continue
        base.set_attn_implementation(kernel)
        made: dict[str, Callable[[], object]] = {"packed": lambda: passes(packed), "padded": lambda: passes(padded)}
        found = measure(made, 5, device)
        note = found["packed"].note or found["padded"].note
        same: tuple[Cell, Cell] = (float("nan"), float("nan"))
        if not note:
            reference = reference or passes(padded)
            same = _apart(passes(packed), reference)
        a, b = found["packed"], found["padded"]
        rows.append((kernel, a.seconds * 1000, b.seconds * 1000, a.peak_mib, b.peak_mib, *same, note))
    header = (
        "kernel",
        "packed, ms",
        "padded, ms",
        "packed, MiB",
        "padded, MiB",
        "loss apart",
        "gradient apart",
        "note",
    )
    count = int((packed["position_ids"] == 0).sum())
    title = f"{count} documents, {packed['input_ids'].shape[1]} tokens in one row or {count} padded rows"
    yield Table(
        title,
        header,
        rows,
        "Loss and gradient apart: relative difference of the packed row's from the padded ones' by sdpa.",
    )


def _documents(vocabulary: int, length: int, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One packed row of documents between an eighth of `length` and all of it, and the same ones padded."""
    generator = torch.Generator().manual_seed(2)
    sizes = [length // 8 * part for part in (1, 8, 3, 2, 5, 1, 4, 8)]
    texts = [torch.randint(2, vocabulary, (size,), generator=generator).to(device) for size in sizes]
    positions = torch.cat([torch.arange(size, device=device) for size in sizes])[None]
    row = torch.cat(texts)[None]
    packed: dict[str, Tensor] = without_crossings({"input_ids": row, "labels": row.clone(), "position_ids": positions})
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return packed, {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def _lacks(kernel: str, device: torch.device) -> str:
    """Why a kernel cannot run here, "" where it can; what would come from the hub is not asked for."""
    if kernel not in FLASH:
        return ""
    if not importable(FLASH[kernel].module):
        return f"{FLASH[kernel].pip} is not installed"
    capability = torch.cuda.get_device_capability(device) if is_gpu(device) else None
    lacks = flash_lacks(kernel, device.type if is_gpu(device) else None, capability, importable)
    return lacks[0] if lacks else ""


def _apart(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    loss = (found[0] - expected[0]).abs() / expected[0].abs()
    squares = [
        ((a.float() - b.float()).square().sum(), b.float().square().sum())
        for a, b in zip(found[1:], expected[1:], strict=True)
    ]
    difference, whole = (torch.stack(parts).sum() for parts in zip(*squares, strict=True))
    return float(loss), float((difference / whole).sqrt())


# --- the start


def start(device: torch.device) -> Iterator[Table]:
    gpu = is_gpu(device)
    rank, shapes, experts = (
        (128, list(starts.SEVEN_BILLION), (64, 1408, 2048)) if gpu else (4, [(128, 64)], (4, 64, 96))
    )
    torch.manual_seed(0)
    taken: dict[tuple[int, ...], float] = {}
    for shape in shapes:
        for spectrum, make in starts.SPECTRA.items():
            with device:
                weight = make(*shape)
            starts.pissa_factors(weight, rank, 1.0)  # a device's libraries are loaded by the first call
            synchronize(device)
            measured = list(starts.rows_of(weight, rank, ["pissa", "pissa_fast"]))
            best = max(energy for *_, energy in measured if energy == energy)
            taken[shape] = max(taken.get(shape, 0.0), measured[0][1])
            rows: list[tuple[Cell, ...]] = [(n, s, c, 1 - e / best) for n, s, c, e in measured]
            title = f"{' x '.join(map(str, shape))}, rank {rank}, singular values: {spectrum}"
            yield Table(title, ("", "s", "columns multiplied", "energy below the best here"), rows)
    if gpu:
        whole = sum(count * taken[shape] for shape, count in starts.SEVEN_BILLION.items())
        yield Table("All of a 7B model, by the slower spectrum of each shape", ("minutes",), [(whole / 60,)])
    with device:
        weight = starts.like_power(*experts)
    found = starts.rows_of_experts(weight, rank, ("pissa",))
    title = f"{experts[0]} experts of {experts[1]} x {experts[2]}, rank {rank}"
    yield Table(title, ("", "s", "to one call"), [(name, s, s / found[0][1]) for name, s in found])
    with device:
        weight = starts.like_power(*shapes[0])
    rows = [(name, s) for name, s, *_ in starts.rows_of(weight, rank, ["pissa_exact"])]
    yield Table(f"LAPACK's or the device's SVD, {' x '.join(map(str, shapes[0]))}", ("", "s"), rows)
