"""What hosting costs: models with spliced bodies beside the same models modified by hand.

    python benchmarks/hosting.py [sites | bert | llama] [--rounds 30]

Both run in turn in one process and CPU time is taken, so that noise of the machine hits both alike; what counts is the
ratio, or for small tensors the difference for each site. By hand means: subclasses whose forward has the adapters
written in, as one would without a library. The outputs are compared before anything is timed. What is measured:

* `sites`: blocks of small linears, eager; microseconds for each site, and operations in the compiled graph;
* `bert`: a BERT-base-size model with 24 bottlenecks, forward and training step; trace, splice and compile, once;
* `llama`: four layers of the shape of a Llama with a billion parameters, bottlenecks after the residual add in the
  middle of each layer, and around each feed-forward.
"""

import argparse
import platform
import statistics
import time

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaModel
from transformers.models.bert.modeling_bert import BertOutput, BertSelfOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import adaptergraph as ag

# ---------------------------------------------------------------------- measuring


def interleaved(runs, rounds, inner=1):
    """CPU seconds of each run, taken in turn, the order turned round each time."""
    seconds = {name: [] for name in runs}
    for i in range(rounds + 3):
        for name in list(runs) if i % 2 else list(runs)[::-1]:
            start = time.process_time()
            for _ in range(inner):
                runs[name]()
            if i >= 3:
                seconds[name].append((time.process_time() - start) / inner)
    return seconds


