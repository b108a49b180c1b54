"""The page: pictures and tables put into one HTML file that needs no network, and PNGs beside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._version import __version__
from ..atomic import write_text
from ..config import TERMS
from . import curves
from .before_after import AskedOfModels, compared_models, pictures
from .drawing import SCHEMES, Picture, png
from .groups import LEVEL, MEASURES, Group, differences, grouped
from .runs import Run
from .updates import updates

FILE = "report.html"


@dataclass
class Section:
    """A part of the page: pictures, and lines on what is not there and why."""

    title: str
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Page:
    """What the page shows. `answers`: for each question the label and the answer of each model."""

    title: str
    groups: list[Group]
    sections: list[Section]
    answers: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def page_of(runs: Sequence[Run], title: str, asked: AskedOfModels | None = None, notes: Iterable[str] = ()) -> Page:
    """Returns the page of these runs; `asked`: what to ask of models, which are then loaded; `notes`: said at its top.

    Raises:
        ValueError: nothing was logged by any of the runs.
    """
    if not any(run.logged for run in runs):
        raise ValueError(f"{runs[0].path} has logged nothing, nor has another run: set logging_steps below its steps.")
    groups = grouped(runs)
    sections = [
        Section("Loss and drift", [*curves.losses(groups)]),
        Section("Terms", [*curves.term_curves(groups)]),
        Section("Optimisation", [*curves.optimisation(groups)]),
        Section("Cost", [*curves.cost(groups)]),
        _section("The update", updates(groups)),
    ]
    page = Page(title, groups, sections, notes=[*notes, *_of_several_bases(runs)])
    if asked is not None:
        found = compared_models(asked, groups)
        sections.append(Section("Before and after", [*pictures(found, asked.samples)], found.notes))
        every = {"before": found.before, **found.after}
        page.answers = [
            (prompt, [(name, seen.answers[place]) for name, seen in every.items() if seen.answers])
            for place, prompt in enumerate(asked.prompts)
        ]
    return page


def write_page(page: Page, directory: str) -> Path:
    """Writes report.html and a PNG of each picture, `<name>.png` and `<name>-dark.png`; returns the page's path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, dict[str, str]] = {}
    for section in page.sections:
        for picture in section.pictures:
            images[picture.name] = {}
            for scheme in SCHEMES:
                data = png(picture, scheme)
                (folder / f"{picture.name}{'' if scheme == 'light' else '-dark'}.png").write_bytes(data)
                images[picture.name][scheme] = base64.b64encode(data).decode()
    environment = Environment(
        loader=PackageLoader("balora_plugin.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("page.html.jinja").render(
        page=page,
        images=images,
        rows=[row for group in page.groups for row in _rows(group)],
        measures=[words for key, (words, _) in MEASURES.items() if _has(page.groups, key)],
        differences=differences(page.groups),
        level=round(100 * LEVEL),
        version=__version__,
        one_seed=all(len(group.runs) == 1 for group in page.groups),
    )
    path = folder / FILE
    write_text(path, text)
    return path


def _of_several_bases(runs: Sequence[Run]) -> Iterable[str]:
    bases = {run.base: run.name for run in runs if run.base is not None}
    if len(bases) > 1:
        named = ", ".join(f"{base} ({name})" for base, name in bases.items())
        yield f"These adapters belong to different models: {named}. Their losses and drifts are of different scales."


def _section(title: str, found: Iterable[Picture | str]) -> Section:
    section = Section(title)
    for each in found:
        if isinstance(each, str):
            section.notes.append(each)
        else:
            section.pictures.append(each)
    return section


def _has(groups: Sequence[Group], key: str) -> bool:
    return any(group.values(key) for group in groups)


def _rows(group: Group) -> Iterable[dict[str, Any]]:
    """What the table says of each run of a group."""
    for run in group.runs:
        yield {
            "group": group.label,
            "run": run.name,
            "seed": run.seed,
            "steps": run.steps,
            "terms": _terms(run),
            "rate": run.settings.get("learning_rate")
            or max((value for _, value in run.curve("learning_rate")), default=None),
            "seconds": (run.cost.get("seconds_per_step") or {}).get("step"),
            "values": {words: run.last(key) for key, (words, _) in MEASURES.items()},
        }


def _terms(run: Run) -> str:
    weights = {name: getattr(run.terms, f"lambda_{name}", 0.0) for name in TERMS}
    return ", ".join(f"{name} {value:g}" for name, value in weights.items() if value) or "none"
