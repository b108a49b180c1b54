"""A YAML edited by its lines, so that comments and order stay: top-level keys alone."""

from __future__ import annotations

import re
from typing import Any

import yaml

_KEY = re.compile(r"""(["']?)([A-Za-z_][\w.-]*)\1\s*:(?=\s|$)""")
_SCALAR = re.compile(r"""(?P<head>[^:]+:[ \t]*)(?P<value>"[^"]*"|'[^']*'|[^#\n]*?)(?P<tail>[ \t]+#.*)?""")


class YamlLines:
    """The lines of a YAML mapping; `values` is what they mean.

    Raises:
        ValueError: it is no YAML mapping.
    """

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()
        self.values = _mapping(text)

    @property
    def text(self) -> str:
        """What is written now."""
        return "\n".join(self._lines) + "\n"

    def meaning(self) -> dict[str, Any]:
        """Returns what the lines say now, read anew.

        Raises:
            ValueError: they are no YAML mapping any more.
        """
        return _mapping(self.text)

    def replace(self, key: str, value: str, note: str = "") -> None:
        """Writes another scalar in the place of a key's, its comment kept or followed by `note`.

        Raises:
            ValueError: the key has no line of its own, or its value is no scalar on that line.
        """
        begin, end = self._place(key)
        found = _SCALAR.fullmatch(self._lines[begin])
        if found is None or any(line.strip() for line in self._lines[begin + 1 : end] if not _is_comment(line)):
            raise ValueError(f"{key}: its value is no scalar on one line: write {key}: {value} there by hand.")
        tail = found["tail"] or ""
        if note:
            tail = f"{tail}; {note}" if tail else f"  # {note}"
        self._lines[begin] = f"{found['head'].rstrip()} {value}{tail}"

    def comment_out(self, key: str, note: str) -> None:
        """Makes a key's lines comments, after a line that says why."""
        begin, end = self._place(key)
        own = [f"# {line}" if line.strip() and not _is_comment(line) else line for line in self._lines[begin:end]]
        self._lines[begin:end] = [f"# {note}", *own]

    def add(self, lines: list[str], after: str | None = None) -> None:
        """Adds lines behind those of a top-level key, or at the end."""
        at = len(self._lines) if after is None else self._place(after)[1]
        self._lines[at:at] = lines

    def append_to_list(self, key: str, item: str) -> None:
        """Adds an item to a list of plain names, in lines or in brackets.

        Raises:
            ValueError: another form of it.
        """
        begin, end = self._place(key)
        items = [index for index in range(begin + 1, end) if self._lines[index].lstrip().startswith("- ")]
        found = re.fullmatch(r"(?P<head>[^\[]+\[)(?P<items>[^\]]*)(?P<tail>\].*)", self._lines[begin])
        if items:
            indent = self._lines[items[-1]].partition("-")[0]
            self._lines.insert(items[-1] + 1, f"{indent}- {item}")
        elif found is not None:
            inside = found["items"].strip().rstrip(",")
            self._lines[begin] = f"{found['head']}{f'{inside}, ' if inside else ''}{item}{found['tail']}"
        elif self.values.get(key) in (None, []):
            self._lines[begin] = f"{key}:"
            self._lines.insert(begin + 1, f"  - {item}")
        else:
            raise ValueError(f"{key}: is no list in lines or in brackets: add {item} to it by hand.")

    def drop_item(self, key: str, ending: str, note: str) -> None:
        """Makes the item of a list that ends so a comment with a note behind it.

        Raises:
            ValueError: it stands in no line of its own.
        """
        begin, end = self._place(key)
        for index in range(begin + 1, end):
            line = self._lines[index]
            if line.lstrip().startswith("- ") and line.partition("#")[0].rstrip().rstrip("'\"").endswith(ending):
                self._lines[index] = f"# {line.strip()}  # {note}"
                return
        raise ValueError(f"{key}: {ending} stands in no line of its own: remove it by hand.")

    def _place(self, key: str) -> tuple[int, int]:
        """The first line of a top-level key, the last of several of its name, and the line behind its block."""
        found = [index for index, line in enumerate(self._lines) if (m := _KEY.match(line)) and m[2] == key]
        if not found:
            raise ValueError(f"{key}: has no line of its own at top level: edit it by hand.")
        begin = end = found[-1]
        for index in range(begin + 1, len(self._lines)):
            line = self._lines[index]
            if line.strip() and not line.startswith((" ", "\t", "-")) and not _is_comment(line):
                break
            if line.strip() and not line.startswith("#"):  # comments at the margin belong to what follows them
                end = index
        return begin, end + 1


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def _mapping(text: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError("it is no YAML mapping of keys to values.")
    return values
