"""What a trace costs: seconds for each architecture, and the ratio to one forward of the same model on fake tensors.

    python benchmarks/tracing.py [--rounds 10] [--batch 2] [--length 128]

The architectures are the tiny models of tests/architectures.py. BERT-base and a Llama of 8 billion parameters lie on
the meta device; for them a trace and an eager forward on fake tensors are run in turn in one process, and what counts
is the ratio round by round. The fake forward is of a model whose parameters are fake already, in eval mode, without
gradients: what torch alone needs to walk through the model. A Llama of 70 billion parameters, traced once in a process
of its own, shows the memory.
"""

import argparse
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import adaptergraph as ag

LLAMA = {"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192}
SHAPES = {
    "BERT-base": lambda: BertForSequenceClassification(BertConfig()),
    "Llama, 8 billion": lambda: LlamaForCausalLM(
        LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14_336, **LLAMA)
    ),
    "Llama, 70 billion": lambda: LlamaForCausalLM(
        LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28_672, **LLAMA)
    ),
}


def on_meta(name):
    with torch.device("meta"):
        return SHAPES[name]().eval()


def sentences(batch, length):
    ones = torch.ones(batch, length, dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones.clone()}


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def each_architecture():
    """Seconds of one trace of each tiny model, the lesser of two."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from architectures import ARCHITECTURES

    found = {}
    for name, architecture in ARCHITECTURES.items():
        args, kwargs = architecture.args()
        model = architecture.model()
        found[name] = min(seconds(lambda: ag.trace(model, *args, **kwargs)) for _ in range(2))  # noqa: B023
    return found


def ratio(name, rounds, batch, length):
    """Seconds of a trace and of a fake forward, in turn, and their ratios."""
    model, inputs = on_meta(name), sentences(batch, length)
    mode = FakeTensorMode()
    with mode, torch.device("cpu"):
        fake = SHAPES[name]().eval()
    given = {k: mode.from_tensor(v) for k, v in inputs.items()}

    def forward():
        with mode, torch.no_grad():
            fake(**given)

    traces, forwards = [], []
    for i in range(rounds + 2):
        pair = [(traces, lambda: ag.trace(model, **inputs)), (forwards, forward)]
        for found, run in pair if i % 2 else reversed(pair):
            found.append(seconds(run))
    traces, forwards = traces[2:], forwards[2:]
    return traces, forwards, [t / f for t, f in zip(traces, forwards, strict=True)]


def memory(batch, length):
    """Run in a process of its own: seconds, nodes and the peak of memory in GB."""
    model = on_meta("Llama, 70 billion")
    before = peak()
    start = time.perf_counter()
    graph = ag.trace(model, **sentences(batch, length))
    print(time.perf_counter() - start, len(graph), before, peak())


def peak():
    """GB of this process alone: `getrusage` would count the peak of the parent that started it."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if options.memory:
        memory(options.batch, options.length)
        return
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}")
    found = each_architecture()
    slowest = sorted(found, key=found.get)[-4:]
    print(f"\n{len(found)} tiny models: median {statistics.median(found.values()):.3f} s for a trace")
    for name in reversed(slowest):
        print(f"  {name:<28} {found[name]:.3f} s")
    print(f"\n{'seconds, min and median':<20} {'trace':>13} {'fake forward':>15} {'ratio':>13}")
    for name in ("BERT-base", "Llama, 8 billion"):
        traces, forwards, ratios = ratio(name, options.rounds, options.batch, options.length)
        cells = [f"{min(x):.2f} {statistics.median(x):.2f}" for x in (traces, forwards, ratios)]
        print(f"{name:<23} {cells[0]:>13} {cells[1]:>15} {cells[2]:>13}")
    command = [sys.executable, __file__, "--memory", "--batch", str(options.batch), "--length", str(options.length)]
    result = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    took, nodes, before, most = result
    print(f"\nLlama, 70 billion: {float(took):.1f} s, {nodes} nodes; memory at its peak {float(most):.2f} GB")
    print(f"  ({float(before):.2f} GB before the trace)")


if __name__ == "__main__":
    main()
