"""GPT-2 finetuned to classify spam, the book's chapter 6: python examples/classify.py --csv SMSSpamCollection.tsv

Without --csv the script makes up messages; the model is the tests' small GPT-2 unless --model names another.
"""

import csv
import random
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import print
from transformers import AutoTokenizer, Trainer, TrainingArguments, pipeline, set_seed
from transformers import logging as transformers_logging

from hf_gpt_scratch import GPTScratchForSequenceClassification

SMALL = Path(__file__).parents[1] / "tests" / "fixtures" / "tiny-gpt2"
LABELS = ["ham", "spam"]
NAMES = ["Anna", "Ben", "mum", "Carlo", "Dina", "the boss", "grandpa", "Eva"]
THINGS = ["phone", "holiday", "car", "book", "concert ticket", "watch", "camera", "bike"]
TIMES = ["today", "tonight", "at noon", "on Friday", "before 5 pm", "this week"]
TEMPLATES = {
    "ham": [
        "{name} has forgotten the {thing} again. Can you bring it {time}?",
        "Are we still meeting {name} {time}? I won the bet about the {thing}, by the way!",
        "Please call {name} {time}, it is about a {thing}.",
        "I cannot come {time}, {name} needs help with a new {thing}.",
        "Thanks for the {thing}! {name} says it was free. See you {time}.",
    ],
    "spam": [
        "Congratulations {name}, you have won a {thing}! Claim it {time}.",
        "FREE {thing}!!! Only {time}. Text YES and tell {name}.",
        "Your {thing} is waiting. Please call this number {time} or {name} gets it.",
        "Urgent: {name}, your account will be closed {time}. Win a {thing} by confirming it.",
        "Can you believe it? A {thing} for 1 pound {time}. {name} has one already, reply STOP to end.",
    ],
}


def messages(csv_file: Path | None) -> list[tuple[str, str]]:
    """Label and text of each message; without a file, 1000 made-up messages with three hams for each spam."""
    if csv_file:
        with csv_file.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, "excel-tab" if csv_file.suffix == ".tsv" else "excel"))
        return [(label, text) for label, text in rows if label in LABELS]
    rng = random.Random(123)
    labels = rng.choices(LABELS, weights=[3, 1], k=1000)
    fill = [dict(name=rng.choice(NAMES), thing=rng.choice(THINGS), time=rng.choice(TIMES)) for _ in labels]
    return [(label, rng.choice(TEMPLATES[label]).format(**words)) for label, words in zip(labels, fill, strict=True)]


def balanced_split(messages: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """As much ham as spam, each message once, shuffled: 70 % to train, 10 % to validate, 20 % to test."""
    rng = random.Random(123)
    groups = [sorted({text for label, text in messages if label == wanted}) for wanted in LABELS]
    size = min(map(len, groups))
    chosen = [(label, t) for label, group in zip(LABELS, groups, strict=True) for t in rng.sample(group, size)]
    rng.shuffle(chosen)
    first, second = int(0.7 * len(chosen)), int(0.8 * len(chosen))
    return [chosen[:first], chosen[first:second], chosen[second:]]


def main(
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Rows of a label (ham or spam) and a text; or a .tsv file.")
    ] = None,
    model: Annotated[str, typer.Option(help="Hub id or directory, official or ours.")] = str(SMALL),
    train_all: Annotated[
        bool, typer.Option(help="Train all of it, not only the last block, the final norm and the head.")
    ] = False,
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW; 5e-5 for the real sizes.")] = 2e-3,
    output: Annotated[Path, typer.Option(help="Where to save the classifier.")] = Path("outputs/classify"),
) -> None:
    """Finetunes on 70 % of a balanced set of messages; prints the accuracies before and after."""
    transformers_logging.set_verbosity_error()  # it would warn that the head is new
    set_seed(123)
    texts = messages(csv_file)
    splits = dict(zip(("training", "validation", "test"), balanced_split(texts), strict=True))
    if not all(splits.values()):
        raise typer.BadParameter(
            f"{len(texts)} messages are too few; give at least 5 different ones of each of {LABELS}"
        )
    print({name: len(split) for name, split in splits.items()}, "messages, half of them spam")

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    names = dict(enumerate(LABELS))
    gpt = GPTScratchForSequenceClassification.from_pretrained(
        model, id2label=names, pad_token_id=tokenizer.pad_token_id
    )
    gpt.requires_grad_(train_all)
    for part in (gpt.model.trf_blocks[-1], gpt.model.final_norm, gpt.score):
        part.requires_grad_(True)
    print(f"{gpt.num_parameters(only_trainable=True):,} of {gpt.num_parameters():,} parameters are trained")

    limit = dict(truncation=True, max_length=gpt.config.context_length)
    data = {
        name: [{**tokenizer(text, **limit), "labels": LABELS.index(label)} for label, text in split]
        for name, split in splits.items()
    }
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=learning_rate,
        weight_decay=0.1,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    trainer = Trainer(
        gpt,
        arguments,
        processing_class=tokenizer,  # pads the batches and is saved with the model
        train_dataset=data["training"],
        eval_dataset=data["validation"],
        compute_metrics=lambda result: {"accuracy": (np.argmax(result.predictions, -1) == result.label_ids).mean()},
    )

    def accuracies():
        sets: dict[str, Any] = data
        figures: dict[str, Any] = {name: trainer.predict(rows).metrics for name, rows in sets.items()}
        return {name: float(metrics["test_accuracy"]) for name, metrics in figures.items()}

    before = accuracies()
    trainer.train()
    after = accuracies()
    for name in data:
        print(f"{name} accuracy: {before[name]:.1%} -> {after[name]:.1%}")

    trainer.save_model()
    classifier = pipeline("text-classification", model=str(output))
    for text in ("Urgent! Claim your free camera today.", "Can you bring the camera today? Thanks!"):
        print(text, classifier(text))
    sys.exit(0 if after["test"] > before["test"] else 3)


if __name__ == "__main__":
    typer.run(main)
