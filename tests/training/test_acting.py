"""Terms that are configured act, or a run says that they do not and what to do."""

from __future__ import annotations

import logging

import pytest
import torch
from classifiers import batch, classifier
from datasets import Dataset
from helpers import TERMS, ba_lora, counts_what_is_predicted, fresh, stock, trainable
from models import tiny_gpt2, tiny_llama
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraTrainer, BaLoraTrainerMixin, RegularizerConfig

pytestmark = pytest.mark.hosts

OFF = RegularizerConfig(lambda_consistency=0.0, lambda_diversity=0.0, lambda_svd=0.0)


def arguments(tmp_path, **changes):
    values = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(**{**values, **changes})


def tokens(n=12, length=10):
    ids = torch.randint(3, 90, (n, length), generator=torch.Generator().manual_seed(3))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def samples(n=12, **kind):
    return Dataset.from_dict({key: value.tolist() for key, value in batch(n, **kind).items()})


class When(TrainerCallback):
    """The warnings that had been said when each step began."""

    def __init__(self, said):
        self.said, self.before = said, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.before.append(len(self.said()))


@pytest.fixture
def said(caplog):
    """The BA-LoRA warnings so far."""
    logging.getLogger("transformers").propagate = True
    caplog.set_level(logging.WARNING)
    return lambda: [r.getMessage() for r in caplog.records if r.getMessage().startswith("BA-LoRA: ")]


# --- a loss of one's own


class ClassWeights(BaLoraTrainer):
    """The usual recipe, which leaves the terms out."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2.0, 0.5]))
        return (loss, outputs) if return_outputs else loss


def test_a_loss_that_leaves_the_terms_out_is_said_before_the_second_step(tmp_path, said):
    when = When(lambda: [line for line in said() if "did not act" in line])
    ClassWeights(
        model=classifier(),
        args=arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=samples(),
        peft_config=BaLoraConfig(r=2, lora_alpha=2, regularizers=RegularizerConfig(lambda_consistency=0.5)),
        callbacks=[when],
    ).train()
    assert when.before == [0, 1, 1]
    (line,) = when.said()
    for words in ("lambda_consistency=0.5", "ClassWeights.compute_loss", "weigh_ba_lora_task", "super().compute_loss"):
        assert words in line


@pytest.mark.parametrize("case", ["terms", "off", "calls super"])
def test_nothing_is_said_where_the_terms_act_or_are_off(case, tmp_path, said):
    class Adds(BaLoraTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) + 0.0

    class Replaces(BaLoraTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(**inputs).loss

    cls = {"terms": BaLoraTrainer, "off": Replaces, "calls super": Adds}[case]
    cls(
        model=tiny_llama(),
        args=arguments(tmp_path),
        train_dataset=tokens(),
        peft_config=BaLoraConfig(
            r=2, lora_alpha=2, target_modules=["q_proj"], regularizers=OFF if case == "off" else TERMS
        ),
    ).train()
    assert not [line for line in said() if "act in the first step" in line or "leaves its terms out" in line]


# --- the mixin behind the Trainer


def test_a_trainer_before_the_mixin_is_refused_at_its_class():
    words = (
        r"class Wrong\(Trainer, BaLoraTrainerMixin\): Trainer stands .*write class Wrong\(BaLoraTrainerMixin, Trainer"
    )
    with pytest.raises(TypeError, match=words):

        class Wrong(Trainer, BaLoraTrainerMixin):
            pass

    class Other(Trainer):
        pass

    with pytest.raises(TypeError, match=r"Other stands before .*write class Worse\(BaLoraTrainer, Other\)"):

        class Worse(Other, BaLoraTrainer):
            pass

    class Right(BaLoraTrainerMixin, Other):
        pass

    class Below(Right):
        pass

    class Aside:
        pass

    class Beside(Aside, Below):
        pass


# --- a BA-LoRA model in a loop that knows nothing of it


def plain(tmp_path, model, **changes):
    return Trainer(model=model, args=arguments(tmp_path, **changes), train_dataset=tokens())


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_stock_trainer_says_before_its_second_step_that_terms_are_left_out(accumulation, tmp_path, said):
    when = When(lambda: [line for line in said() if "leaves its terms out" in line])
    trainer = plain(
        tmp_path, ba_lora(tiny_llama(), regularizers=TERMS), max_steps=4, gradient_accumulation_steps=accumulation
    )
    trainer.add_callback(when)
    trainer.train()
    # on_step_begin of the second step is before its first micro-batch, which says it
    assert when.before == [0, 0, 1, 1]
    (line,) = when.said()
    for words in ("lambda_consistency=0.5", "lambda_diversity=0.02", "BaLoraSFTTrainer", "BaLoraTrainerMixin"):
        assert words in line


def test_compiled_too(tmp_path, said):
    """The mode is set on the model itself, outside its graph."""
    torch._dynamo.reset()
    trainer = plain(
        tmp_path,
        ba_lora(tiny_llama(num_hidden_layers=1), targets=["q_proj"], regularizers=TERMS),
        torch_compile=True,
        torch_compile_backend="eager",
        max_steps=2,
    )
    trainer.train()
    torch._dynamo.reset()
    assert len([line for line in said() if "leaves its terms out" in line]) == 1


@pytest.mark.parametrize("case", ["lambdas 0", "plain LoRA", "our trainer", "evaluation", "a loop of one's own"])
def test_nothing_is_said_where_nothing_is_left_out(case, tmp_path, said, ids):
    if case == "lambdas 0":
        plain(tmp_path, ba_lora(tiny_llama(), regularizers=OFF)).train()
    elif case == "plain LoRA":
        plain(tmp_path, stock(tiny_llama())).train()
    elif case == "our trainer":
        model = ba_lora(tiny_llama(), regularizers=TERMS)
        BaLoraTrainer(model=model, args=arguments(tmp_path), train_dataset=tokens()).train()
    elif case == "evaluation":
        model = ba_lora(tiny_llama(), regularizers=TERMS)
        trainer = plain(tmp_path, model)
        for _ in range(3):
            trainer.evaluate(tokens(4))
            model.train()
            model.generate(input_ids=ids[:1], max_new_tokens=2)
    else:
        model = ba_lora(tiny_llama(), regularizers=OFF)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        for _ in range(3):
            model.train()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    assert not [line for line in said() if "terms out" in line]


# --- weights of samples and of tokens


CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


class Weighted(BaLoraTrainer):
    """The same recipe by the hook."""

    def weigh_ba_lora_task(self, inputs):
        return CLASS_WEIGHTS[inputs["labels"]]


class First(TrainerCallback):
    """The gradients of the first optimizer step."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = self.found or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cut", [(8, 1), (2, 4)])
