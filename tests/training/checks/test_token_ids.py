"""Token ids that no row of the embedding answers to: one line before the first step, or where a later one fails."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers import TERMS
from models import VOCABULARY, tiny_llama
from transformers import TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraTrainer
from balora_plugin.training.checks.token_ids import check_ids, check_row

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([[1, 2], [3, -1]], "-1 in row 1 of a batch is no token of LlamaForCausalLM"),
        ([[1, VOCABULARY]], f"{VOCABULARY} in row 0 .* which has {VOCABULARY}: tokenise with"),
        ([[True, False]], "a batch of torch.bool: write each row"),
        ([[1.5]], "a batch of torch.float32: write"),
        ([[]], "a batch of torch.float32, as rows without a single token give: write"),
    ],
)
def test_of_a_batch(ids, said):
    with pytest.raises(ValueError, match=rf"^input_ids: {said}"):
        check_ids(torch.tensor(ids), tiny_llama())


@pytest.mark.parametrize(
    ("ids", "said"),
    [([], "row 3 of the training data is empty"), ([True, False], r"row 3 .* holds \[True, False\]"), (["a"], "holds")],
)
def test_of_a_row(ids, said):
    with pytest.raises(ValueError, match=f"^input_ids: .*{said}"):
        check_row({"input_ids": ids}, 3)
    check_row({"input_ids": [1, 2]}, 0)
    check_row({"input_ids": torch.tensor([1])}, 0)
    check_row({"input_ids": [[1, 2]]}, 0)
    check_row({"text": "a"}, 0)


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
@pytest.mark.parametrize("row", [0, 5])  # of the first batch, and of a later one
def test_a_run_says_which_id_and_not_what_a_kernel_makes_of_it(wrong, row, tmp_path):
    rows = torch.randint(3, 90, (6, 8)).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    ids = [list(each) for each in rows]
    ids[row][2] = wrong
    data = Dataset.from_dict({"input_ids": ids, "labels": rows})
    config = BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], regularizers=TERMS)
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = BaLoraTrainer(model=tiny_llama(), args=args, train_dataset=data, peft_config=config)
    with pytest.raises(ValueError, match=rf"input_ids: {wrong} in row {row % 2} of a batch is no token"):
        trainer.train()
