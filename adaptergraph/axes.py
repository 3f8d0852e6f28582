"""Which dimension of a value holds its features, told from the operations that made it and read it. Floor 2.

A dimension is counted from the end, -1 for the last: so it is the same with and without a batch before it. Each torch
function has a rule: it says where the features are (a convolution, a linear layer), or hands on what it got, moved or
not; of any other nothing is known. What is not known yet is told by those who read it.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Key: TypeAlias = Any
# for each dimension of a value the one of the result that it becomes, or None; None for all as they are
Way: TypeAlias = "Sequence[int | None] | None"
_CONVOLUTION = re.compile(r"conv(?:_transpose)?([123])d")


class Axes:
    """The dimensions of the features of all values of one run; a value is whatever a key stands for."""

    def __init__(self) -> None:
        self.known: dict[Key, int] = {}
        # values of which nothing is known, what was made of them, and how their dimensions moved
        self.links: list[tuple[Key, Key, Way]] = []
        # products of values: how many links there were before, what was made, and of what
        self.products: list[tuple[int, Key, Sequence[tuple[Key, Way]]]] = []
        self.asked: dict[Key, set[int]] = {}
        # the first value of each convolution
        self.convolutions: list[Key] = []

    def follow(
        self, op: str, args: Any, kwargs: Any, outs: Sequence[tuple[Key, Tensor]], key: Callable[[Tensor], Key]
    ) -> None:
        """An operation gave tensors.

        Args:
            outs: these tensors and what stands for each.
            key: what stands for a tensor that it was given; None for one that is no value, such as a parameter.
        """
        rule = rule_of(op)
        if rule is not None and outs:
            # of a call in a form that its rule does not know, nothing is known either
            with suppress(TypeError, ValueError, IndexError, AttributeError):
                rule(_Event(self, args, kwargs, outs, key))

    def hand_on(self, source: Key, result: Key, way: Way = None) -> None:
        """A value was made of another one, its dimensions moved in this way."""
        axis = self.known.get(source)
        if axis is None:
            if source is not None:
                self.links.append((source, result, way))
            return
        moved = axis if way is None else way[axis]
        if moved is not None:
            self.known[result] = moved

    def ask(self, value: Key, axis: int) -> None:
        """Somebody reads a value as one with its features there."""
        if value is not None and value not in self.known:
            self.asked.setdefault(value, set()).add(axis)

    def settle(self) -> None:
        """Tells what is not known yet from those who read it, if they agree."""
        ways: dict[Key, list[tuple[Key, Way, bool]]] = {}
        for source, result, way in self.links:
            ways.setdefault(source, []).append((result, way, True))
            ways.setdefault(result, []).append((source, way, False))
        found: dict[Key, set[int]] = {}
        waiting = [(value, axis) for value, asked in self.asked.items() for axis in asked]
        while waiting:
            value, axis = waiting.pop()
            if value in self.known or axis in found.setdefault(value, set()):
                continue
            found[value].add(axis)
            for other, way, onward in ways.get(value, ()):
                moved = axis if way is None else way[axis] if onward else _back(way, axis)
                if moved is not None:
                    waiting.append((other, moved))
        self.known.update((value, next(iter(axes))) for value, axes in found.items() if len(axes) == 1)

    def product(self, result: Key, factors: Sequence[tuple[Key, Way]]) -> None:
        """A value was made of several, with the dimensions of each that are still there; nobody knows the features."""
        if all(key is not None for key, _ in factors):
            self.products.append((len(self.links), result, factors))

    def assume_last(self) -> set[Key]:
        """Lets values of which nobody told have their features last, and follows these from there.

        Returns:
            what has no features: products that sum up those of all factors, such as the scores of attention, and what
            was made of one.
        """
        events = [*self.products, *((n, result, [(source, way)]) for n, (source, result, way) in enumerate(self.links))]
        made: dict[Key, list[tuple[Key, Way]]] = {}
        for _, result, factors in sorted(events, key=lambda event: event[0]):
            made.setdefault(result, []).extend(factors)
        products, without = {result for _, result, _ in self.products}, set[Key]()
        for result, factors in made.items():
            given = [(self.known.get(key, -1), way) for key, way in factors if key not in without]
            left = {axis if way is None else way[axis] for axis, way in given} - {None}
            lost = not left if result in products else len(given) < len(factors)
            if result not in self.known and lost:
                without.add(result)
            elif result not in self.known and len(left) == 1:
                self.known[result] = left.pop()  # type: ignore[assignment]
        return without


class Following(TorchFunctionMode):
    """Follows the features through what is run in it."""

    def __init__(self) -> None:
        super().__init__()
        self.axes = Axes()
        self.given: list[Key] = []
        # a number for each value of a tensor, and the tensors, so that their ids stay their own
        self.values: dict[int, tuple[int, Tensor]] = {}
        self.count = itertools.count()

    def starts(self, tensor: Tensor, axis: int | None) -> None:
        """A tensor that is there before."""
        key = next(self.count)
        self.given.append(key)
        self.values[id(tensor)] = key, tensor
        if axis is not None:
            self.axes.known[key] = axis

    def axis(self, tensor: Tensor) -> int | None:
        """Where a tensor has its features."""
        return self.axes.known.get(self.key(tensor))

    def key(self, tensor: Tensor) -> Key:
        """What stands for a tensor; None for a parameter."""
        return self.values.get(id(tensor), (None,))[0]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outs = [t for t in (result if isinstance(result, list | tuple) else (result,)) if isinstance(t, Tensor)]
        new = [(next(self.count), t) for t in outs]
        self.axes.follow(op_name(func), args, kwargs or {}, new, self.key)
        self.values.update((id(t), (key, t)) for key, t in new)
        return result


_NO_WORD = re.compile(r"\W+")


def op_name(func: Any) -> str:
    """What an operation is called in a graph."""
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "get")
    return _NO_WORD.sub("_", name.strip("_") if name.startswith("__") else name) or "op"


def _back(way: Sequence[int | None], axis: int) -> int | None:
    """Which dimension became this one."""
    return way.index(axis) - len(way) if axis in way else None


class _Event:
    """One operation as its rule sees it."""

    __slots__ = ("args", "axes", "key", "kwargs", "outs")

    def __init__(self, axes: Axes, args: Any, kwargs: Any, outs: Any, key: Any) -> None:
        self.axes, self.args, self.kwargs, self.outs, self.key = axes, args, kwargs, outs, key

    @property
    def x(self) -> Tensor | None:
        """The tensor that it works on."""
        given = self.args[0] if self.args else self.kwargs.get("input")
        return given if isinstance(given, Tensor) else None

    @property
    def rank(self) -> int:
        """How many dimensions its result has."""
        return self.outs[0][1].dim()

    def option(self, position: int, *names: str) -> Any:
        """An argument by its position or name."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), None)

    def given(self) -> Iterator[Tensor]:
        """The tensors among its arguments, also those in a list."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, list | tuple):
                yield from (item for item in value if isinstance(item, Tensor))

    def axis(self, tensor: Tensor | None) -> int | None:
        """Where a tensor that it was given has its features."""
        return None if tensor is None else self.axes.known.get(self.key(tensor))

    def says(self, axis: int) -> None:
        """All results have their features there."""
        for key, tensor in self.outs:
            if tensor.dim() >= -axis:
                self.axes.known[key] = axis

    def reads(self, tensor: Any, axis: int) -> None:
        """It reads a tensor as one with its features there."""
        if isinstance(tensor, Tensor) and tensor.dim() >= -axis:
            self.axes.ask(self.key(tensor), axis)

    def hands_on(self, tensor: Tensor | None, way: Way = None) -> None:
        """All results have their features where this tensor has them."""
        source = None if tensor is None else self.key(tensor)
        if source is not None:
            for key, _ in self.outs:
                self.axes.hand_on(source, key, way)

    def agree(self, tensors: Iterator[Tensor], way: Way = None) -> None:
        """The result has its features where all of several tensors have them, as far as that is known."""
        keys = [key for t in tensors if (key := self.key(t)) is not None]
        known = {axis for key in keys if (axis := self.axes.known.get(key)) is not None}
        if len(known) > 1:
            return
        for key in keys:
            for axis in known:
                self.axes.ask(key, axis)
            if (key in self.axes.known) == bool(known):
                for out, _ in self.outs:
                    self.axes.hand_on(key, out, way)


Rule = Callable[[_Event], None]

# ---------------------------------------------------------------------- what leaves the dimensions as they are


def _same(event: _Event) -> None:
    x = event.x
    if x is not None and x.dim() == event.rank:
        event.hands_on(x)


def _spread(event: _Event) -> None:
    """New dimensions come in front."""
    event.hands_on(event.x)


def _pointwise(event: _Event) -> None:
    """Each number is computed from those at its place; where features are spread over places they are none."""
    axes, shape = event.axes, event.outs[0][1].shape
    found, alike = set(), []
    for tensor in event.given():
        key = event.key(tensor)
        if key is None:
            continue
        axis = axes.known.get(key)
        if axis is None:
            if tensor.shape == shape:
                alike.append(key)
        elif tensor.shape[axis] == shape[axis]:
            found.add(axis)
    if len(found) == 1:
        axis = found.pop()
        event.says(axis)
        for key in alike:
            axes.ask(key, axis)
    elif not found:
        for key in alike:
            axes.links += ((key, out, None) for out, _ in event.outs)


def _joined(event: _Event) -> None:
    event.agree(event.given())


# ---------------------------------------------------------------------- what says where they are


def _last(event: _Event) -> None:
    event.says(-1)


def _linear(event: _Event) -> None:
    event.reads(event.x, -1)
    event.says(-1)


def _attention(event: _Event) -> None:
    for tensor in event.args[:3]:
        event.reads(tensor, -1)
    event.says(-1)


def _attention_layer(event: _Event) -> None:
    for tensor in event.args[:3]:
        event.reads(tensor, -1)
    event.axes.known[event.outs[0][0]] = -1


def _convolution(axis: int, event: _Event) -> None:
    event.reads(event.x, axis)
    event.says(axis)
    event.axes.convolutions.append(event.outs[0][0])


def _channel_norm(event: _Event) -> None:
    """Batch × channels × places, where nobody knows better."""
    x = event.x
    if x is not None and event.axis(x) is None and x.dim() > 1:
        event.reads(x, 1 - x.dim())
        event.says(1 - x.dim())
    else:
        event.hands_on(x)


def _layer_norm(event: _Event) -> None:
    x, sizes = event.x, event.option(1, "normalized_shape")
    if event.axis(x) is None and isinstance(sizes, list | tuple) and len(sizes) == 1:
        event.reads(x, -1)
        event.says(-1)
    else:
        event.hands_on(x)


def _shuffle(event: _Event) -> None:
    """Places into channels or back; both are where a convolution has them."""
    if event.axis(event.x) is None:
        event.reads(event.x, -3)
        event.says(-3)
    else:
        event.hands_on(event.x)


def _unfold(event: _Event) -> None:
    """Windows: of one dimension, in a new last one; or of images, in one with the channels."""
    x = event.x
    if x is None:
        return
    if event.rank == x.dim() + 1:
        cut = event.option(1, "dimension")
        event.hands_on(x, [None if i == cut % x.dim() else i - x.dim() - 1 for i in range(x.dim())])
    else:
        event.reads(x, -3)
        event.says(-2)


def _fold(event: _Event) -> None:
    event.reads(event.x, -2)
    event.says(-3)


# ---------------------------------------------------------------------- what moves dimensions


def _permuted(event: _Event, order: Sequence[int]) -> None:
    """The result has the dimensions in this order."""
    rank, way = len(order), [None] * len(order)
    for place, dim in enumerate(order):
        way[dim % rank] = place - rank  # type: ignore[call-overload]
    event.hands_on(event.x, way)


def _permute(event: _Event) -> None:
    dims = event.option(1, "dims")
    order = dims if isinstance(dims, list | tuple) else event.args[1:]
    if len(order) == event.rank:
        _permuted(event, order)


def _swap(event: _Event) -> None:
    one, other = event.option(1, "dim0", "axis0"), event.option(2, "dim1", "axis1")
    order = list(range(event.rank))
    order[one], order[other] = order[other], order[one]
    _permuted(event, order)


def _swap_last(event: _Event) -> None:
    rank = event.rank
    _permuted(event, range(rank) if rank < 2 else (*range(rank - 2), rank - 1, rank - 2))


def _reverse(event: _Event) -> None:
    _permuted(event, range(event.rank)[::-1])


def _move(event: _Event) -> None:
    rank, ends = event.rank, (event.option(1, "source"), event.option(2, "destination"))
    source, destination = ([d % rank for d in (e if isinstance(e, list | tuple) else (e,))] for e in ends)
    order = [d for d in range(rank) if d not in source]
    for to, dim in sorted(zip(destination, source, strict=True)):
        order.insert(to, dim)
    _permuted(event, order)


def _reshape(event: _Event) -> None:
    """A dimension is still there where as many numbers are in it, and behind it, as before."""
    x = event.x
    if x is None:
        return
    before, after = tuple(x.shape), tuple(event.outs[0][1].shape)
    event.hands_on(x, None if before == after else _survivors(before, after))


def _survivors(before: Sequence[int], after: Sequence[int]) -> Way:
    ends = [[(size, math.prod(shape[i + 1 :])) for i, size in enumerate(shape)] for shape in (before, after)]
    once = [end if ends[0].count(end) == ends[1].count(end) == 1 else None for end in ends[0]]
    return [None if end is None else ends[1].index(end) - len(after) for end in once]


def _unsqueeze(event: _Event) -> None:
    x, rank = event.x, event.rank
    if x is not None:
        new = event.option(1, "dim") % rank
        event.hands_on(x, [i - rank if i < new else i + 1 - rank for i in range(rank - 1)])


def _stack(event: _Event) -> None:
    rank = event.rank
    new = (event.option(1, "dim") or 0) % rank
    event.agree(event.given(), [i - rank if i < new else i + 1 - rank for i in range(rank - 1)])


def _without(event: _Event, dims: Sequence[int]) -> None:
    """The result lacks these dimensions, or has one number in each."""
    x = event.x
    if x is None:
        return
    gone, way, place = {d % x.dim() for d in dims}, list[int | None](), 0
    kept = event.rank == x.dim()
    for i in range(x.dim()):
        way.append(None if i in gone else place - event.rank)
        place += kept or i not in gone
    event.hands_on(x, way)


def _select(event: _Event) -> None:
    _without(event, [event.option(1, "dim") or 0])


def _reduce(position: int, event: _Event) -> None:
    """Numbers over some dimensions become one; of two tensors it is a function of both at each place."""
    dims = event.option(position, "dim", "axis", "other")
    if isinstance(dims, Tensor):
        _pointwise(event)
    elif isinstance(dims, list | tuple) or (isinstance(dims, int) and not isinstance(dims, bool)):
        _without(event, dims if isinstance(dims, list | tuple) else [dims])


def _index(event: _Event) -> None:
    """Slices, numbers, new dimensions, and at most one tensor."""
    x, index = event.args[:2]
    items = index if isinstance(index, tuple) else (index,)
    counted = [i for i in items if i is not None and i is not Ellipsis]
    single = [i for i in counted if isinstance(i, Tensor)]
    numbers = [i for i in counted if isinstance(i, int) and not isinstance(i, bool)]
    slices = [i for i in counted if isinstance(i, slice)]
    if len(single) + len(numbers) + len(slices) < len(counted) or len(single) > 1 or (single and numbers):
        return
    taken = sum(i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1 for i in counted)
    rest = [slice(None)] * (x.dim() - taken)
    # an index without an ellipsis ends in one
    at = next((n for n, i in enumerate(items) if i is Ellipsis), len(items))
    way, place = list[int | None](), 0
    for item in (*items[:at], *rest, *items[at + 1 :]):
        if isinstance(item, Tensor):
            mask = item.dtype == torch.bool
            gone, made = (item.dim(), 1) if mask else (1, item.dim())
            way += [place] if gone == made == 1 else [None] * gone
            place += made
        else:
            way += [] if item is None else [place if isinstance(item, slice) else None]
            place += item is None or isinstance(item, slice)
    if place == event.rank:
        event.hands_on(x, [None if w is None else w - place for w in way])


# ---------------------------------------------------------------------- products


def _product(first: int, event: _Event) -> None:
    """A matrix product: the rows of one and the columns of the other survive; a weight's stand for features."""
    a, b = event.option(first, "input", "mat1", "batch1"), event.option(first + 1, "other", "mat2", "batch2")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or min(a.dim(), b.dim()) < 2:
        return
    rows, columns = event.axis(a), event.axis(b)
    found = {axis for axis, gone in ((rows, -1), (columns, -2)) if axis is not None and axis != gone}
    if not found and rows == -1 and event.key(b) is None:
        found = {-1}
    if not found and columns == -2 and event.key(a) is None:
        found = {-2}
    if len(found) == 1:
        event.says(found.pop())
    elif not found:
        left = [*range(-a.dim(), -1), None], [*range(-b.dim(), -2), None, -1]
        event.axes.product(event.outs[0][0], [(event.key(a), left[0]), (event.key(b), left[1])])


