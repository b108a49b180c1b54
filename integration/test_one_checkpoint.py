"""A checkpoint is one thing: nothing of it missing, damaged or another's. Finished runs; two runs in one place."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import TERMS
from models import character_tokenizer, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForLanguageModeling, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraTrainer
from balora_plugin.checkpoint import integrity

TEXTS = [f"The number {i} comes before {i + 1}" + " and so on" * (i % 3) for i in range(8)]
SHAPE = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
KINDS = ("ba_lora", "plain_lora", "full")
LAST = 6  # in the middle of the second epoch, of four steps
MANIFEST = "ba_lora_checkpoint.json"


def rows():
    return Dataset.from_list([character_tokenizer()(text) for text in TEXTS])


def build(kind, out, **changes):
    extra = {
        "ba_lora": {"peft_config": BaLoraConfig(**SHAPE, regularizers=TERMS)},
        "plain_lora": {"peft_config": LoraConfig(**SHAPE), "regularizers": TERMS},
        "full": {"regularizers": TERMS, "teacher_model": tiny_llama()},
    }[kind]
    extra |= {key: changes.pop(key) for key in ("peft_config", "eval_dataset") if key in changes}
    model = changes.pop("model", None)
    values = {
        "output_dir": str(out),
        "max_steps": LAST,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_tqdm": True,
    }
    tokenizer = character_tokenizer()
    return BaLoraTrainer(
        model=tiny_llama() if model is None else model,
        args=TrainingArguments(**{**values, **changes}),
        train_dataset=rows(),
        data_collator=DataCollatorForLanguageModeling(copy.deepcopy(tokenizer), mlm=False),
        **extra,
    )


def adapters(kind):
    return ["default"] if kind == "ba_lora" else []


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of each kind, of different seeds."""
    directory = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        build(kind, directory / kind).train()
        build(kind, directory / f"{kind}-other", seed=7, data_seed=7, learning_rate=3e-3).train()
    return directory


