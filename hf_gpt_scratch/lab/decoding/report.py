"""What the decoding lab found."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

RIGHT, WRONG, NOT_MADE = "right", "wrong", "not made"


@dataclass(frozen=True)
class DecodingFinding:
    """Something wrong with a decoder.

    `where` is the decoder. `proven`: what is named reproduces the candidate's numbers, as `proof` says; otherwise
    `says` is what was observed. `shortest` is the shortest prompt that was found to show it, and how many new tokens
    it takes.
    """

    name: str
    says: str
    where: str
    remedy: str
    proven: bool
    proof: str
    figures: dict[str, Any] = field(default_factory=dict)
    shortest: dict[str, Any] | None = None


@dataclass(frozen=True)
class DecodingCheck:
    """One question asked of a decoder: right, wrong or not made, and why."""

    where: str
    what: str
    outcome: str
    why: str = ""


@dataclass
class DecodingReport:
    """The checks of all decoders of a candidate."""

    candidate: str
    decoders: list[str]
    checks: list[DecodingCheck] = field(default_factory=list)
    findings: list[DecodingFinding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    replays: int = 0

    @property
    def right(self) -> bool:
        return not self.findings

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(finding.name for finding in self.findings))

    @property
    def verdict(self) -> str:
        made = [check for check in self.checks if check.outcome != NOT_MADE]
        if self.findings:
            return f"Decoding is wrong: {', '.join(self.names)}"
        return f"Nothing wrong was found with decoding in {len(made)} checks of {', '.join(self.decoders)}"

    def checked(self, where: str, what: str, outcome: str, why: str = "") -> None:
        self.checks.append(DecodingCheck(where, what, outcome, why))

    def to_dict(self) -> dict[str, Any]:
        figures = {"verdict": self.verdict, "right": self.right, "names": self.names, **asdict(self)}
        return finite(figures)


def finite(value: Any) -> Any:
    """The same with null for what JSON cannot express."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list) else value
