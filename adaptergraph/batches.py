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
from torch.utils.data import DataLoader, IterableDataset, StackDataset, default_collate

from .errors import GraphError, here, suggestion
from .tasks import Tasked


def loader(what: str, given: SimpleNamespace, generator: torch.Generator | None = None) -> Any:
    """Batches of `data` or `evaluate`, whatever form they came in; shuffled when there is a generator."""
    data = getattr(given, what)
    if data is None or isinstance(data, DataLoader):
        return data
    if isinstance(data, Mapping):
        lengths = {name: len(c) if _is_column(c) else type(c).__name__ for name, c in data.items()}
        if len(set(lengths.values())) > 1 or str in map(type, lengths.values()):
            sides = [(repr(name), str(length)) for name, length in lengths.items()]
            hint = 'torch.tensor(…) makes one; a tokenizer gives them with padding=True, return_tensors="pt"'
            raise GraphError(f"{what}= is no dict of equally long tensors", sides=sides, source=here(), hint=hint)
        data = StackDataset(**data) if data else []
    if type(data) in (tuple, list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        hint = "torch.utils.data.TensorDataset(x, y) makes samples of them, for loss="
        raise GraphError(f"{what}= is a pair of tensors, not samples", source=here(), hint=hint)
    if isinstance(data, IterableDataset):
        return DataLoader(data, given.batch_size, collate_fn=given.collate or _collated)
    if isinstance(data, str | Tensor) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        hint = "a DataLoader, a Dataset, a list of samples, or a dict of equally long tensors"
        raise GraphError(f"{what}= is a {type(data).__name__}", source=here(), hint=hint)
    if len(data) == 0:
        raise GraphError(f"{what}= is empty", source=here(), hint="give it at least one sample")
    shuffle = generator is not None
    collate = given.collate or _collated
    return DataLoader(data, given.batch_size, shuffle=shuffle, generator=generator, collate_fn=collate)


def _collated(samples: list[Any]) -> Any:
    """A batch as torch makes it of samples of one form."""
    first = samples[0]
    numbers = [k for k, v in first.items() if _is_numbers(v)] if isinstance(first, Mapping) else []
    why = "torch would make columns of a list of numbers"
    if not numbers:
        try:
            return default_collate(samples)
        except (RuntimeError, TypeError, KeyError, AttributeError) as error:
            why = str(error).splitlines()[0]
    raise GraphError(
        "samples cannot be made into a batch",
        sides=[(f"sample {i}", _form(sample)) for i, sample in enumerate(samples[:3])] + [("because", why)],
        source=here(),
        hint="tensors of one shape, or collate= for rows of different length: "
        "collate=transformers.DataCollatorWithPadding(tokenizer)",
    )


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int | float)


def _form(sample: Any) -> str:
    """What a sample holds, in few words."""
    if isinstance(sample, Mapping):
        return ", ".join(f"{name}: {_form(value)}" for name, value in sample.items())
    if isinstance(sample, Tensor):
        return str(tuple(sample.shape))
    if isinstance(sample, list | tuple):
        return f"{type(sample).__name__} of {len(sample)}"
    return type(sample).__name__


def _is_column(column: Any) -> bool:
    """A tensor of rows, or a list of words such as a task for each row."""
    if isinstance(column, list | tuple):
        return bool(column) and all(isinstance(word, str) for word in column)
    return isinstance(column, Tensor) and column.dim() > 0


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
    # a root with a `Switch` takes the word beside what its own forward takes
    names = ["task"] * isinstance(model, Tasked)
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
    """How many rows a batch has."""
    from accelerate.utils import find_batch_size

    if isinstance(batch, Mapping):
        # a task for each row is a list of names
        batch = [value for value in batch.values() if isinstance(value, Tensor)] or batch
    return find_batch_size(batch) or 1
