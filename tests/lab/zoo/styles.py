# ruff: noqa: E501
"""GPTs in the styles that readers write, as source text: each is GPT-2, and has one mistake that can be planted.

A style is a file, `file.py` unless `files` says otherwise. `mistake` is a piece of it and what it becomes when it is
wrong. `variants` are other healthy versions: pieces of the text and what they become.
"""

from dataclasses import dataclass, field

HEAD = "import math\nfrom dataclasses import dataclass\n\nimport torch\nimport torch.nn as nn\nfrom torch.nn import functional as F\n\n"


@dataclass
class Style:
    text: str
    mistake: tuple[str, str]
    target: str = "GPT"
    file: str = "file.py"
    files: dict[str, str] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)
    variants: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


STYLES: dict[str, Style] = {}

STYLES["book"] = Style(
    HEAD
    + """
class LayerNorm(nn.Module):
    def __init__(self, emb_dim):
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        mean = x.mean(dim=-1, keepdim=True)
        var = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(var + self.eps) + self.shift


class GELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(cfg["emb_dim"], 4 * cfg["emb_dim"]), GELU(), nn.Linear(4 * cfg["emb_dim"], cfg["emb_dim"])
        )

    def forward(self, x):
        return self.layers(x)


class MultiHeadAttention(nn.Module):
    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        self.d_out, self.num_heads, self.head_dim = d_out, num_heads, d_out // num_heads
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", torch.triu(torch.ones(context_length, context_length), diagonal=1))

    def forward(self, x):
        b, num_tokens, d_in = x.shape
        keys, queries, values = self.W_key(x), self.W_query(x), self.W_value(x)
        keys = keys.view(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        values = values.view(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        queries = queries.view(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        attn_scores = queries @ keys.transpose(2, 3)
        mask_bool = self.mask.bool()[:num_tokens, :num_tokens]
        attn_scores.masked_fill_(mask_bool, -torch.inf)
        attn_weights = torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)
        attn_weights = self.dropout(attn_weights)
        context_vec = (attn_weights @ values).transpose(1, 2)
        context_vec = context_vec.contiguous().view(b, num_tokens, self.d_out)
        return self.out_proj(context_vec)


class TransformerBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.att = MultiHeadAttention(
            cfg["emb_dim"], cfg["emb_dim"], cfg["context_length"], cfg["drop_rate"], cfg["n_heads"], cfg["qkv_bias"]
        )
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg["emb_dim"])
        self.norm2 = LayerNorm(cfg["emb_dim"])
        self.drop_shortcut = nn.Dropout(cfg["drop_rate"])

    def forward(self, x):
        x = x + self.drop_shortcut(self.att(self.norm1(x)))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, in_idx):
        batch_size, seq_len = in_idx.shape
        x = self.tok_emb(in_idx) + self.pos_emb(torch.arange(seq_len, device=in_idx.device))
        x = self.drop_emb(x)
        x = self.trf_blocks(x)
        x = self.final_norm(x)
        return self.out_head(x)
""",
    mistake=("torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)", "torch.softmax(attn_scores, dim=-1)"),
    variants={
        "norms from 0": [("norm2", "normX"), ("norm1", "norm0"), ("normX", "norm1")],
        "norms registered backwards": [
            ("self.norm1 = LayerNorm", "self.b = LayerNorm"),
            ("self.norm2 = LayerNorm", "self.a = LayerNorm"),
            ("self.norm1(", "self.a("),
            ("self.norm2(", "self.b("),
        ],
        "norms called pre and post": [("norm1", "post"), ("norm2", "pre")],
        "tied head": [
            ('        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)\n', ""),
            ("self.out_head(x)", "x @ self.tok_emb.weight.T"),
        ],
        "toqueries": [
            ("W_query", "toqueries"),
            ("W_key", "tokeys"),
            ("W_value", "tovalues"),
            ("out_proj", "unifyheads"),
        ],
        "single letters": [
            *(
                (f"self.{name}", f"self.{letter}")
                for name, letter in (("W_query", "q"), ("W_key", "k"), ("W_value", "v"))
            ),
            ("self.out_proj", "self.o"),
            ("self.tok_emb", "self.e"),
            ("self.pos_emb", "self.p"),
            ("self.att ", "self.a "),
            ("self.att(", "self.a("),
            ("self.ff ", "self.f "),
            ("self.ff(", "self.f("),
            ("norm1", "g"),
            ("norm2", "h"),
            ("trf_blocks", "b"),
            ("final_norm", "n"),
            ("out_head", "u"),
        ],
        "letters that say nothing": [
            ("W_query", "aa"),
            ("W_key", "bb"),
            ("W_value", "cc"),
            ("out_proj", "dd"),
            ("self.att ", "self.ee "),
            ("self.att(", "self.ee("),
            ("norm1", "ff1"),
            ("norm2", "ff0"),
            ("tok_emb", "gg"),
            ("pos_emb", "hh"),
        ],
        "upper case": [
            ("W_query", "QUERY"),
            ("W_key", "KEY"),
            ("W_value", "VALUE"),
            ("out_proj", "OUT"),
            ("self.att ", "self.ATTN "),
            ("self.att(", "self.ATTN("),
            ("norm1", "LN_A"),
            ("norm2", "LN_B"),
            ("tok_emb", "WTE"),
            ("pos_emb", "WPE"),
            ("trf_blocks", "BLOCKS"),
            ("final_norm", "LN_F"),
            ("out_head", "HEAD"),
        ],
        "embed_in, embed_out": [("tok_emb", "embed_in"), ("pos_emb", "embed_pos"), ("out_head", "embed_out")],
        "queries, then keys and values": [
            (
                "self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)\n        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)",
                "self.W_kv = nn.Linear(d_in, 2 * d_out, bias=qkv_bias)",
            ),
            (
                "keys, queries, values = self.W_key(x), self.W_query(x), self.W_value(x)",
                "queries = self.W_query(x)\n        keys, values = self.W_kv(x).chunk(2, dim=-1)",
            ),
        ],
        "keys times queries, without names": [
            ("queries @ keys.transpose(2, 3)", "(keys @ queries.transpose(2, 3)).transpose(2, 3)"),
            ("W_query", "aa"),
            ("W_key", "bb"),
            ("W_value", "cc"),
        ],
        "addcmul": [
            (
                "self.scale * (x - mean) / torch.sqrt(var + self.eps) + self.shift",
                "torch.addcmul(self.shift, (x - mean) * torch.rsqrt(var + self.eps), self.scale)",
            )
        ],
        "norms and layers in a loop": [
            (
                "x = x + self.drop_shortcut(self.att(self.norm1(x)))\n        return x + self.drop_shortcut(self.ff(self.norm2(x)))",
                "for norm, part in ((self.norm1, self.att), (self.norm2, self.ff)):\n            x = x + part(norm(x))\n        return x",
            ),
        ],
        "one positions argument": [("def forward(self, in_idx):", "def forward(self, in_idx, start_pos):")],
        "a cache that may be None": [
            ("def forward(self, in_idx):", "def forward(self, in_idx, cache=None, use_cache=False):")
        ],
        "a dict": [("return self.out_head(x)\n", "return {'hidden': x, 'logits': self.out_head(x)}\n")],
        "a dict without the name": [
            ("return self.out_head(x)\n", "return {'hidden': x, 'output': self.out_head(x)}\n")
        ],
        "a tuple, logits last": [("return self.out_head(x)\n", "return x, self.out_head(x)\n")],
        "flat logits": [("return self.out_head(x)\n", "return self.out_head(x).flatten(0, 1)\n")],
        "a dataclass": [
            (
                "class GPT(nn.Module):",
                "@dataclass\nclass Out:\n    loss: object\n    scores: torch.Tensor\n\n\nclass GPT(nn.Module):",
            ),
            ("return self.out_head(x)\n", "return Out(None, self.out_head(x))\n"),
        ],
        "an object": [
            ("class GPT(nn.Module):", "class Out:\n    pass\n\n\nclass GPT(nn.Module):"),
            (
                "return self.out_head(x)\n",
                "out = Out()\n        out.prediction = self.out_head(x)\n        return out\n",
            ),
        ],
        "a padded vocabulary": [
            ('nn.Embedding(cfg["vocab_size"]', 'nn.Embedding(cfg["vocab_size"] + 13'),
            ('cfg["vocab_size"], bias', 'cfg["vocab_size"] + 13, bias'),
        ],
        "fewer positions": [('nn.Embedding(cfg["context_length"]', "nn.Embedding(40")],
        "a bare wpe": [
            (
                'self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])',
                'self.pos_emb = nn.Parameter(torch.randn(cfg["context_length"], cfg["emb_dim"]))',
            ),
            ("self.pos_emb(torch.arange(seq_len, device=in_idx.device))", "self.pos_emb[:seq_len]"),
        ],
        "a wpe with a batch dimension": [
            (
                'self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])',
                'self.pos_emb = nn.Parameter(torch.randn(1, cfg["context_length"], cfg["emb_dim"]))',
            ),
            ("self.pos_emb(torch.arange(seq_len, device=in_idx.device))", "self.pos_emb[:, :seq_len]"),
        ],
        "the norm of the next block in each": [
            (
                "    def forward(self, x):\n        x = x + self.drop_shortcut(self.att(self.norm1(x)))\n"
                "        return x + self.drop_shortcut(self.ff(self.norm2(x)))",
                "    def forward(self, x, z):\n        x = x + self.drop_shortcut(self.att(z))\n"
                "        x = x + self.drop_shortcut(self.ff(self.norm1(x)))\n        return x, self.norm2(x)",
            ),
            ("self.final_norm = ", "self.first = "),
            ("x = self.trf_blocks(x)", "z = self.first(x)"),
            ("x = self.final_norm(x)", "for block in self.trf_blocks:\n            x, z = block(x, z)"),
            ("self.out_head(x)", "self.out_head(z)"),
        ],
        "any keywords, as an object": [
            (
                "def __init__(self, cfg):\n        super().__init__()\n        self.tok_emb",
                "def __init__(self, **hp):\n"
                "        super().__init__()\n        hp = SimpleNamespace(**hp)\n        cfg = dict(vocab_size=hp.n_vocab, "
                "context_length=hp.n_ctx, emb_dim=hp.n_embd, n_heads=hp.n_head, n_layers=hp.n_layer, drop_rate=0.1, "
                "qkv_bias=True)\n        self.tok_emb",
            ),
            ("import math\n", "import math\nfrom types import SimpleNamespace\n"),
        ],
        "blocks as attributes": [
            (
                'self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])',
                "self.n = cfg[\"n_layers\"]\n        for i in range(self.n):\n            setattr(self, f'block{i}', TransformerBlock(cfg))",
            ),
            ("x = self.trf_blocks(x)", "for i in range(self.n):\n            x = getattr(self, f'block{i}')(x)"),
        ],
        "blocks from 1": [
            (
                'self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])',
                "self.layers = nn.ModuleDict({f'layer_{i + 1}': TransformerBlock(cfg) for i in range(cfg[\"n_layers\"])})",
            ),
            ("x = self.trf_blocks(x)", "for block in self.layers.values():\n            x = block(x)"),
        ],
    },
)

