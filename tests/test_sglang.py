"""What SGLang's Transformers backend does with our models, as its source says: srt/models/transformers.py of 0.5.23.

It does not install beside what is tested here, so its steps are repeated, in one process.
"""

import re

import pytest
import torch
from pairs import LAYERS, random_ids, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModel

from hf_gpt_scratch.model.configuration_gpt_scratch import FEED_FORWARD_STYLE, SHARDED_LOADING
from hf_gpt_scratch.weights.parity import FP32_LOGITS, relative_error

# The styles that it knows, and what it makes of them; any other is an error.
STYLES = {"colwise": "colwise", "rowwise": "rowwise", "embedding_rowwise": "replicate"}
# Beginnings of a checkpoint's names and of its own; the first that fits.
NAMES = {"model.": "model.", "lm_head.": "lm_head.", "": "model."}


class Linear(nn.Module):
    """Its layers are no `nn.Linear`, and may hold a part of the weight."""

    def __init__(self, linear, style):
        super().__init__()
        self.weight, self.bias, self.style = linear.weight, linear.bias, style

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Missing(nn.Identity):
    """What is in another stage of a pipeline: returns the first argument."""

    def forward(self, x, *args, **kwargs):
        return x


class Attention:
    """Keeps keys and values for itself, as an engine does: all are (T, H·D)."""

    def __init__(self, num_heads):
        self.num_heads, self.kept, self.scaling = num_heads, [], None

    def forward(self, query, key, value, forward_batch):
        assert forward_batch == "the batch"
        self.kept.append((key, value))
        whole = [query, *(torch.cat(parts) for parts in zip(*self.kept, strict=True))]
        q, k, v = (x.unflatten(1, (self.num_heads, -1)).transpose(0, 1) for x in whole)
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        return F.scaled_dot_product_attention(q, k, v, mask, scale=self.scaling).transpose(0, 1).flatten(1)


def attend(module, query, key, value, attention_mask, scaling=None, attention_instances=None, forward_batch=None, **_):
    attention = attention_instances[module.layer_idx]
    if scaling is not None:
        attention.scaling = float(scaling)
    flat = [x.transpose(1, 2).reshape(query.shape[-2], -1) for x in (query, key, value)]
    return attention.forward(*flat, forward_batch=forward_batch), None


def loaded(model):
    """The base model as it is built, replaced and filled; and the names in the checkpoint that it does not find."""
    AttentionInterface.register("sglang", attend)
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = "sglang"
    base = AutoModel.from_config(config)
    assert base.is_backend_compatible() and all(getattr(m, "is_causal", True) for m in base.modules())
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            rule = next((rule for rule in base.tp_plan if re.match(rule, name)), None)
            setattr(base.get_submodule(parent), child, Linear(module, base.tp_plan.get(rule)))
    base.set_input_embeddings(nn.Embedding(config.vocab_size, config.hidden_size))
    own = {f"model.{name}": parameter for name, parameter in base.named_parameters()}
    unknown = []
    for name, tensor in model.state_dict().items():
        if name == "out_head.weight" and config.tie_word_embeddings:  # which is in no file then
            continue
        before, after = next(pair for pair in NAMES.items() if name.startswith(pair[0]))
        there = after + name.removeprefix(before)
        if there in own:
            own.pop(there).data.copy_(tensor)
        else:
            unknown.append(name)
    assert not own
    return base.eval(), unknown


def run(base, instances, positions, **inputs):
    """One flat row without a cache; the hidden states, (T, E)."""
    row = dict(position_ids=positions[None], use_cache=False, return_dict=False, forward_batch="the batch")
    return base(**inputs, **row, attention_instances=instances)[0][0]


@torch.no_grad()
def test_a_tied_model_is_served_step_by_step_and_in_stages():
    model = tiny_model(tie_word_embeddings=True, scale_attn_by_inverse_layer_idx=True)
    base, unknown = loaded(model)
    assert not unknown
    ids, positions, states = random_ids(1, 9), torch.arange(9), []
    expected = model(ids).logits[0]
    instances = {layer: Attention(model.config.num_attention_heads) for layer in range(LAYERS)}
    for part in (slice(0, 6), slice(6, 7), slice(7, 9)):
        states.append(run(base, instances, positions[part], input_ids=ids[:, part]))
    assert relative_error(expected, torch.cat(states) @ base.get_input_embeddings().weight.T) < FP32_LOGITS

    instances = {layer: Attention(model.config.num_attention_heads) for layer in range(LAYERS)}
    names = list(base.config.base_model_pp_plan)
    (last, _), cut = loaded(model), names.index("trf_blocks")
    for name in names[:cut]:
        setattr(last, name, Missing())
    for name in names[cut + 1 :]:
        setattr(base, name, Missing())
    last.trf_blocks[0] = base.trf_blocks[1] = base.trf_blocks[2] = Missing()
    hidden = run(base, instances, positions, input_ids=ids)
    hidden = run(last, instances, positions, inputs_embeds=hidden[None])
    assert relative_error(expected, hidden @ model.out_head.weight.T) < FP32_LOGITS


def test_an_untied_head_has_no_place_there():
    _, unknown = loaded(tiny_model(tie_word_embeddings=False))
    assert unknown == ["out_head.weight"]


def test_it_knows_the_styles_of_the_plan_that_its_transformers_has():
    """SGLang 0.5.23 comes with transformers 5.19."""
    model = tiny_model()
    unknown = {style for style in model.model.tp_plan.values() if style not in STYLES}
    assert unknown == ({FEED_FORWARD_STYLE} if SHARDED_LOADING else set())
    if SHARDED_LOADING:
        pytest.skip("its transformers is older than 5.22")
    base, _ = loaded(model)
    styles = {name: STYLES[module.style] for name, module in base.named_modules() if isinstance(module, Linear)}
    for layer in range(LAYERS):
        block = f"trf_blocks.{layer}."
        for name in ("att.W_query", "att.W_key", "att.W_value", "ff.layers.0"):
            assert styles.pop(block + name) == "colwise"
        for name in ("att.out_proj", "ff.layers.2"):
            assert styles.pop(block + name) == "rowwise"
    assert not styles
