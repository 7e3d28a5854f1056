"""Differences between versions of transformers, and errors for a version that does something unexpected.

transformers has a minor release nearly every week, and may pass a model new keywords. A cache under an unknown name
would change the generated text without an error, so no cache is ever ignored here.
"""

import re
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import Cache, GenerationMixin, PreTrainedModel

OLDEST_TESTED, NEWEST_TESTED = "5.4.0", "5.24.0"
INSTALLED = transformers.__version__
PACKAGE = __name__.rpartition(".")[0]  # this folder as a package: the installed one's, or one that came with a model
IN_PACKAGE = PACKAGE.partition(".")[0] == "hf_gpt_scratch"

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


class NoTranslation(PreTrainedModel):
    """In place of `Interop` in code that came along with a model: says what has it."""

    @classmethod
    def from_book(cls, *args, **kwargs):
        """Not in the code that comes along with a model."""
        raise ImportError(f"{cls.__name__}.from_book is in the package: pip install hf-gpt-scratch")

    @classmethod
    def from_gpt2(cls, *args, **kwargs):
        """Not in the code that comes along with a model."""
        raise ImportError(f"{cls.__name__}.from_gpt2 is in the package: pip install hf-gpt-scratch")

    def to_gpt2(self, *args, **kwargs):
        """Not in the code that comes along with a model."""
        raise ImportError(f"{type(self).__name__}.to_gpt2 is in the package: pip install hf-gpt-scratch")

    def save_as_gpt2(self, *args, **kwargs):
        """Not in the code that comes along with a model."""
        raise ImportError(f"{type(self).__name__}.save_as_gpt2 is in the package: pip install hf-gpt-scratch")


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
