"""Classification with BaLoraTrainer: one definition of the loss however a batch is cut, warm-up, checkpoints, ranks."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from classifiers import batch, classifier
from peft import PeftModel
from transformers import TrainerCallback

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig
from balora_plugin.checkpoint.names import HEAD_FILE

from .nlu_training import Gradients, arguments, build, rows
from .ranks import run_worker

SAMPLE_TERMS = RegularizerConfig(preset="iclr2026", schedule="constant", lambda_diversity=0.0, lambda_svd=0.0)


@pytest.fixture(autouse=True)
def _one_thread(_seed):
    torch.set_num_threads(1)  # two would wait for each other more than they compute on models this small


def history(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def new_head(seed):
    """The same backbone with another random head: what a second process gets from a pre-trained checkpoint."""
    model = classifier()
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.classifier.weight, std=0.3)
    return model


@pytest.mark.parametrize("kind", [{}, {"multi": True}, {"regression": True}])
def test_sample_terms_do_not_depend_on_how_the_global_batch_is_cut(kind, tmp_path):
    """A loss that ignores num_items_in_batch would be 4 times as large; one that counts labels, a third for `multi`."""
    found = []
    data = rows(8, **kind)
    for size, accumulation in ((8, 1), (2, 4)):
        keep = Gradients()
        trainer = build(
            tmp_path,
            classifier(num_labels=1 if "regression" in kind else 3),
            SAMPLE_TERMS,
            data,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            callbacks=[keep],
        )
        trainer.train()
        found.append((keep.found, trainer))
    (whole, one), (cut, many) = found
    scale = max(g.abs().max() for g in whole.values())
    assert whole.keys() == cut.keys() and scale > 1e-3
    for name, gradient in whole.items():
        assert (gradient - cut[name]).abs().max() < 1e-5 * scale, name
    for key in ("loss", "balora/task", "balora/consistency", "balora/loss"):
        torch.testing.assert_close(history(many, key), history(one, key), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(history(one, "loss"), history(one, "balora/loss"), rtol=1e-4, atol=1e-6)
    assert history(one, "balora/consistency")[0] == 0 < history(one, "balora/consistency")[1]


def test_batch_statistics_weigh_their_samples_and_a_last_sample_alone_is_left_out(tmp_path, caplog):
    """Five samples in batches of 4 and 1: the statistic of the four counts for four fifths of the step."""
    terms = RegularizerConfig(lambda_consistency=0.0, lambda_diversity=0.3, lambda_svd=0.2, svd_norm="nuclear")
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        trainer = build(tmp_path, classifier(), terms, rows(5), gradient_accumulation_steps=2, max_steps=2)
        trainer.train()
    first = trainer.state.log_history[0]
    expected = first["balora/task"] + 4 / 5 * (0.3 * first["balora/diversity"] + 0.2 * first["balora/svd"])
    assert first["loss"] == pytest.approx(expected, rel=1e-4)
    assert first["balora/loss"] == pytest.approx(expected, rel=1e-4)
    assert first["balora/svd_used_k"] == 2 and -1 < first["balora/svd"] < 0
    said = [record.getMessage() for record in caplog.records if "BA-LoRA: " in record.getMessage()]
    for what in ("SVD term cannot act on a single sample", "used one less than that", "diversity term, a covariance"):
        assert len([text for text in said if what in text]) == 1, what
    assert any("svd_input='features'" in text for text in said)


def test_evaluation_metrics_and_the_saved_classifier(tmp_path):
    def metrics(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    model = classifier(dropout=0.3)
    trainer = build(tmp_path, model, RegularizerConfig(), compute_metrics=metrics)
    before = trainer.evaluate()
    assert before["eval_balora/consistency"] == 0.0  # whatever the dropout
    assert before["eval_loss"] == pytest.approx(before["eval_balora/task"], rel=1e-5)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_balora/consistency"] > 0 and math.isfinite(after["eval_balora/loss"])
    assert after["eval_balora/diversity"] > 0 and after["eval_balora/svd"] < 0 and "eval_accuracy" in after
    assert {"balora/share_consistency", "balora/share_diversity", "balora/share_svd"} <= set().union(
        *trainer.state.log_history
    )
    assert (
        "svd_all" in trainer.ba_lora_run.warn.said and "svd_clamped" not in trainer.ba_lora_run.warn.said
    )  # k = 5, 3 classes
    trainer.save_model(str(tmp_path / "adapter"))
    settings = json.loads((tmp_path / "adapter" / "ba_lora.json").read_text())
    assert settings["regularizers_in_force"]["task"] == "nlu" and HEAD_FILE in settings["sha256"]
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card and "num_labels=3" in card
    with torch.no_grad():
        stock = PeftModel.from_pretrained(new_head(5), tmp_path / "adapter").eval()
        ours = trainer.model.eval()(**batch()).logits
        torch.testing.assert_close(stock(**batch()).logits, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_checkpointing_and_half_precision(kind, tmp_path):
    """Checkpointing gives the same run, the head's warm-up included; bfloat16 autocast a near one."""
    terms = RegularizerConfig(preset="iclr2026", schedule="constant", svd_input="features", head_warmup_steps=1)
    runs = [
        build(tmp_path, classifier(kind), terms, **settings)
        for settings in (
            {},
            {"gradient_checkpointing": True},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {"bf16": True},
        )
    ]
    for trainer in runs:
        trainer.train()
    for key in ("loss", "balora/consistency", "balora/diversity", "balora/svd"):
        for trainer in runs[1:]:
            exact = not trainer.args.bf16
            expected = pytest.approx(history(runs[0], key), rel=1e-4 if exact else 0.3, abs=1e-6 if exact else 2e-2)
            assert history(trainer, key) == expected, key


