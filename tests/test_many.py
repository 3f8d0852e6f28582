"""Many adapted models over one base, many threads, many processes, the Trainer, and what is refused while running."""

import copy
import gc
import subprocess
import sys
import threading
from pathlib import Path

import byhand
import pytest
import torch
import two_processes
from kinds import BODY, KINDS, NEW, adapted, add_tap, deep_llama, gradients, ids, trainer_arguments
from models import WIDTH, snapshot
from test_recompute import METHODS, called_twice
from torch import nn

import adaptergraph as ag
from adaptergraph.hosting import frames

GIVEN = {"input_ids": ids(), "use_cache": False}


def storages(*models):
    """The bytes of the distinct storages under these models."""
    found = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


# ---------------------------------------------------------------------- one base


def test_twenty_models_cost_one_base_and_their_adapters():
    base = deep_llama()
    before = snapshot(base)
    models = [adapted(list(KINDS)[i % len(KINDS)], base) for i in range(20)]
    bodies = sum(
        p.numel() * p.element_size()
        for model in models
        for name in ag.graph_of(model).bodies
        for p in model.get_submodule(name).parameters()
    )
    buffers = sum(b.numel() * b.element_size() for model in models for b in model.buffers())
    assert storages(base, *models) == storages(base) + bodies + buffers
    assert buffers < 0.01 * storages(base)

    with torch.no_grad():
        expected = [model(**GIVEN).logits for model in models]
    models[0].to(torch.float64)
    models[1].bfloat16()
    models[2].requires_grad_(True)
    models[3].load_state_dict({n: torch.zeros_like(t) for n, t in models[3].state_dict().items()})
    models[4].eval()(**GIVEN).logits.sum().backward()
    ag.detach(models[5])
    for name, parameter in models[6].named_parameters():
        if name in dict(base.named_parameters()):
            parameter.requires_grad_(name == "model.norm.weight")
    optimizer = torch.optim.SGD(models[6].parameters(), lr=1.0)
    models[6](**GIVEN).logits.pow(2).mean().backward()
    optimizer.step()
    with torch.no_grad():
        for model, wanted in zip(models[7:], expected[7:], strict=True):
            assert torch.equal(model(**GIVEN).logits, wanted)
    assert snapshot(base) == before
    # the one parameter that was trained has values of its own, all others are where they were
    own = dict(models[6].named_parameters())
    moved = [n for n, p in base.named_parameters() if own[n].data_ptr() != p.data_ptr()]
    assert moved == ["model.norm.weight"]


def test_an_unfrozen_parameter_is_copied_alone():
    base = deep_llama()
    graph = KINDS["mid"](ag.trace(base, **GIVEN)).unfreeze("model.layers.1.mlp.down_proj")
    model = graph.compile()
    own = dict(model.named_parameters())
    moved = [n for n, p in base.named_parameters() if own[n].data_ptr() != p.data_ptr()]
    assert moved == ["model.layers.1.mlp.down_proj.weight"]


@pytest.mark.parametrize("kind", NEW)
def test_copies_and_pickles_keep_frames_of_their_own(kind):
    import io
    import pickle

    model = adapted(kind)
    expected = model(**GIVEN).logits
    twins = [copy.deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model)))]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for twin in twins:
        assert torch.equal(twin(**GIVEN).logits, expected)


# ---------------------------------------------------------------------- threads


