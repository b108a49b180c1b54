"""Options of an adapter: what is trained can be read back, what could not is one line before anything is loaded."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import ba_lora, logits, train
from models import tiny_llama

from balora_plugin import BaLoraConfig, BaLoraModel

pytestmark = pytest.mark.hosts

WRONG = {
    "r": [True, 0, 2.0, "4", 10**30],
    "lora_alpha": [0, -1, float("nan"), float("inf"), "8", True, None, 10**400],
    "lora_dropout": [-0.1, 1.1, float("nan"), "0.1", True, None],
    "use_rslora": ["false", 1, None],
    "rank_pattern": [{"q_proj": 2.5}, {"q_proj": True}, {"(": 2}, {3: 2}, ["q_proj"]],
    "alpha_pattern": [{"q_proj": True}, {"q_proj": float("inf")}, {"q_proj": "2"}, {"(": 2}],
    "target_modules": ["(", [1], {"q_proj": 1}, 3],
    "exclude_modules": ["(", [1], 3],
    "modules_to_save": ["lm_head", [1], 3],
    "target_parameters": [[1]],
    "layers_to_transform": [-1, True, "0", [0.5]],
    "init_lora_weights": [0, 1],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_an_option_that_could_not_be_read_back_is_one_line_by_name(key, value):
    values = {"r": 4, "target_modules": ["q_proj"], key: value}
    with pytest.raises(ValueError) as caught:
        BaLoraConfig(**values)
    message = str(caught.value)
    assert message.startswith(f"{key}={repr(value)[:60]}") and "\n" not in message


RIGHT = [
    {"lora_alpha": np.float32(8), "lora_dropout": np.float64(0.1), "r": np.int64(4), "use_rslora": np.bool_(True)},
    {"rank_pattern": {"q_proj": np.int64(2)}, "alpha_pattern": {r".*layers\.0.*": np.float32(3)}, "lora_alpha": 2.5},
    {"target_modules": {"q_proj", "v_proj"}, "exclude_modules": r".*layers\.1.*", "modules_to_save": ("lm_head",)},
    {"target_modules": ("q_proj",), "layers_to_transform": [1]},
]


@pytest.mark.parametrize("changes", RIGHT)
def test_what_is_trained_is_read_back(changes, ids, tmp_path):
    base = tiny_llama()
    targets = changes.get("target_modules", "all-linear")
    model = ba_lora(copy.deepcopy(base), targets=targets, **{k: v for k, v in changes.items() if k != "target_modules"})
    train(model, ids, steps=1)
    model.save_pretrained(tmp_path)
    again = BaLoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(again.eval(), ids), logits(model.eval(), ids))
