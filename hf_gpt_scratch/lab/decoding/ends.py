"""The end token: does a decoder end with it, and only there?"""

import torch

from .examination import Examiner


class Ends(Examiner):
    def ends(self) -> None:
        """Does it end with the end token, and only there?"""
        what = "the end token"
        if not self.decoder.has("eos_id"):
            self.not_made(what, "it has no parameter for one")
            return
        new = 8
        for seed in (*range(80, 160), *range(-160, -80)):  # of the latter, those may have the token 0, too
            prompt = self.bench.ids(5, abs(seed))
            plain = self.run([prompt], new)
            if plain.error is not None:
                self.fails(what, plain, new)
                return
            full = plain.new[0]
            places = [place for place in firsts(full, prompt) if full.count(full[place]) == 1]
            later = [place for place in places if 1 < place < new - 2][:2]
            if len(full) == new and 0 in places and later and (seed < 0 or 0 not in (*prompt, *full)):
                break
        else:
            self.not_made(what, "no prompt gives tokens that are different")
            return
        results: dict[int, str] = {}
        for place in (0, *later):
            run = self.run([prompt], new, eos_id=full[place])
            if run.error is not None:
                self.not_made(what, run.failure)
                return
            results[place] = ending(run.new[0], full, place)
        kinds = set(results.values())
        shown = {"prompt": prompt, "eos_id": full[0], "new_tokens": new}
        proof = f"the same at {len(results)} places"
        remedy = "stop as soon as the new token is the end token"
        if kinds in ({"kept"}, {"dropped"}):
            self.right(what)
            convention = "keeps the end token in its result" if kinds == {"kept"} else "leaves the end token out"
            self.report.notes.append(f"{self.decoder.name} {convention}")
        elif kinds == {"ignored"}:
            self.wrong(what, "end-ignored", "it goes on after the end token", remedy, proof=proof, shortest=shown)
        elif results[0] == "ignored" and {results[n] for n in later} in ({"kept"}, {"dropped"}):
            self.wrong(
                what,
                "end-missed-at-first-token",
                "it goes on if the first new token is the end token",
                remedy,
                proof="at later places it ends",
                shortest=shown,
            )
        elif kinds == {"late"}:
            self.wrong(
                what, "end-counted-late", "one token more follows the end token", remedy, proof=proof, shortest=shown
            )
        elif {results[n] for n in later} == {"lost"}:
            self.wrong(
                what,
                "end-token-lost",
                "the token before the end token is lost with it",
                "drop the end token once, or not at all",
                proof=proof,
                shortest=shown,
            )
        elif kinds <= {"kept", "dropped"}:
            self.wrong(
                what,
                "end-token-inconsistent",
                f"the end token is {results[0]} at the first place, {results[later[-1]]} later",
                "treat it alike wherever it comes",
                proof=proof,
                shortest=shown,
            )
        else:
            self.wrong(
                what,
                "end-handled-otherwise",
                f"with the end token {full[later[0]]}, {full} becomes "
                f"{self.run([prompt], new, eos_id=full[later[0]]).new[0]}",
                remedy,
                shortest=shown,
            )
        self.end_in_prompt(prompt, full)
        self.end_zero(prompt, full, later[0], results[later[0]])
        if kinds in ({"kept"}, {"dropped"}):
            self.rows_end()

    def end_in_prompt(self, prompt: list[int], full: list[int]) -> None:
        what = "an end token in the prompt"
        places = [n for n, token in enumerate(prompt) if token not in full]
        for place in dict.fromkeys([*places[:3], *places[-1:]]):  # a prompt may end with it, as of <|endoftext|> alone
            run = self.run([prompt], len(full), eos_id=prompt[place])
            if run.error is not None:
                self.not_made(what, run.failure)
                return
            if run.new[0] != full:
                self.wrong(
                    what,
                    "end-token-of-prompt-counted",
                    f"an end token in the prompt changes the result: {full} becomes {run.new[0]}",
                    "look for the end token among the new tokens only",
                    proof="without an end token the same prompt gives all tokens",
                    shortest={"prompt": prompt, "eos_id": prompt[place], "new_tokens": len(full)},
                )
                return
        self.right(what)

    def end_zero(self, prompt: list[int], full: list[int], place: int, ends: str) -> None:
        """Is an end token with the id 0 one too? The vocabulary is renumbered for it."""
        what = "the end token 0"
        tables, token = self.bench.tables, full[place]
        matrices = {t.data_ptr(): t for t in (tables.tokens, tables.head)}.values()
        if ends not in ("kept", "dropped"):
            self.not_made(what, "other end tokens are handled wrongly already")
            return
        if 0 in (*prompt, *full) or any(t.shape[0] != self.bench.vocab_size for t in matrices):
            self.not_made(what, "the vocabulary cannot be renumbered")
            return
        swap = [token, 0]
        with torch.no_grad():
            for matrix in matrices:
                matrix[[0, token]] = matrix[swap]
            try:
                run = self.run([prompt], len(full), eos_id=0)
            finally:
                for matrix in matrices:
                    matrix[[0, token]] = matrix[swap]
        renumbered = [0 if one == token else one for one in full]
        if run.error is None and ending(run.new[0], renumbered, place) == ends:
            self.right(what)
        elif run.error is None and run.new[0] == renumbered:
            self.wrong(
                what,
                "end-id-0-ignored",
                "an end token with the id 0 is ignored",
                "compare with None: if eos_id is not None",
                proof="with another id it ends",
                shortest={"eos_id": 0, "prompt": prompt, "new_tokens": place + 1},
            )

    def rows_end(self) -> None:
        """Does each row of a batch end by itself?"""
        what = "each row of a batch ends by itself"
        new = 6
        for seed in range(200, 230):
            prompts = [self.bench.ids(5, seed), self.bench.ids(5, seed + 500)]
            singles = [self.run([prompt], new).new for prompt in prompts]
            if not all(singles):
                continue
            a, b = singles[0][0], singles[1][0]
            free = [n for n in firsts(a, [*prompts[0], *prompts[1], *b]) if 0 < n < 3]
            if free and len(a) == len(b) == new and len(set(a[free[0] :])) > 2:
                place = free[0]
                break
        else:
            self.not_made(what, "no two prompts give different tokens")
            return
        together = self.run(prompts, new)
        if together.error is not None or together.new != [a, b]:
            self.not_made(what, together.failure or "without an end token, its rows are not those of single prompts")
            return
        for order in ((0, 1), (1, 0)):
            run = self.run([prompts[n] for n in order], new, eos_id=a[place])
            if run.error is not None:
                self.not_made(what, f"it takes one prompt at a time: {run.failure}"[:300])
                return
            ended, going = run.new[order.index(0)], run.new[order.index(1)]
            shown = {"prompts": [prompts[n] for n in order], "eos_id": a[place], "new_tokens": new}
            proof = "alone, each prompt gives " + f"{a[: place + 1]} and {b}"
            if going[: len(b)] != b:
                self.wrong(
                    what,
                    "rows-end-together",
                    f"a row is cut off when another one ends: {b} becomes {going}",
                    "keep a flag for each row; stop when all have ended",
                    proof=proof if going == b[: len(going)] else "",
                    shortest=shown,
                )
                return
            if ending(ended, a, place) not in ("kept", "dropped"):
                went_on = ended[: len(a)] == a or ended[: place + 3] == a[: place + 3]
                if went_on and not self.decoder.has("pad_id"):
                    # All rows go on until all have ended, for the caller to cut: many programs do so.
                    self.report.notes.append(
                        f"{self.decoder.name}: in a batch, rows go on after their end token until all end"
                    )
                    self.not_made(what, "its rows are for the caller to cut")
                    return
                padded = self.decoder.parameters.get("pad_id")
                self.wrong(
                    what,
                    "row-continues-after-end" if went_on else "row-changed-by-batch",
                    f"in a batch, a row that has ended goes on, where {padded} should follow: {ended}"
                    if went_on
                    else f"in a batch a row becomes {ended}",
                    "once a row has ended, append padding to it",
                    proof=proof,
                    shortest=shown,
                )
                return
        self.right(what)


def firsts(full: list[int], others: list[int]) -> list[int]:
    """The places of tokens that come there for the first time, and not among the others."""
    return [n for n, token in enumerate(full) if token not in (*others, *full[:n])]


def ending(found: list[int], full: list[int], place: int) -> str:
    """How a result ends whose end token is full[place]: kept, dropped, lost, late or ignored; else "other"."""
    if found == full:
        return "ignored"
    if found == full[: place + 2]:
        return "late"
    for kind, size in (("kept", place + 1), ("dropped", place), ("lost", place - 1)):
        # What follows may be padding, the same id all along.
        if (
            size >= 0
            and found[:size] == full[:size]
            and len(set(found[size:])) <= (1 if kind in ("kept", "dropped") else 0)
        ) and (kind != "dropped" or len(found) == size or found[size] not in full):
            return kind
    return "other"
