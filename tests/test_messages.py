"""Every error of the declared side: its first line, what it says to do, and that it names the user's own line."""

import ast
import copy
import inspect
import pickle
import re
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import adaptergraph as ag
from adaptergraph import Adapter
from adaptergraph.names import check_imported_name

PACKAGE = Path(ag.__file__).parent
OWN = (
    *(
        PACKAGE / f"{n}.py"
        for n in (
            "names",
            "select",
            "graph",
            "collect",
            "edit",
            "shapes",
            "adapter",
            "lower",
        )
    ),
    *(PACKAGE / "splicing" / f"{n}.py" for n in ("surgery", "site", "unsplice", "hosts")),
    # the families of layers and the combining methods have tests of their own
    *(PACKAGE / "layers" / f"{n}.py" for n in ("calls", "making", "table", "initializers", "functions")),
    *(PACKAGE / "methods" / f"{n}.py" for n in ("base", "bottleneck")),
)


def x(*shape, name="x", dtype=torch.float32):
    return ag.input(name, shape=shape or ("batch", 8), dtype=dtype)


def chain():
    h = ag.relu(ag.dense(x(), 8, name="a"), name="act")
    return ag.Graph(ag.dense(h, 8, name="b"))


def adapted():
    return chain().splice("a", ag.Bottleneck(2))


def ids(name="ids"):
    return x("batch", "seq", name=name, dtype=torch.int64)


def two_ranks():
    a = ag.dense(x(), 8, name="a")
    return ag.Graph([a, ag.dense(x("batch", 3, 8, name="y"), 8, share=a)])


def wide():
    return ag.Graph(ag.dense(ag.dense(x(), 4, name="low"), 8, name="up"))


def lstm():
    return ag.module(x("batch", "seq", 8), nn.LSTM(8, 8), name="lstm")


def sums():
    return ag.Graph(ag.add([x(), x(name="y")], name="sum"))


class Half(nn.Module):
    """A module with a child that is never called, and one that gives no float tensor."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.idle = nn.Linear(8, 8)
        self.aside = nn.Linear(8, 8)
        self.arg = ArgMax()

    def forward(self, t):
        h = self.other(self.fc(t) + t)
        whole = t.int()
        first, second = h.split(4, -1)
        return h, self.arg(h), self.aside(t), whole, first + second


class Unread(nn.Module):
    """A model that reads one of two outputs of its children, and nothing of another child."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8)
        self.pair = Pair()
        self.dead = nn.Linear(8, 8)
        self.deader = nn.Linear(8, 8)

    def forward(self, t):
        _states, (hidden, _) = self.lstm(t)
        b = self.pair(hidden)["b"]
        self.deader(self.dead(b))
        return b


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)

    def forward(self, t):
        a = self.a(t)
        return {"a": a, "b": self.b(a)}


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x["a"])


class ArgMax(nn.Module):
    def forward(self, t):
        return t.argmax(-1)


class Top(nn.Module):
    def forward(self, t):
        return t + 1, t.argmax(-1)


class Best(nn.Module):
    def __init__(self):
        super().__init__()
        self.top = Top()

    def forward(self, t):
        value, place = self.top(t)
        return value + place[:, None]


class Empty(nn.Module):
    """One module gives a value without features."""

    def __init__(self):
        super().__init__()
        self.none, self.fc = nn.Linear(8, 0), nn.Linear(8, 8)

    def forward(self, t):
        return torch.cat([self.none(t), self.fc(t)], -1)


class Aside(nn.Module):
    """Nothing comes of what one module gives."""

    def __init__(self):
        super().__init__()
        self.dead, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, t):
        self.dead(t)
        return self.last(t)


UNLESS = "\nor first splice what reads it, or trace with the arguments that make the model read it (labels, say)"


def tapped():
    """A body reads what nothing else reads."""
    graph = ag.trace(Aside(), torch.ones(2, 8))
    return graph.splice("last", lambda s: s.output + ag.dense(s.graph["dead"], 8, name="t"), name="tap")


def unread(at, **how):
    return ag.trace(Unread(), torch.ones(2, 3, 8)).splice(at, ag.Bottleneck(2), **how)


def traced():
    return ag.trace(Half(), torch.ones(2, 8))


def broken(**changes):
    graph = adapted()
    fields = {n: getattr(graph, n) for n in ("outputs", "bodies", "splices", "imported")}
    fields |= {"nodes": graph._nodes, "overrides": graph._overrides}
    return ag.Graph._of(**{**fields, **{k: v(graph) for k, v in changes.items()}})


def misplaced(graph):
    return {"a.adapter": replace(graph.bodies["a.adapter"], calls=(("a", "act"),))}


def codes():
    return ag.Graph(ag.module(x(), Codes(), name="q"))


class Codes(nn.Module):
    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(8, dtype=torch.int8), requires_grad=False)

    def forward(self, t):
        return t + self.codes


SHARED = nn.Linear(8, 8)
OTHER = ag.Graph(ag.dense(x("batch", 3), 8, name="a"))
G, S, D, B, U = ag.GraphError, ag.ShapeMismatch, ag.DuplicateName, ag.BadSplice, ag.UnknownNode
ANY = object()

# (what is done, kind, first line, hint or None; ANY where the hint is tested elsewhere)
NAMES = [
    (lambda: ag.relu(x(), name=5), G, "a node's name is a string, not 5", None),
    (
        lambda: ag.relu(x(), name="a b"),
        G,
        "a node cannot be called 'a b': the parts between dots are letters, digits and _",
        "'a_b' would do",
    ),
    (
        lambda: ag.relu(x(), name=""),
        G,
        "a node cannot be called '': the parts between dots are letters, digits and _",
        "'node' would do",
    ),
    (
        lambda: ag.relu(x(), name="a..b"),
        G,
        "a node cannot be called 'a..b': the parts between dots are letters, digits and _",
        "'a.node.b' would do",
    ),
    (
        lambda: ag.relu(x(), name="a\n"),
        G,
        "a node cannot be called 'a\\n': the parts between dots are letters, digits and _",
        "'a' would do",
    ),
    (
        lambda: ag.relu(x(), name="é"),
        G,
        "a node cannot be called 'é': the parts between dots are letters, digits and _",
        "'node' would do",
    ),
    (
        lambda: ag.relu(x(), name="a'); import os; os.system('ls"),
        G,
        "a node cannot be called \"a'); import os; os.system('ls\": the parts between dots are letters, digits and _",
        "'a_import_os_os.system_ls' would do",
    ),
    (
        lambda: ag.relu(x(), name="layer.class"),
        G,
        "a node cannot be called 'layer.class': 'class' is a Python keyword",
        "'layer.class_' would do",
    ),
    (
        lambda: ag.relu(x(), name="forward"),
        G,
        "a node cannot be called 'forward': 'forward' is an attribute of every module",
        "'forward_' would do",
    ),
    (
        lambda: ag.relu(x(), name="training"),
        G,
        "a node cannot be called 'training': 'training' is an attribute of every module",
        "'training_' would do",
    ),
    (
        lambda: ag.relu(x(), name="graph"),
        G,
        "a node cannot be called 'graph': 'graph' is an attribute of every module",
        "'graph_' would do",
    ),
    (
        lambda: ag.relu(x(), name="a.code.b"),
        G,
        "a node cannot be called 'a.code.b': 'code' is an attribute of every module",
        "'a.code_.b' would do",
    ),
    (
        lambda: ag.relu(x(), name="__class__"),
        G,
        "a node cannot be called '__class__': '__class__' is an attribute of every module",
        "'__class___' would do",
    ),
    (
        lambda: ag.relu(x(), name="_source"),
        G,
        "a node cannot be called '_source': '_source' is an attribute of every module",
        "'_source_' would do",
    ),
    (
        lambda: x(name="a.b"),
        G,
        "an input cannot be called 'a.b': it is an argument of forward()",
        "use a plain identifier, such as 'x_a_b'",
    ),
    (
        lambda: x(name="0"),
        G,
        "an input cannot be called '0': it is an argument of forward()",
        "use a plain identifier, such as 'x_0'",
    ),
    (
        lambda: x(name="self"),
        G,
        "an input cannot be called 'self': it is an argument of forward()",
        "use a plain identifier, such as 'x_self'",
    ),
    (
        lambda: x(name="torch"),
        G,
        "an input cannot be called 'torch': it is an argument of forward()",
        "use a plain identifier, such as 'x_torch'",
    ),
    (
        lambda: x(name="getattr"),
        G,
        "an input cannot be called 'getattr': it is an argument of forward()",
        "use a plain identifier, such as 'x_getattr'",
    ),
    (lambda: check_imported_name("a b"), G, "'a b' is no name of an imported node", None),
    (
        lambda: chain().splice("a", ag.Bottleneck(2), name="x.y"),
        G,
        "the name of a body is one word, not 'x.y'",
        'letters, digits and _: name="adapter"',
    ),
    (
        lambda: chain().splice("a", ag.Bottleneck(2), name="to"),
        G,
        "a node cannot be called 'to': 'to' is an attribute of every module",
        "'to_' would do",
    ),
    (
        lambda: Adapter.build(8, name="a-b"),
        G,
        "a node cannot be called 'a-b': the parts between dots are letters, digits and _",
        "'a_b' would do",
    ),
]

