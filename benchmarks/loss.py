"""The loss against its floor and the usual ways, time and memory, in one run: `python -m benchmarks.loss`

Forward and backward with respect to the hidden states, frozen head, cross-entropy + 0.5 KL - 0.02 entropy, all tokens
counted. Ratios are to the bare GEMMs (student's and teacher's logits, gradient) at our chunk size. Then the spectrum
against `svdvals` of the logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from balora_plugin import regularizers
from balora_plugin.fused import HeadFactor, spectral_term, token_terms
from balora_plugin.fused.project import default_chunk

from .measuring import Measured, machine, measure, plot_bars, table

CPU_SHAPES = ((2048, 512, 32000), (1024, 2048, 32000), (512, 1024, 128256))
GPU_SHAPES = ((8192, 4096, 32000), (16384, 4096, 32000), (8192, 4096, 128256))
CONSISTENCY, DIVERSITY = 0.5, 0.02


class Case:
    """Random inputs of one shape; the logits have a standard deviation near 1."""

    def __init__(
        self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, chunk: int | None = None
    ) -> None:
        n, d, v = shape
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        self.hidden, self.teacher = random(n, d).requires_grad_(), random(n, d)
        self.weight = random(v, d) / d**0.5
        self.labels = torch.randint(0, v, (n,), generator=generator).to(device)
        self.chunk = chunk or default_chunk(v, device.type, d)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.hidden.grad = None


def dense_loss(hidden: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As the paper's script has it: all logits of both models at once."""
    z = (hidden @ weight.T).float()
    with torch.no_grad():
        z_t = (teacher @ weight.T).float()
    kl = F.kl_div(F.log_softmax(z, -1), F.log_softmax(z_t, -1), reduction="sum", log_target=True)
    p = F.softmax(z, -1)
    entropy = -(p * F.log_softmax(z, -1)).sum()
    return F.cross_entropy(z, labels, reduction="sum") + CONSISTENCY * kl - DIVERSITY * entropy


def ours(case: Case, *, compiled: bool = False) -> Callable[[], None]:
    def run() -> None:
        terms = token_terms(
            case.hidden,
            case.teacher,
            case.weight,
            case.labels,
            lambda_consistency=CONSISTENCY,
            lambda_diversity=DIVERSITY,
            chunk_size=case.chunk,
            compiled=compiled,
        )
        case.backward(terms.loss)

    return run


def ours_compiled(case: Case) -> Callable[[], None]:
    """With the passes over the logits as compiled loops."""
    return ours(case, compiled=True)


def dense(case: Case) -> Callable[[], None]:
    return lambda: case.backward(dense_loss(case.hidden, case.teacher, case.weight, case.labels))


def compiled_dense(case: Case) -> Callable[[], None]:
    function = torch.compile(dense_loss, dynamic=False)
    return lambda: case.backward(function(case.hidden, case.teacher, case.weight, case.labels))


def gemms(case: Case) -> Callable[[], None]:
    """The floor: the three products of every chunk, into buffers that are there."""
    n, v, c = case.hidden.shape[0], case.weight.shape[0], case.chunk
    logits = torch.empty(c, v, dtype=case.weight.dtype, device=case.weight.device)
    gradient = torch.empty_like(case.hidden)

    @torch.no_grad()
    def run() -> None:
        for start in range(0, n, c):
            part = slice(start, min(start + c, n))
            z = logits[: part.stop - start]
            torch.mm(case.hidden[part], case.weight.T, out=z)
            torch.mm(case.teacher[part], case.weight.T, out=z)
            torch.mm(z, case.weight, out=gradient[part])

    return run


def liger(case: Case) -> Callable[[], None]:
    """Liger's fused distillation base (hard loss + KL, no entropy; it also computes the head's unused gradient)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(beta=0.0, compiled=False, chunk_size=max(case.chunk, 1))
    weight = case.weight.detach().clone().requires_grad_()

    def run() -> None:
        case.backward(loss(case.hidden, weight, case.teacher, case.weight, case.labels))
        weight.grad = None

    return run


def checkpointed_cross_entropy(case: Case) -> Callable[[], None]:
    """Cross-entropy alone in recomputed chunks: how TRL's chunked_nll goes about it."""
    from torch.utils.checkpoint import checkpoint

    def chunk(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ case.weight.T).float(), labels, reduction="sum")

    def run() -> None:
        total = case.hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, case.hidden.shape[0], 256):
            part = slice(start, start + 256)
            total = total + checkpoint(chunk, case.hidden[part], case.labels[part], use_reentrant=False)
        case.backward(total)

    return run


