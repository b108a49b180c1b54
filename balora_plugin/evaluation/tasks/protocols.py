"""The functions that the YAML files beside this one name: prompts, answers and scores of the paper's protocols."""

from __future__ import annotations

from typing import Any

from balora_plugin.evaluation.answers import code_in, completed, formula_in, same_number
from balora_plugin.evaluation.prompts import alpaca
from balora_plugin.evaluation.sandbox import passes

_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
_STEPS = "Let's think step by step."
_MBPP_TEST = range(11, 511)


def gsm8k_prompt(doc: dict[str, Any]) -> str:
    """Returns the prompt of a question of GSM8K, as the authors' script has it."""
    return alpaca(doc["question"], start=_STEPS)


def gsm8k_score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Returns whether the number behind "The answer is:" is the right one."""
    return {"accuracy": float(same_number(results[0], doc["answer"]))}


def math_prompt(doc: dict[str, Any]) -> str:
    """Returns the prompt of a problem of MATH."""
    return alpaca(doc["problem"], start=_STEPS)


def math_score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Returns whether the formula behind "The answer is:" is the boxed one, by Hendrycks' comparison."""
    from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed

    wanted = remove_boxed(last_boxed_only_string(doc["solution"]))
    found = formula_in(results[0])
    return {"accuracy": float(found is not None and is_equiv(found, wanted))}


def math_data(**_: Any) -> Any:
    """Returns MATH's test set from the hub, all subjects in one."""
    from datasets import DatasetDict, concatenate_datasets, load_dataset

    parts = [load_dataset("EleutherAI/hendrycks_math", subject, split="test") for subject in _SUBJECTS]
    return DatasetDict({"test": concatenate_datasets(parts)})


def humaneval_prompt(doc: dict[str, Any]) -> str:
    """Returns the prompt of a problem of HumanEval."""
    return alpaca(f"Complete the following Python function:\n```python\n{doc['prompt'].rstrip()}\n```")


def humaneval_score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Returns whether the program passes the problem's test."""
    program = completed(doc["prompt"], doc["entry_point"], results[0])
    return {"pass_at_1": float(passes(f"{program}\n{doc['test']}\ncheck({doc['entry_point']})\n"))}


def mbpp_prompt(doc: dict[str, Any]) -> str:
    """Returns the prompt of a problem of MBPP: the task and its tests."""
    tests = "\n".join(doc["test_list"])
    text = doc["text"] if "text" in doc else doc["prompt"]  # its sanitized version says prompt
    return alpaca(f"{text} Your code should pass these tests:\n\n{tests}")


def mbpp_score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Returns whether the program passes the problem's tests."""
    before = doc.get("test_setup_code") or "\n".join(doc.get("test_imports") or [])
    tests = "\n".join(doc["test_list"])
    return {"pass_at_1": float(passes(f"{code_in(results[0])}\n{before}\n{tests}\n"))}


def mbpp_test(dataset: Any) -> Any:
    """Returns MBPP's test problems, which are those numbered 11 to 510, where a file holds all."""
    return dataset.filter(lambda doc: doc.get("task_id", _MBPP_TEST[0]) in _MBPP_TEST)
