"""Two models side by side: what is recorded, what is measured, and whose parameters are whose."""

import json
import math

import pytest
import torch
from pairs import LAYERS, VOCAB, random_gpt2, random_ids, random_pair
from readers import RAW_MAP, FusedGPT, RawGPT
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_gpt_scratch import GPTModel, GPTScratchConfig
from hf_gpt_scratch.errors import LabError
from hf_gpt_scratch.lab.building import book_settings
from hf_gpt_scratch.lab.compare import aligned, compare_models, errors
from hf_gpt_scratch.lab.pairing import match_parameters
from hf_gpt_scratch.lab.subject import REFERENCE, SIZES, copy_weights, load, subject
from hf_gpt_scratch.lab.trace import MODULE_INPUTS, in_dtype, stages, trace
from hf_gpt_scratch.weights.parity import FLOAT64_STAGE, FP32_GRADIENTS, FP32_LOGITS


@pytest.fixture(scope="module")
def pair():
    gpt2, scratch = random_pair()
    return subject(gpt2, name="official"), subject(scratch, name="ours")


def settings(reference):
    return book_settings(reference.config)


def reader(reference, model_class, mapping=None):
    cfg = settings(reference)
    model = (model_class(**{n: cfg[n] for n in SIZES}) if model_class is RawGPT else model_class(cfg)).eval()
    candidate = subject(model, reference.config, model_class.__name__, mapping)
    copy_weights(reference, candidate)
    return candidate


READERS = {"the book's": (GPTModel, None), "fused": (FusedGPT, None), "bare": (RawGPT, RAW_MAP)}


@pytest.fixture(params=READERS)
def candidate(request, pair):
    return reader(pair[0], *READERS[request.param])


def test_all_stages_of_official_and_ours_are_heard_in_execution_order(pair):
    comparison = compare_models(*pair, random_ids())
    assert [stage.stage for stage in comparison.stages] == stages(LAYERS)
    for subject_ in pair:
        heard = [stage for stage in trace(subject_, random_ids()) if "weights" not in stage]
        order = [
            stage for stage in heard if stage.removeprefix("trf_blocks.").lstrip("0123456789.") not in MODULE_INPUTS
        ]
        assert order == [stage for stage in stages(LAYERS) if "weights" not in stage]


def test_the_same_model_is_the_same_in_every_stage(pair):
    comparison = compare_models(*pair, random_ids(), gradients=True, text_ids=random_ids(1, 100))
    assert comparison.same
    assert comparison.dtype == "float64"
    assert comparison.first_divergence is None
    assert all(stage.relative < 1e-13 < stage.float32 or stage.float32 == 0 for stage in comparison.stages[20:])
    assert max(comparison.growth) < 1e-13
    assert len(comparison.growth) == LAYERS
    assert comparison.logits.top1_agreement == 1
    assert comparison.logits.max_kl < 1e-13
    assert max(comparison.gradients.values()) <= FP32_GRADIENTS
    assert comparison.perplexity["reference"] == pytest.approx(comparison.perplexity["candidate"], rel=1e-6)
    assert "rounding" in comparison.verdict


def test_readers_models_are_the_same_model(pair, candidate):
    comparison = compare_models(pair[0], candidate, random_ids())
    assert comparison.same, comparison.verdict
    assert comparison.first_divergence is None
    assert len(comparison.stages) >= 6 * LAYERS


@pytest.mark.parametrize("place", range(LAYERS))
@pytest.mark.parametrize(
    ("tensor", "stage"),
    [
        ("norm1.scale", "norm1"),
        ("att.W_key.weight", "att.W_key"),
        ("att.W_value.bias", "att.W_value"),
        ("att.out_proj.weight", "att.out_proj"),
        ("norm2.shift", "norm2"),
        ("ff.layers.0.bias", "ff.layers.0"),
        ("ff.layers.2.weight", "ff.layers.2"),
    ],
)
def test_the_first_stage_that_diverges_is_that_of_the_tensor_that_was_changed(pair, place, tensor, stage):
    candidate = reader(pair[0], GPTModel)
    with torch.no_grad():
        dict(candidate.module.named_parameters())[f"trf_blocks.{place}.{tensor}"][0] += 1e-3
    comparison = compare_models(pair[0], candidate, random_ids())
    assert comparison.first_divergence.stage == f"trf_blocks.{place}.{stage}"
    assert not comparison.same
    assert max([0.0, *comparison.growth[:place]]) <= 1e-13 < min(comparison.growth[place:])


