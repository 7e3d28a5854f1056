"""What a watched run has shown: faults, which are proved, and notes, which only state what is there."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

FAULT, NOTE = "fault", "note"


@dataclass(frozen=True)
class Finding:
    """One thing seen in a run.

    `level` is "fault" for a mistake and "note" for a choice or an observation. `where` is file and line in the user's
    code, or empty. `proof` says what was replayed or counted; `figures` has its numbers.
    """

    name: str
    says: str
    where: str = ""
    remedy: str = ""
    proof: str = ""
    level: str = FAULT
    figures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return finite(asdict(self))


class Findings:
    """What collects findings, each name once."""

    def __init__(self, recorder: Any):
        self.recorder = recorder
        self.findings: list[Finding] = []

    @property
    def optimizer_made(self) -> str:
        """File and line where the first optimizer was made, or nothing."""
        return next((event.where for event in self.recorder.loaded if event.what == "optimizer_made"), "")

    def add(self, name: str, *args: Any, **kwargs: Any) -> bool:
        if name not in {finding.name for finding in self.findings}:
            self.findings.append(Finding(name, *args, **kwargs))
        return True


@dataclass
class WatchedStep:
    """One optimizer step: the mean loss of its tokens, the norm of its gradient, and the learning rates."""

    number: int
    loss: float | None = None
    tokens: int = 0
    micro_batches: int = 0
    gradient_norm: float | None = None
    update_norm: float | None = None
    learning_rates: list[float] = field(default_factory=list)


@dataclass
class WatchReport:
    """What was seen of a training run; filled when the watching ends.

    `ended` says why it ended: "after 3 steps", "the script ended", "the time was over", or the script's error.
    """

    wanted: int = 3
    model: str = ""
    parameters: int = 0
    vocabulary: int = 0
    ended: str = ""
    error: str = ""
    steps: list[WatchedStep] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == FAULT]

    @property
    def notes(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == NOTE]

    @property
    def names(self) -> list[str]:
        """The names of all findings, faults first."""
        return [finding.name for finding in (*self.faults, *self.notes)]

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        count = f"{len(self.steps)} optimizer step{'' if len(self.steps) == 1 else 's'}"
        if self.faults:
            return f"Mistakes found in {count}: {', '.join(fault.name for fault in self.faults)}."
        if self.error:
            return f"The script failed after {count}: {self.error}"
        if not self.steps:
            return "No optimizer step was seen, so nothing can be said about the training."
        return f"No known mistake in {count}."

    @property
    def exit_status(self) -> int:
        """0 no mistake, 3 a mistake, 1 the script failed or did not train."""
        if self.error or not (self.steps or self.faults):
            return 1
        return 3 if self.faults else 0

    def to_html(self, script: str = "a training") -> str:
        """The report as an HTML page, complete in itself."""
        from .watch_page import watch_page

        return watch_page(self, script)

    def to_dict(self) -> dict[str, Any]:
        return finite(
            {
                "verdict": self.verdict,
                "model": self.model,
                "parameters": self.parameters,
                "vocabulary": self.vocabulary,
                "ended": self.ended,
                "error": self.error,
                "steps": [asdict(step) for step in self.steps],
                "findings": [asdict(finding) for finding in (*self.faults, *self.notes)],
                "seen": self.seen,
            }
        )


def finite(value: Any) -> Any:
    """The value for JSON, which has no infinities: these become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
