"""What each micro-batch asks of the model: weights by schedule, the teacher by interval, shares where they are due."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

from ..fused.factor import FactorCache
from ..objective.request import StepRequest, uncounted
from ..pretrained.switch import TeacherSwitch
from ..schedules import Lambdas, lambdas_at
from .fill_cache import initial_head_here
from .metrics import TERMS

if TYPE_CHECKING:
    from .trainer import BaLoraTrainerMixin


class Requests:
    """Makes the requests of one trainer; knows which micro-batch of which step it is, and what was measured when."""

    def __init__(self, trainer: BaLoraTrainerMixin, switch: TeacherSwitch) -> None:
        self._trainer, self._switch = trainer, switch
        self._factors = FactorCache()
        self._position = (-1, -1)  # optimizer step, micro-batch within it
        self._shares_due = False
        self._measured_at = 0

    def step(self, training: bool) -> StepRequest:
        """The weights in force now: schedule by optimizer step, teacher by micro-batch."""
        trainer = self._trainer
        config, state, args = trainer.ba_lora, trainer.state, trainer.args
        assert config is not None
        lambdas = lambdas_at(config, state.global_step / max(state.max_steps, 1))
        measure, factor = False, 1
        if training:
            micro = self._next_micro_batch()
            index = state.global_step * args.gradient_accumulation_steps + micro
            runs = teacher_runs(index, config.teacher_interval, int(state.epoch or 0))
            factor = config.teacher_interval if runs else 0
            measure = self._measures(micro, config.share_interval, bool(factor))
            lambdas = lambdas._replace(consistency=lambdas.consistency * factor)
        else:  # every configured term at its full weight, so that evaluations compare
            lambdas = Lambdas(*(getattr(config, f"lambda_{name}") for name in TERMS))
        cache = trainer._ba_lora_cache
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
            teacher=trainer._ba_lora_teacher,
            return_logits=trainer._ba_lora_wants_logits,
            measure_shares=measure,
            teacher_factor=factor,
            switch=self._switch,
            compiled=trainer._ba_lora_compiled if training else None,
            part=trainer._ba_lora_meter.part if training and trainer._ba_lora_meter is not None else uncounted,
            seed=state.global_step if training else 0,  # evaluations compare
            cache=cache,
            teacher_head=initial_head_here(trainer),
            counts=trainer._ba_lora_counts,
        )

    def fill(self) -> StepRequest:
        """Asks a forward pass for nothing but the teacher's states in the cache."""
        trainer = self._trainer
        assert trainer.ba_lora is not None
        return StepRequest(
            config=trainer.ba_lora,
            lambdas=Lambdas(1.0, 0.0, 0.0),
            teacher=trainer._ba_lora_teacher,
            switch=self._switch,
            cache=trainer._ba_lora_cache,
            teacher_head=initial_head_here(trainer),
            fill=True,
        )

    def may_judge(self) -> bool:
        """Whether the shares measured last say something: in warm-up the student still is the teacher."""
        return self._measured_at >= self._judging_step()

    def _judging_step(self) -> int:
        return max(1, math.ceil(0.1 * self._trainer.state.max_steps))

    def _next_micro_batch(self) -> int:
        now = self._trainer.state.global_step
        step, micro = self._position
        micro = micro + 1 if step == now else 0
        self._position = (now, micro)
        return micro

    def _measures(self, micro: int, every: int, with_teacher: bool) -> bool:
        """Whether this micro-batch measures the terms' shares: the first with a teacher from where they are due."""
        now = self._trainer.state.global_step
        # not at step 0, where the consistency gradient is zero by construction
        due = now > 0 and (now in (1, self._judging_step()) or now % max(every, 1) == 0)
        if every and micro == 0 and due:
            self._shares_due = True
        measure = self._shares_due and with_teacher
        if measure:
            self._shares_due, self._measured_at = False, now
        return measure


def teacher_runs(index: int, interval: int, epoch: int) -> bool:
    """Whether micro-batch `index` of the run meets the teacher: every `interval`-th, the same on every rank.

    The phase is drawn anew for each epoch: data in a fixed order would show the teacher the same part again and again.
    """
    phase = random.Random(epoch).randrange(interval) if epoch else 0
    return (index + phase) % interval == 0
