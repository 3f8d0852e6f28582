"""Which task a model runs: per call, per thread, or as its default. Floor 4."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .errors import GraphError, here, suggestion
from .graph import Graph
from .hosting.attachment import attachment
from .hosting.hosted import host, plan_of
from .hosting.sites import graph_of, refuse_no_model
from .names import body_name
from .switch import Block, Chosen, Rows, Switch, opener, whose_call

# ---------------------------------------------------------------------- choosing


def task(model: nn.Module, task: str | Sequence[str]) -> AbstractContextManager[None]:
    """In this `with` block and thread, the model runs this task, or one task for each row of the batch.

    It changes what runs, not what is trained, and goes before `set_task`. What a checkpoint computes again in the
    backward runs the task that it ran in the forward, also after the block and in another thread; only where a
    checkpoint is around a part that is compiled by itself, the backward belongs into the block.

    Other threads have blocks of their own. Of the blocks that are open in one thread the one that was entered last
    counts, in whatever order they are left. A generator or coroutine that is suspended inside a block would lend it to
    whoever runs meanwhile: there another block, or a call without `task=`, is an error (calls of a program of
    `torch.compile` are not looked at). `contextlib.contextmanager` may wrap a block, and a generator or coroutine that
    returns may leave one open for its caller (`stack.enter_context`).

    Under `torch.compile` a block around the call compiles nothing again, whichever task or rows it chooses, as long as
    the branches are equal in shape; each further shape of a single task compiles once, while rows are one program
    whatever the shapes are. `task=` in the call itself is a constant of the program: each task and each list compiles
    once more, and torch stops at its limit of eight. So there use a block.

    Args:
        model: a compiled model with a `Switch`.
        task: the name of a task, or a list of names as long as the batch.

    Raises:
        GraphError: the model has no `Switch`, or no such task; its tasks are listed. On entering: a generator or
            coroutine is suspended inside another block. On leaving: it was entered in another thread.

    >>> import adaptergraph as ag, torch
    >>> x = ag.input("x", shape=("batch", 8))
    >>> switch = ag.Switch({"a": ag.Bottleneck(2), "b": ag.Bottleneck(2)})
    >>> model = ag.Graph(ag.dense(x, 8, name="fc")).splice("fc", switch).compile()
    >>> with ag.task(model, ["a", "b", "a"]):
    ...     model(torch.ones(3, 8)).shape
    torch.Size([3, 8])
    """
    return _Block(model, task)


class _Chosen(AbstractContextManager[None]):
    """Fills the slots of switches during one call, and gives them back what they held."""

    def __init__(self, model: nn.Module, task: Any) -> None:
        choices = [(s, _choice(s, task)) for s in _switches(model)]
        self.switches = [switch for switch, _ in choices]
        self.pairs = [(None, c) if isinstance(c, Rows) else (c, None) for _, c in choices]
        self.before: list[list[Chosen]] = []

    def __enter__(self) -> None:
        slots = [switch.adaptergraph_slot.here for switch in self.switches]
        self.before.append([slot.choose(*pair) for slot, pair in zip(slots, self.pairs, strict=True)])

    def __exit__(self, *_: object) -> None:
        for switch, before in zip(self.switches, self.before.pop(), strict=True):
            switch.adaptergraph_slot.here.restore(before)


class _Block(_Chosen):
    """The same for a `with` block of the user, which may be left in any order; in compiled code it never is."""

    def __init__(self, model: nn.Module, task: Any) -> None:
        super().__init__(model, task)
        self.entered: list[tuple[int, list[Block]]] = []

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            super().__enter__()
            return
        for switch in self.switches:
            frame = switch.adaptergraph_slot.here.suspended()
            if frame is not None:
                raise whose_call(switch, frame)
        who, slots = opener(), [switch.adaptergraph_slot.here for switch in self.switches]
        blocks = [slot.enter(branch, rows, who) for slot, (branch, rows) in zip(slots, self.pairs, strict=True)]
        self.entered.append((threading.get_ident(), blocks))

    def __exit__(self, kind: object = None, *rest: object) -> None:
        if not self.entered:
            super().__exit__(kind, *rest)
            return
        thread = threading.get_ident()
        # one object may be entered in several threads
        own = next((e for e in reversed(self.entered) if e[0] == thread), self.entered[-1])
        self.entered.remove(own)
        for block in own[1]:
            block.leave()
        if own[0] != thread and kind is None:
            raise GraphError(
                "a block of ag.task was left in another thread than it was entered in; there it chose nothing",
                source=here(),
                hint='no yield or await inside such a block; model(…, task="…") always runs its own',
            )


def set_task(model: nn.Module, task: str | None) -> nn.Module:
    """Lets the model run this task by default, and train only this one; the others get no gradient and no step.

    Of the parameters of all branches exactly those of this task are trained which the graph says are trained; the
    gradients of the others are dropped, so that no optimizer moves them. None takes the default away: every branch is
    trained again. A module put in the place of a branch (`switch.a = other`) runs wherever that one was chosen, but by
    what other threads have chosen; parameters that the graph does not know keep their `requires_grad`.

    Returns:
        The model.

    Raises:
        GraphError: the model has no `Switch`, or no such task; its tasks are listed.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> switch = ag.Switch({"a": ag.Bottleneck(2), "b": ag.Bottleneck(2)})
    >>> model = ag.Graph(ag.dense(x, 8, name="fc")).freeze().splice("fc", switch).compile()
    >>> [n for n, p in ag.set_task(model, "b").named_parameters() if p.requires_grad][:2]
    ['fc.adapter.b.down.weight', 'fc.adapter.b.down.bias']
    """
    switches = _switches(model)
    if task is not None and not isinstance(task, str):
        raise GraphError(f"set_task takes the name of one task, not {task!r}", source=here())
    for switch in switches:
        if task is not None:
            _choice(switch, task)
    trained = graph_of(model).trained
    for switch in switches:
        switch.be_default(task)
        for name, parameter in switch.named_parameters():
            known = trained.get(f"{switch.adaptergraph_path}.{name}")
            if known is None:
                continue
            parameter.requires_grad_(known and (task is None or name.startswith(task + ".")))
            if not parameter.requires_grad:
                parameter.grad = None
    return model


def _switches(model: nn.Module) -> list[Switch]:
    refuse_no_model(model)
    found = [m for m in model.modules() if isinstance(m, Switch)]
    if not found:
        raise _no_tasks(model)
    return found


def _no_tasks(model: nn.Module) -> GraphError:
    return GraphError(
        f"this {type(model).__name__} has no Switch, so there is no task to choose",
        source=here(),
        hint='graph.splice(at, ag.Switch({"a": …, "b": …}))',
    )


def _choice(switch: Switch, task: Any) -> nn.Module | Rows:
    """What a choice means for one switch."""
    if isinstance(task, str):
        return _branch(switch, task)
    if not isinstance(task, list | tuple) or not task or not all(isinstance(t, str) for t in task):
        raise GraphError(f"a task is a name, or a list with one name for each row, not {task!r}", source=here())
    for name in dict.fromkeys(task):
        _branch(switch, name)
    names = list(switch._modules)
    return Rows(tuple(task), torch.tensor([names.index(t) for t in task]))


def _branch(switch: Switch, task: str) -> nn.Module:
    branch = switch._modules.get(task)
    if branch is None:
        raise GraphError(
            f"there is no task {task!r} at {switch.adaptergraph_path!r}",
            node=switch.adaptergraph_path,
            sides=[("tasks", ", ".join(switch._modules))],
            source=here(),
            hint=suggestion(task, switch._modules),
        )
    return branch


# ---------------------------------------------------------------------- the root of a model


class _OwnArguments(inspect.Signature):
    """The arguments of a model's own forward, for what binds a call to them beforehand, as `torch.export` does."""

    def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        if "task" in kwargs and not any(p.kind is p.VAR_KEYWORD for p in self.parameters.values()):
            raise GraphError(
                "task= is no argument of the model's own forward, which is what is asked for here",
                source=here(),
                hint="ag.set_task(model, …) before, or with ag.task(model, …) around this call",
            )
        return super().bind(*args, **kwargs)