def test_eight_threads_with_their_own_tasks_inputs_and_taps():
    model = called_twice((("layers.*.shared@1", ag.Switch(METHODS)), ("layers.2.norm", tapping)))
    names = list(METHODS)
    inputs = [torch.randn(1 + i % 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(24)]
    with torch.no_grad():
        expected = {(i, t): model(x, task=t) for i, x in enumerate(inputs) for t in names}
    wrong, done = [], []

    def work(number):
        with torch.no_grad():
            for i in range(200):
                at, task = (7 * number + i) % len(inputs), names[(number + i) % 3]
                if i % 2:
                    with model.task(task):
                        got = model(inputs[at])
                else:
                    got = model(inputs[at], task=task)
                done.append(1)
                if not torch.equal(got, expected[at, task]):
                    wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert (len(done), wrong) == (1600, [])


def tapping(site):
    """A body that reads the layers before."""
    first, second = site.graph["layers.0.norm"], site.graph["layers.1.shared@1"]
    return site.output + ag.dense(ag.tanh(first), 16, name="a") + ag.dense(second, 16, name="b")


class Stop(BaseException):
    """Like KeyboardInterrupt."""


@pytest.mark.parametrize("error", [ValueError, Stop])
@pytest.mark.parametrize("where", ["layers.1.norm", "layers.1.shared", "layers.2.norm.adapter_1", "embed"])
def test_an_exception_inside_a_forward_leaves_nothing_behind(error, where):
    base = called_twice((("layers.*.shared@1", ag.Switch(METHODS)),))
    ag.detach(base)
    graph = ag.trace(base, torch.randn(2, 8))
    graph = graph.splice("layers.*.shared@1", ag.Switch(METHODS)).splice("layers.2.norm", tapping, name="adapter_1")
    model = byhand.randomise(graph.compile())
    x = torch.randn(3, 8)
    expected = model(x, task="b")
    before = snapshot(model)
    broken = model.get_submodule(where)

    def fail(module, args):
        raise error("on purpose")

    handle = broken.register_forward_pre_hook(fail)
    for how in ("plain", "layers", "nested"):
        model.how = how
        with pytest.raises(error, match="on purpose"):
            model(x, task="c")
        assert frames.HERE.frame is None
        for module in model.modules():
            slot = getattr(module, "adaptergraph_slot", None)
            assert slot is None or (slot.here.branch, slot.here.rows, slot.here.backward) == (None, None, -1)
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    handle.remove()
    model.how = "plain"
    assert snapshot(model) == before
    assert torch.equal(model(x, task="b"), expected)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is frames.Frame]


# ---------------------------------------------------------------------- the Trainer


