"""Splices at different places commute: the graph and what it computes are the same, whichever was spliced first."""

import pytest
import torch
from byhand import randomise

import adaptergraph as ag

METHOD = ag.Bottleneck(4)


def group():
    """Two layers that are a group, between two others."""
    x = ag.input("x", shape=("batch", 8))
    h = ag.dense(ag.dense(x, 8, name="first"), 8, name="block.up")
    return ag.Graph(ag.dense(ag.dense(h, 8, name="block.down"), 8, name="last")).freeze()


@pytest.mark.parametrize("order", ["node first", "group first"])
@pytest.mark.parametrize("node", ["before", "around", "after"])
@pytest.mark.parametrize("around", ["before", "around", "after"])
def test_a_body_at_a_group_and_one_at_a_node_inside_it(node, around, order):
    """The group is given what it was given, whatever is inside it."""
    x, graph = torch.randn(3, 8), group()
    methods = {"before": METHOD, "after": METHOD, "around": ag.Bottleneck(4, parallel=True)}
    splices = [("block.up", "inner", node), ("block", "outer", around)]
    for at, name, where in splices if order == "node first" else splices[::-1]:
        graph = graph.splice(at, methods[where], name=name, where=where)
    model = randomise(graph.compile())
    inner, outer = model.get_submodule("block.up.inner"), model.get_submodule("block.outer")

    def body(body, h):
        return body.up(torch.relu(body.down(h)))

    given = h = model.first(x)
    if around == "before":
        given = h = h + body(outer, h)
    value = h + body(inner, h) if node == "before" else h
    up = model.block.up(value)
    if node != "before":
        up = up + body(inner, up if node == "after" else value)
    down = model.block.down(up)
    if around != "before":
        down = down + body(outer, down if around == "after" else given)
    torch.testing.assert_close(model(x), model.last(down))
