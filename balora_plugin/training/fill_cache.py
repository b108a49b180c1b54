"""Opening a run's teacher cache, choosing what it keeps, and filling it before the first step: one pass over the data
in which only the documents that are missing are computed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..adapter.saved import provenance
from ..distributed import any_process, check_loaded, sum_over_processes
from ..fused.head import Head
from ..objective.batches import counted_positions
from ..objective.causal_lm import backbone_inputs
from ..pretrained.lm_head import read_head
from ..teacher.cache import TeacherCache
from ..teacher.opening import open_cache
from ..teacher.rows import Rows, TopRows
from .host import HostTrainer
from .run_state import RunState
from .step_requests import fill_request

logger = logging.get_logger(__name__)


def open_run_cache(run: RunState, host: HostTrainer) -> None:
    """Gives a run the cache that its terms name, and its trainer the callback that fills it.

    Raises:
        ValueError: as `open_cache`; full fine-tuning whose teacher could not be had later.
    """
    config, teacher, args = run.config, run.teacher, host.args
    check_loaded(
        (run.model if teacher is None else teacher).parameters(),
        f"teacher_cache={str(config.teacher_cache)!r} needs the teacher's weights on every process, and they are "
        "loaded on one alone: switch FSDP's cpu_ram_efficient_loading off, or remove teacher_cache.",
    )
    if teacher is None and not isinstance(host.model, PeftModel):  # the weights are the teacher's until step 1
        for key in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(args, key, False):
                raise ValueError(
                    f"{key}=True with teacher_cache in full fine-tuning: evaluation would need a teacher in another "
                    f"precision; set {key}=False, or pass teacher_model=..."
                )
        head = read_head(run.model)
        if hasattr(head.weight, "ds_id"):
            raise ValueError(
                "teacher_cache in full fine-tuning under ZeRO-3 has no whole copy of the initial LM head: pass "
                "teacher_model=..., or use ZeRO-2."
            )
        bias = None if head.bias is None else head.bias.detach().clone()
        run.initial_head = Head(head.weight.detach().clone(), bias, head.scale, head.softcap)
    cache = open_cache(
        str(config.teacher_cache),
        run.model if teacher is None else teacher,
        config,
        own=teacher is not None,
        tokenizer=host.processing_class,
        mixed_precision=str(host.accelerator.mixed_precision),
        base=provenance.base_sha256(host.model) if teacher is None else None,
    )
    filling = CacheFilling(run, host, cache)
    cache.choose = filling.choose_rows
    run.cache = cache
    run.callbacks.append(TeacherCacheCallback(filling))


class TeacherCacheCallback(TrainerCallback):
    """Fills the cache when training begins, and writes what was added at every save, evaluation and end."""

    def __init__(self, filling: CacheFilling) -> None:
        self._filling = filling

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._filling.before_training()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._filling.cache.flush()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._filling.cache.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._filling.cache.flush()


class CacheFilling:
    """Passes over a run's data for its teacher cache: to choose what is kept of a token, and to fill it.

    Training itself is the same to the bit: the loaders are its own, and random states are as before.
    """

    def __init__(self, run: RunState, host: HostTrainer, cache: TeacherCache) -> None:
        self.cache = cache
        self._run, self._host = run, host
        self._full = run.initial_head is not None  # full fine-tuning: the weights are the teacher's only now

    def before_training(self) -> None:
        """Computes the missing documents of the training data, every process a part of them.

        Data without a length (iterable, streaming), or of which less than an epoch is read, is filled as training goes.
        In full fine-tuning the weights are the teacher only now: the evaluation data is filled too, and what is missing
        later is an error.

        Raises:
            ValueError: full fine-tuning on data without a length.
            RuntimeError: full fine-tuning that resumes, with an incomplete cache.
        """
        cache, host = self.cache, self._host
        whole = self._passes_over_training_data()
        cache.settle(host.args.device)
        before = cache.runs
        cache.on_miss = None
        host.model_wrapped.train()  # as for a step; the teacher's switch sets what has to be in eval mode
        if whole:
            with _random_states_kept():
                self._fill_training_data()
                if self._full:
                    self._fill_evaluation_data()
        cache.flush()
        host.accelerator.wait_for_everyone()
        cache.refresh()  # what the other processes computed
        self._say_what_it_holds(cache.runs - before)
        if whole:
            cache.on_miss = self._say_late
        if self._full:
            cache.frozen = "in full fine-tuning the weights are no longer the teacher's"

    def choose_rows(self) -> tuple[Rows, str]:
        """Returns what to keep of a token, and why: all processes count the training data's tokens, up to too many.

        Data without a length (iterable, streaming) is not counted.
        """
        choice, dataset = self.cache.choice, self._host.train_dataset
        if dataset is None or not has_length(dataset):
            return choice.by_size(None)
        tokens = 0
        with _random_states_kept():
            loader = self._host.get_train_dataloader()
            each_once = loader if _covers_all(loader) else self._in_order(loader)
            for batch in self._batches(each_once, "Teacher cache, its size"):
                found = self._counted(batch)
                tokens += sum_over_processes(0 if found is None else self.cache.tokens(*found), self._host.args.device)
                if tokens > choice.hidden_tokens:
                    break
            self._release(loader)
        return choice.by_size(tokens)

    # --- what is passed over

    def _passes_over_training_data(self) -> bool:
        dataset = self._host.train_dataset
        whole = dataset is not None and has_length(dataset)
        if whole and not self._full and self._part_of_an_epoch():
            logger.info(
                f"teacher_cache={self.cache.directory}: max_steps={self._host.args.max_steps} reads less than one "
                "epoch, so it is filled as training goes, without a pass over all data before."
            )
            whole = False
        if self._full and not whole:
            raise ValueError(
                "teacher_cache in full fine-tuning without teacher_model needs a training set with a length, which it "
                "can pass over before the weights move: use a map-style dataset, or pass teacher_model=..."
            )
        return whole

    def _part_of_an_epoch(self) -> bool:
        """Whether training ends before it has read its data once: a pass before would compute what nobody reads."""
        args = self._host.args
        if args.max_steps <= 0:
            return False
        examples = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        return examples < len(self._host.train_dataset)

    def _fill_training_data(self) -> None:
        loader = self._host.get_train_dataloader()
        self._fill_from(loader, "Teacher cache")
        self._release(loader)
        if not _covers_all(loader):
            self._fill_from(self._in_order(loader), "Teacher cache, the rest")

    def _fill_evaluation_data(self) -> None:
        given = self._host.eval_dataset
        for dataset in given.values() if isinstance(given, dict) else [given]:
            if dataset is not None and has_length(dataset):
                loader = self._host.get_eval_dataloader(dataset)
                self._fill_from(loader, "Teacher cache, evaluation")
                self._release(loader)

    def _in_order(self, loader: Any) -> DataLoader[Any]:
        """This process's part of the loader's examples, each once, through its own collator."""
        accelerator, args = self._host.accelerator, self._host.args
        world, rank = accelerator.num_processes, accelerator.process_index
        size = len(loader.dataset)
        indices = [(start + rank) % size for start in range(0, size, world)]
        return DataLoader(
            Subset(loader.dataset, indices),
            batch_size=args.train_batch_size,
            collate_fn=loader.collate_fn,
            num_workers=args.dataloader_num_workers,
        )

    def _release(self, loader: Any) -> None:
        """Lets accelerate forget a loader that was read by the way."""
        if loader in getattr(self._host.accelerator, "_dataloaders", []):
            self._host.accelerator._dataloaders.remove(loader)  # type: ignore[attr-defined]
        with suppress(AttributeError, ValueError):  # left early, it would count as the one in use
            loader.end()

    # --- one batch

    def _fill_from(self, loader: Iterable[Any], title: str) -> None:
        request = fill_request(self._run, self._host.args.device)
        for batch in self._batches(loader, title):
            found = self._counted(batch)
            if found is None or not any_process(self.cache.missing(*found), self._host.args.device):
                continue
            with torch.no_grad(), self._host.compute_loss_context_manager():
                self._host.model_wrapped(**self._run.to_device(self._run.inputs(batch)), ba_lora=request)

    def _batches(self, loader: Iterable[Any], title: str) -> Iterator[Any]:
        """The loader's batches under a progress bar, as many on every process."""
        args = self._host.args
        hidden_bar = args.disable_tqdm or not self._host.accelerator.is_main_process
        batches: Iterator[Any] = iter(loader)
        with tqdm(total=len(loader), desc=title, disable=hidden_bar, dynamic_ncols=True) as bar:  # type: ignore[arg-type]
            while True:
                batch = next(batches, None)
                if any_process(batch is None, args.device):  # sharded loaders may differ by one
                    break
                yield batch
                bar.update()

    def _counted(self, batch: Any) -> tuple[dict[str, Any], Tensor] | None:
        """The backbone's inputs and the counted positions; None without labels, which training will say."""
        inputs = self._run.inputs(batch)
        if inputs.get("labels") is None and inputs.get("shift_labels") is None:
            return None
        plain = {key: value for key, value in inputs.items() if key != "output_router_logits"}
        return backbone_inputs(plain), counted_positions(inputs)

    # --- what is said

    def _say_what_it_holds(self, passes: int) -> None:
        cache = self.cache
        if isinstance(cache.rows, TopRows) and cache.choice.top_k is None:
            self._run.warn(
                "cache_top_k",
                f"teacher_cache={cache.directory} holds {cache.rows} ({cache.why}): the consistency term is taken over "
                f"{cache.rows.top_k + 1} buckets, a lower bound of the whole one. For hidden states, which are exact: "
                "teacher_cache_top_k=0 and an empty directory.",
            )
        logger.info(
            f"teacher_cache={cache.directory}: {cache.rows} ({cache.why}), {len(cache)} documents, "
            f"{cache.size() / 1e9:.3g} GB on disk, {passes} teacher passes."
        )

    def _say_late(self) -> None:
        if self._host.model.training:  # evaluation data comes as it comes
            self._run.warn(
                "cache_late",
                f"teacher_cache={self.cache.directory} lacked a document at {self.cache.where} that was not in the "
                "pass before training: the teacher runs live for such batches and the cache grows. Data that changes "
                "from epoch to epoch gains nothing from a cache; several machines need one directory that all of them "
                "see.",
            )


def _covers_all(loader: Any) -> bool:
    """Whether one pass over this loader sees every example; packing samplers leave some out, others each time."""
    shard = getattr(loader, "batch_sampler", None)
    sampler = getattr(shard, "batch_sampler", shard)  # what accelerate cuts up among processes
    if type(sampler) is not BatchSampler or sampler.drop_last or not getattr(shard, "even_batches", True):
        return False
    # SeedableRandomSampler is a RandomSampler
    return isinstance(sampler.sampler, (RandomSampler, SequentialSampler))


@contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
