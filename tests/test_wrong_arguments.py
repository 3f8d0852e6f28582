"""Arguments that a verb does not take: each is refused by name, and nothing is changed."""

import copy

import pytest
import torch
from torch import nn

import adaptergraph as ag

NET = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
GRAPH = ag.trace(NET, torch.ones(3, 8))
SPLICED = GRAPH.splice("0", ag.Bottleneck(2))
DECLARED = ag.Graph(ag.dense(ag.input("x", shape=("b", 8)), 8, name="fc"))
TASKS = GRAPH.splice("0", ag.Switch({"p": ag.Bottleneck(2), "q": ag.Bottleneck(3)})).compile()


@pytest.mark.parametrize("graph", [SPLICED, DECLARED], ids=["imported", "declared"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": nn.Sequential}, "compile attaches bodies to a model, not to a class\n.*graph.compile\\(model\\)"),
        ({"host": "model"}, "compile attaches bodies to a model, not to a str"),
        ({"state": []}, "state is a mapping of tensors or the path of a safetensors file, not a list"),
        ({"state": 3}, "state is a mapping of tensors or the path of a safetensors file, not a int"),
        ({"device": "gpu"}, "device 'gpu' is not there\n    torch says   .*\n.*'cuda:1'"),
        ({"device": ""}, "device '' is not there"),
        ({"device": []}, "device \\[\\] is not there"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
        ({"dtype": "float32"}, "dtype is a dtype of torch for numbers with a fraction, not 'float32'"),
        ({"dtype": torch.int64}, "dtype is a dtype of torch for numbers with a fraction, not torch.int64"),
        ({"seed": "abc"}, "seed is a whole number, not 'abc'"),
        ({"seed": None}, "seed is a whole number, not None"),
        ({"seed": True}, "seed is a whole number, not True"),
        ({"inplace": "no"}, "inplace is True or False, not 'no'"),
        ({"inplace": 0}, "inplace is True or False, not 0"),
    ],
    ids=str,
)
def test_compile(graph, options, message):
    with pytest.raises(ag.GraphError, match=message.replace("\n.*", "\n(.*\n)*.*")):
        graph.compile(**options)


def test_a_refused_compile_in_place_leaves_the_model_as_it_was():
    model = copy.deepcopy(NET)
    graph = ag.trace(model, torch.ones(3, 8)).splice("0", ag.Bottleneck(2))
    with pytest.raises(ag.GraphError, match="inplace is True or False"):
        graph.compile(inplace="no")
    assert list(model.state_dict()) == list(NET.state_dict())
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: ag.apply(NET, SPLICED.recipe()), "apply takes a graph and a recipe, not a Sequential and a str"),
        (lambda f: ag.apply(GRAPH, None), "apply takes a graph and a recipe, not a Graph and a NoneType"),
        (lambda f: ag.apply(GRAPH, []), "apply takes a graph and a recipe, not a Graph and a list"),
        (lambda f: ag.load(NET, f, inplace="no"), "inplace is True or False, not 'no'"),
        (lambda f: ag.load_branch(TASKS, None, "p"), "the folder of load_branch is a NoneType, not a path"),
        (lambda f: ag.load_branch(TASKS, f, None), "a branch is one name, not None"),
        (lambda f: ag.load_branch(TASKS, f, ["p"]), r"a branch is one name, not \['p'\]"),
        (lambda f: ag.load_branch(GRAPH, f, "p"), "this is a graph, not the model that is compiled from it"),
        (lambda f: ag.detach(None), "None is no model"),
        (lambda f: ag.detach(GRAPH), "this is a graph, not the model that is compiled from it"),
        (lambda f: ag.task(GRAPH, "p"), "this is a graph, not the model that is compiled from it"),
        (lambda f: ag.task(None, "p"), "None is no model"),
        (lambda f: ag.set_task("p", TASKS), "'p' is no model"),
        (lambda f: GRAPH.draw(3), "a picture is drawn into a file, not into 3\n(.*\n)*.*graph.draw"),
        (lambda f: GRAPH.draw(f), "a picture is drawn into a file, not into the folder"),
        (lambda f: GRAPH.draw(str(f)), "a picture is drawn into a file, not into the folder"),
        (lambda f: GRAPH.draw(f / "a.svg", open=None), "open takes names, not None"),
        (lambda f: GRAPH.draw(f / "a.svg", mark=3), "mark takes names, not 3"),
        (lambda f: GRAPH.dot(open=3), "open takes names, not 3"),
        (lambda f: GRAPH.mermaid(open=[3]), r"open takes names, not \[3\]"),
        (lambda f: DECLARED.remove(["fc"]), r"takes the name of one node, not \['fc'\]"),
        (lambda f: DECLARED.truncate(["fc"]), r"takes the name of one node, not \['fc'\]"),
        (lambda f: ag.Bottleneck(scale=float("nan")), "scale is a finite number or 'learned', not nan"),
        (lambda f: ag.Bottleneck(scale=float("inf")), "scale is a finite number or 'learned', not inf"),
    ],
)
def test_verbs(call, message, tmp_path):
    folder = ag.save(SPLICED.compile(), tmp_path / "adapter")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ag.GraphError, match=message) as error:
        call(folder)
    assert error.value.source is not None
    assert sorted(tmp_path.rglob("*")) == before


