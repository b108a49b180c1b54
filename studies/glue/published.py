"""What the paper publishes on GLUE that the study has a figure beside, and what of it can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..common.bootstrap import Interval
from ..common.tables import table
from .differences import ALL, Key
from .outcomes import MINORITY, SCORE, Metric

GLUE = "DeBERTa-v3-base, eight tasks, whole training sets, tuned for each method"
SIGN = "sign alone: "
MNLI = "MNLI with an imbalance that is not stated in numbers, three classes"


@dataclass(frozen=True)
class Claim:
    """A published difference in points: `value`, of which method to which; here in `setting`, by `metric`."""

    setting: str
    metric: Metric
    method: str
    reference: str
    value: float
    on: str


CLAIMS = (
    Claim("clean", SCORE, "pissa", "lora", 89.47 - 88.56, GLUE),
    Claim("clean", SCORE, "ba-paper", "pissa", 89.91 - 89.47, GLUE),
    Claim("clean", SCORE, "ba-iclr2026", "pissa", 90.67 - 89.47, GLUE),
    Claim("clean", SCORE, "consistency", "pissa", 89.78 - 89.47, GLUE),
    Claim("clean", SCORE, "diversity", "pissa", 89.65 - 89.47, GLUE),
    Claim("clean", SCORE, "svd", "pissa", 89.59 - 89.47, GLUE),
    Claim("imbalance", MINORITY, "pissa", "lora", 26.4 - 5.8, MNLI),
    Claim("imbalance", MINORITY, "ba-paper", "pissa", 61.7 - 26.4, MNLI),
    Claim("imbalance", MINORITY, "ba-iclr2026", "pissa", 61.7 - 26.4, MNLI),
)


def beside(found: Mapping[str, Mapping[Key, Interval]]) -> str:
    """A row a claim: published, found here over the tasks, and what of the two can be compared."""
    rows = []
    for claim in CLAIMS:
        here = found.get(claim.setting, {}).get(Key(ALL, claim.metric, claim.method, claim.reference))
        if here is None:
            continue
        name = f"{claim.setting}, {claim.metric.name}: {claim.method} minus {claim.reference}"
        rows.append([name, f"{claim.value:+.2f}", here.text(1), agreement(claim.value, here), SIGN + claim.on])
    return table(["", "published, points", "here", "", "comparable"], rows) if rows else ""


def agreement(published: float, here: Interval) -> str:
    """What the interval says of the published difference."""
    if np.isnan(here.value):
        return "not run"
    if not here.leaves_out_zero():
        holds = here.low <= published <= here.high
        return "within chance of 0" + (", and of the published one" if holds else ", not of the published one")
    return "same sign" if here.value * published > 0 else "the other sign"
