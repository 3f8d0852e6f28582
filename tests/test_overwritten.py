"""Values over which a model writes others in place: bodies read what the graph says, or are refused by name.

Each is compared with the same forward in which the adapter is written by hand, in a copy without in-place operations.
"""

import pytest
import torch
from byhand import randomise
from torch import nn

import adaptergraph as ag


def linear():
    return nn.Linear(6, 6)


class Net(nn.Module):
    """The modules that the forwards below use."""

    def __init__(self, middle=None):
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear()
        self.n = nn.BatchNorm1d(6)
        self.n.running_mean = torch.randn(6)
        self.relu = nn.ReLU(inplace=True)
        self.m = middle


class ByActivation(Net):
    """As in every ResNet."""

    def forward(self, x):
        return self.c(self.relu(self.n(self.a(x))))


class ByOperation(Net):
    def forward(self, x):
        h = self.n(self.a(x))
        y = self.b(h)
        h.zero_()
        return self.c(y + h)


class ByResidual(Net):
    def forward(self, x):
        h = self.n(self.a(x))
        y = self.relu(self.b(h))
        h += y
        return self.c(h)


class ThroughAView(Net):
    def forward(self, x):
        h = self.n(self.a(x))
        y = self.b(h)
        h[:, :3].mul_(-3)
        return self.c(y)


class OutOfSight(Net):
    """Gives the tensor other memory."""

    def forward(self, x):
        h = self.n(self.a(x))
        y = self.b(h)
        h.data = torch.ones_like(h)
        return self.c(y + h)


class InAList(Net):
    """No version of a fake tensor counts that."""

    def forward(self, x):
        h, other = self.n(self.a(x)), torch.ones_like(x)
        y = self.b(h)
        torch._foreach_mul_([h, other], 2.0)
        return self.c(y + h) + other


class CopiedInAList(Net):
    """What 'n' gives is read by way of the write only."""

    def forward(self, x):
        h = self.a(x)
        torch._foreach_copy_([h], [self.n(x)])
        return self.c(h)


class OverTheInput(Net):
    """Of the model itself."""

    def forward(self, x):
        h = self.a(x)
        x.fill_(3.0)
        return self.c(h + x)


