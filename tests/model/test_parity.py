"""Our model against `GPT2LMHeadModel` with the same weights; each law has a mutation twin that must break it."""

from pathlib import Path

import pytest
import torch
from pairs import LAYERS, random_gpt2, random_ids, random_pair, randomize
from torch import nn
from transformers import DynamicCache, GPT2LMHeadModel, set_seed
from transformers.activations import ACT2FN

from hf_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from hf_gpt_scratch.errors import ParityError
from hf_gpt_scratch.model.compat import CACHE
from hf_gpt_scratch.model.modeling_gpt_scratch import FusedLayerNorm
from hf_gpt_scratch.model.weight_map import BASE, LM_HEAD, TABLE
from hf_gpt_scratch.weights.parity import (
    FLOAT64_RATIO,
    FP32_GRADIENTS,
    FP32_LOGITS,
    FP32_LOSS,
    LogitParity,
    compare_logits,
    gradient_errors,
    greedy_ids,
    probe_ids,
    relative_error,
    rms_error,
    verify_models,
    weights_equal,
)

TRAINED = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def trained_pair():
    return GPT2LMHeadModel.from_pretrained(TRAINED).eval(), GPTScratchForCausalLM.from_pretrained(TRAINED).eval()


PAIRS = {
    "random": random_pair,
    "random, another seed": lambda: random_pair(seed=1),
    "random, untied": lambda: random_pair(tie_word_embeddings=False),
    "trained": trained_pair,
}


@pytest.fixture(params=PAIRS, scope="module")
def pair(request):
    return PAIRS[request.param]()


@pytest.fixture(params=["eager", "sdpa"])
def attention(request, pair):
    for model in pair:
        model.set_attn_implementation(request.param)
    return request.param


def ids_for(model, batch=2, length=24):
    return random_ids(batch, length, vocab_size=model.config.vocab_size)


def logit_error(gpt2, scratch, **inputs):
    return compare_logits(gpt2, scratch, ids_for(gpt2), **inputs).relative_error


def test_logits(pair, attention):
    assert logit_error(*pair) <= FP32_LOGITS


def test_loss_with_ignored_labels(pair, attention):
    ids = ids_for(pair[0])
    labels = ids.masked_fill(ids % 3 == 0, -100)
    theirs, ours = (model(ids, labels=labels).loss.item() for model in pair)
    assert abs(theirs - ours) <= FP32_LOSS * theirs
    assert abs(theirs - pair[1](ids, labels=ids).loss.item()) > FP32_LOSS * theirs


def test_gradient_of_every_parameter(pair, attention):
    gpt2, scratch = pair
    ids = ids_for(gpt2)
    for model in pair:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
    errors = gradient_errors(*pair)
    assert errors.keys() == dict(gpt2.named_parameters()).keys()
    assert max(errors.values()) <= FP32_GRADIENTS, errors
    with torch.no_grad():
        scratch.model.final_norm.scale.grad *= 1.001
    assert max(gradient_errors(*pair).values()) > FP32_GRADIENTS


def test_hidden_states_and_attentions(pair):
    for model in pair:
        model.set_attn_implementation("eager")
    ids = ids_for(pair[0])
    theirs, ours = (model(ids, output_hidden_states=True, output_attentions=True) for model in pair)
    for kind in ("hidden_states", "attentions"):
        assert len(theirs[kind]) == len(ours[kind]) > 0
        for a, b in zip(theirs[kind], ours[kind], strict=True):
            assert a.shape == b.shape
            assert relative_error(a, b) <= FP32_LOGITS


def test_cache_equals_no_cache_and_the_officials_cache(pair, attention):
    ids = ids_for(pair[0])
    steps = [[], []]
    for model, logits in zip(pair, steps, strict=True):
        cache = DynamicCache()
        for chunk in ids.split([10, 1, 1, 12], dim=1):
            with torch.no_grad():
                logits.append(model(chunk, **{CACHE: cache}).logits)
    theirs, ours = (torch.cat(logits, dim=1) for logits in steps)
    assert relative_error(theirs, ours) <= FP32_LOGITS
    assert relative_error(pair[1](ids).logits, ours) <= FP32_LOGITS


def test_token_types_are_embedded_as_tokens(pair, attention):
    types = ids_for(pair[0]) % 2
    assert logit_error(*pair, token_type_ids=types) <= FP32_LOGITS
    ids = ids_for(pair[0])
    assert relative_error(pair[0](ids).logits, pair[1](ids, token_type_ids=types).logits) > 100 * FP32_LOGITS


def left_padded(model):
    ids = ids_for(model, batch=3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 11)):
        mask[row, :padding] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def test_left_padded_batches(pair, attention):
    ids, mask, positions = left_padded(pair[0])
    theirs, ours = (model(ids, attention_mask=mask, position_ids=positions).logits for model in pair)
    seen = mask.bool()
    assert relative_error(theirs[seen], ours[seen]) <= FP32_LOGITS
    alone = pair[1](ids[2:, 11:]).logits
    assert relative_error(alone, ours[2:, 11:]) <= FP32_LOGITS
    unmasked = pair[1](ids, position_ids=positions).logits
    assert relative_error(theirs[seen], unmasked[seen]) > 100 * FP32_LOGITS


