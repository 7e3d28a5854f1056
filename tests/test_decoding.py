"""What decoding saves changes no number: the growing cache and the order of weights in memory."""

import copy
import pickle

import pytest
import torch
from pairs import LAYERS, random_ids, random_pair
from safetensors.torch import save_file
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_gpt_scratch import GPTScratchForCausalLM, GPTScratchModel, decoding
from hf_gpt_scratch.decoding import GrowingLayer, growing_cache, order_for_decoding, order_for_training

QKV = ("W_query", "W_key", "W_value")


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
            logits = ours(part, past_key_values=cache, use_cache=True).logits
        logits.sum().backward()
        gradients.append(ours.model.tok_emb.weight.grad.clone())
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_forward_and_generate_make_growing_caches_unless_told_otherwise():
    _, ours = random_pair()
    ids = random_ids()
    assert {type(layer) for layer in ours(ids, use_cache=True).past_key_values.layers} == {GrowingLayer}
    options = dict(max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None)
    made = ours.generate(ids, **options).past_key_values
    assert (type(made), [type(layer) for layer in made.layers]) == (DynamicCache, [GrowingLayer] * LAYERS)
    given = DynamicCache(config=ours.config)
    assert ours.generate(ids, past_key_values=given, **options).past_key_values is given
    assert type(given.layers[0]) is DynamicLayer
    assert ours.generate(ids, cache_implementation="static", **options).past_key_values.layers[0].is_compileable


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@torch.no_grad()
def test_a_copied_cache_is_transformers_own_and_goes_on(duplicate):
    _, ours = random_pair()
    ids = random_ids()
    cache = ours(ids[:, :-1], use_cache=True).past_key_values
    copied = duplicate(cache)
    assert type(copied.layers[0]) is DynamicLayer
    assert copied.layers[0].keys.untyped_storage().nbytes() < cache.layers[0].keys.untyped_storage().nbytes()
    logits = [ours(ids[:, -1:], past_key_values=c).logits for c in (cache, copied)]
    torch.testing.assert_close(*logits)


def test_the_order_of_weights_changes_neither_shapes_nor_numbers_nor_ids():
    gpt2, ours = random_pair()
    ids = random_ids()
    before = {name: weight.clone() for name, weight in ours.state_dict().items()}
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(ids, **options), gpt2.generate(ids, **options))
    assert all(not m.weight.is_contiguous() for m in ours.modules() if isinstance(m, torch.nn.Linear))
    assert ours.out_head.weight is ours.model.tok_emb.weight
    for name, weight in ours.state_dict().items():
        assert weight.shape == before[name].shape and torch.equal(weight, before[name])
    torch.testing.assert_close(ours(ids).logits, gpt2(ids).logits)


def test_training_gets_contiguous_weights_that_can_be_trained():
    _, ours = random_pair()
    ids = random_ids()
    with torch.inference_mode():
        ours.generate(ids, max_new_tokens=2, pad_token_id=0)
    ours.train()
    assert all(weight.is_contiguous() for weight in ours.parameters())
    ours(ids, labels=ids).loss.backward()
    torch.nn.utils.parameters_to_vector(ours.parameters())


def test_a_model_in_training_mode_keeps_its_weights_where_they_are():
    _, ours = random_pair()
    ours.train()
    ours.generate(random_ids(), max_new_tokens=2, pad_token_id=0)
    assert all(weight.is_contiguous() for weight in ours.parameters())


def test_a_model_saved_after_generation_has_the_same_bytes(tmp_path):
    _, ours = random_pair()
    ours.save_pretrained(tmp_path / "before")
    ours.generate(random_ids(), max_new_tokens=2, pad_token_id=0)
    ours.save_pretrained(tmp_path / "after")
    ours.generate(random_ids(), max_new_tokens=2, pad_token_id=0)
    save_file({k: v for k, v in torch.nn.Sequential(ours).state_dict().items() if "out_head" not in k}, tmp_path / "x")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after"))
    assert first == second
    assert GPTScratchForCausalLM.from_pretrained(tmp_path / "after").out_head.weight.is_contiguous()


@pytest.mark.parametrize(
    "prepare",
    [lambda model: model.share_memory(), lambda model: model.to(torch.bfloat16), lambda model: model.to("meta")],
    ids=["shared with other processes", "bfloat16", "elsewhere"],
)
def test_weights_that_are_not_ours_to_move_or_gain_nothing_stay(prepare):
    _, ours = random_pair()
    model = prepare(ours)
    places = [weight.data_ptr() for weight in model.parameters()]
    order_for_decoding(model)
    assert [weight.data_ptr() for weight in model.parameters()] == places


