"""Gradients, training and freezing of real Axon, its names and its errors, and its adapters through surgery.

`golden/axon.json` was written by Axon 0.8.1. A small interpreter turns the layers of a case into our calls.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import adaptergraph as ag
from adaptergraph import Adapter

DEFAULT = Path(__file__).parent / "golden" / "axon.json"
DTYPES = {"f32": torch.float32, "s64": torch.int64, "u8": torch.uint8}
CLOSE = {"rtol": 1e-6, "atol": 1e-6}

# layers whose data have to be turned round first: test_axon_golden.py takes these, and every other case once more
TURNED = {
    "conv",
    "conv_transpose",
    "depthwise_conv",
    "adaptive_avg_pool",
    "adaptive_lp_pool",
    "adaptive_max_pool",
    "avg_pool",
    "blur_pool",
    "global_avg_pool",
    "global_lp_pool",
    "global_max_pool",
    "lp_pool",
    "max_pool",
    "group_norm",
    "lstm",
    "gru",
    "mask",
    "split",
    "pad",
    "resize",
    "or_else",
}
NOT_SAID = {
    "adapter_broadcasting_hidden_1": "refused, see test_a_wrong_hidden_size_is_refused_where_it_is_written",
    "adapter_same_default_name_twice_different_bottleneck": "refused, see test_two_wraps_of_one_name_are_refused",
    "adapter_same_default_name_twice_same_shapes": "refused, see test_two_wraps_of_one_name_are_refused",
    "adapter_wrong_hidden_size": "refused, see test_a_wrong_hidden_size_is_refused_where_it_is_written",
    "act_hard_silu": "torch's, see test_hard_silu_is_torchs",
    "batch_norm_inference_img": "channels last, see test_axon_golden.py",
    "batch_norm_train": "another momentum, see test_axon_golden.py",
}


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        path = Path(metafunc.config.getoption("--axon-golden", default=None) or DEFAULT)
        cases = json.loads(path.read_text())["cases"]
        metafunc.parametrize("case", [pytest.param(c, id=f"{c['group']}-{c['name']}") for c in cases if is_said(c)])


@pytest.fixture(scope="session")
def golden(pytestconfig):
    return json.loads(Path(pytestconfig.getoption("--axon-golden", default=None) or DEFAULT).read_text())


def is_said(case):
    ops = {w for layer in case.get("layers", []) for w in (layer["op_name"], layer["op"])}
    return case["name"] not in NOT_SAID and not ops & TURNED


def tensor(value):
    return torch.tensor(value["data"], dtype=DTYPES[value["dtype"]]).reshape(value["shape"])


def ours(name):
    """`adapter_down` is `adapter.down` here: a name is a module path."""
    return re.sub(r"adapter_(down|act|up|residual)$", r"adapter.\1", name)


def state_of(params):
    """Axon's parameters under our names; kernels are the other way round."""
    state = {}
    for layer, tensors in params.items():
        for key, value in tensors.items():
            name = {"kernel": "weight", "gamma": "weight", "beta": "bias", "mean": "running_mean", "var": "running_var"}
            values = tensor(value)
            turned = key == "kernel" and values.dim() == 2 and not layer.startswith("embedding")
            state[f"{ours(layer)}.{name.get(key, key)}"] = values.T if turned else values
    return state


# ---------------------------------------------------------------------- from Axon's list of layers to our calls


def option(layer, key):
    return json.loads(re.search(rf"{key}: ([-\d.e]+)", layer["opts"])[1])


def make_input(layer, case):
    dims = re.search(r"\{(.*)\}", layer["opts"])[1].split(", ")
    dtype = DTYPES[case["inputs"][layer["name"]]["dtype"]]
    return ag.input(layer["name"], shape=["batch" if d == "nil" else int(d) for d in dims], dtype=dtype)


