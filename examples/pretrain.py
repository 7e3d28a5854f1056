"""Pretraining from scratch, the book's chapter 5: python examples/pretrain.py --text the-verdict.txt

Without --text it learns Python's language reference. The model is small, and its vocabulary is made from the text; for
GPT-2's vocabulary and size, with the book's settings: --preset 124M --context 256 --learning-rate 4e-4 --epochs 10
"""

import math
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer
from rich import print
from rich.markup import escape
from transformers import GPT2Tokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_gpt_scratch import (
    GPTScratchConfig,
    GPTScratchForCausalLM,
    gpt2_tokenizer,
    text_to_token_ids,
    token_ids_to_text,
)

SMALL = dict(emb_dim=96, n_heads=4, n_layers=4)


class Sample(TrainerCallback):
    """After each epoch, prints a continuation of the prompt."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.ids = tokenizer, text_to_token_ids(prompt, tokenizer)

    def on_epoch_end(self, args, state, control, **kwargs):
        model = kwargs["model"]
        model.eval()
        ids = self.ids.to(model.device)
        mask = torch.ones_like(ids)
        ids = model.generate(
            ids, attention_mask=mask, max_new_tokens=40, do_sample=True, top_k=25, temperature=0.7, pad_token_id=0
        )
        print(f"[bold]epoch {state.epoch:.0f}:[/]", escape(" ".join(token_ids_to_text(ids, self.tokenizer).split())))


def rows(ids: torch.Tensor, length: int) -> list[dict]:
    """The text in rows of `length` tokens; the model itself shifts the labels by one."""
    return [{"input_ids": row, "labels": row} for row in ids.split(length) if len(row) == length]


def plot(history: list[dict], tokens_per_epoch: int, target: Path) -> None:
    """The losses over the epochs, and over the tokens seen."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training, mean since the last point", "-"), ("eval_loss", "validation", "--")):
        logs = [log for log in history if key in log]
        axis.plot([log["epoch"] for log in logs], [log[key] for log in logs], style, label=label)
    axis.set(xlabel="epochs", ylabel="loss, nats per token", xlim=(0, None))
    tokens = axis.twiny()
    tokens.set(xlabel="tokens seen, thousands", xlim=(0, axis.get_xlim()[1] * tokens_per_epoch / 1000))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(target, dpi=150)


def main(
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to train on.")] = None,
    preset: Annotated[str | None, typer.Option(help="124M, 355M, 774M or 1558M instead of the small model.")] = None,
    context: Annotated[int, typer.Option(help="The model's context_length: tokens per row of the batch.")] = 64,
    batch: Annotated[int, typer.Option(help="Rows in a batch.")] = 8,
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 3e-3,
    prompt: Annotated[str, typer.Option(help="Prompt of the samples.")] = "The",
    output: Annotated[Path, typer.Option(help="Where to save model, tokenizer and plot.")] = Path("outputs/pretrain"),
) -> None:
    """Trains on 90 % of the text, validates on the rest, samples after each epoch and plots the losses."""
    set_seed(123)
    content = text.read_text(encoding="utf-8") if text else "\n\n".join(topics.values())[:250_000]
    tokenizer = gpt2_tokenizer() if preset else GPT2Tokenizer().train_new_from_iterator([content], 1000)
    special: dict[str, Any] = dict(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    sizes = dict(context_length=context)
    config = GPTScratchConfig.preset(preset, **sizes) if preset else GPTScratchConfig(**{**SMALL, **sizes, **special})
    model = GPTScratchForCausalLM(config)

    ids = torch.tensor(tokenizer(content, verbose=False).input_ids)
    train, validation = (rows(part, context) for part in ids.tensor_split([int(0.9 * len(ids))]))
    if not validation:
        raise typer.BadParameter(
            f"a tenth of the text's {len(ids)} tokens is less than --context {context}; lower --context"
        )
    print(f"{model.num_parameters():,} parameters; {len(train)} rows to train, {len(validation)} to validate")
    every = max(1, math.ceil(len(train) / batch) // 5)
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.1,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
        logging_steps=every,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    callbacks: list[TrainerCallback] = [Sample(tokenizer, prompt)]
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=validation, callbacks=callbacks)
    trainer.train()

    trainer.save_model()
    tokenizer.save_pretrained(output)
    history = trainer.state.log_history
    plot(history, len(train) * context, output / "loss.png")
    losses = [log["eval_loss"] for log in history if "eval_loss" in log]
    best = min(losses)
    print(f"validation loss {losses[0]:.3f} -> {losses[-1]:.3f} (lowest {best:.3f}, perplexity {math.exp(best):.1f})")
    print("saved to", output)
    sys.exit(0 if losses[-1] < losses[0] else 3)


if __name__ == "__main__":
    typer.run(main)
