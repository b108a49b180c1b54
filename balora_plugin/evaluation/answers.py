"""What the paper's protocols take for an answer in generated text: numbers, formulas and programs."""

from __future__ import annotations

import re
from fractions import Fraction

MARK = "The answer is:"
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?(?:\.\d+)?(?:/\d+)?")
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_AFTERWARDS = re.compile(r"^(?:if __name__ ==|# Example usage|assert\b|print\()", re.MULTILINE)


def behind_mark(text: str) -> str | None:
    """Returns what stands behind the last "The answer is:", or None."""
    _, mark, rest = text.rpartition(MARK)
    return rest if mark else None


def number_in(text: str) -> Fraction | None:
    """Returns the first number of a text, such as "$1,234.50", "-3" or "3/4", or None."""
    for match in _NUMBER.finditer(text):
        digits = match.group().replace(",", "")
        if not any(c.isdigit() for c in digits):
            continue
        try:
            return Fraction(digits)
        except ZeroDivisionError:
            return None
        except ValueError:  # ".5/2"
            continue
    return None


def same_number(text: str, answer: str) -> bool:
    """Returns whether the number behind the mark is that of `answer` (of GSM8K: behind ####), both rounded to integers.

    So the authors' script has it.
    """
    said = behind_mark(text)
    found = None if said is None else number_in(said)
    wanted = number_in(answer.rpartition("####")[2])
    return found is not None and wanted is not None and round(found) == round(wanted)


def formula_in(text: str) -> str | None:
    """Returns the formula behind the mark, up to the end of its sentence, without the full stop; None without one."""
    said = behind_mark(text)
    return None if said is None else said.split(".\n")[0].strip().removesuffix(".").strip()


def code_in(text: str) -> str:
    """Returns the program of a response: its first fenced block, or all of it, up to examples, asserts and prints."""
    block = _BLOCK.search(text)
    code = block.group(1) if block else text
    behind = _AFTERWARDS.search(code)
    return (code[: behind.start()] if behind else code).rstrip()


def completed(prompt: str, entry: str, response: str) -> str:
    """Returns HumanEval's program: the prompt and, behind it, the function anew or the rest of it."""
    code = code_in(response)
    anew = re.search(rf"^(?:async )?def {re.escape(entry)}\b", code, re.MULTILINE)
    if anew:
        return f"{prompt}\n    pass\n\n{code}\n"
    return f"{prompt}{code}\n"
