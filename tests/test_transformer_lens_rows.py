"""What TransformerLens is told, as far as it can be run without it; `.ci/clients transformer_lens` runs it for real."""

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pairs import random_ids, random_pair
from torch import nn

import hf_gpt_scratch
from hf_gpt_scratch.weights.parity import FP32_LOGITS, relative_error

ROWS = "hf_gpt_scratch.transformer_lens_rows"


class Component(nn.Module):
    """A component of a bridge: the name of a module, and those of modules in it."""

    def __init__(self, name, config=None, submodules=None):
        super().__init__()
        self.name, self.config, self.parts = name, config, submodules or {}
        self.seen = {}
        for hook in ("hook_in", "hook_out", "hook_hidden_states", "hook_attn_scores", "hook_pattern"):
            setattr(self, hook, lambda x, hook=hook: self.seen.setdefault(hook, x))

    @staticmethod
    def _apply_reconstruct_attention_mask(scores, mask, num_keys, num_queries):
        assert scores.shape[2:] == (num_queries, num_keys) == mask.shape[2:]
        return scores + mask


class Adapter:
    def __init__(self, cfg):
        self.cfg = cfg

    def prepare_model(self, hf_model):
        pass


@pytest.fixture
def adapter(monkeypatch):
    """The adapter that is in both tables of a TransformerLens of stubs."""
    tables = {}, {}
    registry = SimpleNamespace(register_adapter=tables[1].__setitem__)
    bridges = ["Attention", "Block", "Embedding", "Linear", "MLP", "Normalization", "PosEmbed", "Unembedding"]
    stubs = {
        "factories.architecture_adapter_factory": dict(
            SUPPORTED_ARCHITECTURES=tables[0], ArchitectureAdapterFactory=registry
        ),
        "conversion_utils.conversion_steps": dict(RearrangeTensorConversion=lambda pattern, **sizes: (pattern, sizes)),
        "conversion_utils.param_processing_conversion": dict(ParamProcessingConversion=lambda tensor_conversion: None),
        "model_bridge.architecture_adapter": dict(ArchitectureAdapter=Adapter),
        "model_bridge.generalized_components": {f"{name}Bridge": Component for name in bridges},
    }
    for name, values in stubs.items():
        whole = f"transformer_lens.{name}"
        for parent in (whole.rsplit(".", 2)[0], whole.rsplit(".", 1)[0]):
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, ModuleType(parent)))
        module = ModuleType(whole)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, whole, module)
        setattr(sys.modules[whole.rsplit(".", 1)[0]], name.rsplit(".", 1)[1], module)
    monkeypatch.delitem(sys.modules, ROWS, raising=False)
    import_module(ROWS)
    monkeypatch.delitem(sys.modules, ROWS)
    for table in tables:
        assert [hasattr(hf_gpt_scratch, architecture) for architecture in table] == [True]
    return tables[0]["GPTScratchForCausalLM"](SimpleNamespace(n_heads=4, use_attn_result=False))


def test_each_component_is_a_module_of_the_model(adapter):
    model = random_pair()[1]
    adapter.prepare_model(model)
    for component in adapter.component_mapping.values():
        whole = model.get_submodule(component.name)
        for part in component.parts.values():
            inner = whole[0].get_submodule(part.name)
            assert all(inner.get_submodule(one.name).weight.ndim == 2 for one in part.parts.values())
            assert type(part) is Component or part.parts.keys() == {"q", "k", "v", "o"}


def test_the_norms_become_torchs_and_the_attention_computes_the_same_with_hooks(adapter):
    gpt2, model = random_pair(attn_implementation="eager")
    model.set_attn_implementation("eager")
    ids = random_ids()
    expected = gpt2(ids).logits
    adapter.prepare_model(model)
    assert sum(type(module) is nn.LayerNorm for module in model.modules()) == 7
    bridge = adapter.component_mapping["blocks"].parts["attn"]
    attention = model.model.trf_blocks[1].att
    bridge.original_component = attention
    bridge.q, bridge.k, bridge.v, bridge.o = (getattr(attention, bridge.parts[name].name) for name in "qkvo")
    model.model.trf_blocks[1].att = bridge
    assert relative_error(expected, model(ids).logits) <= FP32_LOGITS
    pattern, scores = bridge.seen["hook_pattern"], bridge.seen["hook_attn_scores"]
    torch.testing.assert_close(scores.softmax(-1), pattern)
    torch.testing.assert_close(gpt2(ids, output_attentions=True).attentions[1], pattern, rtol=1e-4, atol=1e-5)
