"""Changes of transformers that nobody has made yet: python tests/helpers/injected.py

Each is made to the library in a process of its own, before the package, or the code of a directory that it saved, is
imported. Then text is generated in every mode. Whatever the change, each mode gives the official ids, or an error that
names the version and the remedy; other ids in silence are the one thing that must not be.

    python tests/helpers/injected.py                   all of them, under the number of a version to come
    python tests/helpers/injected.py --only swallowed  those whose name has it
"""

# ruff: noqa: E402  # the environment is set before torch and transformers look at it

import argparse
import functools
import gc
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
CACHES = tempfile.mkdtemp(prefix="injected-")
os.environ["HF_MODULES_CACHE"] = CACHES + "/modules"

import torch
import transformers
from transformers import (
    GenerationConfig,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    cache_utils,
    conversion_mapping,
    core_model_loading,
    masking_utils,
    modeling_layers,
    modeling_outputs,
    modeling_utils,
)
from transformers.generation.continuous_batching import cache as paged
from transformers.utils import generic, output_capturing

torch.set_num_threads(1)
COMING = "5.99.0"
CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
ROOT = Path(__file__).resolve().parents[2]
CHANGES = {}


def change(function):
    CHANGES[function.__name__.replace("_", " ")] = function
    return function


def wrapped(owner, name):
    """Decorator: replaces `owner.name` by a function that is given the old one first."""

    def put(function):
        old = getattr(owner, name)
        new = functools.wraps(old)(lambda *args, **kwargs: function(old, *args, **kwargs))
        setattr(owner, name, new)
        return function

    return put


def inputs_changed(edit):
    """What `generate` hands to the forward pass of every model but the official one's own class."""

    @wrapped(GenerationMixin, "prepare_inputs_for_generation")
    def prepare(old, self, *args, **kwargs):
        inputs = old(self, *args, **kwargs)
        if type(self).__module__ != "transformers.models.gpt2.modeling_gpt2":  # which a release changes along
            edit(inputs)
        return inputs


# ---- what generate hands over


@change
def the_cache_has_another_name():
    inputs_changed(lambda inputs: inputs.update(kv_cache=inputs.pop(CACHE, None)))


@change
def the_cache_has_the_old_name():
    inputs_changed(lambda inputs: inputs.update(past_key_values=inputs.pop(CACHE, None)))


@change
def the_cache_comes_in_a_tuple():
    inputs_changed(lambda inputs: inputs.update(states=(inputs.pop(CACHE, None),)))


@change
def the_cache_comes_in_a_dict():
    inputs_changed(lambda inputs: inputs.update(generation_state={"cache": inputs.pop(CACHE, None)}))


@change
def the_cache_comes_in_an_object():
    inputs_changed(lambda inputs: inputs.update(state=type("State", (), {"cache": inputs.pop(CACHE, None)})()))


@change
def the_cache_is_kept_by_the_library():
    inputs_changed(lambda inputs: inputs.pop(CACHE, None))


@change
def neither_cache_nor_mask_nor_positions_come():
    inputs_changed(lambda inputs: [inputs.pop(name, None) for name in (CACHE, "attention_mask", "position_ids")])


@change
def positions_no_longer_come():
    inputs_changed(lambda inputs: inputs.pop("position_ids", None))


@change
def positions_have_another_name():
    inputs_changed(lambda inputs: inputs.update(positions=inputs.pop("position_ids", None)))


@change
def positions_count_from_one():
    inputs_changed(
        lambda inputs: inputs.update(position_ids=inputs["position_ids"] + 1) if "position_ids" in inputs else None
    )


@change
def the_mask_no_longer_comes():
    inputs_changed(lambda inputs: inputs.pop("attention_mask", None))


@change
def the_mask_has_another_name():
    inputs_changed(lambda inputs: inputs.update(padding_mask=inputs.pop("attention_mask", None)))


def _only_2d(inputs, edit):
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        inputs["attention_mask"] = edit(mask)


@change
def the_mask_is_of_the_new_tokens_only():
    inputs_changed(lambda inputs: _only_2d(inputs, lambda mask: mask[:, -inputs["input_ids"].shape[1] :]))


@change
def the_mask_marks_padding():
    inputs_changed(lambda inputs: _only_2d(inputs, lambda mask: 1 - mask))


