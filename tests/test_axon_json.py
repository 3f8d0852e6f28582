"""Every op as JSON text and back: the same graph, and the same numbers."""

import json

import pytest
import torch

import adaptergraph as ag
from adaptergraph.layers.table import ACTIVATIONS, OPS


def image(*shape):
    return ag.input("x", shape=("batch", *shape))


def made():
    """A graph for every op of the table, by op."""
    flat, steps, pixels = image(6), image(5, 4), image(4, 8, 6)
    ids = ag.input("ids", ("batch", "seq"), torch.int64)
    pred = ag.input("pred", (), torch.bool)
    extra = ag.input("extra", ("batch", 6), optional=True)
    qkv = ag.input("x", ("batch", "seq", 8))
    sequence, (hidden, cell) = ag.lstm(steps, 3, mask=ag.input("seen", ("batch", 5), torch.bool))
    found = {name: ag.activation(flat, name) for name in ACTIVATIONS}
    return found | {
        "dense": ag.dense(flat, 3, weight_init="glorot_uniform"),
        "embedding": ag.embedding(ids, 9, 4),
        "layer_norm": ag.layer_norm(flat),
        "dropout": ag.dropout(flat),
        "attention": ag.attention(qkv, qkv, qkv, num_heads=2),
        "add": flat + 1,
        "subtract": flat - 1,
        "multiply": flat * 2,
        "concatenate": ag.concatenate([flat, flat]),
        "reshape": ag.reshape(flat, ("batch", 3, 2)),
        "transpose": ag.transpose(steps),
        "flatten": ag.flatten(pixels),
        "conv": ag.conv(pixels, 6, kernel_size=3, padding="same", stride=2, groups=2),
        "depthwise_conv": ag.depthwise_conv(pixels, 2, kernel_size=(2, 3), padding=[(1, 0), (1, 1)]),
        "conv_transpose": ag.conv_transpose(pixels, 3, kernel_size=2, stride=3, padding="same"),
        "max_pool": ag.max_pool(pixels, kernel_size=2),
        "avg_pool": ag.avg_pool(pixels, kernel_size=2, dilation=2, stride=1),
        "lp_pool": ag.lp_pool(pixels, kernel_size=2, norm=2),
        "adaptive_avg_pool": ag.adaptive_avg_pool(pixels, 2),
        "adaptive_max_pool": ag.adaptive_max_pool(pixels, (3, 2)),
        "global_avg_pool": ag.global_avg_pool(pixels),
        "global_max_pool": ag.global_max_pool(pixels, keep_dims=True),
        "rms_norm": ag.rms_norm(flat),
        "batch_norm": ag.batch_norm(pixels),
        "group_norm": ag.group_norm(pixels, 2),
        "instance_norm": ag.instance_norm(pixels),
        "spatial_dropout": ag.spatial_dropout(pixels),
        "alpha_dropout": ag.alpha_dropout(flat),
        "feature_alpha_dropout": ag.feature_alpha_dropout(pixels),
        "bilinear": ag.bilinear(flat, flat, 3),
        "bias": ag.bias(flat),
        "item": ag.split(flat, 3),
        "split": ag.split(flat, (2, 4)),
        "cond": ag.cond(pred, ag.relu(flat), ag.tanh(flat)),
        "optional": flat + ag.optional(extra, default=2.5),
        "or_else": ag.or_else(extra, ag.relu(flat)),
        "pad": ag.pad(pixels, [(1, 0), (0, 2)], 1.5),
        "resize": ag.resize(pixels, (4, 12), method="bilinear", antialias=True),
        "lstm": {"sequence": sequence, "state": (hidden, [cell])},
        "gru": ag.gru(steps, 3, state=ag.input("h", ("batch", 3))),
        "mask": ag.mask(ids, 0),
        "contiguous": ag.Adapter.wrap(ag.conv(pixels, 4, kernel_size=1), bottleneck_size=2, residual=False),
        "reverse": ag.bidirectional(steps, lambda h: ag.gru(h, 3)),
    }


def arguments(graph):
    torch.manual_seed(0)
    given = {}
    for name, node in graph.inputs.items():
        shape = [{"batch": 2, "seq": 3}.get(d, d) for d in node.shape]
        value = torch.randn(shape) if node.dtype.is_floating_point else torch.randint(0, 2, shape)
        given[name] = value.to(node.dtype)
    return {name: value for name, value in given.items() if not graph.inputs[name].options.get("optional")}


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in (value.values() if isinstance(value, dict) else value) for t in leaves(part)]


