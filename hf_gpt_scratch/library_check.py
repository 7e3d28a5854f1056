"""A check of the library that is there: before the first use in a process, it generates with a tiny model.

What transformers does between a prompt and a model changes from release to release. Whether all of it still fits
together is tried here on weights and prompts whose right ids are known, which takes a fifth of a second.
"""

import threading
from collections.abc import Callable
from contextlib import contextmanager

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from .compat import CACHE, NEWEST_TESTED, advice, is_untested
from .layers import GPTModel, generate_text_simple
from .weight_map import to_scratch_state_dict

logger = logging.get_logger(__name__)


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
        """Checks `generate`, forward passes among it, or `generate_batch`, once in a process.

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
                given = {"this model": _attempt(mode, ours), "GPT2LMHeadModel": _attempt(mode, official)}
                right = given["GPT2LMHeadModel"]
                if name in BY_THE_BOOK:
                    right = given["the book's layers"] = BY_THE_BOOK[name](book)
                elif isinstance(right, Exception):
                    continue  # this version does not have it
                if not all(_same(right, result) for result in given.values()):
                    told = "; ".join(f"{who}: {_short(result)}" for who, result in given.items())
                    return f"{what} ({name}) of a tiny model does not give what it should. {told}"
        except Exception as error:  # whatever it is, it is a reason not to go on
            return f"{what} of a tiny model failed with {type(error).__name__}: {error!s:.300}"
        return None


@contextmanager
def _undisturbed():
    """The check neither sees nor leaves anything: random numbers, default device, dtype, autocast, gradients, logs."""
    dtype, progress, verbosity = torch.get_default_dtype(), logging.is_progress_bar_enabled(), logging.get_verbosity()
    torch.set_default_dtype(torch.float32)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
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
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()


# Two prompts of different length, the first one padded on the left.
PROMPTS = [[5, 3, 9], [20, 1, 7, 11, 2]]
NEW_TOKENS, PAD = 5, 22


def _tiny_models(model_class):
    """This model, the official one that it was loaded from, and the book's, with the same weights."""
    config = model_class.config_class(
        vocab_size=23,
        context_length=16,
        emb_dim=8,
        n_heads=2,
        n_layers=2,
        drop_rate=0.0,
        qkv_bias=True,
        scale_attn_by_inverse_layer_idx=True,  # a scaling that attention functions do not have by default
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    official = model_class.gpt2_class(config.to_gpt2()).eval()
    torch.manual_seed(16)  # of these weights the ids vary, and are far from ties
    for name, weight in official.named_parameters():
        weight.copy_(torch.randn(weight.shape) + (".ln_" in name and name.endswith("weight")))
    ours = model_class.from_gpt2(official)
    book = GPTModel(config).eval()
    book.load_state_dict(to_scratch_state_dict(_state_dict(official), config.n_layers))
    return ours, official, book


def _state_dict(official):
    state_dict = official.state_dict()
    return {name: weight for name, weight in state_dict.items() if name != "lm_head.weight"}


def _attempt(mode, model):
    try:
        return mode(model)
    except Exception as error:
        return error


def _same(expected, got):
    """Ids and logits are compared alike: ids differ by 1 at least, logits by rounding at most."""
    return (
        torch.is_tensor(got)
        and got.shape == expected.shape
        and torch.allclose(got.float(), expected.float(), atol=1e-2, rtol=1e-3)
    )


def _short(result):
    if torch.is_tensor(result) and result.is_floating_point():
        return "logits " + ", ".join(f"{number:.2f}" for number in result.flatten()[:5].tolist()) + ", …"
    return f"{result.tolist() if torch.is_tensor(result) else result!r:.200}"


def _padded():
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in PROMPTS])
    return ids, (ids != PAD).long()


def _greedy(book):
    rows = [generate_text_simple(book, torch.tensor([ids]), NEW_TOKENS, 16) for ids in PROMPTS]
    return torch.stack([row[0, -NEW_TOKENS:] for row in rows])


def _logits(book):
    return torch.cat([book(torch.tensor([ids]))[0] for ids in PROMPTS])


def _generate(**options):
    def mode(model):
        ids, mask = _padded()
        torch.manual_seed(0)
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
        return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]

    return mode


def _prompt_lookup(model):
    ids = torch.tensor([[5, 3, 9, 5, 3]])
    settings = dict(max_new_tokens=NEW_TOKENS, do_sample=False, prompt_lookup_num_tokens=2)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


def _forward(*parts):
    """The logits of what is not padding, of passes over so many tokens each."""

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
        return torch.cat(logits, dim=1)[mask.bool()]

    return mode


def _batch(model):
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)  # not all of the memory
    outputs = model.generate_batch(
        PROMPTS, generation_config=config, continuous_batching_config=small, progress_bar=False
    )
    return torch.tensor([output.generated_tokens for output in outputs.values()])


MODES = {
    "a forward pass": _forward(5),
    "passes with a cache": _forward(3, 1, 1),
    "greedy": _generate(),
    "greedy without a cache": _generate(use_cache=False),
    "beams": _generate(num_beams=3, max_new_tokens=9),
    "sampling": _generate(do_sample=True, top_k=5),
    "a static cache": _generate(cache_implementation="static"),
    "prompt lookup": _prompt_lookup,
}
BATCH_MODES = {"continuous batching": _batch}
BY_THE_BOOK = {
    "a forward pass": _logits,
    "passes with a cache": _logits,
    "greedy": _greedy,
    "greedy without a cache": _greedy,
    "continuous batching": _greedy,
}
