"""What a model is made of, and where its parameters come from."""

import json
import re

import pytest
import torch
from pairs import LAYERS, gpt2_config, random_pair
from transformers import GPT2ForSequenceClassification

from hf_gpt_scratch import GPT_CONFIG_124M, GPTScratchConfig, GPTScratchForCausalLM
from hf_gpt_scratch.errors import UnknownName
from hf_gpt_scratch.lab.explain import explain
from hf_gpt_scratch.lab.inspect import Inspection, arithmetic, inspect
from hf_gpt_scratch.model.heads_gpt_scratch import MODELS
from hf_gpt_scratch.model.modeling_gpt_scratch import GPTScratchBlock
from hf_gpt_scratch.model.weight_map import BASE, DROPPED, LM_HEAD, TABLE


@pytest.fixture(scope="module")
def book() -> Inspection:
    return inspect("book")


def all_steps(steps):
    for step in steps:
        yield step
        yield from all_steps(step.steps)


def test_arithmetic_goes_step_by_step():
    assert arithmetic([(768, 3072), (3072,)]) == "768 × 3,072 + 3,072 = 2,359,296 + 3,072 = 2,362,368"
    assert arithmetic([(2048, 2048)]) == "2,048 × 2,048 = 4,194,304"
    assert arithmetic([(5,), (7,), (0,), (5,)]) == "2 × 5 + 7 = 10 + 7 = 17"
    assert arithmetic([]) == "0"


@pytest.mark.parametrize(
    "module, expected",
    [
        ("model.tok_emb", "50,257 × 768 = 38,597,376"),
        ("model.pos_emb", "1,024 × 768 = 786,432"),
        ("model.trf_blocks.0-11.att.W_query", "768 × 768 = 589,824"),
        ("model.trf_blocks.0-11.att.out_proj", "768 × 768 + 768 = 589,824 + 768 = 590,592"),
        ("model.trf_blocks.0-11.att", "3 × 589,824 + 590,592 = 1,769,472 + 590,592 = 2,360,064"),
        ("model.trf_blocks.0-11.ff.layers.0", "768 × 3,072 + 3,072 = 2,359,296 + 3,072 = 2,362,368"),
        ("model.trf_blocks.0-11.ff.layers.2", "3,072 × 768 + 768 = 2,359,296 + 768 = 2,360,064"),
        ("model.trf_blocks.0-11.ff.layers", "2,362,368 + 2,360,064 = 4,722,432"),
        ("model.trf_blocks.0-11.norm1", "2 × 768 = 1,536"),
        (
            "model.trf_blocks.0-11",
            "2 × 1,536 + 2,360,064 + 4,722,432 = 3,072 + 2,360,064 + 4,722,432 = 7,085,568",
        ),
        ("model.trf_blocks", "12 × 7,085,568 = 85,026,816"),
        ("model.final_norm", "2 × 768 = 1,536"),
        ("out_head", "768 × 50,257 = 38,597,376"),
    ],
)
def test_the_figures_are_those_of_the_tutorials(book, module, expected):
    assert book.tree[module].arithmetic == expected


def test_totals_and_memory_are_those_of_the_tutorials(book):
    assert book.parameters == {"tied": 124_412_160, "untied": 163_009_536}
    assert book.arithmetic["tied"] == "163,009,536 − 38,597,376 = 124,412,160"
    assert book.memory["float32"]["untied"] == 163_009_536 * 4
    assert f"{book.memory['float32']['untied'] / 1024**2:.2f}" == "621.83"
    assert not book.tied