STYLES["nanoGPT"] = Style(
    HEAD
    + '''
class LayerNorm(nn.Module):
    """LayerNorm but with an optional bias."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, input):
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.n_embd, self.dropout = config.n_head, config.n_embd, config.dropout
        self.flash = config.flash
        if not self.flash:
            ones = torch.ones(config.block_size, config.block_size)
            self.register_buffer("bias", torch.tril(ones).view(1, 1, config.block_size, config.block_size))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=self.dropout if self.training else 0, is_causal=True
            )
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    flash: bool = True


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        b, t = idx.size()
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is not None:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits = self.lm_head(x[:, [-1], :])
            loss = None
        return logits, loss
''',
    mistake=('nn.GELU(approximate="tanh")', "nn.GELU()"),
    variants={
        "without the kernel": [("flash: bool = True", "flash: bool = False")],
        "an annotated config": [
            (
                "def __init__(self, config):\n        super().__init__()\n        self.config",
                "def __init__(self, config: GPTConfig):\n        super().__init__()\n        self.config",
            )
        ],
        "a class of constants": [("@dataclass\nclass GPTConfig:", "class GPTConfig:")],
        "required targets": [("targets=None", "targets")],
    },
)

STYLES["minGPT, old"] = Style(
    HEAD
    + '''
class GPTConfig:
    """base GPT config, params common to all GPT versions"""

    embd_pdrop = 0.1
    resid_pdrop = 0.1
    attn_pdrop = 0.1

    def __init__(self, vocab_size, block_size, **kwargs):
        self.vocab_size = vocab_size
        self.block_size = block_size
        for k, v in kwargs.items():
            setattr(self, k, v)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.key = nn.Linear(config.n_embd, config.n_embd)
        self.query = nn.Linear(config.n_embd, config.n_embd)
        self.value = nn.Linear(config.n_embd, config.n_embd)
        self.attn_drop = nn.Dropout(config.attn_pdrop)
        self.resid_drop = nn.Dropout(config.resid_pdrop)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        ones = torch.ones(config.block_size, config.block_size)
        self.register_buffer("mask", torch.tril(ones).view(1, 1, config.block_size, config.block_size))
        self.n_head = config.n_head

    def forward(self, x, layer_past=None):
        B, T, C = x.size()
        k = self.key(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = self.query(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = self.value(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_drop(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_drop(self.proj(y))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU("tanh"),
            nn.Linear(4 * config.n_embd, config.n_embd),
            nn.Dropout(config.resid_pdrop),
        )

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        x = x + self.mlp(self.ln2(x))
        return x


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.block_size, config.n_embd))
        self.drop = nn.Dropout(config.embd_pdrop)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx, targets=None):
        b, t = idx.size()
        x = self.drop(self.tok_emb(idx) + self.pos_emb[:, :t, :])
        x = self.blocks(x)
        logits = self.head(self.ln_f(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss
''',
    mistake=("x = x + self.mlp(self.ln2(x))", "x = self.mlp(self.ln2(x))"),
)

