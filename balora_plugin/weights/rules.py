"""Which rules a run's settings ask for."""

from __future__ import annotations

from ..config import RegularizerConfig
from ..schedules import lambdas_at
from .adaptive import ByEntropy
from .balance import HeldShares
from .drift import HeldDrift
from .observed import Rule


def rules_of(config: RegularizerConfig, steps: int) -> dict[str, Rule]:
    """Returns {key of the setting: its rule} of resolved settings, at the start of a run of so many optimizer steps."""
    rules: dict[str, Rule] = {}
    full = lambdas_at(config, 0.0, scheduled=False)
    if config.drift_target is not None:
        rules["drift_target"] = HeldDrift(
            config.drift_target, full.consistency, steps, in_nats=config.consistency != "mse"
        )
    if config.balance:
        rules["balance"] = HeldShares(config.balance, full)
    if config.schedule == "adaptive":
        rules["schedule"] = ByEntropy()
    return rules
