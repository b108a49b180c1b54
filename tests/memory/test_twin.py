"""What a step is said to take, against the peak of real training steps, as PyTorch's CPU allocator reports it."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers import ba_lora
from models import VOCABULARY, tiny_gpt2, tiny_llama, tiny_mixtral
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig
from balora_plugin.memory.estimate import PARTS, Workload
from balora_plugin.memory.held import held_by
from balora_plugin.memory.remedies import Case, remedies
from balora_plugin.memory.twin import Twin, hollow

pytestmark = pytest.mark.hosts
ROWS, LENGTH = 4, 96
TINY_BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_gemma2():
    """Softcaps, sliding windows, eager attention, four norms a layer, a large vocabulary."""
    config = Gemma2Config(
        vocab_size=1500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=32,
        attn_implementation="eager",
        pad_token_id=0,
    )
    return Gemma2ForCausalLM(config)


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma2": tiny_gemma2}


def allocated():
    """Bytes of the tensors that live in this process, each storage once."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu":
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


class Peak(TrainerCallback):
    """The most that the allocator had out during the second optimizer step, with what there was before it."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            self.before = allocated()
            self.profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self.profiler.start()

    def on_step_end(self, args, state, control, **_):
        if state.global_step != 2:
            return
        self.profiler.stop()
        events = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        now, self.bytes = self.before, 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            self.bytes = max(self.bytes, now)


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def measured(make, tmp_path, **arguments):
    """The peak of a real step of padded rows, every token counted (the most there can be), and its trainer."""
    before = allocated()
    model = ba_lora(make())
    ids = torch.randint(3, 90, (16, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(LENGTH) < LENGTH - 8).long()
    data = [
        {
            "input_ids": row.tolist(),
            "attention_mask": mask.tolist(),
            "labels": row.tolist(),
        }
        for row in ids
    ]
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=ROWS,
        max_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **arguments,
    )
    peak = Peak()
    trainer = BaLoraTrainer(model, args, train_dataset=data, data_collator=collate, callbacks=[peak])
    trainer.train()
    return peak.bytes - before, trainer


def twin_of(model, dtype=torch.float32):
    config = BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return Twin(hollow(lambda config: type(model)._from_config(config, dtype=dtype), model.config), config)


def workload(**changes):
    terms = RegularizerConfig().resolved("nlg")
    return Workload(**{"rows": ROWS, "length": LENGTH, "terms": terms, "device_type": "cpu", **changes})


CASES = [
    *((name, {}, {}) for name in MODELS),
    *((name, {"gradient_checkpointing": True}, {"checkpointing": True}) for name in MODELS),
    ("llama", {"gradient_accumulation_steps": 2}, {"accumulates": True}),
    ("llama", {"bf16": True}, {"autocast": torch.bfloat16}),
]


@pytest.mark.parametrize(("name", "arguments", "changes"), CASES)
def test_the_estimate_is_the_measured_peak(name, arguments, changes, tmp_path):
    peak, trainer = measured(MODELS[name], tmp_path, **arguments)
    twin = twin_of(trainer.model.get_base_model())
    found = twin.estimate(workload(**changes), twin.held("adamw_torch_fused"))
    assert found.total == pytest.approx(peak, rel=0.1), found.in_words()


def test_the_parts_are_those_of_the_model():
    model = ba_lora(tiny_llama())
    twin = twin_of(model.get_base_model())
    found = twin.estimate(workload(), twin.held("adamw_torch"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for name, p in model.named_parameters() if "frozen_" in name)
    assert found.trained == 4 * trained == 4 * frozen == found.frozen_factors
    assert found.optimizer == 2 * found.trained
    base = sum(p.numel() for p in tiny_llama().parameters()) + sum(b.numel() for b in tiny_llama().buffers())
    assert found.weights == 4 * base
    assert found.total == sum(getattr(found, part) for part in PARTS) == found.by_moment[found.moment]
    assert found.total == max(found.by_moment.values())
    assert sum(found.kept.values()) < found.by_moment["student"]


def test_what_saves_memory_is_counted_by_the_same_steps():
    twin = twin_of(tiny_llama())
    case = Case(twin, workload(), twin.held("adamw_torch_fused"))
    now = case.estimate()
    found = {remedy.what.split(":")[0]: remedy.saves for remedy in remedies(case, now)}
    names = ["teacher_cache", "micro_batch_size", "gradient_checkpointing", "load_in_4bit"]
    assert list(found) == [name for name in names if name in found]
    assert {"micro_batch_size", "gradient_checkpointing"} <= set(found)
    checkpointed = case.doing(checkpointing=True)
    assert found["gradient_checkpointing"] == now.total - checkpointed.estimate().total
    assert case.estimate() == now  # a step leaves nothing behind
    again = {remedy.what.split(":")[0] for remedy in remedies(checkpointed.doing(rows=1), checkpointed.estimate())}
    assert not again & {"gradient_checkpointing", "micro_batch_size"}


def test_a_teacher_and_its_logits_are_counted_where_there_is_one():
    twin = twin_of(tiny_llama())
    held = twin.held("sgd")
    alone = RegularizerConfig(lambda_consistency=0.0).resolved("nlg")
    with_teacher, without = twin.estimate(workload(), held), twin.estimate(workload(terms=alone), held)
    assert without.by_moment["teacher"] == held.total + 2 * 32 * 32 * 8  # the head's factor and its Gram matrix
    assert with_teacher.by_moment["teacher"] > without.by_moment["teacher"]
    states, logits = ROWS * LENGTH * 32 * 4, ROWS * LENGTH * VOCABULARY * 4
    assert with_teacher.by_moment["terms"] - without.by_moment["terms"] >= states + logits
    assert with_teacher.by_moment["backward"] == without.by_moment["backward"]  # its states are gone by then


def test_half_precision_experts_and_classifiers_are_counted():
    mixtral = tiny_mixtral()
    found = twin_of(mixtral, torch.bfloat16)
    estimate = found.estimate(workload(autocast=torch.bfloat16), found.held("adamw_torch_fused"))
    assert estimate.weights == pytest.approx(2 * sum(p.numel() for p in mixtral.parameters()), rel=0.01)
    with torch.device("meta"):
        classifier = BertForSequenceClassification(BertConfig(**TINY_BERT))
    adapter = BaLoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    twin = Twin(classifier, adapter)
    terms = RegularizerConfig().resolved("nlu")
    few, many = (twin.estimate(workload(rows=n, terms=terms), twin.held("sgd")).activations for n in (2, 8))
    assert many == pytest.approx(4 * few, rel=0.02)


def test_a_real_models_dtypes_are_taken():
    model = ba_lora(tiny_llama().to(torch.bfloat16))
    twin = twin_of(model.get_base_model())
    twin.like(model)
    assert twin.held("adamw_torch") == held_by(model, "adamw_torch")
