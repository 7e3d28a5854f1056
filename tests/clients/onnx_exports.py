"""What clients of ONNX have in common: exported directories, prompts, and what the official model makes of them."""

from pathlib import Path

import torch
from checkpoints import CONTEXT, PROMPTS, checkpoints
from transformers import AutoTokenizer, GPT2LMHeadModel

from hf_gpt_scratch import GPTScratchConfig, export
from hf_gpt_scratch.weights.formats.onnx import FOLDER, INT8, Session

MORE = 20  # tokens after each of the texts
TEXTS = ["Every effort moves", "I had always thought Jack"]


def exported(folder: Path, tied: bool) -> tuple[Path, Path]:
    """The official directory, and that of our ONNX export, with int8."""
    official, ours = checkpoints(folder, tied)
    target = folder / f"onnx-{'tied' if tied else 'untied'}"
    export(ours, target, "onnx", quantize="int8")
    return official, target


def left_padded() -> tuple[list[list[int]], list[list[int]]]:
    """The prompts as one batch, and its mask."""
    longest = max(map(len, PROMPTS))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS]
    return ids, [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]


def official_batch(directory: Path) -> list[list[int]]:
    """What transformers generates greedily after the left-padded prompts, to the end of the context."""
    gpt2 = GPT2LMHeadModel.from_pretrained(directory).eval()
    gpt2.generation_config.eos_token_id = None
    ids, mask = map(torch.tensor, left_padded())
    found = gpt2.generate(ids, attention_mask=mask, max_length=CONTEXT, do_sample=False, pad_token_id=0)
    return found[:, ids.shape[1] :].tolist()


def official_texts(directory: Path) -> list[str]:
    """What transformers writes greedily after each of the texts."""
    gpt2, tokenizer = GPT2LMHeadModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    found = [
        gpt2.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=MORE, do_sample=False, pad_token_id=0)[0]
        for text in TEXTS
    ]
    return tokenizer.batch_decode(found, skip_special_tokens=True)


def int8_ids(directory: Path) -> list[list[int]]:
    """What the int8 graph generates in onnxruntime after each prompt, to the end of the context."""
    official = GPT2LMHeadModel.from_pretrained(directory.with_name(directory.name.replace("onnx", "official"))).config
    session = Session(directory / FOLDER / INT8, GPTScratchConfig.from_gpt2(official))
    every = []
    for prompt in PROMPTS:
        ids, past, found = torch.tensor([prompt]), None, []
        while len(prompt) + len(found) < CONTEXT:
            logits, past = session(ids, torch.ones(1, len(prompt) + len(found), dtype=torch.long), past)
            ids = logits[:, -1:].argmax(-1)
            found.append(ids.item())
        every.append(found)
    return every
