"""What this package does about versions of transformers: both names of the cache, none ignored, a check before use."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from pairs import random_ids, random_pair
from remote import run_without_the_package
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin

from hf_gpt_scratch import GPTModel, GPTScratchDoubleHeadsModel, GPTScratchForCausalLM, generate_text_simple
from hf_gpt_scratch.model import compat
from hf_gpt_scratch.model import modeling_gpt_scratch as modeling
from hf_gpt_scratch.model.book_cfg import SIZES
from hf_gpt_scratch.model.compat import CACHE, check_growth, check_mask, one_cache

NAMES = ("past_key_values", "cache")


@pytest.fixture
def model():
    return random_pair()[1]


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(modeling.check_library, "passed", set())
    monkeypatch.setattr(modeling.check_library, "warned", False)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_either_name_of_the_cache_is_understood(model, name):
    ids = random_ids()
    whole = model(ids).logits
    for part in (model, model.model):
        cache = DynamicCache(config=model.config)
        part(ids[:, :12], use_cache=True, **{name: cache})
        output = part(ids[:, 12:], use_cache=True, **{name: cache})
        assert cache.get_seq_length() == ids.shape[1]
        assert getattr(output, CACHE) is cache
    cache = DynamicCache(config=model.config)
    logits = [model(piece, **{name: cache}).logits for piece in ids.split(5, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_double_heads_model_understands_both_too(model, name):
    double = GPTScratchDoubleHeadsModel(model.config).eval()
    cache = DynamicCache(config=model.config)
    double(random_ids()[:, None], use_cache=True, **{name: cache})
    assert cache.get_seq_length() == random_ids().shape[1]


@pytest.mark.parametrize("wrap", [lambda cache: cache, lambda cache: [cache], lambda cache: (None, cache)])
def test_no_cache_is_swallowed(model, wrap):
    with pytest.raises(TypeError, match=r"DynamicCache|list|tuple.*'kv_cache'.*would be ignored.*pip install"):
        model(random_ids(), kv_cache=wrap(DynamicCache()))
    with pytest.raises(TypeError, match=r"'past_key_value'"):
        model.model(random_ids(), past_key_value=EncoderDecoderCache(DynamicCache(), DynamicCache()))


def test_two_different_caches_are_refused():
    one, other = DynamicCache(), DynamicCache()
    assert one_cache(one, one, {}) is one and one_cache(None, other, {}) is other and one_cache(None, None, {}) is None
    with pytest.raises(TypeError, match="two names of one argument"):
        one_cache(one, other, {})


@pytest.mark.parametrize("columns", [1, 11, 13, 40])
def test_a_mask_has_one_column_a_token(model, columns):
    cache = DynamicCache(config=model.config)
    model(random_ids(2, 8), **{CACHE: cache})
    mask = torch.ones(2, columns, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"{columns} columns, but there are 12 tokens, 8 in the cache and 4 new"):
        model(random_ids(2, 4), attention_mask=mask, **{CACHE: cache})
    model(random_ids(2, 4), attention_mask=torch.ones(2, 12), **{CACHE: cache})
    check_mask(mask, columns - 1, 1)


def test_a_cache_that_did_not_take_what_it_was_given_is_noticed(model):
    class Forgetful(DynamicCache):
        def update(self, keys, values, *args, **kwargs):
            return keys, values

    with pytest.raises(RuntimeError, match=r"holds 0 tokens after a forward pass instead of 20; this is transf"):
        model(random_ids(), **{CACHE: Forgetful()})
    full = DynamicCache(config=model.config)
    model(random_ids(), **{CACHE: full})
    check_growth(full, 20)


@pytest.mark.slow
def test_import_says_nothing_and_an_untested_version_gets_one_line(monkeypatch, unchecked, model, caplog):
    monkeypatch.setattr(compat, "INSTALLED", "5.99.0")
    monkeypatch.setattr(compat, "_UNTESTED", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    logger = logging.getLogger("hf_gpt_scratch.model.compat")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        model(random_ids())
        model(random_ids())
        model.generate(random_ids(), max_new_tokens=2, pad_token_id=0)
    lines = [record.getMessage() for record in caplog.records if "hf_gpt_scratch" in record.name]
    assert len(lines) == 1 and "5.99.0 is newer than" in lines[0]


def test_on_a_tested_version_a_forward_pass_checks_nothing_and_generate_does(unchecked, model):
    model(random_ids())
    assert modeling.check_library.passed == set()
    model.generate(random_ids(), max_new_tokens=2, pad_token_id=0)
    assert modeling.check_library.passed == {"generate"}


def test_the_check_refuses_again_and_again_and_names_version_and_remedy(monkeypatch, unchecked, model):
    old = GenerationMixin.prepare_inputs_for_generation

    def without_positions(self, *args, **kwargs):
        return {name: value for name, value in old(self, *args, **kwargs).items() if name != "position_ids"}

    monkeypatch.setattr(GPTScratchForCausalLM, "prepare_inputs_for_generation", without_positions)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"generate \(greedy\).*GPT-2: .*pip install \"transf") as told:
            model.generate(random_ids(), max_new_tokens=2, pad_token_id=0)
    assert transformers.__version__ in str(told.value) and len(str(told.value)) < 1500


@pytest.mark.slow
@pytest.mark.parametrize("untested", [False, True])
def test_the_check_leaves_no_trace(monkeypatch, unchecked, untested):
    monkeypatch.setattr(compat, "is_untested", lambda: untested)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.autocast("cpu"), torch.inference_mode():
            modeling.check_library()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(3), expected) and torch.is_grad_enabled()
    assert modeling.check_library.passed == {"generate"}


def test_the_check_is_not_counted_nor_traced(unchecked, model):
    ids = random_ids()
    with FlopCounterMode(display=False) as counter:
        model(ids)
        alone = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        modeling.check_library()
        model(ids)
    assert counter.get_total_flops() == alone
    assert modeling.check_library.passed == set()  # the next use checks


def test_what_does_not_come_again_is_raised_and_is_no_verdict(monkeypatch, unchecked, model):
    class Late(Exception):
        pass

    calls = []
    right = compat.MODES["greedy"]

    def once_late(model):
        calls.append(model)
        if len(calls) == 1:
            raise Late("a time limit of the user's")
        return right(model)

    monkeypatch.setitem(compat.MODES, "greedy", once_late)
    with pytest.raises(Late):
        modeling.check_library()
    modeling.check_library()
    assert modeling.check_library.passed == {"generate"}


def test_a_process_that_is_forked_during_the_check_has_a_lock_of_its_own(unchecked):
    reader, writer = os.pipe()
    with modeling.check_library.lock:
        child = os.fork()
        if child == 0:
            taken = modeling.check_library.lock.acquire(timeout=5)
            os.write(writer, b"1" if taken and not modeling.check_library.running else b"0")
            os._exit(0)
    assert os.read(reader, 1) == b"1"
    os.waitpid(child, 0)


def test_an_unread_tensor_is_refused_on_an_untested_version(monkeypatch, model):
    model(random_ids(), something=torch.ones(2))
    monkeypatch.setattr(modeling, "is_untested", lambda: True)
    with pytest.raises(TypeError, match="the tensor 'something', which would be ignored"):
        model(random_ids(), something=torch.ones(2))
    model(random_ids(), labels=random_ids(), num_items_in_batch=torch.tensor(7))


def test_a_cache_in_another_place_and_what_is_no_cache_are_refused(model):
    with pytest.raises(TypeError, match=f"got a cache as attention_mask; pass it by name, {CACHE}="):
        model(random_ids(), DynamicCache())
    with pytest.raises(TypeError, match="got a tuple as the cache"):
        model(random_ids(), **{CACHE: ((torch.ones(2), torch.ones(2)),)})


@pytest.fixture
def tiny():
    with compat._undisturbed():
        yield lambda **options: compat._tiny_model(GPTScratchForCausalLM, **options)


def test_the_tiny_model_tells_prompts_positions_and_padding_apart(tiny):
    greedy = torch.tensor(compat.GREEDY)
    assert len(set(greedy.flatten().tolist())) > 4
    ids, _ = compat._padded()
    assert not torch.equal(torch.tensor(compat.RIGHT["beams"])[:, :5], greedy)
    unmasked = tiny().to_gpt2().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert not torch.equal(unmasked[0, 5:], greedy[0])


@pytest.mark.parametrize("name", compat.MODES)
def test_what_the_check_takes_for_right_is_the_official_models(tiny, name):
    if name in compat.OPTIONAL and compat._fails(compat.MODES[name], GPTScratchForCausalLM):
        pytest.skip("not in this version")
    official = compat.MODES[name](tiny().to_gpt2())
    torch.testing.assert_close(torch.tensor(compat.RIGHT[name]), official, atol=1e-3, rtol=1e-3)


def test_what_the_check_takes_for_right_is_the_books(tiny):
    model = tiny()
    config = {name: getattr(model.config, name) for name in (*SIZES, "qkv_bias", "tie_word_embeddings")}
    weights = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if ".W_query." in name:  # the book's layers do not divide scores by the layer's number
            weights[name] = tensor / (int(name.split(".")[1]) + 1)
    book = GPTModel(config).eval()
    book.load_state_dict(weights)
    rows = [generate_text_simple(book, torch.tensor([ids]), 5, 16)[0, -5:].tolist() for ids in compat.PROMPTS]
    assert rows == compat.GREEDY


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="it forgets the encoder's mask")
def test_the_cross_attention_of_the_check_is_the_official_models(tiny):
    expected = torch.tensor(compat.RIGHT["cross-attention"])
    official = tiny(add_cross_attention=True).to_gpt2()
    torch.testing.assert_close(compat._cross(official), expected, atol=1e-3, rtol=1e-3)


def test_a_mode_that_the_official_model_lacks_is_not_checked(monkeypatch, unchecked):
    def gone(model):
        raise NotImplementedError("removed from transformers")

    monkeypatch.setitem(compat.MODES, "beams", gone)
    modeling.check_library()
    assert modeling.check_library.passed == {"generate"}


def test_a_mode_that_only_this_model_lacks_is_an_error(monkeypatch, unchecked):
    right = compat.MODES["beams"]

    def ours_fails(model):
        if isinstance(model, GPTScratchForCausalLM):
            raise NotImplementedError("no such thing")
        return right(model)

    monkeypatch.setitem(compat.MODES, "beams", ours_fails)
    with pytest.raises(RuntimeError, match=r"generate \(beams\) .*NotImplementedError"):
        modeling.check_library()


def test_an_import_that_fails_says_which_versions_do_not():
    with pytest.raises(ImportError, match=r"no_such_thing.*5\.4\.0 to .* were tested: pip install"), compat.explained():
        from transformers import no_such_thing  # noqa: F401


@pytest.mark.parametrize(
    ("there", "untested"),
    [("5.4.0", False), ("5.24.0", False), ("5.24.3", False), ("5.25.0", True), ("5.25.0.dev0", True), ("6.0.0", True)],
)
def test_which_versions_are_untested(there, untested):
    assert compat.is_newer_than_tested(there) == untested


@pytest.mark.slow
@pytest.mark.skipif(CACHE != "cache", reason="the changes are made to transformers of 5.24 on")
@pytest.mark.long
def test_sixty_changes_of_the_library_give_the_official_ids_or_an_error():
    script = Path(__file__).parents[1] / "helpers" / "injected.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if not line.startswith("ok"))
    assert "no change, package: same" in done.stdout and "no change, saved: same" in done.stdout
    assert done.stdout.count(": error") > 40


MODES = {
    "greedy": dict(do_sample=False),
    "no cache": dict(do_sample=False, use_cache=False),
    "beams": dict(do_sample=False, num_beams=3),
    "static": dict(do_sample=False, cache_implementation="static"),
    "sampling": dict(do_sample=True, top_k=5),
}
GENERATED = f"""
import torch
from transformers import AutoModelForCausalLM