GRAPHS = {op: ag.Graph(node) for op, node in made().items()}


def test_every_op_is_here():
    # what bodies of methods are made of goes to files with these: test_combine.py, test_features.py
    assert set(GRAPHS) == set(OPS) - {"stack", "scores", "mix", "switch", "add_alike"}


@pytest.mark.parametrize("op", sorted(GRAPHS))
def test_an_op_comes_back_equal(op):
    graph = GRAPHS[op]
    assert op in graph.get_op_counts()
    again = ag.Graph.from_json(graph.to_json())
    assert again == graph
    assert again.to_json() == graph.to_json()
    given = arguments(graph)
    one, two = leaves(graph.compile().eval()(**given)), leaves(again.compile().eval()(**given))
    assert [t.shape for t in one] == [tuple({"batch": 2, "seq": 3}.get(d, d) for d in s) for s in shapes(graph)]
    assert all(map(torch.equal, one, two))


def shapes(graph):
    return [graph[name].shape for name in graph.output_names()]


@pytest.mark.parametrize("op", ["conv", "lstm", "batch_norm", "optional", "cond", "item", "avg_pool"])
def test_an_op_is_compiled_whole(op):
    graph = GRAPHS[op]
    model = graph.compile().eval()
    given = arguments(graph)
    exported = torch.export.export(model, (), given).module()
    for a, b in zip(leaves(model(**given)), leaves(exported(**given)), strict=True):
        torch.testing.assert_close(a, b)


def test_shared_weights_and_nested_outputs_come_back():
    x = image(6)
    tower = ag.block(lambda h: ag.Adapter.wrap(ag.dense(h, 6, name="fc"), bottleneck_size=2), name="tower")
    graph = ag.Graph({"deep": [tower(tower(x)), {"x": x}]})
    again = ag.Graph.from_json(graph.to_json())
    assert again == graph
    assert again.outputs == {"deep": ("tower.adapter.residual@1", {"x": "x"})}
    assert list(again.params) == list(graph.params)


def edited(graph, fn):
    data = json.loads(graph.to_json())
    fn({n["name"]: n for n in data["nodes"]})
    return json.dumps(data)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("split", lambda n: n["split_0.1"]["options"].update(index=7), "'split_0.1' is no output of"),
        ("split", lambda n: n["split_0.1"]["options"].update(index=True), "'split_0.1' is no output of"),
        ("split", lambda n: n["split_0.1"].update(shape=["batch", 5]), "'split_0.1' cannot give"),
        ("split", lambda n: n["split_0.1"].update(inputs=["x"]), "'split_0.1' is no output of"),
        ("split", lambda n: n["split_0.1"].update(inputs=[]), "'split_0.1' is no output of"),
        ("conv", lambda n: n["conv_0"]["options"].update(groups=3), "conv 'conv_0' does not fit what it reads"),
        ("optional", lambda n: n["add_0"].update(inputs=["x", "extra"]), "reads 'extra', which is optional"),
        ("dense", lambda n: n["x"].update(options={"optional": True}), "reads 'x', which is optional"),
        ("dense", lambda n: n["x"].update(options={"code": "1"}), "the input 'x' has"),
    ],
)
def test_a_file_that_cannot_be_right(op, change, message):
    with pytest.raises(ag.GraphError, match=message):
        ag.Graph.from_json(edited(GRAPHS[op], change))


def test_a_shared_name_in_a_file_is_checked():
    x = image(6)
    first = ag.dense(x, 6, name="fc")
    text = ag.Graph(ag.dense(first, 6, share=first)).to_json()
    assert list(ag.Graph.from_json(text)) == ["x", "fc", "fc@1"]
    with pytest.raises(ag.GraphError, match="is no name of a further call"):
        ag.Graph.from_json(text.replace("fc@1", "fc@1');x('"))
    data = json.loads(text)
    data["nodes"][2] |= {"op": "relu", "options": {}, "params": {}}
    with pytest.raises(ag.GraphError, match="'fc' and 'fc@1' are calls of one layer, but not the same layer"):
        ag.Graph.from_json(json.dumps(data))
