"""What is translated to and from the official model, and saved, computes the same afterwards, or is refused by name."""

import copy
import functools
import types

import peft
import pytest
import torch
from packaging.version import Version
from pairs import gpt2_config, random_gpt2, random_ids, random_pair, randomize
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, GPT2Model
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_gpt_scratch import (
    FeedForward,
    GPTModel,
    GPTScratchConfig,
    GPTScratchForCausalLM,
    GPTScratchForSequenceClassification,
    GPTScratchPreTrainedModel,
)
from hf_gpt_scratch.model.heads_gpt_scratch import MODELS
from hf_gpt_scratch.model.modeling_gpt_scratch import CachedAttention, GPTScratchBlock
from hf_gpt_scratch.weights.parity import FP32_LOGITS, relative_error

pytestmark = pytest.mark.slow


class OtherFeedForward(nn.Module):
    """Of the same parameters as the book's, so that state dicts fit."""

    def __init__(self, ff):
        super().__init__()
        self.layers = ff.layers

    def forward(self, x):
        return self.layers[2](self.layers[0](x).relu())


class HalfFeedForward(FeedForward):
    def forward(self, x):
        return super().forward(x) / 2


def other_module(model):
    model.model.trf_blocks[1].ff = OtherFeedForward(model.model.trf_blocks[1].ff)


def inherited_module(model):
    model.model.trf_blocks[1].ff.__class__ = HalfFeedForward


def exact_gelu(model):
    model.model.trf_blocks[1].ff.layers[1] = nn.GELU()


def other_vocabulary(model):
    model.model.tok_emb = nn.Embedding(250, 48)


def edited_config(**changes):
    return lambda model: [setattr(model.config, name, value) for name, value in changes.items()]


# What makes a model another than its config says, and what the message names.
STRUCTURE = {
    "another module": (
        other_module,
        r"trf_blocks\.1\.ff is a .*OtherFeedForward instead of a modeling_gpt_scratch\.AnyFeedForward",
    ),
    "a module that inherits": (inherited_module, r"trf_blocks\.1\.ff is a .*HalfFeedForward"),
    "exact GELU": (
        exact_gelu,
        r"trf_blocks\.1\.ff\.layers\.1 is a activation\.GELU instead of a modeling_gpt_scratch\.FusedGELU",
    ),
    "other vocabulary": (other_vocabulary, r"tok_emb\.weight has shape \(250, 48\) instead of \(211, 48\)"),
    "n_heads": (edited_config(n_heads=6), r"att\.head_dim is 12 instead of 8"),
    "n_layers": (edited_config(n_layers=2), r"trf_blocks\.2 is an unknown"),
    "vocab_size": (edited_config(vocab_size=300), r"tok_emb\.weight has shape \(211, 48\) instead of \(300, 48\)"),
    "context_length": (edited_config(context_length=32), r"pos_emb\.weight has shape"),
    "activation": (
        edited_config(activation_function="relu"),
        r"ff\.layers\.1 is a modeling_gpt_scratch\.FusedGELU instead of a",
    ),
    "epsilon": (edited_config(layer_norm_epsilon=1e-4), r"final_norm\.eps is 1e-05 instead of 0\.0001"),
    "scaling": (edited_config(scale_attn_weights=False), r"att\.scaling is 0\.28.* instead of 1\.0"),
}


def hook(model):
    model.model.trf_blocks[1].register_forward_hook(lambda module, args, output: output * 0.9)


def replaced_method(model):
    model.model._check_positions = lambda position_ids, num_tokens: position_ids.zero_()


def not_a_number(model):
    model.model.final_norm.shift.data[0] = float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_as_its_config_says_is_translated(dtype):
    for kind in MODELS:
        cross = kind.__name__ in ("GPTScratchModel", "GPTScratchForCausalLM")
        gpt2 = randomize(kind.gpt2_class(gpt2_config(add_cross_attention=cross))).to(dtype)
        model = kind.from_gpt2(gpt2).train()
        hidden = model.base_model.trf_blocks[0].register_forward_hook(lambda *_: None)  # it looks, and changes nothing
        back = model.to_gpt2()
        hidden.remove()
        assert type(back) is kind.gpt2_class and model.training and not back.training
        assert all(torch.equal(p, q) for p, q in zip(gpt2.parameters(), back.parameters(), strict=True))


