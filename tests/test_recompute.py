"""Parts of a forward that are computed again in the backward pass: with taps, calls, tasks, and in other threads."""

import copy
import gc
import threading
import weakref

import byhand
import pytest
import torch
from kinds import BODY, KINDS, NEW, adapted, add_tap, deep_llama, gradients, ids
from torch import nn
from torch.utils.checkpoint import checkpoint

import adaptergraph as ag
from adaptergraph.hosting import frames

WIDTH = 16
MODES = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


class Twice(nn.Module):
    """A layer that calls one module twice."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        h = torch.tanh(self.shared(x))
        return self.norm(x + self.shared(h))


class Net(nn.Module):
    """Three layers, checkpointed in the ways that `how` says."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(Twice() for _ in range(3))
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        self.how = "plain"
        self.reentrant = False

    def forward(self, x):
        h = self.embed(x)
        again = {"use_reentrant": self.reentrant}
        if self.how == "plain":
            h = self.run_all(h)
        elif self.how == "layers":
            for layer in self.layers:
                h = checkpoint(self.run_one, layer, h, **again)
        elif self.how == "one region":
            h = checkpoint(self.run_all, h, **again)
        elif self.how == "nested":
            h = checkpoint(self.run_nested, h, **again)
        elif self.how == "inner hooks":
            with torch.autograd.graph.save_on_cpu():
                h = checkpoint(self.run_hooked, h, **again)
        return self.head(h)

    def run_one(self, layer, h):
        return h + torch.tanh(self.mix(layer(h)))

    def run_all(self, h):
        for layer in self.layers:
            h = self.run_one(layer, h)
        return h

    def run_nested(self, h):
        for layer in self.layers:
            h = checkpoint(self.run_one, layer, h, use_reentrant=self.reentrant)
        return h

    def run_hooked(self, h):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return self.run_all(h)


def reading(*names):
    """A body that adds something of each of these values to its host's."""

    def method(site):
        out = site.output
        for i, name in enumerate(names):
            out = out + ag.tanh(ag.dense(site.graph[name], WIDTH, name=f"read_{i}"))
        return out

    return method


# what is spliced where: one call of a module, a tap from the other call, and from layers before
AT_CALLS = (
    ("layers.*.shared@1", BODY),
    ("layers.1.shared", reading("layers.0.norm", "layers.0.shared@1")),
    ("layers.2.shared@1", reading("layers.2.shared", "layers.1.norm", "layers.0.shared", "embed")),
    ("mix@1", reading("mix", "layers.0.norm")),
    ("mix@2", reading("mix@1", "mix")),
)


def called_twice(splices=AT_CALLS):
    torch.manual_seed(0)
    base = Net()
    graph = ag.trace(base, torch.randn(2, 8))
    for i, (at, method) in enumerate(splices):
        graph = graph.splice(at, method, name=f"body_{i}" if i else "adapter")
    return byhand.randomise(graph.compile(base), 0.4)


def inputs(count):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(3, 8, generator=generator, requires_grad=True) for _ in range(count)]


def backward_of(model, given, **how):
    """The gradients of several forwards before one backward."""
    for name, value in how.items():
        setattr(model, name, value)
    model.zero_grad()
    out = torch.stack([model(x).pow(2).sum() for x in given]).sum()
    out.backward()
    return gradients(model), [x.grad.clone() for x in given]


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one), {n: (one[n] - other[n]).abs().max() for n in one}


def in_thread(work):
    """Does it in another thread, and raises what it raises."""
    found = []

    def run():
        try:
            found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = found[0]
    if error is not None:
        raise error
    return value


# ---------------------------------------------------------------------- Hugging Face's switch


def two_losses(model):
    """Two forwards of different inputs and lengths, and their loss."""
    return sum(model(input_ids=ids(2, n, seed=n), use_cache=False).logits.pow(2).mean() for n in (5, 7))


@MODES
@pytest.mark.parametrize("kind", NEW)
def test_checkpointed_layers_give_the_gradients_of_plain_ones(kind, reentrant):
    model = adapted(kind).train()
    model.enable_input_require_grads()
    plain = copy.deepcopy(model)
    two_losses(plain).backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if kind == "tap" and reentrant:
        # the embeddings require gradients, and a part of them goes around the second layer's region
        with pytest.raises(ag.GraphError, match="gradients that go through it would be lost"):
            two_losses(model).backward()
        return
    layers = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda m, args: layers.append(m))
    out = two_losses(model)
    assert len(layers) == 4
    in_thread(out.backward)
    assert len(layers) == 8
    assert len(gradients(model)) > 1
    same(gradients(model), gradients(plain))
    assert frames.HERE.frame is None


def inside(site):
    """A body at the end that reads a value from the inside of a layer."""
    tapped = site.graph["model.layers.0.mlp"]
    return site.output + ag.dense(tapped, 32, name="up")


