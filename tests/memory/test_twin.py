"""What a step is said to take, against the peak of real training steps, as PyTorch's CPU allocator reports it."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers import ba_lora
from models import tiny_gpt2, tiny_llama
from transformers import Gemma2Config, Gemma2ForCausalLM, TrainerCallback, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig
from balora_plugin.memory.estimate import PARTS, Workload
from balora_plugin.memory.remedies import Case, remedies
from balora_plugin.memory.twin import Twin, hollow

pytestmark = pytest.mark.hosts
ROWS, LENGTH = 4, 96


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
    """The peak of a real step of padded rows, and its trainer."""
    before = allocated()
    model = ba_lora(make())
    ids = torch.randint(3, 90, (16, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(LENGTH) < LENGTH - 8).long()
    data = [
        {
            "input_ids": row.tolist(),
            "attention_mask": mask.tolist(),
            "labels": row.masked_fill(mask == 0, -100).tolist(),
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
    print(found.as_json(), peak, found.total / peak)
    assert found.total == pytest.approx(peak, rel=0.1), found.in_words()
