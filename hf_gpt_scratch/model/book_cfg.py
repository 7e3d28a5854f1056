"""The book's cfg: its keys, other programs' names for them, and the checks; it does not ship with a model."""

import difflib
import re

# Keys beyond the book's seven, with their defaults; None means the value in the comment.
DEFAULTS = {
    "drop_rate": 0.1,
    "drop_rate_emb": None,  # drop_rate
    "drop_rate_attn": None,  # drop_rate
    "drop_rate_shortcut": None,  # drop_rate
    "qkv_bias": False,
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,  # 4 * emb_dim
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": False,
}

SIZES = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")

# Other programs' names. Beside the book's name, with the same value, such a key does no harm.
OTHER_NAMES = {
    **dict.fromkeys(("n_vocab", "vocabulary_size"), "vocab_size"),
    **dict.fromkeys(
        ("n_positions", "n_ctx", "block_size", "ctx_len", "max_seq_len", "max_seq_length", "max_position_embeddings"),
        "context_length",
    ),
    **dict.fromkeys(
        ("n_embd", "n_embed", "d_model", "embed_dim", "embed_size", "embedding_dim", "embedding_size", "hidden_size"),
        "emb_dim",
    ),
    **dict.fromkeys(("n_head", "num_heads", "heads", "num_attention_heads", "nhead"), "n_heads"),
    **dict.fromkeys(("n_layer", "num_layers", "layers", "n_blocks", "num_blocks", "num_hidden_layers"), "n_layers"),
    **dict.fromkeys(("dropout", "dropout_rate", "p_dropout"), "drop_rate"),
    "embd_pdrop": "drop_rate_emb",
    "attn_pdrop": "drop_rate_attn",
    "resid_pdrop": "drop_rate_shortcut",
    **dict.fromkeys(("hidden_dim", "d_ff", "ffn_dim", "intermediate_size"), "n_inner"),
    **dict.fromkeys(("attention_bias", "use_bias"), "qkv_bias"),
    **dict.fromkeys(("layer_norm_eps", "norm_eps", "eps"), "layer_norm_epsilon"),
    **dict.fromkeys(("tie_weights", "tie_embeddings", "weight_tying"), "tie_word_embeddings"),
    **dict.fromkeys(("activation", "act", "act_fn", "afn", "hidden_activation"), "activation_function"),
}
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
# Keys that do not change what GPTModel computes from given weights; FeedForward checks `activation_function`.
HARMLESS = (
    "activation_function",
    "initializer_range",
    "reorder_and_upcast_attn",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


# Keys of other models, and the remedy.
FOREIGN = {
    "(torch_)?dtype": "weights keep their dtype; call .to(dtype) on the model",
    ".*kv_(heads|groups)|num_key_value_heads": "here each head has its own keys and values; a model with groups is "
    "another model",
    ".*rope.*|.*rotary.*": "here positions are learned, in pos_emb; a model with rotary embeddings is another model",
    ".*window.*": "here a token attends to all tokens before it; remove it if the context is no longer than the window",
    ".*experts?.*|.*moe.*": "here a layer has one feed-forward network; a mixture of experts is another model",
}


def what_to_do(name, known):
    """The remedy for an unknown key: its right name, or why there is none; None if nothing is known about it."""
    meant = OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), None)
    if meant:
        return f"here it is {meant}: rename it, or remove it"
    return next((words for pattern, words in FOREIGN.items() if re.fullmatch(pattern, name)), None)


def settings(cfg):
    """`cfg`, a dict or a config object, as a complete dict.

    Raises:
        KeyError: a size is missing.
        ValueError: a key of a dict is unknown, or a value is not allowed.
    """
    if not hasattr(cfg, "__dict__") and not isinstance(cfg, dict):
        raise ValueError(f"got {type(cfg).__name__} as the cfg; give the book's dict, such as GPT_CONFIG_124M")
    if isinstance(cfg, dict) and "model_type" not in cfg:
        check_keys(cfg)
    else:  # a config or its `to_dict`: its keys are checked, and many are transformers'
        cfg = cfg if isinstance(cfg, dict) else vars(cfg)
        cfg = {name: cfg[name] for name in (*SIZES, *DEFAULTS, *HARMLESS) if name in cfg}
    cfg = {**DEFAULTS, **cfg}
    missing = [k for k in SIZES if k not in cfg]
    if missing:
        raise KeyError(f"the model config lacks {missing}; start from GPT_CONFIG_124M and change what differs")
    for place in ("drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut"):
        if cfg[place] is None:
            cfg[place] = cfg["drop_rate"]
    check_values(cfg)
    if cfg["n_inner"] is None:
        cfg["n_inner"] = 4 * cfg["emb_dim"]
    return cfg


def check_values(cfg):
    """Raises ValueError for a size, a switch or a dropout rate with a value that is not allowed."""
    switches = ("qkv_bias", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")
    for names, fits, rule in (
        (SIZES, lambda value: type(value) is int and value > 0, "a whole number of at least 1"),
        (switches, lambda value: type(value) is bool, "True or False"),
        (
            [name for name in cfg if name.startswith("drop_rate")],
            lambda value: type(value) in (int, float) and 0 <= value <= 1,
            "a number from 0 to 1",
        ),
    ):
        for name in names:
            if not fits(cfg[name]):
                raise ValueError(f"the model config has {name}={str(cfg[name])[:80]!r}, but it must be {rule}")


def book_cfg(cfg):
    """`settings` of a cfg for the book's layers, which support only what the book has.

    Raises:
        KeyError, ValueError: as `settings`; or only a GPTScratch model supports the cfg.
    """
    cfg = settings(cfg)
    books = {"n_inner": 4 * cfg["emb_dim"], "layer_norm_epsilon": 1e-5, "scale_attn_weights": True}
    books |= {"scale_attn_by_inverse_layer_idx": False, "activation_function": TANH_GELU[0]}
    for name, value in books.items():
        if cfg.get(name, value) != value and not (name == "activation_function" and cfg[name] in TANH_GELU):
            raise ValueError(
                f"got {name}={cfg[name]!r}, but the book's layers have {value!r}; GPTScratchForCausalLM supports it: "
                "use GPTScratchForCausalLM(GPTScratchConfig(…)), or from_book for weights of your own"
            )
    return cfg


def check_keys(cfg):
    """Raises ValueError if a dict has an unknown key, since it may change what the model computes."""
    for name, value in cfg.items():
        same = OTHER_NAMES.get(name)
        if name in (*SIZES, *DEFAULTS, *HARMLESS) or (same in cfg and cfg[same] == value):
            continue
        if name == "bias" and value is True:  # nanoGPT's: biases in all layers, as here; qkv_bias is a key of its own
            continue
        raise ValueError(
            f"the model config has {name}={str(value)[:80]}, which GPTModel does not know; "
            f"{what_to_do(name, (*SIZES, *DEFAULTS)) or 'remove it if it says nothing about the model'}"
        )