def test_every_arithmetic_comes_out(book):
    for _, node in book.tree.walk():
        for side in node.arithmetic.split(" = "):
            assert eval(side.replace(",", "").replace("×", "*")) == node.parameters


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_class", MODELS, ids=lambda model_class: model_class.__name__)
def test_the_tree_counts_what_the_model_has(model_class, tied):
    config = gpt2_config(tie_word_embeddings=tied, n_inner=70, activation_function="prelu")
    model = model_class(GPTScratchConfig.from_gpt2(config))
    found = inspect(model)
    assert found.tree.parameters == model.num_parameters() == sum(p.numel() for p in model.parameters())
    kind = "all" if model.get_output_embeddings() is None else "tied" if tied else "untied"
    assert found.parameters[kind] == found.tree.parameters
    shapes = [list(p.shape) for p in model.model.trf_blocks[0].parameters()] if hasattr(model, "model") else []
    block = next(node for _, node in found.tree.walk() if node.copies == LAYERS)
    below = [shape for _, node in block.walk() for shape in node.shapes.values()]
    assert not shapes or sorted(shapes) == sorted(below)
    json.dumps(found.to_dict())


@pytest.mark.slow
@pytest.mark.parametrize("save", ["official", "ours", "heads", "config.json"])
def test_a_saved_model_is_read_from_its_config_alone(tmp_path, save):
    if save == "heads":
        model = GPT2ForSequenceClassification(gpt2_config(num_labels=5))
        model.config.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [type(model).__name__]}
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        pair = dict(zip(("official", "ours"), random_pair(), strict=True))
        model = pair.get(save, pair["official"])
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
    found = inspect(tmp_path / "config.json" if save == "config.json" else tmp_path)
    if save != "config.json":
        assert found.kind == ("GPTScratchForSequenceClassification" if save == "heads" else "GPTScratchForCausalLM")
    assert found.tree.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_presets_configs_dicts_and_models_mean_the_same():
    config = GPTScratchConfig.preset("124M")
    found = [inspect(model).tree for model in ("124M", config, config.to_gpt2())]
    assert found[0] == found[1] == found[2]
    assert inspect(GPT_CONFIG_124M).tree == inspect("book").tree
    gpt2, scratch = random_pair()
    assert inspect(gpt2).tree == inspect(scratch).tree == inspect(gpt2.config).tree


def test_a_size_that_there_is_not_is_no_hub_id(monkeypatch):
    monkeypatch.setattr("hf_gpt_scratch.lab.inspect.PreTrainedConfig.get_config_dict", pytest.fail)
    with pytest.raises(ValueError, match=r"got '125M'; did you mean '124M'\?.*no such size"):
        inspect("125M")


@pytest.mark.parametrize("given", ["125M", torch.nn.Linear(2, 2), "there/is/nothing"], ids=str)
def test_what_is_no_model_is_refused_with_a_remedy(given, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="config"):
        inspect(given)


@pytest.mark.parametrize("kind", ["bert", "broken"])
def test_another_model_is_refused(tmp_path, kind):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}' if kind == "bert" else "{")
    with pytest.raises(ValueError, match=r"bert|config\.json"):
        inspect(tmp_path)


def test_steps_are_in_the_order_of_execution_with_their_shapes(book):
    [blocks] = [step for step in book.steps if step.steps]
    assert [step.name for step in book.steps] == [
        *("tok_emb", "pos_emb", "+", "drop_emb", "trf_blocks.0-11", "final_norm", "out_head")
    ]
    attention = [
        "norm1",
        "att.W_query",
        "att.W_key",
        "att.W_value",
        "att.softmax",
        "att.out_proj",
        "drop_shortcut",
        "+",
    ]
    feed_forward = ["norm2", "ff.layers.0", "ff.layers.1", "ff.layers.2", "drop_shortcut", "+"]
    assert [step.name for step in blocks.steps] == attention + feed_forward
    assert (blocks.copies, blocks.gpt2) == (12, "h.0-11")
    shapes = {step.name: step.shape for step in all_steps(book.steps)}
    assert shapes["att.softmax"] == ("B", 12, "T", "T")
    assert shapes["ff.layers.0"] == ("B", "T", 3072)
    assert book.steps[-1].shape == ("B", "T", 50257)
    assert all(step.does or step.steps for step in all_steps(book.steps))


