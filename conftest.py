"""Fixtures of tests/ and integration/."""

from __future__ import annotations

import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from models import VOCABULARY, character_tokenizer, tiny_llama

THREADS = torch.get_num_threads()  # OMP_NUM_THREADS: two threads in each of two processes on two cores only wait


@pytest.fixture(scope="session", autouse=True)
def _imports_are_not_garbage() -> None:
    """accelerate collects garbage whenever a trainer starts: a second and more over what the libraries hold."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    if "torch._dynamo" in sys.modules:  # Axolotl switches it on where it compiles: a compiler's failure is silent then
        torch._dynamo.config.suppress_errors = False


@pytest.fixture(scope="session")
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