GENERATION = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "beam": {"num_beams": 3},
    "beam-sampled": {"num_beams": 3, "do_sample": True, "temperature": 1.2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}
QUICK_MODES = ("greedy", "beam")


@pytest.mark.parametrize(
    "mode",
    [*QUICK_MODES, *(pytest.param(mode, marks=pytest.mark.slow) for mode in GENERATION if mode not in QUICK_MODES)],
)
def test_generated_ids(pair, attention, mode):
    ids, mask, _ = left_padded(pair[0])
    settings = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0, **GENERATION[mode]}
    generated = []
    for model in pair:
        set_seed(7)
        generated.append(model.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(*generated)
    set_seed(8)
    if settings["do_sample"]:
        assert not torch.equal(generated[1], pair[1].generate(ids, attention_mask=mask, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_float64_than_the_official_model(pair, attention, dtype):
    gpt2, scratch = (type(model)(model.config).to(dtype).eval() for model in pair)
    for rounded, model in zip((gpt2, scratch), pair, strict=True):
        rounded.load_state_dict(model.state_dict())
    exact = GPT2LMHeadModel(gpt2.config).double().eval()
    exact.load_state_dict(gpt2.state_dict())
    ids = ids_for(gpt2, batch=4, length=48)
    with torch.no_grad():
        reference, theirs, ours = (model(ids).logits for model in (exact, gpt2, scratch))
    assert rms_error(reference, ours) <= FLOAT64_RATIO * rms_error(reference, theirs)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_dropout_draws_the_same_masks(attn):
    gpt2, scratch = (model.train() for model in random_pair(attn_implementation=attn))
    ids = ids_for(gpt2)
    logits = []
    for model in (gpt2, scratch):
        set_seed(3)
        logits.append(model(ids).logits)
    assert relative_error(*logits) <= FP32_LOGITS
    assert relative_error(logits[1], scratch(ids).logits) > 1e-2


OPTIONS = [
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"n_inner": 100},
    {"layer_norm_epsilon": 0.5},
    {"reorder_and_upcast_attn": True},
    *({"activation_function": name} for name in ACT2FN),
]

TANH_GELUS = ("gelu_new", "gelu_accurate", "gelu_fast", "gelu_python_tanh", "gelu_pytorch_tanh")


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_options_of_gpt2_are_honoured(option, attn):
    gpt2, scratch = random_pair(**option, attn_implementation=attn)
    assert logit_error(gpt2, scratch) <= FP32_LOGITS
    if option == {"reorder_and_upcast_attn": True} or option.get("activation_function") in TANH_GELUS:
        return  # the same function as by default, in other arithmetic
    default = random_gpt2(attn_implementation=attn)
    if {p.shape for p in default.parameters()} == {p.shape for p in gpt2.parameters()}:
        default.load_state_dict(gpt2.state_dict())
        assert logit_error(default, scratch) > FP32_LOGITS


@pytest.mark.parametrize("autocast", [False, True])
def test_upcast_attention_is_the_officials_in_bfloat16(autocast):
    gpt2, scratch = random_pair(reorder_and_upcast_attn=True, attn_implementation="eager")
    if not autocast:
        gpt2, scratch = gpt2.bfloat16(), scratch.bfloat16()
    hidden = torch.randn(2, 10, 48, dtype=gpt2.dtype)
    future = torch.ones(10, 10, dtype=torch.bool).triu(1)
    mask = torch.zeros(10, 10, dtype=gpt2.dtype).masked_fill(future, torch.finfo(gpt2.dtype).min)
    attention = scratch.model.trf_blocks[1].att
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs, their_weights = gpt2.transformer.h[1].attn(hidden, attention_mask=mask)
        ours, our_weights = attention(hidden, mask)
        attention.config.reorder_and_upcast_attn = False
        _, plain_weights = attention(hidden, mask)

    def rms(reference, candidate):
        return rms_error(reference, candidate) / reference.double().square().mean().sqrt().item()

    # Their products are shaped otherwise, and an order of sums can round to another bfloat16: a number in hundreds, if
    # any. Without float32 a quarter of the numbers is off, by 2.7e-3 and more altogether.
    assert rms(their_weights, our_weights) <= 1e-3
    assert rms(theirs, ours) <= 1e-3
    assert rms(their_weights, plain_weights) > 2e-3


# Mutation twins: whatever is wrong, the comparison above must see it.


def set_row(scratch, row, change):
    """Replaces the tensors of a table row by `change` of GPT-2's tensor, read back as ours."""
    parameters = dict(scratch.named_parameters())
    names = [name if name in parameters else f"model.{name}" for name in row.ours]
    with torch.no_grad():
        fused = row.to_theirs([parameters[name].clone() for name in names])
        for name, part in zip(names, row.to_ours(change(fused)), strict=True):
            parameters[name].copy_(part)


def not_transposed(tensor):
    """What is read when Conv1D's numbers are taken in nn.Linear's order; for vectors, numbers in the wrong place."""
    if tensor.ndim == 1:
        return tensor.roll(1)
    return tensor.reshape(tensor.shape[::-1]).T


LM_ROWS = [row for row in (*BASE, LM_HEAD) if ".act." not in row.theirs]


@pytest.mark.slow
@pytest.mark.parametrize("row", LM_ROWS, ids=lambda row: row.theirs)
def test_any_row_read_wrongly_is_noticed(row):
    cross = "cross" in row.theirs
    gpt2, scratch = random_pair(tie_word_embeddings=False, add_cross_attention=cross)
    states = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1))
    inputs = {"encoder_hidden_states": states[: len(ids_for(gpt2))]} if cross else {}
    set_row(scratch, row.at(1), lambda tensor: tensor)
    assert logit_error(gpt2, scratch, **inputs) <= FP32_LOGITS
    set_row(scratch, row.at(1), not_transposed)
    assert logit_error(gpt2, scratch, **inputs) > 100 * FP32_LOGITS
    assert not weights_equal(gpt2, scratch)


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0), (2, 0, 1), (1, 2, 0)])
def test_swapped_query_key_and_value_are_noticed(kind, order):
    gpt2, scratch = random_pair()
    row = next(row for row in TABLE if row.theirs.endswith(f"c_attn.{kind}"))

    def swap(tensor):
        parts = tensor.chunk(3, dim=-1)
        return torch.cat([parts[i] for i in order], dim=-1)

    set_row(scratch, row.at(0), swap)
    assert logit_error(gpt2, scratch) > 100 * FP32_LOGITS


