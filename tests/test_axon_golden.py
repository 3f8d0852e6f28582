"""All that real Axon gave, layer by layer: equal, or a deviation that is meant, with what torch means instead.

`pytest tests/test_axon_golden.py --axon-golden PATH` takes another file of the same format.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from axonfile import Reader, as_window, flat, tensor

import adaptergraph as ag

DEFAULT = Path(__file__).parent / "golden" / "axon.json"


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        found = cases(metafunc.config)
        metafunc.parametrize("case", found, ids=[c["name"] for c in found])


def cases(config):
    return json.loads(Path(config.getoption("--axon-golden") or DEFAULT).read_text())["cases"]


def ours(case):
    reader = Reader(case)
    model = reader.graph().compile(state=reader.state)
    model.train(case["mode"] == "train")
    with torch.no_grad():
        result = model(**reader.inputs())
    return model, [result] if isinstance(result, torch.Tensor) else leaves(result)


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in leaves(part)]


def same(case):
    expected = flat(case["output"])
    _, found = ours(case)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# ---------------------------------------------------------------------- the deviations, and what holds instead


def differs_and_is(torchs):
    def check(case):
        _, (found,) = ours(case)
        x = tensor(case["inputs"]["input"])
        if x.dim() > 2:
            x, found = x.movedim(-1, 1), found.movedim(-1, 1)
        torch.testing.assert_close(found, torchs(case, x))
        assert not torch.allclose(found, flat(case["output"])[0].movedim(-1, 1), atol=1e-3)

    return check


def adaptive(pool, torchs):
    """Torch's bins; the windows of Axon are those of an ordinary pool."""

    def check(case):
        differs_and_is(lambda _, x: torchs(x, (4, 3)))(case)
        x = ag.input("x", ("batch", 4, 6, 5))
        model = ag.Graph(pool(x, **as_window(x, {"output_size": (4, 3)}))).compile()
        found = model(tensor(case["inputs"]["input"]).movedim(-1, 1))
        torch.testing.assert_close(found.movedim(1, -1), flat(case["output"])[0], rtol=2e-5, atol=2e-5)

    return check


def batch_norm_train(case):
    """The prediction is equal; the statistics move by torch's rule: 0.1 of the batch, unbiased variance."""
    model, (found,) = ours(case)
    torch.testing.assert_close(found, tensor(case["output"]["prediction"]), rtol=2e-5, atol=2e-5)
    x, old = tensor(case["inputs"]["input"]), case["params"]["batch_norm_0"]
    state = model.state_dict()
    torch.testing.assert_close(state["batch_norm_0.running_mean"], 0.9 * tensor(old["mean"]) + 0.1 * x.mean(0))
    torch.testing.assert_close(state["batch_norm_0.running_var"], 0.9 * tensor(old["var"]) + 0.1 * x.var(0))
    axons = case["output"]["state"]["batch_norm_0"]
    torch.testing.assert_close(tensor(axons["mean"]), 0.1 * tensor(old["mean"]) + 0.9 * x.mean(0), rtol=1e-4, atol=1e-4)


def mask(case):
    """True where a token is, which is what `attention` and torch's attention take."""
    _, (found,) = ours(case)
    assert torch.equal(found, ~flat(case["output"])[0].bool())


def blur_pool(case):
    """There is no such layer; a depthwise convolution with the binomial kernel says it."""
    with pytest.raises(AttributeError, match="blur_pool"):
        Reader(case)
    x = tensor(case["inputs"]["input"])
    node = ag.depthwise_conv(ag.input("x", x.shape), kernel_size=3, padding="same", bias=False, name="blur")
    kernel = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))
    model = ag.Graph(node).freeze().compile(state={"blur.weight": kernel.expand(4, 1, 3, 3)})
    torch.testing.assert_close(model(x), flat(case["output"])[0])


def left_out(word):
    def check(case):
        with pytest.raises(ag.GraphError, match=word):
            Reader(case)

    return check


def refused(error, text):
    def check(case):
        with pytest.raises(error, match=text):
            Reader(case).graph()

    return check


