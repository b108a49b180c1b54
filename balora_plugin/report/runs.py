"""What is read of a run's directory: its log, its settings, its cost, where its adapter lies. Nothing heavy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.names import CONFIG_FILE, COST_FILE, SETTINGS_FILE, STATE_FILE
from ..checkpoint.rules import MAPPING, Rule, each, flaw, is_a, or_none
from ..config import TERMS, RegularizerConfig
from ..schedules import lambdas_at

CLIP = 1.0  # max_grad_norm of transformers, where a run does not say its own
SEED_IN_NAME = re.compile(r"[-_.]?seed[-_=]?(\d+)|[-_]s(\d+)$", re.IGNORECASE)
_NUMBER: Rule = or_none(("a number", lambda value: number(value) is not None and not isinstance(value, str)))
_FINITE: Rule = or_none(("a finite number", lambda value: _NUMBER[1](value) and math.isfinite(value or 0.0)))
_MAPPING: Rule = or_none(MAPPING)
_COST: dict[str, Rule] = {
    "seconds_per_step": or_none(("a mapping of parts to seconds", each(is_a(str), _FINITE[1]))),
    "run": _MAPPING,
}
_SETTINGS: dict[str, Rule] = {
    "seed": or_none(("a whole number", is_a(int))),
    "learning_rate": _FINITE,
    "max_grad_norm": ("a number or null", lambda value: _NUMBER[1](value) and value == value),  # inf: none
    "adapter": _MAPPING,
    "terms": _MAPPING,
}
_OURS: dict[str, Rule] = {"config": MAPPING, "regularizers_in_force": _MAPPING}
_OF_A_ROW = {"step", "epoch"}  # what says where a row belongs
_TRIED = {"learning_rate", "seed"}  # what a search over settings asks for and a run is told apart by

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: What it is called in the page: the end of its path that tells it from the other runs.
        path: Its directory.
        history: The rows that its Trainer logged.
        steps: The optimizer steps that it was to take.
        settings: Of the run: seed, learning_rate, max_grad_norm, adapter ...; what is not known is left out.
        terms: The terms' settings, resolved; None for a run without.
        cost: ba_lora_cost.json, without its settings; empty where there is none.
        adapter: The directory of its adapter; None where there is none.
        base: The model that its adapter belongs to: the start of the hash that is recorded, else a name; None where
            nothing says it.
    """

    name: str
    path: Path
    history: list[dict[str, Any]]
    steps: int
    settings: dict[str, Any] = field(default_factory=dict)
    terms: RegularizerConfig | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    adapter: Path | None = None
    base: str | None = None

    @property
    def logged(self) -> bool:
        """Returns whether there is a number of some step that can be drawn."""
        return any(self.curve(key) for key in {key for row in self.history for key in row} - _OF_A_ROW)

    @property
    def seed(self) -> int | None:
        """Returns its seed, by its record or its name; None where neither says it."""
        if self.settings.get("seed") is not None:
            return int(self.settings["seed"])
        found = SEED_IN_NAME.search(self.name)
        return None if found is None else int(found.group(1) or found.group(2))

    @property
    def method(self) -> str:
        """Returns what was trained, in a word: one of `balora compare`'s methods, or `adapter` of another kind."""
        adapter = self.settings.get("adapter")
        if adapter is None:
            return "full" if self.adapter is None else "adapter"
        if self.terms is not None and any(getattr(self.terms, f"lambda_{name}") for name in TERMS):
            return "lora_terms" if adapter.get("start") is True else "ba_lora"
        return "pissa" if str(adapter.get("start", "")).startswith("pissa") else "lora"

    def curve(self, key: str) -> Curve:
        """Returns (step, value) of everything that was logged by this key, in order; the last one of a step."""
        found: dict[float, float] = {}
        for row in self.history:
            value, step = number(row.get(key)), number(row.get("step"))
            if value is not None and step is not None and math.isfinite(step):
                found[step] = value
        return sorted(found.items())

    def last(self, key: str) -> float | None:
        """Returns what was logged last by this key."""
        curve = self.curve(key)
        return curve[-1][1] if curve else None

    def weights(self, term: str) -> Curve:
        """Returns the weight of a term over the steps: as it was logged, or as its schedule says."""
        logged = self.curve(f"balora/lambda_{term}")
        if logged or self.terms is None:
            return logged
        places = range(51) if self.terms.schedule != "constant" else (0, 50)
        return [(self.steps * place / 50, float(getattr(lambdas_at(self.terms, place / 50), term))) for place in places]

    @property
    def clip(self) -> tuple[float, bool]:
        """Returns the gradient norm that is clipped at, and whether the run says it itself; inf for none."""
        found = self.settings.get("max_grad_norm")
        if found is None:
            return CLIP, False
        return (float(found) if found > 0 else math.inf), True


