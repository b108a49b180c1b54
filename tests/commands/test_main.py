"""`balora`: every failure is one line and an exit code, a traceback only where it is asked for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from balora_plugin import commands
from balora_plugin.checkpoint.names import CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE

pytestmark = pytest.mark.hosts

EARLIER = Path(__file__).parents[1] / "data" / "before_layout" / "causal_lm"
ERRORS = [
    RuntimeError("size mismatch:\n" + "\ta tensor\n" * 1000),
    KeyError("base_digests"),
    TypeError("unhashable"),
    AttributeError("'NoneType' object has no attribute 'x'"),
    RecursionError("maximum recursion depth exceeded"),
    MemoryError(),
    AssertionError(),
    IndexError("list index out of range"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    ValueError("a value\nin two lines"),
    OSError(28, "No space left on device"),
    ModuleNotFoundError("No module named 'sklearn'"),
]
LINES = {  # a command line of every subcommand
    "compare": ["--model", "BASE", "--data", "ADAPTER", "--output", "OUTPUT"],
    "axolotl": ["init", "OUTPUT/starter.yml"],
    "doctor": [],
    "eval": ["ADAPTER", "--base", "BASE", "--drift", __file__],
    "export": ["ADAPTER", "--output", "OUTPUT"],
    "glue": ["--recipe", "ADAPTER", "--output", "OUTPUT"],
    "llamafactory": ["init", "OUTPUT/starter.yaml"],
    "report": ["ADAPTER"],
    "swift": ["OUTPUT/starter.yaml"],
    "verify": ["ADAPTER", "--base", "BASE"],
}


def test_every_subcommand_is_here():
    assert set(LINES) == set(commands.command_line().list_commands(click.Context(commands.command_line())))


def test_help_comes_at_once():
    """Time is not looked at: what takes seconds to import is."""
    code = (
        "import sys\nfrom balora_plugin.commands import main\n"
        f"for words in ([], *([name] for name in {list(LINES)})):\n"
        "    assert main([*words, '--help']) == main([*words, '-h']) == 0\n"
        "assert main(['--version']) == 0\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'trl', 'axolotl', 'swift') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-2].startswith("balora-plugin ") and lines[-1] == "[]" and done.stderr == ""
    assert done.stdout.count("--debug") == done.stdout.count("Usage: balora") == 2 * (1 + len(LINES))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Error: Missing command (see balora --help)"),
        (["nothing"], "Error: No such command 'nothing' (see balora --help)"),
        (["export"], "Error: Missing argument 'ADAPTER' (see balora export --help)"),
        (["verify", "x"], "Error: Missing option '--base' (see balora verify --help)"),
        (["compare", "--methods"], "Error: Option '--methods' requires "),
        (["glue", "--task", "rte", "x"], "Error: Invalid value for '--task': 'x' is not one of "),
        (
            ["glue", "--recipe", "x", "--output", "o", "--limit", "-5"],
            "Error: Invalid value for '--limit': -5 is not in",
        ),
        (["glue", "--recipe", "x", "--output", "o", "--seeds", "1", "-1"], "Error: Invalid value for '--seeds': -1 is"),
        (["eval", "--limit", "x"], "Error: Invalid value for '--limit': 'x' is not a valid integer (see balora eval"),
        (["doctor", "--jsom"], "Error: No such option"),
        (["export", "x", "--output", ""], "Error: Invalid value for '--output': is empty: write a value, or leave"),
        (["verify", "", "--base", "y"], "Error: Invalid value for 'ADAPTER': is empty: write a value"),
        (["compare", "--model", "m", "--methods", "lora", "", "--data", "d"], "Error: Invalid value for '--methods': "),
        (["verify", "x", "--base", "y", "z"], "Error: Got unexpected extra argument (z) (see balora verify --help)"),
    ],
)
def test_a_command_line_that_is_none_is_one_line(words, said, capsys):
    assert commands.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1


def test_an_option_takes_several_values(monkeypatch):
    found = []
    monkeypatch.setattr(commands.subcommand("compare"), "run", lambda args: found.append(args) or 0)
    line = ["compare", "--model", "m", "--seeds", "0", "-1", "--data", "d", "--output", "o", "--methods", "lora"]
    assert commands.main([*line, "full", "--methods", "pissa", "--debug"]) == 0
    (args,) = found
    assert args.seeds == [0, -1] and args.methods == ["lora", "full", "pissa"] and args.rates == []
    assert args.preset is None and args.terms == [] and args.steps is None


@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["plain", "debug"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", LINES)
def test_whatever_goes_wrong_is_one_line(name, error, debug, monkeypatch, capsys):
    def fails(args):
        raise error

    monkeypatch.setattr(commands.subcommand(name), "run", fails)
    for line in ([*debug, name, *LINES[name]], [name, *LINES[name], *debug]):
        assert commands.main(line) == 2
        said = capsys.readouterr().err
        assert ("Traceback" in said) == bool(debug)
        last = said.splitlines()[-1]
        assert last.startswith("Error: ") and len(last) < 1200
        if not debug:
            assert said == last + "\n"
            assert isinstance(error, (ValueError, OSError, ImportError)) or type(error).__name__ in last


@pytest.mark.parametrize("name", LINES)
def test_an_interrupt_is_no_traceback(name, monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.subcommand(name), "run", interrupted)
    assert commands.main([name, *LINES[name]]) == 130
    assert capsys.readouterr().err == "Error: interrupted\n"


def test_a_reader_who_has_gone_is_no_traceback():
    code = "import sys\nfrom balora_plugin.commands import main\nsys.exit(main(['doctor']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 2
    assert said.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in said and "Exception ignored" not in said


def damaged_config(path):
    (path / CONFIG_FILE).write_text("[]")


def config_of_other_types(path):
    values = json.loads((path / CONFIG_FILE).read_text())
    (path / CONFIG_FILE).write_text(json.dumps({**values, "peft_type": {}, "r": []}))


def damaged_settings(path):
    values = json.loads((path / SETTINGS_FILE).read_text())
    (path / SETTINGS_FILE).write_text(json.dumps({**values, "base_digests": []}))


def names_elsewhere(path):
    values = json.loads((path / SETTINGS_FILE).read_text())
    values["sha256"]["../" + WEIGHTS_FILE] = "0" * 64
    (path / SETTINGS_FILE).write_text(json.dumps(values))


def damaged_weights(path):
    (path / WEIGHTS_FILE).write_bytes(b"\x00" * 100)
    (path / SETTINGS_FILE).unlink()


def no_weights(path):
    (path / WEIGHTS_FILE).unlink()
    (path / SETTINGS_FILE).unlink()


def nothing(path):
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize("command", ["eval", "export", "verify"])
@pytest.mark.parametrize(
    "damage",
    [
        damaged_config,
        config_of_other_types,
        damaged_settings,
        names_elsewhere,
        damaged_weights,
        no_weights,
        nothing,
    ],
)
def test_a_damaged_adapter_is_one_line(damage, command, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(EARLIER / "checkpoint-4", adapter)
    damage(adapter)
    places = {"ADAPTER": str(adapter), "OUTPUT": str(tmp_path / "out"), "BASE": str(EARLIER / "base")}
    code = commands.main([command, *(places.get(word, word) for word in LINES[command])])
    said = capsys.readouterr()
    if code == 1:  # verify: the files are not those that were saved
        assert command == "verify" and "MISMATCH" in said.out and said.err == ""
        return
    assert code == 2, said
    assert said.err.startswith("Error: ") and said.err.count("\n") == 1 and str(adapter) in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["not/there/at/all", "/not/there", "a b"])
@pytest.mark.parametrize("which", ["adapter", "base"])
def test_a_path_that_is_not_there_is_called_so(which, name, capsys):
    adapter, base = (name, str(EARLIER / "base")) if which == "adapter" else (str(EARLIER / "checkpoint-4"), name)
    assert commands.main(["verify", adapter, "--base", base]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is no directory here, and no name on the hub either" in said
    assert " ".join((repr(name) if which == "adapter" else f"--base {name}").split()) in said


def test_an_adapter_by_its_name_is_found_for_who_asks_above_it(tmp_path, capsys):
    """PEFT saves an adapter of another name than "default" into a directory of that name."""
    shutil.copytree(EARLIER / "checkpoint-4", tmp_path / "run" / "mine")
    assert commands.main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 2
    assert f"an adapter by its name is {tmp_path / 'run' / 'mine'}" in capsys.readouterr().err