def given_to(model, path, x):
    """What the dense layer of a tap was given."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    output = model(x.clone())
    hook.remove()
    return seen, output


def tap(name):
    return lambda site: site.output + ag.dense(site.graph[name], 6, name="t")


@pytest.mark.parametrize("cls", [ByActivation, ByOperation, ByResidual, ThroughAView, OutOfSight, InAList])
@pytest.mark.parametrize("adapted_too", [False, True])
def test_a_tap_is_given_the_value_as_it_was(cls, adapted_too):
    base, x = cls().eval(), torch.randn(5, 6)
    graph = ag.trace(base, x)
    assert "n" in graph.imported.overwritten
    if adapted_too:
        graph = graph.splice("n", ag.Bottleneck(2), name="own")
    assert ag.Graph.from_json(graph.to_json()) == graph
    graph = graph.splice("c", tap("n"), name="tap")
    model = randomise(graph.compile(), 2.0).eval()
    seen, output = given_to(model, "c.tap.t", x)
    expected = base.n(base.a(x))
    if adapted_too:
        own = model.n.own
        expected = expected + own.up(torch.relu(own.down(expected)))
    torch.testing.assert_close(seen, [expected])
    output.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.c.tap.t.weight.grad.any()
    if cls is not OutOfSight:
        # torch does not compile that
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x.clone()), output)


def test_what_is_written_in_a_list_is_read():
    base, x = CopiedInAList().eval(), torch.randn(5, 6)
    model = randomise(ag.trace(base, x).splice("n", ag.Bottleneck(2)).compile(), 2.0)
    body, h = model.n.adapter, base.n(x)
    torch.testing.assert_close(model(x), base.c(h + body.up(torch.relu(body.down(h)))))


def test_a_tap_of_the_models_input_is_given_it_as_it_was():
    base, x = OverTheInput().eval(), torch.randn(5, 6)
    model = randomise(ag.trace(base, x).splice("c", tap("x")).compile(), 2.0)
    seen, _ = given_to(model, "c.adapter.t", x)
    torch.testing.assert_close(seen, [x])


def test_a_span_reads_what_its_start_was_given():
    base, x = ByOperation().eval(), torch.randn(5, 6)
    graph = ag.trace(base, x).splice(ag.span("b", "c"), ag.Bottleneck(2, parallel=True))
    model = randomise(graph.compile(), 2.0)
    body, h = model.c.adapter, base.n(base.a(x))
    expected = base.c(base.b(h)) + body.up(torch.relu(body.down(h)))
    torch.testing.assert_close(model(x.clone()), expected)


def test_a_value_that_is_written_over_at_one_call_only():
    class Twice(Net):
        def forward(self, x):
            first = self.b(self.n(self.a(x)))
            second = self.n(self.a(first))
            return self.c(second) + self.relu(second)

    base, x = Twice().eval(), torch.randn(5, 6)
    model = randomise(ag.trace(base, x).splice("c", tap("n@1")).compile(), 2.0)
    seen, _ = given_to(model, "c.adapter.t", x)
    torch.testing.assert_close(seen, [base.n(base.a(base.b(base.n(base.a(x)))))])


def test_what_nobody_writes_over_is_not_copied():
    class Plain(Net):
        def forward(self, x):
            return self.c(torch.relu(self.n(self.a(x))))

    base, x = Plain().eval(), torch.randn(5, 6)
    graph = ag.trace(base, x)
    assert graph.imported.overwritten == ()
    model = graph.splice("c", tap("n")).compile()
    steps = [
        s for m in model.modules() if (p := vars(m).get("_adaptergraph_plan")) for v in p.visits for s in v.steps()
    ]
    assert [s.copied for s in steps if s.keep] == [False]


# ---------------------------------------------------------------------- modules that write over their argument


class Adds(nn.Module):
    """Writes into what it is given, and returns it."""

    def __init__(self):
        super().__init__()
        self.fc = linear()

    def forward(self, h):
        h.add_(self.fc(h))
        return h


class Chain(Net):
    def forward(self, x):
        return self.c(self.m(self.a(x)))


class Beside(Net):
    """Reads what the module wrote into, beside what it returns."""

    def forward(self, x):
        h = self.a(x)
        y = self.m(h)
        return self.c(h) + y


class Unread(Net):
    """Reads nothing of what the module returns."""

    def forward(self, x):
        h = self.a(x)
        self.m(h)
        return self.c(h)


WRITERS = [lambda: nn.ReLU(inplace=True), Adds, lambda: nn.Sequential(nn.SELU(inplace=True), nn.Tanh())]
IDS = ["leaf", "block", "container"]


@pytest.mark.parametrize("make", WRITERS, ids=IDS)
@pytest.mark.parametrize("where", ["before", "around"])
def test_bodies_before_and_around_a_module_that_writes_over_its_argument(make, where):
    base, x = Chain(make()).eval(), torch.randn(5, 6)
    method = ag.Bottleneck(2, parallel=where == "around")
    graph = ag.trace(base, x).splice("m", method, where=where)
    assert ag.Graph.from_json(graph.to_json()) == graph
    model = randomise(graph.compile(), 2.0)
    body, h = model.m.adapter, base.a(x)
    added = body.up(torch.relu(body.down(h)))

    def own(v):
        return base.m(v.clone())

    expected = base.c(own(h + added) if where == "before" else own(h) + added)
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in body.parameters())
    # by itself too: what it reads lies in a frame of its own
    torch.testing.assert_close(model.m(h.clone()), own(h + added) if where == "before" else own(h) + added)


@pytest.mark.parametrize("make", WRITERS, ids=IDS)
def test_what_is_read_beside_the_return_is_refused_before_and_kept_apart_after(make):
    if isinstance(make(), nn.Sequential):
        pytest.skip("writes over nothing that it was given")
    base, x = Beside(make()).eval(), torch.randn(5, 6)
    graph = ag.trace(base, x)
    with pytest.raises(ag.BadSplice, match="'c' reads what 'm' is given, and not only by way of its entry"):
        graph.splice("m", ag.Bottleneck(2), where="before")
    model = randomise(graph.splice("m", ag.Bottleneck(2)).compile(), 2.0)
    h = base.m(base.a(x))
    expected = base.c(h) + h + model.m.adapter.up(torch.relu(model.m.adapter.down(h)))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("make", WRITERS[:2], ids=IDS[:2])
@pytest.mark.parametrize("method", [ag.Bottleneck(2), ag.Bottleneck(2, parallel=True)], ids=["after", "around"])
def test_a_module_whose_return_nobody_takes_is_no_place_for_a_body(make, method):
    graph = ag.trace(Unread(make()).eval(), torch.randn(5, 6))
    with pytest.raises(ag.BadSplice) as error:
        graph.splice("m", method)
    assert "'m' gives a value that nothing reads: a body there would change nothing" in str(error.value)
    assert error.value.hint.startswith(
        "splice at 'a', which runs before it and is read, or leave it out of the pattern"
    )


# ---------------------------------------------------------------------- operations that give a view


class Half(Net):
    def forward(self, x):
        h = self.a(x)
        v = h[:, :3]
        v.mul_(2)
        return self.c(h)


class Picked(Net):
    def forward(self, x):
        h = self.a(x)
        v = h.view(-1, 2, 3).select(1, 0)
        v.copy_(self.b(x)[:, :3])
        return self.c(h)


class BaseFirst(Net):
    def forward(self, x):
        h = self.a(x)
        v = h[:, :3]
        h.mul_(2)
        return self.c(h) + v.sum()


class Returned(Net):
    def forward(self, x):
        h = self.a(x)
        v = torch.nn.functional.dropout(h, 0.1, self.training)
        v += self.b(x)
        return h


class ByAModule(Net):
    def forward(self, x):
        h = self.a(x)
        self.relu(h[:, 3:])
        return self.c(h)


VIEWS = [(Half, "/getitem"), (Picked, "/select"), (Picked, "/view"), (BaseFirst, "/getitem"), (Returned, "/dropout")]


@pytest.mark.parametrize(("cls", "at"), [*VIEWS, (ByAModule, "/getitem")])
def test_a_view_through_which_memory_is_written_and_read_is_no_place_for_a_body(cls, at):
    graph = ag.trace(cls().eval(), torch.randn(5, 6))
    assert ag.Graph.from_json(graph.to_json()) == graph
    with pytest.raises(ag.BadSplice) as error:
        graph.splice(at, ag.Bottleneck(2))
    assert f"the model itself reads what {at!r} gives, and not only by way of its exit" in str(error.value)
    assert "on an attribute, in a dict or list, or in one memory" in str(error.value)


class WrittenAndDropped(Net):
    """What is under the view is read no more."""

    def forward(self, x):
        h = self.a(x)
        v = h[:, :3] * 1.0
        w = h.view(-1, 6)
        w.mul_(2)
        return self.c(w) + v.sum()


def test_a_view_that_is_read_alone_is_a_place_for_a_body():
    base, x = WrittenAndDropped().eval(), torch.randn(5, 6)
    model = randomise(ag.trace(base, x).splice("/view", ag.Bottleneck(2)).compile(), 2.0)
    body, h = model.adapter_view, base.a(x)
    expected = base.c(2 * (h + body.up(torch.relu(body.down(h))))) + h[:, :3].sum()
    torch.testing.assert_close(model(x), expected)


def test_many_views_of_written_memory_are_traced_in_time_and_told_once():
    class Loop(Net):
        def forward(self, x):
            h = self.a(x)
            for i in range(40):
                h[:, i % 6].add_(1)
                h = h.view(-1, 6)
                h.mul_(0.5)
            return self.c(h)

    graph = ag.trace(Loop().eval(), torch.randn(5, 6))
    assert len(graph.imported.asides) == 40
