"""Bodies before a host, over a span, at one call, at one output, at an operation: the graph and what becomes of it.

What the model computes then is compared with a forward written by hand in test_matrix.py.
"""

from collections import OrderedDict

import pytest
import torch
from byhand import randomise
from models import CASES
from torch import nn

import adaptergraph as ag

METHOD = ag.Bottleneck(4)
PARALLEL = ag.Bottleneck(4, parallel=True)
KINDS = {
    "before": ("llama", "model.layers.*.self_attn.q_proj", METHOD, "before", "model.layers.0.self_attn.q_proj.adapter"),
    "span": (
        "bert",
        ag.span("bert.encoder.layer.*.intermediate", "bert.encoder.layer.*.output.dense"),
        PARALLEL,
        None,
        "bert.encoder.layer.0.output.dense.adapter",
    ),
    "several": (
        "bert",
        [ag.span("bert.encoder.layer.0.intermediate", "bert.encoder.layer.0.output.dense"), "bert.pooler.dense"],
        PARALLEL,
        None,
        "bert.encoder.layer.0.output.dense.adapter",
    ),
    "call": ("roberta", "classifier.dropout@1", METHOD, None, "classifier.dropout.adapter_call1"),
    "first call": ("roberta", "classifier.dropout@0", METHOD, None, "classifier.dropout.adapter_call0"),
    "calls": ("t5", "{encoder,decoder}.dropout@1", METHOD, None, "encoder.dropout.adapter_call1"),
    "output": ("bert", "bert.encoder:last_hidden_state", METHOD, None, "bert.encoder.adapter_last_hidden_state"),
    "mid-block": ("llama", "model.layers.*/add", METHOD, None, "model.layers.0.adapter_add"),
    "boundary": ("bert", "bert.encoder.layer.*.output/add", METHOD, None, "bert.encoder.layer.0.output.adapter_add"),
}


@pytest.fixture(params=KINDS)
def kind(request, traced):
    name, at, method, where, body = KINDS[request.param]
    case, model, graph = traced(name)
    return case, model, graph, graph.splice(at, method, where=where), body


def logits(output):
    return output[0] if not isinstance(output, torch.Tensor) else output


def test_where_a_body_lives_and_its_keys(kind):
    _, _, _, spliced, body = kind
    assert next(iter(spliced.bodies)) == body
    keys = list(spliced.compile().state_dict())
    assert [k for k in keys if k.startswith(body + ".")] == [
        f"{body}.{part}" for part in ("down.weight", "down.bias", "up.weight", "up.bias")
    ]


def test_files_recipes_and_taking_out(kind, tmp_path):
    case, model, graph, spliced, _ = kind
    assert spliced != graph
    assert spliced.unsplice() == graph
    assert spliced.unsplice(list(spliced.bodies)) == graph
    again = ag.Graph.from_json(spliced.to_json())
    assert again == spliced
    assert again.splices == spliced.splices
    assert ag.apply(graph, spliced.recipe()) == spliced
    adapted = randomise(spliced.compile())
    ag.save(adapted, tmp_path / "adapter")
    loaded = ag.load(model, tmp_path / "adapter")
    args, kwargs = case.args()
    with torch.no_grad():
        expected = logits(adapted(*args, **kwargs))
        assert torch.equal(logits(loaded(*args, **kwargs)), expected)
        assert not torch.allclose(logits(model(*args, **kwargs)), expected)


def test_pictures_tables_and_plans_know_them(kind):
    _, _, _, spliced, body = kind
    text = spliced.summary().plain if hasattr(spliced.summary(), "plain") else str(spliced.summary())
    assert "+" in text
    assert body in spliced.dot(fold=False, open=()) or body.rpartition(".")[2] in spliced.dot()
    assert spliced.plan().trained == sum(spliced.params[p].size for p in spliced.body_params)


# ---------------------------------------------------------------------- declared graphs


def declared():
    x = ag.input("x", shape=("batch", 6))
    up = ag.dense(x, 8, name="up")
    down = ag.dense(ag.relu(up, name="act"), 6, name="down")
    return ag.Graph(ag.add([x, down], name="sum")).freeze()


