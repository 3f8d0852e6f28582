"""Operations in forwards that take another way without an argument, or in training, than when they were traced."""

import copy

import byhand
import pytest
import torch
import torch.nn.functional as F
from cells import ALL
from hypothesis import given
from hypothesis import strategies as st
from test_hosted import same
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import adaptergraph as ag
from adaptergraph.hosting.lowering import counterparts

BODY = ag.Bottleneck(4)
IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
PADDED = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 7, [0] * 3 + [1] * 4])}
CALLS = {"padded": PADDED, "plain": {"input_ids": IDS}, "short": {"input_ids": IDS[:1, :4]}}
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(scope="module", params=[4, 2], ids=["heads", "grouped_heads"])
def llama(request):
    """Torch's attention: under fake tensors it gets a mask, on real ones none where no token is padding.

    Where heads are in groups, their keys are repeated only where there is a mask.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=request.param,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


class At:
    """Runs a body on the first of the results of a function that a forward calls, in place of that function."""

    def __init__(self, body, owner, name, part=None):
        self.body, self.owner, self.name, self.part = body, owner, name, part

    def __enter__(self):
        self.function, self.calls = getattr(self.owner, self.name), 0
        setattr(self.owner, self.name, self)

    def __exit__(self, *error):
        setattr(self.owner, self.name, self.function)

    def __call__(self, *args, **kwargs):
        out = self.function(*args, **kwargs)
        self.calls += 1
        if self.calls > 1:
            return out
        return self.body(out, None) if self.part is None else (self.body(out[0], None), *out[1:])


WHERE = {
    "scaled_dot_product_attention": (F, "scaled_dot_product_attention", None),
    "add": (modeling_llama, "apply_rotary_pos_emb", 0),
    "contiguous": (modeling_llama.ALL_ATTENTION_FUNCTIONS, "sdpa", 0),
}


@pytest.mark.parametrize("traced", CALLS)
@pytest.mark.parametrize("operation", ["scaled_dot_product_attention", "add"])
def test_attention_with_and_without_a_mask(llama, traced, operation):
    graph = ag.trace(llama, **CALLS[traced]).splice(f"{ATTENTION}/{operation}", BODY)
    model = byhand.randomise(graph.compile())
    body = byhand.Body(model.get_submodule(f"{ATTENTION}.adapter_{operation}"))
    for training in (False, True):
        model.train(training)
        llama.train(training)
        for call in CALLS.values():
            with At(body, *WHERE[operation]):
                wanted = llama(**call).logits
            found = model(**call).logits
            assert torch.equal(found, wanted)
            assert not torch.equal(found, llama(**call).logits)
            own = model.get_submodule(f"{ATTENTION}.adapter_{operation}").parameters()
            same(
                torch.autograd.grad(found.pow(2).mean(), own), torch.autograd.grad(wanted.pow(2).mean(), body.values())
            )
    llama.eval()


@pytest.mark.parametrize("operation", ["scaled_dot_product_attention", "add", "contiguous_1"])
def test_it_goes_on_working_in_one_graph_in_copies_and_in_pickles(llama, operation, tmp_path):
    model = byhand.randomise(ag.trace(llama, **PADDED).splice(f"{ATTENTION}/{operation}", BODY).compile())
    torch.save(model, tmp_path / "model")
    others = [copy.deepcopy(model), torch.load(tmp_path / "model", weights_only=False)]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for call in CALLS.values():
        wanted = model(**call).logits
        assert all(torch.equal(other(**call).logits, wanted) for other in others)
        torch.testing.assert_close(compiled(**call).logits, wanted)


@pytest.mark.parametrize("llama", [2], ids=["grouped_heads"], indirect=True)
def test_what_is_there_only_with_a_mask(llama):
    """The keys of grouped heads are repeated only then, so such a body cannot run without."""
    model = byhand.randomise(ag.trace(llama, **PADDED).splice(f"{ATTENTION}/reshape_1", BODY).compile())
    assert not torch.equal(model(**PADDED).logits, llama(**PADDED).logits)
    with pytest.raises(
        ag.GraphError, match="'attention_mask' is None here, but the forward was lowered for a value"
    ) as error:
        model(input_ids=IDS)
    assert "it runs other operations than when it was traced: 'reshape_1' may not be one of them" in str(error.value)
    assert "give it, or splice at a module instead of an operation" in str(error.value)


def test_attention_with_a_cache_and_without(llama):
    """Traced as people call it, with a cache that the model makes; it is copied to lower the forward."""
    base = copy.deepcopy(llama)
    base.config.use_cache = True
    at = f"{ATTENTION}/scaled_dot_product_attention"
    model = byhand.randomise(ag.trace(base, **PADDED).splice(at, BODY).compile())
    body = byhand.Body(model.get_submodule(f"{ATTENTION}.adapter_scaled_dot_product_attention"))
    for call in (*CALLS.values(), {**PADDED, "use_cache": False}, {"input_ids": IDS, "use_cache": False}):
        with At(body, *WHERE["scaled_dot_product_attention"]):
            wanted = base(**call)
        found = model(**call)
        assert torch.equal(found.logits, wanted.logits)
        if call.get("use_cache", True):
            pairs = zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True)
            assert all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs)
            more = torch.cat([PADDED["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
    # two more tokens on the cache of a padded call
    last = [one(**PADDED) for one in (model, base)]
    with At(body, *WHERE["scaled_dot_product_attention"]):
        wanted = base(**PADDED)
    with At(body, *WHERE["scaled_dot_product_attention"]):
        wanted = base(input_ids=IDS[:, :2], attention_mask=more, past_key_values=wanted.past_key_values).logits
    found = model(input_ids=IDS[:, :2], attention_mask=more, past_key_values=last[0].past_key_values).logits
    assert torch.equal(found, wanted)
    with pytest.raises(
        ag.GraphError,
        match=r"what it branches on \(.*\.shape\[2\] > 1\) is (True|False) here, but the forward was lowered",
    ):
        model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, use_cache=True)


def test_gpt2_without_the_mask_that_it_was_traced_with():
    case = ALL["gpt2"]
    base = case.model().requires_grad_(False)
    kwargs = {**case.args()[1], "use_cache": False}
    padded = {**kwargs, "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    at = "transformer.h.0.attn/view"
    model = byhand.randomise(ag.trace(base, **padded).splice(at, BODY).compile())
    other = ag.trace(base, **kwargs).splice(at, BODY).compile(state=model.state_dict())
    for call in (padded, kwargs):
        same(model(**call), other(**call))
        assert not torch.equal(model(**call).logits, base(**call).logits)


# ---------------------------------------------------------------------- plain forwards


class Renamed(nn.Module):
    """A function is given what it is given, under another name, and reads it only where it is there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)
        self.body = lambda h: h

    def forward(self, x, mask=None):
        h = self.body(self.norm(x) * 2 + x)
        other = mask
        return pick(h, [other]) + h


