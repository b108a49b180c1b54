"""The PeftModel subclasses: saving and loading in format version 1, several adapters."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.peft_model import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from torch import nn

from ..checkpoint.integrity import check_adapter
from ..checkpoint.names import SETTINGS_FILE
from ..checkpoint.placing import withdraw
from ..pretrained.classifier_head import with_head
from ..pretrained.quantised import protect_weights
from .config import BaLoraConfig
from .delta import FROZEN, attach_delta, fill_empty, is_delta
from .peft_releases import add_stock_adapter, check_peft_version
from .saved import card
from .saved.fit import check_stock_fits
from .saved.reading import LoadOptions, SavedAdapter, check_same_base, load_delta, restore_teacher_head
from .saved.stock import stock_config, to_stock_state_dict
from .saved.writing import check_finite, write_side_files
from .start.full_precision import full_precision_of
from .start.layers import start_layers
from .target_names import check_names
from .targets import check_targets, expert_dropout_explained, fill_targets, injected_config, injected_layers
from .towers import leave_towers_out
from .unasked import say_unasked_terms

if TYPE_CHECKING:  # a mixin for type checkers too: its methods call PeftModel's
    from peft import PeftModel as _Base
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
        layers = injected_layers(self, adapter_name)
        check_targets(self.get_base_model(), layers, config.custom_modules.values())
        for key in _RESOLVED:
            setattr(config, key, getattr(stock, key))
        with_head(config, self.get_base_model())
        if config.delta:
            for _, layer in layers:
                attach_delta(layer, adapter_name)
        self.peft_config[adapter_name] = config
        if config.delta and start:
            source = full_precision_of(config, self.get_base_model(), layers)
            method = str(config.init_lora_weights)
            start_layers(layers, adapter_name, method=method, read=None if source is None else source.read)

    def train(self, mode: bool = True) -> Any:
        """Sets the mode as PyTorch does, and says once if the model trains where nothing asks for its terms."""
        if mode:
            say_unasked_terms(self)
        return super().train(mode)

    # --- saving

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
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
            FloatingPointError: a tensor of an adapter holds NaN or inf: nothing is written.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False is not supported: BA-LoRA adapters are safetensors only.")
        if path_initial_model_for_weight_conversion is not None:
            raise ValueError(
                "path_initial_model_for_weight_conversion is not needed: BA-LoRA already saves a plain LoRA for the "
                "original base. Remove it."
            )
        save_directory = os.fspath(save_directory)
        state_dict = kwargs.pop("state_dict", None)
        if state_dict is None:
            state_dict = self.state_dict()
        configs = self.peft_config
        if not is_main_process:  # nothing is written here, and a gathered dict may be empty
            super().save_pretrained(
                save_directory, selected_adapters=selected_adapters, is_main_process=False, state_dict=state_dict
            )
            return
        names = list(configs) if selected_adapters is None else selected_adapters
        check_finite(names, state_dict)  # before the first of them is written
        for name in names:
            config = configs.get(name)
            ours = isinstance(config, BaLoraConfig)
            rewritten = state_dict
            if ours and config.delta:
                rewritten = to_stock_state_dict(self, name, state_dict)
            directory = save_directory if name == "default" else f"{save_directory}/{name}"
            if ours:
                configs[name] = stock_config(config, self, name)
                withdraw(directory)  # an earlier one's settings beside these factors would be a third function
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
                write_side_files(directory, self, name, state_dict)
        card.update(save_directory, self)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Writes PEFT's card with our section in it; hosts that write a card of their own call it after that."""
        output_dir = os.fspath(output_dir)
        tags = card.tags_of(output_dir)
        super().create_or_update_model_card(output_dir)
        card.add_tags(output_dir, tags)
        card.update(output_dir, self)

    # --- loading

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """Loads a saved BA-LoRA adapter onto its base, in delta form, ready to go on training.

        Unmodified `PeftModel.from_pretrained` loads the same directory as a plain rank-2r LoRA. A `config` that is
        given is taken instead of the directory's, with its regularisers, dropout and base_model_name_or_path.

        Raises:
            ValueError: the directory is not a BA-LoRA adapter, was saved for other modules, or for another rank or
                scaling than `config` has.
        """
        chosen = SavedAdapter.open(model_id, kwargs).config_or(config)
        chosen.inference_mode = not is_trainable
        peft_model = build(
            model,
            chosen,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            start=False,
        )
        if config is not None and config.base_model_name_or_path is not None:
            peft_model.peft_config[adapter_name].base_model_name_or_path = config.base_model_name_or_path
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
        model_id: str | os.PathLike[str],
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
        model_id = os.fspath(model_id)
        saved = SavedAdapter.open(model_id, kwargs)
        existing = self.peft_config.get(adapter_name)
        delta = isinstance(existing, BaLoraConfig) and existing.delta
        if not saved.delta:
            if delta:
                raise ValueError(
                    f"{model_id!r} is not a BA-LoRA adapter in delta form ({SETTINGS_FILE} "
                    f"{'is missing' if saved.settings is None else 'says so'}), but adapter {adapter_name!r} here is: "
                    "load it under another adapter_name, or with peft.PeftModel.from_pretrained."
                )
            if saved.settings is not None:  # ours, as an ordinary LoRA
                check_adapter(saved.settings, saved.files)
            if isinstance(existing, BaLoraConfig):
                check_stock_fits(self, adapter_name, saved.files)
            if is_trainable:
                check_same_base(self, saved)
            result = super().load_adapter(
                model_id,
                adapter_name,
                is_trainable=is_trainable,
                torch_device=torch_device,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                **kwargs,
            )
        else:
            if existing is None:
                config = BaLoraConfig.from_settings(saved.settings, str(saved.files))
                config.inference_mode = not is_trainable
                self._add_ba_lora(adapter_name, config, start=False, autocast_adapter_dtype=autocast_adapter_dtype)
            elif not delta:
                raise ValueError(
                    f"adapter {adapter_name!r} of this model is not in delta form, but {model_id!r} is: load "
                    "it under another adapter_name."
                )
            options = LoadOptions(is_trainable, torch_device, autocast_adapter_dtype, low_cpu_mem_usage)
            result = load_delta(self, adapter_name, saved, options)
            if not is_trainable:
                self.eval()
        if is_trainable:
            restore_teacher_head(self, saved)
        return result

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
        if start:
            check_names(config, self.get_base_model())
        fill_targets(config, self.get_base_model())
        if start:
            leave_towers_out(config, self.get_base_model())
        with expert_dropout_explained(config):
            stock = injected_config(config)
            add_stock_adapter(super().add_adapter, self, adapter_name, stock, autocast=autocast_adapter_dtype)
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
        """Refuses to combine adapters: PEFT would combine dA and dB, which are not the update."""
        raise NotImplementedError(
            "add_weighted_adapter would combine the wrong factors of a BA-LoRA adapter: save the adapters and combine "
            "them in a plain PeftModel, where they are ordinary LoRAs."
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Returns False for delta form: what it saves already is a LoRA."""
        config = self.peft_config[adapter_name]
        if isinstance(config, BaLoraConfig) and config.delta:
            return False
        return super().supports_lora_conversion(adapter_name)


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


def build(
    model: nn.Module,
    config: BaLoraConfig,
    adapter_name: str,
    *,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    start: bool,
) -> PeftModel:
    """Injects a stock adapter, then gives the model our class, then puts the layers in delta form.

    `start=False`: the factors come from a file, and with low_cpu_mem_usage they are on the meta device until then.
    """
    check_peft_version()
    config = copy.deepcopy(config)
    if start:
        check_names(config, model)
    fill_targets(config, model)
    if start:  # an adapter from a file says by itself what it stands on
        leave_towers_out(config, model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    stock = injected_config(config)
    if not start:
        stock.base_model_name_or_path = None  # PEFT would warn of a base that has moved
    with expert_dropout_explained(config):
        peft_model = get_peft_model(
            model,
            stock,
            adapter_name=adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
    peft_model.__class__ = CLASSES[type(peft_model)]
    try:
        if start and low_cpu_mem_usage:
            fill_empty(peft_model, adapter_name, stock.init_lora_weights, autocast=autocast_adapter_dtype)
        peft_model._adopt(config, adapter_name, start=start)
    except Exception:
        base = peft_model.unload()  # leave the caller's model as it was
        for name, p in base.named_parameters():
            p.requires_grad_(name in trainable)
        raise
    return peft_model