STYLES["minGPT, new"] = Style(
    STYLES["minGPT, old"]
    .text[STYLES["minGPT, old"].text.index("class CausalSelfAttention") :]
    .join(
        [
            HEAD
            + """
class CfgNode:
    def __init__(self, **kwargs):
        self.__dict__.update(kwargs)


""",
            "",
        ]
    )
    .replace(
        """    def __init__(self, config):
        super().__init__()
        self.tok_emb""",
        """    @staticmethod
    def get_default_config():
        C = CfgNode()
        C.model_type = "gpt"
        C.n_layer = C.n_head = C.n_embd = C.vocab_size = C.block_size = None
        C.embd_pdrop = C.resid_pdrop = C.attn_pdrop = 0.1
        return C

    def __init__(self, config):
        super().__init__()
        type_given = config.model_type is not None
        params_given = all([config.n_layer is not None, config.n_head is not None, config.n_embd is not None])
        assert type_given ^ params_given
        self.tok_emb""",
    ),
    mistake=("(1.0 / math.sqrt(k.size(-1)))", "(1.0 / math.sqrt(C))"),
)

STYLES["picoGPT"] = Style(
    HEAD
    + """
def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    exp_x = torch.exp(x - x.max(-1, keepdim=True).values)
    return exp_x / exp_x.sum(-1, keepdim=True)


def layer_norm(x, g, b, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, keepdim=True, unbiased=False)
    return g * (x - mean) / torch.sqrt(variance + eps) + b


def linear(x, w, b):
    return x @ w + b


def ffn(x, c_fc, c_proj):
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def attention(q, k, v, mask):
    return softmax(q @ k.mT / math.sqrt(q.shape[-1]) + mask) @ v


def mha(x, c_attn, c_proj, n_head):
    x = linear(x, **c_attn)
    qkv = x.chunk(3, dim=-1)
    heads = [part.chunk(n_head, dim=-1) for part in qkv]
    mask = (1 - torch.tril(torch.ones(x.shape[-2], x.shape[-2], dtype=x.dtype))) * -1e10
    out = torch.cat([attention(q, k, v, mask) for q, k, v in zip(*heads)], dim=-1)
    return linear(out, **c_proj)


def block(x, mlp, attn, ln_1, ln_2, n_head):
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def pair(*shape):
    return nn.ParameterDict({"w": nn.Parameter(torch.randn(*shape)), "b": nn.Parameter(torch.zeros(shape[-1]))})


def norm(width):
    return nn.ParameterDict({"g": nn.Parameter(torch.ones(width)), "b": nn.Parameter(torch.zeros(width))})


class GPT(nn.Module):
    def __init__(self, n_vocab, n_ctx, n_embd, n_head, n_layer):
        super().__init__()
        self.wte = nn.Parameter(torch.randn(n_vocab, n_embd))
        self.wpe = nn.Parameter(torch.randn(n_ctx, n_embd))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "mlp": nn.ModuleDict({"c_fc": pair(n_embd, 4 * n_embd), "c_proj": pair(4 * n_embd, n_embd)}),
                    "attn": nn.ModuleDict({"c_attn": pair(n_embd, 3 * n_embd), "c_proj": pair(n_embd, n_embd)}),
                    "ln_1": norm(n_embd),
                    "ln_2": norm(n_embd),
                }
            )
            for _ in range(n_layer)
        )
        self.ln_f = norm(n_embd)
        self.n_head = n_head

    def forward(self, inputs):
        x = self.wte[inputs] + self.wpe[range(inputs.shape[-1])]
        for b in self.blocks:
            x = block(x, **b, n_head=self.n_head)
        return layer_norm(x, **self.ln_f) @ self.wte.T
""",
    mistake=("math.sqrt(q.shape[-1]) + mask", "math.sqrt(q.shape[-1]) + 0 * mask"),
)

FUSED = (
    HEAD
    + """
class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Layer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.pre_attention, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.pre_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))

    def forward(self, x):
        x = x + self.attention(self.pre_attention(x))
        return x + self.mlp(self.pre_mlp(x))


class GPT(nn.Module):
    def __init__(self, vocab_size, max_len, dim, depth, heads):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(max_len, dim)
        self.layers = nn.ModuleList([Layer(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions(torch.arange(tokens.size(1)))
        for layer in self.layers:
            x = layer(x)
        return self.to_logits(self.norm(x))
"""
)
STYLES["fused QKV with the kernel"] = Style(
    FUSED,
    mistake=("is_causal=True", "is_causal=False"),
    variants={
        "kwargs": [
            (
                "def __init__(self, vocab_size, max_len, dim, depth, heads):\n        super().__init__()",
                "def __init__(self, **kwargs):\n        super().__init__()\n        vocab_size, max_len, dim = kwargs['vocab_size'], kwargs['n_positions'], kwargs['n_embd']\n        depth, heads = kwargs['n_layer'], kwargs['n_head']",
            ),
        ],
        "a config class": [
            (
                "class GPT(nn.Module):",
                "class ModelArgs:\n    d_model = 64\n    n_layers = 2\n    num_heads = 2\n    d_vocab = 100\n    n_ctx = 10\n    pad_id = 0\n\n\nclass GPT(nn.Module):",
            ),
            (
                "def __init__(self, vocab_size, max_len, dim, depth, heads):\n        super().__init__()",
                "def __init__(self, args: ModelArgs):\n        super().__init__()\n        vocab_size, max_len, dim = args.d_vocab, args.n_ctx, args.d_model\n        depth, heads = args.n_layers, args.num_heads\n        assert args.pad_id == 0",
            ),
        ],
        "optional sizes": [
            (
                "vocab_size, max_len, dim, depth, heads):",
                "vocab_size=50257, max_len=1024, dim=768, depth=12, heads=12):",
            )
        ],
        "one size required": [
            (
                "vocab_size, max_len, dim, depth, heads):",
                "vocab_size, max_len=1024, dim=768, depth=12, heads=12):",
            )
        ],
        "all in one list": [
            (
                "self.layers = nn.ModuleList([Layer(dim, heads) for _ in range(depth)])\n        self.norm = nn.LayerNorm(dim)\n        self.to_logits = nn.Linear(dim, vocab_size, bias=False)",
                "self.net = nn.Sequential(*[Layer(dim, heads) for _ in range(depth)], nn.LayerNorm(dim), nn.Linear(dim, vocab_size, bias=False))",
            ),
            (
                "for layer in self.layers:\n            x = layer(x)\n        return self.to_logits(self.norm(x))",
                "return self.net(x)",
            ),
        ],
        "positions found first": [
            (
                "self.embed(tokens) + self.positions(torch.arange(tokens.size(1)))",
                "self.positions(torch.arange(tokens.size(1))) + self.embed(tokens)",
            )
        ],
        "positions of the batch": [
            ("torch.arange(tokens.size(1))", "torch.arange(tokens.size(1)).expand(tokens.shape)")
        ],
        "an embedding of one-hot vectors": [
            (
                "self.embed(tokens) +",
                "F.one_hot(tokens, self.embed.num_embeddings).to(self.embed.weight.dtype) @ self.embed.weight +",
            )
        ],
    },
)

STYLES["nn.MultiheadAttention"] = Style(
    HEAD
    + """
class Block(nn.Module):
    def __init__(self, d_model, n_head):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.mha = nn.MultiheadAttention(d_model, n_head, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x):
        h = self.ln_1(x)
        mask = torch.full((x.size(1), x.size(1)), float("-inf"), dtype=x.dtype).triu(1)
        x = x + self.mha(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.fc2(F.gelu(self.fc1(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, vocab_size, d_model, n_head, n_layer, block_size):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(block_size, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_head) for _ in range(n_layer))
        self.ln = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)

    def forward(self, x):
        x = self.token_embedding(x) + self.position_embedding(torch.arange(x.size(1)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))
""",
    mistake=(".triu(1)", ".triu(2)"),
    variants={
        "time first": [
            ("batch_first=True", "batch_first=False"),
            ("h = self.ln_1(x)", "h = self.ln_1(x).transpose(0, 1)"),
            ("need_weights=False)[0]", "need_weights=False)[0].transpose(0, 1)"),
        ]
    },
)

