"""What happens to the gradient between the loss and the update: scaled, left over, clipped, cut or missing."""

import copy
import math
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...errors import few
from .findings import NOTE, Finding, Findings
from .losses import unscaled
from .record import DATA, Event, Loss, Parts, Recorder, Step, are_probabilities, tensors_in

# Relative; weights are computed in float32 or float64 from a handful of factors.
NEAR = 1e-3


def near(value: float, other: float) -> bool:
    return math.isfinite(value) and abs(value - other) <= NEAR * abs(other)


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class Names:
    """The names of parameters in the models that were seen."""

    def __init__(self, recorder: Recorder):
        self.modules = models(recorder)
        self.names: dict[int, list[str]] = {}
        self.parameters: dict[int, torch.nn.Parameter] = {}
        self.owners: dict[int, set[int]] = {}
        for module in self.modules:
            for prefix, part in module.named_modules(remove_duplicate=False):
                for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
                    full = f"{prefix}.{name}" if prefix else name
                    if full not in self.names.setdefault(id(parameter), []):
                        self.names[id(parameter)].append(full)
                    self.parameters[id(parameter)] = parameter
                    self.owners.setdefault(id(parameter), set()).add(id(part))

    def of(self, keys) -> str:
        return few([self.names.get(key, ["?"])[0] for key in keys], 4)


def models(recorder: Recorder) -> list[torch.nn.Module]:
    """The outermost modules whose passes went backward, in order of their first call."""
    found: dict[tuple[int, ...], torch.nn.Module] = {}
    for step in recorder.steps:
        for forward in step.forwards:
            if any(loss.forward is forward and loss.weights is not None for loss in step.losses):
                found.setdefault(key_of(forward.module), forward.module)
    if not found:
        for step in recorder.steps:
            for forward in step.forwards:
                if any(tensor.requires_grad for tensor in forward.module.parameters()):
                    found.setdefault(key_of(forward.module), forward.module)
    return list(found.values())


def key_of(module: torch.nn.Module) -> tuple[int, ...]:
    return tuple(map(id, module)) if isinstance(module, Parts) else (id(module),)


