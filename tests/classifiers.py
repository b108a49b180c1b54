"""Tiny random classifiers of every architecture, and batches of samples for them."""

from __future__ import annotations

import torch
from models import VOCABULARY

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARED = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
ENCODER = {**SIZES, "max_position_embeddings": 64}
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
KINDS = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "deberta-v2": {**ENCODER, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": {**ENCODER, "cls_token_id": 1, "sep_token_id": 2, "classifier_pooling": "mean"},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": DECODER,
    "gemma": DECODER,
    "gemma2": DECODER,
    "qwen2": {**DECODER, "head_dim": None},
    "qwen3": DECODER,
}
_DROPOUT = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "modernbert": ("embedding_dropout", "mlp_dropout", "attention_dropout", "classifier_dropout"),
    **dict.fromkeys(("bert", "roberta", "deberta-v2"), (*DROPOUTS, "classifier_dropout")),
}


def classifier(kind="bert", *, num_labels=3, dropout=0.0, seed=1, **changes):
    """A random model for sequence classification; `dropout` everywhere, the head included."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    values = {key: value for key, value in KINDS[kind].items() if value is not None}
    rates = dict.fromkeys(_DROPOUT.get(kind, ("attention_dropout",)), dropout)
    config = AutoConfig.for_model(kind, **{**SHARED, **values, **rates, "num_labels": num_labels, **changes})
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config)


def batch(n=4, *, num_labels=3, length=12, seed=3, regression=False, multi=False):
    """Right-padded samples of different lengths with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (n, length), generator=generator)
    lengths = torch.randint(4, length + 1, (n,), generator=generator)
    mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    if regression:
        labels = 5 * torch.rand(n, generator=generator)
    elif multi:
        labels = torch.randint(0, 2, (n, num_labels), generator=generator).float()
    else:
        labels = torch.randint(0, num_labels, (n,), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