def test_weights_of_classes_give_the_weighted_loss_and_gradient(cut, tmp_path):
    """Against torch's own weighted cross-entropy on the logits of the same model, however the global batch is cut."""
    data, keep = samples(8), First()
    model = ba_lora(classifier(), targets=["query", "value"], task_type="SEQ_CLS", regularizers=OFF)
    reference = fresh(model)
    trainer = Weighted(
        model=model,
        args=arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=cut[0],
            gradient_accumulation_steps=cut[1],
            max_grad_norm=0.0,
        ),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[keep],
    )
    before = trainer.evaluate()
    trainer.train()
    rows = {key: torch.tensor(data[key]) for key in ("input_ids", "attention_mask", "labels")}
    labels = rows.pop("labels")
    sums = F.cross_entropy(reference(**rows).logits, labels, weight=CLASS_WEIGHTS, reduction="sum")
    loss = sums / 8
    loss.backward()
    assert before["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    logged = next(row for row in trainer.state.log_history if "balora/task" in row)
    assert logged["balora/task"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert keep.found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(keep.found[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [{}, {"multi": True}, {"regression": True}])
def test_even_weights_change_nothing_for_a_classifier(kind):
    from balora_plugin.objective.classification import classification_step
    from balora_plugin.objective.request import StepRequest
    from balora_plugin.schedules import Lambdas

    model = classifier(num_labels=1 if "regression" in kind else 3).eval()
    rows = batch(4, **kind)
    config = OFF.resolved("nlu")
    found = [
        classification_step(
            model, StepRequest(config=config, lambdas=Lambdas(0.0, 0.0, 0.0), task_weights=weights), dict(rows)
        )
        for weights in (None, torch.ones(4), torch.ones(rows["labels"].shape), 3.0 * torch.ones(4))
    ]
    for even in found[1:3]:
        torch.testing.assert_close(even.loss, found[0].loss)
    torch.testing.assert_close(found[3].loss, 3.0 * found[0].loss)


class TokenWeights(BaLoraTrainer):
    def weigh_ba_lora_task(self, inputs):
        return inputs["labels"] % 5 / 2.0


@counts_what_is_predicted
def test_weights_of_tokens_give_the_weighted_loss_and_gradient(tmp_path):
    """Against dense logits; the terms beside are those without weights."""
    data, keep = tokens(4), First()
    config = BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], regularizers=TERMS)
    results = []
    for cls in (TokenWeights, BaLoraTrainer):
        trainer = cls(
            model=tiny_llama(),
            args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=4, max_grad_norm=0.0),
            train_dataset=data,
            peft_config=config,
            callbacks=[keep] if cls is TokenWeights else [],
        )
        reference = fresh(trainer.model)
        trainer.train()
        results.append(trainer.state.log_history[0])
    ids = torch.tensor(data["input_ids"])
    logits = reference(input_ids=ids).logits[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    rows = F.cross_entropy(logits, targets, reduction="none")
    loss = (rows * (targets % 5 / 2.0)).sum() / targets.numel()
    assert results[0]["balora/task"] == pytest.approx(loss.item(), rel=1e-5)
    assert results[1]["balora/task"] == pytest.approx(rows.mean().item(), rel=1e-5)
    for key in ("balora/consistency", "balora/diversity", "balora/svd"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-6)
    log_p = torch.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1).mean()
    s = torch.linalg.svdvals(logits)
    # at step 0 the consistency term has no gradient
    total = loss - 0.02 * entropy - 0.02 * s[:10].sum() / s.sum()
    total.backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert keep.found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (keep.found[name] - gradient).norm() < 1e-3 * gradient.norm(), name