LAYERS = [
    (lambda: ag.input("x", shape="batch"), G, "the shape of input 'x' is a tuple of sizes, not 'batch'", None),
    (lambda: ag.input("x", shape=8), G, "the shape of input 'x' is a tuple of sizes, not 8", None),
    (
        lambda: ag.input("x", shape=("batch", 0)),
        G,
        "0 in the shape of input 'x' is no size",
        "a positive number, a name such as 'batch', or None",
    ),
    (lambda: ag.input("x", shape=(True,)), G, "True in the shape of input 'x' is no size", ANY),
    (lambda: ag.input("x", shape=(8.0,)), G, "8.0 in the shape of input 'x' is no size", ANY),
    (lambda: ag.input("x", shape=("",)), G, "'' in the shape of input 'x' is no size", ANY),
    (
        lambda: ag.input("x", shape=(8,), dtype="float32"),
        G,
        "the dtype of input 'x' is a torch.dtype, not 'float32'",
        None,
    ),
    (lambda: ag.param("p", 8), G, "the shape of param 'p' is a tuple of sizes, not 8", None),
    (lambda: ag.param("p", ("batch",)), G, "a size of param 'p' is a positive whole number, not 'batch'", None),
    (
        lambda: ag.param("p", (8,), dtype=torch.int64),
        G,
        "param 'p' is trained, so its dtype is one of floats, not torch.int64",
        None,
    ),
    (
        lambda: ag.param("p", (8,), init="orthogonal"),
        G,
        "the initializer 'orthogonal' fills matrices, not param 'p' of shape (8,)",
        "'zeros', 'ones', a deviation such as 0.02, or a function that fills the tensor in place",
    ),
    (lambda: ag.param("p", (8,), init="zero"), G, "unknown initializer 'zero'", "did you mean 'zeros'?"),
    (lambda: ag.dense(x(), 8, weight_init=5), G, "unknown initializer 5", None),
    (
        lambda: ag.dense(x(), 8, bias_init="glorot_normal"),
        G,
        "the initializer 'glorot_normal' fills matrices, not the bias of dense of shape (8,)",
        "'zeros', 'ones', a deviation such as 0.02, or a function that fills the tensor in place",
    ),
    (lambda: ag.constant([1]), G, "a constant is a tensor or a number, not [1]", None),
    (lambda: ag.constant(True), G, "a constant is a tensor or a number, not True", None),
    (lambda: ag.dense(x(), 0), G, "the size of dense is a positive whole number, not 0", None),
    (lambda: ag.dense(x(), -3, name="fc"), G, "the size of dense 'fc' is a positive whole number, not -3", None),
    (lambda: ag.dense(x(), True), G, "the size of dense is a positive whole number, not True", None),
    (lambda: ag.dense(x(), 8.0), G, "the size of dense is a positive whole number, not 8.0", None),
    (lambda: ag.dense(x(), "8"), G, "the size of dense is a positive whole number, not '8'", None),
    (lambda: ag.dense(x(), 8, bias=1), G, "bias is True or False, not 1", None),
    (lambda: ag.dense(x(), 8, biass=True), G, "dense has no option 'biass'", "did you mean 'bias'?"),
    (lambda: ag.dense(x(), 8, activation="rleu"), G, "unknown activation 'rleu'", "did you mean 'relu'?"),
    (lambda: ag.activation(x(), "rleu"), G, "unknown activation 'rleu'", "did you mean 'relu'?"),
    (lambda: ag.activation(x(), None), G, "unknown activation None", "it is called 'linear' here"),
    (lambda: ag.activation(x(), 5), G, "unknown activation 5", ANY),
    *(
        ((lambda a=a: ag.activation(x(), a)), G, f"unknown activation {a!r}", hint)
        for a, hint in (
            ("Relu", "did you mean 'relu'?"),
            ("ReLU6", "did you mean 'relu6'?"),
            ("LeakyReLU", "did you mean 'leaky_relu'?"),
            ("swish", "it is called 'silu' here"),
            ("Hardswish", "it is called 'hard_silu' here"),
            ("Identity", "it is called 'linear' here"),
            ("none", "it is called 'linear' here"),
            (
                "gelu_new",
                "'gelu' is the exact one; ag.gelu(x, approximate=\"tanh\") approximates it in a body of your own",
            ),
        )
    ),
    (
        lambda: ag.activation(x(), "leaky_relu", slope=0.1),
        G,
        "leaky_relu has no option 'slope'",
        "did you mean 'negative_slope'?",
    ),
    (lambda: ag.activation(x(), "relu", inplace=True), G, "relu has no option 'inplace'", "it has no options"),
    (lambda: ag.softmax(x(), dimension=1), G, "softmax has no option 'dimension'", ANY),
    (lambda: ag.softmax(x(), dim=True), G, "a dimension is a whole number, not True", None),
    (lambda: ag.softmax(x(), dim=5), S, "'x' has no dimension 5", "from -2 to 1"),
    (lambda: ag.gelu(x(), approximate="fast"), S, "gelu does not fit what it reads", ANY),
    (lambda: ag.concatenate([x(), x(name="y")], dim="1"), G, "a dimension is a whole number, not '1'", None),
    (lambda: ag.dropout(x(), rate=1), G, "a dropout rate is at least 0 and less than 1, not 1", None),
    (lambda: ag.dropout(x(), rate="0.1"), G, "a dropout rate is at least 0 and less than 1, not '0.1'", None),
    (lambda: ag.layer_norm(x(), eps=-1), G, "eps is a number that is not negative, not -1", None),
    (lambda: ag.layer_norm(x(), eps="1"), G, "eps is a number that is not negative, not '1'", None),
    (lambda: ag.embedding(ids(), 0, 8), G, "vocab_size is a positive whole number, not 0", None),
    (lambda: ag.embedding(x(), 5, 8), S, "embedding does not fit what it reads", ANY),
    (
        lambda: ag.dense(ids(), 8),
        S,
        "dense reads floats, and 'ids' is torch.int64",
        "ag.nx(x, torch.Tensor.float) makes floats of it",
    ),
    (lambda: ag.relu(ids()), S, "relu reads floats, and 'ids' is torch.int64", ANY),
    (lambda: ag.dense(ag.input("s", shape=()), 8), S, "dense does not fit what it reads", ANY),
    (
        lambda: ag.dense(x("batch", "features"), 8, name="fc"),
        S,
        "dense 'fc' does not fit what it reads",
        "change the option, or what the node reads",
    ),
    (lambda: ag.layer_norm(x("batch", None)), S, "layer_norm does not fit what it reads", ANY),
    (
        lambda: ag.attention(x(), x(), x(), num_heads=2),
        S,
        "attention reads batch × seq × size, not batch × 8",
        'reshape it: ag.reshape(x, ("batch", -1, size))',
    ),
    (lambda: ag.attention(*[x("b", "s", 8)] * 3, num_heads=3), S, "attention does not fit what it reads", ANY),
    (lambda: ag.attention(*[x("b", "s", 8)] * 3, num_heads=0), G, "num_heads is a positive whole number, not 0", None),
    (lambda: ag.attention(*[x("b", "s", 8)] * 3, num_heads=2, causal=1), G, "causal is True or False, not 1", None),
    (lambda: ag.add([x()]), G, "add takes two or more nodes, not 1", None),
    (lambda: ag.add(None), G, "add reads a node or a list of nodes, not None", None),
    (lambda: ag.add("ab"), G, "add reads a node or a list of nodes, not 'ab'", None),
    (
        lambda: ag.add([x(), 2]),
        G,
        "add reads nodes, not int: 2",
        "a tensor or number becomes a node with ag.constant(…)",
    ),
    (lambda: x() + "y", G, "add reads nodes, not str: y", None),
    (lambda: ag.add([x(), x("batch", 7, name="y")], name="sum"), S, "add 'sum' does not fit what it reads", ANY),
    (lambda: ag.relu(lstm()), G, "relu reads 'lstm', which gives no single tensor", "read one of its outputs"),
    (lambda: ag.reshape(x(), 8), G, "reshape takes a tuple of sizes, not 8", None),
    (
        lambda: ag.reshape(x(), ("seq", 8)),
        G,
        "reshape asks for 'seq', which 'x' has not",
        "a text stands for a size that the input has by this name; -1 is what is left",
    ),
    (
        lambda: ag.reshape(x(), ("batch", 2.0)),
        G,
        "2.0 is no size to reshape to",
        "a whole number, -1 for what is left, or the name of a size of the input",
    ),
    (
        lambda: ag.reshape(x(), ("batch", -2)),
        G,
        "-2 is no size to reshape to",
        "a whole number, -1 for what is left, or the name of a size of the input",
    ),
    (lambda: ag.reshape(x(), ("batch", 3, -1)), S, "reshape does not fit what it reads", ANY),
    (lambda: ag.transpose(x(), 1), G, "transpose takes a tuple of dimensions, not 1", None),
    (lambda: ag.concatenate([x(), x(name="y")], dim=-3), S, "'x' has no dimension -3", "from -2 to 1"),
    (lambda: ag.transpose(x(), (0, 2)), S, "'x' has no dimension 2", "from -2 to 1"),
    (lambda: ag.transpose(x(), (0, True)), G, "a dimension is a whole number, not True", None),
    (lambda: ag.transpose(x(), (0, 0)), S, "transpose does not fit what it reads", ANY),
    (lambda: ag.flatten(x(8)), S, "flatten does not fit what it reads", ANY),
    (lambda: ag.module(x(), torch.sin), G, "module() takes an nn.Module, not " + repr(torch.sin), None),
    (lambda: ag.module(x(), nn.Linear(7, 3), name="m"), S, "module 'm' does not fit what it reads", ANY),
    (lambda: ag.module(x(), nn.ReLU(inplace=True), name="m"), S, "module 'm' does not fit what it reads", ANY),
    (lambda: ag.nx(x(), lambda t: t.add_(1)), S, "nx does not fit what it reads", ANY),
    (lambda: ag.nx(x(), 5), G, "nx() takes a function of tensors, not 5", None),
    (
        lambda: ag.nx(x(), nn.Linear(8, 8)),
        G,
        "nx() takes a function without parameters, not a Linear",
        "ag.module(x, nn_module)",
    ),
    (
        lambda: ag.layer(nn.Linear(8, 8).forward, [x()]),
        G,
        "layer() takes a function without parameters, not a Linear",
        ANY,
    ),
    (lambda: ag.nx(None, torch.sin), G, "nx reads a node or a list of nodes, not None", None),
    (
        lambda: ag.layer(torch.add, [x()], other=torch.ones(8)),
        G,
        "option 'other' of a layer is a plain value, not a Tensor",
        "a tensor is one of the inputs: ag.constant(…), or ag.param(…) for one that is trained",
    ),
]

