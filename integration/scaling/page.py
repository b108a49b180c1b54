"""The tables of docs/scaling.md, between its markers."""

from __future__ import annotations

import re
from pathlib import Path

from balora_plugin.memory.estimate import GIB, MOMENTS
from benchmarks.measuring import table

from ..configs.page import trainings
from .needs import CORE, DOCUMENT_BYTES, SETUPS, TOP_K_BYTES, Needs, Setup, needs

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
DOCUMENTS = 10**7
Counted = dict[Setup, Needs]


def counts(setups: tuple[Setup, ...] = SETUPS) -> Counted:
    """Counts each setup; some seconds each."""
    return {setup: needs(setup, trainings()[setup.yaml]) for setup in setups}


def bytes_table(found: Counted) -> str:
    header = (
        "",
        "weights",
        "A0, B0",
        "trained",
        "optimizer",
        "two whole layers",
        "passing, at most",
        "sum",
        "GiB there are",
    )
    rows = []
    for setup, need in found.items():
        parts = [need.held[part] / setup.gpus for part in ("weights", "frozen_factors", "trained", "optimizer")]
        figures = [*parts, need.whole, need.passing, need.bytes_on(setup.gpus)]
        cells = [f"{figure / GIB:.1f}" for figure in figures]
        cells[5] += f" ({MOMENTS[need.moment].removeprefix('the ')})"
        rows.append((setup.title, *cells, str(setup.gpu.gib)))
    return table(header, rows)


def flop_table(found: Counted) -> str:
    parts = ("student", "recomputed", "backward", "teacher", "head", "teacher's head", "spectrum")
    rows = []
    for setup, need in found.items():
        cells = [f"{need.flop[part] / 1e12:.0f}" for part in parts]
        rows.append((setup.title, f"{need.tokens:,}", *cells, f"{sum(need.flop.values()) / 1e12:.0f}"))
    return table(("TFLOP", "tokens", *parts, "sum"), rows)


def moved_table(found: Counted) -> str:
    parts = ("student", "recomputed", "backward", "teacher", "head", "spectrum", "optimizer")
    rows = []
    for setup, need in found.items():
        cells = [f"{need.moved[part] / 1e9:.0f}" for part in parts]
        gathered = f"{need.gathered / 1e9:.0f}" if need.gathered else ""
        rows.append((setup.title, *cells, f"{sum(need.moved.values()) / 1e9:.0f}", gathered))
    return table(("GB", *parts, "sum", "over the links"), rows)


def shares_table(found: Counted) -> str:
    header = ("", "seconds a step", "bound by", "teacher", "terms", "teacher, of PiSSA's step", "links, s")
    rows = []
    for setup, need in found.items():
        seconds = need.seconds(setup.gpu)
        whole = sum(seconds.values())
        teacher = seconds["teacher"] + need.flop["teacher's head"] / (0.4 * setup.gpu.flop)
        terms = seconds["spectrum"] + need.moved["head"] / setup.gpu.memory
        bound = (
            "products"
            if need.flop["student"] / (0.4 * setup.gpu.flop) >= need.moved["student"] / setup.gpu.memory
            else "memory"
        )
        links = f"{need.gathered / setup.gpu.link:.1f}" if need.gathered else ""
        shares = (teacher / whole, terms / whole, teacher / (whole - teacher))
        rows.append((setup.title, f"{whole:.1f}", bound, *(f"{share:.1%}" for share in shares), links))
    return table(header, rows)


def kept_table(found: Counted) -> str:
    header = (
        "",
        "start, TFLOP",
        "start on one CPU core, minutes",
        "cache of hidden states",
        "of 128 log-probabilities",
    )
    rows = []
    for setup, need in found.items():
        low, high = (f"{flop / 1e12:.0f}" for flop in need.start)
        minutes = [f"{flop / rate / 60:.0f}" for flop, rate in zip(need.start, CORE, strict=True)]
        kept = [f"{bytes_ / 1e9 * 1e6:.1f} GB" for bytes_ in (need.hidden, TOP_K_BYTES)]
        rows.append((setup.title, f"{low} to {high}", f"{minutes[0]} to {minutes[1]}", *kept))
    return table(header, rows)


def tables(found: Counted) -> dict[str, str]:
    """Returns {name of its marker: table}."""
    index = f"{DOCUMENTS:,} documents: {DOCUMENTS * DOCUMENT_BYTES / 1e6:.0f} MB of index in each process."
    return {
        "bytes": bytes_table(found),
        "flop": flop_table(found),
        "moved": moved_table(found),
        "shares": shares_table(found),
        "kept": kept_table(found),
        "index": index,
    }


def with_tables(text: str, made: dict[str, str]) -> str:
    """Returns the page with each `<!-- name -->` followed by its table."""
    for name, content in made.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{PAGE.name} has no place for {name}: write <!-- {name} --> and <!-- /{name} -->.")
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text
