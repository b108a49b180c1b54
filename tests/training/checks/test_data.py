"""Training data from which nothing could be learnt is refused in one line; what may be learnt from is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models import tiny_llama

from balora_plugin import BaLoraConfig, get_ba_lora_model
from balora_plugin.objective.classification import problem_of
from balora_plugin.training.checks.data import check_classes, check_counted, check_rows

pytestmark = pytest.mark.hosts

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
            check_classes(rows)
    for value in (0, 1.5, [0.0, 1.0], torch.tensor(2)):
        check_classes([{name: value}])
    check_rows(iter([]))


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
