"""One body per task: which one runs, which one is trained, and that nothing is left behind."""

import copy
import pickle
import threading

import pytest
import torch
from models import loss, run, snapshot, tensors
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import adaptergraph as ag

SIZE = 8
B = ag.Bottleneck
METHODS = {"a": B(2), "b": B(3), "c": ag.Stack(B(2), B.parallel(2))}
SITES = "bert.encoder.layer.*.{attention.output,output}.dense"


def declared(methods=METHODS):
    x = ag.input("x", shape=("batch", SIZE))
    graph = ag.Graph(ag.relu(ag.dense(x, SIZE, name="fc"), name="out")).freeze()
    return graph.splice("fc", ag.Switch(methods))


def randomise(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in ag.graph_of(model).bodies:
            for parameter in model.get_submodule(name).parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def batch(rows=4):
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    return randomise(declared().compile())


@pytest.fixture
def bert(traced):
    """A live model with a switch, what it is called with, and its graph."""
    case, _, graph = traced("bert")
    graph = graph.splice(SITES, ag.Switch({"a": B(2), "b": B(3)}))
    return randomise(graph.compile()), case, graph


def alone(model, task):
    """The same values in a model that has this task's method only, as a plain body."""
    x = ag.input("x", shape=("batch", SIZE))
    graph = ag.Graph(ag.relu(ag.dense(x, SIZE, name="fc"), name="out")).freeze().splice("fc", METHODS[task])
    state = {
        k.replace(f".{task}.", ".", 1): v for k, v in model.state_dict().items() if f".{task}." in k or "er." not in k
    }
    return graph.compile(state=state).eval()


# ---------------------------------------------------------------------- what runs


@pytest.mark.parametrize("task", METHODS)
def test_each_task_runs_its_own_method(model, task):
    wanted = alone(model, task)(batch())
    assert torch.equal(model(batch(), task=task), wanted)
    with model.task(task):
        assert torch.equal(model(batch()), wanted)
    with ag.task(model, task):
        assert torch.equal(model(batch()), wanted)
    assert model.set_task(task) is model
    assert torch.equal(model(batch()), wanted)


def test_keys_and_nodes():
    graph = declared({"a": B(2), "b": B(3)})
    assert list(graph) == [
        *("x", "fc"),
        *(f"fc.adapter.{t}.{n}" for t in "ab" for n in ("down", "act", "up", "residual")),
        *("fc.adapter.switch", "out"),
    ]
    node = graph["fc.adapter.switch"]
    assert node.inputs == ("fc", "fc.adapter.a.residual", "fc.adapter.b.residual")
    assert node.options["tasks"] == ("a", "b")
    keys = [k for k in graph.compile().state_dict() if "adapter" in k]
    assert keys == [f"fc.adapter.{t}.{n}.{p}" for t in "ab" for n in ("down", "up") for p in ("weight", "bias")]
    assert set(keys) == graph.body_params
    assert ag.Graph.from_json(graph.to_json()) == graph
    assert "self.fc.adapter(fc)" in graph.compile().code


def test_call_before_thread_before_default(model):
    wanted = {t: model(batch(), task=t) for t in METHODS}
    model.set_task("a")
    with model.task("b"):
        assert torch.equal(model(batch(), task="c"), wanted["c"])
        assert torch.equal(model(batch()), wanted["b"])
        with model.task("c"):
            assert torch.equal(model(batch()), wanted["c"])
        assert torch.equal(model(batch()), wanted["b"])
    assert torch.equal(model(batch()), wanted["a"])
    model.set_task(None)
    with pytest.raises(ag.GraphError, match="no task is chosen"):
        model(batch())


WAYS_TO_REPLACE = {
    "setattr": lambda switch, name, new: setattr(switch, name, new),
    "add_module": lambda switch, name, new: switch.add_module(name, new),
    "register_module": lambda switch, name, new: switch.register_module(name, new),
    "set_submodule": lambda switch, name, new: switch.set_submodule(name, new),
}


class First(nn.Module):
    """A module of the first of its arguments, as a branch: it is given what any branch of its switch reads."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, *more):
        return self.module(x)


@pytest.mark.parametrize("way", WAYS_TO_REPLACE)
def test_a_branch_in_the_place_of_another_one_runs_wherever_that_was_chosen(model, way):
    switch, new = model.fc.adapter, nn.Linear(SIZE, SIZE)
    replace = lambda name, module: WAYS_TO_REPLACE[way](switch, name, First(module))  # noqa: E731
    h = nn.functional.linear(batch(), model.fc.weight, model.fc.bias)
    others = {t: model(batch(), task=t) for t in "ac"}
    model.set_task("b")
    model(batch())
    replace("b", new)
    wanted = torch.relu(new(h))
    assert torch.equal(model(batch()), wanted)
    assert torch.equal(copy.deepcopy(model)(batch()), wanted)
    assert torch.equal(model(batch(), task="b"), wanted)
    assert torch.equal(model(batch(), task=["b"] * 4), wanted)
    assert all(torch.equal(model(batch(), task=t), others[t]) for t in others)
    with model.task("b"), model.task("a"):
        replace("b", nn.Identity())
        assert torch.equal(model(batch()), others["a"])
        with model.task("b"):
            replace("b", nn.Tanh())
            assert torch.equal(model(batch()), torch.relu(torch.tanh(h)))
    with model.task("b"):
        replace("b", new)
        assert torch.equal(model(batch()), wanted)
    assert torch.equal(model(batch()), wanted)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch()), wanted)
    replace("b", nn.Tanh())
    torch.testing.assert_close(compiled(batch()), torch.relu(torch.tanh(h)))


def test_parameters_that_the_graph_does_not_know_keep_what_they_are(model):
    model.fc.adapter.b = nn.Linear(SIZE, SIZE)
    model.fc.adapter.b.bias.requires_grad_(False)
    for task in ("a", "b", None):
        model.set_task(task)
        assert [p.requires_grad for p in model.fc.adapter.b.parameters()] == [True, False]
        assert all(p.requires_grad == (task != "b") for p in model.fc.adapter.a.parameters())


def test_a_branch_that_is_deleted_is_no_default_any_more(model):
    model.set_task("b")
    del model.fc.adapter.b
    with pytest.raises(ag.GraphError, match=r"^no task is chosen at 'fc\.adapter'\n    tasks   a, c\n"):
        model(batch())


@pytest.mark.parametrize("tasks", [["a", "b", "c", "a"], ("b", "b", "a", "b"), ["c"] * 4])
def test_rows_of_different_tasks(model, tasks):
    mixed = model(batch(), task=tasks)
    for i, task in enumerate(tasks):
        torch.testing.assert_close(mixed[i], model(batch(), task=task)[i], rtol=1e-6, atol=1e-6)
    with model.task(tasks):
        assert torch.equal(model(batch()), mixed)


def test_rows_are_bit_equal_to_each_branch_on_its_rows(model):
    switch, x, given = model.fc.adapter, torch.randn(5, SIZE), torch.randn(5, SIZE)
    with model.task(["b", "a", "c", "b", "a"]):
        mixed = switch(x, given)
    for task, rows in {"a": [1, 4], "b": [0, 3], "c": [2]}.items():
        assert torch.equal(mixed[rows], switch.get_submodule(task)(x[rows], given[rows]))


def test_rows_get_the_gradients_of_separate_calls(model):
    tasks = ["a", "b", "c", "a"]
    model(batch(), task=tasks).square().sum().backward()
    mixed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for task in METHODS:
        rows = [i for i, t in enumerate(tasks) if t == task]
        model(batch(), task=task)[rows].square().sum().backward()
    for name, grad in mixed.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-5, atol=1e-6)


def test_rows_in_a_live_model(bert):
    model, case, _ = bert
    mixed = run(model, case, task=["b", "a"]).logits
    torch.testing.assert_close(mixed[0], run(model, case, task="b").logits[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[1], run(model, case, task="a").logits[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mixed[0], run(model, case, task="a").logits[0])


def test_only_the_chosen_branch_runs(bert):
    model, case, graph = bert
    counts = {}
    for name in graph.bodies:
        for task in "ab":
            path = f"{name}.{task}"
            model.get_submodule(path).register_forward_pre_hook(
                lambda m, args, path=path: counts.update({path: counts.get(path, 0) + 1})
            )
    run(model, case, task="b")
    assert counts == {f"{name}.b": 1 for name in graph.bodies}
    counts.clear()
    run(model, case, task=["a", "b"])
    assert counts == {f"{name}.{t}": 1 for name in graph.bodies for t in "ab"}


def test_a_live_model_with_one_task_is_the_model_with_its_adapter(bert, traced):
    model, case, _ = bert
    plain = traced("bert").graph.splice(SITES, B(3)).compile()
    state = {k.replace(".adapter.b.", ".adapter."): v for k, v in model.state_dict().items() if ".adapter.a." not in k}
    plain.load_state_dict(state)
    for one, other in zip(tensors(run(model, case, task="b")), tensors(run(plain, case)), strict=True):
        assert torch.equal(one, other)
    with model.task("b"):
        loss(run(model, case)).backward()
    loss(run(plain, case)).backward()
    for name, parameter in plain.named_parameters():
        if ".adapter." in name:
            mine = model.get_parameter(name.replace(".adapter.", ".adapter.b."))
            assert torch.equal(mine.grad, parameter.grad)


# ---------------------------------------------------------------------- nothing is left behind


@pytest.mark.parametrize("how", ["call", "with"])
def test_an_exception_leaves_nothing_behind(model, how):
    model.set_task("a")
    wanted = model(batch())

    def call():
        if how == "call":
            model(torch.ones(2, 3), task="b")
        with model.task("b"):
            model(torch.ones(2, 3))

    with pytest.raises(ag.ShapeMismatch, match="input 'x' has another shape than declared"):
        call()
    assert torch.equal(model(batch()), wanted)


def test_two_models_in_one_thread(model):
    other = randomise(declared().compile())
    wanted = {t: model(batch(), task=t) for t in METHODS}
    with model.task("a"), other.task("b"):
        assert torch.equal(model(batch()), wanted["a"])
        assert torch.equal(other(batch()), wanted["b"])
        with model.task("c"):
            assert torch.equal(other(batch()), wanted["b"])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_has_a_state_of_its_own(model, again):
    wanted = {t: model(batch(), task=t) for t in METHODS}
    model.set_task("a")
    with model.task("b"):
        other = again(model)
    assert torch.equal(other(batch()), wanted["a"])
    other.set_task("c")
    assert torch.equal(other(batch()), wanted["c"])
    assert torch.equal(model(batch()), wanted["a"])
    with other.task("b"):
        assert torch.equal(model(batch()), wanted["a"])
    assert model.fc.adapter.a.down.weight.requires_grad
    assert other.fc.adapter.adaptergraph_default is other.fc.adapter.c


def test_a_copy_of_a_live_model(bert):
    model, case, _ = bert
    model.set_task("a")
    other = copy.deepcopy(model)
    other.set_task("b")
    same = [torch.equal(run(m, case).logits, run(model, case, task=t).logits) for m, t in ((model, "a"), (other, "b"))]
    assert same == [True, True]
    assert type(other).__name__ == "BertForSequenceClassification"


def test_eight_threads_with_different_tasks(bert):
    model, case, _ = bert
    # made once: making them sets the seed of the whole process
    _, given = case.args()
    with torch.no_grad():
        wanted = {t: model(**given, task=t).logits for t in ("a", "b")}
        wrong, done = [], []

        def work(number):
            torch.set_num_threads(1)
            for i in range(50):
                task = "ab"[(number + i) % 2]
                with torch.no_grad():
                    if i % 3:
                        with model.task(task):
                            got = model(**given).logits
                    else:
                        got = model(**given, task=task).logits
                done.append(task)
                if not torch.equal(got, wanted[task]):
                    wrong.append((number, i))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(done), wrong) == (400, [])


class Swallowing(nn.Module):
    """Takes whatever keyword arguments there are."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, **kwargs):
        return self.fc(x) * kwargs.get("scale", 1.0)


class HandsOn(Swallowing):
    """Hands them on to a module that has tasks of its own."""

    class Own(nn.Module):
        def forward(self, x, task="a"):
            return -x if task == "b" else x

    def __init__(self):
        super().__init__()
        self.own = self.Own()

    def forward(self, x, **kwargs):
        return self.own(self.fc(x), **kwargs)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_task_where_there_are_none_is_not_swallowed(inplace):
    base, x = Swallowing(), torch.randn(2, 8)
    expected = base(x, scale=3.0)
    model = ag.trace(base, x).splice("fc", B(2)).compile(inplace=inplace)
    cls = type(model)
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ag.GraphError) as error:
            again(x, task="sst2")
        assert str(error.value).splitlines()[0] == "this Swallowing has no Switch, so there is no task to choose"
        assert "ag.Switch(" in error.value.hint
        # other keyword arguments are the host's own
        assert torch.equal(again(x, scale=3.0), expected)
    ag.detach(model)
    assert type(model) is cls
    assert torch.equal(model(x, task="sst2", scale=3.0), expected)