ADAPTERS = [
    (lambda: Adapter.build(0), G, "hidden_size is a positive whole number, not 0", None),
    (lambda: Adapter.build(True), G, "hidden_size is a positive whole number, not True", None),
    (lambda: Adapter.build("8"), G, "hidden_size is a positive whole number, not '8'", None),
    (lambda: Adapter.build(8.0), G, "hidden_size is a positive whole number, not 8.0", None),
    (lambda: Adapter.output_size(-1), G, "hidden_size is a positive whole number, not -1", None),
    (lambda: Adapter.adapter_block(x(), None), G, "hidden_size is a positive whole number, not None", None),
    (lambda: Adapter.wrap(x(), bottleneck_size=0), G, "bottleneck_size is a positive whole number, not 0", None),
    (lambda: Adapter.wrap(x(), bottleneck_size=True), G, "bottleneck_size is a positive whole number, not True", None),
    (lambda: Adapter.wrap(x(), hidden_size=-8), G, "hidden_size is a positive whole number, not -8", None),
    (
        lambda: Adapter.wrap(x(), hidden_size=1),
        S,
        "body 'adapter' does not fit its host",
        "leave hidden_size out, or set it to 8",
    ),
    (
        lambda: Adapter.wrap(ag.dense(x(), 1), hidden_size=8),
        S,
        "body 'adapter' does not fit its host",
        "leave hidden_size out, or set it to 1",
    ),
    (
        lambda: Adapter.wrap(x(), botleneck_size=2),
        G,
        "Adapter.wrap has no option 'botleneck_size'",
        "did you mean 'bottleneck_size'?",
    ),
    (lambda: Adapter.build(8, residul=True), G, "Adapter.wrap has no option 'residul'", "did you mean 'residual'?"),
    (lambda: Adapter.wrap(x(), activation="rleu"), G, "unknown activation 'rleu'", "did you mean 'relu'?"),
    (lambda: Adapter.wrap(x(), scale="learnt"), G, "scale is a finite number or 'learned', not 'learnt'", None),
    (lambda: Adapter.wrap(x(), scale=True), G, "scale is a finite number or 'learned', not True", None),
    (lambda: Adapter.wrap(x(), init="zero"), G, "unknown init 'zero'", "did you mean 'zeros'?"),
    (lambda: Adapter.wrap(x(), init=0.1), G, "unknown init 0.1", None),
    (lambda: Adapter.wrap(x(), init=["bert"]), G, "unknown init ['bert']", None),
    (lambda: Adapter.wrap(x(), init="brt"), G, "unknown init 'brt'", "did you mean 'bert'?"),
    (lambda: Adapter.wrap(x(), residual=1), G, "residual is True or False, not 1", None),
    (lambda: Adapter.wrap(x(), layer_norm="both"), G, "layer_norm is None, 'before' or 'after', not 'both'", None),
    (lambda: Adapter.wrap(x(), dropout=1.0), G, "a dropout rate is at least 0 and less than 1, not 1.0", None),
    (lambda: Adapter.wrap("layer"), G, "an adapter wraps a node, not 'layer'", None),
    (
        lambda: Adapter.wrap(x("batch", None)),
        S,
        "an adapter needs a layer whose features are known; 'x' gives batch × ?",
        "wrap a layer whose number of features is known",
    ),
    (
        lambda: Adapter.wrap(ids()),
        S,
        "an adapter needs a layer whose features are known; 'ids' gives batch × seq",
        "wrap a layer whose number of features is known",
    ),
    (lambda: ag.Bottleneck(0), G, "Bottleneck(size=0): Input should be greater than 0", None),
    (lambda: ag.Bottleneck(True), G, "Bottleneck(size=True): Input should be a valid integer", None),
    (lambda: ag.Bottleneck("8"), G, "Bottleneck(size='8'): Input should be a valid integer", None),
    (lambda: ag.Bottleneck(8.0), G, "Bottleneck(size=8.0): Input should be a valid integer", None),
    (lambda: ag.Bottleneck(size=-8), G, "Bottleneck(size=-8): Input should be greater than 0", None),
    (lambda: ag.Bottleneck(reduction=0), G, "Bottleneck(reduction=0): Input should be greater than 0", None),
    (lambda: ag.Bottleneck(8, reduction=2), G, "Bottleneck takes a size or a reduction, not both", None),
    (lambda: ag.Bottleneck(8, hidden_size=0), G, "Bottleneck(hidden_size=0): Input should be greater than 0", None),
    (
        lambda: ag.Bottleneck(8, activaton="relu"),
        G,
        "Bottleneck has no option 'activaton'",
        "did you mean 'activation'?",
    ),
    (lambda: ag.Bottleneck(8, activation="rleu"), G, "unknown activation 'rleu'", "did you mean 'relu'?"),
    (lambda: ag.Bottleneck(8, 2), G, "Bottleneck takes only its size by position", "name the options"),
    (lambda: ag.Bottleneck(8, init="zero"), G, "unknown init 'zero'", "did you mean 'zeros'?"),
    (lambda: ag.Bottleneck(8, dropout=1.5), G, "a dropout rate is at least 0 and less than 1, not 1.5", None),
    (lambda: ag.Bottleneck(8, scale=True), G, "Bottleneck(scale=True): Input should be a valid number", None),
]

