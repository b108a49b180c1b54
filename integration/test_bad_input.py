"""Wrong, contradictory and unsupported settings and inputs in TRL and transformers: one clear error before any step.

Axolotl's own table, of YAMLs, is in test_axolotl.py.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from models import character_tokenizer, tiny_llama
from peft import LoraConfig, PromptTuningConfig
from transformers import DataCollatorForSeq2Seq, LlamaModel, TrainerCallback, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, BaLoraTrainer, RegularizerConfig, get_ba_lora_model
from balora_plugin.pretrained import attention

HOSTS = ("trl", "transformers")
TEXT = [f"The number {i} comes before {i + 1}" for i in range(4)]


class Started(TrainerCallback):
    """Remembers whether a step was begun."""

    def __init__(self):
        self.steps = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps += 1


def train(host, tmp_path, started, *, model=None, rows=None, **changes):
    """A run on a tiny model; `changes` go to the trainer where named here, else to its arguments."""
    keys = ("peft_config", "regularizers", "teacher_model", "compute_loss_func")
    extra = {key: changes.pop(key) for key in keys if key in changes}
    values = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "per_device_train_batch_size": 2, "report_to": []}
    values |= {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, **changes}
    tokenizer = character_tokenizer()
    if rows is None:
        ids = [tokenizer(text)["input_ids"] for text in TEXT]
        rows = [{"input_ids": row, "labels": list(row)} for row in ids]
    extra |= {"model": tiny_llama() if model is None else model, "train_dataset": Dataset.from_list(rows)}
    if host == "trl":
        from trl import SFTConfig

        values = {"bf16": False, "gradient_checkpointing": False, **values}
        prepared = {"skip_prepare_dataset": True} if "input_ids" in (rows or [{"input_ids": ()}])[0] else None
        args = SFTConfig(**values, dataset_kwargs=prepared)
        trainer = BaLoraSFTTrainer(args=args, processing_class=tokenizer, callbacks=[started], **extra)
    else:
        args = TrainingArguments(**values)
        trainer = BaLoraTrainer(
            args=args, data_collator=DataCollatorForSeq2Seq(copy.deepcopy(tokenizer)), callbacks=[started], **extra
        )
    trainer.train()


def adapter(terms=None, **changes):
    values = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
    return {"peft_config": BaLoraConfig(**{**values, **changes}, regularizers=RegularizerConfig(**(terms or {})))}


def lora(**changes):
    return {
        "peft_config": LoraConfig(**{"target_modules": ["q_proj"], **changes}),
        "regularizers": RegularizerConfig(lambda_consistency=0.5),
    }


def base(change):
    """A tiny model after `change`."""
    model = tiny_llama()
    change(model)
    return model


def spoil(value):
    def change(model):
        model.model.layers[1].mlp.up_proj.weight.data[3, 2] = value

    return change


def config(name, value):
    return lambda model: setattr(model.config, name, value)


def nothing_counted():
    return [{"input_ids": [5, 6, 7, 8], "labels": [-100] * 4} for _ in range(4)]


def text_labels():
    return [{"input_ids": [5, 6, 7, 8], "labels": "positive"} for _ in range(4)]


FLASH = "attn_implementation='flash_attention_2'"
NAN, INF = float("nan"), float("inf")
# name -> (settings, made when the test runs; what the error says: key, value, remedy)
WRONG = {
    "negative": (lambda: adapter({"lambda_svd": -1}), "lambda_svd=-1 |from 0 to 1e+06"),
    "nan": (lambda: adapter({"lambda_consistency": NAN}), "lambda_consistency=nan|finite number from 0 to 1e+06"),
    "inf": (lambda: adapter({"lambda_diversity": INF}), "lambda_diversity=inf|finite number from 0 to 1e+06"),
    "text": (lambda: adapter({"lambda_svd": "much"}), "lambda_svd='much'|must be a number"),
    "true": (lambda: adapter({"lambda_svd": True}), "lambda_svd=True|must be a number"),
    "preset": (lambda: adapter({"preset": "iclr"}), "preset='iclr'|'iclr2026'"),
    "task": (lambda: adapter({"task": "nlu"}), "task='nlu'|write task='nlg' (or 'auto')"),
    "task name": (lambda: adapter({"task": "lm"}), "task='lm'|'nlg'"),
    "form": (lambda: adapter({"consistency": "forward"}), "consistency='forward'|'reverse_kl'"),
    "temperature": (lambda: adapter({"temperature": 0}), "temperature=0|from 0.01 to 100"),
    "temperature large": (lambda: adapter({"temperature": 1e6}), "temperature=1000000.0|from 0.01 to 100"),
    "diversity_top_k": (lambda: adapter({"diversity_top_k": 1}), "diversity_top_k=1|>= 2"),
    "svd_top_k": (lambda: adapter({"svd_top_k": 0}), "svd_top_k=0|>= 1"),
    "svd_top_k float": (lambda: adapter({"svd_top_k": 2.5}), "svd_top_k=2.5|whole number"),
    "svd_norm": (lambda: adapter({"svd_norm": "l1"}), "svd_norm='l1'|'nuclear'"),
    "svd_input": (lambda: adapter({"svd_input": "hidden"}), "svd_input='hidden'|'features'"),
    "svd_layout": (
        lambda: adapter({"svd_layout": "flattened", "svd_input": "centered_logits"}),
        "svd_layout='flattened'|Use svd_layout='rows'",
    ),
    "svd_max_rows": (lambda: adapter({"svd_max_rows": -1}), "svd_max_rows=-1|>= 0"),
    "schedule": (lambda: adapter({"schedule": "linear"}), "schedule='linear'|'constant'"),
    "teacher_interval": (lambda: adapter({"teacher_interval": 0}), "teacher_interval=0|>= 1"),
    "share_interval": (lambda: adapter({"share_interval": -1}), "share_interval=-1|>= 0"),
    "teacher_cache": (lambda: adapter({"teacher_cache": ""}), "teacher_cache=''|write a path"),
    "teacher_cache_top_k": (lambda: adapter({"teacher_cache_top_k": 8}), "teacher_cache_top_k=8|write teacher_cache="),
    "unknown key": (lambda: {"regularizers": {"lambda_cr": 0.1}}, "lambda_cr|lambda_consistency"),
    "no terms": (lambda: {**adapter(), "regularizers": 0.5}, "regularizers=0.5|RegularizerConfig"),
    "rank zero": (lambda: adapter(r=0), "r=0|from 1 to 2147483647"),
    "rank text": (lambda: adapter(r="16"), "r='16'|whole number"),
    "start": (lambda: adapter(init_lora_weights="olora"), "init_lora_weights='olora'|write 'pissa'"),
    "start niter": (
        lambda: adapter(init_lora_weights="pissa_niter_x"),
        "init_lora_weights='pissa_niter_x'|write 'pissa'",
    ),
    "dora": (lambda: adapter(use_dora=True), "use_dora=True|remove it"),
    "bias": (lambda: adapter(bias="all"), "bias='all'|write bias='none'"),
    "lora_bias": (lambda: adapter(lora_bias=True), "lora_bias=True|init_lora_weights"),
    "targets": (lambda: adapter(target_modules=["query_proj"]), "target_modules: query_proj|did you mean q_proj"),
    "head": (lambda: adapter(target_modules=["q_proj", "lm_head"]), "target_modules|'lm_head'|Remove it"),
    "embedding": (lambda: adapter(target_modules=["embed_tokens"]), "target_modules|'model.embed_tokens'|Remove it"),
    "start_from": (lambda: adapter(start_from="./none"), "start_from='./none'|Leave start_from out"),
    "nan in base": (lambda: {**adapter(), "model": base(spoil(NAN))}, "model.layers.1.mlp.up_proj.weight|NaN|load"),
    "inf in base": (lambda: {**adapter(), "model": base(spoil(INF))}, "model.layers.1.mlp.up_proj.weight|inf|load"),
    "no head": (
        lambda: {**adapter(), "model": LlamaModel(tiny_llama().config)},
        "LlamaModel|not a causal language model",
    ),
    "logits": (lambda: {**adapter(), "model": base(config("logit_scale", 0.5))}, "LlamaForCausalLM|logits are not"),
    "nothing counted": (lambda: {**adapter(), "rows": nothing_counted()}, "labels|-100|train_on_inputs"),
    "no rows": (lambda: {**adapter(), "rows": []}, "train_dataset has no rows|filter"),
    "text labels": (lambda: {**adapter(), "rows": text_labels()}, "labels|'positive'|whole number"),
    "tokens trained": (
        lambda: lora(trainable_token_indices=[1]),
        "trainable_token_indices=[1]|modules_to_save=['embed_tokens']",
    ),
    "wrapped twice": (
        lambda: {**adapter(), "model": get_ba_lora_model(tiny_llama(), adapter()["peft_config"])},
        "peft_config is given|leave peft_config out",
    ),
    "mutating start": (lambda: lora(init_lora_weights="pissa"), "init_lora_weights='pissa'|use BaLoraConfig"),
    "trained bias": (lambda: lora(bias="all"), "bias='all'|write bias='none'"),
    "prompt tuning": (
        lambda: {**lora(), "peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")},
        "PromptTuningConfig|pass teacher_model",
    ),
    "full": (lambda: {"regularizers": RegularizerConfig()}, "lambda_consistency > 0|pass teacher_model|teacher_cache"),
    "teacher name": (
        lambda: {**adapter(), "teacher_model": "some/model"},
        "teacher_model='some/model'|AutoModelForCausalLM",
    ),
    "teacher alone": (lambda: {"teacher_model": tiny_llama()}, "teacher_model is given|pass regularizers"),
    "label smoothing": (lambda: {**adapter(), "label_smoothing_factor": 1.5}, "label_smoothing_factor=1.5|from 0 to 1"),
    "loss function": (lambda: {**adapter(), "compute_loss_func": lambda *a, **k: 0}, "compute_loss_func|remove it"),
    "compiled twice": (
        lambda: {**adapter(compile=True), "torch_compile": True},
        "torch_compile=True|set torch_compile to False",
    ),
    "flash": (
        lambda: {**adapter(), "model": base(config("_attn_implementation", "flash_attention_2"))},
        f"{FLASH}|needs a GPU|attn_implementation='sdpa'",
    ),
    "flash under a plain LoRA": (
        lambda: {**lora(), "model": base(config("_attn_implementation", "flash_attention_2"))},
        f"{FLASH}|needs a GPU|attn_implementation='sdpa'",
    ),
    "another kernel for the teacher": (
        lambda: {**lora(), "teacher_model": base(lambda model: model.set_attn_implementation("eager"))},
        "teacher_model attends by 'eager', the model by 'sdpa'|teacher_model.set_attn_implementation('sdpa')",
    ),
    "reentrant": (
        lambda: {
            **adapter(compile=True),
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        "compile=True|'use_reentrant': False",
    ),
}
ELSEWHERE = {"model": "there/is no such model", "model_init_kwargs": {"attn_implementation": "flash_attention_2"}}
TRL_ALONE = {
    "answers cut off": (
        lambda: {**adapter(), "rows": [{"prompt": text, "completion": "yes"} for text in TEXT], "max_length": 8},
        "train_dataset has no rows|TRL drops rows whose answer max_length cuts off",
    ),
    "flash to load": (lambda: {**adapter(), **ELSEWHERE}, f"{FLASH} in model_init_kwargs|GPU|write 'sdpa'"),
    "loss type": (lambda: {**adapter(), "loss_type": "focal"}, "loss_type='focal'|write 'nll' or 'dft'"),
    "two forms": (
        lambda: {**adapter(), "loss_type": "dft", "label_smoothing_factor": 0.1},
        "label_smoothing_factor=0.1|loss_type='dft'|set it to 0",
    ),
    "template": (lambda: {**adapter(), "chat_template_path": "some/model"}, "chat_template_path='some/model'|.jinja"),
}
CASES = [(case, host) for case in WRONG for host in HOSTS] + [(case, "trl") for case in TRL_ALONE]


@pytest.mark.parametrize(("case", "host"), CASES)
def test_one_clear_error_before_the_first_step(case, host, tmp_path):
    settings, words = {**WRONG, **TRL_ALONE}[case]
    started = Started()
    with pytest.raises((ValueError, TypeError)) as caught:
        train(host, tmp_path, started, **settings())
    message = str(caught.value)
    for part in words.split("|"):
        assert part in message
    assert len(message) < 450 and "\n" not in message
    assert started.steps == 0
    assert not list(tmp_path.glob("out/**/*.safetensors"))


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU that flash attention runs on, as far as settings are looked at."""
    monkeypatch.setattr(attention, "accelerator", lambda: "cuda")
    monkeypatch.setattr(attention.torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda"))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    return monkeypatch


@pytest.mark.parametrize("host", HOSTS)
def test_accelerates_own_compilation_beside_ours(host, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    AcceleratorState._reset_state(True)
    started = Started()
    with pytest.raises(ValueError, match=r"ACCELERATE_DYNAMO_BACKEND=inductor.*compile='layers'.*set it to no"):
        train(host, tmp_path, started, **adapter(compile="layers"))
    assert started.steps == 0
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("installed", "dtype", "words"),
    [
        ((), torch.bfloat16, ("needs the package flash-attn", "pip install flash-attn --no-build-isolation, or write")),
        (("flash_attn",), torch.float32, ("half precision alone", "in float32", "bf16=True", "dtype=torch.bfloat16")),
        (("kernels",), torch.float64, ("half precision alone", "in float64", "bf16=True", "dtype=torch.bfloat16")),
    ],
    ids=["no package", "float32", "float64"],
)
def test_flash_attention_on_a_gpu(installed, dtype, words, host, tmp_path, gpu):
    """Without its package, or in a precision it has not: refused before the first matrix is factorised."""
    gpu.setattr(attention, "importable", lambda module: module.partition(".")[0] in installed)
    gpu.setattr(f"balora_plugin.hosts.{host}.get_ba_lora_model", lambda *_, **__: pytest.fail("factorised"))
    model, started = base(config("_attn_implementation", "flash_attention_2")).to(dtype), Started()
    with pytest.raises(ValueError, match=r"^attn_implementation='flash_attention_2' ") as caught:
        train(host, tmp_path, started, model=model, **adapter())
    assert all(part in str(caught.value) for part in words)
    assert started.steps == 0


@pytest.mark.parametrize("autocast", [{"bf16": True}, {"fp16": True}, {"ACCELERATE_MIXED_PRECISION": "bf16"}])
def test_flash_attention_in_half_precision_passes(autocast, gpu):
    gpu.setattr(attention, "importable", lambda module: True)
    model = base(config("_attn_implementation", "flash_attention_2"))
    args = SimpleNamespace(device=torch.device("cuda"), bf16=False, fp16=False)
    attention.check_attention(model.to(torch.bfloat16), args)
    with pytest.raises(ValueError, match="half precision"):
        attention.check_attention(model.float(), args)
    for key, value in autocast.items():
        gpu.setenv(key, value) if key.isupper() else setattr(args, key, value)
    attention.check_attention(model, args)


@pytest.mark.parametrize("host", HOSTS)
def test_a_teacher_cache_of_another_model(host, tmp_path):
    cached = {"teacher_cache": str(tmp_path / "cache"), "lambda_consistency": 0.5}
    train(host, tmp_path, Started(), **adapter(cached))
    started = Started()
    with pytest.raises(ValueError, match=r"teacher_cache=.*another base model"):
        train(
            host, tmp_path, started, model=base(lambda model: model.model.norm.weight.data.mul_(2)), **adapter(cached)
        )
    assert started.steps == 0


@pytest.mark.parametrize("host", HOSTS)
def test_batches_that_count_nothing_among_others_train(host, tmp_path):
    """As after a truncation: documented, not an error."""
    rows = [*nothing_counted()[:2], *({"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]} for _ in range(2))]
    started = Started()
    train(host, tmp_path, started, rows=rows, **adapter(), max_steps=2, train_sampling_strategy="sequential")
    assert started.steps == 2