def zeroed(path):
    content = bytearray(path.read_bytes())
    middle = max(len(content) // 2 - 200, 0)
    first = next(i for i in range(middle, len(content) - 64) if any(content[i : i + 64]))
    content[first : first + 64] = bytes(64)
    path.write_bytes(content)


def take(source, name):
    def exchange(here):
        theirs = {"step": here.parent / "checkpoint-4", "run": here.parent.parent / source / here.name}
        shutil.copy(theirs["step" if source == "step" else "run"] / name, here / name)

    return exchange


FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
DAMAGES = {
    **{f"no {name}": (lambda d, name=name: (d / name).unlink(), name) for name in FILES},
    **{f"zeroed {name}": (lambda d, name=name: zeroed(d / name), name) for name in FILES},
    **{f"{name} of another step": (take("step", name), name) for name in FILES},
    "optimizer.pt of another run": (take("other", "optimizer.pt"), "optimizer.pt"),
    "half a manifest": (lambda d: (d / MANIFEST).write_text((d / MANIFEST).read_text()[:80]), MANIFEST),
    "an open manifest": (lambda d: integrity.open_manifest(str(d)), MANIFEST),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_one_thing_is_refused_in_one_line(damage, kind, runs, tmp_path):
    """Also a random state or a schedule that torch could not read, which raised a UnicodeEncodeError."""
    shutil.copytree(runs / kind, tmp_path / "out")
    shutil.copytree(runs / f"{kind}-other", tmp_path / "other")
    last, before = (tmp_path / "out" / f"checkpoint-{step}" for step in (LAST, LAST - 1))
    do, name = DAMAGES[damage]
    do(last)
    with pytest.raises(ValueError, match="cannot resume from") as caught:
        build(kind, tmp_path / "out").train(resume_from_checkpoint=True)
    said = str(caught.value)
    assert name in said and str(before) in said and "\n" not in said


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_step_are_refused(kind, runs, tmp_path):
    shutil.copytree(runs / kind, tmp_path / "out")
    last = tmp_path / "out" / f"checkpoint-{LAST}"
    for path in (tmp_path / "out" / "checkpoint-4").iterdir():
        if path.suffix == ".safetensors" or path.name == "ba_lora.json":
            shutil.copy(path, last / path.name)
    with pytest.raises(ValueError, match=rf"is not the file that was saved.*checkpoint-{LAST - 1}"):
        build(kind, tmp_path / "out").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_earlier_checkpoint_resumes_with_a_line_that_says_what_was_not_checked(kind, runs, tmp_path, caplog):
    shutil.copytree(runs / kind, tmp_path / "out")
    middle = tmp_path / "out" / "checkpoint-3"
    for path in (tmp_path / "out").glob(f"checkpoint-*/{MANIFEST}"):
        path.unlink()
    resumed = build(kind, tmp_path / "out")
    resumed.train(resume_from_checkpoint=str(middle))
    assert resumed.state.global_step == LAST
    assert sum(f"{middle} has no {MANIFEST}" in line for line in caplog.messages) == 1
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):  # their own checksums are there
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(runs / kind, tmp_path / "out")
        (middle / MANIFEST).unlink()
        zeroed(middle / name)
        with pytest.raises(ValueError, match=f"{name} is (damaged|cut short)"):
            build(kind, tmp_path / "out").train(resume_from_checkpoint=str(middle))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run_and_its_checkpoints_are_whole(kind, runs, tmp_path):
    shutil.copytree(runs / kind, tmp_path / "out")
    resumed = build(kind, tmp_path / "out", save_total_limit=2)
    resumed.train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-3")  # a pathlib.Path
    for step in (LAST - 1, LAST):
        found, expected = (d / f"checkpoint-{step}" / MANIFEST for d in (tmp_path / "out", runs / kind))
        assert integrity.checkpoint_flaw(str(found.parent), adapters(kind)) is None
        same = [name for name in json.loads(expected.read_text())["sha256"] if "optimizer" in name or "rng" in name]
        for name in same:
            hashes = [json.loads(path.read_text())["sha256"][name] for path in (found, expected)]
            assert hashes[0] == hashes[1], name
    assert not (tmp_path / "out" / "checkpoint-4").exists()


def test_a_save_only_model_checkpoint_says_so(tmp_path):
    build("plain_lora", tmp_path, save_only_model=True, max_steps=2).train()
    content = json.loads((tmp_path / "checkpoint-2" / MANIFEST).read_text())
    assert content["save_only_model"] is True and "trainer_state.json" in content["sha256"]
    with pytest.raises(ValueError, match="save_only_model=True"):
        build("plain_lora", tmp_path).train(resume_from_checkpoint=True)


def test_a_whole_checkpoint_is_there_while_older_ones_are_deleted(tmp_path, monkeypatch):
    from transformers import trainer as host

    seen, rotate = [], host.rotate_checkpoints

    def looking(*args, **kwargs):
        seen.append(integrity.last_whole(str(tmp_path)))
        return rotate(*args, **kwargs)

    monkeypatch.setattr(host, "rotate_checkpoints", looking)
    build("ba_lora", tmp_path, save_total_limit=1, max_steps=3).train()
    assert seen == [str(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3)]


# --- another kind of adapter, or another's weights


def named(out, **changes):
    """A plain LoRA of a name of its own, which PEFT saves in a directory of that name."""
    model = get_peft_model(tiny_llama(), LoraConfig(**SHAPE), adapter_name="mine")
    return build("plain_lora", out, model=model, peft_config=None, **changes)


def test_weights_of_an_adapter_of_another_name_belong_to_the_checkpoint_too(tmp_path):
    named(tmp_path, max_steps=3).train()
    first, last = (tmp_path / f"checkpoint-{step}" / "mine" / "adapter_model.safetensors" for step in (1, 3))
    resumed = named(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=str(last.parent.parent))
    assert resumed.state.global_step == 4
    shutil.copy(first, last)
    with pytest.raises(ValueError, match=r"mine/adapter_model\.safetensors is not the file"):
        named(tmp_path, max_steps=4).train(resume_from_checkpoint=str(last.parent.parent))


def test_ordinary_weights_are_checked_where_a_plain_lora_goes_on_from_them(tmp_path):
    """A BA-LoRA checkpoint of the ordinary start, whose own hashes a plain LoRA does not read."""
    ordinary = BaLoraConfig(**SHAPE, init_lora_weights=True, regularizers=TERMS)
    build("ba_lora", tmp_path, peft_config=ordinary, max_steps=3).train()
    shutil.copy(tmp_path / "checkpoint-1" / "adapter_model.safetensors", tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not the file"):
        build("plain_lora", tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": 64}, "lora_alpha=64 here.*write 4"),
        ({"target_modules": ["q_proj"]}, "does not target"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] here"),
    ],
)
def test_a_plain_lora_of_another_kind_is_refused(changes, words, runs):
    other = LoraConfig(**{**SHAPE, **changes})
    with pytest.raises(ValueError, match=words):
        build("plain_lora", runs / "plain_lora", peft_config=other).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("saved", "here", "words"),
    [
        ("plain_lora", "full", "is a checkpoint of an adapter, but"),
        ("full", "plain_lora", "is a checkpoint of full fine-tuning, but"),
    ],
)
def test_a_checkpoint_of_another_kind_of_training_is_one_line(saved, here, words, runs, tmp_path):
    with pytest.raises(ValueError, match=words):
        build(here, tmp_path).train(resume_from_checkpoint=str(runs / saved / f"checkpoint-{LAST}"))


