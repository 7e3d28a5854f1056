"""The state of AdamW beside the weights: through the same weight map into what Trainer resumes from.

A moment has its weight's shape, so it is renamed, split and transposed as the weight is. The step and the parameter
group go the same way, as tensors filled with one number: what is fused or split finds its own, and a mixture shows.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..errors import ConversionError, some
from ..model.book_files import has_adapters
from .checkpoint import checked_finite, lazy, read_pickle, shown
from .formats import Format, Source
from .formats.directory import PREFIXES, Directory
from .formats.format import Contents, Options
from .formats.torch_file import save_lazily
from .tensors import LazyTensor, zero
from .torch_archive import Stored

# Trainer's files, and one that it does not have: settings for TrainingArguments.
OPTIMIZER, SCHEDULER, STATE, ARGUMENTS = "optimizer.pt", "scheduler.pt", "trainer_state.json", "training_arguments.json"
LOGGING_STEPS = 10  # a resumed Trainer obeys its state in this, not its arguments
MOMENTS = ("exp_avg", "exp_avg_sq")
WITH_AMSGRAD = "max_exp_avg_sq"
# AdamW's settings of a parameter group; the others are about how torch computes, and torch chooses them again.
GROUP = {"lr": None, "betas": None, "eps": None, "weight_decay": None, "amsgrad": False, "maximize": False}
# What nanoGPT's config says of its schedule.
SCHEDULE = ("learning_rate", "warmup_iters", "lr_decay_iters", "min_lr")
BUFFERS = r"trf_blocks\.\d+\.att\.(.*\.)?mask"
REMEDY = "to convert the model without it, pass --no-optimizer, in Python optimizer=False"


class NotCarried(Exception):
    """The reason why an optimizer's state has no counterpart in Trainer."""


@dataclass
class State:
    """The state of AdamW, for one model in Trainer.

    Args:
        moments: for each kind, the tensors under the model's names of its parameters.
        there: the same in the layout of the source's format, to verify what was written.
        steps: of each parameter of AdamW.
        groups: the names and the settings of Trainer's parameter groups.
        untrained: the parameters that the source's program did not train.
        run: the number of steps of the run; the schedule is at its next one.
        prefix: what the model's names have before the weight map's.
        arguments: for TrainingArguments.
        notes: what the user should know.
    """

    moments: dict[str, dict[str, LazyTensor]]
    there: dict[str, dict[str, LazyTensor]]
    steps: dict[str, float]
    groups: list[tuple[list[str], dict[str, Any]]]
    untrained: list[str]
    run: int
    prefix: str
    arguments: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.moments.values() for tensor in tensors.values())

    def write(self, directory: Path, options: Options) -> dict[str, dict[str, Any]]:
        """Writes the files that `trainer.train(resume_from_checkpoint=directory)` reads beside the weights.

        Returns:
            sha256 and size of the largest of them.
        """
        from transformers.trainer_callback import TrainerControl, TrainerState

        names = [name for group, _ in self.groups for name in group]
        tensors = {(name, kind): tensors[name] for kind, tensors in self.moments.items() for name in names}

        def content(values: Mapping[Any, torch.Tensor]) -> dict[str, Any]:
            state = {
                i: {"step": torch.tensor(self.steps[name]), **{kind: values[name, kind] for kind in self.moments}}
                for i, name in enumerate(names)
            }
            groups = [{**settings, "params": [names.index(name) for name in group]} for group, settings in self.groups]
            return {"state": state, "param_groups": groups}

        hashes = save_lazily(tensors, content, directory / OPTIMIZER, options.progress)
        torch.save(self._scheduler(), directory / SCHEDULER)
        size = self.arguments.get("per_device_train_batch_size", 8)  # TrainingArguments' own
        counts: dict[str, Any] = dict(
            global_step=self.run, epoch=0.0, train_batch_size=size, logging_steps=LOGGING_STEPS
        )
        trainer = TrainerState(**counts, stateful_callbacks={"TrainerControl": TrainerControl().state()})  # type: ignore[arg-type]
        trainer.save_to_json(str(directory / STATE))
        (directory / ARGUMENTS).write_text(json.dumps(self.arguments, indent=2) + "\n")
        return hashes

    def _scheduler(self) -> dict[str, Any]:
        """The state of the scheduler, whose function of the step is that of `arguments`."""
        optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in self.groups])
        lrs = [settings["lr"] for _, settings in self.groups]
        state = LambdaLR(optimizer, lambda step: 1.0).state_dict()
        base = [settings["initial_lr"] for _, settings in self.groups]
        return {**state, "base_lrs": base, "last_epoch": self.run, "_step_count": self.run + 1, "_last_lr": lrs}

    def read_back(
        self, directory: Path, wanted: Format, source: Format, n_layers: int
    ) -> Iterator[tuple[dict[str, LazyTensor], dict[str, LazyTensor]]]:
        """Yields for each kind of moment the source's tensors, and those in the file, mapped back to the source."""
        names = [name for group, _ in self.groups for name in group]
        written = read_pickle(directory / OPTIMIZER)["state"]
        for kind, there in self.there.items():
            found = {name.removeprefix(self.prefix): lazy(written[i][kind]) for i, name in enumerate(names)}
            ours = wanted.layout.to_scratch(found, n_layers)
            back = source.layout.from_scratch(ours, n_layers)
            yield there, back


