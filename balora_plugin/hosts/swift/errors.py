"""WrongArguments: what is found in ms-swift's arguments, raised together; a few lines on the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from ...findings import Finding, distinct, in_one_message


class WrongArguments(ValueError):
    """Arguments that cannot be trained as they stand; `findings` has them."""

    def __init__(self, findings: tuple[Finding, ...]) -> None:
        super().__init__(in_one_message(findings))
        self.findings = findings


def refuse_arguments(findings: Iterable[Finding]) -> None:
    """Raises one error for all findings, each said once.

    Raises:
        WrongArguments: there is a finding.
    """
    if found := distinct(findings):
        raise WrongArguments(found)


def print_without_traceback() -> None:
    """Lets an uncaught WrongArguments be its text alone, once for all processes of a node."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _text_alone


def _text_alone(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not issubclass(kind, WrongArguments):
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
        print(f"Error: {error}", file=sys.stderr)
