"""Importing what people write in plain torch: each forward's graph is known by hand, and replayed on real values."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from models import on_path, snapshot, tensors
from replay import recorded
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import adaptergraph as ag

W = 4
OUTSIDE = torch.tensor([1.0, -2.0, 3.0, 0.5])


class Inner(nn.Module):
    """One linear, called by the forward or by another method."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x):
        return self.fc(x).relu()

    def other(self, x):
        return self.fc(x).tanh()


class Handing(nn.Module):
    """Hands on a list that it was given."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x, states):
        return self.fc(x), states


class Writing(nn.Module):
    """Writes into an argument and returns something else."""

    def forward(self, x, out):
        out.copy_(x * 2)
        return x + 1


class Keeping(nn.Module):
    """Leaves a value on itself for somebody else."""

    def forward(self, x):
        self.last = x * 3
        return x + 1


class Failing(nn.Module):
    """Runs a child and fails."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x):
        self.fc(x)
        raise ValueError("no")


class Doubled(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Same(torch.autograd.Function):
    """A function that returns its argument."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def _gated(x: Tensor, y: Tensor) -> Tensor:
    return x * 2 + y


gated = torch.jit.script(_gated)


@dataclasses.dataclass
class Pair:
    """What a model may return."""

    first: Tensor
    more: dict


class Plain(nn.Module):
    """Two linears, a buffer, a tensor that is neither; its forward is the test's."""

    def __init__(self, forward, **children):
        super().__init__()
        self.run = forward
        self.a = nn.Linear(W, W)
        self.b = nn.Linear(W, W)
        self.register_buffer("buffer", torch.randn(W))
        self.tensor = torch.randn(W)
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x, *, deep=None):
        return self.run(self, x) if deep is None else self.run(self, x, deep)


def child_called_directly(m, x):
    return m.a.forward(x) * 2


def child_called_both_ways(m, x):
    return m.a(x) + m.a.forward(x)


def container_called_directly(m, x):
    return m.inner.forward(x)


def method_of_a_child(m, x):
    return m.inner.other(x) + m.inner(x)


def checkpointed(m, x):
    return checkpoint(m.inner, m.a(x), use_reentrant=False)


def checkpointed_reentrant(m, x):
    return checkpoint(m.inner, m.a(x), use_reentrant=True)


def functions(m, x):
    return Same.apply(Doubled.apply(m.a(x))) + x


def scripted(m, x):
    return gated(m.a(x), x) * 3


def closure(m, x):
    return m.a(x) + OUTSIDE


def unregistered(m, x):
    return m.hidden[0](m.a(x))


def handed_on(m, x):
    h, states = m.handing(m.a(x), [m.b(x)])
    return h + states[0]


def written_argument(m, x):
    out = torch.zeros_like(x)
    return m.writing(x, out) * out


class Turning(nn.Module):
    """Turns its argument in place."""

    def forward(self, x):
        x.t_()
        return x * 2


class Renewing(nn.Module):
    """Gives its argument other memory."""

    def forward(self, x, other):
        x.data = other
        return x * 2


def turned_in_place(m, x):
    h = m.a(x)
    return m.turning(h) @ m.b(h.t())


def renewed(m, x):
    h = m.a(x)
    return m.renewing(h, m.b(x)) + torch.tanh(h)


def left_on_a_module(m, x):
    return m.keeping(m.a(x)) * m.keeping.last


def goes_on_after_an_error(m, x):
    try:
        y = m.failing(x)
    except ValueError:
        y = m.b(x)
    return m.a(y)


def views_of_one_memory(m, x):
    left, right = m.a(x).chunk(2, -1)
    left.mul_(right)
    return torch.cat([left, right], -1)


def view_of_a_view(m, x):
    h = m.a(x)
    turned = h.t()
    turned[0] = 1
    h.view(-1).add_(2)
    return h * turned.t()


def given_other_memory(m, x):
    h = m.a(x)
    h.data = m.b(x)
    return h + 1


def out_argument(m, x):
    out = torch.empty_like(x)
    torch.add(m.a(x), x, out=out)
    return out * 2


def masked_and_indexed(m, x):
    h = m.a(x)
    h[h > 0] = 0
    h[:, [0, 1]] += 1
    return h.index_add_(0, torch.tensor([0]), x[1:2])


def detached(m, x):
    h = m.a(x)
    h.detach().add_(1)
    return h


def unbound(m, x):
    return torch.stack([row.tanh_() for row in m.a(x).unbind(0)])


def state_of_the_model(m, x):
    m.buffer.add_(1)
    m.buffer[:2].mul_(3)
    m.tensor = m.tensor + m.buffer
    return m.a(x) * m.buffer + m.tensor


def structures(m, x, deep):
    h = m.a(deep["k"][0]["z"]) + deep["w"]
    return Pair(h, {"all": [x, (m.b(x), m.buffer)], "weight": m.a.weight})


