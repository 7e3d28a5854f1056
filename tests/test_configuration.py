import dataclasses
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GPT2Config

from hf_gpt_scratch import GPT_CONFIG_124M, GPTScratchConfig
from hf_gpt_scratch.configuration_gpt_scratch import FROM_GPT2


def test_defaults_are_the_books():
    config = GPTScratchConfig()
    assert {name: getattr(config, name) for name in GPT_CONFIG_124M} == GPT_CONFIG_124M
    assert config.tie_word_embeddings is False


def test_transformers_names_read_and_write_the_same_fields():
    config = GPTScratchConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=3, max_position_embeddings=50)
    assert (config.emb_dim, config.n_heads, config.n_layers, config.context_length) == (96, 4, 3, 50)
    config.n_layers = 5
    assert config.num_hidden_layers == 5


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"emb_dim": 770, "n_heads": 12}, r"emb_dim=770 and n_heads=12.*take emb_dim=768"),
        ({"emb_dim": "768"}, r"emb_dim.*expected int, got str \(value: '768'\)"),
        ({"hidden_size": "768"}, r"emb_dim.*expected int, got str \(value: '768'\)"),
        ({"n_layers": -1}, r"n_layers.*got -1.*at least 1"),
        ({"num_hidden_layers": -1}, r"n_layers.*got -1.*at least 1"),
        ({"vocab_size": 0}, r"vocab_size.*got 0.*at least 1"),
        ({"context_length": 1024.0}, r"context_length.*expected int, got float"),
        ({"n_inner": 0}, r"n_inner.*got 0.*at least 1"),
        ({"n_heads": True}, r"n_heads.*expected int, got bool"),
        ({"drop_rate": 1.5}, r"drop_rate.*got 1.5.*\[0, 1\]"),
        ({"drop_rate_attn": -0.1}, r"drop_rate_attn.*got -0.1.*\[0, 1\]"),
        ({"drop_rate_emb": float("nan")}, r"drop_rate_emb.*got nan.*\[0, 1\]"),
        ({"drop_rate": "0.1"}, r"drop_rate.*'0.1'"),
        ({"qkv_bias": "yes"}, r"qkv_bias.*expected bool, got str"),
        ({"layer_norm_epsilon": 0.0}, r"layer_norm_epsilon.*got 0.0.*above 0"),
        ({"initializer_range": -0.02}, r"initializer_range.*got -0.02.*at least 0"),
        ({"activation_function": "gelu_neu"}, r"activation_function.*gelu_neu.*gelu_new"),
        ({"add_cross_attention": 1}, r"add_cross_attention.*expected bool, got int"),
    ],
)
def test_wrong_values_are_refused_with_value_rule_and_remedy(values, told):
    with pytest.raises(StrictDataclassError) as error:
        GPTScratchConfig(**values)
    assert re.search(told, str(error.value), re.DOTALL), str(error.value)


def test_wrong_values_are_refused_on_assignment():
    config = GPTScratchConfig()
    with pytest.raises(StrictDataclassError, match="expected int, got str"):
        config.hidden_size = "768"
    assert config.emb_dim == 768


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("124M", (768, 12, 12)), ("355M", (1024, 24, 16)), ("774M", (1280, 36, 20)), ("1558M", (1600, 48, 25))],
)
def test_presets_are_the_official_sizes(name, sizes):
    config = GPTScratchConfig.preset(name, drop_rate=0.0)
    assert (config.emb_dim, config.n_layers, config.n_heads) == sizes
    assert config.qkv_bias
    assert config.tie_word_embeddings
    assert config.drop_rate == 0.0


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"'345M'.*124M, 355M, 774M, 1558M"):
        GPTScratchConfig.preset("345M")


EVERY_OPTION = {
    "vocab_size": 77,
    "n_positions": 33,
    "n_embd": 40,
    "n_layer": 2,
    "n_head": 5,
    "n_inner": 90,
    "activation_function": "relu",
    "resid_pdrop": 0.3,
    "embd_pdrop": 0.2,
    "attn_pdrop": 0.15,
    "layer_norm_epsilon": 1e-4,
    "initializer_range": 0.03,
    "summary_type": "mean",
    "summary_use_proj": False,
    "summary_activation": "tanh",
    "summary_proj_to_labels": False,
    "summary_first_dropout": 0.4,
    "scale_attn_weights": False,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "scale_attn_by_inverse_layer_idx": True,
    "reorder_and_upcast_attn": True,
    "tie_word_embeddings": False,
    "add_cross_attention": True,
}


def options(config):
    return {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "architectures")}


def test_every_gpt2_option_is_in_this_test():
    own = {f.name for f in dataclasses.fields(GPT2Config)}
    common = {f.name for f in dataclasses.fields(GPT2Config.__mro__[1])}
    assert own - common == EVERY_OPTION.keys() - common


def test_translation_from_gpt2_loses_nothing():
    theirs = GPT2Config(**EVERY_OPTION, id2label={0: "ham", 1: "spam"}, task_specific_params={"a": 1})
    assert all(getattr(theirs, name) != getattr(GPT2Config(), name) for name in EVERY_OPTION)
    ours = GPTScratchConfig.from_gpt2(theirs)
    assert options(ours.to_gpt2()) == options(theirs)
    for gpt2_name, value in EVERY_OPTION.items():
        assert getattr(ours, FROM_GPT2.get(gpt2_name, gpt2_name)) == value


def test_equal_dropout_rates_become_the_books_one_rate():
    config = GPTScratchConfig.from_gpt2(GPT2Config(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2))
    assert (config.drop_rate, config.drop_rate_emb) == (0.2, None)
    assert config.to_gpt2().attn_pdrop == 0.2


def test_config_of_another_model_is_refused_by_name(tmp_path):
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match="'llama'"):
        GPTScratchConfig.from_gpt2(LlamaConfig())
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama'"):
        GPTScratchConfig.from_pretrained(tmp_path)


def test_official_config_is_translated_on_loading(tmp_path):
    GPT2Config(n_embd=96, n_head=6).save_pretrained(tmp_path)
    config = GPTScratchConfig.from_pretrained(tmp_path)
    assert (config.emb_dim, config.n_heads, config.qkv_bias, config.tie_word_embeddings) == (96, 6, True, True)


def test_config_survives_saving(tmp_path):
    config = GPTScratchConfig(emb_dim=96, n_heads=6, drop_rate_attn=0.25)
    config.save_pretrained(tmp_path)
    assert options(GPTScratchConfig.from_pretrained(tmp_path)) == options(config)
    assert type(AutoConfig.from_pretrained(tmp_path)) is GPTScratchConfig
