"""Records a training run from outside: forward passes, losses, backward passes, gradients, updates and what is between.

The script is not changed. While the recorder is on, calls of modules, of a few functions of torch and of the methods of
optimizers, schedulers, scalers and data loaders are noted before they go on as usual. Nothing that is recorded uses
random numbers, and no gradient, parameter or state is written to.

Shapes: B batch, T tokens, V vocabulary, N rows of logits that enter a loss.
"""

import functools
import inspect
import os
import random
import sys
import sysconfig
import time
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.data import dataloader

PACKAGE = str(Path(__file__).parents[2])
LIBRARIES = tuple(
    {
        PACKAGE,
        str(Path(torch.__file__).parent),
        *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    }
)
# Elements whose values are kept beside the run; of a larger model, only the smallest parameters' are.
FOLLOWED = 20_000_000
# Parameters whose optimizer state is looked at.
REMEMBERED = 16
# Elements of logits that are kept.
KEPT_LOGITS = 64_000_000
# Passes without gradients that are recorded, and those after the last step before the run is stopped.
EVALUATIONS, EVALUATIONS_AFTER = 64, 4
# Backward passes without any step before the run is stopped.
FRUITLESS = 64
# Calls that draw random integers, and integers drawn by each, that are kept.
DRAWS, DRAWN = 4096, 4096
# Batches of loaders that wait for their forward passes: a loader may read ahead.
AHEAD = 64
# How long a run goes on after the last step, until its first evaluation: seconds, and backward passes.
PATIENCE, PASSES = 10.0, 100


RANDINT = random.randint
DATA: Any = vars(torch._C.TensorBase)["data"].__get__  # what reads `tensor.data`


class Enough(BaseException):
    """Ends a watched run once enough has been seen."""


@functools.lru_cache(maxsize=4096)
def is_library(file: str) -> bool:
    return file.startswith("<frozen") or os.path.abspath(file).startswith(LIBRARIES)


def own_frame() -> types.FrameType | None:
    """The innermost frame of the user's code."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def place() -> str:
    """File and line of the innermost frame of the user's code, or nothing."""
    frame = own_frame()
    if frame is None:
        return ""
    file = frame.f_code.co_filename
    shown = os.path.relpath(file) if os.path.isabs(file) else file
    return f"{os.path.basename(file) if shown.startswith('..') else shown}:{frame.f_lineno}"


@contextmanager
def untouched() -> Iterator[None]:
    """Reads datasets again, whose items may be drawn, and leaves the random generators as they were."""
    kept, kept_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(kept)
            np.random.set_state(kept_numpy)


class Parts(nn.ModuleList):
    """The modules of one forward pass that a script calls one after the other, without a call of the whole."""


@dataclass(eq=False)
class Forward:
    """An outermost call of a module with parameters, or such calls of the parts of a model."""

    module: nn.Module
    training: bool
    grad: bool
    arguments: tuple[tuple, dict]
    where: str
    rng: int
    ids: torch.Tensor | None = None  # (B, T)
    embedded: torch.Tensor | None = None  # those of them that a module within embeds, as of a wrapper that shifts
    head: torch.Tensor | None = None  # the last output of a module with three dimensions
    output: Any = None
    called: set[int] = field(default_factory=set)
    dropouts: int = 0  # calls that drop something
    idle_dropouts: int = 0  # calls of dropout with p > 0 that drop nothing
    cuts: list[str] = field(default_factory=list)  # where graphs are cut: detach, data, no_grad
    autocast: bool = False
    losses: int = 0
    large: bool = False  # its logits are not kept
    registered: set[int] = field(default_factory=set)  # the module's parameters
    strangers: dict[int, nn.Parameter] = field(default_factory=dict)  # of modules that run and are not registered in it
    backwards: int = 0  # how many backward passes came before it
    beside: bool = False  # without gradients, on a batch that a pass with gradients is given too
    loader: dict[str, Any] | None = None  # the facts of the loader that its batch is from


@dataclass
class Loss:
    """A cross-entropy: rows of logits against target ids."""

    kind: str  # cross_entropy, nll, gather, head_loss
    rows: torch.Tensor | None  # (N, V)
    targets: torch.Tensor  # (N,)
    ignore_index: int | None
    reduction: str
    output: torch.Tensor
    where: str
    grad: bool
    forward: Forward | None
    options: dict[str, Any] = field(default_factory=dict)
    weights: torch.Tensor | None = None  # (N,): the factor of each row's loss in what went backward

    @property
    def tokens(self) -> int:
        """The rows that count."""
        return 0 if self.weights is None else int(torch.count_nonzero(self.weights))


@dataclass
class Event:
    """Something else that happens in a step, in order; `what` is its name."""

    what: str
    where: str
    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class Update:
    """One call of an optimizer's `step`."""

    optimizer: Any
    where: str
    groups: list[dict[str, Any]]
    ids: list[int]
    before: dict[int, torch.Tensor]
    gradients: dict[int, torch.Tensor | None]
    state: dict[int, dict[str, Any]]
    gradient_norm: float
    own: bool  # whether the optimizer is the user's code, or there is none
    closure: bool = False  # whether the step itself runs the model
    after: dict[int, torch.Tensor] = field(default_factory=dict)
    # The parameters whose state holds values that are not 0, before and after.
    remembered: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)
    numbers: dict[str, float] = field(default_factory=dict)  # that a plain class held at the time, or was given