def test_a_difference_that_float32_hides_shows_in_float64(pair):
    candidate = reader(pair[0], GPTModel)
    with torch.no_grad():
        candidate.module.final_norm.scale *= 1 + 3e-6
    comparison = compare_models(pair[0], candidate, random_ids())
    assert comparison.logits_float32.relative_error < FP32_LOGITS
    assert comparison.logits.relative_error > FLOAT64_STAGE
    assert not comparison.same


def test_models_that_compute_in_float32_are_compared_in_float32(pair):
    class Stubborn(GPTModel):
        def forward(self, ids):
            return super().forward(ids).float()

    comparison = compare_models(pair[0], reader(pair[0], Stubborn), random_ids())
    assert comparison.dtype == "float32"
    assert comparison.same


def test_comparing_leaves_the_models_as_they_were(pair):
    before = [{n: p.clone() for n, p in s.module.named_parameters()} for s in pair]
    attention = [s.module.config._attn_implementation for s in pair]
    compare_models(*pair, random_ids(), gradients=True)
    for subject_, weights in zip(pair, before, strict=True):
        for name, parameter in subject_.module.named_parameters():
            assert torch.equal(parameter, weights[name])
            assert parameter.grad is None
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject_.module.modules())
    assert attention == [s.module.config._attn_implementation for s in pair]


def test_float32_survives_float64_bit_for_bit():
    layer = nn.Linear(3, 5)
    weight = layer.weight.clone()
    with in_dtype(layer, torch.float64):
        assert layer.weight.dtype == torch.float64
    assert torch.equal(layer.weight, weight)


def test_gradients_of_tied_and_untied_heads_are_comparable(pair):
    candidate = reader(pair[0], GPTModel)
    assert candidate.module.out_head.weight is not candidate.module.tok_emb.weight
    gradients = compare_models(pair[0], candidate, random_ids(), gradients=True).gradients
    assert max(gradients.values()) <= FP32_GRADIENTS
    with torch.no_grad():
        candidate.module.final_norm.shift[0] += 0.01
    gradients = compare_models(pair[0], candidate, random_ids(), gradients=True).gradients
    assert max(gradients.values()) > 10 * FP32_GRADIENTS


def test_perplexity_is_exp_of_the_mean_loss(pair):
    ids = random_ids(1, 16)
    perplexity = compare_models(*pair, ids, text_ids=ids).perplexity["reference"]
    with torch.no_grad():
        loss = pair[0].module(ids, labels=ids).loss.item()
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_errors_of_known_tensors():
    a, b = torch.tensor([[3.0, -4.0]]), torch.tensor([[3.0, -3.0]])
    assert errors(a, b)[:3] == pytest.approx((1.0, math.sqrt(0.5), 0.25))
    assert errors(a, torch.tensor([[3.0, math.nan]]))[2] == math.inf
    assert errors(a, torch.zeros(1, 3))[2] == math.inf
    assert "(1, 3) instead of (1, 2)" in errors(a, torch.zeros(1, 3))[3]
    holes = torch.tensor([[3.0, math.nan]])
    assert errors(holes, holes)[2] == 0


def test_shapes_that_mean_the_same_are_aligned():
    positions = torch.randn(5, 8)
    for shape in ((1, 5, 8), (2, 5, 8)):
        assert errors(positions, positions.expand(shape))[2] == 0
    flat = torch.randn(10, 8)
    assert errors(flat.view(2, 5, 8), flat)[2] == 0
    logits = torch.randn(2, 5, 8)
    assert errors(logits, logits[:, -1:])[2] == 0
    assert errors(logits, logits[:, :1])[2] > 0
    assert aligned(torch.randn(2, 4, 5, 5), torch.randn(2, 8, 5, 5)) is None


