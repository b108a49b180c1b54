"""Opening a run's teacher cache, choosing what it keeps, and filling it before the first step: one pass over the data
in which only the documents that are missing are computed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..adapter.saved import provenance
from ..distributed import any_process, sum_over_processes
from ..fused.head import Head
from ..objective.batches import counted_positions
from ..objective.causal_lm import backbone_inputs
from ..objective.request import StepRequest
from ..pretrained.lm_head import read_head
from ..teacher.cache import TeacherCache
from ..teacher.opening import open_cache
from ..teacher.rows import Rows, TopRows

if TYPE_CHECKING:
    from .trainer import BaLoraTrainerMixin

logger = logging.get_logger(__name__)


def open_run_cache(trainer: BaLoraTrainerMixin, causal_lm: PreTrainedModel) -> None:
    """Gives a trainer the cache that its terms name, and the callback that fills it.

    Raises:
        ValueError: as `open_cache`; full fine-tuning whose teacher could not be had later.
    """
    config, teacher, args = trainer.ba_lora, trainer._ba_lora_teacher, trainer.args
    assert config is not None and config.teacher_cache is not None
    if teacher is None and not isinstance(trainer.model, PeftModel):  # the weights are the teacher's until step 1
        for key in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(args, key, False):
                raise ValueError(
                    f"{key}=True with teacher_cache in full fine-tuning: evaluation would need a teacher in another "
                    f"precision; set {key}=False, or pass teacher_model=..."
                )
        head = read_head(causal_lm)
        if hasattr(head.weight, "ds_id"):
            raise ValueError(
                "teacher_cache in full fine-tuning under ZeRO-3 has no whole copy of the initial LM head: pass "
                "teacher_model=..., or use ZeRO-2."
            )
        bias = None if head.bias is None else head.bias.detach().clone()
        trainer._ba_lora_initial_head = Head(head.weight.detach().clone(), bias, head.scale, head.softcap)
    cache = open_cache(
        str(config.teacher_cache),
        causal_lm if teacher is None else teacher,
        config,
        own=teacher is not None,
        tokenizer=getattr(trainer, "processing_class", None),
        mixed_precision=str(trainer.accelerator.mixed_precision),
        base=provenance.base_sha256(trainer.model) if teacher is None else None,
    )
    cache.choose = lambda: choose_rows(trainer, cache)
    trainer._ba_lora_cache = cache
    trainer.add_callback(TeacherCacheCallback(trainer, cache))


def initial_head_here(trainer: BaLoraTrainerMixin) -> Head | None:
    """The head that full fine-tuning began with, on the device it is needed on."""
    head, device = trainer._ba_lora_initial_head, trainer.args.device
    if head is not None and head.weight.device != device:
        bias = None if head.bias is None else head.bias.to(device)
        head = Head(head.weight.to(device), bias, head.scale, head.softcap)
        trainer._ba_lora_initial_head = head
    return head


class TeacherCacheCallback(TrainerCallback):
    """Fills the cache when training begins, and writes what was added at every save, evaluation and end."""

    def __init__(self, trainer: BaLoraTrainerMixin, cache: TeacherCache) -> None:
        self._trainer = trainer
        self._cache = cache

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        prefill(self._trainer, self._cache)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._cache.flush()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._cache.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._cache.flush()


def prefill(trainer: BaLoraTrainerMixin, cache: TeacherCache) -> None:
    """Computes the missing documents of the training data, every process a part of them.

    Data without a length (iterable, streaming), or of which less than an epoch is read, is filled as training goes.
    Training itself is the same to the bit: the loaders are its own, and random states are as before. In full
    fine-tuning the weights are the teacher only now: the evaluation data is filled too, and what is missing later is an
    error.

    Raises:
        ValueError: full fine-tuning on data without a length.
        RuntimeError: full fine-tuning that resumes, with an incomplete cache.
    """
    whole = trainer.train_dataset is not None and has_length(trainer.train_dataset)
    full = trainer._ba_lora_initial_head is not None
    if whole and not full and _part_of_an_epoch(trainer):
        logger.info(
            f"teacher_cache={cache.directory}: max_steps={trainer.args.max_steps} reads less than one epoch, so it is "
            "filled as training goes, without a pass over all data before."
        )
        whole = False
    if trainer._ba_lora_initial_head is not None and not whole:
        raise ValueError(
            "teacher_cache in full fine-tuning without teacher_model needs a training set with a length, which it can "
            "pass over before the weights move: use a map-style dataset, or pass teacher_model=..."
        )
    cache.settle(trainer.args.device)
    before = cache.runs
    cache.on_miss = None
    trainer.model_wrapped.train()  # as for a step; the teacher's switch sets what has to be in eval mode
    if whole:
        with _random_states_kept():
            loader = trainer.get_train_dataloader()
            _fill_from(trainer, cache, loader, "Teacher cache")
            _release(trainer, loader)
            if not _covers_all(loader):
                _fill_from(trainer, cache, _in_order(trainer, loader), "Teacher cache, the rest")
            if trainer._ba_lora_initial_head is not None:
                for dataset in _evaluation_sets(trainer):
                    loader = trainer.get_eval_dataloader(dataset)
                    _fill_from(trainer, cache, loader, "Teacher cache, evaluation")
                    _release(trainer, loader)
    cache.flush()
    trainer.accelerator.wait_for_everyone()
    cache.refresh()  # what the other processes computed
    if isinstance(cache.rows, TopRows) and cache.choice.top_k is None:
        trainer._ba_lora_warn(
            "cache_top_k",
            f"teacher_cache={cache.directory} holds {cache.rows} ({cache.why}): the consistency term is taken over "
            f"{cache.rows.top_k + 1} buckets, a lower bound of the whole one. For hidden states, which are exact: "
            "teacher_cache_top_k=0 and an empty directory.",
        )
    logger.info(
        f"teacher_cache={cache.directory}: {cache.rows} ({cache.why}), {len(cache)} documents, "
        f"{cache.size() / 1e9:.3g} GB on disk, {cache.runs - before} teacher passes."
    )
    if whole:
        cache.on_miss = lambda: _say_late(trainer, cache)
    if trainer._ba_lora_initial_head is not None:
        cache.frozen = "in full fine-tuning the weights are no longer the teacher's"


def _part_of_an_epoch(trainer: BaLoraTrainerMixin) -> bool:
    """Whether training ends before it has read its data once: a pass before would compute what nobody reads."""
    args = trainer.args
    if args.max_steps <= 0 or trainer.train_dataset is None:
        return False
    examples = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
    return examples < len(trainer.train_dataset)


def choose_rows(trainer: BaLoraTrainerMixin, cache: TeacherCache) -> tuple[Rows, str]:
    """What to keep of a token, and why: all processes count the training data's tokens, until they are too many.

    Data without a length (iterable, streaming) is not counted.
    """
    choice, dataset = cache.choice, trainer.train_dataset
    if dataset is None or not has_length(dataset):
        return choice.by_size(None)
    tokens = 0
    with _random_states_kept():
        loader = trainer.get_train_dataloader()
        each_once = loader if _covers_all(loader) else _in_order(trainer, loader)
        for batch in _batches(trainer, each_once, "Teacher cache, its size"):
            found = _counted(trainer, batch)
            tokens += sum_over_processes(0 if found is None else cache.tokens(*found), trainer.args.device)
            if tokens > choice.hidden_tokens:
                break
        _release(trainer, loader)
    return choice.by_size(tokens)


def _say_late(trainer: BaLoraTrainerMixin, cache: TeacherCache) -> None:
    if trainer.model.training:  # evaluation data comes as it comes
        trainer._ba_lora_warn(
            "cache_late",
            f"teacher_cache={cache.directory} lacked a document at {cache.where} that was not in the pass before "
            "training: the teacher runs live for such batches and the cache grows. Data that changes from epoch "
            "to epoch gains nothing from a cache; several machines need one directory that all of them see.",
        )


def _fill_from(trainer: BaLoraTrainerMixin, cache: TeacherCache, loader: Iterable[Any], title: str) -> None:
    request = trainer._ba_lora_fill_request()
    for batch in _batches(trainer, loader, title):
        _fill_batch(trainer, cache, request, batch)


def _batches(trainer: BaLoraTrainerMixin, loader: Iterable[Any], title: str) -> Iterator[Any]:
    """The loader's batches under a progress bar, as many on every process."""
    hidden_bar = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
    batches: Iterator[Any] = iter(loader)
    with tqdm(total=len(loader), desc=title, disable=hidden_bar, dynamic_ncols=True) as bar:  # type: ignore[arg-type]
        while True:
            batch = next(batches, None)
            if any_process(batch is None, trainer.args.device):  # sharded loaders may differ by one
                break
            yield batch
            bar.update()


