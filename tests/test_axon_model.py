"""The model API of Axon: verbs, shared weights, namespaces, optional inputs, nested outputs; layers beside torch."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from axonfile import Reader, flat
from torch import nn

import adaptergraph as ag

CASES = {c["name"]: c for c in json.loads((Path(__file__).parent / "golden" / "axon.json").read_text())["cases"]}


def x(*shape):
    return ag.input("x", ("batch", *shape))


# ---------------------------------------------------------------------- verbs


def lora(node):
    if node.op != "dense":
        return None

    def write(inputs, output):
        h = ag.dense(inputs[0], 2, bias=False, name=f"{node.name}_lora_a")
        h = ag.dense(h, node.shape[-1], bias=False, name=f"{node.name}_lora_b")
        return ag.add(output, h * 0.5, name=f"{node.name}_lora_out")

    return write


def adapters(node):
    if node.op != "dense" or node.name == "head":
        return None
    return lambda inputs, output: ag.Adapter.wrap(output, bottleneck_size=4, name=f"{node.name}_adapter")


def to_tanh(node):
    return (lambda inputs, output: ag.tanh(inputs[0])) if node.op == "relu" else None


@pytest.mark.parametrize(
    ("name", "rewriter"),
    [("rewrite_lora", lora), ("rewrite_splice_adapters", adapters), ("rewrite_relu_to_tanh", to_tanh)],
)
def test_a_rewrite_gives_what_axon_gives(name, rewriter):
    case = CASES[name]
    before, after = Reader(CASES["base"]), Reader(case)
    rewritten = before.graph().rewrite_nodes(rewriter)
    state = {name.replace("_down.", ".down.").replace("_up.", ".up."): v for name, v in after.state.items()}
    model = rewritten.compile(state=state)
    torch.testing.assert_close(model(**after.inputs()), flat(case["output"])[0], rtol=2e-5, atol=2e-5)


def test_pop_node_gives_what_axon_gives():
    reader = Reader(CASES["base"])
    head, rest = reader.graph().pop_node()
    state = {n: v for n, v in reader.state.items() if not n.startswith("head.")}
    expected = flat(CASES["pop_head"]["output"])[0]
    torch.testing.assert_close(rest.compile(state=state)(**reader.inputs()), expected, rtol=2e-5, atol=2e-5)
    assert head.op == "dense"


def test_rewriting_on_top_of_bodies():
    graph = ag.Graph(ag.relu(ag.dense(x(6), 6, name="fc"), name="act")).splice("fc", ag.Bottleneck(2))
    wide = graph.rewrite_nodes(lora)
    assert list(wide)[1:8] == [
        "fc",
        "fc_lora_a",
        "fc_lora_b",
        "constant_0",
        "multiply_0",
        "fc_lora_out",
        "fc.adapter.down",
    ]
    assert wide.bodies["fc.adapter"].calls == (("fc_lora_out", "fc.adapter.residual"),)
    with pytest.raises(ag.BadSplice, match=r"'fc' has the body 'fc\.adapter'"):
        graph.rewrite_nodes(lambda n: (lambda i, o: ag.tanh(i[0], name="other")) if n.name == "fc" else None)
    assert list(graph.rewrite_nodes(lambda n: (lambda i, o: i[0]) if n.name == "act" else None))[-1] == (
        "fc.adapter.residual"
    )


def test_map_and_reduce():
    graph = ag.Graph(ag.relu(ag.dense(x(6), 6, name="fc"), name="act"))
    assert graph.map_nodes(lambda n: n) == graph
    mapped = graph.map_nodes(lambda n: ag.gelu(graph["fc"]) if n.op == "relu" else n)
    assert mapped.properties == {"x": "input", "fc": "dense", "act": "gelu"}
    assert graph.reduce_nodes(0, lambda n, count: count + len(n.params)) == 2
    assert graph.get_op_counts() == {"input": 1, "dense": 1, "relu": 1}
    assert graph.get_inputs() == {"x": ("batch", 6)}
    assert graph.get_output_shape() == ("batch", 6)
    assert ag.Graph({"a": [graph["fc"], graph["x"]]}).get_output_shape() == {"a": (("batch", 6), ("batch", 6))}


def test_imported_graphs_are_not_rewritten_but_read():
    graph = ag.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.ones(1, 4))
    assert graph.get_op_counts()
    assert set(graph.properties) == set(graph)
    with pytest.raises(ag.BadSplice, match="rewrite_nodes works on declared graphs"):
        graph.rewrite_nodes(lambda n: None)


# ---------------------------------------------------------------------- sharing, namespaces, structure


def test_shared_layers_are_one_set_of_weights():
    first = ag.dense(x(6), 6)
    graph = ag.Graph(ag.dense(ag.relu(first), 6, share=first))
    assert list(graph) == ["x", "dense_0", "relu_0", "dense_0@1"]
    model = graph.compile()
    assert list(model.state_dict()) == ["dense_0.weight", "dense_0.bias"]
    given = torch.randn(3, 6)
    torch.testing.assert_close(model(given), model.dense_0(torch.relu(model.dense_0(given))))
    renamed = graph.rename("dense_0", "fc")
    assert list(renamed) == ["x", "fc", "relu_0", "fc@1"]
    adapted = graph.splice("dense_0", ag.Bottleneck(2))
    assert adapted.bodies["dense_0.adapter"].calls[1] == ("dense_0@1", "dense_0.adapter.residual@1")
    assert adapted.unsplice() == graph
    once = graph.splice("dense_0@1", ag.Bottleneck(2))
    assert once.bodies["dense_0.adapter_call1"].calls == (("dense_0@1", "dense_0.adapter_call1.residual"),)
    assert once["relu_0"].inputs == ("dense_0",)
    assert graph.splice("**", ag.Bottleneck(2)).splices[0].hosts == ("dense_0", "relu_0")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda h, **o: ag.conv(h, 4, kernel_size=3, padding="same", **o), (4, 5, 5)),
        (lambda h, **o: ag.depthwise_conv(h, **o), (4, 5, 5)),
        (lambda h, **o: ag.conv_transpose(h, 4, **o), (4, 5, 5)),
        (lambda h, **o: ag.batch_norm(h, **o), (4, 5, 5)),
        (lambda h, **o: ag.group_norm(h, 2, **o), (4, 5, 5)),
        (lambda h, **o: ag.instance_norm(h, **o), (4, 5, 5)),
        (lambda h, **o: ag.rms_norm(h, **o), (4,)),
        (lambda h, **o: ag.bias(h, **o), (4,)),
        (lambda h, **o: ag.bilinear(h, h, 4, **o), (4,)),
        (lambda h, **o: ag.lstm(h, 4, **o)[0], (3, 4)),
        (lambda h, **o: ag.gru(h, 4, **o)[0], (3, 4)),
    ],
)
def test_every_layer_with_weights_can_share_them(layer, shape):
    first = layer(x(*shape))
    graph = ag.Graph(layer(first, share=first))
    once = ag.Graph(layer(x(*shape)))
    assert list(graph.params) == list(once.params)
    assert graph.compile()(torch.randn(2, *shape)).shape == (2, *shape)
    assert ag.Graph.from_json(graph.to_json()) == graph


def test_sharing_with_a_node_that_is_not_reached():
    first = ag.dense(x(6), 6, name="fc")
    assert list(ag.Graph(ag.dense(x(6), 6, share=first))) == ["x", "fc"]
    graph = ag.Graph(first)
    assert list(ag.Graph(ag.dense(graph["fc"], 6, share=graph["fc"]))) == ["x", "fc", "fc@1"]


def test_a_block_with_what_is_outside_of_it():
    gain = ag.param("gain", (6,), init="ones")
    tower = ag.block(lambda h: ag.dropout(ag.dense(h, 6) * gain))
    graph = ag.Graph(tower(tower(tower(x(6)))))
    assert set(graph.params) == {"gain", "dense_0.weight", "dense_0.bias"}
    assert graph.get_op_counts()["dense"] == 3
    pair = ag.block(lambda h: ag.lstm(h, 4, name="enc")[1])
    hidden, cell = pair(x(3, 4))
    again = pair(x(3, 4))
    assert isinstance(again, tuple)
    assert (hidden.name, cell.name) == ("enc.hidden", "enc.cell")


def test_namespaces_nest():
    with ag.namespace("model"), ag.namespace("encoder"):
        h = ag.Adapter.wrap(ag.dense(x(6), 6, name="fc"), bottleneck_size=2)
        h = ag.relu(h * ag.param("gain", (6,)))
    graph = ag.Graph(ag.relu(h))
    assert [n for n in graph if not n.startswith("model.encoder.")] == ["x", "relu_0"]
    assert "model.encoder.gain" in graph.params
    assert list(graph.bodies) == ["model.encoder.adapter"]
    with ag.namespace("one"):
        a = ag.Adapter.wrap(x(6), bottleneck_size=2)
    with ag.namespace("two"):
        b = ag.Adapter.wrap(a, bottleneck_size=2)
    assert list(ag.Graph(b).bodies) == ["one.adapter", "two.adapter"]


def test_nested_outputs_keep_their_structure_through_surgery():
    h = ag.dense(x(6), 6, name="fc")
    graph = ag.Graph({"deep": [h, {"act": (ag.relu(h, name="act"),)}], "x": h})
    adapted = graph.splice("fc", ag.Bottleneck(2))
    assert adapted.outputs["x"] == "fc.adapter.residual"
    assert adapted.unsplice() == graph
    result = adapted.compile()(torch.ones(2, 6))
    assert result["deep"][1]["act"][0].shape == (2, 6)
    assert result["x"] is result["deep"][0]
    assert graph.rename("act", "other").outputs["deep"][1] == {"act": ("other",)}


def test_optional_inputs():
    gain = ag.input("gain", ("batch", 6), optional=True)
    bias = ag.input("bias", (6,), optional=True)
    graph = ag.Graph(x(6) * ag.optional(gain, default=2.0) + ag.or_else(bias, ag.constant(torch.ones(6))))
    model = graph.compile()
    given = torch.randn(3, 6)
    assert torch.equal(model(given), given * 2 + 1)
    assert torch.equal(model(given, bias=torch.zeros(6)), given * 2)
    assert torch.equal(model(x=given, gain=given, bias=torch.zeros(6)), given * given)
    with pytest.raises(ag.ShapeMismatch, match="input 'gain' has another shape"):
        model(given, torch.ones(2, 6))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(given), given * 2 + 1)


def test_cond_for_all_and_for_rows():
    h = x(3)
    for shape, pred in [((), torch.tensor(True)), (("batch",), torch.tensor([True, False]))]:
        model = ag.Graph(ag.cond(ag.input("pred", shape, torch.bool), h, -1 * h)).compile()
        given = torch.randn(2, 3)
        sign = torch.where(pred, 1.0, -1.0).expand(2).unsqueeze(1)
        assert torch.equal(model(pred=pred, x=given), given * sign)


# ---------------------------------------------------------------------- layers, beside torch's own


def run(node, given, state=None, train=False):
    return ag.Graph(node).compile(state=state).train(train)(given)


@pytest.mark.parametrize("layer", ["lstm", "gru"])
def test_a_masked_step_changes_nothing(layer):
    """Equal to running only the steps that are seen, row by row."""
    torch.manual_seed(0)
    seen = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    given = torch.randn(4, 5, 4, requires_grad=True)
    call = getattr(ag, layer)
    result = call(x(5, 4), 3, mask=ag.input("seen", ("batch", 5), torch.bool), name="rnn")
    plain = ag.Graph(call(x("steps", 4), 3, name="rnn")).compile()
    model = ag.Graph(result).compile(state=plain.state_dict())
    sequence, states = model(x=given, seen=seen)
    states = states if isinstance(states, tuple) else (states,)
    for row in range(4):
        steps = given[row : row + 1, seen[row]]
        if not len(steps[0]):
            assert not sequence[row].any()
            continue
        out, last = plain(steps)
        torch.testing.assert_close(sequence[row][seen[row]], out[0])
        for mine, other in zip(states, last if isinstance(last, tuple) else (last,), strict=True):
            torch.testing.assert_close(mine[row], other[0])
    sequence.sum().backward()
    assert torch.equal(given.grad.abs().sum(-1) > 0, seen)


def test_lstm_is_torchs():
    module = nn.LSTM(4, 3, batch_first=True)
    given = torch.randn(2, 5, 4)
    sequence, (hidden, cell) = ag.lstm(x(5, 4), 3, name="rnn")
    state = {f"rnn.{n}": p for n, p in module.named_parameters()}
    mine = ag.Graph([sequence, hidden, cell]).compile(state=state)(given)
    out, (h, c) = module(given)
    for a, b in zip(mine, (out, h[0], c[0]), strict=True):
        torch.testing.assert_close(a, b)


def test_bidirectional_is_torchs():
    module = nn.GRU(4, 3, batch_first=True, bidirectional=True)
    given = torch.randn(2, 5, 4)
    sequence, hidden = ag.bidirectional(x("steps", 4), lambda h: ag.gru(h, 3, name="rnn"), name="both")
    state = {
        f"both.{'backwards' if 'reverse' in n else 'forwards'}.rnn.{n.replace('_reverse', '')}": p
        for n, p in module.named_parameters()
    }
    mine, last = ag.Graph([sequence, hidden]).compile(state=state)(given)
    out, h = module(given)
    torch.testing.assert_close(mine, out)
    torch.testing.assert_close(last, torch.cat([h[0], h[1]], -1))


def test_convolutions_are_torchs():
    given = torch.randn(2, 4, 7, 6)
    for node, module in [
        (ag.conv(x(4, 7, 6), 6, kernel_size=3, padding=1, stride=2, name="c"), nn.Conv2d(4, 6, 3, 2, 1)),
        (ag.conv(x(4, 7, 6), 6, kernel_size=(2, 3), padding="same", name="c"), nn.Conv2d(4, 6, (2, 3), padding="same")),
        (ag.conv_transpose(x(4, 7, 6), 6, kernel_size=3, padding=1, name="c"), nn.ConvTranspose2d(4, 6, 3, 1, 1)),
        (ag.depthwise_conv(x(4, 7, 6), 2, kernel_size=3, name="c"), nn.Conv2d(4, 8, 3, groups=4)),
    ]:
        state = {f"c.{n}": p for n, p in module.named_parameters()}
        torch.testing.assert_close(run(node, given, state), module(given))
    for stride in (1, 2, 3, 5):
        made = ag.conv_transpose(x(4, 7, 6), 2, kernel_size=3, stride=stride, padding="same")
        assert made.shape == ("batch", 2, 7 * stride, 6 * stride)
        assert run(made, given).shape == (2, 2, 7 * stride, 6 * stride)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("options", "torchs"),
    [
        ({"kernel_size": 3}, ((1, 1), (0, 0))),
        ({"kernel_size": (3, 2), "stride": (2, 3)}, ((2, 3), (0, 0))),
        ({"kernel_size": 3, "padding": 1}, ((1, 1), (1, 1))),
        ({"kernel_size": (5, 3), "padding": "same"}, ((1, 1), (2, 1))),
    ],
)
def test_a_separable_convolution_is_two_of_torchs(options, torchs, bias):
    """Along the height and then along the width, each channel by itself, as Axon's `separable_conv2d`."""
    node = ag.separable_conv2d(x(4, 9, 8), 2, bias=bias, name="sep", **options)
    graph = ag.Graph(node)
    assert list(graph) == ["x", "sep.rows", "sep.columns"]
    model = graph.compile()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    rows, columns = model.sep.rows, model.sep.columns
    (down, right), (above, left) = torchs
    given = torch.randn(2, 4, 9, 8)
    h = F.conv2d(given, rows.weight, rows.bias, stride=(down, 1), padding=(above, 0), groups=4)
    wanted = F.conv2d(h, columns.weight, columns.bias, stride=(1, right), padding=(0, left), groups=8)
    assert node.shape == ("batch", *wanted.shape[1:])
    torch.testing.assert_close(model(given), wanted)
    if not bias:
        # both together are one depthwise convolution with the outer product as its kernel
        kernel = rows.weight * columns.weight
        whole = F.conv2d(given, kernel, stride=(down, right), padding=(above, left), groups=4)
        torch.testing.assert_close(model(given), whole, rtol=1e-4, atol=1e-4)


