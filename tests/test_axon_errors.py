"""What Axon finds late or not at all: here at the user's line. One test for each error of the golden file."""

import json
import re
from pathlib import Path

import pytest
import torch

import adaptergraph as ag

GOLDEN = Path(__file__).parent / "golden" / "axon.json"
HERE = Path(__file__).name


def x(size=6):
    return ag.input("x", ("batch", size))


def base():
    h = ag.relu(ag.dense(x(), 8, name="fc1"), name="act1")
    h = ag.relu(ag.dense(h, 8, name="fc2"), name="act2")
    return ag.Graph(ag.dense(h, 3, name="head"))


def raises(fn, message, error=ag.GraphError, at_call=True):
    """The error, whose text says the user's line when a graph could have known."""
    with pytest.raises(error, match=message) as caught:
        fn()
    text = str(caught.value)
    if at_call:
        assert f"written at  {HERE}:" in text
    return text


def test_rewrite_nodes_output_only_adapter_crashes():
    graph = base().freeze()

    def rewriter(node):
        if node.op == "dense" and node.name != "head":
            return lambda inputs, output: ag.Adapter.wrap(output, bottleneck_size=4, name=f"{node.name}_adapter")
        return None

    adapted = graph.rewrite_nodes(rewriter)
    assert list(adapted.bodies) == ["fc1_adapter", "fc2_adapter"]
    assert adapted["act1"].inputs == ("fc1_adapter.residual",)
    given = torch.randn(4, 6)
    # a fresh adapter is the identity
    assert torch.equal(adapted.compile()(given), graph.compile()(given))
    assert [p for p, t in adapted.trained.items() if t] == [p for p in adapted.params if "adapter" in p]
    assert adapted.unsplice() == graph


def test_rewrite_nodes_on_output_node_works():
    graph = ag.Graph(ag.dense(x(), 6, name="o"))
    wide = graph.rewrite_nodes(lambda n: (lambda i, o: ag.add([i[0], o], name="res")) if n.op == "dense" else None)
    assert list(wide) == ["x", "o", "res"]
    assert wide.outputs == "res"


def test_shape_mismatch_add():
    text = raises(
        lambda: ag.add([ag.dense(x(), 32, name="left"), ag.dense(x(), 64, name="right")], name="bad_sum"),
        "add 'bad_sum' does not fit what it reads",
        ag.ShapeMismatch,
    )
    assert re.search(r"reads +left +batch × 32", text)
    assert re.search(r"reads +right +batch × 64", text)


def test_shape_mismatch_add_debug():
    """The line is always there, without a debug switch."""
    text = raises(lambda: ag.dense(x(), 32) + ag.dense(x(), 64), "add does not fit what it reads", ag.ShapeMismatch)
    assert "ag.dense(x(), 32) + ag.dense(x(), 64)" in text


def test_dense_zero_units():
    raises(lambda: ag.dense(x(), 0), "the size of dense is a positive whole number, not 0")


def test_dense_float_units():
    raises(lambda: ag.dense(x(), 2.5), "the size of dense is a positive whole number, not 2.5")


def test_unknown_option():
    text = raises(lambda: ag.dense(x(), 3, activaton="relu"), "dense has no option 'activaton'")
    assert "did you mean 'activation'?" in text
    raises(lambda: ag.conv(x(), 3, strides=2), "conv has no option 'strides'")


def test_bad_initializer():
    text = raises(lambda: ag.dense(x(), 3, weight_init="glorot_unifrom"), "unknown initializer 'glorot_unifrom'")
    assert "did you mean 'glorot_uniform'?" in text


def test_orthogonal_initializer_atom():
    weight = ag.Graph(ag.dense(x(), 3, weight_init="orthogonal", name="fc")).compile().fc.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(3))


@pytest.mark.parametrize("layer", [ag.dropout, ag.alpha_dropout])
def test_dropout_rate_1(layer):
    raises(lambda: layer(x(), rate=1.0), "a dropout rate is at least 0 and less than 1, not 1.0")


