"""Differences between versions of transformers, a check of the installed one, and what code does without the package.

transformers has a minor release nearly every week, and may pass a model new keywords. A cache under an unknown name
would change the generated text without an error, so no cache is ever ignored here.

What it does between a prompt and a model changes, too. So before the first use in a process, `LibraryCheck` generates
with a tiny model on weights and prompts whose right ids are known, which takes a fifth of a second.
"""

import os
import re
import tempfile
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, GPT2Config, PreTrainedModel
from transformers.utils import logging

from .configuration_gpt_scratch import FEED_FORWARD_STYLE, IN_PACKAGE, SHARDED_LOADING

if SHARDED_LOADING:
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import TensorParallelLayer

logger = logging.get_logger(__name__)

OLDEST_TESTED, NEWEST_TESTED = "5.4.0", "5.24.0"
INSTALLED = transformers.__version__

# transformers' name for the cache: `cache` from 5.24 on, in forward passes, outputs and `generate`.
_names = signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _names else "past_key_values"


def is_newer_than_tested(version: str) -> bool:
    """Whether a version of transformers is of a later minor release than all versions that were tested."""
    return Version(version).release[:2] > Version(NEWEST_TESTED).release[:2]


_UNTESTED = is_newer_than_tested(INSTALLED)


def is_untested() -> bool:
    """Whether this transformers is newer than all versions that were tested."""
    return _UNTESTED


def advice() -> str:
    """The remedy when transformers does something unexpected."""
    return (
        f"this is transformers {INSTALLED}, and {OLDEST_TESTED} to {NEWEST_TESTED} were tested: "
        f'pip install "transformers<={NEWEST_TESTED}", or a newer hf_gpt_scratch'
    )


def _not_here(model_class: type, what: str) -> str:
    return (
        f"{model_class.__name__}.{what} is not in the code that came along with this model; pip install "
        "hf-gpt-scratch, and load the model by the class there, without trust_remote_code"
    )


class NoTranslation(PreTrainedModel):
    """In place of `Interop` in code that came along with a model: says what has it."""

    @classmethod
    def from_book(cls, *args, **kwargs):
        """Not in the code that comes along with a model."""
        raise ImportError(_not_here(cls, "from_book"))

    @classmethod
    def from_gpt2(cls, *args, **kwargs):
        """Not in the code that comes along with a model."""
        raise ImportError(_not_here(cls, "from_gpt2"))

    def to_gpt2(self, *args, **kwargs):
        """Not in the code that comes along with a model."""
        raise ImportError(_not_here(type(self), "to_gpt2"))

    def save_as_gpt2(self, *args, **kwargs):
        """Not in the code that comes along with a model."""
        raise ImportError(_not_here(type(self), "save_as_gpt2"))


