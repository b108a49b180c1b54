"""Trains a byte-level BPE tokenizer and a 1.1-million-parameter Llama on the docstring corpus, once per machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .base import BaseModel
from .cache import cached_folder
from .settings import PretrainingSettings

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
RECIPE = 1  # raise it when the code below changes what a given setting produces


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocabulary` entries, the special tokens and all 256 bytes among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN)


def build_model(settings: PretrainingSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama; input and output embeddings are tied, as is usual at this size."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, chunk: int) -> torch.Tensor:
    """Token ids of all texts, each ended by the end-of-sequence token, cut into chunks: [chunks, chunk]."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    stream = [token for ids in encoded for token in (*ids, tokenizer.eos_token_id)]
    if len(stream) < chunk:
        raise ValueError(f"the corpus has {len(stream)} tokens, fewer than one chunk of {chunk}")
    usable = len(stream) // chunk * chunk
    return torch.tensor(stream[:usable]).view(-1, chunk)


def learning_rate_factor(step: int, settings: PretrainingSettings) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak; factor on the peak learning rate."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def pretrain(model: LlamaForCausalLM, chunks: torch.Tensor, settings: PretrainingSettings, progress: bool) -> float:
    """Trains `model` in place on random batches of `chunks` [n, chunk]; returns the last steps' mean loss in nats."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.empty(0, dtype=torch.long)
    losses: list[float] = []
    model.train()
    bar = tqdm(range(settings.steps), desc="pre-training", unit="step", disable=not progress)
    for _ in bar:
        while len(order) < settings.batch:  # a new epoch
            order = torch.cat([order, torch.randperm(len(chunks), generator=generator)])
        batch, order = chunks[order[: settings.batch]], order[settings.batch :]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[0]:.2f} -> {losses[-1]:.2f}", refresh=False)
    model.eval()
    recent = losses[-20:]
    return sum(recent) / max(1, len(recent))


def base_model(
    cache_dir: Path, texts: Sequence[str], fingerprint: str, settings: PretrainingSettings, progress: bool = True
) -> BaseModel:
    """The pre-trained model for these texts (digest `fingerprint`) and settings, from the cache or trained now."""

    def write(folder: Path) -> None:
        tokenizer = train_tokenizer(texts, settings.vocabulary)
        model = build_model(settings, tokenizer)
        pretrain(model, pack(texts, tokenizer, settings.chunk), settings, progress)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    keyed = asdict(settings) | {"corpus": fingerprint, "recipe": RECIPE}
    return BaseModel(*cached_folder(cache_dir, keyed, write))
