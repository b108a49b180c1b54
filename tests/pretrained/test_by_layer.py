"""The teacher inside the student's call of each layer: the bits of two whole passes, or a pass of its own."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from forked import on_two_ranks
from helpers import TERMS, ba_lora, stock
from models import load_quantised, tiny_gpt2, tiny_llama
from multimodal import tiny_multimodal
from teacher_passes import (
    ATTENTION,
    CHECKPOINTING,
    FIRST,
    LAYERS,
    MODELS,
    adapted,
    assert_same,
    batch,
    forward,
    noisy,
    step,
    with_router,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaForSequenceClassification

from balora_plugin.memory.live import LiveBytes
from balora_plugin.objective.classification import classification_step
from balora_plugin.objective.install import install
from balora_plugin.objective.request import AnchorRows, StepRequest
from balora_plugin.pretrained.by_layer import ByLayer
from balora_plugin.pretrained.shared_layers import SharedLayers
from balora_plugin.pretrained.switch import TeacherSwitch
from balora_plugin.schedules import Lambdas

pytestmark = pytest.mark.hosts


def everywhere(name, make=ba_lora, **changes):
    """A model with an adapter on every layer."""
    return adapted(name, make, **{"layers_to_transform": None, **changes})


def by_layer_of(model):
    said = []
    found = ByLayer(model.get_base_model(), say=said.append)
    return found, said


def assert_by_layer(model, times=3, **more):
    """All micro-batches are those of a whole teacher, all but the first, which proves it, by layer."""
    whole = step(model, **more)
    assert whole["consistency"] > 0
    found, said = by_layer_of(model)
    for passes in range(times):
        assert_same(step(model, by_layer=found, **more), whole)
        assert (found.why, found.passes, said) == ("", passes, [])
    return found


@pytest.mark.parametrize("name", list(MODELS))
def test_the_terms_and_gradients_are_those_of_two_whole_passes(name):
    """Hybrids and sliding windows have masks by layer, Gemma 3n and 4 layers that read the keys of lower ones."""
    assert_by_layer(everywhere(name, lora_dropout=0.2))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    model = ba_lora(load_quantised(tmp_path, kind), targets=ATTENTION, regularizers=TERMS)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    install(model.get_base_model())
    assert_by_layer(model.train())


def test_a_router_balances_the_students_logits_alone():
    assert_by_layer(with_router(everywhere("mixtral")))


def test_dropout_of_the_models_own_and_noise_are_the_students_as_before():
    model = ba_lora(tiny_gpt2(n_layer=LAYERS), targets=["c_attn"], regularizers=TERMS)
    install(model.get_base_model())
    assert_by_layer(model.train())
    assert_by_layer(noisy(everywhere("llama")))


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*(embed_tokens|[qv]_proj)"},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [5, 6]},
    ],
    ids=["embedding_adapter", "modules_to_save", "new_tokens"],
)
def test_what_is_adapted_beside_the_layers_is_the_teachers_own(changes):
    assert_by_layer(everywhere("llama", stock, **changes))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("how", [None, *CHECKPOINTING])
def test_with_checkpointing_and_packing(how, packed):
    model = everywhere("llama", lora_dropout=0.2)
    if how:
        model.get_base_model().gradient_checkpointing_enable(CHECKPOINTING[how])
        model.enable_input_require_grads()
    assert_by_layer(model, **batch(packed))
    checkpointed = [layer.gradient_checkpointing for layer in model.get_base_model().model.layers]
    assert checkpointed == [bool(how)] * LAYERS  # as before the proof, which computes nothing again


@pytest.mark.parametrize("how", CHECKPOINTING)
def test_a_recomputed_layer_runs_no_teacher(how):
    model = everywhere("llama")
    model.enable_input_require_grads()
    model.get_base_model().gradient_checkpointing_enable(CHECKPOINTING[how])
    calls = []
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_pre_hook(lambda mlp, _: calls.append(mlp.training))
    found, _ = by_layer_of(model)
    step(model, by_layer=found)
    calls.clear()
    out = forward(model, by_layer=found)
    assert calls == [False, True] * LAYERS  # each layer: the teacher, then the student
    calls.clear()
    out.loss.backward()
    assert calls == [True] * LAYERS


def test_anchors_are_the_students_alone():
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    counted = torch.ones_like(ids, dtype=torch.bool)
    states = torch.randn(int(counted.sum()), 32, generator=torch.Generator().manual_seed(2))
    assert_by_layer(everywhere("llama"), anchors=AnchorRows(ids, counted, states, 0.7, 40, 2))


def test_together_with_layers_that_are_computed_once():
    model = adapted("llama")
    whole = step(model)
    shared, (found, _) = SharedLayers(model.get_base_model()), by_layer_of(model)
    calls = []
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_pre_hook(lambda mlp, _: calls.append(mlp.training))
    for passes in range(3):
        calls.clear()
        assert_same(step(model, shared, by_layer=found), whole)
        assert (shared.passes, found.passes) == (passes, passes)
    assert calls == [False] * FIRST + [False, True] * (LAYERS - FIRST)
    layers = list(model.get_base_model().model.layers)
    weights = sum(p.numel() * p.element_size() for layer in layers[FIRST:] for p in layer.parameters())
    assert found.bytes_once == 2 * weights


class Kept:
    """Bytes of the storages that the graph keeps for its backward pass, each once."""

    def __init__(self):
        self.storages = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = (storage, storage.nbytes())  # held, so that no other takes its place
        return tensor

    def bytes(self):
        return sum(size for _, size in self.storages.values())


@pytest.mark.parametrize("how", [None, "not_reentrant"])
def test_no_more_is_kept_for_the_backward_pass(how):
    model = everywhere("llama")
    if how:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable(CHECKPOINTING[how])
    found, _ = by_layer_of(model)
    step(model, by_layer=found)
    sizes, longer = [], {key: value.repeat(1, 6) for key, value in batch().items()}
    for way in (None, found):
        kept = Kept()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            forward(model, by_layer=way, **longer)
        with LiveBytes() as live:
            out = forward(model, by_layer=way, **longer)
        # without checkpointing all activations live when the teacher's norm follows, which takes a moment's more
        sizes.append((len(kept.storages), kept.bytes(), live.now, live.peak if how else None))
        del out
    assert found.passes == 2
    assert sizes[0] == sizes[1]
    assert sizes[0][1] > 0


def test_a_classifier_too():
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_llama(num_hidden_layers=LAYERS).config)
    model = ba_lora(model, targets=ATTENTION, task_type="SEQ_CLS", regularizers=TERMS)
    base = model.get_base_model()
    install(base, classification_step)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    by_layer, _ = by_layer_of(model)
    inputs = {"input_ids": batch()["input_ids"], "labels": torch.tensor([0, 1])}
    found = []
    for way in (None, by_layer, by_layer):
        request = StepRequest(TERMS.resolved("nlu"), Lambdas(0.5, 0.02, 0.02), switch=TeacherSwitch(base), by_layer=way)
        model.zero_grad()
        out = model.train()(**inputs, ba_lora=request)
        out.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": out.loss.detach(), "consistency": out.consistency, **gradients})
    assert found[0]["consistency"] > 0
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
    assert (by_layer.passes, by_layer.why) == (1, "")


def test_evaluation_proves_nothing_and_uses_what_is_proven():
    model = everywhere("llama").eval()
    found, _ = by_layer_of(model)
    with torch.no_grad():
        whole = forward(model)
        forward(model, by_layer=found)
    assert not found.proven
    step(model.train(), by_layer=found)
    with torch.no_grad():
        again = forward(model.eval(), by_layer=found)
    assert found.passes == 1
    assert torch.equal(again.loss, whole.loss)


def test_layers_are_their_own_again_after_a_pass_that_fails():
    model = everywhere("llama")
    found, _ = by_layer_of(model)
    step(model, by_layer=found)
    layers = list(model.get_base_model().model.layers)
    failing = layers[FIRST].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(model, by_layer=found)
    failing.remove()
    assert list(model.get_base_model().model.layers) == layers
    assert not any("forward" in vars(layer) for layer in layers)
    assert_same(step(model, by_layer=found), step(model))


def remembers(model):
    """Layers that exchange a state beside their arguments: each adds what the one below left in its place."""
    left = {}
    layers = list(model.get_base_model().model.layers)

    def exchange(index, mlp, args, out):
        out = out if index == 0 else out + left[index - 1]
        left[index] = 0.1 * out.detach()
        return out

    for index, layer in enumerate(layers):
        layer.mlp.register_forward_hook(partial(exchange, index))
    return model


def between(model):
    """A model that changes its states between two layers, as Qwen3-VL adds images to them."""
    inner = model.get_base_model().model

    class Changing(torch.nn.ModuleList):
        def __getitem__(self, index):
            found = super().__getitem__(index)
            return [_doubled(layer) for layer in found] if isinstance(index, slice) else found

    def _doubled(layer):
        return lambda states, **kwargs: layer(states * 1.5, **kwargs)

    inner.layers.__class__ = Changing
    return model


def draws(model):
    """A layer that draws random numbers, in the teacher's eval mode too."""
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.register_forward_hook(lambda module, args, out: out + 0.0 * torch.rand_like(out))
    return model


