"""LLaMA-Factory itself, by `balora llamafactory train`, on a tiny model: `make test-llamafactory`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import fresh, logits
from models import character_tokenizer, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

pytest.importorskip("llamafactory")

from llamafactory import launcher
from llamafactory.model import adapter as host_adapter
from llamafactory.train import tuner
from llamafactory.train.sft import workflow as host_workflow

from balora_plugin import BaLoraModel
from balora_plugin.commands import main
from balora_plugin.hosts.llamafactory.checks import findings_of_yaml, planned
from balora_plugin.hosts.llamafactory.hooks import check_release, globals_replaced
from balora_plugin.hosts.llamafactory.train import NotTrainable, start_training

pytestmark = pytest.mark.hosts

EXAMPLES = "LLAMAFACTORY_EXAMPLES"  # LLaMA-Factory's examples/, which its source distribution has
TWO_LINES = {"ba_lora": {"lambda_consistency": 0.3}}
IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model, rows, and LLaMA-Factory's list of data sets."""
    folder = tmp_path_factory.mktemp("llamafactory")
    tiny_llama().save_pretrained(folder / "base")
    character_tokenizer().save_pretrained(folder / "base")
    rows = [{"instruction": f"add {i} and {i}", "input": "", "output": f"{2 * i}, of course"} for i in range(24)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    return folder


@pytest.fixture(autouse=True)
def no_launcher_of_anothers(monkeypatch):
    for name in ("FORCE_TORCHRUN", "LOCAL_RANK", "USE_V1", "USE_RAY", "USE_MCA", "USE_KT"):
        monkeypatch.delenv(name, raising=False)


def stock(place, out, **changes):
    """A LoRA YAML as its user has it."""
    return {
        "model_name_or_path": str(place / "base"),
        "template": "default",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_alpha": 4,
        "lora_target": "all",
        "dataset": "rows",
        "dataset_dir": str(place),
        "cutoff_len": 128,
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "seed": 1,
        **changes,
    }


def written(path, values):
    path.write_text(yaml.safe_dump(values))
    return str(path)


def train(place, out, words=(), **changes):
    """Trains with the two lines in this process; returns what was logged at each step."""
    values = {**stock(place, out), **TWO_LINES, **changes}
    assert start_training([written(out.with_suffix(".yaml"), values), *words]) == 0
    return history(out)


def history(out):
    state = json.loads((out / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


def factors(directory):
    return load_file(directory / "adapter_model.safetensors")


def base(place):
    return fresh(tiny_llama()) if place is None else type(tiny_llama()).from_pretrained(place / "base")


@pytest.fixture(scope="module")
def trained(place):
    """One run that the tests of its files share."""
    out = place / "trained"
    train(place, out, max_steps=4)
    return out


def test_a_users_yaml_trains_with_two_more_lines(place, trained, tmp_path):
    """Teacher and student agree at step 1; the task's loss is stock LLaMA-Factory's; the base stays as it was."""
    before = load_file(place / "base" / "model.safetensors")
    rows = history(trained)
    assert rows[0]["balora/consistency"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["balora/consistency"] > 0
    tuner.run_exp(stock(place, tmp_path / "stock", max_steps=1, save_strategy="no"))
    assert history(tmp_path / "stock")[0]["loss"] == pytest.approx(rows[0]["balora/task"], rel=1e-4)
    assert all(torch.equal(before[key], value) for key, value in base(place).state_dict().items() if key in before)


def test_what_is_saved_is_a_plain_lora_that_llamafactory_merges(place, trained, tmp_path):
    ours = logits(BaLoraModel.from_pretrained(base(place), trained).eval(), IDS)
    plain = logits(PeftModel.from_pretrained(base(place), trained).eval(), IDS)
    assert (ours - logits(base(place).eval(), IDS)).abs().max() > 0.01
    torch.testing.assert_close(plain, ours, rtol=0, atol=1e-5)
    tuner.export_model(
        {
            "model_name_or_path": str(place / "base"),
            "adapter_name_or_path": str(trained),
            "template": "default",
            "finetuning_type": "lora",
            "export_dir": str(tmp_path / "merged"),
            "infer_dtype": "float32",
        }
    )
    merged = type(tiny_llama()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged.eval(), IDS), ours, rtol=0, atol=2e-5)
    assert json.loads((trained / "checkpoint-2" / "adapter_config.json").read_text())["r"] == 8


def test_a_resumed_run_ends_where_the_whole_one_did(place, trained, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(trained / "checkpoint-2", out / "checkpoint-2")
    train(place, out, max_steps=4)  # LLaMA-Factory finds the checkpoint by itself
    whole, resumed = factors(trained), factors(out)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_an_adapter_goes_on_training(place, trained, tmp_path):
    train(place, tmp_path / "more", adapter_name_or_path=str(trained), max_steps=1)
    a, b = factors(trained), factors(tmp_path / "more")
    assert a.keys() == b.keys() and not torch.equal(*(next(iter(each.values())) for each in (a, b)))
    settings = json.loads((tmp_path / "more" / "ba_lora.json").read_text())
    assert settings["regularizers"]["lambda_consistency"] == 0.3
    tuner.run_exp(stock(place, tmp_path / "lora", max_steps=1))
    with pytest.raises(ValueError, match=r"^adapter_name_or_path: .* create_new_adapter: true"):
        train(place, tmp_path / "no", adapter_name_or_path=str(tmp_path / "lora"))


def test_an_adapter_that_goes_on_is_compiled_where_the_block_says_so(place, trained):
    for written in (True, "layers", False):
        block = {"lambda_svd": 0.2, "compile": written}
        plan = planned({**stock(place, trained), "adapter_name_or_path": str(trained), "ba_lora": block})
        with globals_replaced(plan):
            model = host_adapter.PeftModel.from_pretrained(base(place), str(trained), is_trainable=True)
        config = model.peft_config["default"]
        assert (config.compile, config.regularizers.lambda_svd) == (written, 0.2)


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True},
        {"packing": True, "neat_packing": True},
        {"pissa_init": True, "pissa_iter": 16, "pissa_convert": True, "lora_dropout": 0.1},
        {"pissa_init": False, "loraplus_lr_ratio": 16.0, "use_rslora": True},
        {"gradient_accumulation_steps": 2, "additional_target": "embed_tokens", "disable_gradient_checkpointing": True},
        {"use_reentrant_gc": False, "upcast_layernorm": True, "ba_lora": {"lambda_svd": 0.1, "lambda_diversity": 0.1}},
    ],
    ids=lambda changes: "-".join(changes)[:40],
)
def test_settings_that_are_passed_train(changes, place, tmp_path):
    rows = train(place, tmp_path / "out", max_steps=2, save_strategy="no", **changes)
    assert rows[0]["balora/consistency"] == pytest.approx(0.0, abs=1e-6)
    assert rows[1]["balora/task"] != rows[0]["balora/task"]
    again = BaLoraModel.from_pretrained(base(place), tmp_path / "out")
    assert torch.isfinite(logits(again.eval(), IDS)).all()


def test_layers_are_compiled_beside_its_checkpointing(place, tmp_path, capfd):
    rows = train(place, tmp_path / "out", max_steps=2, save_strategy="no", ba_lora={"compile": "layers"})
    said = capfd.readouterr()
    assert "(compiled by layer)" in said.out + said.err and "does not work" not in said.err
    assert rows[0]["balora/consistency"] == pytest.approx(0.0, abs=1e-6)


def test_neftunes_noise_is_the_students_alone(place, tmp_path):
    rows = train(place, tmp_path / "out", neftune_noise_alpha=5.0, max_steps=1)
    assert rows[0]["balora/consistency"] > 1e-4


def test_it_evaluates(place, tmp_path):
    out = tmp_path / "out"
    train(place, out, max_steps=2, val_size=0.25, eval_strategy="steps", eval_steps=1, compute_accuracy=True)
    state = json.loads((out / "trainer_state.json").read_text())["log_history"]
    rows = [row for row in state if "eval_loss" in row]
    assert len(rows) == 2 and all(0 <= row["eval_accuracy"] <= 1 for row in rows)
    assert rows[1]["eval_balora/task"] == pytest.approx(rows[1]["eval_loss"], rel=0.02)
    assert rows[1]["eval_balora/consistency"] > 0


def test_a_4_bit_base(place, tmp_path):
    pytest.importorskip("bitsandbytes")
    rows = train(place, tmp_path / "out", quantization_bit=4, pissa_init=True, pissa_iter=-1, max_steps=2)
    assert rows[0]["balora/consistency"] == pytest.approx(0.0, abs=1e-6)
    settings = json.loads((tmp_path / "out" / "ba_lora.json").read_text())
    assert settings["base_quantization"]


def test_two_processes_are_one(place, tmp_path):
    """By LLaMA-Factory's own launcher; two rows each, and four in one process, are the same global batch."""
    changes = {"max_steps": 2, "save_strategy": "no", "disable_shuffling": True, "learning_rate": 1e-3}
    train(place, tmp_path / "one", per_device_train_batch_size=4, **changes)
    values = {**stock(place, tmp_path / "two", **changes), **TWO_LINES}
    path = written(tmp_path / "two.yaml", {**values, "ddp_backend": "gloo"})
    env = {**os.environ, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    code = "import sys; from balora_plugin.commands import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "llamafactory", "train", path],
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert b["balora/task"] == pytest.approx(a["balora/task"], rel=1e-4)
    ours, theirs = (BaLoraModel.from_pretrained(base(place), tmp_path / name).eval() for name in ("one", "two"))
    torch.testing.assert_close(logits(theirs, IDS), logits(ours, IDS), rtol=0, atol=1e-3)


def test_refusals_come_before_anything_is_loaded(place, tmp_path, capsys):
    values = stock(place, tmp_path / "out", use_dora=True, stage="dpo", model_name_or_path="/not/there", **TWO_LINES)
    path = written(tmp_path / "x.yaml", values)
    with pytest.raises(NotTrainable):
        start_training([path])
    assert main(["llamafactory", "train", path, "shift_attn=true"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: 3 settings cannot be trained as they stand:\n  - stage: dpo ")
    assert said.count("\n  - ") == 3 and not (tmp_path / "out").exists()
    quantised = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(NotTrainable, match=r"^model_name_or_path: .*stored in awq"):
        train(place, tmp_path / "out", model_name_or_path=str(tmp_path))


def test_what_is_replaced_is_where_this_release_has_it():
    check_release()
    with pytest.raises(ImportError, match=r'found 0\.9\.4.*pip install "llamafactory==0\.9\.5"'):
        check_release("0.9.4")
    with pytest.warns(UserWarning, match=r"was tested with LLaMA-Factory 0\.9\.5, found 0\.10\.0"):
        check_release("0.10.0")
    assert host_adapter.PeftModel is PeftModel and host_adapter.get_peft_model is get_peft_model
    assert host_workflow.CustomSeq2SeqTrainer.__module__ == "llamafactory.train.sft.trainer"  # after other runs here
    assert Path(launcher.__file__).name == "launcher.py" and tuner.run_exp.__module__ == tuner.__name__


def test_the_hosts_own_examples():
    """Its LoRA SFT YAMLs with our two lines: those that are refused ask for another engine or another base."""
    folder = os.environ.get(EXAMPLES)
    if not folder:
        pytest.skip(f"{EXAMPLES} names no folder")
    taken, refused = [], {}
    for path in sorted(Path(folder).rglob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "v1" in path.parts or not isinstance(values, dict) or not values.get("do_train"):
            continue
        if (values.get("stage"), values.get("finetuning_type")) != ("sft", "lora"):
            continue
        found = {finding.key for finding in findings_of_yaml({**values, **TWO_LINES}, {})}
        if found:
            refused[path.relative_to(folder).as_posix()] = found
        else:
            taken.append(path.relative_to(folder).as_posix())
    print(f"{len(taken)} taken: {taken}\n{len(refused)} refused: {refused}")
    assert len(taken) >= 9
    assert set().union(*refused.values()) <= {"use_kt", "use_v1_kernels"}
