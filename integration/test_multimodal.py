"""Multimodal models in the trainers: text through their own classes, and images, as the host's collators give them."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from helpers import TERMS, fresh
from models import character_tokenizer
from multimodal import image_batch, skip_where_broken, text_batch, tiny_multimodal, tiny_processor
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig, SFTTrainer

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, BaLoraTrainer, RegularizerConfig
from balora_plugin.training.repeated_samples import drop_rows

PLACEHOLDER = {"llava": "<image>", "gemma3": "<start>"}
TEXT = [{"prompt": f"What is {i} + {i}? ", "completion": f"It is {2 * i}" + " ok" * (i % 3)} for i in range(8)]


def adapter(**changes):
    values = {"r": 2, "lora_alpha": 2, "target_modules": "all-linear", "regularizers": TERMS}
    return BaLoraConfig(**{**values, **changes})


def arguments(tmp_path, kind=TrainingArguments, **changes):
    values = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 1,
    }
    return kind(**{**values, **changes})


def history(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def factors(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_trained(trainer, base, batch):
    """Consistency grew from exact 0, and what is saved is the trained model in plain PEFT on the whole one."""
    consistency = history(trainer, "balora/consistency")
    assert consistency[0] == 0.0
    assert consistency[-1] > 1e-7
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    trainer.save_model()
    plain = PeftModel.from_pretrained(copy.deepcopy(base), trainer.args.output_dir).eval()
    with torch.no_grad():
        expected, before = trainer.model.eval()(**inputs).logits, base.eval()(**inputs).logits
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 1e-4


def made_by_hand(tmp_path, family, images=True, model=None, terms=TERMS, **changes):
    """A transformers Trainer over ready batches."""
    rows = [image_batch(family, seed) if images else text_batch(seed) for seed in range(4)]
    return BaLoraTrainer(
        tiny_multimodal(family) if model is None else model,
        arguments(tmp_path, **changes),
        train_dataset=rows,
        data_collator=lambda features: features[0],
        peft_config=adapter(target_modules=["q_proj", "v_proj", "down_proj"], regularizers=terms),
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mllama", "idefics3"])
def test_pixels_and_what_belongs_to_them_train_and_resume(family, tmp_path):
    base = tiny_multimodal(family)
    whole = made_by_hand(tmp_path / "whole", family, save_strategy="steps", save_steps=2, gradient_checkpointing=True)
    whole.train()
    assert_trained(whole, base, image_batch(family))
    again = made_by_hand(tmp_path / "again", family, gradient_checkpointing=True)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    expected = factors(whole)
    assert all(torch.equal(value, expected[name]) for name, value in factors(again).items())


@pytest.mark.parametrize("family", ["qwen3_5", "gemma3", "llama4"])
def test_text_trains_the_multimodal_class(family, tmp_path):
    skip_where_broken(family)
    base = tiny_multimodal(family)
    trainer = made_by_hand(tmp_path, family, images=False)
    trainer.train()
    assert_trained(trainer, base, text_batch())
    assert not any("vis" in name for name in factors(trainer))


def test_the_text_class_of_a_multimodal_checkpoint_trains_too(tmp_path):
    tiny_multimodal("qwen3_5").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert type(base).__name__ == "Qwen3_5ForCausalLM"
    trainer = made_by_hand(tmp_path, "qwen3_5", images=False, model=copy.deepcopy(base))
    trainer.train()
    assert_trained(trainer, base, text_batch())
    whole, names = tiny_multimodal("qwen3_5"), {r"model\.layers": "model.language_model.layers"}
    served = PeftModel.from_pretrained(whole, trainer.args.output_dir, key_mapping=names).eval()
    with torch.no_grad():
        ids = text_batch()["input_ids"]
        torch.testing.assert_close(served(ids).logits, trainer.model.eval()(ids).logits, rtol=0, atol=1e-5)


def test_repeated_samples_of_a_batch_with_pixels_stay_and_do_not_count():
    batch = image_batch("qwen2_5_vl")
    dropped = drop_rows(batch, 1)
    assert all(dropped[key] is value for key, value in batch.items() if key != "labels")
    assert torch.equal(dropped["labels"][0], batch["labels"][0])
    assert bool((dropped["labels"][1] == -100).all())


def sft(tmp_path, cls, model, rows, processing_class, **changes):
    extra = {key: changes.pop(key) for key in ("peft_config",) if key in changes}
    args = arguments(tmp_path, SFTConfig, per_device_train_batch_size=2, max_length=None, **changes)
    return cls(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=processing_class, **extra
    )


def pictures(family):
    """Prompts with an image each, completions."""
    image = pytest.importorskip("PIL.Image")
    draw = torch.Generator().manual_seed(2)
    return [
        {
            "images": [image.fromarray(torch.randint(0, 256, (8, 8, 3), generator=draw).to(torch.uint8).numpy())],
            "prompt": f"{PLACEHOLDER[family]} What is {i}? ",
            "completion": f"It is {2 * i}" + " ok" * (i % 3),
        }
        for i in range(6)
    ]


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_trls_images_train_as_in_sft_trainer(family, tmp_path):
    """TRL's own collator and the family's own processor; the first task loss is SFTTrainer's."""
    rows, base = pictures(family), tiny_multimodal(family)
    plain = sft(tmp_path / "plain", SFTTrainer, fresh(base), rows, tiny_processor(family), max_steps=1)
    plain.train()
    trainer = sft(
        tmp_path, BaLoraSFTTrainer, fresh(base), rows, tiny_processor(family), peft_config=adapter(lora_dropout=0.1)
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert "pixel_values" in batch
    trainer.train()
    assert history(trainer, "balora/task")[0] == pytest.approx(history(plain, "loss")[0], rel=1e-5)
    assert_trained(trainer, base, batch)


def test_text_by_trl_on_a_multimodal_checkpoint(tmp_path):
    """Given by name: its own class, and its tokenizer, for which no image library is needed."""
    tiny_multimodal("qwen3_5").save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    trainer = sft(tmp_path, BaLoraSFTTrainer, str(tmp_path / "base"), TEXT, None, peft_config=adapter())
    assert type(trainer.model.get_base_model()).__name__ == "Qwen3_5ForConditionalGeneration"
    trainer.train()
    assert_trained(trainer, tiny_multimodal("qwen3_5"), text_batch())


def test_images_and_a_teacher_cache_are_refused_by_name(tmp_path):
    terms = RegularizerConfig(lambda_consistency=0.5, teacher_cache=str(tmp_path / "cache"))
    rows = [{"images": [], "text": "a"}]
    with pytest.raises(ValueError, match=r"teacher_cache=.* with images in the data.*Remove teacher_cache"):
        sft(tmp_path, BaLoraSFTTrainer, None, rows, None, peft_config=adapter(regularizers=terms))
    trainer = made_by_hand(tmp_path, "llava", terms=terms, num_train_epochs=1, max_steps=-1)
    with pytest.raises(ValueError, match=r"teacher_cache=.*pixel_values in the batch.*remove teacher_cache"):
        trainer.train()


def test_a_tokenizers_template_for_a_processor_is_refused_by_name(tmp_path):
    character_tokenizer().save_pretrained(tmp_path / "chat")
    rows = [{"images": [], "text": "a"}]
    changes = {"peft_config": adapter(), "chat_template_path": str(tmp_path / "chat")}
    with pytest.raises(ValueError, match=r"chat_template_path=.*multimodal processor: write it to a .jinja file"):
        sft(tmp_path, BaLoraSFTTrainer, None, rows, None, **changes)


def test_a_teacher_cache_takes_a_multimodal_models_text(tmp_path):
    """Kinds of tokens that are all text are as if they were not there."""
    terms = RegularizerConfig(lambda_consistency=0.5, teacher_cache=str(tmp_path / "cache"), teacher_cache_top_k=0)
    trainer = made_by_hand(tmp_path, "gemma3", images=False, terms=terms, num_train_epochs=1, max_steps=-1)
    for row in trainer.train_dataset:
        row["token_type_ids"] = torch.zeros_like(row["input_ids"])
    trainer.train()
    assert trainer.ba_lora_run.cache.runs <= 5
    assert len(trainer.ba_lora_run.cache) == 8
