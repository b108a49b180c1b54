"""What a run says it trains does train, and what it says stays stays; else it is refused or said before it matters."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from classifiers import classifier
from helpers import TERMS, ba_lora
from models import tiny_llama
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from test_acting import arguments, samples, tokens
from torch.nn import functional as F
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM, TrainerCallback

from balora_plugin import BaLoraConfig, BaLoraModel, BaLoraTrainer, RegularizerConfig

pytestmark = pytest.mark.hosts

TARGETS = ["q_proj", "v_proj"]
ALONE = RegularizerConfig(lambda_consistency=0.5, lambda_diversity=0.0, lambda_svd=0.0)


@pytest.fixture
def said(caplog):
    """The BA-LoRA warnings so far."""
    logging.getLogger("transformers").propagate = True
    caplog.set_level(logging.WARNING)
    return lambda: [r.getMessage() for r in caplog.records if r.getMessage().startswith("BA-LoRA: ")]


def build(tmp_path, model=None, cls=BaLoraTrainer, regularizers=TERMS, **changes):
    """A trainer of a bare model that gets an adapter, or of a model that has one."""
    extra = {key: changes.pop(key) for key in ("callbacks", "optimizers") if key in changes}
    model = tiny_llama() if model is None else model
    if not hasattr(model, "peft_config"):
        extra["peft_config"] = BaLoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, regularizers=regularizers)
    args = arguments(tmp_path, max_steps=changes.pop("max_steps", 2), **changes)
    return cls(model=model, args=args, train_dataset=tokens(), **extra)


# --- a loss that was asked for, and left out


class OwnLoss(BaLoraTrainer):
    """The recipe for weights of classes, over the logits that super() gives: its loss is not returned."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        labels = inputs["labels"]
        if labels.ndim == 1:
            return F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2.0, 0.5]))
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_a_loss_of_ours_that_is_asked_for_and_not_returned_is_said(kind, tmp_path, said):
    if kind == "classifier":
        OwnLoss(
            model=classifier(),
            args=arguments(tmp_path),
            train_dataset=samples(),
            peft_config=BaLoraConfig(r=2, lora_alpha=2, regularizers=RegularizerConfig(lambda_consistency=0.5)),
        ).train()
    else:
        build(tmp_path, cls=OwnLoss).train()
    (line,) = [line for line in said() if "did not act in the first step" in line]
    assert "OwnLoss.compute_loss" in line and "its loss is not in what was trained" in line


class Stops(BaLoraTrainer):
    """Asks for our loss as long as `asks`, and later for the model's own."""

    asks = 1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.state.global_step < self.asks:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return model(**inputs).loss


@pytest.mark.parametrize(
    ("asks", "logging", "when"),
    [(1, 1, "step 2 "), (2, 2, "steps 3 to 4 "), (1, 100, "steps 2 to 5 "), (3, 2, "step 5 "), (5, 1, None)],
)
def test_terms_that_stop_acting_are_said_at_the_next_log(asks, logging, when, tmp_path, said):
    class Asks(Stops):
        pass

    Asks.asks = asks
    build(tmp_path, cls=Asks, max_steps=5, logging_steps=logging).train()
    lines = [line for line in said() if "did not act in" in line]
    assert len(lines) == (when is not None)
    if when:
        assert f"did not act in {when}(they did before): Stops.compute_loss" in lines[0]


# --- nothing that would move


def not_trainable(tmp_path):
    ba_lora(tiny_llama(), targets=TARGETS).save_pretrained(tmp_path / "saved")
    return {"model": BaLoraModel.from_pretrained(tiny_llama(), tmp_path / "saved")}


def frozen(tmp_path):
    model = ba_lora(tiny_llama(), targets=TARGETS)
    return {"model": prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)}


def of_the_base(tmp_path):
    model = tiny_llama()
    return {"model": model, "optimizers": (torch.optim.AdamW(model.parameters(), lr=1e-2), None)}


def merged(tmp_path):
    model = ba_lora(tiny_llama(), targets=TARGETS)
    model.merge_adapter()
    return {"model": model}


def off(tmp_path):
    model = ba_lora(tiny_llama(), targets=TARGETS, modules_to_save=["norm"])
    model.base_model.disable_adapter_layers()
    return {"model": model}


