"""Whether the updates are what the optimizer's settings say, and whether these settings and the schedule make sense."""

import itertools
import math
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .findings import NOTE, Finding, Findings
from .gradients import Names, counted, covered
from .record import Plain, Recorder, Step, Update

# Decay above this share of the gradient's norm is part of the gradient, not a correction of it.
L2_SHARE = 0.1
ADAMS = ("Adam", "NAdam", "RAdam", "Adamax")
# Elements of an update that are replayed.
REPLAYED = 40_000
# In units of what rounding explains, the error from which a rule does not reproduce the updates.
MISFIT = 8


def default_groups(update: Update) -> list[dict[str, Any]]:
    return [group for group in update.groups if group.get("ids")]


class UpdateFindings(Findings):
    """The findings about the updates of a recorded run."""

    def __init__(self, recorder: Recorder, names: Names):
        super().__init__(recorder)
        self.names = names
        self.steps = recorder.steps

    def all(self) -> list[Finding]:
        if not self.steps:
            return []
        self.optimizers()
        self.forgotten()
        self.twice()
        self.replay()
        self.schedule()
        self.decay()
        self.settings()
        self.idle()
        self.unmoved()
        return self.findings

    def updates(self) -> list[tuple[int, Step, Update]]:
        return [(n, step, update) for n, step in enumerate(self.steps) for update in step.updates]

    # Optimizers

    def optimizers(self) -> None:
        kinds: dict[int, list[Any]] = {}
        for step in self.steps:
            for update in step.updates:
                for key in update.ids[:1]:
                    if update.optimizer is not None and not any(one is update.optimizer for one in kinds.get(key, [])):
                        kinds.setdefault(key, []).append(update.optimizer)
        late = [e.info["of"] for e in self.recorder.loaded if e.what == "optimizer_made" and e.info["steps"]]
        for several in kinds.values():
            if not any(one is other for one in several for other in late):
                continue  # all of them were there before the first step
            if len(several) > 1 and len(self.steps) > 1 and len(self.steps[0].updates) < len(several):
                made = [event for event in self.recorder.loaded if event.what == "optimizer_made"]
                self.add(
                    "optimizer-recreated",
                    f"{len(several)} optimizers were made for the same parameters in {len(self.steps)} steps, so each "
                    "begins without moments and without a step count",
                    made[-1].where if made else "",
                    "make the optimizer once, before the loop",
                    "the steps were made by different objects",
                    figures={"optimizers": len(several)},
                )

    def forgotten(self) -> None:
        """State that a step leaves and the next does not find, each time; of a user's own optimizer, see `replay`."""
        history: dict[int, list[Update]] = {}
        for _, _, update in self.updates():
            if update.optimizer is not None:
                history.setdefault(id(update.optimizer), []).append(update)
        for updates in history.values():
            pairs = list(itertools.pairwise(updates))
            if not pairs or updates[0].own or any(event.what == "optimizer" for event in self.recorder.loaded):
                continue
            if all(before.left and not before.left & after.remembered for before, after in pairs):
                self.add(
                    "state-forgotten",
                    f"the state of {type(updates[0].optimizer).__name__} is lost between the steps, so each begins "
                    "without moments",
                    updates[1].where,
                    "keep optimizer.state between the steps: neither clear it nor set it to 0",
                    f"after {counted(len(pairs), 'step')} the state held moments, and at the start of the next it held "
                    "none, or only zeros",
                    figures={"times": len(pairs)},
                )

    def twice(self) -> None:
        for _, step in enumerate(self.steps):
            seen: dict[int, int] = {}
            optimizers = {id(update.optimizer): update for update in step.updates}
            for update in optimizers.values():
                for key in update.ids:
                    seen[key] = seen.get(key, 0) + 1
            double = [key for key, number in seen.items() if number > 1]
            if double:
                self.add(
                    "updated-twice",
                    f"{counted(len(double), 'parameter')} are updated twice in each step: {self.names.of(double)}",
                    step.updates[0].where,
                    "give each parameter to one optimizer once; a tied weight is one parameter",
                    "the groups hold the same tensor twice"
                    + (f"; it has the names {', '.join(self.names.names.get(double[0], ['?']))}" if double else ""),
                    figures={"parameters": len(double)},
                )
                return
            calls = [update for update in step.updates if update.optimizer is step.updates[0].optimizer]
            if len(calls) > 1 and calls[0].optimizer is not None and step.backwards:
                self.add(
                    "stepped-twice",
                    f"the optimizer's step is called {len(calls)} times with one gradient",
                    calls[1].where,
                    "call optimizer.step() once after the backward passes",
                    "no backward pass came between the calls",
                )
                return

    # Learning rates

    def rates(self) -> list[list[float]]:
        return [
            [float(group["lr"]) for update in step.updates for group in update.groups if is_number(group.get("lr"))]
            for step in self.steps
        ]

    def schedule(self) -> None:
        rates = self.rates()
        if not rates or not rates[0]:
            return
        peak = [max(step) if step else math.nan for step in rates]
        calls = [step.happened("schedule") for step in self.steps]
        schedulers = self.recorder.schedulers
        made = next((event.where for event in self.recorder.loaded if event.what == "scheduler_made"), "")
        outer = {id(event.info["of"]) for one in calls for event in one}
        driven = [scheduler for scheduler in schedulers if id(scheduler) in outer]
        moved = {id(scheduler.optimizer) for scheduler in driven}
        idle = [scheduler for scheduler in schedulers if id(scheduler.optimizer) not in moved]
        shown = ", ".join(f"{rate:.4g}" for rate in peak)
        figures = {"learning_rates": peak}
        for n, step in enumerate(self.steps):
            order = [event.what for event in step.events]
            # One that reacts to a loss has no first learning rate to lose.
            ordered = [e for e in step.happened("schedule") if not isinstance(e.info["of"], ReduceLROnPlateau)]
            if ordered and "step" in order and step.events.index(ordered[0]) < order.index("step"):
                early = ordered[0]
                micro = len(step.happened("schedule"))
                if micro == 1 or step.backwards <= 1:
                    self.add(
                        "schedule-off-by-one",
                        "the schedule advances before the optimizer steps, so its first learning rate is never used",
                        early.where,
                        "optimizer.step(), then scheduler.step()",
                        f"at step {n + 1} schedule comes before step; the learning rates used are {shown}",
                        figures=figures,
                    )
                    return
            for scheduler in driven:
                times = [event for event in step.happened("schedule") if event.info["of"] is scheduler]
                places = [n for n, event in enumerate(step.events) if any(event is one for one in times)]
                between = [event.what for event in step.events[places[0] : places[-1]]] if places else []
                if len(times) > 1:
                    each = "backward" in between and len(times) >= step.backwards - 1
                    self.add(
                        "schedule-per-micro-batch" if each else "schedule-stepped-twice",
                        f"the schedule advances {len(times)} times per optimizer step"
                        + (", once per micro-batch" if each else ""),
                        times[0].where,
                        "call scheduler.step() once after optimizer.step()",
                        f"the learning rates used are {shown}",
                        figures=figures,
                    )
                    return
        if idle and len(self.steps) > 1:
            self.never_advanced(idle, made, peak, shown)
            return
        if all(rate == 0 for rate in peak) and len(peak) > 1:
            self.add(
                "learning-rate-zero",
                f"the learning rate is 0 in all {len(peak)} steps, so nothing is learnt",
                self.steps[0].updates[0].where,
                "check the schedule",
                f"the learning rates used are {shown}",
                figures=figures,
            )
            return
        if any(rate < 0 for rate in peak):
            self.add("learning-rate-negative", f"the learning rates used are {shown}", self.steps[0].updates[0].where)
            return
        if len(peak) >= 3 and not schedulers and peak[0] > 1.5 * peak[1] and peak[1] < peak[2] < peak[0]:
            self.add(
                "schedule-off-by-one",
                f"the first step uses {peak[0]:.4g}, the optimizer's own learning rate, not the schedule's",
                self.steps[0].updates[0].where,
                "set the learning rate before optimizer.step()",
                f"the learning rates used are {shown}: a warm-up whose first step is at full rate",
                figures=figures,
            )
            return
        falling = len(peak) > 1 and (schedulers or len(set(peak)) > 1) and peak[0] >= max(peak)
        if falling or (len(set(peak)) == 1 and not schedulers):
            self.add(
                "no-warm-up",
                f"the first step uses the highest learning rate, {peak[0]:.4g}: there is no warm-up",
                made or self.steps[0].updates[0].where,
                "large models are trained with a linear warm-up; small ones often do without",
                f"the learning rates used are {shown}",
                level=NOTE,
                figures=figures,
            )

    def never_advanced(self, schedulers: list[Any], made: str, peak: list[float], shown: str) -> None:
        batches = max((facts.get("batches", 0) for _, facts in self.recorder.loaders if facts["grad"]), default=0)
        horizon = max((horizon_of(scheduler) or 0 for scheduler in schedulers), default=0)
        figures = {"learning_rates": peak, "horizon": horizon, "batches_per_epoch": batches}
        proof = f"the learning rates used are {shown}, and scheduler.step() was not called in {len(peak)} steps"
        remedy = "call scheduler.step() after each optimizer.step()"
        rising = [rate for scheduler in schedulers for rate in [next_rate(scheduler)] if rate is not None]
        now = max(float(group["lr"]) for scheduler in schedulers for group in scheduler.optimizer.param_groups)
        if now == 0:
            says = "the schedule starts at 0 and does not advance with the steps, so the learning rate is 0"
        elif rising and max(rising) > 1.2 * now:
            says = "the schedule warms up, but it does not advance with the steps; warm-ups count steps"
        elif batches > 1 and horizon >= max(2 * batches, 50) and horizon % batches == 0:
            says = (
                f"the schedule is made for {horizon} steps, and an epoch has {batches} batches, but it does not "
                "advance with the steps"
            )
        else:
            self.add(
                "schedule-not-stepped",
                "there is a schedule, but it did not advance in these steps",
                made,
                "if it counts steps, " + remedy,
                proof,
                level=NOTE,
                figures=figures,
            )
            return
        self.add("schedule-not-stepped", says, made, remedy, proof, figures=figures)

    # Replay

    def replay(self) -> None:
        own = [update for _, _, update in self.updates() if update.own]
        if not own:
            return
        first = own[0].optimizer
        history = [update for update in own if update.optimizer is first]
        if len(history) < 2 or any(event.what == "optimizer" for event in self.recorder.loaded):
            return
        found = explain_updates(history)
        if found is None:
            self.add(
                "update-not-explained",
                "the updates follow none of the rules that are known here",
                history[0].where,
                level=NOTE,
            )
            return
        name, says, remedy, proof, figures = found
        for update, rate in zip(history, figures.pop("rates", ()), strict=False):
            update.groups[0]["lr"] = rate
        if name:
            # Of what tells no weight_decay it is not known which kind was meant, unless its name says it.
            untold = first is None or (isinstance(first, Plain) and "adamw" not in type(first.own).__name__.lower())
            choice = name == "l2-instead-of-decoupled" and untold
            level = NOTE if choice else "fault"
            self.add(name, says, history[0].where, remedy, proof, level=level, figures=figures)

    # Weight decay

    def decay(self) -> None:
        _, _, update = self.updates()[0]
        groups = [group for group in default_groups(update) if is_number(group.get("weight_decay"))]
        made = self.optimizer_made or update.where
        small, tables = [], []
        for group in groups:
            if not group["weight_decay"]:
                continue
            for key in group["ids"]:
                parameter = self.names.parameters.get(key)
                if parameter is None:
                    continue
                if parameter.dim() < 2:
                    small.append(key)
                elif self.is_embedding(key):
                    tables.append(key)
        matrices = "GPT-2's own recipe decays matrices only: two groups, parameters with dim() >= 2 and the others"
        book = "the group that holds them has weight_decay > 0; the book does the same"
        for keys, what, *told in (
            (small, f"{len(small)} norms and biases", "decay-on-norms-and-biases", matrices, book),
            (
                tables,
                "embeddings",
                "decay-on-embeddings",
                "some recipes leave them out; nanoGPT decays them",
                book[:44],
            ),
        ):
            if keys:
                says = f"weight decay applies to {what}: {self.names.of(keys)}"
                self.add(told[0], says, made, *told[1:], level=NOTE, figures={"parameters": len(keys)})
        self.coupled(update, groups, made)

    def is_embedding(self, key: int) -> bool:
        return any(
            isinstance(part, torch.nn.Embedding) and part.weight is self.names.parameters[key]
            for module in self.names.modules
            for part in module.modules()
        )

    def coupled(self, update: Update, groups: list[dict[str, Any]], made: str) -> None:
        if update.own or type(update.optimizer).__name__ not in ADAMS:
            return
        worst, rate = 0.0, 0.0
        for group in groups:
            if not group["weight_decay"] or group.get("decoupled_weight_decay"):
                continue
            gradients = [(update.gradients.get(key), update.before.get(key)) for key in group["ids"]]
            pairs = [(g, p) for g, p in gradients if g is not None and p is not None]
            size = math.sqrt(sum(float(g.double().pow(2).sum()) for g, _ in pairs))
            pull = group["weight_decay"] * math.sqrt(sum(float(p.double().pow(2).sum()) for _, p in pairs))
            if size and pull / size > worst:
                worst, rate = pull / size, group["weight_decay"]
        if not worst:
            return
        self.add(
            "l2-instead-of-decoupled",
            f"{type(update.optimizer).__name__} adds weight_decay={rate:g} times the weights to the gradient, and then "
            "divides both by the gradient's size: this is L2, not decoupled weight decay",
            made,
            "torch.optim.AdamW",
            f"at the first step that term is {worst:.2g} times the gradient's norm",
            level="fault" if worst >= L2_SHARE else NOTE,
            figures={"decay_to_gradient": worst},
        )

    # Betas and eps

    def settings(self) -> None:
        _, _, update = self.updates()[0]
        for group in default_groups(update):
            betas = group.get("betas")
            if isinstance(betas, (tuple, list)) and len(betas) >= 2 and float(betas[0]) > float(betas[1]):
                self.add(
                    "betas-swapped",
                    f"betas={tuple(map(float, betas[:2]))}: the mean of squares forgets faster than the mean",
                    self.optimizer_made,
                    f"betas=({float(betas[1]):g}, {float(betas[0]):g})",
                    "Adam divides by the root of the second mean, which has to be the steadier one",
                )
            eps = float(group["eps"]) if is_number(group.get("eps")) else 0.0
            if eps >= 1e-4 and betas is not None:
                sizes = [g.abs().flatten() for key in group["ids"] if (g := update.gradients.get(key)) is not None]
                sizes = [one[one > 0] for one in sizes]
                if sizes and (every := torch.cat(sizes)).numel():
                    middle = float(every.median())
                    if eps > middle:
                        self.add(
                            "eps-too-large",
                            f"eps={eps:g} is larger than most of the gradient, so the update is not scaled by its size",
                            self.optimizer_made,
                            "eps=1e-8",
                            f"the median of |gradient| at the first step is {middle:.3g}",
                            figures={"eps": eps, "median_gradient": middle},
                        )

    # Movement

    def idle(self) -> None:
        """An optimizer that never steps, beside others that do."""
        stepped = {key for _, _, update in self.updates() for key in update.ids}
        called = [event for step in self.steps for event in step.events]
        tried = [event.info["of"] for event in called if event.what == "scaler_step"]
        first, names = self.recorder.reference, self.names.parameters
        still = first.keys() & names.keys() & set().union(*(step.gradients for step in self.steps)) - stepped
        still = {key for key in still if torch.equal(first[key], names[key])} if len(self.steps) > 1 else set()
        for made in [event for event in self.recorder.loaded if event.what == "optimizer_made"]:
            mine = still & covered(made)
            if not mine or any(one is made.info["of"] for one in tried):
                continue
            dropped = any(covered(event) & mine for event in called if event.what == "zero_grad")
            self.add(
                "step-missing",
                f"an optimizer never steps: {counted(len(mine), 'parameter')} of it have gradients, and stay as they "
                f"are: {self.names.of(mine)}",
                made.where,
                "call step() of each optimizer",
                f"in {len(self.steps)} steps of other optimizers they did not change by a bit"
                + (", and zero_grad dropped their gradients" if dropped else ""),
                level="fault" if dropped else NOTE,  # it may step more rarely
                figures={"parameters": len(mine)},
            )

    def unmoved(self) -> None:
        last_only: set[int] | None = None
        lost = 0.0
        for _, _, update in self.updates():
            positive = {
                key
                for group in update.groups
                for key in group["ids"]
                if not is_number(group.get("lr")) or group["lr"] > 0
            }
            still = {
                key
                for key, before in update.before.items()
                if key in update.after
                and key in positive
                and (grad := update.gradients.get(key)) is not None
                and bool(grad.any())
                and torch.equal(before, update.after[key])
            }
            last_only = still if last_only is None else last_only & still
            low = [key for key in update.before if update.before[key].dtype in (torch.bfloat16, torch.float16)]
            if low:
                same = total = 0
                for key in low:
                    grad = update.gradients.get(key)
                    if grad is not None and key in update.after:
                        moving = grad != 0
                        total += int(moving.sum())
                        same += int((moving & (update.before[key] == update.after[key])).sum())
                lost = max(lost, same / total if total else 0.0)
        if last_only:
            self.add(
                "not-moved",
                f"{counted(len(last_only), 'parameter')} did not move although they have gradients: "
                f"{self.names.of(last_only)}",
                self.steps[0].updates[0].where,
                "check that the optimizer's step writes to these tensors, and the learning rate",
                "they are bit for bit the same before and after each step",
                figures={"parameters": len(last_only)},
                level=NOTE if lost else "fault",
            )
        if lost > 0.5:
            self.add(
                "updates-lost-to-rounding",
                f"{lost:.0%} of the elements in 16 bits with a gradient did not change: their updates are smaller than "
                "the spacing of these numbers",
                self.steps[0].updates[0].where,
                "keep the weights in float32, and compute in 16 bits with autocast",
                level=NOTE,
                figures={"share": lost},
            )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def horizon_of(scheduler: Any) -> int | None:
    """The number of steps that a schedule is made for, if it says so."""
    numbers = [vars(scheduler).get(name) for name in ("T_max", "total_steps", "total_iters", "step_size", "T_0")]
    numbers += [horizon_of(inner) for inner in vars(scheduler).get("_schedulers", []) if inner is not scheduler]
    found = [int(number) for number in numbers if is_number(number)]
    return max(found) if found else None


