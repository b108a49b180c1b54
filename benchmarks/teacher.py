"""What the teacher's pass costs where it runs live, in one run: `python -m benchmarks.teacher`

Steps whose adapter stands in the upper half of the layers, with a whole teacher and with one that begins there; the
work that checkpointing adds, counted; what a 4-bit product spends on dequantising; and the variance of the consistency
term's gradient where the teacher meets a part of the data, by micro-batch and by document.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from balora_plugin import BaLoraConfig, RegularizerConfig, get_ba_lora_model
from balora_plugin.objective.request import StepRequest
from balora_plugin.objective.two_passes import TwoPasses
from balora_plugin.pretrained.by_layer import ByLayer
from balora_plugin.pretrained.shared_layers import SharedLayers
from balora_plugin.pretrained.switch import TeacherSwitch
from balora_plugin.schedules import Lambdas

from .measuring import machine, measure, quiet, table
from .step import Bench

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class UpperHalf(Bench):
    """The same model and batch, adapted in the upper half of its layers."""

    def adapter(self, **changes: Any) -> dict[str, Any]:
        layers = self.base.config.num_hidden_layers
        upper = {"target_modules": NAMES, "layers_to_transform": list(range(layers // 2, layers))}
        return super().adapter(**upper, **changes)

    def contenders(self) -> dict[str, Callable[[], None]]:
        return {
            "no terms": self.ba_lora(lambda_consistency=0.0, lambda_diversity=0.0, lambda_svd=0.0),
            "whole teacher (before)": self.ba_lora(lambda_svd=0.0, teacher_pass="whole"),
            "teacher from the adapter on": self.ba_lora(lambda_svd=0.0),
            "the same, by layer": self.ba_lora(lambda_svd=0.0, teacher_pass="by_layer"),
        }

    def upper(self) -> tuple[int, int]:
        """FLOP of the upper half forward: of the student's and of the teacher's."""
        base = self.ba_lora_trainer().model.get_base_model()
        inner = base.base_model
        inner.layers = inner.layers[len(inner.layers) // 2 :]
        ids = torch.tensor(self.rows["input_ids"], device=self.device)

        def forward() -> None:
            with torch.no_grad():
                inner(input_ids=ids, use_cache=False)

        student = _flop(forward)
        with TeacherSwitch(base).off():
            return student, _flop(forward)


def steps(options: argparse.Namespace, folder: Path) -> str:
    """The table of steps, with checkpointing and without; the floor is what the parts need, counted one by one."""
    rows = []
    device = torch.device("cpu")
    least = plain = 0
    for checkpointing in (False, True):
        options.checkpointing = checkpointing
        bench = UpperHalf(options, device, folder)
        made = bench.contenders()
        peaks = measure(made, 0, device)
        took = _processor_seconds(made, options.repeats)
        work = {name: _flop(run) for name, run in made.items()}
        student, teacher = bench.upper()
        plain = plain or work["no terms"]
        least = plain + teacher + (student if checkpointing else 0)
        more = ", checkpointing" if checkpointing else ""
        for name, seconds in took.items():
            ratio = f"{seconds / took['no terms']:.2f}"
            flop = f"{work[name] / plain:.2f}"
            rows.append((name + more, f"{seconds:.3f}", ratio, flop, f"{peaks[name].peak_mib:.0f}"))
        rows.append((f"floor{more}", "", "", f"{least / plain:.2f}", ""))
    header = ("", "processor seconds a step", "to no terms", "products, to no terms without checkpointing", "peak MiB")
    return table(header, rows)


def _processor_seconds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Medians of the process's own time, in turn: other processes take the cores away, and are not counted."""
    took: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began = time.process_time()
            function()
            took[name].append(time.process_time() - began)
    return {name: median(each) for name, each in took.items()}