def test_before_a_declared_node_replaces_what_it_reads_and_nobody_else():
    graph = declared().splice("up", METHOD, where="before")
    assert graph["up"].inputs == ("up.adapter.residual",)
    assert graph["sum"].inputs == ("x", "down")
    model = randomise(graph.compile())
    x = torch.randn(3, 6)
    body = model.up.adapter
    inner = x + body.up(torch.relu(body.down(x)))
    torch.testing.assert_close(model(x), x + model.down(torch.relu(model.up(inner))))


def test_two_bodies_before_one_host_run_in_splice_order():
    graph = declared().splice("up", METHOD, name="one", where="before").splice("up", METHOD, name="two", where="before")
    assert graph.bodies["up.two"].calls == (("up.one.residual", "up.two.residual"),)
    assert graph["up"].inputs == ("up.two.residual",)
    assert graph.unsplice("up.one")["up"].inputs == ("up.two.residual",)
    assert graph.unsplice("up.one").bodies["up.two"].calls == (("x", "up.two.residual"),)


def test_a_body_around_a_host_reads_what_a_body_before_it_gives():
    before_first = declared().splice("up", METHOD, name="pre", where="before").splice("up", PARALLEL_8, name="side")
    around_first = declared().splice("up", PARALLEL_8, name="side").splice("up", METHOD, name="pre", where="before")
    assert before_first["up.side.down"].inputs == around_first["up.side.down"].inputs == ("up.pre.residual",)


PARALLEL_8 = ag.Bottleneck(3, parallel=True)


def test_a_span_over_declared_nodes():
    graph = declared().splice(ag.span("up", "down"), PARALLEL)
    model = randomise(graph.compile())
    x = torch.randn(3, 6)
    body = model.down.adapter
    expected = model.down(torch.relu(model.up(x))) + body.up(torch.relu(body.down(x)))
    torch.testing.assert_close(model(x), x + expected)
    assert graph.splices[0].at == ag.span("up", "down")
    assert ag.Graph.from_json(graph.to_json()) == graph


# ---------------------------------------------------------------------- what stays refused