class Unread(Renamed):
    """A function asks whether it is there, no more."""

    def forward(self, x, mask=None):
        h = self.body(self.norm(x) * 2 + x)
        return (h.tanh() if mask is None else h * 0.5) + h


class Two(Renamed):
    """Two arguments, each of which may be left out."""

    def forward(self, x, mask=None, bias=None):
        h = self.body(self.norm(x) * 2 + x)
        h = h if mask is None else h * mask
        return self.fc(h if bias is None else h - bias)


class Noisy(Renamed):
    """Does something more in training."""

    def forward(self, x, mask=None):
        h = self.norm(x)
        if self.training:
            h = h.tanh()
        h = self.body(h * 2)
        return self.fc(h) + h


def pick(h, masks):
    return h.tanh() if masks[0] is None else h * masks[0]


class Wrapped(nn.Module):
    """Hands on what it is given."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, **more):
        return self.inner(x, **more)


def spliced(kind, at, **traced):
    """A model with a large body at an operation, and one that runs the same body by hand."""
    base = Wrapped(kind())
    model = byhand.randomise(ag.trace(base, torch.randn(2, 8), **traced).splice(f"inner/{at}", BODY).compile())
    hand = Wrapped(kind())
    body = byhand.Body(model.get_submodule(f"inner.adapter_{at}"))
    hand.inner.body = lambda h: body(h, None)
    return model, hand


@pytest.mark.parametrize("kind", [Renamed, Unread, Two])
def test_calls_without_an_argument_that_was_traced(kind):
    x, mask = torch.randn(3, 8), torch.rand(8)
    model, hand = spliced(kind, "add", mask=torch.ones(8))
    for training in (False, True):
        for more in ({"mask": mask}, {}, {"mask": None}):
            assert torch.equal(model.train(training)(x, **more), hand.train(training)(x, **more))
    assert not torch.equal(model(x), model(x, mask=mask))


def test_of_several_arguments_any_may_be_left_out():
    x, mask, bias = torch.randn(3, 8), torch.rand(8), torch.rand(8)
    model, hand = spliced(Two, "add", mask=mask, bias=bias)
    for more in ({"mask": mask, "bias": bias}, {"mask": mask}, {"bias": bias}, {}):
        assert torch.equal(model(x, **more), hand(x, **more))


class Either(Renamed):
    """Needs one of two."""

    def forward(self, x, mask=None, bias=None):
        h = self.body(self.norm(x) * 2 + x)
        if mask is None:
            return self.fc(h - bias)
        return self.fc(h * mask if bias is None else h * mask - bias)


def test_what_fails_without_both_says_so():
    x, mask, bias = torch.randn(3, 8), torch.rand(8), torch.rand(8)
    model, hand = spliced(Either, "add", mask=mask, bias=bias)
    for more in ({"mask": mask, "bias": bias}, {"mask": mask}, {"bias": bias}):
        assert torch.equal(model(x, **more), hand(x, **more))
    with pytest.raises(ag.GraphError, match="the arguments 'mask' and 'bias' are None here, but the forward") as error:
        model(x)
    assert "it fails on values of the traced shapes: unsupported operand" in str(error.value)


def test_an_argument_that_was_not_traced_is_refused_in_a_call():
    model, _ = spliced(Unread, "add")
    with pytest.raises(ag.GraphError, match=r"'mask' is .* here, but the forward was lowered for None") as error:
        model(torch.randn(2, 8), mask=torch.ones(8))
    assert "trace the model as it is called and set now, or splice at a module" in str(error.value)


@pytest.mark.parametrize("training", [False, True])
def test_what_training_does_more_is_no_other_operation(training):
    base = Wrapped(Noisy()).train(training)
    x = torch.randn(2, 8)
    model = byhand.randomise(ag.trace(base, x).splice("inner/mul", BODY).compile())
    hand = Wrapped(Noisy())
    body = byhand.Body(model.get_submodule("inner.adapter_mul"))
    hand.inner.body = lambda h: body(h, None)
    for mode in (False, True):
        assert torch.equal(model.train(mode)(x), hand.train(mode)(x))


class Unclear(Noisy):
    """What it does more in training is of the same kind."""

    def forward(self, x, mask=None):
        h = self.norm(x)
        if self.training:
            h = h * 3
        h = h * 2
        return self.fc(h) + h


@pytest.mark.parametrize("training", [False, True])
def test_an_operation_that_could_be_either_of_two_is_refused(training):
    base = Wrapped(Unclear()).train(training)
    graph = ag.trace(base, torch.randn(2, 8)).splice("inner/mul", BODY)
    with pytest.raises(
        ag.BadSplice, match="'inner/mul' is an operation inside a forward that cannot be reached"
    ) as error:
        graph.compile()
    assert "it runs other operations than when it was traced: 'mul' may not be one of them" in str(error.value)
    assert "splice at a module near it: 'inner'" in str(error.value)


KINDS = st.lists(st.sampled_from(["add", "mul", "view"]), max_size=6)


def named(kinds):
    return [f"{k}_{n}" if (n := kinds[:i].count(k)) else k for i, k in enumerate(kinds)]


@given(KINDS, KINDS, KINDS, KINDS)
def test_counterparts_are_of_one_kind_in_order_and_the_only_ones(first, one, two, last):
    mine, theirs = first + one + last, first + two + last
    found = counterparts(named(mine), named(theirs))
    pairs = [(named(mine).index(a), named(theirs).index(b)) for a, b in found.items()]
    assert all(mine[i] == theirs[j] for i, j in pairs)
    assert pairs == sorted(pairs)
    assert len({j for _, j in pairs}) == len(pairs)
    if mine == theirs:
        assert len(found) == len(mine)
    if not set(one) & set(two) and not (set(one) | set(two)) & set(first + last):
        # nothing in the middle looks like anything around it
        around = {*range(len(first)), *range(len(mine) - len(last), len(mine))}
        assert {i for i, _ in pairs} == around
