"""A recipe: model, adapter, terms and, per task, epochs, batch size and learning rates; read from YAML, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import RegularizerConfig
from .tasks import RECIPES, TASKS

_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("lora_alpha", lambda x: x > 0, "above 0"),
    ("lora_dropout", lambda x: 0 <= x < 1, "from 0 to below 1"),
    ("epochs", lambda x: x > 0, "above 0"),
    ("warmup_ratio", lambda x: 0 <= x < 1, "from 0 to below 1, a part of all steps"),
    ("weight_decay", lambda x: x >= 0, ">= 0"),
)


@dataclass(frozen=True)
class Settings:
    """What one task is trained with. Learning rates are a grid; the rest is fixed."""

    r: int = 8
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    target_modules: str | list[str] | None = "all-linear"
    epochs: float = 10
    batch_size: int = 16
    accumulation: int = 1
    eval_batch_size: int = 64
    learning_rates: tuple[float, ...] = (3e-4,)
    max_length: int = 128
    scheduler: str = "linear"
    warmup_ratio: float = 0.06
    weight_decay: float = 0.0
    bf16: bool = False
    max_steps: int = -1

    def __post_init__(self) -> None:
        rates = self.learning_rates
        rates = (rates,) if isinstance(rates, (int, float)) else tuple(rates)
        if not rates or not all(isinstance(rate, (int, float)) and rate > 0 for rate in rates):
            hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if any(isinstance(rate, str) for rate in rates) else ""
            raise ValueError(f"learning_rates: {self.learning_rates!r} must be numbers above 0{hint}.")
        object.__setattr__(self, "learning_rates", rates)
        for key in ("r", "batch_size", "accumulation", "eval_batch_size", "max_length"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key}: {value!r} must be a whole number >= 1.")
        steps = self.max_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or not (steps == -1 or steps >= 1):
            raise ValueError(f"max_steps: {steps!r} must be a whole number >= 1, or -1 for all epochs.")
        for key, fits, expected in _RANGES:
            value = getattr(self, key)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not fits(value):
                raise ValueError(f"{key}: {value!r} must be a number {expected}.")


@dataclass(frozen=True)
class Recipe:
    """A model's settings for every task. `tasks` holds what differs from `defaults`."""

    model: str
    defaults: Settings = field(default_factory=Settings)
    tasks: dict[str, Settings] = field(default_factory=dict)
    regularizers: RegularizerConfig = field(default_factory=RegularizerConfig)
    seeds: tuple[int, ...] = (42, 1024, 2024)

    def of(self, task: str) -> Settings:
        """Returns the settings of a task."""
        return self.tasks.get(task, self.defaults)


def recipe_file(name: str) -> str:
    """Returns the file of a recipe: `name` itself, or that of one of RECIPES, which lie in this package.

    Raises:
        ValueError: it is neither.
    """
    if name in RECIPES and not Path(name).is_file():
        return str(Path(__file__).parent / "recipes" / f"{name}.yaml")
    if not Path(name).is_file():
        raise ValueError(f"--recipe {name} is no file: name one, or one of {', '.join(RECIPES)}.")
    return name


def read_recipe(path: str) -> Recipe:
    """Reads a recipe from a YAML of `model`, `seeds`, `regularizers`, `defaults` and `tasks: {name: {...}}`.

    Raises:
        ValueError: a key or value that is none; names it.
    """
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no YAML mapping of keys to values.")
    known = [entry.name for entry in dataclasses.fields(Recipe)]
    _check_keys(path, values, known)
    if not isinstance(values.get("model"), str):
        raise ValueError(f"{path}: model: {values.get('model')!r} must be a model's name or directory.")
    defaults = _settings(f"{path}: defaults", values.get("defaults") or {}, {})
    tasks = {}
    for name, changes in (values.get("tasks") or {}).items():
        if name not in TASKS:
            raise ValueError(f"{path}: tasks: {name!r} is not a task of GLUE: {', '.join(TASKS)}.")
        tasks[name] = _settings(f"{path}: tasks: {name}", changes or {}, values.get("defaults") or {})
    terms = RegularizerConfig.from_dict({"task": "nlu", **(values.get("regularizers") or {})})
    terms.resolved("nlu")
    seeds = values.get("seeds", list(Recipe.seeds))
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"{path}: seeds: {seeds!r} must be a list of whole numbers.")
    return Recipe(values["model"], defaults, tasks, terms, tuple(seeds))


def _settings(where: str, changes: dict[str, Any], defaults: dict[str, Any]) -> Settings:
    _check_keys(where, changes, [entry.name for entry in dataclasses.fields(Settings)])
    try:
        return Settings(**{**defaults, **changes})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _check_keys(where: str, values: dict[str, Any], known: list[str]) -> None:
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: {key!r} is not a setting: {', '.join(known)}.")
