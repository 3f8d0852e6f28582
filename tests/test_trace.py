"""Importing: what `ag.trace` says about a model is true, and the model is afterwards what it was."""

from __future__ import annotations

import dataclasses
import functools
import gc
from typing import NamedTuple

import networkx
import pytest
import torch
from models import CASES, mixtral, on_path, run, snapshot, tensors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import adaptergraph as ag

EACH = pytest.mark.parametrize("name", CASES)


def fakes():
    """Fake tensors that are alive in this process and were not when the test began (compiling keeps some)."""
    gc.collect()
    return [o for o in gc.get_objects() if isinstance(o, FakeTensor) and id(o) not in BEFORE]


BEFORE = {}


@pytest.fixture(autouse=True)
def what_there_was():
    BEFORE.clear()
    BEFORE.update({id(o): o for o in fakes()})
    yield
    BEFORE.clear()


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def real_calls(model, case, disturbed=None):
    """`{(path, call): output}` of one real run; the output of one call may be disturbed."""
    calls, counts, handles = {}, {}, []

    def hook(module, args, output, path):
        index = counts[path] = counts.get(path, -1) + 1
        if (path, index) == disturbed:
            output = disturb(output)
        calls[path, index] = [t.clone() for t in tensors(output)], output
        return output

    for path, module in model.named_modules():
        handles.append(module.register_forward_hook(functools.partial(hook, path=path)))
    try:
        with torch.no_grad():
            run(model, case)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def disturb(output):
    """The same structure with noise in its float tensors."""
    if isinstance(output, Tensor):
        return output + torch.rand_like(output) + 1 if output.is_floating_point() else output
    return tuple(disturb(o) for o in output) if isinstance(output, tuple) else output


# ---------------------------------------------------------------------- the model afterwards


@EACH
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_the_model_is_left_as_it_was(name, train):
    case = CASES[name]
    model = case.model().train(train)
    next(model.children()).eval()
    before, random = snapshot(model), torch.get_rng_state()
    with torch.no_grad():
        torch.manual_seed(5)
        args, kwargs = case.args()
        expected = tensors(case.model().train(train)(*args, **kwargs)) if not train else None
    torch.set_rng_state(random)
    graph = ag.trace(model, *args, **kwargs)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert not fakes()
    assert graph.imported.host is model
    if expected is not None:
        with torch.no_grad():
            assert equal(run(model.eval(), case), expected)
    assert not any(graph.trained.values())


# ---------------------------------------------------------------------- what the graph says


@EACH
def test_every_call_of_every_module_is_known(traced, name):
    case, _, graph = traced(name)
    model = case.model()
    if name == "encoder":
        # its fused kernel calls no child
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        calls = real_calls(model, case)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert list(graph.imported.modules) == [n for n, _ in model.named_modules()]
    for path, module in graph.imported.modules.items():
        assert module.cls == type(model.get_submodule(path)).__name__
        real = [calls[k][1] for k in calls if k[0] == path]
        assert len(module.calls) == len(real), path
        for call, output in zip(module.calls, real, strict=True):
            floats = [t for t in tensors(output) if t.is_floating_point()]
            if not floats:
                assert call.output is None
                continue
            assert on_path(output, call.path) is floats[0]
            node = graph[call.output]
            assert (node.shape, node.dtype) == (tuple(floats[0].shape), floats[0].dtype)


@EACH
def test_every_output_depends_on_an_input(traced, name):
    case, _, graph = traced(name)
    net = graph.to_networkx()
    inputs = set(graph.inputs)
    args, kwargs = case.args()
    assert len(inputs) == len(tensors((args, kwargs)))
    for output in graph.output_names():
        assert inputs & networkx.ancestors(net, output)


