"""How the library grows with the size of a graph, and what a compiled declared graph costs at each call.

    python benchmarks/scale.py [--sizes 1000 10000 50000] [--rounds 60]

The first table: CPU seconds of each verb on declared graphs (a chain of `dense`, `relu`, `add`), the least of 3
to 20 runs, and the slope of a straight line through log(seconds) over log(nodes): 1 is linear. The last row is a bare
loop: its slope is that of memory which no longer fits the cache. Python's garbage collector looks at everything there
is, torch included, whenever a quarter as much is new; that begins between the sizes, so the slope is also given of the
time without it. The second: a compiled graph's forward beside the same network written as a
plain nn.Module with the same weights, interleaved in one process, CPU time. Last: whether torch.compile takes each
compiled graph whole.
"""

import argparse
import datetime
import gc
import math
import os
import platform
import statistics
import time

import torch
from torch import nn

import adaptergraph as ag


def declared(count):
    """A chain of about `count` nodes in groups of four: `block.7.fc`, `.act`, `.out`, `.add`."""
    h = ag.input("x", shape=("batch", 8))
    for i in range(count // 4):
        t = ag.relu(ag.dense(h, 8, name=f"block.{i}.fc"), name=f"block.{i}.act")
        h = ag.add([h, ag.dense(t, 8, name=f"block.{i}.out")], name=f"block.{i}.add")
    return ag.Graph(h)


def tenth(graph):
    return [name for i, name in enumerate(graph) if i % 10 == 9]


class Collector:
    """CPU seconds that Python's garbage collector takes."""

    def __init__(self):
        self.seconds = 0.0
        self.start = 0.0

    def __call__(self, phase, info):
        now = time.process_time()
        if phase == "start":
            self.start = now
        else:
            self.seconds += now - self.start


def looked_at(graph):
    """One loop over the nodes that looks up what each reads: what any verb has to do."""
    seen = set()
    for name, node in graph._nodes.items():
        assert all(value in seen for value in node.inputs)
        seen.add(name)


def verbs(count):
    """For each verb on one graph CPU seconds, and how much of it the collector took; the quickest of 3 to 20 runs."""
    found = {}
    collector = Collector()

    def timed(what, fn):
        spent = runs = 0
        while runs < 3 or (spent < 1 and runs < 20):
            gc.collect()
            collector.seconds = 0.0
            gc.callbacks.append(collector)
            start = time.process_time()
            result = fn()
            seconds = time.process_time() - start
            gc.callbacks.remove(collector)
            found[what] = min(found.get(what, (math.inf, 0.0)), (seconds, collector.seconds))
            spent, runs = spent + seconds, runs + 1
        return result

    graph = timed("construct", lambda: declared(count))
    places = tenth(graph)
    spliced = timed("splice every 10th", lambda: graph.splice(places, ag.Bottleneck(2)))
    timed("unsplice", spliced.unsplice)
    timed("freeze", graph.freeze)
    timed("select", lambda: graph.select("block.*.fc"))
    timed("check", graph.check)
    text = timed("to_json", graph.to_json)
    timed("from_json", lambda: ag.Graph.from_json(text))
    timed("compile", graph.compile)
    timed("summary", lambda: str(graph.summary()))
    timed("(a loop over the nodes)", lambda: looked_at(graph))
    return found


def slope(sizes, seconds):
    """The exponent of the power law that fits best."""
    xs, ys = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def growth(sizes):
    verbs(200)
    found = [verbs(size) for size in sizes]
    print("| seconds | " + " | ".join(f"{size:,} nodes" for size in sizes) + " | exponent | without collector |")
    print("| --- |" + " --: |" * (len(sizes) + 2))
    for what in found[0]:
        whole = [row[what][0] for row in found]
        own = [seconds - collected for seconds, collected in (row[what] for row in found)]
        cells = " | ".join(f"{s:.3f}" for s in whole)
        print(f"| {what} | {cells} | {slope(sizes, whole):.2f} | {slope(sizes, own):.2f} |")


# ---------------------------------------------------------------------- running


class Layer(nn.Module):
    """The layer of `ag.blocks.transformer_layer`, written by hand."""

    def __init__(self, size, heads, d_ff):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(size, size) for _ in range(4))
        self.up, self.down = nn.Linear(size, d_ff), nn.Linear(d_ff, size)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = self.norm1(x + self.output(h))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class Network(nn.Module):
    """Parts that are called one after the other."""

    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def transformer(size=256, layers=4):
    h = ag.input("x", shape=("batch", "seq", size))
    for i in range(layers):
        h = ag.blocks.transformer_layer(h, 4, 4 * size, name=f"layer.{i}")
    return ag.Graph(h), Network([Layer(size, 4, 4 * size) for _ in range(layers)]), torch.randn(4, 32, size)


