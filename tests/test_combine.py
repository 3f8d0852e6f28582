"""Methods in sequence, added and fused, against the formulas in plain torch, declared and in a live model."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from models import CASES, loss, run, snapshot
from torch import nn

import adaptergraph as ag
from adaptergraph.saving.exchange import method_from_json, method_to_json

SIZE = 8
B = ag.Bottleneck
SITES = "bert.encoder.layer.*.output.dense"


def declared():
    x = ag.input("x", shape=("batch", "seq", SIZE))
    return ag.Graph(ag.relu(ag.dense(x, SIZE, name="fc"), name="out")).freeze()


def batch():
    return torch.randn(3, 5, SIZE, generator=torch.Generator().manual_seed(1))


def randomise(model, deviation=0.4):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in ag.graph_of(model).bodies:
            for parameter in model.get_submodule(name).parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation + 0.1)
    return model


# ---------------------------------------------------------------------- the formulas


def linear(state, name, x):
    bias = state.get(f"{name}.bias")
    return x @ state[f"{name}.weight"].T + (0 if bias is None else bias)


def delta(state, name, x):
    return linear(state, f"{name}.up", torch.relu(linear(state, f"{name}.down", x)))


def fusion(state, x, names, scaled=True, temperature=None):
    """Pfeiffer et al. 2021, section 3.3, one adapter after the other."""
    us = [delta(state, name, x) for name in names]
    query = linear(state, "query", x)
    scores = torch.stack([(query * linear(state, "key", u)).sum(-1) for u in us], -1)
    scores = scores / (x.shape[-1] ** 0.5 if scaled else 1.0)
    scores = scores / (state["temperature"] if temperature is None else temperature)
    shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return x + sum(shares[..., i : i + 1] * linear(state, "value", u) for i, u in enumerate(us))


FORMULAS = {
    "stack": (
        ag.Stack(B(2), B(3)),
        lambda s, x: (y := x + delta(s, "0", x)) + delta(s, "1", y),
    ),
    "sum": (ag.Sum(B(2), B(3)), lambda s, x: x + delta(s, "0", x) + delta(s, "1", x)),
    "weighted": (
        ag.Sum(B(2), B(3), weights=(0.5, -2)),
        lambda s, x: x + 0.5 * delta(s, "0", x) - 2 * delta(s, "1", x),
    ),
    "nested": (
        ag.Stack(ag.Sum(B(2), B(3)), B(4)),
        lambda s, x: (y := x + delta(s, "0.0", x) + delta(s, "0.1", x)) + delta(s, "1", y),
    ),
    "sum of stack": (
        ag.Sum(ag.Stack(B(2), B(3)), B(4)),
        lambda s, x: (y := x + delta(s, "0.0", x)) + delta(s, "0.1", y) + delta(s, "1", x),
    ),
    "fusion": (ag.Fusion({"a": B(2), "b": B(3), "c": B(2)}), lambda s, x: fusion(s, x, "abc")),
    "one adapter": (ag.Fusion({"a": B(2)}), lambda s, x: fusion(s, x, "a")),
    "fixed temperature": (
        ag.Fusion({"a": B(2), "b": B(3)}, temperature=0.5, scaled=False),
        lambda s, x: fusion(s, x, "ab", scaled=False, temperature=0.5),
    ),
    "adapterhub": (
        ag.Fusion.adapterhub({"a": B(2), "b": B(3)}),
        lambda s, x: fusion(s, x, "ab", scaled=False, temperature=1.0),
    ),
    "stack on fusion": (
        ag.Stack(ag.Fusion({"a": B(2), "b": B(2)}), B(3)),
        lambda s, x: (y := fusion({n[2:]: v for n, v in s.items() if n[0] == "0"}, x, "ab")) + delta(s, "1", y),
    ),
}


def compare(got, wanted, model, state):
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    got.square().mean().backward()
    wanted.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_declared_equals_the_formula(name):
    method, formula = FORMULAS[name]
    graph = declared().splice("fc", method).unfreeze("**").unfreeze("**", bodies=True)
    model = randomise(graph.compile()).eval()
    state = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    x = linear(state, "fc", batch())
    body = {n.removeprefix("fc.adapter."): v for n, v in state.items()}
    compare(model(batch()), torch.relu(formula(body, x)), model, state)


class Hand(nn.Module):
    """A linear layer with one formula after it."""

    def __init__(self, inner, formula, state):
        super().__init__()
        self.inner, self.formula, self.state = inner, formula, state

    def forward(self, x):
        return self.formula(self.state, self.inner(x))


@pytest.mark.parametrize("name", ["stack", "weighted", "fusion", "adapterhub"])
def test_in_a_live_model_equals_the_formula(traced, name):
    case, _, graph = traced("bert")
    method, formula = FORMULAS[name]
    model = randomise(graph.splice(SITES, method).unfreeze("**", bodies=True).compile(), 0.2)
    hand = case.model()
    state = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if ".adapter." in n}
    for site in ag.graph_of(model).splices[0].hosts:
        prefix = f"{site}.adapter."
        own = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        parent, _, child = site.rpartition(".")
        setattr(hand.get_submodule(parent), child, Hand(hand.get_submodule(site), formula, own))
    one, two = run(model, case), run(hand, case)
    torch.testing.assert_close(one.logits, two.logits, rtol=1e-6, atol=1e-6)
    loss(one).backward()
    loss(two).backward()
    for key, value in state.items():
        mine = model.get_parameter(key).grad
        assert mine.abs().max() > 0, key
        torch.testing.assert_close(mine, value.grad, rtol=1e-5, atol=1e-6)


def test_a_callable_is_a_branch_too():
    graph = declared().splice("fc", ag.Sum(B(2), lambda site: ag.tanh(site.output)))
    assert graph["fc.adapter.1.contribution"].inputs == ("fc.adapter.1.tanh_0", "fc")
    model = randomise(graph.compile())
    x = F.linear(batch(), model.fc.weight, model.fc.bias)
    state = {n.removeprefix("fc.adapter."): p for n, p in model.named_parameters()}
    torch.testing.assert_close(model(batch()), torch.relu(x + delta(state, "0", x) + torch.tanh(x) - x))


def test_a_parallel_branch_puts_the_combination_around_its_host():
    graph = declared().splice("fc", ag.Sum(B(2), B.parallel(3)))
    assert graph.bodies["fc.adapter"].where == "around"
    assert graph["fc.adapter.1.down"].inputs == ("x",)
    assert graph.unsplice() == declared()


# ---------------------------------------------------------------------- fusion


def test_the_nodes_and_keys_of_a_fusion():
    graph = declared().splice("fc", ag.Fusion({"sst2": B(2), "mnli": B(3)}, dropout=0.1), name="fusion")
    body = [n.removeprefix("fc.fusion.") for n in graph if n.startswith("fc.fusion.")]
    assert sorted(body) == sorted(
        [f"{b}.{n}" for b in ("sst2", "mnli") for n in ("down", "act", "up")]
        + ["stacked", "query", "key", "value", "temperature", "scores", "dropout", "weights", "fused", "residual"]
    )
    own = ["query.weight", "query.bias", "key.weight", "key.bias", "value.weight", "temperature"]
    assert {n for n, t in graph.trained.items() if t} == {f"fc.fusion.{n}" for n in own}
    assert graph["fc.fusion.weights"].shape == ("batch", "seq", 2)
    assert graph["fc.fusion.stacked"].shape == ("batch", "seq", 2, SIZE)
    assert graph.unsplice() == declared()
    assert ag.apply(declared(), graph.recipe()) == graph
    assert ag.Graph.from_json(graph.to_json()) == graph


def test_where_a_fusion_starts():
    model = declared().splice("fc", ag.Fusion({"a": B(2), "b": B(2)}), name="fusion").compile()
    assert torch.equal(model.fc.fusion.value.weight, torch.eye(SIZE))
    assert model.fc.fusion.temperature.tolist() == [1.0]
    # fresh adapters contribute nothing, so the fused model says what the host says
    assert torch.equal(model(batch()), declared().compile()(batch()))
    hub = declared().splice("fc", ag.Fusion.adapterhub({"a": B(2)}), name="fusion").compile()
    assert torch.equal(hub.fc.fusion.value.weight, torch.eye(SIZE) + 1e-6 * (1 - torch.eye(SIZE)))
    assert hub.fc.fusion.query.bias.abs().max() == 0
    assert 0.01 < hub.fc.fusion.key.weight.std() < 0.03


def test_dropout_of_the_scores_only_while_training():
    model = randomise(declared().splice("fc", ag.Fusion({"a": B(2), "b": B(3)}, dropout=0.5)).compile())
    x = batch()
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize("where", ["declared", "bert"])
def test_training_a_fusion_leaves_its_adapters_as_they_were(traced, where):
    graph = declared() if where == "declared" else traced("bert").graph
    at = "fc" if where == "declared" else SITES
    model = randomise(graph.splice(at, ag.Fusion({"a": B(2), "b": B(3)}), name="fusion").compile(), 0.1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(20):
        output = model(batch()) if where == "declared" else run(model, CASES["bert"])
        loss(output).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    for name, parameter in model.named_parameters():
        inside = name.partition(".fusion.")[2]
        assert torch.equal(parameter, before[name]) == (inside[:2] in ("", "a.", "b.")), name


def test_a_fused_adapter_can_be_trained_after_all():
    graph = declared().splice("fc", ag.Fusion({"a": B(2), "b": B(3)})).unfreeze("fc.adapter.a", bodies=True)
    assert {n.split(".")[2] for n, t in graph.trained.items() if t} >= {"a", "query"}
    assert not any(t for n, t in graph.trained.items() if n.startswith("fc.adapter.b."))


# ---------------------------------------------------------------------- reading adapters that were trained alone

NEW_PROCESS = """
import sys; sys.path[:0] = {path!r}
import torch, adaptergraph as ag
from models import CASES, run
case = CASES["bert"]
graph = ag.trace(case.model(), **case.args()[1])
adapters = {{"a": ag.Bottleneck(2), "b": ag.Bottleneck(3, activation="gelu")}}
fused = graph.unfreeze("classifier").splice({at!r}, ag.Fusion(adapters), name="fusion").compile()
for name in adapters:
    ag.load_branch(fused, {folder!r} + "/" + name, name)
