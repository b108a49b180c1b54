"""The graph passes one by one: the nodes before and after, values and gradients, and where each declines."""

from __future__ import annotations

import operator

import pytest
import torch
from helpers import ba_lora, stock, trainable
from models import VOCABULARY, tiny_llama
from peft import LoraConfig
from torch.nn import functional as F

from balora_plugin.compile import ba_lora as compile_backend
from balora_plugin.compile import backend
from balora_plugin.compile.inductor import NarrowProducts
from balora_plugin.compile.narrow import narrow_products

pytestmark = pytest.mark.hosts

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def passes(monkeypatch):
    """What every pass replaced, summed over the graphs; below lies AOTAutograd with our pass on aten, no inductor."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    counts = {}
    original = backend.transform

    def transform(module):
        found = original(module)
        for name, count in found.items():
            counts[name] = counts.get(name, 0) + count
        return found

    def narrow(module, inputs):
        counts["narrow_products"] = counts.get("narrow_products", 0) + narrow_products(module.graph)
        module.recompile()
        return module.forward

    def lower(module, inputs, options):
        return aot_autograd(fw_compiler=narrow, bw_compiler=narrow, decompositions=select_decomp_table())(
            module, inputs
        )

    monkeypatch.setattr(backend, "transform", transform)
    monkeypatch.setattr(backend, "lower", lower)
    return counts


def check(function, inputs, parameters, tolerance=1e-12):
    """Values and gradients by every leaf, compiled as one graph and not."""
    results = []
    for call in (function, torch.compile(function, backend=compile_backend, fullgraph=True)):
        leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        for p in parameters:
            p.grad = None
        value = call(*leaves)
        weights = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view_as(value)
        (value.double() * weights).sum().backward()
        results.append((value.detach(), [x.grad for x in leaves if x.requires_grad] + [p.grad for p in parameters]))
    (value, gradients), (other, others) = results
    torch.testing.assert_close(other, value, rtol=tolerance, atol=tolerance)
    for found, expected in zip(others, gradients, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def model_of(name):
    """A tiny backbone of an architecture, float64."""
    import transformers as t

    makers = {
        "llama": lambda: t.LlamaConfig(**GROUPED),
        "mistral": lambda: t.MistralConfig(**GROUPED, sliding_window=4),
        "gemma": lambda: t.GemmaConfig(**GROUPED),
        "qwen2": lambda: t.Qwen2Config(**SMALL, num_key_value_heads=2),
        "gpt2": lambda: t.GPT2Config(n_embd=32, n_layer=1, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
        "bert": lambda: t.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    }
    config = makers[name]()
    config.vocab_size, config.pad_token_id = VOCABULARY, 0
    torch.manual_seed(1)
    return t.AutoModel.from_config(config).double()


TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "bert": ["query", "key", "value", "dense"]}
LLAMA_LIKE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# stacked groups, accumulated updates and narrowed gradients of a layer (BERT: and of the pooler, which gets none)
# Gemma: dynamo asks the backend a second time, when it finds that a float of the graph is a constant
EXPECTED = {"gpt2": (4, 4, 8), "bert": (5, 7, 10), "gemma": (8, 14, 11)}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma", "qwen2", "gpt2", "bert"])
def test_every_architecture_is_one_graph_with_the_same_numbers(name, passes):
    from balora_plugin import BaLoraConfig, get_ba_lora_model

    model = get_ba_lora_model(
        model_of(name), BaLoraConfig(r=4, lora_alpha=8, target_modules=TARGETS.get(name, LLAMA_LIKE))
    ).train()
    with torch.no_grad():
        for i, p in enumerate(trainable(model)):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    keywords = {} if name == "bert" else {"use_cache": False}
    parameters = [p for p, n in zip(trainable(model), _names(model), strict=True) if "pooler" not in n]
    if hasattr(model.get_base_model(), "norm"):  # RMSNorm computes in float32, which would round differences away
        model.get_base_model().norm = torch.nn.Identity()
    check(lambda x: model.get_base_model()(input_ids=x, **keywords).last_hidden_state, [ids], parameters, 1e-12)
    names = ("stack_siblings", "accumulate_products", "narrow_products")
    assert tuple(passes[key] for key in names) == EXPECTED.get(name, (4, 7, 11))


def test_scales_that_differ_from_layer_to_layer_accumulate_too(passes):
    """Layers that share a graph: dynamo makes their scale an input of it, no constant."""
    layers = torch.nn.ModuleDict(
        {"frozen_B": torch.nn.Linear(4, 6, bias=False), "lora_B": torch.nn.Linear(4, 6, bias=False)}
    ).double()

    def function(y, u, v, scale):
        return y + (layers["frozen_B"](u) + layers["lora_B"](v)) * scale

    compiled = torch.compile(function, backend=compile_backend, fullgraph=True)
    inputs = [torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True) for n in (6, 4, 4)]
    leaves = [*inputs, *layers.parameters()]
    for scale in (0.5, 0.25, 3.0):
        values = [call(*inputs, scale) for call in (compiled, function)]
        torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
        weights = torch.randn_like(values[0])
        for one, other in zip(*(torch.autograd.grad((v * weights).sum(), leaves) for v in values), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert passes["accumulate_products"] == 2  # the constant's graph, and the one for all others


def others():
    """PEFT's adapters whose layers look like ours in part, on q and k of a tiny Llama."""
    import peft

    both = {"target_modules": ["q_proj", "k_proj"]}
    return {
        "lora with a bias": peft.LoraConfig(r=4, lora_bias=True, **both),
        "rslora": peft.LoraConfig(r=4, use_rslora=True, **both),
        "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2, **both),
        "vera": peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
        "ia3": peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }


@pytest.mark.parametrize("name", others())
def test_other_adapters_keep_their_numbers(name, passes, ids):
    """Whatever of them a pass takes for a factor, or leaves alone."""
    from peft import get_peft_model

    model = get_peft_model(tiny_llama(num_hidden_layers=1).double(), others()[name]).double()
    with torch.no_grad():
        for p in trainable(model):
            p.add_(0.05 * torch.randn_like(p))
    backbone = model.get_base_model().model
    check(lambda x: backbone(input_ids=x, use_cache=False).last_hidden_state, [ids], trainable(model), 1e-10)


def test_two_active_adapters(passes, ids):
    model = ba_lora(tiny_llama(num_hidden_layers=1).double())
    targets = ["q_proj", "v_proj", "down_proj"]
    model.add_adapter("second", LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    model = model.double()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    backbone = model.get_base_model().model
    check(lambda x: backbone(input_ids=x, use_cache=False).last_hidden_state, [ids], trainable(model), 1e-10)
    assert passes["stack_siblings"] >= 4


def _names(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_stock_lora_accumulates_too(passes, ids):
    model = stock(tiny_llama().double(), targets=["q_proj", "v_proj"])
    with torch.no_grad():
        for p in trainable(model):
            p.add_(0.05)
    backbone = model.get_base_model().model
    check(lambda x: backbone(input_ids=x, use_cache=False).last_hidden_state, [ids], trainable(model))
    assert (passes["stack_siblings"], passes["accumulate_products"]) == (2, 4)
    assert passes["narrow_products"] == 0  # nothing is frozen


# --- up-projections


class Layer(torch.nn.Module):
    """The delta form by hand; `change` stands in the place of the plain sum."""

    def __init__(self, change=None, scale=0.5, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(2)
        self.lora_A, self.frozen_A = (torch.nn.Linear(6, 2, bias=False, dtype=dtype) for _ in range(2))
        self.lora_B, self.frozen_B = (torch.nn.Linear(2, 5, bias=False, dtype=dtype) for _ in range(2))
        self.frozen_A.requires_grad_(False)
        self.frozen_B.requires_grad_(False)
        self.change, self.scale = change, scale

    def forward(self, x, base):
        u = self.lora_A(x)
        one, two = self.frozen_B(u), self.lora_B(self.frozen_A(x) + u)
        if self.change is not None:
            return self.change(self, base, one, two)
        return base + (one + two) * self.scale


def an_update_that_is_read_again(layer, base, one, two):
    update = (one + two) * layer.scale
    return base + update + update.sum()


def a_product_that_is_read_again(layer, base, one, two):
    return base + (one + two) * layer.scale + one.mean()


def a_base_that_broadcasts(layer, base, one, two):
    return base[:1] + (one + two) * layer.scale


def a_scale_that_is_a_tensor(layer, base, one, two):
    return base + (one + two) * base.mean()


def a_base_that_is_written_into(layer, base, one, two):
    base = base * 1.0
    result = base + (one + two) * layer.scale
    base.mul_(2.0)
    return result + base


def a_switch_of_grad_mode_in_between(layer, base, one, two):
    with torch.no_grad():
        update = (one + two) * layer.scale
    return base + update


def a_product_the_other_way_round(layer, base, one, two):
    return base + (two + one) * layer.scale


DECLINED = [value for name, value in list(globals().items()) if name.startswith("a_")]


@pytest.mark.parametrize("change", DECLINED, ids=lambda f: f.__name__)
def test_no_accumulation_where_the_pattern_does_not_hold(change, passes):
    layer = Layer(change)
    x, base = torch.randn(3, 4, 6).double().requires_grad_(), torch.randn(3, 4, 5).double().requires_grad_()
    check(layer, [x, base], list(layer.parameters()))
    assert passes["accumulate_products"] == 0


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("scale", [1.0, 2, -0.3])
def test_accumulation_of_any_shape_and_scale(shape, scale, passes):
    layer = Layer(scale=scale)
    x = torch.randn(*shape, 6).double().requires_grad_()
    base = torch.randn(*shape, 5).double().requires_grad_()
    check(layer, [x, base], list(layer.parameters()))
    assert passes["accumulate_products"] == 1
    assert passes["narrow_products"] == 2


def test_accumulation_widens_as_the_sum_did(passes):
    """float32 adapters on a bfloat16 base: the sum is float32."""
    layer = Layer(dtype=torch.float32)
    x, base = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 5).bfloat16().requires_grad_()
    check(layer, [x, base], list(layer.parameters()), 1e-6)
    assert passes["accumulate_products"] == 1


def test_lengths_that_vary_stay_one_graph(passes):
    layer = Layer()
    compiled = torch.compile(layer, backend=compile_backend, fullgraph=True)
    for length in (3, 5, 7, 9):
        x, base = torch.randn(2, length, 6).double(), torch.randn(2, length, 5).double()
        torch.testing.assert_close(compiled(x, base), layer(x, base), rtol=1e-12, atol=1e-12)
    assert passes["accumulate_products"] == 2  # static once, then dynamic


# --- casts


def casts_left(module):
    return sum(node.target in ("to", "float") for node in module.graph.nodes)


@pytest.mark.parametrize(
    "cast",
    [lambda x: x.to(torch.float32), lambda x: x.to(dtype=torch.float32), lambda x: x.float()],
    ids=["position", "keyword", "name"],
)
def test_repeated_casts_are_one(cast, passes):
    """PEFT writes them by position in one release, by keyword in another."""
    layer = Layer(dtype=torch.float32)
    x = torch.randn(3, 6).double().requires_grad_()
    check(lambda x: layer.lora_A(cast(x)) + layer.frozen_A(cast(x)), [x], [layer.lora_A.weight], 1e-6)
    assert (passes["share_casts"], passes["stack_siblings"]) == (1, 1)


def test_a_cast_to_what_it_is_already_goes(passes):
    layer = Layer()
    x = torch.randn(3, 6).double().requires_grad_()
    check(lambda x: layer.lora_A(x.to(torch.float64)) + layer.frozen_A(x), [x], [layer.lora_A.weight])
    assert (passes["share_casts"], passes["stack_siblings"]) == (1, 1)


def test_a_cast_that_does_more_stays(passes):
    layer = Layer(dtype=torch.float32)
    x = torch.randn(3, 6).double().requires_grad_()

    def function(x):
        return layer.lora_A(x.to(torch.float32, copy=True)) + layer.frozen_A(x.to(torch.float32, copy=True))

    check(function, [x], [layer.lora_A.weight], 1e-6)
    assert passes["share_casts"] == 0


# --- narrowed products


def traced(function, *inputs):
    from torch.fx.experimental.proxy_tensor import make_fx

    module = make_fx(function, tracing_mode="fake")(*inputs)
    fake = [node for node in module.graph.nodes if node.op == "placeholder"]
    assert all("val" in node.meta for node in fake)
    return module


def widths(module):
    return [tuple(node.meta["val"].shape) for node in module.graph.nodes if node.target is torch.ops.aten.mm.default]


A, B = torch.randn(6, 5).double(), torch.randn(5, 8).double()


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda a, b: torch.mm(a, b)[2:4], (2, 8)),
        (lambda a, b: torch.mm(a, b)[:, 4:], (6, 4)),
        (lambda a, b: torch.mm(a, b)[:3].sum() + torch.mm(a, b)[1:4].sum(), (3, 8)),
        (lambda a, b: torch.mm(a, b).t()[4:], (6, 4)),
        (lambda a, b: (torch.mm(a, b).t() * 0.5)[:, 1:-1], (4, 8)),
    ],
    ids=["rows", "columns", "two_products", "transposed", "scaled"],
)
def test_products_are_narrowed_to_what_is_read(function, shape):
    module = traced(function, A, B)
    before = widths(module)
    assert narrow_products(module.graph) == len(before)
    module.recompile()
    assert shape in widths(module)
    torch.testing.assert_close(module(A, B), function(A, B), rtol=1e-12, atol=1e-12)