def parameters_in_containers(m, x):
    return m.a(x) @ m.table["w"] + m.row[0] + F.embedding(torch.tensor([0, 1]), m.b.weight)


def compiled_inside(m, x):
    return torch.compile(lambda t: t.sin() + 1, backend="eager")(m.a(x))


def device_as_a_context(m, x):
    with torch.device("cpu"):
        zeros = torch.zeros(W)
    return m.b(m.a(x) + zeros)


class Signed(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight.abs() + 0.5


def parametrized(m, x):
    return m.c(x) + m.d(x) + m.e(x)


def parametrized_children():
    own = nn.Linear(W, W)
    parametrize.register_parametrization(own, "weight", Signed())
    return {
        "c": own,
        "d": parametrizations.orthogonal(nn.Linear(W, W)),
        "e": parametrizations.spectral_norm(nn.Linear(W, W)),
    }


def old_hooks(m, x):
    return m.c(x) + m.d(x)


def old_hook_children():
    return {
        "c": torch.nn.utils.weight_norm(nn.Linear(W, W)),
        "d": prune.l1_unstructured(nn.Linear(W, W), "weight", 0.5),
    }


def nothing():
    return {}


def inner():
    return {"inner": Inner()}


CASES = {
    f.__name__: (f, children, edges)
    for f, children, edges in [
        (child_called_directly, nothing, {"a": "x", "/mul": "a"}),
        (child_called_both_ways, nothing, {"a": "x", "a@1": "x", "/add": "a a@1"}),
        (container_called_directly, inner, {"inner.fc": "x", "inner/relu": "inner.fc"}),
        (method_of_a_child, inner, {"/tanh": "inner.fc", "inner/relu": "inner.fc@1", "/add": "/tanh inner/relu"}),
        (checkpointed, inner, {"inner.fc": "a", "inner/relu": "inner.fc"}),
        (checkpointed_reentrant, inner, {"inner.fc": "a", "inner/relu": "inner.fc"}),
        (functions, nothing, {"/mul": "a", "/view_as": "/mul", "/add": "/view_as x"}),
        (scripted, nothing, {"/_gated": "a x", "/mul": "/_gated"}),
        (closure, nothing, {"/add": "a"}),
        (unregistered, lambda: {"hidden": [nn.Linear(W, W)]}, {"/linear": "a"}),
        (handed_on, lambda: {"handing": Handing()}, {"handing/identity": "b", "/add": "handing.fc handing/identity"}),
        (
            written_argument,
            lambda: {"writing": Writing()},
            {"writing:copy_": "writing", "/mul": "writing writing:copy_"},
        ),
        (turned_in_place, lambda: {"turning": Turning()}, {"turning": "a", "/t": "turning:t_"}),
        (renewed, lambda: {"renewing": Renewing()}, {"renewing": "a b", "/tanh": "renewing:set:changed"}),
        (left_on_a_module, lambda: {"keeping": Keeping()}, {"keeping": "a", "/mul": "keeping keeping:mul"}),
        (goes_on_after_an_error, lambda: {"failing": Failing()}, {"failing.fc": "x", "b": "x", "a": "b"}),
        (views_of_one_memory, nothing, {"/mul_": "/chunk /chunk:1 a", "/cat": "/mul_ /mul_:view:3"}),
        (view_of_a_view, nothing, {"/setitem": "/t a", "/mul": "/add_:view:0 /t_1"}),
        (given_other_memory, nothing, {"/set": "a b", "/add": "/set"}),
        (out_argument, nothing, {"/add": "a x /empty_like", "/mul": "/add"}),
        (masked_and_indexed, nothing, {"/gt": "a", "/setitem": "a /gt"}),
        (detached, nothing, {"/detach": "a", "/add_": "/detach"}),
        (unbound, nothing, {"/unbind": "a", "/stack": "/tanh_ /tanh__1"}),
        (state_of_the_model, nothing, {"/add_": "", "/mul_": "/getitem /add_", "/mul": "a /mul_:view:0"}),
        (structures, nothing, {"a": "deep:k:0:z", "/add": "a deep:w", "/identity": "x", "/identity_1": ""}),
        (
            parameters_in_containers,
            lambda: {
                "table": nn.ParameterDict({"w": nn.Parameter(torch.randn(W, W))}),
                "row": nn.ParameterList([nn.Parameter(torch.randn(W))]),
            },
            {"/matmul": "a", "/embedding": "/tensor", "/add_1": "/add /embedding"},
        ),
        (compiled_inside, nothing, {"/sin": "a", "/add": "/sin"}),
        (device_as_a_context, nothing, {"/add": "a /zeros", "b": "/add"}),
        (parametrized, parametrized_children, {"c/linear": "x c.parametrizations.weight.0"}),
        (old_hooks, old_hook_children, {"c": "x /_weight_norm", "d": "x /mul"}),
    ]
}


def made(name):
    """A model and its arguments, the same each time."""
    forward, children, edges = CASES[name]
    torch.manual_seed(0)
    model = Plain(forward, **children()).eval()
    more = {"deep": {"k": [{"z": torch.randn(2, W)}], "w": torch.randn(W)}} if forward is structures else {}
    return model, (torch.randn(2, W),), more, edges


@pytest.mark.parametrize("name", CASES)
def test_a_forward_in_plain_torch(name):
    model, args, kwargs, edges = made(name)
    before = snapshot(model)
    found = recorded(model, args, kwargs)
    assert snapshot(model) == before
    graph, recorder = found.graph, found.recorder
    assert recorder.fake
    assert not recorder.unknown
    assert {n: sorted(graph._nodes[n].inputs) for n in edges} == {n: sorted(e.split()) for n, e in edges.items()}
    found.run(args, kwargs)
    with torch.no_grad():
        output = model(*args, **kwargs)
    assert len(recorder.results) == len(tensors(output))
    for path, ref in recorder.results:
        assert torch.equal(found.values[ref], on_path(output, path)), path


def test_a_direct_call_of_forward_runs_the_body_too():
    model, args, _, _ = made("child_called_both_ways")
    adapted = ag.trace(model, *args).splice("a", ag.Bottleneck(2)).compile()
    body = adapted.a.adapter
    with torch.no_grad():
        body.up.weight.normal_()
        assert torch.equal(adapted(*args), body(model.a(*args)) + body(model.a(*args)))


def test_code_that_torch_does_not_show_reads_all_there_was():
    def forward(m, x):
        h = m.a(x)
        return torch.vmap(lambda row: row.sin() + 1)(h) * m.b(x)

    graph = ag.trace(Plain(forward), torch.randn(2, W))
    assert set(graph["/unseen"].inputs) == {"x", "a", "b"}
    assert set(graph["/mul"].inputs) == {"/unseen", "b"}


def test_a_script_is_called_as_before_after_a_trace():
    call = torch.jit.ScriptFunction.__call__
    model, args, _, _ = made("scripted")
    ag.trace(model, *args)
    assert torch.jit.ScriptFunction.__call__ is call
    x = torch.randn(3)
    assert torch.equal(gated(x, x), x * 2 + x)


def test_what_a_leaf_made_inside_is_no_place_for_a_body():
    model, args, _, _ = made("left_on_a_module")
    with pytest.raises(ag.GraphError, match="keeping:mul"):
        ag.trace(model, *args).splice("keeping:mul", ag.Bottleneck(2)).compile()


@pytest.mark.parametrize("layout", ["subclass", "sparse", "complex"])
def test_other_kinds_of_tensors(layout):
    class Kind(Tensor):
        pass

    x = torch.randn(W, W)
    given = {"subclass": x.as_subclass(Kind), "sparse": x.to_sparse(), "complex": x}[layout]
    forwards = {
        "subclass": lambda m, x: m.a(x) + 1,
        "sparse": lambda m, x: torch.sparse.mm(x, m.a.weight) + m.b.bias,
        "complex": lambda m, x: torch.view_as_real(torch.fft.fft(m.a(x))),
    }
    model = Plain(forwards[layout])
    before = snapshot(model)
    graph = ag.trace(model, given)
    assert snapshot(model) == before
    assert graph.output_names() == ({"subclass": "/add", "sparse": "Plain", "complex": "/view_as_real"}[layout],)


def test_frames_of_one_jagged_batch():
    def forward(m, x):
        return torch.nested.to_padded_tensor(m.a(x), 0.0)

    rows = torch.nested.nested_tensor([torch.randn(2, W), torch.randn(3, W)], layout=torch.jagged)
    graph = ag.trace(Plain(forward), rows)
    assert graph["a"].inputs == ("x",)
    assert "a" in graph[graph.output_names()[0]].inputs


def test_a_second_fake_tensor_is_what_view_as_gives():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from adaptergraph.tracing.memory import another

    with FakeTensorMode(), torch.no_grad():
        tensor = torch.empty(3, 5).t()
        one, other = another(tensor), tensor.view_as(tensor)
        tensor.add_(1)
        for new in (one, other):
            assert new is not tensor
            assert (new.shape, new.stride(), new.device, new._version) == ((5, 3), (1, 5), torch.device("cpu"), 1)
            assert new.untyped_storage()._cdata == tensor.untyped_storage()._cdata
        # a constant still knows its value
        assert another(torch.tensor(7.0)).item() == 7.0
    with FakeTensorMode():
        assert another(torch.empty(2, requires_grad=True)).grad_fn is not None