def _flop(run: Callable[[], None]) -> int:
    """FLOP of what runs, the head's products left out, which are inside the terms' own operators."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def dequantising(options: argparse.Namespace) -> str:
    """Products with a 4-bit weight, teacher's and student's rows one after the other, and together."""
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    rows = []
    weight = torch.randn(2048, 2048)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")

    def product(x: Tensor) -> Tensor:
        shape, kind = state.shape, state.quant_type
        return torch.ops.bitsandbytes.gemm_4bit.default(x, packed, shape, state.absmax, state.blocksize, kind)

    def apart(x: Tensor) -> None:
        product(x)
        product(x)

    def one_weight(x: Tensor) -> tuple[Tensor, Tensor]:
        floats = bnb.dequantize_4bit(packed, state)
        return torch.nn.functional.linear(x, floats), torch.nn.functional.linear(x, floats)

    for count in (64, 256, 1024):
        x = torch.randn(count, 2048)
        both = torch.cat([x, x])
        functions: dict[str, Callable[[], Any]] = {
            "one": lambda: bnb.dequantize_4bit(packed, state),
            "apart": partial(apart, x),
            "together": partial(product, both),
            "one weight": partial(one_weight, x),
        }
        one, two, together, once = (1e3 * each for each in _processor_seconds(functions, options.repeats).values())
        same = "yes" if torch.equal(one_weight(x)[1], product(x)) else "no"
        ratios = (f"{together:.1f}", f"{together / two:.2f}", f"{once:.1f}", f"{once / two:.2f}", same)
        rows.append((str(count), f"{one:.1f}", f"{two:.1f}", *ratios))
    header = ("rows", "dequantising, ms", "two products, ms", "one of both, ms", "to two")
    return table((*header, "two of one dequantised weight, ms", "to two", "same bits"), rows)


WAYS = {
    "no teacher (floor)": None,
    "two whole passes (before)": "whole",
    "layers below the adapter once": "shared",
    "by layer": "by_layer",
}


def gathers() -> str:
    """MiB that two ranks under FSDP2 gather in a micro-batch, counted, layers as units, with checkpointing too."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_gathering, (folder,), nprocs=2)
        found = torch.load(Path(folder, "found.pt"))
    rows = [(name, *(f"{size / 2**20:.2f}" for size in sizes)) for name, sizes in found.items()]
    header = ("MiB gathered", "upper half adapted", "all layers adapted", "all, checkpointing")
    return table(header, rows)


def _gathering(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # torch's own rename
    gathered, original = [0], getattr(dist, name)

    def counted(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        gathered[0] += output.numel() * output.element_size()
        return original(output, *args, **kwargs)

    setattr(dist, name, counted)
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, list[int]] = {name: [] for name in WAYS}
    ids = torch.randint(2, 128, (2, 32))
    for upper, checkpointing in ((True, False), (False, False), (False, True)):
        for name, way in WAYS.items():
            base, layers = _adapted(upper)
            if checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": False})
            request = _request(base, way)
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(base, mesh=mesh)
            for _ in range(3):  # the first one shows what may be shared
                gathered[0] = 0
                _micro_batch(base, request, ids)
            found[name].append(gathered[0])
    if rank == 0:
        torch.save(found, Path(folder, "found.pt"))
    dist.destroy_process_group()


def _adapted(upper: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).train()
    which: dict[str, Any] = {"target_modules": NAMES, "layers_to_transform": [2, 3] if upper else [0, 1, 2, 3]}
    base = get_ba_lora_model(model, BaLoraConfig(r=4, lora_alpha=4, task_type="CAUSAL_LM", **which)).get_base_model()
    return base, base.model.layers


def _request(base: Any, way: str | None) -> StepRequest:
    """What asks for the teacher in one of the ways; None: for no teacher."""
    request = StepRequest(RegularizerConfig(), Lambdas(0.0 if way is None else 1.0, 0.0, 0.0))
    request.switch = TeacherSwitch(base)
    request.shared = SharedLayers(base) if way in ("shared", "by_layer") else None
    request.by_layer = ByLayer(base) if way == "by_layer" else None
    return request


def _micro_batch(base: Any, request: StepRequest, ids: Tensor) -> None:
    """Teacher, student and backward pass as training runs them, without the terms."""

    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}

    def teacher(inputs: dict[str, Any]) -> Tensor:
        assert request.switch is not None
        with request.switch.off():
            return base(**inputs).logits

    passes = TwoPasses(base, request, inputs, teacher=teacher, student=partial(base, **inputs))
    passes.teacher()
    loss = passes.student().logits.sum()
    passes.late_teacher()
    loss.backward()