GRAPHS = [
    (lambda: ag.Graph([]), G, "a graph ends in a node, or a list or dict of nodes, not []", None),
    (lambda: ag.Graph("x"), G, "a graph ends in a node, or a list or dict of nodes, not 'x'", None),
    (lambda: ag.Graph(None), G, "a graph ends in a node, or a list or dict of nodes, not None", None),
    (
        lambda: ag.Graph([x(), 5]),
        G,
        "a graph ends in nodes, not 5 at [1]",
        "ag.constant makes a node of a number or tensor",
    ),
    (lambda: ag.Graph({1: x()}), G, "an output is called by a string, not 1", None),
    (
        lambda: ag.Graph(ag.relu(traced()["fc"])),
        G,
        "an imported graph runs in its model's own forward: nodes cannot be put on top of it",
        "graph.splice(at, lambda site: …) adds nodes at a place inside the model",
    ),
    (
        lambda: ag.Graph(ag.dense(ag.dense(x(), 8, name="d"), 8, name="d")),
        D,
        "two different nodes are called 'd'",
        "give one of them another name=, or take both from one graph",
    ),
    (
        lambda: ag.Graph(ag.dense(ag.dense(x(), 8, name="d"), 8, name="d.bias")),
        D,
        "node 'd.bias' has the name of a parameter: 'd'",
        "call it 'd.bias_'",
    ),
    (
        lambda: ag.Graph(ag.dense(x(), 8, name="p.fc") * ag.param("p", (8,))),
        D,
        "node 'p.fc' is below a tensor: 'p'",
        "rename 'p'",
    ),
    (
        lambda: ag.Graph(ag.module(ag.module(x(), SHARED, name="m"), SHARED, name="n")),
        G,
        "nodes 'm' and 'n' hold the same parameter: they would not share it",
        "give each a module of its own: copy.deepcopy(module)",
    ),
    (lambda: chain()["haed"], U, "'haed' is no node of this graph", ANY),
    (lambda: chain().truncate("acl"), U, "'acl' is no node of this graph", "use the nearest name"),
    (lambda: chain().select("q*"), U, "'q*' selects no node", "print(graph.summary(fold=False)) lists every name"),
    (lambda: chain().select([]), U, "the list of selectors is empty: it selects no node", None),
    (lambda: chain().select(5), G, "a selector is a string, a predicate or a list of these, not 5", None),
    (lambda: chain().select(["a", 5]), G, "a selector is a string, a predicate or a list of these, not 5", None),
    (
        lambda: chain().select(lambda n: False),
        U,
        "the predicate selects no node",
        'it is asked once for each node: graph.select(lambda node: node.op == "linear")',
    ),
    (
        lambda: chain().select("{a"),
        G,
        "the selector '{a' has a bracket that is not closed, or one inside another",
        "write {a,b} for alternatives, {0..11} or [0-5] for a range of numbers",
    ),
    (
        lambda: chain().select("a[x]"),
        G,
        "[x] in the selector 'a[x]' is no range of numbers",
        "write [0-5] for a range, {a,b} for alternatives; a dot before a number: layer.0",
    ),
    (
        lambda: chain().select("a[3-1]"),
        G,
        "the range 3-1 in the selector 'a[3-1]' is empty or too long",
        "the smaller number first: [0-11]",
    ),
    (
        lambda: chain().select("*").expect(7),
        U,
        "'*' selects 4 nodes, expected 7",
        "narrow or widen the pattern, or expect another number",
    ),
    (lambda: chain().select("*").where(op="dens"), U, "none of the 4 selected nodes is left", "did you mean 'dense'?"),
    (lambda: chain().select("*").where(lambda n: False), U, "none of the 4 selected nodes is left", None),
    (lambda: chain().select("*").where(shape=8), G, "a shape is a tuple of sizes, not 8", None),
    (lambda: chain()(torch.ones(2, 8)), G, "a graph does not run", "compile it first: graph.compile()(…)"),
    (
        lambda: chain().diff(chain().compile()),
        G,
        f"a graph is compared with a graph, not with a {type(chain().compile()).__name__}",
        "ag.graph_of(model) is the graph of a compiled model, ag.trace(model, …) that of any other",
    ),
    (lambda: chain().freeze("act"), U, "'act' is no parameter of a host of this graph", ANY),
    (lambda: chain().freeze("*.wight"), U, "'*.wight' selects no parameter of a host", "use the nearest name"),
    (
        lambda: adapted().unfreeze("**.adapter"),
        U,
        "'**.adapter' selects parameters of bodies, and those of hosts are meant here",
        "graph.unfreeze('**.adapter', bodies=True)",
    ),
    (
        lambda: chain().unfreeze(),
        G,
        "unfreeze names what is trained",
        'graph.unfreeze("head") for a part of the model, graph.unfreeze("**") for all hosts, '
        'graph.unfreeze("**", bodies=True) for all bodies',
    ),
    (
        lambda: chain()["a*"],
        U,
        "'a*' is a pattern, and here is a place for the name of one node",
        "graph.select('a*') for all of them, 'a' for the first",
    ),
    (lambda: chain().freeze(lambda n: True), G, ANY, None),
    (lambda: chain().freeze(5), G, "a selector is a string, a predicate or a list of these, not 5", None),
    (lambda: chain().freeze([5]), G, "freeze and unfreeze take patterns of names, not 5", None),
    (
        lambda: codes().unfreeze("q"),
        G,
        "'q.codes' holds whole numbers (torch.int8): it cannot be trained",
        "leave it out of the pattern",
    ),
]

