"""A model with blocks of its own, from examples/custom_block.py: exact, and independent of this package once saved."""

import importlib
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from pairs import random_gpt2, random_ids, randomize
from remote import run_without_the_package
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from hf_gpt_scratch import GPTModel, GPTScratchForCausalLM, Int8Config, model_card
from hf_gpt_scratch.model import own_code
from hf_gpt_scratch.model.layers import generate_text_simple

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = dict(vocab_size=97, context_length=32, emb_dim=48, n_heads=4, n_layers=3, drop_rate=0.0)


@pytest.fixture(scope="module")
def own():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import custom_block
    finally:
        sys.path.remove(str(EXAMPLES))
    return custom_block


@pytest.fixture
def model(own):
    config = own.RotaryConfig(**SIZES, rope_theta=500.0, bos_token_id=None, eos_token_id=None)
    return randomize(own.RotaryForCausalLM(config)).eval()


def greedy(model, ids, **options):
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, **options)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def test_rotary_scores_depend_on_distances_alone(own):
    """Su et al., RoFormer: the product of a query at m and a key at n is a function of m - n."""
    queries, keys = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(m, n):
        at = [own.rotate(x, torch.tensor([[position]]), 500.0) for x, position in ((queries, m), (keys, n))]
        return (at[0] * at[1]).sum()

    torch.testing.assert_close(score(7, 3), score(25, 21), rtol=1e-4, atol=1e-4)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-2
    torch.testing.assert_close(score(4, 4), (queries * keys).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_keys_are_rotated_before_they_are_cached(model, attention):
    model.set_attn_implementation(attention)
    ids = random_ids(2, 9, vocab_size=97)
    expected = generate_text_simple(lambda ids: model(ids).logits, ids, max_new_tokens=12, context_size=32)
    assert torch.equal(greedy(model, ids), expected)
    rotate = type(model.model.trf_blocks[1].att).at_positions
    type(model.model.trf_blocks[1].att).at_positions = lambda self, heads, **kwargs: heads
    try:
        assert not torch.equal(greedy(model, ids), expected)
    finally:
        type(model.model.trf_blocks[1].att).at_positions = rotate


def test_blocks_are_built_once_and_stay_whole(own, monkeypatch):
    built = []
    monkeypatch.setattr(own.RotaryBlock, "__init__", counted(own.RotaryBlock.__init__, built))
    model = own.RotaryForCausalLM(own.RotaryConfig(**SIZES))
    assert len(built) == 3
    assert "RotaryBlock" in model._no_split_modules
    states = model(random_ids(1, 5, vocab_size=97), output_hidden_states=True).hidden_states
    assert len(states) == 4


def counted(method, calls):
    def wrapper(self, *args):
        calls.append(args)
        return method(self, *args)

    return wrapper


LOAD = """
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.endswith("custom_block"), type(model)
assert model.config.rope_theta == 500.0
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
model.save_pretrained(sys.argv[4])
"""


@pytest.mark.slow
def test_saved_it_loads_where_neither_file_is_installed(own, model, tmp_path):
    before = (EXAMPLES / "custom_block.py").read_text(encoding="utf-8")
    model.save_pretrained(tmp_path / "saved")
    assert (EXAMPLES / "custom_block.py").read_text(encoding="utf-8") == before
    ids = random_ids(2, 9, vocab_size=97)
    torch.save(ids, tmp_path / "ids.pt")
    paths = [tmp_path / name for name in ("saved", "ids.pt", "logits.pt", "again")]
    run_without_the_package(LOAD, *paths, cwd=tmp_path)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=1e-5)
    for name in ("saved", "again"):
        assert "hf_gpt_scratch import" not in (tmp_path / name / "custom_block.py").read_text(encoding="utf-8")
        assert torch.equal(own.RotaryForCausalLM.from_pretrained(tmp_path / name)(ids).logits, expected)


