"""BaLoraSFTTrainer: what SFTTrainer can do works or is refused by name, and the loss is the method's."""

from __future__ import annotations

import copy
import json
import logging
import math

import pytest
import torch
from datasets import Dataset
from helpers import TERMS, fresh, logits
from models import VOCABULARY, tiny_gpt2, tiny_llama, tiny_mixtral
from peft import LoraConfig, PeftModel
from torch.nn import functional as F
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, RegularizerConfig, regularizers

N = 16
PROMPT_COMPLETION = [
    {"prompt": f"What is {i} + {i}? ", "completion": f"It is {2 * i}" + " ok" * (i % 3)} for i in range(N)
]
TEXT = [{"text": f"The number {i} comes before {i + 1}" + " and so on" * (i % 3)} for i in range(N)]
CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"What comes after {i}?"},
            {"role": "assistant", "content": f"{i + 1} does" + ", yes" * (i % 3)},
        ]
    }
    for i in range(N)
]
CHAT_PROMPT = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in CHAT]


def adapter(**changes):
    values = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "regularizers": TERMS}
    return BaLoraConfig(**{**values, **changes})


def build(tmp_path, tokenizer, rows=PROMPT_COMPLETION, model=None, cls=BaLoraSFTTrainer, evaluate=False, **changes):
    """A trainer on a tiny model; `changes` go to SFTConfig, except those named here."""
    trainer_keys = ("peft_config", "regularizers", "teacher_model", "compute_metrics", "callbacks", "compute_loss_func")
    extra = {key: changes.pop(key) for key in trainer_keys if key in changes}
    if cls is BaLoraSFTTrainer and not {"peft_config", "regularizers"} & set(extra):
        extra["peft_config"] = adapter()
    values = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 64,
        "seed": 1,
    }
    args = SFTConfig(**{**values, **changes})
    dataset = Dataset.from_list(rows)
    return cls(
        model=tiny_llama() if model is None else model,
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(5)) if evaluate else None,
        processing_class=copy.deepcopy(tokenizer),
        **extra,
    )


def history(trainer, key="loss"):
    return [row[key] for row in trainer.state.log_history if key in row]


KEYS = ["balora/task", "balora/consistency", "balora/diversity", "balora/svd", "balora/loss"]

WORKS = {
    "prompt_completion": {},
    "prompt_completion_full_loss": {"completion_only_loss": False},
    "text": {"rows": TEXT},
    "chat": {"rows": CHAT},
    "chat_assistant_only": {"rows": CHAT, "assistant_only_loss": True},
    "chat_prompt_completion": {"rows": CHAT_PROMPT},
    "packing": {"packing": True, "max_length": 48},
    "packing_wrapped": {"rows": TEXT, "packing": True, "packing_strategy": "wrapped", "max_length": 32},
    "padding_free": {"padding_free": True, "max_length": None},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing_reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16_autocast": {"bf16": True, "max_steps": 2},
}