@change
def the_mask_is_as_long_as_the_text_will_be():
    inputs_changed(lambda inputs: _only_2d(inputs, lambda mask: torch.nn.functional.pad(mask, (0, 20), value=1)))


@change
def all_tokens_come_at_every_step():
    @wrapped(GenerationMixin, "prepare_inputs_for_generation")
    def prepare(old, self, input_ids, *args, **kwargs):
        inputs = old(self, input_ids, *args, **kwargs)
        return {**inputs, "input_ids": input_ids}


@change
def ids_have_another_name():
    inputs_changed(lambda inputs: inputs.update(tokens=inputs.pop("input_ids")))


@change
def use_cache_no_longer_comes():
    inputs_changed(lambda inputs: inputs.pop("use_cache", None))


@change
def logits_to_keep_has_another_name():
    inputs_changed(lambda inputs: inputs.update(keep_logits=inputs.pop("logits_to_keep", None)))


@change
def token_types_come_unasked():
    inputs_changed(lambda inputs: inputs.update(token_type_ids=torch.ones_like(inputs["input_ids"])))


# ---- the cache


@change
def update_returns_the_new_states_only():
    @wrapped(cache_utils.Cache, "update")
    def update(old, self, keys, values, *args, **kwargs):
        old(self, keys, values, *args, **kwargs)
        return keys, values


@change
def update_no_longer_stores():
    cache_utils.Cache.update = lambda self, keys, values, *args, **kwargs: (keys, values)


@change
def update_stores_twice():
    @wrapped(cache_utils.Cache, "update")
    def update(old, self, keys, values, *args, **kwargs):
        old(self, keys, values, *args, **kwargs)
        return old(self, keys, values, *args, **kwargs)


@change
def update_wants_a_position():
    @wrapped(cache_utils.Cache, "update")
    def update(old, self, keys, values, layer_idx, *args, position, **kwargs):
        return old(self, keys, values, layer_idx, *args, **kwargs)


@change
def update_returns_an_object():
    @wrapped(cache_utils.Cache, "update")
    def update(old, self, *args, **kwargs):
        return type("States", (), dict(zip(("keys", "values"), old(self, *args, **kwargs), strict=True)))()


@change
def update_returns_values_first():
    wrapped(cache_utils.Cache, "update")(lambda old, self, *args, **kwargs: old(self, *args, **kwargs)[::-1])


@change
def update_counts_layers_from_one():
    @wrapped(cache_utils.Cache, "update")
    def update(old, self, keys, values, layer_idx, *args, **kwargs):
        return old(self, keys, values, max(layer_idx - 1, 0), *args, **kwargs)


@change
def update_is_called_put():
    cache_utils.Cache.put = cache_utils.Cache.update
    del cache_utils.Cache.update


@change
def the_cache_no_longer_knows_its_length():
    cache_utils.Cache.get_seq_length = lambda self, *args, **kwargs: 0


@change
def the_length_is_a_property():
    cache_utils.Cache.get_seq_length = property(lambda self: self.layers[0].get_seq_length() if self.layers else 0)


@change
def layers_keep_other_fields():
    @wrapped(cache_utils.DynamicLayer, "reorder_cache")
    def reorder(old, self, beam_idx):
        self.order = beam_idx

    @wrapped(cache_utils.DynamicLayer, "update")
    def update(old, self, *args, **kwargs):
        order, self.order = getattr(self, "order", None), None
        if order is not None:
            self.keys, self.values = self.keys[order], self.values[order]
        return old(self, *args, **kwargs)


@change
def the_dynamic_cache_has_its_own_layers():
    cache_utils.DynamicCache.layers = property(
        lambda self: self._own, lambda self, layers: setattr(self, "_own", list(layers))
    )


# ---- masks


def masks_changed(make):
    wrapped(masking_utils, "create_causal_mask")(make)


@change
def the_mask_function_wants_other_arguments():
    def make(old, *, config, hidden_states, padding, cache):
        return old(config=config, inputs_embeds=hidden_states, attention_mask=padding, **{CACHE: cache})

    masks_changed(make)


@change
def the_mask_function_swallows_the_cache():
    def make(old, *args, **kwargs):
        kwargs[CACHE] = None
        return old(*args, **kwargs)

    masks_changed(make)


@change
def the_mask_function_swallows_the_padding():
    masks_changed(lambda old, *args, **kwargs: old(*args, **{**kwargs, "attention_mask": None}))


