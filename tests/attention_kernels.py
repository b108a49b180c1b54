"""FlashAttention's two functions written with PyTorch's, for machines without a GPU, and what watches attention run."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn import functional as F
from transformers import modeling_flash_attention_utils as flash
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """q (B, L, H, D), k and v (B, L, G, D) -> (B, L, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, None, dropout_p, causal, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """q (tokens, H, D): what stands between two entries of cu_seqlens sees itself alone. Nothing in Python depends on
    the data, so that a graph can hold it, as it holds the operator of the package.
    """
    at = torch.arange(q.shape[0], device=q.device)
    query, key = (torch.searchsorted(edges.to(at.dtype), at, right=True) for edges in (cu_seqlens_q, cu_seqlens_k))
    mask = query[:, None] == key[None, :]
    mask = mask & (at[:, None] >= at[None, :]) if causal else mask
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=softmax_scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def install_reference_flash_attention(monkeypatch):
    """Lets transformers find them as the package flash_attn; a model then needs `_attn_implementation` alone."""
    if Version(transformers.__version__) == Version("5.6.0"):
        pytest.skip("flash attention of transformers 5.6.0 fails on every model without attention sinks")
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    padding.pad_input, padding.unpad_input = flash._pad_input, flash._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    flash.lazy_import_flash_attention("flash_attention_2")  # as when a model is loaded: no graph can hold it


@contextmanager
def watched(name):
    """Inside, a list of whether gradients were on at each attention call of the implementation `name`."""
    original, calls = ALL_ATTENTION_FUNCTIONS[name], []

    def counting(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return original(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = counting
    try:
        yield calls
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = original
