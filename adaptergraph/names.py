"""What a node may be called: a name is a module path and becomes part of generated code, so it is checked twice.

Once where a node is made, once where a file is read. Floor 1; torch only for the names it keeps for itself.
"""

from __future__ import annotations

import keyword
import re
from functools import lru_cache

import torch.fx

from .errors import GraphError, Source

SEGMENT = re.compile(r"[A-Za-z0-9_]+")
_PATH_ENDS = re.compile(r"[@/:]")
# `<module path>`, then `@2` (a further call), `/add_1` (an operation in its forward), `:hidden` (a further output)
_IMPORTED = re.compile(r"[\w.]*(?:@\d+)?(?:/\w+)?(?:@\d+)?(?::[\w:]+)?", re.ASCII)


@lru_cache(maxsize=1)
def reserved() -> frozenset[str]:
    """Attributes of the class a graph is lowered to: a child of such a name would replace one of them."""
    own = set(dir(torch.fx.GraphModule)) | set(vars(torch.nn.Module()))
    return frozenset(own | {"_source", "_inputs", "_graph", "_code", "meta"})


def check_name(name: object, source: Source | None = None) -> str:
    """Returns a declared node's name, or says what is wrong with it.

    >>> check_name("layer.0.ffn")
    'layer.0.ffn'
    >>> check_name("layer.forward")
    Traceback (most recent call last):
    adaptergraph.errors.GraphError: a node cannot be called 'layer.forward': 'forward' is an attribute of every module
      to fix      'layer.forward_' would do
    """
    if not isinstance(name, str):
        raise GraphError(f"a node's name is a string, not {name!r}", source=source)
    for segment in name.split("."):
        if not SEGMENT.fullmatch(segment):
            clean = ".".join(re.sub(r"\W+", "_", s, flags=re.ASCII).strip("_") or "node" for s in name.split("."))
            raise GraphError(
                f"a node cannot be called {name!r}: the parts between dots are letters, digits and _",
                node=name,
                source=source,
                hint=f"{clean!r} would do",
            )
        why = _reserved(segment)
        if why:
            better = ".".join(f"{s}_" if _reserved(s) else s for s in name.split("."))
            raise GraphError(
                f"a node cannot be called {name!r}: {segment!r} is {why}",
                node=name,
                source=source,
                hint=f"{better!r} would do",
            )
    return name


def check_input_name(name: object, source: Source | None = None) -> str:
    """An input is an argument of the compiled `forward`, so its name is one plain identifier."""
    checked = check_name(name, source)
    # names that generated code keeps for itself
    taken = {"self", "getattr", *torch.fx.graph._custom_builtins}
    if not checked.isidentifier() or checked in taken:
        raise GraphError(
            f"an input cannot be called {name!r}: it is an argument of forward()",
            node=checked,
            source=source,
            hint=f"use a plain identifier, such as {'x_' + re.sub(r'[^A-Za-z0-9]+', '_', checked)!r}",
        )
    return checked


def check_imported_name(name: object) -> str:
    """Names of imported nodes come from a real module tree; from a file they may still be anything."""
    if not isinstance(name, str) or not _IMPORTED.fullmatch(name) or not name:
        raise GraphError(f"{name!r} is no name of an imported node")
    return name


def _reserved(segment: str) -> str | None:
    if keyword.iskeyword(segment):
        return "a Python keyword"
    if segment in reserved():
        return "an attribute of every module"
    return None


def body_name(host: str, name: str) -> str:
    """Where the modules of a body live: below its host, or for a part of a module beside the module's own children.

    >>> body_name("layer.0.fc", "adapter"), body_name("layer.0/add_1", "adapter")
    ('layer.0.fc.adapter', 'layer.0.adapter_add_1')
    >>> body_name("shared@1", "adapter"), body_name("lstm:1:0", "adapter")
    ('shared.adapter_call1', 'lstm.adapter_out1_0')
    """
    path = path_of(host)
    part = re.sub(r":(?=\d)", ":out", host[len(path) :], count=1)
    part = re.sub(r"[/:]", "_", part.replace("@", "_call"))
    return f"{path}.{name}{part}" if path else f"{name}{part}"


def path_of(name: str) -> str:
    """The module path in a node's name: without the call, the operation and the output.

    >>> path_of("encoder.dropout@1"), path_of("lstm:1")
    ('encoder.dropout', 'lstm')
    """
    end = _PATH_ENDS.search(name)
    return name if end is None else name[: end.start()]
