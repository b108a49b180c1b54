"""Docstrings of ten module families, split by module, with label noise or class imbalance in training.

A docstring with a summary line and more below it gives two texts: the body, which is trained on, and the summary, on
which the trained classifier is tested under shift.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..quickstart.corpus import Docstring, collapse

# Top-level packages and modules of each class; what belongs to none is left out.
FAMILIES = {
    "build": "compileall distutils ensurepip py_compile site sysconfig venv zipapp",
    "concurrency": "_threading_local asyncio concurrent multiprocessing queue sched selectors subprocess threading",
    "email": "email imaplib mailbox mailcap mimetypes nntplib poplib quopri smtpd smtplib uu",
    "files": "bz2 filecmp fileinput fnmatch genericpath glob gzip io linecache lzma ntpath os pathlib shutil stat "
    "tarfile tempfile zipfile",
    "gui": "curses tkinter turtle turtledemo",
    "imports": "imp importlib modulefinder pkgutil runpy zipimport",
    "language": "abc ast code codeop dataclasses dis enum inspect opcode pyclbr symtable tokenize types typing",
    "network": "ftplib http ipaddress socket socketserver ssl telnetlib urllib webbrowser wsgiref xmlrpc",
    "numbers": "calendar colorsys datetime decimal fractions numbers random statistics",
    "testing": "bdb cProfile doctest pdb profile pstats timeit trace traceback tracemalloc unittest",
}
CLASSES = tuple(FAMILIES)
FAMILY_OF = {name: family for family, names in FAMILIES.items() for name in names.split()}
SETTINGS = ("clean", "noise", "imbalance")

HELD_OUT = 0.4  # at most this part of a family's texts
NOISE = 0.4
IMBALANCE = 20
MINORITIES = 3
FEWEST_WORDS = {"summary": 3, "body": 6}


@dataclass(frozen=True)
class Sample:
    """The two texts of one docstring; `label` indexes `CLASSES` and may be a wrong one in training."""

    module: str
    label: int
    summary: str
    body: str


@dataclass(frozen=True)
class Study:
    """What one seed trains and tests on; `minority` are the classes that are rare under imbalance."""

    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    minority: tuple[int, ...]


def samples(docstrings: Iterable[Docstring], modules: Iterable[str]) -> list[Sample]:
    """Docstrings of the families with both texts; no text occurs twice, in either role.

    `modules`: names of all modules, by which a docstring's qualified name is cut.
    """
    known = set(modules)
    seen: set[str] = set()
    found = []
    for docstring in docstrings:
        family = FAMILY_OF.get(docstring.name.partition(".")[0])
        summary, body = two_texts(docstring.text)
        if family is None or not body or seen & {summary, body}:
            continue
        seen |= {summary, body}
        found.append(Sample(module_of(docstring.name, known), CLASSES.index(family), summary, body))
    return found


def two_texts(text: str) -> tuple[str, str]:
    """(summary, body), white space collapsed; empty where either is too short to say anything."""
    parts = [collapse(part) for part in re.split(r"\n\s*\n", text.strip(), maxsplit=1)]
    if len(parts) < 2 or any(
        len(part.split()) < fewest for part, fewest in zip(parts, FEWEST_WORDS.values(), strict=True)
    ):
        return "", ""
    return parts[0], parts[1]


def module_of(name: str, modules: set[str]) -> str:
    """The longest prefix of a qualified name that is a module, else its first part."""
    parts = name.split(".")
    prefixes = (".".join(parts[:stop]) for stop in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in modules), parts[0])


def split_by_module(found: Sequence[Sample], rng: random.Random) -> tuple[list[Sample], list[Sample]]:
    """(training, held-out) samples: whole modules, drawn at random while a family's part stays small enough."""
    groups: dict[int, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in found:
        groups[sample.label][sample.module].append(sample)
    train: list[Sample] = []
    test: list[Sample] = []
    for _, modules in sorted(groups.items()):
        room = HELD_OUT * sum(map(len, modules.values()))
        order = sorted(modules)
        rng.shuffle(order)
        for name in order:
            if len(modules[name]) <= room:
                room -= len(modules[name])
                test += modules[name]
            else:
                train += modules[name]
    return train, test


def at_most(found: Sequence[Sample], most: Sequence[int], rng: random.Random) -> list[Sample]:
    """A random choice of at most `most[label]` samples of each class."""
    kept: list[Sample] = []
    for label, limit in enumerate(most):
        of_class = [sample for sample in found if sample.label == label]
        kept += rng.sample(of_class, min(limit, len(of_class)))
    return kept


def with_noise(train: Sequence[Sample], rng: random.Random, share: float = NOISE) -> list[Sample]:
    """The samples with exactly `share` of them (rounded) under a wrong class, each wrong one equally likely."""
    wrong = set(rng.sample(range(len(train)), round(share * len(train))))
    return [
        replace(sample, label=rng.choice([label for label in range(len(CLASSES)) if label != sample.label]))
        if index in wrong
        else sample
        for index, sample in enumerate(train)
    ]


def build(found: Sequence[Sample], setting: str, seed: int, per_class: int, test_per_class: int) -> Study:
    """The data of one seed: split, sizes and minorities are the same in every setting, for every method."""
    if setting not in SETTINGS:
        raise ValueError(f"setting={setting!r} must be one of {', '.join(SETTINGS)}.")
    rng = random.Random(seed)
    train, test = split_by_module(found, rng)
    train = at_most(train, [per_class] * len(CLASSES), rng)
    test = at_most(test, [test_per_class] * len(CLASSES), rng)
    minority = tuple(sorted(rng.sample(range(len(CLASSES)), MINORITIES)))
    if setting == "noise":
        train = with_noise(train, rng)
    if setting == "imbalance":
        few = max(1, per_class // IMBALANCE)
        train = at_most(train, [few if label in minority else per_class for label in range(len(CLASSES))], rng)
    return Study(tuple(train), tuple(test), minority)