class Tasked:
    """What the root of a model with a `Switch` can do beside its own class: `model(…, task="a")` and these."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        forward: Any = vars(cls)["forward"]
        signature = inspect.signature(forward)
        forward.__signature__ = _OwnArguments(
            list(signature.parameters.values()), return_annotation=signature.return_annotation
        )

    def task(self: Any, task: str | Sequence[str]) -> AbstractContextManager[None]:
        """See `ag.task`."""
        return _Block(self, task)

    def set_task(self: Any, task: str | None) -> nn.Module:
        """See `ag.set_task`."""
        return set_task(self, task)


class Refused:
    """The same for a root that uses these words itself."""

    def task(self: Any, task: Any = None) -> Any:
        """Refused: see `ag.task`."""
        raise _own_words(self, "task")

    def set_task(self: Any, task: Any = None) -> Any:
        """Refused: see `ag.set_task`."""
        raise _own_words(self, "set_task")


def _own_words(model: nn.Module, word: str) -> GraphError:
    return GraphError(
        f"this {type(model).__name__} has an argument or attribute 'task' or 'set_task' of its own",
        source=here(),
        hint=f"ag.{word}(model, …) does the same",
    )


def give_tasks(model: nn.Module) -> None:
    """Lets the root of a model with a `Switch` take `task=`, unless it uses the word itself."""
    own = "task" in inspect.signature(model.forward).parameters or any(hasattr(model, w) for w in ("task", "set_task"))
    record = attachment(model)
    if record is not None and plan_of(model) is None:
        record.hosts.append("")
    plan = host(model, Refused if own else Tasked)
    plan.around = None if own else task_argument


def task_argument(model: nn.Module, given: dict[str, Any]) -> AbstractContextManager[None]:
    """Takes `task=` from the arguments of a call of the model."""
    chosen = given.pop("task", None)
    return nullcontext() if chosen is None else _Chosen(model, chosen)


def refuse_tasks(model: nn.Module) -> None:
    """Lets a hosted model without a `Switch` refuse `task=` where its forward would swallow it without a word."""
    record = attachment(model)
    if record is None or not record.graph.bodies:
        return
    forwards = {id(vars(type(m)).get("forward", m)): m.forward for m in model.modules()}
    takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    if takes_more and not any("task" in inspect.signature(f).parameters for f in forwards.values()):
        record.hooked.append(model.register_forward_pre_hook(_refuse_task, with_kwargs=True))


def _refuse_task(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if "task" in kwargs:
        raise _no_tasks(model)


# ---------------------------------------------------------------------- graphs


def has_switch(graph: Graph) -> bool:
    """Whether a task can be chosen."""
    return any(node.op == "switch" for node in graph.nodes())


def only_task(graph: Graph, task: str) -> Graph:
    """The graph whose switches have this task only; what is left keeps its name.

    Raises:
        GraphError: there is no `Switch`, or one without this task.
    """
    switches = {n: node for n, node in graph._nodes.items() if node.op == "switch"}
    if not switches:
        raise GraphError(
            "the graph has no Switch, so there is no task to compile", source=here(), hint="leave task= out"
        )
    gone: set[str] = set()
    changed = {}
    for name, node in switches.items():
        tasks = node.options["tasks"]
        if task not in tasks:
            raise GraphError(
                f"there is no task {task!r} at {node.body!r}",
                node=node.body,
                sides=[("tasks", ", ".join(tasks))],
                source=here(),
                hint=suggestion(task, tasks),
            )
        below = tuple(f"{node.body}.{t}." for t in tasks if t != task)
        gone |= {n for n, other in graph._nodes.items() if other.body == node.body and n.startswith(below)}
        x, branch = node.inputs[0], node.inputs[1 + tasks.index(task)]
        changed[name] = replace(node, inputs=(x, branch), options={"tasks": (task,)})
    nodes = {n: changed.get(n, node) for n, node in graph._nodes.items() if n not in gone}
    bodies = {node.body for node in switches.values()}
    splices = [
        replace(s, method=type(s.method)({task: s.method.branches[task]}))
        if any(body_name(host, s.name) in bodies for host in s.hosts) and hasattr(s.method, "branches")
        else s
        for s in graph.splices
    ]
    lost = {p for n in gone for p in graph._nodes[n].param_names()}
    overrides = {p: t for p, t in graph._overrides.items() if p not in lost}
    return graph._with(nodes=nodes, splices=tuple(splices), overrides=overrides)