class GradientFindings(Findings):
    """The findings about the gradients of a recorded run."""

    def __init__(self, recorder: Recorder, names: Names):
        super().__init__(recorder)
        self.names = names

    def all(self) -> list[Finding]:
        for number, step in enumerate(self.recorder.steps):
            if step.late:
                self.add(
                    "step-before-backward",
                    "the optimizer steps before the backward pass, with the gradients of the step before or none",
                    step.updates[0].where,
                    "backward, then step",
                    f"at step {number + 1} the loss went backward after optimizer.step()",
                )
                break
        self.scale()
        self.zeroing()
        self.clipping()
        self.scaler()
        self.missing()
        return self.findings

    # The scale of what goes backward

    def scale(self) -> None:
        totals = []
        for step in self.recorder.steps:
            losses = [loss for loss in step.losses if loss.tokens]
            if not losses or not step.backwards or losses[0].options.get("label_smoothing"):
                continue
            if any(loss.kind != losses[0].kind for loss in losses):
                continue
            total = sum(unscaled(step, loss) for loss in losses) * rescaling(step)
            tokens = sum(loss.tokens for loss in losses)
            # Trainer divides by all tokens, although the last of each row has no target.
            inputs = sum(loss.forward.ids.numel() for loss in losses if loss.forward and loss.forward.ids is not None)
            right = near(total, 1) or bool(inputs and near(total, tokens / inputs))
            if math.isfinite(total):
                totals.append((step, total, tokens, losses, right))
            if not right and not whole(step, losses):
                self.add(
                    "loss-weighted",
                    f"cross-entropy is only a part of the loss: its tokens' weights sum to {total:.4g}",
                    losses[0].where,
                    level=NOTE,
                    figures={"sum_of_weights": total},
                )
                return
        wrong = [one for one in totals if not one[-1]]
        if not wrong:
            return
        step, total, tokens, losses, _ = wrong[0]
        if len(wrong) < len(totals):
            self.add(
                "accumulation-uneven",
                f"in {len(wrong)} of {len(totals)} steps the tokens' weights do not sum to 1, but to {total:.4g}: "
                f"such a step has {len(losses)} micro-batch{'' if len(losses) == 1 else 'es'}",
                losses[0].where,
                "divide by the number of micro-batches that the step really has",
                f"the other steps' weights sum to 1; this one has {len(losses)} losses",
                level=NOTE,
            )
            return
        self.name_scale(step, total, tokens, len(losses), losses[0])

    def name_scale(self, step: Step, total: float, tokens: int, parts: int, loss: Any) -> bool:
        where = next((event.where for event in step.happened("backward")), loss.where)
        proof = (
            f"the {tokens} tokens of the step enter the gradient with weights that sum to {total:.6g}; those of a mean "
            "sum to 1"
        )
        figures = {"sum_of_weights": total, "tokens": tokens, "backward_passes": step.backwards, "micro_batches": parts}
        rows = loss.forward.ids.shape if loss.forward is not None and loss.forward.ids is not None else None
        if step.scale != 1 and near(total * step.scale, 1):
            return self.add(
                "loss-not-scaled",
                "scaler.step() divides the gradients by the scale, but what went backward was not multiplied by it",
                where,
                "scaler.scale(loss).backward()",
                f"the weights sum to {total * step.scale:.6g} before they are divided by the scale, {step.scale:g}",
                figures=figures,
            )
        per_part = parts > 1 and near(total, tokens / parts)
        if (near(total, tokens) or per_part) and tokens > 1 and not (parts > 1 and near(total, parts)):
            return self.add(
                "sum-not-mean",
                f"the loss is the sum over its {tokens // parts if per_part else tokens} tokens, not their mean: the "
                "gradient grows with the batch",
                loss.where,
                "reduction='mean', or divide by the number of tokens",
                proof,
                figures=figures,
            )
        if parts > 1 and near(total, parts):
            return self.add(
                "accumulation-not-divided",
                f"the losses of {parts} micro-batches are added without dividing by {parts}",
                where,
                f"(loss / {parts}).backward()",
                proof,
                figures=figures,
            )
        if parts > 1 and near(total, 1 / parts):
            return self.add(
                "accumulation-divided-twice",
                f"the losses of {parts} micro-batches are divided by {parts} twice",
                where,
                "divide once; accelerate and Trainer do it themselves",
                proof,
                figures=figures,
            )
        inverse = 1 / total if total else math.inf
        if parts == 1 and 1.5 < inverse <= 1024 and near(inverse, round(inverse)):
            return self.add(
                "divided-without-accumulating",
                f"the loss is divided by {round(inverse)}, but every backward pass has its own optimizer step",
                where,
                f"step once in {round(inverse)} backward passes, or do not divide",
                proof,
                figures=figures,
            )
        if rows is not None and parts == 1:
            for number, what, fix in (
                (rows[1], "sequences", 0),
                (rows[1] - 1, "sequences", 0),
                (rows[0], "positions", 1),
            ):
                if number > 1 and near(total, number):
                    return self.add(
                        "sum-not-mean",
                        f"the loss is averaged over the {what} only, and summed over the rest: it is {number} times "
                        f"the mean over tokens (batch and length are {tuple(rows)})",
                        loss.where,
                        "reduction='mean' over all tokens",
                        proof,
                        figures=figures | {"factor": fix},
                    )
        if parts > 1:
            for number in range(2, 1025):
                if near(total, parts / number) and number != parts:
                    return self.add(
                        "accumulation-wrong-divisor",
                        f"the losses of {parts} micro-batches are divided by {number}, not by {parts}",
                        where,
                        f"divide each by {parts}, the number of backward passes between two steps",
                        proof,
                        figures=figures,
                    )
        return self.add(
            "loss-weighted",
            f"the loss that goes backward is {total:.6g} times the mean over tokens",
            where,
            "intended? The gradient is scaled by it",
            proof,
            level=NOTE,
            figures=figures,
        )

    # zero_grad

    def zeroing(self) -> None:
        steps = self.recorder.steps
        for number, step in enumerate(steps):
            used = {key for update in step.updates for key in update.ids}
            step.leftover = {key: grad for key, grad in step.leftover.items() if key in used}
            if step.leftover:
                share = self.share_left(step)
                calls = [e for one in steps for e in one.happened("zero_grad") if covered(e) & step.leftover.keys()]
                where = calls[0].where if calls else step.updates[0].where
                says = "the gradients of the step before are still there when the next backward pass adds to them"
                if calls:
                    says += "; zero_grad is called, but not between the step and the next backward pass for all of them"
                name = "zero-grad-missing" if not calls else "zero-grad-misplaced"
                self.add(
                    name,
                    f"{says} ({len(step.leftover)} parameters: {self.names.of(step.leftover)})",
                    where,
                    "optimizer.zero_grad() once before the backward passes of each step",
                    f"at step {number + 1} the gradients begin at norm {share:.4g}, not at 0",
                    figures={"parameters": len(step.leftover), "norm_left_over": share},
                )
                return
        for number, step in enumerate(steps):
            order = [event.what for event in step.events if event.what in ("zero_grad", "backward", "step")]
            places = {event.what: event.where for event in step.events}
            if "step" not in order:
                continue
            before = order[: order.index("step")]
            dropped = any(what == "zero_grad" and "backward" in before[:n] for n, what in enumerate(before))
            if not dropped:
                continue
            last = len(before) - 1 - before[::-1].index("zero_grad")
            after = before[last:].count("backward")
            had = any(grad is not None and bool(grad.any()) for u in step.updates for grad in u.gradients.values())
            if after == 0 and not had:
                self.add(
                    "zero-grad-before-step",
                    "zero_grad comes between backward and step, so the step has no gradient to use",
                    places["zero_grad"],
                    "zero_grad, backward, step, in this order",
                    f"at step {number + 1} all gradients are zero or None, after {step.backwards} backward passes",
                    figures={"backward_passes": step.backwards},
                )
                return
            if after and after < step.backwards:
                self.add(
                    "zero-grad-drops-micro-batches",
                    f"zero_grad is called between the backward passes of one step: only {after} of {step.backwards} "
                    "count",
                    places["zero_grad"],
                    "call zero_grad once per optimizer step, not once per micro-batch",
                    f"at step {number + 1} the order is {', '.join(before)}, step",
                    figures={"backward_passes": step.backwards, "used": after},
                )
                return

    def share_left(self, step: Step) -> float:
        return float(sum(grad.double().pow(2).sum() for grad in step.leftover.values())) ** 0.5

    # Clipping

    def clipping(self) -> None:
        for number, step in enumerate(self.recorder.steps):
            events = [event for event in step.events if event.what in CLIPS]
            steps = [n for n, event in enumerate(step.events) if event.what == "step"]
            backwards = [n for n, event in enumerate(step.events) if event.what == "backward"]
            places = [n for n, event in enumerate(step.events) if event.what in CLIPS]
            if events and steps and backwards:
                useful = [n for n in places if backwards[0] < n < steps[0]]
                if not useful and any(n > steps[0] for n in places):
                    norm = step.updates[0].gradient_norm
                    limit = events[0].info.get("limit", math.nan)
                    self.add(
                        "clipped-after-step",
                        "the gradients are clipped after the optimizer has used them",
                        events[0].where,
                        "clip between backward and step",
                        f"step {number + 1} used a gradient of norm {norm:.4g}, and the limit is {limit:.4g}",
                        figures={"norm_used": norm, "limit": limit},
                    )
                    return
                if not useful:
                    self.add(
                        "clipped-before-backward",
                        "the gradients are clipped before the backward pass has made them",
                        events[0].where,
                        "clip between backward and step",
                        f"at step {number + 1} the order is {order_of(step)}",
                    )
                    return
                made = [n for n in backwards if n < steps[0]]
                if len(useful) >= max(2, len(made) - 1) and useful[0] < made[-1]:
                    last = "" if useful[-1] > made[-1] else ", but not after the last"
                    self.add(
                        "clipped-per-micro-batch",
                        f"the gradients are clipped {len(useful)} times between the {len(made)} backward passes "
                        f"of a step, while they add up{last}",
                        events[0].where,
                        "clip once, after the last backward pass of the step",
                        f"at step {number + 1} the order is {order_of(step)}",
                    )
                    return
            part = clipped_part(step) if events else None
            if part is not None:
                ones, every = part
                self.add(
                    "clipped-in-part",
                    f"{counted(len(ones), 'parameter')} of {every} are clipped, the others are not: "
                    f"{self.names.of(ones)}",
                    events[0].where,
                    "clip_grad_norm_(model.parameters(), ...), all of them by one norm",
                    f"at step {number + 1} the gradients used are those of the backward pass, smaller for these and "
                    "bit for bit the same for the rest",
                    level=NOTE,
                    figures={"clipped": len(ones), "parameters": every},
                )
            cut = by_value(step)
            values = [event for event in events if event.what == "clip_value"]
            if values or (cut is not None and not any(event.what == "clip_norm" for event in events)):
                limit, share = cut or (math.nan, 0.0)
                self.add(
                    "clipped-by-value",
                    "the gradient is clipped element by element, which changes its direction once it cuts",
                    next((event.where for event in events), ""),
                    "clip_grad_norm_, which keeps the direction",
                    f"the gradient used is the backward pass's, clamped to ±{limit:.4g}: {share:.2%} of it is cut"
                    if cut
                    else "in these steps it cut nothing",
                    level=NOTE,
                    figures={"limit": limit, "share": share} if cut else {},
                )
                return

    # GradScaler

    def scaler(self) -> Any:
        for number, step in enumerate(self.recorder.steps):
            scaled = [event for event in step.happened("scale") if event.info["of"].is_enabled()]
            order = [event.what for event in step.events]
            stepped = [event for event in step.happened("scaler_step") if event.info["of"].is_enabled()]
            if scaled:
                position = {what: order.index(what) for what in set(order)}
                clip = min((position[what] for what in CLIPS if what in position), default=None)
                unscale = position.get("unscale")
                first_step = position.get("step", len(order))
                if not stepped and unscale is None and step.updates:
                    norm = step.updates[0].gradient_norm
                    return self.add(
                        "stepped-without-unscaling",
                        "the loss is scaled, but optimizer.step() is called directly, with gradients that are "
                        f"{step.scale:g} times too large",
                        step.updates[0].where,
                        "scaler.step(optimizer), then scaler.update()",
                        f"step {number + 1} used a gradient of norm {norm:.4g}; unscaled it is {norm / step.scale:.4g}",
                    )
                if clip is not None and clip < first_step and (unscale is None or unscale > clip):
                    event = step.events[clip]
                    return self.add(
                        "clipped-before-unscaling",
                        f"the gradients are clipped while they are still multiplied by {step.scale:g}",
                        event.where,
                        "scaler.unscale_(optimizer) before clipping",
                        f"at step {number + 1} the order is {order_of(step)}",
                    )
                if stepped and not step.happened("scaler_update"):
                    return self.add(
                        "scaler-update-missing",
                        "scaler.update() is never called after scaler.step()",
                        stepped[0].where,
                        "call scaler.update() once per step",
                        f"at step {number + 1} the order is {order_of(step)}",
                    )
            if step.happened("backward_in_autocast"):
                event = step.happened("backward_in_autocast")[0]
                self.add(
                    "backward-in-autocast",
                    "backward() runs inside autocast, which torch recommends against",
                    event.where,
                    "end the autocast block after the loss",
                    level=NOTE,
                )

    # Parameters without a gradient or an optimizer

    def missing(self) -> None:
        recorder, names = self.recorder, self.names
        stepped: set[int] = set()
        with_gradient: set[int] = set()
        in_optimizers: dict[int, torch.Tensor] = {}
        for optimizer in recorder.optimizers:
            for group in optimizer.param_groups:
                in_optimizers |= {id(parameter): parameter for parameter in group["params"]}
        for step in recorder.steps:
            with_gradient |= set(step.gradients)
            for update in step.updates:
                stepped |= set(update.ids)
                with_gradient |= {key for key, grad in update.gradients.items() if grad is not None}
        if not names.parameters or not stepped:
            return
        trainable = [key for key, parameter in names.parameters.items() if parameter.requires_grad]
        frozen = [key for key, parameter in names.parameters.items() if not parameter.requires_grad]
        if frozen:
            elements = sum(names.parameters[key].numel() for key in frozen)
            self.add(
                "frozen",
                f"{counted(len(frozen), 'parameter')} with {elements:,} elements have requires_grad=False: "
                f"{names.of(frozen)}",
                remedy="intended? Otherwise set requires_grad=True before the optimizer is made",
                level=NOTE,
                figures={"parameters": len(frozen), "elements": elements},
            )
        self.unregistered(in_optimizers)
        by_hand = any(update.optimizer is None for step in recorder.steps for update in step.updates)
        looked = {id(one) for forward in recorder.evaluations for one in forward.module.parameters()}
        stale = [key for key in in_optimizers if key not in {*names.parameters, *looked} and key in stepped]
        # The script may change others itself, as those of a plain class that was not recognised.
        first = recorder.reference
        moved = {key for key in first if key in names.parameters and not torch.equal(first[key], names.parameters[key])}
        left_out = [key for key in trainable if key not in in_optimizers and key not in moved] if not by_hand else []
        if stale and not (set(in_optimizers) & set(names.parameters)):
            self.stale(stale, in_optimizers, left_out)
            return
        if left_out:
            self.left_out(left_out, stale, in_optimizers)
        elif stale:
            # Another model, as of a second network, has passes of its own, and its parameters have gradients.
            # Of a model that is called by its parts, the weights that run without a call are not known.
            dead = [key for key in stale if key not in with_gradient]
            if dead and not any(isinstance(module, Parts) for module in names.modules):
                self.stale(dead, in_optimizers, [])
        without = [key for key in trainable if key in stepped and key not in with_gradient]
        dropped = {"zero-grad-before-step"} & {finding.name for finding in self.findings}
        if any(update.closure for step in recorder.steps for update in step.updates):
            return
        if any(step.backwards for step in recorder.steps) and not dropped:
            self.no_gradient(without)
        elif not with_gradient and not by_hand:
            self.add(
                "backward-missing",
                "optimizer.step() is called, but no backward pass was seen",
                recorder.steps[0].updates[0].where,
                "loss.backward() before optimizer.step()",
                f"{counted(len(recorder.steps), 'step')} without a backward pass",
            )

    def unregistered(self, in_optimizers: dict[int, torch.Tensor]) -> None:
        forwards = [forward for step in self.recorder.steps for forward in step.forwards]
        found = {key: parameter for forward in forwards for key, parameter in forward.strangers.items()}
        found = {key: one for key, one in found.items() if one.requires_grad and key not in in_optimizers}
        if not found or not in_optimizers:
            return
        elements = sum(parameter.numel() for parameter in found.values())
        self.add(
            "not-in-optimizer",
            f"{counted(len(found), 'parameter')} ({elements:,} elements) of modules that run are not registered in the "
            "model, so they are in no optimizer, in no state dict, and do not follow eval()",
            forwards[0].where,
            "keep modules in nn.ModuleList or nn.ModuleDict, not in a list or dict",
            "these modules were called within the model's forward pass, and model.parameters() has not their weights",
            figures={"parameters": len(found), "elements": elements},
        )

    def stale(self, stale: list[int], in_optimizers: dict[int, torch.Tensor], left_out: list[int]) -> None:
        elements = sum(in_optimizers[key].numel() for key in stale)
        says = f"the optimizer has {counted(len(stale), 'parameter')} ({elements:,} elements) that the model has not"
        if left_out:
            says += f", and not {counted(len(left_out), 'parameter')} that it has"
        self.add(
            "stale-parameters",
            says + ": the model was tied, copied or replaced after the optimizer was made",
            self.optimizer_made,
            "make the optimizer after the model is complete and on its device",
            "none of them gets a gradient, and none is among the parameters of the model that runs",
            figures={"stale": len(stale), "left_out": len(left_out)},
        )

    def left_out(self, left_out: list[int], stale: list[int], in_optimizers: dict[int, torch.Tensor]) -> None:
        names = self.names
        if stale:
            self.stale(stale, in_optimizers, left_out)
            return
        order = list(names.parameters)
        inside = [n for n, key in enumerate(order) if key in in_optimizers]
        elements = sum(names.parameters[key].numel() for key in left_out)
        top = bool(inside) and all(order[n] in in_optimizers for n in range(inside[0], len(order)))
        self.add(
            "not-in-optimizer",
            f"{counted(len(left_out), 'trainable parameter')} of the model ({elements:,} elements) are in no optimizer "
            f"and stay as they are: {names.of(left_out)}",
            self.optimizer_made,
            "give the optimizer all of model.parameters(), or set requires_grad=False where they are to stay",
            f"they are bit for bit the same after {counted(len(self.recorder.steps), 'step')}, and no group holds them",
            # Only the last layers: how a model is fine-tuned.
            level=NOTE if top and len(inside) * 4 < len(order) else "fault",
            figures={"parameters": len(left_out), "elements": elements},
        )

    def no_gradient(self, without: list[int]) -> None:
        if not without:
            return
        names, recorder = self.names, self.recorder
        forwards = [forward for step in recorder.steps for forward in step.forwards]
        called = set().union(*(forward.called for forward in forwards)) if forwards else set()
        uncut = gradients_without_cuts(forwards[0], names) if forwards else set()
        cut = [key for key in without if key in uncut]
        rest = [key for key in without if key not in uncut]
        used = [
            key for key in rest if names.owners[key] & called and len(names.owners[key]) and not is_root(key, names)
        ]
        unused = [key for key in rest if key not in used]
        sites = list(dict.fromkeys(site for forward in forwards for site in forward.cuts if site))
        if cut or used:
            keys = cut or used
            self.add(
                "graph-cut",
                f"{counted(len(keys), 'parameter')} of modules that run get no gradient, because the graph is cut: "
                f"{names.of(keys)}",
                sites[0] if sites else "",
                "remove the detach(), .data or no_grad() from the forward pass",
                f"with detach, .data and no_grad left out, the same forward pass gives {len(cut)} of them a gradient"
                if cut
                else "their modules were called, and their gradients are None",
                figures={"parameters": len(keys), "places": sites},
            )
        if unused and not ((cut or used) and any(isinstance(module, Parts) for module in names.modules)):
            self.add(
                "never-used",
                f"{counted(len(unused), 'parameter')} of the model have no part in its output: {names.of(unused)}",
                "",
                "use them in forward, or remove them",
                "their modules were not called, and their gradients are None after each backward pass",
                figures={"parameters": len(unused)},
            )


