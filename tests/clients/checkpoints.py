"""The same random weights as an official checkpoint and as ours, and how a client reports a row."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedModel

from hf_gpt_scratch import GPTScratchForCausalLM, GPTScratchForSequenceClassification

TRAINED = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
CONTEXT = 128
PROMPTS = [list(range(5, 5 + length)) for length in (3, 9, 40, 100)]


WITHOUT_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def checkpoints(
    folder: Path, tied: bool = True, width: int = 128, seed: int = 0, num_labels: int | None = None, **changes
) -> tuple[Path, Path]:
    """Directories of the official model and of ours; norms and biases are random, too.

    Args:
        num_labels: of sequence classifiers; None: language models.
        changes: other settings of the official config.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    sizes = dict(vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=width, n_layer=3, n_head=4)
    kinds = (GPT2LMHeadModel, GPTScratchForCausalLM)
    if num_labels is not None:
        kinds = (GPT2ForSequenceClassification, GPTScratchForSequenceClassification)
        changes["num_labels"] = num_labels
    gpt2_class, our_class = kinds
    gpt2 = gpt2_class(GPT2Config(**sizes, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, **changes)).eval()
    for name, parameter in gpt2.named_parameters():
        parameter.data.normal_(std=0.08).add_("ln_" in name and name.endswith("weight"))
    kind = "tied" if tied else "untied"
    official, ours = folder / f"official-{kind}", folder / f"ours-{kind}"
    gpt2.save_pretrained(official)
    our_class.from_gpt2(gpt2).save_pretrained(ours)
    for directory in (official, ours):
        tokenizer.save_pretrained(directory)
    return official, ours


def official_ids(directory: Path, prompts=PROMPTS) -> list[list[int]]:
    """What transformers generates greedily after each prompt, to the end of the context."""
    gpt2 = GPT2LMHeadModel.from_pretrained(directory).eval()
    gpt2.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = dict(max_length=CONTEXT, do_sample=False, pad_token_id=0)
        found.append(gpt2.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    return found


def same_weights(gpt2: PreTrainedModel, ours: PreTrainedModel, tolerance: float = 1e-5) -> bool:
    """Whether two models have the same weights, apart from rounding; ours is translated."""
    if not isinstance(ours, type(gpt2)):
        ours = ours.to_gpt2()
    theirs = ours.state_dict()
    return all(
        name in theirs and (value - theirs[name]).abs().max() <= tolerance * value.abs().max()
        for name, value in gpt2.state_dict().items()
    )


def same_curve(found: list[dict], expected: list[dict], tolerance: float = 1e-3) -> bool:
    """Whether the logs of all steps have the same figures, as far as Trainer does not round them away."""
    return len(found) == len(expected) > 0 and all(
        one.keys() == other.keys() and all(abs(one[k] - other[k]) <= tolerance * (abs(other[k]) + 0.1) for k in one)
        for one, other in zip(found, expected, strict=True)
    )


def row(what: str, equal: bool) -> None:
    print(json.dumps({"what": what, "equal": bool(equal)}), flush=True)
