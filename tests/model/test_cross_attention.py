"""Cross-attention: the decoder of EncoderDecoderModel and VisionEncoderDecoderModel."""

import pytest
import torch
from pairs import gpt2_config, random_ids, random_pair, randomize
from transformers import (
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2LMHeadModel,
    GPT2Model,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

from hf_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM, GPTScratchModel
from hf_gpt_scratch.errors import ConversionError
from hf_gpt_scratch.model.compat import CACHE
from hf_gpt_scratch.weights.convert import export_checkpoint, scratch_to_gpt2
from hf_gpt_scratch.weights.parity import (
    FP32_GRADIENTS,
    FP32_LOGITS,
    FP32_LOSS,
    gradient_errors,
    greedy_ids,
    relative_error,
)


def states(batch=2, length=7, seed=5):
    return torch.randn(batch, length, 48, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair():
    return random_pair(add_cross_attention=True, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("changes", [{}, {"scale_attn_by_inverse_layer_idx": True}, {"reorder_and_upcast_attn": True}])
def test_logits_and_attentions_equal_the_officials(implementation, changes):
    outputs = []
    for model in random_pair(add_cross_attention=True, **changes):
        model.set_attn_implementation(implementation)
        outputs.append(model(random_ids(), encoder_hidden_states=states(), output_attentions=implementation == "eager"))
    theirs, ours = outputs
    assert relative_error(theirs.logits, ours.logits) < FP32_LOGITS
    if implementation == "eager":
        for name in ("attentions", "cross_attentions"):
            assert len(getattr(ours, name)) == 3
            for reference, candidate in zip(getattr(theirs, name), getattr(ours, name), strict=True):
                assert relative_error(reference, candidate) < FP32_LOGITS


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_of_the_states_does_not_count(pair, implementation):
    """Row by row without padding; in 5.4 the official model forgets the mask."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 4:] = 0
    gpt2, ours = pair
    ours.set_attn_implementation(implementation)
    logits = ours(random_ids(), encoder_hidden_states=states(), encoder_attention_mask=mask).logits
    for row, length in enumerate((4, 7)):
        alone = gpt2(random_ids()[row : row + 1], encoder_hidden_states=states()[row : row + 1, :length]).logits
        assert relative_error(alone[0], logits[row]) < FP32_LOGITS


def test_states_order_and_masks_matter(pair):
    """Mutations that the comparison above would see."""
    _, ours = pair
    logits = ours(random_ids(), encoder_hidden_states=states()).logits
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[:, 4:] = 0
    for changed in (
        ours(random_ids(), encoder_hidden_states=states(seed=6)).logits,
        ours(random_ids(), encoder_hidden_states=states(), encoder_attention_mask=mask).logits,
        ours(random_ids()).logits,
    ):
        assert relative_error(logits, changed) > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_officials(checkpointing):
    models = random_pair(add_cross_attention=True, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    losses = []
    for model in models:
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(random_ids(), encoder_hidden_states=states(), labels=random_ids()).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=FP32_LOSS)
    errors = gradient_errors(*models)
    assert any("crossattention.c_attn" in name for name in errors)
    assert max(errors.values()) < FP32_GRADIENTS


def test_cached_steps_equal_the_whole(pair):
    _, ours = pair
    ids = random_ids(2, 9)
    whole = ours(ids, encoder_hidden_states=states()).logits
    cache, steps = None, []
    for t in range(9):
        # The states of later steps are not looked at: keys and values are in the cache.
        given = states() if t == 0 else torch.full_like(states(), torch.nan)
        out = ours(ids[:, t : t + 1], encoder_hidden_states=given, past_key_values=cache, use_cache=True)
        cache = getattr(out, CACHE)
        steps.append(out.logits)
    assert relative_error(whole, torch.cat(steps, 1)) < FP32_LOGITS


@pytest.mark.parametrize("model_classes", [(GPT2LMHeadModel, GPTScratchForCausalLM), (GPT2Model, GPTScratchModel)])
def test_checkpoints_travel_both_ways(tmp_path, model_classes):
    gpt2_class, scratch_class = model_classes
    gpt2 = randomize(gpt2_class(gpt2_config(add_cross_attention=True))).eval()
    gpt2.save_pretrained(tmp_path / "official")
    ours, info = scratch_class.from_pretrained(tmp_path / "official", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours.save_as_gpt2(tmp_path / "again")
    original, again = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("official", "again"))
    assert original == again


def test_without_biases_the_official_ones_are_zeros():
    config = GPTScratchConfig(
        vocab_size=97, context_length=16, emb_dim=48, n_heads=4, n_layers=2, add_cross_attention=True
    )
    ours = randomize(GPTScratchForCausalLM(config)).eval()
    gpt2 = ours.to_gpt2()
    assert not gpt2.transformer.h[1].crossattention.q_attn.bias.any()
    ids = random_ids(vocab_size=97, length=9)
    theirs = gpt2(ids, encoder_hidden_states=states()).logits
    assert relative_error(theirs, ours(ids, encoder_hidden_states=states()).logits) < FP32_LOGITS


def test_converted_without_biases_the_official_ones_are_zeros(tmp_path):
    config = GPTScratchConfig(
        vocab_size=97, context_length=16, emb_dim=48, n_heads=4, n_layers=2, add_cross_attention=True
    )
    ours = randomize(GPTScratchForCausalLM(config)).eval()
    ours.save_pretrained(tmp_path / "ours")
    scratch_to_gpt2(tmp_path / "ours", tmp_path / "official")
    gpt2 = GPT2LMHeadModel.from_pretrained(tmp_path / "official")
    assert not gpt2.transformer.h[1].crossattention.c_attn.bias.any()
    ids = random_ids(vocab_size=97, length=9)
    theirs = gpt2(ids, encoder_hidden_states=states()).logits
    assert relative_error(theirs, ours(ids, encoder_hidden_states=states()).logits) < FP32_LOGITS


@pytest.mark.parametrize("format", ["book", "nanogpt", "gguf"])
def test_formats_without_cross_attention_refuse_it_by_name(pair, tmp_path, format):
    pair[1].save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match="add_cross_attention=True"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_states_for_a_model_without_cross_attention_are_refused():
    _, ours = random_pair()
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        ours(random_ids(), encoder_hidden_states=states())


needs_strict_bool = pytest.mark.skipif(
    "int" in str(EncoderDecoderConfig.__annotations__.get("is_encoder_decoder")),
    reason="this version's EncoderDecoderConfig refuses its own is_encoder_decoder=True",
)


def seq2seq(decoder):
    """The same encoder in front of either decoder."""
    encoder = randomize(GPT2Model(gpt2_config()), seed=3).eval()
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id = model.config.pad_token_id = 1
    model.generation_config.decoder_start_token_id = model.generation_config.pad_token_id = 1
    return model.eval()


@needs_strict_bool
@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoder_model_generates_the_same(pair, beams):
    ids, generated = random_ids(2, 11, seed=2), []
    for decoder in pair:
        model = seq2seq(decoder)
        options = dict(max_new_tokens=12, do_sample=False, num_beams=beams, eos_token_id=None)
        generated.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options))
    assert torch.equal(*generated)
    assert generated[0].shape == (2, 13)


@needs_strict_bool
@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way:FutureWarning")
def test_encoder_decoder_model_has_the_same_loss_and_comes_back_from_disk(pair, tmp_path):
    ids, labels = random_ids(2, 11, seed=2), random_ids(2, 6, seed=4)
    theirs, ours = (seq2seq(decoder) for decoder in pair)
    loss = ours(input_ids=ids, labels=labels).loss
    assert loss.item() == pytest.approx(theirs(input_ids=ids, labels=labels).loss.item(), rel=FP32_LOSS)
    ours.save_pretrained(tmp_path)
    again = EncoderDecoderModel.from_pretrained(tmp_path)
    assert isinstance(again.decoder, GPTScratchForCausalLM)
    assert again(input_ids=ids, labels=labels).loss.item() == pytest.approx(loss.item(), rel=FP32_LOSS)


@needs_strict_bool
def test_checkpoints_compose_through_from_encoder_decoder_pretrained(pair, tmp_path):
    gpt2, ours = random_pair(seed=3)
    gpt2.transformer.save_pretrained(tmp_path / "encoder")
    ours.save_pretrained(tmp_path / "decoder")
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(str(tmp_path / "encoder"), str(tmp_path / "decoder"))
    assert model.decoder.config.add_cross_attention
    assert torch.equal(model.decoder.model.tok_emb.weight, ours.model.tok_emb.weight)
    assert model.decoder.model.trf_blocks[0].cross_att.W_key.weight.std() > 0


def test_vision_encoder_decoder_model_generates_the_same(pair):
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    encoder = randomize(ViTModel(config), seed=3).eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    generated, logits = [], []
    for decoder in pair:
        model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
        model.generation_config.decoder_start_token_id = model.generation_config.pad_token_id = 1
        generated.append(model.generate(pixels, max_new_tokens=10, do_sample=False, eos_token_id=None))
        logits.append(model(pixel_values=pixels, decoder_input_ids=random_ids()).logits)
    assert torch.equal(*generated)
    assert relative_error(*logits) < FP32_LOGITS


def test_without_states_it_is_the_plain_model(pair):
    gpt2, ours = pair
    assert relative_error(gpt2(random_ids()).logits, ours(random_ids()).logits) < FP32_LOGITS
    assert torch.equal(greedy_ids(gpt2, random_ids(1, 5), 10), greedy_ids(ours, random_ids(1, 5), 10))