CLIPS = ("clip_norm", "clip_value")


def covered(event: Event) -> set[int]:
    """The parameters whose gradients a call of `zero_grad` is for."""
    of = event.info["of"]
    groups = [{"params": of.parameters()}] if isinstance(of, torch.nn.Module) else getattr(of, "param_groups", [])
    return {id(parameter) for group in groups for parameter in group["params"]}


def whole(step: Step, losses: list[Loss]) -> bool:
    """Whether what went backward is the weighted sum of these losses' tokens, and nothing else."""
    if any(loss.rows is None for loss in losses) or not all(map(math.isfinite, step.roots)):
        return True
    total = 0.0
    for loss in losses:
        assert loss.rows is not None and loss.weights is not None
        counted = loss.weights != 0
        rows, targets = loss.rows[counted], loss.targets[counted].long()
        if loss.kind == "gather" and are_probabilities(rows):
            rows = rows.double().log()
        for part in torch.arange(len(rows), device=rows.device).split(1024):
            each = torch.nn.functional.cross_entropy(rows[part].double(), targets[part], reduction="none")
            total += float((each * loss.weights[counted][part]).sum())
    return abs(total - sum(step.roots)) <= 0.01 * abs(total)


def is_root(key: int, names: Names) -> bool:
    """Whether the parameter belongs to a whole model itself, whose call says nothing."""
    return any(id(module) in names.owners[key] for module in names.modules if any(True for _ in module.children()))