def test_dropout_rate_neg():
    raises(lambda: ag.dropout(x(), rate=-0.1), "a dropout rate is at least 0 and less than 1, not -0.1")


def test_layer_name_integer():
    raises(lambda: ag.dense(x(), 3, name=5), "a node's name is a string, not 5")


def test_layer_name_atom():
    raises(lambda: ag.dense(x(), 3, name=b"foo"), "a node's name is a string, not b'foo'")


def test_input_atom_name():
    raises(lambda: ag.input(b"foo", (1,)), "a node's name is a string, not b'foo'")


def test_input_bad_shape():
    raises(lambda: ag.input("x", 5), "the shape of input 'x' is a tuple of sizes, not 5")
    raises(lambda: ag.input("x", (0,)), "0 in the shape of input 'x' is no size")


def test_constant_bad():
    raises(lambda: ag.constant("x"), "a constant is a tensor or a number, not 'x'")


def test_layer_bad_input():
    raises(lambda: ag.layer(torch.mul, [1]), "layer reads nodes, not int: 1")


def test_dense_on_tensor():
    raises(lambda: ag.dense(torch.ones(2, 6), 3), "dense reads nodes, not Tensor")


def test_missing_input():
    model = ag.Graph(ag.relu(x())).compile()
    raises(lambda: model(), "input 'x' is missing", at_call=False)
    raises(lambda: model(other=torch.ones(2, 6)), "unexpected keyword argument 'other'", TypeError, at_call=False)


def test_ambiguous_input():
    model = ag.Graph(ag.input("a", ("batch", 6)) + ag.input("b", ("batch", 6))).compile()
    assert "call model(b=…)" in raises(lambda: model(torch.ones(2, 6)), "input 'b' is missing", at_call=False)


def test_missing_param():
    """A compiled model has all its parameters; a state that lacks some is named by torch."""
    model = base().compile()
    raises(lambda: model.load_state_dict({}), "Missing key.*fc1.weight", RuntimeError, at_call=False)
    text = raises(lambda: base().compile(state={"fc1.wieght": torch.ones(8, 6)}), "do not fit", ag.StateMismatch)
    assert "nearest: fc1.weight" in text


def test_wrong_param_shape():
    text = raises(lambda: base().compile(state={"fc1.weight": torch.ones(8, 5)}), "do not fit", ag.StateMismatch)
    assert re.search(r"fc1\.weight +model \(8, 6\) +given \(8, 5\)", text)


def test_declared_input_shape_not_enforced():
    model = ag.Graph(ag.relu(x())).compile()
    text = raises(lambda: model(torch.ones(2, 7)), "another shape than declared", ag.ShapeMismatch, at_call=False)
    assert re.search(r"declared +batch × 6\n +given +2 × 7", text)


def test_extra_input_ignored():
    model = ag.Graph(ag.relu(x())).compile()
    raises(lambda: model(torch.ones(2, 6), extra=1), "unexpected keyword argument 'extra'", TypeError, at_call=False)


def twice(first, second):
    text = raises(lambda: ag.Graph(second(first)), "two different nodes are called 'd'", ag.DuplicateName)
    assert len(re.findall(rf"(first|second) +{HERE}:\d+", text)) == 2


def test_dup_names_same_shape():
    twice(ag.dense(x(), 6, name="d"), lambda h: ag.dense(h, 6, name="d"))


def test_dup_names_diff_shape():
    twice(ag.dense(x(), 4, name="d"), lambda h: ag.dense(h, 3, name="d"))


def test_dup_names_different_ops():
    twice(ag.dense(x(), 6, name="d"), lambda h: ag.layer_norm(h, name="d"))


def test_dup_input_names():
    raises(lambda: ag.Graph(x() + x()), "two different nodes are called 'x'", ag.DuplicateName)