@pytest.mark.parametrize("kind", ["tap", "inside"])
def test_a_reentrant_checkpoint_refuses_to_lose_gradients(kind):
    base = deep_llama()
    graph = ag.trace(base, input_ids=ids(), use_cache=False)
    graph = graph.splice("model.layers.0.mlp.up_proj", BODY, name="first")
    graph = KINDS["tap"](graph) if kind == "tap" else graph.splice("model.norm", inside)
    model = byhand.randomise(graph.compile(base)).train()
    model.enable_input_require_grads()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    name = "model.layers.0"
    message = f"a body reads '{name}.*', and gradients that go through it would be lost\n.*use_reentrant=False"
    with pytest.raises(ag.GraphError, match=message):
        two_losses(model).backward()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    two_losses(model).backward()
    two_losses(plain).backward()
    same(gradients(model), gradients(plain))


# ---------------------------------------------------------------------- torch's own checkpoint


@pytest.mark.parametrize("how", ["layers", "one region", "nested", "inner hooks"])
@pytest.mark.parametrize("thread", [False, True], ids=["here", "thread"])
def test_calls_and_taps_are_found_again(how, thread):
    model = called_twice()
    plain = backward_of(model, inputs(3), how="plain")
    again = backward_of(model, inputs(3), how=how)
    if thread:
        given = inputs(3)
        model.zero_grad()
        out = torch.stack([model(x).pow(2).sum() for x in given]).sum()
        in_thread(out.backward)
        again = gradients(model), [x.grad for x in given]
    same(again[0], plain[0])
    assert all(torch.equal(a, b) for a, b in zip(again[1], plain[1], strict=True))
    assert frames.HERE.frame is None


@pytest.mark.parametrize("how", ["one region", "nested"])
def test_taps_within_a_reentrant_region(how):
    within = (("layers.*.shared@1", BODY), ("layers.2.shared@1", reading("layers.2.shared")))
    model = called_twice(within)
    plain = backward_of(model, inputs(2), how="plain")
    again = backward_of(model, inputs(2), how=how, reentrant=True)
    same(again[0], plain[0])
    assert all(torch.equal(a, b) for a, b in zip(again[1], plain[1], strict=True))


@pytest.mark.parametrize("how", ["layers", "one region", "nested"])
def test_gradients_that_go_around_a_reentrant_region(how):
    model = called_twice()
    model.how, model.reentrant = how, True
    (x,) = inputs(1)
    with pytest.raises(ag.GraphError, match="gradients that go through it would be lost"):
        model(x).sum().backward()
    assert frames.HERE.frame is None


def test_two_backwards_over_one_forward():
    model = called_twice()
    grads = []
    for how in ("plain", "layers", "nested"):
        model.how = how
        model.zero_grad()
        (x,) = inputs(1)
        out = model(x).pow(2).sum()
        out.backward(retain_graph=True)
        model(x.detach() + 1)
        (out * 2).backward()
        grads.append(gradients(model))
    same(grads[0], grads[1])
    same(grads[0], grads[2])


def test_a_backward_inside_another_forward():
    """As force fields do: what is computed again reads its own forward, not the one that is running."""
    model, other = called_twice(), called_twice()
    plain = backward_of(model, inputs(1), how="plain")
    model.zero_grad()
    model.how = "layers"
    (x,) = inputs(1)
    out = model(x).pow(2).sum()
    other.layers[1].register_forward_hook(lambda m, args, output: out.backward())
    expected = called_twice()(x.detach() + 3)
    assert torch.equal(other(x.detach() + 3), expected)
    same(gradients(model), plain[0])


def test_nothing_keeps_a_forward_that_is_given_up():
    model = called_twice()
    model.how = "nested"
    (x,) = inputs(1)
    kept = []
    # values that bodies of later regions read
    for module in (model.layers[0].norm, model.layers[1].norm, model.mix):
        module.register_forward_hook(lambda m, args, output: kept.append(weakref.ref(output)))
    model(x)
    gc.collect()
    assert [one() for one in kept] == [None] * 5


@pytest.mark.parametrize("how", ["layers", "one region"])
def test_where_the_region_cannot_be_found_it_is_an_error(monkeypatch, how):
    model = called_twice()
    plain = backward_of(model, inputs(1), how="plain")
    monkeypatch.setattr(frames, "_regions", lambda: [])
    monkeypatch.setattr(frames, "_reentrant_regions", lambda: [])
    model.how = how
    for reentrant in (False, True):
        model.reentrant = reentrant
        (x,) = inputs(1)
        with pytest.raises(ag.GraphError, match=r"'(layers|mix).*(was not computed in this|is called by itself)"):
            model(x).pow(2).sum().backward()
    model.how = "plain"
    same(backward_of(model, inputs(1))[0], plain[0])


# ---------------------------------------------------------------------- tasks

