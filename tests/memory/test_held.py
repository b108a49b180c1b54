"""What is held all along, against the tensors that real optimizers and quantised layers hold."""

from __future__ import annotations

import pytest
import torch
from helpers import ba_lora, trainable
from models import load_quantised, tiny_llama
from torch import nn
from transformers import Adafactor

from balora_plugin.memory.held import held_by, quantised_bytes, state_bytes
from balora_plugin.memory.live import LiveBytes, bytes_of

pytestmark = pytest.mark.hosts


def adafactor(parameters):
    return Adafactor(parameters, lr=1e-3, relative_step=False)


OPTIMIZERS = {
    "adamw_torch": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adafactor": adafactor,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states_are_those_of_the_optimizer(name):
    model = ba_lora(tiny_llama())
    optimizer = OPTIMIZERS[name](trainable(model))
    ids = torch.arange(8).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    real = bytes_of(x for x in states if x.ndim > 0)  # beside a few numbers: steps
    assert held_by(model, name).optimizer == real


def test_states_in_eight_bits_keep_small_parameters_whole():
    large, small = torch.empty(1024, 1024), torch.empty(64)
    assert state_bytes(large, "paged_adamw_8bit") == pytest.approx(2 * large.numel(), rel=0.02)
    assert state_bytes(small, "adamw_bnb_8bit") == 2 * 4 * 64


@pytest.mark.parametrize(("kind", "bits", "double"), [("nf4", 4, False), ("nf4_double", 4, True), ("int8", 8, True)])
def test_quantised_weights_are_those_of_bitsandbytes(kind, bits, double, tmp_path):
    pytest.importorskip("bitsandbytes")
    whole = tiny_llama(hidden_size=128, intermediate_size=256)
    whole.save_pretrained(tmp_path)
    linear = [m.weight for m in whole.model.modules() if isinstance(m, nn.Linear)]
    packed = sum(quantised_bytes(w, bits, double=double) for w in linear)
    expected = held_by(whole.requires_grad_(False), "sgd").weights - bytes_of(linear) + packed
    model = load_quantised(tmp_path, kind).requires_grad_(False)
    assert held_by(model, "sgd").weights == pytest.approx(expected, rel=0.01)


def test_bytes_live_from_their_making_until_nobody_holds_them():
    with LiveBytes() as live:
        first = torch.zeros(100)
        view = first[:10]
        second = first + 1
        assert live.now == live.peak == 800
        del first
        assert live.now == 800  # the view holds it
        del view
        assert (live.now, live.peak) == (400, 800)
        live.start_phase()
        assert live.peak == 400
        second.mul_(2)
        assert live.peak == 400
