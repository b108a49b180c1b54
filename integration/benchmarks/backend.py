"""The compile backend beside eager and inductor, in one run: `python -m integration.benchmarks.backend`

Forward and backward of a few Llama layers with BA-LoRA on all seven projections: time as ratios to inductor, matrix
products counted by PyTorch's profiler, seconds to compile. Inductor with its own batch fusions is among the baselines.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from balora_plugin import BaLoraConfig, get_ba_lora_model

from .measuring import machine, measure, synchronize, table

CPU_SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8}
GPU_SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
# inductor's own fusions of linear layers that read one input; of those for CPUs and GPUs without fbgemm
FUSIONS: dict[str, Any] = {
    "pre_grad_fusion_options": {"batch_linear": {"min_fuse_set_size": 2}, "batch_linear_lhs": {"min_fuse_set_size": 2}},
    "post_grad_fusion_options": {"batch_linear_post_grad": {"min_fuse_set_size": 2}},
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

        torch._dynamo.reset()
        self.forward: Callable[[Tensor], Tensor] = forward
        if backend is not None:
            self.forward = torch.compile(forward, backend=backend, options=options, fullgraph=True)
        self.ids, self.parameters = ids, [p for p in model.parameters() if p.requires_grad]

    def __call__(self) -> None:
        for p in self.parameters:
            p.grad = None
        self.forward(self.ids).backward()


def products(step: Step) -> int:
    """Matrix products of one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum(event.count for event in profile.key_averages() if event.key in PRODUCTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--output", type=Path, help="folder for backend.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = f"{options.layers} Llama layers, {options.batch} x {options.length} tokens"
    lines = [f"`python -m integration.benchmarks.backend` on {machine(device)}; {size}", ""]
    ways: dict[str, tuple[str | None, dict[str, Any] | None]] = {
        "eager": (None, None),
        "inductor": ("inductor", None),
        "inductor, its batch fusions": ("inductor", FUSIONS),
        "ba_lora": ("ba_lora", None),
    }
    for rank in options.ranks:
        model = build(device, options.layers, rank)
        ids = torch.randint(0, 1024, (options.batch, options.length), device=device)
        steps, compiled_in, failed = {}, {}, {}
        for name, (backend, settings) in ways.items():
            step = Step(model, ids, backend, settings)
            began = time.perf_counter()
            try:
                step()
            except Exception as error:  # a baseline that does not run here is a line of the table
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
                continue
            synchronize(device)
            compiled_in[name] = time.perf_counter() - began
            steps[name] = step
        found = measure(dict(steps), options.repeats, device)
        reference = found["inductor"].seconds
        rows = [
            (name, failed[name], "", "", "")
            if name in failed
            else (
                name,
                f"{found[name].seconds * 1000:.1f}",
                f"{found[name].seconds / reference:.2f}",
                str(products(steps[name])),
                "" if name == "eager" else f"{compiled_in[name]:.0f}",
            )
            for name in ways
        ]
        header = ("", "ms a step", "to inductor", "matrix products", "seconds to compile")
        lines += [f"**Rank {rank}**", "", table(header, rows), ""]
        print("\n".join(lines[-4:]), flush=True)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "backend.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
