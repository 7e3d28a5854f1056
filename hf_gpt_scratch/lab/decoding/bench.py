"""The candidate on the bench: small, with random weights, in float64, fresh for each run.

Decoding does not depend on the weights, so the class is built with a small config where it accepts one.
"""

import copy
import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, NoneType
from typing import Any

import numpy
import torch
from torch import nn

from ...errors import LabError
from ..building import Settings, build, concept
from .decoders import MEANINGS, Decoder
from .recording import NotReplayable, Recorder, Replay, Run, Tables, causal, most_probable

WIDTH, HEADS, LAYERS, CONTEXT = 32, 4, 2, 48
# Logits whose relative error is below this multiple of the precision are equal. Measured: a cached step and a full pass
# differ by at most 20 times the precision.
ROUNDING = 500


@dataclass(frozen=True)
class Make:
    """What makes the candidate: a class, function or model, its module, and the config that the user gave, if any."""

    made: Any
    module: ModuleType
    given: Any
    source: str

    def __call__(self, settings: Settings) -> nn.Module:
        return build(self.made, settings, self.source, self.module, self.given)


def resized(settings: Settings, context_length: int) -> Settings:
    """A cfg with the bench's sizes, under all the names that it has."""
    sizes = {"emb_dim": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "context_length": context_length}
    changed = Settings({**settings, **sizes})
    changed.defaults = settings.defaults
    sizes |= {"n_inner": 4 * WIDTH, "head_dim": WIDTH // HEADS}
    for name, value in settings.items():
        if value is not None and (size := sizes.get(concept(name) or name)) is not None:
            changed[name] = size
    return changed


def randomize(module: nn.Module) -> None:
    """Weights with which the tokens depend on everything before them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            ones = parameter.ndim == 1 and bool((parameter == 1).all())
            spread = 0.3 if parameter.ndim == 1 else 2 / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread + ones)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(kept)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All generators of random numbers that a decoder may use start at the seed, and go on afterwards as before."""
    kept, kept_numpy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(kept)
            numpy.random.set_state(kept_numpy)


@dataclass
class Bench:
    """The candidate, its sizes and what they allow.

    `module` is never run: every run has a copy that shares its parameters. `roomy` is the same with a larger context,
    in which sequences beyond the window can be replayed.
    """

    module: nn.Module
    tables: Tables
    vocab_size: int
    context_length: int
    dtype: torch.dtype
    settings: Settings
    roomy: nn.Module | None = None
    plain: dict[str, Any] = field(default_factory=dict)
    rounding: float = 0.0
    replays: int = 0
    causal: bool = True
    can_move: bool = False
    can_mask: bool = False
    known: dict[Any, torch.Tensor] = field(default_factory=dict)
    state: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    defaults: list[tuple[Any, Any]] = field(default_factory=list)

    def keep_state_of(self, module: ModuleType) -> None:
        """Remembers a file's variables and its functions' defaults, in which a cache can lie, for every run to find."""
        functions = [inspect.unwrap(value) for value in vars(module).values() if inspect.isfunction(value)]
        kinds = (dict, list, set, int, float, NoneType)
        mine = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("__")
            and (type(value) in kinds or type(value).__module__ == module.__name__)
            and not isinstance(value, nn.Module | type)
        }
        self.state += [(vars(module), name, copy.deepcopy(value)) for name, value in mine.items()]
        self.defaults += [(function, copy.deepcopy(function.__defaults__)) for function in functions]

    def restore_state(self) -> None:
        for variables, name, value in self.state:
            variables[name] = copy.deepcopy(value)
        for function, values in self.defaults:
            function.__defaults__ = copy.deepcopy(values)

    def fresh(self, roomy: bool = False) -> nn.Module:
        module = self.roomy if roomy and self.roomy is not None else self.module
        kept = {id(p): p for p in module.parameters()}
        return copy.deepcopy(module, kept).eval()

    def ids(self, length: int, seed: int) -> list[int]:
        """Random ids, all different where the vocabulary has as many."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return torch.randperm(self.vocab_size, generator=generator)[:length].tolist()

    def run(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        new: int,
        *,
        module: nn.Module | None = None,
        choose: Callable | None = most_probable,
        seed: int = 0,
        dropout: bool = True,
        **settings: Any,
    ) -> Run:
        """A decoder's run on a fresh copy, or on `module`, with everything recorded; what it raises is in `error`."""
        run = Run([list(row) for row in prompts], self.context_length)
        if module is None:
            self.restore_state()
            module = self.fresh()
        most = 50 + 4 * (sum(map(len, prompts)) + new)
        values = {"context_size": self.context_length, "seed": seed, "cfg": self.settings, **settings}
        if decoder.has("generator"):
            values["generator"] = torch.Generator().manual_seed(seed)
        with seeded(seed), default_dtype(self.dtype), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with Recorder(run, self.tables, self.vocab_size, most, choose, dropout):
                    run.new = decoder(module, prompts, new, **values)
            except Exception as error:  # whatever the user's code raises
                run.error = error
        run.trained = module.training
        return run

    def last(
        self, ids: list[int], positions: list[int] | None = None, visible: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The logits (V,) after ids, by the candidate's forward pass without a cache.

        Raises:
            NotReplayable: it does not run so.
        """
        key = (
            tuple(ids),
            None if positions is None else tuple(positions),
            None if visible is None else str(visible.tolist()),
        )
        if key not in self.known:
            self.known[key] = self.all_logits(ids, positions, visible)[-1]
        return self.known[key]

    def all_logits(self, ids, positions=None, visible=None) -> torch.Tensor:
        """The logits that it returns of all these ids, (T, V), or (1, V) where it returns only the last."""
        roomy = len(ids) > self.context_length
        if roomy and self.roomy is None:
            raise NotReplayable("more tokens than the context has")
        if positions is not None and (not self.can_move or max(positions) >= self.context_length):
            raise NotReplayable("positions")
        if visible is not None and not self.can_mask:
            raise NotReplayable("mask")
        module = self.fresh(roomy)
        tables = Tables.of(module, self.vocab_size, 3 * self.context_length) if roomy else self.tables
        assert tables is not None
        return self.forward(module, tables, ids, positions, visible)

    def forward(self, module, tables, ids, positions=None, visible=None) -> torch.Tensor:
        run = Run([ids])
        self.replays += 1
        replay = Replay(run, tables, self.vocab_size, positions, visible)
        with default_dtype(self.dtype), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with replay:
                    module(torch.tensor([ids]), **self.plain)
            except Exception as error:
                raise NotReplayable(f"{type(error).__name__}: {error}") from error
        logits = run.calls[-1].logits if run.calls else None
        if logits is None:
            raise NotReplayable("its logits are not the product of a matrix with as many rows as the vocabulary")
        if torch.finfo(replay.coarsest).eps > self.rounding / ROUNDING:
            self.rounding = ROUNDING * torch.finfo(replay.coarsest).eps
        return logits[0]

    def error(self, found: torch.Tensor, right: torch.Tensor) -> float:
        """Relative to the largest logit; infinite if they are not comparable."""
        if found.shape != right.shape or not torch.isfinite(found).all():
            return float("inf")
        return float((found - right).abs().max() / right.abs().max())

    def equal(self, found: torch.Tensor, right: torch.Tensor) -> bool:
        return self.error(found, right) <= self.rounding


def plain_arguments(forward: Callable[..., Any], meanings: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which a forward pass uses no cache.

    Raises:
        LabError: it requires something else than ids.
    """
    arguments: dict[str, Any] = {}
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        required = parameter.default is parameter.empty
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if isinstance(parameter.default, bool):
            if MEANINGS.get(parameter.name) == "use_cache":
                arguments[parameter.name] = False
        elif required and any(word in parameter.name for word in ("cache", "past", "mask", "target")):
            arguments[parameter.name] = None
        elif required and any(word in parameter.name for word in ("start", "pos", "offset")):
            arguments[parameter.name] = 0
        elif required:
            raise LabError(
                f"forward requires {parameter.name!r}; the decoding lab calls it with ids alone, so give it a default"
            )
    return arguments


def make_bench(make: Make, settings: Settings, vocab_size: int, context_length: int) -> Bench:
    """The candidate on the bench, in float64, or float32 if it does not run in that.

    Raises:
        LabError: it does not run, or its embeddings are not found.
    """
    problems = []
    for dtype in (torch.float64, torch.float32):
        for small in (True, False):
            try:
                bench = one_bench(make, settings, vocab_size, context_length, dtype, small)
            except (LabError, NotReplayable) as error:
                problems.append(str(error))
                continue
            return bench
    raise LabError(f"{make.source} cannot be examined: {problems[-1]}")


def one_bench(make, settings, vocab_size, context_length, dtype, small) -> Bench:
    context = CONTEXT if small and vocab_size != CONTEXT else context_length
    made, source, roomy = make.made, make.source, None
    with default_dtype(dtype), torch.random.fork_rng(devices=[]):
        if isinstance(made, nn.Module):
            module, context = copy.deepcopy(made), context_length
        else:
            settings = resized(settings, context) if small else settings
            module = make(settings)
        module = module.to(dtype).eval()
        tables = Tables.of(module, vocab_size, context)
        if tables is None or tables.tokens.shape[1] == tables.tokens.shape[0]:
            raise LabError(f"{source} has no embedding with {vocab_size} rows")
        randomize(module)
        if small and not isinstance(made, nn.Module):
            roomy = with_room(make, settings, context, module, dtype)
    forward = type(module).forward
    bench = Bench(module, tables, vocab_size, context, dtype, settings, roomy)
    bench.plain = plain_arguments(forward.__get__(module), {})
    if small and tables.positions is None:
        raise LabError(f"{source} has no position embedding with {context} rows")
    calibrate(bench)
    return bench


def with_room(make, settings, context, module, dtype) -> nn.Module | None:
    """The same model with three times the context; None if it is not built so."""
    try:
        roomy = make(resized(settings, 3 * context)).to(dtype).eval()
        right = dict(module.named_parameters())
        with torch.no_grad():
            for name, parameter in roomy.named_parameters():
                part = parameter if parameter.shape == right[name].shape else parameter[:context]
                part.copy_(right[name])
    except (LabError, KeyError, RuntimeError):
        return None
    return roomy


def calibrate(bench: Bench) -> None:
    """Measures the rounding, and whether positions and mask can be replaced."""
    ids = bench.ids(6, 0)
    right = bench.forward(bench.fresh(), bench.tables, ids)[-1]
    for what in ("can_move", "can_mask"):
        setattr(bench, what, True)
        try:
            positions = list(range(6)) if what == "can_move" else None
            visible = causal(6) if what == "can_mask" else None
            works = bench.equal(bench.last(ids, positions, visible), right)
            other = bench.last(
                ids, [5, *range(1, 6)] if positions else None, torch.eye(6).bool() if positions is None else None
            )
            works = works and not bench.equal(other, right)
        except NotReplayable:
            works = False
        setattr(bench, what, works)


def causal_forward(bench: Bench) -> bool:
    """Whether the logits of a token do not depend on those after it; True where only the last logits are returned."""
    first, second = bench.ids(6, 0), [*bench.ids(5, 0), bench.ids(6, 9)[-1]]
    logits, others = bench.all_logits(first), bench.all_logits(second)
    return len(logits) == 1 or bench.equal(logits[:5], others[:5])