def _einsum(event: _Event) -> None:
    """The letter of the features, or the only new one of a weight."""
    equation, operands = event.args[0], list(event.given())
    terms, arrow, result = equation.replace(" ", "").partition("->")
    words = terms.split(",")
    if not arrow or "." in equation or len(words) != len(operands):
        return
    pairs = [(word, event.axis(t)) for word, t in zip(words, operands, strict=True)]
    letters = {word[axis] for word, axis in pairs if axis is not None}
    left = letters & set(result)
    if letters and not left:
        weights = "".join(word for word, t in zip(words, operands, strict=True) if event.key(t) is None)
        values = "".join(word for word, t in zip(words, operands, strict=True) if event.key(t) is not None)
        left = (set(weights) & set(result)) - set(values)
    if len(left) == 1:
        event.says(result.index(left.pop()) - len(result))
    elif not left:
        ways = [[result.find(c) - len(result) if c in result else None for c in word] for word in words]
        event.axes.product(event.outs[0][0], [(event.key(t), way) for t, way in zip(operands, ways, strict=True)])


# ---------------------------------------------------------------------- the table

_KINDS: Mapping[Rule, str] = {
    _same: """
        clone contiguous detach to float half bfloat16 double type cpu cuda data requires_grad alias identity narrow
        index_select index_fill index_copy index_add scatter scatter_add gather take_along_dim masked_scatter softmax
        log_softmax softmin gumbel_softmax cumsum cumprod cummax cummin logcumsumexp sort argsort topk flip fliplr
        flipud roll tril triu chunk split split_with_sizes tensor_split pad glu normalize renorm local_response_norm
        dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout channel_shuffle
        zeros_like ones_like full_like empty_like rand_like randn_like
        interpolate upsample upsample_nearest upsample_bilinear grid_sample repeat_interleave diff
        max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
        avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d lp_pool3d fractional_max_pool2d fractional_max_pool3d
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
        adaptive_max_pool3d max_unpool1d max_unpool2d max_unpool3d
    """,
    _spread: "expand expand_as repeat tile broadcast_to",
    _pointwise: """
        radd rsub rmul truediv rtruediv rdiv floordiv rfloordiv rpow mod rmod and or xor iadd isub imul itruediv
        ipow relu6 softsign tanhshrink logsigmoid hardswish silu mish prelu rrelu type_as minimum maximum fmod lerp
    """,
    _joined: "cat concat concatenate",
    _last: "embedding embedding_bag one_hot bilinear",
    _linear: "linear linear_dynamic lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell conv_tbc",
    _attention: "scaled_dot_product_attention",
    _attention_layer: "multi_head_attention_forward native_multi_head_attention transformer_encoder_layer_fwd",
    _channel_norm: "batch_norm group_norm instance_norm",
    _layer_norm: "layer_norm rms_norm",
    _shuffle: "pixel_shuffle pixel_unshuffle",
    _unfold: "unfold",
    _fold: "fold",
    _permute: "permute",
    _swap: "transpose swapaxes swapdims",
    _swap_last: "mT mH adjoint",
    _reverse: "T H t",
    _move: "movedim moveaxis",
    _reshape: "view reshape flatten unflatten ravel squeeze view_as reshape_as",
    _unsqueeze: "unsqueeze",
    _stack: "stack",
    _select: "select unbind",
    _index: "getitem",
    _einsum: "einsum",
    functools.partial(_product, 0): "matmul bmm mm",
    functools.partial(_product, 1): "addmm baddbmm",
    functools.partial(_reduce, 1): """
        mean sum amax amin aminmax max min std var std_mean var_mean prod logsumexp argmax argmin any all median
        nanmean nansum nanmedian mode count_nonzero
    """,
    functools.partial(_reduce, 2): "norm linalg_norm linalg_vector_norm quantile nanquantile kthvalue",
}
_RULES: dict[str, Rule | None] = {name: rule for rule, names in _KINDS.items() for name in names.split()}
# the shape from before is gone
_RULES["squeeze_"] = None


def rule_of(op: str) -> Rule | None:
    """The rule of a torch function, in place or not; None for one of which nothing is known."""
    if op not in _RULES:
        name = op.strip("_")
        conv = _CONVOLUTION.fullmatch(name)
        if conv is not None:
            _RULES[op] = functools.partial(_convolution, -1 - int(conv[1]))
        else:
            _RULES[op] = _RULES.get(name) or (_pointwise if _is_pointwise(name) else None)
    return _RULES[op]


def _is_pointwise(name: str) -> bool:
    """Whether torch itself says so."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ()
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads)