BODY = "take it out first: graph.unsplice('a.adapter')"
SPLICES = [
    (lambda: chain().splice("a", 5), B, "5 is no method and no callable site -> Node", None),
    (
        lambda: chain().splice("a", ag.Bottleneck),
        B,
        f"{ag.Bottleneck!r} is no method and no callable site -> Node",
        "make one of it: Bottleneck(…)",
    ),
    (
        lambda: chain().splice("a", ag.Bottleneck(2), where="inside"),
        B,
        "a body can be 'after', 'around' or 'before' its host, not 'inside'",
        None,
    ),
    (
        lambda: adapted().splice("a", ag.Bottleneck(2)),
        B,
        "there is a body 'a.adapter' already",
        "give this one another name=, or take it out first: graph.unsplice('a.adapter')",
    ),
    (
        lambda: ag.Graph(ag.relu(ag.dense(x(), 8, name="a"), name="a.adapter")).splice("a", ag.Bottleneck(2)),
        B,
        "there is a node 'a.adapter' already",
        "give this one another name=",
    ),
    (
        lambda: adapted().splice("a.adapter.up", ag.Bottleneck(2)),
        B,
        "'a.adapter.up' belongs to the body 'a.adapter'",
        "splice at its host: 'a'",
    ),
    (
        lambda: ag.Graph(x() * ag.param("p", (8,))).splice("p", ag.Bottleneck(2)),
        B,
        "'p' is of the kind 'param': a body is added at a layer",
        "splice at a layer that reads it",
    ),
    (
        lambda: ag.Graph(x() * ag.param("p", (8,))).splice("p*", ag.Bottleneck(2)),
        B,
        "'p*' selects no place for a body",
        "splice at a layer",
    ),
    (
        lambda: ag.Graph(x() * ag.param("p", (8,))).splice(lambda n: n.op == "param", ag.Bottleneck(2)),
        B,
        "the predicate selects no place for a body",
        "splice at a layer",
    ),
    (
        lambda: ag.Graph(lstm()).splice("lstm", ag.Bottleneck(2)),
        B,
        "'lstm' gives no single tensor: a body has nothing to work on",
        "splice at a node that reads it",
    ),
    (
        lambda: chain().splice("a", lambda s: 5),
        B,
        "the method at 'a' returned 5, not a node",
        "end it with return node: a method is a function site -> Node",
    ),
    (
        lambda: chain().splice("a", lambda s: s.output),
        B,
        "the method at 'a' returned 'a', which is there already: it added no node",
        "return a node made from it: ag.dense(site.output, …)",
    ),
    (
        lambda: chain().splice("a", lambda s: OTHER["a"]),
        B,
        "the method at 'a' returned 'a', which is there already: it added no node",
        "return a node made from it: ag.dense(site.output, …)",
    ),
    (
        lambda: chain().splice("a", lambda s: ag.dense(s.output, 7)),
        S,
        "body 'a.adapter' does not fit its host",
        "end the body with the shape of its host: batch × 8",
    ),
    (
        lambda: two_ranks().splice("a", lambda s: ag.reshape(s.output, ("batch", 8))),
        S,
        "body 'a.adapter' does not fit each call of its host",
        "splice at one call, or at each a body of its own: 'a@0', 'a@1'",
    ),
    (
        lambda: chain().splice("a", ag.Bottleneck(2, hidden_size=1)),
        S,
        "body 'adapter' does not fit its host",
        "leave hidden_size out, or set it to 8",
    ),
    (
        lambda: chain().splice("a", lambda s: s.output + x(name="z")),
        B,
        "the body 'a.adapter' reads a new input 'z'",
        "declare the input in the graph itself, or make it a constant or a param",
    ),
    (
        lambda: chain().splice("a", lambda s: s.output + ag.relu(OTHER["a"])),
        B,
        "the body 'a.adapter' reads 'a', which is no node of this graph",
        "read site.output, site.input or site.graph[name]",
    ),
    (
        lambda: chain().splice("a", lambda s: s.output + s.graph["b"]),
        B,
        ANY,
        "a node can only read what is computed before it",
    ),
    (
        lambda: chain().splice("a", lambda s: s.output + s.input),
        B,
        "a body 'after' 'a' sees its output only",
        "graph.splice(…, where='around') gives it the input too",
    ),
    (
        lambda: chain().splice("a", lambda s: s.output + s.inputs["input"]),
        B,
        "a body 'after' 'a' sees its output only",
        "graph.splice(…, where='around') gives it the input too",
    ),
    (
        lambda: sums().splice("sum", lambda s: s.output + s.inputs["nope"], where="around"),
        B,
        "the host 'sum' reads no float tensor as 'nope'",
        "one of: input, input_1",
    ),
    (
        lambda: sums().splice("sum", lambda s: s.output + s.input, where="around"),
        B,
        "the host 'sum' reads 2 float tensors, so its input is not one of them",
        "say which: site.inputs[name]",
    ),
    (
        lambda: ag.Graph(ag.embedding(ids(), 3, 8, name="e")).splice("e", lambda s: s.output + s.input, where="around"),
        B,
        "the host 'e' reads 0 float tensors, so its input is not one of them",
        "splice after an earlier node: what is in a list or dict, is whole numbers or is overwritten there "
        "does not count",
    ),
    (
        lambda: ag.trace(Empty(), torch.ones(2, 8)).splice("none", ag.Bottleneck(2)),
        S,
        "'none' has no features: its shape is 2 × 0",
        "a body needs values to work on: splice elsewhere, or leave it out of the pattern",
    ),
    (
        lambda: chain()[["a", "b"]],
        U,
        "graph[…] takes the name of one node, not ['a', 'b']",
        "graph.select(…) takes patterns and lists of them; list(graph) gives every name",
    ),
    (
        lambda: chain()[:2],
        U,
        "graph[…] takes the name of one node, not slice(None, 2, None)",
        "graph.select(…) takes patterns and lists of them; list(graph) gives every name",
    ),
    (
        lambda: chain().splice("a", ag.Bottleneck(2), where=[]),
        B,
        "a body can be 'after', 'around' or 'before' its host, not []",
        None,
    ),
    (
        lambda: chain().splice("a", ag.Bottleneck(2), where=torch.ones(2)),
        B,
        "a body can be 'after', 'around' or 'before' its host, not tensor([1., 1.])",
        None,
    ),
    (
        lambda: tapped().splice("dead", ag.Bottleneck(2), name="own").unsplice("last.tap"),
        B,
        "of the body 'dead.own' nothing comes without 'last.tap': it would change nothing",
        "take it out too: graph.unsplice(['last.tap', 'dead.own'])",
    ),
    (
        lambda: chain().splice("a", lambda s: ag.dense(ag.dense(s.output, 8, name="d"), 8, name="d")),
        D,
        "two different nodes are called 'a.adapter.d'",
        ANY,
    ),
    (
        lambda: chain().unsplice(),
        U,
        "this graph has no body to take out",
        "splice first; graph.bodies holds what is there",
    ),
    (lambda: adapted().unsplice("b"), U, "'b' is no body of this graph", ANY),
    (lambda: adapted().unsplice("*.adaptor"), U, "'*.adaptor' selects no body", "use the nearest name"),
    (lambda: adapted().unsplice(["a", "b"]), U, "'b' is no body of this graph", ANY),
    (lambda: adapted().unsplice(lambda n: True), G, ANY, None),
    (
        lambda: adapted().tap("a.adapter.down").unsplice(),
        B,
        "the graph returns 'a.adapter.down' of the body 'a.adapter', which cannot be taken out alone",
        "take out what reads it first",
    ),
    (lambda: chain().replace("a", 5), G, "a node is replaced by a node, not 5", None),
    (
        lambda: chain().replace("a", ag.dense(chain()["x"], 7)),
        S,
        "the new node does not fit in the place of 'a'",
        "end it with the old shape and dtype, or change what reads it as well: graph.rewrite_nodes",
    ),
    (
        lambda: chain().replace("act", ag.relu(OTHER["a"])),
        B,
        "the new node reads 'a', which is no node of this graph",
        "read graph[name]",
    ),
    (
        lambda: chain().replace("act", ag.relu(ag.relu(chain()["a"], name="b"))),
        D,
        "two different nodes are called 'b'",
        ANY,
    ),
    (lambda: chain().replace("a", chain()["b"]), B, ANY, "a node can only read what is computed before it"),
    (
        lambda: adapted().replace("a", ag.dense(adapted()["x"], 8, name="c")),
        B,
        "'a' has the body 'a.adapter', which would be left without its host",
        BODY,
    ),
    (lambda: adapted().remove("a"), B, "'a' has the body 'a.adapter', which would be left without its host", BODY),
    (lambda: adapted().rename("a", "c"), B, "'a' has the body 'a.adapter', which would be left without its host", BODY),
    (
        lambda: adapted().remove("a.adapter.act"),
        B,
        "'a.adapter.act' is part of the body 'a.adapter', which changes only as a whole",
        "graph.unsplice('a.adapter'), then splice another one",
    ),
    (
        lambda: sums().remove("sum"),
        B,
        "'sum' reads 2 nodes, so its consumers cannot simply read its input",
        "graph.replace(name, node) says what stands in its place",
    ),
    (
        lambda: wide().remove("low"),
        S,
        "'low' cannot be left out: its consumers need what it makes of its input",
        "graph.replace(name, node) says what stands in its place",
    ),
    (lambda: chain().rename("a", "b"), D, "two different nodes are called 'b'", ANY),
    (
        lambda: ag.Graph({"a": ag.relu(ag.dense(x(), 8, name="a"))}).tap("a"),
        D,
        "there is another output called 'a'",
        "give the tap another name",
    ),
    (
        lambda: traced().remove("fc"),
        B,
        "remove works on declared graphs: this one runs in the forward of Half",
        "add to it with graph.splice",
    ),
    (
        lambda: traced().tap("fc"),
        B,
        "tap works on declared graphs: this one runs in the forward of Half",
        "add to it with graph.splice",
    ),
    (
        lambda: traced().splice("/add", ag.Bottleneck(2), where="before"),
        B,
        "a body cannot stand before '/add', which is no layer but a value",
        ANY,
    ),
    (
        lambda: traced().splice(ag.span("/add", "other"), ag.Bottleneck(2, parallel=True)),
        B,
        "the span starts at '/add', which is an operation, which has no input of its own",
        "start it at the module whose input the body is to read",
    ),
    (
        lambda: traced().splice("fc@00", ag.Bottleneck(2)),
        U,
        "'fc@00' is no node of this graph",
        ANY,
    ),
    (
        lambda: ag.span("fc", 2),
        G,
        "span takes the names or patterns of two hosts, not 2",
        None,
    ),
    (
        lambda: traced().splice(ag.span("fc", "fc"), ag.Bottleneck(2)),
        B,
        "a body 'after' the end of ag.span('fc', 'fc') never reads its start",
        "splice at 'fc', or use a method that reads its input, or where='around'",
    ),
    (
        lambda: traced().splice(ag.span("{fc,other}", "fc"), ag.Bottleneck(2, parallel=True)),
        B,
        "ag.span('{fc,other}', 'fc') has 2 starts and 1 ends: they are paired in order",
        "narrow the pattern that selects more",
    ),
    (
        lambda: traced().splice(ag.span("other", "fc"), ag.Bottleneck(2, parallel=True)),
        B,
        "the span starts at 'other', which runs after its end",
        "ag.span('fc', 'other')",
    ),
    (
        lambda: traced().splice("idle", ag.Bottleneck(2)),
        B,
        "'idle' (Linear) is never called: a body there would never run",
        "narrow the pattern; or trace with arguments that make the model call it",
    ),
    (
        lambda: unread("lstm"),
        B,
        "'lstm' gives a value that nothing reads: a body there would change nothing",
        "splice at 'lstm:1:0', which 'pair.a' reads" + UNLESS,
    ),
    (
        lambda: unread("lstm:0"),
        B,
        "'lstm:0' gives a value that nothing reads: a body there would change nothing",
        "splice at 'lstm:1:0', which 'pair.a' reads" + UNLESS,
    ),
    (
        lambda: unread("pair"),
        B,
        "'pair' gives a value that nothing reads: a body there would change nothing",
        "splice at 'pair:b', which the model returns" + UNLESS,
    ),
    (
        lambda: unread("dead"),
        B,
        "'dead' gives a value that reaches no output: a body there would change nothing",
        "splice at 'pair.b', which runs before it and is read, or leave it out of the pattern" + UNLESS,
    ),
    (
        lambda: unread("deader", where="before"),
        B,
        "'deader' is given a value that reaches no output: a body before it would change nothing",
        "splice at 'pair.b', which runs before it and is read, or leave it out of the pattern" + UNLESS,
    ),
    (
        lambda: unread("lstm:1:1"),
        U,
        "the model reads no output '1:1' of 'lstm'",
        "mend the name; if 'lstm' gives such a value, nothing reads it: a body there would change nothing",
    ),
    (
        lambda: unread("dead:0"),
        U,
        "the model reads no output '0' of 'dead'",
        "'dead' is the name of that tensor",
    ),
    (
        lambda: traced()["idle"],
        U,
        "'idle' is never called: it has no output",
        "take a module that runs: graph.summary() shows them",
    ),
    (
        lambda: traced().splice("arg", ag.Bottleneck(2)),
        B,
        "'arg' (ArgMax) returns no float tensor: a body has nothing to work on",
        "splice at a module or operation that gives floats",
    ),
    (
        lambda: ag.trace(Best(), torch.ones(2, 8)).splice("top:1", ag.Bottleneck(2)),
        B,
        "'top:1' is no float tensor but torch.int64: a body has nothing to work on",
        "splice at a module or operation that gives floats",
    ),
    (
        lambda: ag.trace(nn.Linear(8, 8), torch.ones(1, 8)).splice("Linear", ag.Bottleneck(2)),
        B,
        "'Linear' is the model itself: bodies are added at modules inside it",
        "trace it inside another module, nn.Sequential(model), and splice at '0'",
    ),
    (
        lambda: traced().select("{fc,othr,aside}"),
        U,
        "'{fc,othr,aside}' selects no node for othr",
        "leave it out, or did you mean 'other'?",
    ),
    (
        lambda: ag.trace(nn.Sequential(nn.ReLU(), nn.ReLU()), torch.ones(2, 8)).select("{0..4}"),
        U,
        "'{0..4}' selects no node for 2, 3, 4",
        "leave them out",
    ),
    (
        lambda: traced().select(nn.Softmax(-1)),
        G,
        ANY,
        "a predicate takes a node and says whether it is meant; a Softmax is selected by its name",
    ),
    (
        lambda: traced().splice("fc", nn.Linear(8, 8)),
        B,
        "Linear is a module, and a method is a function site -> Node",
        "lambda site: ag.module(site.output, nn.Linear(…))",
    ),
    (
        lambda: chain().splice("a", nn.Linear),
        B,
        f"{nn.Linear!r} is no method and no callable site -> Node",
        "lambda site: ag.module(site.output, nn.Linear(…))",
    ),
    (
        lambda: chain().splice(ag.Bottleneck(4), "a"),
        B,
        "'a' is no method and no callable site -> Node",
        "first where, then what: graph.splice('a', Bottleneck(4))",
    ),
    (
        lambda: chain().splice("a", "bottleneck"),
        B,
        "'bottleneck' is no method and no callable site -> Node",
        "first where, then what: graph.splice('a', ag.Bottleneck(16))",
    ),
    (
        lambda: traced().splice("/split", ag.Bottleneck(2)),
        B,
        "'/split' gives several values, of which none is its own: no body can be attached there",
        ANY,
    ),
    (
        lambda: traced().splice("/split:1", ag.Bottleneck(2)),
        B,
        "'/split:1' is one of several values of an operation: no body can be attached there",
        ANY,
    ),
    (
        lambda: traced().splice("/int", ag.Bottleneck(2)),
        B,
        "'/int' gives no float tensor but torch.int32: a body has nothing to work on",
        ANY,
    ),
    (
        lambda: ag.trace(Nested(), {"a": torch.ones(1, 8)}).splice("fc", lambda s: s.output + s.graph["x:a"]),
        B,
        "the body 'fc.adapter' reads 'x:a', which is inside an argument of the model",
        "read a node that reads it",
    ),
    (
        lambda: traced().splice("fc", lambda s: s.output + s.graph["aside"]),
        B,
        "the body 'fc.adapter' reads 'aside', which runs later in the model's own forward",
        "read a node that runs before its host, or splice at a later host",
    ),
    (
        lambda: (
            traced()
            .splice("fc", ag.Bottleneck(2))
            .splice("other", lambda s: s.output + ag.dense(s.graph["fc.adapter.act"], 8))
        ),
        B,
        "the body 'other.adapter' reads 'fc.adapter.act', which is inside the body 'fc.adapter'",
        "read what that body gives: 'fc.adapter.residual'",
    ),
]

