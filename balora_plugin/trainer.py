"""BaLoraTrainerMixin: BA-LoRA's loss, logging and teacher for any transformers Trainer subclass."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import logging

from .adapter.config import BaLoraConfig
from .config import RegularizerConfig
from .head import FactorCache, check_head, read_head
from .objective import StepOutput, StepRequest, install
from .schedules import Lambdas, lambdas_at
from .teacher import quantised_layers_stay_in_training_mode

logger = logging.get_logger(__name__)

if TYPE_CHECKING:  # a mixin for type checkers too: its methods call the Trainer's
    from transformers import Trainer as _Base
else:
    _Base = object

NEGLIGIBLE_SHARE = 1e-3
TERMS = ("consistency", "diversity", "svd")
# starts that rewrite the base weights: switching such an adapter off gives a residual model, not the pre-trained one
_MUTATING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class BaLoraTrainerMixin(_Base):
    """Adds the BA-LoRA objective to a transformers Trainer: `class MyTrainer(BaLoraTrainerMixin, Trainer)`.

    Active if the model carries a BaLoraConfig adapter or `regularizers` is given; otherwise the trainer is untouched.
    Token terms are summed over counted tokens and divided by `num_items_in_batch`, so their gradients do not depend on
    how a global batch is cut; the spectral term is taken per micro-batch and averaged.

    Args (beside the Trainer's own):
        regularizers: RegularizerConfig for any PEFT adapter (teacher: adapter off) or full fine-tuning (teacher:
            `teacher_model`). Overrides the adapter config's.
        teacher_model: An explicit second model as teacher, in eval mode. Not needed with an adapter.

    Logs `balora/task`, `balora/consistency`, `balora/diversity`, `balora/svd` (unweighted means), `balora/loss`
    (weighted total) and `balora/share_*`, with the `eval_` prefix in evaluation. `eval_loss` is the task loss alone.
    """

    def __init__(
        self,
        *args: Any,
        regularizers: RegularizerConfig | None = None,
        teacher_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self.ba_lora: RegularizerConfig | None = None
        super().__init__(*args, **kwargs)
        self._set_up_ba_lora(regularizers, teacher_model)

    # --- set-up

    def _set_up_ba_lora(self, regularizers: RegularizerConfig | None, teacher_model: nn.Module | None) -> None:
        model = self.model
        adapter = _active_config(model)
        if regularizers is None and isinstance(adapter, BaLoraConfig):
            regularizers = adapter.regularizers
        if regularizers is None:
            if teacher_model is not None:
                raise ValueError("teacher_model is given, but no terms: pass regularizers=RegularizerConfig(...) too.")
            return
        if not isinstance(regularizers, RegularizerConfig):
            raise TypeError(f"regularizers must be a RegularizerConfig, got {type(regularizers).__name__}.")
        check_arguments(self.args)
        if getattr(self, "compute_loss_func", None) is not None:
            raise ValueError("compute_loss_func does not work with BA-LoRA, whose loss it would replace: remove it.")
        causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
        config = regularizers.resolved(_task_of(causal_lm, regularizers))
        if config.lambda_consistency:
            _check_teacher(model, adapter, teacher_model)
        _check_model(causal_lm, config)
        check_head(causal_lm)
        install(causal_lm)
        if teacher_model is not None:
            teacher_model.requires_grad_(False).eval().to(self.args.device)
        self.ba_lora = config
        self.model_accepts_loss_kwargs = True  # the host then counts the tokens of the accumulated batch for us
        self._ba_lora_teacher = teacher_model
        self._ba_lora_factors = FactorCache()
        self._ba_lora_sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._ba_lora_position = (-1, -1)  # optimizer step, micro-batch within it
        self._ba_lora_wants_logits = False
        self._ba_lora_warned: set[str] = set()
        logger.info(f"BA-LoRA: {config}")

    def _ba_lora_warn(self, key: str, message: str) -> None:
        if key not in self._ba_lora_warned:
            self._ba_lora_warned.add(key)
            logger.warning(f"BA-LoRA: {message}")

    # --- loss

    def _ba_lora_request(self, training: bool) -> StepRequest:
        """The weights in force now: schedule by optimizer step, teacher by micro-batch."""
        config, state = self.ba_lora, self.state
        assert config is not None
        lambdas = lambdas_at(config, state.global_step / max(state.max_steps, 1))
        measure = False
        if training:
            step, micro = self._ba_lora_position
            micro = micro + 1 if step == state.global_step else 0
            self._ba_lora_position = (state.global_step, micro)
            interval = config.teacher_interval
            if interval > 1:
                # the same choice on every rank, and after a resume
                index = state.global_step * self.args.gradient_accumulation_steps + micro
                factor = interval if index % interval == 0 else 0
                lambdas = lambdas._replace(consistency=lambdas.consistency * factor)
            # not at step 0, where the consistency gradient is zero by construction
            every = config.share_interval
            measure = (
                bool(every)
                and micro == 0
                and (state.global_step == 1 or (state.global_step and state.global_step % every == 0))
            )
        return StepRequest(
            config=config,
            lambdas=lambdas,
            factors=self._ba_lora_factors,
            teacher=self._ba_lora_teacher,
            return_logits=self._ba_lora_wants_logits,
            measure_shares=measure,
            warn=self._ba_lora_warn,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The BA-LoRA loss of one micro-batch; in evaluation the task loss alone."""
        if self.ba_lora is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        training = bool(self.model.training)
        inputs = {key: value for key, value in inputs.items() if not key.startswith("_")}  # TRL's own notes to itself
        inputs = self._extend_inputs(inputs)
        request = self._ba_lora_request(training)
        out: StepOutput = model(**inputs, ba_lora=request)
        loss = self._combine(out, request.lambdas, training, num_items_in_batch)
        self._record_terms(out, request.lambdas, training)
        self._record_host_metrics(out, inputs, training)
        if not return_outputs:
            return loss
        return loss, CausalLMOutput(loss=loss, logits=out.logits)

    def _combine(
        self, out: StepOutput, lambdas: Lambdas, training: bool, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Sums to the host's loss. Token terms by the global batch's count, batch terms averaged over micro-batches."""
        assert out.loss is not None and out.task is not None and out.count is not None
        tokens = out.loss if training else out.task
        if num_items_in_batch is None:
            loss = tokens / out.count.clamp(min=1)
        else:
            loss = tokens / torch.as_tensor(num_items_in_batch, device=tokens.device).clamp(min=1)
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        batch_terms = torch.zeros_like(loss)
        if training and out.svd is not None:
            batch_terms = batch_terms + lambdas.svd * out.svd
        if out.aux_loss is not None:
            batch_terms = batch_terms + self._router_coefficient() * out.aux_loss.to(loss.device)
        if training and num_items_in_batch is not None:  # the host does not divide by accumulation steps then
            batch_terms = batch_terms / self.current_gradient_accumulation_steps
        return loss + batch_terms

    def _router_coefficient(self) -> float:
        config = self.model.config.get_text_config()
        return float(getattr(self, "router_aux_loss_coef", None) or getattr(config, "router_aux_loss_coef", 0.0) or 0.0)

    def _extend_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Hook for hosts: keywords their own compute_loss would add."""
        return inputs

    def _record_host_metrics(self, out: StepOutput, inputs: dict[str, Any], training: bool) -> None:
        """Hook for hosts: metrics their own compute_loss would keep."""

    # --- logging

    def _record_terms(self, out: StepOutput, lambdas: Lambdas, training: bool) -> None:
        """Adds to the sums behind the log keys; tensors stay on their device until the next log."""
        assert out.loss is not None and out.task is not None and out.count is not None
        values: dict[str, Tensor] = {"task": out.task, "count": out.count, "tokens": out.loss.detach()}
        if out.consistency is not None:
            values |= {"consistency": out.consistency, "consistency_count": out.count}
        if out.diversity is not None and lambdas.diversity:
            values |= {"diversity": out.diversity, "diversity_count": out.count}
        if out.svd is not None:
            one = torch.ones_like(out.svd)
            values |= {"svd": out.svd.detach(), "svd_count": one, "weighted_svd": lambdas.svd * out.svd.detach()}
        values["batches"] = torch.ones_like(out.loss)
        if out.shares is not None:
            for name, share in zip(TERMS, out.shares, strict=True):
                values[f"share_{name}"] = share
            values["share_count"] = torch.ones_like(out.loss)
        sums = self._ba_lora_sums["train" if training else "eval"]
        for key, value in values.items():
            value = value.detach().double()
            sums[key] = sums[key] + value if key in sums else value

    def _take_terms(self, mode: str) -> dict[str, float]:
        """The log keys since the last call, reduced over ranks; empties the sums."""
        sums, self._ba_lora_sums[mode] = self._ba_lora_sums[mode], {}
        if not sums:
            return {}
        # every rank walks the same keys, whether or not its own batches had a term
        keys = ["task", "count", "tokens", "batches", "weighted_svd", "share_count"]
        keys += [f"{name}{suffix}" for name in TERMS for suffix in ("", "_count")] + [f"share_{name}" for name in TERMS]
        zero = torch.zeros_like(sums["task"])
        packed = self.accelerator.reduce(torch.stack([sums.get(key, zero) for key in keys]), "sum")
        total = defaultdict(float, zip(keys, packed.tolist(), strict=True))
        count = max(total["count"], 1.0)
        logs = {"balora/task": total["task"] / count}
        for name in TERMS:
            if total[f"{name}_count"]:
                logs[f"balora/{name}"] = total[name] / total[f"{name}_count"]
        logs["balora/loss"] = total["tokens"] / count + total["weighted_svd"] / max(total["batches"], 1.0)
        if total["share_count"]:
            shares = {name: total[f"share_{name}"] / total["share_count"] for name in TERMS}
            logs |= {f"balora/share_{name}": value for name, value in shares.items()}
            self._warn_negligible(shares)
        return logs

    def _warn_negligible(self, shares: dict[str, float]) -> None:
        config = self.ba_lora
        weights = {name: getattr(config, f"lambda_{name}") for name in TERMS}
        # a schedule may hold a term back for now: its share is exactly 0 then
        small = {name: share for name, share in shares.items() if weights[name] and 0 < share < NEGLIGIBLE_SHARE}
        if small:
            listed = ", ".join(f"lambda_{name}={weights[name]:g} ({share:.0e})" for name, share in small.items())
            self._ba_lora_warn(
                "negligible",
                f"these terms carry less than {NEGLIGIBLE_SHARE:g} of the task's gradient and hardly act: {listed}. "
                "Raise them to see an effect, or set them to 0 to save their cost.",
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the training terms since the last training log."""
        if self.ba_lora is not None and not any(key.startswith(("eval", "test")) for key in logs):
            logs.update(self._take_terms("train"))
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Adds the terms over the whole evaluation set, token mean, under the host's metric prefix."""
        if self.ba_lora is None:
            return super().evaluation_loop(*args, **kwargs)
        self._ba_lora_sums["eval"] = {}
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix") or (args[4] if len(args) > 4 else "eval")
        output.metrics.update({f"{prefix}_{key}": value for key, value in self._take_terms("eval").items()})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As the host's; asks for logits only where a metric needs them."""
        if self.ba_lora is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        self._ba_lora_wants_logits = not prediction_loss_only
        try:
            with quantised_layers_stay_in_training_mode(self.model):
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        finally:
            self._ba_lora_wants_logits = False


def check_arguments(args: Any) -> None:
    """Training arguments that would replace or bypass the loss, refused by name.

    Raises:
        ValueError: names the argument, its value and what to write.
    """
    refused: list[tuple[str, Any, str]] = [
        ("label_smoothing_factor", 0.0, "the consistency term already softens the targets; set it to 0"),
        ("use_liger_kernel", False, "it replaces the forward that computes the terms; set it to False"),
        ("loss_type", ("nll", "chunked_nll"), "BA-LoRA's task loss is the cross-entropy; leave it at its default"),
    ]
    for key, allowed, remedy in refused:
        value = getattr(args, key, None)
        if value is None or value in (allowed if isinstance(allowed, tuple) else (allowed,)):
            continue
        raise ValueError(f"{key}={value!r} does not work with BA-LoRA: {remedy}.")
    if getattr(args, "n_gpu", 1) > 1:
        raise ValueError(
            f"n_gpu={args.n_gpu}: nn.DataParallel is not supported. Launch with `accelerate launch` or `torchrun`, or "
            "show one GPU with CUDA_VISIBLE_DEVICES."
        )
    parallelism = getattr(args, "parallelism_config", None)
    for key in ("cp_enabled", "sp_enabled", "tp_enabled"):
        if getattr(parallelism, key, False):
            raise ValueError(f"parallelism_config.{key}=True does not work with BA-LoRA yet: use DDP or FSDP.")


def _active_config(model: nn.Module) -> Any:
    if not isinstance(model, PeftModel):
        return None
    return model.peft_config.get(model.active_adapters[0]) if model.active_adapters else None


def _task_of(model: PreTrainedModel, regularizers: RegularizerConfig) -> str:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        return "nlg"
    if regularizers.task == "nlg":
        read_head(model)  # says that there is no LM head
    raise ValueError(
        f"{type(model).__name__} is not a causal language model: this version trains NLG (task='nlg'); the NLU terms "
        "are available as formulas in balora_plugin.regularizers."
    )


def _check_teacher(model: nn.Module, adapter: Any, teacher_model: nn.Module | None) -> None:
    if teacher_model is not None:
        return
    if adapter is None:
        raise ValueError(
            "lambda_consistency > 0 in full fine-tuning has no adapter to switch off for the teacher: pass "
            "teacher_model=<the pre-trained model>, or set lambda_consistency=0."
        )
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(f"{type(adapter).__name__} cannot be switched off for the teacher: pass teacher_model=...")
    if isinstance(adapter, BaLoraConfig):
        return
    start = str(getattr(adapter, "init_lora_weights", "")).lower()
    if start.startswith(_MUTATING_STARTS):
        raise ValueError(
            f"init_lora_weights={start!r} rewrites the base weights, so switching the adapter off gives its residual "
            "model, not the pre-trained one: use BaLoraConfig (the same start in delta form), or pass teacher_model=..."
        )
    for key, neutral in (("bias", "none"), ("trainable_token_indices", None)):
        if getattr(adapter, key, neutral) not in (neutral, None):
            raise ValueError(
                f"{key}={getattr(adapter, key)!r} trains base parameters that the teacher shares: leave it at "
                f"{neutral!r}, or pass teacher_model=..."
            )


def _check_model(model: PreTrainedModel, config: RegularizerConfig) -> None:
    model_config = model.config
    if hasattr(model_config, "vision_config") or hasattr(model_config, "audio_config"):
        raise ValueError(
            f"{type(model).__name__} is a multimodal (vision-language) model, which BA-LoRA does not train yet: use a "
            "text-only model."
        )
    if getattr(model_config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, which BA-LoRA does not train: use a causal LM."
        )
    head = read_head(model)
    if config.lambda_svd and config.svd_layout == "flattened" and config.svd_input != "features":
        for what, present in (
            ("a head bias", head.bias is not None),
            ("a softcap", head.softcap is not None),
            ("a head that trains", head.trains),
        ):
            if present:
                raise ValueError(f"svd_layout='flattened' does not work with {what}: use svd_layout='rows'.")