def trained_frozen_factors(tmp_path):
    model = ba_lora(tiny_llama(), targets=TARGETS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("frozen_" in name or parameter.requires_grad)
    return {"model": model}


@pytest.mark.parametrize("checkpointing", [False, True])  # with it the loss has a gradient that reaches nothing
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (not_trainable, "no parameter requires a gradient.*is_trainable=True"),
        (frozen, "no parameter requires a gradient.*prepare_model_for_kbit_training before"),
        (of_the_base, r"the optimizer holds nothing that trains, .*lora_A.*optimizers="),
        (merged, "merged into model.layers.0.self_attn.q_proj: call model.unmerge_adapter"),
        (off, "switched off at model.layers.0.self_attn.q_proj"),
        (trained_frozen_factors, "frozen_A requires a gradient"),
    ],
)
def test_what_would_train_nothing_or_another_thing_is_one_line(make, words, checkpointing, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        build(tmp_path, gradient_checkpointing=checkpointing, **make(tmp_path)).train()
    assert "\n" not in str(caught.value)


def unfreezes(trainer):
    for name, parameter in trainer.model.named_parameters():
        if "frozen_" not in name:
            parameter.requires_grad_(True)


def sets_a_loss(trainer):
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (unfreezes, "trains beside the adapter"),
        (sets_a_loss, "compute_loss_func does not work"),
        (lambda trainer: trainer.model.merge_adapter(), "is merged into"),
        (lambda trainer: trainer.model.base_model.disable_adapter_layers(), "is switched off at"),
    ],
)
def test_what_is_changed_after_the_trainer_was_made_is_seen(change, words, tmp_path):
    trainer = build(tmp_path)
    before = trainer.model.get_base_model().lm_head.weight.clone()
    change(trainer)
    with pytest.raises(ValueError, match=words):
        trainer.train()
    assert torch.equal(trainer.model.get_base_model().lm_head.weight, before)


def test_an_optimizer_of_the_adapter_trains(tmp_path):
    model = ba_lora(tiny_llama(), targets=TARGETS)
    before = copy.deepcopy({name: p for name, p in model.named_parameters() if p.requires_grad})
    own = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    build(tmp_path, model, optimizers=(own, None)).train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("held", [2, 8])
def test_an_optimizer_of_a_part_of_the_adapter_is_said_once_with_the_count(held, tmp_path, said):
    model = ba_lora(tiny_llama(), targets=TARGETS)
    own = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad][:held], lr=1e-2)
    trainer = build(tmp_path, model, optimizers=(own, None))
    trainer.train()
    trainer.train()
    lines = [line for line in said() if "trainable tensors" in line]
    assert len(lines) == (held < 8)
    if lines:
        assert "holds 2 of 8 trainable tensors" in lines[0] and "layers.0.self_attn.v_proj.lora_A" in lines[0]
        assert "and 3 more" in lines[0]


def test_a_copy_of_a_trainer_that_has_trained_is_refused_until_its_optimizer_is_made_anew(tmp_path):
    trainer = build(tmp_path)
    trainer.train()
    copied = copy.deepcopy(trainer)
    with pytest.raises(ValueError, match=r"a copied trainer .*trainer\.optimizer = trainer\.lr_scheduler = None"):
        copied.train()
    before = {name: p.detach().clone() for name, p in copied.model.named_parameters() if p.requires_grad}
    copied.optimizer = copied.lr_scheduler = None
    copied.train()
    assert all(not torch.equal(p, before[name]) for name, p in copied.model.named_parameters() if p.requires_grad)
    copy.deepcopy(build(tmp_path / "new")).train()


# --- what was changed since


def hooks_the_head(trainer):
    trainer.model.get_base_model().lm_head.register_forward_hook(lambda module, args, output: output * 2.0)


def caps_in_the_config(trainer):
    trainer.model.config.final_logit_softcapping = 5.0


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("change", [hooks_the_head, caps_in_the_config])
def test_a_head_that_was_changed_since_is_refused(change, trained, tmp_path):
    trainer = build(tmp_path)
    if trained:
        trainer.train()
    change(trainer)
    with pytest.raises(ValueError, match=r"logits are not softcap.*When the trainer was made they were: take away"):
        trainer.train()


@pytest.mark.parametrize("case", ["head in modules_to_save", "full fine-tuning in bfloat16"])
def test_a_trained_head_is_no_changed_one(case, tmp_path):
    if case == "head in modules_to_save":
        trainer = build(tmp_path, ba_lora(tiny_llama(), targets=TARGETS, modules_to_save=["lm_head"]))
    else:
        off = RegularizerConfig(lambda_consistency=0.0, lambda_diversity=0.1, lambda_svd=0.0)
        args = arguments(tmp_path, max_steps=2, bf16=True)
        trainer = BaLoraTrainer(model=tiny_llama(), args=args, train_dataset=tokens(), regularizers=off)
    trainer.train()
    trainer.train()


