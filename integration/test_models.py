"""The architectures of docs/architectures.md: a sample of them here, all by `make test-models`."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from models import character_tokenizer
from peft import PeftModel

from .models.families import CAUSAL_LM, CLASSIFIER, CLASSIFIERS, LANGUAGE_MODELS, PAPER, tiny
from .models.journey import travel
from .models.table import PAGE, cell

# a logit scale, softcaps with tied embeddings, latent attention with shared experts, linear attention, biases
SAMPLE = [
    (CAUSAL_LM, "cohere2"),
    (CAUSAL_LM, "gemma2"),
    (CAUSAL_LM, "deepseek_v3"),
    (CAUSAL_LM, "qwen3_5_text"),
    (CAUSAL_LM, "gpt_neox"),
    (CLASSIFIER, "deberta-v2"),
]
# of Axolotl's lora_target_linear these have nothing (Conv1D), or names of modules that are not linear, as in stock
TARGETS = {
    "gpt2": ["c_attn", "c_fc"],
    "gemma3n_text": ["q_proj", "o_proj", "down_proj"],
    "zamba2": ["q_proj", "o_proj", "down_proj"],
}
ALL = [(CAUSAL_LM, name) for name in LANGUAGE_MODELS] + [(CLASSIFIER, name) for name in CLASSIFIERS]


def rows():
    """{family: (cell of the language model, cell of the classifier)} as the page has them."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    cells = [[part.strip() for part in line.strip("|").split(" | ")] for line in lines]
    return {line[0].strip("`"): (line[1], line[2]) for line in cells}


@pytest.mark.parametrize(("task", "family"), SAMPLE)
def test_a_sample(task, family, tmp_path):
    outcome = travel(family, task, tmp_path)
    assert cell(outcome) == rows()[family][task == CLASSIFIER]


def test_the_page_has_every_family():
    found = rows()
    assert set(found) == {*LANGUAGE_MODELS, *CLASSIFIERS}
    for task, family in ALL:
        assert found[family][task == CLASSIFIER], (family, task)


def test_the_papers_models_are_among_them():
    for family in PAPER.values():
        assert tiny(family, CAUSAL_LM if family in LANGUAGE_MODELS else CLASSIFIER).config.model_type == family


@pytest.mark.models
@pytest.mark.skipif(find_spec("axolotl") is None, reason="needs axolotl")
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_axolotl_trains(family, written, tmp_path):
    """Three steps of `axolotl train` with `lora_target_linear`, and its adapter in plain PEFT."""
    from .axolotl_run import history, run

    if rows()[family][0].startswith("refused"):
        pytest.skip("refused, as the page says")
    base = tmp_path / "base"
    tiny(family).save_pretrained(base)
    character_tokenizer().save_pretrained(base)
    named = {"lora_target_linear": None, "lora_target_modules": TARGETS[family]} if family in TARGETS else {}
    trainer = run(written(base_model=str(base), dataset_prepared_path=str(tmp_path / "prepared"), **named))
    assert history(trainer, "balora/consistency")[0] == 0
    assert len(history(trainer, "balora/task")) == 3
    ids = torch.randint(3, 90, (2, 12))
    plain = PeftModel.from_pretrained(tiny(family), trainer.args.output_dir).eval()
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, use_cache=False).logits for model in (trainer.model.eval(), plain))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