def wrong_hidden(case):
    with pytest.raises(ag.ShapeMismatch, match="body 'adapter' does not fit its host"):
        ag.Adapter.wrap(ag.input("input", (None, 8)), hidden_size=6)


def other_bottleneck(case):
    once = ag.Adapter.wrap(ag.input("input", ("batch", 8)), bottleneck_size=4)
    with pytest.raises(ag.DuplicateName, match=r"two different nodes are called 'adapter\.down'"):
        ag.Graph(ag.Adapter.wrap(once, bottleneck_size=2))


DEVIATIONS = {
    "act_hard_silu": differs_and_is(lambda _, x: F.hardswish(x)),
    "adaptive_avg_pool_4x3": adaptive(ag.avg_pool, F.adaptive_avg_pool2d),
    "adaptive_max_pool_4x3": adaptive(ag.max_pool, F.adaptive_max_pool2d),
    "batch_norm_train": batch_norm_train,
    "mask": mask,
    "resize_lanczos3_down": left_out("no method 'lanczos3'"),
    "resize_lanczos3_up": left_out("no method 'lanczos3'"),
    "resize_lanczos5_down": left_out("no method 'lanczos5'"),
    "resize_lanczos5_up": left_out("no method 'lanczos5'"),
    "blur_pool_channels_first": blur_pool,
    "adapter_same_default_name_twice_same_shapes": refused(ag.DuplicateName, "two different nodes are called"),
    "adapter_same_default_name_twice_different_bottleneck": other_bottleneck,
    "adapter_wrong_hidden_size": wrong_hidden,
}


def test_a_case_of_axon(case):
    DEVIATIONS.get(case["name"], same)(case)


def test_every_case_is_equal_or_a_deviation(pytestconfig):
    names = [c["name"] for c in cases(pytestconfig)]
    deviations = [n for n in names if n in DEVIATIONS]
    assert len(names) == len(set(names))
    if pytestconfig.getoption("--axon-golden") is None:
        assert (len(names), len(names) - len(deviations), len(deviations)) == (115, 102, 13)


def test_every_deviation_is_in_the_docs():
    text = (Path(__file__).parent.parent / "docs" / "axon.md").read_text()
    assert [n for n in DEVIATIONS if f"`{n}`" not in text] == []


# the public functions of Axon 0.8.1
PUBLIC = """
input constant container optional or_else block layer param parameter nx stack_columns namespace
dense bilinear embedding bias conv conv_transpose depthwise_conv separable_conv2d separable_conv3d
activation celu elu exp gelu hard_sigmoid hard_silu hard_tanh leaky_relu linear log_sumexp log_sigmoid log_softmax mish
relu relu6 sigmoid silu selu softmax softplus softsign tanh dropout spatial_dropout feature_alpha_dropout alpha_dropout
max_pool avg_pool lp_pool adaptive_avg_pool adaptive_max_pool adaptive_lp_pool global_avg_pool global_max_pool
global_lp_pool blur_pool batch_norm instance_norm layer_norm group_norm rms_norm lstm gru conv_lstm mask bidirectional
add subtract multiply concatenate cond split flatten reshape transpose pad resize map_nodes reduce_nodes rewrite_nodes
pop_node get_inputs get_output_shape get_op_counts get_parameters get_options set_parameters set_options properties
attach_hook trace_init trace_forward trace_backward build init compile predict freeze unfreeze as_table as_graph
"""


def test_every_public_function_of_axon_is_in_the_docs():
    text = (Path(__file__).parent.parent / "docs" / "axon.md").read_text()
    assert [n for n in PUBLIC.split() if not re.search(rf"(?<!\w){n}(?!\w)", text)] == []


def test_what_the_docs_call_by_axons_name_is_there():
    elsewhere = """stack_columns separable_conv3d adaptive_lp_pool global_lp_pool blur_pool conv_lstm parameter
    get_parameters get_options set_parameters set_options attach_hook trace_init trace_forward trace_backward
    build init predict as_table as_graph"""
    graph = set(dir(ag.Graph))
    missing = {n for n in PUBLIC.split() if not hasattr(ag, n) and n not in graph}
    assert missing == set(elsewhere.split())
