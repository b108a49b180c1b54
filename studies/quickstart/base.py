"""What every part of the quickstart knows of the pre-trained model: a folder with weights and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


@dataclass(frozen=True)
class BaseModel:
    """Where the pre-trained model and its tokenizer lie; every run loads a fresh copy."""

    folder: Path
    was_cached: bool

    def load_model(self) -> Any:
        """A fresh float32 copy of the pre-trained model in evaluation mode."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model."""
        return AutoTokenizer.from_pretrained(self.folder)
