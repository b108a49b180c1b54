"""The `ba_lora:` block of an Axolotl YAML: typed, bounded, described; unknown keys refused. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, create_model, model_validator

from ...config import RegularizerConfig, nearest_setting
from ...findings import Finding
from ...settings import Setting, settings_of

ADAPTER = "ba_lora"
Method = Literal["full", "lora", "pissa", "dora", "ba_lora"]
Terms = Literal["none", "all", "consistency", "diversity", "svd"]
METHOD_CHOICES: tuple[str, ...] = get_args(Method)
TERMS_CHOICES: tuple[str, ...] = get_args(Terms)
# of the block, beside the fields of RegularizerConfig
HOST_KEYS = ("compile", "start_from", "apply_to", "loss_type", "text_columns", "label_column", "method", "terms")


def nearest_field(key: str) -> str | None:
    """Returns the block's field that a misspelt one most likely means; None: none is near."""
    return nearest_setting(key, HOST_KEYS)


def _top_level(key: str) -> str:
    return key if key.startswith(("lora_", "peft_")) else f"lora_{key}"


def _declared(known: Setting) -> tuple[Any, Any]:
    """Type and Field of a setting, as pydantic's `create_model` takes them."""
    if known.kind == "numbers":
        return _numbers(known)
    types = {"number": float, "integer": int, "flag": bool, "path": str, "data": str}
    kind: Any = Literal[known.choices] if known.kind == "choice" else types[known.kind]
    bounds: dict[str, Any] = {"allow_inf_nan": False} if known.kind == "number" else {}
    if known.minimum is not None:
        bounds["gt" if known.exclusive else "ge"] = known.minimum
        bounds |= _most(known)
    field = Field(default=known.default, description=known.meaning, **bounds)
    return (kind | None if known.optional else kind), field


def _most(known: Setting) -> dict[str, float]:
    """The upper bound, as pydantic names it; nothing where it is that of all floats."""
    return {} if known.maximum is None and known.kind != "integer" else {"le": known.largest}


def _numbers(known: Setting) -> tuple[Any, Any]:
    """The same of a mapping to numbers, each bounded."""
    bounds: dict[str, Any] = {} if known.minimum is None else {"gt" if known.exclusive else "ge": known.minimum}
    bounds |= _most(known)
    number = Annotated[float, Field(allow_inf_nan=False, **bounds)]
    keys: Any = Literal[known.keys]
    return dict[keys, number] | None, Field(default=known.default, description=known.meaning)


_SETTINGS = settings_of(RegularizerConfig)
_FIELDS: dict[str, Any] = {name: _declared(known) for name, known in _SETTINGS.items()}
_Settings: Any = create_model("_Settings", **_FIELDS)


