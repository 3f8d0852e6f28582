"""What all methods share: they are strict pydantic dataclasses, and what pydantic refuses reads like our own errors."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass

from ..errors import GraphError, here, suggestion

METHODS: dict[str, type] = {}
T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(pydantic.Field,))
def method(cls: type[T]) -> type[T]:
    """Makes a class a method: a frozen value with checked options that files know by its name.

    A misspelt option or a wrong kind of value is a `GraphError` at the user's line. A class with `several` set takes
    any number of values by position; together they are its first option.
    """
    made: Any = dataclass(frozen=True, repr=False, config=pydantic.ConfigDict(extra="forbid", strict=True))(cls)
    strict = made.__init__

    def __init__(self: Any, *args: Any, **options: Any) -> None:
        given = (args,) if args and getattr(made, "several", False) else args
        try:
            strict(self, *given, **options)
        except pydantic.ValidationError as error:
            raise _refused(made, error) from None

    __init__.__wrapped__ = strict  # type: ignore[attr-defined]
    made.__init__ = __init__
    made.__repr__ = show
    METHODS[made.__name__] = made
    return made


def _refused(cls: Any, error: pydantic.ValidationError) -> GraphError:
    names = [f.name for f in fields(cls)]
    first = error.errors()[0]
    word = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] in ("unexpected_keyword_argument", "dataclass_init_only", "no_such_attribute"):
        return GraphError(f"{cls.__name__} has no option {word!r}", source=here(), hint=suggestion(word, names))
    if first["type"] == "unexpected_positional_argument":
        return GraphError(
            f"{cls.__name__} takes only its {names[0]} by position", source=here(), hint="name the options"
        )
    what = str(first["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    where = names[int(word)] if word.isdigit() and int(word) < len(names) else word
    return GraphError(f"{cls.__name__}({where}={first.get('input')!r}): {what}", source=here())


def show(method: Any) -> str:
    """The call that makes this method: only what is not the default."""
    parts: list[str] = []
    for i, field in enumerate(fields(method)):
        value = getattr(method, field.name)
        if i == 0 and getattr(method, "several", False):
            parts += map(repr, value)
        elif value != field.default:
            parts.append(repr(value) if i == 0 else f"{field.name}={value!r}")
    return f"{type(method).__name__}({', '.join(parts)})"