def test_slices_side_by_side_are_one_product():
    def function(a, b):
        product = torch.mm(a, b)
        return product[:, 1:3].sum() * 2 + product[:, 3:5].prod()

    module = traced(function, A, B)
    assert narrow_products(module.graph) == 1
    module.recompile()
    assert widths(module) == [(6, 4)]
    torch.testing.assert_close(module(A, B), function(A, B), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: torch.mm(a, b),
        lambda a, b: torch.mm(a, b)[::2],
        lambda a, b: (lambda p: p[:2].sum() + p[:, :2].sum())(torch.mm(a, b)),
        lambda a, b: (lambda p: p[:2].sum() + p.sum())(torch.mm(a, b)),
        lambda a, b: (lambda p: p[:3].sum() + p[3:].sum())(torch.mm(a, b)),
        lambda a, b: (torch.mm(a, b) * torch.mm(a, b))[:2],
    ],
    ids=["whole", "step", "two_dimensions", "other_reader", "all_of_it", "times_a_tensor"],
)
def test_what_is_read_whole_stays_whole(function):
    module = traced(function, A, B)
    before = str(module.graph)
    assert narrow_products(module.graph) == 0
    assert str(module.graph) == before


# --- inductor


def gemms(function):
    """Matrix products that are called, by PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
    return sum(event.count for event in profile.key_averages() if event.key in names)


class Siblings(torch.nn.Module):
    """What reads what in an attention block, with as few loops for inductor to compile as can be."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x):
        return self.o(self.q(x) * self.k(x) + self.v(x))


