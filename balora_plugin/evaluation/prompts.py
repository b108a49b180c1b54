"""The prompt that the paper trains and tests with."""

from __future__ import annotations

_BELOW = "Below is an instruction that describes a task"
_COMPLETE = "Write a response that appropriately completes the request."


def alpaca(instruction: str, given: str = "", start: str = "") -> str:
    """Returns Alpaca's prompt of an instruction and, where there is one, its input; `start` begins the response."""
    response = f"### Response:{' ' if start else ''}{start}"
    if given:
        head = f"{_BELOW}, paired with an input that provides further context. {_COMPLETE}"
        return f"{head}\n\n### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n{response}"
    return f"{_BELOW}. {_COMPLETE}\n\n### Instruction:\n{instruction}\n\n{response}"
