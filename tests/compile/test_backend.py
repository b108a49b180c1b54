"""The backend `ba_lora`: what its pass does to a graph, and that values and gradients stay what they are."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from helpers import ba_lora as adapted
from helpers import stock, trainable
from models import tiny_gpt2, tiny_llama
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.nn import functional as F

from balora_plugin.compile import Compiled, backend, fallback, or_eagerly
from balora_plugin.compile import ba_lora as compile_backend
from balora_plugin.objective.install import without_input_hooks

LINEAR = (F.linear, torch._C._nn.linear)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """Collects (linear layers before, after, groups stacked) of every compiled graph; no inductor below."""
    from torch._dynamo.backends.debugging import aot_eager

    seen = []

    def count(module):
        nodes = [node for child in module.modules() if hasattr(child, "graph") for node in child.graph.nodes]
        return sum(node.target in LINEAR for node in nodes)

    original = backend.transform

    def transform(module):
        before = count(module)
        replaced = original(module)
        seen.append((before, count(module), replaced["stack_siblings"]))
        return replaced

    monkeypatch.setattr(backend, "transform", transform)
    monkeypatch.setattr(backend, "lower", lambda module, inputs, options: aot_eager(module, inputs))
    return seen


def run(model, ids, function=None):
    """Hidden states and gradients of one backward pass."""
    torch.manual_seed(5)
    backbone = (
        model.get_base_model().model if hasattr(model.get_base_model(), "model") else model.get_base_model().transformer
    )
    hidden = (function or (lambda ids: backbone(input_ids=ids, use_cache=False).last_hidden_state))(ids)
    for p in trainable(model):
        p.grad = None
    (hidden.double() * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
    return hidden.detach(), [p.grad.clone() for p in trainable(model)]


def compiled(model):
    backbone = model.get_base_model().base_model

    def function(ids):
        return backbone(input_ids=ids, use_cache=False).last_hidden_state

    return torch.compile(function, backend=compile_backend, fullgraph=True)


def trained(model):
    """Factors that are not at their start, where half of the gradients are zero."""
    with torch.no_grad():
        for i, p in enumerate(trainable(model)):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


def assert_equal(one, other, tolerance):
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    assert one[1]
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(b.abs().max().item(), 1.0))


def test_siblings_share_one_down_projection(graphs, ids):
    model = trained(adapted(tiny_llama().double()))
    expected = run(model, ids)
    assert_equal(run(model, ids, compiled(model)), expected, 1e-12)
    ((before, after, replaced),) = graphs
    # 7 base layers and 7 adapters of 4 products a layer; of the 14 down-projections one is left for each of 4 inputs,
    # of the 14 up-projections none: they are 7 products that accumulate
    assert before == 2 * (7 + 28)
    assert after == 2 * (7 + 4)
    assert replaced == 2 * 4


def test_stock_lora_has_siblings_too(graphs, ids):
    model = trained(stock(tiny_llama().double(), targets=["q_proj", "k_proj", "v_proj", "o_proj"]))
    expected = run(model, ids)
    assert_equal(run(model, ids, compiled(model)), expected, 1e-12)
    ((before, after, replaced),) = graphs
    # q, k and v share one down-projection, and all four up-projections accumulate
    assert (before - after, replaced) == (2 * (2 + 4), 2)


def test_gpt2(graphs, ids):
    model = trained(adapted(tiny_gpt2().double(), targets=["c_attn", "c_proj"]))
    expected = run(model, ids)
    assert_equal(run(model, ids, compiled(model)), expected, 1e-12)
    assert graphs[0][2] > 0


def test_dropout_keeps_the_layers_apart(graphs, ids):
    """Every layer drops other entries of x: only the two factors of one layer read the same."""
    model = trained(adapted(tiny_llama(), lora_dropout=0.3)).train()
    run(model, ids, compiled(model))
    ((before, after, replaced),) = graphs
    assert before - after == 2 * 7 * (1 + 2)  # and both up-projections accumulate
    assert replaced == 2 * 7
    graphs.clear()
    torch._dynamo.reset()
    run(model.eval(), ids, compiled(model))  # no dropout: the siblings are back
    assert graphs[0][2] == 2 * 4


def test_float32_adapters_on_a_bf16_base_share_their_casts(graphs, ids):
    model = trained(adapted(tiny_llama().bfloat16()))
    assert next(iter(trainable(model))).dtype == torch.float32
    expected = run(model, ids)
    found = run(model, ids, compiled(model))
    torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=2e-2)
    assert graphs[0][2] >= 2


def test_checkpointed_layers_are_reached(graphs, ids):
    model = trained(adapted(tiny_llama().double())).train()
    base = model.get_base_model()
    expected = run(model, ids)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    hooks = dict(base.get_input_embeddings()._forward_hooks)
    assert hooks  # PEFT's, which dynamo refuses in a graph
    with without_input_hooks(base):
        assert not base.get_input_embeddings()._forward_hooks
        assert_equal(run(model, ids, compiled(model)), expected, 1e-10)
    assert base.get_input_embeddings()._forward_hooks == hooks  # a pass that is not compiled may need them
    assert sum(replaced for _, _, replaced in graphs) >= 2 * 4


def test_other_layers_are_left_alone(graphs):
    """A bias, another dtype, another name, or a weight made in the graph: nothing to stack."""
    a, b = torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(4, 2, bias=False)
    biased = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(4, 2), "lora_A2": torch.nn.Linear(4, 2)})
    made = torch.nn.ParameterDict({"lora_A": torch.randn(2, 4), "frozen_A": torch.randn(2, 4)})
    x = torch.randn(3, 4)

    def function(x):
        named = F.linear(x, made["lora_A"] * 2) + F.linear(x, made["frozen_A"] * 2)
        return a(x) + b(x) + biased["lora_A"](x) + biased["lora_A2"](x) + named

    expected = function(x)
    torch.testing.assert_close(torch.compile(function, backend=compile_backend)(x), expected)
    assert [(before - after, replaced) for before, after, replaced in graphs] == [(0, 0)]


@torch.library.custom_op("balora_tests::double", mutates_args={"x"})
def double(x: torch.Tensor) -> None:
    x.mul_(2.0)


class Doubling(torch.autograd.Function):
    """Writes into its second input."""

    @staticmethod
    def forward(ctx, x, other):
        other.mul_(2.0)
        ctx.mark_dirty(other)
        return x + 1.0, other

    @staticmethod
    def backward(ctx, one, other):
        return one, 2.0 * other


class Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + 1.0

    @staticmethod
    def backward(ctx, one):
        return one


@pytest.fixture
def factors():
    torch.manual_seed(2)
    return torch.nn.ModuleDict({name: torch.nn.Linear(4, 2, bias=False) for name in ("lora_A", "frozen_A")})


def check_traps(function, x, parameters):
    """The same values, requires_grad and gradients compiled and not, by every leaf."""
    results = []
    for call in (function, torch.compile(function, backend=compile_backend, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        for p in parameters:
            p.grad = None
        value = call(leaf)
        if value.requires_grad:
            value.double().square().sum().backward()
        gradients = [None if p.grad is None else p.grad.clone() for p in (leaf, *parameters)]
        results.append((value.detach(), value.requires_grad, gradients))
    (value, differentiable, gradients), (other, other_differentiable, other_gradients) = results
    assert other_differentiable == differentiable
    torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-6)
    for found, expected in zip(other_gradients, gradients, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def doubled(x):
    x.mul_(2.0)


def doubled_through_a_view(x):
    x.view(-1)[1:].add_(1.0)


def doubled_by_an_operator(x):
    x *= 2.0


def doubled_by_an_item(x):
    x[0] = 2.0


def doubled_by_a_keyword(x):
    F.relu(x, inplace=True)


def doubled_by_a_position(x):
    F.relu(x, True)


def doubled_by_an_out(x):
    torch.add(x, 1.0, out=x)


def doubled_by_a_custom_operator(x):
    double(x)


WRITES = [value for name, value in list(globals().items()) if name.startswith("doubled")]


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_a_source_that_is_written_into_is_read_where_it_stands(write, graphs, factors):
    def function(x):
        x = x.detach() * 1.0
        with torch.no_grad():
            one = factors["lora_A"](x)
            write(x)
            return one + factors["frozen_A"](x)

    check_traps(function, torch.randn(3, 4), [])
    assert graphs[0][2] == 0


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_a_cast_that_is_written_into_is_nobodys_but_its_own(write, graphs, factors):
    def function(x):
        with torch.no_grad():
            one = x.to(torch.float32)
            two = x.to(torch.float32)
            write(one)
            return factors["lora_A"](one) + factors["frozen_A"](two)

    check_traps(function, torch.randn(3, 4).double(), [])
    assert graphs[0][2] == 0


def test_a_cast_before_and_after_its_source_is_written_into(graphs, factors):
    def function(x):
        x = x.detach() + 0
        one = x.to(torch.float32)
        x.mul_(2.0)
        return factors["lora_A"](one) + factors["frozen_A"](x.to(torch.float32))

    check_traps(function, torch.randn(3, 4).bfloat16(), list(factors.parameters()))


def test_writes_inside_a_graph_that_is_called_are_seen(graphs, factors, monkeypatch):
    monkeypatch.setattr(backend, "lower", lambda module, inputs, options: module.forward)

    def function(x, write):
        x = x * 1.0
        one = factors["lora_A"](x)
        other = Doubling.apply(one, x)[1] if write else Reading.apply(x)
        return one + factors["frozen_A"](x) + other.sum()

    for write in (True, False):
        leaf = torch.randn(3, 4, requires_grad=True)
        torch.compile(function, backend=compile_backend, fullgraph=True)(leaf, write)
    assert [replaced for _, _, replaced in graphs] == [0, 1]


def test_a_result_that_is_written_into_is_its_own(graphs, factors):
    def function(x):
        one, two = factors["lora_A"](x), factors["frozen_A"](x)
        one.mul_(2.0)
        return one + two

    check_traps(function, torch.randn(3, 4), list(factors.parameters()))
    assert graphs[0][2] == 0


def test_idle_dropout_of_what_is_written_into_stays(graphs, factors):
    """PyTorch's compiler takes its result for a copy, eager PyTorch for the input itself: here it is the compiler's."""

    def function(x):
        x = x.detach() * 1.0
        with torch.no_grad():
            one = factors["lora_A"](x)
            same = F.dropout(x, 0.5, False)
            same.mul_(2.0)
            return one + factors["frozen_A"](x) + factors["frozen_A"](same)

    x = torch.randn(3, 4)
    expected = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, backend=compile_backend, fullgraph=True)(x), expected)


@pytest.mark.parametrize("mode", ["no_grad", "autocast"])
@pytest.mark.parametrize("first", [True, False])
def test_nothing_moves_over_a_switch_of_mode(first, mode, graphs, factors):
    def inside(x):
        with torch.no_grad() if mode == "no_grad" else torch.autocast("cpu", dtype=torch.bfloat16):
            return factors["frozen_A"](x)

    def function(x):
        if first:
            return inside(x).float() * factors["lora_A"](x)
        return factors["lora_A"](x) * inside(x).float()

    check_traps(function, torch.randn(3, 4), list(factors.parameters()))
    assert graphs[0][2] == 0


def test_casts_on_both_sides_of_no_grad(graphs, factors):
    def function(x):
        with torch.no_grad():
            scale = x.to(torch.float32).abs().amax()
            frozen = factors["frozen_A"](x.to(torch.float32))
        return factors["lora_A"](x.to(torch.float32)) * frozen / scale

    check_traps(function, torch.randn(3, 4).bfloat16(), list(factors.parameters()))


def test_casts_of_others_are_left_alone(graphs):
    def function(x):
        with torch.no_grad():
            scale = x.to(torch.float32).abs().amax()
        return (x.to(torch.float32) / scale).sin().sum()

    check_traps(function, torch.randn(5).bfloat16(), [])


def test_siblings_inside_one_region_are_stacked(graphs, factors):
    """Neither the switches around them nor a write into something else keeps them apart."""

    def function(x):
        buffer = torch.zeros(2)
        with torch.autocast("cpu", enabled=False):
            one = factors["lora_A"](x.to(torch.float32))
            buffer.add_(1.0)
            x = F.relu(one + factors["frozen_A"](x.to(torch.float32)) + buffer)
        return (x * 1.0).mul_(2.0)

    check_traps(function, torch.randn(3, 4).double(), list(factors.parameters()))
    assert graphs[0][2] == 1


def test_pytorch_finds_the_backend_by_name():
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends")
    assert [entry.value for entry in entries if entry.name == "ba_lora"] == ["balora_plugin.compile:ba_lora"]
    assert "ba_lora" in torch._dynamo.list_backends()


def test_inductor_lies_underneath(ids):
    model = trained(adapted(tiny_llama(num_hidden_layers=1)))
    expected = run(model, ids)
    torch._dynamo.utils.counters.clear()
    assert_equal(run(model, ids, compiled(model)), expected, 1e-4)
    assert torch._dynamo.utils.counters["inductor"]


def test_a_failed_compilation_falls_back_once():
    said = []

    def function(x):
        torch._dynamo.graph_break()
        return x * 2

    passed = Compiled(function, lambda key, message: said.append((key, message)))
    for _ in range(2):
        assert passed(torch.ones(2)).tolist() == [2.0, 2.0]
    assert [key for key, _ in said] == ["compile"]
    assert "goes on without it" in said[0][1]


def test_too_many_graphs_are_a_failed_compilation(graphs, monkeypatch):
    """Dynamo raises no error of its own kind where a whole graph may not be compiled once more."""
    monkeypatch.setattr(fallback, "GRAPHS", 2)
    said = []
    passed = Compiled(lambda x: x * 2, lambda key, message: said.append(message))
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert torch.equal(passed(torch.ones(2, dtype=dtype)), torch.full((2,), 2.0, dtype=dtype))
    assert len(graphs) == 2
    assert len(said) == 1 and "goes on without it: it would take more than 2 graphs" in said[0]


def test_one_trainers_graphs_are_not_counted_as_anothers(graphs):
    """Dynamo counts graphs by code object: a sweep in one process would reach its limit."""

    def function(x):
        return x * 2

    limit = fallback.GRAPHS
    for _ in range(limit + 2):
        passed = Compiled(function, lambda key, message: pytest.fail(message))
        passed(torch.ones(2))
    assert len(graphs) == limit + 2


def test_a_graph_that_cannot_be_compiled_runs_eagerly(graphs, monkeypatch):
    """The ones before stay compiled, no more are; nothing is raised, so that suppress_errors hides nothing."""
    said, calls = [], []

    def lower(module, inputs, options):
        calls.append(module)
        if len(calls) == 2:
            raise RuntimeError("no compiler for this one")
        return module.forward

    monkeypatch.setattr(backend, "lower", lower)
    passed = torch.compile(lambda x: (x * x).sin(), backend=or_eagerly(said.append))
    for dtype in (torch.float32, torch.float64, torch.float16):
        x = torch.randn(3, dtype=dtype, requires_grad=True)
        passed(x).sum().backward()
        torch.testing.assert_close(x.grad, 2 * x.detach() * (x.detach() ** 2).cos())
    assert said == ["no compiler for this one"]
    assert len(calls) == 2


def test_a_result_that_leaves_the_graph_is_its_own(graphs):
    """Cut out of a stack it would require gradients, and lie in memory otherwise."""
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(4, 2, bias=False) for name in ("lora_A", "frozen_A")})
    layers["frozen_A"].requires_grad_(False)
    x = torch.randn(3, 4)
    eager = (layers["lora_A"](x), layers["frozen_A"](x))
    found = torch.compile(lambda x: (layers["lora_A"](x), layers["frozen_A"](x)), backend=compile_backend)(x)
    for one, other in zip(found, eager, strict=True):
        torch.testing.assert_close(one, other)
        assert (one.requires_grad, one.stride()) == (other.requires_grad, other.stride())


def test_a_pass_in_inductors_config_runs_too():
    from torch._inductor import config as inductor_config

    class Count(CustomGraphPass):
        graphs = 0

        def __call__(self, graph):
            Count.graphs += 1

        def uuid(self):
            return None

    with inductor_config.patch({"force_disable_caches": True, backend.HOOK: Count()}):
        torch.compile(lambda x: x * 2 + 1, backend=compile_backend)(torch.ones(3))
    assert Count.graphs == 1


def test_a_failed_backward_falls_back_too(monkeypatch):
    """AOTAutograd compiles the backward pass when it is first called: then it is too late to go on without."""
    from functorch.compile import nop
    from torch._dynamo.backends.common import aot_autograd

    def out_of_resources(module, inputs):
        raise RuntimeError("out of resources in a backward kernel")

    monkeypatch.setattr(
        backend,
        "lower",
        lambda module, inputs, options: aot_autograd(fw_compiler=nop, bw_compiler=out_of_resources)(module, inputs),
    )
    said = []
    passed = Compiled(lambda x: (x * x).sin(), lambda key, message: said.append((key, message)))
    x = torch.randn(3, requires_grad=True)
    passed(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() * (x.detach() ** 2).cos())
    assert [key for key, _ in said] == ["compile"]
    assert "out of resources" in said[0][1]


def test_inductors_backward_is_compiled_at_once(monkeypatch):
    """As above with what inductor itself calls."""
    from torch._inductor import compile_fx

    seen = []

    def inner(module, inputs, **options):
        seen.append(bool(options.get("is_backward")))
        return module.forward

    def lower(module, inputs, options):
        return compile_fx.compile_fx(module, inputs, inner_compile=inner)

    monkeypatch.setattr(backend, "lower", lower)
    passed = Compiled(lambda x: (x * x).sin(), lambda key, message: pytest.fail(message))
    x = torch.randn(3, requires_grad=True)
    passed(x)
    assert seen == [False, True]
    with torch.no_grad():  # the teacher's pass has no backward
        passed(x)
    assert seen == [False, True, False]


@pytest.fixture
def options(monkeypatch):
    seen = []
    monkeypatch.setattr(
        backend, "lower", lambda module, inputs, options: (seen.append(options or {}), module.forward)[1]
    )
    return seen


def test_a_mode_is_inductors(options):
    for mode in ("max-autotune", "reduce-overhead", "default"):
        torch._dynamo.reset()
        torch.compile(lambda x: x * 2, backend="ba_lora", mode=mode)(torch.ones(3))
        assert options.pop() == torch._inductor.list_mode_options(mode)
    assert torch._inductor.list_mode_options("max-autotune")["max_autotune"]


def test_options_are_inductors(options):
    torch.compile(lambda x: x * 2, backend="ba_lora", options={"max-autotune": True})(torch.ones(3))
    assert options == [{"max_autotune": True}]


def test_an_unknown_mode_or_setting_is_refused():
    graph = torch.fx.symbolic_trace(lambda x: x * 2)
    with pytest.raises(RuntimeError, match=r"fastest.*max-autotune"):
        compile_backend(graph, [torch.ones(3)], mode="fastest")
    with pytest.raises(TypeError, match="dynamic"):
        compile_backend(graph, [torch.ones(3)], dynamic=True)


def test_errors_of_the_function_itself_are_not_swallowed(graphs):
    """Dynamo raises them as its own: that is no reason to go on without compilation."""
    said = []

    def function(x):
        return x @ torch.ones(5, 5)

    passed = Compiled(function, lambda key, message: said.append(key))
    with pytest.raises(RuntimeError) as raised:
        passed(torch.ones(2, 3))
    assert not isinstance(raised.value, torch._dynamo.exc.TorchDynamoException)
    assert not said
    assert passed(torch.ones(2, 5)).shape == (2, 5)
    assert graphs  # still compiled