def test_a_depthwise_and_a_pointwise_convolution():
    """What others call separable."""
    node = ag.conv(ag.depthwise_conv(x(4, 9, 8), 2, kernel_size=3, name="depth"), 5, name="point")
    state = {"depth.weight": (8, 1, 3, 3), "depth.bias": (8,), "point.weight": (5, 8, 1, 1), "point.bias": (5,)}
    state = {name: torch.randn(shape) for name, shape in state.items()}
    given = torch.randn(2, 4, 9, 8)
    h = F.conv2d(given, state["depth.weight"], state["depth.bias"], groups=4)
    torch.testing.assert_close(run(node, given, state), F.conv2d(h, state["point.weight"], state["point.bias"]))


def test_activations_are_torchs():
    given = torch.linspace(-4, 8, 25).reshape(5, 5)
    for call, torchs in {
        ag.celu: F.celu,
        ag.hard_sigmoid: F.hardsigmoid,
        ag.leaky_relu: F.leaky_relu,
        ag.mish: F.mish,
        ag.softplus: F.softplus,
        ag.log_sumexp: lambda t: torch.logsumexp(t, -1, keepdim=True),
    }.items():
        torch.testing.assert_close(run(call(x(5)), given), torchs(given))
    torch.testing.assert_close(run(ag.leaky_relu(x(5), negative_slope=0.3), given), F.leaky_relu(given, 0.3))
    torch.testing.assert_close(run(ag.hard_tanh(x(5), min_val=-2, max_val=3), given), given.clamp(-2, 3))


