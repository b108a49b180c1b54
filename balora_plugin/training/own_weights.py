"""The weights of a run's terms: as written, by the schedule, or by rules that read what its steps measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import TERMS, RegularizerConfig
from ..objective.request import Measures, StepOutput, StepRequest
from ..schedules import Lambdas, lambdas_at
from ..weights.balance import HeldShares
from ..weights.drift import HeldDrift
from ..weights.observed import Observed
from ..weights.rules import rules_of

Reduce = Callable[[Tensor, str], Tensor]


class OwnWeights:
    """Knows the weights in force at each step, and takes what micro-batches measure.

    Every rank holds the same: rules read sums and counts over all ranks and all micro-batches of a step.

    Args:
        config: The settings in force, every one resolved.

    Attributes:
        measures: What each micro-batch that meets the teacher is to measure.
        in_force: The weights of the step at hand.
    """

    def __init__(self, config: RegularizerConfig) -> None:
        self.config = config
        self.full = lambdas_at(config, 0.0, scheduled=False)
        self.measures = Measures(drift=config.drift_target is not None, entropy=config.schedule == "adaptive")
        self.in_force = self.full
        self.begin(1)

    def begin(self, steps: int) -> None:
        """Starts the rules anew, for a run of so many optimizer steps."""
        self.rules = rules_of(self.config, steps)
        self._sums: Tensor | None = None
        self._shares_taken = False

    def at(self, progress: float) -> Lambdas:
        """Returns the weights of a step, at `progress` from 0 to 1 of the run."""
        lambdas = scheduled = lambdas_at(self.config, progress)
        for rule in self.rules.values():
            lambdas = rule.weights(lambdas, self.full)
        self._scheduled, self.in_force = scheduled, lambdas
        return lambdas

    def wants_shares(self, step: int) -> bool:
        """Whether shares are due at optimizer step `step` for `balance`, beside those of share_interval.

        At powers of two, between which the way that the student has gone about doubles, and with it the gradient of the
        consistency term; and as soon as a schedule lets a term act that was never measured.
        """
        rule = self.rules.get("balance")
        if not isinstance(rule, HeldShares) or step < 1:
            return False
        return step & (step - 1) == 0 or rule.unmeasured(self._scheduled)

    def note(self, out: StepOutput, request: StepRequest) -> None:
        """Adds what a micro-batch of training measured; nothing waits for its device."""
        if not self.rules:
            return
        assert out.loss is not None and out.count is not None
        zero = torch.zeros((), dtype=torch.float32 if out.loss.device.type == "mps" else torch.float64)
        zero = zero.to(out.loss.device)
        met = out.drift is not None or out.teacher_entropy is not None
        task = out.task if met else None
        found = (out.drift, task, out.teacher_entropy)
        measured = [zero if value is None else value.detach().to(zero) for value in found]
        shares = torch.zeros(len(TERMS)) if out.shares is None else out.shares
        self._shares_taken |= out.shares is not None
        counts = (out.met_teacher, out.count)
        row = [
            *measured,
            *(count.to(zero) if met else zero for count in counts),
            *shares.to(zero),
            zero + (out.shares is not None),
        ]
        sums = torch.stack(row)
        self._sums = sums if self._sums is None else self._sums + sums

    def observe(self, reduce: Reduce) -> Observed:
        """Gives the rules what the step that has ended measured; reduce(tensor, "sum") over ranks, as accelerate's."""
        sums, self._sums = self._sums, None
        due = any(self.measures) or self._shares_taken  # the same on every rank
        self._shares_taken = False
        if sums is None or not due:
            return Observed()
        drift, task, entropy, taught, count, *shares, taken = reduce(sums, "sum").tolist()
        acted = zip(TERMS, shares, self.in_force, strict=True)
        measured = Observed(
            drift=drift / taught if taught and self.measures.drift else None,
            task=task / count if count else None,
            teacher_entropy=entropy / taught if taught and self.measures.entropy else None,
            shares={name: share / taken / weight for name, share, weight in acted if weight} if taken else None,
        )
        for rule in self.rules.values():
            rule.observe(measured)
        return measured

    def first_step(self, measured: Observed) -> str | None:
        """Says that the drift of the first step that moved anything is above its budget; None where it is not."""
        rule = self.rules.get("drift_target")
        return rule.first_step(measured.drift or 0.0) if isinstance(rule, HeldDrift) else None

    def logged(self) -> dict[str, float]:
        """The weights in force, by log key, where any sets itself."""
        return {f"balora/lambda_{name}": value for name, value in zip(TERMS, self.in_force, strict=True) if self.rules}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: {setting: its rule's state}."""
        return {key: rule.state() for key, rule in self.rules.items()}

    def load(self, state: dict[str, Any]) -> list[str]:
        """Goes on from what `state` gave; returns the settings whose rules are not in it, which start anew."""
        for key in self.rules.keys() & state.keys():
            self.rules[key].load(state[key])
        return [key for key in self.rules if key not in state]
