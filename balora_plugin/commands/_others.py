"""What other packages say while a command runs: kept from a screen on which our own lines are read."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# whatever a command is to do: torchao that its kernels do not load, torch that torchao registers a class in an old way,
# bitsandbytes that there is no GPU, kernels that the hub is not asked
WARN = ("torch", "torchao", "bitsandbytes", "kernels", "triton")
LOG = ("torch.utils._pytree", "torchao", "bitsandbytes", "kernels")  # torch sets the levels of "torch" when it comes


@contextmanager
def said_by_others(*, shown: bool = False) -> Iterator[None]:
    """Keeps warnings that come from WARN, and what LOG says below an error, from stderr; `shown` keeps nothing."""
    if shown:
        yield
        return
    loggers = [logging.getLogger(name) for name in LOG]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for name in WARN:
            warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