def number(value: Any) -> float | None:
    """Returns a logged value as a number (Axolotl's logs hold text too), None for what is none."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Reads runs from their output directories, or from one of their checkpoints each.

    Raises:
        ValueError: a directory that no Trainer has written to; names it, and what to do.
    """
    directories = [Path(path) for path in dict.fromkeys(str(Path(path).resolve()) for path in paths)]
    return [_read(path, name) for path, name in zip(directories, _names(directories), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell all of them apart."""
    for length in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read(path: Path, name: str) -> Run:
    state = _state(path)
    holders = [path, state.parent]
    # above a checkpoint lies its run's; above a trial of a search the last trial's
    places = (path, path.parent) if state.parent == path else (path,)
    files = [place / COST_FILE for place in places]
    cost, told_by = next(((found, file) for file in files if (found := _json(file))), ({}, path))
    _check(cost, _COST, told_by)
    values = _json(state)
    tried = values.get("trial_params") or {}
    tried = tried if isinstance(tried, dict) else {}
    history = values.get("log_history") or []
    settings = dict(cost.pop("run", None) or {})
    _check(settings, _SETTINGS, told_by)
    tried = {key: tried[key] for key in _TRIED & tried.keys()}
    _check(tried, _SETTINGS, state)
    settings |= tried
    adapter = next((place for place in holders if (place / CONFIG_FILE).is_file()), None)
    terms, base = settings.pop("terms", None), None
    if adapter is not None:
        told = _json(adapter / CONFIG_FILE)
        ours = _json(adapter / SETTINGS_FILE)
        _check(ours, _OURS, adapter / SETTINGS_FILE)
        settings.setdefault("adapter", _adapter(told, ours))
        base = _base(told, ours)
        if not terms:
            terms, told_by = ours.get("regularizers_in_force"), adapter / SETTINGS_FILE
    return Run(
        name=name,
        path=path,
        history=[row for row in (history if isinstance(history, list) else []) if isinstance(row, dict)],
        steps=_count(values, "max_steps", state) or _count(values, "global_step", state),
        settings=settings,
        terms=_terms(terms, told_by),
        cost=cost,
        adapter=adapter,
        base=base,
    )


def _state(path: Path) -> Path:
    """The trainer_state.json that knows most of a run."""
    if not path.is_dir():
        raise ValueError(f"{path} is no directory: name a run's output directory, or one of its checkpoints.")
    found = [file for file in (path / STATE_FILE, *path.glob(f"checkpoint-*/{STATE_FILE}")) if file.is_file()]
    if not found and (path / "results.json").is_file() and (path / "runs").is_dir():
        raise ValueError(
            f"{path} is no run but what balora compare has written: its report is {path}/report/report.html. For "
            f"another one name runs of it: balora report {path}/runs/*"
        )
    if not found:
        raise ValueError(
            f"{path} holds no {STATE_FILE}, nor has it checkpoints that do: name a run's output directory. A run that "
            "saves no checkpoint keeps its log with trainer.save_state()."
        )
    return max(found, key=lambda file: (_count(_json(file), "global_step", file), file.parent == path))


def _check(values: dict[str, Any], rules: dict[str, Rule], path: Path) -> None:
    """Refuses a file whose values are of other types than the page draws."""
    wrong = flaw(values, rules)
    if wrong is not None:
        raise ValueError(f"{path}: {wrong}: copy the file again.")


def _count(values: dict[str, Any], key: str, file: Path) -> int:
    """A number of steps that a Trainer has written; 0 where it says none."""
    value = values.get(key) or 0
    if isinstance(value, str) or (found := number(value)) is None or not math.isfinite(found):
        raise ValueError(f"{file}: {key} is {repr(value)[:40]}, not a number of steps: copy the file again.")
    return int(value)


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping, NaN and Infinity (which Trainers write) included; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again.") from None
    return values if isinstance(values, dict) else {}


def _adapter(config: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """What an adapter is, by its files: of ours, whose file is a plain LoRA, by what stands beside it."""
    start = ours.get("start", config.get("init_lora_weights"))
    rank = ours.get("config", config).get("r")
    return {"kind": str(config.get("peft_type", "")).lower(), "start": start, "r": rank}


def _base(config: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """What an adapter's files say of its base: one model may lie at several places, so that its hash comes first."""
    digest, name = ours.get("base_sha256"), config.get("base_model_name_or_path")
    return str(digest)[:12] if digest else str(name) if name else None


def _terms(values: dict[str, Any] | None, path: Path) -> RegularizerConfig | None:
    if not values:
        return None
    known = RegularizerConfig.__dataclass_fields__
    try:
        config = RegularizerConfig.from_dict({key: value for key, value in values.items() if key in known})
        return config.resolved("nlg" if config.task == "auto" else None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, the terms of the run: {error}") from None


def clipped(run: Run) -> Iterator[tuple[float, float]]:
    """Yields (step, gradient norm) where the norm was above what is clipped at."""
    limit, _ = run.clip
    yield from ((step, value) for step, value in run.curve("grad_norm") if value > limit)
