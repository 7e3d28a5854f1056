"""Instruction tuning, the book's chapter 7: python examples/instruct.py --json instruction-data.json

Without --json the script makes up instructions; the model is the tests' small GPT-2 unless --model names another.
"""

import json
import random
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import print
from rich.markup import escape
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from hf_gpt_scratch import GPTScratchForCausalLM

SMALL = Path(__file__).parents[1] / "tests" / "fixtures" / "tiny-gpt2"
OPPOSITES = "hot cold, big small, old new, day night, up down, open closed, rich poor, wet dry, left right, good bad"
COLOURS = "grass green, blood red, the sky blue, coal black, snow white, a lemon yellow, ash grey, chocolate brown"
ANIMALS = "dogs bark, cats meow, cows moo, ducks quack, lions roar, bees buzz, frogs croak, owls hoot, pigs grunt"
ASKED = {
    OPPOSITES: "What is the opposite of {}?; Name the opposite.|{}; Which word means the contrary of {}?; {} is not:",
    COLOURS: "What colour is {}?; Tell me the colour.|{}; Which colour do you think of with {}?; {} is painted in:",
    ANIMALS: "What do {} do?; Name the sound.|{}; How do {} make themselves heard?; On a farm with {} one hears them:",
}


def made_up() -> list[dict[str, str]]:
    """Entries like those in the book's file, with four instructions for each fact."""
    entries = []
    for facts, questions in ASKED.items():
        for fact in facts.split(", "):
            subject, answer = fact.rsplit(maxsplit=1)
            for question in questions.split("; "):
                instruction, _, given = question.format(subject).partition("|")
                entries.append({"instruction": instruction, "input": given, "output": f"{answer.capitalize()}."})
    return entries


def prompt(entry: dict[str, str]) -> str:
    """The entry in Alpaca's format, up to the beginning of the response."""
    given = f"\n\n### Input:\n{entry['input']}" if entry.get("input") else ""
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{entry['instruction']}{given}\n\n### Response:\n"
    )


# The same for a chat: each message of the user's is an instruction.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
    "{% elif message.role == 'user' %}" + prompt({"instruction": "{{ message.content }}"}) + "{% else %}"
    "{{ raise_exception('this model knows the roles user and assistant') }}{% endif %}{% endfor %}"
)


def tokenize(entry: dict[str, str], tokenizer) -> dict[str, list[int]]:
    """Prompt, response and end of text; the prompt has no labels."""
    asked = tokenizer(prompt(entry)).input_ids
    answer = [*tokenizer(entry["output"]).input_ids, tokenizer.eos_token_id]
    return {"input_ids": asked + answer, "labels": [-100] * len(asked) + answer}


def respond(model: GPTScratchForCausalLM, tokenizer, entry: dict[str, str]) -> str:
    """The model's own response, at most 40 tokens."""
    inputs = tokenizer(prompt(entry), return_tensors="pt").to(model.device)
    asked = inputs.input_ids.shape[1]
    room = min(40, model.config.context_length - asked)
    ids = model.eval().generate(**inputs, max_new_tokens=room, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(ids[0, asked:], skip_special_tokens=True).strip()


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="List of instruction, input and output.")] = None,
    model: Annotated[str, typer.Option(help="Hub id or directory, official or ours.")] = str(SMALL),
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = 25,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW; 5e-5 for the real sizes.")] = 3e-3,
    output: Annotated[Path, typer.Option(help="Where to save the model.")] = Path("outputs/instruct"),
) -> None:
    """Finetunes on 85 % of the instructions and answers some of the others before and after."""
    set_seed(123)
    entries = json.loads(json_file.read_text(encoding="utf-8")) if json_file else made_up()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = CHAT_TEMPLATE
    gpt = GPTScratchForCausalLM.from_pretrained(model)

    entries = [e for e in entries if len(tokenize(e, tokenizer)["input_ids"]) <= gpt.config.context_length]
    random.Random(123).shuffle(entries)
    cut = int(0.85 * len(entries))
    train, test = entries[:cut], entries[cut:]
    if not train:
        raise typer.BadParameter(
            f"{json_file} has {len(entries)} entries that fit the model, but at least 2 are needed"
        )
    print(f"{len(train)} instructions to learn, {len(test)} to test")
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=learning_rate,
        weight_decay=0.1,
        eval_strategy="epoch",
        eval_on_start=True,
        logging_strategy="epoch",
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    trainer = Trainer(
        gpt,
        arguments,
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads labels with -100
        train_dataset=[tokenize(entry, tokenizer) for entry in train],
        eval_dataset=[tokenize(entry, tokenizer) for entry in test],
    )
    before = [respond(gpt, tokenizer, entry) for entry in test[:5]]
    trainer.train()
    for entry, old in zip(test, before, strict=False):
        print("[bold]" + escape(f"{entry['instruction']} {entry.get('input', '')}"))
        new = respond(gpt, tokenizer, entry)
        print(escape(f"  before: {old!r}\n  after:  {new!r}\n  wanted: {entry['output']!r}"))

    trainer.save_model()
    tokenizer.save_pretrained(output)
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    print(f"test loss {losses[0]:.3f} -> {losses[-1]:.3f}, saved to", output)
    sys.exit(0 if losses[-1] < losses[0] else 3)


if __name__ == "__main__":
    typer.run(main)