class Layers(nn.Module):
    """What the forwards below run."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)


class Branches(Layers):
    def forward(self, x):
        h = self.fc(x) * 2
        if h.sum() > 0:
            h = h + 1
        return self.last(h) + h


class Inside(Layers):
    def forward(self, x):
        h = self.fc(x) * 2
        with torch.no_grad():
            h = h + 1
        return self.last(h) + h


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Inside, "it runs a part of itself in a `with` block"),
        (Branches, "it branches on what a value is (gt)"),
    ],
)
def test_a_forward_that_cannot_be_lowered_is_refused_with_the_places_near_it(cls, why):
    model = nn.Sequential(cls())
    before = {n: type(m) for n, m in model.named_modules()}
    graph = ag.trace(model, torch.ones(2, 4)).splice("0/mul", METHOD)
    with pytest.raises(ag.BadSplice) as caught:
        graph.compile()
    text = str(caught.value)
    assert text.startswith("'0/mul' is an operation inside a forward that cannot be reached")
    assert why in text
    assert "splice at a module near it:" in text
    assert "'0'" in text
    with pytest.raises(ag.BadSplice):
        graph.compile(inplace=True)
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert all(not hasattr(m, "_adaptergraph_plan") for m in model.modules())


def test_arguments_that_cannot_be_made_again():
    class Takes(Layers):
        def forward(self, x, keep):
            h = self.fc(x) * 2
            keep.append(h)
            return self.last(h) + h

    model = Takes()
    graph = ag.trace(model, torch.ones(2, 4), []).splice("/mul", METHOD)
    with pytest.raises(ag.BadSplice, match="was traced with arguments that cannot be made again"):
        ag.Graph.from_json(graph.to_json()).compile(model)


@pytest.mark.parametrize("more", [{}, {"use_cache": False}], ids=["cache", "no_cache"])
def test_an_operation_of_a_forward_that_reads_a_cache(traced, more):
    case, base, _ = traced("llama")
    at = "model.layers.0.self_attn/transpose_1"
    args, kwargs = case.args()
    model = ag.trace(base, *args, **kwargs, **more).splice(at, METHOD).compile()
    body = randomise(model).get_submodule("model.layers.0.self_attn.adapter_transpose_1")

    def on_keys(module, args, output):
        keys = output.unflatten(-1, (-1, body.down.in_features))
        return (keys + body.up(torch.relu(body.down(keys)))).flatten(-2)

    # a mask that masks something is a tensor in the trace and in the call
    padded = {**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"]), "use_cache": False}
    padded["attention_mask"][0, :2] = 0
    with base.get_submodule("model.layers.0.self_attn.k_proj").register_forward_hook(on_keys), torch.no_grad():
        expected = logits(base(*args, **padded))
    with torch.no_grad():
        torch.testing.assert_close(logits(model(*args, **padded)), expected)


class Fixed:
    """An object that cannot be copied."""

    def __init__(self):
        self.values = torch.ones(4)

    def __deepcopy__(self, memo):
        raise TypeError


def test_an_operation_of_a_forward_that_asks_for_an_object():
    class Takes(Layers):
        def forward(self, x, keep):
            return self.last((self.fc(x) * 2 if keep is not None else x) + 1) + 1

    class Optional(Layers):
        def forward(self, x, keep=None):
            return self.last((self.fc(x) * 2 if keep is not None else x) + 1) + 1

    x, base = torch.randn(2, 4), Takes()
    model = ag.trace(base, x, object()).splice("/mul", METHOD).compile()
    body = randomise(model).get_submodule("adapter_mul")
    h = base.fc(x) * 2
    with torch.no_grad():
        torch.testing.assert_close(
            model(x, object()), base.last(h + body.up(torch.relu(body.down(h))) + 1) + 1, rtol=0, atol=0
        )
    for cls, advice in ((Takes, False), (Optional, True)):
        graph = ag.trace(cls(), x, Fixed()).splice("/mul", METHOD)
        with pytest.raises(ag.BadSplice, match="which is a Fixed that cannot be made again") as caught:
            graph.compile()
        assert ("trace without it: for many models, ag.trace(model, …, use_cache=False)" in str(caught.value)) is advice


@pytest.mark.parametrize("name", [n for n in CASES if n in ("bert", "llama", "gpt2", "t5", "vit")])
def test_a_refused_splice_changes_nothing(traced, name):
    graph = traced(name).graph
    with pytest.raises(ag.UnknownNode, match="nearest"):
        graph.splice("**.laier.*/add", METHOD)


class Aside(nn.Module):
    """A module without modules that leaves a value for others."""

    def __init__(self):
        super().__init__()
        self.left = []

    def forward(self, x):
        self.left[:] = [x * 2]
        return x + 1


class Leaves(nn.Module):
    def __init__(self):
        super().__init__()
        self.aside = Aside()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.aside(x)
        return self.fc(y + self.aside.left[0])


def test_a_value_that_a_module_leaves_for_others_is_no_place():
    graph = ag.trace(Leaves(), torch.ones(2, 4))
    inner = next(n for n in graph if n.startswith("aside:"))
    with pytest.raises(
        ag.BadSplice, match="is computed inside a module without modules: no body can be attached there"
    ):
        graph.splice(inner, METHOD)
    reads = graph.splice("fc", lambda site: site.output + ag.dense(site.graph[inner], 4))
    with pytest.raises(ag.BadSplice, match="is computed inside a module without modules, where it cannot be read"):
        reads.compile()


def test_a_replica_runs_its_own_body_at_an_operation(traced):
    graph = traced("llama").graph
    layer = randomise(graph.splice("model.layers.*/add", METHOD).compile()).model.layers[0]
    replica = layer._replicate_for_data_parallel()
    replica._modules = dict(layer._modules)
    replica._modules["adapter_add"] = nn.Identity()
    x = torch.randn(1, 3, 32)
    position = torch.ones(1, 3, 8), torch.zeros(1, 3, 8)
    given = {"attention_mask": None, "position_ids": None, "past_key_values": None, "position_embeddings": position}
    with torch.no_grad():
        middle = x + layer.self_attn(hidden_states=layer.input_layernorm(x), **given)[0]
        expected = middle + layer.mlp(layer.post_attention_layernorm(middle))
        torch.testing.assert_close(replica(x, **given), expected)
        assert not torch.allclose(layer(x, **given), expected)


class GivesTheSum(nn.Module):
    """Returns a sum that its layer reads too."""

    def __init__(self):
        super().__init__()
        self.fc, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.fc(x) + x
        return {"sum": h, "last": self.last(h)}


def test_an_operation_that_the_model_returns_is_replaced_there_too():
    base, x = GivesTheSum(), torch.randn(2, 4)
    model = randomise(ag.trace(base, x).splice("/add", METHOD).compile())
    body = model.adapter_add
    h = base.fc(x) + x
    h = h + body.up(torch.relu(body.down(h)))
    found = model(x)
    torch.testing.assert_close(found["sum"], h)
    torch.testing.assert_close(found["last"], base.last(h))


class Shared(nn.Module):
    """Gives one value to one module twice."""

    def __init__(self):
        super().__init__()
        self.block = GivesTheSum()

    def forward(self, x):
        return self.block(x)["last"] * torch.tanh(self.block(x)["last"])


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [("block", "block", "before"), ("block/add", "block@1/add", None), ("block@1/add", "block/add", None)],
)
def test_bodies_at_two_calls_with_one_value_run_in_splice_order(first, second, where):
    base, x = Shared(), torch.randn(2, 4)
    graph = ag.trace(base, x).splice(first, METHOD, name="one", where=where)
    graph = graph.splice(second, METHOD, name="two", where=where)
    model = randomise(graph.compile())
    one, two = graph.bodies.values()
    both = {written for _, written in one.calls} & {read for read, _ in two.calls}
    assert len(both) == min(len(one.calls), len(two.calls))
    bodies = [model.get_submodule(name) for name in graph.bodies]

    def run(h, which):
        for body in which:
            h = h + body.up(torch.relu(body.down(h)))
        return h

    def block(call):
        which = [b for b, at in zip(bodies, (first, second), strict=True) if call == 1 or "@1" not in at]
        given = run(x, which) if where else x
        h = base.block.fc(given) + given
        return base.block.last(h if where else run(h, which))

    torch.testing.assert_close(model(x), block(0) * torch.tanh(block(1)))


# ---------------------------------------------------------------------- splices commute


class Steps(nn.Module):
    """`first` is called twice and so is `last`; `wide` is read by both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.first, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        h = torch.tanh(self.wide(x))
        one = self.first(h)
        two = self.first(torch.tanh(one))
        return self.last(torch.relu(self.last(one + h)) + two)


