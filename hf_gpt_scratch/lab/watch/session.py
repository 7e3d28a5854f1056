"""`watch`: a training run, recorded for a few steps and judged."""

import io
import os
import runpy
import signal
import sys
import threading
import traceback
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...errors import LabError
from .data import DataFindings
from .findings import FAULT, Finding, WatchedStep, WatchReport
from .gradients import GradientFindings, Names
from .losses import LossFindings
from .record import PACKAGE, Enough, Recorder
from .updates import UpdateFindings

# What follows from another finding, and is not told beside it.
FOLLOWS = {
    "softmax-before-cross-entropy": {"loss-starts-high"},
    "not-in-optimizer": {"not-moved"},
    "stale-parameters": {"not-moved", "not-in-optimizer"},
    "zero-grad-before-step": {"not-moved", "backward-missing"},
    "step-before-backward": {
        "zero-grad-before-step",
        "backward-missing",
        "zero-grad-misplaced",
        "zero-grad-missing",
        "schedule-off-by-one",
    },
    "same-batch": {"same-random-numbers"},
    "schedule-not-stepped": {"learning-rate-zero"},
    "wrong-rows": {"loss-starts-high"},
    "eval-mode-in-training": {"dropout-off"},
    "clipped-before-unscaling": {"clipped-by-value"},
}


def report_of(recorder: Recorder, report: WatchReport, frames: list[dict[str, Any]]) -> None:
    """Fills the report with what the recorder has seen. `frames`: the script's variables, where its data is."""
    found: list[Finding] = []
    with torch.no_grad():
        names = Names(recorder)
        losses = LossFindings(recorder)
        parts: dict[str, Any] = {
            "losses": losses,
            "gradients": GradientFindings(recorder, names),
            "updates": UpdateFindings(recorder, names),
            "modes and data": DataFindings(recorder, losses, frames),
        }
        for what, part in parts.items():
            try:
                found += part.all()
            except Exception as error:  # the others are still worth telling
                report.seen.append(f"{what} could not be judged: {type(error).__name__}: {error}")
        found += wrong_ids(recorder)
    if recorder.no_graph and not any(finding.name == "graph-cut" for finding in found):
        # Its pass without gradients is no evaluation.
        found = [finding for finding in found if finding.name != "train-mode-in-evaluation"]
        found.append(
            Finding(
                "graph-cut",
                "the loss that is to go backward has no graph: it was computed under no_grad, or detached",
                recorder.no_graph,
                "compute the loss with gradients, and without detach() or item()",
                "loss.requires_grad is False",
            )
        )
    if not recorder.steps and recorder.backwards > 4:
        ran, proof = f"{recorder.backwards} backward passes ran", "no parameter has changed"
        remedy = "optimizer.step() after backward(), before the gradients are set to 0"
        missing = Finding("step-missing", f"{ran}, and no optimizer of torch made a step", "", remedy, proof)
        if not any(bool(grad.any()) for grad in recorder.step.gradients.values()):
            says = f"{ran}, and no parameter has a gradient other than 0 after the last of them"
            missing = Finding("graph-cut", says, "", "compute the loss with gradients, and without detach()", proof)
        found.append(missing)
    hidden = set().union(*(FOLLOWS.get(finding.name, set()) for finding in found))
    report.findings = [finding for finding in found if finding.name not in hidden]
    if names.modules:
        report.model = type(names.modules[0]).__name__
        report.parameters = sum(parameter.numel() for parameter in names.parameters.values())
    report.steps = steps_of(recorder)
    rows = [loss.rows for step in recorder.steps for loss in step.losses if loss.rows is not None]
    report.vocabulary = rows[0].shape[-1] if rows else 0
    report.seen += seen(recorder)


def wrong_ids(recorder: Recorder) -> list[Finding]:
    """Why an embedding or a loss refused its ids."""
    wrong = recorder.wrong_ids
    if wrong is None:
        return []
    low, high, rows, where = wrong["low"], wrong["high"], wrong["rows"], wrong["where"]
    proof = f"the ids go from {low} to {high}, and there are {rows} rows"
    if wrong["kind"] == "targets" and low < 0:
        return [
            Finding(
                "ignore-index-missing",
                f"targets are marked with {low}, but cross_entropy ignores {wrong['ignore_index']} alone",
                where,
                f"ignore_index={low}, or mark targets with -100",
                proof,
            )
        ]
    if wrong.get("positions"):
        return [
            Finding(
                "beyond-the-context",
                f"position {high} is beyond the {rows} positions of the model",
                where,
                "give at most as many tokens as the model has positions",
                proof,
            )
        ]
    return [
        Finding(
            "token-beyond-vocabulary",
            f"token {high if high >= rows else low} is outside the model's vocabulary of {rows}",
            where,
            "a vocab_size that is the tokenizer's, or larger",
            proof,
        )
    ]


