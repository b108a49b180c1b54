"""What every architecture is taken through: exact start, terms, three steps, files, a resumed run, export and merge.

All of it as a user would: with `BaLoraTrainer`, plain PEFT and the command `balora`. Each term and its gradient is
compared with a dense reference, made of nothing but the model's own logits with the adapter on and off.
"""

from __future__ import annotations

import contextlib
import copy
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig, get_ba_lora_model
from balora_plugin.commands import main
from balora_plugin.regularizers import consistency, covariance, spectral, token_entropy

from .families import CAUSAL_LM, CLASSIFIER, VOCABULARY, tiny

ROWS, LENGTH, RANK = 6, 12, 4
TERMS = RegularizerConfig(lambda_consistency=0.5, lambda_diversity=0.02, lambda_svd=0.02, svd_top_k=2)
_AUTO = {CAUSAL_LM: AutoModelForCausalLM, CLASSIFIER: AutoModelForSequenceClassification}


@dataclass(frozen=True)
class Outcome:
    """How the journey of one architecture ended.

    Args:
        family: Its model type in transformers.
        task: "CAUSAL_LM" or "SEQ_CLS".
        targets: What was adapted; empty where it was refused.
        why: The reason of the refusal, as the error says it.
    """

    family: str
    task: str
    targets: str = ""
    why: str = ""


def travel(family: str, task: str, folder: Path, *, ships: bool = True) -> Outcome:
    """Takes one architecture through everything, or returns why it is refused.

    Args:
        family: Its model type.
        task: "CAUSAL_LM" or "SEQ_CLS".
        folder: An empty directory for its files.
        ships: Whether the trained adapter is exported and merged too.

    Raises:
        AssertionError: something trained, saved or loaded is not what it should be.
    """
    base = tiny(family, task)
    targets, why = _targets(base, task)
    if not targets:
        return Outcome(family, task, why=why)
    try:
        trainer = _trainer(base, targets, folder / "run")
    except (ValueError, TypeError) as error:
        return Outcome(family, task, why=_first_sentence(error))
    _starts_exactly(trainer, tiny(family, task))
    trainer.train()
    _terms_are_the_dense_ones(trainer, task)
    trainer.save_model(str(folder / "adapter"))
    _loads_in_plain_peft(trainer, tiny(family, task), folder / "adapter")
    _resumes(trainer, _trainer(tiny(family, task), targets, folder / "run"))
    if ships:
        _ships(trainer, tiny(family, task), folder, task)
    return Outcome(family, task, targets, why)