@change
def the_mask_function_leaves_causality_to_attention():
    masks_changed(lambda old, *args, **kwargs: None)


@change
def masks_say_what_is_hidden():
    def make(old, *args, **kwargs):
        mask = old(*args, **kwargs)
        return ~mask if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool else mask

    masks_changed(make)


@change
def masks_come_by_kind_of_layer():
    masks_changed(lambda old, *args, **kwargs: {"full_attention": old(*args, **kwargs)})


@change
def the_mask_function_is_elsewhere():
    del masking_utils.create_causal_mask


# ---- attention


def attention_changed(call):
    functions = modeling_utils.ALL_ATTENTION_FUNCTIONS
    old = functions["sdpa"]
    functions["sdpa"] = functools.wraps(old)(lambda *args, **kwargs: call(old, *args, **kwargs))


@change
def attention_ignores_the_scaling():
    attention_changed(lambda old, *args, scaling=None, **kwargs: old(*args, **kwargs))


@change
def attention_ignores_the_mask():
    def call(old, module, query, key, value, attention_mask=None, **kwargs):
        return old(module, query, key, value, None, **kwargs)

    attention_changed(call)


@change
def attention_returns_heads_first():
    def call(old, *args, **kwargs):
        out, weights = old(*args, **kwargs)
        return out.transpose(1, 2), weights

    attention_changed(call)


@change
def attention_wants_tokens_before_heads():
    def call(old, module, query, key, value, *args, **kwargs):
        return old(module, *(states.transpose(1, 2) for states in (query, key, value)), *args, **kwargs)

    attention_changed(call)


@change
def attention_returns_one_tensor():
    attention_changed(lambda old, *args, **kwargs: old(*args, **kwargs)[0])


@change
def attention_wants_values_before_keys():
    attention_changed(
        lambda old, module, query, key, value, *args, **kwargs: old(module, query, value, key, *args, **kwargs)
    )


@change
def attention_updates_the_cache_itself():
    def call(old, module, query, key, value, *args, **kwargs):
        held = call.cache.layers[module.layer_idx] if call.cache is not None else None
        if held is not None and held.get_seq_length():
            key, value = torch.cat([held.keys, key], -2), torch.cat([held.values, value], -2)
        return old(module, query, key, value, *args, **kwargs)

    call.cache = None
    attention_changed(call)

    @wrapped(cache_utils.Cache, "update")
    def update(old, self, *args, **kwargs):
        call.cache = self
        return old(self, *args, **kwargs)


@change
def attention_functions_are_found_otherwise():
    type(modeling_utils.ALL_ATTENTION_FUNCTIONS).get_interface = lambda self, config: self[config._attn_implementation]


# ---- outputs


@change
def outputs_have_another_name_for_the_cache():
    for name in ("BaseModelOutputWithPastAndCrossAttentions", "CausalLMOutputWithCrossAttentions"):
        old = getattr(modeling_outputs, name)
        fields = {field: value for field, value in inspect.get_annotations(old).items() if field != CACHE}
        body = {"__annotations__": {**fields, "kv": object}, **dict.fromkeys([*fields, "kv"])}
        from dataclasses import dataclass

        setattr(modeling_outputs, name, dataclass(type(name, (generic.ModelOutput,), body)))


