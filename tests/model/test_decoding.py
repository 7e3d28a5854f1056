"""What decoding saves changes no result: the growing cache, and products by oneDNN."""

import copy
import pickle
import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch
from onednn import by_onednn
from pairs import LAYERS, random_ids, random_pair
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CompileConfig, DynamicCache
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


# Products by oneDNN.

NEW = 5
PRODUCTS = 6 * LAYERS + 1  # of a forward pass
OPTIONS = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.fixture
def pair(onednn):
    gpt2, ours = random_pair()
    ours.generate(random_ids(), **OPTIONS)  # with the check of transformers, which is not to be counted
    return gpt2, ours


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_product_of_generation_is_onednn_s_and_its_logits_are_right(pair, batch, implementation):
    gpt2, ours = pair
    ours.set_attn_implementation(implementation)
    ids = random_ids(batch)
    asked = dict(**OPTIONS, output_logits=True, return_dict_in_generate=True)
    expected = gpt2.generate(ids, **asked)
    count, got = by_onednn(lambda: ours.generate(ids, **asked))
    assert count == NEW * PRODUCTS
    assert torch.equal(expected.sequences, got.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-4)


def test_a_layer_without_bias_and_the_last_of_many_tokens(pair):
    ids, (_, ours) = random_ids(), pair
    for projection in ("W_query", "W_key", "W_value"):
        for block in ours.model.trf_blocks:
            layer = getattr(block.att, projection)
            layer.bias = nn.Parameter(torch.zeros_like(layer.bias))
    expected = ours.generate(ids, **OPTIONS)
    for projection in ("W_query", "W_key", "W_value"):
        for block in ours.model.trf_blocks:
            getattr(block.att, projection).bias = None
    count, got = by_onednn(lambda: ours.generate(ids, **OPTIONS))
    assert count == NEW * PRODUCTS and torch.equal(expected, got)


def changed_in_place(model, other):
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)


def stepped(model, other):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.grad = (mine - theirs).detach()
    optimizer.step()


def swapped(model, other):
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()


@pytest.mark.parametrize(
    "change",
    [
        changed_in_place,
        stepped,
        swapped,
        lambda model, other: model.load_state_dict(other.state_dict()),
        lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    ],
    ids=["in place", "optimizer", "data", "loaded", "assigned"],
)
def test_it_multiplies_by_the_weights_as_they_are_now(pair, change):
    _, ours = pair
    other_gpt2, other = random_pair(seed=1)
    ids = random_ids()
    before = ours.generate(ids, **OPTIONS)
    change(ours, other)
    count, after = by_onednn(lambda: ours.generate(ids, **OPTIONS))
    assert count == NEW * PRODUCTS
    assert torch.equal(after, other_gpt2.generate(ids, **OPTIONS)) and not torch.equal(before, after)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_generate_by_onednn_too_and_nothing_is_stored_in_a_model(pair, copied):
    _, ours = pair
    attributes = {name: set(vars(module)) for name, module in ours.named_modules()}
    fresh = {name: set(vars(module)) for name, module in random_pair()[1].named_modules()}
    assert attributes == fresh
    count, got = by_onednn(lambda: copied(ours).generate(random_ids(), **OPTIONS))
    assert count == NEW * PRODUCTS and torch.equal(got, ours.generate(random_ids(), **OPTIONS))


def hooked(model, calls):
    block = model.model.trf_blocks[0]
    block.att.W_key.register_forward_hook(lambda *_: calls.append(1))
    block.ff.layers.register_forward_hook(lambda *_: calls.append(1))
    model.model.trf_blocks[1].ff.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))


def replaced(model, calls):
    forward = model.out_head.forward
    model.out_head.forward = lambda x: calls.append(1) or forward(x)


def subclassed(model, calls):
    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    model.out_head.__class__ = Counted


@pytest.mark.parametrize(
    ("change", "called", "products"),
    [(hooked, 3, 4), (replaced, 1, 1), (subclassed, 1, 1)],
    ids=["hooks", "forward", "subclass"],
)
def test_a_layer_that_does_more_than_multiply_is_called(pair, change, called, products):
    gpt2, ours = pair
    calls = []
    change(ours, calls)
    count, got = by_onednn(lambda: ours.generate(random_ids(), **OPTIONS))
    assert len(calls) == NEW * called and count == NEW * (PRODUCTS - products)
    assert torch.equal(got, gpt2.generate(random_ids(), **OPTIONS))


@contextmanager
def switched_off():
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True


@pytest.mark.parametrize(
    "around",
    [
        switched_off,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: FlopCounterMode(display=False),
    ],
    ids=["switched off", "autocast", "FLOPs counted"],
)
def test_where_torch_is_told_otherwise_torch_multiplies(pair, around):
    _, ours = pair
    with around():
        count, _ = by_onednn(lambda: ours.generate(random_ids(), **OPTIONS))
    assert count == 0