def of_the_adapter(**changes):
    return lambda trainer: vars(trainer.model.peft_config["default"]).update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: setattr(t.ba_lora, "lambda_consistency", 1.0), r"lambda_consistency .* -> 1\.0: changed in "
         r"trainer\.ba_lora"),
        (lambda t: setattr(t.model.peft_config["default"].regularizers, "lambda_svd", 1.0), "lambda_svd .* -> 1.0"),
        (of_the_adapter(regularizers=ALONE), "lambda_diversity 0.02 -> 0.0, lambda_svd 0.02"),
        (of_the_adapter(lora_alpha=64), "lora_alpha 4 -> 64: changed in the BaLoraConfig .*make the adapter after"),
        (of_the_adapter(lora_dropout=0.5, r=8), "r 4 -> 8, lora_dropout 0.0 -> 0.5"),
    ],
)  # fmt: skip
def test_settings_that_were_changed_since_are_refused(change, words, tmp_path):
    trainer = build(tmp_path)
    change(trainer)
    with pytest.raises(ValueError, match=words):
        trainer.train()


def test_terms_beside_a_plain_lora_that_were_changed_since_are_refused(tmp_path):
    terms = RegularizerConfig(lambda_consistency=0.5)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=TARGETS))
    trainer = BaLoraTrainer(model=model, args=arguments(tmp_path), train_dataset=tokens(), regularizers=terms)
    terms.lambda_consistency = 0.7
    with pytest.raises(ValueError, match=r"lambda_consistency 0\.5 -> 0\.7: changed in regularizers"):
        trainer.train()


# --- which terms


def test_of_two_active_adapters_the_one_with_terms_has_them(tmp_path):
    model = ba_lora(tiny_llama(), targets=TARGETS)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    model.base_model.set_adapter(["other", "default"])
    trainer = build(tmp_path, model)
    assert trainer.ba_lora is not None


@pytest.mark.parametrize(("interval", "accumulate", "said_once"), [(50, 1, 1), (8, 2, 1), (7, 2, 0), (1, 1, 0)])
def test_a_teacher_that_is_met_once_is_said(interval, accumulate, said_once, tmp_path, said):
    terms = RegularizerConfig(lambda_consistency=0.5, teacher_interval=interval)
    build(tmp_path, regularizers=terms, gradient_accumulation_steps=accumulate).train()
    assert sum(f"teacher_interval={interval} is not below" in line for line in said()) == said_once


def test_neftunes_noise_is_said_where_it_is_measured(tmp_path, said):
    build(tmp_path / "with", neftune_noise_alpha=5)
    off = RegularizerConfig(lambda_consistency=0.0)
    build(tmp_path / "without", regularizers=off, neftune_noise_alpha=5)
    assert sum("neftune_noise_alpha=5 adds noise" in line for line in said()) == 1


# --- the model's own task


class Focal(LlamaForCausalLM):
    """A loss of its own in the forward pass."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if labels is not None:
            each = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
            outputs.loss = ((1 - torch.exp(-each)) ** 2 * each).mean()
        return outputs


def focal():
    return Focal(tiny_llama().config)


def replaced():
    model = tiny_llama()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.pow(2).mean()
    return model


@pytest.mark.parametrize(("make", "name"), [(focal, "Focal"), (replaced, "LlamaForCausalLM")])
def test_a_models_own_loss_is_said(make, name, tmp_path, said):
    build(tmp_path, make())
    assert sum(f"{name} has a loss of its own" in line for line in said()) == 1


def test_a_model_that_sees_what_it_is_to_predict_is_named(tmp_path, said):
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    for causal in (True, False):
        config = BertConfig(**sizes, num_attention_heads=4, is_decoder=causal)
        model = BertLMHeadModel(config)
        model.cls.predictions.transform = torch.nn.Identity()  # its head is then one that BA-LoRA has
        build(tmp_path, ba_lora(model, targets=["query"]), regularizers=ALONE)
        assert any("sees the tokens that it is to predict" in line for line in said()) is not causal


class Looks(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen = [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ordinary_run_is_told_nothing(dtype, tmp_path, said):
    looks = Looks()
    build(tmp_path, tiny_llama().to(dtype), callbacks=[looks]).train()
    assert looks.seen and not [line for line in said() if "hardly act" not in line]
