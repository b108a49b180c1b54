"""label_smoothing_factor and loss_type, from a host's arguments to the loss: the host's own where no term is on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from classifiers import batch, classifier
from datasets import Dataset
from helpers import TERMS, ba_lora, counts_what_is_predicted, fresh
from models import VOCABULARY, tiny_llama
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from balora_plugin import BaLoraTrainer, RegularizerConfig, regularizers
from balora_plugin.fused.loss import TaskForm
from balora_plugin.objective.install import install
from balora_plugin.objective.request import StepRequest
from balora_plugin.schedules import Lambdas
from balora_plugin.training.checks.arguments import check_arguments, check_loss_function
from balora_plugin.training.task_form import task_form

pytestmark = pytest.mark.hosts

OFF = RegularizerConfig(lambda_consistency=0.0, lambda_diversity=0.0, lambda_svd=0.0)


def arguments(tmp_path, **changes):
    values = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(**{**values, **changes})


def tokens(n=8, length=10):
    """Rows of which each has another number of counted tokens."""
    ids = torch.randint(3, 90, (n, length), generator=torch.Generator().manual_seed(3))
    labels = [row[:2].fill_(-100).tolist() + row[2:].tolist() for row in ids.clone()]
    labels = [[-100] * (i % 4) + row[i % 4 :] for i, row in enumerate(labels)]
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels})


def samples(n=8, **kind):
    return Dataset.from_dict({key: value.tolist() for key, value in batch(n, **kind).items()})


class First(TrainerCallback):
    """The gradients of the first optimizer step."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = self.found or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run(cls, model, args, data):
    """Evaluation before and logged loss of the first step, and its gradients."""
    keep = First()
    trainer = cls(model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=[keep])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.state.log_history[-2]["loss"], keep.found, trainer


def same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4)  # logs are rounded
    assert ours[2].keys() == theirs[2].keys() and ours[2]
    for name, gradient in theirs[2].items():
        assert (ours[2][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name


# --- what is asked


def test_arguments_are_read_in_one_place():
    assert task_form(None, None) == task_form(0, "nll") == task_form(0.0, "chunked_nll") == TaskForm()
    assert task_form(0.1, "nll") == task_form(0.1, None) == TaskForm(0.1)
    assert task_form(0.0, "dft") == TaskForm(dft=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"label_smoothing_factor": 1.5}, "label_smoothing_factor=1.5 .* write a number from 0 to 1"),
        ({"label_smoothing_factor": True}, "label_smoothing_factor=True"),
        ({"loss_type": ["sigmoid"]}, r"loss_type=\['sigmoid'\] .* write 'nll' or 'dft'"),
        (
            {"label_smoothing_factor": 0.1, "loss_type": "dft"},
            "label_smoothing_factor=0.1 does not go together with loss_type='dft': set it to 0",
        ),
    ],
)
def test_what_cannot_be_asked_is_named(given, words):
    with pytest.raises(ValueError, match=words):
        check_arguments(SimpleNamespace(**given))


def test_a_loss_of_ones_own_is_refused_whatever_the_form():
    for form in (TaskForm(), TaskForm(0.1), TaskForm(dft=True)):
        with pytest.raises(ValueError, match=r"compute_loss_func .* remove it"):
            check_loss_function(lambda *a, **k: 0, form)


# --- language models


@counts_what_is_predicted
@pytest.mark.parametrize("cut", [(8, 1), (2, 4)])
def test_smoothing_without_terms_is_the_trainers_own(cut, tmp_path):
    model = ba_lora(tiny_llama(), regularizers=OFF)
    args = {
        "label_smoothing_factor": 0.2,
        "per_device_train_batch_size": cut[0],
        "gradient_accumulation_steps": cut[1],
    }
    theirs = run(Trainer, fresh(model), arguments(tmp_path, **args), tokens())
    ours = run(BaLoraTrainer, model, arguments(tmp_path, **args), tokens())
    same(ours, theirs)
    logged = next(row["balora/task"] for row in ours[3].state.log_history if "balora/task" in row)
    assert logged == pytest.approx(theirs[1], rel=1e-4)


