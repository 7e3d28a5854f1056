"""Tiny pairs of an official model and ours that hold the same random weights; nothing in them is 0 or 1."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM

VOCAB, CONTEXT, LAYERS = 211, 64, 3


def gpt2_config(**changes) -> GPT2Config:
    sizes = dict(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=48, n_head=4, n_layer=LAYERS)
    tokens = dict(bos_token_id=VOCAB - 1, eos_token_id=VOCAB - 1)
    return GPT2Config(**{**sizes, **tokens, **changes})


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights, biases and norms all random, and large enough that a mistake in any of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2 if parameter.ndim > 1 else 0.5, generator=generator)
            if "ln_" in name and name.endswith("weight"):
                parameter += 1
    return model


def random_gpt2(seed: int = 0, **changes) -> GPT2LMHeadModel:
    return randomize(GPT2LMHeadModel(gpt2_config(**changes)), seed).eval()


def random_pair(seed: int = 0, **changes) -> tuple[GPT2LMHeadModel, GPTScratchForCausalLM]:
    gpt2 = random_gpt2(seed, **changes)
    return gpt2, GPTScratchForCausalLM.from_gpt2(gpt2)


def random_ids(batch: int = 2, length: int = 20, seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_config(**changes):
    sizes = dict(vocab_size=VOCAB, context_length=CONTEXT, emb_dim=48, n_heads=4, n_layers=LAYERS)
    return GPTScratchConfig(**{**sizes, "bos_token_id": VOCAB - 1, "eos_token_id": VOCAB - 1, **changes})


def tiny_model(**changes):
    return randomize(GPTScratchForCausalLM(tiny_config(**changes))).eval()