STYLES["nn.TransformerEncoder"] = Style(
    HEAD
    + """
class GPT(nn.Module):
    def __init__(self, ntoken, d_model, nhead, nlayers, max_seq_len):
        super().__init__()
        self.encoder = nn.Embedding(ntoken, d_model)
        self.pos_encoder = nn.Parameter(torch.zeros(1, max_seq_len, d_model))
        layer = nn.TransformerEncoderLayer(
            d_model, nhead, 4 * d_model, dropout=0.1, activation=lambda x: F.gelu(x, approximate="tanh"),
            batch_first=True, norm_first=True,
        )
        self.transformer_encoder = nn.TransformerEncoder(layer, nlayers, nn.LayerNorm(d_model), enable_nested_tensor=False)
        self.decoder = nn.Linear(d_model, ntoken, bias=False)

    def forward(self, src):
        mask = nn.Transformer.generate_square_subsequent_mask(src.size(1), dtype=self.pos_encoder.dtype)
        x = self.encoder(src) + self.pos_encoder[:, : src.size(1)]
        return self.decoder(self.transformer_encoder(x, mask=mask))
""",
    mistake=("norm_first=True", "norm_first=False"),
    options={"cfg": {"ntoken": "vocab_size", "nlayers": "n_layers"}},
)

STYLES["a list of nn.TransformerEncoderLayer"] = Style(
    HEAD
    + """
class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        E = cfg.n_embd
        self.wte, self.wpe = nn.Embedding(cfg.vocab_size, E), nn.Embedding(cfg.block_size, E)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(E, cfg.n_head, 4 * E, 0.0, nn.GELU("tanh"), batch_first=True, norm_first=True)
            for _ in range(cfg.n_layer)
        )
        self.norm = nn.LayerNorm(E)

    def forward(self, ids):
        T = ids.shape[1]
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        x = self.wte(ids) + self.wpe.weight[:T]
        for layer in self.layers:
            x = layer(x, src_mask=hidden)
        return F.linear(self.norm(x), self.wte.weight)
""",
    mistake=('nn.GELU("tanh")', "nn.ReLU()"),
)

STYLES["a module for each head"] = Style(
    HEAD
    + '''
class Head(nn.Module):
    """one head of self-attention"""

    def __init__(self, n_embd, head_size, block_size):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size)
        self.query = nn.Linear(n_embd, head_size)
        self.value = nn.Linear(n_embd, head_size)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x):
        B, T, C = x.shape
        k, q = self.key(x), self.query(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        wei = F.softmax(wei, dim=-1)
        return wei @ self.value(x)


class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd, num_heads, block_size):
        super().__init__()
        self.heads = nn.ModuleList([Head(n_embd, n_embd // num_heads, block_size) for _ in range(num_heads)])
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x):
        return self.proj(torch.cat([h(x) for h in self.heads], dim=-1))


class FeedFoward(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU("tanh"), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        self.sa = MultiHeadAttention(n_embd, n_head, block_size)
        self.ffwd = FeedFoward(n_embd)
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        x = x + self.ffwd(self.ln2(x))
        return x


class GPT(nn.Module):
    def __init__(self, vocab_size, n_embd, n_head, n_layer, block_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*[Block(n_embd, n_head, block_size) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.token_embedding_table(idx) + self.position_embedding_table(torch.arange(T))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        if targets is None:
            return logits, None
        return logits.view(-1, logits.shape[-1]), F.cross_entropy(logits.flatten(0, 1), targets.flatten())
''',
    mistake=("k.shape[-1] ** -0.5", "C ** -0.5"),
)

STYLES["einsum weights"] = Style(
    HEAD
    + """
@dataclass
class Config:
    d_model: int = 768
    layer_norm_eps: float = 1e-5
    d_vocab: int = 50257
    n_ctx: int = 1024
    d_head: int = 64
    d_mlp: int = 3072
    n_heads: int = 12
    n_layers: int = 12


class LayerNorm(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.w, self.b = nn.Parameter(torch.ones(cfg.d_model)), nn.Parameter(torch.zeros(cfg.d_model))

    def forward(self, residual):
        mean = residual.mean(dim=-1, keepdim=True)
        std = (residual.var(dim=-1, keepdim=True, unbiased=False) + self.cfg.layer_norm_eps).sqrt()
        return (residual - mean) / std * self.w + self.b


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.W_Q = nn.Parameter(torch.empty((cfg.n_heads, cfg.d_model, cfg.d_head)))
        self.W_K = nn.Parameter(torch.empty((cfg.n_heads, cfg.d_model, cfg.d_head)))
        self.W_V = nn.Parameter(torch.empty((cfg.n_heads, cfg.d_model, cfg.d_head)))
        self.W_O = nn.Parameter(torch.empty((cfg.n_heads, cfg.d_head, cfg.d_model)))
        self.b_Q = nn.Parameter(torch.zeros((cfg.n_heads, cfg.d_head)))
        self.b_K = nn.Parameter(torch.zeros((cfg.n_heads, cfg.d_head)))
        self.b_V = nn.Parameter(torch.zeros((cfg.n_heads, cfg.d_head)))
        self.b_O = nn.Parameter(torch.zeros((cfg.d_model)))
        for W in (self.W_Q, self.W_K, self.W_V, self.W_O):
            nn.init.normal_(W, std=0.02)
        self.register_buffer("IGNORE", torch.tensor(float("-inf")))

    def forward(self, x):
        q = torch.einsum("bpm,hmd->bphd", x, self.W_Q) + self.b_Q
        k = torch.einsum("bpm,hmd->bphd", x, self.W_K) + self.b_K
        v = torch.einsum("bpm,hmd->bphd", x, self.W_V) + self.b_V
        attn_scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.cfg.d_head**0.5
        mask = torch.triu(torch.ones(attn_scores.size(-2), attn_scores.size(-1)), diagonal=1).bool()
        pattern = attn_scores.masked_fill(mask, self.IGNORE).softmax(-1)
        z = torch.einsum("bkhd,bhqk->bqhd", v, pattern)
        return torch.einsum("bqhd,hdm->bqm", z, self.W_O) + self.b_O


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.W_in = nn.Parameter(torch.randn((cfg.d_model, cfg.d_mlp)) * 0.02)
        self.W_out = nn.Parameter(torch.randn((cfg.d_mlp, cfg.d_model)) * 0.02)
        self.b_in = nn.Parameter(torch.zeros((cfg.d_mlp)))
        self.b_out = nn.Parameter(torch.zeros((cfg.d_model)))

    def forward(self, x):
        pre = torch.einsum("bpd,df->bpf", x, self.W_in) + self.b_in
        post = F.gelu(pre, approximate="tanh")
        return torch.einsum("bpf,fd->bpd", post, self.W_out) + self.b_out


class TransformerBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln1, self.attn = LayerNorm(cfg), Attention(cfg)
        self.ln2, self.mlp = LayerNorm(cfg), MLP(cfg)

    def forward(self, resid_pre):
        resid_mid = self.attn(self.ln1(resid_pre)) + resid_pre
        return self.mlp(self.ln2(resid_mid)) + resid_mid


class Embed(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.W_E = nn.Parameter(torch.randn((cfg.d_vocab, cfg.d_model)))

    def forward(self, tokens):
        return self.W_E[tokens]


class PosEmbed(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.W_pos = nn.Parameter(torch.randn((cfg.n_ctx, cfg.d_model)))

    def forward(self, tokens):
        batch, seq_len = tokens.shape
        return self.W_pos[:seq_len].unsqueeze(0).expand(batch, -1, -1)


class Unembed(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.W_U = nn.Parameter(torch.randn((cfg.d_model, cfg.d_vocab)))

    def forward(self, x):
        return x @ self.W_U


class GPT(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.embed, self.pos_embed = Embed(cfg), PosEmbed(cfg)
        self.blocks = nn.ModuleList([TransformerBlock(cfg) for _ in range(cfg.n_layers)])
        self.ln_final, self.unembed = LayerNorm(cfg), Unembed(cfg)

    def forward(self, tokens):
        residual = self.embed(tokens) + self.pos_embed(tokens)
        for block in self.blocks:
            residual = block(residual)
        return self.unembed(self.ln_final(residual))
""",
    mistake=("diagonal=1", "diagonal=0"),
    variants={
        "E first": [
            ("(cfg.n_heads, cfg.d_model, cfg.d_head)", "(cfg.d_model, cfg.n_heads, cfg.d_head)"),
            ("bpm,hmd->bphd", "bpm,mhd->bphd"),
        ],
    },
)

