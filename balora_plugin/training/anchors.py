"""A run's anchors: opened with it, their teacher rows computed before the first step, a few of them in each step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from ..anchors.reading import check_anchors
from ..anchors.stream import Stream
from ..anchors.tokens import length_limit, token_documents
from ..distributed import any_process
from ..fused import TopLogProbs
from ..objective.request import AnchorRows, StepOutput
from ..pretrained.lm_head import read_head
from ..settings import described
from ..teacher.cache import TeacherCache
from ..teacher.in_memory import MemoryFiles
from ..teacher.opening import open_cache
from .host import HostTrainer
from .run_state import RunState
from .step_requests import fill_request

logger = logging.get_logger(__name__)

EVALUATED = 8  # documents that evaluations measure, and training leaves alone where there are twice as many
MEMORY = 2 << 30  # bytes of teacher states that are kept without a teacher_cache
_ROWS, _TOKENS = 8, 16384  # of a teacher pass, at most


def open_run_anchors(run: RunState, host: HostTrainer) -> None:
    """Gives a run the anchors that its terms name, and its trainer the callback that computes their teacher rows.

    Raises:
        ValueError: data that cannot be read, no tokenizer; names the setting and what to write.
    """
    config, args = run.config, host.args
    shown = described(config.anchor_data)
    if not config.lambda_consistency:
        run.warn(
            "anchors_inert",
            f"anchor_data={shown!r} with lambda_consistency=0 does nothing: raise lambda_consistency, or leave "
            "anchor_data out.",
        )
        return
    processor = host.processing_class
    tokenizer = getattr(processor, "tokenizer", processor)
    check_anchors(config.anchor_data, tokenizer)
    given = getattr(args, "max_length", None) or getattr(args, "max_seq_length", None)
    positions = getattr(run.model.config.get_text_config(), "max_position_embeddings", None)
    width = int(getattr(read_head(run.model).weight, "ds_shape", read_head(run.model).weight.shape)[1])
    documents, total = token_documents(
        config.anchor_data,
        tokenizer,
        limit=length_limit(given, tokenizer, positions),
        tokens=None if run.cache is not None else MEMORY // (2 * width),
    )
    if run.cache is None and len(documents) < total:
        run.warn(
            "anchors_memory",
            f"anchor_data={shown!r}: {len(documents)} of {total} documents are used, whose teacher states take "
            f"{MEMORY >> 30} GiB of memory. Name a teacher_cache, a directory, to use all.",
        )
    rows = Fraction(str(config.anchor_fraction)) * args.train_batch_size * args.gradient_accumulation_steps
    held_out = EVALUATED if len(documents) >= 2 * EVALUATED else 0
    stream = Stream(len(documents) - held_out, rows * args.world_size, args.world_size, args.seed)
    cache = _in_memory(run, host) if run.cache is None else run.cache  # an empty one is false
    anchors = run.anchors = RunAnchors(run, host, cache, stream, documents)
    run.callbacks.insert(0, ComputeBeforeTraining(anchors))  # before full fine-tuning freezes its cache
    logger.info(
        f"anchor_data={shown!r}: {len(documents)} of {total} documents, {float(stream.per_step):g} rows a step."
    )


class RunAnchors:
    """The anchors of a run, as each micro-batch and each evaluation meets them.

    Args:
        run: The run.
        host: Its trainer.
        cache: Holds the teacher's rows.
        stream: Which documents a step meets, of all but the first ones, which evaluations do.
        documents: Token ids (n,) of each.
    """

    def __init__(
        self, run: RunState, host: HostTrainer, cache: TeacherCache, stream: Stream, documents: list[np.ndarray]
    ) -> None:
        self._run, self._host, self._cache, self._stream = run, host, cache, stream
        first = len(documents) - stream.documents
        self._trained, self._evaluated = documents[first:], documents[:EVALUATED]
        self._until = -1  # the step before which all anchors are computed

    def of_step(self, micro: int, weight: float) -> AnchorRows:
        """Returns the anchors of this process's micro-batch `micro` of the current step; `weight`: of the term."""
        host, stream, step = self._host, self._stream, self._host.state.global_step
        self.compute(step + 1)
        count = getattr(host, "current_gradient_accumulation_steps", host.args.gradient_accumulation_steps)
        chosen = stream.of_micro_batch(step, host.args.process_index, micro, count)
        whole = sum(len(self._trained[i]) for i in stream.of_step(step))
        rows = self._rows([self._trained[i] for i in chosen], f"step {step}")
        return rows._replace(weight=weight * stream.weight, whole=whole, parts=count * stream.processes)

    def of_evaluation(self, weight: float) -> AnchorRows | None:
        """Returns the fixed anchors for the first batch of an evaluation, the same on all processes; then None."""
        args = self._host.args
        if self._run.metrics.recorded_in("eval") or args.bf16_full_eval or args.fp16_full_eval:
            return None  # the teacher's rows are of another precision than such an evaluation
        self.compute(0)
        whole = sum(map(len, self._evaluated))
        return self._rows(self._evaluated, "evaluation")._replace(weight=weight, whole=whole)

    def compute(self, steps: int) -> None:
        """Computes the teacher's rows of the evaluation's documents, and of those that the first `steps` steps meet.

        All processes call it together, each computes its own. What is together in a pass depends on the settings
        alone, so that a resumed run has the same rows to the bit.
        """
        if steps <= self._until:
            return
        self._until = steps
        cache, device = self._cache, self._host.args.device
        blocks = self._missing(steps)
        while any_process(bool(blocks), device):
            self._pass_over(blocks.pop(0) if blocks else self._evaluated[:1])
        cache.flush()

    def _missing(self, steps: int) -> list[list[np.ndarray]]:
        met = list(self._stream.met_by(self._host.args.process_index, steps))
        ahead = {document for step, document in met if step >= self._host.state.global_step}
        blocks = list(_blocks(self._evaluated))
        for block in _blocks_of(list(dict.fromkeys(document for _, document in met)), self._trained):
            if ahead.intersection(block):
                blocks.append([self._trained[i] for i in block])
        return [block for block in blocks if self._cache.missing(*_batch(block))]

    def _pass_over(self, block: list[np.ndarray]) -> None:
        host, device = self._host, self._host.args.device
        inputs, counted = _batch(block)
        inputs["shift_labels"] = inputs["input_ids"].masked_fill(~counted, -100)
        request = dataclasses.replace(fill_request(self._run, device), cache=self._cache)
        with torch.no_grad(), host.compute_loss_context_manager():
            host.model_wrapped(**{key: value.to(device) for key, value in inputs.items()}, ba_lora=request)

    def _rows(self, documents: list[np.ndarray], where: str) -> AnchorRows:
        """These documents with the teacher's rows, on the run's device."""
        device = self._host.args.device
        if not documents:
            empty = torch.zeros(0, 0, dtype=torch.int64, device=device)
            return AnchorRows(empty, empty.bool(), None, 0.0, 0, 1)
        inputs, counted = _batch(documents)
        teacher = self._cache.held(inputs, counted)
        if teacher is None:
            raise RuntimeError(
                f"anchor_data: the teacher's rows of an anchor at {where} are gone: start again from it."
            )
        if isinstance(teacher, TopLogProbs):
            teacher = TopLogProbs(*(x.to(device) for x in teacher))
        else:
            teacher = teacher.to(device)
        return AnchorRows(inputs["input_ids"].to(device), counted.to(device), teacher, 0.0, 0, 1)


