"""What adapter_config.json says of the tensors beside it: each one's scaling and experts, and whether it was edited."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from itertools import permutations
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from ..adapter.config import BaLoraConfig
from ..adapter.delta import PEFT_PREFIX
from ..adapter.saved.stock import rank_and_scaling
from ..checkpoint.names import CONFIG_FILE

# what an adapter computes hangs on these; a base that moved, or what a release of PEFT adds, does not
_PATTERNS = ("rank_pattern", "alpha_pattern")
_SCOPE = ("target_modules", "target_parameters", "modules_to_save", "layers_to_transform", "layers_pattern")
Explanation = tuple[tuple[float, int], ...]  # scaling and experts of each pair of factors of a module
_COMPUTE = ("r", "lora_alpha", "use_rslora", *_PATTERNS, "fan_in_fan_out", *_SCOPE, "exclude_modules")


def scalings_of(config: LoraConfig, shapes: dict[str, tuple[int, int]], path: str) -> dict[str, tuple[float, int]]:
    """Returns (scaling, experts) of every name in the file; `shapes`: rows of A, columns of B.

    A name tells its module, but of several parameters in one module not which: there the shapes have to.

    Raises:
        ValueError: shapes that the config does not explain, or that leave a choice.
    """
    found: dict[str, tuple[float, int]] = {}
    for module, names in _by_module(shapes).items():
        fits: set[Explanation] = set()
        for keys in _candidates(config, module, len(names)):
            fits = _explanations(config, [shapes[name] for name in names], keys, plain=keys == [module])
            if fits:
                break
        if not fits:
            rows, columns = shapes[names[0]]
            raise ValueError(
                f"{path}: {names[0]} has {rows} rows in lora_A and {columns} columns in lora_B, which "
                f"{CONFIG_FILE} (r={config.r}, rank_pattern, alpha_pattern) does not explain: the two files do not "
                "belong together."
            )
        if len(fits) > 1:
            alike = len({frozenset(count for _, count in fit) for fit in fits}) == 1
            which, own = ("alpha_pattern", "scalings") if alike else ("rank_pattern", "ranks")
            raise ValueError(
                f"{which}={getattr(config, which)!r} gives {' and '.join(keys)} {own} of their own, and {path} "
                "does not say which factors are whose; only PEFT on a loaded base can tell: merge there, with "
                f"PeftModel.from_pretrained(<the full-precision base model>, {os.path.dirname(path)!r})"
                f".merge_and_unload(), or give both one {own[:-1]} in the next training{_named(alike)}."
            )
        found |= dict(zip(names, fits.pop(), strict=True))
    return found


def _named(alike: bool) -> str:
    return "" if alike else " (named in target_parameters: the pattern of 'all-linear' is PEFT's)"


def _by_module(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns the names of a file by the module of the base that they adapt; wrapped parameters share one."""
    modules: dict[str, list[str]] = {}
    for name in sorted(names):
        modules.setdefault(name.removeprefix(PEFT_PREFIX).replace(".base_layer", ""), []).append(name)
    return modules


def _candidates(config: LoraConfig, module: str, count: int) -> list[list[str]]:
    """Returns what a module's `count` pairs of factors may stand for, the likeliest first: itself, or its parameters.

    `target_parameters` may name a parameter alone ("down_proj": PEFT writes it so for mixtures of experts), which any
    module may have: such a one counts where no target that names the module explains it.
    """
    if count == 1 and config.target_modules and check_target_module_exists(config, module):
        return [[module]]
    own, anywhere = set(), set()
    for target in config.target_parameters or []:
        owner, _, parameter = target.rpartition(".")
        if not owner:
            anywhere.add(parameter)
        elif module == owner or module.endswith(f".{owner}"):
            own.add(parameter)
    named = [sorted(own), sorted(own | anywhere)]
    return [*([f"{module}.{p}" for p in parameters] for parameters in named if len(parameters) >= count), [module]]


def _explanations(
    config: LoraConfig, shapes: list[tuple[int, int]], keys: list[str], *, plain: bool
) -> set[Explanation]:
    """Returns every explanation by the config of tensors of these shapes, if they are those of `keys`.

    Where several counts of experts fit, those that are one for all parameters: zero experts (LongCat-Flash), which the
    first of two parameters has and the second has not, are the exception.
    """
    fits = set()
    for chosen in permutations(keys, len(shapes)):
        read = [rank_and_scaling(config, key) for key in chosen]
        counts = [rows // rank for (rows, _), (rank, _) in zip(shapes, read, strict=True)]
        exact = all(
            count and shape == (rank * count,) * 2 for shape, (rank, _), count in zip(shapes, read, counts, strict=True)
        )
        if exact and (not plain or set(counts) == {1}):
            fits.add(tuple((scaling, count) for (_, scaling), count in zip(read, counts, strict=True)))
    return {fit for fit in fits if len({count for _, count in fit}) == 1} or fits


# --- edited since?


def what_it_computes(config: LoraConfig) -> dict[str, Any]:
    """Returns the part of a config that decides what its adapter computes, JSON-ready."""
    return {key: _plain(getattr(config, key, None)) for key in _COMPUTE}


def check_as_trained(config: LoraConfig, settings: Mapping[str, Any], names: Iterable[str], path: str) -> None:
    """Refuses an adapter_config.json that says something else than the ba_lora.json (`settings`) of its training.

    Patterns are compared by what they give each layer: the saved file may write them otherwise.

    Raises:
        ValueError: names the key and both values.
    """
    values = {key: value for key, value in settings["config"].items() if key in (*_COMPUTE, "init_lora_weights")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a conversion that is not made here
        trained = BaLoraConfig(**values)
    _compare(config, what_it_computes(trained.to_stock_config()), path, but=_PATTERNS)
    factor = 2 if trained.delta else 1
    for module, pairs in _by_module(names).items():
        for key in {key for keys in _candidates(config, module, len(pairs)) for key in keys}:
            (rank, scaling), (own, expected) = rank_and_scaling(config, key), rank_and_scaling(trained, key)
            if rank != factor * own or not math.isclose(scaling, expected, rel_tol=1e-7):
                which = "rank_pattern" if rank != factor * own else "alpha_pattern"
                raise ValueError(
                    f"{which}={getattr(config, which)!r} in {path} gives {key} rank {rank} and scaling {scaling:g}, "
                    f"but it was trained and saved with rank {factor * own} and scaling {expected:g}: {_REMEDY}"
                )


def check_as_exported(config: LoraConfig, written: Mapping[str, Any], path: str) -> None:
    """Refuses an adapter_config.json that says something else than was `written` in its export's tensor file.

    Raises:
        ValueError: names the key and both values.
    """
    _compare(config, written, path)


_REMEDY = "the file was edited since. Put the file back as it was saved; only where its base is may differ."


def _compare(config: LoraConfig, expected: Mapping[str, Any], path: str, but: tuple[str, ...] = ()) -> None:
    here = what_it_computes(config)
    for key, value in expected.items():
        if key in here and key not in but and here[key] != value:
            raise ValueError(f"{key}={here[key]!r} in {path}, but it was saved with {key}={value!r}: {_REMEDY}")


def _plain(value: Any) -> Any:
    """Returns a value so that two of the same meaning are equal: no order in sets of names, nothing for none."""
    if isinstance(value, (set, list, tuple)):
        value = sorted(value, key=str)
    return value or None if isinstance(value, (list, dict, str)) else value
