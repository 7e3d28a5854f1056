"""Graph capture: no graph breaks, no recompilation between steps, exported programs for any batch and length."""

import pytest
import torch
from pairs import random_ids, random_pair
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

from hf_gpt_scratch.weights.parity import FP32_LOGITS, relative_error

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["eager", "sdpa"])
def pair(request):
    return random_pair(attn_implementation=request.param)


@torch.no_grad()
def test_prefill_is_one_graph(pair):
    gpt2, scratch = pair
    counter = CompileCounter()
    compiled = torch.compile(scratch, backend=counter, fullgraph=True)
    ids = random_ids()
    assert relative_error(gpt2(ids).logits, compiled(ids, use_cache=False).logits) <= FP32_LOGITS
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.long
def test_compiled_prefill_has_a_mask_only_if_one_is_given(use_cache):
    gpt2, scratch = random_pair(attn_implementation="sdpa")
    masks = []

    def backend(graph, _):
        attention = [node for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
        masks.append({(node.kwargs["attn_mask"] is not None, node.kwargs["is_causal"]) for node in attention})
        return graph

    compiled = torch.compile(scratch, backend=backend, fullgraph=True, dynamic=True)
    for length in (9, 14, 1):
        ids = random_ids(2, length)
        assert relative_error(gpt2(ids).logits, compiled(ids, use_cache=use_cache).logits) <= FP32_LOGITS
    assert masks[0] == {(False, True)}
    mask = torch.ones_like(ids)
    compiled(ids, attention_mask=mask, use_cache=use_cache)
    assert masks[-1] == {(True, False)}


@torch.no_grad()
def test_static_decoding_compiles_once(pair):
    gpt2, scratch = pair
    ids = random_ids(2, 16)
    cache = StaticCache(config=scratch.config, max_cache_len=32)
    counter = CompileCounter()
    compiled = torch.compile(scratch, backend=counter, fullgraph=True)
    logits = [scratch(ids[:, :8], past_key_values=cache, position_ids=torch.arange(8).unsqueeze(0)).logits]
    for t in range(8, 16):
        logits.append(compiled(ids[:, t : t + 1], past_key_values=cache, position_ids=torch.tensor([[t]])).logits)
    assert counter.frame_count == 1
    assert relative_error(gpt2(ids).logits, torch.cat(logits, dim=1)) <= FP32_LOGITS


@torch.no_grad()
def test_compiled_training_has_equal_gradients(pair):
    _, scratch = pair
    ids = random_ids()
    with torch.enable_grad():
        scratch(ids, labels=ids).loss.backward()
        expected = {name: p.grad.clone() for name, p in scratch.named_parameters()}
        scratch.zero_grad()
        torch.compile(scratch, backend="aot_eager", fullgraph=True)(ids, labels=ids, use_cache=False).loss.backward()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in scratch.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * largest, name


@torch.no_grad()
def test_exported_program_takes_any_batch_and_length(pair):
    gpt2, scratch = pair
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=64)
    shapes = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}, "use_cache": None}
    inputs = {"input_ids": random_ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long), "use_cache": False}
    program = torch.export.export(scratch, (), inputs, dynamic_shapes=shapes, strict=False).module()
    for size in ((3, 17), (2, 64), (5, 2)):
        ids = random_ids(*size)
        mask = torch.ones_like(ids)
        mask[0, : size[1] // 2] = 0
        ours = program(input_ids=ids, attention_mask=mask, use_cache=False).logits
        theirs = gpt2(ids, attention_mask=mask).logits
        assert relative_error(theirs[mask.bool()], ours[mask.bool()]) <= FP32_LOGITS
