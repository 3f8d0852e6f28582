"""Values that leave torch while a model runs, as numbers, lists or arrays, and what may come back of them. Floor 4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

# what gives the memory of a tensor; or that, or its values, as something else
MEMORY = {"data_ptr", "storage", "untyped_storage"}
_LEAVING = MEMORY | {"item", "tolist", "numpy", "array", "dlpack", "float", "int", "index", "complex"}
# what makes a tensor of anything
_MAKING = {"tensor", "as_tensor", "asarray"}


class Outside:
    """What left torch so far in one run, and which numbers it left as.

    A number that comes back is told by its value. What Python computes from one is not followed, nor whole numbers, nor
    what a forward decides by one.
    """

    def __init__(self) -> None:
        self.left: dict[Any, None] = {}
        self.numbers: dict[float, dict[Any, None]] = {}

    def note(self, operation: str, values: Iterable[Any], result: Any) -> None:
        """An operation on these values gave something that is no tensor."""
        if operation in _LEAVING and type(result) is not bool:
            found = dict.fromkeys(values)
            self.left |= found
            for number in _others(result):
                if type(number) is float:
                    self.numbers.setdefault(number, {}).update(found)

    def back(self, operation: str, args: Any, kwargs: Any) -> list[Any]:
        """The values that an operation may be given beside its tensors."""
        found: dict[Any, None] = {}
        given = list(_others((args, kwargs)))
        if operation in _MAKING and not (args and isinstance(args[0], int | float | complex | Tensor)):
            found |= self.left
        for other in given:
            if type(other) is float:
                found |= self.numbers.get(other, {})
            elif type(other).__module__ == "numpy":
                found |= self.left
        return list(found)


def _others(value: Any) -> Iterator[Any]:
    """What is in a structure beside tensors."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _others(item)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _others(item)
    elif not isinstance(value, Tensor):
        yield value
