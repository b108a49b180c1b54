"""BaLoraTrainerMixin: BA-LoRA's loss, logging and teacher for any transformers Trainer subclass."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..adapter.config import BaLoraConfig, our_adapters
from ..adapter.saved import card, provenance
from ..checkpoint.integrity import begin_save, check_whole
from ..config import RegularizerConfig, as_regularizers
from ..fused.head import Head
from ..objective import classification as nlu
from ..objective.batches import without_crossings
from ..objective.install import install
from ..objective.request import StepOutput, StepRequest
from ..pretrained.attention import check_attention, check_same_attention
from ..pretrained.lm_head import check_head
from ..pretrained.quantised import protect_weights, quantised_layers_stay_in_training_mode
from ..pretrained.switch import TeacherSwitch
from ..schedules import Lambdas
from ..teacher.cache import TeacherCache
from . import classification as run
from .checks.arguments import check_arguments, check_checkpoint, check_counted, check_saving
from .checks.model import resolve
from .checks.teacher import check_teacher
from .compiling import BACKEND, Asked, compiled_passes, take_backend
from .cost import CostCallback, CostMeter, format_report, write_report
from .fill_cache import open_run_cache
from .finite_guard import FiniteGuard
from .metrics import TermMetrics
from .repeated_samples import drop_rows, refill, repeated_rows
from .sharded_adapter import RestoreAdapter, frozen_factors
from .step_requests import Requests

logger = logging.get_logger(__name__)

if TYPE_CHECKING:  # a mixin for type checkers too: its methods call the Trainer's
    from transformers import Trainer as _Base
else:
    _Base = object


class BaLoraTrainerMixin(_Base):
    """Adds the BA-LoRA objective to a transformers Trainer: `class MyTrainer(BaLoraTrainerMixin, Trainer)`.

    Active if the model carries a BaLoraConfig adapter or `regularizers` is given; otherwise the trainer is untouched.
    Token terms (and a classifier's sample terms) are summed and divided by `num_items_in_batch`, so their gradients do
    not depend on how a global batch is cut; the spectral term is taken per micro-batch and averaged. A causal language
    model gets the NLG terms, a *ForSequenceClassification the NLU terms.

    Args (beside the Trainer's own):
        regularizers: RegularizerConfig for any PEFT adapter (teacher: adapter off) or full fine-tuning (teacher:
            `teacher_model`, or a `teacher_cache` filled before the first step). Overrides the adapter config's.
        teacher_model: An explicit second model as teacher, in eval mode. Not needed with an adapter.

    Logs `balora/task`, `balora/consistency`, `balora/diversity`, `balora/svd` (unweighted means), `balora/loss`
    (weighted total) and `balora/share_*`, with the `eval_` prefix in evaluation. `eval_loss` is the task loss alone;
    evaluation measures every configured term, at its full weight whatever the schedule.
    """

    _ba_lora_head_checked = False  # a host that wrapped the model itself has checked the bare one before

    def __init__(
        self,
        *args: Any,
        regularizers: RegularizerConfig | None = None,
        teacher_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self.ba_lora: RegularizerConfig | None = None
        self._ba_lora_meter: CostMeter | None = None
        self._ba_lora_cache: TeacherCache | None = None
        self._ba_lora_initial_head: Head | None = None
        self._ba_lora_frozen: dict[str, Tensor] = {}  # A0 and B0 while they are saved under ZeRO-3
        args, kwargs, self._ba_lora_backend = take_backend(args, kwargs)
        super().__init__(*args, **kwargs)
        self._set_up_ba_lora(regularizers, teacher_model)
        if self.ba_lora is None and self._ba_lora_backend is not None:  # no terms: the host's own pass
            self._compile_for_the_host(self._ba_lora_backend)

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
        regularizers = as_regularizers(regularizers)
        if isinstance(teacher_model, str):
            raise TypeError(
                f"teacher_model={teacher_model!r} must be a loaded model: pass "
                f"AutoModelForCausalLM.from_pretrained({teacher_model!r})."
            )
        check_arguments(self.args)
        if isinstance(adapter, BaLoraConfig):
            check_saving(self.accelerator)
        if getattr(self, "compute_loss_func", None) is not None:
            raise ValueError("compute_loss_func does not work with BA-LoRA, whose loss it would replace: remove it.")
        causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
        check_attention(causal_lm, self.args)
        config = resolve(causal_lm, regularizers)
        if config.lambda_consistency:
            check_teacher(adapter, teacher_model, cached=config.teacher_cache is not None, model=causal_lm)
        self._ba_lora_check_task(config)
        if not self._ba_lora_head_checked and config.task == "nlg":
            check_head(causal_lm)
        protect_weights(causal_lm)  # a base under another adapter too
        install(causal_lm, nlu.classification_step if config.task == "nlu" else None)
        if isinstance(teacher_model, PeftModel):
            teacher_model = teacher_model.get_base_model()  # its adapters live in the module tree
        if teacher_model is not None:
            if config.task == "nlg":
                check_head(teacher_model)
            check_same_attention(causal_lm, teacher_model)
            teacher_model.requires_grad_(False).eval().to(self.args.device)
        if isinstance(adapter, BaLoraConfig):
            adapter.regularizers = regularizers  # what is used is what the adapter's file says
        self.ba_lora = config
        self.model_accepts_loss_kwargs = True  # the host then counts the tokens of the accumulated batch for us
        self._ba_lora_teacher = teacher_model
        self._ba_lora_requests = Requests(self, TeacherSwitch(causal_lm))
        self._ba_lora_warned: set[str] = set()
        asked = self._ba_lora_backend
        compiled = getattr(adapter, "compile", False) or asked is not None
        if config.task == "nlu":
            run.set_up(self, causal_lm, teacher_model, compiled=compiled)
        mode = None if asked is None else asked.mode
        self._ba_lora_compiled = compiled_passes(self.args, self._ba_lora_warn, compiled, mode) if compiled else None
        self.ba_lora_metrics = TermMetrics(config, self._ba_lora_warn)
        self._ba_lora_wants_logits = False
        self._ba_lora_counts = True
        if isinstance(adapter, BaLoraConfig):
            provenance.prepare(model, provenance.teacher_in_words(config, teacher_model))
        if config.teacher_cache is not None and config.lambda_consistency:
            open_run_cache(self, causal_lm)
        self.add_callback(FiniteGuard(self))
        logger.info(f"BA-LoRA: {config}")

    def _compile_for_the_host(self, asked: Asked) -> None:
        """`torch_compile_backend="ba_lora"` for a run without terms, whose loss is the host's own."""
        from ..compile import or_eagerly

        def failed(reason: str) -> None:
            logger.warning(
                f"BA-LoRA: torch_compile_backend={BACKEND!r} does not work here, so training goes on without it: "
                f"{reason}"
            )

        self.model.compile(backend=or_eagerly(failed, asked.mode))

    def _ba_lora_check_task(self, config: RegularizerConfig) -> None:
        """Hook for hosts: refuses a family of models that the host does not train."""

    def _ba_lora_warn(self, key: str, message: str) -> None:
        if key not in self._ba_lora_warned:
            self._ba_lora_warned.add(key)
            logger.warning(f"BA-LoRA: {message}")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the host's; refuses a checkpoint that is not whole, or of another kind of adapter."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if isinstance(checkpoint, str):
            check_checkpoint(_active_config(self.model), checkpoint)
            if isinstance(_active_config(self.model), BaLoraConfig):
                check_whole(checkpoint, our_adapters(self.model))
            run.restore_head(self, checkpoint)
        if checkpoint and self._ba_lora_initial_head is not None and self._ba_lora_cache is not None:
            self._ba_lora_cache.frozen = "full fine-tuning resumes with weights that are no longer the teacher's"
        if self.ba_lora is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        check_counted(self.train_dataset)
        self._ba_lora_meter = CostMeter(self.args.device)
        callbacks: list[TrainerCallback] = [CostCallback(self._ba_lora_meter)]
        if isinstance(_active_config(self.model), BaLoraConfig):
            callbacks.append(RestoreAdapter(self, checkpoint if isinstance(checkpoint, str) else None))
        for callback in callbacks:
            self.add_callback(callback)
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            for callback in callbacks:
                self.remove_callback(callback)
            if self._ba_lora_compiled is not None and self._ba_lora_compiled.layers is not None:
                self._ba_lora_compiled.layers.remove()
        self._report_cost()
        return result

    def _report_cost(self) -> None:
        """One table at the end of training, and `ba_lora_cost.json` in the output directory."""
        meter = self._ba_lora_meter
        if meter is None or not meter.steps or not self.is_world_process_zero():
            return
        report = meter.report(
            compiled="" if self._ba_lora_compiled is None else self._ba_lora_compiled.in_use(),
            teacher_interval=self.ba_lora.teacher_interval if self.ba_lora is not None else 1,
            device=torch.cuda.get_device_name(self.args.device) if meter.cuda else platform.machine() or "cpu",
            torch=torch.__version__,
        )
        write_report(report, self.args.output_dir)
        if not self.args.disable_tqdm:
            print(format_report(report))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's, its time counted."""
        meter = self._ba_lora_meter
        if self.ba_lora is None or meter is None:
            return super().training_step(*args, **kwargs)
        with meter.part("micro"):
            return super().training_step(*args, **kwargs)

    # --- loss

    def _ba_lora_request(self, training: bool) -> StepRequest:
        return self._ba_lora_requests.step(training)

    def _ba_lora_fill_request(self) -> StepRequest:
        return self._ba_lora_requests.fill()

    def _ba_lora_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What a batch gives to the model's forward."""
        inputs = {key: value for key, value in inputs.items() if not key.startswith("_")}
        return self._extend_inputs(without_crossings(inputs))

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        """As the host's, which counts the tokens of the accumulated batch here."""
        if self.ba_lora is not None:
            epoch_iterator = map(without_crossings, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, *args, **kwargs)

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
        inputs = self._ba_lora_inputs(inputs)  # without TRL's own notes to itself
        request = self._ba_lora_request(training)
        out: StepOutput = model(**inputs, ba_lora=request)
        if num_items_in_batch is not None and self.ba_lora.task == "nlu":
            num_items_in_batch = nlu.samples_of(inputs["labels"], num_items_in_batch)
        loss = self._combine(out, request.lambdas, training, num_items_in_batch)
        self.ba_lora_metrics.record(out, request.lambdas, "train" if training else "eval", self.state.global_step + 1)
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
        if training and out.svd is not None and out.svd_count is None:
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

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the host's, which may write the file anew; then the adapter's section is put back in."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and isinstance(_active_config(self.model), BaLoraConfig):
            card.update(self.args.output_dir, self.model)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As the host's, which every process calls; under ZeRO-3 with A0 and B0, which its state dict leaves out."""
        if our_adapters(self.model):
            begin_save(
                output_dir or str(self.args.output_dir),
                rank=self.args.process_index,
                processes=self.args.world_size,
                first=self.args.should_save,
            )
        self._ba_lora_frozen = frozen_factors(self.model, keep=self.args.should_save)
        try:
            super().save_model(output_dir, *args, **kwargs)
        finally:
            self._ba_lora_frozen = {}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As the host's; beside any adapter the head of a classifier's teacher, which a resumed run needs."""
        if state_dict is not None and self._ba_lora_frozen:
            state_dict = {**state_dict, **self._ba_lora_frozen}
        super()._save(output_dir, state_dict)
        if self.ba_lora is not None and self.ba_lora.task == "nlu" and self.ba_lora.lambda_consistency:
            run.save_head(self, output_dir or str(self.args.output_dir))

    # --- logging

    def _take_terms(self, mode: str) -> dict[str, float]:
        return self.ba_lora_metrics.take(mode, self.accelerator.reduce, judge=self._ba_lora_requests.may_judge())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the training terms since the last training log."""
        if self.ba_lora is not None and ("loss" in logs or "train_runtime" in logs):  # not an evaluation's row
            logs.update(self._take_terms("train"))
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Adds the terms over the whole evaluation set, token mean, under the host's metric prefix."""
        if self.ba_lora is None:
            return super().evaluation_loop(*args, **kwargs)
        self.ba_lora_metrics.clear("eval")
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
        rows = len(inputs["input_ids"])
        repeated = repeated_rows(self.accelerator, rows)
        if repeated == rows and self._ba_lora_cache is not None:
            repeated = 0  # what counts nothing is no document of the cache's
        self._ba_lora_counts = repeated < rows
        shown = drop_rows(inputs, repeated, token_labels=self.ba_lora.task == "nlg")
        try:
            with quantised_layers_stay_in_training_mode(self.model):
                loss, logits, labels = super().prediction_step(
                    model, shown, prediction_loss_only, ignore_keys=ignore_keys
                )
            missing = min(repeated, rows - 1)
            return loss, refill(logits, missing), refill(labels, missing)
        finally:
            self._ba_lora_wants_logits, self._ba_lora_counts = False, True


def _active_config(model: nn.Module) -> Any:
    if not isinstance(model, PeftModel):
        return None
    return model.peft_config.get(model.active_adapters[0]) if model.active_adapters else None