def test_unknown_activation():
    assert "did you mean 'gelu'?" in raises(lambda: ag.activation(x(), "gleu"), "unknown activation 'gleu'")


def test_unknown_activation_at_construction():
    raises(lambda: ag.dense(x(), 3, activation="nope"), "unknown activation 'nope'")


def test_adapter_missing_hidden():
    raises(lambda: ag.Adapter.build(), "hidden_size", TypeError, at_call=False)
    # where the layer is known, it need not be said
    assert ag.Adapter.wrap(ag.dense(x(), 8)).shape == ("batch", 8)


def test_adapter_bad_activation():
    raises(lambda: ag.Adapter.build(8, activation="nope"), "unknown activation 'nope'")


def test_adapter_hidden_mismatch():
    text = raises(lambda: ag.Adapter.wrap(x(8), hidden_size=6), "does not fit its host", ag.ShapeMismatch)
    assert "leave hidden_size out, or set it to 8" in text
    # a hidden size of one is no broadcast either
    raises(lambda: ag.Adapter.wrap(x(1), hidden_size=8), "does not fit its host", ag.ShapeMismatch)


def test_adapter_unknown_opt_ignored():
    text = raises(lambda: ag.Adapter.build(8, botleneck_size=2), "has no option 'botleneck_size'")
    assert "did you mean 'bottleneck_size'?" in text


def test_optional_none():
    maybe = ag.input("maybe", ("batch", 6), optional=True)
    raises(lambda: ag.Graph(maybe), "the graph's output reads 'maybe', which is optional and may be missing")
    text = raises(lambda: ag.dense(maybe, 3), "dense reads 'maybe', which is optional and may be missing")
    assert "ag.optional(maybe, default=…)" in text


def test_conv_rank2():
    text = raises(lambda: ag.conv(x(), 3), "conv reads batch × channels × one to three spatial sizes")
    assert "'x' is batch × 6" in text


def test_group_norm_indivisible():
    image = ag.input("image", ("batch", 4, 6, 5))
    text = raises(lambda: ag.group_norm(image, 3, name="gn"), "group_norm 'gn' does not fit", ag.ShapeMismatch)
    assert "num_channels (4) must be divisible by num_groups (3)" in text


def test_reshape_bad():
    text = raises(lambda: ag.reshape(x(), ("batch", 4)), "reshape does not fit what it reads", ag.ShapeMismatch)
    assert re.search(r"reads +x +batch × 6", text)


def test_cond_not_bool():
    mean = ag.nx(x(), torch.mean, name="mean")
    text = raises(lambda: ag.cond(mean, ag.relu(x()), ag.tanh(x())), "cond asks 'mean', which is no boolean")
    assert "torch.float32" in text


def test_embedding_out_of_range():
    """Only the values say it: torch refuses the call."""
    model = ag.Graph(ag.embedding(ag.input("ids", ("batch",), torch.int64), 7, 3)).compile()
    raises(lambda: model(torch.tensor([9])), "index out of range", IndexError, at_call=False)


def test_rewriter_returns_garbage():
    graph = base()
    text = raises(lambda: graph.rewrite_nodes(lambda n: 5), "the rewriter returned 5 for 'x'")
    assert "(inputs, output) -> Node" in text
    raises(lambda: graph.rewrite_nodes(lambda n: lambda i, o: 5), "what the rewriter made for 'x' is no node but 5")


def test_freeze_deprecated_works():
    assert not any(base().freeze().trained.values())


def test_freeze_lost_in_train_step():
    """Axon's training forgets what is frozen. Here a frozen parameter takes no gradient, so no optimizer moves it."""
    model = base().freeze(["fc1", "fc2"]).compile()
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"head.weight", "head.bias"}


def test_freeze_twice_overwrites():
    trained = base().freeze("fc1").freeze("fc2").trained
    assert [n for n, t in trained.items() if t] == ["head.weight", "head.bias"]


