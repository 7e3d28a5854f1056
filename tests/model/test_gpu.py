"""What needs a GPU: python -m pytest tests/model/test_gpu.py"""

import pytest
import torch
from pairs import random_ids, random_pair
from transformers.utils import is_flash_attn_2_available

from hf_gpt_scratch.weights.parity import greedy_ids, relative_error

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs a GPU and the package flash-attn")
@pytest.mark.parametrize("padded", [False, True])
def test_flash_attention_is_as_close_to_float32_as_eager(padded):
    _, scratch = random_pair(n_embd=64)
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0 if padded else 1
    exact = scratch(ids, attention_mask=mask).logits[mask.bool()]
    errors = {}
    for name in ("eager", "flash_attention_2"):
        model = scratch.to("cuda", torch.bfloat16)
        model.set_attn_implementation(name)
        logits = model(ids.cuda(), attention_mask=mask.cuda()).logits.float().cpu()[mask.bool()]
        errors[name] = relative_error(exact, logits)
    assert errors["flash_attention_2"] <= 1.5 * errors["eager"]


@needs_gpu
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_ids_on_a_gpu_are_the_officials(attention):
    pair = [model.cuda() for model in random_pair(attn_implementation=attention)]
    theirs, ours = (greedy_ids(model, random_ids(2, 8).cuda(), 16) for model in pair)
    assert torch.equal(theirs, ours)


@needs_gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_cuda_graphs_of_static_decoding_give_the_same_ids():
    _, scratch = random_pair()
    scratch = scratch.cuda()  # float32: of numbers rounded to bfloat16 the greatest may be another
    ids = random_ids(1, 8).cuda()
    settings = dict(max_new_tokens=16, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    plain = scratch.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(plain, scratch.generate(ids, cache_implementation="static", **settings))