@pytest.mark.parametrize("case", WORKS)
@pytest.mark.parametrize("preset", ["paper", "iclr2026"])
def test_every_kind_of_data_and_setting_trains_and_starts_at_zero_consistency(case, preset, tmp_path, tokenizer):
    """The teacher is exact at step 0, under LoRA dropout too."""
    terms = RegularizerConfig(preset=preset, lambda_consistency=0.5)
    config = adapter(lora_dropout=0.2, regularizers=terms)
    trainer = build(tmp_path, tokenizer, peft_config=config, **WORKS[case])
    trainer.train()
    assert abs(history(trainer, "balora/consistency")[0]) < 1e-9
    assert history(trainer, "balora/consistency")[-1] > 1e-6
    for key in ("balora/task", "balora/loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
        assert all(math.isfinite(value) for value in history(trainer, key)), key
        assert len(history(trainer, key)) == trainer.state.max_steps, key
    if preset == "paper":
        assert all(len(history(trainer, key)) == trainer.state.max_steps for key in KEYS)
    else:  # diversity and spectrum rest for the first fifth of training
        assert "balora/svd" not in trainer.state.log_history[0]
        assert history(trainer, "balora/svd")


def dense_loss(model, teacher_logits, batch, terms, num_items):
    """The objective written out on dense logits, from the definition."""
    out = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    mask = targets != -100
    student, teacher = out[mask], teacher_logits[:, :-1][mask]
    n = mask.sum()
    token = F.cross_entropy(student, targets[mask], reduction="sum")
    token = token + terms.lambda_consistency * n * regularizers.consistency(
        student, teacher, form=terms.consistency, temperature=terms.temperature
    )
    token = token + terms.lambda_diversity * n * regularizers.token_entropy(student, top_k=terms.diversity_top_k)
    svd = regularizers.spectral(student, k=terms.svd_top_k, norm=terms.svd_norm, centered=False)
    return token / num_items + terms.lambda_svd * svd


@pytest.mark.parametrize(
    "terms",
    [
        TERMS,
        RegularizerConfig(lambda_consistency=0.3, lambda_diversity=0.1, lambda_svd=0.2, svd_top_k=3),
        RegularizerConfig(preset="iclr2026", schedule="constant", svd_top_k=2, consistency="jsd", lambda_svd=0.5),
        RegularizerConfig(consistency="reverse_kl", lambda_consistency=1.0, svd_norm="none", diversity_top_k=4),
        RegularizerConfig(consistency="mse", lambda_consistency=5.0, lambda_svd=0.0, lambda_diversity=0.0),
    ],
)
@pytest.mark.parametrize(
    ("model", "modules_to_save"), [(tiny_llama, None), (tiny_gpt2, None), (tiny_llama, ["lm_head"])]
)
def test_loss_and_gradient_are_the_definitions(terms, model, modules_to_save, tmp_path, tokenizer):
    """Also of a head that trains: the student's is the copy, the live teacher's the original."""
    base = model(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    pretrained = fresh(base).eval()
    config = adapter(regularizers=terms, modules_to_save=modules_to_save)
    trainer = build(tmp_path, tokenizer, model=base, peft_config=config)
    parameters = assert_the_definition(trainer, pretrained, terms)
    assert any(p.shape == (VOCABULARY, 32) for p in parameters) == (modules_to_save is not None)


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_on_other_adapters_they_are_the_definitions_too(kind, tmp_path, tokenizer):
    """PEFT's own DoRA and rsLoRA: the teacher is the model with the adapter off."""
    terms = RegularizerConfig(lambda_consistency=0.3, lambda_diversity=0.1, lambda_svd=0.2, svd_top_k=3)
    config = LoraConfig(r=4, target_modules="all-linear", **{f"use_{kind}": True})
    trainer = build(tmp_path, tokenizer, model=tiny_llama(), peft_config=config, regularizers=terms)
    assert_the_definition(trainer, tiny_llama().eval(), terms)


def assert_the_definition(trainer, pretrained, terms):
    """Loss and gradients are those of [`dense_loss`]; returns the trained parameters."""
    wrapped = trainer.model.train()
    with torch.no_grad():  # away from the start, so that every term has a gradient
        for name, p in wrapped.named_parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    batch = next(iter(trainer.get_train_dataloader()))
    batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        teacher = pretrained(**{k: v for k, v in batch.items() if k != "labels"}).logits
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    num_items = torch.tensor(40)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(wrapped, dict(batch), num_items_in_batch=num_items)
    ours = torch.autograd.grad(loss, parameters)
    expected = dense_loss(wrapped, teacher, batch, terms.resolved("nlg"), num_items)
    theirs = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-6)
    scale = max(g.abs().max() for g in theirs)
    assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < 3e-5 * scale
    return parameters


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("terms", [TERMS, RegularizerConfig(preset="iclr2026", lambda_consistency=0.5)])
def test_token_terms_do_not_depend_on_how_the_global_batch_is_cut(terms, tmp_path, tokenizer):
    terms = copy.deepcopy(terms)
    terms.lambda_svd, terms.schedule = 0.0, "constant"
    results = {}
    for size, steps in ((1, 4), (2, 2), (4, 1)):
        keep = KeepGradients()
        trainer = build(
            tmp_path,
            tokenizer,
            rows=PROMPT_COMPLETION[5:9],  # of different lengths
            peft_config=adapter(regularizers=terms),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=0.1,
            callbacks=[keep],
        )
        trainer.train()
        results[size] = (keep.gradients, history(trainer, "loss"), history(trainer, "balora/loss"))
    for size in (1, 2):
        for a, b in zip(results[size][0], results[4][0], strict=True):
            scale = max(g.abs().max() for g in b)
            assert max((x - y).abs().max() for x, y in zip(a, b, strict=True)) < 1e-5 * scale
        torch.testing.assert_close(results[size][1], results[4][1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(results[size][2], results[4][2], rtol=1e-5, atol=1e-6)


def test_with_all_weights_zero_it_is_the_stock_trainer_metric_for_metric(tmp_path, tokenizer):
    """Loss, entropy, accuracy, token count, evaluation: what TRL logs, it still logs."""
    off = RegularizerConfig(lambda_consistency=0, lambda_diversity=0, lambda_svd=0)
    settings = {"evaluate": True, "eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2}
    torch.manual_seed(0)
    ours = build(tmp_path, tokenizer, peft_config=adapter(init_lora_weights=True, regularizers=off), **settings)
    torch.manual_seed(0)
    theirs = build(
        tmp_path,
        tokenizer,
        cls=SFTTrainer,
        peft_config=LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"),
        **settings,
    )
    theirs.model.load_state_dict(ours.model.state_dict())
    ours.train(), theirs.train()
    metrics = ["loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"]
    for key in [*metrics, "eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"]:
        assert history(theirs, key), key
        torch.testing.assert_close(history(ours, key), history(theirs, key), rtol=2e-5, atol=2e-5, msg=key)
    torch.testing.assert_close(history(ours, "balora/task"), history(ours, "loss"), rtol=1e-5, atol=1e-5)
    assert not history(ours, "balora/consistency")  # off, and its cost with it


@pytest.mark.parametrize("init", [True, "pissa"])
def test_a_plain_lora_config_is_exactly_the_stock_trainer(init, tmp_path, tokenizer):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init)
    runs = []
    for cls in (BaLoraSFTTrainer, SFTTrainer):
        torch.manual_seed(0)
        trainer = build(tmp_path, tokenizer, cls=cls, peft_config=copy.deepcopy(config))
        trainer.train()
        runs.append(trainer)
    assert history(runs[0]) == history(runs[1])
    assert runs[0].ba_lora is None
    assert not any(key.startswith("balora") for row in runs[0].state.log_history for key in row)


def test_full_fine_tuning_baseline_is_the_stock_trainer(tmp_path, tokenizer):
    ours, theirs = (build(tmp_path, tokenizer, cls=cls, peft_config=None) for cls in (BaLoraSFTTrainer, SFTTrainer))
    ours.train(), theirs.train()
    assert history(ours) == history(theirs)


def test_terms_on_a_plain_lora(tmp_path, tokenizer):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    trainer = build(tmp_path, tokenizer, peft_config=config, regularizers=TERMS)
    trainer.train()
    assert history(trainer, "balora/consistency")[0] == 0
    assert history(trainer, "balora/consistency")[-1] > 0


def test_terms_in_full_fine_tuning_train_the_head_too(tmp_path, tokenizer):
    terms = RegularizerConfig(lambda_consistency=0.5, lambda_diversity=0.1, lambda_svd=0.3, svd_top_k=2)
    base = tiny_llama()
    trainer = build(tmp_path, tokenizer, model=fresh(base), regularizers=terms, teacher_model=fresh(base))
    model = trainer.model.train()
    with torch.no_grad():
        model.lm_head.weight.add_(0.1 * torch.randn_like(model.lm_head.weight))
    batch = next(iter(trainer.get_train_dataloader()))
    batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}
    teacher = logits(base, batch["input_ids"])
    teacher = base(**{k: v for k, v in batch.items() if k != "labels"}).logits.detach()
    trainer.current_gradient_accumulation_steps = 1
    parameters = list(model.parameters())
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(30))
    ours = torch.autograd.grad(loss, parameters)
    expected = dense_loss(model, teacher, batch, terms.resolved("nlg"), 30)
    theirs = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-6)
    scale = max(g.abs().max() for g in theirs)
    assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < 3e-5 * scale
    trainer.train()
    assert not any(p.requires_grad for p in trainer.ba_lora_run.teacher.parameters())