def steps_of(recorder: Recorder) -> list[WatchedStep]:
    found = []
    for number, step in enumerate(recorder.steps, start=1):
        used = [loss for loss in step.losses if loss.weights is not None and loss.rows is not None]
        tokens = sum(loss.tokens for loss in used)
        # Of logits that were too large to keep, the loss itself.
        known = [loss for loss in step.losses if loss.tokens and loss.rows is None and loss.reduction == "mean"]
        tokens += sum(loss.tokens for loss in known)
        total = sum(float(loss.output) * loss.tokens for loss in known)
        for loss in used:
            assert loss.rows is not None and loss.weights is not None
            counted = (loss.weights != 0) & (loss.targets >= 0) & (loss.targets < loss.rows.shape[-1])
            for part in counted.nonzero()[:, 0].split(1024):
                rows = loss.rows[part].double()
                total += float(torch.nn.functional.cross_entropy(rows, loss.targets[part].long(), reduction="sum"))
        moved = [
            (update.after[key].double() - before.double()).pow(2).sum()
            for update in step.updates
            for key, before in update.before.items()
            if key in update.after
        ]
        found.append(
            WatchedStep(
                number,
                total / tokens if tokens else None,
                tokens,
                step.backwards,
                sum(update.gradient_norm**2 for update in step.updates) ** 0.5,
                float(sum(moved)) ** 0.5 if moved else None,
                [float(g["lr"]) for update in step.updates for g in update.groups if isinstance(g.get("lr"), float)],
            )
        )
    return found


def seen(recorder: Recorder) -> list[str]:
    """What was there to be judged, in words."""
    words = []
    losses = [loss for step in recorder.steps for loss in step.losses]
    if not any(loss.weights is not None for loss in losses) and recorder.steps:
        words.append("no cross-entropy was seen on the way to the backward pass: targets and loss were not judged")
    elif losses and all(loss.rows is None for loss in losses):
        words.append("the logits are too large to keep: targets were not judged")
    evaluated = sum(1 for forward in recorder.evaluations if forward.losses)
    words.append(f"passes without gradients: {len(recorder.evaluations)}, with a loss: {evaluated}")
    if not recorder.optimizers and recorder.steps:
        words.append("the parameters are changed without an optimizer")
    return words


class watch:
    """Watches the training in a `with` block for a few steps, and judges it.

    ```
    with watch(model, steps=3) as report:
        train(model, loader, optimizer)
    print(report.verdict)
    ```

    The block is left after `steps` optimizer steps, at the next backward pass. Until then the training goes on as it
    would: its random numbers, gradients and weights are the same, bit for bit.

    Args:
        model: the module to watch; default: the one whose loss goes backward.
        steps: optimizer steps to watch.
        timeout: seconds after which the block is left at the next call of a model, or None.

    Returns:
        On entry the `WatchReport`, which is filled when the block is left.

    Raises:
        LabError: `steps` is not a positive number, or a watch is on already.
    """

    active = False
    patient = False  # whether to wait for an evaluation after the last step

    def __init__(self, model: torch.nn.Module | None = None, *, steps: int = 3, timeout: float | None = None):
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise LabError(f"got steps={steps!r}, but at least 1 step has to be watched")
        if model is not None and not isinstance(model, torch.nn.Module):
            raise LabError(f"got a {type(model).__name__} as the model, but it has to be a torch.nn.Module")
        self.model = model
        self.recorder = Recorder(steps, timeout, self.patient)
        self.report = WatchReport(wanted=steps)

    def __enter__(self) -> WatchReport:
        if watch.active:
            raise LabError("a training is watched already; leave that block first")
        watch.active = True
        self.frame = sys._getframe(1)
        try:
            self.recorder.__enter__()
        except BaseException:
            watch.active = False
            self.recorder.undo.close()
            raise
        return self.report

    def __exit__(self, kind, error, trace) -> bool:
        self.close()
        self.finish(error, [*frames_of(trace), self.frame.f_locals, self.frame.f_globals])
        del self.frame
        return isinstance(error, Enough)

    def close(self) -> None:
        self.recorder.__exit__()
        watch.active = False

    def finish(self, error: BaseException | None, frames: list[dict[str, Any]]) -> None:
        report, recorder = self.report, self.recorder
        if isinstance(error, Enough):
            report.ended = recorder.ended or f"after {len(recorder.steps)} steps"
        elif error is None or (isinstance(error, SystemExit) and not error.code):
            report.ended = "the script ended"
        else:
            report.ended = "an error"
            report.error = f"{type(error).__name__}: {error}"
        report_of(recorder, report, frames)