def test_json_has_every_figure_and_no_nan(pair):
    candidate = reader(pair[0], GPTModel)
    candidate.module.trf_blocks[1].norm1.scale.data[0] = math.nan
    comparison = compare_models(pair[0], candidate, random_ids(), gradients=True)
    figures = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert figures["first_divergence"] == "trf_blocks.1.norm1"
    assert figures["same"] is False
    assert {"growth", "stages", "logits", "logits_float32", "top_tokens", "mapping", "gradients"} <= figures.keys()
    assert figures["stages"][-1]["relative"] == "inf"


def test_other_vocabularies_and_lengths_are_refused(pair):
    other = subject(random_gpt2(vocab_size=VOCAB + 1))
    with pytest.raises(LabError, match="vocabulary"):
        compare_models(pair[0], other, random_ids())
    with pytest.raises(LabError, match="does not run on tokens of shape"):
        compare_models(*pair, random_ids(1, 65))


# Whose parameter is whose


def names_of(matches):
    return {match.row.theirs: match.row.ours for match in matches}


def test_guesses_pair_each_parameter_with_the_right_one(pair):
    reference = pair[0]
    matches = {m.row.theirs: m for m in reader(reference, FusedGPT).matches}
    fused = matches["transformer.h.1.attn.c_attn.weight"]
    assert fused.row.ours == tuple(f"trf_blocks.1.att.{n}.weight" for n in ("W_query", "W_key", "W_value"))
    assert matches["transformer.h.2.ln_2.bias"].row.ours == ("trf_blocks.2.norm2.shift",)
    assert matches["lm_head.weight"].row.ours == ("out_head.weight",)
    bare = {m.row.theirs: m for m in reader(reference, RawGPT, RAW_MAP).matches}
    assert bare["stack.0.wide.weight"].row.ours == ("trf_blocks.0.ff.layers.0.weight",)
    assert bare["stack.0.behind.gain"].row.ours == ("trf_blocks.0.norm2.scale",)
    assert bare["stack.0.wide.weight"].confidence < bare["stack.0.behind.gain"].confidence < 1
    assert bare["stack.1.attention.w_o"].row.transposed
    assert all(match.reason for match in bare.values())


@pytest.mark.parametrize(
    "renamed",
    [
        {"att": "attention", "W_query": "q_proj", "W_key": "k_proj", "W_value": "v_proj", "out_proj": "o_proj"},
        {"att": "self_attn", "W_query": "wq", "W_key": "wk", "W_value": "wv", "out_proj": "wo", "ff": "mlp"},
        {"norm1": "ln1", "norm2": "ln2", "tok_emb": "token_embedding", "pos_emb": "position_embedding"},
        {"trf_blocks": "blocks", "final_norm": "ln_f", "out_head": "lm_head", "ff": "feed_forward"},
        {"tok_emb": "embed_tokens", "att": "attn", "W_query": "query", "W_key": "key", "W_value": "value"},
    ],
)
def test_usual_names_are_known(pair, renamed):
    model = GPTModel(settings(pair[0]))
    for old, new in renamed.items():
        for parent in [module for module in model.modules() if old in module._modules]:
            parent._modules[new] = parent._modules.pop(old)
    back = {new: old for old, new in renamed.items()}
    matches = match_parameters(model, pair[0].config, {})
    assert len(matches) == len(list(model.parameters()))
    for match in matches:
        assert match.row.ours == (".".join(back.get(part, part) for part in match.row.theirs.split(".")),)


def test_conv1d_is_known_to_be_in_out(pair):
    model = GPTModel(settings(pair[0]))
    for block in model.trf_blocks:
        block.att.out_proj = Conv1D(48, 48)
    rows = {m.row.theirs: m.row for m in match_parameters(model, pair[0].config, {})}
    assert rows["trf_blocks.0.att.out_proj.weight"].transposed
    assert not rows["trf_blocks.0.att.W_query.weight"].transposed


