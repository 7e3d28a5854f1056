"""All questions, in their order."""

from dataclasses import replace

from .beams import Beams
from .bench import Bench
from .cached import Cached
from .choice import Choice
from .decoders import Decoder
from .ends import Ends
from .rows import Rows
from .window import Window


def ready(bench: Bench, decoder: Decoder) -> tuple[Decoder, str]:
    """The decoder with the form of ids that it takes, or why it does not run."""
    prompt = bench.ids(5, 1)
    failures = []
    for form in ("tensor", "rows", "list", "vector", "tensors"):
        one = replace(decoder, form=form, keeps_prompt=False)
        run = bench.run(one, [prompt], 4)
        if run.error is not None:
            failures.append(run.failure)
            continue
        if not run.new[0]:
            failures.append("it returns no ids")
            continue
        keeps = len(run.new[0]) > len(prompt) and run.new[0][: len(prompt)] == prompt
        count = len(run.new[0]) - len(prompt) * keeps
        total = not (one.has("max_length") and count == 4 + len(prompt))
        return replace(one, keeps_prompt=keeps, length_is_total=total), ""
    return decoder, failures[0]


class Examination(Choice, Cached, Window, Ends, Rows, Beams):
    """All questions to one decoder."""

    def uses_cache(self) -> bool:
        run = self.run([self.bench.ids(5, 3)], 3)
        return any(call.ids.shape[1] < 5 for call in run.calls[1:])

    def everything(self) -> None:
        self.choose_settings()
        self.count()
        if not self.repeatable():
            return
        if self.many_beams:
            self.beams()
            return
        self.greedily()
        self.steps()
        self.second_prompt()
        self.window()
        self.ends()
        self.batch()
        self.padding()
        self.sampling()
        if not any(self.has_found(f"temperature-{how}") for how in ("multiplied", "wrong", "ignored", "after-softmax")):
            self.at_zero()
        self.beams()