def tapping(name):
    """A body that adds what it makes of an earlier value."""
    return lambda site: site.output + ag.dense(site.graph[name], 4, name="tapped")


def serial(body, h):
    return h + body.up(torch.relu(body.down(h)))


@pytest.mark.parametrize("order", ["tap first", "body first"])
def test_a_tap_reads_what_the_model_hands_on_whichever_was_spliced_first(order):
    base, x = Steps(), torch.randn(2, 4)
    graph = ag.trace(base, x)
    splices = [("last@1", tapping("wide"), "tap"), ("wide", METHOD, "adapter")]
    for at, method, name in splices if order == "tap first" else splices[::-1]:
        graph = graph.splice(at, method, name=name)
    model = randomise(graph.compile())
    wide = serial(model.wide.adapter, base.wide(x))
    h = torch.tanh(wide)
    one = base.first(h)
    out = base.last(torch.relu(base.last(one + h)) + base.first(torch.tanh(one)))
    torch.testing.assert_close(model(x), out + model.last.tap_call1.tapped(wide))


@pytest.mark.parametrize("name", ["first", "first@0", "first@1"])
def test_at_each_call_a_body_reads_the_value_of_that_call_or_of_the_one_it_names(name):
    base, x = Steps(), torch.randn(2, 4)

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = base.first, base.last

        def forward(self, x):
            one = self.first(x)
            two = self.first(torch.tanh(one))
            return self.last(torch.relu(self.last(one + two)))

    late = Late()
    model = randomise(ag.trace(late, x).splice("last", tapping(name)).compile())
    one = base.first(x)
    two = base.first(torch.tanh(one))
    tapped = {"first": (one, two), "first@0": (one, one), "first@1": (two, two)}[name]
    add = model.last.adapter.tapped
    inner = base.last(one + two) + add(tapped[0])
    torch.testing.assert_close(model(x), base.last(torch.relu(inner)) + add(tapped[1]))