def test_weights_of_rows_reach_their_tokens():
    from balora_plugin.objective.install import install
    from balora_plugin.objective.request import StepRequest
    from balora_plugin.schedules import Lambdas

    model, ids = tiny_llama(), torch.randint(3, 90, (3, 8), generator=torch.Generator().manual_seed(3))
    install(model)

    def task(weights, **batch):
        asked = StepRequest(config=OFF.resolved("nlg"), lambdas=Lambdas(0.0, 0.0, 0.0), task_weights=weights)
        return model(input_ids=ids, ba_lora=asked, **(batch or {"labels": ids})).task

    row, spread = torch.tensor([0.0, 2.0, 0.5]), torch.rand(3, 8)
    torch.testing.assert_close(task(row), task(row.unsqueeze(1).expand(3, 8)))
    shifted = {"shift_labels": F.pad(ids[:, 1:], (0, 1), value=-100)}
    torch.testing.assert_close(task(spread), task(F.pad(spread[:, 1:], (0, 1)), **shifted))
    with pytest.raises(ValueError, match=r"weigh_ba_lora_task returned weights of shape \(2,\) .* one weight a sample"):
        task(torch.ones(2))


# --- a model's own dropout


GPT2_KEYS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def dropout_lines(tmp_path, said, model, terms=TERMS, **changes):
    config = BaLoraConfig(r=2, lora_alpha=2, regularizers=terms, **changes)
    trainer = BaLoraTrainer(model=model, args=arguments(tmp_path), train_dataset=tokens(), peft_config=config)
    return trainer, [line for line in said() if "dropout of its own" in line]


def test_a_models_own_dropout_is_said_with_its_keys(tmp_path, said):
    trainer, lines = dropout_lines(tmp_path, said, tiny_gpt2(), target_modules=["c_attn"])
    assert len(lines) == 1
    assert all(f"{key}=0.0" in lines[0] for key in GPT2_KEYS)
    assert "(0.1 in " in lines[0] and "summary" not in lines[0] and "overrides_of_model_config" in lines[0]
    trainer.train()
    assert trainer.state.log_history[0]["balora/consistency"] > 1e-3  # what it is about


def test_the_keys_named_switch_it_off(tmp_path, said):
    trainer, lines = dropout_lines(
        tmp_path, said, tiny_gpt2(**dict.fromkeys(GPT2_KEYS, 0.0)), target_modules=["c_attn"], lora_dropout=0.1
    )
    assert not lines
    trainer.train()
    assert trainer.state.log_history[0]["balora/consistency"] == 0


def test_dropout_that_is_a_number_in_a_module_is_found(tmp_path, said):
    """Llama's attention, and layers like OPT's, keep the rate and call the function."""
    _, lines = dropout_lines(tmp_path, said, tiny_llama(attention_dropout=0.2), target_modules=["q_proj"])
    assert "attention_dropout=0.0" in lines[0] and "(0.2 in 2 modules, the first is model.layers.0" in lines[0]


def test_a_classifiers_dropout_names_its_heads_too(tmp_path, said):
    model = classifier(dropout=0.3)
    config = BaLoraConfig(r=2, lora_alpha=2, regularizers=RegularizerConfig(lambda_consistency=0.5))
    BaLoraTrainer(model=model, args=arguments(tmp_path), train_dataset=samples(), peft_config=config)
    (line,) = [line for line in said() if "dropout of its own" in line]
    assert all(f"{key}=0.0" in line for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"))


def test_no_consistency_no_word_of_dropout(tmp_path, said):
    terms = RegularizerConfig(lambda_consistency=0.0)
    assert not dropout_lines(tmp_path, said, tiny_gpt2(), terms, target_modules=["c_attn"])[1]


def test_a_trainer_without_adapter_and_terms_says_what_it_trains(tmp_path, said):
    model = tiny_llama()
    BaLoraTrainer(model=model, args=arguments(tmp_path), train_dataset=tokens())
    count = sum(p.numel() for p in model.parameters())
    (line,) = [line for line in said() if "no terms" in line]
    assert f"BaLoraTrainer trains all {count:,} parameters of the model" in line and "peft_config=BaLoraConfig" in line
    BaLoraTrainer(model=stock(tiny_llama()), args=arguments(tmp_path), train_dataset=tokens())
    assert "LoraConfig's adapter" in said()[-1] and "regularizers=" in said()[-1]
    BaLoraTrainer(model=ba_lora(tiny_llama()), args=arguments(tmp_path), train_dataset=tokens())
    assert sum("no terms" in line for line in said()) == 2