class Plain:
    """In place of `decoding` and `loss` in code that came along with a model: the same results, by plain ways."""

    onednn_products = nullcontext

    @staticmethod
    def product(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer(x)

    @staticmethod
    def growing_cache(config: Any) -> DynamicCache:
        return DynamicCache(config=config)

    @staticmethod
    def can_skip_logits(model: nn.Module) -> bool:
        return False


def few(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def explained():
    """Adds the tested versions to the message of an ImportError."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{error}; {advice()}", name=error.name, path=error.path) from error


def is_cache(value: Any) -> bool:
    """Whether the value is a cache of keys and values, paged or not."""
    return isinstance(value, Cache) or (callable(getattr(value, "update", None)) and "Cache" in type(value).__name__)


def one_cache(past_key_values: Any, cache: Any, kwargs: dict[str, Any], attention_mask: Any = None) -> Any:
    """The cache that was passed to a forward pass, under either name.

    Before 5.24, `cache` is the paged cache of continuous batching, which is passed on to the attention function.

    Raises:
        TypeError: there are two caches, one under a name that would be ignored, or something that is not a cache.
    """
    if is_cache(attention_mask):
        raise TypeError(f"got a cache as attention_mask; pass it by name, {CACHE}=…")
    if CACHE == "past_key_values" and cache is not None and not isinstance(cache, Cache):
        kwargs["cache"] = cache
        cache = None
    for name, value in kwargs.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if not (name == "cache" and name != CACHE) and any(map(is_cache, values)):
            raise TypeError(
                f"got a {type(value).__name__} as {name!r}, but a cache is read from `past_key_values` or `cache` only "
                f"and would be ignored here; {advice()}"
            )
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise TypeError("got both `past_key_values` and `cache`, two names of one argument; pass one of them")
    found = past_key_values if cache is None else cache
    if found is not None and not is_cache(found):
        raise TypeError(f"got a {type(found).__name__} as the cache; pass one of transformers', such as DynamicCache()")
    return found


# Tensors that forward passes get by keyword and pass on to attention functions and losses.
READ_ELSEWHERE = re.compile(
    r"cache|cache_position|labels|shift_labels|num_items_in_batch|seq_idx|block_table|logits_indices|logits_processor_args|"
    r"(cu_seq_lens|max_length|max_seqlen|cu_seqlens)(_[qk])?|(read|write)_index|[kv]_cache|s_aux"
)


def refuse_unread(kwargs: dict[str, Any]) -> None:
    """Raises TypeError for a tensor under a keyword that neither this model nor what it calls is known to read."""
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and not READ_ELSEWHERE.fullmatch(name):
            raise TypeError(f"got the tensor {name!r}, which would be ignored; {advice()}")


def check_mask(attention_mask: torch.Tensor, num_past: int, num_new: int) -> None:
    """Raises ValueError unless a mask (B, S) has one column for each token, cached or new."""
    if attention_mask.shape[-1] != num_past + num_new:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[-1]} columns, but there are {num_past + num_new} tokens, "
            f"{num_past} in the cache and {num_new} new ones; give one column per token, and pass the cache "
            f"as `{CACHE}` ({advice()})"
        )


def check_growth(cache: Any, expected: int) -> None:
    """Raises RuntimeError unless a cache holds `expected` tokens after a forward pass."""
    length = cache.get_seq_length()
    if isinstance(length, int) and length != expected:
        raise RuntimeError(f"the cache holds {length} tokens after a forward pass instead of {expected}; {advice()}")


# Several processes

if SHARDED_LOADING:

    class FeedForwardParallel(TensorParallelLayer):
        """The first layer by columns, the last by rows, the activation on each process's part.

        One style for all of `ff.layers`, since transformers' plans cannot distinguish numbers in names.
        """

        def style(self, module: nn.Module) -> TensorParallelLayer:
            if not isinstance(module, nn.Linear):
                return ALL_PARALLEL_STYLES["replicated_with_grad_allreduce"]
            return ALL_PARALLEL_STYLES["rowwise" if hasattr(module, "adds_to_shortcut") else "colwise"]

        def shard_param(self, module, param, mesh):
            self.style(module).shard_param(module, param, mesh)

        def install_forward(self, module, mesh):
            return self.style(module).install_forward(module, mesh)

    ALL_PARALLEL_STYLES.register(FEED_FORWARD_STYLE, FeedForwardParallel())  # type: ignore[arg-type]  # as all styles


def refuse_tensor_parallel_loading(options: dict) -> None:
    """Before 5.22, transformers would shard official tensors as if their rows were ours, and compute wrong logits.

    Raises:
        ValueError: `options` of `from_pretrained` ask for it.
    """
    asked = [name for name in ("tp_plan", "tp_size", "distributed_config") if options.get(name) is not None]
    if asked and not SHARDED_LOADING:
        raise ValueError(
            f"from_pretrained got {', '.join(asked)}, but tensor parallelism of this model needs transformers 5.22 or "
            "newer; update transformers, or load the model without"
        )


# The check before the first use


class LibraryCheck:
    """Generates with a tiny model before the first use in a process, and raises an error if the ids are not the
    official model's with the same weights.

    Args:
        model_class: returns the language model's class.
    """

    def __init__(self, model_class: Callable[[], type[PreTrainedModel]]):
        self.model_class = model_class
        self.passed: set[str] = set()
        self.warned = False
        self._make_lock()
        if hasattr(os, "register_at_fork"):  # a process that is forked during a check would wait forever
            os.register_at_fork(after_in_child=self._make_lock)

    def _make_lock(self) -> None:
        self.lock, self.running = threading.RLock(), False

    def __call__(self, what: str = "generate") -> None:
        """Checks `generate`, including forward passes, or `generate_batch`, once in a process.

        It does not run while operations are traced or counted, since it would be traced and counted, too.

        Raises:
            RuntimeError: this transformers gives other results; the message names version and remedy.
        """
        if what in self.passed or self.running or _is_traced():
            return
        with self.lock:
            if what in self.passed:
                return
            if is_untested() and not self.warned:
                self.warned = True
                logger.warning(
                    f"transformers {INSTALLED} is newer than {NEWEST_TESTED}, the newest that "
                    "hf_gpt_scratch was tested with; a tiny model is checked first."
                )
            self.running = True
            try:
                with _undisturbed():
                    # An error that does not recur has another cause: a time limit of the user's, another thread.
                    first = self._failure(what)
                    failure = first and self._failure(what)
            finally:
                self.running = False
            if failure is not None:
                raise RuntimeError(f"{failure[0]}; {advice()}") from failure[1]
            if first is not None and first[1] is not None:
                raise first[1]
            self.passed.add(what)

    def _failure(self, what: str) -> tuple[str, Exception | None] | None:
        """What is wrong, and the exception that it raised, if any."""
        model_class = self.model_class()
        try:
            for model, modes in _trials(what, model_class):
                for name, mode in modes.items():
                    got = _attempt(mode, model)
                    if isinstance(got, Exception) and name in OPTIONAL and _fails(mode, model_class):
                        continue  # not in this version
                    if not _is_right(name, got):
                        found = got.tolist() if torch.is_tensor(got) else got
                        results = f"this model: {found!r:.200}; GPT-2: {RIGHT[name]!r:.200}"
                        error = got if isinstance(got, Exception) else None
                        return f"{what} ({name}) of a tiny model gives wrong results. {results}", error
        except Exception as error:  # any error is a reason to stop
            return f"{what} of a tiny model failed with {type(error).__name__}: {error!s:.300}", error
        return None


def _is_traced() -> bool:
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _get_current_dispatch_mode_stack()
        or torch._C._are_functorch_transforms_active()
    )


@contextmanager
def _undisturbed():
    """Isolates the check from the user's default device, autocast, gradient mode and logging."""
    progress, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with (
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()


# Two prompts of different length, the first one padded on the left.
PROMPTS = [[5, 3, 9], [20, 1, 7, 11, 2]]
REPEATED = [5, 3, 9, 5, 3]
NEW_TOKENS, MORE_TOKENS, PAD, SEED = 5, 9, 22, 1311


def _tiny_model(model_class, attn_implementation="sdpa", from_files=False, add_cross_attention=False):
    config = model_class.config_class(
        vocab_size=23,
        context_length=16,
        emb_dim=8,
        n_heads=2,
        n_layers=2,
        drop_rate=0.0,
        qkv_bias=True,
        scale_attn_by_inverse_layer_idx=True,  # not the default scaling of attention functions
        tie_word_embeddings=True,
        add_cross_attention=add_cross_attention,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    # With these weights the ids vary and are far from ties. The user's random state is not touched.
    generator = torch.Generator().manual_seed(SEED)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in model_class(config).named_parameters()}
    weights = {
        name: torch.randn(shape, generator=generator, dtype=torch.float32) + name.endswith("scale")
        for name, shape in sorted(shapes.items())
    }
    model = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32, attn_implementation=attn_implementation
    )
    if from_files:
        with tempfile.TemporaryDirectory() as directory:
            if IN_PACKAGE:
                model.save_as_gpt2(f"{directory}/official")
                model = model_class.from_pretrained(f"{directory}/official", dtype=torch.float32)
            model.save_pretrained(f"{directory}/ours")
            model = model_class.from_pretrained(f"{directory}/ours", dtype=torch.float32)
    return model


def _trials(what, model_class):
    if what == "generate_batch":
        yield _tiny_model(model_class), {"continuous batching": _batch}
        return
    yield _tiny_model(model_class), MODES
    if is_untested():  # for tested versions the tests have shown this
        yield _tiny_model(model_class, attn_implementation="eager"), MODES
        yield _tiny_model(model_class, from_files=True), FORWARD_MODES
        yield _tiny_model(model_class, add_cross_attention=True), {"cross-attention": _cross}


def _fails(mode, model_class):
    """Whether the official class does not have this mode, either."""
    sizes = {"vocab_size": 23, "n_positions": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    config = GPT2Config.from_dict({**sizes, **tokens, "add_cross_attention": mode is _cross})
    with torch.random.fork_rng(devices=[]):  # random weights
        return isinstance(_attempt(mode, model_class.gpt2_class(config).eval()), Exception)


def _attempt(mode, model):
    try:
        return mode(model)
    except Exception as error:
        return error


def _is_right(name, got):
    """Whether ids or logits are right: wrong ids differ by at least 1, right logits only by rounding."""
    right = torch.tensor(RIGHT[name], dtype=torch.float32)
    is_like = torch.is_tensor(got) and got.shape == right.shape
    return is_like and torch.allclose(got.float(), right, atol=1e-2, rtol=1e-3)


def _padded():
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in PROMPTS])
    return ids, (ids != PAD).long()


def _generate(**options):
    def mode(model):
        ids, mask = _padded()
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
        return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]

    return mode