class Gradients:
    """The consistency term's gradient of each document, (N, P): a small model after pre-training and fine-tuning."""

    def __init__(self, documents: int = 128, length: int = 48) -> None:
        self.length = length
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        )
        model = LlamaForCausalLM(config)
        prose, code = self._texts()
        self._train(model, prose, steps=150, rate=3e-3)
        adapter = BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
        student: Any = get_ba_lora_model(model, adapter)
        self._train(student, code, steps=40, rate=1e-3)
        base = student.get_base_model()
        found = []
        self.student, self.documents = student, code[torch.randperm(len(code))[:documents]]
        for row in self.documents.split(1):
            with TeacherSwitch(base).off():
                teacher = base(row).logits[0].log_softmax(-1)
            mine = student(row).logits[0].log_softmax(-1)
            (teacher.exp() * (teacher - mine)).sum(-1).mean().backward()
            trained = [p for p in student.parameters() if p.requires_grad]
            found.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
            student.zero_grad()
        self.rows = torch.stack(found).double()

    def _texts(self) -> tuple[Tensor, Tensor]:
        """Characters of the standard library: its docstrings, and its code."""
        source = Path(argparse.__file__).read_text() + Path(tempfile.__file__).read_text()
        parts = source.split('"""')
        return tuple(self._rows("".join(parts[start::2])) for start in (1, 0))  # type: ignore[return-value]

    def _rows(self, text: str) -> Tensor:
        ids = torch.tensor([min(ord(c), 127) for c in text])
        return ids[: len(ids) // self.length * self.length].view(-1, self.length)

    def _train(self, model: Any, rows: Tensor, steps: int, rate: float) -> None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        for _ in range(steps):
            batch = rows[torch.randint(len(rows), (16,))]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def variance(self, batch: int, accumulated: int, interval: int, by: str, draws: int = 4000) -> float:
        """Of a step's gradient over the squared norm of the whole data's, teacher on every `interval`-th `by`."""
        torch.manual_seed(1)
        mean = self.rows.mean(0)
        micro = torch.arange(accumulated).repeat_interleave(batch)
        index = micro if by == "micro-batch" else torch.arange(batch * accumulated)
        every = accumulated if by == "micro-batch" else batch * accumulated
        total = 0.0
        for step in range(draws):
            chosen = torch.randint(len(self.rows), (batch * accumulated,))
            weights = ((index + step * every) % interval == 0) * float(interval)
            total += float(((weights[:, None] * self.rows[chosen]).mean(0) - mean).square().sum())
        return total / draws / float(mean.square().sum())


def variances() -> str:
    """The table of variances at equal cost."""
    gradients = Gradients()
    rows = []
    for batch, accumulated, interval in ((4, 1, 4), (8, 1, 4), (8, 2, 4), (16, 1, 4), (8, 4, 4), (2, 8, 4), (1, 4, 4)):
        shape = (batch, accumulated, interval)
        every = gradients.variance(batch, accumulated, 1, "document")
        micro, document = (gradients.variance(*shape, by) for by in ("micro-batch", "document"))
        rows.append((f"{batch} x {accumulated}", f"{every:.2f}", f"{micro:.2f}", f"{document:.2f}"))
    header = ("documents x accumulated", "teacher on all", "every 4th micro-batch", "every 4th document")
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--terms", default="steps,dequantising,gathers,variance", help="which tables")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    print(f"`python -m benchmarks.teacher` on {machine(torch.device('cpu'))}\n")
    wanted = options.terms.split(",")
    if "steps" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            print(steps(options, Path(folder)), end="\n\n")
    if "dequantising" in wanted:
        print(dequantising(options), end="\n\n")
    if "gathers" in wanted:
        print(gathers(), end="\n\n")
    if "variance" in wanted:
        print(variances())


if __name__ == "__main__":
    main()
