"""Entry point of `python -m studies.quickstart`: quietens the host libraries, then runs the comparison."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from .progress import Phase
from .settings import Options, parse_options

HOSTS = ("accelerate", "bitsandbytes", "datasets", "peft", "torch", "torchao", "transformers", "trl")


def prepare_environment(options: Options) -> None:
    """Sets what the hosts read while they are imported: no network, no thread pools of their own, no chatter."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve others where cores are shared
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the default of the hosts' bars; the quickstart's own say what they do
    warnings.filterwarnings("ignore", module=rf"({'|'.join(HOSTS)})(\.|$)")
    for host in HOSTS:
        logging.getLogger(host).setLevel(logging.ERROR)


def silence_progress_bars() -> None:
    """Turns off the hosts' progress bars; the quickstart says itself how far it is."""
    import datasets
    import torch.utils._pytree

    logging.getLogger(torch.utils._pytree.__name__).setLevel(logging.ERROR)  # torchao's import makes it warn
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()


def main() -> int:
    """Runs the quickstart; the exit status is 1 if a saved adapter does not give back its model."""
    options = parse_options()
    prepare_environment(options)
    with Phase("loading PyTorch, Transformers and PEFT"):
        silence_progress_bars()
        from .run import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