# these name a node's line or none at all: they are found after the line was written
LATER = [
    (
        lambda: broken(nodes=lambda g: {**g._nodes, "c": g._nodes["a"]}).check(),
        G,
        "node 'a' stands in the table as 'c'",
        None,
    ),
    (
        lambda: broken(nodes=lambda g: dict(reversed(g._nodes.items()))).check(),
        G,
        "node 'b' reads 'act', which comes later: a cycle",
        "a node can only read what is computed before it",
    ),
    (lambda: broken(outputs=lambda g: "c").check(), G, "the output 'c' is no node of the graph", None),
    (
        lambda: broken(bodies=lambda g: {}).check(),
        G,
        "node 'a.adapter.down' belongs to 'a.adapter', which is no body of the graph",
        None,
    ),
    (lambda: broken(bodies=misplaced).check(), G, "the body 'a.adapter' does not lead from 'a' to 'act'", None),
    (
        lambda: ag.Graph(ag.dense(x(), 8, name="d") * ag.param("d.in_features", (8,))).compile(),
        G,
        "node 'd.in_features' cannot be below a Linear, which has 'in_features' already",
        "call it something else than 'in_features'",
    ),
    (lambda: chain().compile()(), G, "input 'x' is missing", "call model(x=…)"),
    (lambda: chain().compile()([1.0]), G, "input 'x' is no tensor but a list", "call model(x=…)"),
    (
        lambda: chain().compile()(torch.ones(2, 7)),
        S,
        "input 'x' has another shape than declared",
        "give a tensor of 2 dimensions with these sizes; a name is one size in all inputs",
    ),
    (
        lambda: chain().compile()(torch.ones(2, 8).double()),
        S,
        "input 'x' has another dtype than declared",
        "x.to(torch.float32)",
    ),
]

