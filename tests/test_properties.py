"""What holds for every declared graph: random ones, and random verbs in random order."""

import string

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import adaptergraph as ag
from adaptergraph.names import reserved

WIDTHS = (2, 3, 4)
SETTINGS = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

segments = st.text(string.ascii_lowercase + string.digits + "_", min_size=1, max_size=3).filter(
    lambda s: (
        s not in reserved()
        and s.isidentifier()
        and s not in ("adapter", "weight", "bias", "as", "if", "in", "is", "or")
    )
)
names = st.lists(segments, min_size=1, max_size=3).map(".".join)


@st.composite
def graphs(draw, with_bodies=False):
    """A random graph of dense, activations, sums, concatenations and norms, with and without names."""
    nodes = [ag.input(n, shape=("batch", draw(st.sampled_from(WIDTHS)))) for n in ("x", "y")[: draw(st.integers(1, 2))]]
    taken = {"x", "y"}

    def name():
        one = draw(st.none() | names)
        if one is None or one in taken:
            return None
        taken.add(one)
        return one

    for _ in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from(["dense", "act", "add", "concatenate", "norm", "wrap"]))
        x = draw(st.sampled_from(nodes))
        if kind == "dense":
            node = ag.dense(x, draw(st.sampled_from(WIDTHS)), bias=draw(st.booleans()), name=name())
        elif kind == "act":
            node = ag.activation(x, draw(st.sampled_from(["relu", "tanh", "gelu"])), name=name())
        elif kind == "norm":
            node = ag.layer_norm(x, name=name())
        elif kind == "concatenate":
            node = ag.concatenate([x, draw(st.sampled_from(nodes))], name=name())
        elif kind == "wrap":
            node = ag.Adapter.wrap(x, bottleneck_size=2, name=f"wrap{len(taken)}")
            taken.add(f"wrap{len(taken)}")
        else:
            same = [n for n in nodes if n.shape == x.shape]
            node = ag.add([x, draw(st.sampled_from(same))], name=name())
        nodes.append(node)
    ends = draw(st.lists(st.sampled_from(nodes[1:]), min_size=1, max_size=3, unique_by=id))
    outputs = draw(st.sampled_from([ends[-1], ends, {f"o{i}": n for i, n in enumerate(ends)}]))
    try:
        graph = ag.Graph(outputs)
    except ag.DuplicateName:
        # `a.weight` beside a dense `a`, or a name below another body's
        assume(False)
    if with_bodies:
        for i in range(draw(st.integers(0, 2))):
            graph = spliced(draw, graph, f"old{i}")
    return graph


def places(graph):
    """Nodes and containers at which a body can be."""
    return [n for n in graph.selectable if graph.op_of(n) != "input" and (n not in graph or graph[n].body is None)]


def spliced(draw, graph, name="adapter", method=None):
    at = places(graph)
    assume(at)
    hosts = draw(st.lists(st.sampled_from(at), min_size=1, max_size=3, unique=True))
    where = draw(st.sampled_from(["after", "before", "around"]))
    try:
        return graph.splice(hosts, method or draw(METHODS), name=name, where=where)
    except ag.BadSplice as error:
        # not every layer has one clear input
        if "float tensors" not in str(error) and "is of the kind" not in str(error):
            raise
        assume(False)


def strong(site):
    """A body that changes a lot."""
    return site.output * 0.5 + ag.dense(ag.gelu(ag.dense(site.output, 3, weight_init=1.0)), site.output.shape[-1])


METHODS = st.sampled_from(
    [ag.Bottleneck(2), ag.Bottleneck(3, activation="gelu", scale="learned"), ag.Bottleneck(reduction=2, dropout=0.1)]
)


def given_to(graph):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(3, *node.shape[1:], generator=generator) for n, node in graph.inputs.items()}


def run(graph, model=None):
    out = (model or graph.compile().eval())(**given_to(graph))
    return list(out.values()) if isinstance(out, dict) else list(out) if isinstance(out, tuple) else [out]


