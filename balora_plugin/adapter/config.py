"""BaLoraConfig: a LoraConfig that carries the regularisers and starts as PiSSA in delta form."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
from peft import LoraConfig, PeftModel
from torch import nn

from ..checkpoint.integrity import is_finished, last_whole
from ..checkpoint.location import AdapterFiles
from ..checkpoint.names import SETTINGS_FILE
from ..checkpoint.settings import read_settings, write_settings
from ..config import RegularizerConfig, as_regularizers
from ..settings import as_path, names_checked, settings_of
from ..teacher.files import HEADER
from .delta import not_linears_own
from .options import NEUTRAL_OPTIONS, OTHER_STARTS, check_options
from .start.pissa import TOLERANCES

logger = logging.getLogger(__name__)

DELTA_STARTS = tuple(TOLERANCES)

_REFUSAL = (
    "BaLoraConfig was given to PEFT's own get_peft_model (or a stock trainer), which would change the base weights. "
    "Use balora_plugin.get_ba_lora_model(model, config), or a BA-LoRA trainer (BaLoraSFTTrainer, BaLoraTrainer) with "
    "peft_config=config."
)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


class _DeltaStart(str):
    """The name of a start that only BA-LoRA builds: PEFT asks `startswith("pissa")` before it rewrites the base."""

    def startswith(self, *args: Any) -> bool:
        """Refuses to be taken for one of PEFT's own starts."""
        raise TypeError(_REFUSAL)


def _refuse_stock_injection(*args: Any, **kwargs: Any) -> None:
    raise TypeError(_REFUSAL)


def _no_field(key: str) -> str:
    """What to write for a keyword that is no field of BaLoraConfig."""
    if key in settings_of(RegularizerConfig):
        return f"{key} is a setting of the terms: write regularizers=RegularizerConfig({key}=...)."
    known = [each.name for each in dataclasses.fields(BaLoraConfig) if each.init]
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"write one of {', '.join(known)}."
    return f"{key} is not a setting of BaLoraConfig: {hint}"


