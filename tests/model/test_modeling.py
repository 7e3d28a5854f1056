import ast
import inspect
import json
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from pairs import CONTEXT, LAYERS, VOCAB, random_gpt2, random_ids, random_pair, randomize, tiny_config, tiny_model
from remote import run_without_the_package
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_gpt_scratch import (
    GPTModel,
    GPTScratchConfig,
    GPTScratchForCausalLM,
    GPTScratchForSequenceClassification,
    GPTScratchModel,
)
from hf_gpt_scratch.model.book_cfg import SIZES
from hf_gpt_scratch.model.modeling_gpt_scratch import CachedAttention, eager_attention
from hf_gpt_scratch.model.weight_map import SCRATCH_PREFIX
from hf_gpt_scratch.weights.parity import FP32_GRADIENTS, FP32_LOGITS, relative_error

TRAINED = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
CLEAN = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}


def load(directory, model_class=GPTScratchForCausalLM, **kwargs):
    model, info = model_class.from_pretrained(directory, output_loading_info=True, **kwargs)
    assert {name: set(info[name]) for name in CLEAN} == CLEAN
    return model


def rewrite(directory, change):
    """Applies `change` to the dict of a checkpoint's tensors."""
    file = Path(directory) / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def as_on_the_hub(tensors):
    """The layout of the official files: no prefix, and mask buffers between the weights."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for n in range(LAYERS):
        tensors[f"h.{n}.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT).tril()
        tensors[f"h.{n}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


@pytest.fixture
def official(tmp_path):
    gpt2 = random_gpt2()
    gpt2.save_pretrained(tmp_path / "official")
    return gpt2, tmp_path / "official"


def same_logits(model, gpt2, bound=5e-6):
    ids = random_ids()
    ours, theirs = model(ids).logits, gpt2(ids).logits
    return (ours.float() - theirs.float()).abs().max() <= bound * theirs.abs().max()


def test_loads_what_save_pretrained_of_gpt2_wrote(official):
    gpt2, directory = official
    assert same_logits(load(directory), gpt2)


def test_loads_the_layout_of_the_hub(official):
    gpt2, directory = official
    rewrite(directory, as_on_the_hub)
    assert same_logits(load(directory), gpt2)


@pytest.mark.parametrize("hub", [False, True])
def test_base_model_loads_both_layouts(official, hub):
    gpt2, directory = official
    if hub:
        rewrite(directory, as_on_the_hub)
    ids = random_ids()
    expected = gpt2.transformer(ids).last_hidden_state
    torch.testing.assert_close(load(directory, GPTScratchModel)(ids).last_hidden_state, expected, atol=1e-4, rtol=1e-5)


def test_loads_shards(tmp_path):
    gpt2 = random_gpt2()
    gpt2.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same_logits(load(tmp_path), gpt2)


def test_loads_a_pickled_state_dict(official):
    gpt2, directory = official
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert same_logits(load(directory), gpt2)


def test_loads_a_separate_head(tmp_path):
    gpt2 = random_gpt2(tie_word_embeddings=False)
    gpt2.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert same_logits(model, gpt2)
    assert model.out_head.weight is not model.model.tok_emb.weight


def test_tied_checkpoint_stays_tied(official):
    model = load(official[1])
    assert model.out_head.weight is model.model.tok_emb.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loads_in_any_dtype(official, dtype):
    _, directory = official
    model = load(directory, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert same_logits(model, GPT2LMHeadModel.from_pretrained(directory, dtype=dtype), bound=5e-2)


def test_loads_in_the_dtype_of_the_checkpoint(tmp_path):
    random_gpt2().bfloat16().save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_loads_with_a_device_map(official, device_map):
    gpt2, directory = official
    assert same_logits(load(directory, device_map=device_map), gpt2)


def test_loads_with_layers_offloaded_to_disk(official, tmp_path):
    gpt2, directory = official
    places = {"model.tok_emb": "cpu", "model.pos_emb": "cpu", "model.final_norm": "cpu", "out_head": "cpu"}
    places |= {f"model.trf_blocks.{n}": "disk" if n else "cpu" for n in range(LAYERS)}
    model = load(directory, device_map=places, offload_folder=tmp_path / "offload")
    assert same_logits(model, gpt2)


# config.json of openai-community/gpt2 but for the sizes: no tie_word_embeddings, and keys that nothing reads any more.
HUB_CONFIG = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": VOCAB - 1,
    "embd_pdrop": 0.1,
    "eos_token_id": VOCAB - 1,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": CONTEXT,
    "n_embd": 48,
    "n_head": 4,
    "n_layer": LAYERS,
    "n_positions": CONTEXT,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": VOCAB,
}


def test_loads_by_hub_id_from_the_hubs_cache(official, tmp_path, monkeypatch):
    gpt2, directory = official
    rewrite(directory, as_on_the_hub)
    repository, commit = tmp_path / "cache" / "models--openai-community--gpt2", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    directory.rename(repository / "snapshots" / commit)
    (repository / "snapshots" / commit / "config.json").write_text(json.dumps(HUB_CONFIG))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = load("openai-community/gpt2", cache_dir=tmp_path / "cache")
    assert same_logits(model, gpt2)
    assert model.config.tie_word_embeddings
    assert model.config.to_gpt2().task_specific_params == HUB_CONFIG["task_specific_params"]


def test_auto_class_still_gives_the_official_model(official):
    assert type(AutoModelForCausalLM.from_pretrained(official[1])) is GPT2LMHeadModel


def test_another_model_is_refused_by_name(tmp_path):
    config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama'"):
        GPTScratchForCausalLM.from_pretrained(tmp_path)


def test_config_is_translated_and_the_official_files_are_left_alone(official):
    before = {path.name: path.read_bytes() for path in official[1].iterdir()}
    model = load(official[1])
    assert model.config.model_type == "gpt_scratch"
    assert model.generation_config.eos_token_id == VOCAB - 1
    assert {path.name: path.read_bytes() for path in official[1].iterdir()} == before


@pytest.mark.parametrize("tied", [True, False])
def test_saves_the_books_names_which_gpt_model_loads_strictly(official, tmp_path, tied):
    model = load(official[1]) if tied else tiny_model(qkv_bias=True)
    model.save_pretrained(tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    book = GPTModel(model.config).eval()
    expected = {SCRATCH_PREFIX + name for name in book.state_dict() if name != "out_head.weight"}
    assert tensors.keys() == expected | (set() if tied else {"out_head.weight"})

    book.load_state_dict({name.removeprefix(SCRATCH_PREFIX): t for name, t in tensors.items()}, strict=True)
    ids = random_ids()
    torch.testing.assert_close(book(ids), model(ids).logits, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "tie_word_embeddings": True}, {"n_inner": 100}])
def test_saving_and_loading_is_bit_exact(tmp_path, changes):
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    for loaded in (load(tmp_path), load(tmp_path, AutoModelForCausalLM)):
        assert type(loaded) is GPTScratchForCausalLM
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert type(AutoModel.from_pretrained(tmp_path)) is GPTScratchModel


@pytest.mark.parametrize(
    "changes",
    [{}, {"qkv_bias": True, "tie_word_embeddings": True}, {"activation_function": "prelu", "n_inner": 100}],
)
def test_save_as_gpt2_writes_an_official_checkpoint(tmp_path, changes):
    model = tiny_model(**changes)
    model.save_as_gpt2(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2"
    gpt2 = load(tmp_path, GPT2LMHeadModel)
    assert same_logits(model, gpt2)
    with torch.device("meta"):
        names = set(GPT2LMHeadModel(gpt2.config).state_dict())
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert load_file(tmp_path / "model.safetensors").keys() == names - tied
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is GPT2LMHeadModel


def test_original_format_is_gpt2s_names(official, tmp_path):
    load(official[1]).save_pretrained(tmp_path / "again", save_original_format=True)
    theirs, again = (load_file(d / "model.safetensors") for d in (official[1], tmp_path / "again"))
    assert theirs.keys() == again.keys()
    assert same_logits(load(tmp_path / "again"), official[0])


def test_models_in_memory_do_not_share_weights():
    gpt2, model = random_pair()
    back = model.to_gpt2()
    ids = random_ids()
    before = gpt2(ids).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(gpt2(ids).logits, before)
    assert torch.equal(back(ids).logits, before)


RELOAD = """
import json
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

