"""What people do with a model on an ordinary day does what it does with the official one."""

import logging
import re
from functools import partial

import pytest
import torch
from pairs import gpt2_config, random_gpt2, random_ids, random_pair
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from hf_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from hf_gpt_scratch.model.compat import CACHE
from hf_gpt_scratch.model.configuration_gpt_scratch import FROM_GPT2
from hf_gpt_scratch.weights.parity import FP32_LOGITS, greedy_ids, relative_error

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of an official and of our checkpoint, and the official model."""
    directory = tmp_path_factory.mktemp("saved")
    gpt2, scratch = random_pair()
    gpt2.save_pretrained(directory / "official")
    scratch.save_pretrained(directory / "ours")
    return directory, gpt2


@pytest.fixture(params=["official", "ours"])
def kind(request):
    return request.param


# Offloading


def auto(directory, share, offload_folder, model_class=GPTScratchForCausalLM):
    """Loaded with device_map="auto" into so large a share of the memory it needs."""
    needed = model_class.from_pretrained(directory).get_memory_footprint()
    settings = dict(max_memory={"cpu": int(share * needed)}, offload_folder=offload_folder)
    return model_class.from_pretrained(directory, device_map="auto", **settings)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_what_does_not_fit_into_memory_is_computed_from_disk(saved, kind, share, tmp_path):
    directory, gpt2 = saved
    model = auto(directory / kind, share, tmp_path)
    official = auto(directory / "official", share, tmp_path / "theirs", GPT2LMHeadModel)
    assert "disk" in model.hf_device_map.values()
    assert "meta" in {p.device.type for p in model.parameters()}
    assert list(model.hf_device_map.values()) == list(official.hf_device_map.values())
    ids = random_ids()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    seen = mask.bool()
    logits = model(ids, attention_mask=mask).logits
    assert relative_error(gpt2(ids, attention_mask=mask).logits[seen], logits[seen]) <= FP32_LOGITS
    assert torch.equal(greedy_ids(model, ids[:, :5], 12), greedy_ids(gpt2, ids[:, :5], 12))


def test_the_cache_is_not_moved_between_devices_as_other_inputs_are(saved, kind, tmp_path):
    directory, _ = saved
    model = auto(directory / kind, 0.5, tmp_path)
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    moving = [hook for hook in hooks if getattr(hook, "io_same_device", False)]
    assert moving and all(CACHE in hook.skip_keys for hook in moving)


def test_no_block_is_split_between_devices(saved, kind, tmp_path):
    directory, _ = saved
    model = auto(directory / kind, 0.7, tmp_path)
    assert not any(".att" in place or ".ff" in place for place in model.hf_device_map)


@torch.no_grad()
# transformers, of models far larger than this one
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_an_offloaded_official_checkpoint_saves_as_ours(saved, tmp_path):
    directory, gpt2 = saved
    model = auto(directory / "official", 0.5, tmp_path / "offload")
    model.save_pretrained(tmp_path / "saved")
    ids = random_ids()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is GPTScratchForCausalLM
    assert relative_error(gpt2(ids).logits, again(ids).logits) <= FP32_LOGITS


# Types and sizes


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_checkpoints_dtype_is_kept_unless_told_otherwise(tmp_path, kind, stored):
    gpt2, scratch = random_pair()
    (gpt2 if kind == "official" else scratch).to(stored).save_pretrained(tmp_path)
    for settings, expected in (({"dtype": "auto"}, stored), ({}, stored), ({"dtype": "float64"}, torch.float64)):
        model = GPTScratchForCausalLM.from_pretrained(tmp_path, **settings)
        assert {p.dtype for p in model.parameters()} == {expected} == {model.config.dtype}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_footprint_and_parameters_are_the_official_ones(tied, dtype):
    gpt2 = random_gpt2(tie_word_embeddings=tied).to(dtype)
    scratch = GPTScratchForCausalLM.from_gpt2(gpt2)
    assert scratch.get_memory_footprint() == gpt2.get_memory_footprint()
    assert scratch.num_parameters() == gpt2.num_parameters()
    assert scratch.num_parameters(exclude_embeddings=True) == gpt2.num_parameters(exclude_embeddings=True)


# Configurations


def test_the_diff_of_a_config_is_the_officials_in_our_names():
    official = gpt2_config(scale_attn_by_inverse_layer_idx=True, resid_pdrop=0.3, id2label={0: "a", 1: "b", 2: "c"})
    ours = GPTScratchConfig.from_gpt2(official).to_diff_dict()
    theirs = {FROM_GPT2.get(name, name): value for name, value in official.to_diff_dict().items()}
    ours_alone = {"drop_rate", "qkv_bias", "book_classifier"}
    assert ours.keys() - ours_alone == theirs.keys()
    assert {name: ours[name] for name in theirs if name != "model_type"} == {
        name: value for name, value in theirs.items() if name != "model_type"
    }


def test_a_diff_has_what_was_changed_and_no_default_of_transformers():
    plain, changed = GPTScratchConfig(), GPTScratchConfig(n_layers=3, num_labels=5, custom="mine")
    told = {k: v for k, v in changed.to_diff_dict().items() if plain.to_diff_dict().get(k, "absent") != v}
    assert {"n_layers", "custom"} <= told.keys() <= {"n_layers", "custom", "id2label", "label2id"}
    assert len(told["id2label"]) == 5
    assert "chunk_size_feed_forward" not in plain.to_diff_dict()
    assert GPTScratchConfig(**changed.to_diff_dict()).to_dict() == changed.to_dict()
    assert GPT2Config().to_diff_dict().keys() >= {"n_layer", "vocab_size"}, "a config's own fields always stay"


# Arguments of other days


def outcome(make, model_class, arguments):
    """What comes of it: dtype and attention, or the error; and what the user is told."""
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append((record.levelname, record.getMessage()))
    transformers_logging.warning_once.cache_clear()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(handler)
    try:
        model = make(**arguments)
        came = (model.dtype, model.config._attn_implementation, model.config.output_hidden_states)
    except (TypeError, ValueError, OSError, ImportError) as error:
        text = re.sub(r"directory \S+", "directory", str(error)).replace(model_class.__name__, "MODEL")
        came = (type(error), text.partition("The only possible")[0])  # ours has flex_attention, too
    finally:
        logger.removeHandler(handler)
        transformers_logging.set_verbosity(verbosity)
    return came, [(level, text.replace(model_class.__name__, "MODEL")) for level, text in told]


def loading(model_class, directory, arguments):
    return outcome(partial(model_class.from_pretrained, directory), model_class, arguments)


ARGUMENTS = {
    "torch_dtype": torch.bfloat16,
    "torch_dtype as a string": "bfloat16",
    "torch_dtype auto": "auto",
    "dtype": "no_such_dtype",
    "low_cpu_mem_usage": True,
    "_fast_init": True,
    "load_in_8bit": True,
    "use_flash_attention_2": True,
    "attn_implementation": "eager",
    "attn_implementation unknown": "no_such_attention",
    "use_auth_token": "hf_none",
    "resume_download": True,
    "use_safetensors": False,
    "from_tf": True,
    "output_hidden_states": True,
    "no_such_argument": 1,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_old_and_wrong_are_taken_or_refused_as_by_the_official_class(saved, kind, name):
    directory, _ = saved
    arguments = {name.split()[0]: ARGUMENTS[name]}
    theirs = loading(GPT2LMHeadModel, directory / "official", arguments)
    assert loading(GPTScratchForCausalLM, directory / kind, arguments) == theirs


def test_the_old_name_of_dtype_is_taken_with_the_same_warning():
    gpt2, scratch = random_pair()
    theirs, ours = (
        outcome(partial(type(model)._from_config, model.config), type(model), {"torch_dtype": torch.bfloat16})
        for model in (gpt2, scratch)
    )
    assert ours == theirs
    assert ours[0][0] == torch.bfloat16
    assert [text for _, text in ours[1]] == ["`torch_dtype` is deprecated! Use `dtype` instead!"]


def test_the_outcomes_tell_arguments_apart(saved):
    """Else the comparisons above would be vacuous."""
    names = ("torch_dtype", "torch_dtype auto", "attn_implementation", "no_such_argument", "load_in_8bit")
    outcomes = [loading(GPTScratchForCausalLM, saved[0] / "ours", {name.split()[0]: ARGUMENTS[name]}) for name in names]
    assert len({str(outcome) for outcome in outcomes}) == len(names)