def torch_linear_cross_entropy(case: Case) -> Callable[[], None]:
    """PyTorch's own fused linear cross-entropy, where this build has it: cross-entropy alone."""
    function = F.linear_cross_entropy
    return lambda: case.backward(function(case.hidden, case.weight, case.labels, reduction="sum"))


def cut_cross_entropy(case: Case) -> Callable[[], None]:
    """The kernels of the package cut-cross-entropy (a GPU's): cross-entropy alone."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda: case.backward(linear_cross_entropy(case.hidden, case.weight, case.labels, reduction="sum"))


CONTENDERS: dict[str, Callable[[Case], Callable[[], None]]] = {
    "bare GEMMs": gemms,
    "ours": ours,
    "ours, compiled passes": ours_compiled,
    "dense, as in the paper": dense,
    "dense, torch.compile": compiled_dense,
    "Liger distillation (no entropy)": liger,
    "chunked CE alone (recomputed)": checkpointed_cross_entropy,
    "torch linear_cross_entropy (CE alone)": torch_linear_cross_entropy,
    "cut-cross-entropy (CE alone)": cut_cross_entropy,
}


def prepare(make: Callable[[Case], Callable[[], None]], case: Case) -> Callable[[], None]:
    """What cannot even be built says so when it is called."""
    try:
        return make(case)
    except (ImportError, AttributeError) as error:
        reason = error

        def fail() -> None:
            raise reason

        return fail


def spectrum(device: torch.device, repeats: int) -> list[tuple[str, Measured]]:
    """Value and gradient at N = d = 1024, V = 32000."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1024, 1024, generator=generator).to(device).requires_grad_()
    weight = (torch.randn(32000, 1024, generator=generator) / 32).to(device)
    factor = HeadFactor.from_weight(weight)
    _ = factor.plain

    def fast() -> None:
        spectral_term(hidden, factor, k=10).backward()
        hidden.grad = None

    def slow() -> None:
        regularizers.spectral(hidden @ weight.T, k=10).backward()
        hidden.grad = None

    return list(measure({"ours": fast, "svdvals of the logits": slow}, repeats, device).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunk", type=int, help="rows a chunk, ours and the products' (default: ours)")
    parser.add_argument("--shapes", type=int, help="only the first so many shapes, and no spectrum")
    parser.add_argument("--output", type=Path, help="folder for loss.md and loss.png")
    parser.add_argument("--skip", nargs="*", default=[], choices=list(CONTENDERS), help="contenders to leave out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    lines = [f"`python -m benchmarks.loss` on {machine(device)}, {str(dtype).removeprefix('torch.')}", ""]
    charts: dict[str, dict[str, float]] = {}
    for shape in (GPU_SHAPES if gpu else CPU_SHAPES)[: options.shapes]:
        torch._dynamo.reset()
        case = Case(shape, device, dtype, options.chunk)
        chosen = {name: prepare(make, case) for name, make in CONTENDERS.items() if name not in options.skip}
        found = measure(chosen, options.repeats, device)
        floor, mine = found["bare GEMMs"].seconds, found["ours"]
        rows = [
            (name, result.note, "", "", "")
            if result.note
            else (
                name,
                f"{result.seconds:.3f}",
                f"{result.seconds / floor:.2f}",
                f"{result.peak_mib:.0f}",
                f"{result.seconds / mine.seconds:.2f} x / {result.peak_mib / max(mine.peak_mib, 1.0):.1f} x",
            )
            for name, result in found.items()
        ]
        n, d, v = shape
        lines += [f"**N = {n}, d = {d}, V = {v}** (chunks of {case.chunk} rows)", ""]
        header = ("", "seconds", "to the GEMMs", "peak MiB", "time / memory of ours")
        lines += [table(header, rows), ""]
        charts[f"{n} x {d} x {v}"] = {k: r.seconds / floor for k, r in found.items() if not r.note}
        print("\n".join(lines[-4:]), flush=True)
    if options.shapes is None:
        entries = spectrum(device, options.repeats)
        slowest = entries[-1][1].seconds
        ratios = [(name, f"{r.seconds:.3f}", f"{slowest / r.seconds:.1f} x") for name, r in entries]
        lines += ["**Spectrum, N = d = 1024, V = 32000**, value and gradient (float64 inside)", ""]
        lines += [table(("", "seconds", "faster than svdvals"), ratios), ""]
        print("\n".join(lines[-3:]))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "loss.md").write_text("\n".join(lines))
        plot_bars(options.output / "loss.png", "Time of the loss over its GEMMs", charts, "time / bare GEMMs")


if __name__ == "__main__":
    main()