def state_that_goes_along(
    source: Source, contents: Contents, wanted: Format, asked: bool
) -> tuple[State | None, list[str]]:
    """The optimizer's state that goes along with the model, and notes on it or on why it is left behind."""
    beside = source.path / OPTIMIZER
    if source.path.is_dir() and beside.exists():
        return None, [f"left behind: {beside.name}, since only the book's and nanoGPT's files bring an optimizer along"]
    training = source.training
    if training is None or not training.optimizers:
        return None, []
    what = f"left behind: the optimizer's state under {', '.join(map(shown, training.optimizers))}"
    try:
        if not asked:
            raise NotCarried("optimizer=False says so")
        if not isinstance(wanted, Directory):
            raise NotCarried(f"{wanted.file or wanted.name} has no place for it")
        state = _state(source, contents, wanted)
    except NotCarried as reason:
        return None, [f"{what}, since {reason}"]
    return state, state.notes


def _state(source: Source, contents: Contents, wanted: Directory) -> State:
    from transformers import Trainer  # which takes seconds

    training, format = source.training, source.format
    if training is None or len(training.optimizers) != 1:
        raise NotCarried("it is not one optimizer, and Trainer has one")
    [optimizer] = training.optimizers.values()
    if has_adapters(training.parameters):
        raise NotCarried("it belongs to adapters, which are merged into their layers")
    groups, ids, states = _checked(optimizer)
    names = _names(training.parameters, groups, ids, contents, format)
    found = {name: states.get(id) for id, name in names.items()}
    kinds = [*MOMENTS, *([WITH_AMSGRAD] if any(group["amsgrad"] for group in groups) else [])]
    for name, state in found.items():
        _check_state(name, state, training.parameters[name], kinds)
    if not any(found.values()):
        raise NotCarried("it has made no step")

    def of(name: str, kind: str) -> LazyTensor:
        state, shape = found.get(name), training.parameters[name]
        if not state:
            return zero(shape, torch.float32)
        return _moment(lazy(state[kind]), f"{kind} of {name}", source.path, positive=kind != "exp_avg")

    member = {name: i for i, group in enumerate(ids) for name in (names[id] for id in group)}
    steps = {name: float(_number(state["step"])) if state else -1.0 for name, state in found.items()}
    numbers: dict[str, Mapping[str, float]] = {"step": steps, "group": member}
    sets: dict[str, dict[str, LazyTensor]] = {kind: {name: of(name, kind) for name in found} for kind in kinds}
    for kind, values in numbers.items():
        sets[kind] = {name: _filled(training.parameters[name], values[name]) for name in found}
    n_layers, prefix = contents.config.n_layers, PREFIXES[wanted.model_type]
    there = {kind: format.in_layout(tensors, source.path) for kind, tensors in sets.items()}
    moved = {
        kind: wanted.layout.from_scratch(format.layout.to_scratch(tensors, n_layers), n_layers)
        for kind, tensors in there.items()
    }
    model = wanted.model(contents)
    step, group = ({bare: _one(tensor, bare) for bare, tensor in moved[kind].items()} for kind in numbers)
    parameters = {name: name.removeprefix(prefix) for name, _ in model.named_parameters()}
    trained = {name: bare for name, bare in parameters.items() if step.get(bare, -1.0) >= 0}
    if missing := sorted(bare for bare, number in step.items() if number >= 0 and bare not in set(trained.values())):
        raise NotCarried(f"the model has no parameter for {some(missing)}")
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it uses no Trainer
    split = ([name for name in trained if name in decayed], [name for name in trained if name not in decayed])
    arranged = [(part, _common(part, [groups[int(group[trained[name]])] for name in part])) for part in split]
    if not arranged[1][0]:
        arranged[1] = ([], {**arranged[0][1], "weight_decay": 0.0})
    if not arranged[0][0]:
        raise NotCarried("it trained no weights, only biases and norms")
    state = State(
        {kind: {name: moved[kind][bare] for name, bare in trained.items()} for kind in kinds},
        {kind: there[kind] for kind in kinds},
        {name: step[bare] for name, bare in trained.items()},
        arranged,
        sorted(parameters.keys() - trained.keys()),
        training.steps if training.steps is not None else int(max(steps.values())),
        prefix,
    )
    if any("decoupled_weight_decay" not in one and one.get("weight_decay") for one in optimizer["param_groups"]):
        state.notes.append("the file is older than the mark that tells AdamW from Adam; AdamW is assumed")
    _schedule(state, training.settings)
    _tell(state)
    return state


