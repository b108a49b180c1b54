"""The model that a monitored run's drift is measured from, where no term brings a teacher."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..adapter.config import active_config
from ..config import RegularizerConfig
from ..distributed import is_sharded
from .checks.teacher import check_teacher
from .host import HostTrainer


def monitored_teacher(host: HostTrainer, bare: Any, config: RegularizerConfig, given: nn.Module | None) -> Any:
    """Returns a second model as teacher: the one given, or a frozen copy of what training begins with; None if neither.

    An adapter that can be switched off needs none, and a consistency term has brought its own. The copy shares what
    does not train: of a start that rewrites its base (PEFT's own PiSSA) only the adapter's factors are copied, which on
    that base are the pre-trained model again; of full fine-tuning everything is.

    Raises:
        ValueError: the model is split over processes, so that there is no copy to be had.
    """
    if given is not None or not config.monitor or config.lambda_consistency:
        return given
    try:
        check_teacher(active_config(host.model), None, model=bare)
    except ValueError as error:
        if host.is_fsdp_enabled or host.is_deepspeed_enabled or is_sharded(bare):
            raise ValueError(
                "monitor=True measures the distance from the model that training begins with, and an engine that "
                f"splits the model leaves no copy of it to be had ({error.args[0].partition(':')[0]}): pass "
                "teacher_model=<the pre-trained model>, or set monitor=False."
            ) from None
        return as_it_began(bare)
    return None


def as_it_began(model: nn.Module) -> nn.Module:
    """Returns a copy of a model that keeps computing what the model computes now; what does not train is shared.

    Without a forward that a host gave to the instance (TRL's own loss): the copy's would run the model's layers.
    """
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    twin = copy.deepcopy(model, shared)
    if not hasattr(twin, "_hf_hook"):  # accelerate's, which moves tensors between devices
        vars(twin).pop("forward", None)
    return twin