AROUND = {"where": "around"}
PAIRS = torch.utils.data.TensorDataset(torch.ones(3, 8), torch.ones(3, 8))


def fit(**options):
    return ag.fit(SPLICED.compile(), **{"data": PAIRS, "loss": nn.functional.mse_loss, "progress": False, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: GRAPH.splice("0", lambda s: s.output + s.inputs["nope"], **AROUND),
            "the host '0' reads no float tensor as 'nope'\n    input   input   3 × 8\n(.*\n)*.*one of: input",
        ),
        (lambda: GRAPH.splice("0", lambda s: s.inputs["input"]), "a body 'after' '0' sees its output only"),
        (lambda: GRAPH.splice("0", lambda: 1), "cannot be called with a site: too many positional arguments"),
        (lambda: GRAPH.splice("0", lambda s, more: s), "cannot be called with a site: missing a required argument"),
        (lambda: GRAPH.select("**").where(op=3), "none of the 4 selected nodes is left"),
        (lambda: GRAPH.calls_of(3), "takes the name of one node, not 3"),
        (lambda: GRAPH.op_of("nope"), "'nope' is no node of this graph"),
        (lambda: DECLARED.op_of("nope"), "'nope' is no node of this graph"),
        (lambda: GRAPH.op_of(None), "takes the name of one node, not None"),
        (lambda: DECLARED.map_nodes(None), "map_nodes takes a function node -> node, not None"),
        (lambda: DECLARED.rewrite_nodes(3), "rewrite_nodes takes a function node -> None, or a function .*, not 3"),
        (lambda: GRAPH.reduce_nodes(0, None), r"reduce_nodes takes a function \(node, value so far\) -> value, not"),
        (lambda: ag.plan_table(NET, at={"a": "0"}), "plan_table takes a graph, not a Sequential\n(.*\n)*.*graph_of"),
        (lambda: ag.plan_table(GRAPH, at={"a": "0"}, sizes=8), "a table of plans needs sizes"),
        (
            lambda: ag.plan_table(GRAPH, at={"a": "0"}, method=ag.Bottleneck(8)),
            r"method= is a function of a size, not Bottleneck\(8\)",
        ),
        (lambda: GRAPH.summary(fold="no"), "fold is True or False, not 'no'"),
        (lambda: GRAPH.summary(fold=torch.ones(3)), "fold is True or False, not tensor"),
        (lambda: GRAPH.draw(fold=1), "fold is True or False, not 1"),
        (lambda: GRAPH.dot(fold=None), "fold is True or False, not None"),
        (lambda: GRAPH.mermaid(fold=()), "fold is True or False, not "),
        (lambda: GRAPH.freeze("**", bodies=torch.ones(3)), "bodies is True or False, not tensor"),
        (lambda: GRAPH.unfreeze("**", bodies="no"), "bodies is True or False, not 'no'"),
        (lambda: fit(data=None), "data=None cannot be\n(.*\n)*.*a list of samples"),
        (lambda: fit(seed=10**30), "seed=1000000000000000000000000000000 cannot be\n(.*\n)*.*63 bits"),
        (lambda: fit(progress="no"), "progress='no' cannot be"),
        (lambda: fit(evaluate=lambda model: True), "evaluate= gives True, not numbers by name"),
        (lambda: fit(evaluate=lambda model: {"loss": "low"}), "evaluate= gives {'loss': 'low'}, not numbers by name"),
        (
            lambda: ag.Fusion({"p": ag.Bottleneck(2), "q": ag.Bottleneck(2)}, temperature=float("nan")),
            "a temperature is a positive number or 'learned', not nan",
        ),
        (
            lambda: ag.Fusion({"p": ag.Bottleneck(2), "q": ag.Bottleneck(2)}, temperature=float("inf")),
            "a temperature is a positive number or 'learned', not inf",
        ),
    ],
)
def test_verbs_that_read(call, message):
    with pytest.raises(ag.GraphError, match=message) as error:
        call()
    assert error.value.source is not None


def test_what_verbs_take_all_the_same():
    assert ["0"] not in GRAPH
    assert "0" in GRAPH
    assert DECLARED.op_of("fc") == "dense"
    assert GRAPH.op_of("0") == "Linear"
    assert fit(evaluate=lambda model: {"score": torch.tensor(0.5)}, seed=2**63 - 1).history[-1].metrics == {
        "score": 0.5
    }
    table = ag.plan_table(GRAPH, at={"a": "0"}, sizes=range(2, 4), method=ag.Bottleneck)
    assert [row.size for row in table.rows] == [2, 3]
    # a method written in C has no signature, and one with further optional arguments is one
    body = GRAPH.splice("0", lambda site, size=2: ag.dense(site.output, 8, name="d"))
    assert list(body.bodies) == ["0.adapter"]
