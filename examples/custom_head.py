"""A head of your own on GPT-2, here a reward model: python examples/custom_head.py --model openai-community/gpt2

The class below is all that is needed: it loads official checkpoints, trains with Trainer, saves and loads again.
Without --model it starts from the tests' small GPT-2. The preferences are made up: a friendly answer beats a rude one.
"""

import random
import sys
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import print
from torch import nn
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers import logging as transformers_logging
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_gpt_scratch import GPTScratchConfig, GPTScratchModel, GPTScratchPreTrainedModel

SMALL = Path(__file__).parents[1] / "tests" / "fixtures" / "tiny-gpt2"


class GPTScratchRewardModel(GPTScratchPreTrainedModel):
    """One number for each text: how good it is."""

    def __init__(self, config: GPTScratchConfig):
        super().__init__(config)
        self.model = GPTScratchModel(config)
        self.reward = nn.Linear(config.emb_dim, 1)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        """`logits` (B,): the rewards of texts that are padded on the right."""
        x = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.sum(dim=1) - 1  # (B,)
        x = x[torch.arange(len(x), device=x.device), last]  # (B, E)
        return SequenceClassifierOutput(logits=self.reward(x).squeeze(-1))


def margins(outputs: SequenceClassifierOutput) -> torch.Tensor:
    """Rewards of the better answers minus those of the worse; they alternate in the batch."""
    assert outputs.logits is not None
    return outputs.logits[0::2] - outputs.logits[1::2]


def preference_loss(outputs: SequenceClassifierOutput, labels=None, **kwargs) -> torch.Tensor:
    """Mean of −log σ(margin): the negative log-likelihood of the preferences in the Bradley-Terry model."""
    return -nn.functional.logsigmoid(margins(outputs)).mean()


QUESTIONS = ["How do I boil an egg?", "Where is the station?", "Can you check my essay?", "What is a token?"]
OPENINGS = {
    "better": ["Happy to help!", "Good question.", "Of course, gladly.", "Let us look at it together."],
    "worse": ["What a silly question.", "Do not bother me.", "Find out yourself.", "Not you again."],
}
ENDINGS = ["It takes ten minutes.", "Tell me more first.", "Ask again if it stays unclear.", "There is a book on it."]


def preferences() -> list[list[str]]:
    """[better, worse] answers to the same question, shuffled."""
    pairs = [
        [f"{question} {opening} {ending}" for opening, ending in ((good, ending_1), (bad, ending_2))]
        for question, good, bad, ending_1, ending_2 in product(QUESTIONS, *OPENINGS.values(), ENDINGS, ENDINGS)
    ]
    return random.Random(123).sample(pairs, 400)


def main(
    model: Annotated[str, typer.Option(help="Hub id or directory, official or ours.")] = str(SMALL),
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW; 5e-5 for the real sizes.")] = 1e-3,
    output: Annotated[Path, typer.Option(help="Where to save the reward model.")] = Path("outputs/custom_head"),
) -> None:
    """Trains rewards on 300 preferences, measures the accuracy on 100 others, saves and loads."""
    transformers_logging.set_verbosity_error()  # it would warn that the head is new
    set_seed(123)
    gpt = GPTScratchRewardModel.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token

    def collate(pairs):
        return tokenizer([text for pair in pairs for text in pair], padding=True, return_tensors="pt")

    pairs = preferences()
    train, test = pairs[:300], collate(pairs[300:])
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=learning_rate,
        logging_steps=10,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    trainer = Trainer(gpt, arguments, data_collator=collate, train_dataset=train, compute_loss_func=preference_loss)

    @torch.no_grad()
    def accuracy():
        return (margins(gpt.eval()(**test.to(gpt.device))) > 0).float().mean().item()

    before = accuracy()
    trainer.train()
    after = accuracy()
    print(f"preferences ranked correctly: {before:.0%} -> {after:.0%}")

    gpt.save_pretrained(output)
    loaded = GPTScratchRewardModel.from_pretrained(output).to(device=gpt.device)  # type: ignore[call-arg]  # hidden by a decorator
    with torch.no_grad():
        equal = torch.equal(loaded(**test).logits, gpt(**test).logits)
    print("the loaded model gives equal rewards:", equal, "- saved to", output)
    sys.exit(0 if after > before and equal else 3)


if __name__ == "__main__":
    typer.run(main)
