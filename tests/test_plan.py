"""Plans: what a graph costs, counted by hand or by running it for real."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import adaptergraph as ag

BERT_BASE = 109_482_240
PLACES = {"attention": "encoder.layer.*.attention.output.dense", "ffn": "encoder.layer.*.output.dense"}


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig())
    ids = torch.zeros(2, 16, dtype=torch.long)
    return ag.trace(model, input_ids=ids, attention_mask=torch.ones_like(ids))


def adapted(size=64):
    x = ag.input("x", shape=("batch", 768))
    return ag.Graph(ag.dense(x, 768, name="fc")).freeze().splice("fc", ag.Bottleneck(size))


def kept_for_backward(model, *args, **kwargs):
    """Bytes that autograd keeps in a real forward, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda t: t):
        model(*args, **kwargs)
    return sum(s.nbytes() for s in kept.values())


# ---------------------------------------------------------------------- counts that are known


def test_one_adapter_of_64_at_768_has_99136_parameters():
    plan = adapted().plan(batch=8)
    assert plan.trained == 99_136 == 2 * 768 * 64 + 64 + 768
    assert plan.parameters == 99_136 + 768 * 768 + 768
    assert plan.trained_share == plan.trained / plan.parameters
    assert plan.optimizer == 2 * 99_136 * 4
    assert plan.gradients == 99_136 * 4


def test_flops_and_memory_by_hand():
    rows = {row.name: row for row in adapted().plan(batch=8).rows}
    assert rows["fc"].flops == 2 * 8 * 768 * 768
    assert rows["fc.adapter.down"].flops == rows["fc.adapter.up"].flops == 2 * 8 * 768 * 64
    assert rows["fc"].activations == 0, "nothing is kept before the first trained node"
    assert rows["fc.adapter.down"].activations == 8 * 768 * 4, "down keeps its input"
    assert rows["fc.adapter.act"].activations == 8 * 64 * 4, "relu keeps its output, which is the input of up"
    assert rows["fc.adapter.up"].activations == rows["fc.adapter.residual"].activations == 0


def test_24_adapters_are_2_2_percent_of_bert_base(bert):
    graph = bert.splice(bert.select(list(PLACES.values())).expect(24), ag.Bottleneck(64))
    plan = graph.plan()
    assert plan.parameters - plan.trained == BERT_BASE
    assert plan.trained == 2_379_264
    assert round(100 * plan.trained / BERT_BASE, 1) == 2.2


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_traced_model_costs_what_a_real_run_keeps(name, traced):
    case, _, graph = traced(name)
    graph = graph.splice(graph.select(list(case.sites)), ag.Bottleneck(4))
    model = graph.compile().train()
    args, kwargs = case.args()
    kept = kept_for_backward(model, *args, **kwargs)
    plan = graph.plan()
    assert plan.traced
    assert plan.activations == kept
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_declared_graph_keeps_what_a_real_run_keeps():
    x = ag.input("x", shape=("batch", "seq", 32))
    graph = ag.Graph(ag.blocks.transformer_layer(x, 4, 64, dropout=0.1))
    kept = kept_for_backward(graph.compile().train(), torch.randn(2, 5, 32))
    assert graph.plan(batch=2, seq=5).activations == kept