@change
def outputs_no_longer_carry_the_cache():
    @wrapped(GenerationMixin, "_update_model_kwargs_for_generation")
    def update(old, self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = old(self, outputs, model_kwargs, *args, **kwargs)
        model_kwargs.pop(CACHE, None)
        return model_kwargs


@change
def captured_outputs_come_as_tuples():
    wrapped(output_capturing, "capture_outputs")(
        lambda old, function=None, **kwargs: lambda *a, **k: tuple(old(function, **kwargs)(*a, **k).values())
    )


@change
def config_defaults_are_no_longer_merged():
    generic.merge_with_config_defaults = lambda function: function


@change
def the_generic_decorators_are_gone():
    del generic.merge_with_config_defaults


# ---- loading


@change
def conversions_are_registered_otherwise():
    conversion_mapping.register_checkpoint_conversion_mapping = lambda *args, **kwargs: None


@change
def the_loader_no_longer_converts():
    for name in ("get_model_conversion_mapping", "get_checkpoint_conversion_mapping"):
        for module in (conversion_mapping, modeling_utils):
            if hasattr(module, name):
                setattr(module, name, lambda *args, **kwargs: [])


@change
def the_loader_transposes_conv1d_itself():
    @wrapped(core_model_loading, "convert_and_load_state_dict_in_model")
    def load(old, model, state_dict, *args, **kwargs):
        square = re.compile(r"attn\.c_proj\.weight$")
        turned = {
            name: tensor.T if isinstance(tensor, torch.Tensor) and square.search(name) else tensor
            for name, tensor in (state_dict or {}).items()
        }
        return old(model, turned, *args, **kwargs)

    modeling_utils.convert_and_load_state_dict_in_model = core_model_loading.convert_and_load_state_dict_in_model


@change
def operations_get_their_tensors_otherwise():
    @wrapped(core_model_loading.WeightConverter, "convert")
    def convert(old, self, layer_name, **kwargs):
        self.collected_tensors = {k: tuple(v) for k, v in self.collected_tensors.items()}
        return old(self, layer_name, **kwargs)


@change
def tied_weights_are_declared_otherwise():
    modeling_utils.PreTrainedModel.tie_weights = lambda self, *args, **kwargs: None


@change
def loaded_weights_are_initialised_again():
    @wrapped(modeling_utils.PreTrainedModel, "tie_weights")
    def tie(old, self, *args, **kwargs):
        old(self, *args, **kwargs)
        if type(self).__module__ != "transformers.models.gpt2.modeling_gpt2":
            with torch.no_grad():
                for weight in self.parameters():
                    if weight.device.type != "meta":
                        weight.normal_()


# ---- continuous batching


def paged_update(make):
    if hasattr(paged, "PagedAttentionCache"):
        wrapped(paged.PagedAttentionCache, "update")(make)


@change
def the_paged_cache_is_updated_by_somebody_else():
    def make(old, self, keys=None, values=None, *args, **kwargs):
        keys, values = kwargs.get("key_states", keys), kwargs.get("value_states", values)
        return keys, values

    paged_update(make)


@change
def the_paged_cache_wants_other_arguments():
    paged_update(lambda old, self, states, *, layer, step: states)


@change
def checkpointing_layers_drop_the_cache():
    @wrapped(modeling_layers.GradientCheckpointingLayer, "__call__")
    def call(old, self, x, *args, **kwargs):
        args = [None if isinstance(value, cache_utils.Cache) else value for value in args]
        return old(self, x, *args, **{k: None if isinstance(v, cache_utils.Cache) else v for k, v in kwargs.items()})


# ---- what is done with each


def tiny_official():
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=24, n_layer=2, n_head=3, bos_token_id=None, eos_token_id=None,
        pad_token_id=96,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.5, generator=generator)
            weight += ".ln_" in name and name.endswith("weight")
    return model


PROMPTS = [[5, 3, 9, 20], [41, 7, 66, 2, 80, 11, 30]]


def padded():
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[96] * (width - len(row)) + row for row in PROMPTS])
    return ids, (ids != 96).long()


def plain(**options):
    def mode(model):
        ids, mask = padded()
        torch.manual_seed(0)
        settings = {"max_new_tokens": 8, "do_sample": False, **options}
        return model.generate(ids, attention_mask=mask, **settings).tolist()

    return mode


def one_prompt(**options):
    def mode(model):
        ids = torch.tensor([PROMPTS[1] + PROMPTS[1][:3]])
        return model.generate(ids, max_new_tokens=8, do_sample=False, **options).tolist()

    return mode


def continued(model):
    ids = torch.tensor(PROMPTS[1:])
    first = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    settings = dict(max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(first.sequences))
    return model.generate(first.sequences, **settings, **{CACHE: getattr(first, CACHE)}).tolist()


def forward(model):
    ids, mask = padded()
    with torch.no_grad():
        best = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits.argmax(-1)
    return [row[keep.bool()].tolist() for row, keep in zip(best, mask, strict=True)]


def batch(model):
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=96)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    answers = model.generate_batch(
        PROMPTS, generation_config=settings, continuous_batching_config=small, progress_bar=False
    )
    return [list(answer.generated_tokens) for answer in answers.values()]


MODES = {
    "greedy": plain(),
    "no cache": plain(use_cache=False),
    "beams": plain(num_beams=3),
    "sampling": plain(do_sample=True, top_k=7, temperature=1.3),
    "static": plain(cache_implementation="static"),
    "prompt lookup": one_prompt(prompt_lookup_num_tokens=3),
    "continued": continued,
    "forward": forward,
    "batch": batch,
}


