"""Training: what changes and what must not, what is measured, and what is refused before anything is trained."""

import functools
import importlib
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import adaptergraph as ag
from adaptergraph import GraphError

# `ag.fit` is the function; this is the module it is in
module = sys.modules["adaptergraph.fit"]
DOCS = Path(__file__).resolve().parent.parent / "docs" / "training.md"
fit = functools.partial(ag.fit, progress=False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def declared(dropout=0.0, **options):
    """Two layers, the first with a bottleneck; `fc` is frozen, body and head are trained."""
    x = ag.input("x", shape=("batch", 8))
    h = ag.relu(ag.dense(x, 8, name="fc"))
    graph = ag.Graph(ag.dense(h, 3, name="head")).freeze("fc")
    return graph.splice("fc", ag.Bottleneck(4, dropout=dropout, **options))


def rows(n=64, seed=0):
    g = generator(seed)
    x = torch.randn(n, 8, generator=g)
    return {"x": x, "labels": (x @ torch.randn(8, 3, generator=generator(9))).argmax(-1)}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


classify = functools.partial(fit, loss=F.cross_entropy)


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def tokens(n=24, length=6):
    ids = torch.randint(1, 50, (n, length), generator=generator())
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 1] % 3}


@pytest.fixture
def adapted(bert):
    sample = {k: v[:1] for k, v in tokens().items() if k != "labels"}
    graph = ag.trace(bert, **sample).splice("bert.encoder.layer.*.output.dense", ag.Bottleneck(4))
    return graph.unfreeze("classifier").compile()


# ---------------------------------------------------------------------- what is trained


def test_a_transformer_learns_and_what_is_frozen_stays_bit_for_bit(bert, adapted):
    before, base = state(adapted), state(bert)
    modes = [m.training for m in adapted.modules()]
    report = fit(adapted, tokens(), epochs=6, batch_size=8, lr=1e-2)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert changed(adapted, before) == trained
    assert all(".adapter." in name or name.startswith("classifier") for name in trained)
    assert changed(bert, base) == set()
    assert report.steps == 18
    assert len(report.losses) == 18
    assert report.losses[-1] < report.losses[0]
    assert report.parameters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert report.untouched == ()
    assert [m.training for m in adapted.modules()] == modes


def test_a_declared_graph_learns():
    model = declared().compile()
    before = state(model)
    report = classify(model, rows(), epochs=20, lr=0.1, evaluate=rows())
    assert changed(model, before) == {n for n in before if not n.startswith("fc.") or ".adapter." in n}
    assert report.history[-1].metrics["accuracy"] > 0.8 > report.history[0].metrics["accuracy"]


def test_nothing_of_accelerate_stays_on_the_model(adapted):
    names = set(vars(adapted)) | {"forward"}
    fit(adapted, tokens(), steps=1, precision="bf16")
    assert set(vars(adapted)) <= names
    assert "forward" not in vars(adapted)
    assert all(p.grad is None for p in adapted.parameters())
    assert not any(key.startswith("_is_accelerate") for m in adapted.modules() for key in vars(m))


def test_accelerate_is_left_as_it_was():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized

    AcceleratorState._reset_state()
    classify(declared().compile(), rows(), precision="bf16")
    assert not is_initialized()
    mine = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
    classify(declared().compile(), rows(), precision="no", accumulate=2)
    assert mine.mixed_precision == "bf16"
    assert mine.gradient_accumulation_steps == 4
    AcceleratorState._reset_state()


def test_calls_add_up():
    model = declared().compile()
    first = classify(model, rows(), epochs=5, lr=1e-2)
    second = classify(model, rows(), epochs=5, lr=1e-2)
    assert second.losses[0] < first.losses[0]
    assert second.losses[-1] < first.losses[-1]


