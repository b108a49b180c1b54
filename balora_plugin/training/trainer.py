"""BaLoraTrainerMixin: BA-LoRA's loss, logging and teacher for any transformers Trainer subclass."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import logging

from ..adapter.config import BaLoraConfig, active_config, our_adapters
from ..adapter.guard import native_factors
from ..adapter.saved import card
from ..config import RegularizerConfig
from ..objective.batches import main_input, without_crossings
from ..objective.classification import samples_of
from ..objective.lazy_logits import LazyLogits
from ..objective.request import StepOutput
from ..pretrained.quantised import quantised_layers_stay_in_training_mode
from ..schedules import Lambdas
from ..settings import as_path
from .acting import check_bases
from .anchors import with_anchors
from .checkpoints import Sealing, alone_in
from .checks.data import check_data
from .checks.token_ids import explained
from .classification import restore_head, save_head
from .compiling import compile_for_the_host, take_backend
from .cost import CostCallback, CostMeter
from .cost_report import cost_at_end, publish
from .finite_guard import saved_weight
from .first_norms import WatchesNorms
from .metrics import TermMetrics
from .out_of_memory import advised
from .repeated_samples import drop_rows, refill, repeated_rows
from .resuming import asked_for, check_resumable, optimizer_begins_anew, position
from .run_state import RunState
from .searching import SearchesByTask
from .set_up import Given, open_run
from .sharded_adapter import LoadsAdapterItself, RestoreAdapter, untrained_tensors, whole_state_dict
from .step_requests import StepRequests

logger = logging.get_logger(__name__)


class BaLoraTrainerMixin(LoadsAdapterItself, WatchesNorms, SearchesByTask):
    """Adds the BA-LoRA objective to a transformers Trainer: `class MyTrainer(BaLoraTrainerMixin, Trainer)`.

    Active if the model carries a BaLoraConfig adapter or `regularizers` is given; otherwise the trainer is untouched.
    Token terms (and a classifier's sample terms) are summed and divided by `num_items_in_batch`, so their gradients do
    not depend on how a global batch is cut; the spectral term is taken per micro-batch and averaged. A causal language
    model gets the NLG terms, a *ForSequenceClassification the NLU terms.

    Args (beside the Trainer's own):
        regularizers: RegularizerConfig for any PEFT adapter (teacher: adapter off) or full fine-tuning (teacher:
            `teacher_model`, or a `teacher_cache` filled before the first step). Overrides the adapter config's.
        teacher_model: An explicit second model as teacher, in eval mode. Not needed with an adapter.

    Logs what `balora_plugin.training.log_keys` lists, with the `eval_` prefix in evaluation, where every term that
    is configured is measured, at its full weight. `eval_loss` is the task's alone, in the form that is asked for.

    A subclass may override the hooks [`wrap_ba_lora_model`], [`check_ba_lora_task`], [`extend_ba_lora_inputs`],
    [`weigh_ba_lora_task`] and [`record_ba_lora_metrics`]. `ba_lora_run` holds the state of the run; None without terms.
    """

    model: Any
    ba_lora_run: RunState | None = None
    ba_lora_requests: StepRequests | None = None
    ba_lora_fresh_optimizer = False  # of the training at hand
    ba_lora_head_checked = False  # a host that wrapped the model itself has checked the bare one before
    ba_lora_loss_type: str | None = None  # TRL's "nll" or "dft", for a host whose arguments have no loss_type

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_bases(cls, BaLoraTrainerMixin)

    def __init__(
        self,
        *args: Any,
        regularizers: RegularizerConfig | None = None,
        teacher_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._untrained: dict[str, Tensor] = {}  # A0, B0 and the teacher's head while they are saved under ZeRO-3
        self._sealing = Sealing(self)
        self._given: Given | None = None
        args, kwargs, backend = take_backend(args, kwargs)
        super().__init__(*args, **kwargs)
        self._given = Given(regularizers, teacher_model, backend)
        self._set_up(self._given)

    def _set_up(self, given: Given) -> None:
        """Makes the state of a run of the model at hand; with `model_init` each training has a model of its own."""
        before = self.ba_lora_run
        for callback in () if before is None else before.callbacks:
            self.remove_callback(callback)
        run = self.ba_lora_run = open_run(self, given)
        if run is not None:
            self.ba_lora_requests = StepRequests(run, self)
            run.callbacks.append(self.ba_lora_requests)
            for callback in run.callbacks:
                self.add_callback(callback)
            self.model_accepts_loss_kwargs = True  # the host then counts the tokens of the accumulated batch for us
            if before is not None:
                run.meter, run.resumed = before.meter, before.resumed
                self._resume(run)
        elif given.backend is not None:  # no terms: the host's own pass
            compile_for_the_host(self.model, given.backend)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Returns a new model of `model_init`, with the trainer's adapter on it, and the run's state made for it."""
        model = self.wrap_ba_lora_model(super().call_model_init(trial))
        if self._given is not None:  # not the first one, which the host asks for while it is being made
            self.model = model
            self._set_up(self._given)
        return model

    @property
    def ba_lora(self) -> RegularizerConfig | None:
        """The settings in force, every one resolved; None where the trainer has no terms."""
        return None if self.ba_lora_run is None else self.ba_lora_run.config

    @property
    def ba_lora_metrics(self) -> TermMetrics:
        """The sums behind the log keys. AttributeError where the trainer has no terms."""
        if self.ba_lora_run is None:
            raise AttributeError("this trainer has no BA-LoRA terms, so it has no ba_lora_metrics")
        return self.ba_lora_run.metrics

    # --- hooks for subclasses

    def wrap_ba_lora_model(self, model: nn.Module) -> nn.Module:
        """Hook: returns what `model_init` has made with the adapter on it, for a trainer that takes a `peft_config`."""
        return model

    def check_ba_lora_task(self, config: RegularizerConfig) -> None:
        """Hook: raises a ValueError for resolved settings that this trainer does not train, a family of models say."""

    def extend_ba_lora_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Hook: returns the batch with the keywords that this trainer's own compute_loss would add to it."""
        return inputs

    def weigh_ba_lora_task(self, inputs: dict[str, Any]) -> Tensor | None:
        """Hook: returns factors of the batch's task loss, one a sample (B,) or one a label (B, L); None: all 1."""
        return None

    def record_ba_lora_metrics(self, out: StepOutput, inputs: dict[str, Any], training: bool) -> None:
        """Hook: keeps the metrics that this trainer's own compute_loss would, from the pass's sums over tokens."""

    # --- training

    def _is_ours(self) -> bool:
        """Whether what is saved is of BA-LoRA: a run with terms, or a model with such an adapter."""
        return self.ba_lora_run is not None or bool(our_adapters(self.model))

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        *args: Any,
        fresh_optimizer: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Trains as the host does; refuses a checkpoint that is not whole, or of another kind of adapter.

        The output directory belongs to this run alone until it ends. A run that is resumed after its last step does
        nothing, and says so. `fresh_optimizer`: resumes weights, step and schedule alone (save_only_model=True).
        """
        self.ba_lora_fresh_optimizer = fresh_optimizer
        checkpoint = asked_for(self, resume_from_checkpoint, fresh_optimizer=fresh_optimizer)
        if checkpoint is not None:
            check_resumable(self, self.ba_lora_run, checkpoint, fresh_optimizer=fresh_optimizer)
            resume_from_checkpoint = checkpoint
        if not self._is_ours():
            return super().train(resume_from_checkpoint, *args, **kwargs)
        callbacks: list[TrainerCallback] = [self._sealing]
        if self.ba_lora_run is not None:
            callbacks += self._begin(self.ba_lora_run, checkpoint)
        for callback in callbacks:
            self.add_callback(callback)
        # an engine's checkpoint holds what trains; RestoreAdapter puts A0 and B0 beside it
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        try:
            with alone_in(self), advised(self), explained(self), native_factors() if sharded else nullcontext():
                result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._sealing.end()
            for callback in callbacks:
                self.remove_callback(callback)
            run = self.ba_lora_run  # with model_init not the one that there was before
            if run is not None and run.compiled is not None and run.compiled.layers is not None:
                run.compiled.layers.remove()
        if run is not None and self.is_world_process_zero():
            publish(run, self.args)
        return result

    def _begin(self, run: RunState, checkpoint: str | None) -> list[TrainerCallback]:
        """Readies a run for training, from a checkpoint or from the start; returns what watches this training alone."""
        check_data(self.train_dataset, run.config.task, run.model.config)
        run.meter, run.resumed = CostMeter(self.args.device), checkpoint
        self._resume(run)
        callbacks: list[TrainerCallback] = [CostCallback(run.meter)]
        if run.ours:
            callbacks.append(RestoreAdapter(self, checkpoint))
        return callbacks

    def _resume(self, run: RunState) -> None:
        """What a run takes from the checkpoint that it goes on from, beside what the host loads."""
        if run.resumed is None:
            return
        restore_head(run, run.resumed)
        if run.initial_head is not None and run.cache is not None:
            run.cache.frozen = "full fine-tuning resumes with weights that are no longer the teacher's"

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Begins or restores the host's state; of streamed data the place where the checkpoint's run was."""
        trained = super()._init_training_state(*args, **kwargs)
        return trained if self.ba_lora_run is None else position(self, self.ba_lora_run.resumed, trained)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads both as the host does; with a fresh optimizer neither; refuses another kind's state."""
        if not optimizer_begins_anew(self, checkpoint, fresh_optimizer=self.ba_lora_fresh_optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the host's step, its time counted."""
        run = self.ba_lora_run
        if run is None or run.meter is None:
            return super().training_step(*args, **kwargs)
        with run.meter.part("micro"):
            return super().training_step(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the host's batches, whose tokens it counts here, without labels that cross documents."""
        if self.ba_lora_run is not None:
            if self.ba_lora_run.finished:
                return [], None
            epoch_iterator = map(without_crossings, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, *args, **kwargs)

    # --- loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the BA-LoRA loss of one micro-batch; in evaluation the task loss alone."""
        run, requests = self.ba_lora_run, self.ba_lora_requests
        if run is None or requests is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        training = bool(self.model.training) and not run.predicts
        weights = self.weigh_ba_lora_task(inputs)
        inputs = run.inputs(inputs)
        if training and run.packing is not None:
            run.packing.look(inputs)
        request = requests.step(training)
        request.task_weights = weights
        if return_outputs and training:  # a subclass that adds a loss of its own
            request.return_hidden, request.return_logits = run.config.task == "nlg", run.config.task == "nlu"
        out: StepOutput = model(**inputs, ba_lora=request)
        if num_items_in_batch is not None and run.config.task == "nlu":
            num_items_in_batch = samples_of(inputs["labels"], num_items_in_batch)
        loss = self._combine(out, request.lambdas, training, num_items_in_batch)
        if training:
            loss = with_anchors(loss, out, self.accelerator.num_processes, counted=num_items_in_batch is not None)
        run.follow(loss)
        run.metrics.record(out, request, "train" if training else "eval", self.state.global_step + 1)
        if training:
            run.own.note(out, request)
        self.record_ba_lora_metrics(out, inputs, training)
        if not return_outputs:
            return loss
        if out.hidden is not None:
            return loss, LazyLogits(loss, partial(run.logits_of, out.hidden))
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
            steps = self.args.gradient_accumulation_steps  # of a loss that is asked for before training begins
            batch_terms = batch_terms / getattr(self, "current_gradient_accumulation_steps", steps)
        return loss + batch_terms

    def _router_coefficient(self) -> float:
        config = self.model.config.get_text_config()
        return float(getattr(self, "router_aux_loss_coef", None) or getattr(config, "router_aux_loss_coef", 0.0) or 0.0)

    # --- saving

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the host's card, maybe anew, and puts the adapter's section back into it."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and isinstance(active_config(self.model), BaLoraConfig):
            card.update(self.args.output_dir, self.model)

    def save_model(self, output_dir: str | os.PathLike[str] | None = None, *args: Any, **kwargs: Any) -> None:
        """Saves as the host does, on every process, an adapter always whole.

        Under ZeRO-3 with what its state dict leaves out, under FSDP also where checkpoints are sharded.

        Raises:
            FloatingPointError: something that trains holds NaN or inf: nothing is written.
        """
        output_dir = as_path("output_dir", output_dir)
        if self._is_ours():
            self._sealing.begin(output_dir or str(self.args.output_dir), saved_weight(self))
        self._untrained = untrained_tensors(self.model, keep=self.args.should_save)
        try:
            with whole_state_dict(self.accelerator, self.model) if our_adapters(self.model) else nullcontext():
                super().save_model(output_dir, *args, **kwargs)
        finally:
            self._untrained = {}

    def _save_rng_state(self, output_dir: str) -> None:
        """Writes this process's random states as the host does, and waits for those of the others: all are sealed."""
        super()._save_rng_state(output_dir)
        if self._is_ours():
            self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Writes what the host does, and beside any adapter the head of a classifier's teacher, for a resumed run."""
        if state_dict is not None and self._untrained:
            state_dict = {**state_dict, **self._untrained}
        super()._save(output_dir, state_dict)
        if self.ba_lora_run is not None:
            save_head(self.ba_lora_run, self, output_dir or str(self.args.output_dir), state_dict)

    # --- logging and evaluation

    def _take_terms(self, mode: str) -> dict[str, float]:
        assert self.ba_lora_run is not None and self.ba_lora_requests is not None
        judge = self.ba_lora_requests.may_judge()
        return self.ba_lora_run.metrics.take(mode, self.accelerator.reduce, judge=judge)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the training terms since the last training log."""
        if self.ba_lora_run is not None and ("loss" in logs or "train_runtime" in logs):  # not an evaluation's row
            cost = cost_at_end(self, self.ba_lora_run, logs)
            logs.update(self._take_terms("train") | self.ba_lora_run.own.logged() | cost)
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Adds the terms over the whole evaluation set, token mean, under the host's metric prefix."""
        if self.ba_lora_run is None:
            return super().evaluation_loop(*args, **kwargs)
        self.ba_lora_run.metrics.clear("eval")
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
        """Evaluates one batch as the host does; asks for logits only where a metric needs them."""
        run = self.ba_lora_run
        if run is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        run.predicts, run.wants_logits = True, not prediction_loss_only
        rows = len(main_input(inputs))
        repeated = repeated_rows(self.accelerator, rows)
        if repeated == rows and run.cache is not None:
            repeated = 0  # what counts nothing is no document of the cache's
        run.counts = repeated < rows
        shown = drop_rows(inputs, repeated, token_labels=run.config.task == "nlg")
        try:
            with quantised_layers_stay_in_training_mode(self.model):
                loss, logits, labels = super().prediction_step(
                    model, shown, prediction_loss_only, ignore_keys=ignore_keys
                )
            missing = rows - len(main_input(shown))
            return loss, refill(logits, missing), refill(labels, missing)
        finally:
            run.predicts, run.wants_logits, run.counts = False, False, True