def test_pop_node_returns_list():
    head, rest = base().pop_node()
    assert (head.name, rest.outputs) == ("head", "act2")
    assert isinstance(rest, ag.Graph)


def test_predict_plain_map_params():
    state = base().compile(seed=3).state_dict()
    one, two = base().compile(state=state), base().compile(seed=3)
    assert torch.equal(one(torch.ones(1, 6)), two(torch.ones(1, 6)))


def test_block_dropout_in_train():
    tower = ag.block(lambda h: ag.dropout(h, rate=0.5))
    model = ag.Graph(tower(tower(x()))).compile().train()
    values = model(torch.ones(50, 6))
    assert 0 < (values == 0).float().mean() < 1
    assert torch.equal(model.eval()(torch.ones(2, 6)), torch.ones(2, 6))


def test_every_error_of_the_file_has_a_test():
    names = [e["name"] for e in json.loads(GOLDEN.read_text())["errors"]]
    assert len(names) == 47
    assert [n for n in names if f"test_{n}" not in globals()] == []


# ---------------------------------------------------------------------- more that Axon finds late


def test_concatenation_along_a_wrong_axis():
    y = ag.input("y", ("batch", 5))
    text = raises(lambda: ag.concatenate([x(), y], dim=0), "concatenate does not fit what it reads", ag.ShapeMismatch)
    assert "option" in text
    raises(lambda: ag.concatenate([x(), y], dim=2), "concatenate does not fit what it reads", ag.ShapeMismatch)


def test_a_cond_with_different_branches():
    pred = ag.input("pred", (), torch.bool)
    text = raises(lambda: ag.cond(pred, x(), ag.dense(x(), 3)), "the branches of cond differ", ag.ShapeMismatch)
    assert re.search(r"true +x +batch × 6 .*\n +false +dense +batch × 3", text)
    rows = ag.input("rows", (3,), torch.bool)
    raises(lambda: ag.cond(rows, x(), x()), "a scalar, or one boolean for each row", ag.ShapeMismatch)


def test_a_container_with_something_else():
    raises(lambda: ag.container({"a": x(), "b": [x(), 5]}), r"a container holds nodes, not 5 at \['b'\]\[1\]")
    raises(lambda: ag.Graph({"a": x(), "b": [x(), 5]}), r"a graph ends in nodes, not 5 at \['b'\]\[1\]")
    raises(lambda: ag.container([]), r"a container holds nodes, not \[\]")


def test_optional_of_what_is_always_there():
    raises(lambda: ag.optional(x()), "optional reads an optional input, and 'x' is always there")
    maybe = ag.input("maybe", ("batch", 6), optional=True)
    raises(lambda: ag.optional(maybe, default="0"), "the default of 'maybe' is a number, not '0'")
    raises(lambda: ag.or_else(maybe, ag.dense(x(), 3)), "cannot stand for the input 'maybe'", ag.ShapeMismatch)
    other = ag.input("other", ("n", 6), optional=True)
    text = raises(lambda: ag.Graph([x(), ag.optional(other, default=1)]), "no other input has the size 'n'")
    assert "ag.or_else" in text


def test_sharing_what_does_not_fit():
    first = ag.dense(x(), 3, name="fc")
    raises(lambda: ag.dense(x(), 4, share=first), "'fc': they do not fit", ag.ShapeMismatch)
    raises(lambda: ag.dense(x(), 3, share=ag.relu(first)), "cannot share the weights of 'relu'")
    raises(lambda: ag.dense(x(), 3, share=first, name="other"), "'other' shares the weights of 'fc'")
    raises(lambda: ag.dense(x(), 3, share="fc"), "share= takes a node")
    norm = ag.layer_norm(x(), name="norm")
    raises(lambda: ag.layer_norm(x(), eps=1.0, share=norm), "is made with another eps")


def test_sharing_is_decided_before_the_graph():
    graph = base()
    raises(
        lambda: graph.splice("act1", lambda s: ag.dense(s.output, 8, share=graph["fc2"])),
        "dense shares the weights of 'fc2'",
        ag.BadSplice,
    )