def test_its_floating_point_operations_are_counted(pair):
    gpt2, ours = pair
    counts = []
    for model in (gpt2, ours):
        with FlopCounterMode(display=False) as counter:
            model.generate(random_ids(), **OPTIONS)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torch_s(pair, dtype):
    _, ours = pair
    assert by_onednn(lambda: ours.to(dtype).generate(random_ids(), **OPTIONS))[0] == 0


def test_a_weight_in_another_order_is_torch_s(pair):
    _, ours = pair
    expected = ours.generate(random_ids(), **OPTIONS)
    ours.out_head.weight.data = ours.out_head.weight.data.t().contiguous().t()
    count, got = by_onednn(lambda: ours.generate(random_ids(), **OPTIONS))
    assert count == NEW * (PRODUCTS - 1) and torch.equal(expected, got)


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_forward_pass_alone_is_torch_s(pair, around):
    _, ours = pair
    with around():
        count, _ = by_onednn(lambda: ours(random_ids()))
    assert count == 0


@pytest.fixture
def graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.long
def test_compiled_generation_is_by_onednn_too(pair, graphs):
    gpt2, ours = pair
    config = CompileConfig(fullgraph=True)
    config._compile_all_devices = True  # otherwise transformers compiles only on GPUs
    asked = dict(**OPTIONS, cache_implementation="static", compile_config=config)
    expected = gpt2.generate(random_ids(2), **OPTIONS)
    ours.generate(random_ids(2), **asked)
    count, got = by_onednn(lambda: ours.generate(random_ids(2), **asked))
    assert count == NEW * PRODUCTS
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("around", "count"),
    [
        (torch.no_grad, PRODUCTS),
        (torch.inference_mode, PRODUCTS),
        (nullcontext, 0),
        (lambda: torch.autocast("cpu", torch.bfloat16), 0),
        (switched_off, 0),
    ],
    ids=["no gradients", "inference", "gradients", "autocast", "switched off"],
)
def test_a_compiled_forward_pass_is_by_onednn_without_gradients(pair, graphs, around, count):
    gpt2, ours = pair
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    ids = random_ids(2)
    no_gradients = nullcontext if around is nullcontext else torch.no_grad
    with no_gradients(), around():
        compiled(ids)
        found, got = by_onednn(lambda: compiled(ids).logits)
        expected = gpt2(ids).logits
    assert found == count
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 if got.dtype == torch.float32 else 0.3)


def test_an_exported_graph_has_torch_s_operators_alone(pair, graphs):
    _, ours = pair
    with torch.no_grad():
        exported = torch.export.export(ours, (random_ids(),), {"use_cache": False})
    names = {str(node.target) for node in exported.graph.nodes}
    assert "aten.linear.default" in names
    assert not any("mkldnn" in name or "hf_gpt_scratch" in name for name in names)


def test_with_gradients_it_is_torch_s(pair):
    _, ours = pair
    with decoding.onednn_products():
        count, out = by_onednn(lambda: ours(random_ids(), labels=random_ids()))
    assert count == 0
    out.loss.backward()
    assert ours.out_head.weight.grad is not None


def test_adapters_add_their_part(pair):
    _, ours = pair
    adapted = get_peft_model(ours, LoraConfig(target_modules=["W_query", "out_proj"], init_lora_weights=False))
    adapted.eval()
    asked = dict(**OPTIONS, output_logits=True, return_dict_in_generate=True)
    got = adapted.generate(input_ids=random_ids(), **asked)
    with torch.no_grad():
        expected = adapted(input_ids=got.sequences[:, :-1]).logits[:, -NEW:]
    torch.testing.assert_close(torch.stack(got.logits, dim=1), expected, rtol=1e-5, atol=1e-4)


def test_generation_in_one_thread_changes_nothing_in_another(onednn):
    seen = []

    def other():
        seen.append(decoding._by_onednn.get())

    with decoding.onednn_products():
        assert decoding._by_onednn.get()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [False] and not decoding._by_onednn.get()


def test_small_weights_and_other_processors_are_torch_s(pair, monkeypatch):
    _, ours = pair
    with monkeypatch.context() as changed:
        changed.setattr(decoding, "LARGE", 48 * 48 + 1)
        count, _ = by_onednn(lambda: ours.generate(random_ids(), **OPTIONS))
        assert count == NEW * (PRODUCTS - 4 * LAYERS)
    monkeypatch.setattr(decoding, "prefers_onednn", lambda: False)
    assert by_onednn(lambda: ours.generate(random_ids(), **OPTIONS))[0] == 0