def _counted(trainer: BaLoraTrainerMixin, batch: Any) -> tuple[dict[str, Any], Tensor] | None:
    """The backbone's inputs and the counted positions; None without labels, which training will say."""
    inputs = trainer._ba_lora_inputs(batch)
    if inputs.get("labels") is None and inputs.get("shift_labels") is None:
        return None
    plain = {key: value for key, value in inputs.items() if key != "output_router_logits"}
    return backbone_inputs(plain), counted_positions(inputs)


def _fill_batch(trainer: BaLoraTrainerMixin, cache: TeacherCache, request: StepRequest, batch: Any) -> None:
    found = _counted(trainer, batch)
    if found is None or not any_process(cache.missing(*found), trainer.args.device):
        return
    model: nn.Module = trainer.model_wrapped
    with torch.no_grad(), trainer.compute_loss_context_manager():
        model(**trainer._prepare_inputs(trainer._ba_lora_inputs(batch)), ba_lora=request)


def _covers_all(loader: Any) -> bool:
    """Whether one pass over this loader sees every example; packing samplers leave some out, others each time."""
    shard = getattr(loader, "batch_sampler", None)
    sampler = getattr(shard, "batch_sampler", shard)  # what accelerate cuts up among processes
    if type(sampler) is not BatchSampler or sampler.drop_last or not getattr(shard, "even_batches", True):
        return False
    # SeedableRandomSampler is a RandomSampler
    return isinstance(sampler.sampler, (RandomSampler, SequentialSampler))


def _in_order(trainer: BaLoraTrainerMixin, loader: Any) -> DataLoader[Any]:
    """This process's part of the loader's examples, each once, through its own collator."""
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    size = len(loader.dataset)
    indices = [(start + rank) % size for start in range(0, size, world)]
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=trainer.args.train_batch_size,
        collate_fn=loader.collate_fn,
        num_workers=trainer.args.dataloader_num_workers,
    )


def _evaluation_sets(trainer: BaLoraTrainerMixin) -> list[Any]:
    found = trainer.eval_dataset
    found = list(found.values()) if isinstance(found, dict) else [found]
    return [dataset for dataset in found if dataset is not None and has_length(dataset)]


def _release(trainer: BaLoraTrainerMixin, loader: Any) -> None:
    """Lets accelerate forget a loader that was read by the way."""
    if loader in getattr(trainer.accelerator, "_dataloaders", []):
        trainer.accelerator._dataloaders.remove(loader)
    with suppress(AttributeError, ValueError):  # left early, it would count as the one in use
        loader.end()


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
