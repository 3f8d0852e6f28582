"""What `fit` trains on: batches of whatever form the data came in, checked before the first step. Floor 7."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, StackDataset

from .errors import GraphError, here, suggestion


def loader(what: str, given: SimpleNamespace, generator: torch.Generator | None = None) -> Any:
    """Batches of `data` or `evaluate`, whatever form they came in; shuffled when there is a generator."""
    data = getattr(given, what)
    if data is None or isinstance(data, DataLoader):
        return data
    if isinstance(data, Mapping):
        lengths = {name: len(c) if isinstance(c, Tensor) and c.dim() else type(c).__name__ for name, c in data.items()}
        if len(set(lengths.values())) > 1 or str in map(type, lengths.values()):
            sides = [(repr(name), str(length)) for name, length in lengths.items()]
            hint = 'torch.tensor(…) makes one; a tokenizer gives them with padding=True, return_tensors="pt"'
            raise GraphError(f"{what}= is no dict of equally long tensors", sides=sides, source=here(), hint=hint)
        data = StackDataset(**data) if data else []
    if type(data) in (tuple, list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        hint = "torch.utils.data.TensorDataset(x, y) makes samples of them, for loss="
        raise GraphError(f"{what}= is a pair of tensors, not samples", source=here(), hint=hint)
    if isinstance(data, IterableDataset):
        return DataLoader(data, given.batch_size, collate_fn=given.collate)
    if isinstance(data, str | Tensor) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        hint = "a DataLoader, a Dataset, a list of samples, or a dict of equally long tensors"
        raise GraphError(f"{what}= is a {type(data).__name__}", source=here(), hint=hint)
    if len(data) == 0:
        raise GraphError(f"{what}= is empty", source=here(), hint="give it at least one sample")
    shuffle = generator is not None
    return DataLoader(data, given.batch_size, shuffle=shuffle, generator=generator, collate_fn=given.collate)


def check_batch(batch: Any, model: nn.Module, loss: Any) -> None:
    """Whether the model can be called with a batch, before it is."""
    if not isinstance(batch, Mapping):
        if loss is None or not isinstance(batch, list | tuple) or len(batch) != 2:
            what = f"a batch is a {type(batch).__name__}" + (", and there is no loss=" if loss is None else "")
            raise GraphError(what, source=here(), hint="a dict, or with loss= a pair (inputs, target)")
        return
    keys = set(batch)
    if loss is not None:
        if "labels" not in keys:
            raise GraphError(
                "a batch has no 'labels' for loss=",
                sides=[("it has", *batch)],
                source=here(),
                hint="call the target 'labels' in the batch, or give pairs (inputs, target)",
            )
        keys.remove("labels")
    accepted = _accepted(model)
    if accepted is not None and not keys <= set(accepted):
        key = min(keys - set(accepted))
        raise GraphError(
            f"a batch has {key!r}, which the forward of {type(model).__name__} does not take",
            sides=[("batch", ", ".join(batch)), ("forward", ", ".join(accepted))],
            source=here(),
            hint="give loss=" if key == "labels" else f"{suggestion(key, accepted)}\nor leave it out of the data",
        )


def _accepted(model: nn.Module) -> list[str] | None:
    """The names that a forward takes; None when it takes any."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            # **kwargs: Unpack[SomeTypedDict] says which
            typed = typing.get_args(parameter.annotation)
            if not typed:
                return None
            names += sorted(typed[0].__required_keys__ | typed[0].__optional_keys__)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            names.append(parameter.name)
    return names


def windows(loader: Any, accumulate: int) -> Iterator[list[Any]]:
    """The batches of one step after the other, over and over; the last step of an epoch may have fewer."""
    while True:
        batches = iter(loader)
        window = list(islice(batches, accumulate))
        if not window:
            raise GraphError("data= has no batch", source=here(), hint="it is empty, or smaller than one batch")
        while window:
            yield window
            window = list(islice(batches, accumulate))


def rows(batch: Any) -> int:
    from accelerate.utils import find_batch_size

    return find_batch_size(batch) or 1
