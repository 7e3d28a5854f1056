"""A sabotaged copy goes in, the name of the mistake comes out. No sabotage here uses the diagnosis's own switches."""

import copy
import json
import math

import pytest
import torch
from pairs import VOCAB, random_gpt2, random_ids
from readers import RAW_MAP, FusedGPT, RawGPT
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel
from zoo_mistakes import SPECIMENS

from hf_gpt_scratch import GPTModel, GPTScratchConfig, GPTScratchForCausalLM
from hf_gpt_scratch.lab.building import book_settings
from hf_gpt_scratch.lab.compare import compare_models
from hf_gpt_scratch.lab.diagnose import diagnose
from hf_gpt_scratch.lab.mistakes import CATALOGUE, mistakes
from hf_gpt_scratch.lab.simulate import Forward, everywhere
from hf_gpt_scratch.lab.subject import SIZES, copy_weights, subject
from hf_gpt_scratch.weights.parity import FLOAT64_STAGE, relative_error

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def official():
    return subject(random_gpt2(), name="official")


@pytest.fixture(scope="module")
def untied():
    return subject(random_gpt2(tie_word_embeddings=False), name="official, untied")


def book_copy(reference, model_class=GPTModel, **changes):
    """The book's model with the reference's weights, as a reader would have it."""
    cfg = {name: getattr(reference.config, name) for name in ("vocab_size", "context_length", "emb_dim", "n_heads")}
    cfg |= dict(n_layers=reference.config.n_layers, drop_rate=0.1, qkv_bias=True, **changes)
    model = model_class(cfg).eval()
    copy_weights(reference, subject(model, reference.config))
    return model


def diagnosis_of(reference, model, length=20):
    candidate = subject(model, reference.config, "candidate")
    comparison = compare_models(reference, candidate, random_ids(length=length))
    return diagnose(comparison, reference, candidate)


def each_block(change):
    def sabotage(model):
        for block in model.trf_blocks:
            change(block)

    return sabotage


def each_norm(model, forward):
    for module in model.modules():
        if type(module).__name__ == "LayerNorm":
            module.forward = forward.__get__(module)


def attend(block, weights_of):
    """Replaces the attention by one in which `weights_of(module, scores)` makes weights (B, H, T, T) of raw scores."""

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = (
            layer(x).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
            for layer in (self.W_query, self.W_key, self.W_value)
        )
        weights = self.dropout(weights_of(self, q @ k.transpose(2, 3)))
        return self.out_proj((weights @ v).transpose(1, 2).reshape(batch, tokens, -1))

    block.att.forward = forward.__get__(block.att)


def future(scores):
    return torch.ones(scores.shape[-2:]).triu(1).bool()


def hiding(diagonal, fill=-math.inf):
    def weights(module, scores):
        hidden = torch.ones(scores.shape[-2:]).triu(diagonal).bool()
        return (scores / module.head_dim**0.5).masked_fill(hidden, fill).softmax(-1)

    return weights


def seeing(module, scores, visible):
    return (scores / module.head_dim**0.5).masked_fill(~visible, -math.inf).softmax(-1)


def heads_cut_without_transpose(block):
    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = (
            layer(x).view(batch, self.num_heads, tokens, self.head_dim)
            for layer in (self.W_query, self.W_key, self.W_value)
        )
        scores = (q @ k.transpose(2, 3) / self.head_dim**0.5).masked_fill(future(q @ k.transpose(2, 3)), -math.inf)
        return self.out_proj((scores.softmax(-1) @ v).reshape(batch, tokens, width))

    block.att.forward = forward.__get__(block.att)


def attention(weights_of):
    return each_block(lambda block: attend(block, weights_of))


def scaled(factor):
    """Weights of scores that are multiplied by `factor`, or by what it makes of the module."""

    def weights(module, scores):
        scores = scores * (factor(module) if callable(factor) else factor)
        return scores.masked_fill(future(scores), -math.inf).softmax(-1)

    return weights


def cubed(module, scores):
    """What no edit of the lab makes."""
    return ((scores / module.head_dim**0.5) ** 3).masked_fill(future(scores), -math.inf).softmax(-1)


