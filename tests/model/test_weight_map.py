from pathlib import Path

import pytest
import torch
from pairs import LAYERS, gpt2_config, random_gpt2, random_pair
from transformers.activations import ACT2FN
from transformers.core_model_loading import revert_weight_conversion

from hf_gpt_scratch import (
    GPTModel,
    GPTScratchConfig,
    GPTScratchDoubleHeadsModel,
    GPTScratchForCausalLM,
    GPTScratchForQuestionAnswering,
    GPTScratchForSequenceClassification,
    GPTScratchForTokenClassification,
)
from hf_gpt_scratch.model.weight_map import (
    GPT2_PREFIX,
    SCRATCH_PREFIX,
    TABLE,
    Row,
    markdown,
    rows,
    to_gpt2_state_dict,
    to_scratch_state_dict,
    without_prefix,
)

MODELS = (
    GPTScratchForCausalLM,
    GPTScratchDoubleHeadsModel,
    GPTScratchForSequenceClassification,
    GPTScratchForTokenClassification,
    GPTScratchForQuestionAnswering,
)


def names_on_meta(activation="gelu_new", model_class=GPTScratchForCausalLM, **changes):
    """The names without prefix that both models really have."""
    config = gpt2_config(activation_function=activation, **changes)
    with torch.device("meta"):
        gpt2, scratch = model_class.gpt2_class(config), model_class(GPTScratchConfig.from_gpt2(config))
    return (
        without_prefix(gpt2.state_dict(), GPT2_PREFIX).keys(),
        without_prefix(scratch.state_dict(), SCRATCH_PREFIX).keys(),
    )


@pytest.mark.parametrize("n_layer", [1, 12, 48])
def test_table_is_injective(n_layer):
    sources = [row.theirs for row in rows(n_layer)]
    targets = [name for row in rows(n_layer) for name in row.ours]
    assert len(set(sources)) == len(sources)
    assert len(set(targets)) == len(targets)


@pytest.mark.parametrize("activation", ["gelu_new", "prelu", "xielu"])
@pytest.mark.parametrize("n_layer", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (12, 48))])
@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("cross", [False, True])
def test_table_is_complete_against_both_models(n_layer, activation, model_class, cross):
    gpt2, scratch = names_on_meta(activation, model_class, n_layer=n_layer, add_cross_attention=cross)
    there = [row for row in rows(n_layer) if row.theirs in gpt2]
    assert {row.theirs for row in there} == gpt2
    assert {name for row in there for name in row.ours} == scratch


@pytest.mark.slow
def test_every_row_is_used_by_some_model():
    used = set()
    for activation in ACT2FN:
        for model_class in MODELS:
            used |= names_on_meta(activation, model_class, n_layer=1, add_cross_attention=True)[0]
    assert {row.theirs for row in rows(1)} - {"score.bias"} == used  # of the book's classifier, not official


def test_shapes_follow_the_layout():
    gpt2, scratch = random_pair()
    theirs = without_prefix(gpt2.state_dict(), GPT2_PREFIX)
    ours = without_prefix(scratch.state_dict(), SCRATCH_PREFIX)
    for row in rows(LAYERS):
        if row.theirs in theirs:
            parts = row.to_ours(theirs[row.theirs])
            assert len(parts) == len(row.ours)
            for name, part in zip(row.ours, parts, strict=True):
                assert torch.equal(part, ours[name]), name


def test_fuse_inverts_split():
    for row in TABLE:
        tensor = torch.randn(4, 6 * len(row.ours)) if row.transposed else torch.randn(6 * len(row.ours))
        assert torch.equal(row.to_theirs(row.to_ours(tensor)), tensor)


def test_state_dicts_convert_there_and_back_bit_for_bit():
    theirs = random_gpt2(tie_word_embeddings=False).state_dict()
    ours = to_scratch_state_dict(theirs, LAYERS)
    back = to_gpt2_state_dict(ours, LAYERS)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    with torch.device("meta"):
        book = GPTModel(GPTScratchConfig.from_gpt2(gpt2_config()))
    assert ours.keys() == book.state_dict().keys()


def test_missing_qkv_biases_become_zeros():
    ours = to_scratch_state_dict(random_gpt2().state_dict(), LAYERS)
    biases = ("W_query.bias", "W_key.bias", "W_value.bias")
    without = {name: tensor for name, tensor in ours.items() if not name.endswith(biases)}
    theirs = to_gpt2_state_dict(without, LAYERS)
    assert theirs["transformer.h.1.attn.c_attn.bias"].tolist() == [0.0] * 144


def test_unknown_and_partial_tensors_are_refused_by_name():
    theirs = random_gpt2().state_dict()
    with pytest.raises(ValueError, match=r"adapter\.weight"):
        to_scratch_state_dict({**theirs, "adapter.weight": torch.ones(2, 48)}, LAYERS)
    with pytest.raises(ValueError, match=r"h\.2\."):
        to_scratch_state_dict(theirs, LAYERS - 1)
    ours = to_scratch_state_dict(theirs, LAYERS)
    with pytest.raises(ValueError, match=r"adapter\.weight"):
        to_gpt2_state_dict({**ours, "adapter.weight": torch.ones(2)}, LAYERS)
    del ours["trf_blocks.1.att.W_key.weight"]
    with pytest.raises(ValueError, match=r"h\.1\.attn\.c_attn\.weight needs all of .*W_key\.weight.* only 2"):
        to_gpt2_state_dict(ours, LAYERS)


@pytest.mark.parametrize("activation", ["gelu_new", "prelu"])
def test_the_loaders_patterns_give_the_tables_names_in_both_directions(activation, tmp_path):
    gpt2, scratch = random_pair(activation_function=activation, tie_word_embeddings=False)
    gpt2.save_pretrained(tmp_path)
    loaded = GPTScratchForCausalLM.from_pretrained(tmp_path)
    for model in (scratch, loaded):
        theirs = revert_weight_conversion(model, model.state_dict())
        assert theirs.keys() == gpt2.state_dict().keys()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in gpt2.state_dict().items())


def test_layouts_in_words():
    assert [row.layout for row in TABLE if "attn.c" in row.theirs or "crossattention.c_attn" in row.theirs] == [
        "transposed, split in 3",
        "split in 3",
        "transposed",
        "same",
        "transposed, split in 2",
        "split in 2",
    ]
    assert Row("a", ("b",), False, "").layout == "same"


def test_the_documentation_shows_this_table():
    page = Path(__file__).parents[2] / "docs" / "weights.md"
    assert markdown() in page.read_text(encoding="utf-8")
