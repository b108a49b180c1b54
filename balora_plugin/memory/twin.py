"""A model of the same shapes without values, and what a training step on it would hold."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ..adapter.config import BaLoraConfig
from ..adapter.model import build
from ..adapter.towers import leave_towers_out
from ..fused.chunk_loop import loop_bytes
from ..fused.factor import HeadFactor
from ..fused.head import Head
from ..fused.head_spectrum import head_ratio_bytes
from ..fused.loss import Execution, TeacherStates, TokenLoss, Wants
from ..fused.project import default_chunk, product_dtype
from ..fused.spectrum import ratio_bytes
from ..objective.causal_lm_terms import (
    SpectrumRequest,
    backbone_pass,
    spectrum_request,
    token_loss,
    token_spectrum,
    token_sums,
)
from ..objective.request import StepRequest
from ..pretrained.attention import is_flash
from ..pretrained.classifier_head import is_classifier
from ..pretrained.lm_head import read_head
from ..pretrained.switch import TeacherSwitch
from ..schedules import Lambdas
from .estimate import Held, MemoryEstimate, Workload
from .held import held_by, quantised_bytes, step_bytes
from .live import LiveBytes, bytes_of


def hollow(make: Callable[[Any], PreTrainedModel], config: Any) -> PreTrainedModel:
    """Returns the model that `make` makes of a config, on the meta device: its tensors have shapes alone.

    A quantisation in the config is left out (see `bits` of [`Twin.estimate`]); flash attention, whose kernels ask for a
    GPU, is counted as sdpa, which keeps the same tensors and a mask more.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if is_flash(str(getattr(config, "_attn_implementation", ""))):
        config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return make(config)


class Twin:
    """A model with its adapter as shapes alone, on which training steps are run to see what they hold.

    Args:
        base: The model, from [`hollow`]; modified in place.
        adapter: The adapter's config; None: all weights train.
    """

    def __init__(self, base: PreTrainedModel, adapter: LoraConfig | None) -> None:
        self.base: Any = base
        self.model: nn.Module = base if adapter is None else _adapted(base, adapter)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            _take_values_away(self.model)

    def like(self, model: nn.Module) -> None:
        """Takes dtypes, and which parameters train, from a real model of the same shapes.

        Packed weights of quantised layers are taken for the floats that they are read as.
        """
        theirs = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with self._mode, torch.no_grad():
            for name, own in (*self.model.named_parameters(), *self.model.named_buffers()):
                given = theirs.get(name)
                if given is None:
                    continue
                own.requires_grad_(given.requires_grad)
                dtype = given.dtype if given.shape == own.shape and given.is_floating_point() else _read_as(given)
                if own.is_floating_point() and dtype is not None:
                    own.data = own.data.to(dtype)

    def estimate(self, work: Workload, held: Held, bits: int | None = None) -> MemoryEstimate:
        """Returns what a step takes.

        Args:
            work: What it does.
            held: What is held all along, from [`Twin.held`] or [`held_by`].
            bits: 4 or 8 where `held` has the linear layers' weights quantised by bitsandbytes; None where they are not.
        """
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with self._mode, self._ready(work):
            step = _Step(self, work)
            moments = step.moments()
        if bits is not None:  # a layer's weight is dequantised where it is read
            largest = max((bytes_of([p]) for p in self._quantisable()), default=0)
            for name in ("teacher", "student", "backward"):
                moments[name] = moments[name]._replace(activations=moments[name].activations + largest)
        made = step_bytes(self.model, work.optimizer, work.device_type)
        moments["optimizer"] = _Moment(made, bytes_of(trained), 0)
        totals = {name: held.total + step.factor + sum(found) for name, found in moments.items()}
        most = max(totals, key=totals.__getitem__)
        return MemoryEstimate(
            **dataclasses.asdict(held),
            gradients=moments[most].gradients,
            activations=moments[most].activations,
            terms=moments[most].terms + step.factor,
            moment=most,
            by_moment=totals,
            kept=step.kept,
        )

    def held(self, optimizer: str, bits: int | None = None) -> Held:
        """Returns what the model would hold all along, its linear layers quantised to `bits`."""
        held = held_by(self.model, optimizer)
        return dataclasses.replace(held, weights=held.weights - self.packed_away(bits))

    def packed_away(self, bits: int | None) -> int:
        """Returns the bytes that quantising the base's linear layers to `bits` saves; 0 for None."""
        if bits is None:
            return 0
        return sum(bytes_of([p]) - quantised_bytes(p, bits) for p in self._quantisable())

    def _quantisable(self) -> list[Tensor]:
        """The weights that bitsandbytes quantises: of linear layers, without the head and without the adapter's."""
        head = self.base.get_output_embeddings() if hasattr(self.base, "get_output_embeddings") else None
        adapters = ("lora_", "frozen_")
        return [
            module.weight
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
            and module is not head
            and not module.weight.requires_grad
            and not any(part in name for part in adapters)
        ]

    @contextmanager
    def _ready(self, work: Workload) -> Iterator[None]:
        """The model in the state in which a micro-batch finds it, and back."""
        self.base.train()  # past the adapter's own method, which looks at values
        if work.checkpointing:
            # no values, so no random states either
            self.base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter) if work.accumulates else None
        try:
            yield
        finally:
            if work.checkpointing:
                self.base.gradient_checkpointing_disable()
                self.base.disable_input_require_grads()  # transformers turns it on beside checkpointing, not off
            for parameter in trained:
                parameter.grad = None