@pytest.mark.parametrize("layer", [ag.spatial_dropout, ag.feature_alpha_dropout])
def test_dropout_of_whole_channels(layer):
    given = torch.randn(20, 8, 3, 3)
    kept = run(layer(x(8, 3, 3)), given, train=True)
    same = (kept == kept[:, :, :1, :1]).all(dim=(2, 3))
    assert 0 < same.float().mean() < 1
    assert torch.equal(run(layer(x(8, 3, 3)), given), given)


def test_frozen_batch_statistics_stay():
    graph = ag.Graph(ag.batch_norm(ag.conv(x(3, 4, 4), 5, name="conv"), name="bn"))
    given = torch.randn(6, 3, 4, 4)
    for frozen in (True, False):
        model = (graph.freeze() if frozen else graph).compile().train()
        model(given)
        assert torch.equal(model.bn.running_mean, torch.zeros(5)) == frozen
    half = ag.Graph(ag.instance_norm(x(3, 4, 4))).compile()
    torch.testing.assert_close(half.eval()(given), F.instance_norm(given))


def test_an_adapter_after_an_output_of_a_recurrent_layer():
    sequence, _ = ag.lstm(x("steps", 4), 6, name="rnn")
    graph = ag.Graph(ag.dense(sequence, 2, name="head")).freeze()
    adapted = graph.splice("rnn.sequence", ag.Bottleneck(3))
    model = adapted.compile()
    given = torch.randn(2, 5, 4)
    assert torch.equal(model(given), graph.compile()(given))
    assert next(n for n, p in model.named_parameters() if p.requires_grad) == "rnn.sequence.adapter.down.weight"
    with pytest.raises(ag.BadSplice, match="'rnn' gives no single tensor"):
        graph.splice("rnn", ag.Bottleneck(3))