@pytest.mark.parametrize("gone", [False, True])
def test_the_best_checkpoint_of_a_run_that_was_moved_is_its_own(gone, tmp_path, caplog):
    """The host keeps its absolute path, where another run may be by now."""
    worst = {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the first step's
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "eval_dataset": rows(), **worst}
    first = build("ba_lora", tmp_path / "out", **best)
    first.train()
    assert Path(first.state.best_model_checkpoint).name == "checkpoint-1"
    moved = tmp_path / "moved"
    (tmp_path / "out").rename(moved)
    other = build("ba_lora", tmp_path / "out", seed=7, data_seed=7, learning_rate=3e-2, **best)
    other.train()
    if gone:
        shutil.rmtree(moved / "checkpoint-1")
    resumed = build("ba_lora", moved, max_steps=LAST + gone, **best)  # with no save the host does not look again
    resumed.train(resume_from_checkpoint=str(moved / f"checkpoint-{LAST}"))
    assert Path(resumed.state.best_model_checkpoint) == moved / f"checkpoint-{LAST + 1 if gone else 1}"
    assert sum("does not stand beside" in line for line in caplog.messages) == gone
    if not gone:
        assert all(torch.equal(value, trained(first)[name]) for name, value in trained(resumed).items())


def test_an_order_that_is_not_the_uninterrupted_runs_is_said(tmp_path, caplog):
    by_length = {"train_sampling_strategy": "group_by_length"}
    build("ba_lora", tmp_path, **by_length).train()
    for step, said in ((3, 0), (5, 1)):  # four steps a pass
        caplog.clear()
        build("ba_lora", tmp_path, **by_length).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert sum("draws the order of each pass" in line for line in caplog.messages) == said


# --- a finished run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"max_steps": 4}, {"save_strategy": "epoch", "eval_strategy": "no"}])
def test_a_finished_run_that_is_resumed_does_nothing_and_says_so(kind, changes, runs, tmp_path, caplog):
    out = tmp_path / "out"
    shutil.copytree(runs / kind, out)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    weights = None
    for _ in range(2):
        caplog.clear()
        resumed = build(kind, out, **changes)
        result = resumed.train(resume_from_checkpoint=True)
        assert result.global_step == resumed.state.global_step == LAST
        assert [row["step"] for row in resumed.state.log_history if "learning_rate" in row] == [*range(1, LAST + 1)]
        assert sum("this run has ended" in line for line in caplog.messages) == 1
        assert weights is None or all(torch.equal(value, weights[name]) for name, value in trained(resumed).items())
        weights = trained(resumed)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    other = build(kind, out)
    assert any(not torch.equal(value, weights[name]) for name, value in trained(other).items())  # it was loaded


def test_a_finished_run_that_gets_more_steps_goes_on(runs, tmp_path):
    shutil.copytree(runs / "ba_lora", tmp_path / "out")
    resumed = build("ba_lora", tmp_path / "out", max_steps=LAST + 1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == LAST + 1


# --- two runs in one place

HOLDER = """
import sys, time
from transformers import TrainerCallback
from integration.test_one_checkpoint import build

class Hang(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            print("hangs", flush=True)
            time.sleep(300)

trainer = build("ba_lora", sys.argv[1])
trainer.add_callback(Hang())
trainer.train()
"""


@pytest.mark.slow
def test_a_second_run_in_one_directory_is_refused_until_the_first_is_killed(tmp_path):
    root = Path(__file__).parents[1]
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])},
    )
    try:
        assert first.stdout is not None
        assert any("hangs" in line for line in first.stdout)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for kind in KINDS:
            with pytest.raises(ValueError, match=rf"output_dir='{tmp_path}' belongs to a run.*process {first.pid}"):
                build(kind, tmp_path).train()
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    resumed = build("ba_lora", tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == LAST
    again = build("ba_lora", tmp_path)
    again.train()
    again.train()  # the same process, the same directory