def rows(task: str, count: int = ROWS) -> list[dict[str, Any]]:
    """Rows of random tokens; a language model's first three have no label, a classifier's label is one of three."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for i in range(count):
        tokens = torch.randint(3, VOCABULARY - 3, (LENGTH,), generator=generator).tolist()
        labels = [-100] * 3 + tokens[3:] if task == CAUSAL_LM else i % 3
        made.append({"input_ids": tokens, "attention_mask": [1] * LENGTH, "labels": labels})
    return made


def _collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in features]) for key in features[0]}


def _config(targets: str) -> BaLoraConfig:
    return BaLoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, regularizers=TERMS)


def _targets(base: PreTrainedModel, task: str) -> tuple[str, str]:
    """Returns "all-linear" and no reason, or nothing and why it is refused."""
    config = _config("all-linear")
    config.task_type = task
    try:
        get_ba_lora_model(copy.deepcopy(base), config)
        return "all-linear", ""
    except (ValueError, TypeError) as error:
        return "", _first_sentence(error)


def _first_sentence(error: Exception) -> str:
    return str(error).split("\n")[0].split(". ")[0].rstrip(".")


def _trainer(base: PreTrainedModel, targets: str, folder: Path) -> BaLoraTrainer:
    task = CLASSIFIER if "SequenceClassification" in type(base).__name__ else CAUSAL_LM
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=ROWS // 2,
        per_device_eval_batch_size=ROWS,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
        seed=1,
    )
    return BaLoraTrainer(
        model=base,
        args=arguments,
        peft_config=_config(targets),
        train_dataset=rows(task, 2 * ROWS),
        eval_dataset=rows(task),
        data_collator=_collate,
    )


def _logits(model: torch.nn.Module, task: str = CAUSAL_LM) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=_collate(rows(task))["input_ids"], use_cache=False).logits


def _starts_exactly(trainer: BaLoraTrainer, base: PreTrainedModel) -> None:
    assert torch.equal(_logits(trainer.model), _logits(base)), "the adapted model is not the pre-trained one at step 0"
    assert trainer.evaluate()["eval_balora/consistency"] == 0


def _terms_are_the_dense_ones(trainer: BaLoraTrainer, task: str) -> None:
    batch = _collate(rows(task))
    metrics = trainer.evaluate()
    model = trainer.model.train()  # no dropout anywhere, so the same function as in evaluation
    dense = _dense(model, batch, task)
    for name in ("task", "consistency", "diversity", "svd"):
        torch.testing.assert_close(
            torch.tensor(metrics[f"eval_balora/{name}"]), dense[name].detach().float(), rtol=1e-4, atol=1e-5, msg=name
        )
    assert dense["consistency"] > 1e-6, "three steps moved nothing"
    trained = [p for p in model.parameters() if p.requires_grad]
    total = dense["task"]
    for name in ("consistency", "diversity", "svd"):
        total = total + getattr(TERMS, f"lambda_{name}") * dense[name]
    theirs = torch.autograd.grad(total, trained, allow_unused=True)  # first: RWKV rescales its weights by mode
    count = int((batch["labels"][:, 1:] != -100).sum()) if task == CAUSAL_LM else ROWS
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(count))
    ours = torch.autograd.grad(loss, trained, allow_unused=True)
    torch.testing.assert_close(loss.detach(), total.detach(), rtol=1e-4, atol=1e-5)
    left, right = (torch.cat([_flat(g, p) for g, p in zip(made, trained, strict=True)]) for made in (ours, theirs))
    assert right.norm() > 0
    assert (left - right).norm() <= 1e-3 * right.norm(), "the gradient is not the dense one"


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return (torch.zeros_like(parameter) if gradient is None else gradient).flatten()


def _dense(model: Any, batch: dict[str, Tensor], task: str) -> dict[str, Tensor]:
    """The terms by their definitions, from logits with the adapter on and off."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    student = model(**inputs, use_cache=False).logits
    with torch.no_grad(), model.disable_adapter():
        teacher = model(**inputs, use_cache=False).logits
    settings = TERMS.resolved("nlg" if task == CAUSAL_LM else "nlu")
    labels = batch["labels"]
    if task == CAUSAL_LM:
        counted = labels[:, 1:] != -100
        student, teacher, labels = student[:, :-1][counted], teacher[:, :-1][counted], labels[:, 1:][counted]
        diversity = token_entropy(student, top_k=settings.diversity_top_k)
    else:
        diversity = covariance(student)
    return {
        "task": F.cross_entropy(student.float(), labels),
        "consistency": consistency(student, teacher, form=settings.consistency, temperature=settings.temperature),
        "diversity": diversity,
        "svd": spectral(
            student, k=settings.svd_top_k, norm=settings.svd_norm, centered=settings.svd_input == "centered_logits"
        ),
    }


def _loads_in_plain_peft(trainer: BaLoraTrainer, base: PreTrainedModel, adapter: Path) -> None:
    # a classifier's adapter carries its head, so the base may have another one
    plain = PeftModel.from_pretrained(base, adapter)
    torch.testing.assert_close(_logits(plain), _logits(trainer.model), rtol=1e-4, atol=1e-4)


def _resumes(trainer: BaLoraTrainer, again: BaLoraTrainer) -> None:
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-2"
    again.train(resume_from_checkpoint=str(checkpoint))
    pairs = zip(trainer.model.named_parameters(), again.model.named_parameters(), strict=True)
    differing = [name for (name, left), (_, right) in pairs if not torch.equal(left, right)]
    assert not differing, f"the resumed run ended elsewhere: {differing[:3]}"


def _ships(trainer: BaLoraTrainer, base: PreTrainedModel, folder: Path, task: str) -> None:
    expected = _logits(trainer.model)
    base.save_pretrained(folder / "base")
    adapter, merged, plain = (str(folder / name) for name in ("adapter", "merged", "plain"))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main(["export", adapter, "--output", plain])
        if task == CAUSAL_LM:  # classifiers merge with PEFT
            code = code or main(["export", adapter, "--output", merged, "--merge", "--base", str(folder / "base")])
    assert code == 0, said.getvalue()
    loaded = PeftModel.from_pretrained(_AUTO[task].from_pretrained(folder / "base"), plain)
    torch.testing.assert_close(_logits(loaded), expected, rtol=1e-4, atol=1e-4)
    if task == CAUSAL_LM:
        whole = AutoModelForCausalLM.from_pretrained(merged)
        torch.testing.assert_close(_logits(whole), expected, rtol=1e-4, atol=1e-3)