def make(layer, parents, case, name):
    """One of Axon's layers as a node of ours; a container is the list of its nodes."""
    op, params = layer["op_name"], case.get("params", {}).get(layer["name"], {})
    if op == "input":
        return make_input(layer, case)
    if op == "container":
        return parents
    x = parents[0] if parents else None
    if op == "dense":
        return ag.dense(x, params["kernel"]["shape"][1], bias="bias" in params, name=name)
    if op == "embedding":
        return ag.embedding(x, *params["kernel"]["shape"], name=name)
    if op == "bias":
        return ag.layer(torch.add, [x, ag.param(f"{name}.bias", params["bias"]["shape"])], name=name)
    if op == "bilinear":
        units, one, two = params["kernel"]["shape"]
        return ag.module(parents, nn.Bilinear(one, two, units, bias="bias" in params), name=name)
    if op == "layer_norm":
        return ag.layer_norm(x, eps=option(layer, "epsilon"), name=name)
    if op == "rms_norm":
        return ag.module(x, nn.RMSNorm(params["gamma"]["shape"], eps=option(layer, "epsilon")), name=name)
    if op == "batch_norm":
        cls = nn.BatchNorm1d if len(x.shape) == 2 else nn.BatchNorm2d
        return ag.module(x, cls(params["gamma"]["shape"][0], eps=option(layer, "epsilon")), name=name)
    if op == "dropout":
        return ag.dropout(x, rate=option(layer, "rate"), name=name)
    if op in ("add", "subtract", "multiply"):
        return getattr(ag, op)(x, name=name)
    if op == "concatenate":
        return ag.concatenate(x, dim=option(layer, "axis"), name=name)
    if op == "constant":
        return ag.constant(float(re.search(r"\n\s*([\d.]+)\n", layer["opts"])[1]), name=name)
    if op == "flatten":
        return ag.flatten(x, name=name)
    if op == "reshape":
        dims = re.search(r"shape: \{(.*)\}", layer["opts"])[1].split(", ")
        return ag.reshape(x, ["batch" if d == ":batch" else int(d) for d in dims], name=name)
    if op == "custom" and "softplus" in case["axon"]:
        return ag.activation(x, "softplus", name=name)
    if op == "custom" and "multiply" in case["axon"]:
        return ag.layer(torch.mul, [x, ag.param(f"{name}.w", params["w"]["shape"])], name=name)
    alpha = {"alpha": option(layer, "alpha")} if "alpha" in layer["opts"] else {}
    return ag.activation(x, op, name=name, **alpha)


def build(case, wrap):
    """The graph of a case; adapters by `Adapter.wrap`, or by their layers one by one."""
    nodes = {}
    for layer in case["layers"]:
        name, parents = layer["name"], [nodes[p] for p in layer["parents"]]
        if wrap and name.endswith("adapter_residual"):
            prefix = name.removesuffix("_residual")
            one, other = next(x for x in case["layers"] if x["name"] == layer["parents"][0])["parents"]
            size = case["params"][f"{prefix}_down"]["bias"]["shape"][0]
            act = next(x["op"] for x in case["layers"] if x["name"] == f"{prefix}_act")
            assert other == f"{prefix}_up"
            nodes[name] = Adapter.wrap(nodes[one], bottleneck_size=size, activation=act, name=prefix)
        else:
            nodes[name] = make(layer, parents, case, ours(name))
    last = nodes[case["layers"][-1]["name"]]
    if isinstance(case["output"], dict) and "data" not in case["output"]:
        return ag.Graph(dict(zip(case["output"], last, strict=True)))
    return ag.Graph(last)


def inputs_of(case):
    return {name: tensor(value) for name, value in case["inputs"].items()}


@pytest.mark.parametrize("wrap", [True, False], ids=["wrap", "layers"])
def test_outputs_are_those_of_axon(case, wrap):
    graph = build(case, wrap)
    hidden = {layer["name"] for layer in case["layers"] if layer["op_name"] == "container"}
    names = {ours(layer["name"]) for layer in case["layers"]} - hidden
    assert names == {n for n in graph if not n.endswith((".bias", ".w"))}, "no node more or less than Axon has"
    model = graph.compile(state=state_of(case["params"])).eval()
    assert set(model.state_dict()) - {f"{n}.num_batches_tracked" for n in graph} == set(state_of(case["params"]))
    out = model(**inputs_of(case))
    if isinstance(out, dict):
        for key, value in out.items():
            torch.testing.assert_close(value, tensor(case["output"][key]), **CLOSE)
    else:
        torch.testing.assert_close(out, tensor(case["output"]), **CLOSE)


