"""What a run does to its checkpoints and to its output directory beside what the host writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from transformers import TrainerCallback

from ..adapter.config import active_config, our_adapters
from ..checkpoint.integrity import begin_save, is_checkpoint
from ..checkpoint.lock import only_run
from ..checkpoint.manifest import Manifest, seal
from ..checkpoint.placing import place, retire
from ..config import RegularizerConfig
from ..distributed import raise_on_every_process
from .host import HostTrainer, optimizer_name


class SealingHost(HostTrainer, Protocol):
    """A Trainer with the mixin, which knows its terms."""

    @property
    def ba_lora(self) -> RegularizerConfig | None:
        """The settings in force; None without terms."""


class Sealing(TrainerCallback):
    """Begins each checkpoint of a run with an open manifest, and seals it when the host has written all the rest.

    The host writes trainer_state.json last, and then pushes the checkpoint or deletes older ones: it is sealed between
    the two, so that at every moment one sealed checkpoint is there.

    A push copies the files that the host knows into the output directory, and uploads that while training goes on:
    `on_push_begin`, right before, has put the whole adapter there, so that the host finds the same bytes.
    """

    def __init__(self, host: SealingHost) -> None:
        self._host = host
        self._training = False
        self._open: str | None = None
        self._sealed: str | None = None  # until the host has done with it
        self._largest: float | None = None

    def begin(self, directory: str, largest: float) -> None:
        """Prepares `directory` for a save, on every rank; `largest`: the largest magnitude of what trained."""
        args = self._host.args
        self._open, self._largest = None, largest
        if args.should_save and os.path.abspath(directory) == self._root():
            self._clear_root()
        if self._training and is_checkpoint(directory):
            self._open = os.path.abspath(directory)
        begin_save(
            directory,
            rank=args.process_index,
            processes=args.world_size,
            first=args.should_save,
            sealed=self._open is not None,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = True
        save_state, finish = state.save_to_json, self._finish

        def save_and_seal(path: str) -> None:  # no method, which a deepcopy of the state would follow to the trainer
            save_state(path)
            finish(os.path.dirname(os.path.abspath(path)))

        state.save_to_json = save_and_seal

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sealed = None

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._sealed is not None and args.should_save:
            self._clear_root()
            place(self._sealed, self._root(), our_adapters(self._host.model))

    def _root(self) -> str:
        return os.path.abspath(str(self._host.args.output_dir))

    def _clear_root(self) -> None:
        """Waits until nothing of the output directory is being uploaded; another kind of adapter takes ours away."""
        pushed = getattr(self._host, "push_in_progress", None)  # hub_always_push does not wait, and would mix two
        if pushed is not None and not pushed.is_done():
            pushed.wait_until_done()
        if "default" not in our_adapters(self._host.model):
            retire(self._root())

    def end(self) -> None:
        """After the run: what is saved now is no checkpoint of a Trainer."""
        self._training, self._open, self._sealed = False, None, None

    def _finish(self, directory: str) -> None:
        if directory == self._open:
            args, self._open, self._sealed = self._host.args, None, directory
            adapters = our_adapters(self._host.model)
            terms = self._host.ba_lora
            known = Manifest(
                largest=self._largest,
                save_only_model=args.save_only_model,
                terms=None if terms is None else terms.to_dict(),
                rows=step_rows(args),
                settings=run_settings(self._host),
            )
            seal(directory, adapters, known)


def step_rows(args: Any) -> dict[str, int]:
    """Returns what is multiplied to the rows of an optimizer step, by the names of the host's arguments."""
    return {
        "per_device_train_batch_size": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": args.world_size,
    }


# which optimizer's state holds them: a resumed run has the checkpoint's, whatever its arguments say
OF_THE_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_OF_THE_RUN = ("seed", "data_seed", "max_grad_norm", *OF_THE_OPTIMIZER)


def run_settings(host: HostTrainer) -> dict[str, Any]:
    """Returns what of a host's arguments and adapter makes a run what it is, as plain values, by their names."""
    args = host.args
    known = {key: getattr(args, key, None) for key in _OF_THE_RUN}
    schedule = getattr(args, "lr_scheduler_type", None)
    known |= {"optim": optimizer_name(args), "lr_scheduler_type": str(getattr(schedule, "value", schedule))}
    known |= {"lora_dropout": getattr(active_config(host.model), "lora_dropout", None)}
    return {**known, "optimizer": optimizer_kind(host.optimizer)}


def optimizer_kind(optimizer: Any) -> str | None:
    """Returns package and class of an optimizer, beneath what a host wraps it in; None of none."""
    kind = type(getattr(optimizer, "optimizer", optimizer))
    return None if optimizer is None else f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


@contextmanager
def alone_in(host: HostTrainer) -> Iterator[None]:
    """Holds the output directory against other runs; the first process does, for all of a job.

    Raises:
        ValueError: another run is going on there; on every process.
    """
    holding = only_run(str(host.args.output_dir)) if host.args.process_index == 0 else None
    error = None
    try:
        if holding is not None:
            holding.__enter__()
    except ValueError as refused:
        error, holding = str(refused), None
    raise_on_every_process(error)
    try:
        yield
    finally:
        if holding is not None:
            holding.__exit__(None, None, None)
