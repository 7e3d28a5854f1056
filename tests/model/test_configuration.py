import dataclasses
import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, GPT2Config

from hf_gpt_scratch import GPT_CONFIG_124M, GPTScratchConfig
from hf_gpt_scratch.model.configuration_gpt_scratch import FROM_GPT2


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
        ({"emb_dim": 770, "n_heads": 12}, r"emb_dim=770 and n_heads=12.*use emb_dim=768"),
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


def test_sizes_are_looked_up_by_transformers_names_and_saved_once():
    config = GPTScratchConfig(emb_dim=48, n_heads=6)
    values = config.to_dict()
    assert (values["hidden_size"], values["num_attention_heads"]) == (values["emb_dim"], values["n_heads"]) == (48, 6)
    assert GPTScratchConfig(**values).to_dict() == GPTScratchConfig.from_dict(values).to_dict() == values
    saved = json.loads(config.to_json_string(use_diff=True))
    assert saved["emb_dim"] == 48 and not {"hidden_size", "num_attention_heads"} & saved.keys()


def test_equal_dropout_rates_become_the_books_one_rate():
    config = GPTScratchConfig.from_gpt2(GPT2Config(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2))
    assert (config.drop_rate, config.drop_rate_emb) == (0.2, None)
    assert config.to_gpt2().attn_pdrop == 0.2


# What is not understood


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"n_embd": 48, "n_head": 4}, "n_embd=48.*here it is emb_dim.*from_gpt2"),
        ({"n_positions": 64}, "n_positions=64.*context_length"),
        ({"resid_pdrop": 0.0}, "resid_pdrop=0.0.*drop_rate_shortcut"),
        ({"qkv_bais": True}, "qkv_bais=True.*qkv_bias"),
        ({"n_layer ": 3}, "n_layers"),
        ({"embd_dim": 48}, "embd_dim=48.*here it is emb_dim"),
        ({"num_heads": 4}, "num_heads=4.*n_heads"),
        ({"d_model": 48}, "d_model=48.*emb_dim"),
        ({"block_size": 32}, "block_size=32.*context_length"),
        ({"n_ctx": 32}, "n_ctx=32.*context_length"),
        ({"dropout": 0.0}, "dropout=0.0.*drop_rate"),
        ({"activation": "relu"}, "activation=relu.*activation_function"),
        ({"n_kv_groups": 2}, "n_kv_groups=2.*keys and values"),
        ({"rope_theta": 1e4}, "rope_theta=10000.0.*positions are learned"),
        ({"sliding_window_size": 64}, "sliding_window_size=64.*attends to all tokens before it"),
        ({"num_experts": 8}, "num_experts=8.*mixture of experts"),
        ({"post_norm": True}, "post_norm=True.*does not know"),
        ({"encoder_layers": 3}, "encoder_layers=3.*does not know"),
        ({"n_embd": "9" * 10_000}, "n_embd=9{80},"),
        ({"emb_dim": 48, "hidden_size": 96}, "emb_dim=48 and hidden_size=96, which are the same setting"),
        ({"emb_dim": 768, "hidden_size": 96}, "emb_dim=768 and hidden_size=96"),  # also where one is the default
    ],
)
def test_a_key_that_would_be_ignored_is_refused_by_name_with_what_to_do(values, told):
    with pytest.raises(ValueError, match=told) as error:
        GPTScratchConfig(**values)
    assert len(str(error.value)) < 400
    with pytest.raises(ValueError, match=told):
        GPTScratchConfig.from_dict({"model_type": "gpt_scratch", **values})


def test_the_right_name_that_is_told_is_one_that_works():
    for name in ("n_embd", "num_heads", "block_size", "dropout", "qkv_bais", "layer_norm_eps", "hidden_dim", "nlayers"):
        with pytest.raises(ValueError, match=name) as error:
            GPTScratchConfig(**{name: 12})
        assert hasattr(GPTScratchConfig(), re.search(r"here it is (\w+)", str(error.value))[1])


def test_gpt2s_names_are_refused_on_assignment():
    config = GPTScratchConfig()
    with pytest.raises(ValueError, match=r"n_layer=3.*n_layers"):
        config.n_layer = 3


# Of transformers 5, and what configs of earlier years hold.
COMMON = {name: value for name, value in vars(GenerationConfig()).items() if name != "use_cache"} | dict(
    num_labels=3,
    id2label={0: "a", 1: "b", 2: "c"},
    label2id={"a": 0, "b": 1, "c": 2},
    problem_type="multi_label_classification",
    torch_dtype="float16",
    attn_implementation="eager",
    auto_map={"AutoConfig": "mine.Mine"},
    quantization_config={"quant_method": "mine"},
    task_specific_params={"text-generation": {"max_length": 50}},
    tokenizer_class="GPT2Tokenizer",
    transformers_version="9.0.0",
    name_or_path="somewhere",
    return_dict=True,
    output_hidden_states=False,
    output_attentions=False,
    chunk_size_feed_forward=0,
    is_encoder_decoder=False,
    architectures=["GPTScratchForCausalLM"],
    classifier_dropout=0.2,
    hidden_dropout=0.2,
    is_decoder=True,
    cross_attention_hidden_size=None,
    pruned_heads={},
    gradient_checkpointing=False,
    sep_token_id=5,
    decoder_start_token_id=3,
    n_ctx=1024,
    n_special=0,
    predict_special_tokens=True,
    output_past=True,
    tie_last_hidden_states=True,
    _num_labels=3,
    loss_type="ForCausalLM",
    max_length=50,
    num_beam_groups=1,
    epsilon_cutoff=0.0,
    num_return_sequences=1,
)


