"""Checks the installed transformers: before the first use in a process, it generates with a tiny model.

What transformers does between a prompt and a model changes from release to release. This check runs it on weights and
prompts whose right ids are known, which takes a fifth of a second.
"""

import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import contextmanager

import torch
import transformers
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from .compat import CACHE, IN_PACKAGE, INSTALLED, NEWEST_TESTED, advice, is_untested
from .configuration_gpt_scratch import SIZES
from .layers import GPTModel, generate_text_simple

logger = logging.get_logger(__name__)


class LibraryCheck:
    """Generates with a tiny model before the first use in a process, and raises an error if the ids are not those of
    the book's layers with the same weights.

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
            for ours, book, modes in self._trials(what, model_class):
                for name, mode in modes.items():
                    right, got = RIGHT[name](book), _attempt(mode, ours)
                    if isinstance(got, Exception) and name in OPTIONAL and _fails(mode, model_class):
                        continue  # not in this version
                    if not _same(right, got):
                        results = f"this model: {_short(got)}; the book's layers: {_short(right)}"
                        error = got if isinstance(got, Exception) else None
                        return f"{what} ({name}) of a tiny model gives wrong results. {results}", error
        except Exception as error:  # any error is a reason to stop
            return f"{what} of a tiny model failed with {type(error).__name__}: {error!s:.300}", error
        return None

    def _trials(self, what, model_class):
        if what == "generate_batch":
            yield *_tiny_models(model_class), BATCH_MODES
            return
        yield *_tiny_models(model_class), MODES
        if is_untested():  # for tested versions the tests have shown this
            yield *_tiny_models(model_class, attn_implementation="eager"), MODES
            yield *_tiny_models(model_class, from_files=True), FORWARD_MODES
            yield *_tiny_models(model_class, add_cross_attention=True), CROSS_MODES


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
NEW_TOKENS, MORE_TOKENS, BEAMS, PAD, SEED = 5, 9, 3, 22, 1311


def _tiny_config(model_class, add_cross_attention=False):
    return model_class.config_class(
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


def _tiny_models(model_class, attn_implementation="sdpa", from_files=False, add_cross_attention=False):
    """Our model and the book's, with the same weights."""
    config = _tiny_config(model_class, add_cross_attention)
    # With these weights the ids vary and are far from ties. The user's random state is not touched.
    generator = torch.Generator().manual_seed(SEED)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in model_class(config).named_parameters()}
        book = GPTModel({name: getattr(config, name) for name in (*SIZES, "qkv_bias", "tie_word_embeddings")}).eval()
    weights = {
        name: torch.randn(shape, generator=generator, dtype=torch.float32) + name.endswith("scale")
        for name, shape in sorted(shapes.items())
    }
    ours = model_class.from_pretrained(
        None, config=config, state_dict=dict(weights), dtype=torch.float32, attn_implementation=attn_implementation
    )
    if from_files:
        with tempfile.TemporaryDirectory() as directory:
            if IN_PACKAGE:
                ours.save_as_gpt2(f"{directory}/official")
                ours = model_class.from_pretrained(f"{directory}/official", dtype=torch.float32)
            ours.save_pretrained(f"{directory}/ours")
            ours = model_class.from_pretrained(f"{directory}/ours", dtype=torch.float32)
    if not add_cross_attention:
        state_dict = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        state_dict["out_head.weight"] = state_dict["tok_emb.weight"]
        for name, tensor in state_dict.items():
            if ".W_query." in name:  # the book's layers do not divide scores by the layer's number
                state_dict[name] = tensor / (int(name.split(".")[1]) + 1)
        book.load_state_dict(state_dict, assign=True)
    return ours, book


def _fails(mode, model_class):
    """Whether the official class does not have this mode, either."""
    config = _tiny_config(model_class, add_cross_attention=mode is _cross).to_gpt2()
    with torch.random.fork_rng(devices=[]):  # random weights
        return isinstance(_attempt(mode, model_class.gpt2_class(config).eval()), Exception)


def _attempt(mode, model):
    try:
        return mode(model)
    except Exception as error:
        return error


def _same(expected, got):
    """Whether ids or logits agree: different ids differ by at least 1, equal logits only by rounding."""
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


def _beams(book):
    rows = []
    for ids in PROMPTS:
        beams = [(0.0, ids)]  # sums of log probabilities
        for _ in range(MORE_TOKENS):
            scores = [book(torch.tensor([beam]))[0, -1].log_softmax(-1).tolist() for _, beam in beams]
            longer = [(s + p, [*b, i]) for (s, b), row in zip(beams, scores, strict=True) for i, p in enumerate(row)]
            beams = sorted(longer, reverse=True)[:BEAMS]
        rows.append(beams[0][1][len(ids) :])
    return torch.tensor(rows)


def _repeated(book):
    return generate_text_simple(book, torch.tensor([REPEATED]), NEW_TOKENS, 16)


def _logits(book):
    return torch.cat([book(torch.tensor([ids]))[0] for ids in PROMPTS])


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
    """The logits of all tokens that are not padding, in passes over `parts` tokens each."""

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
    small = transformers.ContinuousBatchingConfig(
        num_blocks=16, max_batch_tokens=32
    )  # otherwise it takes all of the memory
    outputs = model.generate_batch(
        PROMPTS, generation_config=config, continuous_batching_config=small, progress_bar=False
    )
    return torch.tensor([output.generated_tokens for output in outputs.values()])


def _cross(model):
    """Logits of the last tokens, which attend to an encoder's states, one of which is padding."""
    ids, _ = _padded()
    states = torch.linspace(-1, 1, 2 * 3 * 8, dtype=torch.float32).sin().view(2, 3, 8)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    return model(ids, encoder_hidden_states=states, encoder_attention_mask=mask).logits[:, -1, :4]


FORWARD_MODES = {"a forward pass": _forward(5), "passes with a cache": _forward(3, 1, 1)}
CROSS_MODES = {"cross-attention": _cross}
MODES = {
    **FORWARD_MODES,
    "greedy": _generate(),
    "greedy without a cache": _generate(use_cache=False),
    "beams": _generate(num_beams=BEAMS, max_new_tokens=MORE_TOKENS),
    "a static cache": _generate(cache_implementation="static"),
    "prompt lookup": _prompt_lookup,
}
# The official model's, since the book has no cross-attention.
CROSS_LOGITS = [[-2.4337, -1.3261, -4.0431, -9.884], [-11.0142, 6.0315, -8.9752, 3.6062]]
BATCH_MODES = {"continuous batching": _batch}
OPTIONAL = ("beams", "a static cache", "prompt lookup", "cross-attention")
RIGHT = {
    "a forward pass": _logits,
    "passes with a cache": _logits,
    "greedy": _greedy,
    "greedy without a cache": _greedy,
    "beams": _beams,
    "a static cache": _greedy,
    "prompt lookup": _repeated,
    "cross-attention": lambda book: torch.tensor(CROSS_LOGITS, dtype=torch.float32),
    "continuous batching": _greedy,
}