def test_the_words_follow_the_model():
    config = gpt2_config(n_inner=70, activation_function="relu", scale_attn_weights=False, attn_pdrop=0.25, n_head=2)
    found = inspect(config)
    told = found.summary + " ".join(step.does for step in all_steps(found.steps))
    for number in ("64 tokens", "one of 211", "3 transformer blocks", "2 attention heads of 24", "70 wide", "relu"):
        assert number in told
    assert "(not scaled)" in told and "25%" in told and "Norms come before" in told
    layers = inspect(gpt2_config(scale_attn_by_inverse_layer_idx=True))
    assert "in block 0 to" in next(s.does for s in all_steps(layers.steps) if s.name == "att.softmax")


def test_post_norm_and_missing_shortcuts_are_told(monkeypatch):
    def forward(self, x, attention_mask=None, past_key_values=None, **kwargs):
        x, _ = self.att(x, attention_mask, past_key_values, **kwargs)
        x = self.norm1(x) + x
        return self.ff(self.norm2(x))

    monkeypatch.setattr(GPTScratchBlock, "forward", forward)
    assert "Norms come after attention and feed-forward, and a shortcut leads around one" in inspect("book").summary


def test_blocks_that_differ_stay_apart(monkeypatch):
    build = GPTScratchForCausalLM.__init__

    def with_a_wider_block(self, config):
        build(self, config)
        self.model.trf_blocks[1].ff.layers[0] = torch.nn.Linear(48, 192, bias=False)

    monkeypatch.setattr(GPTScratchForCausalLM, "__init__", with_a_wider_block)
    assert [node.name for node in inspect(gpt2_config()).tree["model.trf_blocks"].children] == ["0", "1", "2"]


def test_a_model_of_ones_own_is_inspected_too():
    class WithAGate(GPTScratchForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.out_head = torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.Sigmoid())

        def get_output_embeddings(self):
            return None

    found = inspect(WithAGate(GPTScratchConfig.from_gpt2(gpt2_config(tie_word_embeddings=False))))
    assert [step.does for step in found.steps][-2:] == ["a Linear", "a Sigmoid"]
    assert found.tree["out_head.0"].arithmetic == "48 × 48 + 48 = 2,304 + 48 = 2,352"


def namespaces(gpt2, scratch, layer):
    """The modules that explanations speak of: those of the models and those of one block."""
    theirs = {**gpt2._modules, **gpt2.transformer._modules, **gpt2.transformer.h[layer]._modules}
    return theirs, {**scratch._modules, **scratch.model._modules, **scratch.model.trf_blocks[layer]._modules}


@pytest.mark.slow
@pytest.mark.parametrize("row", [row.at(1) for row in (*BASE, LM_HEAD)], ids=lambda row: row.theirs)
def test_the_code_of_an_explanation_moves_the_weights(row):
    activation = next((name for name in ("prelu", "xielu") if name in row.meaning), "gelu_new")
    gpt2, scratch = random_pair(activation_function=activation, add_cross_attention="cross" in row.theirs)
    theirs, ours = namespaces(gpt2, scratch, 1)
    [found] = explain(row.theirs, gpt2.config)
    moved = [eval(part.value, theirs) for part in found.parts]
    for part, tensor in zip(found.parts, moved, strict=True):
        assert torch.equal(tensor, eval(part.code, ours))
        assert torch.equal(tensor, scratch.state_dict()[part.stored])
        assert list(tensor.shape) == part.shape
    back = eval(found.gpt2_value, {**ours, "torch": torch})
    assert torch.equal(back, eval(found.gpt2_code, theirs))
    assert torch.equal(back, gpt2.state_dict()[found.gpt2_stored])
    assert list(back.shape) == found.gpt2_shape
    assert sum(map(torch.numel, moved)) == int(found.arithmetic.split(" = ")[-1].replace(",", ""))


