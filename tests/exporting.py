"""Running `balora export` in a test, and what it says."""

from __future__ import annotations

import torch
from helpers import logits, train
from transformers import AutoModelForCausalLM

from balora_plugin.commands import main


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of `balora`."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *arguments):
    """The one line of an error."""
    code, _, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert code == 2, err
    assert len(lines) == 1, err
    return lines[0]


def error_in(out):
    """The total error that was printed."""
    line = next(line for line in out.splitlines() if line.startswith("error"))
    return float(line.split()[1])


def trained(model, ids, directory):
    """Trains and saves; the logits in eval mode."""
    train(model, ids)
    model.eval()
    model.save_pretrained(directory)
    return logits(model, ids)


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
