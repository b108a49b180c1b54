"""Refusals of a run in which what it says that it trains would not move, or what it says stays would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...adapter.delta import FROZEN


def check_adapters(model: nn.Module) -> None:
    """Refuses adapters that are merged into the base or switched off, and A0 or B0 that would train.

    A merged adapter has changed the base, which is the teacher; a pass of the teacher would take it out again, to
    rounding.

    Raises:
        ValueError: names the module and what to call.
    """
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.merged:
            raise ValueError(f"the adapter is merged into {name}: call model.unmerge_adapter() before training.")
        if module.disable_adapters:
            raise ValueError(
                f"the adapter is switched off at {name}: train outside of `with model.disable_adapter()`, or call "
                "model.base_model.enable_adapter_layers() first."
            )
        for factor in FROZEN:
            for parameter in getattr(module, factor, nn.Module()).parameters():
                if parameter.requires_grad:
                    raise ValueError(
                        f"{name}.{factor} requires a gradient: A0 and B0 stay as they are, so that dA and dB start at "
                        "a zero update. Something unfroze all parameters: leave those of frozen_A and frozen_B out."
                    )


def check_moves(model: nn.Module, optimizer: Any, warn: Callable[[str, str], None]) -> None:
    """Refuses a training whose optimizer would move nothing that trains; says once what it leaves out.

    `warn`: warn(key, message), which says each key once.

    Raises:
        ValueError: names a parameter and the usual reasons.
    """
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            "no parameter requires a gradient, so nothing would train: load a saved adapter with is_trainable=True, "
            "and call prepare_model_for_kbit_training before the adapter is put on the model, not after it."
        )
    groups = getattr(optimizer, "param_groups", None)
    if groups is None or "Dummy" in type(getattr(optimizer, "optimizer", optimizer)).__name__:
        return  # one that steps inside the backward pass holds a tensor of its own
    held = {id(p) for group in groups for p in group["params"]}
    left = [name for key, name in trained.items() if key not in held]
    if len(left) == len(trained):
        raise ValueError(
            f"the optimizer holds nothing that trains, {left[0]} for one: optimizers=(...) was "
            "made of the parameters of a model without the adapter. Leave it out (args: optim, learning_rate), make "
            "it of get_ba_lora_model(model, config), or pass optimizer_cls_and_kwargs."
        )
    if left:
        shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        warn(
            "optimizer_part",
            f"the optimizer holds {len(trained) - len(left)} of {len(trained)} trainable tensors, so that the others "
            f"stay as they are: {shown}. Make it of all (optimizers=(...) of every parameter that requires a "
            "gradient), or freeze what is not to train (requires_grad_(False)).",
        )


def check_steps(optimizer: Any, accelerator: Any) -> None:
    """Refuses a prepared optimizer that asks another accelerator than the trainer's whether a step is due.

    Accelerate's objects share one state, which a deep copy takes apart: a copied trainer's optimizer holds the right
    tensors and never steps.

    Raises:
        ValueError: says how it comes, and what to do.
    """
    own = getattr(optimizer, "gradient_state", None)
    if own is None or vars(own) is vars(accelerator.gradient_state):
        return
    raise ValueError(
        "the optimizer is that of a copied trainer (copy.deepcopy of one that has trained) and would not move a "
        "weight: make a new trainer of copy.deepcopy(trainer.model), or set trainer.optimizer = trainer.lr_scheduler "
        "= None on the copy, which begins both anew."
    )
