"""What each micro-batch asks of the model: weights by schedule, the teacher by interval, shares where they are due."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TrainerCallback

from ..fused.factor import FactorCache
from ..objective.request import StepRequest, uncounted
from ..pretrained.shared_layers import SharedLayers
from ..schedules import Lambdas
from .host import HostTrainer
from .run_state import RunState
from .teacher_rows import WHOLE, TeacherRows, Turn, apart_in_words

# steps taken: a warm-up's first has a rate of 0, and the consistency's share grows with what the weights have moved
FIRST_JUDGED = 10


class StepRequests(TrainerCallback):
    """Makes the requests of one trainer; knows which micro-batch of which step it is, and what was measured when."""

    def __init__(self, run: RunState, host: HostTrainer) -> None:
        self._run, self._host = run, host
        self._factors = FactorCache()
        self._teacher_rows = TeacherRows(run, host)
        self._begin()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin()
        apart = apart_in_words(self._run.config.teacher_interval, args.gradient_accumulation_steps)
        if self._run.by_layer is not None and apart:  # arguments may be others than when the trainer was made
            self._run.by_layer.stop(apart)

    def _begin(self) -> None:
        """Counts anew: a training begins, perhaps at the very step at which an earlier one ended."""
        self._position = (-1, -1)  # optimizer step, micro-batch within it
        self._shares_due = False
        self._measured_at = 0

    def step(self, training: bool) -> StepRequest:
        """Returns the request of the next micro-batch: weights by schedule, the teacher where it is due.

        In evaluation every term has the weight that is written, so that evaluations compare.
        """
        run, state, args = self._run, self._host.state, self._host.args
        config = run.config
        lambdas = run.own.at(state.global_step / max(state.max_steps, 1)) if training else run.own.full
        monitor = config.monitor and not training
        measure, factor, anchors, turn = False, 1, None, WHOLE
        if training:
            micro = self._next_micro_batch()
            anchors = None if run.anchors is None else run.anchors.of_step(micro, lambdas.consistency)
            index = state.global_step * args.gradient_accumulation_steps + micro
            turn = self._teacher_rows.of(index)
            factor = config.teacher_interval if turn.runs else 0
            measure = self._measures(micro, config.share_interval, turn.common)
            lambdas = lambdas._replace(consistency=lambdas.consistency * factor)
        else:
            anchors = None if run.anchors is None else run.anchors.of_evaluation(lambdas.consistency)
        cache = run.cache
        if cache is not None:
            cache.where = f"step {state.global_step}" if training else "evaluation"
            if not training and (args.bf16_full_eval or args.fp16_full_eval):
                cache = None  # another precision than the cache's
        warming = state.global_step < config.head_warmup_steps  # the head alone: there is no teacher for it yet
        if warming:
            lambdas, measure = Lambdas(0.0, 0.0, 0.0), False
        return StepRequest(
            config=config,
            lambdas=lambdas,
            head_only=training and warming,
            factors=self._factors,
            teacher=run.teacher,
            return_logits=run.wants_logits,
            measure_shares=measure,
            teacher_factor=factor,
            switch=run.switch,
            compiled=run.compiled if training else None,
            part=run.meter.part if training and run.meter is not None else uncounted,
            seed=state.global_step if training else 0,  # evaluations compare
            cache=cache,
            teacher_head=run.initial_head_on(args.device),
            counts=run.counts,
            task_form=run.task_form,
            monitor=monitor and not warming,
            measures=run.own.measures._replace(drift=True, student_entropy=True) if monitor else run.own.measures,
            anchors=anchors,
            shared=self._shared(turn),
            by_layer=run.by_layer,
            teacher_rows=turn.rows,
            teacher_late=turn.late,
        )

    def _shared(self, turn: Turn) -> SharedLayers | None:
        """The layers that teacher and student compute once; what proves them is asked of all processes together."""
        shared = self._run.shared
        return shared if shared is None or shared.proven or turn.common else None

    def may_judge(self) -> bool:
        """Returns whether the shares measured last say something: in warm-up the student still is the teacher."""
        return self._measured_at >= self._judging_step()

    def _judging_step(self) -> int:
        return max(FIRST_JUDGED, math.ceil(0.1 * self._host.state.max_steps))

    def _next_micro_batch(self) -> int:
        now = self._host.state.global_step
        step, micro = self._position
        micro = micro + 1 if step == now else 0
        self._position = (now, micro)
        return micro

    def _measures(self, micro: int, every: int, with_teacher: bool) -> bool:
        """Whether this micro-batch measures the terms' shares: the first with a teacher from where they are due."""
        now = self._host.state.global_step
        # not at step 0, where the consistency gradient is zero by construction
        due = now > 0 and (now in (1, self._judging_step()) or now % max(every, 1) == 0)
        due = due or self._run.own.wants_shares(now - self._run.config.head_warmup_steps)
        if every and micro == 0 and due:
            self._shares_due = True
        measure = self._shares_due and with_teacher
        if measure:
            self._shares_due, self._measured_at = False, now
        return measure


def fill_request(run: RunState, device: torch.device) -> StepRequest:
    """Returns what asks a forward pass for nothing but the teacher's outputs in the cache."""
    return StepRequest(
        config=run.config,
        lambdas=Lambdas(1.0, 0.0, 0.0),
        teacher=run.teacher,
        switch=run.switch,
        cache=run.cache,
        teacher_head=run.initial_head_on(device),
        fill=True,
    )
