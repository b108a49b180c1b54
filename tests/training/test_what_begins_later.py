"""What begins after a trainer, or a proof, was made ends the sharing; optimizers of few bits end no run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import tiny_llama
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import TrainerCallback, TrainingArguments

from balora_plugin import BaLoraTrainer, RegularizerConfig
from balora_plugin.teacher.files import CacheFiles
from balora_plugin.training.checks.token_ids import check_ids

ROW = [3, 5, 7, 9, 11, 13]


class Callback(TrainerCallback):
    def __init__(self, **events):
        for event, act in events.items():
            setattr(self, event, lambda args, state, control, model=None, act=act, **kwargs: act(state, model))


def trainer(tmp_path, adapter=None, callback=None, teacher_pass="shared", hidden=32, **changes):
    torch.manual_seed(0)
    adapter = adapter or LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[2])
    adapter.task_type = "CAUSAL_LM"
    model = get_peft_model(tiny_llama(num_hidden_layers=3, hidden_size=hidden), adapter)
    terms = {"lambda_consistency": 1.0, "lambda_diversity": 0.0, "lambda_svd": 0.0, "teacher_pass": teacher_pass}
    quiet = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    batches = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2}
    return BaLoraTrainer(
        model=model,
        args=TrainingArguments(tmp_path, **{**quiet, **batches, **changes}),
        train_dataset=[{"input_ids": ROW, "labels": ROW}] * 8,
        data_collator=lambda rows: {key: torch.tensor([row[key] for row in rows]) for key in rows[0]},
        regularizers=RegularizerConfig(**terms),
        callbacks=[callback] if callback else None,
    )


def losses(trained):
    return [entry["balora/consistency"] for entry in trained.state.log_history if "balora/consistency" in entry]


def with_noise(state, model):
    """From step 2 on the lowest layer is another one in training, the same for every run of it."""
    if state.global_step == 2:
        mlp = model.get_base_model().model.layers[0].mlp
        mlp.register_forward_hook(lambda module, args, out: out * 1.5 if module.training else out)


def test_a_hook_that_comes_after_the_proof_ends_the_sharing(tmp_path):
    whole, shared = (
        trainer(tmp_path / how, callback=Callback(on_step_begin=with_noise), teacher_pass=how)
        for how in ("whole", "shared")
    )
    whole.train(), shared.train()
    assert losses(shared) == losses(whole) and losses(whole)[2] > 1e-3
    assert shared.ba_lora_run.shared.passes == 1
    assert "has come to the layers below the adapter" in shared.ba_lora_run.shared.why


def test_another_adapter_than_the_trainer_was_made_with_trains_all_its_layers(tmp_path):
    made = trainer(tmp_path)
    made.model.add_adapter("two", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    made.model.set_adapter("two")
    made.train()
    moved = {n.split(".layers.")[1][0]: p.abs().max() for n, p in made.model.named_parameters() if "lora_B.two" in n}
    assert max(moved.values()) < 1.5 * min(moved.values())  # one step of four moves a fourth as far
    assert "another adapter is active" in made.ba_lora_run.shared.why


def test_a_training_begins_with_a_proof_of_its_own(tmp_path):
    made = trainer(tmp_path)
    made.train()
    first = made.ba_lora_run.shared.passes
    assert made.ba_lora_run.shared.proven and first == 3
    made.train()
    assert made.ba_lora_run.shared.proven and made.ba_lora_run.shared.passes == 2 * first


def test_graphs_of_the_hosts_share_nothing(tmp_path):
    made = trainer(tmp_path, torch_compile=True, torch_compile_backend="eager")
    assert "torch_compile" in made.ba_lora_run.shared.why


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_optimizers_of_few_bits_train_to_the_end(optim, tmp_path):
    pytest.importorskip("torchao")
    adapter = LoraConfig(r=16, target_modules=["q_proj"])
    made = trainer(tmp_path, adapter, hidden=256, optim=optim, max_steps=2, save_strategy="steps", save_steps=1)
    made.train()
    kinds = {type(value).__name__ for state in made.optimizer.state.values() for value in state.values()}
    assert any(kind.startswith("OptimState") for kind in kinds)
    assert (tmp_path / "checkpoint-2").is_dir()


def test_ranks_that_adalora_gives_away_are_no_change_of_the_users(tmp_path):
    adapter = AdaLoraConfig(total_step=4, tinit=0, tfinal=1, deltaT=1, init_r=8, target_r=2, target_modules=["q_proj"])
    step = Callback(on_optimizer_step=lambda state, model: model.base_model.update_and_allocate(state.global_step + 1))
    made = trainer(tmp_path, adapter, step)
    made.train()
    assert made.model.peft_config["default"].rank_pattern
    made.train()


class Hashing(torch.nn.Module):
    """Stands for CANINE, which has no embedding of its ids."""

    class config:
        @staticmethod
        def get_text_config():
            return object()

    def get_input_embeddings(self):
        raise NotImplementedError


def test_a_model_that_hashes_its_ids_takes_any(monkeypatch):
    monkeypatch.setattr("balora_plugin.training.checks.token_ids.is_multimodal", lambda model: False)
    check_ids(torch.tensor([[1, 10**6]]), Hashing())
    with pytest.raises(ValueError, match="-1 in row 0 of a batch is no token of Hashing: tokenise"):
        check_ids(torch.tensor([[1, -1]]), Hashing())


def test_rows_of_the_first_version_are_compared_at_every_read(tmp_path):
    files = CacheFiles(tmp_path)
    files.version, files.dtype, files.shape = 1, np.dtype("<u2"), (4,)
    files.refresh()
    keys = [bytes([number]) * 16 for number in (1, 2, 3)]  # a key of zeros is a document taken out
    files.write({key: np.full((2, 4), number, "<u2") for number, key in enumerate(keys)})
    assert files.read(keys[0])[0, 0] == 0
    (path,) = tmp_path.glob("*.index.npy")
    index = np.load(path)
    index["start"][0] = 2
    np.save(path, index)
    assert files.read(keys[0]) is None