def _checked(optimizer: Mapping[Any, Any]) -> tuple[list[dict[str, Any]], list[list[int]], dict[int, Any]]:
    """The groups' settings, their parameters' numbers, and the states by number."""
    stored, states = optimizer.get("param_groups"), optimizer.get("state")
    if not isinstance(stored, list) or not isinstance(states, dict) or not stored:
        raise NotCarried("it is not as torch saves it")
    groups, ids = [], []
    for group in stored:
        numbers = group.get("params") if isinstance(group, dict) else None
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise NotCarried("it is not as torch saves it")
        settings = {name: group.get(name, default) for name, default in GROUP.items()}
        betas = settings["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise NotCarried("it has no two betas, so it is not AdamW's")
        plain = [settings["lr"], settings["eps"], settings["weight_decay"], *betas]
        if not all(isinstance(one, int | float) and math.isfinite(one) and one >= 0 for one in plain):
            raise NotCarried("its learning rate, betas, eps or weight decay is not a number that AdamW takes")
        if "amsgrad" not in group:
            raise NotCarried("it is not AdamW's, which has a setting amsgrad")
        if group.get("decoupled_weight_decay") is False and settings["weight_decay"]:
            raise NotCarried("it is Adam's, whose weight decay is part of the gradient, and Trainer has AdamW")
        groups.append(
            {
                **{name: float(settings[name]) for name in ("lr", "eps", "weight_decay")},
                "betas": tuple(map(float, betas)),
                "amsgrad": settings["amsgrad"] is True,
                "maximize": settings["maximize"] is True,
            }
        )
        ids.append(numbers)
    flat = [number for numbers in ids for number in numbers]
    if len(set(flat)) != len(flat) or not states.keys() <= set(flat):
        raise NotCarried("its states are not those of its parameters")
    return groups, ids, states


def _names(
    parameters: Mapping[str, torch.Size], groups: list[dict[str, Any]], ids: list[list[int]], contents: Contents, format
) -> dict[int, str]:
    """The parameter of each number: in the order of the model, and in two groups, as nanoGPT's, matrices first."""
    order = [name for name in parameters if not re.fullmatch(f"{format.layout.dropped}|{BUFFERS}", name)]
    count, head = sum(map(len, ids)), format.layout.head
    if contents.config.tie_word_embeddings and head in order:
        if count == len(order):
            raise NotCarried(
                f"it has moments for {head} and for the token embedding, which are equal and become one matrix"
            )
        order.remove(head)  # of the two names, the first is that of the parameter
    if count != len(order):
        raise NotCarried(f"it has {count} parameters, and the model {len(order)}")
    if len(ids) == 2:
        order = [
            *(name for name in order if len(parameters[name]) >= 2),
            *(name for name in order if len(parameters[name]) < 2),
        ]
    elif len(ids) != 1:
        raise NotCarried(f"nothing tells which parameters its {len(ids)} groups have")
    if len(ids) == 2 and len(ids[0]) != sum(len(parameters[name]) >= 2 for name in order):
        raise NotCarried("its groups are not matrices and the rest, so nothing tells which parameters they have")
    flat = [number for numbers in ids for number in numbers]
    return dict(zip(flat, order, strict=True))


def _check_state(name: str, state: Any, shape: torch.Size, kinds: list[str]) -> None:
    if state is None:
        return
    if not isinstance(state, dict) or not {"step", *kinds} == state.keys():
        raise NotCarried(f"what it has for {name[:200]!r} is not AdamW's step and moments")
    _number(state["step"])
    for kind in kinds:
        stored = state[kind]
        if not isinstance(stored, Stored) or not stored.dtype.is_floating_point:
            raise NotCarried(f"{kind} of {name[:200]!r} is not a dense tensor of floats")
        if stored.shape != shape:
            raise NotCarried(
                f"{kind} of {name[:200]!r} has shape {list(stored.shape)} instead of {list(shape)}, so its parameters "
                "are in another order than the model's"
            )


def _number(value: Any) -> float:
    """The step, which older versions of torch save as a number."""
    if isinstance(value, Stored) and value.shape.numel() == 1:
        value = value.read().item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 48:
        raise NotCarried(f"its step is {shown(value)}, and not a number")
    return float(value)


def _moment(tensor: LazyTensor, name: str, path: Path, positive: bool) -> LazyTensor:
    """The tensor, which raises an error when it is read if AdamW could not have it."""

    def read() -> torch.Tensor:
        try:
            values = checked_finite(tensor.read(), name, path.name) if tensor.shape.numel() else tensor.read()
        except ConversionError as error:
            raise ConversionError(f"{error}; {REMEDY}") from error
        if positive and values.numel() and values.min() < 0:
            raise ConversionError(f"{name} in {path.name} has values below 0, but it is a mean of squares; {REMEDY}")
        return values

    return replace(tensor, read=read)


def _filled(shape: torch.Size, number: float) -> LazyTensor:
    value = torch.tensor(number, dtype=torch.float64)
    return LazyTensor(shape, value.dtype, partial(value.expand, shape))


def _one(tensor: LazyTensor, name: str) -> float:
    """The number that fills it."""
    values = tensor.read()
    least, most = (values.min().item(), values.max().item()) if values.numel() else (-1.0, -1.0)
    if least != most:
        raise NotCarried(f"what becomes {name} was in different groups, or trained for different numbers of steps")
    return least


def _common(names: list[str], settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that all parameters of a group of Trainer's have."""
    for name, one in zip(names, settings, strict=True):
        for key in one:
            if one[key] != settings[0][key]:
                raise NotCarried(
                    f"Trainer has {names[0]} and {name} in one group, but their {key} is {settings[0][key]} and "
                    f"{one[key]}"
                )
    return {**settings[0]} if settings else {}


def _schedule(state: State, config: Mapping[str, Any]) -> None:
    """Makes TrainingArguments of the groups' settings and of nanoGPT's config, and the schedule's base."""
    now = state.groups[0][1]
    arguments: dict[str, Any] = {
        "learning_rate": now["lr"],
        "adam_beta1": now["betas"][0],
        "adam_beta2": now["betas"][1],
        "adam_epsilon": now["eps"],
        "weight_decay": now["weight_decay"],
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": LOGGING_STEPS,
        "ignore_data_skip": True,  # the order of the source's data is not known
    }
    known = {name: config[name] for name in config if isinstance(config[name], int | float)}
    if "grad_clip" in known:
        arguments["max_grad_norm"] = float(known["grad_clip"])
    for theirs, ours in (
        ("batch_size", "per_device_train_batch_size"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ):
        if type(known.get(theirs)) is int and known[theirs] > 0:
            arguments[ours] = known[theirs]
    base = now["lr"]
    if known.get("decay_lr") is not False and all(name in known for name in SCHEDULE):
        rate, warmup, end, least = (known[name] for name in SCHEDULE)
        if not (0 <= least <= rate and rate > 0 and 0 <= warmup < end and type(warmup) is type(end) is int):
            state.notes.append("the schedule of its config is not nanoGPT's, so the learning rate stays as it is")
        elif not any(math.isclose(now["lr"], lr, rel_tol=1e-6) for lr in _nanogpt(state.run, rate, warmup, end, least)):
            state.notes.append(
                f"its learning rate is {now['lr']}, which is not what its config says for step {state.run}, so it "
                "stays as it is"
            )
        elif state.run < end:
            base = float(rate)
            arguments |= {
                "learning_rate": base,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": least / rate},
                "warmup_steps": warmup,
                "max_steps": end,
            }
            if state.run < warmup:
                state.notes.append(
                    f"it was saved in its warm-up, in which Trainer's learning rate differs by up to 1/{warmup}, until "
                    f"step {warmup}"
                )
    elif "decay_lr" not in known:
        clipping = "" if "grad_clip" in known else "of clipping or "
        state.notes.append(
            f"the file says nothing {clipping}of a schedule: the learning rate stays {now['lr']}"
            + (", and max_grad_norm is 0, which is no clipping" if clipping else "")
        )
    for _, settings in state.groups:
        settings["initial_lr"] = base
    state.arguments = arguments


def _nanogpt(step: int, rate: float, warmup: int, end: int, least: float) -> list[float]:
    """nanoGPT's learning rate at a step, today's and that of before 2025, which differ in the warm-up."""
    if step < warmup:
        return [rate * (step + 1) / (warmup + 1), rate * step / warmup]
    done = min(1.0, (step - warmup) / (end - warmup))
    return [least + 0.5 * (1 + math.cos(math.pi * done)) * (rate - least)]


def _tell(state: State) -> None:
    told = (
        f"the optimizer came along, after {state.run} steps: trainer.train(resume_from_checkpoint=...) on this "
        f"directory goes on with it; {ARGUMENTS} has the settings for TrainingArguments"
    )
    if state.untrained:
        state.notes.append(
            f"{len(state.untrained)} parameters were not trained ({some(state.untrained)}): freeze them, "
            "parameter.requires_grad_(False), before making the Trainer"
        )
    state.notes.insert(0, told)
