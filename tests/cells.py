"""Kinds of adapters at the places of models: what is spliced, and the same written by hand into the model's forwards.

Nothing here uses hosting code of the library: a forward is replaced on the instance, or a block's forward is written
anew, with the modified arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from byhand import lora, on_features, on_first_float
from models import CASES, MORE, Case
from torch import Tensor, nn

import adaptergraph as ag

Hands = Mapping[str, "Hand"]


class Hand(nn.Module):
    """The body at one host by hand: copies of its linear layers in a formula that is written here; counts its calls."""

    def __init__(self, compiled: nn.Module, formula: Callable[..., Tensor]) -> None:
        super().__init__()
        self.calls = 0
        self.formula = formula
        for name, child in compiled.named_modules():
            if isinstance(child, nn.Linear):
                own = nn.Linear(child.in_features, child.out_features).to(child.weight.dtype)
                own.load_state_dict(child.state_dict())
                self.add_module(name, own)

    def forward(self, value: Tensor, *more: Any) -> Tensor:
        self.calls += 1
        if value.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu"):
            return self.formula(self, value, *more)
        # a host of half precision: what the body reads is widened, what it gives is narrowed
        wide = [[t.float() for t in m] if isinstance(m, list) else m.float() for m in more]
        return self.formula(self, value.float(), *wide).to(value.dtype)


def serial(hand: Any, value: Tensor) -> Tensor:
    return parallel(hand, value, value)


def parallel(hand: Any, value: Tensor, given: Tensor) -> Tensor:
    return value + on_features(hand.down.in_features, given, lambda h: hand.up(torch.relu(hand.down(h))))


def low_rank(hand: Any, value: Tensor, given: Tensor) -> Tensor:
    return value + hand.b(hand.a(given))


def climbed(hand: Any, value: Tensor, rungs: list[Tensor]) -> Tensor:
    for i, rung in enumerate(rungs):
        rung = rung[:, 0] if rung.dim() > value.dim() else rung
        value = value + getattr(hand, f"rung_{i}")(torch.tanh(rung))
    return value


# ---------------------------------------------------------------------- forwards written over


def first_of(args: Any, kwargs: Any) -> Tensor:
    """The first argument of a call."""
    return args[0] if args else next(iter(kwargs.values()))


def wrap_after(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`change(output, input)` takes the place of what a module returns first."""
    old = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = first_of(args, kwargs)
        return on_first_float(old(*args, **kwargs), lambda value: change(value, given))

    module.forward = forward