@names_checked(_no_field)
@dataclass
class BaLoraConfig(LoraConfig):
    """A [`peft.LoraConfig`] for BA-LoRA; every LoRA field means what it means there.

    Args:
        regularizers: The three terms, see [`RegularizerConfig`]; a dict of its fields works too.
        compile: Compile teacher, student and terms with the backend `ba_lora` (not beside the trainer's torch_compile):
            True: one graph each; "layers": each kind of decoder layer once.
        init_lora_weights: `"pissa"` (default: the leading singular triples to within 1e-6 of their energy, by an
            iteration with a fixed seed), `"pissa_fast"` (the same to 1e-4; PEFT's `"pissa_niter_N"` means this one),
            `"pissa_exact"` (LAPACK's SVD), all in delta form, so that the base weights stay as they are; `True`: the
            ordinary LoRA start with the regularisers; `False`: random factors, for tests.
        start_from: Over a quantised (bitsandbytes) base: where A0 and B0 come from. None: the dequantised weights. A
            directory, .safetensors file or hub id of the full-precision model: its weights, read one at a time. Not
            part of a saved adapter. Base and teacher are the quantised weights either way.

    Raises:
        ValueError: for an option that would change the function or the teacher (DoRA, trained biases, ...).
    """

    init_lora_weights: bool | str = field(
        default="pissa",
        # PEFT reads this list to find its own variants of the start
        metadata={**LoraConfig.__dataclass_fields__["init_lora_weights"].metadata},
    )
    regularizers: RegularizerConfig = field(
        default_factory=RegularizerConfig, metadata={"help": "Settings of the three regularisers."}
    )
    compile: bool | str = field(default=False, metadata={"help": "Compile teacher and student: true or 'layers'."})
    start_from: str | os.PathLike[str] | None = field(
        default=None, metadata={"help": "The full-precision model that a quantised base takes A0 and B0 from."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = str(self.init_lora_weights)
        self._take_iterations()
        check_options(self)
        super().__post_init__()
        self.regularizers = as_regularizers(self.regularizers)
        self._check_neutral()
        if not isinstance(self.compile, bool) and self.compile != "layers":
            raise (ValueError if isinstance(self.compile, str) else TypeError)(
                f"compile={self.compile!r} must be True, False or 'layers'."
            )
        self.start_from = as_path("start_from", self.start_from)
        if self.start_from is not None and not self.delta:
            raise ValueError(
                f"start_from={self.start_from!r} with init_lora_weights={self.init_lora_weights!r}, which has no A0 "
                "and B0: write init_lora_weights='pissa', or leave start_from out."
            )
        if self.delta:
            self.init_lora_weights = _DeltaStart(self.init_lora_weights)
        # no fields, so that they are not saved; the first: the output directory of a run that a host resumes there
        self.resumed_in: str | None = None
        self.custom_modules: dict[type[nn.Module], type[nn.Module]] = {}
        super()._register_custom_module({nn.Module: _refuse_stock_injection})

    def _register_custom_module(self, mapping: Mapping[type[nn.Module], type[nn.Module]]) -> None:
        """Takes layers of the caller's own, as PEFT does: {class of a module: class of the LoRA layer that adapts it}.

        Like PEFT's they are not saved: a config that is loaded has to be given them again.

        Raises:
            ValueError: in delta form, a layer that would compute without A0 and B0.
        """
        for kind, layer in mapping.items():
            changed = not_linears_own(layer) if self.delta else None
            if changed is not None:
                raise ValueError(
                    f"_register_custom_module({{{kind.__name__}: {layer.__name__}}}): {layer.__name__} {changed}, so "
                    "that A0 and B0 would be left out. Instead: a subclass of peft.tuners.lora.Linear that leaves that "
                    "method alone, or init_lora_weights=True (the ordinary LoRA start), which takes any LoRA layer."
                )
        self.custom_modules.update(mapping)

    def _take_iterations(self) -> None:
        """`pissa_niter_N` of PEFT's iterates too."""
        if isinstance(self.init_lora_weights, str) and re.fullmatch(r"pissa_niter_\d+", self.init_lora_weights):
            _say_once(
                f"init_lora_weights={self.init_lora_weights!r} is 'pissa_fast' here, which iterates to a tolerance: "
                "write that."
            )
            self.init_lora_weights = "pissa_fast"

    def _check_neutral(self) -> None:
        """Refuses a start, or a LoRA option, that replaces the function or the teacher."""
        start = self.init_lora_weights
        if not isinstance(start, (str, bool)) or start not in (*DELTA_STARTS, True, False):
            why = OTHER_STARTS.get(str(start).lower())
            raise ValueError(
                f"init_lora_weights={start!r} is not a BA-LoRA start: "
                + (
                    f"{why}."
                    if why
                    else "write 'pissa', 'pissa_fast' (a little faster) or 'pissa_exact' (an SVD), all with the same "
                    "step-0 model, True (ordinary LoRA) or False (random, for tests)."
                )
            )
        for key, neutral in NEUTRAL_OPTIONS.items():
            value = getattr(self, key, neutral.value)
            if value not in (neutral.value, None, False):
                raise ValueError(
                    f"{key}={value!r} does not work with BA-LoRA: {neutral.reason}. Instead: {neutral.remedy}."
                )

    @property
    def delta(self) -> bool:
        """Returns whether the start is in delta form (frozen A0, B0 beside the trained dA, dB)."""
        return self.init_lora_weights in DELTA_STARTS

    @property
    def family(self) -> str:
        """Returns which terms a model with this adapter is trained with: "nlu" for classifiers, else "nlg"."""
        if self.regularizers.task != "auto":
            return self.regularizers.task
        return "nlu" if getattr(self.task_type, "value", self.task_type) == "SEQ_CLS" else "nlg"

    def to_lora_config(self, **changes: Any) -> LoraConfig:
        """Returns the LoRA fields alone, as a stock LoraConfig with `changes` applied."""
        values = {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(LoraConfig) if f.init}
        stock = LoraConfig(**{**values, **changes})
        if self.custom_modules:
            stock._register_custom_module(self.custom_modules)
        return stock

    def to_stock_config(self) -> LoraConfig:
        """Returns the LoraConfig of a saved file: rank 2r with the same scaling in delta form, rank r otherwise.

        alpha / r = (2 alpha) / (2 r) exactly. With rsLoRA alpha / sqrt(r) has no such twin, so it says
        use_rslora=False with an alpha that gives the same float. Patterns are doubled as they stand; where that would
        give a layer something else, the writer, who knows the layers, replaces them.
        """
        if not self.delta:
            return self.to_lora_config(init_lora_weights=True)
        ranks: dict[str, int] = self.rank_pattern or {}
        alphas: dict[str, float] = self.alpha_pattern or {}
        default_rank: int = self.r
        default_alpha: float = self.lora_alpha
        if self.use_rslora:
            alpha = alpha_for(default_alpha / math.sqrt(default_rank), 2 * default_rank)
            scaled = {
                key: alpha_for(
                    alphas.get(key, default_alpha) / math.sqrt(ranks.get(key, default_rank)),
                    2 * ranks.get(key, default_rank),
                )
                for key in {**ranks, **alphas}
            }
        else:
            alpha, scaled = 2 * default_alpha, {key: 2 * value for key, value in alphas.items()}
        changes: dict[str, Any] = {"init_lora_weights": True, "use_rslora": False, "r": 2 * default_rank}
        doubled = {key: 2 * rank for key, rank in ranks.items()}
        return self.to_lora_config(**changes, lora_alpha=alpha, rank_pattern=doubled, alpha_pattern=scaled)

    def to_settings(self) -> dict[str, Any]:
        """Returns what `ba_lora.json` says of this config: plain values, JSON-ready."""
        # only what is set: another PEFT release may not know the rest
        neutral = type(self)().to_dict()
        values = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in {**self.to_dict(), "regularizers": self.regularizers.to_dict()}.items()
            if (value != neutral.get(key) or key in ("r", "lora_alpha"))
            and key not in ("runtime_config", "auto_mapping", "peft_version", "inference_mode", "start_from")
        }
        return {
            "start": self.init_lora_weights,
            "delta_form": self.delta,
            "base_model": self.base_model_name_or_path,
            "regularizers": self.regularizers.to_dict(),
            # for readers: presets may change
            "regularizers_in_force": self.regularizers.resolved(self.family).to_dict(),
            "config": values,
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any] | None, source: str) -> BaLoraConfig:
        """Returns the config that `ba_lora.json` holds; `source` names its adapter in errors.

        A `teacher_cache` is taken over only where that directory already is one: an adapter from elsewhere does not
        choose where files are written.

        Raises:
            ValueError: no settings (not a BA-LoRA adapter), or an option that this release of PEFT does not know.
        """
        if settings is None:
            inside = last_whole(source)  # a run that was cut short has saved nothing else
            if inside is not None:
                raise ValueError(
                    f"{source!r} holds no adapter, but checkpoints; the newest whole one is {inside!r}: name it."
                )
            raise ValueError(
                f"{source!r} holds no {SETTINGS_FILE}: it is not a BA-LoRA adapter (or its side files were not "
                "copied). As a plain LoRA it loads with peft.PeftModel.from_pretrained."
            )
        values = settings["config"]
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(
                f"{source!r} ({SETTINGS_FILE}) was saved with {unknown[0]}={repr(values[unknown[0]])[:60]}, which this "
                f"release of PEFT ({peft.__version__}) does not know: pip install -U peft."
            )
        try:
            config = cls(**values)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{source}: {SETTINGS_FILE}: config: {' '.join(str(error).split())}") from None
        cache = config.regularizers.teacher_cache
        if cache is not None and not os.path.isfile(os.path.join(cache, HEADER)):  # somebody else's path
            logger.warning(
                f"{source} was trained with teacher_cache={cache}, which is no teacher cache here: going on without; "
                "name one of your own to have it again."
            )
            config.regularizers = dataclasses.replace(config.regularizers, teacher_cache=None, teacher_cache_top_k=None)
        anchors = config.regularizers.anchor_data
        if anchors is not None and not (
            isinstance(anchors, str) and os.path.isfile(anchors)
        ):  # nor may a file name what is fetched
            logger.warning(
                f"{source} was trained with anchor_data={anchors!r}, which is no file here: going on without; name it "
                "again to have it."
            )
            config.regularizers = dataclasses.replace(config.regularizers, anchor_data=None)
        return config

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes what a saved adapter carries: the *stock* config (rank 2r in delta form) and `ba_lora.json`.

        Not over a finished adapter, whose weights these would not describe: Axolotl saves a config before the first
        step, and a run that then fails must leave the adapter of the run before it as it was. That is said, unless
        the run is resumed there (`resumed_in`).
        """
        if is_finished(str(save_directory)):
            own = self.resumed_in is not None and os.path.realpath(self.resumed_in) == os.path.realpath(save_directory)
            if not own:
                logger.warning(
                    f"{save_directory} holds the adapter of an earlier run: it stays until the new one is saved over "
                    "it."
                )
            return
        self.to_stock_config().save_pretrained(str(save_directory), **kwargs)
        write_settings(str(save_directory), self.to_settings())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> BaLoraConfig:
        """Reads the settings a BA-LoRA adapter was saved with.

        Raises:
            ValueError: if the directory holds no `ba_lora.json` (a plain LoRA: use `LoraConfig.from_pretrained`).
        """
        files = AdapterFiles.from_arguments(pretrained_model_name_or_path, {**kwargs, "subfolder": subfolder})
        return cls.from_settings(read_settings(files), str(files))


def alpha_for(scaling: float, rank: int) -> float:
    """Returns alpha with alpha / rank == scaling, bit for bit (or, if no float does, to the last bit of a float32)."""
    guess = scaling * rank
    for alpha in (guess, math.nextafter(guess, math.inf), math.nextafter(guess, 0.0)):
        if alpha / rank == scaling:
            return alpha
    return guess


def our_adapters(model: Any) -> list[str]:
    """Returns the names of the adapters of `model` that have a BaLoraConfig; none for a model without adapters."""
    configs = getattr(model, "peft_config", None) or {}
    return [name for name, config in configs.items() if isinstance(config, BaLoraConfig)]


def active_config(model: nn.Module | None) -> Any:
    """Returns the config of a model's active adapter; of several a BA-LoRA one, else the first. None without any."""
    if not isinstance(model, PeftModel) or not model.active_adapters:
        return None
    active = [model.peft_config.get(name) for name in model.active_adapters]
    return next((config for config in active if isinstance(config, BaLoraConfig)), active[0])
