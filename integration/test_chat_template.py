"""chat_template_path= naming another tokenizer: taken where the vocabulary stays, else refused by name."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers import TERMS
from models import character_tokenizer, tiny_llama
from trl import SFTConfig

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer

TEMPLATE = "{% for m in messages %}{{ m.role }}> {{ m.content }}<s>{% endfor %}"
ROWS = [
    {"messages": [{"role": "user", "content": f"{i} + 1"}, {"role": "assistant", "content": str(i + 1)}]}
    for i in range(4)
]


@pytest.fixture
def other(tmp_path):
    """A tokenizer of another template and end-of-sequence token, and of the same vocabulary."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "<s>"
    tokenizer.save_pretrained(tmp_path / "other")
    return tokenizer, tmp_path / "other"


def build(out, template, model=None, **changes):
    args = SFTConfig(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        save_strategy="no",
        disable_tqdm=True,
        **changes,
    )
    args.chat_template_path = template
    config = BaLoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    return BaLoraSFTTrainer(
        model if model is not None else tiny_llama(vocab_size=128),
        args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=character_tokenizer(),
        peft_config=config,
        regularizers=TERMS,
    )


def losses(made):
    return [row["loss"] for row in made.state.log_history if "loss" in row]


def test_a_template_of_the_same_vocabulary_trains_as_its_file_does(other, tmp_path):
    _, path = other
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    before = tiny_llama(vocab_size=128).get_input_embeddings().weight
    found = []
    for template, changes in ((path, {}), (str(tmp_path / "chat.jinja"), {"eos_token": "<s>"})):
        made = build(tmp_path / "out", template, **changes)
        made.train()
        assert made.processing_class.chat_template == TEMPLATE
        assert made.processing_class.eos_token == "<s>"
        assert torch.equal(made.model.get_input_embeddings().original_module.weight, before)
        found.append(losses(made))
    assert found[0] == found[1] and len(found[0]) == 2


def test_what_would_change_the_vocabulary_is_refused_with_the_way_out(other, tmp_path):
    tokenizer, path = other
    with pytest.raises(ValueError, match=r"from 96 to 128 rows.*chat\.jinja.*eos_token='<s>'"):  # 95 tokens
        build(tmp_path / "out", path, tiny_llama())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match=r"would add 2 tokens \(<\|im_end\|>, .*clone_chat_template.*modules_to_save"):
        build(tmp_path / "out", path)