@pytest.mark.slow
def test_fewer_products_than_inductor_and_the_same_numbers():
    from balora_plugin import BaLoraConfig, get_ba_lora_model

    model = get_ba_lora_model(Siblings(), BaLoraConfig(r=4, lora_alpha=8, target_modules=["q", "k", "v", "o"]))
    with torch.no_grad():
        for i, p in enumerate(trainable(model)):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    x = torch.randn(2, 6, 16)
    counts, results = {}, {}
    for name in ("inductor", "ba_lora"):
        torch._dynamo.reset()
        compiled = torch.compile(model.get_base_model(), backend=name, fullgraph=True)

        def step(compiled=compiled):
            for p in trainable(model):
                p.grad = None
            result = compiled(x)
            (result * torch.linspace(-1, 1, 16)).sum().backward()
            return result.detach(), [p.grad.clone() for p in trainable(model)]

        results[name] = step()
        counts[name] = gemms(step)
    torch.testing.assert_close(results["ba_lora"], results["inductor"], rtol=1e-4, atol=1e-5)
    # forward: 4 layers, 8 and 8 products of their adapters; 4 layers, 2 and 4. Backward: 1 layer, 8 by the outputs, 8
    # by the factors, 2 by the input of o; 1 layer, 4, 4 and 2, and 1 by the input of o
    assert counts == {"inductor": 20 + 19, "ba_lora": 10 + 12}, counts


def test_a_users_own_pass_runs_after_ours():
    seen = []
    found = NarrowProducts(lambda graph: seen.append(len(list(graph.nodes))))
    module = traced(lambda a, b: torch.mm(a, b)[2:4], A, B)
    found(module.graph)
    assert seen == [len(list(module.graph.nodes))]
    assert widths(module) == [(2, 8)]
    assert found.uuid() is None  # the other says nothing of itself: no cache
    assert NarrowProducts().uuid() == NarrowProducts().uuid() is not None


def test_the_hook_is_still_inductors():
    """A private setting of PyTorch: where it goes, this says so."""
    from torch._inductor import config

    assert hasattr(config, backend.HOOK)


def test_what_the_passes_add_has_values_for_the_next(passes):
    """A node without one would look like a switch of mode and keep the passes behind it from acting."""
    from balora_plugin.compile.siblings import stack_siblings

    graphs = []

    def capture(module, inputs):
        stack_siblings(module)
        graphs.append(module)
        return module.forward

    layer = Layer()
    torch.compile(layer, backend=capture, fullgraph=True)(torch.randn(3, 6).double(), torch.randn(3, 5).double())
    (module,) = graphs
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    assert {n.target for n in nodes} >= {torch.cat, torch.split, F.linear, operator.getitem}
    assert all(n.meta.get("example_value") is not None for n in nodes)
