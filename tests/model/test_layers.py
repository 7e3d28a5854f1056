import hashlib
import math

import pytest
import torch
from pairs import random_ids
from transformers import DynamicCache

from hf_gpt_scratch import (
    GELU,
    GPT_CONFIG_124M,
    FeedForward,
    GPTModel,
    GPTScratchConfig,
    GPTScratchForCausalLM,
    LayerNorm,
    MultiHeadAttention,
    TransformerBlock,
    generate_text_simple,
)
from hf_gpt_scratch.model.compat import CACHE

TINY = {
    "vocab_size": 97,
    "context_length": 16,
    "emb_dim": 24,
    "n_heads": 3,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": True,
}
# sha256 over names and bytes of the weights that the seeds' code gives after torch.manual_seed(123), masks left out.
SEEDED_124M = "388958f5e12061d8e6d831a4e85923ceda68637a861ca631642a4127266e85d8"


def fingerprint(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def book_model():
    torch.manual_seed(123)
    return GPTModel(GPT_CONFIG_124M)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = GPTModel(TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.slow
def test_seeded_weights_are_bit_for_bit_the_books(book_model):
    assert fingerprint(book_model) == SEEDED_124M


@pytest.mark.slow
def test_another_seed_gives_other_weights():
    torch.manual_seed(124)
    assert fingerprint(GPTModel(GPT_CONFIG_124M)) != SEEDED_124M


@pytest.mark.slow
def test_parameter_counts_are_the_books(book_model):
    assert sum(p.numel() for p in book_model.parameters()) == 163_009_536
    assert sum(p.numel() for p in book_model.trf_blocks[0].att.parameters()) == 2_360_064
    assert sum(p.numel() for p in book_model.trf_blocks[0].ff.parameters()) == 4_722_432


@pytest.mark.parametrize(
    ("qkv_bias", "tied", "expected"),
    [(True, True, 124_439_808), (True, False, 163_037_184), (False, False, 163_009_536), (False, True, 124_412_160)],
)
def test_parameter_counts_with_and_without_bias_and_tying(qkv_bias, tied, expected):
    with torch.device("meta"):
        model = GPTModel({**GPT_CONFIG_124M, "qkv_bias": qkv_bias, "tie_word_embeddings": tied})
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.slow
def test_published_logits_come_out_with_dropout_on():
    # Chapter 4 runs the fresh model in training mode, so that this pins the order of random draws in forward, too.
    torch.manual_seed(123)
    batch = torch.tensor([[6109, 3626, 6100, 345], [6109, 1110, 6622, 257]])
    logits = GPTModel(GPT_CONFIG_124M)(batch)
    assert logits.shape == (2, 4, 50257)
    first_three = torch.tensor([0.3613, 0.4222, -0.0711])
    last_three = torch.tensor([1.2630, -0.1858, 0.0388])
    torch.testing.assert_close(logits[0, 0, :3], first_three, atol=6e-5, rtol=0)
    torch.testing.assert_close(logits[1, 3, -3:], last_three, atol=6e-5, rtol=0)


@pytest.mark.slow
def test_published_ids_are_generated(book_model):
    hello_i_am = torch.tensor([[15496, 11, 314, 716]])
    out = generate_text_simple(book_model.eval(), hello_i_am, max_new_tokens=6, context_size=1024)
    assert out.tolist() == [[15496, 11, 314, 716, 27018, 24086, 47843, 30961, 42348, 7267]]


def test_state_dict_of_the_book_with_mask_buffers_loads_strictly(tiny):
    theirs = dict(tiny.state_dict())
    for n in range(TINY["n_layers"]):
        theirs[f"trf_blocks.{n}.att.mask"] = torch.triu(torch.ones(16, 16), diagonal=1)
    model = GPTModel(TINY)
    assert model.load_state_dict(theirs, strict=True).unexpected_keys == []
    assert fingerprint(model) == fingerprint(tiny)


def test_other_buffers_do_not_load_strictly(tiny):
    with pytest.raises(RuntimeError, match=r"trf_blocks\.0\.att\.masque"):
        tiny.load_state_dict({**tiny.state_dict(), "trf_blocks.0.att.masque": torch.ones(1)}, strict=True)


def test_state_dict_has_parameters_only(tiny):
    assert tiny.state_dict().keys() == {name for name, _ in tiny.named_parameters()}


@pytest.mark.parametrize("build", ["on meta, assigned", "on meta, moved, copied"])
def test_a_model_built_without_memory_computes_the_same_once_weights_are_loaded(tiny, build):
    with torch.device("meta"):
        model = GPTModel(TINY).eval()
    if "moved" in build:
        model = model.to_empty(device="cpu")
    model.load_state_dict(tiny.state_dict(), assign="assigned" in build)
    ids = random_ids(2, 9, vocab_size=97)
    assert torch.equal(model(ids), tiny(ids))


def test_tied_model_loads_a_state_dict_that_stores_the_matrix_once():
    model = GPTModel({**TINY, "tie_word_embeddings": True})
    once = {name: tensor for name, tensor in model.state_dict().items() if name != "out_head.weight"}
    model.load_state_dict(once, strict=True)
    with pytest.raises(RuntimeError, match="out_head"):
        GPTModel(TINY).load_state_dict(once, strict=True)


def test_dict_and_config_object_build_the_same_model():
    torch.manual_seed(5)
    from_dict = GPTModel(TINY)
    torch.manual_seed(5)
    assert fingerprint(GPTModel(GPTScratchConfig(**TINY))) == fingerprint(from_dict)


def test_missing_size_is_named():
    with pytest.raises(KeyError, match=r"n_heads.*GPT_CONFIG_124M"):
        GPTModel({name: value for name, value in TINY.items() if name != "n_heads"})


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ({"n_head": 12}, "n_head=12.*here it is n_heads"),
        ({"num_heads": 12}, "num_heads=12.*here it is n_heads"),
        ({"qkv_bais": True}, "qkv_bais=True.*here it is qkv_bias"),
        ({"hidden_dim": 64}, "hidden_dim=64.*here it is n_inner"),
        ({"dtype": torch.bfloat16}, r"dtype=torch\.bfloat16.*\.to\(dtype\)"),
        ({"n_kv_groups": 2}, "n_kv_groups=2.*keys and values"),
        ({"rope_base": 10_000}, "rope_base=10000.*positions are learned"),
        ({"bias": False}, "bias=False.*does not know"),
        ({"anything": "x" * 10_000}, "anything=x{80},.*remove it"),
    ],
)
def test_a_key_that_means_nothing_here_is_refused_by_name_with_what_to_do(key, told):
    with pytest.raises(ValueError, match=told) as error:
        GPTModel({**TINY, **key})
    assert len(str(error.value)) < 300


