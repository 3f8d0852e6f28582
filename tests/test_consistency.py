"""Files whose tables contradict each other: each is refused with the entry named, and none is a crash or a hang."""

import faulthandler
import json
import random
import sys
from functools import cache

import pytest
import torch
from models import CASES
from torch import nn

import adaptergraph as ag

SMALL = ag.Bottleneck(2)


class Shared(nn.Module):
    """An LSTM, a layer and an activation that are called twice, and a weight with two names."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.fc = nn.Linear(4, 4)
        self.act = nn.Tanh()
        self.idle = nn.Identity()
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.fc.weight
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x, double=False):
        h, _ = self.lstm(self.fc(x) * self.scale)
        h = self.act(self.fc(h) + x)
        return self.tied(self.act(h)), h


def shared():
    """Bodies of every kind on it."""
    torch.manual_seed(0)
    model = Shared()
    graph = ag.trace(model, torch.ones(2, 3, 4), double=False).splice("fc", SMALL)
    graph = graph.splice("fc@1", SMALL, name="call").splice("lstm:0", SMALL, name="part")
    graph = graph.splice("/add", SMALL, name="op").splice("act", SMALL, where="before", name="early")
    graph = graph.splice("fc", ag.Bottleneck(2, parallel=True), name="beside")
    graph = graph.splice("act", ag.Switch({"a": SMALL, "b": ag.Bottleneck(3)}), name="tasks")
    return graph, model


def declared():
    """A constant, an optional input, parameters, bodies by hand, in a group and with tasks."""
    x = ag.input("x", shape=("batch", 4))
    h = ag.add([ag.optional(ag.input("z", shape=("batch", 4), optional=True), default=0.0, name="given"), x])
    h = ag.dense(h, 4, name="block.a", weight_init="glorot_uniform", bias_init=0.02)
    h = ag.dense(ag.relu(h, name="block.act"), 4, name="block.b")
    h = ag.Adapter.wrap(h, bottleneck_size=2, scale="learned", name="hand")
    h = ag.multiply([h, ag.constant(torch.tensor([2.0]), name="two")], name="product")
    sequence, _ = ag.lstm(ag.reshape(h, ("batch", 1, 4), name="steps"), 4, name="rnn")
    graph = ag.Graph((h, {"sequence": sequence})).splice("block", ag.Switch({"a": SMALL, "b": ag.Bottleneck(3)}))
    graph = graph.splice("block.a", ag.Bottleneck(2, parallel=True), name="beside")
    return graph.splice("product", SMALL, where="before", name="early").freeze("block"), None


def case(name, at):
    """A small model of a library, with bodies."""
    model = CASES[name].model()
    args, kwargs = CASES[name].args()
    return ag.trace(model, *args, **kwargs).splice(at, SMALL), model


MAKE = {
    "declared": declared,
    "shared": shared,
    "bert": lambda: case("bert", "bert.encoder.layer.*.output.dense"),
    "gpt2": lambda: case("gpt2", "**.mlp"),
    "t5": lambda: case("t5", "{encoder,decoder}.dropout@1"),
}


@cache
def made(kind):
    """The graph, its model, and its text."""
    graph, model = MAKE[kind]()
    return graph, model, graph.to_json()


@pytest.mark.parametrize("kind", MAKE)
def test_what_agrees_comes_back_and_runs_as_before(kind):
    graph, model, text = made(kind)
    again = ag.Graph.from_json(text)
    assert again == graph
    assert again.splices == graph.splices
    assert again.to_json() == text
    assert list(again.compile(model).state_dict()) == list(graph.compile(model).state_dict())


# ---------------------------------------------------------------------- one message each


def node(data, name):
    return next(n for n in data["nodes"] if n["name"] == name)


def body(data, name):
    return next(b for b in data["bodies"] if b["name"] == name)


def modules(data):
    return data["imported"]["modules"]


def call(data, path, index=0):
    return modules(data)[path]["calls"][index]


def renamed(data, old, new):
    """Another name for a node, wherever the file speaks of it."""
    text = json.dumps(data).replace(json.dumps(old), json.dumps(new))
    data.clear()
    data.update(json.loads(text))


DECLARED = [
    # options that no run shows to be wrong
    (lambda d: node(d, "block.a")["options"].update(weight_init="os.system"), "unknown initializer 'os.system'"),
    (lambda d: node(d, "block.a")["options"].update(bias_init=-1.0), "unknown initializer -1.0"),
    (lambda d: node(d, "block.a")["options"].update(bias_init="orthogonal"), "'orthogonal' fills matrices, not"),
    (lambda d: node(d, "block.a")["options"].update(wait_init="zeros"), "'block.a' has 'wait_init', and no such param"),
    (lambda d: node(d, "hand.scale")["options"].update(init="one"), "unknown initializer 'one'"),
    (lambda d: node(d, "hand.scale").pop("options"), "the parameter 'hand.scale' has {}, not 'init' alone"),
    (lambda d: node(d, "hand.scale").update(shape=["batch"]), r"the parameter 'hand.scale' has the shape \('batch',\)"),
    (lambda d: node(d, "z").update(options={"optional": "yes"}), "the input 'z' is optional: 'yes'"),
    (lambda d: node(d, "given")["options"].update(default="0"), "'given' has .*, not a number as its default"),
    (lambda d: node(d, "given")["options"].clear(), "'given' has {}, not a number as its default"),
    (lambda d: node(d, "rnn.sequence")["options"].update({"x) or print(1": 1}), "'rnn.sequence' has the options"),
    (lambda d: node(d, "rnn.sequence")["options"].update(more=1), "'rnn.sequence' has the options"),
    (lambda d: node(d, "rnn.sequence")["options"].update(part=1), "'rnn.sequence' has the options"),
    (lambda d: node(d, "two")["options"].pop("value"), "the constant 'two' is no tensor"),
    (lambda d: node(d, "two")["options"]["value"].update(tensor=[[1], [1, 2]]), "the constant 'two' is no tensor"),
    (lambda d: node(d, "two")["options"]["value"].update(tensor=[1, 2]), "the constant 'two' holds .2,."),
    (lambda d: node(d, "block.a")["params"].pop("bias"), "'block.a' has other parameters than its op 'dense' makes"),
    (lambda d: renamed(d, "product", "product@0"), "'product@0' is no name of a further call"),
    (lambda d: renamed(d, "product", "product@" + "9" * 5000), "is no name of a further call"),
    # tasks
    (lambda d: node(d, "block.adapter.switch")["options"].update(tasks=["a", 1]), "not tasks by name"),
    (lambda d: node(d, "block.adapter.switch")["options"].update(tasks=["a", "a"]), "not tasks by name"),
    (lambda d: node(d, "block.adapter.switch")["options"].update(tasks=["a"]), "has not as many branches as tasks"),
    (
        lambda d: node(d, "block.adapter.switch")["options"].update(tasks=["b", "a"]),
        "'block.adapter.a.residual' is no branch of the task 'b'",
    ),
    (
        lambda d: node(d, "block.adapter.b.residual").update(inputs=["block.adapter.a.residual", "block.adapter.b.up"]),
        "'block.adapter.b.residual' is in no branch, or in several",
    ),
    # bodies and splices
    (lambda d: d["bodies"].append(d["bodies"][0]), "two bodies are called 'hand'"),
    (lambda d: body(d, "hand")["calls"].clear(), "bodies: 'hand' has no calls"),
    (
        lambda d: d["bodies"].append({"name": "none", "host": "x", "where": "after", "calls": [["x", "given"]]}),
        "the body 'none' does not lead from 'x' to 'given'",
    ),
    (lambda d: body(d, "hand").update(host="nowhere"), "bodies: 'hand' is after 'nowhere', which cannot be"),
    (lambda d: body(d, "hand").update(where="around"), "bodies: 'hand' is around 'block.b', which cannot be"),
    (lambda d: body(d, "hand")["calls"][0].reverse(), "the body 'hand' does not lead from"),
    (lambda d: body(d, "hand")["calls"][0].__setitem__(0, "product"), "'hand' replaces 'product', which is not before"),
    (lambda d: body(d, "hand")["calls"][0].__setitem__(0, "hand.down"), "'hand' replaces 'hand.down', which is not"),
    (lambda d: body(d, "hand")["calls"].append(["x", "hand.residual"]), "bodies: 'hand' gives 'hand.residual' twice"),
    (lambda d: body(d, "hand")["calls"][0].__setitem__(1, "hand.down"), "'hand' replaces a value of another shape"),
    (lambda d: renamed(d, "hand.down", "hold.down"), "the node 'hold.down' is not below its body 'hand'"),
    (
        lambda d: d["splices"][0].update(name="other"),
        "'other' has the host 'block', and there is no body 'block.other'",
    ),
    (lambda d: d["splices"][0].update(name="a.b"), "splices: 'a.b' is more than one word"),
    (lambda d: d["splices"][0].update(hosts=[]), "splices: 'adapter' has no host"),
    (lambda d: d["splices"][0].update(where="around"), "'block.adapter' say otherwise where it stands"),
    (lambda d: d["splices"].append(d["splices"][0]), "splices: the body 'block.adapter' came from two splices"),
    (lambda d: d["splices"][0]["method"].update(method=["Bottleneck"]), r"there is no method \['Bottleneck'\]"),
    (lambda d: d["trained"].update({"block.a.wait": False}), "trained: 'block.a.wait' is no parameter"),
]


IMPORTED = [
    # modules and calls
    (lambda d: modules(d).pop(""), "modules: the model itself, '', is not there, or has no call"),
    (lambda d: modules(d)[""]["calls"].clear(), "modules: the model itself, '', is not there, or has no call"),
    (lambda d: modules(d)[""].update(cls="Other"), "modules: the model is a Shared, and '' a Other"),
    (lambda d: modules(d).update({"a.b": {"cls": "Linear"}}), "modules: 'a.b' is in no other module"),
    (lambda d: modules(d).update({"a/b": {"cls": "Linear"}}), "modules: 'a/b' is in no other module"),
    (lambda d: call(d, "fc").update(caller="nowhere"), "the call 'fc' was made by 'nowhere', which is no call"),
    (lambda d: call(d, "fc").update(caller="fc@7"), "the call 'fc' was made by 'fc@7', which is no call"),
    (lambda d: call(d, "fc").update(caller="fc"), "the call 'fc' was made by itself: a cycle"),
    (
        lambda d: call(d, "fc").update(caller="act") or call(d, "act").update(caller="fc"),
        r"was made by itself: a cycle\n    made by   \w+ ← \w+ ← \w+",
    ),
    (lambda d: call(d, "").update(caller="fc"), "the model's own call was made by 'fc': it is the first"),
    (lambda d: call(d, "fc").update(output="nowhere"), "the call 'fc' speaks of 'nowhere', which is no node"),
    (
        lambda d: call(d, "fc").update(output="fc.adapter.up"),
        "speaks of 'fc.adapter.up', which is no node of the model",
    ),
    (lambda d: call(d, "fc")["inputs"].append(["more", "nowhere"]), "the call 'fc' speaks of 'nowhere'"),
    (lambda d: call(d, "fc")["inputs"].append(["input", "x"]), "the call 'fc' has two arguments of one name, or one"),
    (lambda d: call(d, "lstm")["parts"][0].__setitem__(1, "nowhere"), "the call 'lstm' speaks of 'nowhere'"),
    (lambda d: call(d, "lstm")["parts"][0].__setitem__(0, "1"), "the call 'lstm': '1' is not the way to 'lstm'"),
    (lambda d: call(d, "lstm").update(path=[1]), "gives 'lstm' at .1., and its parts say otherwise"),
    (lambda d: call(d, "lstm").update(output=None), "the call 'lstm' gives nothing at .0."),
    (lambda d: call(d, "fc").update(path=[0]), "the call 'fc' gives 'fc' at .0., and its parts say otherwise"),
    # what came past a call
    (lambda d: d["imported"]["walked"].update({"nowhere": True}), "walked: 'nowhere' is no module"),
    (lambda d: d["imported"]["asides"].append(["nowhere", "exit", "fc", "/add", True]), "asides: 'nowhere' is no call"),
    (
        lambda d: d["imported"]["asides"].append(["fc", "exit", "none", "/add", True]),
        "asides: 'none' is no node of the",
    ),
    (lambda d: d["imported"]["asides"].append(["fc", "exit", None, "none", False]), "of the model, nor a call"),
    (lambda d: d["imported"]["kept"].append(("none", "")), "kept: 'none' is no node of the model"),
    (lambda d: d["imported"]["kept"].append((d["nodes"][0]["name"], "none")), "kept: 'none' is no call"),
    # where values have their features
    (lambda d: d["imported"]["axes"].update(none=None), "axes: 'none' is no tensor of the model"),
    (lambda d: d["imported"]["axes"].update({"fc.adapter.up": -1}), "axes: 'fc.adapter.up' is no tensor of the model"),
    (lambda d: d["imported"]["axes"].update(fc=-4), r"axes: 'fc' has no dimension -4: 2 × 3 × 4"),
    (lambda d: d["imported"]["axes"].update(fc=0), "axes: 'fc' has no dimension 0"),
    # parameters
    (
        lambda d: d["imported"]["params"].update({"no.w": {"shape": [1], "dtype": "int8"}}),
        "'no.w' belongs to no module",
    ),
    (lambda d: d["imported"]["tied"].update({"act.w": "fc.wait"}), "tied: 'fc.wait' is no parameter"),
    (lambda d: d["imported"]["tied"].update({"fc.bias": "fc.weight"}), "tied: 'fc.bias' is a parameter of its own"),
    (lambda d: d["imported"]["readers"].update({"scales": "/mul"}), "readers: 'scales' is no parameter"),
    (lambda d: d["imported"]["readers"].update(scale="/mull"), "readers: '/mull', which reads 'scale', is no node"),
    (
        lambda d: node(d, "fc")["params"]["bias"].update(shape=[5]),
        "'fc' has the parameter 'fc.bias', and the model not",
    ),
    (lambda d: node(d, "fc")["params"].update(more={"shape": [5], "dtype": "int8"}), "has the parameter 'fc.more'"),
    (
        lambda d: d["imported"]["params"]["scale"].update(dtype="int8") or d["trained"].update(scale=True),
        "whole numbers",
    ),
    (
        lambda d: d["imported"]["params"]["scale"].update(shape=[-1]),
        "imported.params.scale.shape.0: .* greater than or",
    ),
    (lambda d: d["imported"]["params"]["scale"].update(shape=[2**63]), "imported.params.scale.shape.0: .* less than"),
    (lambda d: d["imported"]["params"]["scale"].update(dtype="int9"), "there is no dtype 'int9'"),
    # nodes and where they run
    (lambda d: node(d, "tied").pop("shape"), "'tied' has the shape – and dtype"),
    (lambda d: node(d, "fc").pop("dtype"), "'fc' has the shape .* and dtype None"),
    (lambda d: node(d, "tied").update(shape=["batch", 4]), "'tied' has the shape batch × 4"),
    (lambda d: node(d, "fc").update(shape=[-2, 4]), "nodes.1.shape.0"),
    (lambda d: node(d, "fc").update(options={"bias": True}), "'fc' is a node of the model, which has no options"),
    (lambda d: node(d, "fc").update(op="Conv2d"), "'fc' is a Conv2d, and its module a Linear"),
    (lambda d: node(d, "x").update(params={"p": {"shape": [], "dtype": "int8"}}), "'x' is an input, and not an input"),
    (lambda d: renamed(d, "x", "idle"), "'idle' is an input, and not an input alone"),
    (lambda d: renamed(d, "act", "acts"), "'act@1' is no call of a module"),
    (lambda d: renamed(d, "fc@1", "fc@2"), "'fc@2' is no call of a module"),
    (lambda d: renamed(d, "act@1", "fc:1"), "'fc:1' is no output of act.early"),
    (lambda d: d["imported"]["scopes"].pop("fc"), "scopes: 'fc' does not run in None"),
    (
        lambda d: d["imported"]["scopes"].update(fc="act"),
        r"scopes: 'fc' does not run in 'act'\n.*\n    its name says   ''",
    ),
    (lambda d: d["imported"]["scopes"].update({"/mul": "fc"}), "scopes: '/mul' does not run in 'fc'"),
    (lambda d: renamed(d, "/mul", "none/mul"), "scopes: 'none/mul' does not run in ''"),
    (lambda d: d["imported"]["scopes"].update(nowhere=""), "scopes: 'nowhere' is no node that the model computes"),
    (lambda d: d["imported"]["scopes"].update(x=""), "scopes: 'x' is no node that the model computes"),
    # the arguments
    (lambda d: d["imported"]["example"]["x"].update(shape=[2, -3, 4]), "imported.example.x"),
    (lambda d: d["imported"]["example"]["x"].update(shape=[2, 5, 4]), "the argument 'x' is no input of this shape"),
    (lambda d: d["imported"]["example"]["x"].update(dtype="float7"), "there is no dtype 'float7'"),
    (lambda d: d["imported"]["example"]["x"].pop("dtype"), "imported.example.x"),
    (lambda d: d["imported"]["example"].update(double={"value": []}), "imported.example.double"),
    (
        lambda d: d["imported"]["example"].update(y={"shape": [1], "dtype": "int8"}),
        "the argument 'y' is no input of this shape",
    ),
    # bodies
    (lambda d: d["splices"].pop(0), "bodies: 'fc.adapter' came from no splice"),
    (
        lambda d: body(d, "fc.adapter").update(host="fc@0") or d["splices"][0].update(hosts=["fc@0"]),
        "there is no body 'fc.adapter_call0'",
    ),
    (lambda d: body(d, "fc.adapter")["calls"].pop(), "does not stand at every call of 'fc'"),
    (
        lambda d: body(d, "fc.call_call1")["calls"][0].__setitem__(0, "lstm"),
        "replaces 'lstm', which 'fc@1' does not give",
    ),
    (lambda d: body(d, "act.early")["calls"][0].__setitem__(0, "x"), "replaces 'x', which 'act' is not given"),
    (lambda d: renamed(d, "lstm.part_out0", "lstm.p"), "the node 'lstm.part_out0.down' is not below its body 'lstm.p'"),
    (lambda d: renamed(d, "fc.adapter.act@1", "fc.adapter.gone@1"), "'fc.adapter.act' has no copy at call 1 of 'fc'"),
    (
        lambda d: node(d, "fc.adapter.act@1").update(op="gelu"),
        "'fc.adapter.act@1' is not what 'fc.adapter.act' is at the first call",
    ),
    (
        lambda d: node(d, "fc.adapter.residual@1")["inputs"].__setitem__(1, "x"),
        "'fc.adapter.residual@1' does not read what 'fc.adapter.residual' reads",
    ),
    (
        lambda d: node(d, "/mul")["inputs"].__setitem__(0, "fc.adapter.act"),
        "'/mul' reads 'fc.adapter.act', which is ins",
    ),
    (
        lambda d: d["outputs"].update({"1": "act.early.up"}),
        "the graph returns 'act.early.up', which is inside the body",
    ),
    (
        lambda d: call(d, "act").update(output=None) or call(d, "act", 1).update(output=None),
        r"bodies: 'act.early': 'act' \(Tanh\) returns no float tensor",
    ),
]
CHANGES = [("declared", *c) for c in DECLARED] + [("shared", *c) for c in IMPORTED]


@pytest.mark.parametrize(("kind", "change", "message"), CHANGES, ids=[m for _, _, m in CHANGES])
def test_a_file_that_contradicts_itself(kind, change, message):
    data = json.loads(made(kind)[2])
    change(data)
    with pytest.raises(ag.GraphError, match=message) as caught:
        ag.Graph.from_json(json.dumps(data))
    assert "to fix" in str(caught.value) or message.startswith("the body")


# ---------------------------------------------------------------------- hundreds of files

STRANGE = ['a"; x', "", None, -1, 10**30, 1.5, True, [], {}, "x@999999999999", "x@²", "../x", "before", 0, 1, 2, ["x"]]
STRANGE += ["output", "input", "around", {"x": 1}, "float32"]


def places(value, way=()):
    """The way to everything in a document."""
    if way:
        yield way
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*way, key))


def damaged(text, dice):
    """The same document with values deleted, copied, swapped, renamed, or of another type: one, or a few."""
    data = json.loads(text)
    ways = list(places(data))
    names = [n["name"] for n in data["nodes"]] + list(data.get("imported", {"modules": {}})["modules"])
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        owners = []
        for _ in range(2):
            *above, key = dice.choice(ways)
            owner = data
            for step in above:
                there = owner if isinstance(owner, dict) else range(len(owner)) if isinstance(owner, list) else ()
                owner = owner[step] if step in there else None
            if key in (owner if isinstance(owner, dict) else range(len(owner)) if isinstance(owner, list) else ()):
                owners.append((owner, key))
        if len(owners) < 2:
            continue
        (owner, key), (other, at) = owners
        kind = dice.randrange(6)
        if kind == 0:
            del owner[key]
        elif kind == 1:
            owner[key] = dice.choice(STRANGE)
        elif kind == 2:
            owner[key] = dice.choice(names)
        elif kind == 3:
            owner[key], other[at] = (json.loads(json.dumps(v)) for v in (other[at], owner[key]))
        elif kind == 4:
            further = dice.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
            owner[key], owner[further] = owner[further], owner[key]
        elif isinstance(owner, dict):
            owner[dice.choice(names)] = owner.pop(key)
        else:
            owner.insert(key, json.loads(json.dumps(owner[key])))
    return json.dumps(data)


def used(graph, model):
    """What people do with a graph; gives how many of these things are refused."""
    sizes = {d: 3 for n in graph.inputs.values() for d in n.shape or () if isinstance(d, str)}
    assert ag.Graph.from_json(graph.to_json()) == graph
    assert graph.check() is graph
    refused = 0
    for use in (
        lambda: str(graph.summary()),
        lambda: graph.summary(fold=False),
        graph.dot,
        graph.mermaid,
        lambda: graph.plan(**sizes if model is None else {}),
        lambda: graph.splice("**", SMALL, name="more"),
        lambda: graph.splice([n for n in graph if "adapter" not in n][-1], ag.Bottleneck(2, parallel=True), name="one"),
        graph.unsplice,
        graph.freeze,
        graph.recipe,
        lambda: ag.places(graph, "houlsby"),
        lambda: graph.compile(model),
    ):
        try:
            use()
        except ag.GraphError:
            refused += 1
    return refused


@pytest.mark.parametrize("kind", MAKE)
def test_whatever_is_in_a_file_it_is_read_or_refused(kind):
    graph, model, text = made(kind)
    dice = random.Random(kind)
    outcomes = {"refused": 0, "the same": 0, "another": 0}
    for _ in range(400):
        damage = damaged(text, dice)
        faulthandler.dump_traceback_later(300, exit=True, file=sys.__stderr__)
        try:
            read = ag.Graph.from_json(damage)
        except ag.GraphError:
            outcomes["refused"] += 1
        else:
            outcomes["the same" if read == graph else "another"] += 1
            if read != graph:
                used(read, model)
        finally:
            faulthandler.cancel_dump_traceback_later()
    print(kind, outcomes)
    assert outcomes["refused"] > 200
    assert outcomes["another"] > 0


class TwoNames(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.b = self.a
        self.head = self.a[1]

    def forward(self, x):
        return self.b(self.a(x))


def test_a_module_with_two_names_comes_back():
    model = TwoNames()
    model.a[0].weight = model.a[1].weight
    graph = ag.trace(model, torch.ones(2, 8)).splice("a.1", ag.Bottleneck(2))
    text = graph.to_json()
    assert ag.Graph.from_json(text) == graph
    data = json.loads(text)
    data["imported"]["tied"]["c.scale"] = "a.0.weight"
    with pytest.raises(ag.GraphError, match=r"params: 'c\.scale' belongs to no module"):
        ag.Graph.from_json(json.dumps(data))
