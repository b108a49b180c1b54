"""Several adapters that train together: a host loads a checkpoint as if the first were alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel


@contextmanager
def kept_active(model: Any, directory: str | None) -> Iterator[None]:
    """Inside, a host loads the checkpoint in `directory`; what was active, and what trained, is so again behind it.

    The host makes the first active adapter alone active, and loads that one alone (the best checkpoint at the end) or,
    of some versions, those alone that have a directory of their own: all that are active are loaded from here.
    """
    names = model.active_adapters if isinstance(model, PeftModel) else []
    if len(names) < 2:
        yield
        return
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    idle = {name: model.peft_config[name].inference_mode for name in names}
    yield
    for name in names if directory is not None else []:
        inside = directory if name == "default" else os.path.join(str(directory), name)
        model.load_adapter(inside, name, is_trainable=True)
    model.base_model.set_adapter(names)
    for name, was in idle.items():
        model.peft_config[name].inference_mode = was
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
