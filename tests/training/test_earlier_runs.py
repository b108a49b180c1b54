"""What a run says of those before it: checkpoints that lie in its output directory, terms that it was resumed with."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
from helpers import TERMS
from models import tiny_llama
from peft import LoraConfig, get_peft_model
from test_acting import arguments, tokens

from balora_plugin import BaLoraConfig, BaLoraModel, BaLoraTrainer, RegularizerConfig
from balora_plugin.checkpoint.names import MANIFEST_FILE
from balora_plugin.training.earlier_runs import changed_rows, others_checkpoints

pytestmark = pytest.mark.hosts


@pytest.fixture
def said(caplog):
    """The BA-LoRA warnings so far."""
    logging.getLogger("transformers").propagate = True
    caplog.set_level(logging.WARNING)
    return lambda: [r.getMessage() for r in caplog.records if r.getMessage().startswith("BA-LoRA: ")]


def trainer(tmp_path, regularizers=TERMS, config=None, model=None, **changes):
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **changes}
    config = config or BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], regularizers=regularizers)
    given = {"peft_config": config} if model is None else {"regularizers": regularizers}
    return BaLoraTrainer(
        model=model or tiny_llama(), args=arguments(tmp_path, **changes), train_dataset=tokens(), **given
    )


def test_checkpoints_of_an_earlier_run_are_said_with_what_a_resume_would_take(tmp_path, said):
    trainer(tmp_path).train()
    assert not any("earlier run" in line for line in said())
    trainer(tmp_path).train()
    (line,) = [line for line in said() if "earlier run" in line]
    assert "checkpoint-1 to checkpoint-2 (2)" in line and "begins anew" in line
    assert "takes the highest number, checkpoint-2 for now" in line


def test_a_resumed_run_counts_later_checkpoints_alone_as_anothers(tmp_path, said):
    trainer(tmp_path).train()
    resumed = trainer(tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert not any("earlier run" in line or "other terms" in line for line in said())
    first = str(tmp_path / "out" / "checkpoint-1")
    later = [str(tmp_path / "out" / f"checkpoint-{step}") for step in (2, 3)]
    assert others_checkpoints(str(tmp_path / "out"), first) == later
    assert others_checkpoints(str(tmp_path / "out"), str(tmp_path / "elsewhere" / "checkpoint-3")) == [first, *later]
    assert others_checkpoints(str(tmp_path / "nothing"), None) == []
    (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").unlink()  # cut short
    assert others_checkpoints(str(tmp_path / "out"), first) == later[:1]


@pytest.mark.parametrize("record", ["manifest", "settings of an earlier release"])
def test_other_terms_than_a_checkpoints_are_said_with_old_and_new(record, tmp_path, said):
    trainer(tmp_path).train()
    last = tmp_path / "out" / "checkpoint-2"
    if record != "manifest":
        manifest = json.loads((last / MANIFEST_FILE).read_text())
        del manifest["terms"]
        (last / MANIFEST_FILE).write_text(json.dumps(manifest))
    changed = dataclasses.replace(TERMS, lambda_svd=0.25, schedule="iclr2026", share_interval=7)
    trainer(tmp_path, changed, max_steps=3).train(resume_from_checkpoint=str(last))
    (line,) = [line for line in said() if "other terms" in line]
    assert f"lambda_svd {TERMS.lambda_svd!r} -> 0.25" in line and "schedule 'constant' -> 'iclr2026'" in line
    assert "share_interval" not in line and "checkpoint-2" in line


def test_another_preset_with_the_same_values_is_no_change(tmp_path, said):
    values = {k: v for k, v in TERMS.resolved("nlg").to_dict().items() if k not in ("preset", "task")}
    trainer(tmp_path, RegularizerConfig(**values)).train()
    trainer(tmp_path, RegularizerConfig(preset="iclr2026", **values), max_steps=3).train(resume_from_checkpoint=True)
    assert not any("other terms" in line for line in said())


def test_terms_on_a_plain_lora_are_recorded_too(tmp_path, said):
    def plain():
        return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))

    trainer(tmp_path, model=plain()).train()
    changed = dataclasses.replace(TERMS, lambda_diversity=0.5)
    trainer(tmp_path, changed, model=plain(), max_steps=3).train(resume_from_checkpoint=True)
    (line,) = [line for line in said() if "other terms" in line]
    assert f"lambda_diversity {TERMS.lambda_diversity!r} -> 0.5" in line


def test_a_directory_of_checkpoints_alone_names_the_newest_whole_one(tmp_path):
    trainer(tmp_path).train()
    out = tmp_path / "out"
    (out / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"holds no adapter, but checkpoints; .*checkpoint-1'"):
        BaLoraModel.from_pretrained(tiny_llama(), out)
    with pytest.raises(ValueError, match=r"holds no adapter, but checkpoints; .*checkpoint-1'"):
        BaLoraConfig.from_pretrained(out)
    BaLoraConfig(r=2, lora_alpha=2).save_pretrained(out)  # as a host does before the first step
    with pytest.raises(ValueError, match=r"before any weights were.*last whole checkpoint of that run: .*checkpoint-1"):
        BaLoraModel.from_pretrained(tiny_llama(), out)


def test_steps_of_another_size_are_said_with_old_and_new_and_a_step_cut_otherwise_is_not(tmp_path, said):
    """For data of any kind: the host skips as many rows as so many steps of the new size have."""
    size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer(tmp_path, **size).train()
    last = str(tmp_path / "out" / "checkpoint-2")
    halved = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer(tmp_path, max_steps=3, **halved).train(resume_from_checkpoint=last)
    assert not any("another size" in line for line in said())
    other = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    trainer(tmp_path, max_steps=3, **other).train(resume_from_checkpoint=last)
    (line,) = [line for line in said() if "another size" in line]
    assert f"{last} was trained with steps of another size: gradient_accumulation_steps 2 -> 1." in line
    (manifest := tmp_path / "out" / "checkpoint-2" / MANIFEST_FILE).write_text(
        json.dumps({key: value for key, value in json.loads(manifest.read_text()).items() if key != "rows"})
    )
    assert changed_rows(last, {"gradient_accumulation_steps": 1}) == {}  # of an earlier release


# --- what else of a run is not that of its checkpoint


def rank_two(**changes):
    return BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], regularizers=TERMS, **changes)


def test_other_settings_than_a_checkpoints_are_said_with_which_of_the_two_act(tmp_path, said):
    trainer(tmp_path).train()
    changes = {"seed": 7, "lr_scheduler_type": "cosine", "learning_rate": 1e-3, "max_steps": 3}
    resumed = trainer(tmp_path, config=rank_two(lora_dropout=0.25), **changes)
    resumed.train(resume_from_checkpoint=True)
    assert not any("other settings" in line or "other terms" in line for line in said())
    new, old = sorted((line for line in said() if "resumes with other" in line), key=len, reverse=True)
    assert "seed 1 -> 7" in new and "lr_scheduler_type 'linear' -> 'cosine'" in new and "From here on the new" in new
    assert "lora_dropout 0.0 -> 0.25" in new and "learning_rate" not in new
    assert "other learning_rate than" in old and "0.01 -> 0.001. The old ones go on" in old
    assert set(resumed.lr_scheduler.base_lrs) == {1e-2}  # which is what that line says


def test_a_fresh_optimizer_takes_the_new_rate(tmp_path, said):
    trainer(tmp_path).train()
    resumed = trainer(tmp_path, learning_rate=1e-3, max_steps=3)
    resumed.train(resume_from_checkpoint=True, fresh_optimizer=True)
    (line,) = [line for line in said() if "resumes with other" in line]
    assert "learning_rate 0.01 -> 0.001. From here on the new ones count" in line
    assert set(resumed.lr_scheduler.base_lrs) == {1e-3}


def test_the_same_settings_are_not_spoken_of(tmp_path, said):
    trainer(tmp_path).train()
    trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=True)
    assert not any("resumes with other" in line for line in said())


def test_another_kind_of_optimizer_is_refused_in_one_line_that_names_both(tmp_path):
    trainer(tmp_path).train()
    words = r"state of torch\.AdamW \(optim='adamw_torch.*optimizer is torch\.SGD \(optim='sgd'\).*fresh_optimizer=True"
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, optim="sgd", max_steps=3).train(resume_from_checkpoint=True)
    trainer(tmp_path, optim="sgd", max_steps=3).train(resume_from_checkpoint=True, fresh_optimizer=True)