def test_what_is_not_certain_is_refused_by_name(pair):
    cfg, config = settings(pair[0]), pair[0].config
    bare = RawGPT(**{n: cfg[n] for n in SIZES})
    assert names_of(subject(bare, config).matches) == names_of(subject(bare, config, mapping=RAW_MAP).matches)
    bare.forward = None  # then nothing shows how the parameters are used
    with pytest.raises(LabError, match=r"words\.weight.*--map FILE"):
        subject(bare, config)
    without = {name: target.removesuffix(".T") for name, target in RAW_MAP.items() if "w_o" not in name}
    with pytest.raises(LabError, match=r"nothing for trf_blocks\.0\.att\.out_proj"):
        subject(bare, config, mapping=without | {"stack.{n}.attention.w_o": None})
    renamed = GPTModel(cfg)
    for block in renamed.trf_blocks:
        block.att.A, block.att.B = block.att.W_query, block.att.W_key
        del block.att.W_query, block.att.W_key  # so that the forward pass fails
    with pytest.raises(LabError, match=r"trf_blocks\.0\.att\.A\.weight"):
        subject(renamed, config)
    told = {"trf_blocks.{n}.att.A.weight": "trf_blocks.{n}.att.W_query.weight"}
    told |= {"trf_blocks.{n}.att.A.bias": "trf_blocks.{n}.att.W_query.bias"}
    matched = names_of(subject(renamed, config, mapping=told).matches)
    assert matched["trf_blocks.2.att.B.weight"] == ("trf_blocks.2.att.W_key.weight",)


def test_square_bare_matrices_need_to_be_told_their_layout(pair):
    cfg, config = settings(pair[0]), pair[0].config
    model = GPTModel(cfg)
    for block in model.trf_blocks:
        weight = block.att.out_proj.weight
        block.att.out_proj = nn.Module()
        block.att.out_proj.weight, block.att.out_proj.bias = weight, nn.Parameter(torch.zeros(48))
    with pytest.raises(LabError, match=r"is square, and nothing shows"):
        subject(model, config)
    for suffix, transposed in (("", False), (".T", True)):
        told = {"trf_blocks.{n}.att.out_proj.weight": f"trf_blocks.{{n}}.att.out_proj.weight{suffix}"}
        rows = {m.row.theirs: m.row for m in subject(model, config, mapping=told).matches}
        assert rows["trf_blocks.1.att.out_proj.weight"].transposed is transposed


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"nothing.weight": "wte.weight"}, "names 'nothing.weight', which the model does not have"),
        ({"tok_emb.weight": "embedding"}, "not a name of the book's or GPT-2's"),
        ({"tok_emb.weight": "wte.weight", "out_head.weight": "wte.weight"}, "several parameters"),
        ({"trf_blocks.{n}.norm1.scale": "h.{n}.mlp.c_fc.bias"}, "has shape"),
    ],
)
def test_wrong_maps_are_refused(pair, mapping, message):
    with pytest.raises(LabError, match=message):
        subject(GPTModel(settings(pair[0])), pair[0].config, mapping=mapping)


def test_other_sizes_are_refused(pair):
    config = pair[0].config
    with pytest.raises(LabError, match="no list of 4 equal blocks"):
        subject(
            GPTModel(settings(pair[0])), GPTScratchConfig(**{n: getattr(config, n) for n in SIZES} | {"n_layers": 4})
        )
    larger = GPTScratchConfig(**{n: getattr(config, n) for n in SIZES} | {"vocab_size": 300}, qkv_bias=True)
    with pytest.raises(LabError, match="tok_emb"):
        subject(GPTModel(settings(pair[0])), larger)


# Loading


