"""Graphs as JSON: what goes out comes back, and nothing in a file can run."""

import json

import pytest
import torch
from torch import nn

import adaptergraph as ag


def declared():
    ids = ag.input("ids", shape=("batch", "seq"), dtype=torch.int64)
    mask = ag.input("mask", shape=("batch", "seq"), dtype=torch.bool)
    x = ag.embedding(ids, 20, 8, name="embed", weight_init=0.02)
    h = ag.attention(*(ag.dense(x, 8, name=f"self.{n}") for n in ("query", "key", "value")), num_heads=2, mask=mask)
    h = ag.layer_norm(x + h, name="norm")
    h = ag.Adapter.wrap(h, bottleneck_size=2, scale="learned", dropout=0.1)
    h = h * ag.constant(torch.tensor([2.0]), name="two")
    return (
        ag.Graph({"out": ag.relu(h), "flat": ag.reshape(h, ("batch", -1))})
        .freeze("self")
        .splice("norm", ag.Bottleneck(3, activation="gelu"), name="extra")
    )


def imported():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.LSTM(4, 4), nn.Identity())
    return ag.trace(model, torch.ones(1, 4)).unfreeze("0.bias").splice("0", ag.Bottleneck(2))


def half_imported():
    """A half-precision model: bodies compute in float32, also where one node of a body has several outputs."""
    model = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)

    def recurrent(site):
        sequence, _ = ag.lstm(ag.reshape(site.output, (1, 1, 4), name="one"), 4, name="lstm")
        return site.output + ag.reshape(sequence, (1, 4), name="flat")

    graph = ag.trace(model, torch.ones(1, 4, dtype=torch.bfloat16)).splice("0", ag.Bottleneck(2))
    assert graph["0.adapter.down"].dtype == torch.float32
    return graph.splice("0", recurrent, name="steps")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_declared_graph_in_half_precision_comes_back(dtype):
    x = ag.input("x", shape=("batch", 8), dtype=dtype)
    graph = ag.Graph(ag.dense(x, 8, name="fc")).splice("fc", ag.Bottleneck(2, scale="learned"))
    again = ag.Graph.from_json(graph.to_json())
    assert again == graph
    assert {p.dtype for p in again.params.values()} == {dtype}
    given = torch.randn(3, 8, dtype=dtype)
    assert again.compile()(given).dtype == dtype


@pytest.mark.parametrize("make", [declared, imported])
def test_a_graph_comes_back_equal(make):
    graph = make()
    text = graph.to_json()
    again = ag.Graph.from_json(text)
    assert again == graph
    assert list(again) == list(graph)
    assert again.splices == graph.splices
    assert again.trained == graph.trained
    assert again.to_json() == text
    assert again.unsplice("**.extra" if make is declared else "**") == graph.unsplice(
        "**.extra" if make is declared else "**"
    )


def test_a_declared_graph_from_a_file_runs_as_before():
    ids = torch.randint(0, 20, (2, 5))
    mask = torch.ones(2, 5, dtype=torch.bool)
    one, two = declared().compile().eval(), ag.Graph.from_json(declared().to_json()).compile().eval()
    assert all(torch.equal(a, b) for a, b in zip(one(ids, mask).values(), two(ids, mask).values(), strict=True))


def test_an_imported_graph_from_a_file_is_given_its_model():
    graph = imported()
    again = ag.Graph.from_json(graph.to_json())
    with pytest.raises(ag.GraphError, match="this graph came from a file: it says what Sequential is, but has none"):
        again.compile()
    x = torch.randn(2, 4)
    one, two = graph.compile().eval(), again.compile(graph.imported.host).eval()
    assert torch.equal(one(x)[0], two(x)[0])


@pytest.mark.parametrize(
    ("node", "name"),
    [
        (ag.nx(ag.input("x", ("b", 2)), torch.neg, name="f"), "f"),
        (ag.module(ag.input("x", ("b", 2)), nn.Linear(2, 2), name="m"), "m"),
        (ag.layer(torch.mul, [ag.input("x", ("b", 2)), ag.param("p", (2,))], name="l"), "l"),
        (ag.dense(ag.input("x", ("b", 2)), 2, weight_init=nn.init.zeros_, name="d"), "d"),
    ],
)
def test_code_has_no_name_in_a_file(node, name):
    with pytest.raises(ag.GraphError, match=f"node '{name}' holds .*, which has no name in a file") as caught:
        ag.Graph(node).to_json()
    assert caught.value.node == name


def edited(fn, make=declared):
    data = json.loads(make().to_json())
    fn(data)
    return json.dumps(data)


def first(data, **match):
    return next(n for n in data["nodes"] if all(n.get(k) == v for k, v in match.items()))


