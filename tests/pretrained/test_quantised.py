"""bitsandbytes bases, 4-bit and 8-bit: exact, trained as a dequantised model would be, started from either weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import assert_stored_weights, ba_lora, logits, quantised_layers, stored_weights, train, trainable
from models import QUANTISED, load_quantised, tiny_gpt2, tiny_llama
from peft import PeftModel
from safetensors.torch import load_file, save_file

from balora_plugin import BaLoraConfig, BaLoraModel
from balora_plugin.adapter.delta import delta_layers_of
from balora_plugin.adapter.start import full_precision as source
from balora_plugin.pretrained.switch import TeacherSwitch

pytestmark = pytest.mark.hosts

bitsandbytes = pytest.importorskip("bitsandbytes")

LAYERS = {"llama": 14, "gpt2": 8}


def full_precision(name):
    if name == "llama":
        return tiny_llama(hidden_size=64, intermediate_size=128)
    return tiny_gpt2(n_embd=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of full-precision models."""
    path = tmp_path_factory.mktemp("bases")
    for name in LAYERS:
        full_precision(name).save_pretrained(path / name)
    return path


@pytest.fixture
def quantise(bases):
    """Builds a truly quantised model, again and again from the same files, in training mode."""

    def build(kind="nf4_double", name="llama", **changes):
        model = load_quantised(bases / name, kind, **changes)
        if not changes:
            assert len(quantised_layers(model)) == LAYERS[name]
        return model

    return build


def best(weight, rank=4):
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def started(model):
    """s B0 A0 of every layer, with s = 1."""
    return {
        name: layer.frozen_B["default"].weight.detach() @ layer.frozen_A["default"].weight.detach()
        for name, layer in delta_layers_of(model)
    }


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", QUANTISED)
def test_exact_over_a_quantised_base(kind, name, quantise, ids, tmp_path):
    base = quantise(kind, name)
    floats = quantise(kind, name).dequantize()
    floats = {key: m.weight.detach() for key, m in floats.named_modules() if isinstance(m, torch.nn.Linear)}
    before, bytes_before = logits(base, ids), stored_weights(base)
    model = ba_lora(base).train()
    targets = delta_layers_of(model)
    assert len(targets) == LAYERS[name]
    kinds = {type(layer.get_base_layer()).__name__ for _, layer in targets}
    assert kinds == {"Linear8bitLt" if kind == "int8" else "Linear4bit"}
    for key, update in started(model).items():
        torch.testing.assert_close(update, best(floats[key]), rtol=1e-3, atol=1e-5)
    assert torch.equal(logits(model, ids), before)  # step 0
    losses = train(model, ids, steps=4)
    assert losses[-1] < losses[0]
    with TeacherSwitch(model).off():
        assert torch.equal(model(input_ids=ids).logits, before)  # and after any step
    assert_stored_weights(model, bytes_before)
    expected = logits(model, ids)
    assert (expected - before).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(quantise(kind, name), tmp_path / "adapter").train()
    torch.testing.assert_close(logits(plain, ids), expected, rtol=0, atol=1e-5)
    ours = BaLoraModel.from_pretrained(quantise(kind, name), tmp_path / "adapter", is_trainable=True).train()
    assert torch.equal(logits(ours, ids), expected)
    # merging into the dequantised base gives the trained model (into the quantised one it would round the update away)
    merged = BaLoraModel.from_pretrained(quantise(kind, name).dequantize(), tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(merged.eval(), ids), expected, rtol=0, atol=1e-5)


def gradients(model, ids):
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    found = [p.grad.clone() for p in trainable(model)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", QUANTISED)
def test_gradients_are_those_of_the_dequantised_model_after_evaluations_too(kind, quantise, ids):
    """In eval mode bitsandbytes repacks 4-bit weights of a CPU; ours must not, whoever calls model.eval()."""
    model = ba_lora(quantise(kind))
    reference = ba_lora(quantise(kind).dequantize())
    reference.load_state_dict(  # a start of its own would differ by rounding
        {k: v for k, v in model.state_dict().items() if "lora_" in k or "frozen_" in k}, strict=False
    )
    train(model, ids, steps=2)
    train(reference, ids, steps=2)
    expected = gradients(reference, ids)
    for _ in range(2):
        for got, want in zip(gradients(model, ids), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)
            model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)