def generated(model, ids):
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=9, pad_token_id=0, eos_token_id=None)
    out = {{}}
    for name, options in {MODES!r}.items():
        torch.manual_seed(0)
        out[name] = model.generate(ids, **settings, **options)
    return out
"""
WITHOUT_THE_PACKAGE = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(generated(model, torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.mark.slow
def test_a_directory_saved_now_generates_the_official_ids_without_the_package(tmp_path):
    gpt2, ours = random_pair()
    ours.save_pretrained(tmp_path / "saved")
    ids = random_ids(2, 7)
    torch.save(ids, tmp_path / "ids.pt")
    code = GENERATED + WITHOUT_THE_PACKAGE
    run_without_the_package(code, tmp_path / "saved", tmp_path / "ids.pt", tmp_path / "out.pt", cwd=tmp_path)
    here: dict = {}
    exec(GENERATED, here)
    expected, got = here["generated"](gpt2, ids), torch.load(tmp_path / "out.pt")
    assert {name: torch.equal(expected[name], got[name]) for name in MODES} == dict.fromkeys(MODES, True)


def test_code_that_came_along_says_where_the_rest_is():
    model = object.__new__(compat.NoTranslation)
    for call in (compat.NoTranslation.from_book, compat.NoTranslation.from_gpt2, model.to_gpt2, model.save_as_gpt2):
        with pytest.raises(ImportError, match="pip install hf-gpt-scratch, and load the model by the class there"):
            call()