def wrap_before(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """`change(input)` takes the place of a module's first argument."""
    old = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            return old(change(args[0]), *args[1:], **kwargs)
        name = next(iter(kwargs))
        return old(**{**kwargs, name: change(kwargs[name])})

    module.forward = forward


def note(module: nn.Module, given: bool = False, overwritten: bool = False) -> list[Tensor]:
    """A list that holds what a module returned last, or was given; a copy if it is written over later."""
    seen: list[Tensor] = []

    def change(value: Tensor, argument: Tensor) -> Tensor:
        noted = argument if given else value
        # a copy is another reader to autograd, which adds up gradients in another order then
        seen[:] = [noted.clone() if overwritten else noted]
        return value

    wrap_after(module, change)
    return seen


# ---------------------------------------------------------------------- blocks written anew, with a body inside


def llama_block(layer: Any, hand: Hand) -> None:
    """Also of its relatives: a norm, attention, a sum, the body; a norm, a feed-forward, a sum."""

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        middle = hand(hidden_states + attended)
        return middle + layer.mlp(layer.post_attention_layernorm(middle))

    layer.forward = forward


def gpt2_block(layer: Any, hand: Hand) -> None:
    def forward(h: Tensor, past: Any = None, mask: Any = None, *cross: Any, use_cache: Any = False, **more: Any) -> Any:
        more = {n: v for n, v in more.items() if not n.startswith("encoder_")}
        attended, _ = layer.attn(layer.ln_1(h), past_key_values=past, attention_mask=mask, use_cache=use_cache, **more)
        middle = hand(attended + h)
        return middle + layer.mlp(layer.ln_2(middle))

    layer.forward = forward


def vit_block(layer: Any, hand: Hand) -> None:
    def forward(h: Tensor, mask: Any = None, **more: Any) -> Tensor:
        attended, _ = layer.attention(layer.layernorm_before(h), mask, **more)
        middle = hand(layer.dropout(attended) + h)
        return layer.dropout(layer.mlp(layer.layernorm_after(middle))) + middle

    layer.forward = forward


def whisper_block(layer: Any, hand: Hand) -> None:
    """An encoder's."""
    drop = nn.functional.dropout

    def forward(h: Tensor, attention_mask: Any, **more: Any) -> Tensor:
        attended, _ = layer.self_attn(
            hidden_states=layer.self_attn_layer_norm(h), attention_mask=attention_mask, **more
        )
        middle = hand(h + drop(attended, layer.dropout, layer.training))
        up = layer.activation_fn(layer.fc1(layer.final_layer_norm(middle)))
        down = layer.fc2(drop(up, layer.activation_dropout, layer.training))
        return middle + drop(down, layer.dropout, layer.training)

    layer.forward = forward


def conv_block(layer: Any, hand: Hand) -> None:
    def forward(x: Tensor) -> Tensor:
        middle = hand(x + layer.conv1(torch.relu(layer.norm1(x))))
        return middle + layer.conv2(torch.relu(layer.norm2(middle)))

    layer.forward = forward


def before_child(name: str) -> Callable[[Any, Hand], None]:
    """The sum goes to one child only, which is given the adapted one."""
    return lambda block, hand: wrap_before(block.get_submodule(name), hand)


def at_output(block: Any, hand: Hand) -> None:
    """The sum is what the block returns."""
    wrap_after(block, lambda value, given: hand(value))


# ---------------------------------------------------------------------- the table


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the kinds of adapters go in one model.

    Attributes:
        feed_forward: hosts whose input a parallel body reads, or of spans the ends.
        start: for the end of a span its start.
        low_rank: hosts of a low-rank product.
        layers: what a ladder reads.
        top: where it is read.
        cross: a module in layer 0, and one in the middle of layer 1.
        sums: selects sums inside blocks, and how such a block is written by hand.
        before: hosts whose input is replaced.
    """

    feed_forward: str
    low_rank: str
    layers: tuple[str, ...]
    top: str
    cross: tuple[str, str]
    before: str
    sums: tuple[str, Callable[[Any, Hand], None]] | None = None
    start: tuple[str, str] | None = None


def _layers(stem: str) -> tuple[str, ...]:
    return f"{stem}.0", f"{stem}.1"


def _bert(name: str, top: str) -> Places:
    layer = f"{name}.encoder.layer"
    return Places(
        f"{layer}.*.output.dense",
        f"{layer}.*.attention.self.{{query,value}}",
        _layers(layer),
        top,
        (f"{layer}.0.intermediate.dense", f"{layer}.1.attention.output.dense"),
        f"{layer}.*.{{attention.output.LayerNorm,output.dense}}",
        (f"{layer}.*.{{attention.output,output}}/add", before_child("LayerNorm")),
        start=(".output.dense", ".intermediate"),
    )


PLACES = {
    "bert": _bert("bert", "bert.pooler.dense"),
    "roberta": _bert("roberta", "classifier.dense"),
    "distilbert": Places(
        "distilbert.transformer.layer.*.ffn",
        "distilbert.transformer.layer.*.attention.{q_lin,v_lin}",
        ("distilbert.embeddings", "distilbert.transformer.layer.0"),
        "distilbert.transformer.layer.1.output_layer_norm",
        ("distilbert.transformer.layer.0.attention.out_lin", "distilbert.transformer.layer.1.ffn.lin1"),
        "distilbert.transformer.layer.*.ffn.lin2",
        ("distilbert.transformer.layer.*/add", before_child("sa_layer_norm")),
    ),
    "gpt2": Places(
        "transformer.h.*.mlp",
        "transformer.h.*.attn.c_attn",
        _layers("transformer.h"),
        "transformer.ln_f",
        ("transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_proj"),
        "transformer.h.*.{ln_2,mlp.c_proj}",
        ("transformer.h.*/add", gpt2_block),
    ),
    "llama": Places(
        "model.layers.*.mlp",
        "model.layers.*.self_attn.{q_proj,v_proj}",
        _layers("model.layers"),
        "model.norm",
        ("model.layers.0.mlp.act_fn", "model.layers.1.self_attn.o_proj"),
        "model.layers.*.{self_attn.o_proj,mlp}",
        ("model.layers.*/add", llama_block),
    ),
    "mixtral": Places(
        "model.layers.*.mlp",
        "model.layers.*.self_attn.{q_proj,v_proj}",
        _layers("model.layers"),
        "model.norm",
        ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp"),
        "model.layers.*.mlp",
        ("model.layers.*/add", llama_block),
    ),
    "mamba": Places(
        "backbone.layers.*.mixer",
        "backbone.layers.*.mixer.in_proj",
        _layers("backbone.layers"),
        "backbone.norm_f",
        ("backbone.layers.0.norm", "backbone.layers.1.mixer.out_proj"),
        "backbone.layers.*.mixer.out_proj",
        ("backbone.layers.*/add", at_output),
    ),
    "t5": Places(
        "**.DenseReluDense",
        "**.{SelfAttention,EncDecAttention}.{q,v}",
        _layers("decoder.block"),
        "decoder.final_layer_norm",
        ("encoder.block.0.layer.0.SelfAttention.v", "encoder.block.1.layer.1.DenseReluDense.wi"),
        "**.DenseReluDense.wo",
        ("{encoder,decoder}.block.*.layer.*/add", at_output),
    ),
    "vit": Places(
        "vit.layers.*.mlp",
        "vit.layers.*.attention.{q_proj,v_proj}",
        _layers("vit.layers"),
        "vit.layernorm",
        ("vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc2"),
        "vit.layers.*.{layernorm_after,mlp.fc2}",
        ("vit.layers.*/add", vit_block),
    ),
    "whisper": Places(
        "**.fc2",
        "**.{q_proj,v_proj}",
        _layers("model.decoder.layers"),
        "model.decoder.layer_norm",
        ("model.encoder.layers.0.self_attn.v_proj", "model.encoder.layers.1.fc1"),
        "**.{fc1,fc2}",
        ("model.encoder.layers.*/add", whisper_block),
        start=(".fc2", ".fc1"),
    ),
    "encoder": Places(
        "layers.*.linear2",
        "layers.*.linear1",
        ("layers.0", "layers.1.linear1"),
        "layers.1.norm2",
        ("layers.0.linear1", "layers.1.norm1"),
        "layers.*.{linear1,norm2}",
        ("layers.*/add", before_child("norm1")),
        start=(".linear2", ".linear1"),
    ),
    "resnet": Places(
        "resnet.encoder.stages.*.layers.1.layer",
        "resnet.encoder.stages.0.layers.1.layer.{0,1}.convolution",
        ("resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.0.layers.1.layer"),
        "resnet.encoder.stages.0.layers.1.activation",
        (
            "resnet.encoder.stages.0.layers.0.layer.0.convolution",
            "resnet.encoder.stages.0.layers.1.layer.1.convolution",
        ),
        "resnet.encoder.stages.*.layers.*.layer.1.convolution",
    ),
    "convnet": Places(
        "layers.*.conv2",
        "layers.*.conv1",
        _layers("layers"),
        "norm",
        ("layers.0.conv1", "layers.1.conv2"),
        "layers.*.norm2",
        ("layers.*/add", conv_block),
        start=(".conv2", ".norm2"),
    ),
}

KINDS = ("serial", "parallel", "low_rank", "ladder", "cross", "sums", "before")
ALL = CASES | MORE


@dataclasses.dataclass(frozen=True)
class Cell:
    """One kind of adapter in one model."""

    name: str
    kind: str

    @property
    def case(self) -> Case:
        return ALL[self.name]

    @property
    def places(self) -> Places:
        return PLACES[self.name]

    def start(self, host: str) -> str:
        """The module whose input a parallel body at this host reads."""
        old, new = self.places.start or ("", "")
        return host.removesuffix(old) + new if old else host

    def splice(self, graph: ag.Graph, label: str = "adapter") -> ag.Graph:
        """The graph with the bodies of this cell."""
        at, plain = self.places, ag.Bottleneck(8)
        if self.kind == "serial":
            return graph.splice(list(self.case.sites), plain, name=label)
        if self.kind == "before":
            return graph.splice(at.before, plain, where="before", name=label)
        if self.kind == "low_rank":
            return graph.splice(at.low_rank, lora, where="around", name=label)
        if self.kind == "sums":
            assert at.sums is not None
            return graph.splice(at.sums[0], plain, name=label)
        if self.kind == "ladder":
            return graph.splice(at.top, Rungs(at.layers), name=label)
        if self.kind == "cross":
            return graph.splice(at.cross[1], Rungs(at.cross[:1]), name=label)
        if at.start is None:
            return graph.splice(at.feed_forward, ag.Bottleneck(8, parallel=True), name=label)
        first = self.start(at.feed_forward)
        return graph.splice(ag.span(first, at.feed_forward), ag.Bottleneck(8, parallel=True), name=label)

    def by_hand(self, adapted: nn.Module, model: nn.Module | None = None) -> tuple[nn.Module, dict[str, Hand]]:
        """The model with copies of the bodies of an adapted one in forwards written by hand, and these by name."""
        model = self.case.model() if model is None else model
        own = dict(adapted.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(own[name].requires_grad)
        hands = {}
        for name, body in ag.graph_of(adapted).bodies.items():
            hands[name] = self.hand(adapted.get_submodule(name))
            self.write(model, body.host, hands[name])
        return model, hands

    def hand(self, compiled: nn.Module) -> Hand:
        """A body of this cell by hand."""
        formula = {"parallel": parallel, "low_rank": low_rank, "ladder": climbed, "cross": climbed}
        return Hand(compiled, formula.get(self.kind, serial))

    def write(self, model: nn.Module, host: str, hand: Hand) -> None:
        """One body, written into the forward of its host."""
        at = self.places
        module = model.get_submodule(host.partition("/")[0])
        if self.kind == "serial":
            wrap_after(module, lambda value, given: hand(value))
        elif self.kind == "before":
            wrap_before(module, hand)
        elif self.kind == "low_rank":
            wrap_after(module, hand)
        elif self.kind == "sums":
            assert at.sums is not None
            at.sums[1](module, hand)
        elif self.kind in ("ladder", "cross"):
            read = at.layers if self.kind == "ladder" else at.cross[:1]
            rungs = [note(model.get_submodule(r), overwritten=self.name == "resnet") for r in read]
            wrap_after(module, lambda value, given: hand(value, [seen[0] for seen in rungs]))
        else:
            start = note(model.get_submodule(self.start(host)), given=True)
            wrap_after(module, lambda value, given: hand(value, start[0]))

    def __str__(self) -> str:
        return f"{self.name}-{self.kind}"


@dataclasses.dataclass(frozen=True)
class Rungs:
    """A body that reads the outputs of some modules, wherever it stands; of sentences the first word, at a head."""

    layers: tuple[str, ...]

    def __call__(self, site: ag.Site) -> ag.Node:
        value = site.output
        for i, layer in enumerate(self.layers):
            tapped = site.graph[site.graph.value_of(layer).name]
            if len(tapped.shape) > len(value.shape):
                tapped = ag.nx(tapped, first_word)
            value = value + ag.dense(ag.tanh(tapped), value.shape[-1], name=f"rung_{i}")
        return value


def first_word(states: Tensor) -> Tensor:
    """Of each sentence the first word."""
    return states[:, 0]


CELLS = [Cell(name, kind) for name in PLACES for kind in KINDS if (kind != "sums" or PLACES[name].sums is not None)]
