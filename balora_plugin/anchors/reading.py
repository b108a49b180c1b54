"""Anchor data as it is written: files, data sets in memory or on the hub. No tokenizer, no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..settings import described

COLUMNS = ("text", "messages", "prompt")
SUFFIXES = (".jsonl", ".json", ".txt")
_TABLES = {".parquet": "parquet", ".csv": "csv"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MOST_FILES = 1000  # of a directory that is looked through
_FIRST = 64  # rows that are looked at before a model loads


class Anchor(NamedTuple):
    """One document: plain text, or the messages of a chat; `prompt`: an answer is still to come."""

    content: str | list[Any]
    prompt: bool = False


def read_anchors(data: Any) -> Iterator[Anchor]:
    """Gives the documents of anchor data, one after the other.

    Args:
        data: A file (.jsonl, .json: rows with `text`, `messages` or `prompt`; .txt: documents with an empty line
            between them; .parquet, .csv), a directory or hub name that `datasets` knows, a datasets.Dataset, or a list
            of rows or texts.

    Raises:
        ValueError: no such file, nothing in it, or no column that is known; names the setting and what to write.
    """
    where, found = f"anchor_data={described(data)!r}", False
    for number, row in enumerate(_rows(data, where)):
        anchor = _anchor(row, number, where)
        if anchor.content:
            found = True
            yield anchor
    if not found:
        raise ValueError(f"{where} holds no text: name a file with at least one document, or leave anchor_data out.")


def check_anchors(data: Any, tokenizer: Any) -> None:
    """Looks at the first rows of anchor data before a model loads; a name on the hub is not asked for.

    Args:
        data: As of [`read_anchors`], or None.
        tokenizer: What the run tokenises with: None is refused. Anything else is looked at later.

    Raises:
        ValueError: as [`read_anchors`]; no tokenizer.
    """
    if data is None:
        return
    if tokenizer is None:
        raise ValueError(
            f"anchor_data={described(data)!r} needs a tokenizer: pass processing_class=AutoTokenizer.from_pretrained("
            "<the model>), or leave anchor_data out."
        )
    if isinstance(data, str) and os.path.isdir(data):
        _check_directory(data, f"anchor_data={data!r}")
    if not isinstance(data, str) or os.path.isfile(data) or not _HUB_NAME.fullmatch(data) or _is_file_name(data):
        for _ in islice(read_anchors(data), _FIRST):
            pass


def _rows(data: Any, where: str) -> Iterable[Any]:
    if not isinstance(data, str):
        return data
    if os.path.isfile(data):
        return _of_file(Path(data), where)
    if data.startswith("<"):
        raise ValueError(f"{where} was an object of an earlier run: pass it again, or name a file.")
    if os.path.isdir(data):
        _check_directory(data, where)
    if os.path.isdir(data) or (_HUB_NAME.fullmatch(data) and not _is_file_name(data)):
        return _of_datasets(data, where)
    raise ValueError(f"{where}: there is no such file: write the path of one ({', '.join(SUFFIXES)}).")


def _check_directory(directory: str, where: str) -> None:
    """Refuses a directory that is no data set's: `datasets` would read all that lies in it, whatever it is."""
    if any(os.path.isfile(os.path.join(directory, name)) for name in ("dataset_info.json", "dataset_dict.json")):
        return
    files = (name for _, _, names in os.walk(directory) for name in names)
    seen = list(islice(files, _MOST_FILES + 1))
    if len(seen) > _MOST_FILES:
        raise ValueError(f"{where} is a directory of more than {_MOST_FILES} files: name the file that is meant.")
    if not any(name.removesuffix(".gz").endswith((*SUFFIXES, *_TABLES, ".arrow")) for name in seen):
        kinds = ", ".join((*SUFFIXES, *_TABLES))
        raise ValueError(f"{where} is a directory without a data file ({kinds}): name a file.")


def _is_file_name(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).suffix in (*SUFFIXES, *_TABLES)


def _of_file(path: Path, where: str) -> Iterable[Any]:
    if path.suffix in _TABLES:
        return _of_datasets(_TABLES[path.suffix], where, data_files=str(path))
    try:
        if path.suffix == ".txt":
            return [part.strip() for part in re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))]
        with open(path, encoding="utf-8") as file:
            first = next((line for line in file if line.strip()), "")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} cannot be read ({' '.join(str(error).split())[:80]}): name a text file.") from None
    if first.lstrip().startswith("["):
        return _parsed(path.read_text(encoding="utf-8"), 1, where)
    return _lines(path, where)


def _lines(path: Path, where: str) -> Iterator[Any]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parsed(line, number, where)


def _parsed(text: str, line: int, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(
            f"{where}: line {line} is no JSON: write one object a line, {{'text': ...}}, or name a .txt file."
        ) from None


def _of_datasets(name: str, where: str, **more: Any) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{where} needs the package datasets: pip install datasets, or name a .jsonl file.") from None
    try:
        if os.path.isfile(os.path.join(name, "dataset_info.json")):
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, split="train", **more)
    except Exception as error:  # of the hub, of its scripts, of a file's format: all kinds
        why = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{where} is no file here, and no data set that loads ({type(error).__name__}: {why}): name a .jsonl or "
            ".txt file, or a data set with the split train."
        ) from None


def _anchor(row: Any, number: int, where: str) -> Anchor:
    if isinstance(row, str):
        return Anchor(row)
    if isinstance(row, Mapping):
        for name in COLUMNS:
            value = row.get(name)
            if isinstance(value, str) or (name != "text" and isinstance(value, list)):
                return Anchor(value, name == "prompt")
    has = f"the columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else repr(row)[:60]
    raise ValueError(
        f"{where}: row {number} has no {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]} that can be read, but {has}: name "
        "the column text (or messages: a list of role and content; or prompt: either)."
    )