def load(what, directory):
    if what == "package":
        from hf_gpt_scratch import GPTScratchForCausalLM

        return GPTScratchForCausalLM.from_pretrained(directory / "official")
    sys.modules["hf_gpt_scratch"] = None
    return transformers.AutoModelForCausalLM.from_pretrained(directory / "saved", trust_remote_code=True)


def explains(error):
    text = f"{type(error).__name__}: {error}"
    return COMING in text and "pip install" in text


def modes(name, expected):
    """Continuous batching takes a second, so it is run for the changes that may touch it."""
    batched = any(word in (name or "paged") for word in ("paged", "attention"))
    return {mode: MODES[mode] for mode in expected if batched or mode != "batch"}


def outcome(name, what, directory, expected):
    """For each mode "same", "error", "unexplained" (an error that names neither version nor remedy) or "WRONG"."""
    try:
        model = load(what, directory).eval()
    except Exception as error:
        return {"loading": "error" if explains(error) else f"unexplained {error!r:.300}"}
    told = {}
    for mode_name, mode in modes(name, expected).items():
        try:
            got = mode(model)
            told[mode_name] = "same" if got == expected[mode_name] else f"WRONG {got}"[:300]
        except Exception as error:
            told[mode_name] = "error" if explains(error) else f"unexplained {error!r:.300}"
    return told


def in_a_child(function, *args):
    """What the function returns, in a copy of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 2)
                os.dup2(null.fileno(), 1)
            answer = function(*args)
        except BaseException:
            answer = {"crash": "unexplained " + traceback.format_exc()[-600:]}
        with os.fdopen(writer, "w") as file:
            json.dump(answer, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"crash": "unexplained: no answer"}


def changed(name, what, directory, expected):
    # The module that `import transformers` finds is made anew as more of it is imported.
    sys.modules["transformers"].__version__ = transformers.__version__ = COMING
    if name is not None:
        CHANGES[name]()
    return outcome(name, what, directory, expected)


def prepare(directory):
    """An official checkpoint, the directory that the package makes of it, and the official ids."""
    official = tiny_official()
    official.save_pretrained(directory / "official")

    def save():
        sys.path.insert(0, str(ROOT))
        from hf_gpt_scratch import GPTScratchForCausalLM

        GPTScratchForCausalLM.from_pretrained(directory / "official").save_pretrained(directory / "saved")
        return {}

    failed = in_a_child(save)
    if failed:
        raise SystemExit(failed["crash"])
    return in_a_child(official_ids, official)


def official_ids(model):
    """Of the modes that the official model has in this version, and on this machine."""
    expected = {}
    for name, mode in MODES.items():
        try:
            expected[name] = mode(model)
        except Exception as error:
            print(f"{name}: the official model fails too, {type(error).__name__}")
    greedy = [row[-8:] for row in expected["greedy"]]
    if expected.get("batch") != greedy:
        expected.pop("batch", None)
    return expected


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="the changes whose name has this")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    options = parser.parse_args(arguments)
    directory = Path(tempfile.mkdtemp(prefix="injected-"))
    bad, told = 0, {}
    try:
        expected = prepare(directory)
        sys.path.insert(0, str(ROOT))
        gc.freeze()  # or every child looks for garbage in all of the libraries
        names = [None, *(name for name in CHANGES if options.only in name)]
        for name in names:
            for what in ("package", "saved"):
                result = told[f"{name or 'no change'}, {what}"] = in_a_child(changed, name, what, directory, expected)
                wrong = {mode: text for mode, text in result.items() if text not in ("same", "error")}
                if name is None:
                    wrong = {mode: text for mode, text in result.items() if text != "same"}
                kinds = sorted({text.split()[0] for text in result.values()})
                print(f"{'BAD ' if wrong else 'ok  '}{name or 'no change'}, {what}: {', '.join(kinds)}", flush=True)
                for text in {text: mode for mode, text in wrong.items()}:
                    print(
                        f"      {', '.join(mode for mode, other in wrong.items() if other == text)}: {text}", flush=True
                    )
                bad += bool(wrong)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(CACHES, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(told, indent=1))
    print(f"{len(names) - 1} changes, the package and a saved directory each: {bad} of {2 * len(names)} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
