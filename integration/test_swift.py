"""ms-swift with the plug-in: trained, saved, resumed, merged; skipped where it is not installed (`make test-swift`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import character_tokenizer, tiny_llama
from safetensors.torch import load_file

pytest.importorskip("swift.tuner_plugin", reason="needs ms-swift: make test-swift")

from peft import PeftModel
from swift.trainers import Seq2SeqTrainer
from transformers import AutoModelForCausalLM

from balora_plugin.hosts.swift.errors import WrongArguments
from integration.swift_run import OFF, TERMS, Run, command_line, defaults, history, write_workspace


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    base = tiny_llama(max_position_embeddings=512)
    return write_workspace(tmp_path_factory.mktemp("swift"), base, character_tokenizer())


@pytest.fixture
def sft(files, tmp_path, monkeypatch):
    """Runs `swift sft` with the working arguments and `changes`, the terms in BA_LORA; returns its trainer."""

    def run(name="out", terms=TERMS, **changes):
        if terms is None:
            monkeypatch.delenv("BA_LORA", raising=False)
        else:
            monkeypatch.setenv("BA_LORA", terms if isinstance(terms, str) else json.dumps(terms))
        made = Run(command_line({**defaults(files, tmp_path / name), **changes}))
        made.main()
        return made.trainer

    return run


def logits(model, ids=None):
    with torch.no_grad():
        return model.eval()(torch.arange(5, 45)[None] if ids is None else ids).logits


def test_it_trains_from_the_pre_trained_model_and_logs_every_term(sft):
    trainer = sft(eval_strategy="steps", eval_steps=3)
    assert history(trainer, "balora/consistency")[0] == 0
    assert history(trainer, "balora/consistency")[-1] > 0
    assert history(trainer, "balora/task")[-1] < history(trainer, "balora/task")[0]
    for key in ("balora/diversity", "balora/svd", "balora/loss", "token_acc"):
        assert len(history(trainer, key)) == 3, key
    assert len(history(trainer, "eval_balora/consistency")) == len(history(trainer, "eval_token_acc")) == 1


@pytest.mark.parametrize("weights", ["default", "last_round+react"])
def test_without_terms_it_trains_what_ms_swift_does(sft, weights, monkeypatch):
    """Loss, gradient norm and token_acc of a plain LoRA, ms-swift's weights for single tokens included."""
    if weights != "default":
        from swift.loss_scale.agent import REACTLossScale

        monkeypatch.setattr(
            REACTLossScale,
            "get_loss_scale",
            lambda self, context, **kwargs: ([context[:3], context[3:]], [2.0, 0.5]),
        )
    ours = sft("ours", OFF, init_weights="lora", loss_scale=weights)
    stock = sft("stock", None, tuner_type="lora", loss_scale=weights)
    assert type(stock) is Seq2SeqTrainer
    for key in ("loss", "grad_norm", "token_acc"):
        torch.testing.assert_close(history(ours, key), history(stock, key), rtol=2e-5, atol=1e-7)


def test_a_pissa_start_without_terms_is_ms_swifts_own(sft):
    ours, stock = sft("ours", OFF), sft("stock", None, tuner_type="lora", init_weights="pissa")
    torch.testing.assert_close(history(ours, "loss"), history(stock, "loss"), rtol=2e-4, atol=1e-5)


