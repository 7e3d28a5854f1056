"""One decoder on the bench: its runs, and how an answer gets into the report."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .bench import Bench
from .decoders import Decoder
from .recording import NotReplayable, Run
from .report import NOT_MADE, RIGHT, WRONG, DecodingFinding, DecodingReport

NEW = 4


@dataclass
class Examiner:
    """What all questions share.

    `settings` are those with which the decoder takes the most probable token, as far as it can be told to; where it
    draws, the most probable one is drawn for it. `unreliable`: its steps are wrong, so that what follows from them is
    not asked.
    """

    bench: Bench
    decoder: Decoder
    report: DecodingReport
    settings: dict[str, Any] = field(default_factory=dict)
    unreliable: bool = False

    def run(self, prompts: list[list[int]], new: int = NEW, **options: Any) -> Run:
        return self.bench.run(self.decoder, prompts, new, **{**self.settings, **options})

    def runs(self, what: str, prompts: list[list[int]], new: int, **options: Any) -> list[Run] | None:
        """A run for each prompt; None, with the reason in the report, if one fails within the context."""
        made = [self.run([prompt], new, **options) for prompt in prompts]
        failed = next((run for run in made if run.error is not None), None)
        if failed is not None:
            self.fails(what, failed, new)
            return None
        return made

    def right(self, what: str) -> None:
        self.report.checked(self.decoder.name, what, RIGHT)

    def not_made(self, what: str, why: str) -> None:
        self.report.checked(self.decoder.name, what, NOT_MADE, why[:300])

    def fails(self, what: str, run: Run, new: int) -> None:
        self.wrong(
            what,
            "fails",
            f"with {len(run.prompts[0])} tokens and {new} new ones, in a context of {self.bench.context_length}, it "
            f" raises {run.failure}",
            "run it so by hand",
            shortest={"prompt": run.prompts[0], "new_tokens": new},
        )
        self.unreliable = True

    def wrong(
        self, what: str, name: str, says: str, remedy: str, *, proof: str = "", shortest: Any = None, **figures: Any
    ) -> None:
        """Reports a finding, once for each decoder and name."""
        self.report.checked(self.decoder.name, what, WRONG, name)
        where = self.decoder.name
        if not any(one.name == name and one.where == where for one in self.report.findings):
            self.report.findings.append(
                DecodingFinding(name, says, where, remedy, bool(proof), proof, figures, shortest)
            )

    def has_found(self, name: str) -> bool:
        return any(one.name == name and one.where == self.decoder.name for one in self.report.findings)

    def draws_unseen(self) -> bool:
        """Whether the new ids change with the seed, although every draw that is seen is decided for it."""
        runs = [self.run([self.bench.ids(5, 90)], NEW, seed=seed) for seed in range(4)]
        return len({str(run.new) for run in runs if run.error is None}) > 1

    def smallest(self, shows: Callable[[Run], bool], **options: Any) -> dict[str, Any] | None:
        """The shortest prompt, and the fewest new tokens, with which a run shows it."""
        for total in range(2, 14):
            for new in range(1, total):
                prompt = self.bench.ids(total - new, 77)
                run = self.run([prompt], new, **options)
                try:
                    if run.error is None and shows(run):
                        return {"prompt": prompt, "new_tokens": new}
                except NotReplayable:
                    continue
        return None

    def replayed(self, found: torch.Tensor, triples: list[tuple]) -> bool:
        """Whether one of these (ids, positions, visible) gives these logits (V,)."""
        for made in triples:
            try:
                if self.bench.equal(found, self.bench.last(*made)):
                    return True
            except NotReplayable:
                continue
        return False