def test_a_model_made_in_inference_mode_generates_with_its_weights_where_they_are():
    with torch.inference_mode():
        gpt2, ours = random_pair()
        options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
        with torch.profiler.profile(record_shapes=True):  # which looks at the weights' versions
            assert torch.equal(ours.generate(random_ids(), **options), gpt2.generate(random_ids(), **options))
    assert all(weight.is_contiguous() for weight in ours.parameters())


def test_ordering_twice_moves_nothing_twice():
    _, ours = random_pair()
    order_for_decoding(ours)
    places = [weight.data_ptr() for weight in ours.parameters()]
    order_for_decoding(ours)
    assert [weight.data_ptr() for weight in ours.parameters()] == places
    order_for_training(ours)
    assert all(weight.is_contiguous() for weight in ours.parameters())


@pytest.fixture
def official(tmp_path):
    gpt2, _ = random_pair()
    gpt2.save_pretrained(tmp_path / "official")
    return gpt2, tmp_path / "official"


def linear_weights(model):
    return [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize("model_class", [GPTScratchForCausalLM, GPTScratchModel])
def test_an_official_checkpoint_is_loaded_without_copying_a_matrix(official, model_class):
    gpt2, directory = official
    model = model_class.from_pretrained(directory)
    for block in getattr(model, "model", model).trf_blocks:
        together = {getattr(block.att, name).weight.untyped_storage().data_ptr() for name in QKV}
        assert len(together) == 1  # the file's c_attn
        assert all(weight.t().is_contiguous() for weight in (block.att.out_proj.weight, block.ff.layers[0].weight))
    ids = random_ids()
    ours, theirs = (m(ids).last_hidden_state for m in (getattr(model, "model", model), gpt2.transformer))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "make", [lambda model: model.train(), lambda model: model.state_dict()], ids=["train", "state"]
)
@pytest.mark.parametrize("model_class", [GPTScratchForCausalLM, GPTScratchModel])
def test_weights_that_are_views_become_contiguous_when_that_is_wanted(official, model_class, make):
    _, directory = official
    model = model_class.from_pretrained(directory)
    copies = [weight.clone() for weight in model.parameters()]
    make(model)
    assert all(weight.is_contiguous() for weight in model.parameters())
    assert all(map(torch.equal, model.parameters(), copies))


@pytest.mark.parametrize(
    "options",
    [dict(dtype=torch.bfloat16), dict(device_map="auto"), dict(device_map={"": "cpu"})],
    ids=["bf16", "auto", "map"],
)
def test_other_dtypes_and_places_get_contiguous_weights(official, options):
    model = GPTScratchForCausalLM.from_pretrained(official[1], **options)
    assert all(weight.is_contiguous() for weight in linear_weights(model))


def test_in_a_group_of_processes_weights_are_contiguous(official):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = GPTScratchForCausalLM.from_pretrained(official[1])
    finally:
        torch.distributed.destroy_process_group()
    assert all(weight.is_contiguous() for weight in linear_weights(model))


def test_a_loaded_model_is_saved_with_the_bytes_of_one_with_contiguous_weights(official, tmp_path):
    for name, options in (("views", {}), ("contiguous", dict(device_map={"": "cpu"}))):
        GPTScratchForCausalLM.from_pretrained(official[1], **options).save_pretrained(tmp_path / name)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("views", "contiguous"))
    assert first == second


def test_a_loaded_model_can_be_saved_over_its_own_checkpoint(official):
    gpt2, directory = official
    model = GPTScratchForCausalLM.from_pretrained(directory)
    model.save_pretrained(directory)
    for ours in (model, GPTScratchForCausalLM.from_pretrained(directory)):
        torch.testing.assert_close(ours(random_ids()).logits, gpt2(random_ids()).logits)


def test_a_converted_model_in_another_dtype_has_its_weights_put_in_that_order_to_generate(official):
    model = GPTScratchForCausalLM.from_pretrained(official[1]).bfloat16()
    assert not model.model.trf_blocks[0].att.out_proj.weight.is_contiguous()
    model.generate(random_ids(), max_new_tokens=2, pad_token_id=0)
    assert all(weight.is_contiguous() for weight in linear_weights(model))


def test_to_generate_only_parts_of_a_matrix_and_rows_are_copied(official):
    model = GPTScratchForCausalLM.from_pretrained(official[1])
    block = model.model.trf_blocks[0]
    before = {name: weight.data_ptr() for name, weight in block.named_parameters()}
    model.generate(random_ids(), max_new_tokens=2, pad_token_id=0)
    moved = {name for name, weight in block.named_parameters() if weight.data_ptr() != before[name]}
    assert moved == {f"att.{name}.weight" for name in QKV}
    assert all(weight.t().is_contiguous() for weight in linear_weights(model))