def can_repack():
    return getattr(bitsandbytes.nn.Linear4bit(64, 64), "support_avx512bf16_for_cpu", False)


@pytest.mark.skipif(not can_repack(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 alone")
def test_a_base_that_was_repacked_is_refused(quantise, ids):
    base = quantise().eval()
    logits(base, ids)
    base.train()
    with pytest.raises(
        ValueError,
        match=r"^model.layers.0.self_attn.q_proj is a 4-bit layer that has run in eval",
    ):
        ba_lora(base)
    assert not any("lora" in name for name, _ in base.named_modules())  # as it was


def test_a_base_that_has_run_can_still_be_wrapped(quantise, ids):
    """Trainers run a model before they wrap it; PEFT's own dequantisation then breaks an int8 layer."""
    for kind in ("int8", "nf4_double"):
        base = quantise(kind)
        before = logits(base, ids)
        model = ba_lora(base).train()
        assert torch.equal(logits(model, ids), before)
        fresh = started(ba_lora(quantise(kind)))
        assert all(torch.equal(update, fresh[key]) for key, update in started(model).items())


# --- A0, B0 from the full-precision weights


def layouts(bases, tmp_path, name):
    """The same full-precision model, in the forms it may be stored in."""
    whole = shutil.copytree(bases / name, tmp_path / "whole")  # not the path that the adapter's file names as its base
    full_precision(name).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    (full_precision(name).base_model).save_pretrained(tmp_path / "backbone")  # no "model." before the names
    full_precision(name).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    return {
        "directory": whole,
        "file": whole / "model.safetensors",
        "sharded": tmp_path / "sharded",
        "backbone": tmp_path / "backbone",
        "half": tmp_path / "half",
    }


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", ["directory", "file", "sharded", "backbone", "half"])
def test_a_start_from_the_full_precision_weights(layout, name, bases, quantise, ids, tmp_path, monkeypatch):
    place = layouts(bases, tmp_path, name)[layout]
    read = []

    class Counting:
        def __init__(self, file, **options):
            self.opened = source_open(file, **options)

        def __enter__(self):
            self.inner = self.opened.__enter__()
            return self

        def __exit__(self, *details):
            return self.opened.__exit__(*details)

        def keys(self):
            return self.inner.keys()

        def get_tensor(self, key):
            read.append(key)
            return self.inner.get_tensor(key)

    source_open = source.safe_open
    monkeypatch.setattr(source, "safe_open", Counting)
    kind = "int8" if layout == "file" else "nf4_double"
    base = quantise(kind, name)
    before = logits(base, ids)
    model = ba_lora(base, start_from=place).train()
    assert len(read) == len(set(read)) == LAYERS[name]  # the targets' weights, once each; never the embedding
    assert torch.equal(logits(model, ids), before)  # the base is the quantised one
    floats = dict(full_precision(name).named_modules())
    for key, update in started(model).items():
        weight = floats[key].weight.detach()
        weight = weight.T if name == "gpt2" else weight
        weight = weight.to(torch.bfloat16) if layout == "half" else weight
        torch.testing.assert_close(update, best(weight), rtol=1e-3, atol=1e-5)
    own = started(ba_lora(quantise(kind, name)))
    assert all((update - own[key]).norm() > 1e-3 * update.norm() for key, update in started(model).items())
    losses = train(model, ids, steps=4)
    assert losses[-1] < losses[0]
    with TeacherSwitch(model).off():
        assert torch.equal(model(input_ids=ids).logits, before)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        assert str(place).encode() not in file.read_bytes()  # a path of this machine is nobody else's business
    ours = BaLoraModel.from_pretrained(quantise(kind, name), tmp_path / "adapter", is_trainable=True).train()
    assert ours.peft_config["default"].start_from is None
    assert torch.equal(logits(ours, ids), expected)
    plain = PeftModel.from_pretrained(quantise(kind, name), tmp_path / "adapter").train()
    torch.testing.assert_close(logits(plain, ids), expected, rtol=0, atol=1e-5)


def test_layers_that_stay_unquantised_keep_their_own_weights(bases, quantise):
    model = ba_lora(quantise(llm_int8_skip_modules=["lm_head", "down_proj"]), start_from=bases / "llama")
    assert len(quantised_layers(model)) == 12
    floats = dict(full_precision("llama").named_modules())
    for key, update in started(model).items():
        torch.testing.assert_close(update, best(floats[key].weight.detach()), rtol=1e-3, atol=1e-5)


def changed(bases, tmp_path, change):
    """A copy of the full-precision Llama whose tensors went through `change`."""
    shutil.copytree(bases / "llama", tmp_path / "changed")
    tensors = load_file(tmp_path / "changed" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    return tmp_path / "changed"


Q = "model.layers.1.self_attn.q_proj.weight"


def drop(tensors):
    del tensors[Q]


def cut(tensors):
    tensors[Q] = tensors[Q][:, :-1].contiguous()


def foreign(tensors):
    tensors[Q] = tensors[Q].flip(0)


def packed(tensors):
    tensors[Q] = tensors[Q].to(torch.int8)


def poisoned(tensors):
    tensors[Q][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"^start_from=.* has no weight for model.layers.1.self_attn.q_proj \(1 of 14 quantised layers\)"),
        (cut, r"q_proj.weight is \(64, 63\), but this layer is \(64, 64\)"),
        (
            foreign,
            r"^model.layers.1.self_attn.q_proj: .* no full-precision version .* they differ by 1\.\d\d",
        ),
        (packed, "is torch.int8, itself quantised"),
        (poisoned, "holds NaN or inf"),
    ],
)
def test_weights_of_another_model_are_refused(change, message, bases, quantise, tmp_path):
    place = changed(bases, tmp_path, change)
    with pytest.raises(ValueError, match=r"start_from=.*changed") as caught:
        ba_lora(quantise(), start_from=place)
    caught.match(message)


def test_places_that_cannot_be_read_are_refused(bases, quantise, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "old").mkdir()
    torch.save({}, tmp_path / "old" / "pytorch_model.bin")
    full_precision("llama").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    outside = tmp_path / "sharded" / source.INDEX
    index = json.loads(outside.read_text())
    shard = next(iter(index["weight_map"].values()))
    for place, message in (
        (tmp_path / "empty", "holds neither model.safetensors nor model.safetensors.index.json"),
        (tmp_path / "old", "holds neither model.safetensors"),
        (tmp_path / "old" / "pytorch_model.bin", "is not a .safetensors file"),
        (tmp_path / "nowhere", "is no directory here, and not found on the hub"),
        ("some-org/some-model", "is no directory here, and"),
    ):
        with pytest.raises(ValueError, match="start_from=") as caught:
            ba_lora(quantise(), start_from=place)
        caught.match(message)
    (tmp_path / "sharded" / shard).rename(tmp_path / shard)
    with pytest.raises(ValueError, match=f"lacks {shard}"):
        ba_lora(quantise(), start_from=tmp_path / "sharded")
    index["weight_map"] = dict.fromkeys(index["weight_map"], f"../{shard}")
    outside.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no file beside it"):
        ba_lora(quantise(), start_from=tmp_path / "sharded")


def test_settings_that_contradict_a_full_precision_start(bases, llama):
    with pytest.raises(ValueError, match="no targeted layer is quantised"):
        ba_lora(llama, start_from=bases / "llama")
    with pytest.raises(ValueError, match=r"start_from=.*init_lora_weights=True"):
        BaLoraConfig(init_lora_weights=True, start_from="x")
    with pytest.raises(TypeError, match="start_from=3"):
        BaLoraConfig(start_from=3)
    with pytest.raises(ValueError, match="start_from="):
        BaLoraConfig(start_from=" ")