def test_a_task_of_the_hosts_own_goes_where_it_went():
    base, x = HandsOn(), torch.randn(2, 8)
    model = ag.trace(base, x).splice("fc", B(2)).compile()
    assert torch.equal(model(x, task="b"), base(x, task="b"))
    assert not torch.equal(model(x), model(x, task="b"))


def test_a_real_model_without_tasks(traced):
    case, _, graph = traced("bert")
    model = graph.splice(SITES, B(2)).compile()
    with pytest.raises(ag.GraphError, match="has no Switch, so there is no task to choose"):
        model(**case.args()[1], task="sst2")


def test_detach_gives_the_root_its_class_back(traced):
    case, shared, graph = traced("bert")
    model = copy.deepcopy(shared)
    before = snapshot(model)
    cls = type(model)
    ag.trace(model, **case.args()[1]).splice(SITES, ag.Switch({"a": B(2)})).compile(inplace=True)
    assert hasattr(model, "set_task")
    ag.detach(model)
    assert type(model) is cls
    assert not hasattr(model, "set_task")
    assert snapshot(model) == before
    assert graph.imported.host is shared


# ---------------------------------------------------------------------- what is trained


def test_set_task_trains_one_branch():
    model = declared().freeze("fc.adapter.b.down.bias", bodies=True).compile()
    assert all(
        p.requires_grad == (n != "fc.adapter.b.down.bias" and "adapter" in n) for n, p in model.named_parameters()
    )
    for task in METHODS:
        model.set_task(task)
        own = {n for n, p in model.named_parameters() if p.requires_grad}
        names = {n for n in model.state_dict() if n.startswith(f"fc.adapter.{task}.")}
        assert own == names - {"fc.adapter.b.down.bias"}
    model.set_task(None)
    assert sum(p.requires_grad for p in model.parameters()) == len(ag.graph_of(model).body_params) - 1