class _Moment(NamedTuple):
    """Bytes at one moment, beside what is held all along."""

    activations: int
    gradients: int
    terms: int


class _Step:
    """One micro-batch on a twin, moment by moment.

    Attributes:
        factor: Bytes of the head's factor, which the spectrum keeps.
        kept: What the backward pass needs, by the class of the module that made it.
    """

    def __init__(self, twin: Twin, work: Workload) -> None:
        self.twin, self.work = twin, work
        self.base, self.classifies = twin.base, is_classifier(twin.base)
        terms = work.terms
        self.lambdas = Lambdas(terms.lambda_consistency or 0.0, terms.lambda_diversity or 0.0, terms.lambda_svd or 0.0)
        self.factor = 0
        self.kept: dict[str, int] = {}
        ids = torch.zeros(work.rows, work.length, dtype=torch.long)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        self.targets = torch.zeros_like(ids)

    def moments(self) -> dict[str, _Moment]:
        """Returns {moment: bytes} of the passes."""
        work, model, live = self.work, self.twin.model, LiveBytes()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        before = bytes_of(gradients)
        found: dict[str, _Moment] = {}
        cast = nullcontext() if work.autocast is None else torch.autocast("cpu", dtype=work.autocast)
        with live:
            live.own([*model.parameters(), *model.buffers(), *gradients])
            live.watch(model)
            with cast:
                teacher = self._teacher()
                found["teacher"] = _Moment(live.peak, before, 0)
                live.start_phase()
                output = self._student()
                found["student"] = _Moment(live.peak, before, 0)
                self.kept = live.by_kind()
                loss, buffers = self._loss(output, teacher)
                found["terms"] = _Moment(live.now, before, buffers)
            del output, teacher
            live.start_phase()
            loss.backward()
            found["backward"] = _Moment(live.peak - live.gradients_at_peak, before + live.gradients_at_peak, 0)
        return found

    def _teacher(self) -> Tensor | None:
        """Its final hidden states, or logits of a classifier; what a cache gives in their place has their shape."""
        if not self.lambdas.consistency:
            return None
        if self.work.cached:
            config = self.base.config.get_text_config()
            return torch.empty(self.work.rows, self.work.length, config.hidden_size, dtype=torch.bfloat16)
        with TeacherSwitch(self.twin.model).off():
            return self._student()

    def _student(self) -> Tensor:
        if self.classifies:
            inputs = {key: value for key, value in self.inputs.items() if key != "use_cache"}
            return self.base(**inputs).logits
        return backbone_pass(self.base, self.inputs)

    def _loss(self, output: Tensor, teacher: Tensor | None) -> tuple[Tensor, int]:
        """The loss of the student's output, and the bytes of the buffers that its operators hold."""
        if self.classifies:  # a few logits a sample: nothing beside the passes
            return output.float().square().sum(), 0
        head = read_head(self.base)
        request = StepRequest(config=self.work.terms, lambdas=self.lambdas)
        states = None if teacher is None else TeacherStates(teacher.to(output.dtype))
        asked = token_loss(request, head, states)
        loss = token_sums(output, self.targets, asked)[0]
        buffers = self._loop_bytes(output, asked)
        spectrum = self._spectrum(request, head)
        ratio = token_spectrum(output, self.targets, head, spectrum)
        if spectrum is not None:
            buffers = max(buffers, self._spectrum_bytes(spectrum, head))
        if ratio is not None:
            loss = loss + ratio[0]
        return loss, buffers

    def _loop_bytes(self, output: Tensor, asked: TokenLoss) -> int:
        vocabulary, size = asked.head.weight.shape
        chunk = default_chunk(vocabulary, self.work.device_type, size)
        execution = Execution(chunk, product_dtype(output, asked.head.weight), Wants(True, asked.head.trains, False))
        taught = asked.teacher is not None
        rows = self.targets.numel()
        return loop_bytes(rows, asked.head, asked.form, execution, self.work.device_type, teacher=taught)

    def _spectrum_bytes(self, spectrum: SpectrumRequest, head: Head) -> int:
        rows = self.work.rows if spectrum.flattened else self.targets.numel()
        if spectrum.max_rows and not spectrum.flattened:
            rows = min(rows, spectrum.max_rows)
        if spectrum.of == "head":
            return head_ratio_bytes(rows, head)
        width = head.weight.shape[1] * (self.work.length if spectrum.flattened else 1)
        return ratio_bytes(rows, width, 0 if spectrum.factor is None else spectrum.factor.shape[1])

    def _spectrum(self, request: StepRequest, head: Head) -> SpectrumRequest | None:
        """What is asked of the spectrum, with a factor of the head that has its shape and no values."""
        size = head.weight.shape[1] + (head.bias is not None)
        request.factors = _Shapes(size)  # type: ignore[assignment]
        asked = spectrum_request(request, head)
        if asked is not None and asked.factor is not None:
            self.factor = 2 * bytes_of([asked.factor])  # and the Gram matrix
        return asked


