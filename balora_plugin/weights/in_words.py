"""Settings and their weights as a reader is told them."""

from __future__ import annotations

from ..config import RegularizerConfig
from ..consistency import form_named
from ..settings import settings_of


def weights_in_words(config: RegularizerConfig) -> list[str]:
    """Returns the weights of resolved settings that are not 0, with their values: "lambda_svd=0.005"."""
    names = [name for name in settings_of(config) if name.startswith("lambda_")]
    return [f"{name}={getattr(config, name):g}" for name in names if getattr(config, name)]


def terms_in_words(config: RegularizerConfig) -> str:
    """Returns resolved settings in a line: each term that is on with its weight and form, schedule, preset."""
    parts = []
    if config.lambda_consistency:
        heated = form_named(config.consistency or "kl").uses_temperature and config.temperature != 1.0
        heat = f", temperature {config.temperature:g}" if heated else ""
        parts.append(f"consistency {_weight(config, 'consistency')} ({config.consistency}{heat})")
    if config.lambda_diversity:
        top = f" (top {config.diversity_top_k})" if config.diversity_top_k else ""
        parts.append(f"diversity {_weight(config, 'diversity')}{top}")
    if config.lambda_svd:
        form = f"k = {config.svd_top_k}, {config.svd_norm}, {config.svd_input}"
        parts.append(f"singular values {_weight(config, 'svd')} ({form})")
    if not parts:
        return "none (all weights 0)"
    schedule = "" if config.schedule == "constant" else f"; schedule {config.schedule}"
    interval = "" if config.teacher_interval == 1 else f"; teacher on every {config.teacher_interval}th row"
    return f"{', '.join(parts)}{schedule}{interval}; preset {config.preset}"


def _weight(config: RegularizerConfig, term: str) -> str:
    """A term's weight, or what it is found for."""
    return config.holds(term) or f"{getattr(config, f'lambda_{term}'):g}"
