"""ms-swift's own example scripts through the checks; SWIFT_EXAMPLES names the folder `examples` of its repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from integration.swift_scripts import is_lora, survey, trainings_in, values_of

SCRIPT = """\
# 22GB
CUDA_VISIBLE_DEVICES=0 \\
swift sft \\
    --model 'a model' \\
    --tuner_type {tuner} \\
    --dataset 'a#5' \\
              'b#5' \\
    --packing true \\
    --lora_rank 8 \\
    --learning_rate 1e-4 {more}
swift infer --adapters x
"""


def test_a_script_is_read_as_the_shell_and_ms_swift_read_it(tmp_path):
    path = tmp_path / "x.sh"
    path.write_text(SCRIPT.format(tuner="lora", more="--use_dora"))
    assert list(trainings_in(path)) == [
        {
            "model": "a model",
            "tuner_type": "lora",
            "dataset": ["a#5", "b#5"],
            "packing": True,
            "lora_rank": 8,
            "learning_rate": 1e-4,
            "use_dora": True,
        }
    ]
    assert values_of(["--a=1", "--b", "false"]) == {"a": 1, "b": False}


def test_what_is_refused_of_a_folder_is_said_by_script(tmp_path):
    (tmp_path / "good.sh").write_text(SCRIPT.format(tuner="lora", more=""))
    (tmp_path / "bad.sh").write_text(SCRIPT.format(tuner="lora", more="--use_dora true"))
    (tmp_path / "full.sh").write_text(SCRIPT.format(tuner="full", more=""))
    (tmp_path / "x.yaml").write_text("model: m\ndataset: [d]\nlorap_lr_ratio: 16\n")
    found = {name: [finding.key for finding in findings] for name, findings in survey(tmp_path).items()}
    assert found == {"good.sh": [], "bad.sh": ["use_dora"], "x.yaml": ["lorap_lr_ratio"]}
    assert not is_lora({"tuner_type": "full"}) and not is_lora({"rlhf_type": "dpo"})


@pytest.mark.skipif("SWIFT_EXAMPLES" not in os.environ, reason="SWIFT_EXAMPLES names ms-swift's folder `examples`")
def test_most_of_the_hosts_own_scripts_are_accepted():
    found = survey(Path(os.environ["SWIFT_EXAMPLES"]))
    accepted = [name for name, findings in found.items() if not findings]
    assert len(found) >= 80 and len(accepted) >= 38
    assert all(finding.remedy for findings in found.values() for finding in findings)
