"""SettingError: what a YAML's findings are raised as, a few lines on Axolotl's command line and no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from ...findings import Finding, distinct, in_one_message


class SettingError(click.ClickException, ValueError):
    """Wrong settings: a ValueError for code, `Error:` and a line for each on Axolotl's command line.

    Attributes:
        findings: The settings; empty for an error that another part raised.
    """

    def __init__(self, message: str, findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(message)
        self.findings = findings


def refuse(findings: Iterable[Finding]) -> None:
    """Raises one error for all findings; of several on one key and value the first says it.

    Raises:
        SettingError: there is a finding.
    """
    if found := distinct(findings):
        raise SettingError(in_one_message(found), found)


@contextmanager
def as_setting_errors() -> Iterator[None]:
    """A ValueError raised inside, the core's own included, leaves as a SettingError."""
    try:
        yield
    except SettingError:
        raise
    except ValueError as error:
        raise SettingError(str(error)) from None


def one_line_errors() -> None:
    """Lets an uncaught SettingError have no traceback without click: accelerate and torchrun run Axolotl's modules."""
    if sys.excepthook is sys.__excepthook__ and click.get_current_context(silent=True) is None:
        sys.excepthook = _one_line_for_settings


def _one_line_for_settings(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not issubclass(kind, SettingError):
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"Error: {error}", file=sys.stderr)