def test_what_any_transformers_config_may_have_is_taken(tmp_path):
    config = GPTScratchConfig(**COMMON)
    assert (config.num_labels, config.id2label[2], str(config.dtype)) == (3, "c", "torch.float16")
    del config.quantization_config
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, **saved, "kernels_of_tomorrow": {"a": 1}}))
    assert GPTScratchConfig.from_pretrained(tmp_path).classifier_dropout == 0.2
    assert type(AutoConfig.from_pretrained(tmp_path)) is GPTScratchConfig


def test_what_says_nothing_about_the_model_is_kept_and_said(caplog, tmp_path):
    config = GPTScratchConfig(owner="me", kernel_of_tomorrow={"a": 1})
    assert "owner=me is stored, but GPTScratchConfig does not use it" in caplog.text
    config.save_pretrained(tmp_path)
    assert GPTScratchConfig.from_pretrained(tmp_path).owner == "me"


class Windowed(GPTScratchConfig):
    model_type = "gpt_scratch_windowed"
    window_size: int = 3
    post_norm: bool = False
    num_experts = 2


class OfItsOwn(GPTScratchConfig):
    model_type = "gpt_scratch_of_its_own"

    def __init__(self, window_size=3, **kwargs):
        self.window_size = window_size
        super().__init__(**kwargs)


def test_a_subclass_has_fields_of_its_own_and_misspells_them_no_more_than_ours(tmp_path):
    Windowed(window_size=5, post_norm=True, num_experts=4).save_pretrained(tmp_path)
    loaded = Windowed.from_pretrained(tmp_path)
    assert (loaded.window_size, loaded.post_norm, loaded.num_experts) == (5, True, 4)
    OfItsOwn(window_size=7, n_layers=2).save_pretrained(tmp_path)
    assert OfItsOwn.from_pretrained(tmp_path).window_size == 7
    with pytest.raises(ValueError, match=r"window_sise=5.*window_size"):
        Windowed(window_sise=5)


IGNORED = dict(hidden_act="relu", n_heads=3, n_layers=1, emb_dim=8, qkv_bias=False, drop_rate=0.9, n_ctx=7, d_model=9)


def test_what_gpt2_ignores_in_its_config_is_not_obeyed_and_said(caplog, tmp_path):
    caplog.set_level("WARNING")
    plain = GPT2Config(n_embd=24, n_head=4, n_layer=2)
    ours = GPTScratchConfig.from_gpt2(GPT2Config(n_embd=24, n_head=4, n_layer=2, **IGNORED))
    assert options(ours) == options(GPTScratchConfig.from_gpt2(plain))
    assert all(f"{name}={value}" in caplog.text for name, value in IGNORED.items())
    plain.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | IGNORED))
    assert options(GPTScratchConfig.from_pretrained(tmp_path)) == options(ours)


def test_what_gpt2_obeys_under_another_name_is_obeyed(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    obeyed = dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=2, max_position_embeddings=32)
    (tmp_path / "config.json").write_text(json.dumps(values | obeyed))
    config = GPTScratchConfig.from_pretrained(tmp_path)
    assert (config.emb_dim, config.n_heads, config.n_layers, config.context_length) == (24, 3, 2, 32)


def test_an_option_that_gpt2_has_and_we_do_not_is_refused_unless_it_is_off():
    class Tomorrows(GPT2Config):
        new_option: bool = False

    assert GPTScratchConfig.from_gpt2(Tomorrows()).n_layers == 12
    with pytest.raises(ValueError, match=r"new_option=True.*Tomorrows"):
        GPTScratchConfig.from_gpt2(Tomorrows(new_option=True))


@pytest.mark.parametrize(
    "values",
    [
        {"n_embd": 24, "n_head": 3, "n_layer": 2},
        {"n_embd": 24, "n_head": 3, "n_layer": 2, "architectures": ["GPT2LMHeadModel"]},
        {"hidden_size": 24, "n_head": 3, "n_layer": 2, "architectures": ["GPT2LMHeadModel"]},
    ],
)
def test_a_config_of_the_first_years_is_gpt2s_without_saying_so(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = GPTScratchConfig.from_pretrained(tmp_path)
    assert (config.emb_dim, config.n_heads, config.n_layers, config.qkv_bias) == (24, 3, 2, True)


@pytest.mark.parametrize(
    "values",
    [
        {"n_embd": 24},
        {"emb_dim": 24, "n_heads": 3, "n_layers": 2},
        {"n_embd": 24, "n_head": 3, "n_layer": 2, "architectures": ["OpenAIGPTLMHeadModel"]},
    ],
)
def test_a_config_of_unknown_type_is_refused_and_the_type_that_is_told_to_write_works(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match='add "model_type"'):
        GPTScratchConfig.from_pretrained(tmp_path)
    told = "gpt_scratch" if "emb_dim" in values else "gpt2"
    (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": told}))
    assert GPTScratchConfig.from_pretrained(tmp_path).emb_dim == 24


def test_a_config_with_a_type_is_not_told_to_add_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 24, "n_head": 3, "n_layer": 2, "model_type": "gptj"}))
    with pytest.raises(ValueError, match=r"of type 'gptj'.*AutoModelForCausalLM loads other models") as refused:
        GPTScratchConfig.from_pretrained(tmp_path)
    assert "lacks its type" not in str(refused.value)


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