METHODS = {"a": ag.Bottleneck(4), "b": ag.Bottleneck(4), "c": ag.Bottleneck(3)}


def tasked():
    return called_twice((("layers.*.norm", ag.Switch(METHODS)),))


def task_gradients(model, task, x, how, after=lambda: None, backward=lambda out: out.backward()):
    model.zero_grad()
    model.how = how
    with model.task(task):
        out = model(x).pow(2).sum()
    after()
    backward(out)
    return gradients(model)


@MODES
@pytest.mark.parametrize("how", ["layers", "one region", "nested"])
@pytest.mark.parametrize("task", ["b", ["b", "c", "a"]], ids=["one", "rows"])
@pytest.mark.parametrize("thread", [False, True], ids=["here", "thread"])
def test_what_is_computed_again_runs_the_task_it_ran(how, task, reentrant, thread):
    model = tasked()
    (x,) = inputs(1)
    plain = task_gradients(model, task, x, "plain")
    model.reentrant = reentrant
    backward = (lambda out: in_thread(out.backward)) if thread else (lambda out: out.backward())
    same(task_gradients(model, task, x, how, backward=backward), plain)
    # another default, and a backward in the block of another task
    same(task_gradients(model, task, x, how, lambda: model(x, task="c"), backward), plain)
    if not thread:

        def elsewhere(out):
            with model.task("c"):
                out.backward()
                assert model.layers[0].norm.adapter.adaptergraph_slot.here.branch is model.layers[0].norm.adapter.c

        same(task_gradients(model, task, x, how, backward=elsewhere), plain)


@MODES
def test_two_tasks_before_one_backward(reentrant):
    model = tasked()
    (x,) = inputs(1)
    found = []
    for how in ("plain", "layers"):
        model.how, model.reentrant = how, reentrant
        model.zero_grad()
        (model(x, task="a").sum() + 3 * model(x, task="b").pow(2).sum()).backward()
        found.append(gradients(model))
    assert {n.split(".")[4] for n in found[0]} == {"a", "b"}
    same(*found)


@MODES
def test_another_default_before_the_backward(reentrant):
    model = tasked()
    (x,) = inputs(1)
    for switch in (layer.norm.adapter for layer in model.layers):
        switch.be_default("a")
    model.how = "plain"
    model(x).pow(2).sum().backward()
    plain = gradients(model)
    model.zero_grad()
    model.how, model.reentrant = "layers", reentrant
    out = model(x).pow(2).sum()
    for switch in (layer.norm.adapter for layer in model.layers):
        switch.be_default("b")
    out.backward()
    same(gradients(model), plain)


@MODES
def test_a_task_that_is_chosen_inside_the_checkpoint(reentrant):
    model = tasked()
    (x,) = inputs(1)
    plain = task_gradients(model, "b", x, "plain")
    model.zero_grad()

    def both(x):
        with ag.task(model, "b"):
            return model(x)

    checkpoint(both, x, use_reentrant=reentrant).pow(2).sum().backward()
    same(gradients(model), plain)
    model.zero_grad()
    checkpoint(lambda x: model(x, task="b"), x, use_reentrant=reentrant).pow(2).sum().backward()
    same(gradients(model), plain)


@MODES
@pytest.mark.parametrize("default", [None, "c"])
def test_where_the_task_cannot_be_found_it_is_an_error(monkeypatch, reentrant, default):
    model = tasked()
    model.set_task(default)
    monkeypatch.setattr(frames, "_regions", lambda: [])
    monkeypatch.setattr(frames, "_reentrant_regions", lambda: [])
    model.how, model.reentrant = "layers", reentrant
    message = r"'layers.2.norm.adapter' runs in a backward pass, and which task.*\n.*or call the model with task="
    for block in (False, True):
        with model.task("c"):
            out = model(inputs(1)[0], task="b" if default is None else "c").sum()
            if block:
                with pytest.raises(ag.GraphError, match=message):
                    out.backward()
        if not block:
            with pytest.raises(ag.GraphError, match=message):
                out.backward()


def test_a_task_and_a_tap_in_a_live_model_checkpointed_by_itself():
    base = deep_llama()
    graph = ag.trace(base, input_ids=ids(), use_cache=False)
    graph = graph.splice("model.layers.*.mlp.down_proj", ag.Switch(METHODS), name="tasks")
    graph = graph.splice("model.layers.1.mlp.down_proj", add_tap)
    model = byhand.randomise(graph.compile(base)).train()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = []
    for one in (model, plain):
        out = one(input_ids=ids(), use_cache=False, task="a").logits.pow(2).mean()
        with one.task("b"):
            losses.append(out + one(input_ids=ids(seed=4), use_cache=False).logits.pow(2).mean())
    in_thread(losses[0].backward)
    losses[1].backward()
    same(gradients(model), gradients(plain))