def scaled_by(factor):
    return attention(scaled(factor))


def permuted(model):
    for block in model.trf_blocks:
        q, k = block.att.W_query, block.att.W_key
        block.att.W_query, block.att.W_key = k, q


def loaded_permuted(model):
    for block in model.trf_blocks:
        for a, b in zip(block.att.W_query.parameters(), block.att.W_value.parameters(), strict=True):
            a.data, b.data = b.data, a.data


def not_transposed(model):
    for block in model.trf_blocks:
        block.att.out_proj.weight.data = block.att.out_proj.weight.data.T.contiguous()


def reshaped(model):
    for block in model.trf_blocks:
        matrix = block.ff.layers[0].weight.data
        block.ff.layers[0].weight.data = matrix.T.reshape(matrix.shape)


def exact_gelu(block):
    block.ff.layers[1] = nn.GELU()


def relu(block):
    block.ff.layers[1] = nn.ReLU()


def wrong_eps(value):
    def sabotage(model):
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps = value

    return sabotage


def unbiased_forward(norm):
    def forward(self, x):
        variance = x.var(-1, keepdim=True)
        return self.scale * (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + self.eps) + self.shift

    norm.forward = forward.__get__(norm)


def unbiased(model):
    for module in model.modules():
        if type(module).__name__ == "LayerNorm":
            unbiased_forward(module)


def eps_on_std(model):
    def forward(self, x):
        deviation = x.var(-1, keepdim=True, unbiased=False).sqrt()
        return self.scale * (x - x.mean(-1, keepdim=True)) / (deviation + self.eps) + self.shift

    each_norm(model, forward)


def torch_std(model):
    def forward(self, x):
        return self.scale * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) + self.shift

    each_norm(model, forward)


def block_forward(forward):
    return each_block(lambda block: setattr(block, "forward", forward.__get__(block)))


def post_norm(self, x):
    x = self.norm1(x + self.att(x))
    return self.norm2(x + self.ff(x))


def output_norm(self, x):
    x = x + self.norm1(self.att(x))
    return x + self.norm2(self.ff(x))


def shortcut_after_norm(self, x):
    x = self.norm1(x)
    x = x + self.att(x)
    x = self.norm2(x)
    return x + self.ff(x)


def no_shortcut(self, x):
    x = self.att(self.norm1(x))
    return x + self.ff(self.norm2(x))


def norm1_twice(self, x):
    x = x + self.att(self.norm1(x))
    return x + self.ff(self.norm1(x))


def final_norm_forgotten(model):
    model.final_norm.forward = lambda x: x


def final_norm_never_built(model):
    model.final_norm = nn.Identity()


def positions_from(offset):
    def sabotage(model):
        look_up = model.pos_emb.forward
        model.pos_emb.forward = lambda positions: look_up(positions + offset)

    return sabotage


def no_positions(model):
    model.pos_emb.forward = lambda positions: model.pos_emb.weight.new_zeros(len(positions), 1)


def positions_loaded_off_by_one(model):
    model.pos_emb.weight.data = model.pos_emb.weight.data.roll(1, 0)


def embeddings_scaled(model):
    look_up = model.tok_emb.forward
    model.tok_emb.forward = lambda ids: look_up(ids) * model.tok_emb.embedding_dim**0.5


def zero_biases(model):
    for block in model.trf_blocks:
        block.ff.layers[0].bias.data.zero_()


def biases_not_added(model):
    for block in model.trf_blocks:
        layer = block.att.out_proj
        layer.forward = lambda x, layer=layer: x @ layer.weight.T


def fresh_head(model):
    torch.manual_seed(1)
    nn.init.normal_(model.out_head.weight, std=0.02)


def returns(function):
    def sabotage(model):
        head = model.out_head.forward
        model.out_head.forward = lambda x: function(head(x))

    return sabotage


def blocks_in_text_order(model):
    first, second = model.trf_blocks[1], model.trf_blocks[2]
    model.trf_blocks[1], model.trf_blocks[2] = second, first


def norms_not_loaded(model):
    for block in model.trf_blocks:
        nn.init.ones_(block.norm2.scale)


