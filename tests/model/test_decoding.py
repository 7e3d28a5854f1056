"""What decoding saves changes no number: the growing cache."""

import copy
import pickle

import pytest
import torch
from pairs import LAYERS, random_ids, random_pair
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_gpt_scratch.model import decoding
from hf_gpt_scratch.model.compat import CACHE
from hf_gpt_scratch.model.decoding import GrowingLayer, growing_cache


def updates(count, batch=2, heads=3, dim=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, batch, heads, 1 + i % 3, dim, generator=generator) for i in range(count)]


@pytest.fixture
def little_room(monkeypatch):
    monkeypatch.setattr(decoding, "ROOM", 4)  # so that it runs out


def test_a_growing_layer_holds_what_transformers_layer_holds(little_room):
    plain, growing = DynamicLayer(), GrowingLayer()
    for keys, values in updates(20):
        for expected, got in zip(plain.update(keys, values), growing.update(keys, values), strict=True):
            assert torch.equal(expected, got)
        assert plain.get_seq_length() == growing.get_seq_length()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-2 if hasattr(layer, "is_croppable") else layer.get_seq_length() - 2),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    ],
    ids=["crop", "repeat", "select", "reorder"],
)
def test_it_stays_so_after_every_change_that_generation_makes(change, little_room):
    layers = [DynamicLayer(), GrowingLayer()]
    for keys, values in updates(6):
        for layer in layers:
            layer.update(keys, values)
    before = layers[1].keys
    copied = before.clone()
    for layer in layers:
        change(layer)
    batch = layers[0].keys.shape[0]
    for keys, values in updates(6, batch):
        (expected, _), (got, _) = (layer.update(keys, values) for layer in layers)
        assert torch.equal(expected, got)
    assert torch.equal(before, copied)  # what was handed out is nobody else's to write to


def test_a_new_token_is_written_beside_the_others_which_are_not_copied():
    layer = GrowingLayer()
    places = set()
    for keys, values in updates(30):
        places.add(layer.update(keys, values)[0].data_ptr())
    assert len(places) == 1
    plain = DynamicLayer()
    kept = [plain.update(keys, values)[0] for keys, values in updates(30)]
    assert len({keys.data_ptr() for keys in kept}) == 30


def test_gradients_flow_through_cached_keys():
    _, ours = random_pair()
    gradients = []
    for cache in (DynamicCache(config=ours.config), growing_cache(ours.config)):
        ours.zero_grad()
        for part in random_ids().split(5, dim=1):
            logits = ours(part, use_cache=True, **{CACHE: cache}).logits
        logits.sum().backward()
        gradients.append(ours.model.tok_emb.weight.grad.clone())
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_forward_and_generate_make_growing_caches_unless_told_otherwise():
    _, ours = random_pair()
    ids = random_ids()
    assert {type(layer) for layer in getattr(ours(ids, use_cache=True), CACHE).layers} == {GrowingLayer}
    options = dict(max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None)
    made = getattr(ours.generate(ids, **options), CACHE)
    assert (type(made), [type(layer) for layer in made.layers]) == (DynamicCache, [GrowingLayer] * LAYERS)
    given = DynamicCache(config=ours.config)
    assert getattr(ours.generate(ids, **{CACHE: given}, **options), CACHE) is given
    assert type(given.layers[0]) is DynamicLayer
    made = getattr(ours.generate(ids, cache_implementation="static", **options), CACHE)
    assert made.layers[0].is_compileable


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@torch.no_grad()
def test_a_copied_cache_is_transformers_own_and_goes_on(duplicate):
    _, ours = random_pair()
    ids = random_ids()
    cache = getattr(ours(ids[:, :-1], use_cache=True), CACHE)
    copied = duplicate(cache)
    assert type(copied.layers[0]) is DynamicLayer
    assert copied.layers[0].keys.untyped_storage().nbytes() < cache.layers[0].keys.untyped_storage().nbytes()
    logits = [ours(ids[:, -1:], **{CACHE: c}).logits for c in (cache, copied)]
    torch.testing.assert_close(*logits)


def test_a_cache_made_in_inference_mode_goes_on_outside_of_it():
    gpt2, ours = random_pair()
    ids = random_ids()
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    continued = []
    for model in (gpt2, ours):
        with torch.inference_mode():
            cache = getattr(model(ids[:, :-1], use_cache=True), CACHE)
        continued.append(model.generate(ids, **{CACHE: cache}, **options))
    assert torch.equal(*continued)
    with torch.inference_mode():
        made_outside = ours(ids[:, :-1], use_cache=True)
    assert torch.equal(continued[1], ours.generate(ids, **{CACHE: getattr(made_outside, CACHE)}, **options))
