"""The PeftModel subclasses: saving and loading in format version 1, several adapters."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.peft_model import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import nn

from .. import card, checkpoint, provenance, whole
from ..nlu.heads import HEAD_FILE, read_head, with_head
from ..probe import PROBE_FILE, Probe, read_probe
from ..quantised import is_quantised_linear, protect_weights
from .config import BaLoraConfig
from .delta import FROZEN, attach_delta, is_delta, is_supported_layer
from .starts import start_layers

if TYPE_CHECKING:  # a mixin for type checkers too: its methods call PeftModel's
    from peft import PeftModel as _Base

    from .source import FullPrecisionWeights
else:
    _Base = object


# what PEFT resolves or rewrites in its config during injection (all-linear, Conv1D, fused experts)
_RESOLVED = (
    "target_modules",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)


class BaLoraModelMixin(_Base):
    """What a BA-LoRA model does differently from a PeftModel: saving, loading, adding and deleting adapters."""

    def _adopt(self, config: BaLoraConfig, adapter_name: str, *, start: bool) -> None:
        """Checks the injected layers, replaces the stock config by ours, and puts the layers in delta form."""
        protect_weights(self.get_base_model())
        stock: LoraConfig = self.peft_config[adapter_name]
        layers = self._injected(adapter_name)
        self._check_targets(layers)
        for key in _RESOLVED:
            setattr(config, key, getattr(stock, key))
        with_head(config, self.get_base_model())
        if config.delta:
            for _, layer in layers:
                attach_delta(layer, adapter_name)
        self.peft_config[adapter_name] = config
        if config.delta and start:
            source = self._full_precision(config, layers)
            fast = config.init_lora_weights == "pissa_fast"
            start_layers(layers, adapter_name, fast=fast, read=None if source is None else source.read)

    def _full_precision(self, config: BaLoraConfig, layers: list[tuple[str, LoraLayer]]) -> FullPrecisionWeights | None:
        """Where A0 and B0 come from, if not from the base's own weights."""
        if config.start_from is None:
            return None
        quantised = {name: base for name, layer in layers if is_quantised_linear(base := layer.get_base_layer())}
        if not quantised:
            raise ValueError(
                f"start_from={config.start_from!r}, but no targeted layer is quantised: the base's own weights are the "
                "full-precision ones. Leave start_from out, or load the base with a BitsAndBytesConfig."
            )
        from .source import FullPrecisionWeights

        return FullPrecisionWeights(config.start_from, self.get_base_model(), quantised)

    def _injected(self, adapter_name: str) -> list[tuple[str, LoraLayer]]:
        return [
            (name.removeprefix("base_model.model."), layer)
            for name, layer in self.named_modules()
            if isinstance(layer, LoraLayer) and (adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A)
        ]

    def _check_targets(self, layers: list[tuple[str, LoraLayer]]) -> None:
        base = self.get_base_model()
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        for name, layer in layers:
            if layer is head or layer.get_base_layer() is head:
                raise ValueError(
                    f"target_modules matches the LM head {name!r}: the terms read its weight directly and would "
                    "ignore an adapter. Remove it from target_modules (or write 'all-linear', which leaves it out)."
                )
            if not is_supported_layer(layer):
                raise ValueError(
                    f"target_modules matches {name!r}, a {type(layer.get_base_layer()).__name__}: BA-LoRA adapts "
                    "nn.Linear, Conv1D, bitsandbytes linear layers and fused experts. Remove it from target_modules."
                )

    # --- saving

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes each adapter as a stock LoRA (rank 2r in delta form) for the original base, plus our side files.

        Raises:
            ValueError: safe_serialization=False, a conversion path (nothing is left to convert), or a state dict that
                lacks the adapter's tensors.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False is not supported: BA-LoRA adapters are safetensors only.")
        if path_initial_model_for_weight_conversion is not None:
            raise ValueError(
                "path_initial_model_for_weight_conversion is not needed: BA-LoRA already saves a plain LoRA for the "
                "original base. Remove it."
            )
        state_dict = kwargs.pop("state_dict", None)
        if state_dict is None:
            state_dict = self.state_dict()
        configs = self.peft_config
        if not is_main_process:  # nothing is written here, and a gathered dict may be empty
            super().save_pretrained(
                save_directory, selected_adapters=selected_adapters, is_main_process=False, state_dict=state_dict
            )
            return
        for name in list(configs) if selected_adapters is None else selected_adapters:
            config = configs.get(name)
            ours = isinstance(config, BaLoraConfig)
            rewritten = state_dict
            if ours and config.delta:
                rewritten = checkpoint.to_stock_state_dict(self, name, state_dict)
            if ours:
                configs[name] = checkpoint.stock_config(config, self, name)
            try:
                super().save_pretrained(
                    save_directory,
                    selected_adapters=[name],
                    save_embedding_layers=save_embedding_layers,
                    state_dict=rewritten,
                    **kwargs,
                )
            finally:
                if config is not None:
                    configs[name] = config
            if ours:
                directory = str(save_directory) if name == "default" else f"{save_directory}/{name}"
                checkpoint.write_side_files(directory, self, name, state_dict)
        card.update(str(save_directory), self)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """PEFT's card, with our section in it: also what a host calls after it has written a card of its own."""
        tags = card.tags_of(output_dir)
        super().create_or_update_model_card(output_dir)
        card.add_tags(output_dir, tags)
        card.update(output_dir, self)

    # --- loading

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """Loads a saved BA-LoRA adapter onto its base, in delta form, ready to go on training.

        Unmodified `PeftModel.from_pretrained` loads the same directory as a plain rank-2r LoRA.

        Raises:
            ValueError: the directory is not a BA-LoRA adapter, or was saved for other modules.
        """
        hub = _hub_arguments(kwargs)
        if config is None:
            config = checkpoint.read_config(str(model_id), **hub)
        if not isinstance(config, BaLoraConfig):
            raise TypeError(f"config must be a BaLoraConfig, got {type(config).__name__}.")
        config.inference_mode = not is_trainable
        from .build import build

        peft_model = build(
            model,
            config,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            start=False,
        )
        peft_model.load_adapter(
            model_id,
            adapter_name,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            **kwargs,
        )
        return peft_model

    def load_adapter(
        self,
        model_id: str,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads an adapter by name; into an existing BA-LoRA adapter the four factors are restored bit for bit.

        Also the path of `resume_from_checkpoint` and `load_best_model_at_end`: A0 and B0 come from the checkpoint, they
        are never recomputed.
        """
        hub = _hub_arguments(kwargs)
        settings = checkpoint.read_settings(str(model_id), **hub)
        existing = self.peft_config.get(adapter_name)
        delta = isinstance(existing, BaLoraConfig) and existing.delta
        if settings is None or not settings["delta_form"]:
            if delta:
                raise ValueError(
                    f"{model_id!r} is not a BA-LoRA adapter in delta form ({checkpoint.SETTINGS_FILE} "
                    f"{'is missing' if settings is None else 'says so'}), but adapter {adapter_name!r} here is: "
                    "load it under another adapter_name, or with peft.PeftModel.from_pretrained."
                )
            if settings is not None:  # ours, as an ordinary LoRA
                whole.check_adapter(settings, str(model_id), **hub)
            if is_trainable:
                self._check_base(settings, str(model_id), hub)
            result = super().load_adapter(
                model_id,
                adapter_name,
                is_trainable=is_trainable,
                torch_device=torch_device,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                **kwargs,
            )
            if is_trainable:
                self._restore_head(settings, str(model_id), hub)
            return result
        if existing is None:
            config = checkpoint.read_config(str(model_id), **hub)
            config.inference_mode = not is_trainable
            self._add_ba_lora(adapter_name, config, start=False, autocast_adapter_dtype=autocast_adapter_dtype)
        elif not delta:
            raise ValueError(
                f"adapter {adapter_name!r} of this model is not in delta form, but {model_id!r} is: load "
                "it under another adapter_name."
            )
        checkpoint.check_settings(settings, self.peft_config[adapter_name], str(model_id))
        whole.check_adapter(settings, str(model_id), **hub)
        if is_trainable:
            self._check_base(settings, str(model_id), hub)
        init_path = checkpoint.find_file(str(model_id), checkpoint.INIT_FILE, **hub)
        if init_path is None:
            raise ValueError(
                f"{model_id!r} lacks {checkpoint.INIT_FILE}: without A0 training cannot go on. For inference load it "
                "with peft.PeftModel.from_pretrained."
            )
        weights = load_peft_weights(str(model_id), device=torch_device or "cpu", **hub)
        split, factors = checkpoint.read_factors(self, adapter_name, weights, init_path)
        result = set_peft_model_state_dict(self, split, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        # an existing adapter keeps the dtype that a host gave it (TRL: bfloat16 over quantised bases), or a resumed run
        # would go on in another one; with low_cpu_mem_usage the file's dtype came with its tensors
        if low_cpu_mem_usage:
            self.base_model._cast_adapter_dtype(
                adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
            )
        checkpoint.copy_factors(self, adapter_name, factors)
        if os.path.isdir(str(model_id)):
            checkpoint.init_files(self)[adapter_name] = init_path
        result.missing_keys.clear()  # base weights; read_factors has checked the adapter's own
        if not is_trainable:
            self.eval()
        else:
            self._restore_head(settings, str(model_id), hub)
        return result

    def _restore_head(self, settings: dict[str, Any] | None, model_id: str, hub: dict[str, Any]) -> None:
        """A classifier's teacher gets the head that the run began with: this model's own is a new random one."""
        if settings is not None and HEAD_FILE in settings["sha256"]:
            path = checkpoint.find_file(model_id, HEAD_FILE, **hub)
            assert path is not None  # whole.check_adapter
            read_head(path, self.get_base_model())

    def _check_base(self, settings: dict[str, Any] | None, model_id: str, hub: dict[str, Any]) -> None:
        """Training goes on only on the base that the adapter was trained on."""

        def stored_probe() -> Probe | None:
            assert settings is not None
            path = checkpoint.find_file(model_id, PROBE_FILE, **hub) if PROBE_FILE in settings["sha256"] else None
            return None if path is None else read_probe(path)

        if settings is not None:
            provenance.check_base(self, settings, model_id, stored_probe)

    # --- several adapters

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """Adds another adapter: a BaLoraConfig in delta form, anything else as PEFT does."""
        if isinstance(peft_config, BaLoraConfig):
            self._add_ba_lora(adapter_name, peft_config, *args, start=True, **kwargs)
        else:
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def _add_ba_lora(
        self,
        adapter_name: str,
        config: BaLoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        start: bool,
    ) -> None:
        config = copy.deepcopy(config)
        with_head(config, self.get_base_model())
        stock = config.to_lora_config(init_lora_weights=False if config.delta else config.init_lora_weights)
        super().add_adapter(adapter_name, stock, autocast_adapter_dtype=autocast_adapter_dtype)
        try:
            self._adopt(config, adapter_name, start=start)
        except Exception:
            self.delete_adapter(adapter_name)
            raise

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter with its frozen factors."""
        for layer in self.modules():
            if is_delta(layer, adapter_name):
                for name in FROZEN:
                    del getattr(layer, name)[adapter_name]
        super().delete_adapter(adapter_name)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: PEFT would combine dA and dB, which are not the update."""
        raise NotImplementedError(
            "add_weighted_adapter would combine the wrong factors of a BA-LoRA adapter: save the adapters and combine "
            "them in a plain PeftModel, where they are ordinary LoRAs."
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False for delta form: what it saves already is a LoRA."""
        config = self.peft_config[adapter_name]
        if isinstance(config, BaLoraConfig) and config.delta:
            return False
        return super().supports_lora_conversion(adapter_name)


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {
        key: kwargs[key]
        for key in ("subfolder", "revision", "cache_dir", "token", "local_files_only")
        if kwargs.get(key) is not None
    }


class BaLoraModel(BaLoraModelMixin, PeftModel):
    """[`peft.PeftModel`] with BA-LoRA's saving and loading."""


class BaLoraModelForCausalLM(BaLoraModelMixin, PeftModelForCausalLM):
    """The causal-LM variant."""


class BaLoraModelForSequenceClassification(BaLoraModelMixin, PeftModelForSequenceClassification):
    """The sequence-classification variant."""


class BaLoraModelForSeq2SeqLM(BaLoraModelMixin, PeftModelForSeq2SeqLM):
    """The sequence-to-sequence variant."""


class BaLoraModelForTokenClassification(BaLoraModelMixin, PeftModelForTokenClassification):
    """The token-classification variant."""


class BaLoraModelForQuestionAnswering(BaLoraModelMixin, PeftModelForQuestionAnswering):
    """The question-answering variant."""


class BaLoraModelForFeatureExtraction(BaLoraModelMixin, PeftModelForFeatureExtraction):
    """The feature-extraction variant."""


# static classes, so that isinstance, deepcopy and pickle hold
CLASSES: dict[type[PeftModel], type[PeftModel]] = {
    PeftModel: BaLoraModel,
    PeftModelForCausalLM: BaLoraModelForCausalLM,
    PeftModelForSequenceClassification: BaLoraModelForSequenceClassification,
    PeftModelForSeq2SeqLM: BaLoraModelForSeq2SeqLM,
    PeftModelForTokenClassification: BaLoraModelForTokenClassification,
    PeftModelForQuestionAnswering: BaLoraModelForQuestionAnswering,
    PeftModelForFeatureExtraction: BaLoraModelForFeatureExtraction,
}