before = {{n: p.clone() for n, p in fused.named_parameters()}}
data = {{**case.args()[1], "labels": torch.tensor([0, 1])}}
ag.fit(fused, data, steps=20, lr=0.01, progress=False)
for n, p in fused.named_parameters():
    alone = ".fusion.a." in n or ".fusion.b." in n
    own = ".fusion." in n and not alone or n.startswith("classifier")
    assert torch.equal(p, before[n]) != own, n
ag.save(fused, {folder!r} + "/fused")
"""


def test_two_adapters_trained_alone_are_fused_in_a_new_process(traced, tmp_path):
    case, model, graph = traced("bert")
    data = {**case.args()[1], "labels": torch.tensor([0, 1])}
    alone = {}
    for name, method in {"a": B(2), "b": B(3, activation="gelu")}.items():
        alone[name] = graph.unfreeze("classifier").splice(SITES, method).compile(seed=ord(name))
        ag.fit(alone[name], data, steps=5, lr=0.01, progress=False)
        ag.save(alone[name], tmp_path / name)
    code = NEW_PROCESS.format(path=sys.path, at=SITES, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    fused = ag.load(case.model(), tmp_path / "fused")
    for name, one in alone.items():
        for key, value in one.state_dict().items():
            if ".adapter." in key:
                assert torch.equal(fused.state_dict()[key.replace(".adapter.", f".fusion.{name}.")], value)
    assert model is graph.imported.host


def saved(tmp_path, method=None, at="fc", graph=None):
    model = (graph or declared()).splice(at, method or B(2)).compile()
    return ag.save(randomise(model), tmp_path / "alone")


@pytest.mark.parametrize(
    ("method", "branch"),
    [
        (ag.Stack(B(2), B(2)), "1"),
        (ag.Sum(B(2), B(2)), "0"),
        (ag.Fusion({"a": B(2), "b": B(2)}), "b"),
        (ag.Switch({"a": B(2), "b": B(2)}), "a"),
    ],
)
def test_a_branch_is_read_and_nothing_else(method, branch, tmp_path):
    folder = saved(tmp_path)
    model = declared().splice("fc", method, name="many").compile()
    before = snapshot(model)
    assert ag.load_branch(model, folder, branch) is model
    changed = [n for n, v in snapshot(model).items() if v != before[n]]
    assert changed
    assert all(n.startswith(f"fc.many.{branch}.") for n in changed)
    assert torch.equal(
        model.get_parameter(f"fc.many.{branch}.up.weight"), ag.load(declared(), folder).fc.adapter.up.weight
    )


def wider():
    x = ag.input("x", shape=("batch", 9))
    return ag.Graph(ag.relu(ag.dense(x, SIZE, name="fc"), name="out")).freeze()


def damage(folder):
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def without_tensor(folder):
    import hashlib

    import safetensors.torch

    state = safetensors.torch.load((folder / "adapter.safetensors").read_bytes())
    del state["fc.adapter.up.bias"]
    state["fc.adapter.down.weight"] = torch.zeros(2, 9)
    raw = safetensors.torch.save(state)
    (folder / "adapter.safetensors").write_bytes(raw)
    text = json.loads((folder / "adapter.json").read_text())
    text["checksum"] = "sha256:" + hashlib.sha256(raw).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(text))


@pytest.mark.parametrize(
    ("options", "fused", "branch", "change", "error", "message"),
    [
        ({}, {"a": B(2)}, "b", None, ag.GraphError, "the model has no branch 'b'\n.*\n  to fix      one of: a"),
        (
            {"method": B(2, activation="gelu")},
            {"a": B(2)},
            "a",
            None,
            ag.StateMismatch,
            r"does not fit the branch 'a' \(1 differences\)\n"
            r"    fc   branch Bottleneck\(2\)   file Bottleneck\(2, activation='gelu'\)\n.*\n"
            r"  to fix      make the branch as the adapter was made, at the same nodes: "
            r"'a' is to be ag\.Bottleneck\(2, activation='gelu'\)$",
        ),
        (
            {"method": B(4)},
            {"a": B(2)},
            "a",
            None,
            ag.StateMismatch,
            r"    fc   branch Bottleneck\(2\)   file Bottleneck\(4\)\n.*\n.*'a' is to be ag\.Bottleneck\(4\)$",
        ),
        (
            {"at": "out"},
            {"a": B(2)},
            "a",
            None,
            ag.StateMismatch,
            r"out   branch none +file .*\n    fc +branch .* file none",
        ),
        ({"graph": wider()}, {"a": B(2)}, "a", None, ag.StateMismatch, r"fc.weight   adapter \[8, 9\]   host \[8, 8\]"),
        ({}, {"a": B(2)}, "a", damage, ag.StateMismatch, "is damaged, or not the file that belongs to adapter.json"),
        (
            {},
            {"a": B(2)},
            "a",
            without_tensor,
            ag.StateMismatch,
            r"fc.fusion.a.up.bias   branch has it   file has none\n.*\n  to fix      save the adapter again$",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_a_branch_changes_nothing(
    options, fused, branch, change, error, message, tmp_path
):
    folder = saved(tmp_path, **options)
    if change is not None:
        change(folder)
    model = declared().splice("fc", ag.Fusion(fused), name="fusion").compile()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        ag.load_branch(model, folder, branch)
    assert snapshot(model) == before


def test_an_adapter_before_its_host_is_no_branch_after_it(tmp_path):
    folder = ag.save(declared().splice("fc", B(2), where="before").compile(), tmp_path)
    after = declared().splice("fc", ag.Fusion({"a": B(2)})).compile()
    with pytest.raises(ag.StateMismatch, match=r"    fc   branch Bottleneck\(2\)   file Bottleneck\(2\), before\n"):
        ag.load_branch(after, folder, "a")
    before = declared().splice("fc", ag.Fusion({"a": B(2)}), where="before").compile()
    assert ag.load_branch(before, folder, "a") is before
    # where both are, each finds its own, whatever was spliced first
    both = declared().splice("fc", B(2)).splice("fc", B(2), name="second", where="before")
    turned = declared().splice("fc", ag.Sum(B(2)), where="before").splice("fc", ag.Sum(B(2)), name="second")
    alone, model = randomise(both.compile()), turned.compile()
    ag.load_branch(model, ag.save(alone, tmp_path), "0")
    assert torch.equal(model.get_parameter("fc.adapter.0.up.weight"), alone.get_parameter("fc.second.up.weight"))
    assert torch.equal(model.get_parameter("fc.second.0.up.weight"), alone.get_parameter("fc.adapter.up.weight"))


def test_a_head_that_was_trained_along_may_have_another_shape(tmp_path):
    def with_head(size):
        x = ag.input("x", shape=("batch", SIZE))
        return ag.Graph(ag.dense(ag.dense(x, SIZE, name="fc"), size, name="head")).freeze().unfreeze("head")

    alone = randomise(with_head(3).splice("fc", B(2)).compile())
    model = with_head(5).splice("fc", ag.Fusion({"a": B(2)})).compile()
    head = model.head.weight.clone()
    ag.load_branch(model, ag.save(alone, tmp_path), "a")
    assert torch.equal(model.fc.adapter.a.up.weight, alone.fc.adapter.up.weight)
    assert torch.equal(model.head.weight, head)
    frozen = with_head(3).freeze().splice("fc", B(2)).compile()
    with pytest.raises(ag.StateMismatch, match=r"head.weight   adapter \[3, 8\]   host \[5, 8\]"):
        ag.load_branch(model, ag.save(frozen, tmp_path), "a")


def test_no_combination_no_branch(tmp_path):
    folder = saved(tmp_path)
    with pytest.raises(
        ag.GraphError, match=r"the model has no branch 'a'\n.*\n  to fix      combine methods: ag\.Fusion"
    ):
        ag.load_branch(declared().splice("fc", B(2)).compile(), folder, "a")


# ---------------------------------------------------------------------- methods are values

VALUES = [
    ag.Stack(B(2), B(3, activation="gelu")),
    ag.Sum(B(2), B(3), weights=[1, 2]),
    ag.Sum(B(2)),
    ag.Fusion({"a": B(2), "b": B(3)}, dropout=0.1, temperature=2.0, value_init="orthogonal"),
    ag.Fusion.adapterhub({"a": B(2)}),
    ag.Switch({"a": B(2), "method": ag.Stack(B(2), B.parallel(2))}),
]


@pytest.mark.parametrize("method", VALUES, ids=str)
def test_a_combination_prints_as_the_call_that_makes_it_and_goes_to_json_and_back(method):
    again = eval(repr(method), vars(ag))
    assert again == method
    assert hash(again) == hash(method)
    text = json.dumps(method_to_json(method))
    assert method_from_json(json.loads(text)) == method
    assert method != B(2)


def test_a_combination_is_frozen():
    method = ag.Switch({"a": B(2)})
    with pytest.raises(AttributeError):
        method.branches = {}
    with pytest.raises(TypeError):
        method.branches["b"] = B(2)
    assert dict(method.branches) == {"a": B(2)}
    assert ag.Switch({"a": B(2)}) != ag.Switch({"b": B(2)})


def test_code_in_a_combination_has_no_name_in_a_file():
    graph = declared().splice("fc", ag.Stack(B(2), lambda site: ag.tanh(site.output)))
    with pytest.raises(ag.GraphError, match=r"the method '.*lambda.*' is code of yours, which has no name in a file"):
        graph.to_json()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ag.Stack(), r"Stack takes one or more methods, not \(\)"),
        (lambda: ag.Sum(B(2), 3), "Sum takes methods or callables site -> Node, not 3"),
        (
            lambda: ag.Stack(B),
            r"Stack takes methods or callables .*\n.*\n  to fix      make one of it: Bottleneck\(…\)",
        ),
        (
            lambda: ag.Stack([B(2), B(4)]),
            r"Stack takes methods .*\n.*\n  to fix      one after the other, without brackets: "
            r"Stack\(Bottleneck\(2\), Bottleneck\(4\)\)",
        ),
        (
            lambda: ag.Sum({"a": B(2), "b": B(4)}),
            r"Sum takes methods .*\n.*\n  to fix      one after the other, without brackets: "
            r"Sum\(Bottleneck\(2\), Bottleneck\(4\)\)",
        ),
        (
            lambda: ag.Stack(nn.Linear(8, 8)),
            r"Stack takes methods .*\n.*\n  to fix      lambda site: ag.module\(site.output, nn.Linear\(…\)\)",
        ),
        (
            lambda: ag.Fusion({"a": nn.Linear}),
            r"Fusion takes methods .*\n.*\n  to fix      lambda site: ag.module\(site.output, nn.Linear\(…\)\)",
        ),
        (lambda: ag.Stack(B(2), weights=(1,)), "Stack has no option 'weights'"),
        (lambda: ag.Sum(B(2), weight=(1,)), "Sum has no option 'weight'\n.*\n  to fix      did you mean 'weights'"),
        (lambda: ag.Sum(B(2), B(2), weights=(1,)), r"one number for each of its 2 methods, not \(1,\)"),
        (lambda: ag.Sum(B(2), weights=(True,)), r"one number for each of its 1 methods, not \(True,\)"),
        (lambda: ag.Sum(B(2), weights=2.0), "one number for each of its 1 methods, not 2.0"),
        (lambda: ag.Fusion({}), r'Fusion takes methods by name, not {}\n.*\n  to fix      Fusion\({"a": ag.Bottleneck'),
        (lambda: ag.Fusion([B(2)]), r"Fusion takes methods by name, not \[Bottleneck\(2\)\]"),
        (lambda: ag.Fusion({"a": 1}), "Fusion takes methods or callables site -> Node, not 1"),
        (lambda: ag.Fusion({"a b": B(2)}), "a node cannot be called 'a b'"),
        (lambda: ag.Fusion({1: B(2)}), "a node's name is a string, not 1"),
        (lambda: ag.Fusion({"a.b": B(2)}), "a branch of Fusion cannot be called 'a.b': it is one word"),
        (
            lambda: ag.Fusion({"query": B(2)}),
            "a branch of Fusion cannot be called 'query': Fusion has a node of that name",
        ),
        (lambda: ag.Fusion({"forward": B(2)}), "'forward' is an attribute of every module"),
        (lambda: ag.Fusion({"a": B(2)}, dropout=1.0), "a dropout rate is at least 0 and less than 1, not 1.0"),
        (
            lambda: ag.Fusion({"a": B(2)}, droput=0.1),
            "Fusion has no option 'droput'\n.*\n  to fix      did you mean 'dropout'",
        ),
        (lambda: ag.Fusion({"a": B(2)}, temperature=0.0), "a temperature is a positive number or 'learned', not 0.0"),
        (lambda: ag.Fusion({"a": B(2)}, temperature="cold"), r"Fusion\(temperature='cold'\)"),
        (lambda: ag.Fusion({"a": B(2)}, value_init="eye"), "unknown value_init 'eye'\n.*\n  to fix      one of: zeros"),
        (lambda: ag.Fusion({"a": B(2)}, init=-1.0), "init is a deviation greater than zero or None, not -1.0"),
        (lambda: ag.Fusion({"a": B(2)}, scaled=1), r"Fusion\(scaled=1\)"),
        (lambda: ag.Switch({"switch": B(2)}), "a branch of Switch cannot be called 'switch'"),
        (
            lambda: ag.Stack(ag.Switch({"a": B(2)})),
            r"a Switch cannot be inside Stack: .*\n.*\n.*Switch\({\"a\": Stack\(…\)}\)",
        ),
        (lambda: ag.Switch({"a": ag.Switch({"b": B(2)})}), "a Switch cannot be inside Switch"),
        (lambda: ag.Switch({"a": B(2)}, B(2)), "Switch takes only its branches by position"),
    ],
)
def test_a_combination_that_cannot_be_right(make, message):
    with pytest.raises(ag.GraphError, match=message) as caught:
        make()
    assert caught.value.source is not None
    assert caught.value.source.file == __file__


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (ag.Stack(lambda s: ag.dense(s.output, 3)), ag.ShapeMismatch, "branch '0' of Stack does not fit its host"),
        (ag.Switch({"a": lambda s: ag.dense(s.output, 1)}), ag.ShapeMismatch, "branch +a +batch × seq × 1"),
        (ag.Sum(lambda s: s.output), ag.BadSplice, "branch '0' of Sum at 'fc' added no node"),
        (ag.Fusion({"a": lambda s: 3}), ag.BadSplice, "branch 'a' of Fusion at 'fc' returned 3, not a node"),
    ],
)
def test_a_branch_that_does_not_fit(method, error, message):
    with pytest.raises(error, match=message):
        declared().splice("fc", method)


def test_a_fusion_needs_to_know_its_size():
    x = ag.input("x", shape=("batch", "size"))
    with pytest.raises(ag.ShapeMismatch, match="Fusion needs a host whose last size is known; 'fc' gives batch × size"):
        ag.Graph(ag.relu(x, name="fc")).splice("fc", ag.Fusion({"a": lambda s: ag.tanh(s.output)}))