class _Shapes:
    """In the place of a FactorCache: factors of a head of `size` columns, without values."""

    def __init__(self, size: int) -> None:
        self.size = size

    def get(self, head: Head) -> HeadFactor:
        """Returns a factor of full rank."""
        gram = torch.empty(self.size, self.size, dtype=torch.float64)
        factor = HeadFactor(gram, gram[0], head.weight.shape[0], head.bias is not None)
        factor.__dict__.update(plain=gram, centered=gram)
        return factor


def _read_as(packed: Any) -> torch.dtype | None:
    """What bitsandbytes makes of a packed weight; None where the weight does not say so."""
    dtype = getattr(getattr(packed, "quant_state", None), "dtype", None)
    return torch.float16 if dtype is None and hasattr(packed, "SCB") else dtype


def _adapted(model: PreTrainedModel, adapter: LoraConfig) -> PeftModel:
    """The model under an adapter that is made on the meta device, without a start."""
    if isinstance(adapter, BaLoraConfig):
        adapter = copy.deepcopy(adapter)
        leave_towers_out(adapter, model)  # as a start does
        return build(model, adapter, "default", low_cpu_mem_usage=True, start=False)
    plain = copy.deepcopy(adapter)
    plain.init_lora_weights = False  # shapes alone: a start would read weights
    return get_peft_model(model, plain, low_cpu_mem_usage=True)


def _take_values_away(model: nn.Module) -> None:
    """Gives a model on the meta device tensors that stand for ones on a CPU; what is shared stays shared."""
    made: dict[int, Any] = {}

    def stand_in(value: Tensor) -> Any:
        if id(value) not in made:
            empty = torch.empty(value.shape, dtype=value.dtype, device="cpu")
            trains = value.requires_grad
            made[id(value)] = nn.Parameter(empty, requires_grad=trains) if isinstance(value, nn.Parameter) else empty
        return made[id(value)]

    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, value in group.items():
                if value is not None:
                    group[name] = stand_in(value)
