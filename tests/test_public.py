"""The package's face: everything is importable from it, and what 0.1.0's README imported still is, with a warning."""

import ast
import graphlib
import importlib
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from forks import run_python

import hf_gpt_scratch
from hf_gpt_scratch.moved import MOVED

SAMPLE = ("int8", "parity")
PACKAGE = Path(hf_gpt_scratch.__file__).parent
SAVED = Path(__file__).parent / "fixtures" / "saved-by-0.1.0"


@pytest.mark.parametrize("name", hf_gpt_scratch.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name):
    value = getattr(hf_gpt_scratch, name)
    assert name in dir(hf_gpt_scratch)
    assert value.__doc__ or not callable(value)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'converts'"):
        hf_gpt_scratch.converts  # noqa: B018


def printed_by(script, **options):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, **options).stdout


def test_the_import_brings_no_library():
    loaded = printed_by("import sys, hf_gpt_scratch; print(*sys.modules)").split()
    ours = {name.split(".")[1] for name in loaded if name.startswith("hf_gpt_scratch.")}
    assert ours == {"errors", "moved", "registration", "version"}
    assert not {"torch", "transformers", "numpy", "huggingface_hub"} & set(loaded)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import hf_gpt_scratch, transformers",
        "import transformers, hf_gpt_scratch",
        "from transformers import AutoModelForCausalLM; import hf_gpt_scratch",
        "import hf_gpt_scratch, transformers.models.gpt2",
        "import hf_gpt_scratch, importlib.util; importlib.util.find_spec('transformers')",
        "import hf_gpt_scratch.weights.hub",  # of ours the first that imports transformers
        "import hf_gpt_scratch.model.layers",
        "from hf_gpt_scratch import gpt2_tokenizer",
    ],
)
@pytest.mark.long
def test_auto_classes_know_the_models_whichever_is_imported_first(imports):
    load = f"print(type(AutoModelForCausalLM.from_pretrained({str(SAVED)!r})).__module__)"
    told = printed_by(f"{imports}\nfrom transformers import AutoModelForCausalLM\n{load}")
    assert told == "hf_gpt_scratch.model.modeling_gpt_scratch\n"


@pytest.mark.slow
def test_the_import_of_transformers_stays_as_it_is_but_for_the_registration():
    script = """
import importlib.resources, sys, hf_gpt_scratch
def hooks():
    return [one.name for one in sys.meta_path if type(one).__module__.startswith("hf_gpt_scratch.registration")]
assert {name.partition(".")[0] for name in hooks()} == {"peft", "transformer_lens", "transformers"}
import transformers
assert "transformers" not in hooks() and "peft.utils.constants" in hooks() and "peft" not in sys.modules
print(type(transformers.__spec__.loader).__name__, (importlib.resources.files(transformers) / "py.typed").is_file())
print("_LazyModule" in transformers.__spec__.loader.get_source("transformers"))
"""
    assert printed_by(script) == "SourceFileLoader True\nTrue\n"


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["import hf_gpt_scratch, peft", "import peft, hf_gpt_scratch"])
@pytest.mark.long
def test_peft_knows_the_models_whichever_is_imported_first(imports):
    script = f"""
{imports}
import sys
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as rows
print(*rows["gpt_scratch"])
hooks = [one.name for one in sys.meta_path if type(one).__module__.startswith("hf_gpt_scratch.registration")]
print(*(name for name in hooks if name.startswith("peft")))
"""
    assert printed_by(script) == "W_query W_key W_value\n\n"


@pytest.mark.slow
def test_two_threads_import_both_packages():
    script = """
import threading, hf_gpt_scratch
done = []
def one():
    import transformers
    done.append("transformers")
def other():
    from hf_gpt_scratch import GPTScratchForCausalLM
    done.append("ours")
threads = [threading.Thread(target=work) for work in (one, other)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*done)
"""
    assert sorted(printed_by(script).split()) == ["ours", "transformers"]


@pytest.mark.slow
def test_models_that_do_not_import_are_told_at_every_import_of_transformers():
    script = """
import sys, hf_gpt_scratch
sys.modules["hf_gpt_scratch.model.layers"] = None
for _ in range(2):
    try:
        import transformers
    except ImportError as error:
        print(error.name)
"""
    assert printed_by(script) == "hf_gpt_scratch.model.layers\n" * 2


def test_errors_are_of_one_family():
    errors = [value for value in vars(hf_gpt_scratch).values() if isinstance(value, type) and "Error" in value.__name__]
    assert len(errors) >= 4 and all(issubclass(error, hf_gpt_scratch.GPTScratchError) for error in errors)


def test_imports_go_one_way():
    """model ← weights ← lab ← cli, and no circle among the modules."""
    rooms = {"template": -1, "errors": 0, "version": 0, "model": 0, "tokenizer": 1, "weights": 1, "lab": 2, "cli": 3}
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
