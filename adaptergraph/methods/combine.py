"""Methods that combine methods at one site: in sequence, added, fused by attention, one per task. Floor 3.

A branch is any method or callable `site -> Node`; its nodes are named below the branch. What a branch contributes is
what its `contribution(site)` gives, or else its result minus the site's value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, replace
from typing import Any, ClassVar, Literal

from .. import layers
from ..collect import unnamed
from ..errors import BadSplice, GraphError, ShapeMismatch, here
from ..features import axis_of
from ..layers import choice
from ..layers.calls import check_rate
from ..layers.initializers import INITIALIZERS
from ..names import check_name
from ..node import Node, format_shape
from ..splicing.site import Site, made
from ..splicing.surgery import method_of
from .base import method


class Branches(Mapping[str, Any]):
    """Methods by name, in the order they were given; never changes."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


class _Combination:
    """What all combinations share: their branches by name, where they stand, what of them starts frozen."""

    branches: Any

    @property
    def where(self) -> str:
        """Around its host if one of its branches is."""
        around = any(getattr(m, "where", "after") == "around" for m in self.branches.values())
        return "around" if around else "after"

    @property
    def frozen(self) -> tuple[str, ...]:
        """The parts of a body that start frozen, as paths below it."""
        return tuple(f"{n}.{part}" for n, m in self.branches.items() for part in getattr(m, "frozen", ()))


class _Numbered(_Combination):
    methods: Any

    @property
    def branches(self) -> Mapping[str, Any]:
        """The methods by their number, which their nodes are below."""
        return {str(i): m for i, m in enumerate(self.methods)}


@method
class Stack(_Numbered):
    """Methods in sequence: each sees the value that the one before it gives. Their nodes are below `0`, `1`, …

    Raises:
        GraphError: there is no method, or something is none.

    >>> import adaptergraph as ag
    >>> ag.Stack(ag.Bottleneck(8), ag.Bottleneck(4))
    Stack(Bottleneck(8), Bottleneck(4))
    """

    methods: Any = ()

    several: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _set(self, methods=_several(self))

    def apply(self, site: Site) -> Node:
        """The value after all of them."""
        for name, branch in self.branches.items():
            site = replace(site, output=_below(_result(self, branch, name, site), name, site))
        return site.output


@method
class Sum(_Numbered):
    """Methods side by side: `x + Σ weight · contribution(x)`. Their nodes are below `0`, `1`, …

    Args:
        methods: by position; each sees the same x.
        weights: a number for each method; None for ones.

    Raises:
        GraphError: there is no method, something is none, or there are not as many weights as methods.

    >>> import adaptergraph as ag
    >>> ag.Sum(ag.Bottleneck(8), ag.Bottleneck(4), weights=(0.5, 2.0))
    Sum(Bottleneck(8), Bottleneck(4), weights=(0.5, 2.0))
    """

    methods: Any = ()
    _: KW_ONLY
    weights: Any = None

    several: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _set(self, methods=_several(self))
        if self.weights is None:
            return
        numbers = isinstance(self.weights, tuple | list) and all(map(_is_number, self.weights))
        if not numbers or len(self.weights) != len(self.methods):
            raise GraphError(
                f"the weights of Sum are one number for each of its {len(self.methods)} methods, not {self.weights!r}",
                source=here(),
            )
        _set(self, weights=tuple(map(float, self.weights)))

    def apply(self, site: Site) -> Node:
        """The site's value plus all contributions."""
        return layers.add([site.output, *self._parts(site)], name="residual")

    def contribution(self, site: Site) -> Node:
        """The weighted sum of what the methods contribute."""
        first, *more = self._parts(site)
        return layers.add([first, *more], name="sum") if more else first

    def _parts(self, site: Site) -> list[Node]:
        parts = [_below(_contribution(self, m, n, site), n, site) for n, m in self.branches.items()]
        for i, weight in enumerate(self.weights or ()):
            factor = layers.constant(weight, name=f"{i}.weight")
            parts[i] = layers.multiply([parts[i], factor], name=f"{i}.weighted")
        return parts