@pytest.mark.parametrize("name", STRUCTURE)
def test_a_model_that_its_config_does_not_describe_is_neither_translated_nor_saved(name, tmp_path):
    change, message = STRUCTURE[name]
    model = random_pair()[1]
    change(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for refused in (model.to_gpt2, lambda: model.save_as_gpt2(tmp_path), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=message):
            refused()
    assert not any(tmp_path.iterdir())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("change", [hook, replaced_method, not_a_number])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_no_module_shows_is_found_by_running_both(change, dtype):
    model = random_pair()[1].to(dtype)
    model.to_gpt2()
    change(model)
    with pytest.raises(ValueError, match="and its translation compute different logits"):
        model.to_gpt2()


def test_official_models_are_looked_at_too():
    for change, message in (
        (lambda gpt2: setattr(gpt2.config, "n_head", 6), r"attn\.head_dim is 12 instead of 8"),
        (lambda gpt2: setattr(gpt2.transformer.h[0].mlp, "act", nn.GELU()), r"h\.0\.mlp\.act is a"),
        (
            lambda gpt2: gpt2.transformer.h[0].register_forward_hook(lambda *args: 2 * args[2]),
            "compute different logits",
        ),
    ):
        gpt2 = random_gpt2()
        GPTScratchForCausalLM.from_gpt2(gpt2)
        change(gpt2)
        with pytest.raises(ValueError, match=message):
            GPTScratchForCausalLM.from_gpt2(gpt2)


def test_models_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"instead of a modeling_gpt2\.GPT2LMHeadModel"):
        GPTScratchForCausalLM.from_gpt2(GPT2Model(gpt2_config()))
    with pytest.raises(ValueError, match="score is missing"):
        GPTScratchForSequenceClassification.from_gpt2(random_gpt2())

    class Reward(GPTScratchPreTrainedModel):
        pass

    with pytest.raises(ValueError, match="Reward has no official counterpart"):
        Reward.from_gpt2(random_gpt2())


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # of the base, which was never saved
def test_active_adapters_are_not_dropped_in_silence(tmp_path):
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=["W_query", "out_proj"])
    wrapped = get_peft_model(random_pair()[1], lora)
    for write in (wrapped.base_model.model.save_as_gpt2, wrapped.base_model.model.save_pretrained):
        with pytest.raises(ValueError, match="merge_and_unload"):
            write(tmp_path)
    assert not any(tmp_path.iterdir())
    expected = wrapped.eval()(random_ids()).logits
    merged = wrapped.merge_and_unload()  # what the message advises
    assert relative_error(expected, merged.to_gpt2()(random_ids()).logits) <= FP32_LOGITS


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason="this transformers wants a newer PEFT for add_adapter than there is",
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # which looks for the base model's config
def test_adapters_that_transformers_added_are_not_dropped_in_silence(tmp_path):
    added = random_pair()[1]
    added.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["W_query", "out_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        added.save_as_gpt2(tmp_path)
    added.save_pretrained(tmp_path)  # the adapter alone, as transformers does
    assert (tmp_path / "adapter_config.json").is_file()


class HalfBlock(GPTScratchBlock):
    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs) / 2


