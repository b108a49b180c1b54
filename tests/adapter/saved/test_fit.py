"""An adapter loaded over one of another kind: refused by the name of the setting, never a third function."""

from __future__ import annotations

import pytest
import torch
from helpers import ba_lora, logits, train
from models import tiny_llama
from peft import LoraConfig

pytestmark = pytest.mark.hosts

TARGETS = ["q_proj", "v_proj"]
STARTS = ("pissa", True)
starts = pytest.mark.parametrize("start", STARTS)
# what it was saved with, what the adapter here has, what the error names
OTHERS = {
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 16}}, {}, r"alpha_pattern=\{\} here.*write \{'q_proj': 16\}"),
    "alpha_pattern_here": ({}, {"alpha_pattern": {"v_proj": 9}}, r"alpha_pattern=\{'v_proj': 9\} here"),
    "alpha": ({}, {"lora_alpha": 64}, "lora_alpha=64 here.*write 4"),
    "rslora": ({}, {"use_rslora": True}, "use_rslora=True here.*write False"),
    "rank": ({}, {"r": 8}, "r=8 here.*write 4"),
    "fewer_targets": ({}, {"targets": ["q_proj"]}, r"also holds .*v_proj\.lora_A"),
    "more_targets": ({}, {"targets": [*TARGETS, "k_proj"]}, r"lacks .*k_proj\.lora_A"),
    "no_modules_here": ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save=None here.*\['lm_head'\]: write that"),
    "modules_here": ({}, {"modules_to_save": ["lm_head"]}, r"lacks .*lm_head.*modules_to_save=\['lm_head'\] here"),
    "other_modules": ({"modules_to_save": ["norm"]}, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
}


def made(start, **changes):
    targets = changes.pop("targets", TARGETS)
    return ba_lora(tiny_llama(), targets=targets, init_lora_weights=start, **changes)


def ids():
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


@starts
@pytest.mark.parametrize("other", OTHERS)
def test_an_adapter_of_another_kind_is_refused_and_nothing_is_changed(other, start, tmp_path):
    saved, here, said = OTHERS[other]
    trained = made(start, **saved)
    train(trained, ids(), steps=2)
    trained.save_pretrained(tmp_path)
    model = made(start, **here)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=said) as caught:
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # the base's head too


@starts
@pytest.mark.parametrize(
    ("saved", "here"),
    [
        ({"modules_to_save": ["lm_head", "norm"]}, {"modules_to_save": ["norm", "lm_head"]}),
        ({"alpha_pattern": {"q_proj": 16}}, {"alpha_pattern": {"self_attn.q_proj": 16}}),  # the same, said otherwise
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
        ({"r": 8, "rank_pattern": {"q_proj": 4, "v_proj": 4}, "lora_alpha": 4}, {}),
    ],
)
def test_what_computes_the_same_loads(saved, here, start, tmp_path):
    trained = made(start, **saved)
    train(trained, ids(), steps=2)
    trained.save_pretrained(tmp_path)
    model = made(start, **here)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(model.eval(), ids()), logits(trained.eval(), ids()))


@starts
def test_a_grown_vocabulary_is_no_foreign_tensor(start, tmp_path):
    """PEFT writes the base's own embeddings beside the adapter then."""
    base = tiny_llama()
    base.resize_token_embeddings(98)
    trained = ba_lora(base, targets=TARGETS, init_lora_weights=start)
    train(trained, ids(), steps=2)
    trained.save_pretrained(tmp_path, save_embedding_layers=True)
    other = tiny_llama()
    other.resize_token_embeddings(98)
    model = ba_lora(other, targets=TARGETS, init_lora_weights=start)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(model.eval(), ids()), logits(trained.eval(), ids()))


def test_another_adapter_of_the_model_is_loaded_as_peft_does(tmp_path):
    trained = made("pissa")
    trained.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=["k_proj"]))
    trained.save_pretrained(tmp_path)
    model = made("pissa")
    model.load_adapter(tmp_path / "other", "other")
    model.load_adapter(tmp_path, "default")
    assert set(model.peft_config) == {"default", "other"}
