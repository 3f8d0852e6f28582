"""The table of docs/places.md: what the presets find in some of the architectures of the tests.

    python benchmarks/places.py [NAME …]

Numbers that differ between layers are a `*`, followed by how many there are.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from architectures import ARCHITECTURES
from transformers.utils import logging

import adaptergraph as ag

SHOWN = ("bert", "gpt2", "llama", "mixtral", "gptj", "falcon", "t5", "wav2vec2", "vit", "convnext", "mamba")
SHOWN += ("nn.TransformerEncoder",)


def folded(graph: ag.Graph, preset: str) -> str:
    """What a preset finds, one entry for names that differ in numbers only."""
    try:
        names = ag.places(graph, preset)
    except ag.UnknownNode:
        return "–"
    counts: dict[str, int] = {}
    for name in names:
        short = re.sub(r"\b\d+\b", "*", name)
        counts[short] = counts.get(short, 0) + 1
    return ", ".join(f"`{name}` × {count}" if count > 1 else f"`{name}`" for name, count in counts.items())


def table(names: list[str] | tuple[str, ...]) -> str:
    """The rows in Markdown."""
    presets = ("attention", "pfeiffer", "lora-attention")
    lines = [f"| | {' | '.join(presets)} |", "| --- | --- | --- | --- |"]
    for name in names:
        architecture = ARCHITECTURES[name]
        args, kwargs = architecture.args()
        graph = ag.trace(architecture.model(), *args, **kwargs)
        lines.append(f"| {name} | {' | '.join(folded(graph, preset) for preset in presets)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=SHOWN, help="of architectures: " + ", ".join(ARCHITECTURES))
    logging.set_verbosity_error()
    print(table(parser.parse_args().names))