def test_a_head_that_trains_beside_the_adapter_has_its_initial_copy_as_teacher(tmp_path, tokenizer):
    trainer = build(tmp_path, tokenizer, peft_config=adapter(modules_to_save=["lm_head"], target_modules=["q_proj"]))
    trainer.train()
    consistency = history(trainer, "balora/consistency")
    assert consistency[0] == 0
    head = trainer.model.base_model.model.lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    with torch.no_grad():  # only the head moved: the consistency term sees it
        for name, p in trainer.model.named_parameters():
            if "lora_" in name:
                p.zero_()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.ba_lora_metrics.clear("train")
    trainer.compute_loss(trainer.model, dict(batch))
    assert trainer._take_terms("train")["balora/consistency"] > 1e-5


def test_evaluation_logs_the_terms_and_eval_loss_is_the_task_alone(tmp_path, tokenizer):
    trainer = build(tmp_path, tokenizer, evaluate=True, per_device_eval_batch_size=2)
    trainer.train()
    result = trainer.evaluate()
    for key in KEYS:
        assert math.isfinite(result[f"eval_{key}"])
    # eval_loss: mean over batches, as the host does; eval_balora/task: mean over all tokens
    sums, counts, means = 0.0, 0, []
    for batch in trainer.get_eval_dataloader():
        out = logits(trainer.model, batch["input_ids"]) if "attention_mask" not in batch else None
        with torch.no_grad():
            out = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:]
        mask = targets != -100
        loss = F.cross_entropy(out[:, :-1][mask], targets[mask], reduction="sum").item()
        sums, counts = sums + loss, counts + int(mask.sum())
        means += [loss / int(mask.sum())] * len(targets)
    assert result["eval_balora/task"] == pytest.approx(sums / counts, rel=1e-5)
    assert result["eval_loss"] == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_compute_metrics_gets_the_models_logits(tmp_path, tokenizer):
    seen = {}

    def metrics(prediction):
        seen["logits"], seen["labels"] = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        return {"first": float(prediction.predictions[0, 0, 0])}

    trainer = build(tmp_path, tokenizer, evaluate=True, compute_metrics=metrics, per_device_eval_batch_size=5)
    trainer.train()
    assert "eval_first" in trainer.evaluate()
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        expected = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(seen["logits"], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(seen["labels"], batch["labels"])


def test_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path, tokenizer):
    config = adapter(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], regularizers=TERMS)
    settings = {"router_aux_loss_coef": 0.1, "max_steps": 2, "gradient_accumulation_steps": 2}
    ours = build(tmp_path, tokenizer, model=tiny_mixtral(), peft_config=config, **settings)
    assert ours.aux_loss_enabled
    ours.train()
    assert history(ours, "balora/consistency")[0] == 0
    theirs = build(
        tmp_path,
        tokenizer,
        model=tiny_mixtral(),
        cls=SFTTrainer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]),
        **settings,
    )
    theirs.train()
    assert history(ours, "aux_loss")[0] == pytest.approx(history(theirs, "aux_loss")[0], rel=1e-5)
    first = ours.state.log_history[0]
    assert first["loss"] == pytest.approx(first["balora/loss"] + 0.1 * first["aux_loss"], rel=1e-4)