class BaLoraBlock(_Settings):
    """RegularizerConfig's fields; everything about the adapter itself is in Axolotl's own `lora_*` keys."""

    compile: bool | Literal["layers"] = Field(
        default=False,
        description="Compile teacher, student and terms with the backend ba_lora; layers: each kind of layer once.",
    )
    start_from: str | None = Field(
        default=None,
        min_length=1,
        description="With load_in_4bit or load_in_8bit: the full-precision model (directory, .safetensors file or hub "
        "id) whose weights give A0 and B0, read one at a time; null: the dequantised weights.",
    )
    apply_to: Literal["lora", "full"] | None = Field(
        default=None,
        description="Put the terms on `adapter: lora`, or on full fine-tuning (with teacher_cache, or "
        "lambda_consistency: 0), instead.",
    )
    loss_type: Literal["nll", "dft"] | None = Field(
        default=None,
        description="The task term's form: the cross-entropy (nll, also null), or each token's times the probability "
        "of its target (dft), as TRL's loss_type.",
    )
    text_columns: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=2,
        description="Classification: the column of the text, or the two of a pair; null: found by their usual names.",
    )
    label_column: str | None = Field(
        default=None, min_length=1, description="Classification: the column of the label; null: label or labels."
    )
    method: Method | None = Field(
        default=None,
        description="What is trained, by one key: ba_lora (null), its starts without terms (pissa, lora), PEFT's DoRA "
        "(dora) or every weight (full).",
    )
    terms: Terms | None = Field(
        default=None,
        description="Which terms are on: all as they are weighted (null for ba_lora), none (null for the other "
        "methods), or one alone.",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        for finding in _unknown(data):
            raise ValueError(finding.sentence())
        return data

    @model_validator(mode="after")
    def _resolve(self) -> BaLoraBlock:
        self.regularizers()
        if self.compile and self.apply_to is not None:
            raise ValueError(
                f"ba_lora.compile: {str(self.compile).lower()} does not work with apply_to: {self.apply_to}: remove "
                "one of the two."
            )
        return self

    def regularizers(self) -> RegularizerConfig:
        """The settings as the core takes them."""
        return RegularizerConfig.from_dict(self.model_dump(exclude=set(HOST_KEYS)))


def _unknown(block: Any) -> Iterator[Finding]:
    """Finds keys of a block that it does not have, and values that pydantic would make something else of."""
    if not isinstance(block, dict):
        yield Finding("ba_lora", repr(block), "must be a block of settings, or absent")
        return
    flags = {"compile", *(name for name, known in _SETTINGS.items() if known.kind == "flag")}
    for key, value in block.items():
        name = f"ba_lora.{key}"
        if key not in BaLoraBlock.model_fields:
            near = nearest_field(str(key))
            if str(key) in ("r", "alpha", "dropout") or str(key).startswith(("lora_", "peft_")):
                hint = f"the adapter's own keys stand at top level: write {_top_level(str(key))} there"
            elif near:
                hint = f"did you mean {near}?"
            else:
                hint = "axolotl ba-lora schema prints what there is"
            yield Finding(name, repr(value), "is not a setting", hint)
        elif isinstance(value, bool) and key not in flags:  # pydantic would make a weight of 1.0 of it
            yield Finding(name, value, "is no value for it", f"write {_wanted(str(key))}")
        elif isinstance(value, dict) and key in _SETTINGS and _SETTINGS[key].keys:
            yield from _of_numbers(name, value, _SETTINGS[key].keys)
        elif key == "compile" and value not in (True, False, "layers"):
            yield Finding(name, repr(value), "is no way to compile", "write true, false or layers")


def _wanted(key: str) -> str:
    """What a field of the block takes, in words."""
    if key in _SETTINGS:
        return _with_article(_SETTINGS[key].values.replace("`", ""))
    choices = [name for part in get_args(BaLoraBlock.model_fields[key].annotation) for name in get_args(part)]
    return " or ".join(map(str, choices)) if all(isinstance(each, str) for each in choices) and choices else "a name"


def _of_numbers(name: str, numbers: dict[Any, Any], keys: tuple[str, ...]) -> Iterator[Finding]:
    """Finds names that a mapping to numbers does not take, and booleans in it."""
    for key, number in numbers.items():
        if key not in keys:
            yield Finding(f"{name}.{key}", repr(number), "is not a setting", f"write some of {', '.join(keys)} there")
        elif isinstance(number, bool):
            yield Finding(f"{name}.{key}", number, "is no value for it", "write a number")


def of_block(block: Any, task: str) -> Iterator[Finding]:
    """Finds everything that is wrong in a `ba_lora:` block as it was written; `task`: nlg or nlu."""
    if block is None:
        return
    unknown = list(_unknown(block))
    yield from unknown
    if not isinstance(block, dict):
        return
    named = {".".join(finding.key.split(".")[:2]) for finding in unknown}
    try:  # the rest of it, so that nothing is left for another round
        rest = {key: value for key, value in block.items() if f"ba_lora.{key}" not in named}
        BaLoraBlock.model_validate(rest).regularizers().resolved(task)
    except ValidationError as error:
        yield from map(_of_pydantic, error.errors())
    except ValueError as error:
        yield Finding.of_error(str(error))


def _of_pydantic(error: Any) -> Finding:
    where = ".".join(["ba_lora", *map(str, error["loc"])])
    message = error["msg"].removeprefix("Value error, ")
    if message.startswith("ba_lora"):
        return Finding.of_error(message)
    known = _SETTINGS.get(str(error["loc"][0])) if error["loc"] else None
    if known is None:  # the host's own keys, whose values pydantic names
        wanted = message.removeprefix("Input should be ").removesuffix(".")
    elif known.kind == "numbers" and len(error["loc"]) > 1:
        wanted = f"number{known.bounds}"
    else:
        wanted = known.values.replace("`", "")
        if error["type"] == "less_than_equal" and known.maximum is None:
            wanted += f" and <= {known.largest}"
    return Finding(where, repr(error["input"]), "is no value for it", f"write {_with_article(wanted)}")


def _with_article(words: str) -> str:
    return f"a {words}" if words.startswith(("number", "whole number", "path", "file", "mapping")) else words