def test_keys_that_change_nothing_are_taken(tiny):
    same = {"n_head": 3, "n_embd": 24, "n_layer": 2, "block_size": 16, "dropout": 0.1, "bias": True}
    harmless = {"bos_token_id": 5, "pad_token_id": 5, "use_cache": False, "activation_function": "gelu_new"}
    other = GPTModel({**TINY, **same, **harmless}).eval()
    other.load_state_dict(tiny.state_dict())
    assert torch.equal(other(random_ids(vocab_size=97, length=9)), tiny(random_ids(vocab_size=97, length=9)))


@pytest.mark.parametrize("cfg", [{**TINY, "activation_function": "relu"}, GPTScratchConfig(activation_function="gelu")])
def test_another_activation_is_refused_where_the_books_would_be_computed(cfg):
    for build in (GPTModel, FeedForward, TransformerBlock):
        with pytest.raises(ValueError, match=r"activation_function='(relu|gelu)'.*'gelu_new'.*GPTScratchForCausalLM"):
            build(cfg)


@pytest.mark.parametrize(
    "other",
    [
        {"n_inner": 50},
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
    ids=str,
)
def test_what_only_the_transformers_model_does_is_refused_by_name(other):
    [name] = other
    for cfg in ({**TINY, **other}, GPTScratchConfig(**TINY, **other)):
        for build in (GPTModel, FeedForward, TransformerBlock):
            with pytest.raises(ValueError, match=f"got {name}=.*GPTScratchForCausalLM supports it"):
                build(cfg)
        assert getattr(GPTScratchForCausalLM(GPTScratchConfig(**TINY, **other)).config, name) == other[name]


def test_dropout_rates_of_exercise_4_3_go_to_their_places():
    cfg = {**TINY, "drop_rate_emb": 0.2, "drop_rate_attn": 0.3, "drop_rate_shortcut": 0.4}
    model = GPTModel(cfg)
    block = model.trf_blocks[1]
    assert (model.drop_emb.p, block.att.dropout.p, block.drop_shortcut.p) == (0.2, 0.3, 0.4)
    assert GPTModel({**cfg, "drop_rate_attn": None}).trf_blocks[0].att.dropout.p == TINY["drop_rate"]


def test_layer_norm_is_its_formula():
    norm = LayerNorm(24, eps=1e-3)
    torch.nn.init.normal_(norm.scale)
    torch.nn.init.normal_(norm.shift)
    x = torch.randn(2, 5, 24) * 3 + 1
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    torch.testing.assert_close(norm(x), norm.scale * (x - mean) / torch.sqrt(var + 1e-3) + norm.shift)
    unbiased = norm.scale * (x - mean) / torch.sqrt(x.var(-1, keepdim=True) + 1e-3) + norm.shift
    assert (norm(x) - unbiased).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_is_its_formula(dtype):
    x = torch.linspace(-6, 6, 1001, dtype=dtype)
    formula = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(GELU()(x), formula)
    assert (GELU()(x) - torch.nn.functional.gelu(x)).abs().max() > 1e-4


def test_parts_work_alone_as_in_the_book():
    x = torch.randn(2, 6, 24)
    attention = MultiHeadAttention(24, 24, context_length=6, dropout=0.0, num_heads=2)
    assert attention(x).shape == x.shape
    assert FeedForward(TINY)(x).shape == x.shape
    assert TransformerBlock(TINY)(x).shape == x.shape


def test_unequal_heads_are_refused():
    with pytest.raises(ValueError, match=r"d_out=25.*num_heads=2"):
        MultiHeadAttention(24, 25, context_length=6, dropout=0.0, num_heads=2)


def test_sequences_longer_than_the_context_are_refused_by_model_and_attention(tiny):
    with pytest.raises(ValueError, match=r"17 tokens.*context_length=16"):
        tiny(random_ids(1, 17, vocab_size=97))
    with pytest.raises(ValueError, match=r"7 tokens.*context_length=6"):
        MultiHeadAttention(24, 24, context_length=6, dropout=0.0, num_heads=2)(torch.randn(1, 7, 24))


def test_generate_text_simple_cuts_the_context(tiny):
    idx = random_ids(2, 14, vocab_size=97)
    out = generate_text_simple(tiny, idx, max_new_tokens=5, context_size=16)
    assert out.shape == (2, 19)
    assert torch.equal(out[:, :14], idx)
    assert torch.equal(out[:, -1], tiny(out[:, -17:-1])[:, -1].argmax(-1))


def test_generate_text_simple_takes_a_transformers_model_of_the_same_weights(tiny):
    ours = GPTScratchForCausalLM.from_book(tiny)
    idx = random_ids(2, 14, vocab_size=97)
    ids = [generate_text_simple(model, idx, max_new_tokens=5, context_size=16) for model in (tiny, ours)]
    assert torch.equal(*ids)


def test_later_tokens_do_not_change_earlier_logits(tiny):
    idx = random_ids(2, 12, vocab_size=97)
    changed = idx.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 97
    torch.testing.assert_close(tiny(idx)[:, :7], tiny(changed)[:, :7])
    assert (tiny(idx)[:, 7:] - tiny(changed)[:, 7:]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_mask_is_no_tensor_of_the_model_and_right_in_each_dtype(tiny, dtype):
    assert list(tiny.buffers()) == []
    model, ids = tiny.to(dtype), random_ids(1, 9, vocab_size=97)
    assert torch.isfinite(model(ids)).all()
    torch.testing.assert_close(model(ids)[:, :5], model(ids[:, :5]))


# The siblings compute what the book's classes do


@pytest.fixture
def siblings(tiny):
    """The book's model, and the Transformers model with its weights."""
    return tiny, GPTScratchForCausalLM.from_book(tiny.state_dict(), TINY)


def test_the_fused_layers_are_the_books(siblings):
    book, ours = siblings
    x = torch.randn(2, 5, 24) * 3 + 1
    for kind, change in ((LayerNorm, lambda norm: norm.shift.data.add_(0.1)), (GELU, None)):
        theirs = next(module for module in book.modules() if isinstance(module, kind))
        sibling = next(module for module in ours.modules() if isinstance(module, kind))
        assert type(theirs) is kind and type(sibling) is not kind
        torch.testing.assert_close(sibling(x), theirs(x), atol=1e-5, rtol=1e-5)
        if change:
            change(sibling)
            assert (sibling(x) - theirs(x)).abs().max() > 1e-2


@pytest.mark.parametrize("steps", [(5, 1, 1, 5), (1, 11), (12,)])
def test_a_cache_does_not_change_the_books_logits(siblings, steps):
    book, ours = siblings
    idx = random_ids(2, 12, vocab_size=97)
    cache, logits = DynamicCache(), []
    for chunk in idx.split(steps, dim=1):
        logits.append(ours(chunk, **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), book(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_left_padding_does_not_change_the_books_logits(siblings, implementation):
    book, ours = siblings
    ours.set_attn_implementation(implementation)
    idx = random_ids(1, 6, vocab_size=97)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), idx], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = ours(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[:, 4:], book(idx), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(logits).all()
    assert (book(padded)[:, 4:] - book(idx)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_bias": "False"}, "qkv_bias='False', but it must be True or False"),
        ({"n_heads": 0}, "n_heads='0', but it must be a whole number of at least 1"),
        ({"n_layers": "3"}, "n_layers='3'.*whole number"),
        ({"emb_dim": 24.0}, "emb_dim='24.0'.*whole number"),
        ({"drop_rate": None}, "drop_rate.*='None', but it must be a number from 0 to 1"),
        ({"drop_rate": 1.5}, "drop_rate.*='1.5'.*number from 0 to 1"),
    ],
)
def test_a_value_that_a_cfg_cannot_have_is_refused_by_name_and_rule(change, message):
    for build in (GPTModel, FeedForward, TransformerBlock):
        with pytest.raises(ValueError, match=message):
            build({**TINY, **change})
    for cfg in (None, [1], "124M"):
        with pytest.raises(ValueError, match="as the cfg; give the book's dict"):
            GPTModel(cfg)


def test_a_tied_model_does_not_load_two_matrices_that_differ(tiny):
    tied = GPTModel({**TINY, "tie_word_embeddings": True})
    with pytest.raises(ValueError, match=r"out_head\.weight differs from tok_emb\.weight"):
        tied.load_state_dict(tiny.state_dict())
    same = {**tiny.state_dict(), "out_head.weight": tiny.tok_emb.weight}
    tied.load_state_dict(same)
