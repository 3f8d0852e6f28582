"""`with model.task(…)` in generators, coroutines, threads and compiled code: never another task without a word."""

import asyncio
import contextlib
import gc
import threading

import pytest
import torch
from test_tasks import METHODS, batch, declared, randomise

import adaptergraph as ag

WAITS = (
    r"^which task is to run at 'fc\.adapter' is not known: a generator or coroutine is suspended inside its block\n"
    r"    {} +waits at test_task_blocks\.py:\d+    .*\n"
    r"  written at  test_task_blocks\.py:\d+    .*\n"
    r'  to fix      no yield or await inside such a block; model\(…, task="…"\) always runs its own$'
)


@pytest.fixture
def model():
    return randomise(declared().compile())


@pytest.fixture
def wanted(model):
    return {t: model(batch(), task=t) for t in METHODS}


def runs(model, wanted):
    """The tasks whose outputs the model gives now."""
    return [t for t in METHODS if torch.equal(model(batch()), wanted[t])]


def nothing_is_left(model):
    here = model.fc.adapter.adaptergraph_slot.here
    return vars(here) == {"branch": None, "rows": None, "backward": -1, "opener": None, "blocks": []}


def steps(model, task, wanted, count=3):
    """A generator that is suspended inside its block."""
    with model.task(task):
        for _ in range(count):
            yield runs(model, wanted)


# ---------------------------------------------------------------------- generators


def test_a_generator_alone_runs_its_task(model, wanted):
    assert list(steps(model, "b", wanted)) == [["b"]] * 3
    assert nothing_is_left(model)


@pytest.mark.parametrize("first", ["one", "other"])
def test_two_generators_are_not_confused(model, wanted, first):
    one, other = steps(model, "a", wanted), steps(model, "b", wanted)
    assert next(one) == ["a"]
    with pytest.raises(ag.GraphError, match=WAITS.format("steps")):
        next(other)
    assert next(one) == ["a"]
    (one if first == "one" else other).close()
    (other if first == "one" else one).close()
    assert nothing_is_left(model)
    assert next(steps(model, "b", wanted)) == ["b"]


def test_who_uses_a_generator_is_not_given_its_task(model, wanted):
    model.set_task("a")
    one = steps(model, "b", wanted)
    next(one)
    with pytest.raises(ag.GraphError, match=WAITS.format("steps")):
        model(batch())
    with pytest.raises(ag.GraphError, match=WAITS.format("steps")), model.task("c"):
        pass
    assert torch.equal(model(batch(), task="c"), wanted["c"])
    assert next(one) == ["b"]
    one.close()
    assert runs(model, wanted) == ["a"]


def test_a_generator_inside_the_block_of_another(model, wanted):
    def outer():
        with model.task("a"):
            yield from steps(model, "b", wanted)
            yield runs(model, wanted)

    assert list(outer()) == [["b"], ["b"], ["b"], ["a"]]
    assert nothing_is_left(model)


def test_a_block_that_is_left_before_one_that_was_entered_later(model, wanted):
    one = steps(model, "b", wanted)
    with model.task("a"):
        assert next(one) == ["b"]
    assert next(one) == ["b"]
    one.close()
    assert nothing_is_left(model)
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(model.task("a"))
    second.enter_context(model.task("b"))
    first.close()
    assert runs(model, wanted) == ["b"]
    second.close()
    assert nothing_is_left(model)


def test_a_generator_that_is_forgotten_leaves_nothing(model, wanted):
    one = steps(model, "b", wanted)
    next(one)
    del one
    gc.collect()
    assert nothing_is_left(model)


def test_a_helper_below_a_generator_belongs_to_it(model, wanted):
    class Helper:
        def __enter__(self):
            self.block = model.task("b")
            self.block.__enter__()

        def __exit__(self, *error):
            self.block.__exit__(*error)

    def helped():
        with Helper():
            yield runs(model, wanted)

    one = helped()
    assert next(one) == ["b"]
    with pytest.raises(ag.GraphError, match=WAITS.format("helped")):
        model(batch())
    one.close()
    assert nothing_is_left(model)


def test_contextlib_may_wrap_a_block(model, wanted):
    @contextlib.contextmanager
    def wrapped(task):
        with model.task(task):
            yield

    with wrapped("b"), contextlib.ExitStack() as stack:
        assert runs(model, wanted) == ["b"]
        stack.enter_context(wrapped("c"))
        assert runs(model, wanted) == ["c"]
        with model.task("a"):
            assert runs(model, wanted) == ["a"]
    assert nothing_is_left(model)

    def generator():
        with wrapped("b"):
            yield runs(model, wanted)

    one = generator()
    assert next(one) == ["b"]
    with pytest.raises(ag.GraphError, match=WAITS.format("generator")):
        model(batch())
    one.close()


# ---------------------------------------------------------------------- coroutines


def test_coroutines_are_not_confused(model, wanted):
    async def waits(task, awaits=True):
        with model.task(task):
            seen = [runs(model, wanted)]
            if awaits:
                await asyncio.sleep(0)
            return [*seen, runs(model, wanted)]

    async def calls(task):
        await asyncio.sleep(0)
        return torch.equal(model(batch(), task=task), wanted[task])

    async def plain():
        return runs(model, wanted)

    async def all_of(*work):
        return await asyncio.gather(*work, return_exceptions=True)

    assert asyncio.run(all_of(waits("a", awaits=False), waits("b", awaits=False))) == [[["a"]] * 2, [["b"]] * 2]
    one, error = asyncio.run(all_of(waits("a"), waits("b")))
    assert one == [["a"]] * 2
    with pytest.raises(ag.GraphError, match=WAITS.format("waits")):
        raise error
    model.set_task("c")
    one, error, right = asyncio.run(all_of(waits("a"), plain(), calls("b")))
    assert (one, right) == ([["a"]] * 2, True)
    with pytest.raises(ag.GraphError, match=WAITS.format("waits")):
        raise error
    assert nothing_is_left(model)