@method
class Fusion(_Combination):
    """AdapterFusion (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247): attention over adapters at one place.

    With `u_i` what adapter i contributes, without its residual: `x + Σ a_i · value(u_i)`, where
    `a = softmax(query(x) · key(u_i) / (√d · temperature))` over the adapters. The adapters start frozen, as in the
    paper: train them first, read them with `ag.load_branch`, then train the fusion. All shapes are `… × d`.

    The nodes are those of the adapters below their names, then `stacked`, `query`, `key`, `value`, `temperature`,
    `scores`, `weights`, `fused` and `residual`.

    Args:
        branches: the adapters by name, such as `{"sst2": ag.Bottleneck(16)}`.
        dropout: of the scores, before the softmax, while training.
        temperature: `"learned"`, one parameter that starts at one, or a fixed number.
        scaled: divide the scores by √d.
        init: deviation of the query's and key's normal starting values; None for torch's own.
        value_init: how the value's weight starts: a name of an initializer; it has no bias.

    Raises:
        GraphError: an option is unknown or cannot be right, or a name cannot be used.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> graph = ag.Graph(ag.dense(x, 8, name="fc")).freeze()
    >>> fused = graph.splice("fc", ag.Fusion({"a": ag.Bottleneck(2), "b": ag.Bottleneck(2)}), name="fusion")
    >>> [name for name, trained in fused.trained.items() if trained]
    ['fc.fusion.query.weight', ..., 'fc.fusion.temperature', 'fc.fusion.value.weight']
    """

    branches: Any
    _: KW_ONLY
    dropout: float = 0.0
    temperature: float | Literal["learned"] = "learned"
    scaled: bool = True
    init: float | None = None
    value_init: str = "identity"

    OWN: ClassVar[tuple[str, ...]] = (
        *("stacked", "query", "key", "value", "temperature", "scores", "dropout", "weights", "fused", "residual"),
    )

    def __post_init__(self) -> None:
        _set(self, branches=_named(self, self.OWN))
        check_rate(self.dropout)
        if self.temperature != "learned" and not 0 < self.temperature < math.inf:
            raise GraphError(
                f"a temperature is a positive number or 'learned', not {self.temperature!r}", source=here()
            )
        if self.init is not None and self.init <= 0:
            raise GraphError(f"init is a deviation greater than zero or None, not {self.init!r}", source=here())
        if self.value_init not in INITIALIZERS:
            raise GraphError(
                f"unknown value_init {self.value_init!r}", source=here(), hint="one of: " + ", ".join(INITIALIZERS)
            )

    @classmethod
    def adapterhub(cls, branches: Mapping[str, Any], dropout: float = 0.1) -> Fusion:
        """The arithmetic of AdapterHub's default fusion: no 1/√d, temperature 1, dropout on the scores.

        Query and key start N(0, 0.02) with zero biases, the value at the identity with 1e-6 beside the diagonal.

        Not copied: the host's layer norm around the adapters and before the query (splice where you want it), the
        penalty on the value's distance to the identity (add it to your loss), and the temperature that falls with every
        call from 50 to 1 and that no checkpoint holds.

        >>> import adaptergraph as ag
        >>> ag.Fusion.adapterhub({"a": ag.Bottleneck(2)}).scaled
        False
        """
        options: dict[str, Any] = {"temperature": 1.0, "scaled": False, "init": 0.02, "value_init": "near_identity"}
        return cls(branches, dropout=dropout, **options)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Its adapters: only the fusion itself is trained."""
        return tuple(self.branches)

    def apply(self, site: Site) -> Node:
        """The site's value plus the fused contributions."""
        return layers.add([site.output, self.contribution(site)], name="residual")

    def contribution(self, site: Site) -> Node:
        """What the adapters contribute, weighted by attention."""
        x = site.output
        size = (x.shape or (None,))[-1]
        if axis_of(x) != len(x.shape or ()) - 1:
            raise ShapeMismatch(
                f"Fusion needs a host whose features are last; those of {site.name!r} are in dimension {axis_of(x)}",
                node=site.name,
                sides=[("host", site.name, format_shape(x.shape))],
                source=site.source,
                hint="splice it at a layer that gives batch × … × features",
            )
        if not isinstance(size, int):
            raise ShapeMismatch(
                f"Fusion needs a host whose last size is known; {site.name!r} gives {format_shape(x.shape)}",
                node=site.name,
                source=site.source,
                hint="splice it where the last size is a number",
            )
        parts = [_below(_contribution(self, m, n, site), n, site) for n, m in self.branches.items()]
        stacked = choice.stack(parts, name="stacked")
        bias_init = None if self.init is None else "zeros"
        query = layers.dense(x, size, weight_init=self.init, bias_init=bias_init, name="query")
        key = layers.dense(stacked, size, weight_init=self.init, bias_init=bias_init, name="key")
        value = layers.dense(stacked, size, bias=False, weight_init=self.value_init, name="value")
        scale = 1 / math.sqrt(size) if self.scaled else 1.0
        learned = None
        if self.temperature == "learned":
            learned = layers.param("temperature", (1,), init="ones", dtype=x.dtype)
        else:
            scale /= self.temperature
        scores = choice.scores(query, key, temperature=learned, scale=scale, name="scores")
        if self.dropout:
            scores = layers.dropout(scores, rate=self.dropout, name="dropout")
        return choice.mix(layers.softmax(scores, name="weights"), value, name="fused")


