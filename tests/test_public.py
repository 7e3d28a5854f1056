"""The package's face: everything is importable from it, and what 0.1.0's README imported still is, with a warning."""

import ast
import graphlib
import importlib
import pickle
import sys
import warnings
from pathlib import Path

import pytest
from forks import run_python

import hf_gpt_scratch
from hf_gpt_scratch.moved import MOVED

SAMPLE = ("int8", "parity")
PACKAGE = Path(hf_gpt_scratch.__file__).parent


@pytest.mark.parametrize("name", hf_gpt_scratch.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name):
    value = getattr(hf_gpt_scratch, name)
    assert name in dir(hf_gpt_scratch)
    assert value.__doc__ or not callable(value)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'converts'"):
        hf_gpt_scratch.converts  # noqa: B018


@pytest.mark.slow
def test_the_import_brings_models_only():
    script = "import sys, hf_gpt_scratch; print(*(m for m in sys.modules if m.startswith('hf_gpt_scratch.')))"
    loaded = run_python("-c", script).stdout.split()
    assert {name.split(".")[1] for name in loaded} == {"errors", "model", "moved", "version"}


def test_errors_are_of_one_family():
    errors = [value for value in vars(hf_gpt_scratch).values() if isinstance(value, type) and "Error" in value.__name__]
    assert len(errors) >= 4 and all(issubclass(error, hf_gpt_scratch.GPTScratchError) for error in errors)


def test_imports_go_one_way():
    """model ← weights ← lab ← cli, and no circle among the modules."""
    rooms = {"errors": 0, "version": 0, "model": 0, "tokenizer": 1, "weights": 1, "lab": 2, "cli": 3}
    arrows = {}
    for file in PACKAGE.rglob("*.py"):
        *place, stem = file.relative_to(PACKAGE).with_suffix("").parts  # formats/ is a package in a room
        nodes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ImportFrom) and node.level]
        if not place or (stem == "__init__" and len(place) == 1):
            continue
        room = place[0]
        arrows[".".join(place if stem == "__init__" else [*place, stem])] = targets = []
        for node in nodes:
            path = [*place[: len(place) + 1 - node.level], *filter(None, (node.module or "").split("."))]
            targets += [".".join(path)] if len(path) > 1 else [f"{path[0]}.{alias.name}" for alias in node.names]
            assert rooms[path[0]] <= rooms[room], f"{'/'.join(place)}/{file.name} imports {'.'.join(path)}"
            assert room != "model" or path[0] == "model", f"{file.name} could not travel with a saved model"
    assert len(arrows) > 35
    graphlib.TopologicalSorter(arrows).prepare()  # or CycleError


@pytest.mark.slow
@pytest.mark.parametrize(
    "old",
    [
        "from hf_gpt_scratch.formats import export_checkpoint, import_checkpoint",
        "from hf_gpt_scratch import formats; formats.import_checkpoint, formats.ConversionError",
        "from hf_gpt_scratch.conversion import ConversionError, gpt2_to_scratch",
        "from hf_gpt_scratch.modeling_gpt_scratch import GPTScratchForCausalLM as C; import hf_gpt_scratch as h; "
        "assert C is h.GPTScratchForCausalLM",
        *(f"import hf_gpt_scratch.{name}" for name in SAMPLE),
        "import hf_gpt_scratch.model_card; hf_gpt_scratch.model_card.model_card",
        "from hf_gpt_scratch.model_card import model_card",
        "from hf_gpt_scratch.tokenizer import gpt2_tokenizer",
    ],
)
def test_imports_of_0_1_0_work_and_say_where_things_are(old):
    still = "import hf_gpt_scratch; assert all(map(callable, (hf_gpt_scratch.model_card, hf_gpt_scratch.convert)))"
    done = run_python("-c", f"{old}\n{still}")
    assert done.returncode == 0, done.stderr
    assert "has moved" in done.stderr or "tokenizer" in old


def test_every_module_of_0_1_0_that_moved_is_one_module_under_both_names():
    for old, new in MOVED.items():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            sys.modules.pop(old, None)
            assert importlib.import_module(old) is importlib.import_module(new)
        assert [str(one.message) for one in told if "has moved to " + new in str(one.message)]
        assert sys.modules[new].__spec__.name == new
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hf_gpt_scratch.nowhere")


@pytest.mark.filterwarnings("ignore:.*has moved to:FutureWarning")
def test_a_model_that_was_pickled_by_0_1_0_is_found():
    assert pickle.loads(b"chf_gpt_scratch.layers\nGPTModel\n.") is hf_gpt_scratch.GPTModel