class Plain:
    """A plain class of the script's that steps, as the recorder sees an optimizer."""

    def __init__(self, own: Any, parameters: Iterable[torch.Tensor]):
        self.own = own
        self.param_groups = [{"params": list(parameters)}]
        self.state: dict[torch.Tensor, Any] = {}


@dataclass
class Step:
    """What happens from one forward pass after an optimizer's step to the next."""

    forwards: list[Forward] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    backwards: int = 0
    roots: list[float] = field(default_factory=list)
    leftover: dict[int, torch.Tensor] = field(default_factory=dict)
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)  # after the last backward pass
    scale: float = 1.0
    late: bool = False  # the backward pass came after the optimizer's step
    batches: list[Any] = field(default_factory=list)

    def happened(self, what: str) -> list[Event]:
        return [event for event in self.events if event.what == what]


def tensors_in(value: Any, depth: int = 3) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item, depth - 1)


def are_ids(value: Any) -> bool:
    """Whether these may be token ids (B, T)."""
    integer = isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)
    there = integer and value.dim() == 2 and value.numel() > 0 and value.device.type != "meta"
    return there and not are_positions(value)


def are_positions(ids: torch.Tensor) -> bool:
    positions = torch.arange(ids.shape[-1], device=ids.device)
    return ids.shape[-1] > 1 and bool((ids == positions).all())


class Functions(TorchFunctionMode):
    """Hands the functions of torch that are watched to the recorder."""

    def __init__(self, handlers: dict[Any, Callable]):
        super().__init__()
        self.handlers = handlers

    def __torch_function__(self, func, types, args=(), kwargs=None):
        handler = self.handlers.get(func)
        return func(*args, **(kwargs or {})) if handler is None else handler(func, args, kwargs or {})