class Round(nn.Module):
    """`turn` is called on what `once` gave, and on what `between` gave of that."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.once, self.turn, self.between = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.turn(self.between(self.turn(self.once(x))))


@pytest.mark.parametrize("order", ["tap first", "before first"])
def test_a_tap_of_what_is_called_once_and_a_body_before_its_host(order):
    """At the first call the tapped value comes to the host through the other body, at the second it does not."""
    base, x = Round(), torch.randn(2, 4)
    graph = ag.trace(base, x)
    splices = [(tapping("once"), "tap", None), (METHOD, "early", "before")]
    for method, name, where in splices if order == "tap first" else splices[::-1]:
        graph = graph.splice("turn", method, name=name, where=where)
    alone = ag.trace(base, x).splice("turn", tapping("once"), name="tap")
    assert graph.unsplice("turn.early") == alone
    model = randomise(graph.compile())
    early, tapped = model.turn.early, model.turn.tap.tapped
    once = base.once(x)
    given = serial(early, once)
    one = base.turn(given) + tapped(given)
    two = base.turn(serial(early, base.between(one))) + tapped(once)
    torch.testing.assert_close(model(x), two)


@pytest.mark.parametrize("order", ["tap first", "before first"])
def test_a_tap_and_a_body_before_one_call(order):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act = nn.Linear(4, 4), nn.Tanh()

        def forward(self, x):
            return self.act(self.up(self.act(self.up(x))))

    base, x = Twice(), torch.randn(2, 4)
    graph = ag.trace(base, x)
    splices = [("act", tapping("up"), "tap", None), ("act@1", METHOD, "early", "before")]
    for at, method, name, where in splices if order == "tap first" else splices[::-1]:
        graph = graph.splice(at, method, name=name, where=where)
    model = randomise(graph.compile())
    tapped, early = model.act.tap.tapped, model.act.early_call1
    one = torch.tanh(base.up(x)) + tapped(base.up(x))
    given = serial(early, base.up(one))
    torch.testing.assert_close(model(x), torch.tanh(given) + tapped(given))


def test_the_first_call_of_the_host_itself_is_refused_where_it_is_each_calls_own_value():
    graph = ag.trace(Round(), torch.randn(2, 4))
    with pytest.raises(ag.BadSplice, match="reads 'turn' as the value of each call and of the first one"):
        graph.splice("turn", tapping("turn@0"))
    assert graph.splice("once", tapping("once@0")).bodies


class States(nn.Module):
    """The second output of `lstm` is read only after `head`, which reads the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head, self.last = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        out, (hidden, _) = self.lstm(x)
        return self.head(out), self.last(hidden)


def test_before_what_reads_one_of_several_outputs_the_others_stay_what_they_are():
    base, x = States(), torch.randn(2, 3, 4)
    graph = ag.trace(base, x).splice("head", METHOD, where="before")
    assert graph["lstm:1:0"].inputs == ("lstm",)
    assert ag.Graph.from_json(graph.to_json()) == graph
    model = randomise(graph.compile())
    out, (hidden, _) = base.lstm(x)
    torch.testing.assert_close(model(x), (base.head(serial(model.head.adapter, out)), base.last(hidden)))


@pytest.mark.parametrize("where", ["before", "after"])
def test_one_of_several_outputs_is_there_as_soon_as_its_module_ran(where):
    base, x = States(), torch.randn(1, 3, 4)

    def tap(site):
        state = ag.nx(site.graph["lstm:1:0"], lambda t: t[0, 0])
        return site.output + ag.dense(state, 4, name="tapped")

    model = randomise(ag.trace(base, x).splice("head", tap, where=where).compile())
    out, (hidden, _) = base.lstm(x)
    more = model.head.adapter.tapped(hidden[0, 0])
    expected = base.head(out + more) if where == "before" else base.head(out) + more
    torch.testing.assert_close(model(x), (expected, base.last(hidden)))


def test_a_body_at_one_of_several_outputs_runs_before_what_comes_after_its_module():
    graph = ag.trace(States(), torch.randn(1, 3, 4))
    with pytest.raises(ag.BadSplice, match="reads 'head', which runs later in the model's own forward"):
        graph.splice("lstm:1:0", lambda site: site.output + ag.nx(site.graph["head"], torch.sum))


def test_a_body_around_a_module_that_is_called_on_what_it_gave_comes_back_from_a_file():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.turn = nn.Linear(4, 4)

        def forward(self, x):
            return self.turn(self.turn(x))

    graph = ag.trace(Loop(), torch.randn(2, 4)).splice("turn", PARALLEL)
    assert ag.Graph.from_json(graph.to_json()) == graph


def test_one_value_by_both_of_its_names_is_refused():
    graph = ag.trace(Steps(), torch.randn(2, 4))

    def both(site):
        return site.output + ag.dense(site.graph["wide"] + site.graph["wide@0"], 4, name="tapped")

    with pytest.raises(ag.BadSplice, match=r"reads 'wide' as the value of each call and of the first one") as caught:
        graph.splice("last", both)
    assert "with @0 or without" in str(caught.value)


