"""What hosting costs: a BERT-base-size model with 24 spliced adapters beside the same model modified by hand.

    python benchmarks/overhead.py [--rounds 30] [--layers 12] [--hidden 768] [--batch 8] [--length 32]

Both run interleaved in one process, so that noise of the machine hits both; what counts is the ratio. By hand means:
the two output modules of each layer are subclasses whose forward has the adapter written in, as one would without a
library. Also printed: what trace, splice (24 sites) and compile cost, once.
"""

import argparse
import platform
import statistics
import time

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertOutput, BertSelfOutput

import adaptergraph as ag

PLACES = "bert.encoder.layer.*.{attention.output,output}.dense"


class Houlsby(nn.Module):
    """An adapter as people write it."""

    def __init__(self, hidden, size):
        super().__init__()
        self.down = nn.Linear(hidden, size)
        self.up = nn.Linear(size, hidden)

    def forward(self, x):
        return x + self.up(torch.relu(self.down(x)))


def by_hand(kind):
    class Adapted(kind):
        def forward(self, hidden_states, input_tensor):
            hidden_states = self.adapter(self.dense(hidden_states))
            return self.LayerNorm(self.dropout(hidden_states) + input_tensor)

    return Adapted


def make_hand(config, spliced):
    """The base with adapters written into its forward, and the weights of the spliced model."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    for layer in model.bert.encoder.layer:
        for module, kind in ((layer.attention.output, BertSelfOutput), (layer.output, BertOutput)):
            module.__class__ = by_hand(kind)
            module.adapter = Houlsby(config.hidden_size, 64)
    state = {k.replace(".dense.adapter.", ".adapter."): v for k, v in spliced.state_dict().items()}
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".adapter." in name or "classifier" in name)
    return model


def step(model, optimizer, batch):
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()


def interleaved(runs, rounds):
    """Seconds of each run, taken in turn, the order turned round each time."""
    seconds = {name: [] for name in runs}
    for i in range(rounds + 3):
        for name in list(runs) if i % 2 else list(runs)[::-1]:
            start = time.perf_counter()
            runs[name]()
            if i >= 3:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(what, seconds):
    ours, hand = seconds["spliced"], seconds["by hand"]
    ratios = sorted(a / b for a, b in zip(ours, hand, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
    print(
        f"{what:<14} by hand {statistics.median(hand) * 1e3:8.1f} ms   spliced {statistics.median(ours) * 1e3:8.1f} ms"
        f"   ratio {statistics.median(ratios):.3f}  (middle half {low:.3f} … {high:.3f},"
        f" of minima {min(ours) / min(hand):.3f})"
    )


def once(what, fn, repeat=5):
    times, result = [], None
    for _ in range(repeat):
        start = time.perf_counter()
        result = fn()
        times.append(time.perf_counter() - start)
    print(f"{what:<14} {min(times):.3f} s  (median {statistics.median(times):.3f} s of {repeat})")
    return result, statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = BertConfig(
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        intermediate_size=4 * args.hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    print(f"torch {torch.__version__}, {platform.machine()}, Python {platform.python_version()}, one thread")
    print(f"BERT of {args.layers} layers, hidden {args.hidden}, batch {args.batch} × {args.length}, bottleneck 64\n")
    torch.manual_seed(0)
    base = BertForSequenceClassification(config)
    ids = torch.randint(0, config.vocab_size, (args.batch, args.length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(args.batch).long()}

    graph, t_trace = once(
        "trace", lambda: ag.trace(base, input_ids=ids[:1], attention_mask=batch["attention_mask"][:1])
    )
    places = 2 * args.layers
    spliced, t_splice = once(
        f"splice ({places})",
        lambda: graph.unfreeze("classifier").splice(graph.select(PLACES).expect(places), ag.Bottleneck(64)),
    )
    ours, t_compile = once("compile", spliced.compile)
    print(f"{'together':<14} {t_trace + t_splice + t_compile:.3f} s\n")

    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".adapter." in name:
                parameter.normal_(0, 0.02)
    hand = make_hand(config, ours)
    assert torch.equal(ours.eval()(**batch).logits, hand.eval()(**batch).logits)
    models = {"spliced": ours, "by hand": hand}
    with torch.no_grad():
        report("forward", interleaved({n: lambda m=m: m(**batch) for n, m in models.items()}, args.rounds))
    optimizers = {n: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for n, m in models.items()}
    for model in models.values():
        model.train()
    runs = {n: lambda m=m, o=optimizers[n]: step(m, o, batch) for n, m in models.items()}
    report("training step", interleaved(runs, args.rounds))


if __name__ == "__main__":
    main()
