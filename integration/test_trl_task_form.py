"""TRL's loss_type and label_smoothing_factor in BaLoraSFTTrainer: SFTTrainer's own loss where no term is on."""

from __future__ import annotations

import copy

import pytest
from datasets import Dataset
from helpers import TERMS, ba_lora, fresh
from models import tiny_llama
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, RegularizerConfig

OFF = RegularizerConfig(lambda_consistency=0.0, lambda_diversity=0.0, lambda_svd=0.0)
ROWS = [{"prompt": f"What is {i} + {i}? ", "completion": f"It is {2 * i}" + " ok" * (i % 3)} for i in range(8)]


class First(TrainerCallback):
    """The gradients of the first optimizer step."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = self.found or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run(cls, model, tmp_path, tokenizer, callbacks=(), **changes):
    """A trainer after two steps and an evaluation."""
    values = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 64,
        "seed": 1,
    }
    extra = {key: changes.pop(key) for key in ("peft_config",) if key in changes}
    data = Dataset.from_list(ROWS)
    trainer = cls(
        model=model,
        args=SFTConfig(**{**values, **changes}),
        train_dataset=data,
        eval_dataset=data.select(range(5)),
        processing_class=copy.deepcopy(tokenizer),
        callbacks=list(callbacks),
        **extra,
    )
    trainer.train()
    trainer.evaluate()
    return trainer


def history(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


FORMS = {
    "dft": {"loss_type": "dft"},
    "smoothed": {"loss_type": "nll", "label_smoothing_factor": 0.2},
    "nll": {"loss_type": "nll"},
}


@pytest.mark.parametrize("form", FORMS)
def test_without_terms_it_is_sft_trainers_own(form, tmp_path, tokenizer):
    """Losses, evaluations and the gradient of the accumulated batch."""
    model, gradients = ba_lora(tiny_llama(), regularizers=OFF), [First(), First()]
    theirs = run(SFTTrainer, fresh(model), tmp_path, tokenizer, gradients[:1], **FORMS[form])
    ours = run(BaLoraSFTTrainer, model, tmp_path, tokenizer, gradients[1:], **FORMS[form])
    assert ours.ba_lora is not None and getattr(theirs, "ba_lora", None) is None
    for key in ("loss", "eval_loss", "mean_token_accuracy", "entropy"):
        found = history(ours, key)
        assert found and found == pytest.approx(history(theirs, key), rel=2e-4), key  # logs are rounded
    task = history(ours, "balora/task")
    assert task == pytest.approx(history(ours, "loss"), rel=2e-4)
    assert gradients[0].found.keys() == gradients[1].found.keys() != set()
    for name, gradient in gradients[0].found.items():
        assert (gradients[1].found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


def adapter():
    return BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear", regularizers=TERMS)


def test_smoothing_does_not_ask_how_trl_computes_the_cross_entropy(tmp_path, tokenizer):
    """In chunks is TRL 1.9's default."""
    runs = [
        run(BaLoraSFTTrainer, tiny_llama(), tmp_path, tokenizer, peft_config=adapter(), **form)
        for form in ({"label_smoothing_factor": 0.2}, FORMS["smoothed"])
    ]
    for key in ("loss", "eval_loss", "balora/task", "balora/consistency"):
        assert history(runs[0], key) == history(runs[1], key) != [], key


def test_anchored_fine_tuning_trains(tmp_path, tokenizer):
    """dft with the consistency term."""
    trainer = run(BaLoraSFTTrainer, tiny_llama(), tmp_path, tokenizer, peft_config=adapter(), **FORMS["dft"])
    consistency = history(trainer, "balora/consistency")
    assert abs(consistency[0]) < 1e-9 and consistency[-1] > 0
    assert 0 < history(trainer, "balora/task")[0] < 1 / 2.718  # -p log p at most, where nll is near 4.5
    assert history(trainer, "eval_balora/consistency")[0] > 0