@pytest.mark.parametrize("order", ["span first", "before first"])
def test_a_span_reads_what_its_start_is_given(order):
    x, base = torch.randn(2, 4), nn.Sequential(*(nn.Tanh() if i % 2 else nn.Linear(4, 4) for i in range(5)))
    graph = ag.trace(base, x)
    splices = [(ag.span("2", "4"), PARALLEL, "wide", None), ("2", METHOD, "early", "before")]
    for at, method, name, where in splices if order == "span first" else splices[::-1]:
        graph = graph.splice(at, method, name=name, where=where)
    model = randomise(graph.compile())
    given = serial(model.get_submodule("2.early"), torch.tanh(base[0](x)))
    wide = model.get_submodule("4.wide")
    expected = base[4](torch.tanh(base[2](given))) + wide.up(torch.relu(wide.down(given)))
    torch.testing.assert_close(model(x), expected)


class Unread(nn.Module):
    """Values of which nothing comes, and values that are kept beside the output."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 6)
        self.dead = nn.Linear(6, 6)
        self.kept = nn.Linear(6, 6)
        self.noted = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.loss = None

    def forward(self, x):
        _states, (hidden, cell) = self.lstm(x)
        self.dead(x)
        self.loss = self.kept(x).square().mean()
        self.tied(x)
        return self.tied(hidden + cell), Notes(self.noted(x))


class Notes:
    """An object that holds a tensor, and is no structure that a trace looks into."""

    def __init__(self, value):
        self.value = value


def unread():
    torch.manual_seed(0)
    base, x = Unread(), torch.randn(3, 2, 6)
    return base, x, ag.trace(base, x)


@pytest.mark.parametrize("at", ["lstm", "lstm:0", "dead", "dead@0", "tied@0", "{lstm,dead,tied}"])
def test_a_body_of_which_nothing_comes_is_refused(at):
    with pytest.raises(ag.BadSplice, match="a body there would change nothing"):
        unread()[2].splice(at, METHOD)


@pytest.mark.parametrize("at", ["lstm:1:0", "lstm:1:1", "tied", "tied@1"])
def test_a_body_at_what_is_read_of_such_a_module_changes_the_output(at):
    base, x, graph = unread()
    with torch.no_grad():
        changed = randomise(graph.splice(at, METHOD).compile())(x)[0]
        assert not torch.equal(changed, base.eval()(x)[0])


def test_a_value_that_is_kept_beside_the_output_is_a_place():
    base, x, graph = unread()
    assert ag.Graph.from_json(graph.to_json()) == graph
    with torch.no_grad():
        before = base.eval()(x)[1]
    for at in ("kept", "noted"):
        model = randomise(graph.splice(at, METHOD).compile())
        with torch.no_grad():
            after = model(x)[1]
        assert torch.equal(model.loss, base.loss) == (at != "kept")
        assert torch.equal(after.value, before.value) == (at != "noted")


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.dead = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6)

    def forward(self, x):
        self.dead(x)
        return self.head(x)


def test_a_dead_value_that_another_body_reads_is_a_place():
    graph = ag.trace(Idle(), x := torch.randn(2, 6))
    with pytest.raises(ag.BadSplice, match="'dead' gives a value that nothing reads"):
        graph.splice("dead", METHOD)
    tapped = graph.splice("head", lambda site: site.output + ag.dense(site.graph["dead"], 6))
    both = tapped.splice("dead", METHOD)
    with torch.no_grad():
        one, other = (randomise(g.compile())(x) for g in (tapped, both))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("declared", [False, True])
def test_a_body_that_reads_nothing_of_its_host_takes_its_place(declared):
    base = nn.Sequential(OrderedDict(one=nn.Linear(4, 5), two=nn.Linear(5, 4)))
    x = torch.randn(2, 4)
    graph = ag.trace(base, x)
    if declared:
        first = ag.dense(ag.input("x", shape=("batch", 4)), 5, name="one")
        graph = ag.Graph(ag.dense(first, 4, name="two"))
    model = randomise(graph.splice("two", lambda site: ag.dense(site.graph["one"], 4, name="own")).compile())
    assert torch.equal(model(x), model.get_submodule("two.adapter.own")(model.one(x)))