def test_shifted_slices_would_be_noticed():
    gpt2, scratch = random_pair()
    theirs, ours = namespaces(gpt2, scratch, 0)
    [found] = explain("h.0.attn.c_attn.weight", gpt2.config)
    query, key, _ = found.parts
    assert not torch.equal(eval(query.value, theirs), eval(key.code, ours))
    assert not torch.equal(eval(query.value.removesuffix(".T"), theirs), eval(query.code, ours))


@pytest.mark.parametrize(
    "name",
    [
        "trf_blocks.1.att.W_key.weight",
        "model.trf_blocks.1.att.W_key.weight",
        "model.model.trf_blocks[1].att.W_key.weight",
        "_orig_mod.model.trf_blocks.1.att.W_key.weight",
        " trf_blocks.{n}.att.W_key.weight ",
        "trf_blocks.att.W_key.weight",
        "W_key.weight",
    ],
)
def test_prefixes_and_layer_numbers_do_not_matter(name):
    [found] = explain(name)
    assert found.gpt2.replace("{n}", "1") == "h.1.attn.c_attn.weight"
    [part] = found.parts
    assert part.value == "attn.c_attn.weight[:, 768:1536].T"
    assert part.shape == [768, 768] and found.gpt2_shape == [768, 2304]
    assert ("1" in part.name) is ("1" in name)


def test_a_part_of_a_name_finds_all_that_have_it():
    kinds = ("attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")
    assert [found.gpt2 for found in explain("c_proj")] == [f"h.{{n}}.{kind}" for kind in kinds]
    assert [len(found.parts) for found in explain("c_attn")] == [3, 3]
    assert [found.gpt2 for found in explain("classifier.bias")] == ["classifier.bias"]


@pytest.mark.slow
def test_every_name_has_an_explanation_without_open_braces():
    names = {name for row in TABLE for name in (row.theirs, *row.ours)} | set(DROPPED)
    for name in names:
        for found in explain(name, gpt2_config()):
            assert found.does and found.equation and not re.search(r"\{(?!n\})", found.does + found.equation)
            assert found.parts or name in DROPPED


@pytest.mark.parametrize("name, module", [("tok_emb", "tok_emb"), ("c_fc.weight", None), ("lm_head", "out_head")])
def test_explanations_and_trees_have_the_same_arithmetic(name, module, book):
    [found] = explain(name, "book")
    expected = book.tree["out_head" if module == "out_head" else f"model.{module}"].arithmetic if module else None
    assert found.arithmetic == (expected or "768 × 3,072 = 2,359,296")


def test_what_a_model_lacks_is_said():
    assert "qkv_bias=True" in explain("W_query.bias", "book")[0].note
    assert "prelu" in explain("mlp.act.weight")[0].note
    assert "SequenceClassification" in explain("score")[0].note
    assert "tied" in explain("lm_head")[0].note
    assert not explain("lm_head", "book")[0].note
    assert explain("h.0.attn.bias")[0].parts == ()


@pytest.mark.parametrize(
    "name, near",
    [
        ("W_querry", "W_query"),
        ("w_key", "W_key"),
        ("h.0.attn.c_prj.weight", "h.{n}.attn.c_proj.weight"),
        ("model.final_nrm.scale", "final_norm.scale"),
        ("trf_blocks.3.att.W_kay.weight", "W_key.weight"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name, near):
    with pytest.raises(UnknownName, match=rf"did you mean.*{re.escape(near)}"):
        explain(name)


@pytest.mark.parametrize("name", ["", "model", "xyzzy", "."])
def test_a_name_like_none_gets_the_table(name):
    with pytest.raises(UnknownName, match=r"docs/weights\.md"):
        explain(name)


def test_a_layer_too_many_is_refused():
    with pytest.raises(UnknownName, match="0 to 11"):
        explain("h.12.ln_1.weight")