def dropout_always(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.forward = lambda x: F.dropout(x, 0.1)


SABOTAGES = {
    "attention output not transposed": ("not-transposed", not_transposed),
    "feed-forward reshaped": ("not-transposed", reshaped),
    "query and key swapped": ("qkv-order", permuted),
    "query and value loaded the other way": ("qkv-order", loaded_permuted),
    "exact GELU": ("exact-gelu", each_block(exact_gelu)),
    "ReLU": ("wrong-activation", each_block(relu)),
    "unbiased variance": ("unbiased-variance", unbiased),
    "eps 1e-6": ("wrong-eps", wrong_eps(1e-6)),
    "an eps that nobody would guess": ("wrong-eps", wrong_eps(3.3e-5)),
    "eps beside the standard deviation": ("eps-outside-root", eps_on_std),
    "no scale": ("missing-scale", scaled_by(lambda att: 1.0)),
    "scale twice": ("doubled-scale", scaled_by(lambda att: 1 / att.head_dim)),
    "scale by emb_dim": ("scale-by-emb-dim", scaled_by(lambda att: att.d_out**-0.5)),
    "scale by n_heads": ("scale-by-n-heads", scaled_by(lambda att: att.num_heads**-0.5)),
    "scores multiplied": ("inverted-scale", scaled_by(lambda att: att.head_dim**0.5)),
    "heads cut without transpose": ("heads-not-transposed", each_block(heads_cut_without_transpose)),
    "post-norm": ("post-norm", block_forward(post_norm)),
    "norms on outputs": ("norm-on-output", block_forward(output_norm)),
    "shortcut of the normed": ("shortcut-after-norm", block_forward(shortcut_after_norm)),
    "no shortcut around attention": ("missing-shortcut", block_forward(no_shortcut)),
    "norm1 twice": ("one-norm-for-both", block_forward(norm1_twice)),
    "final norm forgotten": ("missing-final-norm", final_norm_forgotten),
    "final norm never built": ("missing-final-norm", final_norm_never_built),
    "positions from 1": ("off-by-one-positions", positions_from(1)),
    "positions loaded one off": ("off-by-one-positions", positions_loaded_off_by_one),
    "no positions": ("no-positions", no_positions),
    "embeddings scaled": ("embedding-scale", embeddings_scaled),
    "no mask": ("no-mask", attention(lambda m, s: (s / m.head_dim**0.5).softmax(-1))),
    "mask over the diagonal": ("mask-hides-diagonal", attention(hiding(0, -1e30))),
    "mask over the diagonal, NaN": ("mask-hides-diagonal", attention(hiding(0))),
    "mask one off": ("mask-sees-ahead", attention(hiding(2))),
    "mask upside down": ("mask-upside-down", attention(lambda m, s: seeing(m, s, torch.ones_like(s).triu().bool()))),
    "mask after softmax": (
        "mask-after-softmax",
        attention(lambda m, s: (s / m.head_dim**0.5).softmax(-1).masked_fill(future(s), 0.0)),
    ),
    "scores zeroed": (
        "mask-zero-scores",
        attention(lambda m, s: (s / m.head_dim**0.5).masked_fill(future(s), 0.0).softmax(-1)),
    ),
    "dropout in evaluation mode": ("dropout-on", dropout_always),
    "training mode": ("dropout-on", nn.Module.train),
    "biases zero": ("missing-bias", zero_biases),
    "biases not added": ("missing-bias", biases_not_added),
    "head never loaded": ("untied-head", fresh_head),
    "log-probabilities": ("not-logits", returns(lambda x: x.log_softmax(-1))),
    "blocks in the wrong order": ("block-order", blocks_in_text_order),
    "norms not loaded": ("not-loaded", norms_not_loaded),
}  # fmt: skip


def test_every_mistake_in_the_forward_pass_has_a_sabotage():
    elsewhere = {"wrong-n-heads", "wrong-head", "shared-blocks"}  # in tests of their own
    known = {mistake.name for mistake in (*CATALOGUE, *mistakes(GPTScratchConfig.preset("124M")))}
    in_the_zoo = {name for specimen in SPECIMENS for name in specimen.names}
    assert known <= {name for name, _ in SABOTAGES.values()} | elsewhere | in_the_zoo


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_names_the_mistake_and_nothing_else(official, sabotage):
    name, change = SABOTAGES[sabotage]
    model = book_copy(official)
    change(model)
    found = diagnosis_of(official, model)
    assert found.names == [name], found
    assert found.explained
    assert found.error > 10 * FLOAT64_STAGE or math.isnan(found.error)
    assert found.unexplained <= FLOAT64_STAGE
    assert found.faults[-1].error <= FLOAT64_STAGE


@pytest.mark.parametrize(("n_heads", "says"), [(8, "8 heads instead of 4"), (1, "1 head instead of 4")])
def test_names_a_wrong_number_of_heads(official, n_heads, says):
    found = diagnosis_of(official, rebuilt(official, n_heads=n_heads))
    assert found.names == ["wrong-n-heads"]
    assert says in found.faults[0].says


def rebuilt(reference, **changes):
    model = book_copy(reference)
    other = GPTModel({**cfg_of(reference), **changes}).eval()
    other.load_state_dict(model.state_dict(), strict=changes.get("qkv_bias", True))
    return other


def cfg_of(reference):
    names = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
    return {name: getattr(reference.config, name) for name in names} | {"drop_rate": 0.1, "qkv_bias": True}


def test_names_missing_qkv_biases(official):
    model = book_copy(official)
    for block in model.trf_blocks:
        for name in ("W_query", "W_key", "W_value"):
            getattr(block.att, name).bias = None
    found = diagnosis_of(official, model)
    assert found.names == ["missing-bias"]
    assert "att.W_query.bias" in found.faults[0].where


def test_names_a_head_that_is_tied_where_the_checkpoint_has_its_own(untied):
    model = book_copy(untied)
    model.out_head.weight = model.tok_emb.weight
    found = diagnosis_of(untied, model)
    assert found.explained
    assert found.names == ["wrong-head"]
    assert "is the same matrix as" in found.faults[0].says and "tok_emb" in found.faults[0].says


# In one block's copy or in several's: what is done to the blocks, the norm behind them left alone.
OUTSIDE = (
    "final norm",
    "positions",
    "no positions",
    "embeddings",
    "head never",
    "log-",
    "dropout",
    "training",
    "blocks in",
)
IN_BLOCKS = [name for name in SABOTAGES if not name.startswith(OUTSIDE)]


@pytest.fixture(scope="module")
def deep():
    """What each block adds is small, so that a wrong eps shows in the last as in the first."""
    model = random_gpt2(n_layer=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name or "wte" in name or "wpe" in name:
                parameter *= 0.1
    return subject(model, name="official, 5 blocks")


def with_blocks_of(reference, change, blocks):
    """The book's copy of the reference, with these blocks taken from a sabotaged copy."""
    model, wrong = book_copy(reference), book_copy(reference)
    change(wrong)
    for n in blocks:
        model.trf_blocks[n] = wrong.trf_blocks[n]
    return model


WHICH = {"middle": [2], "last": [4], "two": [1, 3]}
# NaN hides all that comes after it.
CASES = [(name, which) for name in IN_BLOCKS for which in WHICH if "NaN" not in name or which != "two"]


@pytest.mark.parametrize(("sabotage", "which"), CASES)
@pytest.mark.long
def test_names_the_mistake_and_the_blocks_that_have_it(deep, sabotage, which):
    (name, change), blocks = SABOTAGES[sabotage], WHICH[which]
    found = diagnosis_of(deep, with_blocks_of(deep, change, blocks))
    assert found.names == [name], found
    assert found.faults[0].blocks == blocks
    told, number = ("in blocks 1 and 3", "{1,3}") if which == "two" else (f"in block {blocks[0]} only", blocks[0])
    if "NaN" not in sabotage or which == "last":
        assert found.faults[0].says.endswith(told)
    assert f"trf_blocks.{number}" in found.faults[0].where
    assert found.explained
    assert found.faults[-1].error <= FLOAT64_STAGE


def test_healthy_blocks_of_another_copy_are_no_mistake(deep):
    assert diagnosis_of(deep, with_blocks_of(deep, lambda model: None, [1, 3])) is None


def moved(model, sabotage, blocks):
    """Puts the named blocks of a sabotaged copy into the model."""
    wrong = copy.deepcopy(model)
    sabotage(wrong)
    for n in blocks:
        model.trf_blocks[n] = wrong.trf_blocks[n]


gelu_everywhere, no_scale = each_block(exact_gelu), scaled_by(lambda att: 1.0)


@pytest.mark.parametrize(
    ("mistakes", "titles"),
    [
        ([(gelu_everywhere, [1]), (no_scale, [3])], ["exact-gelu in block 1", "missing-scale in block 3"]),
        ([(gelu_everywhere, [0]), (no_scale, [1])], ["exact-gelu in block 0", "missing-scale in block 1"]),
        ([(gelu_everywhere, [0, 1, 2]), (each_block(relu), [4])],
         ["exact-gelu in blocks 0 to 2", "wrong-activation in block 4"]),
        ([(gelu_everywhere, range(5)), (no_scale, [3])], ["exact-gelu", "missing-scale in block 3"]),
        ([(not_transposed, [1]), (unbiased, [3])], ["not-transposed in block 1", "unbiased-variance in block 3"]),
        ([(loaded_permuted, [0, 4]), (reshaped, [2])], ["qkv-order in blocks 0 and 4", "not-transposed in block 2"]),
        ([(block_forward(post_norm), [2]), (final_norm_forgotten, [])], ["post-norm in block 2", "missing-final-norm"]),
    ],
)  # fmt: skip
def test_names_several_mistakes_of_several_blocks(deep, mistakes, titles):
    model = book_copy(deep)
    for sabotage, blocks in mistakes:
        moved(model, sabotage, blocks) if blocks else sabotage(model)
    found = diagnosis_of(deep, model)
    assert sorted(fault.title for fault in found.faults) == sorted(titles)
    assert found.explained
    assert found.faults[-1].error <= FLOAT64_STAGE
    assert not found.faults[0].error <= FLOAT64_STAGE


def test_a_known_mistake_is_named_behind_a_block_with_an_unknown_one(deep):
    model = book_copy(deep)
    attend(model.trf_blocks[1], cubed)
    exact_gelu(model.trf_blocks[4])
    found = diagnosis_of(deep, model)
    assert [fault.title for fault in found.faults] == ["exact-gelu in block 4"]
    assert not found.explained
    assert "in block 1, at trf_blocks.1.att.weights" in found.note


def test_a_norm_that_is_wrong_only_behind_the_blocks_or_only_in_them(deep):
    model = book_copy(deep)
    unbiased(model.final_norm)
    assert diagnosis_of(deep, model).faults[0].says.endswith(", in the final norm only")
    moved(model, unbiased, range(5))
    assert diagnosis_of(deep, model).faults[0].title == "unbiased-variance"
    found = diagnosis_of(deep, with_blocks_of(deep, unbiased, range(5)))
    assert found.faults[0].says.endswith(", in norm1 and norm2 only")


def test_a_mistake_that_cannot_show_in_some_blocks_is_not_said_to_be_missing_there(official, deep):
    # Each block adds so much that the norms behind it hide such an eps: what all may have, the model has.
    for blocks in ([0], range(3)):
        found = diagnosis_of(official, with_blocks_of(official, wrong_eps(1e-6), blocks))
        assert found.faults[0].title == "wrong-eps"
    # NaN from block 1 on.
    found = diagnosis_of(deep, with_blocks_of(deep, attention(hiding(0)), [1]))
    assert found.faults[0].says.endswith(", in block 1; in blocks 2 to 4 it makes no difference")


@pytest.mark.parametrize("blocks", [[3], [1, 2], range(5)])
def test_dropout_that_was_left_on_in_some_blocks(deep, blocks):
    model = book_copy(deep)
    for n in blocks:
        model.trf_blocks[n].train()
    exact_gelu(model.trf_blocks[2])
    found = diagnosis_of(deep, model)
    titles = {(3,): "dropout-on in block 3", (1, 2): "dropout-on in blocks 1 and 2"}
    assert [fault.title for fault in found.faults] == [titles.get(tuple(blocks), "dropout-on"), "exact-gelu in block 2"]


@pytest.mark.parametrize("n", [0, 2, 4])
def test_one_block_of_a_class_whose_blocks_are_no_calls(deep, n):
    """Then nothing is recorded between the blocks, and they are looked at together."""
    candidate = readers_model(deep, RawGPT, RAW_MAP)
    for norm in (candidate.module.stack[n].before, candidate.module.stack[n].behind):
        norm.scale, norm.shift, norm.eps = norm.gain, norm.offset, 1e-5
        unbiased_forward(norm)
    found = verdict_of(deep, candidate)
    assert [fault.title for fault in found.faults] == [f"unbiased-variance in block {n}"]


@pytest.mark.long
def test_one_block_of_a_black_box(deep):
    model = with_blocks_of(deep, each_block(exact_gelu), [3])
    found = verdict_of(deep, boxed(deep, model, {name: name for name in model.state_dict()}))
    assert [fault.title for fault in found.faults] == ["exact-gelu in block 3"]


def sabotaged(*changes):
    def sabotage(model):
        for change in changes:
            change(model)

    return sabotage


# Pairs at one place (the attention weights) have no stage between them that could agree: there pairs are searched.
TWO = {
    "weights and forward": ([not_transposed, each_block(exact_gelu)], ["not-transposed", "exact-gelu"]),
    "two in the weights": ([zero_biases, not_transposed], ["not-transposed", "missing-bias"]),
    "two in the forward pass": ([wrong_eps(1e-6), scaled_by(lambda att: 1.0)], ["wrong-eps", "missing-scale"]),
    "both in one norm": ([torch_std], ["unbiased-variance", "eps-outside-root"]),
    "both in one softmax": (
        [attention(lambda m, s: s.masked_fill(torch.ones(s.shape[-2:]).triu(2).bool(), -math.inf).softmax(-1))],
        ["missing-scale", "mask-sees-ahead"],
    ),
    "dropout and another": ([nn.Module.train, each_block(exact_gelu)], ["dropout-on", "exact-gelu"]),
    "early and late": ([positions_from(1), final_norm_forgotten], ["off-by-one-positions", "missing-final-norm"]),
    "three": (
        [wrong_eps(1e-6), not_transposed, returns(lambda x: x.log_softmax(-1))],
        ["wrong-eps", "not-transposed", "not-logits"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("faults", TWO)
def test_names_several_mistakes_in_execution_order(official, faults):
    changes, names = TWO[faults]
    model = book_copy(official)
    sabotaged(*changes)(model)
    found = diagnosis_of(official, model)
    assert found.names == names, found
    assert found.explained
    assert found.faults[-1].error <= FLOAT64_STAGE
    assert not found.faults[0].error <= FLOAT64_STAGE


class BlackBox(nn.Module):
    """A model of which nothing can be recorded: it hides its modules, and computes with copies of its parameters."""

    def __init__(self, model):
        super().__init__()
        self.inner = [model]
        self.mine = nn.ParameterDict({n.replace(".", "/"): p for n, p in model.named_parameters()})

    def forward(self, ids):
        mine = {name.replace("/", "."): p.clone() for name, p in self.mine.items()}
        return torch.func.functional_call(self.inner[0], mine, (ids, ids) if self.takes_targets else (ids,))

    @property
    def takes_targets(self):
        return isinstance(self.inner[0], FusedGPT)


def boxed(reference, model, names):
    """The black box of a model whose parameters' names are `names` -> those of the table."""
    mapping = {f"mine.{name.replace('.', '/')}": target for name, target in names.items()}
    return subject(BlackBox(model), reference.config, "box", mapping)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ([each_block(exact_gelu)], ["exact-gelu"]),
        ([scaled_by(lambda att: 1.0)], ["missing-scale"]),
        ([each_block(exact_gelu), unbiased], ["unbiased-variance", "exact-gelu"]),
    ],
)
def test_black_boxes_are_diagnosed_by_attention_weights_and_logits(official, changes, names):
    model = book_copy(official)
    sabotaged(*changes)(model)
    candidate = boxed(official, model, {name: name for name in model.state_dict()})
    comparison = compare_models(official, candidate, random_ids())
    assert {stage.meaning for stage in comparison.stages} == {"attention weights", "logits"}
    assert diagnose(comparison, official, candidate).names == names


@pytest.mark.long
def test_black_boxes_are_diagnosed_by_logits_alone(official, monkeypatch):
    reader = readers_model(official, FusedGPT)
    # A fused tensor goes by GPT-2's name; the others by the book's, which says that they are stored [out, in].
    names = {m.row.theirs: m.row.ours[0] for m in reader.matches if len(m.row.ours) == 1}
    names |= {m.row.theirs: m.row.theirs.removeprefix("transformer.") for m in reader.matches if len(m.row.ours) == 3}
    del names["lm_head.weight"]
    candidate = boxed(official, reader.module, names)
    assert verdict_of(official, candidate) is None
    gelu, kernel = F.gelu, F.scaled_dot_product_attention
    monkeypatch.setattr("readers.F.gelu", lambda x, approximate="none": gelu(x))
    comparison = compare_models(official, candidate, random_ids())
    assert [stage.stage for stage in comparison.stages] == ["out_head"]
    assert diagnose(comparison, official, candidate).names == ["exact-gelu"]
    changed = lambda q, k, v, is_causal: kernel(q, k, v, is_causal=False)  # noqa: E731
    monkeypatch.setattr("readers.F.scaled_dot_product_attention", changed)
    found = verdict_of(official, candidate)
    assert found.names == ["no-mask", "exact-gelu"]
    assert found.explained


def renormalised(module, scores):
    """The book's first way to mask, which is right: after softmax, and each row divided by its sum."""
    weights = (scores / module.head_dim**0.5).softmax(-1).masked_fill(future(scores), 0.0)
    return weights / weights.sum(-1, keepdim=True)


def test_a_healthy_stage_that_differs_hides_no_mistake(official):
    model = book_copy(official)
    attention(renormalised)(model)
    assert diagnosis_of(official, model) is None
    each_block(exact_gelu)(model)
    assert diagnosis_of(official, model).names == ["exact-gelu"]


def readers_model(reference, model_class, mapping=None):
    cfg = book_settings(reference.config)
    model = (model_class(**{name: cfg[name] for name in SIZES}) if model_class is RawGPT else model_class(cfg)).eval()
    candidate = subject(model, reference.config, model_class.__name__, mapping)
    copy_weights(reference, candidate)
    return candidate


def verdict_of(reference, candidate):
    comparison = compare_models(reference, candidate, random_ids())
    return diagnose(comparison, reference, candidate)


def test_a_bare_matrix_that_is_multiplied_the_wrong_way_round(official):
    right = {name: target.removesuffix(".T") for name, target in RAW_MAP.items()}
    assert verdict_of(official, readers_model(official, RawGPT, RAW_MAP)) is None
    # Loaded as nn.Linear has them, but x @ w is what the class computes.
    found = verdict_of(official, readers_model(official, RawGPT, right))
    assert found.names == ["not-transposed"]
    assert found.explained


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (dict(is_causal=False), ["no-mask"]),
        (dict(scale=1.0), ["missing-scale"]),
        (dict(is_causal=False, scale=1.0), ["missing-scale", "no-mask"]),
        (dict(dropout_p=0.1), ["dropout-on"]),
    ],
)
def test_what_happens_inside_a_fused_kernel_is_told_from_what_comes_out(official, monkeypatch, options, names):
    candidate = readers_model(official, FusedGPT)
    kernel = F.scaled_dot_product_attention
    changed = lambda q, k, v, **told: kernel(q, k, v, **told | options)  # noqa: E731
    monkeypatch.setattr("readers.F.scaled_dot_product_attention", changed)
    found = verdict_of(official, candidate)
    assert sorted(found.names) == sorted(names)
    assert found.explained


def test_swapped_parts_of_a_fused_matrix_are_named(official):
    candidate = readers_model(official, FusedGPT)
    for block in candidate.module.transformer["h"]:
        for parameter in block.attn["c_attn"].parameters():
            q, k, v = parameter.data.chunk(3)
            parameter.data = torch.cat([k, q, v])
    assert verdict_of(official, candidate).names == ["qkv-order"]


def test_a_healthy_model_gives_no_diagnosis(official, untied):
    for reference in (official, untied):
        assert diagnosis_of(reference, book_copy(reference)) is None
        assert diagnosis_of(reference, GPTScratchForCausalLM.from_gpt2(reference.module)) is None
        assert diagnosis_of(reference, reference.module) is None


def test_an_unknown_mistake_is_not_given_a_name(official):
    model = book_copy(official)
    attention(cubed)(model)
    found = diagnosis_of(official, model)
    assert found.names == []
    assert not found.explained
    assert "trf_blocks.0.att.weights" in found.note


def test_weights_of_another_checkpoint_are_called_so(official):
    found = diagnosis_of(official, book_copy(subject(random_gpt2(seed=1))))
    assert found.names == ["other-weights"]
    assert found.explained


def test_a_model_that_is_random_without_dropout_is_called_random(official):
    model = book_copy(official)
    returns(lambda x: x + torch.randn_like(x))(model)
    found = diagnosis_of(official, model)
    assert (found.names, found.explained) == ([], False)
    assert "random" in found.note


def test_a_reference_that_is_no_gpt2_is_refused(official):
    model = book_copy(official)
    returns(torch.tanh)(model)
    reference = subject(model, official.config, "reference")
    reference.config = official.config
    candidate = subject(book_copy(official), official.config, "candidate")
    comparison = compare_models(reference, candidate, random_ids())
    found = diagnose(comparison, reference, candidate)
    assert (found.names, found.explained) == ([], False)
    assert "reference" in found.note


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(activation_function="relu", layer_norm_epsilon=1e-3),
        dict(scale_attn_weights=False, n_inner=100),
        dict(scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False),
    ],
)
def test_the_simulation_without_mistakes_is_the_official_model(changes):
    gpt2 = random_gpt2(**changes).double()
    reference = subject(gpt2)
    weights, ids = reference.weights(), random_ids()
    with torch.no_grad():
        logits = Forward(weights, reference.config, ids, {})["out_head"]
        assert relative_error(gpt2(ids).logits, logits) < 1e-12
        unseen = []
        for mistake in mistakes(reference.config):
            if mistake.slots == {"input"}:  # of blocks that are none in block 0
                continue
            edits = {place: dict(mistake.changes) for place in everywhere(reference.config.n_layers)}
            wrong = Forward(weights, reference.config, ids, edits)["out_head"]
            harmless = mistake.name in ("wrong-head",) and reference.config.tie_word_embeddings
            harmless |= not reference.config.scale_attn_weights and mistake.name == "missing-scale"
            harmless |= mistake.slots == {"W_key.bias"}  # softmax does not see what is added to a whole row
            harmless |= reference.config.scale_attn_by_inverse_layer_idx and "layer" in mistake.says
            least = 1e-12 if mistake.name == "wrong-eps" else FLOAT64_STAGE
            if not harmless and relative_error(logits, wrong) < least:
                unseen.append(mistake)
    assert unseen == []


def test_two_official_models_are_diagnosed_too(official):
    other = random_gpt2(n_head=8)
    other.load_state_dict(official.module.state_dict())
    found = diagnosis_of(official, other)
    assert found.names == ["wrong-n-heads"]
    assert isinstance(other, GPT2LMHeadModel)


def test_a_diagnosis_becomes_json(official):
    model = book_copy(official)
    not_transposed(model)
    figures = json.loads(json.dumps(diagnosis_of(official, model).to_dict()))
    assert figures["faults"][0]["where"] == "trf_blocks.{0…2}.att.out_proj.weight"
    assert GPTScratchConfig.from_gpt2(official.module.config).vocab_size == VOCAB