def exact_gelu(scratch, monkeypatch):
    scratch.model.trf_blocks[1].ff.layers[1] = nn.GELU()


def unbiased_variance(scratch, monkeypatch):
    def forward(self, x):
        return self.scale * (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + self.eps).sqrt() + self.shift

    monkeypatch.setattr(FusedLayerNorm, "forward", forward)


def missing_scale(scratch, monkeypatch):
    scratch.model.trf_blocks[1].att.scaling = 1.0


def wrong_epsilon(scratch, monkeypatch):
    scratch.model.final_norm.eps = 1e-1


def wrong_number_of_heads(scratch, monkeypatch):
    for block in scratch.model.trf_blocks:
        block.att.head_dim //= 2


def dropout_left_on(scratch, monkeypatch):
    scratch.model.drop_emb.train()


@pytest.mark.parametrize(
    "mutate",
    [exact_gelu, unbiased_variance, missing_scale, wrong_epsilon, wrong_number_of_heads, dropout_left_on],
)
def test_wrong_arithmetic_is_noticed(mutate, monkeypatch):
    gpt2, scratch = random_pair()
    assert logit_error(gpt2, scratch) <= FP32_LOGITS
    mutate(scratch, monkeypatch)
    assert logit_error(gpt2, scratch) > 10 * FP32_LOGITS


def test_a_small_change_of_one_weight_is_noticed_by_weights_logits_and_verify():
    gpt2, scratch = random_pair()
    assert verify_models(gpt2, scratch).passed
    with torch.no_grad():
        scratch.model.trf_blocks[2].att.W_key.bias[5] += 1e-6  # invisible in logits
    with pytest.raises(ParityError, match=r"weights: DIFFERENT"):
        verify_models(gpt2, scratch)


def test_verify_compares_generated_ids_and_restores_settings(monkeypatch):
    gpt2, scratch = random_pair()
    settings = scratch.generation_config
    figures = verify_models(gpt2, scratch).to_dict()
    assert figures["greedy_tokens"] == 32
    assert figures["passed"]
    assert scratch.generation_config is settings
    ids = probe_ids(211, 8)
    assert greedy_ids(scratch, ids, 3).shape == (2, 11)
    monkeypatch.setattr("hf_gpt_scratch.weights.parity.greedy_ids", lambda model, ids, n: ids + (model is scratch))
    with pytest.raises(ParityError, match=r"greedy ids: DIFFERENT"):
        verify_models(gpt2, scratch)


def test_verify_works_at_the_smallest_context():
    gpt2, scratch = random_pair(n_positions=1)
    assert verify_models(gpt2, scratch).greedy_tokens == 0


def test_nan_is_never_parity():
    gpt2, scratch = random_pair()
    randomize(scratch, seed=1).out_head.weight.data[3] = float("nan")
    with pytest.raises(ParityError):
        verify_models(gpt2, scratch)
    nan = float("nan")
    assert not LogitParity(1, 1.0, nan, 1.0).relative_error <= FP32_LOGITS


def test_biases_that_ours_lacks_must_be_zero():
    config = GPTScratchConfig(vocab_size=211, context_length=64, emb_dim=48, n_heads=4, n_layers=LAYERS)
    scratch = randomize(GPTScratchForCausalLM(config)).eval()
    gpt2 = scratch.to_gpt2()
    assert verify_models(gpt2, scratch).passed
    gpt2.transformer.h[0].attn.c_attn.bias.data[3] = 1e-9
    assert not weights_equal(gpt2, scratch)
