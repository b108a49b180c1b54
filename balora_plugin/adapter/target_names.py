"""Names that an adapter's config asks for and the model does not have."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.utils import logging

from .peft_releases import as_peft_reads

logger = logging.get_logger(__name__)


class NoMatch(NamedTuple):
    """What of a setting matches nothing: a field of the adapter's config, names or patterns, what was meant."""

    setting: str
    names: list[str]
    hint: str
    among: str = "nothing"


def takes(full: str, name: str) -> bool:
    """Returns whether PEFT takes `name`, of a list of targets, for the module or parameter of this full name."""
    return full == name or full.endswith(f".{name}")


def check_names(config: LoraConfig, model: nn.Module) -> None:
    """Says once which names of a config, as its user wrote it, the model (maybe shapes alone) does not have.

    PEFT itself says nothing of a list of which one name matches, of modules_to_save, nor of rank_pattern and the like.

    Raises:
        ValueError: nothing is left to adapt.
    """
    found = list(_without_match(config, model))
    missing = {each.setting: len(each.names) for each in found}
    left = [len(_listed(getattr(config, key, None))) - missing.get(key, 0) for key in _TARGETS]
    asked = any(getattr(config, key, None) for key in _TARGETS)
    for each in found:
        what = f"{', '.join(each.names)} matches {each.among} in {type(model).__name__}"
        sentence = f"{each.setting}: {what}: {each.hint}"
        if asked and not any(left) and each.setting in _TARGETS:
            raise ValueError(f"{sentence}{'' if sentence.endswith('?') else '.'}")
        logger.warning_once(f"BA-LoRA: {sentence}{'' if sentence.endswith('?') else '.'}")


_TARGETS = ("target_modules", "target_parameters")


def _listed(wanted: Any) -> list[str]:
    return [wanted] if isinstance(wanted, str) else list(wanted or ())


def _as_read(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The config as PEFT takes it, which knows the layers that were before experts were fused (w1 of Mixtral)."""
    config = copy.deepcopy(config)
    as_peft_reads(config, model)
    return config


def _without_match(config: LoraConfig, model: nn.Module) -> Iterator[NoMatch]:
    config = _as_read(config, model)
    added = _added(model)
    modules = {_as_it_was(name): module for name, module in model.named_modules() if not name.startswith(added)}
    names = [name for name in modules if name]
    layers = {_last(name) for name in names if getattr(getattr(modules[name], "weight", None), "ndim", 0) == 2}
    parameters = [_as_it_was(name) for name, _ in model.named_parameters() if not name.startswith(added)]
    # of quantised experts the parameter as it was
    parameters = [re.sub(r"\.parametrizations\.([^.]+)\..*", r".\1", name) for name in parameters]
    yield from _of("target_modules", config, _Among(names, takes, layers))
    yield from _of("target_parameters", config, _Among(parameters, takes, ()))
    yield from _of("modules_to_save", config, _Among(names, str.endswith, map(_last, names)))
    for setting in ("rank_pattern", "alpha_pattern"):
        yield from _of_pattern(setting, config, [*names, *parameters], layers)


def _added(model: nn.Module) -> tuple[str, ...]:
    """The beginnings of the names of what adapters have put into the model before."""
    return tuple(
        f"{name}.{child}"
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
        for child, _ in layer.named_children()
        if child != "base_layer"
    )


def _as_it_was(name: str) -> str:
    """A full name as it was before adapters wrapped its layer."""
    return re.sub(r"\.base_layer(?=\.|$)", "", name)


class _Among(NamedTuple):
    """The full names that a setting is looked up in, PEFT's rule for one of a list, and what can have been meant."""

    full: list[str]
    rule: Callable[[str, str], bool]
    meant: Iterable[str]


def _of(setting: str, config: LoraConfig, among: _Among) -> Iterator[NoMatch]:
    wanted = getattr(config, setting, None)
    if not wanted or (isinstance(wanted, str) and wanted.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND):
        return
    if isinstance(wanted, str):
        missing = [] if any(re.fullmatch(wanted, full) for full in among.full) else [wanted]
    else:
        missing = sorted(name for name in wanted if not any(among.rule(full, name) for full in among.full))
    if missing:
        yield NoMatch(setting, missing, _hint(missing, set(among.meant)))


def _of_pattern(setting: str, config: LoraConfig, full: list[str], layers: set[str]) -> Iterator[NoMatch]:
    """Looks up a pattern's expressions, PEFT's way: in the whole model, then among the targets where they are named."""
    patterns = list(getattr(config, setting, None) or ())
    missing = [key for key in patterns if not _found(key, full)]
    if missing:
        yield NoMatch(setting, missing, _hint(missing, layers))
    targets = _targets(config, full)
    left_out = [key for key in patterns if key not in missing and targets and not _found(key, targets)]
    if left_out:
        names = ", ".join(sorted({_last(name) for name in targets}))
        yield NoMatch(setting, left_out, f"the targets are {names}", "no target")


def _found(expression: str, full: list[str]) -> bool:
    return any(re.match(rf"(.*\.)?({expression})$", name) for name in full)


def _targets(config: LoraConfig, full: list[str]) -> list[str]:
    """The names that target_modules takes; none where it says all, leaves it to a default, or parameters are meant."""
    wanted = config.target_modules
    if not wanted or config.target_parameters:
        return []
    if isinstance(wanted, str):
        every = wanted.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        return [] if every else [name for name in full if re.fullmatch(wanted, name)]
    return [name for name in full if any(takes(name, each) for each in wanted)]


def _hint(missing: list[str], there: set[str]) -> str:
    near = [difflib.get_close_matches(_last(name), sorted(there), n=1) for name in missing]
    if any(near):
        return f"did you mean {', '.join(dict.fromkeys(name for found in near for name in found))}?"
    return f"there are {', '.join(sorted(there))}" if there else "remove it"


def _last(name: str) -> str:
    return name.rpartition(".")[2]
