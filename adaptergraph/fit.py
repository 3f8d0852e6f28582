"""`ag.fit`: a training loop on accelerate, small because a compiled graph is a plain nn.Module. Floor 7.

One optimizer step is `_Trainer.step`; the loop around it is `_Trainer.run`; what is seen of it is `_Display`.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .batches import check_batch, loader, rows, windows
from .errors import GraphError, here
from .layers.making import spelt
from .saving.complete import refuse_left_out
from .saving.files import made_folder


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured after one step.

    Attributes:
        step: the optimizer step.
        train_loss: mean training loss since the evaluation before.
        loss: mean loss on the evaluation data; None without any.
        metrics: by name.
    """

    step: int
    train_loss: float
    loss: float | None
    metrics: Mapping[str, float]

    def __str__(self) -> str:
        shown = {"train loss": self.train_loss, "loss": self.loss, **self.metrics}
        parts = [f"{name} {value:<8.4g}" for name, value in shown.items() if value is not None]
        return "   ".join([f"step {self.step:>6,}", *parts]).rstrip()


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """What `fit` did; prints as a few lines.

    Attributes:
        history: one entry for each evaluation, or for each epoch without evaluation data.
        best: the entry of `history` whose parameters were written to `folder`; None without evaluation data.
        losses: the training loss of every step.
        parameters: how many numbers were trained.
        seconds: how long it took.
        untouched: trained parameters that no batch ever gave a gradient; normally none.
    """

    history: tuple[Evaluation, ...]
    best: Evaluation | None
    losses: tuple[float, ...]
    parameters: int
    seconds: float
    untouched: tuple[str, ...]

    @property
    def steps(self) -> int:
        """How many optimizer steps were made."""
        return len(self.losses)

    def __repr__(self) -> str:
        lines = [f"{self.steps:,} steps in {self.seconds:.1f} s, {self.parameters:,} trained parameters"]
        lines += [f"  {entry}{'   best' if entry is self.best else ''}" for entry in self.history]
        return "\n".join(lines + [f"  no gradient ever reached {name}" for name in self.untouched])