def test_a_block_around_what_is_awaited_in_the_same_coroutine(model, wanted):
    async def below():
        with model.task("b"):
            seen = runs(model, wanted)
        await asyncio.sleep(0)
        return [seen, runs(model, wanted)]

    @contextlib.asynccontextmanager
    async def wrapped():
        with model.task("a"):
            yield

    async def above():
        async with wrapped():
            return [*await below(), runs(model, wanted)]

    assert asyncio.run(above()) == [["b"], ["a"], ["a"]]
    assert nothing_is_left(model)


async def a_coroutine(stack, block):
    stack.enter_context(block)
    await asyncio.sleep(0)
    return "done"


async def a_coroutine_without_a_value(stack, block):
    await asyncio.sleep(0)
    stack.enter_context(block)


def a_generator(stack, block):
    yield stack.enter_context(block)


def a_generator_that_tries(stack, block):
    try:
        yield
        stack.enter_context(block)
        return
    finally:
        stack.callback(int)


async def an_async_generator(stack, block):
    yield stack.enter_context(block)


def finish(opener):
    """Runs it to its end."""

    async def below():
        async for _ in opener:
            pass

    async def above():
        return await opener

    if hasattr(opener, "__await__"):
        asyncio.run(above())
    elif hasattr(opener, "__anext__"):
        asyncio.run(below())
    else:
        list(opener)


OPENERS = [a_coroutine, a_coroutine_without_a_value, a_generator, a_generator_that_tries, an_async_generator]


@pytest.mark.parametrize("opener", OPENERS)
def test_who_returned_left_its_block_to_who_holds_it(model, wanted, opener):
    model.set_task("c")
    with contextlib.ExitStack() as stack:
        finish(opener(stack, model.task("b")))
        assert runs(model, wanted) == ["b"]
        assert torch.equal(model(batch(), task="a"), wanted["a"])
        assert list(steps(model, "a", wanted)) == [["a"]] * 3
        with model.task("a"):
            assert runs(model, wanted) == ["a"]
        assert runs(model, wanted) == ["b"]
        one = steps(model, "a", wanted)
        next(one)
        with pytest.raises(ag.GraphError, match=WAITS.format("steps")):
            model(batch())
        one.close()
        finish(opener(stack, model.task("a")))
        assert runs(model, wanted) == ["a"]
    assert runs(model, wanted) == ["c"]
    assert nothing_is_left(model)


def test_who_has_not_returned_still_waits(model):
    with contextlib.ExitStack() as stack:
        one = a_generator(stack, model.task("b"))
        next(one)
        with pytest.raises(ag.GraphError, match=WAITS.format("a_generator")):
            model(batch())
        assert next(one, "done") == "done"
        model(batch())


# ---------------------------------------------------------------------- threads


def in_a_thread(call):
    """What a call in another thread gives, or the error that it raised."""
    out = []

    def work():
        try:
            out.append(call())
        except Exception as error:
            out.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return out[0]


def test_a_generator_that_goes_on_in_another_thread(model):
    model.set_task("a")

    def generator():
        with model.task("b"):
            model(batch())
            yield

    one = generator()
    next(one)
    error = in_a_thread(lambda: next(one, None))
    message = r"^a block of ag\.task was left in another thread than it was entered in; there it chose nothing\n"
    with pytest.raises(ag.GraphError, match=message):
        raise error
    assert nothing_is_left(model)
    two = generator()
    next(two)
    assert in_a_thread(two.close) is None
    assert nothing_is_left(model)


def test_one_block_object_in_two_threads(model, wanted):
    block = model.task("b")
    entered, leave = threading.Event(), threading.Event()

    def other():
        with block:
            entered.set()
            leave.wait()
            return runs(model, wanted)

    out = []
    thread = threading.Thread(target=lambda: out.append(other()))
    with block:
        thread.start()
        entered.wait()
        with block:
            pass
        assert runs(model, wanted) == ["b"]
    assert nothing_is_left(model)
    leave.set()
    thread.join()
    assert out == [["b"]]


# ---------------------------------------------------------------------- compiled code


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_block_inside_compiled_code(model, wanted, fullgraph):
    model.set_task("a")

    def call(x, task):
        with model.task(task):
            out = model(x)
            if not fullgraph:
                torch._dynamo.graph_break()
                out = (out + model(x)) / 2
            return out

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=fullgraph)
    for task in METHODS:
        torch.testing.assert_close(compiled(batch(), task), wanted[task])
    assert nothing_is_left(model)


def test_generators_that_call_compiled_code(model, wanted):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def generator(task):
        with ag.task(compiled, task):
            for _ in range(2):
                yield torch.equal(compiled(batch()), wanted[task])

    one = generator("a")
    assert next(one)
    with pytest.raises(ag.GraphError, match=WAITS.format("generator")):
        next(generator("b"))
    assert next(one)
    one.close()
    assert list(generator("b")) == [True, True]