def order_of(step: Step) -> str:
    words = {"clip_norm": "clip", "clip_value": "clip", "scaler_step": "scaler.step", "scaler_update": "scaler.update"}
    return ", ".join(words.get(event.what, event.what) for event in step.events if event.what != "schedule")


def rescaling(step: Step) -> float:
    """The factor from the last backward pass's gradient to the one used; 1 if it is not the same for all."""
    if step.happened("clip_norm") or step.happened("clip_value") or step.happened("unscale") or not step.updates:
        return 1.0
    if step.happened("scaler_step"):
        return 1.0
    factors = []
    for used, made in used_and_made(step).values():
        if not bool(made.any()):
            continue
        factor = float((used.double() * made.double()).sum() / made.double().pow(2).sum())
        if not torch.allclose(used.double(), made.double() * factor, rtol=1e-4, atol=1e-12):
            return 1.0
        factors.append(factor)
    if not factors or max(factors) - min(factors) > 1e-4 * max(map(abs, factors)):
        return 1.0
    return factors[0]


def used_and_made(step: Step) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """The gradients that the updates used and those that the last backward pass left, by the parameter's id."""
    used = {key: one for update in step.updates for key, one in update.gradients.items() if one is not None}
    return {key: (one, step.gradients[key]) for key, one in used.items() if key in step.gradients}


