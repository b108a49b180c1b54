"""What other packages say on their import is kept from a command's screen, and is there again afterwards."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from balora_plugin import commands
from balora_plugin.commands._others import LOG, WARN, said_by_others

EARLIER = Path(__file__).parents[1] / "data" / "before_layout" / "causal_lm"
NOISY = ("torch.utils._pytree", "torchao", "bitsandbytes.backends.cpu.ops", "kernels.utils")


def loggers_as_they_come(caplog, monkeypatch):
    """The loggers heard here as their packages make them, whatever the tests before did to them."""
    parents = {name.rpartition(".")[0] for name in NOISY} | {"torch", "bitsandbytes"}
    for name in sorted({*NOISY, *parents, "balora_plugin"} - {""}):
        caplog.set_level(logging.WARNING if name == "torch" else logging.NOTSET, logger=name)
        for attribute, value in {"propagate": True, "disabled": False, "filters": []}.items():
            monkeypatch.setattr(logging.getLogger(name), attribute, value)


@pytest.fixture(autouse=True)
def put_aside(caplog, monkeypatch):
    loggers_as_they_come(caplog, monkeypatch)


def speak():
    for name in NOISY:
        logging.getLogger(name).warning(f"{name} failed to load")
        warnings.warn_explicit(f"{name} is too old", UserWarning, "file.py", 1, module=name)
    logging.getLogger("torchao").error("an error")
    logging.getLogger("balora_plugin").warning("ours")
    warnings.warn_explicit("ours too", UserWarning, "file.py", 1, module="balora_plugin.config")


def heard(caplog, recwarn):
    said = [record.getMessage() for record in caplog.records] + [str(w.message) for w in recwarn.list]
    caplog.clear(), recwarn.clear()
    return said


def test_others_are_silent_inside_alone(caplog, recwarn):
    everything = 2 * len(NOISY) + 3
    warnings.simplefilter("always")
    before = [logging.getLogger(name).level for name in LOG]
    with said_by_others():
        speak()
    assert sorted(heard(caplog, recwarn)) == ["an error", "ours", "ours too"]
    assert [logging.getLogger(name).level for name in LOG] == before
    speak()
    assert len(heard(caplog, recwarn)) == everything
    with said_by_others(shown=True):
        speak()
    assert len(heard(caplog, recwarn)) == everything


LEFT = {"disabled": True, "level": logging.ERROR, "filters": [lambda record: False], "propagate": False}


@pytest.mark.parametrize("attribute", LEFT)
def test_what_other_tests_leave_is_put_aside(attribute, monkeypatch, caplog, recwarn):
    logger = logging.getLogger("torch.utils._pytree")
    monkeypatch.setattr(logger, attribute, LEFT[attribute])
    logging.getLogger("torch").manager._clear_cache()
    logger.warning("lost")
    assert heard(caplog, recwarn) == []
    loggers_as_they_come(caplog, monkeypatch)
    logger.warning("heard")
    assert heard(caplog, recwarn) == ["heard"]


def test_levels_come_back_after_an_error():
    before = [logging.getLogger(name).level for name in LOG]
    filters = list(warnings.filters)
    with pytest.raises(KeyError), said_by_others():
        raise KeyError
    assert [logging.getLogger(name).level for name in LOG] == before and warnings.filters == filters
    assert set(WARN) >= {name.partition(".")[0] for name in LOG}


@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["plain", "debug"])
def test_a_command_asks_for_it(debug, monkeypatch, caplog, recwarn):
    warnings.simplefilter("always")
    monkeypatch.setattr(commands.subcommand("verify"), "run", lambda args: speak() or 0)
    assert commands.main(["verify", "x", "--base", "y", *debug]) == 0
    assert len(heard(caplog, recwarn)) == (2 * len(NOISY) + 3 if debug else 3)


@pytest.mark.slow
def test_verify_prints_its_own_lines_alone():
    line = ["verify", str(EARLIER / "checkpoint-4"), "--base", str(EARLIER / "base")]
    command = [sys.executable, "-m", "balora_plugin.commands", *line]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("OK\n")
    ours = ("Loading weights", str(EARLIER))
    others = [said for said in done.stderr.split("\n") if said.strip("\r") and not said.strip("\r").startswith(ours)]
    assert others == []