def test_a_rewriter_that_reads_what_comes_later():
    graph = base()
    later = lambda n: (lambda i, o: ag.relu(graph["fc2"])) if n.name == "act1" else None  # noqa: E731
    raises(lambda: graph.rewrite_nodes(later), "reads 'fc2', which comes later: a cycle", ag.BadSplice)
    narrow = lambda n: (lambda i, o: ag.dense(o, 2)) if n.name == "act1" else None  # noqa: E731
    raises(lambda: graph.rewrite_nodes(narrow), "does not fit in the place of 'act1'", ag.ShapeMismatch)


def test_what_cannot_be_popped():
    both = base().tap("act2")
    raises(lambda: both.pop_node(), "the graph has 2 outputs", ag.BadSplice)
    raises(lambda: ag.Graph(x()).pop_node(), "'x' cannot be popped: it is an input", ag.BadSplice)
    adapted = base().splice("head", ag.Bottleneck(2))
    raises(lambda: adapted.pop_node(), "part of the body 'head.adapter'", ag.BadSplice)


def test_a_block_that_makes_other_layers():
    kinds = iter([ag.relu, ag.tanh])
    other = ag.block(lambda h: next(kinds)(h))
    first = other(x())
    raises(lambda: other(first), "makes other layers than at its first call")
    raises(lambda: ag.block(lambda h: 5)(x()), "a block returns a node or a tuple of nodes, not 5")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i: ag.conv(i, 3, kernel_size=0), "kernel_size of conv is a whole number of at least 1"),
        (lambda i: ag.conv(i, 3, kernel_size=(1, 2, 3)), "or 2 of them, not"),
        (lambda i: ag.conv(i, 3, padding="sane"), "padding is 'valid', 'same', numbers or pairs"),
        (lambda i: ag.conv(i, 3, padding=[(1, 0)]), "padding is a whole number"),
        (lambda i: ag.conv(i, 3, groups=3), "conv does not fit what it reads"),
        (lambda i: ag.max_pool(i, kernel_size=9), "max_pool does not fit what it reads"),
        (lambda i: ag.lp_pool(i, norm=0), "the norm of lp_pool is a positive number"),
        (lambda i: ag.split(i, 4), "is no 4 equal parts"),
        (lambda i: ag.split(i, (1, 2)), "split does not fit what it reads"),
        (lambda i: ag.pad(i, [1, 2]), "pad takes a pair"),
        (lambda i: ag.resize(i, (2, 2), method="bilinaer"), "did you mean 'bilinear'?"),
        (lambda i: ag.resize(i, (2, 2), method="nearest", antialias=True), "resize does not fit what it reads"),
        (lambda i: ag.batch_norm(i, momentum=2), "momentum is a number from 0 to 1"),
        (lambda i: ag.lstm(i, 3), "it reads batch × steps × features"),
        (lambda i: ag.namespace("a b"), "a node cannot be called 'a b'"),
        (lambda i: ag.conv(ag.input("j", ("batch", "c", 4, 4)), 3), "conv does not fit what it reads"),
    ],
)
def test_options_that_cannot_be_right(make, message):
    raises(lambda: make(ag.input("image", ("batch", 4, 6, 5))), re.escape(message))


def test_states_and_masks_of_a_recurrent_layer():
    steps = ag.input("steps", ("batch", 5, 4))
    wrong = ag.input("h", ("batch", 2))
    raises(lambda: ag.gru(steps, 3, state=wrong), "'h' does not fit the gru that reads it", ag.ShapeMismatch)
    seen = ag.input("seen", ("batch", 4), torch.bool)
    raises(lambda: ag.gru(steps, 3, mask=seen), "'seen' does not fit the gru that reads it", ag.ShapeMismatch)
    raises(lambda: ag.lstm(steps, 3, state=wrong), r"the state of lstm is a pair \(hidden, cell\)")
