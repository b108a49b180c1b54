"""BaLoraConfig: a LoraConfig that carries the regularisers and starts as PiSSA in delta form."""

from __future__ import annotations

import copy
import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from torch import nn

from ..config import RegularizerConfig, as_path

logger = logging.getLogger(__name__)

DELTA_STARTS = ("pissa", "pissa_fast")

_REFUSAL = (
    "BaLoraConfig was given to PEFT's own get_peft_model (or a stock trainer), which would change the base weights. "
    "Use balora_plugin.get_ba_lora_model(model, config), or a BA-LoRA trainer (BaLoraSFTTrainer, BaLoraTrainer) with "
    "peft_config=config."
)

# LoRA options that replace the function or the teacher; name -> what its neutral value is
NEUTRAL_OPTIONS: dict[str, Any] = {
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "layer_replication": None,
    "trainable_token_indices": None,
    "megatron_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "kasa_config": None,
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "ensure_weight_tying": False,
}


class _DeltaStart(str):
    """The name of a start that only BA-LoRA builds: PEFT asks `startswith("pissa")` before it rewrites the base."""

    def startswith(self, *args: Any) -> bool:
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
        init_lora_weights: `"pissa"` (default: exact SVD), `"pissa_fast"` (randomised SVD, fixed seed), both in delta
            form, so that the base weights stay as they are; `True`: the ordinary LoRA start with the regularisers;
            `False`: random factors, for tests.
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
    start_from: str | None = field(
        default=None, metadata={"help": "The full-precision model that a quantised base takes A0 and B0 from."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = str(self.init_lora_weights)
        super().__post_init__()
        if isinstance(self.regularizers, dict):
            self.regularizers = RegularizerConfig.from_dict(self.regularizers)
        elif not isinstance(self.regularizers, RegularizerConfig):
            raise TypeError(f"regularizers={self.regularizers!r} must be a RegularizerConfig or a dict of its fields.")
        if self.init_lora_weights not in (*DELTA_STARTS, True, False):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} is not a BA-LoRA start: write 'pissa', 'pissa_fast' "
                "(faster, same step-0 model), True (ordinary LoRA) or False (random, for tests)."
            )
        for key, neutral in NEUTRAL_OPTIONS.items():
            if getattr(self, key, neutral) not in (neutral, None, False):
                raise ValueError(f"{key}={getattr(self, key)!r} does not work with BA-LoRA: leave it at {neutral!r}.")
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

    @property
    def delta(self) -> bool:
        """True for the starts in delta form (frozen A0, B0 beside the trained dA, dB)."""
        return self.init_lora_weights in DELTA_STARTS

    @property
    def family(self) -> str:
        """Which terms a model with this adapter is trained with: "nlu" for classifiers, else "nlg"."""
        if self.regularizers.task != "auto":
            return self.regularizers.task
        return "nlu" if getattr(self.task_type, "value", self.task_type) == "SEQ_CLS" else "nlg"

    def to_lora_config(self, **changes: Any) -> LoraConfig:
        """The LoRA fields alone, as a stock LoraConfig with `changes` applied."""
        values = {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(LoraConfig) if f.init}
        return LoraConfig(**{**values, **changes})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes what a saved adapter carries: the *stock* config (rank 2r in delta form) and `ba_lora.json`.

        Not over a finished adapter, whose weights these would not describe: Axolotl saves a config before the first
        step, and a run that then fails must leave the adapter of the run before it as it was.
        """
        from .. import checkpoint, whole

        if whole.is_finished(str(save_directory)):
            logger.warning(
                f"{save_directory} holds the adapter of an earlier run: it stays until the new one is saved over it."
            )
            return
        checkpoint.stock_config(self).save_pretrained(str(save_directory), **kwargs)
        checkpoint.write_settings(str(save_directory), self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> BaLoraConfig:
        """Reads the settings a BA-LoRA adapter was saved with.

        Raises:
            ValueError: if the directory holds no `ba_lora.json` (a plain LoRA: use `LoraConfig.from_pretrained`).
        """
        from .. import checkpoint

        return checkpoint.read_config(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)


def our_adapters(model: Any) -> list[str]:
    """Names of the adapters of `model` that have a BaLoraConfig; none for a model without adapters."""
    configs = getattr(model, "peft_config", None) or {}
    return [name for name, config in configs.items() if isinstance(config, BaLoraConfig)]
