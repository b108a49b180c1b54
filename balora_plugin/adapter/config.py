"""BaLoraConfig: a LoraConfig that carries the regularisers and starts as PiSSA in delta form."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import peft
from peft import LoraConfig
from torch import nn

from ..checkpoint.integrity import is_finished
from ..checkpoint.location import AdapterFiles
from ..checkpoint.names import SETTINGS_FILE
from ..checkpoint.settings import read_settings, write_settings
from ..config import RegularizerConfig, as_regularizers
from ..settings import as_path
from ..teacher.files import HEADER

logger = logging.getLogger(__name__)

DELTA_STARTS = ("pissa", "pissa_fast")

_REFUSAL = (
    "BaLoraConfig was given to PEFT's own get_peft_model (or a stock trainer), which would change the base weights. "
    "Use balora_plugin.get_ba_lora_model(model, config), or a BA-LoRA trainer (BaLoraSFTTrainer, BaLoraTrainer) with "
    "peft_config=config."
)


class Neutral(NamedTuple):
    """The value at which a LoRA option does nothing, why BA-LoRA takes no other, and what to write instead."""

    value: Any
    reason: str
    remedy: str


_ITS_START = "it is another start of the factors, and BA-LoRA's is the SVD of the weight"
_WRITE_START = "remove it, with init_lora_weights='pissa' or 'pissa_fast' (or True, for the ordinary LoRA start)"

# LoRA options that replace the function or the teacher
NEUTRAL_OPTIONS: dict[str, Neutral] = {
    "use_dora": Neutral(
        False,
        "DoRA rescales the adapted weight by trained magnitudes, which the delta form has no place for",
        "remove it (a larger r adds capacity)",
    ),
    "lora_bias": Neutral(
        False,
        "a trained bias beside the factors is no part of the update that is saved",
        "remove it; modules_to_save=[...] trains a whole module with its bias",
    ),
    "bias": Neutral(
        "none",
        "it trains the base's own biases, which the teacher shares: the pre-trained model would be gone",
        "write bias='none'; modules_to_save=[...] trains a copy of a whole module, and the teacher keeps the first",
    ),
    "layer_replication": Neutral(
        None,
        "it builds another model out of the base's layers, so the teacher is not the pre-trained one",
        "remove it, or load a base that already has those layers",
    ),
    "trainable_token_indices": Neutral(
        None,
        "it trains rows of the embedding in place, and a head that is tied to it, where the terms read the pre-trained",
        "remove it and write modules_to_save=['embed_tokens'] (and 'lm_head', where they are to be predicted), "
        "whose first copies the teacher keeps",
    ),
    "megatron_config": Neutral(
        None,
        "Megatron's parallel layers are not the linear layers that BA-LoRA factorises",
        "remove it and split the model with FSDP or DeepSpeed",
    ),
    "alora_invocation_tokens": Neutral(
        None,
        "an activated LoRA acts behind its invocation tokens alone, and the terms compare whole sequences",
        "remove it",
    ),
    "use_qalora": Neutral(
        False,
        "QALoRA pools a layer's inputs, which is another function than the saved B A",
        "remove it and load the base with a BitsAndBytesConfig",
    ),
    "use_bdlora": Neutral(
        None,
        "block-diagonal factors are not those of an SVD of the whole weight",
        "remove it (a smaller r makes smaller factors)",
    ),
    "arrow_config": Neutral(
        None,
        "Arrow routes among adapters that are trained already, so there is none to train",
        "train with BA-LoRA first, and give what it saved, a plain LoRA, to Arrow",
    ),
    "velora_config": Neutral(
        None,
        "VeLoRA compresses what the backward pass reads, so gradients are not those of the terms",
        "remove it and set gradient_checkpointing=True where memory is short",
    ),
    "monteclora_config": Neutral(
        None,
        "MonteCLoRA adds noise to the factors, so that student and teacher differ before the first step",
        "remove it",
    ),
    "kasa_config": Neutral(
        None,
        "KaSA truncates the base's weights and trains singular values, so the base is not the teacher",
        "remove it",
    ),
    "eva_config": Neutral(None, _ITS_START, _WRITE_START),
    "corda_config": Neutral(None, _ITS_START, _WRITE_START),
    "lora_ga_config": Neutral(None, _ITS_START, _WRITE_START),
    "ensure_weight_tying": Neutral(
        False,
        "it makes the head a tied copy of trained embeddings, and the terms read student's and teacher's head apart",
        "remove it and write modules_to_save=['embed_tokens', 'lm_head'], which trains both as copies of their own",
    ),
}

_REWRITES = "it rewrites the base's weights, which are the teacher's: write 'pissa', the like in delta form"
_DATA = "it needs a pass over data before training: write 'pissa', which starts from the weights"
# other values of init_lora_weights that PEFT takes: why not, and what instead
OTHER_STARTS: dict[str, str] = {
    "gaussian": "it is the ordinary start with other random numbers: write True",
    "orthogonal": "its two factors do not begin at a zero update: write True (ordinary LoRA), or 'pissa'",
    "olora": _REWRITES,
    "corda": f"{_REWRITES}; {_DATA}",
    "lora_ga": f"{_REWRITES}; {_DATA}",
    "eva": _DATA,
    "loftq": "it replaces the base by a quantised one: load the base with a BitsAndBytesConfig, write 'pissa', and "
    "name the full-precision model in start_from",
}


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


@dataclass
class BaLoraConfig(LoraConfig):
    """A [`peft.LoraConfig`] for BA-LoRA; every LoRA field means what it means there.

    Args:
        regularizers: The three terms, see [`RegularizerConfig`]; a dict of its fields works too.
        compile: Compile teacher, student and terms with the backend `ba_lora` (not beside the trainer's torch_compile):
            True: one graph each; "layers": each kind of decoder layer once.
        init_lora_weights: `"pissa"` (default: exact SVD), `"pissa_fast"` (randomised SVD, fixed seed; PEFT's
            `"pissa_niter_N"` means this one), both in delta form, so that the base weights stay as they are; `True`:
            the ordinary LoRA start with the regularisers; `False`: random factors, for tests.
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
                "and B0: write init_lora_weights='pissa' or 'pissa_fast', or leave start_from out."
            )
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r={self.r!r} must be a whole number >= 1.")
        if self.delta:
            self.init_lora_weights = _DeltaStart(self.init_lora_weights)
        self._register_custom_module({nn.Module: _refuse_stock_injection})

    def _take_iterations(self) -> None:
        """`pissa_niter_N` of PEFT's is a randomised SVD too."""
        if isinstance(self.init_lora_weights, str) and re.fullmatch(r"pissa_niter_\d+", self.init_lora_weights):
            _say_once(
                f"init_lora_weights={self.init_lora_weights!r} is 'pissa_fast' here, whose iterations are fixed: "
                "write that."
            )
            self.init_lora_weights = "pissa_fast"

    def _check_neutral(self) -> None:
        """Refuses a start, or a LoRA option, that replaces the function or the teacher."""
        start = self.init_lora_weights
        if start not in (*DELTA_STARTS, True, False):
            why = OTHER_STARTS.get(str(start).lower())
            raise ValueError(
                f"init_lora_weights={start!r} is not a BA-LoRA start: "
                + (
                    f"{why}."
                    if why
                    else "write 'pissa', 'pissa_fast' (faster, same step-0 model), True (ordinary LoRA) or False "
                    "(random, for tests)."
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
        return LoraConfig(**{**values, **changes})

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
            for key, value in self.to_dict().items()
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
        return config

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes what a saved adapter carries: the *stock* config (rank 2r in delta form) and `ba_lora.json`.

        Not over a finished adapter, whose weights these would not describe: Axolotl saves a config before the first
        step, and a run that then fails must leave the adapter of the run before it as it was.
        """
        if is_finished(str(save_directory)):
            logger.warning(
                f"{save_directory} holds the adapter of an earlier run: it stays until the new one is saved over it."
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