@EACH
def test_a_disturbance_reaches_what_the_edges_say(traced, name):
    """Noise on one module's output changes the outputs of exactly the modules that the graph puts after it."""
    case, _, graph = traced(name)
    model = case.model()
    leaves = [n for n, node in graph._nodes.items() if n.partition("@")[0] in graph.imported.modules]
    assert len(leaves) > 3
    net = graph.to_networkx()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        before = real_calls(model, case)
        for leaf in leaves:
            path, _, index = leaf.partition("@")
            torch.manual_seed(7)
            after = real_calls(model, case, (path, int(index or 0)))
            changed = {
                f"{p}@{i}" if i else p for (p, i), (ts, _) in after.items() if not equal(ts, before[p, i][0])
            } & set(graph)
            after_it = {n for n in networkx.descendants(net, leaf) if "/" not in n and ":" not in n} | {leaf}
            # what is read for its shape or dtype only is read, too
            assert after_it - changed <= {"model.rotary_emb"}, leaf
            assert changed <= after_it, leaf
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_the_edges_of_a_layer_known_by_hand(traced):
    _, _, graph = traced("bert")
    layer = "bert.encoder.layer.0."
    attention, output = layer + "attention.", layer + "output"

    def reads(name):
        return graph[name].inputs

    before = "bert.embeddings.dropout"
    for part in ("query", "key", "value"):
        assert reads(f"{attention}self.{part}") == (before,)
    heads = next(n for n in graph if n.startswith(attention + "self/scaled_dot_product_attention"))
    found = {graph._nodes[graph._nodes[i].inputs[0]].inputs[0] for i in reads(heads)[:3]}
    assert found == {f"{attention}self.{part}" for part in ("query", "key", "value")}
    assert reads(f"{attention}output.dropout") == (f"{attention}output.dense",)
    assert reads(f"{attention}output/add") == (f"{attention}output.dropout", before)
    assert reads(f"{attention}output.LayerNorm") == (f"{attention}output/add",)
    assert reads(f"{layer}intermediate.dense") == (f"{attention}output.LayerNorm",)
    assert reads(f"{output}.dense") == (f"{layer}intermediate.intermediate_act_fn",)
    assert reads(f"{output}/add") == (f"{output}.dropout", f"{attention}output.LayerNorm")
    assert graph.consumers[f"{output}.LayerNorm"] == (
        *(f"bert.encoder.layer.1.attention.self.{p}" for p in ("query", "key", "value")),
        "bert.encoder.layer.1.attention.output/add",
    )
    assert graph["bert.encoder.layer.0"].name == f"{output}.LayerNorm"


def test_the_edges_of_the_torch_encoder_known_by_hand(traced):
    _, _, graph = traced("encoder")
    expected = {
        "layers.0.self_attn": ("src",),
        "layers.0.dropout1": ("layers.0.self_attn",),
        "layers.0/add": ("src", "layers.0.dropout1"),
        "layers.0.norm1": ("layers.0/add",),
        "layers.0.linear1": ("layers.0.norm1",),
        "layers.0/relu": ("layers.0.linear1",),
        "layers.0.dropout": ("layers.0/relu",),
        "layers.0.linear2": ("layers.0.dropout",),
        "layers.0.dropout2": ("layers.0.linear2",),
        "layers.0/add_1": ("layers.0.norm1", "layers.0.dropout2"),
        "layers.0.norm2": ("layers.0/add_1",),
    }
    assert {n: graph[n].inputs for n in graph if n.startswith("layers.0")} == expected


@pytest.mark.parametrize(
    ("name", "never"),
    [
        ("bert", ["bert.encoder.layer.0.attention.self.dropout", "bert.encoder.layer.1.attention.self.dropout"]),
        ("t5", ["shared"]),
        ("encoder", ["layers.0.self_attn.out_proj", "layers.1.self_attn.out_proj"]),
        ("resnet", ["resnet.encoder.stages.0.layers", "resnet.encoder.stages.1.layers"]),
    ],
)
def test_modules_that_are_never_called(traced, name, never):
    _, _, graph = traced(name)
    containers = (nn.ModuleList, nn.ModuleDict)
    model = CASES[name].model()
    found = [p for p, m in graph.imported.modules.items() if not m.calls]
    assert [p for p in found if not isinstance(model.get_submodule(p), containers)] == never