def hooked(model):
    """A hook on a layer's call itself, which the teacher inside it goes past."""
    layer = model.get_base_model().model.layers[1]
    layer.register_forward_hook(lambda module, args, out: out * 1.5)
    return model


def selective(model):
    keywords = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), nullcontext())}
    model.get_base_model().gradient_checkpointing_enable(keywords)
    return model


def gives_more(model):
    layer = model.get_base_model().model.layers[1]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: Pair([own(*args, **kwargs), torch.zeros(())])
    after = model.get_base_model().model.layers[2]
    after.register_forward_pre_hook(lambda module, args: (args[0][0], *args[1:]))
    return model


class Pair(tuple):
    __slots__ = ()


REFUSED = {
    "state": (remembers, "the teacher's states are others inside the student's pass"),
    "between": (between, "changes its states between two layers"),
    "random": (draws, "draws random numbers"),
    "hook": (hooked, "the teacher's states are others inside the student's pass"),
    "selective": (selective, "selective checkpointing"),
    "more": (gives_more, "more than their states"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_has_a_pass_of_its_own_and_one_line(case):
    change, why = REFUSED[case]
    model = change(everywhere("llama"))
    whole = step(model)
    found, said = by_layer_of(model)
    for _ in range(2):
        assert_same(step(model, by_layer=found), whole)
    assert found.passes == 0
    assert why in found.why
    assert said == [found.why]


def test_a_leak_is_seen_at_the_first_step_where_student_and_teacher_are_one():
    model = ba_lora(tiny_llama(num_hidden_layers=LAYERS), regularizers=TERMS)
    install(model.get_base_model())
    remembers(model.train())
    found, _ = by_layer_of(model)
    assert step(model, by_layer=found)["consistency"] == 0
    assert "others inside the student's pass" in found.why


def test_a_hook_that_comes_later_ends_it():
    model = everywhere("llama")
    found, said = by_layer_of(model)
    for _ in range(2):
        step(model, by_layer=found)
    hooked(model)
    assert_same(step(model, by_layer=found), step(model))
    assert (found.passes, said) == (1, ["a hook has come to a layer, or gone"])


def test_a_layer_that_the_student_leaves_out_costs_a_whole_pass():
    model = everywhere("llama")
    inner = model.get_base_model().model
    expected = teacher_states(model)
    for skipped, why in ((1, "in another order"), (LAYERS - 1, "left a layer out")):
        found, said = by_layer_of(model)
        step(model, by_layer=found)
        assert found.begin(lambda: teacher_states(model), lambda: None)
        with found.student():
            inner.layers[skipped].forward = lambda states, **kwargs: states
            inner(input_ids=batch()["input_ids"], use_cache=False)
        assert torch.equal(found.end(lambda: teacher_states(model)), expected)
        assert why in said[0]


def teacher_states(model):
    base = model.get_base_model()
    with TeacherSwitch(base).off():
        return base.model(input_ids=batch()["input_ids"], use_cache=False).last_hidden_state


@pytest.mark.parametrize("proven", [False, True])
def test_a_teacher_that_runs_out_of_memory_leaves_nothing_behind(proven):
    """A host tries a smaller batch then."""
    model = adapted("llama")
    by_layer, norm = ByLayer(model.get_base_model()), model.get_base_model().model.norm
    if proven:
        step(model, by_layer=by_layer)
    passes = []

    def full(*_):
        passes.append(1)
        if len(passes) == (1 if proven else 3):  # of the proof the pass that goes by the layers is the third
            raise torch.OutOfMemoryError

    handle = norm.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        step(model, by_layer=by_layer)
    handle.remove()
    assert by_layer._walk is None
    step(model, by_layer=by_layer)
    assert (by_layer.passes, by_layer.why) == (1 if proven else 0, "")


def test_inference_mode_counts_no_writes():
    model = adapted("llama")
    by_layer = ByLayer(model.get_base_model())
    step(model, by_layer=by_layer)
    model.eval()
    with torch.inference_mode():
        found, expected = forward(model, by_layer=by_layer), forward(model)
    assert torch.equal(found.loss, expected.loss) and by_layer.passes == 1


def test_several_processes_stop_rather_than_wait_for_each_other(monkeypatch):
    model = everywhere("llama")
    found, _ = by_layer_of(model)
    step(model, by_layer=found)
    monkeypatch.setattr("balora_plugin.pretrained.by_layer.world_size", lambda: 2)
    between(model)
    with pytest.raises(
        RuntimeError, match=r"changes its states between two layers in this batch.*teacher_pass: shared"
    ):
        step(model, by_layer=found)


def test_a_multimodal_model_has_a_pass_of_its_own():
    found = ByLayer(tiny_multimodal("gemma3"))
    assert "towers" in found.why


def gathering():
    """Counts bytes that are gathered, in a list of one number."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # torch's own rename
    gathered, original = [0], getattr(dist, name)

    def counted(output, *args, **kwargs):
        gathered[0] += output.numel() * output.element_size()
        return original(output, *args, **kwargs)

    setattr(dist, name, counted)
    return gathered


def sharded_steps(rank, how, dtype):
    """Two micro-batches of each rank's own rows under FSDP2, by each way: sums, gradients, bytes of the second."""
    gathered = gathering()
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=dtype) if dtype else MixedPrecisionPolicy()
    found = {}
    for way in ("whole", "shared", "by_layer", "both"):
        model = adapted("llama", layers_to_transform=[FIRST, LAYERS - 1] if way in ("shared", "both") else None)
        if how:
            model.get_base_model().gradient_checkpointing_enable(CHECKPOINTING[how])
            model.enable_input_require_grads()
        shared = SharedLayers(model.get_base_model()) if way in ("shared", "both") else None
        by_layer = ByLayer(model.get_base_model()) if way in ("by_layer", "both") else None
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        inputs = {key: value.roll(rank, 1) for key, value in batch().items()}
        for _ in range(2):
            gathered[0] = 0
            values = step(model, shared, by_layer=by_layer, **inputs)
        values = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in values.items()}
        found[way] = (values, gathered[0], by_layer and by_layer.why)
    return found


@pytest.mark.parametrize(
    ("how", "dtype"), [(None, None), pytest.param("not_reentrant", torch.bfloat16, marks=pytest.mark.long)]
)
def test_two_ranks_of_fsdp2_gather_a_quarter_less(how, dtype, tmp_path):
    for found in on_two_ranks(tmp_path, sharded_steps, how, dtype):
        assert found["by_layer"][2] == found["both"][2] == ""
        for way, other in (("by_layer", "whole"), ("both", "shared")):
            assert_same(found[way][0], found[other][0])
        assert found["by_layer"][1] <= 0.75 * found["whole"][1]
        assert found["both"][1] < found["shared"][1]
