"""What can be read off the text of a forward before it is followed. Floor 4."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import nn

from .program import Unlowered


def refuse_catching(function: types.FunctionType, cls: type) -> None:
    """Refuses a forward that calls a method of its class which catches errors.

    Raises:
        Unlowered: it does.
    """
    waiting, found = [function.__code__], set[str]()
    while waiting:
        part = waiting.pop()
        waiting += [c for c in part.co_consts if isinstance(c, types.CodeType)]
        for name in set(part.co_names) - found:
            found.add(name)
            member = inspect.getattr_static(cls, name, None)
            member = member.fget if isinstance(member, property) else member
            if isinstance(member, types.FunctionType) and member not in vars(nn.Module).values():
                method = inspect.unwrap(member)
                if _catches(method):
                    raise Unlowered(CATCHES)
                waiting.append(method.__code__)


CATCHES = "it goes another way where an error is raised, in a `try` block"


@functools.cache
def _catches(function: types.FunctionType) -> bool:
    """Whether a function has a `try` block; one without a source has none that can be seen."""
    with suppress(OSError, TypeError, SyntaxError):
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        return any(isinstance(node, ast.Try | ast.TryStar) for node in ast.walk(tree))
    return False


# what changes from call to call and cannot be seen in the arguments
_ASKS = ("is_grad_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled", "is_inference_mode_enabled")
_KINDS = ("isinstance", "is_tensor", "type", "hasattr")


class Source:
    """What can be read off the text of a forward.

    Attributes:
        asked: names that it compares with None.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
        except (OSError, TypeError, SyntaxError):
            raise Unlowered("its source is not there to be read") from None
        # what may be compared with None: here, or in a function that it is handed to
        self.asked: set[str] = set()
        self.handed: set[str] = set()
        self.kinds: list[str] = []
        arguments: ast.arguments = tree.body[0].args  # type: ignore[attr-defined]
        own, rest = arguments.args[0].arg if arguments.args else "", arguments.kwarg and arguments.kwarg.arg
        handed_on = {id(k.value) for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords if not k.arg}
        for node in ast.walk(tree):
            if isinstance(node, ast.With):
                raise Unlowered("it runs a part of itself in a `with` block")
            if isinstance(node, ast.Try | ast.TryStar):
                raise Unlowered(CATCHES)
            if (
                isinstance(node, ast.Attribute)
                and not isinstance(node.ctx, ast.Load | ast.Del)
                and _is_part(node.value)
            ):
                raise Unlowered(f"it sets the attribute {node.attr!r}")
            if isinstance(node, ast.Name) and node.id == rest and id(node) not in handed_on:
                raise Unlowered("it looks at its further keyword arguments")
            if isinstance(node, ast.Attribute):
                if node.attr in _ASKS:
                    raise Unlowered(f"it asks {node.attr!r}")
                if node.attr == "training" and not (isinstance(node.value, ast.Name) and node.value.id == own):
                    raise Unlowered("it asks for the mode of another module")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                if called in _KINDS and node.args and not _is_own(node.args[0]):
                    self.kinds.append(node.args[0].id if isinstance(node.args[0], ast.Name) else "")
            if isinstance(node, ast.Compare) and any(isinstance(o, ast.Is | ast.IsNot) for o in node.ops):
                if not any(isinstance(n, ast.Constant) for n in (node.left, *node.comparators)):
                    raise Unlowered("it asks whether two values are the same object")
                self.asked |= {n.id for n in (node.left, *node.comparators) if isinstance(n, ast.Name)}
            if isinstance(node, ast.Call) and not _is_own(node.func):
                given = (*node.args, *(k.value for k in node.keywords))
                self.handed |= {n.id for n in given if isinstance(n, ast.Name)}


def _is_part(value: ast.expr) -> bool:
    """Whether this is something on the module; what it sets on itself is looked at when it has run."""
    return not isinstance(value, ast.Name) and _is_own(value)


def _is_own(called: ast.expr) -> bool:
    """Whether what is called is a part of the module itself, such as a child."""
    while isinstance(called, ast.Attribute | ast.Subscript):
        called = called.value
    return isinstance(called, ast.Name) and called.id == "self"
