"""What a saved adapter records of its base, balora verify, and training on with another base."""

from __future__ import annotations

import copy
import json
import logging
import shutil

import pytest
import torch
from classifiers import classifier
from helpers import ba_lora, logits, stock, train
from models import tiny_gpt2, tiny_llama, tiny_mixtral
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from balora_plugin import BaLoraConfig, BaLoraModel, get_ba_lora_model
from balora_plugin.adapter.saved import provenance
from balora_plugin.checkpoint.names import PROBE_FILE
from balora_plugin.commands import main
from balora_plugin.pretrained import fingerprint, probe
from balora_plugin.pretrained.fingerprint import model_fingerprint
from balora_plugin.pretrained.identity import base_identity, compare
from balora_plugin.pretrained.switch import TeacherSwitch

pytestmark = pytest.mark.hosts


@pytest.fixture
def base(tmp_path):
    """A tiny base model on disk."""
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(path, dtype=torch.float32, **values):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **values)


@pytest.fixture
def adapter(base, ids, tmp_path):
    """A trained adapter of that base."""
    model = ba_lora(loaded(base))
    train(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def settings_of(directory):
    return json.loads((directory / "ba_lora.json").read_text())


def verify(capsys, *arguments):
    """(exit code, what it says, an error included) of balora verify."""
    capsys.readouterr()
    code = main(["verify", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out + "".join(line for line in err.splitlines() if line.startswith("Error: "))


def mismatches(out):
    """Subjects of the lines that say MISMATCH."""
    return [line.removeprefix("MISMATCH").strip().split("  ")[0] for line in out.splitlines() if "MISMATCH" in line]


# --- what is recorded


def test_the_base_and_a_probe_of_both_models_are_recorded(base, adapter, ids):
    settings = settings_of(adapter)
    clean = loaded(base).eval()
    assert settings["base_sha256"] == model_fingerprint(clean)
    assert (settings["base_dtype"], settings["base_quantization"]) == ("float32", None)
    assert settings["probe"] == {"base": True, "adapted": True, "note": None}
    stored = load_file(adapter / "ba_lora_probe.safetensors")
    with torch.no_grad():
        expected = clean(input_ids=stored["input_ids"].long()).logits[0]
    rows, columns = stored["positions"].long(), stored["columns"].long()
    torch.testing.assert_close(stored["base"], expected[rows][:, columns])
    again = BaLoraModel.from_pretrained(loaded(base), adapter).eval()
    adapted = logits(again, stored["input_ids"].long())[0][rows][:, columns]
    torch.testing.assert_close(stored["adapted"], adapted)
    assert (adapted - expected[rows][:, columns]).abs().max() > 0.01


@pytest.mark.parametrize("vocabulary", [7, 2048, 128256])
def test_the_probe_is_small_and_valid_for_any_vocabulary(vocabulary, tmp_path):
    ids, columns = probe.token_ids(vocabulary), probe.columns(vocabulary)
    assert ids.shape == (1, 16) and ids.min() >= 0 and ids.max() < vocabulary
    assert columns.unique().numel() == columns.numel() and columns[-1] == vocabulary - 1
    table = torch.randn(len(probe.POSITIONS), columns.numel())
    probe.write_probe(str(tmp_path), probe.Probe(vocabulary, table + 1, table))
    assert (tmp_path / PROBE_FILE).stat().st_size < 100_000
    assert torch.equal(probe.read_probe(str(tmp_path / PROBE_FILE)).adapted, table)


def test_weights_are_hashed_once_and_saving_leaves_the_model_as_it_was(base, ids, tmp_path, monkeypatch):
    calls = []
    original = fingerprint.weight_digests
    monkeypatch.setattr(
        "balora_plugin.pretrained.identity.weight_digests", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    model = ba_lora(loaded(base), lora_dropout=0.3)
    model.add_adapter("second", BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.train()
    model.base_model.model.model.layers[0].eval()  # flags are restored one by one
    before = [(m.training, getattr(m, "_disable_adapters", None)) for m in model.modules()]
    trains, active, random = [p.requires_grad for p in model.parameters()], model.active_adapters, torch.get_rng_state()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    assert calls == [1]
    assert [(m.training, getattr(m, "_disable_adapters", None)) for m in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == trains
    assert model.active_adapters == active and torch.equal(torch.get_rng_state(), random)


def test_every_adapter_has_the_logits_of_its_own(base, ids, tmp_path, capsys):
    model = ba_lora(loaded(base))
    model.add_adapter("second", BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name in ("default", "second"):
        model.set_adapter(name)
        train(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    for directory in (tmp_path / "adapter", tmp_path / "adapter" / "second"):
        code, out = verify(capsys, directory, "--base", base)
        assert code == 0, out


def test_another_dtype_is_another_hash(base, tmp_path):
    model = ba_lora(loaded(base))
    model.save_pretrained(tmp_path / "one")
    model.bfloat16().save_pretrained(tmp_path / "two")
    one, two = settings_of(tmp_path / "one"), settings_of(tmp_path / "two")
    assert (one["base_dtype"], two["base_dtype"]) == ("float32", "bfloat16")
    assert one["base_sha256"] != two["base_sha256"]
    assert one["base_digests"]["bfloat16"] == two["base_digests"]["bfloat16"]


def test_a_merged_base_is_not_hashed(base, tmp_path):
    """The weights hold the adapter then: their hash would be nobody's."""
    model = ba_lora(loaded(base))
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    settings = settings_of(tmp_path / "merged")
    assert settings["base_sha256"] is None and "merged" in settings["probe"]["note"]
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "unmerged")
    assert settings_of(tmp_path / "unmerged")["base_sha256"] is not None


def test_a_model_sharded_before_it_was_hashed_says_so(base, ids, tmp_path, monkeypatch, capsys):
    model = ba_lora(loaded(base))
    ba_lora(tiny_llama()).save_pretrained(tmp_path / "sharded")  # whose probe must not be taken for this one's
    with monkeypatch.context() as patch:
        patch.setattr("balora_plugin.pretrained.identity.is_sharded", lambda model: True)
        model.save_pretrained(tmp_path / "sharded")
    settings = settings_of(tmp_path / "sharded")
    assert settings["base_sha256"] is None
    assert settings["probe"] == {"base": False, "adapted": False, "note": "the model is sharded over processes"}
    assert not (tmp_path / "sharded" / "ba_lora_probe.safetensors").exists()
    code, out = verify(capsys, tmp_path / "sharded", "--base", base)
    assert code == 0
    assert "cannot be told by its hash" in out and "sharded over processes: logits cannot be compared" in out


def test_a_trainer_hashes_before_sharding_so_the_base_is_known_after_it(base, ids, tmp_path, monkeypatch, capsys):
    model = ba_lora(loaded(base))
    provenance.prepare(model, "the base itself")
    for module in ("pretrained.identity", "adapter.saved.provenance"):
        monkeypatch.setattr(f"balora_plugin.{module}.is_sharded", lambda model: True)
    model.save_pretrained(tmp_path / "adapter")
    settings = settings_of(tmp_path / "adapter")
    assert settings["base_sha256"] == model_fingerprint(loaded(base))
    assert settings["probe"] == {"base": True, "adapted": False, "note": "the model is sharded over processes"}
    assert settings["teacher"] == "the base itself"
    monkeypatch.undo()
    code, out = verify(capsys, tmp_path / "adapter", "--base", base)
    assert code == 0 and "only its base is checked" in out


def test_a_probe_that_cannot_run_does_not_stop_a_save(base, tmp_path, monkeypatch):
    model = ba_lora(loaded(base))
    monkeypatch.setattr(probe, "_logits", lambda model: (_ for _ in ()).throw(RuntimeError("no such kernel")))
    model.save_pretrained(tmp_path)
    settings = settings_of(tmp_path)
    assert settings["base_sha256"] and "no such kernel" in settings["probe"]["note"]
    assert not (tmp_path / "ba_lora_probe.safetensors").exists()


def test_a_model_that_is_no_language_model_has_no_probe(tmp_path):
    model = get_ba_lora_model(nn.Sequential(nn.Linear(8, 8)), BaLoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    settings = settings_of(tmp_path)
    assert settings["base_sha256"] and settings["probe"]["note"] == "it is not a causal language model"


# --- comparing bases


def changed_matrix(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 0.01
    return model


def fine_tuned(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids = torch.arange(3, 19).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return model


def another_seed(model):
    for p in model.parameters():
        p.data = (0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))).to(p.dtype)
    return model


WRONG = {"changed matrix": changed_matrix, "fine-tuned": fine_tuned, "another seed": another_seed}


@pytest.mark.parametrize("wrong", WRONG)
def test_bases_are_told_apart(wrong):
    recorded = base_identity(tiny_llama())
    assert compare(recorded, base_identity(tiny_llama())) == "same"
    assert compare(recorded, base_identity(WRONG[wrong](tiny_llama()))) == "other"
    for ours, theirs in (("float32", "bfloat16"), ("bfloat16", "float32")):
        one, two = (base_identity(tiny_llama().to(getattr(torch, dtype))) for dtype in (ours, theirs))
        assert compare(one, two) == "dtype"
        assert compare(one, base_identity(WRONG[wrong](tiny_llama().to(getattr(torch, theirs))))) == "other"
    assert compare(recorded, base_identity(tiny_llama().half())) == "unclear"
    assert compare(recorded, base_identity(tiny_llama(rms_norm_eps=1e-3))) == "config"
    assert compare(recorded, None) == compare(None, recorded) == "unknown"


def test_a_change_below_bfloat16_is_another_base_in_float32():
    recorded, changed = (tiny_llama().bfloat16().float() for _ in range(2))
    changed.model.layers[0].mlp.up_proj.weight.data *= 1 + 1e-5
    assert compare(base_identity(recorded), base_identity(changed)) == "other"
    assert compare(base_identity(recorded), base_identity(changed.bfloat16())) == "dtype"  # nothing is left of it


def test_a_release_that_renames_weights_is_no_other_base():
    class Renamed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner, self.config = model, model.config

    assert compare(base_identity(tiny_llama()), base_identity(Renamed(tiny_llama()))) == "config"
    assert compare(base_identity(tiny_llama()), base_identity(Renamed(changed_matrix(tiny_llama())))) == "other"


def test_parts_kept_in_another_precision_are_the_same_base():
    """K-bit preparation and some hosts raise norms to float32; that is no other model."""
    recorded = base_identity(tiny_llama().bfloat16())
    raised = tiny_llama().bfloat16()
    raised.model.norm.float()
    assert compare(recorded, base_identity(raised)) == "dtype"


# --- balora verify


PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "modules_to_save": ["norm"]}


@pytest.mark.parametrize(
    ("build", "changes"), [(tiny_llama, {}), (tiny_llama, PATTERNS), (tiny_gpt2, {}), (tiny_mixtral, {})]
)
def test_the_right_base_is_recognised(build, changes, ids, tmp_path, capsys):
    build().save_pretrained(tmp_path / "base")
    model = ba_lora(loaded(tmp_path / "base"), **changes)
    train(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    code, out = verify(capsys, tmp_path / "adapter", "--base", tmp_path / "base")
    assert code == 0, out
    for words in (
        "files as they were saved",
        "is the recorded one",
        "adapter in stock PEFT",
        "adapter in BA-LoRA",
        "OK",
    ):
        assert words in out
    assert len(out.strip().splitlines()) < 12


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_base_is_caught(wrong, dtype, adapter, tmp_path, capsys):
    WRONG[wrong](tiny_llama()).save_pretrained(tmp_path / "wrong")
    code, out = verify(capsys, adapter, "--base", tmp_path / "wrong", "--dtype", dtype)
    assert code == 1
    assert "base" in mismatches(out)
    assert ("base's logits" in mismatches(out)) == (wrong == "another seed") or dtype == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_same_base_in_another_dtype_is_recognised(dtype, base, adapter, capsys):
    code, out = verify(capsys, adapter, "--base", base, "--dtype", dtype)
    assert code == 0, out
    assert ("in another dtype" if dtype == "bfloat16" else "hashes cannot tell") in out


def test_another_config_is_caught_by_the_logits(base, adapter, capsys):
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 50.0
    (base / "config.json").write_text(json.dumps(config))
    code, out = verify(capsys, adapter, "--base", base)
    assert code == 1
    assert "under another config" in out and "base's logits" in mismatches(out)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "ba_lora_init.safetensors"])
def test_a_changed_or_missing_file_is_named(name, base, adapter, capsys):
    path = adapter / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, out = verify(capsys, adapter, "--base", base)
    assert code == 1 and mismatches(out) == [name]
    if name == "ba_lora_init.safetensors":
        path.unlink()
        code, out = verify(capsys, adapter, "--base", base)
        assert code == 1 and "is missing" in out


def test_a_vocabulary_of_another_size_is_named_with_what_to_do(base, ids, tmp_path, capsys):
    """Tokens were added before training: the base as it was published would be called another model."""
    model = loaded(base)
    model.resize_token_embeddings(100, mean_resizing=False)
    model.save_pretrained(tmp_path / "prepared")
    adapter = ba_lora(model, modules_to_save=["embed_tokens", "lm_head"])
    train(adapter, ids, steps=1)
    adapter.save_pretrained(tmp_path / "adapter")
    code, out = verify(capsys, tmp_path / "adapter", "--base", base)
    assert code == 1 and mismatches(out) == ["vocabulary"] and "ANOTHER" not in out
    assert "96 entries here, 100 when the adapter was trained, 4 more" in out
    assert "resize_token_embeddings(100)" in out and "balora export --merge" in out
    code, out = verify(capsys, tmp_path / "adapter", "--base", tmp_path / "prepared")
    assert code == 0, out
    ba_lora(loaded(base)).save_pretrained(tmp_path / "before")
    code, out = verify(capsys, tmp_path / "before", "--base", tmp_path / "prepared")
    assert code == 1 and "4 fewer: name the base as it was before tokens were added" in out


def test_factors_that_compute_something_else_are_caught_even_with_their_hash(base, adapter, capsys):
    """The probe, not the hash: what was written is not what was trained."""
    from balora_plugin.checkpoint.settings import file_digest

    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    key = next(key for key in weights if "lora_B" in key)
    save_file({**weights, key: -weights[key]}, path, {"format": "pt"})
    settings = settings_of(adapter)
    settings["sha256"][path.name] = file_digest(str(path))
    (adapter / "ba_lora.json").write_text(json.dumps(settings))
    code, out = verify(capsys, adapter, "--base", base)
    assert code == 1
    assert set(mismatches(out)) == {"adapter in stock PEFT", "adapter in BA-LoRA"}


def test_an_adapter_without_side_files_says_what_can_be_checked(base, tmp_path, capsys):
    stock(loaded(base)).save_pretrained(tmp_path / "plain")
    code, out = verify(capsys, tmp_path / "plain", "--base", base)
    assert code == 0
    for words in ("no ba_lora.json", "none is recorded", "logits cannot be compared", "not verified"):
        assert words in out
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    assert verify(capsys, tmp_path / "plain", "--base", tmp_path / "gpt2")[0] == 1  # does not fit
    stock(tiny_llama(), init_lora_weights="pissa").save_pretrained(tmp_path / "raw")
    code, out = verify(capsys, tmp_path / "raw", "--base", base)
    assert code == 0 and "residual base" in out and "--initial" in out and "not verified" in out


def test_an_exported_adapter_still_knows_its_base(base, adapter, tmp_path, capsys):
    main(["export", str(adapter), "--output", str(tmp_path / "out"), "--rank", "3"])
    main(["export", str(tmp_path / "out"), "--output", str(tmp_path / "again"), "--rank", "2"])
    another_seed(tiny_llama()).save_pretrained(tmp_path / "wrong")
    capsys.readouterr()
    for name in ("out", "again"):
        code, out = verify(capsys, tmp_path / name, "--base", base)
        assert code == 0 and "is the recorded one" in out
        code, out = verify(capsys, tmp_path / name, "--base", tmp_path / "wrong")
        assert code == 1 and mismatches(out) == ["base"]


def test_usage_errors(base, adapter, tmp_path, capsys):
    for arguments, word in (
        ([tmp_path / "nothing", "--base", base], "nothing"),
        ([adapter, "--base", tmp_path / "nothing"], "--base"),
        ([adapter, "--base", adapter], "is an adapter"),
    ):
        code, out = verify(capsys, *arguments)
        assert code == 2 and out.startswith("Error: ")
        assert word in out
    BaLoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]).save_pretrained(tmp_path / "early")
    code, out = verify(capsys, tmp_path / "early", "--base", base)
    assert code == 2 and "has not saved" in out


@pytest.fixture
def quantised(base, tmp_path):
    """Builds the base in 4 or 8 bits."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(base)

    def build(bits=4, **changes):
        chosen = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32, **changes}
        if bits == 8:
            chosen = {"load_in_8bit": True}
        return loaded(base, quantization_config=BitsAndBytesConfig(**chosen), device_map={"": "cpu"}).train()

    return build


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base(bits, base, quantised, ids, tmp_path, capsys):
    model = ba_lora(quantised(bits)).train()
    train(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    expected = copy.deepcopy(settings_of(tmp_path / "adapter"))
    assert expected["base_quantization"][f"load_in_{bits}bit"] is True
    with TeacherSwitch(model).off():  # the probe's forward pass has not repacked the weights
        before = model(input_ids=ids).logits
    assert torch.equal(before, logits(quantised(bits), ids))
    # loaded again as it was trained on, from the full-precision files
    code, out = verify(capsys, tmp_path / "adapter", "--base", base)
    assert code == 0, out
    assert "is the recorded one" in out and "quantised" in out
    # full precision: hashes cannot tell, the logits are near
    code, out = verify(capsys, tmp_path / "adapter", "--base", base, "--dtype", "float32")
    assert code == 0, out
    assert "hashes cannot tell" in out
    another_seed(tiny_llama(hidden_size=64, intermediate_size=64)).save_pretrained(tmp_path / "wrong")
    code, out = verify(capsys, tmp_path / "adapter", "--base", tmp_path / "wrong")
    assert code == 1 and "base's logits" in mismatches(out)


# --- training on


@pytest.fixture
def said():
    """Warnings of provenance.py."""
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    provenance.logger.addHandler(handler)
    yield heard
    provenance.logger.removeHandler(handler)


@pytest.mark.parametrize("wrong", WRONG)
def test_training_on_with_another_base_is_refused(wrong, base, adapter, tmp_path):
    other = WRONG[wrong](loaded(base))
    with pytest.raises(ValueError, match="belongs to another base") as error:
        BaLoraModel.from_pretrained(other, adapter, is_trainable=True)
    assert settings_of(adapter)["base_sha256"][:12] in str(error.value)
    assert model_fingerprint(WRONG[wrong](loaded(base)))[:12] in str(error.value)
    resumed = ba_lora(WRONG[wrong](loaded(base)))
    with pytest.raises(ValueError, match="belongs to another base"):
        resumed.load_adapter(str(adapter), "default", is_trainable=True)
    BaLoraModel.from_pretrained(WRONG[wrong](loaded(base)), adapter)  # for inference it is the user's business


def test_training_on_with_the_same_base_says_nothing(base, adapter, said):
    BaLoraModel.from_pretrained(loaded(base), adapter, is_trainable=True)
    assert said == []


def test_training_on_in_another_dtype_is_said_once(base, adapter, said):
    for _ in range(2):
        BaLoraModel.from_pretrained(loaded(base, torch.bfloat16), adapter, is_trainable=True)
    assert len(said) == 1 and "in another dtype" in said[0] and "float32" in said[0] and "bfloat16" in said[0]


def test_float16_is_decided_by_the_probe(base, adapter, said):
    BaLoraModel.from_pretrained(loaded(base, torch.float16), adapter, is_trainable=True)
    assert len(said) == 1 and "another form of its base" in said[0] and "apart" in said[0]
    with pytest.raises(ValueError, match="another base"):
        BaLoraModel.from_pretrained(another_seed(loaded(base)).half(), adapter, is_trainable=True)


def test_another_config_is_said_if_it_computes_something_else(base, adapter, said):
    harmless = loaded(base)
    harmless.config.a_key_of_another_release = 1
    BaLoraModel.from_pretrained(harmless, adapter, is_trainable=True)
    assert said == []
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 50.0
    (base / "config.json").write_text(json.dumps(config))
    BaLoraModel.from_pretrained(loaded(base), adapter, is_trainable=True)
    assert len(said) == 1 and "the same weights under another config" in said[0]


def test_training_on_with_another_form_of_a_quantised_base(base, quantised, ids, tmp_path, said):
    model = ba_lora(quantised()).train()
    train(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    BaLoraModel.from_pretrained(quantised(), tmp_path / "adapter", is_trainable=True)
    assert said == []
    BaLoraModel.from_pretrained(loaded(base), tmp_path / "adapter", is_trainable=True)
    BaLoraModel.from_pretrained(quantised(bits=8), tmp_path / "adapter", is_trainable=True)
    assert len(said) == 2 and all("another form of its base" in text for text in said)
    other = another_seed(tiny_llama(hidden_size=64, intermediate_size=64))
    with pytest.raises(ValueError, match="another base"):
        BaLoraModel.from_pretrained(other, tmp_path / "adapter", is_trainable=True)


def test_an_adapter_that_recorded_no_base_is_loaded_as_before(base, adapter):
    settings = settings_of(adapter)
    for key in [key for key in settings if key.startswith("base_") and key != "base_model"] + ["probe", "teacher"]:
        del settings[key]
    (adapter / "ba_lora.json").write_text(json.dumps(settings))
    BaLoraModel.from_pretrained(another_seed(loaded(base)), adapter, is_trainable=True)


def test_a_directory_without_its_probe_is_still_told_by_the_hash(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "copied", ignore=lambda *_: ["ba_lora_probe.safetensors"])
    BaLoraModel.from_pretrained(loaded(base), tmp_path / "copied", is_trainable=True)
    with pytest.raises(ValueError, match="another base"):
        BaLoraModel.from_pretrained(changed_matrix(loaded(base)), tmp_path / "copied", is_trainable=True)


def test_a_classifier_is_verified_by_files_and_hash(tmp_path, capsys):
    classifier("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    get_ba_lora_model(model, BaLoraConfig(r=2, lora_alpha=2)).save_pretrained(tmp_path / "adapter")
    code, out = verify(capsys, tmp_path / "adapter", "--base", tmp_path / "base")
    assert code == 0 and "is the recorded one" in out, out
    classifier("llama", seed=2).save_pretrained(tmp_path / "other")
    code, out = verify(capsys, tmp_path / "adapter", "--base", tmp_path / "other")
    assert code == 1 and mismatches(out) == ["base"]
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0\1"[:1])
    path.write_bytes(path.read_bytes()[:-4] + b"1234")
    code, out = verify(capsys, tmp_path / "adapter", "--base", tmp_path / "base")
    assert code == 1 and mismatches(out) == ["adapter_model.safetensors"]


def test_a_base_quantised_alike_with_other_bytes_needs_logits_to_be_accepted(base, quantised, tmp_path, said):
    """A classifier's adapter has no probe; here that of a language model is taken away."""
    ba_lora(quantised()).train().save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "ba_lora_probe.safetensors").unlink()
    BaLoraModel.from_pretrained(quantised(), tmp_path / "adapter", is_trainable=True)
    BaLoraModel.from_pretrained(quantised(bits=8), tmp_path / "adapter", is_trainable=True)  # that cannot be told
    assert len(said) == 1
    another_seed(tiny_llama(hidden_size=64, intermediate_size=64)).save_pretrained(base)
    with pytest.raises(ValueError, match=r"another base.*could not be compared"):
        BaLoraModel.from_pretrained(quantised(), tmp_path / "adapter", is_trainable=True)
