"""An architecture whose tensors PEFT renames while it loads: nothing is lost, and the adapter is not accused of it."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny
from exporting import loaded, run, trained
from helpers import ba_lora, logits
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

pytestmark = pytest.mark.hosts

LAGUNA = {"num_experts": 4, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]}


@pytest.fixture
def expected(ids, tmp_path):
    """The logits of an adapter on Laguna, of whose shared experts PEFT 0.20 looks for other names."""
    if "laguna" not in CONFIG_MAPPING_NAMES:
        pytest.skip("this release of transformers has no Laguna")
    tiny("laguna", **LAGUNA).save_pretrained(tmp_path / "base")
    return trained(ba_lora(loaded(tmp_path / "base")), ids, tmp_path / "adapter")


def test_the_merged_model_is_exact(expected, ids, tmp_path, capsys):
    arguments = ["--merge", "--base", tmp_path / "base", "--output", tmp_path / "out"]
    code, _, err = run(capsys, "export", tmp_path / "adapter", *arguments)
    assert code == 0, err
    torch.testing.assert_close(logits(loaded(tmp_path / "out"), ids), expected, rtol=0, atol=1e-5)


def test_verify_says_that_it_is_pefts_loading(expected, tmp_path, capsys):
    code, out, err = run(capsys, "verify", tmp_path / "adapter", "--base", tmp_path / "base")
    if code == 0:  # a release that looks for today's names
        return
    assert code == 1, err
    wrong = [line for line in out.splitlines() if line.startswith("MISMATCH")]
    assert len(wrong) == 2 and all("stock PEFT" in line for line in wrong)
    assert "leaves out 6 tensors that the file holds" in wrong[0]
    assert "They belong together" in out and "do not belong together" not in out and "--merge" in out