@pytest.fixture
def without_inductor(monkeypatch):
    """The backend with autograd's tracing below it alone: compiling C++ takes most of a minute."""
    from torch._dynamo.backends.debugging import aot_eager

    from balora_plugin.compile import backend

    graphs = []

    def lower(module, inputs, options):
        graphs.append(module)
        return aot_eager(module, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(backend, "lower", lower)
    yield graphs
    torch._dynamo.reset()


def compiled_adapter(**changes):
    return adapter(regularizers=RegularizerConfig(**{**WEIGHTS, **changes}), compile=True)


WEIGHTS = {"lambda_consistency": 0.5, "lambda_diversity": 0.02, "lambda_svd": 0.02}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
                "gradient_accumulation_steps": 2,
            },
            marks=pytest.mark.slow,
        ),
        pytest.param({"bf16": True}, marks=pytest.mark.long),
    ],
    ids=["plain", "checkpointing_accumulation", "bf16"],
)
def test_compiled_steps_are_the_eager_ones(changes, tmp_path, tokenizer, without_inductor):
    plain = adapter(regularizers=RegularizerConfig(**WEIGHTS))
    eager = build(tmp_path, tokenizer, model=tiny_llama(num_hidden_layers=1), peft_config=plain, **changes)
    eager.train()
    torch._dynamo.utils.counters.clear()
    compiled = build(
        tmp_path, tokenizer, model=tiny_llama(num_hidden_layers=1), peft_config=compiled_adapter(), **changes
    )
    compiled.train()
    assert "compile" not in compiled.ba_lora_run.warn.said  # it did not fall back
    assert not torch._dynamo.utils.counters["graph_break"]
    assert without_inductor
    tolerance = 1e-2 if changes.get("bf16") else 1e-5
    for key in ("loss", "grad_norm", "balora/task", "balora/consistency", "balora/diversity", "balora/svd"):
        found, expected = ([r[key] for r in t.state.log_history if key in r] for t in (compiled, eager))
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance), key


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            marks=pytest.mark.long,
        ),
    ],
    ids=["plain", "reentrant"],
)
def test_compiled_by_layer(changes, tmp_path, tokenizer, without_inductor):
    """The same numbers, with graphs that do not grow with the layers, nor in evaluation; none is left afterwards."""
    rows = [{"prompt": "a" * (i + 3), "completion": "b" * (i + 2)} for i in range(6)]
    shape = {"rows": rows, "per_device_train_batch_size": 1, "max_steps": 4, **changes}
    terms = RegularizerConfig(**WEIGHTS)
    counts, runs = [], []
    for layers, how in ((2, "layers"), (4, "layers"), (4, False)):
        torch._dynamo.reset()
        without_inductor.clear()
        model = tiny_llama(num_hidden_layers=layers)
        trainer = build(tmp_path, tokenizer, model=model, peft_config=adapter(regularizers=terms, compile=how), **shape)
        watch = Watch(without_inductor)
        trainer.add_callback(watch)
        trainer.train()
        assert watch.wrapped == {layers if how else 0}
        assert not watch.grew
        assert wrapped(trainer.model) == 0
        counts.append(len(without_inductor))
        assert "compile" not in trainer.ba_lora_run.warn.said  # it did not fall back
        runs.append(trainer)
    assert counts[0] == counts[1] > counts[2] == 0
    assert counts[1] <= 8
    for key in ("loss", "grad_norm", "balora/consistency", "balora/svd"):
        found, expected = ([r[key] for r in t.state.log_history if key in r] for t in runs[1:])
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), key


class Watch(TrainerCallback):
    """Between steps: how many layers may run compiled, and whether a pass in eval mode made graphs."""

    def __init__(self, graphs):
        self.graphs, self.wrapped, self.grew = graphs, set(), False

    def on_step_end(self, args, state, control, model, **kwargs):
        self.wrapped.add(wrapped(model))
        before = len(self.graphs)
        model.eval()
        model(input_ids=torch.ones(2, 7, dtype=torch.int64))
        model.train()
        self.grew |= len(self.graphs) > before


def wrapped(model):
    return sum(hasattr(vars(module).get("forward"), "compiled_by") for module in model.modules())


@pytest.mark.parametrize("last", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_layers_that_cannot_be_compiled_run_eagerly(last, tmp_path, tokenizer, without_inductor, monkeypatch):
    """All, or from the n-th graph on: the third layer has another rank, and checkpointing computes all again."""
    from balora_plugin.compile import backend

    compiles = backend.lower

    def lower(module, inputs, options):
        if len(without_inductor) >= last:
            raise RuntimeError("no compiler here")
        return compiles(module, inputs, options)

    monkeypatch.setattr(backend, "lower", lower)
    terms, histories = RegularizerConfig(**WEIGHTS), []
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    for how in ("layers", False):
        config = adapter(regularizers=terms, compile=how, rank_pattern={r".*layers\.2.*q_proj": 2})
        model = tiny_llama(num_hidden_layers=3)
        trainer = build(tmp_path, tokenizer, peft_config=config, model=model, **checkpointing)
        with torch._dynamo.config.patch(suppress_errors=True):  # as Axolotl has it
            trainer.train()
        assert ("compile" in trainer.ba_lora_run.warn.said) == bool(how)
        histories.append(history(trainer))
    assert len(without_inductor) == last
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)


@pytest.mark.slow
def test_layers_that_share_graphs_may_differ_in_scale(tmp_path, tokenizer, without_inductor, monkeypatch):
    """Dynamo makes a scale that changes an input of the graph: the updates accumulate all the same."""
    from balora_plugin.compile import backend

    replaced = []
    original = backend.transform
    monkeypatch.setattr(backend, "transform", lambda module: replaced.append(original(module)) or replaced[-1])
    histories = []
    for how in ("layers", False):
        config = adapter(regularizers=RegularizerConfig(**WEIGHTS), compile=how, alpha_pattern={r".*layers\.1\..*": 7})
        trainer = build(tmp_path, tokenizer, peft_config=config, model=tiny_llama(num_hidden_layers=3), max_steps=2)
        trainer.train()
        histories.append(history(trainer))
    updates = [found["accumulate_products"] for found in replaced if found["stack_siblings"]]
    assert updates and set(updates) == {7}
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)


