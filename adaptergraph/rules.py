"""What each torch function tells of the dimension of the features: where they are, or the same as what it got. Floor 2.

Of a function without a rule, and of one that is called in a form which its rule does not know, nothing is known.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .axes import Axes

Key: TypeAlias = Any
# for each dimension of a value the one of the result that it becomes, or None; None for all as they are
Way: TypeAlias = "Sequence[int | None] | None"
_CONVOLUTION = re.compile(r"conv(?:_transpose)?([123])d")


class Event:
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

    def values(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Those that are computed from what the model was given."""
        return (t for t in tensors if (key := self.key(t)) is not None and key not in self.axes.constants)

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

    def agree(self, tensors: Iterable[Tensor], way: Way = None) -> None:
        """The result has its features where all of several values have them, and so have constants among these."""
        axes, given = self.axes, [key for t in tensors if (key := self.key(t)) is not None]
        keys = [key for key in given if key not in axes.constants] or given
        known = {key: axes.known[key] for key in keys if key in axes.known}
        # what is known only from how dimensions moved may be a mixing of tokens: it says nothing of the others
        sure = [key for key in known if key not in axes.moved]
        one = len(set(known.values())) == 1 and bool(sure or len(known) == len(keys))
        for out, _ in self.outs if keys else ():
            if one or len(keys) == 1:
                axes.hand_on((sure or keys)[0], out, way)
            else:
                axes.sums.append((keys, out, way))
                axes.links += ((key, out, way) for key in keys if key not in known)
            if len(keys) > 1:
                axes.stayed.pop(out, None)
        if one:
            for key in given:
                axes.ask(key, known[(sure or keys)[0]])


Rule = Callable[[Event], None]

# ---------------------------------------------------------------------- what leaves the dimensions as they are


def _same(event: Event) -> None:
    x = event.x
    if x is not None and x.dim() == event.rank:
        event.hands_on(x)


def _spread(event: Event) -> None:
    """New dimensions come in front."""
    event.hands_on(event.x)


def _pointwise(event: Event) -> None:
    """Each number is computed from those at its place; a value that is spread over places, as a gate, tells nothing."""
    shape = event.outs[0][1].shape
    # masks have no features
    values = [t for t in event.given() if t.dtype != torch.bool] or list(event.given())
    whole = [t for t in values if t.shape == shape and event.key(t) is not None]
    if whole:
        event.agree(whole)
        return
    axes = {
        axis if (axis := event.axis(t)) is None or t.shape[axis] == shape[axis] else None for t in event.values(values)
    }
    if len(axes) == 1 and (axis := axes.pop()) is not None:
        event.says(axis)


def _joined(event: Event) -> None:
    event.agree(event.given())


# ---------------------------------------------------------------------- what says where they are


def _last(event: Event) -> None:
    event.says(-1)


def _linear(event: Event) -> None:
    event.reads(event.x, -1)
    event.says(-1)


def _attention(event: Event) -> None:
    for tensor in event.args[:3]:
        event.reads(tensor, -1)
    event.says(-1)


def _attention_layer(event: Event) -> None:
    for tensor in event.args[:3]:
        event.reads(tensor, -1)
    event.axes.known[event.outs[0][0]] = -1


def _convolution(axis: int, event: Event) -> None:
    event.reads(event.x, axis)
    event.says(axis)
    event.axes.convolutions.append(event.outs[0][0])


def _channel_norm(event: Event) -> None:
    """Batch × channels × places, where nobody knows better."""
    x = event.x
    if x is not None and event.axis(x) is None and x.dim() > 1:
        event.reads(x, 1 - x.dim())
        event.says(1 - x.dim())
    else:
        event.hands_on(x)


def _layer_norm(event: Event) -> None:
    x, sizes = event.x, event.option(1, "normalized_shape")
    if event.axis(x) is None and isinstance(sizes, list | tuple) and len(sizes) == 1:
        event.reads(x, -1)
        event.says(-1)
    else:
        event.hands_on(x)


def _shuffle(event: Event) -> None:
    """Places into channels or back; both are where a convolution has them."""
    if event.axis(event.x) is None:
        event.reads(event.x, -3)
        event.says(-3)
    else:
        event.hands_on(event.x)


def _unfold(event: Event) -> None:
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


def _fold(event: Event) -> None:
    event.reads(event.x, -2)
    event.says(-3)


# ---------------------------------------------------------------------- what moves dimensions


def _permuted(event: Event, order: Sequence[int]) -> None:
    """The result has the dimensions in this order."""
    rank, way = len(order), [None] * len(order)
    for place, dim in enumerate(order):
        way[dim % rank] = place - rank  # type: ignore[call-overload]
    event.hands_on(event.x, way)


def _permute(event: Event) -> None:
    dims = event.option(1, "dims")
    order = dims if isinstance(dims, list | tuple) else event.args[1:]
    if len(order) == event.rank:
        _permuted(event, order)


def _swap(event: Event) -> None:
    one, other = event.option(1, "dim0", "axis0"), event.option(2, "dim1", "axis1")
    order = list(range(event.rank))
    order[one], order[other] = order[other], order[one]
    _permuted(event, order)


def _swap_last(event: Event) -> None:
    rank = event.rank
    _permuted(event, range(rank) if rank < 2 else (*range(rank - 2), rank - 1, rank - 2))


def _reverse(event: Event) -> None:
    _permuted(event, range(event.rank)[::-1])