def middle(values):
    ordered = sorted(values)
    return ordered[len(ordered) // 4], statistics.median(ordered), ordered[3 * len(ordered) // 4]


def report(what, seconds):
    ours, hand = seconds["spliced"], seconds["by hand"]
    low, ratio, high = middle([a / b for a, b in zip(ours, hand, strict=True)])
    print(
        f"{what:<22} by hand {statistics.median(hand) * 1e3:8.1f} ms   spliced {statistics.median(ours) * 1e3:8.1f} ms"
        f"   ratio {ratio:.3f}  (middle half {low:.3f} … {high:.3f}, of minima {min(ours) / min(hand):.3f})"
    )


def step(model, optimizer, batch):
    optimizer.zero_grad()
    output = model(**batch)
    loss = output.loss if "labels" in batch else output.last_hidden_state.square().mean()
    loss.backward()
    optimizer.step()


def side_by_side(what, ours, hand, batch, rounds):
    """Forward and training step of both."""
    models = {"spliced": ours, "by hand": hand}
    with torch.no_grad():
        report(f"{what} forward", interleaved({n: lambda m=m: m(**batch) for n, m in models.items()}, rounds))
    optimizers = {n: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for n, m in models.items()}
    for model in models.values():
        model.train()
    runs = {n: lambda m=m, o=optimizers[n]: step(m, o, batch) for n, m in models.items()}
    report(f"{what} training step", interleaved(runs, rounds))


# ---------------------------------------------------------------------- small tensors


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.one = nn.Linear(size, size)
        self.two = nn.Linear(size, size)

    def forward(self, x):
        h = x + self.one(x)
        return h + self.two(torch.relu(h))


class Blocks(nn.Module):
    def __init__(self, size, number, kind=Block):
        super().__init__()
        self.blocks = nn.ModuleList(kind(size) for _ in range(number))
        self.last = nn.Linear(size, size)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Houlsby(nn.Module):
    """An adapter as people write it; without its residual it adds to something else."""

    def __init__(self, size, bottleneck, residual=True):
        super().__init__()
        self.down = nn.Linear(size, bottleneck)
        self.up = nn.Linear(bottleneck, size)
        self.residual = residual

    def forward(self, x):
        added = self.up(torch.relu(self.down(x)))
        return x + added if self.residual else added


class Serial(Block):
    def __init__(self, size):
        super().__init__(size)
        self.adapter = Houlsby(size, 4)

    def forward(self, x):
        h = x + self.adapter(self.one(x))
        return h + self.two(torch.relu(h))


class Before(Serial):
    def forward(self, x):
        h = x + self.one(self.adapter(x))
        return h + self.two(torch.relu(h))


class MidBlock(Serial):
    def forward(self, x):
        h = self.adapter(x + self.one(x))
        return h + self.two(torch.relu(h))


class Parallel(Block):
    def __init__(self, size):
        super().__init__(size)
        self.adapter = Houlsby(size, 4, residual=False)

    def forward(self, x):
        h = x + self.one(x) + self.adapter(x)
        return h + self.two(torch.relu(h))


class Span(Parallel):
    def forward(self, x):
        h = x + self.one(x)
        return h + (self.two(torch.relu(h)) + self.adapter(x))


class Ladder(Blocks):
    """Reads the output of each block at the end."""

    def __init__(self, size, number):
        super().__init__(size, number)
        self.rungs = nn.ModuleList(nn.Linear(size, 4) for _ in range(number))
        self.up = nn.Linear(4, size)

    def forward(self, x):
        side = 0
        for block, rung in zip(self.blocks, self.rungs, strict=True):
            x = block(x)
            side = side + rung(x)
        return self.last(x) + self.up(side)


def rungs(number):
    """The same as a method."""

    def ladder(site):
        parts = [ag.dense(site.graph[f"blocks.{i}"], 4, name=f"rungs.{i}") for i in range(number)]
        return site.output + ag.dense(ag.add(parts), site.output.shape[-1], name="up")

    return ladder


def operations(model, x):
    """How many operations torch.compile sees."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    torch.compile(model, fullgraph=True, backend=counter)(x)
    return sum(node.op.startswith("call_") for graph in counter.graphs for node in graph.graph.nodes)


def sites(rounds, number=24, size=16):
    kinds = {
        "serial": (lambda g: g.splice("blocks.*.one", ag.Bottleneck(4)), lambda: Blocks(size, number, Serial)),
        "before": (
            lambda g: g.splice("blocks.*.one", ag.Bottleneck(4), where="before"),
            lambda: Blocks(size, number, Before),
        ),
        "parallel": (
            lambda g: g.splice("blocks.*.one", ag.Bottleneck(4, parallel=True)),
            lambda: Blocks(size, number, Parallel),
        ),
        "span": (
            lambda g: g.splice(ag.span("blocks.*.one", "blocks.*.two"), ag.Bottleneck(4, parallel=True)),
            lambda: Blocks(size, number, Span),
        ),
        "mid-block": (lambda g: g.splice("blocks.*/add", ag.Bottleneck(4)), lambda: Blocks(size, number, MidBlock)),
        "ladder": (lambda g: g.splice("last", rungs(number)), lambda: Ladder(size, number)),
    }
    print(f"{number} blocks of two {size} × {size} linears, batch 4, eager, no gradients; the base does nothing\n")
    print(f"{'kind':<10} {'by hand':>9} {'spliced':>9}  {'each site':>9}  middle half      operations compiled")
    torch.manual_seed(0)
    base = Blocks(size, number).eval()
    x = torch.randn(4, size)
    graph = ag.trace(base, x)
    for kind, (splice, make) in kinds.items():
        ours, hand = splice(graph).compile().eval(), make().eval()
        names = {n: p for n, p in ours.named_parameters() if n not in dict(base.named_parameters())}
        with torch.no_grad():
            for p in names.values():
                p.normal_(0, 0.1)
        copy_weights(ours, hand)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), hand(x), rtol=1e-4, atol=1e-4)
            times = interleaved({"spliced": lambda m=ours: m(x), "by hand": lambda m=hand: m(x)}, 4 * rounds, 5)
            low, each, high = middle([(a - b) / number * 1e6 for a, b in zip(*times.values(), strict=True)])
            counts = operations(ours, x), operations(hand, x)
        slow = {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()}
        print(
            f"{kind:<10} {slow['by hand']:6.2f} ms {slow['spliced']:6.2f} ms"
            f"  {each:+6.1f} µs  {low:+5.1f} … {high:+5.1f}    {counts[0]} beside {counts[1]} by hand"
        )
    print()


def copy_weights(ours, hand):
    """Bodies live below their hosts in one, and where they were written in the other."""
    names = {".one.adapter": ".adapter", ".two.adapter": ".adapter", ".adapter_add": ".adapter", "last.adapter.": ""}
    state = {}
    for name, value in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = value
    hand.load_state_dict(state)


# ---------------------------------------------------------------------- whole models


def once(what, fn, repeat=5):
    times, result = [], None
    for _ in range(repeat):
        start = time.perf_counter()
        result = fn()
        times.append(time.perf_counter() - start)
    print(f"{what:<14} {min(times):.3f} s  (median {statistics.median(times):.3f} s of {repeat})")
    return result, statistics.median(times)


def randomised(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter" in name:
                parameter.normal_(0, 0.02)
    return model


def by_hand(kind):
    class Adapted(kind):
        def forward(self, hidden_states, input_tensor):
            hidden_states = self.adapter(self.dense(hidden_states))
            return self.LayerNorm(self.dropout(hidden_states) + input_tensor)

    return Adapted


def bert(rounds):
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    print("BERT-base size, batch 8 × 32, 24 bottlenecks of 64\n")
    torch.manual_seed(0)
    base = BertForSequenceClassification(config)
    ids = torch.randint(0, config.vocab_size, (8, 32))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(8).long()}
    places = "bert.encoder.layer.*.{attention.output,output}.dense"
    graph, t_trace = once(
        "trace", lambda: ag.trace(base, input_ids=ids[:1], attention_mask=batch["attention_mask"][:1])
    )
    spliced, t_splice = once(
        "splice (24)",
        lambda: graph.unfreeze("classifier").splice(graph.select(places).expect(24), ag.Bottleneck(64)),
    )
    ours, t_compile = once("compile", spliced.compile)
    print(f"{'together':<14} {t_trace + t_splice + t_compile:.3f} s\n")
    torch.manual_seed(0)
    hand = BertForSequenceClassification(config)
    for layer in hand.bert.encoder.layer:
        for module, kind in ((layer.attention.output, BertSelfOutput), (layer.output, BertOutput)):
            module.__class__ = by_hand(kind)
            module.adapter = Houlsby(config.hidden_size, 64)
    state = randomised(ours).state_dict()
    hand.load_state_dict({k.replace(".dense.adapter.", ".adapter."): v for k, v in state.items()})
    for name, parameter in hand.named_parameters():
        parameter.requires_grad_(".adapter." in name or "classifier" in name)
    assert torch.equal(ours.eval()(**batch).logits, hand.eval()(**batch).logits)
    side_by_side("BERT-base", ours, hand, batch, rounds)
    print()


class HandLayer(LlamaDecoderLayer):
    """The layer with an adapter after its first residual add and one beside its feed-forward."""

    def forward(self, hidden_states, **given):
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
        hidden_states = self.adapter_add(residual + hidden_states)
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed) + self.adapter(normed))


def llama(rounds):
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1000,
        use_cache=False,
    )
    print("4 Llama layers of hidden 2048, feed-forward 8192, batch 2 × 64; bottlenecks of 64\n")
    torch.manual_seed(0)
    base = LlamaModel(config).eval()
    ids = torch.randint(0, config.vocab_size, (2, 64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    graph, _ = once("trace", lambda: ag.trace(base, **{k: v[:1, :8] for k, v in batch.items()}))
    spliced = graph.splice("layers.*/add", ag.Bottleneck(64)).splice("layers.*.mlp", ag.Bottleneck(64, parallel=True))
    ours, _ = once("compile", spliced.compile)
    print()
    torch.manual_seed(0)
    hand = LlamaModel(config).eval()
    for layer in hand.layers:
        layer.__class__ = HandLayer
        layer.adapter_add = Houlsby(2048, 64)
        layer.adapter = Houlsby(2048, 64, residual=False)
    state = randomised(ours).state_dict()
    hand.load_state_dict({k.replace(".mlp.adapter.", ".adapter."): v for k, v in state.items()})
    for name, parameter in hand.named_parameters():
        parameter.requires_grad_(".adapter" in name)
    torch.testing.assert_close(ours(**batch).last_hidden_state, hand(**batch).last_hidden_state)
    side_by_side("Llama layers", ours, hand, batch, max(3, rounds // 3))
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["sites", "bert", "llama"], help="all of them, if none is named")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, Python {platform.python_version()}, one thread\n")
    for what in [args.what] if args.what else ["sites", "bert", "llama"]:
        {"sites": sites, "bert": bert, "llama": llama}[what](args.rounds)


if __name__ == "__main__":
    main()
