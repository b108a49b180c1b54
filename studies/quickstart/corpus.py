"""Collects the docstrings of the Python standard library and turns them into pre-training text and instruction pairs.

Every Python installation carries this corpus (about 7,000 different docstrings, 240,000 words), so the quickstart
needs no download. The modules are parsed with `ast` and never imported: importing all of the standard library has
side effects (`antigravity` opens a browser, `this` prints, platform modules fail).
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
)
# Implementation modules under the name by which users import them.
PUBLIC_MODULES = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "posixpath": "os.path",
}
HELD_OUT_ONE_IN = 10
COMPLETION_CHARACTERS = (24, 300)  # shorter ones say nothing, longer ones are lists or tables without blank lines
MINIMUM_WORDS = 4


@dataclass(frozen=True)
class Docstring:
    """One documented object: qualified `name`, `kind` ("module", "class" or "function") and dedented `text`."""

    name: str
    kind: str
    text: str


@dataclass(frozen=True)
class Instruction:
    """One prompt-completion pair about the object `name`; prompt + completion is the full sequence."""

    name: str
    prompt: str
    completion: str

    def as_row(self) -> dict[str, str]:
        """The pair in TRL's prompt-completion format."""
        return {"prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True)
class Corpus:
    """Pre-training texts, training pairs (drawn from the same docstrings) and held-out pairs (drawn from neither)."""

    pretraining: tuple[str, ...]
    train: tuple[Instruction, ...]
    held_out: tuple[Instruction, ...]

    def fingerprint(self) -> str:
        """Hex digest of all content: what a cached model must have been trained on to be the same model."""
        digest = hashlib.sha256()
        for text in self.pretraining:
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()


def source_files(root: Path) -> list[tuple[str, Path]]:
    """(module name, path) of every importable module below `root`, in an order that no file system can change."""
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and all(part.isidentifier() for part in parts):
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append((PUBLIC_MODULES.get(module, module), path))
    return sorted(found, key=lambda item: (item[0], item[1].as_posix()))


def docstrings_in(tree: ast.AST, name: str) -> Iterator[Docstring]:
    """Docstrings of a module's syntax tree in source order; functions inside functions are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            qualified = f"{name}.{node.name}"
            is_class = isinstance(node, ast.ClassDef)
            if text := ast.get_docstring(node):
                yield Docstring(qualified, "class" if is_class else "function", text.strip())
            if is_class:
                yield from docstrings_in(node, qualified)
        elif isinstance(node, (ast.If, ast.Try)):  # definitions that depend on the platform
            yield from docstrings_in(node, name)


def parse_module(module: str, path: Path) -> list[Docstring]:
    """All docstrings of one source file, the module's own first; a file that does not parse yields none."""
    try:
        with tokenize.open(path) as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(handle.read())
    except (SyntaxError, UnicodeDecodeError, OSError):
        return []
    own = ast.get_docstring(tree)
    head = [Docstring(module, "module", own.strip())] if own else []
    return head + list(docstrings_in(tree, module))


def collapse(text: str) -> str:
    """`text` with every run of white space turned into one blank."""
    return " ".join(text.split())


def is_encodable(text: str) -> bool:
    """Whether `text` has a UTF-8 form: an escape in a docstring can produce a lone surrogate, which has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unique(docstrings: Iterable[Docstring]) -> list[Docstring]:
    """Keeps the first docstring of every name and of every text (compared without regard to white space)."""
    names: set[str] = set()
    texts: set[str] = set()
    kept = []
    for docstring in docstrings:
        text = collapse(docstring.text)
        if text and is_encodable(text) and docstring.name not in names and text not in texts:
            kept.append(docstring)
            names.add(docstring.name)
            texts.add(text)
    return kept


def collect_docstrings(root: Path | None = None, progress: bool = False) -> list[Docstring]:
    """Deduplicated docstrings of all modules below `root` (default: this interpreter's standard library)."""
    files = source_files(root or Path(sysconfig.get_paths()["stdlib"]))
    bar = tqdm(files, desc="corpus", unit="file", disable=not progress)
    return unique(docstring for module, path in bar for docstring in parse_module(module, path))


def is_held_out(name: str) -> bool:
    """Whether `name` belongs to the hold-out: a hash of the name alone, hence the same on every machine."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def first_paragraph(text: str) -> str | None:
    """First paragraph of a docstring on one line, or None where it is not a bounded piece of prose."""
    paragraph = collapse(re.split(r"\n\s*\n", text, maxsplit=1)[0])
    low, high = COMPLETION_CHARACTERS
    is_prose = paragraph[:1].isalpha() and len(paragraph.split()) >= MINIMUM_WORDS
    is_code = re.match(r"[\w.]+\(", paragraph) or "->" in paragraph or ">>>" in paragraph
    return paragraph if is_prose and not is_code and low <= len(paragraph) <= high else None


def instruction(docstring: Docstring) -> Instruction | None:
    """The question about a public class or function with its first paragraph as answer, or None."""
    if docstring.kind == "module" or any(part.startswith("_") for part in docstring.name.split(".")):
        return None
    completion = first_paragraph(docstring.text)
    if completion is None:
        return None
    verb = "is" if docstring.kind == "class" else "does"
    tail = "" if docstring.kind == "class" else " do"
    return Instruction(docstring.name, f"What {verb} `{docstring.name}`{tail}?\n", completion)


def build_corpus(docstrings: Sequence[Docstring]) -> Corpus:
    """Splits deduplicated docstrings by name and derives the instruction pairs of either side.

    Module docstrings always stay in pre-training: they have no pairs. A held-out pair is dropped if pre-training
    text happens to contain its name or its answer, e.g. where two methods share a first paragraph.
    """
    held_out = [entry for entry in docstrings if entry.kind != "module" and is_held_out(entry.name)]
    out = {entry.name for entry in held_out}
    kept = [entry for entry in docstrings if entry.name not in out]
    seen = "\n".join(collapse(entry.text) for entry in kept)
    train = [pair for pair in map(instruction, kept) if pair]
    candidates = [pair for pair in map(instruction, held_out) if pair]
    clean = [pair for pair in candidates if pair.completion not in seen and pair.name not in seen]
    return Corpus(tuple(entry.text for entry in kept), tuple(train), tuple(clean))
