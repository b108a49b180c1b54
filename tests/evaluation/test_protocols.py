"""The paper's protocols: answers taken from texts, programs put together and run within limits."""

from __future__ import annotations

import os
import time
from fractions import Fraction
from pathlib import Path

import pytest

from balora_plugin.evaluation.answers import code_in, completed, formula_in, number_in, same_number
from balora_plugin.evaluation.prompts import alpaca
from balora_plugin.evaluation.sandbox import Limits, check_sandbox, limited, passes
from balora_plugin.evaluation.tasks import protocols


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [
        ("so 3. The answer is: 42", "6 * 7 = <<6*7=42>>42\n#### 42", True),
        ("The answer is: $1,234.00.", "#### 1,234", True),
        ("The answer is: 1,234,567 dollars", "#### 1234567", True),
        ("The answer is: -3", "#### -3", True),
        ("The answer is: 7/2", "#### 4", True),  # the authors' script rounds
        ("The answer is: 41. The answer is: 42", "#### 42", True),  # the last one
        ("42", "#### 42", False),  # without the mark nothing counts
        ("The answer is: 43", "#### 42", False),
        ("The answer is: unknown", "#### 42", False),
        ("The answer is: 1/0", "#### 1", False),
    ],
)
def test_numbers_behind_the_mark(text, answer, same):
    assert same_number(text, answer) is same


def test_numbers():
    assert number_in("x = .5 m") == Fraction(1, 2)
    assert number_in("+ - , .") is None


def test_formulas_end_with_their_sentence():
    assert formula_in("The answer is: $\\frac{1}{2}$.\nI hope it is right.") == "$\\frac{1}{2}$"
    assert formula_in("The answer is: 3.5.") == "3.5"
    assert formula_in("It is 3") is None


def test_math_compares_as_hendrycks():
    pytest.importorskip("lm_eval")
    doc = {"problem": "1/2?", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
    assert protocols.math_score(doc, ["The answer is: \\frac12."]) == {"accuracy": 1.0}
    assert protocols.math_score(doc, ["The answer is: 1/2"]) == {"accuracy": 1.0}
    assert protocols.math_score(doc, ["The answer is: 2"]) == {"accuracy": 0.0}
    assert protocols.math_score(doc, ["\\frac12"]) == {"accuracy": 0.0}


def test_the_prompt_is_the_authors():
    prompt = protocols.gsm8k_prompt({"question": "Why?"})
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhy?\n\n### Response: Let's think step by step."
    )
    assert alpaca("Add.", "1, 2").endswith("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:")


def test_programs_are_cut_out_of_responses():
    assert code_in("Sure:\n```python\ndef f():\n    return 1\n```\nand ```python\nx\n```") == "def f():\n    return 1"
    assert code_in("def f():\n    return 1\n\n# Example usage\nf()") == "def f():\n    return 1"
    assert code_in("def f():\n    return 1\nassert f() == 2") == "def f():\n    return 1"
    prompt = 'def f(x):\n    """Adds one."""\n'
    for response in ("```python\ndef f(x):\n    return x + 1\n```", "    return x + 1\n\nprint(f(1))"):
        space = {}
        exec(completed(prompt, "f", response), space)
        assert space["f"](1) == 2


HUMANEVAL = {
    "prompt": 'def add(a, b):\n    """Adds."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
MBPP = {"text": "Add.", "test_list": ["assert add(1, 2) == 3"], "test_setup_code": "", "task_id": 11}


def test_right_programs_pass_and_wrong_ones_do_not():
    assert protocols.humaneval_score(HUMANEVAL, ["def add(a, b):\n    return a + b"]) == {"pass_at_1": 1.0}
    assert protocols.humaneval_score(HUMANEVAL, ["    return a - b"]) == {"pass_at_1": 0.0}
    assert protocols.mbpp_score(MBPP, ["```python\ndef add(a, b):\n    return a + b\n```"]) == {"pass_at_1": 1.0}
    assert protocols.mbpp_score(MBPP, ["def add(a, b):\n    return a"]) == {"pass_at_1": 0.0}
    assert "assert add(1, 2) == 3" in protocols.mbpp_prompt(MBPP)


@pytest.mark.parametrize("program", ["raise SystemExit(0)", "import os; os._exit(0)", "def f(:", "1 / 0"])
def test_a_program_that_leaves_early_has_not_passed(program):
    assert not passes(program)


def test_an_endless_loop_is_killed():
    start = time.monotonic()
    with limited(Limits(seconds=0.5)):
        assert not passes("import time\nwhile True: time.sleep(1)")
        assert not passes("while True: pass")
    assert time.monotonic() - start < 60  # and not for ever


def test_what_a_program_starts_is_killed_with_it(tmp_path):
    note = tmp_path / "pid"
    program = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\nchild.wait()"
    )
    with limited(Limits(seconds=5)):
        assert not passes(program)
    child = int(note.read_text())
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":  # dead, and nobody has asked for it
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child lives on")


def test_a_memory_hog_is_stopped():
    with limited(Limits(seconds=20, megabytes=256)):
        assert passes("x = bytearray(32 << 20)")
        assert not passes("x = bytearray(1 << 30)")
        assert not passes("x = []\nwhile True: x.append(bytearray(1 << 20))")


def test_a_large_file_is_stopped_and_nothing_is_left(tmp_path):
    assert not passes("open('a', 'wb').write(bytes(8 << 20))")
    assert passes("import os\nassert os.listdir('.') == [] and 'HF_TOKEN' not in os.environ")


def test_the_sandbox_is_tried_before_any_model():
    check_sandbox()
    with limited(Limits(seconds=1e-3)), pytest.raises(ValueError, match="--code-seconds"):
        check_sandbox()