def test_no_case_is_left_out_for_another_reason(golden):
    """Every adapter and rewrite case is compared, but for those that are refused on purpose."""
    said = {c["name"] for c in golden["cases"] if is_said(c)}
    for group in ("adapter", "rewrite", "activation", "linear"):
        names = {c["name"] for c in golden["cases"] if c["group"] == group}
        refused = ("adapter_same", "adapter_broadcasting", "adapter_wrong", "act_hard_silu")
        assert names - said == {n for n in names if n.startswith(refused)}
    assert len(said) >= 50


# ---------------------------------------------------------------------- the same through surgery


def cases(golden):
    return {c["name"]: c for c in golden["cases"]}


def without_adapters(state):
    return {k.replace("_adapter", ".adapter"): v for k, v in state.items()}


def test_splicing_is_rewriting(golden):
    """Axon's `rewrite_nodes` with `Adapter.wrap` after every dense but the head, as one splice."""
    case = cases(golden)["rewrite_splice_adapters"]
    base = build(cases(golden)["base"], True)
    graph = base.splice("fc*", ag.Bottleneck(4))
    model = graph.compile(state=without_adapters(state_of(case["params"])))
    torch.testing.assert_close(model(**inputs_of(case)), tensor(case["output"]), **CLOSE)


def test_replacing_is_rewriting(golden):
    case = cases(golden)["rewrite_relu_to_tanh"]
    graph = build(cases(golden)["base"], True)
    for name in ("act1", "act2"):
        graph = graph.replace(name, ag.tanh(graph[graph[name].inputs[0]]))
    model = graph.compile(state=state_of(case["params"]))
    torch.testing.assert_close(model(**inputs_of(case)), tensor(case["output"]), **CLOSE)


def test_truncating_is_popping(golden):
    case = cases(golden)["pop_head"]
    model = build(cases(golden)["base"], True).truncate("act2").compile(state=state_of(case["params"]))
    torch.testing.assert_close(model(**inputs_of(case)), tensor(case["output"]), **CLOSE)


def test_a_body_around_its_host_is_lora_by_rewriting(golden):
    case = cases(golden)["rewrite_lora"]

    def lora(site):
        size = case["params"][f"{site.name}_lora_b"]["kernel"]["shape"][1]
        low = ag.dense(site.input, 2, bias=False, name="a")
        return site.output + ag.dense(low, size, bias=False, name="b") * 0.5

    graph = build(cases(golden)["base"], True).splice("{fc1,fc2,head}", lora, name="lora", where="around")
    state = {k.replace("_lora_", ".lora."): v for k, v in state_of(case["params"]).items()}
    model = graph.compile(state=state)
    torch.testing.assert_close(model(**inputs_of(case)), tensor(case["output"]), **CLOSE)


# ---------------------------------------------------------------------- gradients and training


@pytest.mark.parametrize("index", range(3))
def test_gradients_of_an_adapter_are_those_of_axon(golden, index):
    case = golden["adapter_grads"][index]
    activation = case["name"].rpartition("_")[2]
    model = Adapter.build(8, 4, activation=activation).compile(state=state_of(case["params"]))
    loss = model(**inputs_of(case)).square().mean()
    torch.testing.assert_close(loss.detach().reshape(()), tensor(case["loss"]), **CLOSE)
    loss.backward()
    same_gradients(model, case["grads"])


def same_gradients(model, wanted):
    expected = state_of(wanted)
    found = {ours(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], **CLOSE)


def frozen(golden):
    """The model with two adapters whose hosts are frozen, by the layers that Axon's file lists."""
    graph = build(cases(golden)["rewrite_splice_adapters"], True)
    return graph.freeze()


