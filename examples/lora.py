"""LoRA with PEFT on the book's layers: python examples/lora.py --model openai-community/gpt2 --text mine.txt

Without --text it adapts to Python's language reference; the model is the tests' small GPT-2 unless
--model names another.
"""

import sys
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from rich import print
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_gpt_scratch import GPTScratchForCausalLM

SMALL = Path(__file__).parents[1] / "tests" / "fixtures" / "tiny-gpt2"
BOUND = 1e-5  # of the relative error of logits, in float32
TARGETS = ["W_query", "W_key", "W_value", "out_proj", "ff.layers.0", "ff.layers.2"]


def main(
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to adapt to.")] = None,
    model: Annotated[str, typer.Option(help="Hub id or directory, official or ours.")] = str(SMALL),
    rank: Annotated[int, typer.Option(help="Rank of the added matrices.")] = 8,
    steps: Annotated[int, typer.Option(help="Batches of 8 rows of 128 tokens.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW; 2e-4 for the real sizes.")] = 5e-3,
    output: Annotated[Path, typer.Option(help="Where to save adapter and merged model.")] = Path("outputs/lora"),
) -> None:
    """Trains an adapter, saves it, loads it, merges it and compares the three."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT uses the old name
    set_seed(123)
    tokenizer = AutoTokenizer.from_pretrained(model)
    content = text.read_text(encoding="utf-8") if text else "\n\n".join(topics.values())[:250_000]
    ids = torch.tensor(tokenizer(content, verbose=False).input_ids)
    data = [{"input_ids": row, "labels": row} for row in ids.split(128) if len(row) == 128]
    cut = int(0.9 * len(data))
    if not cut:
        raise typer.BadParameter(f"{text} has {len(ids)} tokens, but training and test need at least 256; add text")

    base = GPTScratchForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(r=rank, target_modules=TARGETS, task_type="CAUSAL_LM"))
    trained, everything = adapted.get_nb_trainable_parameters()
    print(f"{trained:,} of {everything:,} parameters are trained, {trained / everything:.1%}")
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=learning_rate,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    trainer = Trainer(adapted, arguments, train_dataset=data[:cut], eval_dataset=data[cut:])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss on other text: {before:.3f} -> {after:.3f}")

    adapted.save_pretrained(str(output / "adapter"))
    loaded = PeftModel.from_pretrained(GPTScratchForCausalLM.from_pretrained(model), output / "adapter").eval()
    sample = ids[None, :64]
    with torch.no_grad():
        expected = adapted.cpu().eval()(input_ids=sample).logits
        equal = torch.equal(loaded(input_ids=sample).logits, expected)
        loaded.merge_and_unload().save_pretrained(output / "merged")
        tokenizer.save_pretrained(output / "merged")
        merged = GPTScratchForCausalLM.from_pretrained(output / "merged")(sample).logits
    error = ((merged - expected).abs().max() / expected.abs().max()).item()
    sizes = [sum(f.stat().st_size for f in (output / name).glob("*.safetensors")) for name in ("adapter", "merged")]
    same = error <= BOUND
    print(f"adapter, {sizes[0]:,} bytes: loaded again, equal logits: {equal}")
    print(f"merged, {sizes[1]:,} bytes: equal logits: {same}, relative error {error:.1e} (at most {BOUND:.0e})")
    print("saved to", output)
    sys.exit(0 if after < before and equal and same else 3)


if __name__ == "__main__":
    typer.run(main)
