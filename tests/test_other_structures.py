"""Calls of a compiled model in which a host returns, or is given, another structure than when it was traced."""

import re

import pytest
import torch
from torch import nn

import adaptergraph as ag

METHOD = ag.Bottleneck(2)


class Kinds(nn.Module):
    """Returns what it is asked for."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, kind):
        h = self.fc(x)
        found = {"tensor": h, "pair": (h, h), "dict": {"h": h}, "second": (None, h), "deep": {"h": [h]}, "none": None}
        return found[kind]


class Asks(nn.Module):
    """Reads the first tensor, if there is one."""

    def __init__(self):
        super().__init__()
        self.a, self.o = Kinds(), nn.Linear(4, 4)

    def forward(self, x, kind):
        returned = self.a(x, kind)
        found = [t for t in torch.utils._pytree.tree_leaves(returned) if t is not None]
        return self.o(found[0] if found else x)


KINDS = {
    "tensor": ("a tensor", "Tensor"),
    "pair": ("a tensor at [0]", "tuple"),
    "dict": ("a tensor at ['h']", "dict"),
    "second": ("a tensor at [1]", "tuple"),
    "deep": ("a tensor at ['h'][0]", "dict"),
    "none": ("", "NoneType"),
}


@pytest.mark.parametrize("called", KINDS)
@pytest.mark.parametrize("traced", list(KINDS)[:-1])
def test_a_host_that_returns_another_structure_is_named(traced, called):
    x = torch.randn(3, 4)
    adapted = ag.trace(Asks().eval(), x, traced).splice("a", METHOD).compile()
    if called == traced or (traced, called) == ("second", "pair"):
        # the traced place holds a tensor in both
        adapted(x, called)
        return
    with pytest.raises(ag.GraphError, match=r"^'a' returns another structure than when it was traced") as error:
        adapted(x, called)
    text = str(error.value)
    assert re.search(rf"traced +{re.escape(KINDS[traced][0])}\n +now +{KINDS[called][1]}, ", text)
    assert error.value.node == "a"
    assert error.value.hint == "trace the model with the arguments that it is called with now"


def test_what_a_body_raises_itself_is_let_through():
    class Late(nn.Module):
        fails = False

        def forward(self, x):
            if type(self).fails:
                raise KeyError("mine")
            return x

    graph = ag.trace(nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4))
    adapted = graph.splice("0", lambda site: ag.module(site.output, Late())).compile()
    adapted(torch.ones(1, 4))
    Late.fails = True
    with pytest.raises(KeyError, match="mine"):
        adapted(torch.ones(1, 4))


class Two(nn.Module):
    def forward(self, x, shift=None):
        return x if shift is None else x + shift


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.two = Two()

    def forward(self, x, how="given"):
        if how == "missing":
            return self.two(x)
        return self.two(x, x * 2 if how == "given" else None)


@pytest.mark.parametrize(("how", "said"), [("missing", "not given"), ("none", "None")])
def test_an_argument_that_a_body_reads_is_named(how, said):
    x = torch.ones(1, 4)
    graph = ag.trace(Shifted(), x)
    adapted = graph.splice("two", lambda s: s.output + ag.dense(s.inputs["shift"], 4), where="around").compile()
    adapted(x)
    with pytest.raises(ag.GraphError, match=f"a body at 'two' reads its argument 'shift', which is {said} in this"):
        adapted(x, how)


def test_an_argument_that_a_body_replaces_is_named():
    class Scale(nn.Module):
        def forward(self, *, shift=None):
            return torch.ones(1, 4) if shift is None else shift * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = Scale()

        def forward(self, x, given=True):
            return self.scale(shift=x) + x if given else self.scale() + x

    x = torch.ones(1, 4)
    adapted = ag.trace(Model(), x).splice("scale", METHOD, where="before").compile()
    adapted(x)
    with pytest.raises(ag.GraphError, match="a body at 'scale' reads its argument 'shift', which is not given"):
        adapted(x, given=False)


def test_hosts_whose_steps_may_fail_compile_as_one_graph():
    x = torch.randn(3, 4)
    for traced in ("tensor", "deep"):
        adapted = ag.trace(Asks().eval(), x, traced).splice("a", METHOD).compile()
        torch._dynamo.reset()
        compiled = torch.compile(adapted, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, traced), adapted(x, traced))