def test_what_is_saved_is_a_lora_that_needs_nothing_of_ours(sft, files, tmp_path):
    trainer = sft(save_steps=3)
    directory = tmp_path / "out" / "checkpoint-3"
    for arguments in (tmp_path / "out" / "args.json", directory / "args.json"):
        written = json.loads(arguments.read_text())
        assert written["tuner_type"] == "lora" and written["external_plugins"] == []
    assert not (tmp_path / "out" / "initial_model").exists() and not (directory / "converted").exists()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files / "base"), directory)
    trained = logits(trainer.model)
    torch.testing.assert_close(logits(model), trained, rtol=0, atol=2e-5)
    assert (trained - logits(AutoModelForCausalLM.from_pretrained(files / "base"))).abs().max() > 0.05


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(sft, tmp_path):
    settings = {"max_steps": 4, "save_steps": 2, "lora_dropout": 0.1}
    whole = sft("whole", **settings)
    resumed = sft("resumed", **settings, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert history(resumed, "loss")[-2:] == history(whole, "loss")[-2:]
    of = [load_file(tmp_path / name / "checkpoint-4" / "adapter_model.safetensors") for name in ("whole", "resumed")]
    assert of[0].keys() == of[1].keys() and all(torch.equal(of[0][key], of[1][key]) for key in of[0])


def test_resume_only_model_begins_with_a_fresh_optimizer(sft, tmp_path):
    sft("whole", max_steps=4, save_steps=2)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    trainer = sft("again", max_steps=4, resume_from_checkpoint=checkpoint, resume_only_model=True)
    assert history(trainer, "balora/consistency")[-2] > 0 and trainer.state.global_step == 4


def test_it_goes_on_from_an_adapter_with_the_terms_of_now(sft, tmp_path):
    sft("first", save_steps=3)
    adapters = [str(tmp_path / "first" / "checkpoint-3")]
    trainer = sft("second", {"lambda_consistency": 0.25}, adapters=adapters, lora_rank=None, lora_alpha=None)
    assert trainer.ba_lora.lambda_consistency == 0.25
    assert history(trainer, "balora/consistency")[0] > 0
    with pytest.raises(WrongArguments, match=r"lora_rank: 16 contradicts the adapter .* which has 4"):
        sft("third", adapters=adapters, lora_rank=16)


@pytest.fixture
def without_flash(monkeypatch):
    """ms-swift asks for flash attention before it packs; transformers' own masks keep documents apart as well."""
    from swift.arguments import SftArguments

    monkeypatch.setattr(
        SftArguments,
        "_check_padding_free",
        lambda self: setattr(self, "padding_free", self.padding_free or self.packing),
    )


def test_documents_of_a_row_without_padding_see_themselves_alone(sft, without_flash):
    settings = {"max_steps": 2, "train_dataloader_shuffle": False, "dataset_shuffle": False, "split_dataset_ratio": 0.0}
    free, padded = sft("free", **settings, padding_free=True), sft("padded", **settings)
    for key in ("loss", "balora/task", "balora/consistency", "balora/diversity", "token_acc"):
        torch.testing.assert_close(history(free, key), history(padded, key), rtol=1e-4, atol=1e-5)
    assert history(free, "balora/consistency")[0] == 0


def test_packing_trains_what_ms_swift_does(sft, without_flash):
    settings = {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    ours = sft("ours", OFF, init_weights="lora", **settings)
    stock = sft("stock", None, tuner_type="lora", **settings)
    for key in ("loss", "grad_norm", "token_acc"):
        torch.testing.assert_close(history(ours, key), history(stock, key), rtol=2e-5, atol=1e-7)
    terms = sft("terms", **settings)
    assert history(terms, "balora/consistency")[0] == 0 and history(terms, "balora/consistency")[1] > 0


def test_a_classifier_has_the_nlu_terms(sft, files, tmp_path):
    settings = {"task_type": "seq_cls", "num_labels": 3, "dataset": [str(files / "labelled.jsonl")], "save_steps": 3}
    trainer = sft(**settings, eval_strategy="steps", eval_steps=3, terms={**TERMS, "lambda_diversity": 0.03})
    assert trainer.ba_lora.task == "nlu" and history(trainer, "balora/consistency")[0] == 0
    assert len(history(trainer, "eval_balora/task")) == 1
    assert history(trainer, "acc") and history(trainer, "eval_acc")
    assert json.loads((tmp_path / "out" / "checkpoint-3" / "args.json").read_text())["tuner_type"] == "lora"


def test_a_classifier_without_terms_trains_what_ms_swift_does(sft, files):
    settings = {"task_type": "seq_cls", "num_labels": 3, "dataset": [str(files / "labelled.jsonl")]}
    ours = sft("ours", OFF, **settings, init_weights="lora")
    stock = sft("stock", None, **settings, tuner_type="lora")
    for key in ("loss", "acc"):
        torch.testing.assert_close(history(ours, key), history(stock, key), rtol=2e-5, atol=1e-7)


def test_everything_wrong_is_said_at_once_before_the_model_loads(sft, monkeypatch):
    monkeypatch.setattr(Run, "_prepare_model_tokenizer", lambda self: pytest.fail("loaded"))
    with pytest.raises(WrongArguments) as raised:
        sft(
            terms={"lambda_svdd": 0.1},
            lorap_lr_ratio=16,
            enable_dft_loss=True,
            enable_channel_loss=True,
            lora_dtype="float32",
            init_weights="olora",
        )
    keys = {finding.key for finding in raised.value.findings}
    assert keys == {
        "lorap_lr_ratio", "enable_dft_loss", "enable_channel_loss", "lora_dtype", "init_weights", "BA_LORA.lambda_svdd",
    }  # fmt: skip


def test_beside_another_tuner_the_plugin_does_nothing(sft):
    trainer = sft(terms=None, tuner_type="lora", enable_dft_loss=True)
    assert type(trainer) is Seq2SeqTrainer and type(trainer.model) is not type(None)
    assert not [key for row in trainer.state.log_history for key in row if key.startswith("balora/")]
    with pytest.raises(WrongArguments, match="tuner_type: lora beside BA_LORA would train without its terms"):
        sft("again", tuner_type="lora")


def test_rlhf_is_refused(files, tmp_path, monkeypatch):
    from swift.pipelines import rlhf_main

    monkeypatch.delenv("BA_LORA", raising=False)
    with pytest.raises(WrongArguments, match=r"rlhf_type: dpo trains with another loss"):
        rlhf_main(command_line({**defaults(files, tmp_path / "out"), "rlhf_type": "dpo"}))


def test_another_plugins_trainer_is_named(sft, tmp_path):
    from balora_plugin.hosts.swift.names import PLUGIN_FILE

    other = tmp_path / "other.py"
    other.write_text(
        "from swift.trainers import TrainerFactory\n"
        "TrainerFactory.TRAINER_MAPPING['causal_lm'] = 'swift.trainers.RerankerTrainer'\n"
    )
    from swift.trainers import TrainerFactory

    before = dict(TrainerFactory.TRAINER_MAPPING)
    try:
        with pytest.raises(WrongArguments, match=r"external_plugins: .*RerankerTrainer"):
            sft(external_plugins=[str(PLUGIN_FILE), str(other)])
    finally:
        TrainerFactory.TRAINER_MAPPING.update(before)


def environment(**more):
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return {**os.environ, **quiet, **more}


def write_yaml(path, values, terms=TERMS):
    import yaml

    values = {key: value for key, value in values.items() if value is not None}
    path.write_text(yaml.safe_dump({"ENV": {"BA_LORA": terms}, **values}))
    return path


def rows_of(output):
    return [json.loads(line) for line in (Path(output) / "logging.jsonl").read_text().splitlines()]


def test_two_ranks_are_one_process(files, tmp_path, sft, monkeypatch):
    """By the command line and a YAML, whose ENV holds the settings as a mapping."""
    terms = {**TERMS, "lambda_svd": 0.0}
    monkeypatch.delenv("BA_LORA", raising=False)
    shared = {"train_dataloader_shuffle": False, "save_steps": 3, "ddp_backend": "gloo"}
    values = {**defaults(files, tmp_path / "two"), **shared, "gradient_accumulation_steps": 1}
    command = [
        str(Path(sys.executable).with_name("swift")),
        "sft",
        str(write_yaml(tmp_path / "two.yaml", values, terms)),
    ]
    port = str(20000 + os.getpid() % 20000)
    done = subprocess.run(
        command, env=environment(NPROC_PER_NODE="2", MASTER_PORT=port), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    one = sft("one", terms, **{**shared, "ddp_backend": None})
    two = [row for row in rows_of(tmp_path / "two") if "balora/task" in row]
    for key in ("balora/task", "balora/consistency", "balora/diversity", "token_acc"):
        torch.testing.assert_close([row[key] for row in two], history(one, key), rtol=1e-4, atol=1e-5)
    of = [load_file(tmp_path / name / "checkpoint-3" / "adapter_model.safetensors") for name in ("one", "two")]
    for key, value in of[0].items():
        torch.testing.assert_close(of[1][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_trains(sft, bits):
    pytest.importorskip("bitsandbytes")
    trainer = sft(quant_method="bnb", quant_bits=bits, max_steps=2, gradient_checkpointing=False)
    kinds = {type(layer.base_layer).__name__ for layer in trainer.model.modules() if hasattr(layer, "base_layer")}
    assert kinds == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    assert history(trainer, "balora/consistency")[0] == 0 and history(trainer, "balora/consistency")[1] > 0


def test_every_argument_of_ms_swift_has_a_place():
    """A key that is new in a release is in none of the tables: whether it trains something else has to be looked at."""
    from dataclasses import fields

    from swift.arguments import SftArguments
    from transformers import Seq2SeqTrainingArguments

    from balora_plugin.hosts.swift import keys

    known = {*keys.REFUSED, *keys.SUPERSEDED, *keys.MAPPED, *keys.PASSED, *keys.UNREAD}
    there = {field.name for field in fields(SftArguments)}
    assert there - {field.name for field in fields(Seq2SeqTrainingArguments)} - known == set()
    assert known - there == set()


def test_a_merge_needs_nothing_of_ours(sft, tmp_path):
    """`swift export` in a process that cannot import this package, with a YAML's own words for its settings."""
    trainer = sft(save_steps=3, terms=str(TERMS))
    blocked = "import sys; sys.modules['balora_plugin'] = None; from swift.pipelines import export_main; export_main()"
    words = ["--adapters", str(tmp_path / "out" / "checkpoint-3"), "--merge_lora", "true", "--use_hf", "true"]
    done = subprocess.run(
        [sys.executable, "-c", blocked, *words, "--output_dir", str(tmp_path / "merged")],
        env=environment(),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(trainer.model), rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    from multimodal import tiny_multimodal, tiny_processor

    return write_workspace(tmp_path_factory.mktemp("llava"), tiny_multimodal("llava"), tiny_processor("llava"))


@pytest.mark.parametrize("encoded", [False, True])
def test_text_trains_a_multimodal_model_as_ms_swift_does(sft, llava, monkeypatch, encoded):
    """Also where ms-swift embeds the tokens in a hook before the forward, which knows its own keywords alone."""
    from swift.template.templates.llava import LlavaHfTemplate

    if encoded:

        def post_encode(self, model, inputs):
            return {"inputs_embeds": self.get_base_model(model).get_input_embeddings()(inputs["input_ids"])}

        monkeypatch.setattr(LlavaHfTemplate, "_post_encode", post_encode)
    settings = {
        "model": str(llava / "base"),
        "model_type": "llava1_5_hf",
        "template": "llava1_5_hf",
        "max_length": 100,
        "max_steps": 2,
    }
    ours = sft("ours", OFF, init_weights="lora", **settings)
    stock = sft("stock", None, tuner_type="lora", **settings)
    for key in ("loss", "grad_norm", "token_acc"):
        torch.testing.assert_close(history(ours, key), history(stock, key), rtol=2e-5, atol=1e-7)
    terms = sft("terms", **settings)
    assert history(terms, "balora/consistency")[0] == 0 and history(terms, "balora/consistency")[1] > 0
    assert not [name for name, p in terms.model.named_parameters() if p.requires_grad and "vision" in name]


def test_load_args_does_not_train_without_terms(sft, tmp_path):
    """ms-swift takes the tuner from the adapter's file before it imports the plug-in."""
    sft("first", save_steps=3)
    with pytest.raises(WrongArguments, match=r"load_args: true takes tuner_type: lora from .*args\.json"):
        sft("second", None, adapters=[str(tmp_path / "first" / "checkpoint-3")], load_args=True)


def test_a_variable_that_is_no_mapping_is_said_with_the_rest(sft):
    with pytest.raises(WrongArguments, match=r"BA_LORA: '0\.3' must be a mapping") as raised:
        sft(terms="0.3", use_dora=True, new_special_tokens=["<new>"])
    assert {finding.key for finding in raised.value.findings} == {"BA_LORA", "use_dora", "new_special_tokens"}


def test_what_encodes_images_for_the_teacher_too_is_not_adapted(sft, llava):
    settings = {"model": str(llava / "base"), "model_type": "llava1_5_hf", "template": "llava1_5_hf", "max_length": 100}
    with pytest.raises(WrongArguments, match=r"freeze_vit: false adapts what encodes images") as raised:
        sft(freeze_vit=False, **settings)
    assert len(raised.value.findings) == 1
    with pytest.raises(WrongArguments, match=r"modules_to_save: match model\.vision_tower\..*, which encodes images"):
        sft(modules_to_save=["all-norm"], **settings)
    with pytest.raises(WrongArguments, match=r"modules_to_save: match .*embed_tokens, which embeds tokens"):
        sft(modules_to_save=["language_model.embed_tokens"], **settings)
    with pytest.raises(WrongArguments, match=r"target_modules: match model\.vision_tower\..*, which encodes images"):
        sft(target_regex=".*(vision_tower|language_model).*q_proj", **settings)


def test_what_an_engine_has_gathered_reaches_the_writer():
    """ms-swift's own PeftTuner drops it, so that under ZeRO-3 each process would write its own part."""
    from balora_plugin.hosts.swift.tuner import BaLoraTuner

    class Model:
        def save_pretrained(self, directory, **given):
            self.given = given

    model, gathered = Model(), {"a": 1}
    BaLoraTuner.save_pretrained(model, "somewhere", state_dict=gathered)
    assert model.given["state_dict"] is gathered and model.given["selected_adapters"] == ["default"]