@method
class Switch(_Combination):
    """One method for each task; which one runs is said when the model is called, see `ag.task`.

    The nodes are those of the branches below the names of the tasks, then `switch`, which gives one of them; the keys
    are `<host>.<name>.<task>.…`. Only the chosen branch runs. Every branch gives what the site is: `… × d`.

    Raises:
        GraphError: a name cannot be used, something is no method, or a branch is a `Switch` itself.

    >>> import adaptergraph as ag, torch
    >>> x = ag.input("x", shape=("batch", 8))
    >>> graph = ag.Graph(ag.dense(x, 8, name="fc")).freeze()
    >>> model = graph.splice("fc", ag.Switch({"a": ag.Bottleneck(2), "b": ag.Bottleneck(4)})).compile()
    >>> model(torch.ones(3, 8), task="a").shape
    torch.Size([3, 8])
    """

    branches: Any

    def __post_init__(self) -> None:
        _set(self, branches=_named(self, ("switch",)))

    def apply(self, site: Site) -> Node:
        """The switch over all branches."""
        results = [_below(_result(self, m, n, site), n, site) for n, m in self.branches.items()]
        return choice.switch(site.output, results, tasks=tuple(self.branches), name="switch")


# ---------------------------------------------------------------------- checking


def _set(combination: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(combination, name, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _several(combination: Any) -> tuple[Any, ...]:
    kind, given = type(combination).__name__, combination.methods
    if not isinstance(given, tuple | list) or not given:
        raise GraphError(
            f"{kind} takes one or more methods, not {given!r}",
            source=here(),
            hint=f"{kind}(ag.Bottleneck(16), ag.Bottleneck(8))",
        )
    for value in given:
        _check_method(kind, value)
    return tuple(given)


def _named(combination: Any, own: tuple[str, ...]) -> Branches:
    kind, given = type(combination).__name__, combination.branches
    if not isinstance(given, Mapping) or not given:
        raise GraphError(
            f"{kind} takes methods by name, not {given!r}", source=here(), hint=f'{kind}({{"a": ag.Bottleneck(16)}})'
        )
    for name, value in given.items():
        if "." in check_name(name, here()) or name in own:
            why = "it is one word" if "." in name else f"{kind} has a node of that name itself"
            raise GraphError(f"a branch of {kind} cannot be called {name!r}: {why}", node=name, source=here())
        _check_method(kind, value)
    return Branches(given)


def _check_method(kind: str, value: Any) -> None:
    hint = method_of(value)
    if hint is not None or not callable(getattr(value, "apply", value)):
        if isinstance(value, list | tuple | Mapping):
            inside = value.values() if isinstance(value, Mapping) else value
            hint = f"one after the other, without brackets: {kind}({', '.join(map(repr, inside))})"
        raise GraphError(f"{kind} takes methods or callables site -> Node, not {value!r}", source=here(), hint=hint)
    if isinstance(value, Switch):
        raise GraphError(
            f"a Switch cannot be inside {kind}: tasks are chosen for a whole site",
            source=here(),
            hint=f'put {kind} inside: Switch({{"a": {kind}(…)}}), or splice twice',
        )


# ---------------------------------------------------------------------- branches as nodes


def _result(combination: Any, branch: Any, name: str, site: Site) -> Node:
    return _fitting(combination, getattr(branch, "apply", branch), name, site)


def _contribution(combination: Any, branch: Any, name: str, site: Site) -> Node:
    """What a branch adds to the site's value."""
    own = getattr(branch, "contribution", None)
    if own is not None:
        return _fitting(combination, own, name, site)
    return layers.subtract([_result(combination, branch, name, site), site.output], name="contribution")


def _fitting(combination: Any, apply: Callable[[Site], Any], name: str, site: Site) -> Node:
    kind, result = type(combination).__name__, apply(site)
    if not isinstance(result, Node) or result.graph is not None or result is site.output:
        what = "added no node" if isinstance(result, Node) else f"returned {result!r}, not a node"
        raise BadSplice(
            f"branch {name!r} of {kind} at {site.name!r} {what}",
            node=site.name,
            source=site.source,
            hint="a branch returns a node that it made from site.output",
        )
    if (result.shape, result.dtype) != (site.output.shape, site.output.dtype):
        raise ShapeMismatch(
            f"branch {name!r} of {kind} does not fit its host",
            node=site.name,
            sides=[
                ("host", site.name, format_shape(site.output.shape), str(site.output.dtype)),
                ("branch", name, format_shape(result.shape), str(result.dtype)),
            ],
            source=site.source,
            hint=f"end the branch with the shape of its host: {format_shape(site.output.shape)}",
        )
    return result


def _below(result: Node, prefix: str, site: Site) -> Node:
    """The same nodes with their names below a prefix; what leads to the site's value is another branch, and stays."""
    new = {} if site.output.graph is not None else {id(node): node for node in made(site.output)}
    order = made(result)
    counts: dict[str, int] = {}
    taken = {node.name for node in order}
    for node in order:
        if id(node) not in new:
            name = node.name or unnamed(node.op, counts, taken)
            taken.add(name)
            inputs = tuple(new.get(id(i), i) for i in node.inputs)
            new[id(node)] = replace(node, name=f"{prefix}.{name}", inputs=inputs)
    return new[id(result)]
