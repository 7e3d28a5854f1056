"""Parity at the official sizes, from a checkpoint on disk: pytest -m real_size -s

Random weights, biases and norms. 1558M in float32 needs 14 GB of memory, 13 GB of disk and some minutes.
"""

import gc

import pytest
import torch
from transformers import GPT2LMHeadModel, set_seed

from hf_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from hf_gpt_scratch.model.configuration_gpt_scratch import PRESETS
from hf_gpt_scratch.weights.convert import gpt2_to_scratch
from hf_gpt_scratch.weights.parity import (
    FLOAT64_RATIO,
    FP32_GRADIENTS,
    FP32_LOGITS,
    FP32_LOSS,
    gradient_errors,
    probe_ids,
    relative_error,
    rms_error,
)

pytestmark = pytest.mark.real_size


def official(size):
    """GPT-2's own initialisation, with biases and norms moved off 0 and 1."""
    set_seed(0)
    model = GPT2LMHeadModel(GPTScratchConfig.preset(size).to_gpt2()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("size", PRESETS)
def test_conversion_at_real_size(size, tmp_path):
    official(size).save_pretrained(tmp_path / "official")
    gc.collect()
    parity = gpt2_to_scratch(tmp_path / "official", tmp_path / "ours")["parity"]
    logits = parity["logits"]
    print(
        f"\n{size}: max |logit| {logits['max_abs_logit']:.3f}, max |error| {logits['max_abs_error']:.1e}, relative "
        f"{logits['relative_error']:.1e}, top-1 {logits['top1_agreement']:.2%}, {parity['greedy_tokens']} greedy ids "
        f"equal: {parity['greedy_equal']}, {parity['tensors']} tensors equal: {parity['weights_equal']}"
    )
    assert parity["passed"]
    assert logits["relative_error"] <= FP32_LOGITS


@pytest.mark.parametrize("size", ["124M", "355M"])
def test_loss_and_gradients_at_real_size(size):
    gpt2 = official(size)
    scratch = GPTScratchForCausalLM.from_gpt2(gpt2)
    ids = probe_ids(gpt2.config.vocab_size, 1024, batch=1, length=128)
    losses = []
    for model in (gpt2, scratch):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    errors = gradient_errors(gpt2, scratch)
    worst = max(errors, key=errors.__getitem__)
    print(f"\n{size}: loss {losses[0]:.6f} and {losses[1]:.6f}; worst gradient {worst}, relative {errors[worst]:.1e}")
    assert abs(losses[0] - losses[1]) <= FP32_LOSS * losses[0]
    assert errors[worst] <= FP32_GRADIENTS


@pytest.mark.parametrize("size", ["124M", "355M"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_further_from_float64_at_real_size(size, dtype):
    gpt2 = official(size).to(dtype)
    scratch = GPTScratchForCausalLM.from_gpt2(gpt2)
    ids = probe_ids(gpt2.config.vocab_size, 1024)
    with torch.no_grad():
        ours, theirs = scratch(ids).logits, gpt2(ids).logits
        del scratch
        exact = gpt2.double()(ids).logits
    ratio = rms_error(exact, ours) / rms_error(exact, theirs)
    print(
        f"\n{size}, {dtype}: against float64 the official model is off by {relative_error(exact, theirs):.1e}, ours by "
        f"{relative_error(exact, ours):.1e}; RMS ratio {ratio:.3f}"
    )
    assert ratio <= FLOAT64_RATIO