FILES = {
    "__init__.py": "",
    "parts.py": """
from hf_gpt_scratch import GPTScratchBlock, GPTScratchConfig


class PartConfig(GPTScratchConfig):
    model_type = "gpt_part"


class PartBlock(GPTScratchBlock):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.att.scaling = 0.5
""",
    "whole.py": """
from hf_gpt_scratch import GPTScratchForCausalLM

from .parts import PartBlock, PartConfig


class WholeForCausalLM(GPTScratchForCausalLM):
    config_class = PartConfig
    block_class = PartBlock
""",
}
LOAD_WHOLE = """
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert {block.att.scaling for block in model.model.trf_blocks} == {0.5}
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_its_classes_may_lie_in_files_that_import_each_other(tmp_path, monkeypatch, quantized):
    (tmp_path / "own_files").mkdir()
    for name, text in FILES.items():
        (tmp_path / "own_files" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_files"]:
        monkeypatch.delitem(sys.modules, name)
    whole = importlib.import_module("own_files.whole")
    model = whole.WholeForCausalLM(whole.PartConfig(**SIZES)).eval()
    if quantized:  # its quantizer goes along, too
        model.save_pretrained(tmp_path / "float")
        model = whole.WholeForCausalLM.from_pretrained(tmp_path / "float", quantization_config=Int8Config())
    model.save_pretrained(tmp_path / "saved")
    ids = random_ids(2, 9, vocab_size=97)
    torch.save(ids, tmp_path / "ids.pt")
    run_without_the_package(
        LOAD_WHOLE, *(tmp_path / name for name in ("saved", "ids.pt", "logits.pt")), cwd=tmp_path / "saved"
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpoint", ["official", "native"])
def test_weights_that_fit_are_taken_and_others_named(own, tmp_path, caplog, checkpoint):
    gpt2 = random_gpt2(layer_norm_epsilon=1e-3)
    native = checkpoint == "native"
    (GPTScratchForCausalLM.from_gpt2(gpt2) if native else gpt2).save_pretrained(tmp_path)
    logging.getLogger("transformers").addHandler(caplog.handler)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    try:
        model, info = own.RotaryForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
        transformers_logging.set_verbosity(verbosity)
    assert torch.equal(model.model.trf_blocks[2].att.out_proj.weight, gpt2.transformer.h[2].attn.c_proj.weight.T)
    assert {name.rpartition(".")[2] for name in info["missing_keys"]} == {"weight"}
    assert all(".norm" in name for name in info["missing_keys"])
    assert "MISSING" in caplog.text and "pos_emb.weight" in caplog.text
    config = model.config
    assert type(config) is own.RotaryConfig and config.model_type == "gpt_rotary" and config.n_layers == 3
    assert config.layer_norm_epsilon == 1e-3 and config.rope_theta == 10000.0
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["architectures"] == ["RotaryForCausalLM"] and saved["model_type"] == "gpt_rotary"
    assert {value.partition(".")[0] for value in saved["auto_map"].values()} == {"custom_block"}
    with pytest.raises(ValueError, match="of type 'gpt_rotary', but GPTScratchConfig reads only"):
        GPTScratchForCausalLM.from_pretrained(tmp_path / "saved")

    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.trf_blocks.1.att.out_proj.weight" if native else "transformer.h.1.attn.c_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for model\.trf_blocks\.1\.att\.out_proj\.weight"):
        own.RotaryForCausalLM.from_pretrained(tmp_path)


def test_it_is_no_gpt2_and_no_book_model_any_more(own, model, tmp_path):
    with pytest.raises(ValueError, match=r"pos_emb is a linear\.Identity instead of"):
        model.save_as_gpt2(tmp_path / "official")
    assert not (tmp_path / "official").exists()
    told = r"missing: trf_blocks\.0\.norm1\.weight.*convert it, and RotaryForCausalLM\.from_pretrained"
    with pytest.raises(ValueError, match=told):
        own.RotaryForCausalLM.from_book(GPTModel({**SIZES, "qkv_bias": False}).state_dict(), {**SIZES})


def test_heads_of_an_odd_size_are_refused_where_halves_are_rotated(own):
    with pytest.raises(ValueError, match="heads have the odd size 3"):
        own.RotaryForCausalLM(own.RotaryConfig(**{**SIZES, "n_heads": 16}))


def test_the_card_says_what_class_it_is(model):
    card = str(model_card(model))
    assert "# RotaryForCausalLM with the layers" in card and "gpt_rotary" in card
    assert "import RotaryForCausalLM" not in card and "save_as_gpt2" not in card


def test_a_push_while_saving_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"push_to_hub=True, .*custom_block\.py.* model\.push_to_hub"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert not (tmp_path / "saved").exists()


OWN = """
{imports}
from hf_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM


class {name}Config(GPTScratchConfig):
    model_type = "gpt_{name}"


class {name}ForCausalLM(GPTScratchForCausalLM):
    config_class = {name}Config
"""


def own_class(folder, monkeypatch, name, imports="", **others):
    """A model of a class in a file of this folder, with other files beside it."""
    folder.mkdir()
    for other, text in others.items():
        (folder / f"{other}.py").write_text(text)
    (folder / f"{name}.py").write_text(OWN.format(name=name, imports=imports))
    monkeypatch.syspath_prepend(folder.parent)
    module = importlib.import_module(f"{folder.name}.{name}")
    return getattr(module, f"{name}ForCausalLM")(getattr(module, f"{name}Config")(**SIZES))


def test_a_file_of_ones_own_with_a_name_that_ships_is_refused(tmp_path, monkeypatch):
    model = own_class(tmp_path / "taken", monkeypatch, "alpha", "from .layers import GELU", layers="GELU = 1\n")
    with pytest.raises(ValueError, match=r"taken/layers\.py cannot be saved with the model.* rename yours"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_folder_of_ones_own_file_is_no_place_for_the_model(tmp_path, monkeypatch):
    model = own_class(tmp_path / "folder", monkeypatch, "beta")
    source = (tmp_path / "folder" / "beta.py").read_text()
    with pytest.raises(ValueError, match=r"is the folder of beta\.py; save the model in another"):
        model.save_pretrained(tmp_path / "folder")
    assert (tmp_path / "folder" / "beta.py").read_text() == source


@pytest.mark.parametrize("absolute", [False, True])
def test_files_of_ones_own_come_along_if_they_are_imported_relatively(tmp_path, monkeypatch, absolute):
    warnings = []
    monkeypatch.setattr(own_code.logger, "warning", warnings.append)
    name, folder = ("gamma", "whole") if absolute else ("delta", "related")
    imports = f"from {folder}.helper import RATE" if absolute else "from .helper import RATE"
    model = own_class(tmp_path / folder, monkeypatch, name, imports, helper="RATE = 2\n")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "helper.py").is_file() != absolute
    assert ["import them relatively: from .helper import" in text for text in warnings] == [True] * absolute


@pytest.mark.parametrize(
    ("source", "expected", "needed", "left"),
    [
        ("from hf_gpt_scratch import GELU\n", "from .layers import GELU\n", {"layers"}, []),
        ("from hf_gpt_scratch import GELU as G  # why\n", "from .layers import GELU as G\n", {"layers"}, []),
        ("if x:\n    from hf_gpt_scratch.model.layers import (\n        GELU,\n    )\n", None, {"layers"}, []),
        (
            "from hf_gpt_scratch import GPTScratchConfig, GPT_CONFIG_124M\n",
            "from .configuration_gpt_scratch import GPTScratchConfig\nfrom .layers import GPT_CONFIG_124M\n",
            {"configuration_gpt_scratch", "layers"},
            [],
        ),
        (
            "from hf_gpt_scratch import compare, GELU\n",
            "from .layers import GELU\nfrom hf_gpt_scratch import compare\n",
            {"layers"},
            ["hf_gpt_scratch.compare"],
        ),
        ("import hf_gpt_scratch\n", "import hf_gpt_scratch\n", set(), ["hf_gpt_scratch"]),
        ("from hf_gpt_scratch import *\n", "from hf_gpt_scratch import *\n", set(), ["hf_gpt_scratch.*"]),
        (
            "import os; from hf_gpt_scratch import GELU\n",
            "import os; from hf_gpt_scratch import GELU\n",
            set(),
            ["hf_gpt_scratch, on a line with something else"],
        ),
        ("from hf_gpt_scratch_other import GELU\n", "from hf_gpt_scratch_other import GELU\n", set(), []),
        ("from .hf_gpt_scratch import GELU\n", "from .hf_gpt_scratch import GELU\n", set(), []),
    ],
)
def test_imports_of_what_ships_become_relative(source, expected, needed, left):
    expected = "if x:\n    from .layers import GELU\n" if expected is None else expected
    assert own_code.relative_imports(source) == (expected, needed, left)