def next_rate(scheduler: Any) -> float | None:
    """What a LambdaLR would give a step later; None for others."""
    functions = vars(scheduler).get("lr_lambdas")
    if not functions:
        return None
    try:
        return max(
            base * float(function(int(scheduler.last_epoch) + 1))
            for base, function in zip(scheduler.base_lrs, functions, strict=True)
        )
    except Exception:  # the user's function
        return None


# Decays that are tried where none is told.
USUAL_DECAYS = (1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

# Rules of Adam's family: how they differ from AdamW, as (name, what it says, remedy).
RULES: dict[str, tuple[str, str]] = {
    "no-bias-correction": (
        "the moments are not corrected for their start at 0",
        "divide m by 1 − β₁ᵗ and v by 1 − β₂ᵗ",
    ),
    "first-moment-uncorrected": ("the first moment is not corrected for its start at 0", "divide m by 1 − β₁ᵗ"),
    "second-moment-uncorrected": ("the second moment is not corrected for its start at 0", "divide v by 1 − β₂ᵗ"),
    "bias-correction-off-by-one": ("the bias correction counts steps from 0 or 2, not from 1", "count from t = 1"),
    "bias-correction-stands-still": ("the bias correction stays that of the first step", "t += 1 in each step"),
    "eps-inside-root": ("eps is added inside the root", "√v̂ + eps"),
    "no-root": ("the update is divided by v, not by its root", "m̂ / (√v̂ + eps)"),
    "betas-swapped": ("β₁ and β₂ are used in place of each other", "m with β₁, v with β₂"),
    "moments-forgotten": ("the moments start at 0 in each step", "keep m and v between the steps"),
    "state-forgotten": ("the moments and the step count start at 0 in each step", "keep m, v and t between the steps"),
    "gradient-not-averaged": ("the gradient is used in place of its running mean", "m̂ / (√v̂ + eps)"),
    "l2-instead-of-decoupled": ("weight decay is added to the gradient (L2), not decoupled", "p −= lr · decay · p"),
    "decay-not-scaled-by-lr": ("weight decay is not multiplied by the learning rate", "p −= lr · decay · p"),
    "decay-missing": ("the group's weight_decay is not applied", "p −= lr · decay · p"),
    "decay-adds": ("weight decay makes the weights grow", "p −= lr · decay · p, with a minus"),
    "one-beta-for-both": ("both moments have the same β", "m with β₁, v with β₂"),
    "correction-outside-root": ("v is corrected for its start after the root, not before", "√(v / (1 − β₂ᵗ)) + eps"),
    "ascent": ("the update goes up the gradient", "p −= lr · …, with a minus"),
}


def explain_updates(history: list[Update]) -> tuple[str, str, str, str, dict[str, Any]] | None:
    """The rule that reproduces the updates of one optimizer of the user's, from its first step on; None if none does.

    The name is empty if the rule is right: SGD, momentum, Nesterov's, Adam, AdamW or Lion.
    """
    chosen = []
    for key in history[0].ids:
        usable = all(
            update.gradients.get(key) is not None and key in update.after and key in update.before for update in history
        )
        if usable and bool(history[0].gradients[key].any()):  # type: ignore[union-attr]
            chosen.append(key)
    if not chosen or any(
        update.before[key].dtype in (torch.bfloat16, torch.float16) for update in history for key in chosen
    ):
        return None
    groups = {key: group for group in history[0].groups for key in group["ids"]}
    by_group: dict[int, list[int]] = {}
    for key in chosen:
        by_group.setdefault(id(groups[key]), []).append(key)
    keys = max(by_group.values(), key=len)
    group = groups[keys[0]]
    if "lr" not in group:  # what decays only some leaves out norms and biases
        keys = [key for key in keys if history[0].before[key].dim() > 1] or keys

    def flat(tensors) -> torch.Tensor:
        return torch.cat([tensor.detach().flatten()[: REPLAYED // len(keys) + 1].double() for tensor in tensors])

    before = [flat(update.before[key] for key in keys) for update in history]
    after = [flat(update.after[key] for key in keys) for update in history]
    gradients = [flat(update.gradients[key] for key in keys) for update in history]
    rates = [
        next((float(g["lr"]) for g in update.groups if keys[0] in g["ids"] and is_number(g.get("lr"))), None)
        for update in history
    ]
    return search_rules(before, after, gradients, rates, group, [update.numbers for update in history])


def search_rules(before, after, gradients, rates, group, numbers) -> tuple[str, str, str, str, dict[str, Any]] | None:
    untold = rates[0] is None
    decay = 0.0 if untold else float(group.get("weight_decay") or 0.0)
    betas = group.get("betas") or (group.get("beta1", 0.9), group.get("beta2", 0.999))
    usual = (float(betas[0]), float(betas[1])) if isinstance(betas, (tuple, list)) else (0.9, 0.999)
    eps = float(group.get("eps") or 1e-8)
    momentum = float(group.get("momentum") or 0.0)
    values = set(numbers[0].values())
    small = [number for number in values if 0 < number <= 1e-5]
    if untold and small:
        eps = min(small)
    deltas = [later - earlier for earlier, later in zip(before, after, strict=True)]
    if not (any if untold else all)(bool(delta.any()) for delta in deltas):
        return None

    generator = torch.Generator().manual_seed(0)
    noisy = [g * (1 + 1e-7 * torch.randn(g.shape, generator=generator, dtype=g.dtype)) for g in gradients]

    def ways_of(rule: "Rule", directions: list[torch.Tensor]) -> list[tuple[list[float], list[float]]]:
        """The learning rates and the shares of the weights that are taken away, by step: as told, or else fitted.

        What is taken is then nothing, in proportion to the rate, or the same in all steps.
        """
        if not untold:
            last = decay if rule.kind == "adam, decay last" else 0.0
            used = [rate * (1 - rate * last) * (-1 if rule.ascent else 1) for rate in rates]
            return [(used, [rule.pull(rate, decay) for rate in rates])]
        free = []  # by least squares
        for d, w, x in zip(directions, before, deltas, strict=True):
            dd, dw, ww, dx, wx = (float((a * b).sum()) for a, b in ((d, d), (d, w), (w, w), (d, x), (w, x)))
            determinant = dd * ww - dw * dw
            apart = determinant > 1e-12 * dd * ww
            free.append(((wx * dw - dx * ww) / determinant, (dx * dw - wx * dd) / determinant) if apart else (0.0, 0.0))
        share = sum(rate * pull for rate, pull in free) / max(sum(rate**2 for rate, _ in free), 1e-300)
        mean = sum(pull for _, pull in free) / len(free)
        adds = "decay-adds" in rule.faults
        taken = [[share * rate for rate, _ in free], [mean] * len(free)]
        taken = [one for one in taken if rule.pulls and (one[-1] < 0) == adds]
        taken += [] if adds and rule.pulls else [[0.0] * len(free)]
        ways = []
        for pulls in taken:
            rows = zip(directions, before, deltas, pulls, strict=True)
            used = [-float((d * (x + p * w)).sum() / d.pow(2).sum().clamp(min=1e-300)) for d, w, x, p in rows]
            ways += [(used, pulls)] if all(rate == 0 or (rate < 0) == rule.ascent for rate in used) else []
        return ways

    def misfit(rule: "Rule") -> float:
        """The largest error over the steps, in units of what rounding explains."""
        settings = (*(rule.betas or usual), eps, rule.momentum or momentum, rule.decay if untold else decay)
        directions, perturbed = (list(rule.directions(before, given, *settings)) for given in (gradients, noisy))
        worst = math.inf
        for used, pulls in reversed(ways_of(rule, directions)):
            # float32 weights and moments are rounded, and so are gradients; what follows from both bounds what a
            # correct program may differ by
            steps = list(zip(used, pulls, directions, perturbed, before, deltas, strict=True))
            rounding = [1.2e-7 * (w.abs() * 2 + x.abs() * 16).pow(2).mean().sqrt() for *_, w, x in steps]
            moved = [abs(rate) * (other - d).pow(2).mean().sqrt() for rate, _, d, other, *_ in steps]
            units = [float(one + two) + 1e-30 for one, two in zip(rounding, moved, strict=True)]
            errors = [float((x + rate * d + p * w).pow(2).mean().sqrt()) for rate, p, d, _, w, x in steps]
            error = max(one / unit for one, unit in zip(errors, units, strict=True))
            if worst >= MISFIT and error < worst:
                worst, rule.fit, rule.unit = error, (used, pulls), max(units)
        return worst

    told = bool(group.get("betas"))
    fits = [(rule, misfit(rule)) for rule in rules(decay, told, values if untold else None)]
    good = [(rule, error) for rule, error in fits if error < MISFIT]
    # A wrong rule may be a right one at other rates: those that the script holds decide, or that they are constant.
    known = [one for one in good if not untold or is_known(one[0].fit[0], numbers)]
    if not good:
        return None
    good = known or good
    if right_ones := [(rule, error) for rule, error in good if not rule.faults]:
        rule, error = min(right_ones, key=lambda item: item[1])
        name, proof = fault_of_decay(rule, error, numbers, before, after) if untold else ("", "")
        rates = rule.fit[0] if untold and rule in [one for one, _ in known] else []
        return name, *RULES.get(name, ("", "")), proof, {"error": error, "rates": rates}
    fewest = min(len(rule.faults) for rule, _ in good)
    rule, error = min(((r, e) for r, e in good if len(r.faults) == fewest), key=lambda item: item[1])
    right_rule, right = min(((r, e) for r, e in fits if not r.faults), key=lambda item: item[1])
    says = " and ".join(RULES[fault][0] for fault in rule.faults)
    remedy = "; ".join(RULES[fault][1] for fault in rule.faults)
    others = sorted({"+".join(r.faults) for r, _ in good if len(r.faults) == fewest} - {"+".join(rule.faults)})
    proof = f"replayed in float64, this rule reproduces {len(deltas)} updates to {error:.2g} times float32's rounding; "
    needed = ", ".join(f"{rate:.4g}" for rate in right_rule.fit[0])
    proof += f"the right rule {f'is off by {right:.2g} times' if right > MISFIT else f'would need the rates {needed}'}"
    if others:
        proof += f". So do: {', '.join(others)}"
    return (
        rule.faults[0],
        says,
        remedy,
        proof,
        {"error": error, "error_of_the_right_rule": right, "faults": rule.faults},
    )


def is_known(rates: list[float], numbers: list[dict[str, float]]) -> bool:
    """Whether the learning rates are constant, or those of one name among the numbers that the script held."""
    held = [[one.get(name, math.nan) for one in numbers] for name in numbers[0]]
    same = [[abs(rate)] * len(rates) for rate in rates[:1]]
    return any(all(abs(a - abs(b)) <= 1e-3 * abs(b) for a, b in zip(one, rates, strict=True)) for one in held + same)


def fault_of_decay(rule: "Rule", error: float, numbers: list[dict[str, float]], before, after) -> tuple[str, str]:
    """What a right rule makes of the weight decay that the script holds: name and proof, or nothing."""
    (rates, pulls), held = rule.fit, numbers[0]
    rate, pull = max(rates), pulls[0]
    wanted = max((n for name, n in held.items() if name.endswith((".weight_decay", ".wd"))), default=0.0)
    elsewhere = any(bool((one != other).any()) for one, other in zip(after, before[1:], strict=False))
    missing = float(rate * wanted * before[0].pow(2).mean().sqrt() / rule.unit)
    if rule.pulls and missing > MISFIT and not any(pulls) and not elsewhere:
        proof = f"the weights follow their gradients to {error:.2g} times float32's rounding, and the weight decay of "
        return "decay-missing", proof + f"{wanted:g} that is held would take {missing:.2g} times that"
    # No decay times the learning rate explains it.
    scaled = is_known(rates, [{}]) and rate and near_one_of(pull / rate, held)
    if is_known(pulls, [{}]) and 0 < rate <= pull and near_one_of(pull, held) and not scaled:
        proof = f"its updates take {pull:.6g} of each weight away, a number that it holds, and the learning rate "
        proof += f"that fits them is {rate:.6g}: as a decay times that it would be {pull / rate:.3g}"
        return "decay-not-scaled-by-lr", proof
    return "", ""


def near_one_of(value: float, numbers: dict[str, float]) -> bool:
    return any(abs(value - number) <= 1e-2 * abs(number) for number in numbers.values())


class Rule:
    """An update rule: Adam's with faults, or SGD's."""

    def __init__(
        self,
        faults: tuple[str, ...] = (),
        kind: str = "adam",
        betas: tuple[float, float] | None = None,
        momentum: float = 0.0,
        decay: float = 0.0,
    ):
        self.faults = list(faults)
        self.decay = decay  # of a rule for settings that are not told
        # Where they are not told, the learning rates and what is taken of the weights; what rounding explains.
        self.fit: tuple[list[float], list[float]] = [], []
        self.unit = 0.0
        self.kind = kind
        self.betas = betas
        self.momentum = momentum
        self.ascent = "ascent" in faults

    @property
    def pulls(self) -> bool:
        """Whether it may take away a share of the weights."""
        return not self.decay and "l2-instead-of-decoupled" not in self.faults

    def pull(self, rate: float, decay: float) -> float:
        coupled = {"l2-instead-of-decoupled", "decay-missing"} & set(self.faults)
        if coupled or self.kind in ("sgd", "nesterov"):
            return 0.0
        if "decay-not-scaled-by-lr" in self.faults:
            return decay
        return -rate * decay if "decay-adds" in self.faults else rate * decay

    def directions(self, before, gradients, one, two, eps, momentum, decay):
        faults = set(self.faults)
        if "betas-swapped" in faults:
            one, two = two, one
        corrected = two
        if "one-beta-for-both" in faults:
            two = one
            corrected = corrected if self.kind == "adam, correction as told" else two
        m = v = torch.zeros_like(gradients[0])
        for t, (weights, gradient) in enumerate(zip(before, gradients, strict=True), start=1):
            if self.kind in ("sgd", "nesterov") or "l2-instead-of-decoupled" in faults:
                gradient = gradient + decay * weights
            if self.kind in ("sgd", "nesterov"):
                m = momentum * m + gradient if t > 1 else gradient
                yield m if self.kind == "sgd" else gradient + momentum * m
                continue
            if self.kind == "lion":
                yield (one * m + (1 - one) * gradient).sign()
                m = two * m + (1 - two) * gradient
                continue
            if "state-forgotten" in faults:
                t = 1
            if faults & {"moments-forgotten", "state-forgotten"}:
                m = v = torch.zeros_like(gradient)
            m = one * m + (1 - one) * gradient
            v = two * v + (1 - two) * gradient**2
            count = 1 if "bias-correction-stands-still" in faults else t + ("bias-correction-off-by-one" in faults)
            first = 1 - one**count
            second = 1 - corrected**count
            if faults & {"no-bias-correction", "first-moment-uncorrected"}:
                first = 1.0
            if faults & {"no-bias-correction", "second-moment-uncorrected"}:
                second = 1.0
            mean, square = m / first, v / second
            if "gradient-not-averaged" in faults:
                mean = gradient
            if self.kind == "adam, eps before correction":
                yield mean / (v.sqrt() + eps) * second**0.5
            elif "correction-outside-root" in faults:
                yield mean / (v.sqrt() / second + eps)
            elif "no-root" in faults:
                yield mean / (square + eps)
            elif "eps-inside-root" in faults:
                yield mean / (square + eps).sqrt()
            else:
                yield mean / (square.sqrt() + eps)


def rules(decay: float, told: bool, numbers: set[float] | None = None) -> list[Rule]:
    """Right rules first; then Adam's with one fault, then with two.

    `told`: the betas are; `numbers`: those that may be settings, where no rates are told.
    """
    decays = ["l2-instead-of-decoupled", "decay-not-scaled-by-lr", "decay-missing", "decay-adds"] if decay else []
    moments = [name for name in RULES if name not in {*decays, "ascent"} and not name.startswith(("decay", "l2"))]
    found = [Rule(), Rule(kind="sgd"), Rule(kind="adam, decay last"), Rule(kind="adam, eps before correction")]
    held = sorted(number for number in numbers or () if 0.5 <= number < 1)[-4:]
    pairs = dict.fromkeys([*itertools.combinations(held, 2), *((0.9, two) for two in (0.95, 0.98, 0.99, 0.999))])
    averages = dict.fromkeys([0.9, *held]) if numbers is not None else ()
    found += [Rule(kind=kind, momentum=one) for kind in ("sgd", "nesterov") for one in averages]
    found += [Rule(kind="nesterov"), Rule(kind="lion")]
    found += [Rule(kind="lion", betas=betas) for betas in ((0.9, 0.99), (0.95, 0.98), *pairs) if not told]
    if not told:
        found += [Rule(betas=betas) for betas in pairs]
    found += [Rule((name,)) for name in (*moments, *decays, "ascent")]
    if numbers is not None:
        found += [Rule((name,), betas=betas) for name in (*moments, "ascent", "decay-adds") for betas in pairs]
        wd = dict.fromkeys([*USUAL_DECAYS, *(number for number in numbers if 0 < number < 0.5)])
        found += [Rule(("l2-instead-of-decoupled",), decay=one, betas=betas) for one in wd for betas in pairs]
        found += [Rule(("ascent",), kind="sgd", momentum=one) for one in averages]
        found += [Rule(("ascent",), kind="lion", betas=betas) for betas in pairs]
        coupled = [dict(kind="sgd", momentum=one, decay=decay) for one in (0.0, *averages) for decay in wd]
        found += [Rule(**one) for one in coupled]
        found += [Rule(("decay-adds",), **one | {"decay": -one["decay"]}) for one in coupled]
    found.append(Rule(("one-beta-for-both",), kind="adam, correction as told"))
    found.append(Rule(("ascent",), kind="sgd"))
    found += [Rule(pair) for pair in itertools.product(moments, decays)]
    return found
