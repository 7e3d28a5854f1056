"""The same random weights as an official checkpoint and as ours, and how a client reports a row."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_gpt_scratch import GPTScratchForCausalLM

TRAINED = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
CONTEXT = 128
PROMPTS = [list(range(5, 5 + length)) for length in (3, 9, 40, 100)]


def checkpoints(folder: Path, tied: bool = True, width: int = 128, seed: int = 0) -> tuple[Path, Path]:
    """Directories of the official model and of ours; norms and biases are random, too."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    sizes = dict(vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=width, n_layer=3, n_head=4)
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0)).eval()
    for name, parameter in gpt2.named_parameters():
        parameter.data.normal_(std=0.08).add_("ln_" in name and name.endswith("weight"))
    kind = "tied" if tied else "untied"
    official, ours = folder / f"official-{kind}", folder / f"ours-{kind}"
    gpt2.save_pretrained(official)
    GPTScratchForCausalLM.from_gpt2(gpt2).save_pretrained(ours)
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


def row(what: str, equal: bool) -> None:
    print(json.dumps({"what": what, "equal": bool(equal)}), flush=True)
