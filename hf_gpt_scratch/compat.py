"""What differs between versions of transformers, and a check of whatever version is there.

transformers has a minor release nearly every week, and hands a model what it likes by keyword. A change that reaches
this model under an unknown name would give other text without an error; so no cache is ever ignored here, and before
its first use the library generates a few tokens with a tiny model, whose right ids are known.
"""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import logging

from .layers import GPTModel, generate_text_simple
from .weight_map import SCRATCH_PREFIX, to_gpt2_state_dict

OLDEST_TESTED, NEWEST_TESTED = "5.4.0", "5.24.0"

# transformers' name for the cache: `cache` from 5.24 on, in forward passes, outputs and `generate`.
_names = signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _names else "past_key_values"

logger = logging.get_logger(__name__)


def is_untested() -> bool:
    """Whether this transformers is newer than every version that the tests ran on."""
    there, newest = Version(transformers.__version__), Version(NEWEST_TESTED)
    return there.release[:2] > newest.release[:2]


def advice() -> str:
    """What helps when transformers does what this package does not expect."""
    return (
        f"this is transformers {transformers.__version__}, and {OLDEST_TESTED} to {NEWEST_TESTED} were tested: "
        f'pip install "transformers<={NEWEST_TESTED}", or a newer hf_gpt_scratch'
    )


def is_cache(value: Any) -> bool:
    """Whether the value is a cache of keys and values, paged or not."""
    return isinstance(value, Cache) or (callable(getattr(value, "update", None)) and "Cache" in type(value).__name__)


def one_cache(past_key_values: Any, cache: Any, kwargs: dict[str, Any]) -> Any:
    """The cache that a forward pass was given, by either name.

    Before 5.24 `cache` was the paged cache of continuous batching, which goes to the attention function.

    Raises:
        TypeError: two caches, or one under a name that would not be looked at.
    """
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
        raise TypeError("got both `past_key_values` and `cache`, two names of one argument; give one of them")
    return past_key_values if cache is None else cache


def check_mask(attention_mask: torch.Tensor, num_past: int, num_new: int) -> None:
    """Raises ValueError unless a mask (B, S) has one column for each token, cached or new."""
    if attention_mask.shape[-1] != num_past + num_new:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[-1]} columns, but there are {num_past + num_new} tokens, "
            f"{num_past} in the cache and {num_new} new ones; give one column a token, and the cache as "
            f"`{CACHE}` ({advice()})"
        )


def check_growth(cache: Any, expected: int) -> None:
    """Raises RuntimeError unless a cache holds `expected` tokens after a forward pass."""
    length = cache.get_seq_length()
    if isinstance(length, int) and length != expected:
        raise RuntimeError(f"the cache holds {length} tokens after a forward pass, but {expected} went in; {advice()}")


class LibraryCheck:
    """Has transformers generate with a tiny model before the first use in a process, and refuses to go on if the ids
    are not those of the book's layers and of the official class.

    Args:
        model_class: the language model's class.
    """

    def __init__(self, model_class: Callable[[], type[PreTrainedModel]]):
        self.model_class = model_class
        self.failure: dict[str, str | None] = {}
        self.lock = threading.RLock()
        self.running = False

    def __call__(self, what: str = "generate") -> None:
        """Checks `generate`, or `generate_batch`, once.

        Raises:
            RuntimeError: this transformers does something else; the message names version and remedy.
        """
        if self.failure.get(what, "") is None or torch.compiler.is_compiling():
            return
        with self.lock:
            if self.running:
                return
            if what not in self.failure:
                if is_untested() and not self.failure:
                    logger.warning(
                        f"transformers {transformers.__version__} is newer than {NEWEST_TESTED}, the newest that "
                        "hf_gpt_scratch was tested with; a tiny model is checked first."
                    )
                self.running = True
                try:
                    with _undisturbed():
                        self.failure[what] = self._failure(what)
                finally:
                    self.running = False
            if self.failure[what] is not None:
                raise RuntimeError(f"{self.failure[what]}; {advice()}")

    def _failure(self, what: str) -> str | None:
        try:
            ours, official, book = _tiny_models(self.model_class())
            for name, mode in (MODES if what == "generate" else BATCH_MODES).items():
                expected = _attempt(mode, official)
                if isinstance(expected, Exception) and name not in ESSENTIAL:
                    continue  # this version does not have it
                given = {"this model": _attempt(mode, ours), "GPT2LMHeadModel": expected}
                if name in ESSENTIAL:
                    expected = given["the book's layers"] = _greedy(book)
                if any(ids != expected for ids in given.values()):
                    told = "; ".join(f"{who}: {ids!r:.300}" for who, ids in given.items())
                    return f"{what} ({name}) of a tiny model does not give the right ids. {told}"
        except Exception as error:  # whatever it is, it is a reason not to go on
            return f"{what} of a tiny model failed with {type(error).__name__}: {error!s:.300}"
        return None