class TokenWeights(BaLoraTrainer):
    def weigh_ba_lora_task(self, inputs):
        return inputs["labels"] % 5 / 2.0


def moved(model):
    """A BA-LoRA model whose student has left its teacher."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def capped():
    """A model whose logits have a softcap."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=None,
    )
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize("task", [{"label_smoothing": 0.2}, {"dft": True}])
@pytest.mark.parametrize("make", [tiny_llama, capped])
def test_beside_the_terms_and_weights_it_is_the_definition(make, task, tmp_path):
    """Anchored fine-tuning among them: dft with the consistency term."""
    model = moved(ba_lora(make(), targets=["q_proj", "v_proj"], regularizers=TERMS))
    reference, rows = fresh(model), {k: torch.tensor(v) for k, v in tokens().to_dict().items()}
    args = arguments(tmp_path, label_smoothing_factor=task.get("label_smoothing", 0.0))
    args.loss_type = "dft" if "dft" in task else "nll"
    trainer = TokenWeights(model=model, args=args, train_dataset=tokens(), eval_dataset=tokens())
    model.train()
    loss = trainer.compute_loss(model, rows)
    loss.backward()
    counted = rows["labels"][:, 1:] != -100
    targets = rows["labels"][:, 1:][counted]
    with reference.disable_adapter(), torch.no_grad():
        teacher = reference(input_ids=rows["input_ids"]).logits[:, :-1][counted]
    z = reference(input_ids=rows["input_ids"]).logits[:, :-1][counted]
    p = z.softmax(-1)
    onehot = F.one_hot(targets, z.shape[-1]).float()
    if "dft" in task:
        each = -(onehot * p).sum(-1).detach() * (onehot * p).sum(-1).log()
    else:
        each = -((0.8 * onehot + 0.2 / z.shape[-1]) * p.log()).sum(-1)
    each = (each * (targets % 5 / 2.0)).mean()
    expected = (
        each
        + TERMS.lambda_consistency * regularizers.consistency(z, teacher)
        + TERMS.lambda_diversity * regularizers.token_entropy(z)
        + TERMS.lambda_svd * regularizers.spectral(z, k=10)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - gradients[name]).norm() < 1e-3 * gradients[name].norm() + 1e-7, name
    assert trainer.evaluate()["eval_balora/task"] == pytest.approx(each.item(), rel=1e-5)


@pytest.mark.parametrize("form", [TaskForm(0.2), TaskForm(dft=True)])
def test_inside_one_compiled_graph_it_is_the_same(form):
    from balora_plugin.objective.causal_lm_terms import backbone_pass, student_pass
    from balora_plugin.objective.request import CompiledPasses

    model = moved(ba_lora(tiny_llama(num_hidden_layers=1), targets=["q_proj"], regularizers=TERMS))
    bare = model.get_base_model()
    install(bare)
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(3))
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(student_pass, backend=lambda module, _: graphs.append(module) or module, fullgraph=True)
    found = []
    for passes in (None, CompiledPasses(backbone_pass, compiled)):
        model.zero_grad()
        asked = StepRequest(TERMS.resolved("nlg"), Lambdas(0.5, 0.02, 0.02), task_form=form, compiled=passes)
        out = bare(input_ids=ids, labels=ids, ba_lora=asked)
        out.loss.backward()
        found.append([out.task, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch._dynamo.reset()
    assert len(graphs) == 1 and len(found[0]) > 2
    for plain, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, plain)


def test_shares_are_over_the_task_term_in_its_form():
    model = moved(ba_lora(tiny_llama(), targets=["q_proj"], regularizers=TERMS))
    bare = model.get_base_model()
    install(bare)
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(3))
    found = []
    for form in (TaskForm(), TaskForm(dft=True)):
        asked = StepRequest(TERMS.resolved("nlg"), Lambdas(0.5, 0.02, 0.02), measure_shares=True, task_form=form)
        found.append(bare(input_ids=ids, labels=ids, ba_lora=asked).shares)
    assert (found[1] > 2 * found[0]).all()  # unlikely targets weigh little, so the task's gradient is small