def frames_of(trace: types.TracebackType | None) -> Iterator[dict[str, Any]]:
    """The variables of the frames of the user's code in a traceback."""
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(PACKAGE):
            yield trace.tb_frame.f_locals
        trace = trace.tb_next


@contextmanager
def as_script(argv: Sequence[str], folder: str) -> Iterator[None]:
    """The interpreter as a script finds it."""
    kept_argv, kept_path, kept_main = sys.argv, sys.path[:], sys.modules["__main__"]
    sys.argv = [*argv]
    sys.path[:] = [folder, *kept_path]
    try:
        yield
    finally:
        sys.argv, sys.modules["__main__"] = kept_argv, kept_main
        sys.path[:] = kept_path


@contextmanager
def alarm(seconds: float | None) -> Iterator[None]:
    """Ends a script that does not come back to us."""
    usable = seconds is not None and hasattr(signal, "setitimer")
    if not usable or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise Enough

    usual = signal.signal(signal.SIGALRM, ring)
    assert seconds is not None
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)


class watch_run(watch):
    """The same for a whole script, which goes on until its first evaluation."""

    patient = True


def watch_script(
    script: str | os.PathLike,
    arguments: Sequence[str] = (),
    *,
    steps: int = 3,
    timeout: float | None = 120,
    module: bool = False,
) -> WatchReport:
    """Runs a training script as `python script arguments` does, stops it after a few optimizer steps, and judges it.

    The script is executed, and what it writes it writes. An error of its own is printed with its traceback.

    Args:
        script: the file, or the module's name if `module`.
        arguments: the script's.
        steps: optimizer steps to watch.
        timeout: seconds, or None.
        module: run it as `python -m script`.

    Raises:
        LabError: there is no such script.
    """
    name = os.fspath(script)
    if not module and not Path(name).is_file():
        raise LabError(f"there is no script {name}; give the path of a .py file, or -m and a module")
    watching = watch_run(steps=steps, timeout=timeout)
    main = types.ModuleType("__main__")
    error: BaseException | None = None
    with as_script([name, *arguments], os.getcwd() if module else str(Path(name).resolve().parent)):
        watching.__enter__()
        try:
            with alarm(timeout):
                if module:
                    runpy.run_module(name, run_name="__main__", alter_sys=True)
                else:
                    main.__file__ = name
                    with io.open_code(name) as file:
                        code = compile(file.read(), name, "exec")
                    sys.modules["__main__"] = main
                    exec(code, vars(main))
        except KeyboardInterrupt:
            raise
        except BaseException as caught:
            error = caught
        finally:
            watching.close()
    if isinstance(error, Enough) and not watching.recorder.ended and len(watching.recorder.steps) < steps:
        watching.recorder.ended = "the time was over"
    if error is not None and not isinstance(error, (Enough, SystemExit)):
        print_traceback(error)
    watching.finish(error, [*frames_of(error.__traceback__ if error else None), vars(main)])
    return watching.report


def print_traceback(error: BaseException) -> None:
    """The script's own traceback, without the frames of this package."""
    told = traceback.TracebackException.from_exception(error)
    one: traceback.TracebackException | None = told
    while one is not None:
        kept = [frame for frame in one.stack if not frame.filename.startswith(str(Path(__file__).parent))]
        one.stack = traceback.StackSummary.from_list(kept)
        one = one.__cause__ or one.__context__
    print("".join(told.format()), end="", file=sys.stderr)


__all__ = ["FAULT", "watch", "watch_script"]
