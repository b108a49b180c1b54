"""WrongArguments: what is found in ms-swift's arguments, raised together; a few lines on the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from ...findings import Finding


class WrongArguments(ValueError):
    """Arguments that cannot be trained as they stand; `findings` has them."""

    def __init__(self, findings: tuple[Finding, ...]) -> None:
        self.findings = findings
        sentences = [finding.sentence() for finding in findings]
        if len(sentences) == 1:
            super().__init__(sentences[0])
            return
        lines = "".join(f"\n  - {sentence}" for sentence in sentences)
        super().__init__(f"{len(sentences)} settings cannot be trained as they stand:{lines}")


def refuse_arguments(findings: Iterable[Finding]) -> None:
    """Raises one error for all findings, each said once.

    Raises:
        WrongArguments: there is a finding.
    """
    found = tuple({str(finding): finding for finding in findings}.values())
    if found:
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