STYLES["bare square matrices"] = Style(
    HEAD
    + """
class Layer(nn.Module):
    def __init__(self, E, H):
        super().__init__()
        self.H = H
        for name in ("wq", "wk", "wv", "wo"):
            setattr(self, name, nn.Parameter(torch.randn(E, E) / E**0.5))
            setattr(self, name.replace("w", "b"), nn.Parameter(torch.zeros(E)))
        self.w1, self.b1 = nn.Parameter(torch.randn(E, 4 * E) / E**0.5), nn.Parameter(torch.zeros(4 * E))
        self.w2, self.b2 = nn.Parameter(torch.randn(4 * E, E) / E**0.5), nn.Parameter(torch.zeros(E))
        self.g1, self.s1 = nn.Parameter(torch.ones(E)), nn.Parameter(torch.zeros(E))
        self.g2, self.s2 = nn.Parameter(torch.ones(E)), nn.Parameter(torch.zeros(E))

    def forward(self, x):
        y = F.layer_norm(x, x.shape[-1:], self.g1, self.s1)
        q, k, v = (
            (y @ w + b).unflatten(-1, (self.H, -1)).transpose(1, 2)
            for w, b in ((self.wq, self.bq), (self.wk, self.bk), (self.wv, self.bv))
        )
        a = q @ k.mT / q.shape[-1] ** 0.5 + torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
        x = x + (a.softmax(-1) @ v).transpose(1, 2).flatten(2) @ self.wo + self.bo
        y = F.layer_norm(x, x.shape[-1:], self.g2, self.s2)
        return x + F.gelu(y @ self.w1 + self.b1, approximate="tanh") @ self.w2 + self.b2


class GPT(nn.Module):
    def __init__(self, V, T, E, H, L):
        super().__init__()
        self.wte, self.wpe = nn.Parameter(torch.randn(V, E)), nn.Parameter(torch.randn(T, E))
        self.stack = nn.ModuleList(Layer(E, H) for _ in range(L))
        self.g, self.s = nn.Parameter(torch.ones(E)), nn.Parameter(torch.zeros(E))

    def forward(self, ids):
        x = self.wte[ids] + self.wpe[: ids.shape[1]]
        for layer in self.stack:
            x = layer(x)
        return F.layer_norm(x, x.shape[-1:], self.g, self.s) @ self.wte.T
""",
    mistake=('F.gelu(y @ self.w1 + self.b1, approximate="tanh")', "F.relu(y @ self.w1 + self.b1)"),
    variants={"as nn.Linear has them": [("(y @ w + b)", "(y @ w.T + b)"), ("@ self.wo", "@ self.wo.T")]},
)

STYLES["parallel lists"] = Style(
    FUSED.replace(
        "self.layers = nn.ModuleList([Layer(dim, heads) for _ in range(depth)])",
        """self.attns = nn.ModuleList([Attention(dim, heads) for _ in range(depth)])
        self.mlps = nn.ModuleList([Layer(dim, heads).mlp for _ in range(depth)])
        self.lns = nn.ModuleList([nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)]) for _ in range(depth)])""",
    ).replace(
        "for layer in self.layers:\n            x = layer(x)",
        """for attn, mlp, (a, b) in zip(self.attns, self.mlps, self.lns):
            x = x + attn(a(x))
            x = x + mlp(b(x))""",
    ),
    mistake=("x = x + mlp(b(x))", "x = x + mlp(a(x))"),
)

STYLES["a cache in forward"] = Style(
    STYLES["minGPT, old"]
    .text.replace("def forward(self, idx, targets=None):", "def forward(self, idx, kv_caches, offset, targets=None):")
    .replace("self.pos_emb[:, :t, :]", "self.pos_emb[:, offset : offset + t, :]"),
    mistake=("self.pos_emb[:, offset : offset + t, :]", "self.pos_emb[:, offset + 1 : offset + t + 1, :]"),
)

STYLES["a mask in forward"] = Style(
    STYLES["nn.MultiheadAttention"]
    .text.replace("def forward(self, x):\n        h", "def forward(self, x, mask):\n        h")
    .replace('        mask = torch.full((x.size(1), x.size(1)), float("-inf"), dtype=x.dtype).triu(1)\n', "")
    .replace("x = block(x)", "x = block(x, mask)")
    .replace("def forward(self, x):\n        x = self.token", "def forward(self, x, mask):\n        x = self.token")
    + """

def run(model, input_ids):
    T = input_ids.shape[1]
    return model(input_ids, torch.ones(T, T).triu(1).bool())
""",
    mistake=("x = x + self.mha(", "x = self.mha("),
    options={"my_forward": "run"},
)

STYLES["parameter lists in one forward"] = Style(
    HEAD
    + """
def several(n, *shape):
    return nn.ParameterList([torch.randn(*shape) for _ in range(n)])


class GPT(nn.Module):
    def __init__(self, v, t, d, h, l):
        super().__init__()
        self.h = h
        self.tok, self.pos = nn.Embedding(v, d), nn.Embedding(t, d)
        self.ln1_w, self.ln1_b, self.ln2_w, self.ln2_b = (several(l, d) for _ in range(4))
        self.qkv_w, self.qkv_b = several(l, 3 * d, d), several(l, 3 * d)
        self.o_w, self.o_b = several(l, d, d), several(l, d)
        self.up_w, self.up_b = several(l, 4 * d, d), several(l, 4 * d)
        self.down_w, self.down_b = several(l, d, 4 * d), several(l, d)
        self.lnf_w, self.lnf_b = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

    def forward(self, idx):
        B, T = idx.shape
        x = self.tok(idx) + self.pos.weight[:T]
        for i in range(len(self.qkv_w)):
            y = F.layer_norm(x, x.shape[-1:], self.ln1_w[i], self.ln1_b[i])
            q, k, v = (part.view(B, T, self.h, -1).transpose(1, 2) for part in F.linear(y, self.qkv_w[i], self.qkv_b[i]).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + F.linear(y, self.o_w[i], self.o_b[i])
            y = F.layer_norm(x, x.shape[-1:], self.ln2_w[i], self.ln2_b[i])
            y = F.gelu(y @ self.up_w[i].T + self.up_b[i], approximate="tanh")
            x = x + F.linear(y, self.down_w[i], self.down_b[i])
        return F.layer_norm(x, x.shape[-1:], self.lnf_w, self.lnf_b) @ self.tok.weight.T
""",
    mistake=(".transpose(1, 2).flatten(2)", ".reshape(B, T, -1)"),
    variants={
        "all layers in one tensor": [
            ("nn.ParameterList([torch.randn(*shape) for _ in range(n)])", "nn.Parameter(torch.randn(n, *shape))")
        ],
    },
)