class ComputeBeforeTraining(TrainerCallback):
    """Has the teacher's rows of all anchors that a run will meet computed when training begins."""

    def __init__(self, anchors: RunAnchors) -> None:
        self._anchors = anchors

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if model is not None:
            model.train()  # as for a step; the teacher's switch sets what has to be in eval mode
        self._anchors.compute(state.max_steps)


def with_anchors(loss: Tensor, out: StepOutput, processes: int, *, counted: bool) -> Tensor:
    """Returns a micro-batch's loss with the consistency over its anchors, which is divided by the step's count.

    Args:
        loss: What the host goes on with.
        out: The pass's output; without anchors the loss stays as it is.
        processes: Over which gradients are averaged.
        counted: Whether the host knew the global batch's tokens; it divides by the micro-batches else.
    """
    if out.anchors is None:
        return loss
    return loss + (out.anchors.loss * processes if counted else out.anchors.loss / out.anchors.part).to(loss.device)


def _in_memory(run: RunState, host: HostTrainer) -> TeacherCache:
    """A cache of this process's own, for a run without teacher_cache."""
    teacher = run.teacher
    return open_cache(
        MemoryFiles("anchor_data, in memory"),
        run.model if teacher is None else teacher,
        run.config,
        own=teacher is not None,
        mixed_precision=str(host.accelerator.mixed_precision),
        base="as it is loaded",
    )


def _batch(documents: list[np.ndarray]) -> tuple[dict[str, Tensor], Tensor]:
    """Documents as rows (A, T), and (A, T) bool: where they are."""
    longest = max(map(len, documents))
    ids = torch.zeros(len(documents), longest, dtype=torch.int64)
    counted = torch.zeros(ids.shape, dtype=torch.bool)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.from_numpy(document)
        counted[row, : len(document)] = True
    return {"input_ids": ids, "attention_mask": counted.long()}, counted


def _blocks(documents: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    for block in _blocks_of(range(len(documents)), documents):
        yield [documents[i] for i in block]


def _blocks_of(order: Iterable[int], documents: list[np.ndarray]) -> Iterator[list[int]]:
    """Cuts an order of documents into what one teacher pass takes."""
    block: list[int] = []
    longest = 0
    for i in order:
        longest = max(longest, len(documents[i]))
        if block and (len(block) == _ROWS or longest * (len(block) + 1) > _TOKENS):
            yield block
            block, longest = [], len(documents[i])
        block.append(i)
    if block:
        yield block
