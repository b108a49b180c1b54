"""Training data from which nothing could be learnt is refused in one line; what may be learnt from is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import ba_lora
from models import VOCABULARY, tiny_llama

from balora_plugin import BaLoraConfig, RegularizerConfig, get_ba_lora_model
from balora_plugin.objective.batches import main_input
from balora_plugin.objective.causal_lm import causal_lm_step
from balora_plugin.objective.classification import check_fit, problem_of
from balora_plugin.objective.request import StepRequest
from balora_plugin.schedules import Lambdas
from balora_plugin.training.checks.data import check_classes, check_counted, check_rows

pytestmark = pytest.mark.hosts

CLASSIFIER = SimpleNamespace(num_labels=3, problem_type=None)
NOTHING, SOME = {"labels": [-100, -100, -100]}, {"labels": [-100, 4, -100]}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no rows"),
        ([NOTHING, NOTHING], "all are -100 in all 2 rows"),
        ([{"labels": [5, -100, -100]}], "all are -100"),  # nothing predicts the first token
        ([NOTHING, {"labels": "positive"}], "row 1 .*'positive'"),
        ([{"labels": ["a", "b"]}], "row 0 .*text"),
    ],
)
def test_of_a_language_model(rows, words):
    with pytest.raises(ValueError, match=words):
        check_counted(rows)


@pytest.mark.parametrize(
    "rows",
    [
        [NOTHING, SOME],
        [{"labels": torch.tensor([-100, 4])}],
        [{"input_ids": [1, 2]}],
        [{"labels": [-100, 4], "label": "a column that nobody reads"}],
        (row for row in [NOTHING]),
        None,
    ],
)
def test_what_trains_is_not_refused(rows):
    check_counted(rows)


@pytest.mark.parametrize("name", ["label", "labels"])
def test_of_a_classifier(name):
    for rows, words in (([], "no rows"), ([{name: "positive"}], "'positive'.*num_labels - 1")):
        with pytest.raises(ValueError, match=words):
            check_classes(rows, CLASSIFIER)
    for value in (0, 1.5, [0.0, 1.0], torch.tensor(2)):
        check_classes([{name: value}], CLASSIFIER)
    check_rows(iter([]))


@pytest.mark.parametrize("name", ["label", "labels"])
def test_classes_that_the_model_has_not_are_found_before_the_first_step(name):
    for values, words in (
        ([1, 2, 3], f"{name}: 3 .*num_labels=3"),
        ([0, -1], f"{name}: -1"),
        ([-100] * 2, "no sample"),
    ):
        with pytest.raises(ValueError, match=words):
            check_classes(Dataset.from_dict({name: values}), CLASSIFIER)
    check_classes(Dataset.from_dict({name: [0, 2, -100]}), CLASSIFIER)
    for changes in ({"num_labels": 1}, {"problem_type": "regression"}, {"problem_type": "multi_label_classification"}):
        check_classes(Dataset.from_dict({name: [7, 9]}), SimpleNamespace(**{**vars(CLASSIFIER), **changes}))


# --- what reaches the loss


TOKENS = torch.arange(3, 11).reshape(2, 4)


def step(labels):
    """A micro-batch of a BA-LoRA model."""
    model = ba_lora(tiny_llama()).get_base_model()
    request = StepRequest(config=RegularizerConfig().resolved("nlg"), lambdas=Lambdas(0.0, 0.1, 0.0))
    return causal_lm_step(model, request, {"input_ids": TOKENS, "labels": labels})


WRONG_LABELS = {
    "too few": (TOKENS[:, :2], r"\(2, 2\) in a batch of \(2, 4\)"),
    "of choices": (TOKENS.unsqueeze(1).expand(2, 2, 4), r"\(2, 2, 4\) in a batch"),
    "of a classifier": (torch.tensor([0, 1]), r"\(2,\) in a batch"),
    "float": (TOKENS.float(), "labels are float32"),
    "flags": (TOKENS > 4, "labels are bool"),
    "of another vocabulary": (TOKENS + VOCABULARY, f"{VOCABULARY + 3} is no token .* has {VOCABULARY}"),
    "another mark of what does not count": (TOKENS.masked_fill(TOKENS < 5, -1), "labels: -1 .*-100"),
}


@pytest.mark.parametrize("case", WRONG_LABELS)
def test_labels_that_are_no_tokens_are_one_line_and_never_trained_on(case):
    labels, words = WRONG_LABELS[case]
    with pytest.raises(ValueError, match=words):
        step(labels)


def test_a_batch_without_tokens_says_so():
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        main_input({"labels": TOKENS, "input_ids": None})


def test_labels_that_are_tokens_pass():
    assert step(TOKENS.to(torch.int32).long().masked_fill(TOKENS < 5, -100)).loss.isfinite()


@pytest.mark.parametrize(
    ("labels", "problem", "words"),
    [
        (torch.tensor([0, 3]), "single_label_classification", "3 is no class .*num_labels=3"),
        (torch.tensor([0, -1]), "single_label_classification", "-1 is no class"),
        (torch.rand(2, 2), "multi_label_classification", r"\(2, 2\), and the model has num_labels=3"),
    ],
)
def test_labels_that_do_not_fit_a_classifier(labels, problem, words):
    with pytest.raises(ValueError, match=words):
        check_fit(labels, problem, 3)


def test_one_score_a_sample_is_no_class():
    with pytest.raises(ValueError, match="num_labels=1"):
        problem_of(SimpleNamespace(config=SimpleNamespace(problem_type=None, num_labels=3)), torch.tensor([1.0, 2.0]))


def test_several_whole_labels_a_sample_need_a_problem_type():
    def model(problem_type, num_labels=3):
        return SimpleNamespace(config=SimpleNamespace(problem_type=problem_type, num_labels=num_labels))

    several = torch.tensor([[1, 0, 1], [0, 0, 1]])
    with pytest.raises(ValueError, match=r"labels \(2, 3\).*problem_type='multi_label_classification'"):
        problem_of(model(None), several)
    assert problem_of(model("multi_label_classification"), several) == "multi_label_classification"
    assert problem_of(model(None), several.float()) == "multi_label_classification"
    assert problem_of(model(None), torch.tensor([1, 2])) == "single_label_classification"
    assert problem_of(model(None), torch.tensor([[1], [2]])) == "single_label_classification"
    assert problem_of(model(None, num_labels=1), torch.tensor([[1], [2]])) == "regression"


def test_a_model_that_is_compiled_already_is_refused_by_name():
    model = torch.compile(tiny_llama())
    with pytest.raises(ValueError, match=r"compiled already.*before torch.compile.*compile=True"):
        get_ba_lora_model(model, BaLoraConfig(r=2, target_modules="all-linear"))