def by_value(step: Step) -> tuple[float, float] | None:
    """Limit and share of the elements cut, if the gradient used is the backward pass's, clamped."""
    pairs = list(used_and_made(step).values())
    if not pairs:
        return None
    limit = max(float(used.abs().max()) for used, _ in pairs)
    cut = sum(int((made.abs() > limit).sum()) for _, made in pairs)
    if not cut or not all(torch.equal(used, made.clamp(-limit, limit)) for used, made in pairs):
        return None
    return limit, cut / sum(made.numel() for _, made in pairs)


def clipped_part(step: Step) -> tuple[list[int], int] | None:
    """The parameters whose gradient was made smaller, and the number of all; None if it was none or all of them."""
    pairs = {key: (used, made) for key, (used, made) in used_and_made(step).items() if bool(made.any())}
    smaller = [key for key, (used, made) in pairs.items() if float(used.norm()) < (1 - NEAR) * float(made.norm())]
    same = [key for key, (used, made) in pairs.items() if torch.equal(used, made)]
    return (smaller, len(pairs)) if smaller and len(smaller) + len(same) == len(pairs) > len(smaller) else None


class Uncut(TorchFunctionMode):
    """In it, detach, .data and no_grad do nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.detach, torch.detach, DATA):
            return args[0]
        if func is torch._C._set_grad_enabled:
            return None
        return func(*args, **(kwargs or {}))


def gradients_without_cuts(forward: Any, names: Names) -> set[int]:
    """The parameters that get a gradient from the same forward pass, of a copy, without cuts in its graph."""
    state = torch.get_rng_state()
    try:
        module = copy.deepcopy(forward.module)
        args, kwargs = forward.arguments
        with torch.enable_grad(), Uncut():
            output = module(*args, **kwargs)
            total = sum(one.float().pow(2).sum() for one in tensors_in(output) if one.requires_grad)
        if not isinstance(total, torch.Tensor):
            return set()
        copies = dict(module.named_parameters(remove_duplicate=False))
        originals = {name: id(p) for name, p in forward.module.named_parameters(remove_duplicate=False)}
        wanted = {name: parameter for name, parameter in copies.items() if parameter.requires_grad}
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        return {originals[name] for name, grad in zip(wanted, found, strict=True) if grad is not None}
    except Exception:  # the user's code, in a way it was not written for: then it is no proof
        return set()
    finally:
        torch.set_rng_state(state)