def test_checkpoints_classes_and_models_load(pair, tmp_path):
    reference = pair[0]
    reference.module.save_pretrained(tmp_path / "official")
    pair[1].module.save_pretrained(tmp_path / "ours")
    official = load(str(tmp_path / "official"))
    assert compare_models(official, load(str(tmp_path / "ours")), random_ids()).same
    model = reader(reference, GPTModel).module
    torch.save({"model_state_dict": model.state_dict(), "optimizer": {}}, tmp_path / "model.pth")
    (tmp_path / "mine.py").write_text(
        "import helper_of_mine\n"
        "from hf_gpt_scratch import GPTModel\n"
        f"CFG = {dict(settings(reference))!r}\n"
        "def make(cfg):\n    return GPTModel(cfg)\n"
        "ready = GPTModel(CFG)\n"
        "def by_name(emb_dim, n_heads, vocab_size, context_length, n_layers):\n"
        "    return GPTModel({**CFG, 'n_heads': n_heads})\n"
        "def wrong():\n    return 3\n"
        "def failing(cfg):\n    raise ZeroDivisionError('oh')\n"
    )
    (tmp_path / "helper_of_mine.py").write_text("")
    mine = str(tmp_path / "mine.py")
    for name, options in (
        ("make", dict(weights=tmp_path / "model.pth")),
        ("make", dict(weights=tmp_path / "model.pth", cfg="CFG")),
        ("make", dict(weights=REFERENCE)),
        ("by_name", dict(weights=REFERENCE)),
    ):
        candidate = load(f"{mine}:{name}", like=official, **options)
        assert compare_models(official, candidate, random_ids()).same
        assert not candidate.module.training
        assert any("weights" in note for note in candidate.notes)
    for name in ("make", "by_name"):
        candidate = load(f"{mine}:{name}", like=official)
        assert not compare_models(official, candidate, random_ids()).same, "what a function returns is judged"
        assert any("judged with its own weights" in note for note in candidate.notes)
    ready = load(f"{mine}:ready", like=official)
    assert ready.module.training, "a model is taken as it is"
    assert not compare_models(official, ready, random_ids()).same
    for name, message in (
        ("wrong", "a int has no weights"),
        ("failing", "ZeroDivisionError: oh"),
        ("absent", "has no 'absent'"),
    ):
        with pytest.raises(LabError, match=message):
            load(f"{mine}:{name}", like=official)
    with pytest.raises(LabError, match="needs a cfg"):
        load(f"{mine}:make")
    with pytest.raises(LabError, match="neither JSON"):
        load(f"{mine}:make", like=official, cfg="ELSE")
    with pytest.raises(LabError, match="lacks context_length, emb_dim"):
        load(f"{mine}:make", cfg='{"vocab_size": 3}')


def test_weights_that_do_not_fit_are_refused_by_name(pair, tmp_path):
    state = reader(pair[0], GPTModel).module.state_dict()
    (tmp_path / "mine.py").write_text("from hf_gpt_scratch import GPTModel\n")
    file = tmp_path / "model.pth"
    for change, message in (
        (lambda s: s.pop("tok_emb.weight"), r"missing tok_emb\.weight"),
        (lambda s: s.update(new=torch.zeros(1)), "unexpected new"),
        (lambda s: s.update({"pos_emb.weight": torch.zeros(2, 2)}), r"pos_emb\.weight: \(2, 2\) instead of"),
    ):
        changed = dict(state)
        change(changed)
        torch.save(changed, file)
        with pytest.raises(LabError, match=message):
            load(f"{tmp_path / 'mine.py'}:GPTModel", weights=file, like=pair[0])
    file.write_bytes(b"nonsense")
    with pytest.raises(LabError, match="cannot read weights"):
        load(f"{tmp_path / 'mine.py'}:GPTModel", weights=file, like=pair[0])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere", "no directory"),
        ("/nowhere/mine.py:GPT", "there is no file"),
        ("no_such_module:GPT", "does not run"),
    ],
)
def test_sources_that_are_not_there_are_refused(source, message):
    with pytest.raises(LabError, match=message):
        load(source)


def test_checkpoints_of_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(LabError, match="'bert'"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(LabError, match="cannot load"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LabError, match="cannot load"):
        load(str(tmp_path))
