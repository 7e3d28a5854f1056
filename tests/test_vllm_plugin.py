"""vLLM's plugin, as far as it can be run without vLLM; `.ci/clients vllm` runs it for real."""

import ast
import sys
import tomllib
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import hf_gpt_scratch


def test_vllm_finds_a_class_for_each_architecture_that_it_can_serve(monkeypatch):
    found = {}
    registry = SimpleNamespace(register_model=found.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [(name, target)] = project["entry-points"]["vllm.general_plugins"].items()
    EntryPoint(name, target, "vllm.general_plugins").load()()
    assert found and all(hasattr(hf_gpt_scratch, architecture) for architecture in found)
    for target in found.values():
        module, _, name = target.partition(":")
        if module.startswith("hf_gpt_scratch"):
            source = Path(find_spec(module).origin).read_text(encoding="utf-8")  # which imports vLLM
            assert name in {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
        else:
            assert module == "vllm.model_executor.models.transformers"