class Recorder:
    """Records while it is entered.

    Args:
        steps: optimizer steps after which `Enough` is raised, at the next backward pass.
        seconds: time after which it is raised at the next event, or None.
        patient: whether the run goes on after the last step until its first evaluation, within `PATIENCE`.
    """

    def __init__(self, steps: int, seconds: float | None = None, patient: bool = False):
        self.wanted = steps
        self.patient = patient
        self.waiting: float | None = None  # since when
        self.waited = 0  # backward passes
        self.after: list[Forward] = []  # the forward pass for training that follows an evaluation then
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.steps: list[Step] = []
        self.step = Step()
        self.evaluations: list[Forward] = []
        self.evaluation_losses: list[Loss] = []
        self.evaluations_after = 0
        self.forward: Forward | None = None  # the one in progress
        self.last: Forward | None = None
        self.depth = 0
        self.inside = 0  # backward passes and optimizer steps in progress
        self.backwards = 0
        self.optimizers: list[Any] = []
        self.plain: dict[int, Plain] = {}  # those of them that are plain classes, by the object's id
        self.schedulers: list[Any] = []
        self.loaded: list[Event] = []
        self.loaders: list[Any] = []
        # Random integers: low, high (excluded), and what was drawn.
        self.draws: deque[tuple[int, int, list[int]]] = deque(maxlen=DRAWS)
        # The arrays and lists of functions that draw, among which the text is, by bounds.
        self.drawing: dict[tuple[int, int], dict[str, Any]] = {}
        self.used: set[int] = set()  # gradients that a step has used
        # The last batches, with the facts of their loaders.
        self.fetched: list[tuple[dict[str, Any], list[torch.Tensor]]] = []
        self.pending: list[Any] = []  # batches that no forward pass has seen yet
        self.wrong_ids: dict[str, Any] | None = None
        self.reference: dict[int, torch.Tensor] = {}
        self.no_graph = ""  # where a loss without a graph was to go backward
        self.stepped = False  # by an optimizer
        self.found_own_loss = False
        self.room = KEPT_LOGITS
        self.finished = False
        self.ended = ""
        self.undo = ExitStack()

    # Turning on and off

    def __enter__(self) -> "Recorder":
        torch.compiler.set_stance("force_eager")
        self.undo.callback(torch.compiler.set_stance, "default")
        patch = self.patch
        patch(nn.Module, "__call__", self.on_module)
        for owner in (torch.nn.utils, torch.nn.utils.clip_grad):
            patch(owner, "clip_grad_norm_", self.noting("clip_norm", self.clip_figures))
            patch(owner, "clip_grad_value_", self.noting("clip_value"))
        patch(torch.optim.Optimizer, "zero_grad", self.noting("zero_grad", lambda args, kwargs: {"of": args[0]}))
        patch(nn.Module, "zero_grad", self.noting("zero_grad", lambda args, kwargs: {"of": args[0]}))
        patch(torch.optim.Optimizer, "__init__", self.on_optimizer)
        patch(torch.optim.Optimizer, "load_state_dict", self.loading("optimizer"))
        schedulers = torch.optim.lr_scheduler
        for kind in list(vars(schedulers).values()):
            if isinstance(kind, type) and issubclass(kind, schedulers.LRScheduler):
                if "step" in vars(kind):
                    patch(kind, "step", self.on_schedule)
                if "load_state_dict" in vars(kind):
                    patch(kind, "load_state_dict", self.loading("scheduler"))
        scaler = torch.amp.GradScaler
        patch(scaler, "scale", self.on_scale)
        patch(scaler, "unscale_", self.noting("unscale", lambda args, kwargs: {"of": args[0]}))
        patch(scaler, "step", self.noting("scaler_step", lambda args, kwargs: {"of": args[0]}))
        patch(scaler, "update", self.noting("scaler_update", lambda args, kwargs: {"of": args[0]}))
        patch(torch, "load", self.on_load)
        patch(nn.Module, "load_state_dict", self.loading("model"))
        patch(torch, "set_rng_state", self.loading("rng"))
        patch(torch.random, "set_rng_state", self.loading("rng"))
        patch(dataloader._BaseDataLoaderIter, "__next__", self.on_batch)
        patch(random, "randint", self.on_draw)
        patch(random, "randrange", self.on_draw)
        patch(np.random, "randint", self.on_draw)
        before = register_optimizer_step_pre_hook(self.before_step)
        after = register_optimizer_step_post_hook(self.after_step)
        self.undo.callback(before.remove)
        self.undo.callback(after.remove)
        self.undo.enter_context(
            Functions(
                {
                    F.cross_entropy: self.on_cross_entropy,
                    F.nll_loss: self.on_nll,
                    torch.randint: self.on_randint,
                    torch.gather: self.on_gather,
                    torch.Tensor.gather: self.on_gather,
                    torch.Tensor.__getitem__: self.on_index,
                    F.embedding: self.on_embedding,
                    F.dropout: self.on_dropout,
                    F.scaled_dot_product_attention: self.on_attention,
                    torch.Tensor.backward: self.on_backward,
                    torch.Tensor.detach: self.on_cut,
                    torch.detach: self.on_cut,
                    DATA: self.on_cut,
                    torch._C._set_grad_enabled: self.on_grad_mode,
                }
            )
        )
        return self

    def __exit__(self, *error) -> None:
        self.undo.close()
        self.close_step()
        self.finished = True

    def patch(self, owner: Any, name: str, make: Callable[[Callable, tuple, dict], Any]) -> None:
        """Replaces a function by one that calls `make(original, args, kwargs)`, until the end."""
        original = vars(owner)[name]

        @functools.wraps(original)
        def watched(*args, **kwargs):
            return make(original, args, kwargs)

        watched.watched = True  # type: ignore[attr-defined]
        setattr(owner, name, watched)
        self.undo.callback(setattr, owner, name, original)

    def enough(self) -> bool:
        return self.waiting is not None or len(self.steps) + bool(self.step.updates) >= self.wanted

    def check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.ended = "the time was over"
            raise Enough

    def note(self, what: str, **info: Any) -> None:
        if not self.inside and self.waiting is None:
            self.step.events.append(Event(what, place(), info))

    def load(self, what: str, **info: Any) -> None:
        info["steps"] = len(self.steps) + bool(self.step.updates)
        self.loaded.append(Event(what, place(), info))

    def noting(self, what: str, figures: Callable = lambda args, kwargs: {}) -> Callable:
        def make(original, args, kwargs):
            if not self.inside:
                self.note(what, **figures(args, kwargs))
            return original(*args, **kwargs)

        return make

    def loading(self, what: str) -> Callable:
        def make(original, args, kwargs):
            self.load(what, of=args[0])
            return original(*args, **kwargs)

        return make

    # Modules

    def on_module(self, original, args, kwargs):
        module = args[0]
        if self.inside or (self.depth == 0 and next(module.parameters(), None) is None):
            return original(*args, **kwargs)
        if self.depth == 0:
            self.check_time()
            self.begin_forward(module, args[1:], kwargs)
        self.depth += 1
        try:
            output = original(*args, **kwargs)
        finally:
            self.depth -= 1
            forward = self.forward
            if self.depth == 0:
                self.forward = None
        if forward is not None:
            forward.called.add(id(module))
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in forward.registered:
                    forward.strangers[id(parameter)] = parameter
            if isinstance(output, torch.Tensor) and output.dim() == 3 and output.is_floating_point():
                forward.head = output.detach()
            if self.depth == 0:
                forward.output = output
                self.last = forward
        return output

    def find_own_loss(self) -> None:
        """The loss of this package's models, which has no logits; only a script that uses them imports it."""
        loss = sys.modules.get("hf_gpt_scratch.model.loss")
        if loss is not None and not self.found_own_loss:
            self.found_own_loss = True
            self.patch(loss, "head_loss", self.on_head_loss)

    def begin_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.find_own_loss()
        grad = torch.is_grad_enabled()
        if grad and self.step.updates:
            self.close_step()
        rng = hash(torch.get_rng_state().numpy().tobytes())
        ids = next((value.detach().clone() for value in tensors_in((args, kwargs)) if are_ids(value)), None)
        if self.goes_on(module, grad, ids):
            return
        forward = Forward(module, module.training, grad, (args, kwargs), place(), rng, ids)
        forward.backwards = self.backwards
        forward.registered = {id(parameter) for parameter in module.parameters()}
        forward.autocast = torch.is_autocast_enabled(next(module.parameters()).device.type)
        self.forward = forward
        self.compare(forward)
        self.use_batch(forward)
        if grad and self.waiting is not None:
            self.after = [forward]
        elif grad:
            if not self.stepped and self.step.backwards:
                self.find_update_by_hand(module)
            self.step.forwards.append(forward)
            self.step.batches += self.pending
            self.pending = []
        else:
            self.evaluated(forward)

    def compare(self, forward: Forward) -> None:
        """Marks the pass without gradients of two on one batch, as of a teacher, before or after the other."""
        if forward.ids is None:
            return
        others = self.evaluations if forward.grad else [*self.step.forwards, *self.after]
        for other in others[-4:]:
            if other.ids is not None and torch.equal(other.ids, forward.ids):
                (other if forward.grad else forward).beside = True

    def use_batch(self, forward: Forward) -> None:
        """Notes whether a loader is for training: whether gradients are on when its batches are used, not when read."""
        if forward.ids is None:
            return
        for number, (facts, tensors) in reversed(list(enumerate(self.fetched))):
            if any(begins_with(one, forward.ids) for one in tensors):
                facts["grad"] = forward.grad or (facts["used"] and facts["grad"])
                facts["used"], forward.loader = True, facts
                if forward.grad:  # a teacher may be given the batch first
                    del self.fetched[number]
                return

    def goes_on(self, module: nn.Module, grad: bool, ids: torch.Tensor | None) -> bool:
        """Whether this call goes on with the pass before it, as of a head on what the blocks gave; then it joins it."""
        last = self.last
        if last is None or last.grad != grad or last.losses or last.backwards != self.backwards:
            return False
        known = self.step.forwards[-1:] if grad and self.waiting is None else [*self.after, *self.evaluations[-1:]]
        if not any(one is last for one in known) or (ids is not None and last.ids is not None):
            return False
        parts = list(last.module) if isinstance(last.module, Parts) else [last.module]
        if last.module is module:
            return False
        if not any(part is module for part in parts):
            last.module = Parts([*parts, module])
            last.training = last.training or module.training
        if last.ids is None:
            last.ids = ids
        last.registered |= {id(parameter) for parameter in module.parameters()}
        self.forward = last
        return True

    def evaluated(self, forward: Forward) -> None:
        if self.enough():
            self.evaluations_after += 1
            if self.evaluations_after > EVALUATIONS_AFTER and not self.patient:
                raise Enough
        if len(self.evaluations) < EVALUATIONS:
            self.evaluations.append(forward)

    # Functions

    def on_embedding(self, func, args, kwargs):
        ids = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if self.forward is not None and self.forward.embedded is None and are_ids(ids):
            self.forward.embedded = ids.detach().clone()
            if self.forward.ids is None:
                self.forward.ids = self.forward.embedded
        try:
            return func(*args, **kwargs)
        except IndexError:
            if ids.numel():
                low, high = int(ids.min()), int(ids.max())
                self.wrong_ids = dict(low=low, high=high, rows=len(weight), where=place(), kind="embedding")
                self.wrong_ids["positions"] = are_positions(ids)
            raise

    def on_randint(self, func, args, kwargs):
        output = func(*args, **kwargs)
        bounds = [one for one in args if isinstance(one, int)][:2]
        low = kwargs.get("low", bounds[0] if len(bounds) > 1 else 0)
        high = kwargs.get("high", bounds[-1] if bounds else None)
        if self.forward is None and high is not None and output.numel() <= DRAWN:
            self.drew(int(low), int(high), output.flatten().long().tolist())
        return output

    def drew(self, low: int, high: int, values: list[int]) -> None:
        self.draws.append((low, high, values))
        frame = own_frame()
        if (low, high) not in self.drawing and len(self.drawing) < 16 and frame is not None:
            of_object = vars(frame.f_locals["self"]) if hasattr(frame.f_locals.get("self"), "__dict__") else {}
            found = {**of_object, **frame.f_locals}.items()
            self.drawing[low, high] = {n: v for n, v in found if isinstance(v, torch.Tensor | np.ndarray | list)}

    def on_draw(self, original, args, kwargs):
        """Of Python's `randint`, whose upper bound is included, and `randrange`, and of numpy's `randint`."""
        drawn = original(*args, **kwargs)
        with suppress(TypeError, ValueError, IndexError):  # arrays of bounds, names, a step
            low, high = (0, args[0]) if len(args) == 1 or args[1] is None else args[:2]
            values = np.asarray(drawn).reshape(-1)
            if len(values) <= DRAWN:
                self.drew(int(low), int(high) + (original is RANDINT), values.tolist())
        return drawn

    def on_dropout(self, func, args, kwargs):
        names = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
        self.dropped(names.get("p", 0.5), names.get("training", True))
        return func(*args, **kwargs)

    def on_attention(self, func, args, kwargs):
        p = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
        if p:
            self.dropped(p, True)
        return func(*args, **kwargs)

    def dropped(self, p: float, training: bool) -> None:
        if self.forward is not None and p > 0:
            if training:
                self.forward.dropouts += 1
            else:
                self.forward.idle_dropouts += 1

    def on_cut(self, func, args, kwargs):
        # detach for printing happens outside of the forward pass
        if self.forward is not None and self.forward.grad and args and getattr(args[0], "requires_grad", False):
            self.forward.cuts.append(place())
        return func(*args, **kwargs)

    def on_grad_mode(self, func, args, kwargs):
        if self.forward is not None and self.forward.grad and args and not args[0]:
            self.forward.cuts.append(place())
        return func(*args, **kwargs)

    # Losses

    def on_cross_entropy(self, func, args, kwargs):
        names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
        given = dict(zip(names, args, strict=False)) | kwargs
        rows, targets = given["input"], given["target"]
        self.check_targets(rows, targets, given.get("ignore_index", -100))
        output = func(*args, **kwargs)
        self.add_loss("cross_entropy", rows, targets, given, output)
        return output

    def on_nll(self, func, args, kwargs):
        names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction")
        given = dict(zip(names, args, strict=False)) | kwargs
        self.check_targets(given["input"], given["target"], given.get("ignore_index", -100))
        output = func(*args, **kwargs)
        self.add_loss("nll", given["input"], given["target"], given, output)
        return output

    def check_targets(self, rows, targets, ignore_index) -> None:
        if targets.is_floating_point() or rows.dim() < 2 or not targets.numel():
            return
        counted = targets[targets != ignore_index]
        classes = rows.shape[1]
        if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= classes):
            self.wrong_ids = dict(low=int(counted.min()), high=int(counted.max()), rows=classes, where=place())
            self.wrong_ids |= dict(kind="targets", ignore_index=ignore_index)

    def add_loss(self, kind, rows, targets, given, output) -> None:
        if self.inside or targets.is_floating_point() or rows.dim() < 2:
            return
        if rows.dim() > 2:  # (B, V, T)
            rows = rows.movedim(1, -1).reshape(-1, rows.shape[1])
        options = {name: given[name] for name in ("label_smoothing", "weight") if given.get(name) is not None}
        reduction = given.get("reduction", "mean")
        if given.get("reduce") is not None or given.get("size_average") is not None:
            reduction = torch.nn._reduction.legacy_get_string(
                given.get("size_average"), given.get("reduce"), emit_warning=False
            )
        self.keep(kind, rows, targets, given.get("ignore_index", -100), reduction, output, options)

    def on_gather(self, func, args, kwargs):
        output = func(*args, **kwargs)
        names = dict(zip(("input", "dim", "index"), args, strict=False)) | kwargs
        source, index = names.get("input"), names.get("index")
        dims = source.dim() if isinstance(source, torch.Tensor) else 0
        last = dims in (2, 3) and isinstance(index, torch.Tensor) and names.get("dim") in (-1, dims - 1)
        one = last and index.shape[-1] == 1 and index.shape[:-1] == source.shape[:-1]
        if one and source.is_floating_point():
            self.chosen(source, index, output)
        return output

    def on_index(self, func, args, kwargs):
        output = func(*args, **kwargs)
        source, index = args[0], args[1] if len(args) > 1 else None
        if isinstance(index, tuple) and index and source.is_floating_point() and len(index) == source.dim() >= 2:
            last = index[-1]
            if isinstance(last, torch.Tensor) and last.dtype in (torch.int64, torch.int32) and last.dim():
                rows = [one for one in index[:-1] if is_index(one)]
                if len(rows) == len(index) - 1:
                    ids = torch.broadcast_tensors(*[torch.as_tensor(one) for one in index])
                    self.chosen(source[tuple(one.reshape(-1) for one in ids[:-1])], ids[-1], output)
        return output

    def chosen(self, source: torch.Tensor, index: torch.Tensor, output: torch.Tensor) -> None:
        if self.inside or source.shape[-1] < 4:
            return
        if (self.forward or self.last) is None or not output.numel():
            return
        source = source.reshape(-1, source.shape[-1])
        self.keep("gather", source, index.reshape(-1), None, "none", output, {})

    def on_head_loss(self, original, args, kwargs):
        output = original(*args, **kwargs)
        if self.inside:
            return output
        x, weight, labels = args[:3]
        ignore = kwargs.get("ignore_index", -100)
        given = kwargs.get("shift_labels")
        targets = F.pad(labels, (0, 1), value=ignore)[..., 1:] if given is None else given
        with torch.no_grad():
            small = x[..., 0].numel() * len(weight) <= KEPT_LOGITS
            rows = F.linear(x, weight.to(x.dtype)).float() if small else None
        if rows is not None and self.forward is not None:
            self.forward.head = rows
        counted = int((targets != ignore).sum())
        items = kwargs.get("num_items_in_batch")
        options = {"divisor": float(counted if items is None else items)}
        self.keep(
            "head_loss", None if rows is None else rows.flatten(0, -2), targets, ignore, "divided", output, options
        )
        return output

    def source_of(self, rows: torch.Tensor | None, grad: bool) -> Forward | None:
        """The pass whose logits these are, by their memory; else the last one, with gradients if the loss has them."""
        passes = (self.step.forwards if self.waiting is None else self.after) if grad else self.evaluations
        recent = [*passes[-4:]] if self.last is None or self.last in passes else [*passes[-4:], self.last]
        for forward in reversed(recent if rows is not None else []):
            for one in (forward.head, *tensors_in(forward.output)):
                if one is not None and one.numel() and storage_of(one) == storage_of(rows):
                    return forward
        return next((forward for forward in reversed(recent) if forward.grad or not grad), self.last)

    def keep(self, kind, rows, targets, ignore_index, reduction, output, options) -> None:
        grad = output.requires_grad
        forward = self.forward or self.source_of(rows, grad)
        if forward is None or (forward.ids is None and kind == "gather"):
            return
        if rows is not None and rows.numel() > self.room:
            rows = forward.head = None
            forward.large = True
        elif rows is not None:
            self.room -= rows.numel()
        loss = Loss(
            kind,
            None if rows is None else rows.detach(),
            targets.detach().reshape(-1).clone(),
            ignore_index,
            reduction,
            output,
            place(),
            grad,
            forward,
            options,
        )
        forward.losses += 1
        if grad:
            if self.waiting is None:
                self.step.losses.append(loss)
        elif len(self.evaluation_losses) < EVALUATIONS and kind != "gather":
            self.evaluation_losses.append(loss)

    # Backward

    def on_backward(self, func, args, kwargs):
        if self.inside:
            return func(*args, **kwargs)
        self.check_time()
        if self.enough():
            if not self.wait():
                raise Enough
            self.inside += 1
            try:
                return func(*args, **kwargs)
            finally:
                self.inside -= 1
        if self.step.updates:
            late = any(loss.weights is None and loss.grad for loss in self.step.losses) and not self.step.backwards
            self.close_step()
            self.steps[-1].late = late
        if not self.stepped or self.plain:
            with suppress(Exception):  # an object of the user's that is not what it seems
                self.find_plain()
        root, step = args[0], self.step
        if not root.requires_grad:
            self.no_graph = place()
        with self.alone():
            self.weigh(root)
            self.note_leftovers()
        step.backwards += 1
        self.backwards += 1
        step.roots.append(float(root.detach()) if root.numel() == 1 else float("nan"))
        if torch.is_autocast_enabled(root.device.type):
            step.events.append(Event("backward_in_autocast", place()))
        step.events.append(Event("backward", place()))
        self.inside += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.inside -= 1
        with self.alone():
            step.gradients = {
                key: parameter.grad.detach().clone()
                for key, parameter in self.followed().items()
                if parameter.grad is not None and not parameter.grad.is_sparse
            }
            if not self.stepped:
                self.reference = {key: one.detach().clone() for key, one in self.followed().items()}
        if self.backwards > FRUITLESS and not self.steps:
            self.ended = f"after {FRUITLESS} backward passes without an optimizer step"
            raise Enough
        return result

    def wait(self) -> bool:
        """Whether to go on after the last step: no evaluation has been seen yet."""
        if not self.patient or any(forward.losses for forward in self.evaluations):
            return False
        if self.waiting is None:
            self.close_step()
            self.waiting = time.monotonic()
        self.waited += 1
        return self.waited <= PASSES and time.monotonic() < self.waiting + PATIENCE

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Own work: unrecorded, and without gradients unless it asks for them."""
        self.inside += 1
        try:
            with torch.no_grad():
                yield
        finally:
            self.inside -= 1

    def weigh(self, root: torch.Tensor) -> None:
        """The factor with which each row's loss enters `root`, from the graph between the two."""
        losses = [loss for loss in self.step.losses if loss.weights is None and loss.output.grad_fn is not None]
        if not losses or root.grad_fn is None or root.numel() != 1:
            return
        try:
            with torch.enable_grad():
                factors = torch.autograd.grad(
                    root, [loss.output for loss in losses], retain_graph=True, allow_unused=True
                )
        except RuntimeError:  # a graph that can be used only once
            return
        for loss, factor in zip(losses, factors, strict=True):
            if factor is not None:
                loss.weights = row_weights(loss, factor.detach().double())

    def note_leftovers(self) -> None:
        for key, parameter in self.followed().items():
            grad = parameter.grad
            if grad is None or grad.is_sparse or not bool(grad.any()):
                self.step.leftover.pop(key, None)
            elif key in self.used:
                self.step.leftover[key] = grad.detach().clone()
        self.used.clear()

    def followed(self) -> dict[int, torch.Tensor]:
        """The parameters whose values are kept, by id: of the optimizers, or of the models seen."""
        known: dict[int, torch.Tensor] = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                known |= {id(parameter): parameter for parameter in group["params"]}
        for module in {id(forward.module): forward.module for forward in self.step.forwards}.values():
            known |= {id(parameter): parameter for parameter in module.parameters()}
        size, chosen = 0, {}
        for key, parameter in sorted(known.items(), key=lambda item: item[1].numel()):
            size += parameter.numel()
            if size <= FOLLOWED:
                chosen[key] = parameter
        return chosen

    # Updates

    def find_plain(self) -> None:
        """Has the steps of optimizers that are plain classes recorded, where one alone holds these parameters."""
        theirs = {id(p) for one in self.optimizers for group in one.param_groups for p in group["params"]}
        models = [forward.module for forward in self.step.forwards]
        wanted = {id(p): p for model in models for p in model.parameters() if p.requires_grad and id(p) not in theirs}
        frames, frame = [], own_frame() if wanted else None
        while frame is not None:
            frames += [] if is_library(frame.f_code.co_filename) else [frame]
            frame = frame.f_back
        running = {one.f_code for one in frames}
        near = {id(v): v for one in frames for v in (*one.f_locals.values(), *one.f_globals.values())}
        for _ in range(2):  # an attribute of an object of the script's, and its attributes
            near |= {id(v): v for one in list(near.values()) if is_plain(one) for v in list(vars(one).values())}
        found = {}
        for one in near.values():
            step = getattr(type(one), "step", None) if is_plain(one) else None
            if inspect.isfunction(step) and inspect.unwrap(step).__code__ not in running:
                found[id(one)] = one, {id(p): p for p in tensors_in(vars(one), 4) if id(p) in wanted}
        for one, mine in found.values():
            if mine and not any(mine.keys() & other.keys() for rival, other in found.values() if rival is not one):
                self.plain[id(one)] = Plain(one, mine.values())
                self.optimizers.append(self.plain[id(one)])
                for name, make in (
                    ("step", self.on_plain_step),
                    ("zero_grad", self.noting("zero_grad", lambda args, kwargs: {"of": self.plain.get(id(args[0]))})),
                ):
                    owner = next((kind for kind in type(one).__mro__ if name in vars(kind)), None)
                    if owner is not None and not hasattr(vars(owner)[name], "watched"):
                        self.patch(owner, name, make)

    def on_plain_step(self, original, args, kwargs):
        plain = self.plain.get(id(args[0]))
        if plain is None or self.inside:
            return original(*args, **kwargs)
        self.before_step(plain, (), {})
        if self.waiting is None:
            self.step.updates[-1].numbers = numbers_of([vars(plain.own), args[1:], kwargs])
        result = original(*args, **kwargs)
        self.after_step(plain, (), {})
        return result

    def on_optimizer(self, original, args, kwargs):
        result = original(*args, **kwargs)
        if not any(known is args[0] for known in self.optimizers):
            self.optimizers.append(args[0])
            self.load("optimizer_made", of=args[0])
        return result

    def before_step(self, optimizer, args, kwargs) -> None:
        if self.waiting is not None:
            return
        if len(self.steps) >= self.wanted:  # of a training that calls no backward()
            raise Enough
        self.stepped = True
        if not any(known is optimizer for known in self.optimizers):
            self.optimizers.append(optimizer)
        if self.step.updates and (len(args) > 1 or kwargs.get("closure") is not None):
            self.close_step()  # whose backward passes are within it
        with self.alone():
            groups, ids, squares = [], [], 0.0
            before: dict[int, torch.Tensor] = {}
            gradients: dict[int, torch.Tensor | None] = {}
            state: dict[int, dict[str, Any]] = {}
            followed = self.followed()
            own = isinstance(optimizer, Plain) or is_own(optimizer)
            for group in optimizer.param_groups:
                kept = {key: value for key, value in group.items() if key != "params"}
                kept["ids"] = [id(parameter) for parameter in group["params"]]
                kept = {
                    key: float(v) if isinstance(v, torch.Tensor) and v.numel() == 1 else v for key, v in kept.items()
                }
                groups.append(kept)
                ids += kept["ids"]
                for parameter in group["params"]:
                    key, grad = id(parameter), parameter.grad
                    if grad is not None:
                        squares += float(grad.detach().float().pow(2).sum())
                    gradients[key] = None
                    if key in followed:
                        before[key] = parameter.detach().clone()
                        if grad is not None and not grad.is_sparse:
                            gradients[key] = grad.detach().clone()
                        if own:
                            state[key] = {
                                name: value.detach().clone() if isinstance(value, torch.Tensor) else value
                                for name, value in optimizer.state.get(parameter, {}).items()
                            }
        closure = len(args) > 1 or kwargs.get("closure") is not None
        update = Update(optimizer, place(), groups, ids, before, gradients, state, squares**0.5, own, closure)
        with self.alone():
            update.remembered = remembered(optimizer)
        self.step.updates.append(update)
        self.step.events.append(Event("step", update.where, {"of": optimizer}))
        self.inside += 1

    def after_step(self, optimizer, args, kwargs) -> None:
        if self.waiting is not None:
            return
        self.inside = max(0, self.inside - 1)
        update = self.step.updates[-1]
        with self.alone():
            for key, parameter in self.followed().items():
                if key in update.before:
                    update.after[key] = parameter.detach().clone()
            update.left = remembered(optimizer)
        self.used.update(update.ids)

    def find_update_by_hand(self, module: nn.Module) -> None:
        """An update that no optimizer made: parameters that have changed since the last backward pass."""
        with self.alone():
            followed = self.followed()
            changed = {
                key: before
                for key, before in self.reference.items()
                if key in followed and not torch.equal(before, followed[key])
            }
            if not changed:
                return
            made: dict[int, torch.Tensor | None] = {key: self.step.gradients.get(key) for key in changed}
            norm = float(sum(g.double().pow(2).sum() for g in made.values() if g is not None)) ** 0.5
            update = Update(None, "", [{"ids": list(changed)}], list(changed), changed, made, {}, norm, True)
            update.after = {key: followed[key].detach().clone() for key in changed}
            self.step.updates.append(update)
            self.used.update(changed)
        self.close_step()

    def close_step(self) -> None:
        if not self.step.updates:
            return
        for loss in self.step.losses:
            loss.output = loss.output.detach()  # lets go of the graph
        for forward in self.step.forwards:
            forward.output = detached(forward.output)
        self.steps.append(self.step)
        self.step = Step()

    # Others

    def clip_figures(self, args, kwargs) -> dict[str, Any]:
        return {"limit": float(args[1] if len(args) > 1 else kwargs.get("max_norm", float("nan")))}

    def on_scale(self, original, args, kwargs):
        scaled = original(*args, **kwargs)
        if not self.inside and args[0].is_enabled():
            if self.step.updates and not self.enough():
                self.close_step()
            self.note("scale", of=args[0])
            if not self.enough():
                self.step.scale = float(args[0].get_scale())
        return scaled

    def on_schedule(self, original, args, kwargs):
        scheduler = args[0]
        caller = sys._getframe(2).f_code.co_filename
        if not any(known is scheduler for known in self.schedulers):
            self.schedulers.append(scheduler)
            self.load("scheduler_made", of=scheduler)
        if os.path.basename(caller) != "lr_scheduler.py":
            self.note("schedule", of=scheduler)
        return original(*args, **kwargs)

    def on_load(self, original, args, kwargs):
        loaded = original(*args, **kwargs)
        kinds = set(contents(loaded))
        self.load("file", kinds=kinds)
        return loaded

    def on_batch(self, original, args, kwargs):
        batch = original(*args, **kwargs)
        iterator = args[0]
        self.check_time()
        facts = next((facts for known, facts in self.loaders if known() is iterator), None)
        if facts is None:
            facts = loader_facts(iterator)
            with suppress(TypeError):
                self.loaders.append((weakref.ref(iterator), facts))
        kept = [(name, one.detach().clone()) for name, one in named_tensors(batch) if one.numel() <= 1_000_000]
        self.fetched = [*self.fetched[-AHEAD + 1 :], (facts, [one for _, one in kept if are_ids(one)])]
        if torch.is_grad_enabled() and self.waiting is None:
            self.pending.append(kept)
        return batch