def test_what_is_frozen_has_no_gradient_and_the_rest_has_axons(golden):
    case = golden["freeze_grad"]
    graph = frozen(golden)
    assert {n.rpartition(".")[0] for n, t in graph.trained.items() if t} == {ours(n) for n in case["trainable_names"]}
    model = graph.compile(state=state_of(case["params"]))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"Trainable Parameters: {trained} " in case["inspect_frozen"]
    loss = nn.functional.mse_loss(model(**inputs_of(case)), tensor(case["target"]))
    torch.testing.assert_close(loss.detach().reshape(()), tensor(case["loss"]), **CLOSE)
    loss.backward()
    same_gradients(model, case["grads"])


def test_ten_steps_end_where_axon_ends(golden):
    run = golden["training"][0]
    model = frozen(golden).compile(state=state_of(run["params_start"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in run["running_mean_loss_after_each_of_10_steps"]:
        loss = nn.functional.mse_loss(model(**inputs_of(run)), tensor(run["target"]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    running = [sum(losses[: i + 1]) / (i + 1) for i in range(len(losses))]
    assert running == pytest.approx(run["running_mean_loss_after_each_of_10_steps"], abs=1e-6)
    for name, value in state_of(run["params_end"]).items():
        torch.testing.assert_close(model.state_dict()[name], value, **CLOSE)
    for name, value in state_of({k: run["params_start"][k] for k in run["frozen"]}).items():
        assert torch.equal(model.state_dict()[name], value), "what is frozen does not move by one bit"


# ---------------------------------------------------------------------- names


def unnamed(case):
    """The graph of a naming case with only the names that were given, and Axon's name of each node."""
    nodes, axon = {}, {}
    params = {"kernel": {"shape": [6, 4]}, "bias": {"shape": [4]}}
    sizes = {layer["name"]: params for layer in case["layers"]}
    inputs = {"input": {"dtype": "f32"}}
    for layer in case["layers"]:
        own = None if re.fullmatch(rf"{layer['op_name']}_\d+", layer["name"]) else ours(layer["name"])
        parents = [nodes[p] for p in layer["parents"]]
        if layer["op_name"] in ("nx", "custom"):
            node = ag.nx(parents[0], torch.abs)
        else:
            made = {"inputs": inputs, "params": sizes, "axon": ""}
            node = make(layer, parents, made, own)
        nodes[layer["name"]] = node
        if layer["op_name"] != "container":
            axon[layer["name"]] = node
    return ag.Graph(nodes[case["layers"][-1]["name"]])


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("adapter_build", {}),
        ("order_of_construction_does_not_matter", {}),
        # we count the nodes that have no name, Axon those that have one too
        ("kitchen_sink_unnamed", {"dense_3": "dense_2", "custom_0": "nx_1"}),
    ],
)
def test_names_that_are_made_up(golden, name, other):
    case = next(c for c in golden["naming"] if c["name"] == name)
    if name == "adapter_build":
        graph = Adapter.build(8, 4)
    else:
        graph = unnamed(case)
    wanted = [ours(layer["name"]) for layer in case["layers"] if layer["op_name"] != "container"]
    assert list(graph) == [other.get(n, n) for n in wanted]


# ---------------------------------------------------------------------- where we mean to differ


def x(width=8):
    return ag.input("input", shape=("batch", width))


def test_two_wraps_of_one_name_are_refused(golden):
    """Axon shares the weights of both without a word, or fails at run time in a layer that is not to blame."""
    assert cases(golden)["adapter_same_default_name_twice_same_shapes"]["output"]
    with pytest.raises(ag.DuplicateName, match=r"two different nodes are called 'adapter\.down'"):
        ag.Graph(Adapter.wrap(Adapter.wrap(x(), bottleneck_size=4), bottleneck_size=4))
    graph = ag.Graph(Adapter.wrap(Adapter.wrap(x(), bottleneck_size=4), bottleneck_size=2, name="second"))
    assert graph["second.down"].shape == ("batch", 2)


def test_a_wrong_hidden_size_is_refused_where_it_is_written(golden):
    """Axon broadcasts 1 to 8 without a word, and reports others at run time."""
    assert cases(golden)["adapter_broadcasting_hidden_1"]["output"]["shape"] == [2, 8]
    with pytest.raises(ag.ShapeMismatch, match="body 'adapter' does not fit its host") as caught:
        Adapter.wrap(ag.dense(x(), 1), hidden_size=8)
    assert caught.value.source.file == __file__
    with pytest.raises(ag.ShapeMismatch, match=r"\(hidden_size=6\)"):
        Adapter.wrap(x(), hidden_size=6)


def test_hard_silu_is_torchs(golden):
    """Axon's hard sigmoid has a slope of 0.2, torch's (and the paper's) of 1/6."""
    case = cases(golden)["act_hard_silu"]
    given = inputs_of(case)["input"]
    torch.testing.assert_close(given * (given * 0.2 + 0.2).clamp(0, 1), tensor(case["output"]), **CLOSE)
    out = build(case, True).compile()(given)
    assert torch.equal(out, nn.functional.hardswish(given))
    assert not torch.allclose(out, tensor(case["output"]), atol=0.1)


def test_a_freeze_survives_and_adds_up(golden):
    """Axon loses a freeze in training, and a second one replaces the first."""
    errors = {e["name"]: e for e in golden["errors"]}
    assert "after: %{}" in errors["freeze_lost_in_train_step"]["result"]
    graph = build(cases(golden)["base"], True).freeze("fc1").freeze("fc2")
    assert [n for n, t in graph.trained.items() if t] == ["head.weight", "head.bias"]


def test_rewriting_with_the_output_only_works(golden):
    """Axon crashes when a rewriter does not use its input."""
    errors = {e["name"]: e for e in golden["errors"]}
    assert errors["rewrite_nodes_output_only_adapter_crashes"]["raised"]
    graph = build(cases(golden)["base"], True).splice("fc1", lambda site: Adapter.wrap(site.output, bottleneck_size=2))
    assert "fc1.adapter.adapter.down" in graph


def sum_of_two():
    return ag.add([ag.dense(x(), 32, name="a"), ag.dense(x(), 64, name="b")], name="bad_sum")


# Axon's name of the error, ours, and what is said at the call or at the first run
ERRORS = {
    "rewrite_nodes_output_only_adapter_crashes": None,
    "rewrite_nodes_on_output_node_works": None,
    "shape_mismatch_add": (sum_of_two, "add 'bad_sum' does not fit what it reads"),
    "shape_mismatch_add_debug": (sum_of_two, r"reads     b   batch × 64"),
    "dense_zero_units": (lambda: ag.dense(x(), 0), "the size of dense is a positive whole number, not 0"),
    "dense_float_units": (lambda: ag.dense(x(), 2.5), "the size of dense is a positive whole number, not 2.5"),
    "unknown_option": (lambda: ag.dense(x(), 3, foo=1), "dense has no option 'foo'"),
    "bad_initializer": (lambda: ag.dense(x(), 3, weight_init="nope"), "unknown initializer 'nope'"),
    "orthogonal_initializer_atom": None,
    "dropout_rate_1": (lambda: ag.dropout(x(), rate=1.0), "a dropout rate is at least 0 and less than 1, not 1.0"),
    "dropout_rate_neg": (lambda: ag.dropout(x(), rate=-0.1), "a dropout rate is at least 0 and less than 1, not -0.1"),
    "layer_name_integer": (lambda: ag.dense(x(), 3, name=5), "a node's name is a string, not 5"),
    "layer_name_atom": (lambda: ag.dense(x(), 3, name=b"foo"), "a node's name is a string, not b'foo'"),
    "input_atom_name": (lambda: ag.input(None, shape=(1,)), "a node's name is a string, not None"),
    "input_bad_shape": (lambda: ag.input("x", shape=5), "the shape of input 'x' is a tuple of sizes, not 5"),
    "constant_bad": (lambda: ag.constant("x"), "a constant is a tensor or a number, not 'x'"),
    "layer_bad_input": (lambda: ag.layer(torch.abs, [1]), "layer reads nodes, not int: 1"),
    "dense_on_tensor": (lambda: ag.dense(torch.ones(2, 6), 3), "dense reads nodes, not Tensor"),
    "missing_input": (lambda: ag.Graph(ag.relu(x())).compile()(), "input 'input' is missing"),
    "ambiguous_input": (
        lambda: ag.Graph(ag.input("a", shape=(2,)) + ag.input("b", shape=(2,))).compile()(torch.ones(2)),
        "input 'b' is missing",
    ),
    "missing_param": None,
    "wrong_param_shape": (
        lambda: ag.Graph(ag.dense(x(), 3)).compile(state={"dense_0.weight": torch.ones(5, 3)}),
        "1 tensors of state do not fit the model",
    ),
    "declared_input_shape_not_enforced": (
        lambda: ag.Graph(ag.relu(x(6))).compile()(torch.ones(2, 7)),
        "input 'input' has another shape than declared",
    ),
    "extra_input_ignored": None,
    "dup_names_same_shape": (
        lambda: ag.Graph(ag.dense(ag.dense(x(), 8, name="d"), 8, name="d")),
        "two different nodes are called 'd'",
    ),
    "dup_names_diff_shape": (
        lambda: ag.Graph(ag.dense(ag.dense(x(), 4, name="d"), 3, name="d")),
        "two different nodes are called 'd'",
    ),
    "dup_names_different_ops": (
        lambda: ag.Graph(ag.layer_norm(ag.dense(x(), 4, name="d"), name="d")),
        "two different nodes are called 'd'",
    ),
    "dup_input_names": (lambda: ag.Graph(x() + x()), "two different nodes are called 'input'"),
    "unknown_activation": (lambda: ag.activation(x(), "nope"), "unknown activation 'nope'"),
    "unknown_activation_at_construction": (lambda: ag.dense(x(), 3, activation="nope"), "unknown activation 'nope'"),
    "adapter_missing_hidden": None,
    "adapter_bad_activation": (lambda: Adapter.build(8, activation="nope"), "unknown activation 'nope'"),
    "adapter_hidden_mismatch": (lambda: Adapter.wrap(x(), hidden_size=6), "body 'adapter' does not fit its host"),
    "adapter_unknown_opt_ignored": (lambda: Adapter.build(8, botleneck_size=2), "no option 'botleneck_size'"),
    "optional_none": None,
    "conv_rank2": None,
    "group_norm_indivisible": None,
    "reshape_bad": (lambda: ag.reshape(x(6), ("batch", 4)), "reshape does not fit what it reads"),
    "cond_not_bool": None,
    "embedding_out_of_range": None,
    "rewriter_returns_garbage": (
        lambda: ag.Graph(ag.dense(x(), 8, name="d")).splice("d", lambda site: 5),
        "the method at 'd' returned 5, not a node",
    ),
    "freeze_deprecated_works": None,
    "freeze_lost_in_train_step": None,
    "freeze_twice_overwrites": None,
    "pop_node_returns_list": None,
    "predict_plain_map_params": None,
    "block_dropout_in_train": None,
}


@pytest.mark.parametrize("name", [n for n, value in ERRORS.items() if value])
def test_axons_errors_are_found_earlier_and_say_more(golden, name):
    assert name in {e["name"] for e in golden["errors"]}
    call, message = ERRORS[name]
    with pytest.raises(ag.GraphError, match=message):
        call()


def test_every_error_of_axons_was_looked_at(golden):
    assert {e["name"] for e in golden["errors"]} == set(ERRORS)


def test_the_rest_of_axons_error_cases():
    ag.Graph(ag.dense(x(), 3, weight_init="orthogonal")).compile()
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        ag.Graph(ag.relu(x())).compile()(input=torch.ones(1, 8), other=torch.ones(1))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'hidden_size'"):
        Adapter.build()
    model = ag.Graph(ag.embedding(ag.input("ids", shape=("batch",), dtype=torch.int64), 7, 3)).compile()
    with pytest.raises(IndexError):
        model(torch.tensor([9]))
