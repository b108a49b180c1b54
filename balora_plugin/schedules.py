"""How the three weights move over training, as pure functions of p = finished optimizer steps / total steps."""

from __future__ import annotations

import math
from typing import NamedTuple

from .config import RegularizerConfig


class Lambdas(NamedTuple):
    """The weights in force at one optimizer step."""

    consistency: float
    diversity: float
    svd: float


def lambdas_at(config: RegularizerConfig, progress: float, *, scheduled: bool = True) -> Lambdas:
    """The weights at `progress` p in [0, 1] (values outside are clamped) of a resolved config.

    `scheduled=False`: the configured ones, whatever the schedule. `adaptive` has no p: `weights/adaptive.py` moves it.

    `iclr2026` (ICLR 2026 version, section "schedules"): lambda_consistency follows a cosine from its value to a tenth
    of it; lambda_diversity and lambda_svd are 0 for p < 0.2, rise linearly until p = 0.25, and stay.
    """
    if config.lambda_consistency is None or config.lambda_diversity is None or config.lambda_svd is None:
        raise ValueError("lambdas_at needs a resolved config: call config.resolved(task) first.")
    full = Lambdas(config.lambda_consistency, config.lambda_diversity, config.lambda_svd)
    if not scheduled or config.schedule in ("constant", "adaptive"):
        return full
    if config.schedule != "iclr2026":
        raise ValueError(f"schedule={config.schedule!r} is not known: write 'constant', 'iclr2026' or 'adaptive'.")
    p = min(max(progress, 0.0), 1.0)
    cosine = 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * p))
    ramp = min(max((p - 0.2) / 0.05, 0.0), 1.0)
    return Lambdas(full.consistency * cosine, full.diversity * ramp, full.svd * ramp)