@pytest.mark.parametrize(
    ("name", "path", "calls"),
    [
        ("t5", "encoder.dropout", ("encoder.dropout", "encoder.dropout@1")),
        ("vit", "vit.layers.0.dropout", ("vit.layers.0.dropout", "vit.layers.0.dropout@1")),
        ("roberta", "classifier.dropout", ("classifier.dropout", "classifier.dropout@1")),
        ("plain", "shared", ("shared", "shared@1")),
    ],
)
def test_modules_that_are_called_more_than_once(traced, name, path, calls):
    assert traced(name).graph.calls_of(path) == calls


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("gpt2", {"lm_head.weight": "transformer.wte.weight"}),
        ("plain", {"out.weight": "embed.weight"}),
        ("bert", {}),
    ],
)
def test_tied_weights_are_one_parameter(traced, name, tied):
    graph = traced(name).graph
    assert graph.imported.tied == tied
    assert list(graph.params) == [n for n, _ in CASES[name].model().named_parameters()]
    for other, first in tied.items():
        assert graph.unfreeze(other).trained[first]


def test_who_reads_the_weight_of_a_module_that_is_never_called(traced):
    readers = traced("encoder").graph.imported.readers
    assert readers["layers.0.self_attn.out_proj.weight"] == "layers.0.self_attn"


def test_the_root_may_be_a_single_module():
    graph = ag.trace(nn.Linear(4, 2), torch.ones(1, 4))
    assert list(graph) == ["input", "Linear"]
    assert list(graph.params) == ["weight", "bias"]


# ---------------------------------------------------------------------- operations inside a forward


def graph_of(forward, *args, **children):
    """The graph of a module with this forward."""

    class Model(nn.Module):
        pass

    Model.forward = forward
    model = Model()
    for name, child in children.items():
        setattr(model, name, child)
    return ag.trace(model.eval(), *args)


@pytest.mark.parametrize(
    "same",
    [
        lambda self, h: self.drop(h),
        lambda self, h: self.nothing(h),
        lambda self, h: h.to(torch.float32),
        lambda self, h: h.contiguous(),
        lambda self, h: self.wrapped(h),
        lambda self, h: self.passing(h)[0],
    ],
    ids=["dropout", "identity", "to", "contiguous", "container", "tuple"],
)
def test_what_changes_nothing_is_a_node_of_its_own(same):
    class Passing(nn.Module):
        def forward(self, x):
            return x, None

    def forward(self, x):
        h = self.fc(x)
        return h + same(self, h)

    graph = graph_of(
        forward,
        torch.ones(1, 4),
        fc=nn.Linear(4, 4),
        drop=nn.Dropout(),
        nothing=nn.Identity(),
        wrapped=nn.Sequential(nn.Dropout(), nn.Identity()),
        passing=Passing(),
    )
    first, second = graph["/add"].inputs
    assert first == "fc"
    assert second != "fc"
    assert "fc" in networkx.ancestors(graph.to_networkx(), second)


def test_in_place_operations_rebind_what_they_change():
    def forward(self, x):
        h = self.fc(x)
        h = self.act(h)
        h.add_(1)
        h[:, 0] = x[:, 0]
        return h * 2

    graph = graph_of(forward, torch.ones(1, 4), fc=nn.Linear(4, 4), act=nn.ReLU(inplace=True))
    assert graph["act"].inputs == ("fc",)
    assert graph["/add_"].inputs == ("act",)
    assert set(graph["/setitem"].inputs) == {"/add_", "/getitem"}
    assert graph["/mul"].inputs == ("/setitem",)
    assert graph["/setitem"].shape == (1, 4)