CASES = [*NAMES, *LAYERS, *ADAPTERS, *GRAPHS, *SPLICES]


def error_of(call, kind=ag.GraphError):
    with pytest.raises(kind) as caught:
        call()
    return caught.value


def hint_of(error):
    lines = str(error).splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("  to fix      ")), None)
    return None if start is None else "\n".join(line[14:] for line in lines[start:])


@pytest.mark.parametrize(
    ("call", "kind", "first", "hint"), [*CASES, *LATER], ids=map(str, range(len([*CASES, *LATER])))
)
def test_what_is_said(call, kind, first, hint):
    error = error_of(call, kind)
    assert type(error) is kind
    if first is not ANY:
        assert str(error).splitlines()[0] == first
    if hint is not ANY:
        assert hint_of(error) == hint
    assert "Traceback" not in str(error)
    assert error.hint == hint_of(error)


@pytest.mark.parametrize("call", [case[0] for case in CASES])
def test_the_users_line_is_named(call):
    """The line of this file on which it was written, wherever inside the library it was found."""
    if call.__code__.co_names[0] == "check_imported_name":
        return
    error = error_of(call)
    source, first = inspect.getsourcelines(call)
    assert error.source is not None
    assert error.source.file == __file__
    helpers = [f for f in globals().values() if inspect.isfunction(f) and f.__module__ == __name__]
    lines = set(range(first, first + len(source)))
    for helper in helpers:
        if helper.__name__ in call.__code__.co_names:
            text, start = inspect.getsourcelines(helper)
            lines |= set(range(start, start + len(text)))
    assert error.source.line in lines
    assert error.source.text in Path(__file__).read_text()
    assert f"test_messages.py:{error.source.line}    " in str(error)


def raised_at(call):
    """Where in the library an error comes from: the innermost of its lines."""
    error = error_of(call)
    frames = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    own = [place for place in frames if place[0].startswith(str(PACKAGE))]
    return own[-1]


# these are raised by the table above as something else, or by tests of their own
ELSEWHERE = {
    ("shapes.py", "ValueError"),  # the reason inside a ShapeMismatch
    ("table.py", "ValueError"),
    ("lower.py", "ValueError"),  # under torch.compile, see test_lower.py
}