def _prompt_lookup(model):
    ids = torch.tensor([REPEATED])
    settings = dict(max_new_tokens=NEW_TOKENS, do_sample=False, prompt_lookup_num_tokens=2)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


def _forward(*parts):
    """The first logits of all tokens that are not padding, in passes over `parts` tokens each."""

    def mode(model):
        ids, mask = _padded()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, logits, seen = None, [], 0
        for part in parts:
            now = slice(seen, seen + part)
            seen += part
            output = model(
                ids[:, now],
                attention_mask=mask[:, :seen],
                position_ids=positions[:, now],
                use_cache=len(parts) > 1,
                **{CACHE: cache},
            )
            cache = getattr(output, CACHE)
            logits.append(output.logits)
        return torch.cat(logits, dim=1)[mask.bool()][:, :3]

    return mode


def _batch(model):
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    # Otherwise it takes all of the memory.
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    options = dict(generation_config=config, continuous_batching_config=small, progress_bar=False)
    outputs = model.generate_batch(PROMPTS, **options)
    return torch.tensor([output.generated_tokens for output in outputs.values()])


def _cross(model):
    """Logits of the last tokens, which attend to an encoder's states, one of which is padding."""
    ids, _ = _padded()
    states = torch.linspace(-1, 1, 2 * 3 * 8, dtype=torch.float32).sin().view(2, 3, 8)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    return model(ids, encoder_hidden_states=states, encoder_attention_mask=mask).logits[:, -1, :4]