@pytest.mark.long
def test_one_run_needs_many_graphs(tmp_path, tokenizer, without_inductor):
    """With a teacher and without, with the spectrum and without, a last batch of one row, lengths that vary."""
    rows = [{"prompt": "a" * (i % 5 + 3), "completion": "b" * (i % 7 + 2)} for i in range(7)]
    config = compiled_adapter(schedule="iclr2026", teacher_interval=2, share_interval=0)
    run = {"rows": rows, "per_device_train_batch_size": 3, "max_steps": 15}
    trainer = build(tmp_path, tokenizer, model=tiny_llama(num_hidden_layers=1), peft_config=config, **run)
    trainer.train()
    assert "compile" not in trainer.ba_lora_run.warn.said
    assert 8 < len(without_inductor) <= 20


def test_reentrant_checkpointing_that_only_the_model_knows_of(tmp_path, tokenizer, without_inductor):
    """It lives on gradients of the embeddings' outputs, whose hooks no graph can hold."""
    histories = []
    for how in (True, False):
        config = adapter(regularizers=RegularizerConfig(**WEIGHTS), compile=how)
        trainer = build(tmp_path, tokenizer, model=tiny_llama(num_hidden_layers=1), peft_config=config, max_steps=2)
        base = trainer.model.get_base_model()
        base.gradient_checkpointing_enable({"use_reentrant": True})
        base.enable_input_require_grads()
        trainer.train()
        assert base.get_input_embeddings()._forward_hooks
        histories.append([history(trainer, key) for key in ("loss", "grad_norm")])
    for one, other in zip(*histories, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_routers_are_part_of_the_students_graph(tmp_path, tokenizer, without_inductor):
    runs = []
    for how in (True, False):
        model = tiny_mixtral()
        model.config.output_router_logits = True
        config = adapter(regularizers=RegularizerConfig(**WEIGHTS), compile=how, target_modules=["q_proj", "v_proj"])
        runs.append(build(tmp_path, tokenizer, model=model, peft_config=config, max_steps=2))
        runs[-1].train()
    names = [{str(node.target) for node in graph.graph.nodes} for graph in without_inductor]
    assert any("balora.token_terms.default" in targets for targets in names)
    assert history(runs[0]) == pytest.approx(history(runs[1]), rel=1e-5)
    report = json.loads((tmp_path / "out" / "ba_lora_cost.json").read_text())
    assert not report["compiled"]


@pytest.mark.slow
def test_inductor_compiles_whole_training_steps(tmp_path, tokenizer):
    """Nothing replaced: lengths that vary, checkpointing, all three terms."""
    rows = [{"prompt": "a" * (i % 5 + 3), "completion": "b" * (i % 7 + 2)} for i in range(12)]
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    torch._dynamo.reset()
    runs = []
    for how in (True, False):
        config = adapter(regularizers=RegularizerConfig(**WEIGHTS, svd_top_k=2, share_interval=0), compile=how)
        model = tiny_llama(num_hidden_layers=1)
        runs.append(
            build(tmp_path, tokenizer, model=model, peft_config=config, rows=rows, max_steps=5, **checkpointing)
        )
        runs[-1].train()
    torch._dynamo.reset()
    assert "compile" not in runs[0].ba_lora_run.warn.said
    for key in ("loss", "grad_norm", "balora/consistency", "balora/diversity", "balora/svd"):
        assert history(runs[0], key) == pytest.approx(history(runs[1], key), rel=1e-4, abs=1e-6), key


@pytest.mark.slow
def test_the_backends_name_among_the_hosts_arguments_compiles_too(tmp_path, tokenizer, without_inductor):
    """accelerate refuses the name: the trainer takes it out of a copy of the arguments."""
    asked = {"torch_compile": True, "torch_compile_backend": "ba_lora", "max_steps": 1}
    plain = adapter(regularizers=RegularizerConfig(**WEIGHTS))
    trainer = build(tmp_path, tokenizer, model=tiny_llama(num_hidden_layers=1), peft_config=plain, **asked)
    trainer.train()
    assert len(without_inductor) == 2  # teacher and student
    assert "compile" not in trainer.ba_lora_run.warn.said
    # with nothing but the host's own loss it is the model that is compiled
    without_inductor.clear()
    lora = LoraConfig(target_modules=["q_proj", "v_proj"])
    trainer = build(tmp_path, tokenizer, model=tiny_llama(num_hidden_layers=1), peft_config=lora, **asked)
    trainer.train()
    assert trainer.ba_lora is None
    assert without_inductor


@pytest.mark.parametrize("terms", [True, False])
def test_the_hosts_mode_is_passed_on_and_a_failure_is_said_once(terms, tmp_path, tokenizer, monkeypatch, caplog):
    from balora_plugin.compile import backend

    seen = []

    def lower(module, inputs, options):
        seen.append(options)
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    monkeypatch.setattr(backend, "lower", lower)
    asked = {"torch_compile": True, "torch_compile_backend": "ba_lora", "torch_compile_mode": "max-autotune"}
    config = adapter(regularizers=RegularizerConfig(**WEIGHTS)) if terms else LoraConfig(target_modules=["q_proj"])
    model = tiny_llama(num_hidden_layers=1)
    ours = logging.getLogger("balora_plugin")
    ours.addHandler(caplog.handler)
    try:
        trainer = build(tmp_path, tokenizer, model=model, peft_config=config, max_steps=2, **asked)
        trainer.train()
    finally:
        ours.removeHandler(caplog.handler)
    torch._dynamo.reset()
    assert seen and all(options["max_autotune"] for options in seen)
    assert all(math.isfinite(loss) for loss in history(trainer))
    said = [record.message for record in caplog.records if "goes on without it: " in record.message]
    assert said and all("no compiler here" in message for message in said)
    assert len(set(said)) == 1


@pytest.mark.parametrize(
    "packing", [pytest.param(False, marks=pytest.mark.long), pytest.param(True, marks=pytest.mark.slow)]
)
def test_twenty_lengths_do_not_recompile_without_end(packing, tmp_path, tokenizer, without_inductor):
    """A static graph, then a dynamic one, of the teacher and of the student each."""
    count = 10 if packing else 20  # packed, two samples a row
    rows = [{"prompt": "a" * (i + 3), "completion": "b" * (i + 2)} for i in range(20)]
    trainer = build(
        tmp_path,
        tokenizer,
        peft_config=compiled_adapter(schedule="iclr2026", share_interval=0),
        rows=rows,
        model=tiny_llama(num_hidden_layers=1),
        per_device_train_batch_size=2 if packing else 1,
        padding_free=packing,
        max_length=None,
        max_steps=count,
    )
    lengths = set()
    original = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        lengths.add(tuple(inputs["input_ids"].shape))
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert "compile" not in trainer.ba_lora_run.warn.said
    assert len(lengths) >= count - 2  # packed rows may be of one length by chance
    # the schedule holds two terms back at first: the student's graph with them and the one without
    assert len(without_inductor) <= 8


def test_the_cost_report(tmp_path, tokenizer, capsys):
    trainer = build(tmp_path, tokenizer, disable_tqdm=False, max_steps=4)
    trainer.train()
    report = json.loads((tmp_path / "out" / "ba_lora_cost.json").read_text())
    seconds = report["seconds_per_step"]
    assert report["steps_measured"] == 3
    assert all(seconds[part] > 0 for part in ("teacher", "student", "token_terms", "spectrum", "rest"))
    assert sum(value for part, value in seconds.items() if part != "step") == pytest.approx(seconds["step"], rel=1e-6)
    assert "teacher forward" in capsys.readouterr().out


@pytest.mark.slow
def test_torch_compile(tmp_path, tokenizer):
    eager = build(tmp_path, tokenizer, model=tiny_llama(num_hidden_layers=1), max_steps=2)
    eager.train()
    asked = {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled = build(tmp_path, tokenizer, model=tiny_llama(num_hidden_layers=1), max_steps=2, **asked)
    compiled.train()
    torch.testing.assert_close(history(compiled), history(eager), rtol=1e-4, atol=1e-4)


def test_a_task_without_a_trainer_is_refused_before_the_model_loads(tmp_path, tokenizer):
    config = adapter(regularizers=RegularizerConfig(task="nlu"))
    with pytest.raises(ValueError, match="task='nlu'"):
        build(tmp_path, tokenizer, model=str(tmp_path / "there is no such model"), peft_config=config)


def test_a_classifier_is_refused(tmp_path, tokenizer):
    from classifiers import classifier

    with pytest.raises(ValueError, match=r"SFTTrainer, which trains language models: use balora_plugin\.BaLoraTrainer"):
        build(tmp_path, tokenizer, model=classifier("llama"), peft_config=adapter(target_modules=["q_proj"]))


def test_schedules_follow_optimizer_steps(tmp_path, tokenizer):
    terms = RegularizerConfig(preset="iclr2026", lambda_consistency=0.5, lambda_diversity=0.4, lambda_svd=0.3)
    trainer = build(
        tmp_path,
        tokenizer,
        peft_config=adapter(regularizers=terms),
        max_steps=20,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
    )
    seen = []
    original = trainer.ba_lora_requests.step

    def spy(training):
        request = original(training)
        seen.append((trainer.state.global_step, request.lambdas))
        return request

    trainer.ba_lora_requests.step = spy
    trainer.train()
    assert len(seen) == 40
    for step, lambdas in seen:
        p = step / 20
        assert lambdas.consistency == pytest.approx(0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2))
        assert lambdas.diversity == pytest.approx(0.4 * min(max((p - 0.2) / 0.05, 0), 1))
        assert lambdas.svd == pytest.approx(0.3 * min(max((p - 0.2) / 0.05, 0), 1))


def test_teacher_interval_runs_every_nth_micro_batch_with_n_times_the_weight(tmp_path, tokenizer):
    terms = RegularizerConfig(lambda_consistency=0.5, teacher_interval=3)
    trainer = build(
        tmp_path,
        tokenizer,
        peft_config=adapter(regularizers=terms),
        max_steps=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
    )
    seen = []
    original = trainer.ba_lora_requests.step
    trainer.ba_lora_requests.step = lambda training: seen.append(original(training)) or seen[-1]
    trainer.train()
    assert [request.lambdas.consistency for request in seen] == [1.5, 0, 0, 1.5, 0, 0]


def test_another_epoch_shows_the_teacher_another_part():
    """Twelve micro-batches an epoch in a fixed order, every fourth: one phase would show the same three for ever."""
    from balora_plugin.training.teacher_rows import phase_of, rows_met

    met = {
        epoch: {i for i in range(12) if rows_met(12 * epoch + i + phase_of(epoch, 4), 1, 4, 1)} for epoch in range(20)
    }
    assert all(len(part) == 3 for part in met.values())
    assert met[0] == {0, 4, 8}
    assert set.union(*met.values()) == set(range(12))


def test_evaluations_take_the_same_rows_of_the_spectrum(tmp_path, tokenizer):
    terms = RegularizerConfig(lambda_consistency=0.0, lambda_diversity=0.0, lambda_svd=0.1, svd_max_rows=8, svd_top_k=2)
    trainer = build(
        tmp_path,
        tokenizer,
        peft_config=adapter(regularizers=terms),
        evaluate=True,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    found = history(trainer, "eval_balora/svd")
    assert len(found) == 3 and len(set(found)) == 1


def test_the_share_of_a_teacher_that_runs_now_and_then_is_its_average_weights(tmp_path, tokenizer):
    shares = []
    for interval in (1, 3):
        terms = RegularizerConfig(lambda_consistency=0.5, teacher_interval=interval, share_interval=1)
        config = adapter(regularizers=terms, init_lora_weights="pissa")
        trainer = build(tmp_path, tokenizer, peft_config=config, max_steps=7, learning_rate=1e-3)
        trainer.train()
        shares.append(history(trainer, "balora/share_consistency"))
    assert len(shares[0]) == 6
    assert len(shares[1]) == 2  # at the micro-batches where the teacher ran
    assert shares[1][0] == pytest.approx(shares[0][2], rel=0.2)


def test_evaluation_measures_every_term_whatever_the_schedule(tmp_path, tokenizer):
    config = adapter(regularizers=RegularizerConfig(preset="iclr2026"))
    result = build(tmp_path, tokenizer, peft_config=config, evaluate=True).evaluate()
    assert all(f"eval_{key}" in result for key in KEYS)
    expected = (
        result["eval_balora/task"]
        + 0.025 * result["eval_balora/consistency"]
        + 0.005 * result["eval_balora/diversity"]
        + 0.005 * result["eval_balora/svd"]
    )
    assert result["eval_balora/loss"] == pytest.approx(expected, rel=1e-5)


def test_checkpoints_are_stock_adapters_and_resuming_is_exact(tmp_path, tokenizer, ids):
    settings = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "peft_config": adapter(
            lora_dropout=0.1, regularizers=RegularizerConfig(preset="iclr2026", lambda_consistency=0.5)
        ),
        "lr_scheduler_type": "cosine",
    }
    whole = build(tmp_path, tokenizer, **settings)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert {"adapter_model.safetensors", "ba_lora.json", "ba_lora_init.safetensors"} <= {
        path.name for path in checkpoint.iterdir()
    }
    base = tiny_llama().eval()
    assert (logits(PeftModel.from_pretrained(fresh(base), checkpoint), ids) - logits(base, ids)).abs().max() > 1e-3
    expected = logits(whole.model.eval(), ids)
    resumed = build(tmp_path, tokenizer, **settings)
    for name, p in resumed.model.named_parameters():
        if "frozen_" in name:
            p.data.neg_()  # as if the SVD had come out otherwise on this machine
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(logits(resumed.model.eval(), ids), expected)
    full, rest = history(whole)[3:], history(resumed)[-3:]
    assert rest == full
    stock = PeftModel.from_pretrained(fresh(base), tmp_path / "out" / "checkpoint-6").eval()
    torch.testing.assert_close(logits(stock, ids), expected, rtol=0, atol=1e-5)


def test_load_best_model_at_end(tmp_path, tokenizer, ids):
    trainer = build(
        tmp_path,
        tokenizer,
        evaluate=True,
        max_steps=4,
        learning_rate=0.5,  # diverges: the best is not the last
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    losses = history(trainer, "eval_loss")
    assert losses.index(min(losses)) < 3
    stock = PeftModel.from_pretrained(tiny_llama(), best).eval()
    torch.testing.assert_close(logits(trainer.model.eval(), ids), logits(stock, ids), rtol=0, atol=1e-4)
    trainer.save_model(str(tmp_path / "final"))
    final = PeftModel.from_pretrained(tiny_llama(), tmp_path / "final").eval()
    torch.testing.assert_close(logits(final, ids), logits(stock, ids), rtol=0, atol=1e-4)


def test_model_by_path_and_saved_settings(tmp_path, tokenizer):
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    terms = RegularizerConfig(preset="iclr2026")
    kwargs = {"dtype": "bfloat16"}
    trainer = build(
        tmp_path,
        tokenizer,
        model=str(tmp_path / "base"),
        peft_config=adapter(),
        regularizers=terms,  # on the trainer: what was used is what the file says
        model_init_kwargs=kwargs,
    )
    assert trainer.model.get_base_model().dtype == torch.bfloat16
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    settings = json.loads((tmp_path / "adapter" / "ba_lora.json").read_text())
    assert settings["base_model"] == str(tmp_path / "base")
    assert settings["regularizers"]["preset"] == "iclr2026"


class Listener(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def warned():
    listener = Listener()
    logger = logging.getLogger("balora_plugin")
    logger.addHandler(listener)
    yield listener.messages
    logger.removeHandler(listener)


def test_terms_that_cannot_act_are_said_once(tmp_path, tokenizer, warned):
    rows = [{"prompt": f"{i} ", "completion": "ok"} for i in range(N)]  # 3 counted tokens a sample
    build(tmp_path, tokenizer, rows=rows, per_device_train_batch_size=1, max_steps=3).train()
    clamped = [message for message in warned if "svd_top_k=10" in message]
    assert len(clamped) == 1
    assert "(2 on average)" in clamped[0]


def test_a_single_counted_token_leaves_the_svd_term_out_and_says_so(tmp_path, tokenizer, warned):
    trainer = build(tmp_path, tokenizer, per_device_train_batch_size=1, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    batch["labels"][:, :-1] = -100
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    for _ in range(2):
        assert math.isfinite(trainer.compute_loss(trainer.model, dict(batch)).item())
    assert "balora/svd" not in trainer._take_terms("train")
    assert len([message for message in warned if "single counted token" in message]) == 1


def test_no_counted_token_gives_zero_and_a_zero_gradient(tmp_path, tokenizer):
    trainer = build(tmp_path, tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    batch["labels"][:] = -100
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_negligible_shares_are_logged_and_said_once(tmp_path, tokenizer, warned):
    terms = RegularizerConfig(share_interval=5)  # the paper's weights
    trainer = build(tmp_path, tokenizer, peft_config=adapter(regularizers=terms), max_steps=11)
    trainer.train()
    assert len(history(trainer, "balora/share_consistency")) == 3  # steps 1, 5, 10
    assert all(0 < value < 1e-3 for value in history(trainer, "balora/share_consistency"))
    assert all(value > 0 for key in ("diversity", "svd") for value in history(trainer, f"balora/share_{key}"))
    assert len([message for message in warned if "hardly act" in message and "lambda_consistency" in message]) == 1


def test_shares_are_not_judged_in_warm_up(tmp_path, tokenizer, warned):
    """There the student still is the teacher: the strongest term would be called idle."""
    terms = RegularizerConfig(lambda_consistency=0.5, lambda_diversity=0.1, lambda_svd=0.1)
    settings = {"max_steps": 30, "warmup_steps": 3, "lr_scheduler_type": "constant_with_warmup", "learning_rate": 1e-3}
    trainer = build(
        tmp_path, tokenizer, peft_config=adapter(regularizers=terms), per_device_train_batch_size=1, **settings
    )
    trainer.train()
    shares = history(trainer, "balora/share_consistency")
    assert len(shares) == 2  # step 1, and step 10, the first that is judged
    assert shares[0] < 1e-3 < shares[1]
    assert not [message for message in warned if "hardly act" in message]


def test_shares_are_the_ratio_of_gradient_norms(tmp_path, tokenizer):
    """Against autograd on dense logits, with respect to the final hidden states."""
    terms = RegularizerConfig(lambda_consistency=0.5, lambda_diversity=0.2, lambda_svd=0.3, svd_top_k=2)
    trainer = build(tmp_path, tokenizer, peft_config=adapter(regularizers=terms))
    trainer.train()
    request = trainer.ba_lora_requests.step(True)
    request.measure_shares = True
    batch = next(iter(trainer.get_train_dataloader()))
    batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}
    model = trainer.model.train()
    shares = model(**batch, ba_lora=request).shares
    base = model.get_base_model()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    mask = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        hidden = base.model(**inputs).last_hidden_state[:, :-1][mask]
        with model.disable_adapter():
            teacher = base.model(**inputs).last_hidden_state[:, :-1][mask] @ base.lm_head.weight.T
    hidden.requires_grad_()
    z = hidden @ base.lm_head.weight.T
    losses = [
        F.cross_entropy(z, batch["labels"][:, 1:][mask]),
        0.5 * regularizers.consistency(z, teacher),
        0.2 * regularizers.token_entropy(z),
        0.3 * regularizers.spectral(z, k=2),
    ]
    norms = [torch.autograd.grad(loss, hidden, retain_graph=True)[0].norm() for loss in losses]
    torch.testing.assert_close(shares, torch.stack(norms[1:]) / norms[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "terms",
    [
        RegularizerConfig(svd_input="centered_logits", lambda_svd=0.5, svd_top_k=2),
        RegularizerConfig(svd_input="features", lambda_svd=0.5, svd_top_k=2),
        RegularizerConfig(svd_layout="flattened", lambda_svd=0.5, svd_top_k=1),
        RegularizerConfig(svd_layout="flattened", svd_input="features", lambda_svd=0.5, svd_top_k=1),
    ],
)
def test_the_other_inputs_of_the_spectral_term(terms, tmp_path, tokenizer):
    trainer = build(tmp_path, tokenizer, peft_config=adapter(regularizers=terms))
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    got = model(**batch, ba_lora=trainer.ba_lora_requests.step(True)).svd
    base = model.get_base_model()
    hidden = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, :-1]
    mask = batch["labels"][:, 1:] != -100
    matrix = hidden if terms.svd_input == "features" else hidden @ base.lm_head.weight.T
    matrix = (matrix * mask[..., None]).flatten(1) if terms.svd_layout == "flattened" else matrix[mask]
    expected = regularizers.spectral(matrix, k=terms.svd_top_k, centered=terms.svd_input == "centered_logits")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_vocabulary_is_what_the_tests_assume(tokenizer):
    assert len(tokenizer) <= VOCABULARY
    assert tokenizer("What is 1?")["input_ids"][0] > 2
