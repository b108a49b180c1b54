"""Everywhere a path may come in, os.PathLike is as good as text, and passes the same guards."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset
from helpers import TERMS, ba_lora, stock
from models import character_tokenizer, tiny_llama
from transformers import DataCollatorForLanguageModeling, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraModel, BaLoraTrainer, RegularizerConfig
from balora_plugin.checkpoint.location import AdapterFiles
from balora_plugin.commands import main
from balora_plugin.export.lora_file import read_adapter, write_adapter

TEXTS = [f"The number {i} comes before {i + 1}" for i in range(8)]


def trainer(out, **changes):
    values = {"max_steps": 3, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    tokenizer = character_tokenizer()
    args = TrainingArguments(output_dir=str(out), **{**values, **changes})
    args.output_dir = out  # transformers makes text of it
    config = BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], regularizers=TERMS)
    return BaLoraTrainer(
        model=tiny_llama(),
        args=args,
        train_dataset=Dataset.from_list([tokenizer(text) for text in TEXTS]),
        data_collator=DataCollatorForLanguageModeling(copy.deepcopy(tokenizer), mlm=False),
        peft_config=config,
    )


def test_training_and_resuming(tmp_path):
    trainer(tmp_path).train()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert resumed.state.global_step == 3
    resumed.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "ba_lora.json").exists()


def damaged(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("as_given", [str, lambda path: path, lambda path: True], ids=["str", "Path", "True"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_every_way_to_resume_passes_the_guards(as_given, name, tmp_path):
    trainer(tmp_path).train()
    damaged(tmp_path / "checkpoint-3" / name)
    with pytest.raises(ValueError, match=r"cannot resume.*checkpoint-2"):
        trainer(tmp_path).train(resume_from_checkpoint=as_given(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("start", ["pissa", True, "plain"])
def test_saving_and_loading_an_adapter(start, tmp_path, ids):
    made = stock(tiny_llama()) if start == "plain" else ba_lora(tiny_llama(), init_lora_weights=start)
    made.save_pretrained(tmp_path / "adapter")
    target = ba_lora(tiny_llama(), init_lora_weights=True if start == "plain" else start)
    target.load_adapter(tmp_path / "adapter", "second")
    if start != "plain":
        loaded = BaLoraModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
        assert BaLoraConfig.from_pretrained(tmp_path / "adapter").r == 4
        loaded.create_or_update_model_card(tmp_path / "adapter")
        loaded.peft_config["default"].save_pretrained(tmp_path / "config")
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, made.eval()(input_ids=ids).logits)


def test_settings_keep_them_as_text(tmp_path):
    config = BaLoraConfig(
        start_from=tmp_path / "base", regularizers=RegularizerConfig(teacher_cache=tmp_path / "cache")
    )
    assert config.start_from == str(tmp_path / "base")
    assert json.loads(json.dumps(config.to_settings()))["regularizers"]["teacher_cache"] == str(tmp_path / "cache")


def test_files_export_and_commands(tmp_path, capsys):
    ba_lora(tiny_llama()).save_pretrained(tmp_path / "adapter")
    assert str(AdapterFiles(tmp_path / "adapter")) == str(tmp_path / "adapter")
    write_adapter(read_adapter(tmp_path / "adapter"), tmp_path / "copy", {})
    assert main(["export", tmp_path / "adapter", "--output", tmp_path / "exported"]) == 0, capsys.readouterr()
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json: it is no adapter"):
        read_adapter(tmp_path)


def test_a_base_given_to_trl(tmp_path):
    from trl import SFTConfig

    from balora_plugin import BaLoraSFTTrainer

    tiny_llama().save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    args = SFTConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[], max_steps=1, disable_tqdm=True
    )
    args.chat_template_path = tmp_path / "chat.jinja"
    made = BaLoraSFTTrainer(
        model=tmp_path / "base",
        args=args,
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
        peft_config=BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]),
    )
    made.train()
    assert made.state.global_step == 1


def test_a_teacher_given_by_its_path_is_named(tmp_path):
    config = {"regularizers": TERMS, "teacher_model": tmp_path / "teacher"}
    with pytest.raises(TypeError, match="must be a loaded model"):
        BaLoraTrainer(model=tiny_llama(), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), **config)