def trained(directory, steps, resume=False):
    from transformers import Trainer

    torch.manual_seed(0)
    base = deep_llama()
    graph = ag.trace(base, **GIVEN).splice("model.layers.1.mlp.down_proj", add_tap)
    model = byhand.randomise(KINDS["mid"](graph).compile(), 0.1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in ids(8, 7)]
    arguments = trainer_arguments(
        directory,
        steps,
        save_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
    return before, dict(model.named_parameters())


def test_the_trainer_resumes_where_it_stopped(tmp_path):
    before, whole = trained(tmp_path / "whole", 4)
    trained(tmp_path / "parts", 2)
    _, resumed = trained(tmp_path / "parts", 4, resume=True)
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    moved = {n for n in whole if not torch.equal(whole[n], before[n])}
    assert moved == {n for n in whole if ".adapter" in n}


# ---------------------------------------------------------------------- two processes


def test_two_processes_give_the_gradients_of_one(tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=script.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.split("\n")[:-1] == [f"{how} {kind}" for how in two_processes.HOWS for kind in KINDS]


# ---------------------------------------------------------------------- what is refused while it runs


def refused(call, *lines):
    with pytest.raises(ag.GraphError) as caught:
        call()
    for line in lines:
        assert line in str(caught.value), str(caught.value)
    assert frames.HERE.frame is None


def test_a_part_called_by_itself():
    model = adapted("tap")
    h, positions = torch.randn(1, 3, WIDTH), torch.arange(3)[None]
    layer = model.model.layers[1]
    turned = model.model.rotary_emb(h, positions)
    refused(
        lambda: layer(h, position_embeddings=turned),
        "which was not computed in this forward",
        "to fix      call the model as a whole",
    )
    # what needs nothing from elsewhere runs by itself
    model.model.layers[0](h, position_embeddings=turned)
    twice = called_twice()
    twice.layers[0](torch.randn(2, 16))
    refused(lambda: twice.layers[1](torch.randn(2, 16)), "a body reads 'layers.0.", "not computed in this forward")


class Skipping(nn.Module):
    """Leaves its first layer out where it is told to, as layerdrop does at random."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.skips = False

    def forward(self, x):
        for layer in self.layers[self.skips :]:
            x = torch.tanh(layer(x))
        return x


def test_a_layer_that_is_read_and_skipped():
    x = torch.randn(2, WIDTH)
    graph = ag.trace(Skipping(), x)
    model = graph.splice("layers.1", lambda site: site.output + site.graph["layers.0"]).compile()
    model(x)
    model.skips = True
    refused(lambda: model(x), "a body reads 'layers.0'", "its module was not called this time", "layerdrop")
    model.skips = False
    model(x)
    refused(lambda: model.layers[1](x), "a body reads 'layers.0'", "to fix      call the model as a whole")


class Repeating(nn.Module):
    """Calls its layer as often as it is told to."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.times = 2

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.fc(x))
        return x


def test_a_module_called_more_often_than_it_was_traced():
    base = Repeating()
    x = torch.randn(2, WIDTH)
    model = byhand.randomise(ag.trace(base, x).splice("fc@1", BODY).compile())
    model.times = 1
    assert torch.equal(model(x), base.forward(x) if base.times == 1 else torch.tanh(base.fc(x)))
    model.times = 3
    refused(lambda: model(x), "'fc' is called more often than in the traced forward: 2 times", "trace the model with")
    model.times = 2
    assert torch.equal(model(x), torch.tanh(model.fc.adapter_call1(base.fc(torch.tanh(base.fc(x))))))
    refused(
        lambda: model.fc(x),
        "'fc' is called by itself, so which of its calls this is cannot be known",
        "call the model as a whole",
    )


class Choosing(nn.Module):
    """Takes another way where it is given nothing."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, shift=None, scale=2.0):
        h = x * scale
        if shift is not None:
            h = h + shift
        return self.fc(h + 1)


class Around(nn.Module):
    """Hands on what it is given."""

    def __init__(self):
        super().__init__()
        self.inner = Choosing()

    def forward(self, x, **more):
        return self.inner(x, **more)


def test_a_lowered_forward_called_with_something_else():
    x, shift = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    base = Around()
    model = byhand.randomise(ag.trace(base, x, shift=shift).splice("inner/mul", BODY).compile())
    body, host = model.inner.adapter_mul, base.inner
    for scale in (2.0, 3.0):
        wanted = host.fc(body(x * scale) + shift + 1)
        assert torch.equal(model(x, shift=shift, scale=scale), wanted)
    assert torch.equal(model(x), host.fc(body(x * 2.0) + 1))
    refused(lambda: model(x, shift=shift, other=1), "there is no argument 'other'")
    refused(lambda: model.inner(x, shift, 2.0, 3), "4 arguments by position, where 3 are taken")
    refused(lambda: model.inner(shift=shift), "the argument 'x' is not given")
    refused(lambda: model.inner(x, shift, shift=shift), "the argument 'shift' is given twice, by position and by name")
    refused(lambda: model.inner(x, x=x, shift=shift), "the argument 'x' is given twice, by position and by name")
    model = byhand.randomise(ag.trace(base, x).splice("inner/mul", BODY).compile())
    assert torch.equal(model(x), host.fc(model.inner.adapter_mul(x * 2.0) + 1))
    refused(lambda: model(x, shift=shift), "the argument 'shift' is", "but the forward was lowered for None")


@pytest.mark.parametrize("kind", NEW)
def test_a_model_that_was_changed_swapped_or_detached(kind):
    base = deep_llama()
    graph = KINDS[kind](ag.trace(base, **GIVEN))
    before = snapshot(base)
    model = graph.compile(base, inplace=True)
    refused(lambda: graph.compile(base), "has bodies already", "ag.detach(model) takes them off")
    refused(lambda: ag.trace(base, **GIVEN), "ag.graph_of(model)")
    ag.detach(model)
    assert snapshot(base) == before
    refused(lambda: ag.detach(model), "nothing is attached to this LlamaForCausalLM")
    assert KINDS[kind](ag.trace(model, **GIVEN)) == graph
    with torch.no_grad():
        again = byhand.randomise(graph.compile(base))(**GIVEN).logits
        assert torch.equal(again, byhand.randomise(graph.compile(base))(**GIVEN).logits)
    base.model.layers[1].mlp.act_fn = nn.ReLU()
    refused(
        lambda: graph.compile(base), "is not the model of the graph", "model.layers.1.mlp.act_fn", "trace the model"
    )
    del base.model.layers[1]
    refused(lambda: graph.compile(base), "is not the model of the graph", "model has none")
    assert gradients(base) == {}