@contextmanager
def _undisturbed():
    """The check neither sees nor leaves anything: random numbers, default device, dtype, autocast, gradients."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


# Two prompts of different length, the first one padded on the left.
PROMPTS = [[5, 3, 9], [20, 1, 7, 11, 2]]
NEW_TOKENS, PAD = 5, 0


def _tiny_models(model_class):
    config = model_class.config_class(
        vocab_size=23, context_length=16, emb_dim=8, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = model_class(config).eval()
    for name, weight in ours.named_parameters():
        weight.copy_(torch.randn(weight.shape) * 0.3 + name.endswith("scale"))
    ours.model.tok_emb.weight.mul_(5)
    ours.model.pos_emb.weight.mul_(5)
    weights = ours.state_dict()
    official = model_class.gpt2_class(config.to_gpt2()).eval()
    official.load_state_dict(to_gpt2_state_dict(weights, config.n_layers))
    book = GPTModel(config).eval()
    book.load_state_dict({name.removeprefix(SCRATCH_PREFIX): weight for name, weight in weights.items()})
    return ours, official, book


def _attempt(mode, model):
    try:
        return mode(model)
    except Exception as error:
        return error


def _greedy(book):
    rows = [generate_text_simple(book, torch.tensor([ids]), NEW_TOKENS, 16) for ids in PROMPTS]
    return [row[0, -NEW_TOKENS:].tolist() for row in rows]


def _generate(**options):
    def mode(model):
        width = max(map(len, PROMPTS))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in PROMPTS])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in PROMPTS])
        torch.manual_seed(0)
        return model.generate(
            ids, attention_mask=mask, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
        )[:, width:].tolist()  # fmt: skip

    return mode


def _one_row(**options):
    def mode(model):
        ids = torch.tensor([[5, 3, 9, 5, 3]])
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, **options).tolist()

    return mode


def _in_two_parts(model):
    """The logits' best tokens of the last prompt, its second part after its first."""
    ids = torch.tensor(PROMPTS[-1:])
    first = model(ids[:, :3], use_cache=True)
    second = model(ids[:, 3:], use_cache=True, **{CACHE: getattr(first, CACHE)})
    return torch.cat([first.logits, second.logits], dim=1).argmax(-1).tolist()


def _whole(model):
    return model(torch.tensor(PROMPTS[-1:]), use_cache=False).logits.argmax(-1).tolist()


def _batch(model):
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)  # not all of the memory
    outputs = model.generate_batch(
        PROMPTS, generation_config=config, continuous_batching_config=small, progress_bar=False
    )
    return [list(output.generated_tokens) for output in outputs.values()]


MODES = {
    "with a cache": _generate(),
    "without a cache": _generate(use_cache=False),
    "beams": _generate(num_beams=2),
    "sampling": _generate(do_sample=True, top_k=5),
    "static cache": _generate(cache_implementation="static"),
    "prompt lookup": _one_row(prompt_lookup_num_tokens=2, do_sample=False),
    "a forward pass": _whole,
    "a forward pass in two parts": _in_two_parts,
}
BATCH_MODES = {"continuous batching": _batch}
ESSENTIAL = ("with a cache", "without a cache", "continuous batching")
