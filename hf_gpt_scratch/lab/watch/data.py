"""Modes, batches and restored state: what the model was given, and in which mode it ran."""

from typing import Any

import torch

from .findings import FAULT, NOTE, Finding, Findings
from .losses import LossFindings
from .record import Forward, Plain, Recorder, untouched
from .streams import glued, overlap, windows


class DataFindings(Findings):
    """The findings about modes, batches and restored state of a recorded run."""

    def __init__(self, recorder: Recorder, losses: LossFindings, frames: list[dict[str, Any]]):
        super().__init__(recorder)
        self.steps = recorder.steps
        self.losses = losses
        self.frames = frames

    def all(self) -> list[Finding]:
        self.mode()
        self.evaluation()
        self.batches()
        self.resume()
        return self.findings

    def trained(self) -> list[tuple[int, Forward]]:
        """The forward passes whose losses went backward, with their steps' numbers."""
        found = []
        for number, step in enumerate(self.steps):
            used = {id(loss.forward) for loss in step.losses if loss.weights is not None}
            found += [(number, forward) for forward in step.forwards if not used or id(forward) in used]
        return found

    # Modes

    def mode(self) -> None:
        trained = self.trained()
        for number, forward in [*trained, *((len(self.steps), later) for later in self.recorder.after)]:
            drops = dropout_modules(forward.module)
            if not forward.training and forward.idle_dropouts and not forward.dropouts:
                early = (
                    "after an evaluation" if self.was_training(number) or self.recorder.evaluations else "all the time"
                )
                self.add(
                    "eval-mode-in-training",
                    f"the model is in evaluation mode in training ({early}), so its dropouts do nothing",
                    forward.where,
                    "model.train() before the training step, and after each evaluation",
                    f"in the forward pass of step {number + 1} dropout was called {forward.idle_dropouts} times with "
                    "p > 0 and dropped nothing",
                    figures={"step": number + 1, "dropouts": forward.idle_dropouts},
                )
                return
            if not forward.training and not drops and not forward.idle_dropouts:
                self.add(
                    "eval-mode-in-training",
                    "the model is in evaluation mode in training; it has no dropout, so that changes nothing here",
                    forward.where,
                    "model.train()",
                    level=NOTE,
                )
        if not trained:
            return
        forward = trained[0][1]
        drops = dropout_modules(forward.module)
        if not forward.dropouts:
            if drops:
                self.add(
                    "dropout-off",
                    f"the model has {len(drops)} dropouts with p > 0, but none of them drops anything in training",
                    forward.where,
                    "call them in forward; F.dropout needs training=self.training",
                    "no call of dropout with p > 0 and training=True was seen in the forward pass",
                    level=NOTE,
                )
            else:
                self.add("dropout-off", "the model trains without dropout", level=NOTE)

    def was_training(self, number: int) -> bool:
        return any(forward.dropouts for earlier, forward in self.trained() if earlier < number)

    def evaluation(self) -> None:
        # A look at a batch of the training, as for a teacher's logits, is no evaluation unless it has a loss.
        looks = {id(forward) for forward in self.recorder.evaluations if forward.beside and not forward.losses}
        for forward in sorted(self.recorder.evaluations, key=lambda forward: id(forward) in looks):
            alone = not forward.training and forward.strangers  # modules that eval() does not reach
            if forward.dropouts and forward.ids is not None and not alone:
                cause = "in training mode" if forward.training else "in evaluation mode, but dropout stays on"
                self.add(
                    "train-mode-in-evaluation",
                    f"a forward pass without gradients, as for an evaluation, runs {cause}",
                    forward.where,
                    "model.eval() before, model.train() after; F.dropout needs training=self.training",
                    f"dropout was called {forward.dropouts} times and dropped; the result changes from call to call",
                    level=NOTE if id(forward) in looks else FAULT,
                    figures={"dropouts": forward.dropouts},
                )
                break
        with untouched():
            found = overlap(self.recorder, self.trained(), [*self.frames, *self.recorder.drawing.values()])
        if found is not None:
            self.add("validation-overlaps-training", **found)
        held = [vars(facts["dataset"]) for _, facts in self.recorder.loaders if hasattr(facts["dataset"], "__dict__")]
        rows = [row.tolist() for row in windows([forward for _, forward in self.trained()])]
        joined = glued([*self.frames, *held], rows)
        if joined is not None:
            self.add(
                "documents-without-end",
                f"{joined[1]} is {joined[0]}, joined without a token that ends each",
                remedy="put an end token, such as <|endoftext|>, between documents",
                level=NOTE,
            )

    # Batches

    def batches(self) -> None:
        trained = [(number, forward) for number, forward in self.trained() if forward.ids is not None]
        if len(trained) < 2:
            return
        loaders = [facts for _, facts in self.recorder.loaders if facts["grad"]]
        batches = max((facts.get("batches", 0) for facts in loaders), default=None)
        first = trained[0][1].ids
        assert first is not None
        same = [forward.ids is not None and torch.equal(forward.ids, first) for _, forward in trained]
        epochs = len(loaders)
        if all(same) and not constant(first):
            one_object = len({source(forward) for _, forward in trained}) == 1 and not loaders
            evaluated = [forward.ids for forward in self.recorder.evaluations if forward.ids is not None]
            others = any(ids.shape == first.shape and not torch.equal(ids, first) for ids in evaluated)
            # To fit one batch on purpose, nobody accumulates it with itself.
            others = others and len(trained) > len({number for number, _ in trained})
            known = (batches is not None and batches > 1) or not one_object or others
            if batches == 1:
                known = False
            self.add(
                "same-batch",
                f"all {len(trained)} batches are the same"
                + (f", although an epoch has {batches}" if batches and batches > 1 else ""),
                trained[0][1].where,
                "take a new batch in each step: iterate over the loader once per epoch, and seed once",
                f"the ids (batch and length {tuple(first.shape)}) are equal in all of them"
                + (", also within a step, and other batches of this shape are evaluated" if others else ""),
                level="fault" if known else NOTE,
                figures={"batches": len(trained), "batches_per_epoch": batches, "iterators": epochs},
            )
        else:
            masks = [forward.rng for _, forward in trained if forward.dropouts]
            if len(masks) > 1 and len(set(masks)) < len(masks):
                self.add(
                    "same-random-numbers",
                    "the random generator is in the same state in several steps, so dropout drops the same elements",
                    trained[0][1].where,
                    "call manual_seed once, before the loop",
                    f"{len(masks)} forward passes with dropout began with {len(set(masks))} states of the generator",
                )
        for facts in loaders:
            if facts["sampler"] == "SequentialSampler" and facts.get("batches", 0) > 1:
                self.add(
                    "not-shuffled",
                    f"the loader goes through its {facts['batches']} batches in order, in each epoch the same",
                    facts["where"],
                    "DataLoader(..., shuffle=True) for training",
                    "its sampler is a SequentialSampler",
                    level=NOTE,
                )
                break
        else:
            self.in_order(trained, loaders)

    def in_order(self, trained: list[tuple[int, Forward]], loaders: list[Any]) -> None:
        if loaders:
            return
        ids = [forward.ids for _, forward in trained if forward.ids is not None]
        rows = torch.cat([one for one in ids if one.shape[1] == ids[0].shape[1]])
        if len(rows) > 1 and bool((rows[1:, 0] == rows[:-1, -1]).all()) and len(rows[0].unique()) > 2:
            self.add(
                "not-shuffled",
                "each row begins where the one before it ends: the text is read in order",
                trained[0][1].where,
                "intended for one pass over much data; otherwise shuffle the windows",
                level=NOTE,
            )

    # Resume

    def resume(self) -> None:
        recorder = self.recorder
        files = [event for event in recorder.loaded if event.what == "file"]
        loaded = {event.what for event in recorder.loaded}
        if "model" not in loaded:
            return
        kinds = set().union(*(event.info["kinds"] for event in files)) if files else set()
        file = files[0].where if files else ""
        lost = {
            "optimizer": (
                "optimizer-state-not-restored",
                "the file holds the optimizer's state, but the optimizer starts anew, without moments and step count",
                "optimizer.load_state_dict(checkpoint[...]) before the loop",
            ),
            "scheduler": (
                "schedule-not-restored",
                "the file holds the schedule's state, but the schedule starts anew",
                "scheduler.load_state_dict(checkpoint[...]) before the loop",
            ),
            "rng": (
                "rng-not-restored",
                "the file holds the random generator's state, but it is not restored",
                "torch.set_rng_state(checkpoint[...]) before the loop",
            ),
        }
        optimizers = [one for one in recorder.optimizers if not isinstance(one, Plain)]  # others load as they like
        present = {"optimizer": bool(optimizers), "scheduler": bool(recorder.schedulers), "rng": True}
        for kind, (name, says, remedy) in lost.items():
            if kind in kinds and kind not in loaded and present[kind]:
                self.add(
                    name,
                    says,
                    file,
                    remedy,
                    "the model's weights were loaded from it, and no load_state_dict of the rest was called before "
                    "the first step",
                )
        made = [event for event in recorder.loaded if event.what == "optimizer_made" and event.info["steps"]]
        late = [event for event in recorder.loaded if event.what == "model" and event.info["steps"]]
        if made and late and "optimizer" not in loaded:
            self.add(
                "optimizer-state-not-restored",
                "the training goes on with loaded weights and a new optimizer, without moments and step count",
                made[0].where,
                "optimizer.load_state_dict(...) with the state of the optimizer before",
                f"the optimizer was made after {made[0].info['steps']} steps, and no state was loaded into it",
            )
        if files and "optimizer" not in kinds and "optimizer" not in loaded and optimizers:
            self.add(
                "resumed-from-weights",
                "the weights were loaded from a file without an optimizer's state: the optimizer starts anew",
                file,
                "to go on with a training, save the optimizer's state too",
                level=NOTE,
            )


def dropout_modules(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    kinds = torch.nn.modules.dropout._DropoutNd
    return [(name, part) for name, part in module.named_modules() if isinstance(part, kinds) and part.p > 0]


def constant(ids: torch.Tensor) -> bool:
    return int(ids.unique().numel()) < 3


def source(forward: Forward) -> int:
    """The identity of the tensor that a forward pass was given."""
    args, kwargs = forward.arguments
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return id(tensors[0]) if tensors else 0