class HalfGPT(GPTScratchForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for n in range(config.n_layers):
            self.model.trf_blocks[n] = HalfBlock(config, n)
        self.post_init()


@pytest.mark.parametrize("own_type", [False, True])
def test_a_class_with_another_block_is_saved_under_a_model_type_of_its_own_only(own_type, tmp_path):
    model = HalfGPT((OwnConfig if own_type else GPTScratchConfig).from_gpt2(gpt2_config()))
    if own_type:
        model.save_pretrained(tmp_path / "half")
        assert (tmp_path / "half" / "test_interop.py").is_file()
    else:
        with pytest.raises(ValueError, match=r"trf_blocks\.0 is a test_interop\.HalfBlock .* model_type of its own"):
            model.save_pretrained(tmp_path / "half")
        assert not (tmp_path / "half").exists()
    OwnGPT(OwnConfig.from_gpt2(gpt2_config())).save_pretrained(tmp_path / "own")
    GPTScratchForCausalLM(GPTScratchConfig.from_gpt2(gpt2_config())).save_pretrained(tmp_path / "ours")


def test_a_class_with_another_block_is_no_official_model(tmp_path):
    model = randomize(HalfGPT(GPTScratchConfig.from_gpt2(gpt2_config()))).eval()
    for refused in (model.to_gpt2, lambda: model.save_as_gpt2(tmp_path)):
        with pytest.raises(ValueError, match=r"trf_blocks\.0 is a test_interop\.HalfBlock"):
            refused()


class OwnConfig(GPTScratchConfig):
    model_type = "own_gpt_scratch"


class OwnGPT(GPTScratchForCausalLM):
    config_class = OwnConfig


def test_a_model_type_of_ones_own_gets_the_official_weights(tmp_path):
    gpt2 = random_gpt2()
    gpt2.save_pretrained(tmp_path / "official")
    loaded, info = OwnGPT.from_pretrained(tmp_path / "official", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    loaded.save_pretrained(tmp_path / "own")
    for model in (loaded, OwnGPT.from_gpt2(gpt2), OwnGPT.from_pretrained(tmp_path / "own")):
        assert type(model.config) is OwnConfig
        assert relative_error(gpt2(random_ids()).logits, model(random_ids()).logits) <= FP32_LOGITS
        assert isinstance(model.to_gpt2(), GPT2LMHeadModel)


def test_what_is_not_there_is_not_translated():
    with torch.device("meta"):
        model = GPTScratchForCausalLM(GPTScratchConfig.from_gpt2(gpt2_config()))
    with pytest.raises(ValueError, match="meta device"):
        model.to_gpt2()


def test_resized_merged_and_copied_models_are_what_their_config_says(tmp_path):
    model = random_pair()[1]
    model.resize_token_embeddings(230)
    model = copy.deepcopy(model)
    ids = random_ids()
    assert relative_error(model(ids).logits, model.to_gpt2()(ids).logits) <= FP32_LOGITS
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative_error(model(ids).logits, loaded(ids).logits) <= FP32_LOGITS


class SharperAttention(CachedAttention):
    def heads(self, x):
        return super().heads(x) * 2


def other_class(model):
    model.model.trf_blocks[0].att.__class__ = SharperAttention


def not_causal(model):
    model.model.trf_blocks[0].att.is_causal = False


def own_forward(model):
    feed_forward = model.model.trf_blocks[0].ff
    whole = feed_forward.forward
    feed_forward.forward = lambda x: whole(x) / 2


def own_forward_of_the_whole(model):
    whole = model.forward

    @functools.wraps(whole)
    def slightly_more(*args, **kwargs):
        output = whole(*args, **kwargs)
        output.logits = output.logits * 1.001
        return output

    model.forward = slightly_more


def head_with_a_bias(model):
    model.out_head.bias = nn.Parameter(torch.ones(model.config.vocab_size))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_class, r"att is a test_interop\.SharperAttention instead of a modeling_gpt_scratch\.CachedAttention"),
        (not_causal, r"att\.is_causal is False instead of True"),
        (own_forward, r"ff has a forward pass of its own"),
        (own_forward_of_the_whole, r"the model has a forward pass of its own"),
        (head_with_a_bias, r"out_head\.bias is an unknown parameter"),
    ],
)
def test_what_would_load_as_another_model_is_not_saved(change, message, tmp_path):
    model = random_pair()[1]
    model.save_pretrained(tmp_path / "as it was")
    change(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


def with_a_loss(model):
    """As TRL does for its losses."""

    @functools.wraps(type(model).forward)
    def forward(self, *args, own_loss=False, **kwargs):
        return type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def under_autocast(dtype):
    """As accelerate does for mixed precision."""

    def change(model):
        whole = model.forward

        def forward(*args, **kwargs):
            with torch.autocast("cpu", dtype=dtype):
                output = whole(*args, **kwargs)
            return type(output)(**{name: value.float() for name, value in output.items()})

        model.forward = forward

    return change


@pytest.mark.parametrize("changes", [{}, {"add_cross_attention": True}], ids=str)
@pytest.mark.parametrize("change", [with_a_loss, under_autocast(torch.bfloat16), under_autocast(torch.float16)])
def test_a_model_whose_forward_pass_is_wrapped_for_training_is_saved_and_translated(change, changes, tmp_path):
    gpt2, model = random_pair(**changes)
    expected = {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}
    change(model.train())
    model.save_pretrained(tmp_path)
    assert model.training and "forward" in vars(model)
    loaded = GPTScratchForCausalLM.from_pretrained(tmp_path)
    change(gpt2)
    for translated in (loaded.to_gpt2(), model.to_gpt2(), GPTScratchForCausalLM.from_gpt2(gpt2).to_gpt2()):
        assert "forward" not in vars(translated)
        assert all(torch.equal(translated.state_dict()[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w["tok_emb.weight"][3].fill_(float("nan")), "tok_emb.weight has NaN or infinite values"),
        (lambda w: w.update({"final_norm.scale": w["final_norm.scale"].half()}), "float16, torch.float32"),
        (lambda w: w.update({"module.final_norm.scale": w["final_norm.scale"] + 1}), "a tensor twice"),
        (lambda w: w.update({"final_norm.scale": w["final_norm.scale"].to("meta")}), "final_norm.scale is on the meta"),
    ],
)
def test_from_book_refuses_weights_that_no_model_can_have(spoil, message):
    cfg = dict(vocab_size=97, context_length=16, emb_dim=24, n_heads=3, n_layers=2)
    weights = {name: tensor.clone() for name, tensor in GPTModel(cfg).state_dict().items()}
    GPTScratchForCausalLM.from_book(weights, cfg)
    spoil(weights)
    with pytest.raises(ValueError, match=message):
        GPTScratchForCausalLM.from_book(weights, cfg)