STYLES["lists of layers in capitals"] = Style(
    HEAD
    + """
class GPT(nn.Module):
    def __init__(self, V, N, E, H, L):
        super().__init__()
        self.E, self.H, self.L = E, H, L
        self.TE, self.PE, self.LNF = nn.Embedding(V, E), nn.Embedding(N, E), nn.LayerNorm(E)
        self.LN1, self.LN2 = (nn.ModuleList(nn.LayerNorm(E) for _ in range(L)) for _ in range(2))
        self.Q, self.K, self.V, self.O = (nn.ModuleList(nn.Linear(E, E) for _ in range(L)) for _ in range(4))
        self.F1 = nn.ModuleList(nn.Linear(E, 4 * E) for _ in range(L))
        self.F2 = nn.ModuleList(nn.Linear(4 * E, E) for _ in range(L))

    def forward(self, i):
        B, T = i.shape
        x = self.TE(i) + self.PE(torch.arange(T))
        for l in range(self.L):
            h = self.LN1[l](x)
            q, k, v = (part[l](h).view(B, T, self.H, -1).transpose(1, 2) for part in (self.Q, self.K, self.V))
            a = q @ k.mT / math.sqrt(self.E // self.H) - torch.triu(torch.ones(T, T), 1) * 1e10
            x = x + self.O[l]((a.softmax(3) @ v).transpose(1, 2).reshape(B, T, self.E))
            h = self.F1[l](self.LN2[l](x))
            x = x + self.F2[l](h * 0.5 * (1 + torch.tanh(0.7978845608028654 * (h + 0.044715 * h**3))))
        return self.LNF(x) @ self.TE.weight.T
""",
    mistake=("0.044715", "0.44715"),
)

STYLES["one token after the other"] = Style(
    HEAD
    + """
class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_in, self.norm_mid = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def step(self, x, keys, values):
        q, k, v = self.to_qkv(self.norm_in(x)).view(len(x), 3, self.heads, -1).unbind(1)
        keys.append(k)
        values.append(v)
        K, V = torch.stack(keys, 2), torch.stack(values, 2)
        w = ((q[:, :, None] * K).sum(-1) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.mix((w[..., None] * V).sum(2).flatten(1))
        return x + self.shrink(F.gelu(self.expand(self.norm_mid(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, vocab_size, max_target_positions, decoder_embed_dim, decoder_attention_heads, decoder_layers):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, decoder_embed_dim)
        self.position = nn.Embedding(max_target_positions, decoder_embed_dim)
        self.stack = nn.ModuleList(Layer(decoder_embed_dim, decoder_attention_heads) for _ in range(decoder_layers))
        self.norm_out = nn.LayerNorm(decoder_embed_dim)

    def forward(self, tokens):
        cache = [([], []) for _ in self.stack]
        outputs = []
        for t in range(tokens.shape[1]):
            x = self.embedding(tokens[:, t]) + self.position.weight[t]
            for layer, (keys, values) in zip(self.stack, cache):
                x = layer.step(x, keys, values)
            outputs.append(F.linear(self.norm_out(x), self.embedding.weight))
        return torch.stack(outputs, 1)
""",
    mistake=("self.expand(self.norm_mid(x))", "self.expand(x)"),
)

STYLES["each block in the one before"] = Style(
    HEAD
    + """
class Node(nn.Module):
    def __init__(self, width, heads, rest):
        super().__init__()
        self.heads = heads
        self.ln_a, self.ln_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.fc_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.next = Node(width, heads, rest - 1) if rest > 1 else None

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.ln_a(x)).chunk(3, -1))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + self.fc_out(F.gelu(self.fc(self.ln_b(x)), approximate="tanh"))
        return x if self.next is None else self.next(x)


class GPT(nn.Module):
    def __init__(self, ntoken, max_len, ninp, nhead, nlayers):
        super().__init__()
        self.encoder = nn.Embedding(ntoken, ninp)
        self.positions = nn.Embedding(max_len, ninp)
        self.first = Node(ninp, nhead, nlayers)
        self.last_norm = nn.LayerNorm(ninp)
        self.decoder = nn.Linear(ninp, ntoken, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, ids):
        x = self.encoder(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.decoder(self.last_norm(self.first(x)))
""",
    mistake=("(scores.softmax(-1) @ v)", "(scores.clamp(-1, 1).softmax(-1) @ v)"),
)

STYLES["a tree of tensors"] = Style(
    HEAD
    + """
def init_params(n_vocab, n_ctx, n_embd, n_layer):
    norm = lambda: {"scale": torch.ones(n_embd), "offset": torch.zeros(n_embd)}
    dense = lambda a, b: {"kernel": torch.randn(a, b) * 0.02, "bias": torch.zeros(b)}
    layers = [
        {"ln_1": norm(), "qkv": dense(n_embd, 3 * n_embd), "proj": dense(n_embd, n_embd),
         "ln_2": norm(), "up": dense(n_embd, 4 * n_embd), "down": dense(4 * n_embd, n_embd)}
        for _ in range(n_layer)
    ]
    return {"wte": torch.randn(n_vocab, n_embd), "wpe": torch.randn(n_ctx, n_embd), "layers": layers, "ln_f": norm()}


def stacked_params(n_vocab, n_ctx, n_embd, n_layer):
    params = init_params(n_vocab, n_ctx, n_embd, n_layer)
    layers = params["layers"]
    params["layers"] = {
        name: {kind: torch.stack([layer[name][kind] for layer in layers]) for kind in layers[0][name]} for name in layers[0]
    }
    return params


def norm(p, x):
    m = x.mean(-1, keepdim=True)
    return p["scale"] * (x - m) * torch.rsqrt(((x - m) ** 2).mean(-1, keepdim=True) + 1e-5) + p["offset"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def block(layer, x, n_head):
    q, k, v = (y.unflatten(-1, (n_head, -1)) for y in dense(layer["qkv"], norm(layer["ln_1"], x)).chunk(3, -1))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    s = torch.where(torch.ones(s.shape[-2:]).tril().bool(), s, -1e9)
    x = x + dense(layer["proj"], torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v).flatten(2))
    return x + dense(layer["down"], F.gelu(dense(layer["up"], norm(layer["ln_2"], x)), approximate="tanh"))


def apply(params, ids, n_head=3):
    x = params["wte"][ids] + params["wpe"][: ids.shape[1]]
    layers = params["layers"]
    if isinstance(layers, dict):
        count = layers["qkv"]["kernel"].shape[0]
        layers = [{name: {kind: p[kind][n] for kind in p} for name, p in layers.items()} for n in range(count)]
    for layer in layers:
        x = block(layer, x, n_head)
    return norm(params["ln_f"], x) @ params["wte"].T


class GPT:
    def __init__(self, n_vocab, n_ctx, n_embd, n_layer, n_head):
        self.params, self.n_head = init_params(n_vocab, n_ctx, n_embd, n_layer), n_head
        self.mask = torch.ones(n_ctx, n_ctx).tril()

    def __call__(self, ids):
        return apply(self.params, ids, self.n_head)
""",
    mistake=("* torch.rsqrt(((x - m) ** 2).mean(", "* torch.rsqrt(((x - m) ** 2).sum("),
    variants={
        "all layers in one": [
            (
                "= init_params(n_vocab, n_ctx, n_embd, n_layer), n_head",
                "= stacked_params(n_vocab, n_ctx, n_embd, n_layer), n_head",
            )
        ],
    },
)
STYLES["a tree of tensors, and a function"] = Style(
    STYLES["a tree of tensors"].text,
    mistake=("s.softmax(-1), v)", "s.softmax(1), v)"),
    target="init_params",
    options={"my_forward": "apply", "weights": "reference"},
)