CODE = "x');__import__('os').system('touch ran');('"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "the graph is not readable: format"),
        (lambda d: d.update(extra=1), "the graph is not readable: extra: Extra inputs"),
        (lambda d: d["nodes"].pop(0), "reads 'ids', which is not before it"),
        (lambda d: d["nodes"].append(d["nodes"][-1]), "two nodes are called"),
        (lambda d: first(d, name="norm").update(op="os.system"), "there is no op 'os.system'"),
        (lambda d: first(d, name="norm").update(op="nx"), "there is no op 'nx'"),
        (lambda d: first(d, name="norm").update(op="module"), "there is no op 'module'"),
        (lambda d: first(d, name="norm").update(name=CODE), "a node cannot be called"),
        (lambda d: first(d, name="norm").update(name="class"), "'class' is a Python keyword"),
        (lambda d: first(d, name="norm").update(name="forward"), "'forward' is an attribute of every module"),
        (
            lambda d: first(d, name="ids").update(name="self.x"),
            "an input cannot be called|an attribute of every module",
        ),
        (lambda d: first(d, name="norm").update(shape=["batch", "seq", 9]), "'norm' cannot give"),
        (lambda d: first(d, name="norm")["options"].update(eps="1"), "layer_norm 'norm' does not fit"),
        (lambda d: first(d, name="norm")["options"].update(evil=1), "layer_norm 'norm' does not fit"),
        (lambda d: first(d, name="norm").update(dtype="Tensor"), "there is no dtype 'Tensor'"),
        (lambda d: first(d, name="norm").update(dtype="__class__"), "there is no dtype '__class__'"),
        (lambda d: first(d, name="norm").update(inputs=5), "the graph is not readable: nodes"),
        (lambda d: d.update(outputs="nowhere"), "the output 'nowhere' is no node of the graph"),
        (lambda d: d["trained"].update({"nowhere.weight": True}), "'nowhere.weight' is no parameter"),
        (lambda d: d["bodies"].clear(), "which is no body of the graph"),
        (lambda d: d["splices"][0]["method"].update(method="eval"), "there is no method 'eval'"),
        (lambda d: d["splices"][0]["method"].update(sizes=3), "Bottleneck has no option 'sizes'"),
    ],
)
def test_a_file_that_cannot_be_right(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ag.GraphError, match=message):
        ag.Graph.from_json(edited(change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["nodes"][1].update(name=CODE), "is no name of an imported node|which is not before it"),
        (lambda d: d["nodes"][1].update(op=CODE), "is no op"),
    ],
)
def test_an_imported_file_that_cannot_be_right(change, message):
    with pytest.raises(ag.GraphError, match=message):
        ag.Graph.from_json(edited(change, imported))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "1" * 5000, '{"format": 1}'])
def test_text_that_is_no_graph(text):
    with pytest.raises(ag.GraphError, match="the graph is not readable"):
        ag.Graph.from_json(text)


class Twice(nn.Module):
    """One layer on two shapes."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x).sum(0) + self.fc(x[:1])[0]


def test_a_body_at_calls_of_several_shapes_comes_back():
    torch.manual_seed(0)
    model = Twice()
    graph = ag.trace(model, torch.ones(3, 4)).splice("fc", ag.Bottleneck(2))
    again = ag.Graph.from_json(graph.to_json())
    assert again == graph
    x = torch.randn(3, 4)
    assert torch.equal(again.compile(model)(x), graph.compile()(x))


def test_a_complex_number_has_no_name_in_a_file():
    two = ag.constant(torch.tensor([2j]), name="two")
    with pytest.raises(ag.GraphError, match=r"node 'two' holds tensor.*, which has no name in a file"):
        ag.Graph(ag.add([two, two])).to_json()


def jagged(x):
    return torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged)


NO_LISTS = {
    "torch.float32, torch.sparse_coo, on cpu": lambda x: torch.eye(4).to_sparse(),
    "torch.float32, torch.sparse_csr, on cpu": lambda x: torch.eye(4).to_sparse_csr(),
    "torch.qint8, quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "torch.float32, torch.strided, on meta": lambda x: x.to("meta"),
    "torch.complex64, torch.strided, on cpu": lambda x: x * 1j,
}


@pytest.mark.parametrize("what", NO_LISTS)
def test_a_constant_that_is_no_list_of_numbers_has_no_name_in_a_file(what):
    node = ag.constant(NO_LISTS[what](torch.randn(4, 4)), name="c")
    message = rf"^node 'c' holds tensor \(4, 4\) of {what}, which has no name in a file\n"
    with pytest.raises(ag.GraphError, match=message) as caught:
        ag.Graph(node).to_json()
    assert "test_exchange.py" in str(caught.value)


class Nesting(nn.Module):
    """Works on a tensor of rows with different lengths, its own or one that it is given."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x if x.is_nested else jagged(x)).values()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_has_no_name_in_a_file():
    x = torch.randn(3, 4)
    for given in (x, jagged(x)):
        graph = ag.trace(Nesting().eval(), given)
        with pytest.raises(
            ag.GraphError, match=r"node '.*' is a nested tensor of shape \(.*\), which has no name"
        ) as caught:
            graph.to_json()
        assert caught.value.node in graph
        assert "written at  test_exchange.py" in str(caught.value)
    constant = ag.Graph(ag.constant(jagged(x), name="c"))
    with pytest.raises(ag.GraphError, match=r"node 'c' is a nested tensor of shape"):
        constant.to_json()


def test_the_name_of_an_option_is_no_code(tmp_path, monkeypatch):
    """Options become words of the code of a compiled graph."""
    monkeypatch.chdir(tmp_path)
    sequence, _ = ag.lstm(ag.input("x", shape=("b", 2, 4)), 4, name="rnn")
    data = json.loads(ag.Graph(sequence).to_json())
    data["nodes"][-1]["options"]["y=__import__('os').system('touch ran'), z"] = 1
    with pytest.raises(ag.GraphError, match=r"'rnn.sequence' has the options"):
        ag.Graph.from_json(json.dumps(data)).compile()
    assert not list(tmp_path.iterdir())