FORWARD_MODES = {"a forward pass": _forward(5), "passes with a cache": _forward(3, 1, 1)}
MODES = {
    **FORWARD_MODES,
    "greedy": _generate(),
    "greedy without a cache": _generate(use_cache=False),
    "beams": _generate(num_beams=3, max_new_tokens=MORE_TOKENS),
    "a static cache": _generate(cache_implementation="static"),
    "prompt lookup": _prompt_lookup,
}
OPTIONAL = ("beams", "a static cache", "prompt lookup", "cross-attention")
# The official model's (tests/model/test_compat.py).
GREEDY = [[12, 12, 7, 5, 12], [4, 10, 4, 4, 4]]
LOGITS = [
    *([-11.5033, 5.7812, -8.0048], [-6.7119, 0.0925, -0.04], [-0.5235, 3.2259, -8.0984]),
    *([-9.724, 2.1081, -3.0064], [-5.709, -0.0594, 0.2613], [-9.1432, 2.7865, -3.8305]),
    *([-10.1901, 3.0056, -4.2915], [-8.7845, 2.551, -4.168]),
]
RIGHT: dict[str, list] = {
    **dict.fromkeys(FORWARD_MODES, LOGITS),
    **dict.fromkeys(("greedy", "greedy without a cache", "a static cache", "continuous batching"), GREEDY),
    "beams": [[12, 12, 12, 5, 12, 12, 12, 12, 12], [4, 10, 4, 4, 4, 4, 4, 10, 4]],
    "prompt lookup": [[*REPEATED, 5, 12, 7, 12, 12]],
    "cross-attention": [[-2.4337, -1.3261, -4.0431, -9.884], [-11.0142, 6.0315, -8.9752, 3.6062]],
}