def _move(event: Event) -> None:
    rank, ends = event.rank, (event.option(1, "source"), event.option(2, "destination"))
    source, destination = ([d % rank for d in (e if isinstance(e, list | tuple) else (e,))] for e in ends)
    order = [d for d in range(rank) if d not in source]
    for to, dim in sorted(zip(destination, source, strict=True)):
        order.insert(to, dim)
    _permuted(event, order)


def _reshape(event: Event) -> None:
    """A dimension is still there where as many numbers are in it, and behind it, as before."""
    x = event.x
    if x is None:
        return
    before, after = tuple(x.shape), tuple(event.outs[0][1].shape)
    event.hands_on(x, None if before == after else _survivors(before, after))


def _survivors(before: Sequence[int], after: Sequence[int]) -> Way:
    if len(after) == 2 and before[0] == after[0]:
        # all that is behind the first dimension in one, the features with it
        return [-2, *(-1 if size > 1 else None for size in before[1:])]
    ends = [[(size, math.prod(shape[i + 1 :])) for i, size in enumerate(shape)] for shape in (before, after)]
    once = [end if ends[0].count(end) == ends[1].count(end) == 1 else None for end in ends[0]]
    return [None if end is None else ends[1].index(end) - len(after) for end in once]


def _unsqueeze(event: Event) -> None:
    x, rank = event.x, event.rank
    if x is not None:
        new = event.option(1, "dim") % rank
        event.hands_on(x, [i - rank if i < new else i + 1 - rank for i in range(rank - 1)])


def _stack(event: Event) -> None:
    rank = event.rank
    new = (event.option(1, "dim") or 0) % rank
    event.agree(event.given(), [i - rank if i < new else i + 1 - rank for i in range(rank - 1)])


def _without(event: Event, dims: Sequence[int], new: int = 0) -> None:
    """The result lacks these dimensions, or has one number in each; so many new ones come in front."""
    x, rank = event.x, event.rank - new
    if x is None:
        return
    gone, way, place = {d % x.dim() for d in dims}, list[int | None](), 0
    kept = rank == x.dim()
    for i in range(x.dim()):
        way.append(None if i in gone else place - rank)
        place += kept or i not in gone
    event.hands_on(x, way)


def _select(event: Event) -> None:
    _without(event, [event.option(1, "dim") or 0])


def _reduce(position: int, event: Event) -> None:
    """Numbers over some dimensions become one; of two tensors it is a function of both at each place."""
    dims = event.option(position, "dim", "axis", "other")
    if isinstance(dims, Tensor):
        _pointwise(event)
    elif isinstance(dims, list | tuple) or (isinstance(dims, int) and not isinstance(dims, bool)):
        _without(event, dims if isinstance(dims, list | tuple) else [dims])


def _quantile(event: Event) -> None:
    quantiles, dim = event.option(1, "q"), event.option(2, "dim")
    if dim is not None:
        _without(event, [dim], quantiles.dim() if isinstance(quantiles, Tensor) else 0)


def _index(event: Event) -> None:
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


def _product(first: int, event: Event) -> None:
    """A matrix product: the rows of one and the columns of the other survive; a weight's stand for features."""
    a, b = event.option(first, "input", "mat1", "batch1"), event.option(first + 1, "other", "mat2", "batch2")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or min(a.dim(), b.dim()) < 2:
        return
    rows, columns = event.axis(a), event.axis(b)
    found = {axis for axis, gone in ((rows, -1), (columns, -2)) if axis is not None and axis != gone}
    nowhere = not found
    if None in (rows, columns) and None not in (event.key(a), event.key(b)):
        # a dimension of both may be the heads of one and the features of none
        found = {axis for axis in found if axis >= -2}
    if not found and rows == -1 and event.key(b) is None:
        found = {-1}
    if not found and columns == -2 and event.key(a) is None:
        found = {-2}
    if len(found) == 1:
        event.says(found.pop())
    elif nowhere:
        left = [*range(-a.dim(), -1), None], [*range(-b.dim(), -2), None, -1]
        event.axes.product(event.outs[0][0], [(event.key(a), left[0]), (event.key(b), left[1])])


def _einsum(event: Event) -> None:
    """The letter of the features, or the only new one of a weight."""
    equation, operands = event.args[0], list(event.given())
    terms, arrow, result = equation.replace(" ", "").partition("->")
    words = terms.split(",")
    if not arrow or "." in equation or len(words) != len(operands):
        return
    pairs = [(word, event.axis(t)) for word, t in zip(words, operands, strict=True)]
    letters = {word[axis] for word, axis in pairs if axis is not None}
    keys = [event.key(t) for t in operands]
    weights, values = (
        {c for word, key in zip(words, keys, strict=True) if (key is None) is own for c in word}
        for own in (True, False)
    )
    if letters & set(result):
        # one that is also a letter of a value of which nothing is known may be that of heads
        unsure = {
            c for (word, axis), key in zip(pairs, keys, strict=True) if axis is None and key is not None for c in word
        }
        left = (letters & set(result)) - unsure
    else:
        left = (weights & set(result)) - values if letters else set()
    if len(left) == 1:
        event.says(result.index(left.pop()) - len(result))
    elif not left and not letters & set(result):
        ways = [[result.find(c) - len(result) if c in result else None for c in word] for word in words]
        event.axes.product(event.outs[0][0], list(zip(keys, ways, strict=True)))


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
    functools.partial(_reduce, 2): "norm linalg_norm linalg_vector_norm kthvalue",
    _quantile: "quantile nanquantile",
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