saved, ids, logits, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
ids = torch.tensor(json.loads(ids))
generated = model.generate(ids, max_new_tokens=8, do_sample=False)
loss = model.train()(ids, labels=ids).loss
loss.backward()
gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
with torch.no_grad():
    torch.save((model.eval()(ids).logits, generated, loss.detach(), gradients), logits)
model.save_pretrained(again)
assert type(AutoTokenizer.from_pretrained(saved)).__name__ == "GPT2Tokenizer"
assert not any(name.startswith("hf_gpt_scratch") for name in sys.modules)
"""


@pytest.mark.slow
def test_saved_code_runs_where_the_package_is_missing(tmp_path):
    model = tiny_model(qkv_bias=True, drop_rate=0.0)
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(TRAINED).save_pretrained(tmp_path / "saved")
    ids = random_ids()
    arguments = [tmp_path / "saved", json.dumps(ids.tolist()), tmp_path / "logits.pt", tmp_path / "again"]
    run_without_the_package(RELOAD, *arguments, cwd=tmp_path)
    logits, generated, loss, gradients = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        # Two processes may add in two orders, as their memory happens to lie.
        assert relative_error(model(ids).logits, logits) <= FP32_LOGITS
    # With transformers' own cache and loss, since ours stay in the package.
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), generated)
    ours = model.train()(ids, labels=ids).loss
    ours.backward()
    model.eval()
    torch.testing.assert_close(loss, ours.detach())
    expected = torch.cat([model.get_parameter(name).grad.flatten() for name in gradients])
    assert relative_error(expected, torch.cat([one.flatten() for one in gradients.values()])) <= FP32_GRADIENTS
    # What remote code saves is as good as what it loaded.
    assert same_logits(load(tmp_path / "again"), model)
    assert (tmp_path / "again" / "layers.py").read_text() == (tmp_path / "saved" / "layers.py").read_text()


BOOKS = """
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