def test_writing_through_a_view_changes_the_whole_and_keeps_its_shape():
    def forward(self, x):
        h = self.fc(x)
        first = h[:, 0]
        first.add_(1)
        return h * 2, first * 3

    graph = graph_of(forward, torch.ones(5, 4), fc=nn.Linear(4, 4))
    (whole,) = graph["/mul"].inputs
    assert whole != "fc"
    assert graph[whole].shape == (5, 4)
    assert {"fc", "/add_"} <= networkx.ancestors(graph.to_networkx(), "/mul")
    assert graph["/mul_1"].inputs == ("/add_",)
    assert graph["/add_"].shape == (5,)


def test_writing_into_one_half_leaves_the_other():
    def forward(self, x):
        a, b = self.fc(x).chunk(2)
        a.mul_(2)
        return a + 1, b + 1

    graph = graph_of(forward, torch.ones(6, 4), fc=nn.Linear(4, 4))
    assert graph["/add"].inputs == ("/mul_",)
    assert "/mul_" not in networkx.ancestors(graph.to_networkx(), "/add_1")


def test_a_container_that_writes_through_a_view_can_have_a_body():
    class Masking(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            h = self.fc(x)
            h[:, 0].zero_()
            return h

    model, x = nn.Sequential(Masking(), nn.ReLU()), torch.ones(5, 4)
    model = ag.trace(model, x).splice("0", ag.Bottleneck(2)).compile()
    assert model[0].adapter.down.in_features == 4
    assert model(x).shape == (5, 4)


class Pair(NamedTuple):
    """A named tuple."""

    first: Tensor
    second: Tensor


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A frozen dataclass."""

    first: Tensor
    second: Tensor


@pytest.mark.parametrize("kind", [Pair, Fixed, lambda a, b: {"first": a, "second": b}, lambda a, b: [a, b]])
def test_structures_that_a_module_may_return(kind):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return kind(self.fc(x), x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            out = self.inner(x)
            first, second = out.values() if isinstance(out, dict) else vars(out).values() if kind is Fixed else out
            return first * 2 + second

    model, x = Outer(), torch.ones(1, 4)
    graph = ag.trace(model, x)
    assert graph["/mul"].inputs == ("inner.fc",)
    adapted = graph.splice("inner", lambda site: ag.dense(site.output, 4, name="fc")).compile()
    fc = adapted.inner.adapter.fc
    assert torch.equal(adapted(x), fc(model.inner.fc(x)) * 2 + x)


def test_arguments_are_named_as_the_signature_names_them():
    def forward(self, first, *rest, scale, **more):
        return first + rest[0] + rest[1] * scale + more["shift"] + more["deep"]["a"][0]

    class Model(nn.Module):
        pass

    Model.forward = forward
    one = torch.ones(2)
    graph = ag.trace(
        Model(), one, one.clone(), one.clone(), scale=one.clone(), shift=one.clone(), deep={"a": [one + 1]}
    )
    assert list(graph.inputs) == ["first", "rest_0", "rest_1", "scale", "shift", "deep:a:0"]


def test_positions_and_keywords_give_the_same_graph():
    case = CASES["bert"]
    _, kwargs = case.args()
    by_name = ag.trace(case.model(), **kwargs)
    assert ag.trace(case.model(), kwargs["input_ids"], kwargs["attention_mask"]) == by_name
    assert ag.trace(case.model().train(), **kwargs) == by_name


# ---------------------------------------------------------------------- models that keep tensors


@functools.lru_cache(maxsize=4)
def positions(length):
    return torch.arange(length, dtype=torch.float32)


@functools.lru_cache(maxsize=4)
def doubled(weight):
    return weight * 2


class Caching(nn.Module):
    """Keeps tensors in an lru_cache, on itself, in a list and in a dict of its own."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.last = None
        self.seen = []
        self.table = {}

    def forward(self, x):
        self.last = x + positions(x.shape[-1])
        self.seen.append(self.last)
        self.table.setdefault(x.shape, self.last * 2)
        self.weight = self.fc.weight
        return self.fc(self.last + self.table[x.shape]) @ doubled(self.fc.weight)


@pytest.mark.parametrize("filled", [False, True])
def test_no_fake_tensor_stays_in_a_cache(filled):
    positions.cache_clear()
    doubled.cache_clear()
    model, x = Caching(), torch.ones(1, 4)
    if filled:
        model(x)
    before = snapshot(model), list(model.seen), dict(model.table)
    graph = ag.trace(model, x)
    assert snapshot(model) == before[0]
    assert model.seen == before[1]
    assert model.table == before[2]
    assert not fakes()
    assert type(model(x)) is Tensor
    assert len(graph) > 2


KEPT = {}


def test_a_cache_that_cannot_be_emptied_is_an_error():
    def forward(self, x):
        KEPT["x"] = x + 1
        return self.fc(KEPT["x"])

    with pytest.raises(ag.GraphError, match="keeps tensors between calls, in: dict"):
        graph_of(forward, torch.ones(1, 4), fc=nn.Linear(4, 4))
    KEPT.clear()
    assert not fakes()


def test_hooks_that_a_forward_installs_are_not_left():
    case = CASES["bert"]
    model = case.model()
    before = snapshot(model)
    args, kwargs = case.args()
    ag.trace(model, *args, **kwargs, output_hidden_states=True)
    assert snapshot(model) == before
    assert len(run(model, case, output_hidden_states=True).hidden_states) == 3


# ---------------------------------------------------------------------- where fake tensors are not enough


class Looking(nn.Module):
    """Looks at values, changes its input, its buffer and a plain tensor in place, and uses random numbers."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.total = torch.zeros(2)

    def forward(self, x):
        self.count += 1
        self.total.add_(1)
        x.add_(torch.rand(4))
        return self.fc(x) * 2 if x.sum().item() > 0 else x


def test_a_forward_that_looks_at_values_runs_on_real_ones():
    model, x = Looking(), torch.ones(1, 4)
    before, random = snapshot(model), torch.get_rng_state()
    graph = ag.trace(model, x)
    assert snapshot(model) == before
    assert torch.equal(model.total, torch.zeros(2))
    assert torch.equal(x, torch.ones(1, 4))
    assert torch.equal(torch.get_rng_state(), random)
    assert graph["fc"].inputs == ("/add__2",)
    assert graph.output_names() == ("/mul",)
    adapted = graph.splice("fc", ag.Bottleneck(2)).compile()
    torch.manual_seed(0)
    expected = model(x.clone())
    torch.manual_seed(0)
    assert torch.equal(adapted(x.clone()), expected)


def test_real_values_of_a_model_on_meta_are_an_error():
    with pytest.raises(
        ag.GraphError, match="the forward of Looking looks at the values of tensors, and the model has none"
    ):
        ag.trace(Looking().to("meta"), torch.ones(1, 4))


def test_kernels_that_know_bfloat16_only():
    case = dataclasses.replace(CASES["llama"], name="mixtral", build=mixtral)
    model = case.model()
    before = snapshot(model)
    args, kwargs = case.args()
    graph = ag.trace(model, *args, **kwargs)
    assert snapshot(model) == before
    assert not fakes()
    assert {n.dtype for n in graph.nodes() if n.dtype and n.dtype.is_floating_point} == {torch.float32}
    assert {p.dtype for p in graph.params.values()} == {torch.float32}
    with torch.device("meta"):
        # there are no real values to run on instead
        assert ag.trace(case.build(), *args, **kwargs) == graph
    adapted = graph.splice("model.layers.*.self_attn.o_proj", ag.Bottleneck(4)).compile()
    assert equal(run(adapted, case), run(model, case))


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit", "resnet", "plain"])
def test_a_model_on_meta_gives_the_same_graph(traced, name):
    case, _, graph = traced(name)
    with torch.device("meta"):
        model = case.build()
    before = snapshot(model)
    args, kwargs = case.args()
    assert ag.trace(model, *args, **kwargs) == graph
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["bert", "plain"])
def test_tracing_inside_inference_mode_or_without_gradients(traced, name):
    case, model, graph = traced(name)
    args, kwargs = case.args()
    with torch.inference_mode():
        args, kwargs = case.args()
        assert ag.trace(model, *args, **kwargs) == graph
    with torch.no_grad():
        assert ag.trace(model, *args, **kwargs) == graph
    looking = Looking()
    with torch.inference_mode():
        assert len(ag.trace(looking, torch.ones(1, 4))) > 3


def test_parametrized_weights():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())
    x = torch.randn(2, 4)
    before = snapshot(model)
    graph = ag.trace(model, x)
    assert snapshot(model) == before
    adapted = graph.splice("0", ag.Bottleneck(2)).compile()
    assert torch.equal(adapted(x), model(x))
    with torch.no_grad():
        adapted[0].adapter.up.weight.fill_(0.5)
        adapted[0].adapter.up.bias.fill_(0.5)
    assert torch.equal(adapted(x), adapted[0].adapter(model[0](x)).relu())


class Store:
    """What a forward puts its values into, such as a cache."""

    def __init__(self, *values):
        self.values = [list(values)]

    def add(self, value):
        self.values[0].append(value)


class Storing(nn.Module):
    """Keeps what it computes in an object that it is given, and reads what was there."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, store):
        h = self.fc(x) + store.values[0][0]
        store.add(h)
        return h


def test_an_object_among_the_arguments_is_left_as_it_was():
    first = torch.randn(2, 4)
    store = Store(first)
    graph = ag.trace(Storing(), torch.randn(2, 4), store)
    assert [value is first for value in store.values[0]] == [True]
    assert graph["fc"].shape == (2, 4)


def test_a_cache_is_left_as_it_was():
    model = CASES["gpt2"].model().eval()
    ids = torch.randint(2, 30, (1, 5))
    cache = model(input_ids=ids, use_cache=True).past_key_values
    kept = [layer.keys.clone() for layer in cache.layers]
    graph = ag.trace(model, input_ids=ids[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 5
    assert all(type(layer.keys) is torch.Tensor for layer in cache.layers)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, kept, strict=True))
    assert graph.splice("transformer.h.*.mlp", ag.Bottleneck(2)).bodies


class Cross(nn.Module):
    """Reads two arguments."""

    def __init__(self, look=False):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.look = look

    def forward(self, query, context):
        if self.look and query.sum() > 1e9:
            return query
        return self.o(torch.tanh(self.q(query)) * self.k(context))


class Crossed(nn.Module):
    """The same inside."""

    def __init__(self, look=False):
        super().__init__()
        self.c, self.h = Cross(look), nn.Linear(4, 4)

    def forward(self, query, context):
        return self.h(self.c(query, context))


@pytest.mark.parametrize("name", ["query", "context"])
@pytest.mark.parametrize("look", [False, True], ids=["fake", "real"])
def test_one_tensor_given_as_two_arguments_is_two_inputs(name, look):
    """An example says shapes only."""
    torch.manual_seed(0)
    base, x, y = Crossed(look).eval(), torch.randn(3, 4), torch.randn(3, 4)
    graph = ag.trace(base, x, x)
    assert (graph["c.q"].inputs, graph["c.k"].inputs) == (("query",), ("context",))

    def read(site):
        return site.output + ag.dense(site.inputs[name], 4, name="t")

    model = graph.splice("c", read, where="around").compile()
    expected = base.h(base.c(x, y) + model.c.adapter.t({"query": x, "context": y}[name]))
    torch.testing.assert_close(model(x, y), expected)


def test_a_parameter_given_as_an_argument_is_the_models_own():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, weight):
            return self.fc(x) @ weight

    base = Takes()
    graph = ag.trace(base, torch.ones(3, 4), base.fc.weight)
    assert graph["/matmul"].inputs == ("fc", "weight")