@pytest.mark.parametrize("adapter", ["ba_lora", "ba_lora, plain start", "lora", "full"])
def test_resuming_is_exact_with_another_random_head(adapter, tmp_path):
    """The warm-up's head becomes the teacher's at step 2, and survives the checkpoint at step 3."""
    terms = RegularizerConfig(preset="iclr2026", lambda_consistency=2.0, head_warmup_steps=2, schedule="constant")
    settings = {"terms": terms, "adapter": adapter, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}

    def run(seed, **changes):
        model = new_head(seed)
        teacher = {"teacher_model": new_head(seed)} if adapter == "full" else {}
        return build(tmp_path, model, **settings, **teacher, **changes)

    whole = run(3)
    initial = whole.model.state_dict()[_teacher_key(adapter)].clone()
    start = {name: p.detach().clone() for name, p in whole.model.named_parameters()}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
            if state.global_step == 2:
                assert moved and all("classifier" in name for name in moved)

    whole.add_callback(Watch())
    whole.train()
    consistency = history(whole, "balora/consistency")
    assert len(consistency) == 4 and consistency[0] == pytest.approx(0, abs=1e-9) and consistency[1] > 1e-9
    resumed = run(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, p in whole.model.named_parameters():
        assert torch.equal(p, dict(resumed.model.named_parameters())[name]), name
    assert history(resumed, "balora/consistency") == consistency
    assert not torch.equal(whole.model.state_dict()[_teacher_key(adapter)], initial)
    if adapter == "lora":
        (tmp_path / "checkpoint-3" / HEAD_FILE).unlink()
        with pytest.raises(ValueError, match=rf"cannot resume.*{HEAD_FILE} is missing.*checkpoint-6"):
            run(4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        (tmp_path / "checkpoint-3" / "ba_lora_checkpoint.json").unlink()  # as an earlier release wrote it
        with pytest.raises(ValueError, match=f"holds no {HEAD_FILE}"):
            run(4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def _teacher_key(adapter):
    return "classifier.weight" if adapter == "full" else "base_model.model.classifier.original_module.weight"


def test_a_head_that_is_not_finite_stops_the_run_before_anything_is_saved(tmp_path):
    """An SVD of NaN raises by itself, and says nothing of term, step or checkpoint."""

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.get_base_model().classifier.modules_to_save["default"].weight.data[0, 0] = math.nan

    trainer = build(tmp_path, save_strategy="steps", save_steps=2, logging_steps=100, callbacks=[Poison()])
    with pytest.raises(FloatingPointError, match=r"balora/task: .* NaN or inf at step 3\b.*checkpoint-2"):
        trainer.train()
    assert not (tmp_path / "checkpoint-4").exists()


def test_refused_by_name(tmp_path):
    for terms, changes, message in (
        ({"head_warmup_steps": 4}, {}, "head_warmup_steps=4 is not below the 4 optimizer steps"),
        ({"head_warmup_steps": 1}, {"ddp_find_unused_parameters": False}, "ddp_find_unused_parameters=False"),
        ({"teacher_cache": str(tmp_path)}, {}, "teacher_cache=.* with task='nlu'"),
    ):
        with pytest.raises(ValueError, match=message):
            build(tmp_path, terms=RegularizerConfig(**terms), **changes).train()
    with pytest.raises(ValueError, match="pass teacher_model=<the pre-trained model>, or set lambda_consistency=0"):
        build(tmp_path, adapter="full")  # a cache would be refused next
    config = BaLoraConfig(r=2, compile=True)
    with pytest.raises(ValueError, match="compile=True is for causal language models"):
        BaLoraTrainer(classifier(), arguments(tmp_path), peft_config=config, train_dataset=rows())
    with pytest.raises(ValueError, match="another head than the model"):
        build(tmp_path, new_head(1), adapter="full", teacher_model=new_head(2))


@pytest.mark.parametrize("kind", ["llama", "deberta-v2", "roberta"])
def test_the_head_of_a_half_precision_base_trains_in_float32(kind, tmp_path, caplog):
    """At 2e-5 most of a bfloat16 head's weights would not move at all."""
    trainer = build(tmp_path, classifier(kind).bfloat16(), bf16=True, learning_rate=2e-5, max_steps=2)
    heads = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_" not in n}
    before = {n: p.detach().clone() for n, p in heads.items()}
    assert trainer.evaluate()["eval_balora/consistency"] == 0.0
    trainer.train()
    for name, p in heads.items():
        assert p.dtype == torch.float32, name
        assert (p != before[name]).float().mean() > 0.9, name
    trainer.model.eval()(**batch())  # without autocast too
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        build(tmp_path, classifier(kind).bfloat16())
    assert "would train in half precision" in caplog.text and "bf16=True" in caplog.text


@pytest.mark.parametrize(("engine", "adapter"), [("fsdp", "ba_lora"), ("fsdp", "lora"), ("deepspeed", "lora")])
def test_engines_that_would_lose_the_teachers_head_are_refused(engine, adapter, tmp_path, monkeypatch):
    """FSDP1 (FSDP2 and BA-LoRA's own adapter: test_sharded_classifier.py), and adapters that nobody restores."""
    original = BaLoraTrainer.create_accelerator_and_postprocess

    def create(self):
        original(self)
        setattr(self, f"is_{engine}_enabled", True)

    monkeypatch.setattr(BaLoraTrainer, "create_accelerator_and_postprocess", create)
    with pytest.raises(ValueError, match=f"{engine}=True does not work with task='nlu'.*use DDP"):
        build(tmp_path, adapter=adapter)


def test_gathered_statistics_on_two_ranks_are_one_processs(tmp_path):
    """Covariance and spectrum over both ranks' samples: losses, gradients and logs of one process with all of them."""
    from .workers.nlu import train

    one = train(8)
    out = tmp_path / "ranks.pt"
    done = run_worker("nlu.py", str(out), "4", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(out, weights_only=False)
    scale = max(g.abs().max() for g in one["gradients"].values())
    for name, gradient in one["gradients"].items():
        assert (gradient - two["gradients"][name]).abs().max() < 1e-5 * scale, name
    assert len(one["logs"]) == len(two["logs"]) and one["logs"][0]["balora/diversity"] > 0
    for alone, both in zip(one["logs"], two["logs"], strict=True):
        for key, value in alone.items():
            assert both[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    # nine samples: the last batch of the second rank is nothing but repeats
    assert "eval_balora/svd" in one["evaluation"]
    assert two["evaluation"] == pytest.approx(one["evaluation"], rel=1e-4, abs=1e-6)
    assert two["predictions"] == pytest.approx(one["predictions"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", [{}, {"multi": True}, {"regression": True}])
def test_a_batch_of_nothing_but_repeats_counts_nothing(kind, tmp_path, monkeypatch):
    """A label of -100 is a score like another in a regression, and the mean loss over no sample NaN."""
    trainer = build(
        tmp_path,
        classifier(num_labels=1 if "regression" in kind else 3),
        SAMPLE_TERMS,
        rows(8, **kind),
        per_device_eval_batch_size=4,
    )
    first = trainer.evaluate(rows(8, **kind).select(range(4)))
    batches = []

    def repeated(accelerator, n):
        batches.append(n)
        return n if len(batches) % 2 == 0 else 0

    monkeypatch.setattr("balora_plugin.training.trainer.repeated_rows", repeated)
    both = trainer.evaluate(rows(8, **kind))
    assert len(batches) == 2
    for key in ("eval_balora/task", "eval_balora/loss", "eval_balora/consistency"):
        assert both[key] == pytest.approx(first[key], rel=1e-6), key
    unlabelled = rows(8, **kind).remove_columns("labels")
    assert trainer.predict(unlabelled).predictions.shape[0] == 8 and len(batches) == 4
