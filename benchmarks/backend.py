"""The compile backend beside eager and inductor, in one run: `python -m benchmarks.backend`

Forward and backward of Llama layers with BA-LoRA on all seven projections, then whole training steps in TRL: time as
ratios to inductor, matrix products counted by PyTorch's profiler, seconds to compile. Inductor with its own batch
fusions is among the baselines.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from transformers import LlamaConfig, LlamaModel

from balora_plugin import BaLoraConfig, get_ba_lora_model
from balora_plugin.objective.causal_lm_terms import backbone_pass, student_pass
from balora_plugin.objective.request import CompiledPasses

from .measuring import Measured, in_words, machine, measure, quiet, synchronize, table
from .step import Bench

CPU_SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8}
GPU_SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
ATTENTION = ("attention", "flash", "fmha")
# inductor's own fusions of linear layers that read one input; of those for CPUs and GPUs without fbgemm
FUSIONS: dict[str, Any] = {
    "pre_grad_fusion_options": {"batch_linear": {"min_fuse_set_size": 2}, "batch_linear_lhs": {"min_fuse_set_size": 2}},
    "post_grad_fusion_options": {"batch_linear_post_grad": {"min_fuse_set_size": 2}},
}

WAYS: dict[str, tuple[str | None, dict[str, Any] | None]] = {
    "eager": (None, None),
    "inductor": ("inductor", None),
    "inductor, its batch fusions": ("inductor", FUSIONS),
    "ba_lora": ("ba_lora", None),
}


def build(device: torch.device, layers: int, rank: int) -> nn.Module:
    """A Llama of `layers` layers with trained-looking factors; bfloat16 base and adapters on a GPU."""
    gpu = device.type == "cuda"
    torch.manual_seed(0)
    config = LlamaConfig(**(GPU_SHAPE if gpu else CPU_SHAPE), num_hidden_layers=layers, vocab_size=1024)
    base = LlamaModel(config).to(device, torch.bfloat16 if gpu else torch.float32)
    adapter = BaLoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights="pissa_fast")
    model = get_ba_lora_model(base, adapter, autocast_adapter_dtype=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 1e-3)
    return model.train()


class Step:
    """Forward and backward of one batch by one way of compiling."""

    def __init__(self, model: nn.Module, ids: Tensor, backend: str | None, options: dict[str, Any] | None) -> None:
        backbone = model.get_base_model()  # type: ignore[operator]

        def forward(ids: Tensor) -> Tensor:
            hidden: Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
            return hidden.float().square().mean()

        self.forward: Callable[[Tensor], Tensor] = forward
        if backend is not None:
            self.forward = torch.compile(forward, backend=backend, options=options, fullgraph=True)
        self.ids, self.parameters = ids, [p for p in model.parameters() if p.requires_grad]

    def __call__(self) -> None:
        for p in self.parameters:
            p.grad = None
        self.forward(self.ids).backward()


class Counts(NamedTuple):
    """Of one step: matrix products, kernels of a GPU (0 without one), and what attends, by name."""

    products: int
    kernels: int
    attention: tuple[str, ...]

    def in_words(self) -> str:
        return f"{self.products}{f' / {self.kernels}' if self.kernels else ''}"


def count(step: Callable[[], object], device: torch.device) -> Counts:
    gpu = device.type == "cuda"
    chosen = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=chosen) as profile:
        step()
        synchronize(device)
    events = profile.key_averages()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    named = kernels or [event for event in events if event.key.startswith("aten::_")]
    attending = {event.key for event in named if any(part in event.key.lower() for part in ATTENTION)}
    return Counts(
        sum(event.count for event in events if event.key in PRODUCTS),
        sum(event.count for event in kernels),
        tuple(sorted(attending)),
    )


class Compared(NamedTuple):
    """One way of compiling: what was measured, what a step has, and what the first call took longer."""

    name: str
    measured: Measured
    counts: Counts
    compiling: float


def compared(steps: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> list[Compared]:
    """All ways in one run. Nothing that was compiled before is found on disk."""
    first, failed = {}, {}
    for name, step in steps.items():
        began = time.perf_counter()
        try:
            with fresh_cache():
                step()
        except Exception as error:  # a baseline that does not run here is a line of the table
            failed[name] = Measured(note=in_words(error))
            continue
        synchronize(device)
        first[name] = time.perf_counter() - began
    found = measure({name: step for name, step in steps.items() if name not in failed}, repeats, device)
    made = []
    for name in steps:
        measured = failed.get(name) or found[name]
        counts = Counts(0, 0, ()) if measured.note else count(steps[name], device)
        made.append(Compared(name, measured, counts, first.get(name, float("nan")) - measured.seconds))
    return made


def compare(steps: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> str:
    """A row a way of compiling: time, its ratio to inductor, products counted, what the first call took longer."""
    found = compared(steps, repeats, device)
    inductor = next(way.measured.seconds for way in found if way.name == "inductor")
    rows = [
        (way.name, way.measured.note, "", "", "")
        if way.measured.note
        else (
            way.name,
            f"{way.measured.seconds * 1000:.1f}",
            f"{way.measured.seconds / inductor:.2f}",
            way.counts.in_words(),
            "" if way.name == "eager" else f"{way.compiling:.0f}",
        )
        for way in found
    ]
    products = "matrix products / kernels" if device.type == "cuda" else "matrix products"
    kernels = sorted({name for way in found for name in way.counts.attention})
    attention = f"\n\nAttention by {', '.join(f'`{name}`' for name in kernels)}." if kernels else ""
    return table(("", "ms a step", "to inductor", products, "seconds to compile"), rows) + attention


def layer_steps(device: torch.device, rank: int, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Forward and backward of layers alone."""
    model = build(device, options.layers, rank)
    ids = torch.randint(0, 1024, (options.batch, options.length), device=device)
    return {name: Step(model, ids, backend, settings) for name, (backend, settings) in WAYS.items()}


def whole_steps(bench: Bench) -> dict[str, Callable[[], None]]:
    """TRL's training step with the optimizer's: teacher, student, all three terms, backward pass."""
    inductor = bench.ba_lora_trainer(compile=True)
    inductor.ba_lora_run.compiled = CompiledPasses(
        torch.compile(backbone_pass, fullgraph=True), torch.compile(student_pass, fullgraph=True)
    )
    return {
        "eager": bench.ba_lora(),
        "inductor": bench.step(inductor),
        "ba_lora (compile: true)": bench.ba_lora(compile=True),
        "ba_lora by layer (compile: layers)": bench.ba_lora(compile="layers"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=1, help="of the first tables")
    parser.add_argument("--model-layers", type=int, default=6, help="of the whole step's model; 0 leaves it out")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--output", type=Path, help="folder for backend.md")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = f"{options.batch} x {options.length} tokens"
    lines = [f"`python -m benchmarks.backend` on {machine(device)}", ""]

    def add(title: str, found: str) -> None:
        lines.extend([f"**{title}**", "", found, ""])
        print("\n".join(lines[-4:]), flush=True)

    for rank in options.ranks:
        torch._dynamo.reset()
        found = compare(layer_steps(device, rank, options), options.repeats, device)
        add(f"{options.layers} layer(s), {tokens}, rank {rank}, forward and backward", found)
    if options.model_layers:
        torch._dynamo.reset()
        settings = argparse.Namespace(
            batch=options.batch, length=options.length, rank=options.ranks[0], checkpointing=False
        )
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(settings, device, Path(folder), layers=options.model_layers)
            found = compare(whole_steps(bench), options.repeats, device)
        add(f"A training step of {options.model_layers} layers, {tokens}, rank {settings.rank}", found)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "backend.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