saved, weights, ids, logits = sys.argv[1:]
cfg = dict(vocab_size=50, context_length=16, emb_dim=24, n_heads=4, n_layers=2, drop_rate=0.3)
model = get_class_from_dynamic_module("layers.GPTModel", saved)(cfg).eval()
assert (model.drop_emb.p, model.trf_blocks[1].att.W_key.bias) == (0.3, None)
model.load_state_dict(torch.load(weights))
torch.save(model(torch.load(ids)), logits)
"""


@pytest.mark.slow
def test_the_books_layers_in_saved_code_need_no_package(tmp_path):
    tiny_model().save_pretrained(tmp_path / "saved")
    torch.manual_seed(0)
    book = GPTModel(dict(vocab_size=50, context_length=16, emb_dim=24, n_heads=4, n_layers=2, drop_rate=0.3)).eval()
    ids = torch.randint(50, (2, 7))
    torch.save(book.state_dict(), tmp_path / "weights.pth")
    torch.save(ids, tmp_path / "ids.pt")
    paths = [tmp_path / name for name in ("saved", "weights.pth", "ids.pt", "logits.pt")]
    run_without_the_package(BOOKS, *paths, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), book(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [GPTScratchForCausalLM, GPTScratchForSequenceClassification])
def test_a_file_of_models_itself_imports_every_file_that_ships(kind):
    """Older versions of transformers fetch only what it imports."""
    file = Path(inspect.getsourcefile(kind))
    everything = {file.stem, *(Path(path).stem for path in get_relative_import_files(file))}
    assert everything == {file.stem, *get_relative_imports(file)}
    assert len(everything) == 5


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """A cache of models' own code for one test, whose modules are forgotten before and after it."""

    def imported():
        return [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in imported():
        monkeypatch.delitem(sys.modules, name)
    others = [folder for folder in sys.path if (Path(folder) / "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in others])
    yield
    for name in imported():
        del sys.modules[name]


def test_remote_copy_and_package_live_in_one_process(tmp_path, own_modules):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    remote = get_class_from_dynamic_module("modeling_gpt_scratch.GPTScratchForCausalLM", str(tmp_path))
    assert remote is not GPTScratchForCausalLM
    assert same_logits(remote.from_pretrained(tmp_path), model)
    assert same_logits(load(tmp_path), model)
    model.save_as_gpt2(tmp_path / "official")
    with pytest.raises(ImportError, match=r"has no config_translation\.py, .*; pip install hf-gpt-scratch"):
        remote.from_pretrained(tmp_path / "official")
    weights = GPTScratchForCausalLM.from_pretrained(tmp_path / "official").state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_models_saved_by_older_versions_keep_loading():
    directory = Path(__file__).parents[1] / "fixtures" / "saved-by-0.1.0"
    expected = load_file(directory / "expected.safetensors")
    for model_class in (GPTScratchForCausalLM, AutoModelForCausalLM):
        model = load(directory, model_class)
        assert (model.config.n_inner, model.config.drop_rate_attn) == (40, 0.2)
        torch.testing.assert_close(model(expected["input_ids"]).logits, expected["logits"], atol=1e-4, rtol=1e-5)


def test_new_weights_follow_gpt2s_scheme():
    torch.manual_seed(0)
    config = tiny_config(emb_dim=256, n_layers=12, qkv_bias=True)
    model = GPTScratchForCausalLM(config)
    block = model.model.trf_blocks[5]
    shortcut = 0.02 / (2 * 12) ** 0.5
    for layer, std in [
        (block.att.W_query, 0.02),
        (block.ff.layers[0], 0.02),
        (model.model.tok_emb, 0.02),
        (model.model.pos_emb, 0.02),
        (model.out_head, 0.02),
        (block.att.out_proj, shortcut),
        (block.ff.layers[2], shortcut),
    ]:
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "shift")):
            assert not parameter.any(), name
        elif name.endswith("scale"):
            assert (parameter == 1).all(), name


def test_missing_norms_are_initialised_as_norms(official, caplog):
    _, directory = official
    rewrite(directory, lambda tensors: {k: v for k, v in tensors.items() if not k.endswith("h.1.ln_2.weight")})
    model, info = GPTScratchForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.trf_blocks.1.norm2.scale"}
    assert (model.model.trf_blocks[1].norm2.scale == 1).all()


def test_positions_go_on_from_the_cache():
    model = tiny_model()
    ids = random_ids(1, 12)
    cache = DynamicCache()
    with torch.no_grad():
        parts = [model(chunk, past_key_values=cache).logits for chunk in ids.split([5, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, atol=1e-4, rtol=1e-4)
        start_again = model(ids[:, 5:6], past_key_values=DynamicCache()).logits
    assert (start_again - parts[1]).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_static_cache_equals_dynamic(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    ids = random_ids(2, 10)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        parts = [model(chunk, past_key_values=cache).logits for chunk in ids.split([6, 1, 3], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("past", [0, CONTEXT - 2])
def test_too_long_sequences_are_refused(past):
    model = tiny_model()
    cache = DynamicCache()
    if past:
        model(random_ids(1, past), past_key_values=cache)
    with pytest.raises(ValueError, match=rf"{CONTEXT + 1} tokens.*context_length={CONTEXT}"):
        model(random_ids(1, CONTEXT + 1 - past), past_key_values=cache)


def test_generation_past_the_context_is_refused_but_padding_takes_no_position():
    model = tiny_model()
    ids = random_ids(1, CONTEXT)
    with pytest.raises(ValueError, match=f"context_length={CONTEXT}"):
        model.generate(ids, max_new_tokens=2, do_sample=False)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids[:, :-4]], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 5).long().unsqueeze(0)
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = model.generate(ids[:, :-4], **settings)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 5:], expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_static_cache_and_wrong_positions_get_the_same_clear_error(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    settings = dict(max_new_tokens=4, do_sample=False, cache_implementation="static", eos_token_id=None, pad_token_id=0)
    with pytest.raises(ValueError, match=rf"{CONTEXT + 1} tokens.*context_length={CONTEXT}"):
        model.generate(random_ids(1, CONTEXT - 2), **settings)
    with pytest.raises(ValueError, match=rf"{CONTEXT + 1} tokens.*context_length={CONTEXT}"):
        model(random_ids(1, 2), position_ids=torch.tensor([[3, CONTEXT]]))


def test_either_ids_or_embeddings():
    model = tiny_model()
    ids = random_ids()
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


def test_logits_to_keep():
    model = tiny_model()
    ids = random_ids()
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_does_not_change_gradients(reentrant):
    model = tiny_model(drop_rate=0.0).train()
    ids = random_ids()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_resized_and_replaced_embeddings_stay_tied():
    model = tiny_model(tie_word_embeddings=True)
    model.resize_token_embeddings(VOCAB + 5)
    assert model(random_ids()).logits.shape[-1] == VOCAB + 5
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_wrong_table_would_be_noticed(official):
    gpt2, directory = official

    def swap_query_and_key(tensors):
        name = "transformer.h.1.attn.c_attn.weight"
        query, key, value = tensors[name].chunk(3, dim=1)
        return {**tensors, name: torch.cat([key, query, value], dim=1)}

    rewrite(directory, swap_query_and_key)
    assert not same_logits(load(directory), gpt2, bound=1e-3)


def test_any_registered_attention_function_is_used():
    calls = []

    def counting(module, *args, **kwargs):
        calls.append((module.layer_idx, kwargs["position_ids"].shape, kwargs["scaling"]))
        return eager_attention(module, *args, **kwargs)

    AttentionInterface.register("counting", counting)
    AttentionMaskInterface.register("counting", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model = tiny_model()
    ids = random_ids()
    expected = model(ids).logits
    model.set_attn_implementation("counting")
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-5)
    assert calls == [(n, (1, 20), 12**-0.5) for n in range(LAYERS)]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="flex attention is compiled: it needs a C++ compiler")
@torch.no_grad()
@pytest.mark.long
def test_flex_attention_equals_eager():
    model = tiny_model()
    ids = random_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    model.set_attn_implementation("flex_attention")
    got = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_class", [GPTScratchForCausalLM, GPTScratchModel])
def test_ids_and_positions_that_do_not_exist_are_told(model_class):
    model = model_class(tiny_config()).eval()
    ids, last = random_ids(1, 5), f"0 to {VOCAB - 1}"
    for wrong in (-1, VOCAB):
        other = ids.clone()
        other[0, 2] = wrong
        for inputs in ({"input_ids": other}, {"input_ids": ids, "token_type_ids": other}):
            name = list(inputs)[-1]
            with pytest.raises(IndexError, match=rf"got {name} from .*{wrong}.*has {last}; use the tokenizer"):
                model(**inputs)
    with pytest.raises(IndexError, match=f"position_ids from -1 to 3, but this model has 0 to {CONTEXT - 1}"):
        model(ids, position_ids=torch.arange(-1, 4).unsqueeze(0))
    for inputs, told in (
        ({"input_ids": ids[0]}, r"input_ids of shape \(5,\), but it must be \(B, T\).*input_ids\.unsqueeze"),
        ({"input_ids": ids[None]}, r"input_ids of shape \(1, 1, 5\)"),
        ({"inputs_embeds": torch.randn(5, 48)}, r"inputs_embeds of shape \(5, 48\).*\(B, T, E\)"),
        ({"input_ids": ids[:, :0]}, "got no tokens"),
        ({"inputs_embeds": torch.randn(2, 0, 48)}, "got no tokens"),
    ):
        with pytest.raises(ValueError, match=told):
            model(**inputs)


def test_auto_tokenizer_knows_the_model(tmp_path):
    """From a directory without tokenizer_config.json, as older official checkpoints are."""
    tiny_model().save_pretrained(tmp_path)
    shutil.copy(TRAINED / "tokenizer.json", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is GPT2Tokenizer
    assert tokenizer("I had always").input_ids == AutoTokenizer.from_pretrained(TRAINED)("I had always").input_ids


def test_serving_engines_get_their_own_arguments_through_every_module():
    """The contract of vLLM's Transformers backend: one flat row, no cache, attention by the engine's own instances.

    It returns the context vectors of the row as (T, H·D).
    """
    model = tiny_model()
    seen = []

    class Attention:
        """Keeps keys and values for itself, as an engine does."""

        def __init__(self):
            self.kept = []

        def forward(self, queries, keys, values, scale):
            self.kept.append((keys, values))
            keys, values = (torch.cat(parts, dim=2) for parts in zip(*self.kept, strict=True))
            mask = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - queries.shape[2])
            return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, mask, scale=scale)

    def engine(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
        seen.append(module.layer_idx)
        context = attention_instances[module.layer_idx].forward(query, key, value, scaling)
        return context.transpose(1, 2).flatten(2)[0], None

    ids = random_ids(1, 9)
    expected = model.model(ids).last_hidden_state
    AttentionInterface.register("engine", engine)
    model.set_attn_implementation("engine")
    instances = {layer: Attention() for layer in range(LAYERS)}
    steps = []
    for part in (slice(0, 6), slice(6, 7), slice(7, 9)):
        positions = torch.arange(9).unsqueeze(0)[:, part]
        steps += model.model(
            input_ids=ids[:, part],
            position_ids=positions,
            use_cache=False,
            attention_instances=instances,
            return_dict=False,
        )[:1]
    assert relative_error(expected, torch.cat(steps, dim=1)) < FP32_LOGITS
    assert seen == list(range(LAYERS)) * 3


def test_the_source_of_attention_is_what_vllm_reads():
    """vLLM 0.30 and newer look in `forward` for the look-up, for one call of what it gives, and for its scale."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(CachedAttention.forward)))
    looked_up = {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    }
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", None) in looked_up]
    assert len(looked_up) == len(calls) == 1
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in calls[0].keywords}["scaling"] == "self.scaling"


def test_unknown_attention_is_refused():
    model = tiny_model()
    with pytest.raises((ValueError, ImportError), match="no_such_attention"):
        model.set_attn_implementation("no_such_attention")


@pytest.mark.parametrize("masks", [True, False])
def test_the_books_model_becomes_a_transformers_model(tmp_path, masks):
    cfg = {"vocab_size": 97, "context_length": 16, "emb_dim": 24, "n_heads": 3, "n_layers": 2, "qkv_bias": False}
    book = randomize(GPTModel({**cfg, "drop_rate": 0.1})).eval()
    theirs = dict(book.state_dict())
    if masks:
        theirs |= {f"trf_blocks.{n}.att.mask": torch.ones(16, 16).triu(1) for n in range(2)}
    torch.save(theirs, tmp_path / "model.pth")
    model = GPTScratchForCausalLM.from_book(torch.load(tmp_path / "model.pth", weights_only=True), cfg)
    ids = random_ids(2, 12, vocab_size=97)
    torch.testing.assert_close(model(ids).logits, book(ids), atol=1e-4, rtol=1e-5)
    model.model.tok_emb.weight.data.zero_()
    assert theirs["tok_emb.weight"].any()


BOOK_CFG = dict(vocab_size=97, context_length=16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_layers": 3}, "n_layers=2, but the config says n_layers=3"),
        ({"n_layers": 1}, "n_layers=2, but the config says n_layers=1"),
        ({"vocab_size": 98}, "vocab_size=97, but the config says vocab_size=98"),
        ({"qkv_bias": True}, "qkv_bias=False, but the config says qkv_bias=True"),
        (
            {"context_length": 8, "emb_dim": 48},
            "context_length=16, but the config says emb_dim=48, context_length=8",
        ),
        ({"n_inner": 50}, r"layers\.0\.bias has shape \[96\] instead of \[50\]"),
    ],
)
def test_a_cfg_that_does_not_fit_the_state_dict_is_refused_with_both_values(change, told, capfd):
    cfg = {"vocab_size": 97, "context_length": 16, "emb_dim": 24, "n_heads": 3, "n_layers": 2, "qkv_bias": False}
    state_dict = GPTModel(cfg).state_dict()
    with pytest.raises(ValueError, match=told):
        GPTScratchForCausalLM.from_book(state_dict, {**cfg, **change})
    assert capfd.readouterr() == ("", "")  # the error says it all


@pytest.mark.parametrize("name", GPTModel(BOOK_CFG).state_dict())
def test_a_tensor_that_is_missing_is_named(name):
    state_dict = GPTModel(BOOK_CFG).state_dict()
    del state_dict[name]
    with pytest.raises(ValueError, match=name if name != "trf_blocks.0.att.W_query.bias" else "qkv_bias=False"):
        GPTScratchForCausalLM.from_book(state_dict, BOOK_CFG)


@pytest.mark.parametrize("name", ["n_head", "num_heads", "heads", "num_attention_heads", None])
def test_a_head_count_under_another_name_or_none_is_never_taken_from_the_defaults(name):
    """As all sizes: 12 heads would divide emb_dim as well, and compute something else."""
    state_dict = randomize(GPTModel(BOOK_CFG)).state_dict()
    cfg = {key: value for key, value in BOOK_CFG.items() if key != "n_heads"} | ({name: 3} if name else {})
    with pytest.raises((ValueError, KeyError), match="n_heads"):
        GPTScratchForCausalLM.from_book(state_dict, cfg)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_must_be_in_the_cfg(size):
    cfg = {key: value for key, value in BOOK_CFG.items() if key != size}
    with pytest.raises(KeyError, match=size):
        GPTScratchForCausalLM.from_book(GPTModel(BOOK_CFG).state_dict(), cfg)


@pytest.mark.parametrize(
    "key", [{"n_kv_groups": 1}, {"rope_base": 1e4}, {"dtype": torch.bfloat16}, {"qkv_bais": True}, {"my_own": "x"}]
)
def test_a_key_of_a_cfg_that_means_nothing_is_refused_by_name(key):
    with pytest.raises(ValueError, match=next(iter(key))):
        GPTScratchForCausalLM.from_book(GPTModel(BOOK_CFG).state_dict(), {**BOOK_CFG, **key})


def test_what_a_config_knows_beyond_the_book_is_taken_from_a_cfg():
    sizes = {"n_inner": 40, "layer_norm_epsilon": 1e-3}
    built = randomize(GPTScratchForCausalLM(GPTScratchConfig(**BOOK_CFG, **sizes))).eval()
    weights = {name.removeprefix("model."): tensor for name, tensor in built.state_dict().items()}
    more = {**sizes, "pad_token_id": 7, "num_labels": 3, "n_head": 3}
    for cfg in ({**BOOK_CFG, **more}, GPTScratchForCausalLM.from_book(weights, BOOK_CFG | more).config):
        model = GPTScratchForCausalLM.from_book(weights, cfg if isinstance(cfg, dict) else cfg.to_dict())
        ids = random_ids(2, 12, vocab_size=97)
        torch.testing.assert_close(model(ids).logits, built(ids).logits, atol=1e-4, rtol=1e-5)
        assert (model.config.pad_token_id, model.config.num_labels) == (7, 3)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_compiled_or_data_parallel_books_model_is_taken(prefix):
    book = randomize(GPTModel(BOOK_CFG)).eval()
    state_dict = {prefix + name: tensor for name, tensor in book.state_dict().items()}
    ids = random_ids(2, 12, vocab_size=97)
    logits = GPTScratchForCausalLM.from_book(state_dict, BOOK_CFG)(ids).logits
    torch.testing.assert_close(logits, book(ids), atol=1e-4, rtol=1e-5)


def test_a_tied_books_model_stays_tied_and_a_copied_head_stays_apart():
    book = randomize(GPTModel(BOOK_CFG))
    with torch.no_grad():
        book.out_head.weight.copy_(book.tok_emb.weight)
    apart = GPTScratchForCausalLM.from_book(book.state_dict(), BOOK_CFG)
    assert not apart.config.tie_word_embeddings
    book.out_head.weight = book.tok_emb.weight
    tied = GPTScratchForCausalLM.from_book(book.state_dict(), BOOK_CFG)
    assert tied.config.tie_word_embeddings and tied.out_head.weight is tied.model.tok_emb.weight
    assert tied.num_parameters() == apart.num_parameters() - 97 * 24


def test_a_cfg_that_ties_what_differs_is_refused():
    state_dict = randomize(GPTModel(BOOK_CFG)).state_dict()
    for cfg in ({**BOOK_CFG, "tie_word_embeddings": True}, GPTScratchConfig(**BOOK_CFG, tie_word_embeddings=True)):
        with pytest.raises(ValueError, match=r"tie_word_embeddings=True.*out_head\.weight"):
            GPTScratchForCausalLM.from_book(state_dict, cfg)


def test_what_is_told_of_a_state_dict_that_does_not_fit_has_the_values_and_a_bound():
    state_dict = {f"other.{n}": torch.randn(2) for n in range(1000)}
    with pytest.raises(ValueError, match=r"37 tensors missing: final_norm\.scale, .*1000 tensors unknown") as error:
        GPTScratchForCausalLM.from_book(state_dict, BOOK_CFG)
    assert "and 995 more" in str(error.value) and len(str(error.value)) < 2000


def test_from_book_says_what_it_was_given_instead(tmp_path):
    book = GPTModel(BOOK_CFG)
    for wrong, advice in (
        ([1], r"got a list as the state dict; give a path, model\.state_dict\(\) or the model"),
        (tmp_path, "is a directory, but the book saves files; from_pretrained"),
        (tiny_model(), "is a Transformers model already"),
        ({"a": 1}, r"got int under 'a'"),
        ({"model": book.state_dict(), "state_dict": book.state_dict()}, "under each of 'state_dict', 'model'"),
        ({**book.state_dict(), **{f"module.{n}": t for n, t in book.state_dict().items()}}, "has a tensor twice"),
    ):
        with pytest.raises(ValueError, match=advice):
            GPTScratchForCausalLM.from_book(wrong, BOOK_CFG)
    with pytest.raises(ValueError, match="as the cfg; the state dict comes first"):
        GPTScratchForCausalLM.from_book(book.state_dict(), book.state_dict())
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pth cannot be read as weights .*; `convert` says"):
        GPTScratchForCausalLM.from_book(tmp_path / "text.pth", BOOK_CFG)
    with pytest.raises(FileNotFoundError):
        GPTScratchForCausalLM.from_book("nowhere.pth", BOOK_CFG)


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for save in (tiny_model().save_pretrained, tiny_model().save_as_gpt2):
        with pytest.raises(NotADirectoryError, match="is a file, but a model is saved as a directory"):
            save(tmp_path / "file")