@pytest.mark.parametrize("to_none", [True, False])
def test_no_step_moves_the_other_tasks(model, to_none):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for task in ("a", "b", "c", "a"):
        model.set_task(task)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for _ in range(3):
            model(batch()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) != name.startswith(f"fc.adapter.{task}."), (task, name)
            assert parameter.grad is None or name.startswith(f"fc.adapter.{task}.")


def test_the_with_block_does_not_change_what_is_trained(model):
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with model.task("a"):
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_fit_trains_one_task(bert):
    model, case, _ = bert
    model.set_task("a")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ag.fit(
        model, {**case.args()[1], "labels": torch.tensor([0, 1])}, steps=5, lr=0.01, weight_decay=0.1, progress=False
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (".adapter.a." in name), name


# ---------------------------------------------------------------------- one task only


def test_compile_one_task(model):
    state = {k: v for k, v in model.state_dict().items() if ".adapter." not in k or ".b." in k}
    one = declared().compile(task="b", state=state).eval()
    assert list(one.state_dict()) == list(state)
    assert torch.equal(one(batch()), model(batch(), task="b"))
    assert torch.equal(one(batch(), task="b"), model(batch(), task="b"))
    assert ag.graph_of(one).splices[0].method == ag.Switch({"b": B(3)})
    with pytest.raises(ag.GraphError, match=r"there is no task 'a' at 'fc\.adapter'"):
        one(batch(), task="a")


def test_compile_one_task_of_a_live_model(bert, tmp_path):
    model, case, graph = bert
    state = {k: v for k, v in model.state_dict().items() if ".adapter.b." in k}
    one = graph.compile(task="b", state=state)
    assert not any(".adapter.a." in k for k in one.state_dict())
    assert torch.equal(run(one, case).logits, run(model, case, task="b").logits)
    ag.save(one, tmp_path)
    again = ag.load(case.model(), tmp_path)
    assert torch.equal(run(again, case).logits, run(one, case).logits)


def test_save_and_load(bert, tmp_path):
    model, case, _ = bert
    again = ag.load(case.model(), ag.save(model, tmp_path))
    for task in ("a", "b", ["b", "a"]):
        assert torch.equal(run(again, case, task=task).logits, run(model, case, task=task).logits)


# ---------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("how", ["with", "set", "rows"])
def test_changing_the_task_does_not_compile_again(how):
    tasks = [f"t{i}" for i in range(10)]
    model = randomise(declared({t: B(2) for t in tasks}).compile())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i, task in enumerate(tasks):
        rows = [tasks[(i + j) % 10] for j in range(4)]
        wanted = model(batch(), task=rows if how == "rows" else task)
        if how == "set":
            ag.set_task(compiled, task)
            got = compiled(batch())
            got.sum().backward()
            moved = {n for n, p in model.named_parameters() if p.grad is not None}
            assert moved == {n for n in model.state_dict() if n.startswith(f"fc.adapter.{task}.")}
        else:
            with ag.task(compiled, rows if how == "rows" else task):
                got = compiled(batch())
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("said", ["in a block", "in the call"])
def test_what_compiles_again(said):
    """What the docs say: shapes of branches, not rows; and each choice that is given by the call."""
    model = randomise(declared({"a": B(2), "b": B(3), "c": B(2)}).compile())

    def compilations(choices):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for choice in choices * 2:
            if said == "in the call":
                got = compiled(batch(), task=choice)
            else:
                with ag.task(model, choice):
                    got = compiled(batch())
            torch.testing.assert_close(got, model(batch(), task=choice), rtol=1e-6, atol=1e-6)
        return counter.frame_count

    rows = [list(names) for names in ("abca", "bbbb", "ccab", "aaaa")]
    assert compilations(["a", "c"]) == (1 if said == "in a block" else 2)
    assert compilations(["a", "b", "c"]) == (2 if said == "in a block" else 3)
    assert compilations(rows) == (1 if said == "in a block" else 4)


def test_a_live_model_compiles_once_for_all_tasks(traced):
    tasks = [f"t{i}" for i in range(10)]
    case, _, graph = traced("bert")
    model = randomise(graph.splice(SITES, ag.Switch({t: B(2) for t in tasks})).compile())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for task in tasks:
        with ag.task(compiled, task):
            got = run(compiled, case).logits
        torch.testing.assert_close(got, run(model, case, task=task).logits, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m(batch()),
            "no task is chosen at 'fc.adapter'\n    tasks   a, b, c\n"
            r'  to fix      model\(…, task="…"\), or with ag.task\(model, "…"\), or ag.set_task\(model, "…"\)',
        ),
        (
            lambda m: m(batch(), task="d"),
            "there is no task 'd' at 'fc.adapter'\n    tasks   a, b, c\n.*\n  to fix      one of: a, b, c",
        ),
        (lambda m: m.task("d"), "there is no task 'd' at 'fc.adapter'\n    tasks   a, b, c"),
        (lambda m: m.set_task("d"), "there is no task 'd' at 'fc.adapter'\n    tasks   a, b, c"),
        (lambda m: m.set_task(["a", "b"]), r"set_task takes the name of one task, not \['a', 'b'\]"),
        (
            lambda m: m(batch(), task=["a", "b"]),
            "2 tasks were given for 4 rows at 'fc.adapter'\n"
            "    rows   the first dimension   of the value at the host: 4 × 8\n(.*\n)*"
            "  to fix      give one task, or one for each row of the "
            r"batch; generate\(num_beams=n\) makes n rows of each: repeat each task n times",
        ),
        (lambda m: m(batch(), task=["a", "b", "a", "d"]), "there is no task 'd'"),
        (lambda m: m(batch(), task=3), "a task is a name, or a list with one name for each row, not 3"),
        (lambda m: m(batch(), task=[]), r"a task is a name, or a list with one name for each row, not \[\]"),
        (lambda m: m(batch(), task=["a", 1, "a", "a"]), r"a list with one name for each row, not \['a', 1, 'a', 'a'\]"),
        (lambda m: ag.graph_of(m).compile(task="d"), "there is no task 'd' at 'fc.adapter'\n    tasks   a, b, c"),
        (
            lambda m: ag.graph_of(m).unsplice().compile(task="a"),
            "the graph has no Switch, so there is no task to compile",
        ),
        (
            lambda m: ag.task(ag.graph_of(m).unsplice().compile(), "a"),
            r'this CompiledGraph has no Switch.*\n.*\n  to fix      graph.splice\(at, ag.Switch\({"a": …, "b": …}\)\)',
        ),
        (lambda m: ag.set_task(nn.Linear(1, 1), "a"), "this Linear has no Switch"),
        (
            lambda m: (
                ag.graph_of(m).unsplice().splice("fc", lambda s: ag.tanh(ag.Switch({"a": B(2)}).apply(s))).compile()
            ),
            "'fc.adapter.switch' is a switch inside a body: it must be the last thing its method does",
        ),
    ],
)
def test_a_task_that_cannot_be_right(model, call, message):
    wanted = model(batch(), task="a")
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ag.GraphError, match=message):
        call(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
    assert torch.equal(model(batch(), task="a"), wanted)


class OwnArgument(nn.Module):
    """A model whose forward has a `task` already."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(SIZE, SIZE)

    def forward(self, x, task=2.0):
        return self.fc(x) * task


class OwnAttribute(OwnArgument):
    """A model that has a `set_task` already."""

    def forward(self, x):
        return self.fc(x)

    def set_task(self, task):
        return f"own {task}"


EXPORT_MESSAGE = (
    r"^task= is no argument of the model's own forward, which is what is asked for here\n"
    r"  written at  test_tasks\.py:\d+    .*\n"
    r"  to fix      ag\.set_task\(model, …\) before, or with ag\.task\(model, …\) around this call$"
)


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_exported_is_the_task_that_was_chosen_before(model, strict):
    graph = ag.trace(nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh()).eval(), batch())
    live = randomise(graph.splice("0", ag.Switch(METHODS)).compile())
    for one in (model, live, pickle.loads(pickle.dumps(live))):
        for task in ("b", ["a", "c", "b", "a"]):
            wanted = one(batch(), task=task)
            with pytest.raises(ag.GraphError, match=EXPORT_MESSAGE):
                torch.export.export(one, (batch(),), {"task": task}, strict=strict)
            with ag.task(one, task):
                exported = torch.export.export(one, (batch(),), strict=strict)
            torch.testing.assert_close(exported.module()(batch()), wanted)
        one.set_task("a")
        exported = torch.export.export(one, (batch(),), strict=strict)
        torch.testing.assert_close(exported.module()(batch()), one(batch(), task="a"))


@pytest.mark.parametrize("strict", [True, False])
def test_a_root_that_takes_more_is_exported_with_its_task(strict):
    class Taking(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(SIZE, SIZE)

        def forward(self, x, **more):
            return self.fc(x)

    one = randomise(ag.trace(Taking().eval(), batch()).splice("fc", ag.Switch(METHODS)).compile())
    exported = torch.export.export(one, (batch(),), {"task": "b"}, strict=strict)
    torch.testing.assert_close(exported.module()(batch(), task="b"), one(batch(), task="b"))


@pytest.mark.parametrize(("cls", "refused"), [(OwnArgument, ["task", "set_task"]), (OwnAttribute, ["task"])])
def test_a_root_that_uses_the_words_itself_keeps_them(cls, refused):
    torch.manual_seed(0)
    graph = ag.trace(cls(), torch.ones(2, SIZE)).splice("fc", ag.Switch({"a": B(2), "b": B(2)}))
    model = randomise(graph.compile())
    for word in refused:
        with pytest.raises(
            ag.GraphError, match=f"this {cls.__name__} has an argument or attribute 'task' or 'set_task' of its"
        ):
            getattr(model, word)("a")
    with ag.task(model, "b"):
        one = model(batch())
    ag.set_task(model, "b")
    assert torch.equal(model(batch()), one)
    if cls is OwnArgument:
        assert torch.equal(model(batch(), task=4.0), one * 2)
    else:
        assert model.set_task("a") == "own a"
        with pytest.raises(TypeError, match="unexpected keyword argument 'task'"):
            model(batch(), task="a")
    with pytest.raises(ag.GraphError, match=r"to fix      ag.task\(model, …\) does the same"):
        model.task("a")


def test_an_input_called_task_keeps_its_meaning():
    task = ag.input("task", shape=("batch", SIZE))
    graph = ag.Graph(ag.dense(task, SIZE, name="fc")).splice("fc", ag.Switch({"a": B(2)}))
    model = graph.compile()
    assert model(task=batch()).shape == (4, SIZE)
    with pytest.raises(ag.GraphError, match="of its own"):
        model.set_task("a")


def test_switches_at_different_sites_may_know_different_tasks():
    graph = declared({"a": B(2), "b": B(2)}).splice("out", ag.Switch({"b": B(2), "c": B(2)}))
    model = randomise(graph.compile())
    model(batch(), task="b")
    for task, where in (("a", "out.adapter"), ("c", "fc.adapter")):
        with pytest.raises(ag.GraphError, match=f"there is no task '{task}' at '{where}'"):
            model(batch(), task=task)


def test_a_switch_may_hold_a_fusion():
    graph = declared({"both": ag.Fusion({"en": B(2), "de": B(2)}), "one": B(2)})
    model = graph.compile().set_task("both")
    assert {n.split(".")[3] for n, p in model.named_parameters() if p.requires_grad} == {
        "query",
        "key",
        "value",
        "temperature",
    }
    with pytest.raises(ag.GraphError, match="a Switch cannot be inside Fusion"):
        ag.Fusion({"a": ag.Switch({"b": B(2)})})


def test_what_is_in_one_branch_is_not_read_outside():
    x = ag.input("x", shape=("batch", 4))
    graph = ag.Graph(ag.dense(x, 4, name="fc")).splice("fc", ag.Switch({"a": ag.Bottleneck(2), "b": ag.Bottleneck(3)}))
    with pytest.raises(ag.GraphError, match=r", which is in one branch of the switch 'fc\.adapter'") as caught:
        graph.tap("fc.adapter.a.down").compile()
    assert str(caught.value).startswith("the graph returns 'fc.adapter.a.down', which is")
    assert "read what the switch gives: 'fc.adapter.switch'" in str(caught.value)