STYLES["an output projection for each head"] = Style(
    HEAD
    + """
class Head(nn.Module):
    def __init__(self, d_model, d_head):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_head) for _ in range(3))
        self.o_proj = nn.Linear(d_head, d_model, bias=False)

    def forward(self, x):
        scores = self.q_proj(x) @ self.k_proj(x).mT / self.q_proj.out_features**0.5
        hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        return self.o_proj(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ self.v_proj(x))


class Attention(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.heads = nn.ModuleList(Head(d_model, d_model // n_heads) for _ in range(n_heads))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x):
        return sum(head(x) for head in self.heads) + self.bias


class Layer(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attn = Attention(d_model, n_heads)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU("tanh"), nn.Linear(4 * d_model, d_model))

    def forward(self, x):
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    def __init__(self, ntoken, num_hiddens, num_blks, num_heads, max_len):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(ntoken, num_hiddens), nn.Embedding(max_len, num_hiddens)
        self.layers = nn.ModuleList(Layer(num_hiddens, num_heads) for _ in range(num_blks))
        self.norm = nn.LayerNorm(num_hiddens)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.tokens.weight.T
""",
    mistake=("/ self.q_proj.out_features**0.5", ""),
)

STYLES["Conv1d, tokens last"] = Style(
    HEAD
    + """
class ChannelNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return F.layer_norm(x.mT, (x.shape[1],), self.g, self.b).mT


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = ChannelNorm(dim), ChannelNorm(dim)
        self.to_qkv, self.to_out = nn.Conv1d(dim, 3 * dim, 1), nn.Conv1d(dim, dim, 1)
        self.up, self.down = nn.Conv1d(dim, 4 * dim, 1), nn.Conv1d(4 * dim, dim, 1)

    def attend(self, x):
        q, k, v = (part.unflatten(1, (self.heads, -1)) for part in self.to_qkv(x).chunk(3, dim=1))
        scores = torch.einsum("bhdi,bhdj->bhij", q, k) / q.shape[2] ** 0.5
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        return self.to_out(torch.einsum("bhij,bhdj->bhdi", scores.softmax(-1), v).flatten(1, 2))

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        dim = kwargs["hidden_size"]
        self.emb, self.pos = nn.Embedding(kwargs["vocab_size"], dim), nn.Embedding(kwargs.get("max_len", 99), dim)
        self.layers = nn.ModuleList(Block(dim, kwargs["num_attention_heads"]) for _ in range(kwargs["depth"]))
        self.norm = ChannelNorm(dim)

    def forward(self, ids):
        x = (self.emb(ids) + self.pos(torch.arange(ids.shape[1]))).mT
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mT @ self.emb.weight.T
""",
    mistake=("scores.softmax(-1)", "scores.softmax(-2)"),
)

NESTED = """
@dataclass
class ModelConfig:
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    block_size: int = 1024


@dataclass
class TrainConfig:
    lr: float = 3e-4


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.model.n_head
        self.c_attn = nn.Linear(cfg.model.n_embd, 3 * cfg.model.n_embd)
        self.c_proj = nn.Linear(cfg.model.n_embd, cfg.model.n_embd)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        width = cfg.model.n_embd
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), Attention(cfg)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        m = cfg.model
        self.wte, self.wpe = nn.Embedding(m.vocab_size, m.n_embd), nn.Embedding(m.block_size, m.n_embd)
        self.h = nn.Sequential(*(Block(cfg) for _ in range(m.n_layer)))
        self.ln_f = nn.LayerNorm(m.n_embd)

    def forward(self, ids):
        return self.ln_f(self.h(self.wte(ids) + self.wpe.weight[: ids.shape[1]])) @ self.wte.weight.T
"""
STYLES["a config in a config"] = Style(
    HEAD.replace("import dataclass", "import dataclass, field") + NESTED,
    mistake=("is_causal=True", "is_causal=False"),
    variants={
        "without annotation": [("cfg: Config", "cfg")],
        "that no file defines": [(NESTED[: NESTED.index("class Attention")], ""), ("cfg: Config", "cfg")],
        "as a dict in a dict": [
            (
                NESTED[: NESTED.index("class Attention")],
                'CONFIG = {"model": {"n_layer": 12, "n_head": 12, "n_embd": 768}, "lr": 3e-4}\n\n\n',
            ),
            ("cfg: Config", "config"),
            ("m = cfg.model", 'cfg = config\n        m = cfg["model"]'),
        ],
    },
)

MLP = 'nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))'
STYLES["attention and feed-forward in one list"] = Style(
    FUSED[: FUSED.index("class Layer")]
    + f"""class Residual(nn.Module):
    def __init__(self, dim, part):
        super().__init__()
        self.norm, self.part = nn.LayerNorm(dim), part

    def forward(self, x):
        return x + self.part(self.norm(x))


class GPT(nn.Module):
    def __init__(self, vocab_size, max_len, dim, depth, heads):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(max_len, dim)
        parts = [part for _ in range(depth) for part in (Attention(dim, heads), {MLP})]
        self.layers = nn.Sequential(*[Residual(dim, part) for part in parts])
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions(torch.arange(tokens.size(1)))
        return self.norm(self.layers(x)) @ self.embed.weight.T
""",
    mistake=('nn.GELU(approximate="tanh")', "nn.ReLU()"),
)

STYLES["all norms in one list"] = Style(
    FUSED[: FUSED.index("class Layer")]
    + f"""class GPT(nn.Module):
    def __init__(self, vocab_size, max_len, dim, depth, heads):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(max_len, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth + 1))
        self.attention = nn.ModuleList(Attention(dim, heads) for _ in range(depth))
        self.mlp = nn.ModuleList({MLP} for _ in range(depth))

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions(torch.arange(tokens.size(1)))
        for n, (attention, mlp) in enumerate(zip(self.attention, self.mlp)):
            x = x + attention(self.norms[2 * n](x))
            x = x + mlp(self.norms[2 * n + 1](x))
        return self.norms[-1](x) @ self.embed.weight.T
""",
    mistake=("mlp(self.norms[2 * n + 1](x))", "mlp(self.norms[2 * n](x))"),
)