def equal(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ---------------------------------------------------------------------- splicing


@SETTINGS
@given(graphs(with_bodies=True), st.data())
def test_unsplice_undoes_splice(graph, data):
    new = spliced(data.draw, graph)
    assert new != graph
    hosts = new.splices[-1].hosts
    assert new.unsplice([f"{h}.adapter" for h in hosts]) == graph
    one_by_one = new
    for host in data.draw(st.permutations(hosts)):
        one_by_one = one_by_one.unsplice(f"{host}.adapter")
    assert one_by_one == graph
    assert list(one_by_one.inputs) == list(graph.inputs)
    assert one_by_one.splices == graph.splices


@SETTINGS
@given(graphs(with_bodies=True), st.data())
def test_a_zero_init_splice_leaves_outputs_bit_equal(graph, data):
    new = spliced(data.draw, graph)
    assert equal(run(graph), run(new))
    assert graph.outputs.keys() == new.outputs.keys() if isinstance(graph.outputs, dict) else True


@SETTINGS
@given(graphs(), st.data())
def test_the_order_of_splices_at_different_places_is_no_matter(graph, data):
    at = places(graph)
    assume(len(at) > 1)
    one, two = data.draw(st.lists(st.sampled_from(at), min_size=2, max_size=2, unique=True))
    first = graph.splice(one, strong).splice(two, strong)
    second = graph.splice(two, strong).splice(one, strong)
    assert first == second
    assert equal(run(first), run(second))
    assert first.unsplice(f"{one}.adapter") == graph.splice(two, strong)


@SETTINGS
@given(graphs(), st.data())
def test_a_body_acts_on_what_is_read_after_it(graph, data):
    """The same by hand: the host's value is replaced wherever it is read, and nothing else changes."""
    at = data.draw(st.sampled_from([n for n in graph if graph.op_of(n) != "input" and graph[n].body is None] or ["x"]))
    assume(at != "x" and not any(at in call for b in graph.bodies.values() for call in b.calls))
    new = graph.splice(at, lambda s: ag.multiply([s.output, s.output], name="square"))
    wanted = new.compile().eval()
    values = dict(given_to(graph))
    for name, node in graph._nodes.items():
        if name not in values:
            single = ag.Graph(made_again(node, values))
            module = single.compile(state={k: v for k, v in wanted.state_dict().items() if k in single.params}).eval()
            reads = {f"i{i}": values[v] for i, v in enumerate(dict.fromkeys(node.inputs))}
            values[name] = module(**reads)
        if name == at:
            values[name] = values[name] * values[name]
    for mine, name in zip(run(new, wanted), graph.output_names(), strict=True):
        torch.testing.assert_close(mine, values[name])


def made_again(node, values):
    from dataclasses import replace

    inputs = {
        v: ag.input(f"i{i}", shape=("batch", *values[v].shape[1:])) for i, v in enumerate(dict.fromkeys(node.inputs))
    }
    return replace(node, inputs=tuple(inputs[v] for v in node.inputs), body=None)


# ---------------------------------------------------------------------- training


@SETTINGS
@given(graphs(with_bodies=True), st.data())
def test_exactly_the_trained_parameters_get_gradients_and_move(graph, data):
    params = list(graph.params)
    assume(params)
    graph = graph.freeze()
    for _ in range(data.draw(st.integers(0, 2))):
        one = data.draw(st.sampled_from(params))
        verb = data.draw(st.sampled_from([graph.freeze, graph.unfreeze]))
        graph = verb(one, bodies=one in graph.body_params)
    model = graph.compile()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert before.keys() == graph.params.keys()
    trained = [p for p in model.parameters() if p.requires_grad]
    assume(trained)
    sum(o.sin().sum() for o in run(graph, model)).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is graph.trained[name]
        assert (parameter.grad is not None) is graph.trained[name]
        if not graph.trained[name]:
            assert torch.equal(parameter, before[name])


@SETTINGS
@given(graphs(with_bodies=True), st.data())
def test_freezing_is_an_algebra(graph, data):
    hosts = [p for p in graph.params if p not in graph.body_params]
    assume(hosts)
    a, b = (data.draw(st.sampled_from(hosts)) for _ in range(2))
    assert graph.freeze(a).freeze(a) == graph.freeze(a)
    assert graph.freeze(a).freeze(b) == graph.freeze(b).freeze(a) == graph.freeze([a, b])
    assert graph.freeze(a).unfreeze(a) == graph.unfreeze(a)
    assert graph.unfreeze(a).freeze(a) == graph.freeze(a)
    frozen = graph.freeze()
    assert not any(frozen.trained[p] for p in hosts)
    assert all(frozen.trained[p] == graph.trained[p] for p in graph.body_params)
    assert frozen.unfreeze(hosts) == graph.unfreeze(hosts)
    assert frozen.unfreeze(a).trained == {**frozen.trained, a: True}
    assert frozen.unsplice() == graph.unsplice().freeze() if frozen.bodies else True


@SETTINGS
@given(graphs(with_bodies=True), st.data())
def test_initial_values_do_not_depend_on_what_else_there_is(graph, data):
    new = spliced(data.draw, graph)
    one, two = (dict(g.compile().named_parameters()) for g in (graph, new))
    assert all(torch.equal(p, two[n]) for n, p in one.items())


# ---------------------------------------------------------------------- any verb, in any order


def verb(draw, graph, step):
    """One verb with arguments that can work; None if there are none."""
    at = [n for n in graph if graph.op_of(n) != "input" and graph[n].body is None]
    if not at:
        return None
    name = draw(st.sampled_from(at))
    node = graph[name]
    kind = draw(
        st.sampled_from(["splice", "unsplice", "replace", "wrap", "rename", "remove", "truncate", "tap", "freeze"])
    )
    if kind == "splice":
        return graph.splice(draw(st.sampled_from(places(graph))), draw(METHODS), name=f"s{step}")
    if kind == "unsplice" and graph.bodies:
        return graph.unsplice(draw(st.sampled_from(list(graph.bodies))))
    if kind == "replace":
        return graph.replace(name, ag.dense(graph[draw(st.sampled_from(list(graph.inputs)))], node.shape[-1]))
    if kind == "wrap":
        return graph.replace(name, ag.Adapter.wrap(node, bottleneck_size=2, name=f"w{step}"))
    if kind == "rename":
        return graph.rename(name, draw(names))
    if kind == "remove":
        return graph.remove(name)
    if kind == "truncate":
        return graph.truncate(name)
    if kind == "tap":
        return graph.tap(name)
    if kind == "freeze" and graph.params:
        return graph.freeze() if draw(st.booleans()) else graph.freeze(bodies=True)
    return None


@SETTINGS
@given(graphs(), st.data())
def test_check_holds_after_any_verbs(graph, data):
    for step in range(data.draw(st.integers(1, 6))):
        before = list(graph), dict(graph._nodes)
        try:
            changed = verb(data.draw, graph, step)
        except (ag.BadSplice, ag.ShapeMismatch, ag.DuplicateName):
            continue
        assert (list(graph), graph._nodes) == before, "a graph never changes"
        if changed is None:
            continue
        invariants(changed)
        for name in changed:
            if name in graph and changed[name].same(graph[name]):
                assert changed[name].params == graph[name].params
        graph = changed
    model = graph.compile().eval()
    assert list(dict(model.named_parameters())) == sorted(graph.params, key=list(dict(model.named_parameters())).index)
    assert set(dict(model.named_parameters())) == set(graph.params)
    run(graph, model)
    assert ag.Graph.from_json(graph.to_json()) == graph


@SETTINGS
@given(graphs(with_bodies=True), st.data())
def test_no_verb_makes_a_cycle(graph, data):
    """What stands for a node reads any other one: what comes earlier works, what comes later is refused by name."""
    order = list(graph)
    own = [n for n in order if graph[n].body is None and graph.op_of(n) != "input"]
    assume(own)
    name = data.draw(st.sampled_from(own))
    read = data.draw(st.sampled_from([n for n in order if (graph[n].shape or ())[:1] == ("batch",)]))
    node = graph[name]

    def write(inputs=None, output=None):
        return ag.dense(graph[read], node.shape[-1], name="new.node")

    ways = {
        "rewrite": lambda: graph.rewrite_nodes(lambda n: write if n.name == name else None),
        "map": lambda: graph.map_nodes(lambda n: write() if n.name == name else n),
        "replace": lambda: graph.replace(name, write()),
    }
    for how, way in ways.items():
        try:
            changed = way()
        except ag.BadSplice as error:
            what = str(error).splitlines()[0]
            late = "a cycle" in what
            assert late or "would be left without its host" in what, what
            assert not late or order.index(read) > order.index(name), how
            continue
        invariants(changed)
        assert changed["new.node"].inputs == (read,) or name == read
        run(changed)


def invariants(graph):
    graph.check()
    order = {n: i for i, n in enumerate(graph)}
    assert len(order) == len(set(order))
    kinds = [n.op == "input" for n in graph.nodes()]
    assert kinds == sorted(kinds, reverse=True), "inputs first"
    assert all(order[i] < order[n.name] for n in graph.nodes() for i in n.inputs)
    for body in graph.bodies.values():
        members = [n for n in graph.nodes() if n.body == body.name]
        assert all(n.name.startswith(body.name + ".") for n in members)
        for read, written in body.calls:
            assert graph[read].shape == graph[written].shape
            assert graph[written].body == body.name
            assert graph[read].body != body.name
        graph.calls_of(body.host)
    assert {f"{h}.{s.name}" for s in graph.splices for h in s.hosts} <= set(graph.bodies)
    assert set(graph._overrides) <= set(graph.params)
    again = graph.unsplice() if graph.bodies else graph
    assert not again.bodies
    assert all(n.body is None for n in again.nodes())
