"""Every public name says what it is for, with an example that runs."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import adaptergraph as ag

MODULES = ["adaptergraph"] + [m.name for m in pkgutil.walk_packages(ag.__path__, "adaptergraph.")]


def test_all_is_what_there_is():
    public = {n for n in vars(ag) if not n.startswith("_") and not inspect.ismodule(getattr(ag, n))} | {"blocks"}
    assert sorted(ag.__all__) == sorted(set(ag.__all__))
    assert public == set(ag.__all__)


@pytest.mark.parametrize("name", ag.__all__)
def test_a_public_name_is_documented(name):
    thing = getattr(ag, name)
    doc = inspect.getdoc(thing) or ""
    assert len(doc) > 8, f"{name} has no docstring"
    for attribute, member in vars(thing).items() if inspect.isclass(thing) else ():
        function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
        if not attribute.startswith("_") and inspect.isfunction(function):
            assert inspect.getdoc(function), f"{name}.{attribute} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("name", ["Adapter", "Bottleneck", "Graph", "adapter_state", "apply", "dense", "trace", "fit"])
def test_the_main_calls_have_an_example(name):
    thing = getattr(ag, name)
    docs = [inspect.getdoc(thing) or ""]
    docs += [inspect.getdoc(m) or "" for m in vars(thing).values()] if inspect.isclass(thing) else []
    assert any(">>>" in doc for doc in docs)