STYLES["a package"] = Style(
    FUSED.replace("class Attention(nn.Module):", "from .attention import Attention\n\n\nclass Unused(nn.Module):", 1),
    mistake=('nn.GELU(approximate="tanh")', "nn.SiLU()"),
    file="mygpt/model.py",
    files={"mygpt/__init__.py": "", "mygpt/attention.py": FUSED[: FUSED.index("class Layer")]},
)

STYLES["a folder with relative imports"] = Style(
    STYLES["a package"].text,
    mistake=("x = x + self.attention(self.pre_attention(x))", "x = x + self.attention(x)"),
    file="loose/model.py",
    files={"loose/attention.py": FUSED[: FUSED.index("class Layer")]},
)

STYLES["a notebook"] = Style(FUSED, mistake=("self.heads, C // self.heads", "1, C"), file="lesson.ipynb")
STYLES["a neighbour"] = Style(
    FUSED.replace("class Attention(nn.Module):", "from attention import Attention\n\n\nclass Unused(nn.Module):", 1),
    mistake=("self.norm(x)", "x"),
    file="near/model.py",
    files={"near/attention.py": FUSED[: FUSED.index("class Layer")]},
)


# Parts that do another's work or none: the style, what becomes of its text, and the lab's name for it, if it has one.
MISUSED: dict[str, tuple[str, list[tuple[str, str]], list[str]]] = {
    "norm2 before attention": (
        "book",
        [("self.norm2(x", "self.normX(x"), ("self.norm1(x", "self.norm2(x"), ("self.normX(x", "self.norm1(x")],
        ["swapped-norms"],
    ),
    "n2 before attention": (
        "book",
        [("norm1", "n1"), ("norm2", "n2"), ("att(self.n1(", "att(self.n2("), ("ff(self.n2(", "ff(self.n1(")],
        ["swapped-norms"],
    ),
    "feed-forward with norm2 first": (
        "book",
        [
            (
                "x = x + self.drop_shortcut(self.att(self.norm1(x)))",
                "x = x + self.drop_shortcut(self.ff(self.norm2(x)))",
            ),
            (
                "return x + self.drop_shortcut(self.ff(self.norm2(x)))",
                "return x + self.drop_shortcut(self.att(self.norm1(x)))",
            ),
        ],
        ["feed-forward-first"],
    ),
    "v as keys, k as values": (
        "book: single letters",
        [
            (
                "keys, queries, values = self.k(x), self.q(x), self.v(x)",
                "keys, queries, values = self.v(x), self.q(x), self.k(x)",
            )
        ],
        ["qkv-order"],
    ),
    "b_V for keys, b_K for values": (
        "einsum weights",
        [
            ("self.W_K) + self.b_K", "self.W_K) + self.b_X"),
            ("self.W_V) + self.b_V", "self.W_V) + self.b_K"),
            ("b_X", "b_V"),
        ],
        [],
    ),
    "a last block that does not run, in letters": (
        "book: single letters",
        [("x = self.b(x)", "x = self.b[:-1](x)")],
        ["skipped-block"],
    ),
    "scale as shift, shift as scale": (
        "book",
        [("return self.scale * (", "return self.shift * ("), (" + self.shift", " + self.scale")],
        ["wrong-norm"],
    ),
    "values from the block's input": (
        "nn.MultiheadAttention",
        [("self.mha(h, h, h,", "self.mha(h, h, x,")],
        ["wrong-input"],
    ),
    "queries and keys from the block's input": (
        "nn.MultiheadAttention",
        [("self.mha(h, h, h,", "self.mha(x, x, h,")],
        ["wrong-input"],
    ),
    "a norm that is not used, in lists": (
        "parameter lists in one forward",
        [("self.ln2_w[i], self.ln2_b[i])", "self.ln1_w[i], self.ln1_b[i])")],
        ["one-norm-for-both"],
    ),
    "feed-forward before attention, in two modules": (
        "attention and feed-forward in one list",
        [
            ("self.layers(x)", "self.swapped(x)"),
            (
                "    def forward(self, tokens):",
                "    def swapped(self, x):\n        for n in (1, 0, 3, 2):\n            x = self.layers[n](x)\n        return x\n\n    def forward(self, tokens):",
            ),
        ],
        ["feed-forward-first"],
    ),
    "the norm of the next block, exchanged with the own": (
        "book: the norm of the next block in each",
        [("self.ff(self.norm1(x))", "self.ff(self.norm2(x))"), ("return x, self.norm2(x)", "return x, self.norm1(x)")],
        [],
    ),
    "the final norm behind each block": (
        "book",
        [
            (
                "x = self.trf_blocks(x)\n        x = self.final_norm(x)",
                "for block in self.trf_blocks:\n            x = self.final_norm(block(x))",
            )
        ],
        ["wrong-wiring"],
    ),
    "the first block's attention in all blocks": (
        "book",
        [
            ("self.att(self.norm1(x))", "self.first(self.norm1(x))"),
            (
                "x = self.trf_blocks(x)",
                "for block in self.trf_blocks:\n            block.__dict__['first'] = self.trf_blocks[0].att\n            x = block(x)",
            ),
        ],
        ["wrong-wiring"],
    ),
    "the first layer's weights in all layers": (
        "parameter lists in one forward",
        [("for i in range(len(self.qkv_w)):", "for i in [0] * len(self.qkv_w):")],
        ["shared-blocks"],
    ),
    "positions by sequence": (
        "book",
        [
            (
                "self.pos_emb(torch.arange(seq_len, device=in_idx.device))",
                "self.pos_emb(torch.arange(batch_size))[:, None]",
            )
        ],
        ["wrong-positions"],
    ),
    "a window, with the softmax written out": (
        "book",
        [
            (
                "torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)",
                "(e := (attn_scores / keys.shape[-1] ** 0.5).exp()) / e.sum(-1, keepdim=True)",
            ),
            (
                "torch.triu(torch.ones(context_length, context_length), diagonal=1)",
                "torch.triu(torch.ones(context_length, context_length), diagonal=1) + torch.tril(torch.ones(context_length, context_length), diagonal=-5)",
            ),
        ],
        ["local-window"],
    ),
    "norms without scale, in functions": (
        "picoGPT",
        [("return g * (x - mean)", "return (x - mean)")],
        ["missing-norm-scale"],
    ),
    "no shortcut around feed-forward, in functions": (
        "picoGPT",
        [("return x + ffn(", "return ffn(")],
        ["missing-shortcut"],
    ),
}


def misused() -> dict[str, tuple[Style, list[str]]]:
    return {name: (replaced(healthy()[style], changes), names) for name, (style, changes, names) in MISUSED.items()}


def healthy() -> dict[str, Style]:
    """All healthy styles and variants, by name."""
    found = dict(STYLES)
    for name, style in STYLES.items():
        for variant, changes in style.variants.items():
            found[f"{name}: {variant}"] = replaced(style, changes)
    return found


def wrong() -> dict[str, Style]:
    """Each style and variant with its mistake."""
    return {
        name: replaced(style, [style.mistake]) for name, style in healthy().items() if style.mistake[0] in style.text
    }


def replaced(style: Style, changes: list[tuple[str, str]]) -> Style:
    text = style.text
    for old, new in changes:
        assert old in text, f"{old!r} is not in the style"
        text = text.replace(old, new)
    return Style(text, style.mistake, style.target, style.file, style.files, style.options)
