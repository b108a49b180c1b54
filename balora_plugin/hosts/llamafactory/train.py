"""`balora llamafactory train x.yaml [key=value ...]`: read, checked, then LLaMA-Factory's own launcher, or its run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...findings import Finding, distinct, in_one_message
from .checks import findings_of_base, findings_of_yaml, planned

WORKER = str(Path(__file__).with_name("torchrun") / "worker.py")  # what torchrun starts, in a directory of its own


class NotTrainable(ValueError):
    """A command line or a YAML that cannot be trained as it stands: a line for each setting."""


def start_training(words: Sequence[str]) -> int:
    """Trains as `llamafactory-cli train WORDS` would, on several GPUs by its own launcher; returns the exit code.

    Raises:
        NotTrainable: settings that would not train, or train something else; all of them, before a model is loaded.
            A file or a command line that cannot be read.
    """
    _check_words(words)
    data = read_yaml(words)  # here too, before torchrun starts anything
    refuse_findings([*findings_of_yaml(data), *findings_of_base(data)])
    if "LOCAL_RANK" in os.environ:  # somebody's torchrun has started this process
        train_here(words)
        return 0
    from llamafactory import launcher
    from llamafactory.train import tuner

    argv, there, run = sys.argv, launcher.__file__, tuner.run_exp
    sys.argv = ["llamafactory-cli", "train", *words]
    launcher.__file__ = WORKER
    tuner.run_exp = lambda *_: train_here(words, run)  # what the launcher calls where one process is enough
    try:
        launcher.launch()
    except SystemExit as ended:  # of torchrun
        return int(ended.code or 0)
    finally:
        sys.argv, launcher.__file__, tuner.run_exp = argv, there, run
    return 0


def train_here(words: Sequence[str], run: Any = None) -> None:
    """Trains in this process, one of however many; `run`: LLaMA-Factory's run function, None: as it is imported.

    Raises:
        NotTrainable: as [`start_training`], and for a base model that is stored quantised.
    """
    data = read_yaml(words)
    refuse_findings([*findings_of_yaml(data), *findings_of_base(data)])
    plan = planned(data)
    from .hooks import check_release, run_with

    check_release()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for sentence in plan.said:
            print(f"BA-LoRA: {sentence}", file=sys.stderr)
    run_with(plan, run)


def read_yaml(words: Sequence[str]) -> dict[str, Any]:
    """Returns a YAML with the command line's `key=value` in it, as LLaMA-Factory merges them.

    Raises:
        NotTrainable: it cannot be read, or is no mapping of keys to values.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.load(words[0]), OmegaConf.from_cli(list(words[1:])))
        data = OmegaConf.to_container(merged)
    except OSError as error:
        raise NotTrainable(str(error)) from None
    except (OmegaConfBaseException, ValueError) as error:
        raise NotTrainable(f"{words[0]} is no YAML of settings: {error}") from None
    if not isinstance(data, dict):
        raise NotTrainable(f"{words[0]} is no mapping of keys to values.")
    return {str(key): value for key, value in data.items()}


def refuse_findings(findings: Iterable[Finding]) -> None:
    """Raises one error for all findings.

    Raises:
        NotTrainable: there is a finding.
    """
    if found := distinct(findings):
        raise NotTrainable(in_one_message(found))


def _check_words(words: Sequence[str]) -> None:
    if not words or not words[0].endswith((".yaml", ".yml")):
        given = words[0] if words else "nothing"
        raise NotTrainable(
            f"{given} is no YAML: write balora llamafactory train x.yaml, then key=value for single keys."
        )
    for word in words[1:]:
        if "=" not in word or word.startswith("-"):
            raise NotTrainable(f"{word}: behind the YAML LLaMA-Factory reads key=value, and ba_lora.key=value.")