def test_experts_cost_what_a_real_run_keeps_and_what_their_products_are():
    """The fake kernel of a grouped matrix product knows bfloat16 only; the real one runs in float32."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        attn_implementation="eager",
    )
    model, ids = transformers.MixtralForCausalLM(config), torch.ones(2, 5, dtype=torch.long)
    graph = ag.trace(model, input_ids=ids, use_cache=False).unfreeze("**.experts")
    graph = graph.splice("**.o_proj", ag.Bottleneck(4))
    plan = graph.plan()
    assert plan.activations == kept_for_backward(graph.compile().train(), input_ids=ids, use_cache=False)
    rows = {row.name: row.flops for row in plan.rows}
    # each of 2 × 5 tokens goes to 2 experts: gate and up from 32 to 48, down from 48 to 32
    assert rows["model.layers.0.mlp.experts"] == rows["model.layers.1.mlp.experts"] == 2 * 20 * 3 * 32 * 48


def test_a_frozen_graph_keeps_nothing():
    plan = adapted().unsplice().plan(batch=8)
    assert (plan.trained, plan.activations, plan.optimizer, plan.gradients) == (0, 0, 0, 0)
    assert plan.flops == 2 * 8 * 768 * 768


def test_tied_parameters_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    assert ag.trace(Tied(), torch.zeros(1, 3, dtype=torch.long)).plan().parameters == 40


def test_a_body_that_runs_twice_counts_its_parameters_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.fc(x))

    graph = ag.trace(Twice(), torch.zeros(1, 8)).splice("fc", ag.Bottleneck(2))
    plan = graph.plan()
    assert plan.trained == 8 * 2 + 2 + 2 * 8 + 8
    assert plan.flops == 2 * (2 * 8 * 8 + 2 * 2 * 8 * 2)


def test_planning_changes_nothing(traced):
    case, model, graph = traced("bert")
    before = {n: (p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}
    graph.plan()
    assert {n: (p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()} == before
    assert not model.training
    args, kwargs = case.args()
    model(*args, **kwargs)


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({}, "missing   batch"),
        ({"batch": 2, "seq": 3}, "unknown   seq"),
        ({"batch": 0}, "no size   batch = 0"),
        ({"batch": True}, "no size   batch = True"),
    ],
)
def test_sizes_that_do_not_fit_are_listed(sizes, says):
    with pytest.raises(ag.GraphError, match=re.escape(says)) as caught:
        adapted().plan(**sizes)
    assert "needs the size of every named dimension: batch" in str(caught.value)


def test_a_size_without_a_name_cannot_be_given():
    graph = ag.Graph(ag.relu(ag.input("x", shape=(None, 4))))
    with pytest.raises(ag.GraphError, match="input 'x' has a size without a name"):
        graph.plan()


def test_an_imported_graph_has_the_sizes_of_its_trace(bert):
    assert bert.plan().sizes["input_ids"] == "2 × 16"
    with pytest.raises(ag.GraphError, match=r"planned at the sizes it was traced with: it has no size 'batch'"):
        bert.plan(batch=8)


def test_a_graph_from_a_file_has_no_model_to_run(bert):
    with pytest.raises(ag.GraphError, match="came from a file and has no model"):
        ag.Graph.from_json(bert.to_json()).plan()


def test_a_forward_that_looks_at_values_is_named():
    class Look(nn.Module):
        def forward(self, x):
            return x * x.sum().item() if self.training else x * 2

    graph = ag.trace(nn.Sequential(nn.Linear(4, 4), Look()), torch.ones(1, 4))
    with pytest.raises(ag.GraphError, match="'1' cannot be planned"):
        graph.plan()


@functools.lru_cache
def positions(length):
    return torch.arange(length)


def test_no_cache_is_left_with_tensors_that_have_no_values():
    class Cached(nn.Module):
        def forward(self, x):
            return x + positions(4)

    positions.cache_clear()
    ag.trace(nn.Sequential(nn.Linear(4, 4), Cached()), torch.ones(1, 4)).plan()
    assert positions.cache_info().currsize == 0


# ---------------------------------------------------------------------- as text


def test_the_table_fits_and_has_totals(bert):
    graph = bert.splice(list(PLACES.values()), ag.Bottleneck(64))
    lines = str(graph.plan()).splitlines()
    assert max(map(len, lines)) <= 100
    assert any("× 12" in line for line in lines)
    total = next(line for line in lines if line.strip().startswith("total"))
    assert "111,861,504" in total
    assert "2,379,264" in total
    assert lines[-3].startswith("at the sizes of the traced call: input_ids = 2 × 16")
    assert "2.13 %" in lines[-2]
    assert repr(adapted().plan(batch=8)) == "<Plan: 99,136 of 689,728 parameters trained, 11.0 MFLOPs>"


def test_a_plan_is_a_value():
    plan = adapted().plan(batch=8)
    assert plan == adapted().plan(batch=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.traced = True


# ---------------------------------------------------------------------- sizes and placements


def test_the_table_counts_what_splicing_adds(bert):
    table = ag.plan_table(bert, at=PLACES)
    found = {(row.at, row.size): row for row in table.rows}
    assert [row.at for row in table.rows[::5]] == ["attention", "ffn", "all"]
    assert table.host_parameters == BERT_BASE
    for size in (8, 32, 64, 128, 256):
        one = 2 * 768 * size + size + 768
        assert found["attention", size].parameters == found["ffn", size].parameters == 12 * one
        every = found["all", size]
        assert (every.sites, every.parameters, every.share) == (24, 24 * one, 24 * one / BERT_BASE)
    assert "2,379,264 (2.17 %)" in str(table)


def test_the_table_of_a_declared_graph_and_another_method():
    graph = adapted()
    table = ag.plan_table(graph, at={"fc": "fc"}, sizes=[4], method=lambda r: ag.Bottleneck(r, scale="learned"))
    assert [(row.sites, row.parameters) for row in table.rows] == [(1, 2 * 768 * 4 + 4 + 768 + 1)]
    assert table.host_parameters == 768 * 768 + 768


@pytest.mark.parametrize("options", [{"at": {}}, {"at": {"all": "fc"}}, {"at": "fc"}, {"at": {"x": "fc"}, "sizes": []}])
def test_a_table_needs_labels_and_sizes(options):
    with pytest.raises(ag.GraphError, match="a table of plans needs sizes, and placements by label"):
        ag.plan_table(adapted(), **options)


def test_a_placement_that_selects_nothing_is_an_error():
    with pytest.raises(ag.UnknownNode, match="no_such"):
        ag.plan_table(adapted(), at={"x": "no_such"})


def test_the_table_in_the_docs_is_what_the_call_gives(bert):
    text = (Path(__file__).parent.parent / "docs" / "choosing.md").read_text()
    assert str(ag.plan_table(bert, at=PLACES)) in text
    for selector in PLACES.values():
        assert f'"{selector}"' in text


def test_a_model_that_takes_a_list_of_tensors_costs_what_one_with_two_arguments_does():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x, y):
            return self.fc(x) + self.fc(y)

    class Several(Pair):
        def forward(self, xs):
            return super().forward(*xs)

    x, y = torch.randn(3, 8), torch.randn(3, 8)
    one, two = (
        ag.trace(model, *args).splice("fc", ag.Bottleneck(2)).plan()
        for model, args in ((Several(), [[x, y]]), (Pair(), [x, y]))
    )
    assert one.sizes == {"xs:0": "3 × 8", "xs:1": "3 × 8"}
    assert two.sizes == {"x": "3 × 8", "y": "3 × 8"}
    assert (one.flops, one.activations) == (two.flops, two.activations)
    # two calls of a linear layer and of its body, a multiply-add is two
    assert one.flops == 2 * 2 * 3 * (8 * 4 + 4 * 2 + 2 * 4)