def integer_rows(values: Iterable[Any]) -> list[list[int]]:
    """The tensors and lists of integers with one dimension among these."""
    rows: list[Any] = [v for v in values if isinstance(v, torch.Tensor) and v.dim() == 1 and not v.is_floating_point()]
    rows += [v for v in values if type(v) is list and v and all(type(one) is int for one in v)]
    return [list(map(int, row)) for row in rows]


def begins_with(batch: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether the ids (B, T) are the batch (B, S), or the first T of S."""
    if batch.dim() != 2 or len(batch) != len(ids) or batch.shape[1] < ids.shape[1]:
        return False
    return torch.equal(batch[:, : ids.shape[1]].to(ids.device, ids.dtype), ids)


def storage_of(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.untyped_storage().data_ptr()


def is_index(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype in (torch.int64, torch.int32)
    return isinstance(value, int) and not isinstance(value, bool)


def is_plain(value: Any) -> bool:
    """Whether this is an object of a plain class of the script's."""
    no = isinstance(value, type | types.ModuleType | types.FunctionType | nn.Module | torch.optim.Optimizer)
    return not no and hasattr(value, "__dict__") and is_own(value)


def numbers_of(value: Any, name: str = "", depth: int = 5) -> dict[str, float]:
    """The numbers in lists, tuples and dicts, by the way to them."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {name: float(value)}
    items = list(value.items()) if isinstance(value, dict) else []
    items = list(enumerate(value)) if isinstance(value, list | tuple) and len(value) <= 16 else items
    found: dict[str, float] = {}
    for key, item in items if depth else []:
        found |= numbers_of(item, f"{name}.{key}", depth - 1)
    return found


def is_own(optimizer: Any) -> bool:
    """Whether the optimizer is the user's code, not a library's."""
    file = getattr(sys.modules.get(type(optimizer).__module__), "__file__", None)
    return file is None or not is_library(file)


def remembered(optimizer: Any) -> set[int]:
    """The parameters (at most `REMEMBERED`, the smallest) whose state has a tensor like them that is not all 0."""
    state = getattr(optimizer, "state", {})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = set()
    for parameter in sorted(parameters, key=torch.Tensor.numel)[:REMEMBERED]:
        values = list(state[parameter].values()) if parameter in state else []
        if any(isinstance(one, torch.Tensor) and one.shape == parameter.shape and bool(one.any()) for one in values):
            found.add(id(parameter))
    return found


def detached(value: Any) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in tensors_in(value) if tensor.is_floating_point()]


def named_tensors(batch: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(batch, torch.Tensor):
        return [("", batch)]
    if isinstance(batch, dict):
        return [(str(name), one) for name, one in batch.items() if isinstance(one, torch.Tensor)]
    if isinstance(batch, (list, tuple)):
        return [(str(n), one) for n, one in enumerate(batch) if isinstance(one, torch.Tensor)]
    return []


def loader_facts(iterator: Any) -> dict[str, Any]:
    sampler = getattr(iterator, "_index_sampler", None)
    inner = getattr(sampler, "sampler", sampler)
    dataset = getattr(iterator, "_dataset", None)
    facts: dict[str, Any] = {"dataset": dataset, "sampler": type(inner).__name__, "grad": torch.is_grad_enabled()}
    facts["used"] = False  # by a forward pass: before, "grad" is a guess
    facts["loader"] = id(sampler)
    facts["kept"] = sampler  # so that its id stays its own
    indices = getattr(inner, "indices", None)
    facts["indices"] = None if indices is None else [int(index) for index in indices]
    with suppress(TypeError, NotImplementedError):
        facts["batches"] = len(iterator)
    facts["where"] = place()
    return facts


def contents(value: Any, depth: int = 2) -> Iterator[str]:
    """What a loaded file holds: optimizer, scheduler, model or rng."""
    if isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.numel() > 1000:
        yield "rng"
    if not isinstance(value, dict):
        return
    if "param_groups" in value and "state" in value:
        if value["state"]:
            yield "optimizer"
    elif "last_epoch" in value and {"_step_count", "base_lrs", "_schedulers"} & value.keys():
        yield "scheduler"
    elif value and all(isinstance(item, torch.Tensor) for item in value.values()) and len(value) > 1:
        yield "model"
    elif depth:
        for item in value.values():
            yield from contents(item, depth - 1)


def row_weights(loss: Loss, factor: torch.Tensor) -> torch.Tensor | None:
    """(N,): the factor of each row's cross-entropy, from the factor of the loss's output."""
    targets = loss.targets
    counted = torch.ones_like(targets, dtype=torch.bool) if loss.ignore_index is None else targets != loss.ignore_index
    number = counted.sum().clamp(min=1)
    if loss.kind == "gather":
        if loss.rows is None or factor.numel() != targets.numel():
            return None
        rows = loss.rows.double()
        weights = -factor.reshape(-1)
        if are_probabilities(rows):
            weights = weights * rows.gather(1, targets[:, None])[:, 0]
        return weights
    if loss.reduction == "mean":
        if loss.options.get("weight") is not None:
            return None
        return counted * factor / number
    if loss.reduction == "sum":
        return counted * factor
    if loss.reduction == "divided":
        return counted * factor / loss.options["divisor"]
    return counted * factor.reshape(-1) if factor.numel() == targets.numel() else None


def are_probabilities(rows: torch.Tensor) -> bool:
    """Whether each row is a distribution."""
    sums = rows.sum(-1, dtype=torch.float64)
    return bool((rows >= 0).all()) and bool(((sums - 1).abs() < 1e-3 if rows.shape[-1] > 1 else sums > 2).all())