def said_by(node):
    """The longest plain piece of an error's message, as a pattern of another test would write it."""
    texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return max((piece for text in texts for piece in re.split(r"[^\w ,:]", text)), key=len, default="").strip()


# what shared layers and optional inputs say: below, and in test_axon_model.py and test_axon_json.py
SHARING = ("calls of one layer", "decided where a graph is made", "cannot make a default for")


def test_a_body_does_not_share_weights_with_itself():
    fc = ag.dense(x(), 8, name="fc")
    graph = ag.Graph(ag.dense(fc, 8, share=fc))
    with pytest.raises(ag.GraphError, match=r"shares the weights of .*, which is decided where a graph is made"):
        graph.splice("fc", lambda site: ag.dense(a := ag.dense(site.output, 8, name="a"), 8, share=a))


def test_every_error_of_these_files_is_pinned():
    """A new `raise` needs a row here, or its words in another test."""
    seen = {raised_at(case[0]) for case in [*CASES, *LATER]}
    others = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py") if p != Path(__file__))
    missing = []
    for path in OWN:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Raise):
                continue
            name = ast.unparse(node.exc.func) if isinstance(node.exc, ast.Call) else ""
            if (path.name, name) in ELSEWHERE:
                continue
            words = said_by(node)
            if (len(words) > 8 and words in others) or any(said in ast.unparse(node) for said in SHARING):
                continue
            if not any(f == str(path) and node.lineno <= line <= node.end_lineno for f, line in seen):
                missing.append(f"{path.name}:{node.lineno} {ast.unparse(node)[:80]}")
    assert not missing


# ---------------------------------------------------------------------- nodes taken for tensors

EIGHT = torch.ones(8)


@pytest.mark.parametrize(
    ("use", "said", "hint"),
    [
        (lambda v: torch.relu(v), "torch's relu cannot take it", "ag.relu(…) is that as a node;"),
        (lambda v: nn.functional.gelu(input=v), "torch's gelu cannot take it", "ag.gelu(…) is that as a node;"),
        (lambda v: torch.cat([v, v]), "torch's cat cannot take it", "ag.nx([x], lambda x: cat(x, …))"),
        (lambda v: nn.Linear(8, 8)(v), "torch's linear cannot take it", "ag.module(x, module)"),
        (lambda v: EIGHT + v, "torch's add cannot take it", "ag.constant(…)"),
        (lambda v: EIGHT @ v, "torch's matmul cannot take it", "ag.nx([x], lambda x: matmul(x, …))"),
        (lambda v: v @ EIGHT, "it does not know @", "lambda x: x @ weight"),
        (lambda v: v / 2, "it does not know /", "x * 0.5"),
        (lambda v: 2 / v, "it does not know /", "lambda x: x / 2"),
        (lambda v: -v, "it does not know a minus before it", "lambda x: -x"),
        (lambda v: v**2, "it does not know **", "lambda x: x ** 2"),
        (lambda v: abs(v), "it does not know abs()", "lambda x: abs(x)"),
        (lambda v: v[0], "it does not know […]", "lambda x: x[…]"),
        (lambda v: [*v], "it does not know […]", "lambda x: x[…]"),
        (lambda v: v > 0, "it does not know comparisons", "lambda x: x > 0"),
        (lambda v: v.mean(-1), "it has no 'mean'", "lambda x: x.mean(…)"),
        (lambda v: v.T, "it has no 'T'", "ag.nx([x]"),
    ],
)
@pytest.mark.parametrize("where", ["declared", "in a method"])
def test_a_node_is_no_tensor(where, use, said, hint):
    call = (lambda: use(x())) if where == "declared" else lambda: traced().splice("fc", lambda site: use(site.output))
    error = error_of(call)
    first = str(error).splitlines()[0]
    assert first.startswith("<x: input" if where == "declared" else "<fc: Linear")
    assert first.endswith(f"> is a node of a graph, not a tensor: {said}")
    assert hint in error.hint
    assert error.source.file == __file__
    assert error.node == ("x" if where == "declared" else "fc")


def test_the_ways_out_that_a_node_names():
    given = torch.randn(4, 8)
    linear = nn.Linear(8, 8)
    node = ag.module(ag.nx([x()], lambda v: v[:, :8] / 2 - v.mean()), linear, name="m")
    model = ag.Graph(ag.relu(node * 0.5 + ag.constant(EIGHT))).compile()
    torch.testing.assert_close(model(given), torch.relu(linear(given / 2 - given.mean()) * 0.5 + EIGHT))


def test_nodes_are_looked_at_as_any_object():
    node = ag.relu(x(), name="act")
    assert not hasattr(node, "mean")
    assert getattr(node, "numpy", None) is None
    for copied in (copy.copy(node), copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert copied.same(replace(node, inputs=copied.inputs))


# ---------------------------------------------------------------------- whole messages


def test_both_sides_are_aligned():
    error = error_of(lambda: Adapter.wrap(ag.dense(x(), 8, name="fc"), hidden_size=512))
    assert str(error).splitlines()[:3] == [
        "body 'adapter' does not fit its host",
        "    host   fc           batch × 8",
        "    body   adapter.up   batch × 512   (hidden_size=512)",
    ]


@pytest.mark.parametrize(("arguments", "file"), [([], "<stdin>"), (["-c"], "<string>")])
def test_code_without_a_file_is_named_by_its_line(arguments, file):
    code = "import adaptergraph as ag\nx = ag.input('x', shape=('batch', 8))\nag.Graph(x)['fc']\n"
    given = {"input": code} if not arguments else {}
    command = [sys.executable, *arguments, *([code] if arguments else [])]
    done = subprocess.run(command, capture_output=True, text=True, **given)
    # newer versions of Python keep the text of such code too
    assert re.search(rf"^  written at  {file}:3(    ag\.Graph\(x\)\['fc'\])?$", done.stderr, re.MULTILINE)


def test_reasons_are_told_in_the_words_of_the_graph():
    def reason(call):
        row = next(line for line in str(error_of(call)).splitlines() if line.strip().startswith("because"))
        return row.split("because")[1].strip()

    assert (
        reason(lambda: ag.dense(x("batch", None), 8)) == "its parameters need a size that is known, not a name or None"
    )
    assert (
        reason(lambda: ag.nx(x(), lambda t: t.mul_(2)))
        == "it changes in place what it reads, and so for every other reader"
    )
    assert reason(lambda: ag.module(x(), nn.ReLU(inplace=True))).startswith("it changes in place")
    assert reason(lambda: ag.dense(ag.input("s", shape=()), 8)) == "a scalar has no features"
    assert "batch" in reason(lambda: ag.reshape(x(), ("batch", 7)))
    assert "?" in reason(lambda: x() + x(None, 8, name="y"))
    assert "211" in reason(lambda: x(211) + x(210, name="y")), "a real size keeps its number"
    with pytest.raises(ag.ShapeMismatch) as caught:
        ag.nx(x(), lambda t: t.nope())
    assert isinstance(caught.value.__cause__, AttributeError), (
        "an error in a function of the user's keeps its traceback"
    )
    with pytest.raises(ag.ShapeMismatch) as caught:
        ag.reshape(x(), ("batch", 7))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_long_lines_are_cut():
    error = error_of(
        lambda: ag.dense(x(), 0, name="a_long_name_that_nobody_would_give_a_node_but_that_fills_the_line_of_a_file")
    )
    line = next(line for line in str(error).splitlines() if "written at" in line)
    assert line.endswith("…")
    assert len(line) < 150