def test_modes_and_random_state_are_as_they_were():
    model = declared(dropout=0.5).compile().eval()
    model.head.train()
    modes = {n: m.training for n, m in model.named_modules()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    classify(model, rows(), evaluate=rows(8))
    assert torch.equal(torch.rand(3), expected)
    assert {n: m.training for n, m in model.named_modules()} == modes


def test_dropout_is_on_while_training_and_off_in_evaluation():
    seen = {"train": [], "eval": []}

    class Watch(nn.Module):
        def forward(self, x):
            seen["train" if self.training else "eval"].append(torch.is_grad_enabled())
            return x

    model = nn.Sequential(nn.Linear(8, 3), Watch())
    classify(model, TensorDataset(*rows(64).values()), evaluate=TensorDataset(*rows(64).values()), batch_size=32)
    assert seen == {"train": [True, True], "eval": [False] * 3}  # one batch of evaluate is tried before training


# ---------------------------------------------------------------------- the same again


def test_the_seed_decides_everything():
    def once(seed, **options):
        torch.rand(1)  # whatever the caller drew before
        model = declared(dropout=0.3).compile()
        classify(model, rows(), epochs=2, batch_size=16, lr=1e-2, seed=seed, **options)
        return state(model)

    first = once(1)
    assert all(torch.equal(v, first[k]) for k, v in once(1).items())
    assert any(not torch.equal(v, first[k]) for k, v in once(2).items())
    # looking at it changes nothing
    assert all(torch.equal(v, first[k]) for k, v in once(1, evaluate=rows(), evaluate_every=1).items())


def test_the_seed_also_decides_the_order_of_a_loader_of_ones_own():
    def once():
        torch.rand(1)
        return classify(declared().compile(), DataLoader(samples(), batch_size=16, shuffle=True)).losses

    assert once() == once()


@pytest.mark.parametrize("n", [64, 52])
def test_accumulated_batches_are_one_bigger_batch(n):
    """52 rows: the last step of an epoch has three batches of 16, 16 and 4 rows less than the others."""

    def once(**options):
        model = declared().compile()
        report = classify(model, rows(n), epochs=3, lr=1e-2, clip=0.5, **options)
        return model, report

    small, a = once(batch_size=8, accumulate=4)
    big, b = once(batch_size=32)
    assert a.steps == b.steps == 3 * math.ceil(n / 32)
    assert a.losses == pytest.approx(b.losses, rel=1e-5)
    for name, value in big.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_one_step_is_what_torch_does():
    data = rows(16)
    model, twin = declared().compile(), declared().compile()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # of a loop before
    classify(model, data, steps=1, warmup=0, lr=1e-2, weight_decay=0.1, clip=0.01, batch_size=16)
    trained = [p for p in twin.parameters() if p.requires_grad]
    assert len(trained) == 6
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    order = torch.randperm(16, generator=generator())
    F.cross_entropy(twin(data["x"][order]), data["labels"][order]).backward()
    assert nn.utils.clip_grad_norm_(trained, 0.01) > 0.01
    optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


class Recorder(torch.optim.SGD):
    """Keeps the learning rate and the length of the gradient of each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rates, self.norms = [], []
        Recorder.last = self

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        self.norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in self.param_groups[0]["params"])))
        super().step(closure)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"warmup": 0}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"warmup": 0.2}, [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ({"warmup": 0.3, "schedule": "constant"}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "constant"}, [1] * 10),
    ],
)
def test_the_learning_rate_of_each_step(options, expected):
    classify(declared().compile(), rows(), steps=10, lr=2.0, optimizer=Recorder, **options)
    assert Recorder.last.rates == pytest.approx([2 * e for e in expected])
    assert Recorder.last.defaults["weight_decay"] == 0


def test_the_first_and_only_step_counts():
    model = declared().compile()
    before = state(model)
    classify(model, rows(), steps=1)
    assert changed(model, before)


def test_clip_is_the_longest_gradient():
    for clip in (0.1, None):
        classify(declared().compile(), rows(), steps=3, clip=clip, optimizer=Recorder)
        assert all(n == pytest.approx(0.1, rel=1e-3) if clip else n > 0.1 for n in Recorder.last.norms)


# ---------------------------------------------------------------------- data


def pairs(n=64):
    return list(zip(*rows(n).values(), strict=True))


def samples(n=64):
    return [{"x": x, "labels": y} for x, y in pairs(n)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(samples(40))


@pytest.mark.parametrize(
    "data",
    [rows(), samples(), pairs(), TensorDataset(*rows().values()), DataLoader(samples(), 32), DataLoader(pairs(), 32)],
    ids=["columns", "samples", "pairs", "dataset", "loader", "loader of pairs"],
)
def test_data_in_any_form(data):
    report = classify(declared().compile(), data, evaluate=data, epochs=2)
    assert report.steps == 4
    assert [e.step for e in report.history] == [2, 4]
    assert set(report.history[-1].metrics) == {"accuracy"}


def test_steps_repeat_the_data_or_stop_in_the_middle():
    assert classify(declared().compile(), rows(), steps=5, batch_size=32).steps == 5
    report = classify(declared().compile(), rows(), steps=1, batch_size=8)
    assert report.steps == 1
    assert [e.step for e in report.history] == [1]


def test_a_stream_needs_a_number_of_steps():
    assert classify(declared().compile(), Stream(), steps=5, batch_size=16).steps == 5
    with pytest.raises(GraphError, match=r"data= has no length\n.*\n.*steps=1000"):
        classify(declared().compile(), Stream())


def test_rows_of_different_length_with_a_collate_of_ones_own(adapted):
    data = [{"input_ids": torch.arange(1, 3 + i % 4), "labels": torch.tensor(i % 3)} for i in range(12)]

    def padded(batch):
        ids = nn.utils.rnn.pad_sequence([s["input_ids"] for s in batch], batch_first=True)
        return {
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": torch.stack([s["labels"] for s in batch]),
        }

    a = fit(adapted, data, collate=padded, batch_size=4, evaluate=data)
    b = fit(adapted, DataLoader(data, 4, collate_fn=padded))
    assert a.steps == b.steps == 3


@pytest.mark.parametrize("form", ["dict", "samples", "loader"])
def test_a_task_for_each_row_in_a_batch(bert, form):
    """Equal to a loop written by hand that calls the model with the whole batch, `task` included."""
    ids = tokens()
    switch = ag.Switch({"a": ag.Bottleneck(4), "b": ag.Bottleneck(2)})
    graph = ag.trace(bert, input_ids=ids["input_ids"][:1]).splice("bert.encoder.layer.*.output.dense", switch)
    data = {"task": ["a" if i % 3 else "b" for i in range(24)], **ids}
    samples = [{name: column[i] for name, column in data.items()} for i in range(24)]
    given = {"dict": data, "samples": samples, "loader": DataLoader(samples, 24)}[form]
    model, hand = graph.compile(), graph.compile()
    for part in (*model.modules(), *hand.modules()):
        if isinstance(part, nn.Dropout):
            # it would be drawn in another order
            part.p = 0.0
    sgd = functools.partial(torch.optim.SGD, momentum=0.5)
    report = fit(model, given, batch_size=24, steps=1, optimizer=sgd, lr=0.5, warmup=0.0, clip=None, evaluate=given)
    assert report.steps == 1
    optimizer = sgd([p for p in hand.parameters() if p.requires_grad], lr=0.5)
    hand.train()
    hand(**data).loss.backward()
    optimizer.step()
    before = dict(graph.compile().named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, hand.get_parameter(name), rtol=1e-4, atol=1e-6)
        if name.endswith("up.weight"):
            assert not torch.equal(parameter, before[name])


def test_what_a_launcher_says_about_accumulation_is_not_counted_twice(monkeypatch):
    plain = classify(declared().compile(), rows(), epochs=3, clip=None, optimizer=torch.optim.SGD)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert classify(declared().compile(), rows(), epochs=3, clip=None, optimizer=torch.optim.SGD).losses == plain.losses


def test_compiled_by_torch(tmp_path):
    torch._dynamo.reset()
    plain = declared().compile()
    model = torch.compile(plain, backend="eager", fullgraph=True)
    before = state(plain)
    classify(model, rows(), evaluate=rows())
    report = classify(model, rows(), epochs=2, folder=tmp_path)
    assert report.steps == 4
    assert changed(plain, before)
    assert torch.equal(ag.load(declared(), tmp_path)(rows()["x"]), plain(rows()["x"]))
    assert model(rows()["x"]).shape == (64, 3)


def test_half_precision():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    model = Spy(8, 3)
    before = state(model)
    report = classify(model, pairs(), precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert model.weight.dtype == torch.float32
    assert changed(model, before) == {"weight", "bias"}
    assert math.isfinite(report.losses[-1])
    seen.clear()
    classify(model, pairs())
    assert set(seen) == {torch.float32}


# ---------------------------------------------------------------------- evaluation


def test_loss_and_accuracy_are_right():
    """Seven rows in batches of three: the last batch has one row, and counts a third of the others."""
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    x = torch.tensor([[3.0, 0], [0, 3], [3, 0], [0, 3], [3, 0], [0, 3], [2, 0]])
    y = torch.tensor([0, 1, 1, 1, 0, 0, 0])  # five of seven
    report = classify(
        model, TensorDataset(x, y), evaluate=TensorDataset(x, y), batch_size=3, steps=1, lr=1e-12, weight_decay=0
    )
    right, wrong = math.log(1 + math.exp(-3)), math.log(1 + math.exp(3))
    expected = (4 * right + 2 * wrong + math.log(1 + math.exp(-2))) / 7
    assert report.history[0].metrics == {"accuracy": pytest.approx(5 / 7)}
    assert report.history[0].loss == pytest.approx(expected, rel=1e-6)


def test_metrics_of_ones_own():
    data = rows(40)
    model = declared().compile()
    metrics = {
        "mean": lambda output, batch: batch["labels"].float().mean(),  # one number: weighted by rows
        "values": lambda output, batch: batch["labels"],  # a tensor: the mean of all values
        "width": lambda output, batch: output.shape[1],
    }
    entry = classify(model, data, evaluate=data, metrics=metrics, batch_size=32).history[-1]
    mean = data["labels"].float().mean().item()
    assert entry.metrics == {"mean": pytest.approx(mean), "values": pytest.approx(mean), "width": 3}
    assert classify(model, data, evaluate=data, metrics={}).history[-1].metrics == {}


def test_a_label_of_minus_100_does_not_count():
    data = rows(8)
    data["labels"][4:] = -100
    model = declared().compile()
    entry = classify(model, rows(), lr=1e-9, evaluate=data).history[0]
    right = model(data["x"]).argmax(-1)[:4] == data["labels"][:4]
    assert entry.metrics["accuracy"] == right.float().mean()


def test_evaluation_keeps_the_order_of_the_data():
    seen = []
    data = rows(20)
    classify(
        declared().compile(),
        rows(),
        evaluate=data,
        metrics={"": lambda _, batch: seen.append(batch["labels"])},
        batch_size=8,
    )
    assert torch.equal(torch.cat(seen[1:]), data["labels"])


def test_there_is_no_accuracy_where_it_would_mean_nothing():
    regression = nn.Linear(8, 1)
    data = TensorDataset(rows()["x"], torch.randn(64, 1))
    report = fit(regression, data, loss=F.mse_loss, evaluate=data)
    assert report.history[0].metrics == {}
    assert report.best is report.history[-1]


def test_a_function_evaluates_what_is_no_mean():
    modes = []

    def judge(model):
        modes.append((model.training, torch.is_grad_enabled()))
        return {"f1": torch.tensor(0.5)}

    report = classify(declared().compile(), rows(), evaluate=judge, epochs=2)
    assert [e.metrics for e in report.history] == [{"f1": 0.5}] * 2
    assert report.history[0].loss is None
    assert report.best is report.history[0]
    assert modes == [(False, False)] * 2


def test_how_often():
    report = classify(declared().compile(), rows(), steps=7, evaluate=rows(8), evaluate_every=3)
    assert [e.step for e in report.history] == [3, 6, 7]
    means = [sum(report.losses[a:b]) / (b - a) for a, b in [(0, 3), (3, 6), (6, 7)]]
    assert [e.train_loss for e in report.history] == pytest.approx(means)


def test_a_report_can_be_read():
    report = classify(declared().compile(), rows(), epochs=2, evaluate=rows())
    lines = repr(report).splitlines()
    assert re.fullmatch(r"4 steps in \d+\.\d s, 103 trained parameters", lines[0])
    assert re.fullmatch(r"  step      2   train loss [\d.]+ +loss [\d.]+ +accuracy [\d.]+( +best)?", lines[1])
    assert sum("best" in line for line in lines) == 1
    with pytest.raises(AttributeError):
        report.seconds = 3


def test_a_trained_parameter_that_is_never_used_is_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.forgotten = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            return self.used(x)

    report = classify(Model(), rows())
    assert report.untouched == ("forgotten.weight", "forgotten.bias")
    assert "no gradient ever reached forgotten.weight" in repr(report)


# ---------------------------------------------------------------------- files


@pytest.fixture
def saves(monkeypatch):
    """What was saved, by the evaluation count at that time."""
    made = []
    storage = importlib.import_module("adaptergraph.saving.storage")
    monkeypatch.setattr(storage, "save", lambda model, folder: made.append((state(model), Path(folder))))
    return made


@pytest.mark.parametrize(
    ("values", "kept"), [([0.1, 0.5, 0.5, 0.4, 0.6], 3), ([math.nan, 0.2, math.nan], 1), ([math.nan], 1)]
)
def test_the_best_so_far_is_written(saves, tmp_path, values, kept):
    ahead = iter(values)
    model = declared().compile()
    report = classify(
        model,
        rows(),
        steps=len(values),
        evaluate=lambda m: {"f1": next(ahead)},
        evaluate_every=1,
        folder=tmp_path / "a",
    )
    assert len(saves) == kept
    assert {folder for _, folder in saves} == {tmp_path / "a"}
    best = max((v for v in values if v == v), default=None)
    assert (report.best.metrics["f1"] if report.best else None) == best


def test_without_metrics_the_lowest_loss_is_the_best(saves, tmp_path):
    data = TensorDataset(rows()["x"], torch.randn(64, 3))
    model = declared().compile()
    # a rate that makes it worse and worse after a while
    report = fit(
        model, data, loss=F.mse_loss, epochs=6, lr=0.5, schedule="constant", evaluate=data, folder=str(tmp_path / "a")
    )
    losses = [e.loss for e in report.history]
    assert report.best.loss == min(losses)
    assert len(saves) == sum(value < min([math.inf, *losses[:i]]) for i, value in enumerate(losses))


def test_without_evaluation_the_end_is_written(tmp_path):
    model = declared().compile()
    classify(model, rows(), epochs=2, lr=1e-2, folder=tmp_path / "deep" / "er")
    again = ag.load(declared(), tmp_path / "deep" / "er")
    x = rows()["x"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    values = state(again)
    assert all(torch.equal(values[n], state(model)[n]) for n in trained)
    assert again(x).shape == model(x).shape


def test_a_folder_needs_a_graph_and_says_so_before_training(tmp_path):
    model = nn.Linear(8, 3)
    before = state(model)
    with pytest.raises(GraphError, match="was not compiled from a graph"):
        classify(model, pairs(), folder=tmp_path / "a")
    assert not changed(model, before)
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------- stopping


def test_ctrl_c_keeps_what_was_learnt(tmp_path, saves):
    model = declared().compile().eval()
    before = state(model)

    def judge(_):
        judge.calls = getattr(judge, "calls", 0) + 1
        if judge.calls == 3:
            raise KeyboardInterrupt
        return {"f1": float(judge.calls)}

    with pytest.raises(KeyboardInterrupt) as stop:
        classify(model, rows(), steps=10, evaluate=judge, evaluate_every=2, folder=tmp_path)
    report = stop.value.report
    assert report.steps == 6
    assert [e.step for e in report.history] == [2, 4]
    assert report.best is report.history[1]
    assert len(saves) == 2
    assert "stopped after 6 steps; the model keeps what it has learnt" in stop.value.__notes__
    assert changed(model, before)
    assert not any(m.training for m in model.modules())
    classify(model, rows())


def test_a_loss_that_is_no_number_stops():
    data = rows(32)
    data["x"][20:] = math.nan
    loader = DataLoader([{k: v[i] for k, v in data.items()} for i in range(32)], 4)
    model, twin = declared().compile(), declared().compile()
    with pytest.raises(GraphError) as error:
        classify(model, loader, epochs=2, lr=1e-2, schedule="constant", warmup=0)
    text = str(error.value)
    assert text.startswith(
        "the loss of step 6 is nan\n    learning rate   0.01\n    parameters      left as after step 5"
    )
    assert "to fix      a smaller lr=, more warmup=, or look for inf and nan in the data" in text
    assert f"{Path(__file__).name}:" in text
    classify(twin, loader, steps=5, lr=1e-2, schedule="constant", warmup=0)
    assert changed(model, state(twin)) == set()
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_that_is_no_number_stops():
    model = nn.Linear(8, 3)
    before = state(model)
    with pytest.raises(GraphError, match="the gradient of step 1 is nan"):
        fit(model, pairs(), loss=lambda output, _: (output * 0).sum().sqrt())
    assert not changed(model, before)


# ---------------------------------------------------------------------- refused


def refused(expected, model=None, data=None, **options):
    model = declared().compile() if model is None else model
    before = state(model)
    with pytest.raises(GraphError) as error:
        fit(model, rows() if data is None else data, **{"loss": F.cross_entropy, **options})
    text = str(error.value)
    assert re.search(expected, text, re.DOTALL), text
    assert not changed(model, before)
    return text


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"epochs": 0}, "epochs is a whole number above 0"),
        ({"epochs": 1.5}, "epochs is a whole number above 0"),
        ({"epochs": None}, "epochs is a whole number above 0"),
        ({"steps": True}, "steps is a whole number above 0"),
        ({"batch_size": "8"}, "batch_size is a whole number above 0"),
        ({"accumulate": 0}, "accumulate is a whole number above 0"),
        ({"evaluate_every": -1}, "evaluate_every is a whole number above 0"),
        ({"lr": "1e-3"}, "lr is a number above 0"),
        ({"lr": 0.0}, "lr is a number above 0"),
        ({"lr": math.nan}, "lr is a number above 0"),
        ({"clip": 0}, "clip is a number above 0"),
        ({"weight_decay": -1}, "weight_decay is a number from 0 up"),
        ({"warmup": 100}, "warmup is a share of all steps, such as 0.06"),
        ({"schedule": "cosine"}, 'schedule is "linear" or "constant"'),
        ({"precision": "float16"}, 'precision is "bf16", "fp16" or "no"'),
        ({"precision": torch.bfloat16}, 'precision is "bf16", "fp16" or "no"'),
        ({"seed": 1.0}, "seed is a whole number from 0 up, of at most 63 bits"),
        ({"optimizer": "sgd"}, "optimizer is a function"),
        ({"loss": "mse"}, "loss is a function"),
        ({"loss": nn.CrossEntropyLoss}, r"loss is an instance of such a class: loss=nn.CrossEntropyLoss\(\)"),
        ({"metrics": ["accuracy"]}, r"metrics is a dict of fn\(output, batch\)"),
        ({"metrics": {"f1": 1}}, r"metrics is a dict of fn\(output, batch\)"),
        ({"folder": 3}, "folder is a path"),
        ({"model": "bert"}, r"model is an nn.Module, such as graph.compile\(\)"),
    ],
    ids=str,
)
def test_options_of_the_wrong_kind(options, hint):
    name, value = next(iter(options.items()))
    with pytest.raises(GraphError, match=hint) as error:
        fit(data=rows(), **{"model": declared().compile(), "loss": F.cross_entropy, **options})
    assert str(error.value).startswith(f"{name}={value!r} cannot be\n")
    assert error.value.hint == hint.replace("\\", "")


@pytest.mark.parametrize(
    ("option", "right"), [("epoch", "epochs"), ("learning_rate", None), ("batchsize", "batch_size")]
)
def test_a_misspelt_option(option, right):
    with pytest.raises(GraphError, match=f"^fit has no option {option!r}\n") as error:
        classify(declared().compile(), rows(), **{option: 3})
    assert right is None or error.value.hint == f"did you mean {right!r}?"


@pytest.mark.parametrize(
    ("options", "name", "arguments"),
    [
        ({"metrics": {"f1": lambda output: 1.0}, "evaluate": rows()}, "metrics['f1']", "output, batch"),
        ({"loss": lambda output: output.mean()}, "loss", "output, target"),
        ({"collate": lambda: None}, "collate", "samples"),
        ({"evaluate": lambda model, data: {}}, "evaluate", "model"),
    ],
)
def test_functions_that_do_not_take_what_they_are_called_with(options, name, arguments):
    text = refused(re.escape(f"{name} cannot be called as {name}({arguments})\n    because   "), **options)
    assert f"to fix      lambda {arguments}: …" in text


@pytest.mark.parametrize("what", ["data", "evaluate"])
@pytest.mark.parametrize(
    ("samples", "because"),
    [
        ([{"x": torch.randn(8 - i % 2), "labels": torch.tensor(i % 3)} for i in range(4)], "stack expects each tensor"),
        ([{"x": torch.randn(8).tolist(), "labels": i % 3} for i in range(4)], "columns of a list of numbers"),
        ([{"x": torch.randn(8), "labels" if i % 2 else "label": 1} for i in range(4)], "'label"),
    ],
)
def test_samples_that_make_no_batch(what, samples, because):
    model = declared().compile()
    before = state(model)
    with pytest.raises(GraphError, match=r"^samples cannot be made into a batch\n    sample 0   x: ") as error:
        classify(model, **{"data": rows(), what: samples})
    assert because in str(error.value)
    assert "collate=transformers.DataCollatorWithPadding(tokenizer)" in error.value.hint
    assert error.value.source.file == __file__
    assert not changed(model, before)


def test_a_folder_that_cannot_be_made(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    refused("'.*file' is a file, not a folder\n", folder=file)
    refused("cannot write into '.*file/a': Not a directory\n", folder=file / "a")


@pytest.mark.parametrize("what", ["data", "evaluate"])
@pytest.mark.parametrize("kind", [tuple, list])
def test_a_pair_of_tensors_is_no_data(what, kind):
    given = kind((torch.randn(8, 8), torch.zeros(8, dtype=torch.int64)))
    text = refused(f"{what}= is a pair of tensors, not samples", **{what: given})
    assert "to fix      torch.utils.data.TensorDataset(x, y) makes samples of them, for loss=" in text


def test_nothing_to_train():
    x = ag.input("x", shape=("batch", 8))
    model = ag.Graph(ag.dense(x, 3, name="head")).freeze().compile()
    text = refused("no parameter of this CompiledGraph is trained", model)
    assert 'graph.unfreeze("…")' in text


def test_the_loss_reaches_nothing_that_is_trained():
    refused("does not depend on any trained parameter", loss=lambda output, target: output.detach().sum())


def test_a_key_that_the_model_does_not_take(adapted):
    text = refused(
        "a batch has 'z', which the forward of CompiledGraph does not take", data={**rows(), "z": torch.ones(64)}
    )
    assert "\n    batch     x, labels, z\n    forward   x\n" in text
    for wrong, right in {"attention_masks": "attention_mask", "label": "labels"}.items():
        data = tokens()
        data[wrong] = data.pop(right)
        text = refused(f"a batch has '{wrong}'", adapted, data, loss=None)
        assert f"did you mean '{right}'?" in text


def test_a_model_that_takes_any_key_gets_any_key():
    class Model(nn.Linear):
        def forward(self, x, **more):
            return super().forward(x)

    classify(Model(8, 3), {**rows(), "z": torch.ones(64)})


def test_no_loss(adapted):
    data = tokens()
    del data["labels"]
    assert 'put "labels" in the batch' in refused("there is no loss", adapted, data, loss=None)
    refused("a batch has no 'labels' for loss=.*it has +x", data={"x": rows()["x"]})
    text = refused("a batch is a list, and there is no loss=", data=pairs(), loss=None)
    assert "a dict, or with loss= a pair (inputs, target)" in text
    refused("a batch is a list\n", data=[(*p, 1) for p in pairs()])
    refused("a batch is a Tensor", data=list(rows()["x"]))
    refused(
        r"the loss has shape \(32, 3\), it must be one number",
        loss=functools.partial(F.mse_loss, reduction="none"),
        data=[(x, torch.zeros(3)) for x, _ in pairs()],
    )


def test_no_data():
    for nothing in ([], {}, {"x": torch.ones(0, 8)}):
        refused("data= is empty", data=nothing)
    refused("data= has no batch", data=DataLoader(pairs(3), 4, drop_last=True))
    refused("evaluate= is empty", evaluate=[])
    refused("evaluate= has no batch", evaluate=DataLoader(pairs(3), 4, drop_last=True))


@pytest.mark.parametrize("what", ["data", "evaluate"])
def test_data_of_the_wrong_kind(what):
    refused(f"{what}= is a int.*a DataLoader, a Dataset", **{what: 3})
    refused(f"{what}= is a str", **{what: "train.csv"})
    refused(f"{what}= is a Tensor", **{what: rows()["x"]})
    text = refused(
        f"{what}= is no dict of equally long tensors", **{what: {"x": torch.ones(3, 8), "labels": [1, 2, 3]}}
    )
    assert "'x'        3\n    'labels'   list" in text
    refused("'x' +3\n +'y' +4", **{what: {"x": torch.ones(3, 8), "y": torch.ones(4)}})


def test_mistakes_in_evaluate_show_before_training():
    refused("a batch has 'y'", evaluate={"y": rows()["x"], "labels": rows()["labels"]})
    with pytest.raises(ZeroDivisionError):
        classify(declared().compile(), rows(), evaluate=rows(), metrics={"bad": lambda output, batch: 1 / 0})


def test_two_collates():
    refused("data= is a DataLoader: it has a collate_fn= of its own", data=DataLoader(pairs()), collate=list)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has it")
def test_a_precision_that_the_device_has_not():
    refused("precision='fp16' does not work on cpu", precision="fp16")


def test_a_model_in_shards(monkeypatch):
    import accelerate

    kind = types.SimpleNamespace(distributed_type=accelerate.DistributedType.FSDP)
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: kind)
    refused(r"fit does not shard a model \(FSDP\)")


def test_without_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert 'pip install "adaptergraph[train]"' in refused("fit needs accelerate")


# ---------------------------------------------------------------------- what is shown


def test_one_plain_line_for_each_evaluation(capsys):
    ag.fit(declared().compile(), rows(), loss=F.cross_entropy, epochs=2, evaluate=rows())
    out = capsys.readouterr().out
    assert re.fullmatch(r"(step +\d   train loss [\d.]+ +loss [\d.]+ +accuracy [\d.]+\n){2}", out)


def test_silence(capsys):
    classify(declared().compile(), rows(), evaluate=rows())
    assert capsys.readouterr() == ("", "")


def test_a_line_that_moves_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    ag.fit(declared().compile(), rows(), loss=F.cross_entropy, epochs=2, evaluate=rows())
    out = capsys.readouterr().out
    assert "\x1b[" in out
    assert "step 4/4" in out
    assert "accuracy" in out
    assert "train loss" not in out


# ---------------------------------------------------------------------- beside other trainers


def test_the_trainer_of_transformers_trains_the_same_parameters(adapted, tmp_path):
    import transformers

    before = state(adapted)
    data = tokens()
    samples = [{k: v[i] for k, v in data.items()} for i in range(24)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2, warmup_steps=0,
    )  # fmt: skip
    transformers.Trainer(adapted, arguments, train_dataset=samples).train()
    assert changed(adapted, before) == {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert fit(adapted, data, steps=1).steps == 1


PROCESS = """
import os, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import test_fit
from adaptergraph.saving import storage
written = []
storage.save = lambda model, folder: written.append(folder)
torch.save((*test_fit.in_one_process(8, {folder!r}), len(written)), {folder!r} + os.environ["RANK"])
"""


def in_one_process(batch_size, folder):
    model = declared().compile()
    report = ag.fit(
        model,
        rows(48),
        loss=F.cross_entropy,
        epochs=2,
        batch_size=batch_size,
        lr=1e-2,
        evaluate=rows(13),
        folder=folder,
    )
    return state(model), report.losses, report.history[-1].loss, type(model).__name__


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_two_processes_are_one_bigger_batch(tmp_path, saves):
    folder = str(tmp_path / "run")
    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(tests=str(Path(__file__).parent), folder=folder))
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    done = subprocess.run(launch, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2, "only one process shows its progress"
    a, b = (torch.load(folder + rank) for rank in "01")
    values, losses, loss, name = in_one_process(16, folder)
    for key, value in values.items():
        assert torch.equal(a[0][key], b[0][key])
        torch.testing.assert_close(a[0][key], value, rtol=1e-4, atol=1e-6)
    assert a[1] == b[1] == pytest.approx(losses, rel=1e-5)
    assert a[2] == b[2] == pytest.approx(loss, rel=1e-5)
    assert a[3] == b[3] == name
    assert (a[4], b[4]) == (len(saves), 0)


def test_the_examples_of_the_docs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = DOCS.read_text()
    space = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "training.md", "exec"), space)
