"""The same adapters written by hand into a model's own forwards: no hosting code of the library is used here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from models import Case
from torch import Tensor, nn

import adaptergraph as ag


def lora(site: ag.Site) -> ag.Node:
    """A method that reads the host's input."""
    return site.output + ag.dense(ag.dense(site.input, 4, name="a"), site.output.shape[-1], name="b")


class Body(nn.Module):
    """A bottleneck, or with `around` a low-rank product on the host's input; counts its calls."""

    def __init__(self, compiled: nn.Module, around: bool = False) -> None:
        super().__init__()
        self.calls = 0
        self.around = around
        first, last = ("a", "b") if around else ("down", "up")
        self.first = _linear(compiled.get_submodule(first))
        self.last = _linear(compiled.get_submodule(last))

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        self.calls += 1
        if self.around:
            return x + self.last(self.first(given))
        return x + on_features(self.first.in_features, x, lambda h: self.last(torch.relu(self.first(h))))

    def values(self) -> list[Tensor]:
        """Its parameters in the order of the compiled body's."""
        return [*self.first.parameters(), *self.last.parameters()]


def on_features(size: int, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of the last dimension on the features, which images have before the places."""
    if x.shape[-1] == size:
        return function(x)
    return function(x.movedim(1, -1)).movedim(-1, 1)


def _linear(other: Any) -> nn.Linear:
    own = nn.Linear(other.in_features, other.out_features).to(other.weight.dtype)
    own.load_state_dict(other.state_dict())
    return own


def randomise(adapted: nn.Module, deviation: float = 0.5) -> nn.Module:
    """Large random values in every body of a compiled model."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in ag.graph_of(adapted).bodies:
            for parameter in adapted.get_submodule(name).parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return adapted


def modified(case: Case, adapted: nn.Module, around: bool = False) -> tuple[nn.Module, dict[str, Body]]:
    """The case's model with the bodies of an adapted one written into it, and these bodies by name."""
    graph = ag.graph_of(adapted)
    model = case.model()
    own = dict(adapted.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(own[name].requires_grad)
    bodies = {}
    for name, body in graph.bodies.items():
        bodies[name] = Body(adapted.get_submodule(name), around)
        write_in(model.get_submodule(body.host), bodies[name])
    return model, bodies


def write_in(module: nn.Module, body: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replaces a module's forward by one that also runs a body on the first float tensor of the output."""
    old = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = old(*args, **kwargs)
        given = args[0] if args else next(iter(kwargs.values()))
        return on_first_float(output, lambda value: body(value, given))

    module.forward = forward


def on_first_float(output: Any, body: Callable[[Tensor], Tensor]) -> Any:
    """The output with its first float tensor replaced."""
    if isinstance(output, Tensor):
        return body(output)
    if isinstance(output, Mapping):
        name = next(k for k, v in output.items() if isinstance(v, Tensor) and v.is_floating_point())
        output[name] = body(output[name])
        return output
    if isinstance(output, tuple):
        at = next(i for i, v in enumerate(output) if isinstance(v, Tensor) and v.is_floating_point())
        return (*output[:at], body(output[at]), *output[at + 1 :])
    first = dataclasses.fields(output)[0].name
    return dataclasses.replace(output, **{first: body(getattr(output, first))})


def count_calls(adapted: nn.Module) -> dict[str, list[int]]:
    """From now on, how often each host and its body run: `{body: [host, body]}`."""
    counts: dict[str, list[int]] = {}
    for name, body in ag.graph_of(adapted).bodies.items():
        counts[name] = [0, 0]
        host = re.split("[@/:]", body.host)[0]
        for i, module in enumerate((adapted.get_submodule(host), adapted.get_submodule(name))):
            module.register_forward_pre_hook(_counter(counts[name], i))
    return counts


def _counter(counts: list[int], index: int) -> Callable[..., None]:
    def count(module: nn.Module, args: Any) -> None:
        counts[index] += 1

    return count