@spelt
def fit(
    model: nn.Module,
    data: Any,
    *,
    epochs: int = 1,
    steps: int | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: float = 0.06,
    schedule: str = "linear",
    clip: float | None = 1.0,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    evaluate: Any = None,
    evaluate_every: int | None = None,
    metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
    folder: str | Path | None = None,
    precision: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Trains what is trained of a model, in place, and says how it went.

    Only parameters with `requires_grad` reach the optimizer; everything else stays bit for bit. A batch is a dict,
    called as `model(**batch)`, or a pair `(inputs, target)`. Afterwards the model is in the train or eval mode it was
    found in, and torch's random state is the caller's again. Each call starts with a new optimizer and schedule.

    Args:
        model: any nn.Module, such as `graph.compile()`; it moves to the device that accelerate trains on.
        data: a DataLoader, a Dataset, a list of samples, or a dict of equally long tensors (or lists of words, such as
            `task`), whose rows are samples.
        epochs: how often all data are seen.
        steps: optimizer steps to make, whatever `epochs` says; data repeat as needed.
        batch_size: rows of a batch, in each process; a DataLoader has its own.
        accumulate: batches that make one step, weighted by their rows as in one bigger batch.
        lr: the highest learning rate.
        weight_decay: of AdamW.
        warmup: the share of all steps in which the learning rate rises to `lr`.
        schedule: `"linear"` falls towards zero after that, `"constant"` stays at `lr`.
        clip: the longest gradient, over all parameters; None for any.
        optimizer: called as `optimizer(parameters, lr=lr)` instead of AdamW, for example `torch.optim.SGD`.
        loss: called as `loss(output, target)`; the target of a dict is its `"labels"`, which the model then does not
            get. Without it the model returns a loss itself, as transformers do when a batch has labels.
        collate: makes a batch of a list of samples; for rows of different lengths.
        evaluate: what to evaluate on, in any form `data` may have, or a function `model -> {name: number}`.
        evaluate_every: steps between evaluations; None for once an epoch. The last step is always evaluated.
        metrics: functions `fn(output, batch)` that give a number for the batch, or a tensor of values; reported is the
            mean over all rows or values. By default the accuracy, where each row has one label.
        folder: where `ag.save` writes the adapter, at each evaluation that is the best so far: highest first metric,
            or lowest loss when there is no metric. At the end without `evaluate`.
        precision: `"bf16"` or `"fp16"` to compute in it; None for what `accelerate launch` says, else `"no"`.
        seed: of data order and dropout.
        progress: show a line that moves in a terminal, one plain line for each evaluation elsewhere.

    Raises:
        GraphError: nothing is trained, data or an option do not fit, or the loss or gradient is no longer a number;
            the parameters are then those of the step before.
        KeyboardInterrupt: Ctrl-C; the model keeps what it has learnt, and `report` of the exception says how much.

    >>> import adaptergraph as ag, torch
    >>> x = ag.input("x", shape=("batch", 8))
    >>> graph = ag.Graph(ag.dense(x, 3, name="fc")).freeze().splice("fc", ag.Bottleneck(2))
    >>> data = {"x": torch.randn(64, 8), "labels": torch.randint(3, (64,))}
    >>> report = ag.fit(graph.compile(), data, loss=torch.nn.functional.cross_entropy, progress=False)
    >>> report.steps, report.parameters
    (2, 17)
    """
    given = SimpleNamespace(**locals())
    _check(given)
    modes = {module: module.training for module in model.modules()}
    try:
        with _accelerator(precision) as accelerator, _random_state():
            torch.manual_seed(seed)
            return _Trainer(accelerator, given).run()
    finally:
        for module, training in modes.items():
            module.training = training


class _Objective(nn.Module):
    """Model and loss as one module: accelerate wraps, patches and marks this one, never the user's model."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor] | None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            inputs = dict(batch)
            target = inputs.pop("labels") if self.loss is not None else None
            output = self.model(**inputs)
        else:
            output, target = self.model(batch[0]), batch[1]
        return (_part(output, "loss") if self.loss is None else self.loss(output, target)), output


class _Trainer:
    """One call of `fit`: the model, its optimizer, and what accelerate makes of both."""

    def __init__(self, accelerator: Any, given: SimpleNamespace) -> None:
        self.accelerator, self.given = accelerator, given
        self.model = _plain(given.model)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.untouched = list(self.trained)
        self.judge = given.evaluate if callable(given.evaluate) else loader("evaluate", given)
        self.loader = accelerator.prepare(loader("data", given, torch.Generator().manual_seed(given.seed)))
        self.objective = accelerator.prepare(_Objective(given.model, given.loss))
        parameters = list(self.trained.values())
        if given.optimizer is None:
            made = torch.optim.AdamW(parameters, lr=given.lr, weight_decay=given.weight_decay)
        else:
            made = given.optimizer(parameters, lr=given.lr)
        self.optimizer = accelerator.prepare(made)
        self.peaks = [group["lr"] for group in made.param_groups]
        try:
            epoch = max(1, math.ceil(len(self.loader) / given.accumulate))
        except TypeError:
            if given.steps is None:
                raise GraphError("data= has no length", source=here(), hint="say how many steps: steps=1000") from None
            epoch = given.steps
        self.total = given.steps or given.epochs * epoch
        self.every = given.evaluate_every or epoch

    def run(self) -> Report:
        """Steps, evaluations and files, in their order."""
        started = time.perf_counter()
        history: list[Evaluation] = []
        losses: list[float] = []
        best: Evaluation | None = None

        def report() -> Report:
            count = sum(p.numel() for p in self.trained.values())
            seconds = time.perf_counter() - started
            return Report(tuple(history), best, tuple(losses), count, seconds, tuple(self.untouched))

        display = _Display(self.total, self.given.progress and self.accelerator.is_main_process)
        try:
            if isinstance(self.judge, DataLoader):
                # one batch of it, so that mistakes show before an epoch has gone by
                self.evaluate(0, math.nan, batches=1)
            with display.bar:
                for step, window in enumerate(islice(windows(self.loader, self.given.accumulate), self.total), 1):
                    losses.append(self.step(window, step))
                    display.step(losses[-1])
                    if step % self.every and step != self.total:
                        continue
                    recent = losses[history[-1].step if history else 0 :]
                    history.append(self.evaluate(step, sum(recent) / len(recent)))
                    display.evaluation(history[-1])
                    if _better(history[-1], best):
                        best = history[-1]
                        self.save()
            if best is None:
                self.save()
        except KeyboardInterrupt as stop:
            stop.report = report()  # type: ignore[attr-defined]
            stop.add_note(f"stopped after {len(losses)} steps; the model keeps what it has learnt")
            raise
        return report()

    def step(self, window: list[Any], step: int) -> float:
        """One optimizer step on the batches of a window; gives their mean loss."""
        if step == 1:
            check_batch(window[0], self.model, self.given.loss)
        self.given.model.train()
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * _factor(self.given.schedule, self.given.warmup, step - 1, self.total)
        self.optimizer.zero_grad()
        sizes = [rows(batch) for batch in window]
        total = torch.zeros((), device=self.accelerator.device)
        for i, batch in enumerate(window):
            last = i == len(window) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                loss = _checked(self.objective(batch)[0], trained=True) * (sizes[i] / sum(sizes))
                self.accelerator.backward(loss)
            total += loss.detach().float()
        self.untouched = [name for name in self.untouched if self.trained[name].grad is None]
        norm = self.accelerator.clip_grad_norm_(self.trained.values(), self.given.clip or math.inf)
        mean = float(self.accelerator.reduce(total, "mean"))
        self._check_finite(step, mean, float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        # fp16 meets gradients that are too long now and then; its scaler leaves out such a step
        if math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.scaler is not None):
            return
        what, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad()
        raise GraphError(
            f"the {what} of step {step} is {value}",
            sides=[("learning rate", f"{rate:.3g}"), ("parameters", f"left as after step {step - 1}")],
            source=here(),
            hint="a smaller lr=, more warmup=, or look for inf and nan in the data",
        )

    def evaluate(self, step: int, train_loss: float, batches: int | None = None) -> Evaluation:
        """What there is to say after a step; `batches` looks at the first few only."""
        if self.judge is None:
            return Evaluation(step, train_loss, None, {})
        self.given.model.eval()
        with torch.no_grad(), _random_state():
            if callable(self.judge):
                return Evaluation(step, train_loss, None, _judged(self.judge(self.given.model)))
            means = self._means(islice(self.judge, batches))
        return Evaluation(step, train_loss, means.pop("loss"), means)

    def _means(self, batches: Iterator[Any]) -> dict[str, float]:
        from accelerate.utils import send_to_device

        metrics = {"accuracy": _accuracy} if self.given.metrics is None else self.given.metrics
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for batch in batches:
            if not sums:
                check_batch(batch, self.model, self.given.loss)
            batch = send_to_device(batch, self.accelerator.device)
            loss, output = self.objective(batch)
            for name, value in {"loss": _checked(loss), **{n: fn(output, batch) for n, fn in metrics.items()}}.items():
                if value is not None:
                    value = torch.as_tensor(value).cpu().double()
                    count = value.numel() if value.dim() else rows(batch)
                    sums[name] = sums.get(name, 0) + (value.sum() if value.dim() else value * count)
                    counts[name] = counts.get(name, 0) + count
        if not sums:
            raise GraphError(
                "evaluate= has no batch", source=here(), hint="give it at least one sample, or leave evaluate= out"
            )
        return {name: float(value / counts[name]) for name, value in sums.items()}

    def save(self) -> None:
        """Writes the adapter, once, whatever the number of processes."""
        if self.given.folder is not None:
            from .saving.storage import save

            if self.accelerator.is_main_process:
                save(self.model, self.given.folder)
            self.accelerator.wait_for_everyone()


def _plain(model: nn.Module) -> Any:
    """The model inside `torch.compile(model)`, or the model."""
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model


def _factor(schedule: str, warmup: float, step: int, total: int) -> float:
    """The learning rate of a step, counted from 0, as a part of its highest value; it is never zero."""
    rising = int(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 1.0 if schedule == "constant" else (total - step) / (total - rising)


def _part(output: Any, name: str) -> Any:
    """One of the things a model returned by name; None when it has none such."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _checked(loss: Any, trained: bool = False) -> Tensor:
    if not isinstance(loss, Tensor):
        hint = 'put "labels" in the batch of a model that makes a loss of them, or give loss='
        raise GraphError("there is no loss: the model returned none", source=here(), hint=hint)
    if loss.numel() != 1:
        message = f"the loss has shape {tuple(loss.shape)}, it must be one number"
        raise GraphError(message, source=here(), hint='reduction="mean"')
    if trained and not loss.requires_grad:
        hint = "graph.draw() shows what does"
        raise GraphError("the loss does not depend on any trained parameter", source=here(), hint=hint)
    return loss.squeeze()


def _accuracy(output: Any, batch: Any) -> Tensor | None:
    """Whether the highest logit is the label, row by row; None unless there is one label for each row."""
    logits = output if isinstance(output, Tensor) else _part(output, "logits")
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    if logits.dim() != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        return None
    return (logits.argmax(-1) == labels)[labels != -100]


def _better(new: Evaluation, old: Evaluation | None) -> bool:
    def score(entry: Evaluation) -> float:
        if entry.metrics:
            return next(iter(entry.metrics.values()))
        return math.nan if entry.loss is None else -entry.loss

    return not math.isnan(score(new)) and (old is None or score(new) > score(old))


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("model", lambda v: isinstance(v, nn.Module), "an nn.Module, such as graph.compile()"),
    ("epochs steps batch_size accumulate evaluate_every", _whole, "a whole number above 0"),
    ("lr clip", lambda v: _number(v) and v > 0, "a number above 0"),
    ("weight_decay", _number, "a number from 0 up"),
    ("warmup", lambda v: _number(v) and v < 1, "a share of all steps, such as 0.06"),
    ("data", lambda v: v is not None, "a DataLoader, a Dataset, a list of samples, or a dict of equally long tensors"),
    ("seed", lambda v: type(v) is int and 0 <= v < 2**63, "a whole number from 0 up, of at most 63 bits"),
    ("progress", lambda v: isinstance(v, bool), "True or False"),
    ("schedule", lambda v: v in ("linear", "constant"), '"linear" or "constant"'),
    ("precision", lambda v: v in ("no", "bf16", "fp16"), '"bf16", "fp16" or "no"'),
    ("optimizer loss collate", callable, "a function"),
    ("loss", lambda v: not isinstance(v, type), "an instance of such a class: loss=nn.CrossEntropyLoss()"),
    ("metrics", lambda v: isinstance(v, Mapping) and all(map(callable, v.values())), "a dict of fn(output, batch)"),
    ("folder", lambda v: isinstance(v, str | Path), "a path"),
)


def _judged(found: Any) -> dict[str, float]:
    """What a function given as `evaluate` found: numbers by name."""
    try:
        return {str(name): float(value) for name, value in found.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError):
        hint = "return a dict such as {'accuracy': 0.9}"
        raise GraphError(f"evaluate= gives {found!r}, not numbers by name", source=here(), hint=hint) from None


def _check(given: SimpleNamespace) -> None:
    """Everything that can be known to be wrong before data are looked at."""
    optional = {name for name, p in inspect.signature(fit).parameters.items() if p.default is None} | {"clip"}
    for names, right, hint in _RULES:
        for name in names.split():
            value = getattr(given, name)
            if not (right(value) or (value is None and name in optional)):
                raise GraphError(f"{name}={value!r} cannot be", source=here(), hint=f"{name} is {hint}")
    _check_calls(given)
    if not any(p.requires_grad for p in given.model.parameters()):
        hint = 'splice a body into its graph, or graph.unfreeze("…"), and compile again'
        name = type(_plain(given.model)).__name__
        raise GraphError(f"no parameter of this {name} is trained", source=here(), hint=hint)
    if given.collate is not None and isinstance(given.data, DataLoader):
        raise GraphError(
            "data= is a DataLoader: it has a collate_fn= of its own",
            source=here(),
            hint="leave collate_fn= out, or give the dataset instead of the loader",
        )
    if given.folder is not None:
        refuse_left_out(given.model)
        made_folder(Path(given.folder))


def _check_calls(given: SimpleNamespace) -> None:
    """Whether functions of the user take what they are called with; of some builtins nobody knows."""
    calls = [(f"metrics[{name!r}]", fn, "output, batch") for name, fn in (given.metrics or {}).items()]
    calls += [("loss", given.loss, "output, target"), ("collate", given.collate, "samples")]
    calls += [("evaluate", given.evaluate, "model")]
    for name, fn, arguments in (call for call in calls if callable(call[1])):
        try:
            inspect.signature(fn).bind(*arguments.split(", "))
        except ValueError:
            continue
        except TypeError as error:
            raise GraphError(
                f"{name} cannot be called as {name}({arguments})",
                sides=[("because", str(error))],
                source=here(),
                hint=f"lambda {arguments}: …",
            ) from None


@contextmanager
def _accelerator(precision: str | None) -> Iterator[Any]:
    """An Accelerator with settings of its own; those that the process had are there again afterwards."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
        from accelerate.utils import DistributedType, GradientAccumulationPlugin
    except ImportError as error:
        raise GraphError("fit needs accelerate", source=here(), hint='pip install "adaptergraph[train]"') from error
    shared = (AcceleratorState._shared_state, GradientState._shared_state)
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        # batches are accumulated in `step`, weighted by rows
        single = GradientAccumulationPlugin(num_steps=1)
        accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_plugin=single)
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise GraphError(
                f"fit does not shard a model ({accelerator.distributed_type.value})",
                source=here(),
                hint="start it with DDP, or write the loop yourself: a compiled model is an nn.Module as any other",
            )
        if precision in ("bf16", "fp16") and not accelerator.native_amp:
            device = accelerator.device.type
            raise GraphError(f"precision={precision!r} does not work on {device}", source=here(), hint='"bf16" or "no"')
        yield accelerator
    finally:
        for state, kept in zip(shared, before, strict=True):
            state.clear()
            state.update(kept)


def _random_state() -> Any:
    """What is drawn inside does not change what is drawn after it."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


class _Display:
    """A line that moves in a terminal; one plain line for each evaluation elsewhere."""

    def __init__(self, total: int, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.shown = shown
        columns = [TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}")]
        self.bar = Progress(*columns, TimeRemainingColumn(), disable=not (shown and Console().is_terminal))
        self.task = self.bar.add_task("", total=total)
        self.found = ""

    def step(self, loss: float) -> None:
        self.bar.update(self.task, advance=1, description=f"loss {loss:.4g}{self.found}")

    def evaluation(self, evaluation: Evaluation) -> None:
        self.found = "".join(f"   {name} {value:.4g}" for name, value in evaluation.metrics.items())
        if self.shown and self.bar.disable:
            print(evaluation, flush=True)