def mlp(size=256, layers=16):
    h = ag.input("x", shape=("batch", size))
    for i in range(layers):
        h = ag.relu(ag.dense(h, size, name=f"fc.{i}"))
    parts = [part for _ in range(layers) for part in (nn.Linear(size, size), nn.ReLU())]
    return ag.Graph(h), Network(parts), torch.randn(32, size)


def node_of(name):
    """What a parameter of the plain network is called in the graph."""
    _, number, rest = name.split(".", 2)
    part = rest.partition(".")[0]
    if part in ("weight", "bias"):
        return f"fc.{int(number) // 2}.{rest}"
    owner = {"up": "ffn.", "down": "ffn.", "norm1": "", "norm2": ""}.get(part, "attention.")
    return f"layer.{number}.{owner}{rest}"


def interleaved(runs, rounds, calls):
    """CPU seconds of a call of each run: so many calls in a row, in turn, the order turned round each time."""
    seconds = {name: [] for name in runs}
    for i in range(rounds + 3):
        for name in list(runs) if i % 2 else list(runs)[::-1]:
            start = time.process_time()
            for _ in range(calls):
                runs[name]()
            if i >= 3:
                seconds[name].append((time.process_time() - start) / calls)
    return seconds


def forwards(rounds):
    heads = [
        "forward, eager, CPU time",
        "plain nn.Module",
        "compiled graph",
        "ratio of minima",
        "median of ratios (middle half)",
    ]
    print("\n| " + " | ".join(heads) + " |")
    print("| --- | --: | --: | --: | --: |")
    for make, calls in ((mlp, 20), (transformer, 4)):
        graph, plain, x = make()
        ours = graph.compile().eval()
        state = ours.state_dict()
        plain.eval().load_state_dict({name: state[node_of(name)] for name in plain.state_dict()})
        with torch.no_grad():
            assert torch.equal(ours(x), plain(x))
            runs = {"plain": lambda m=plain, x=x: m(x), "ours": lambda m=ours, x=x: m(x)}
            times = interleaved(runs, rounds, calls)
        ratios = sorted(a / b for a, b in zip(times["ours"], times["plain"], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        least = {name: min(seconds) for name, seconds in times.items()}
        name, milliseconds = (
            f"{make.__name__}, {' × '.join(map(str, x.shape))}",
            [f"{v * 1e3:.3f} ms" for v in least.values()],
        )
        spread = f"{statistics.median(ratios):.3f} ({low:.3f} … {high:.3f})"
        print(f"| {name} | {' | '.join(milliseconds)} | {least['ours'] / least['plain']:.3f} | {spread} |")


def whole():
    for make in (mlp, transformer):
        graph, _, x = make()
        model = graph.compile().eval()
        torch._dynamo.reset()
        found = torch._dynamo.explain(model)(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), model(x))
        print(f"torch.compile of the {make.__name__}: {found.graph_count} graph, {found.graph_break_count} breaks")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10000, 50000])
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, one thread, "
        f"Python {platform.python_version()}, {datetime.date.today()}\n"
    )
    growth(args.sizes)
    forwards(args.rounds)
    print()
    whole()


if __name__ == "__main__":
    main()