# --- classifiers


@counts_what_is_predicted
@pytest.mark.parametrize("cut", [(8, 1), (2, 4)])
def test_a_smoothed_classifier_without_terms_is_the_trainers_own(cut, tmp_path):
    model = ba_lora(classifier(), targets=["query", "value"], task_type="SEQ_CLS", regularizers=OFF)
    args = {
        "label_smoothing_factor": 0.2,
        "per_device_train_batch_size": cut[0],
        "gradient_accumulation_steps": cut[1],
    }
    theirs = run(Trainer, fresh(model), arguments(tmp_path, **args), samples())
    ours = run(BaLoraTrainer, model, arguments(tmp_path, **args), samples())
    same(ours, theirs)


CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


class ClassWeights(BaLoraTrainer):
    def weigh_ba_lora_task(self, inputs):
        return CLASS_WEIGHTS[inputs["labels"]]


@pytest.mark.parametrize("task", [{"label_smoothing": 0.2}, {"dft": True}])
def test_a_classifiers_weights_and_form_go_together(task, tmp_path):
    model = ba_lora(classifier(), targets=["query", "value"], task_type="SEQ_CLS", regularizers=OFF)
    reference, rows = fresh(model).eval(), batch(8)
    args = arguments(tmp_path, label_smoothing_factor=task.get("label_smoothing", 0.0))
    args.loss_type = "dft" if "dft" in task else "nll"
    trainer = ClassWeights(model=model, args=args, eval_dataset=samples())
    labels = rows.pop("labels")
    log_p = reference(**rows).logits.log_softmax(-1)
    chosen = log_p.gather(1, labels[:, None])[:, 0]
    each = -chosen * chosen.detach().exp() if "dft" in task else -0.8 * chosen - 0.2 * log_p.mean(-1)
    expected = (each * CLASS_WEIGHTS[labels]).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    loss = trainer.compute_loss(model.train(), {**rows, "labels": labels})
    (loss + expected).backward()
    gradients = [[p.grad for p in m.parameters() if p.requires_grad] for m in (model, reference)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}])
@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        ({"num_labels": 1}, {"regression": True}, "'regression' is a regression"),
        ({"problem_type": "regression"}, {"regression": True}, "'regression' is a regression"),
        ({}, {"multi": True}, "'multi_label_classification' is several labels a sample"),
    ],
)
def test_what_has_no_classes_is_refused_by_name(make, kind, words, form, tmp_path):
    """The host's own smoother would take a logarithm of one output's softmax, or an index of a score."""
    args = arguments(tmp_path, label_smoothing_factor=form.get("label_smoothing_factor", 0.0))
    args.loss_type = form.get("loss_type")
    key, value = next(iter(form.items()))
    with pytest.raises(ValueError, match=f"{key}={value!r} is for one class a sample.*{words}"):
        BaLoraTrainer(
            model=ba_lora(classifier(**make), targets=["query", "value"], task_type="SEQ_CLS", r=1, regularizers=OFF),
            args=args,
            train_dataset=samples(**kind),
        ).train()


def test_of_several_labels_a_sample_smoothing_is_off_as_the_host_says(tmp_path):
    def trained(factor):
        model = ba_lora(
            classifier(problem_type="multi_label_classification"),
            targets=["query", "value"],
            task_type="SEQ_CLS",
            regularizers=OFF,
        )
        return run(BaLoraTrainer, model, arguments(tmp_path, label_smoothing_factor=factor), samples(multi=True))

    with pytest.warns(UserWarning, match="Disabling label smoothing"):
        smoothed = trained(0.1)
    same(smoothed, trained(0.0))


def test_the_reference_is_transformers_smoother():
    z = torch.randn(7, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([1, 2, -100, 8, 0, -100, 3])
    theirs = LabelSmoother(epsilon=0.3)({"logits": z}, labels)
    assert regularizers.cross_entropy(z, labels, label_smoothing=0.3).item() == pytest.approx(theirs.item(), rel=1e-6)
