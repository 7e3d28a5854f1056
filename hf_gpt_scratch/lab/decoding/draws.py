"""Sampling: are the probabilities those of the settings?"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

from .examination import Examiner
from .sampling import SETTINGS, Variant, right_distributions
from .steps import steps_of

# Probabilities in float64, and where the decoder computes them in float32.
EXACT, SINGLE = 1e-9, 3e-6
UNSEEN = "no draw was seen: it uses neither torch.multinomial nor a race of random numbers"
NOTHING = "its probabilities are not finite"
VALUES = {"temperature": (0.6, 1.7), "top_k": (3, 5), "top_p": (0.5, 0.8)}
REMEDIES = {
    "temperature": "divide the logits by it, before softmax",
    "top_k": "keep the k largest logits, and set the others to -inf",
    "top_p": "keep the smallest set of tokens whose probabilities reach it, and set the other logits to -inf",
}

# Runs whose draws are counted: rows of a batch and batches, or single prompts. Standard deviations of chi-squared from
# which on probabilities are refuted, and up to which they may be.
BATCH, ROUNDS, SINGLES = 128, 32, 300
REFUTED, LIKELY = 8.0, 4.0
# A temperature at which many tokens are drawn.
FLAT = 3.0


@dataclass(frozen=True)
class Drawn:
    """What was drawn from: logits (V,), probabilities by id (V,), their rounding, and the settings of the run."""

    z: torch.Tensor
    found: torch.Tensor
    bound: float
    values: dict[str, Any]

    def error(self, variants: tuple[Variant, ...]) -> float:
        """The smallest difference from the probabilities of these variants; a setting of top_p=1 may do nothing."""
        neutral = [False, True] if self.values.get("top_p") == 1.0 else [False]
        return min(self.error_of(variants, skipped) for skipped in neutral)

    def error_of(self, variants: tuple[Variant, ...], without_top_p: bool) -> float:
        logits = self.z
        for (setting, _), variant in zip(SETTINGS.items(), variants, strict=True):
            value = self.values.get(setting)
            if setting == "top_p" and value and variants[0].unnormalized:
                value *= self.values["temperature"]
            if value and not (setting == "top_p" and without_top_p):
                logits = variant.apply(logits, value, self.z)
        return float((logits.softmax(-1) - self.found).abs().max())


class Draws(Examiner):
    """Questions about what a decoder draws from."""

    def sampling(self) -> None:
        """Are the probabilities those of the settings?"""
        one = self.decoder
        if self.has_found("wrong-row"):
            self.not_made("sampling", "its logits are those of another row")
            return
        on: dict[str, Any] = {"use_cache": True}
        if one.has("do_sample"):
            on["do_sample"] = True
        if one.has("greedy"):
            on["greedy"] = False
        settings = [setting for setting in VALUES if one.has(setting)]
        if not settings and not one.has("do_sample") and not one.has("greedy"):
            self.without_settings()
            return
        neutral = {"temperature": 1.0, "top_k": self.bench.vocab_size, "top_p": 1.0}
        off = dict(on)
        for setting in settings:
            default = one.defaults.get(setting, 0)
            off[setting] = None if default is None and setting != "temperature" else neutral[setting]
            if setting == "top_k" and default == 0:
                off[setting] = 0
        cases = {setting: [{**off, setting: value} for value in VALUES[setting]] for setting in settings}
        cases = cases or {"do_sample": [off]}
        if self.over_rows({**off, "temperature": 1.0} if one.has("temperature") else off):
            return
        drawn: dict[str, list[Drawn]] = {}
        for setting, tried in cases.items():
            what = f"sampling with {one.parameters.get(setting, setting)}"
            found = [self.drawn(self.bench.ids(5, 110 + seed), values) for values in tried for seed in (0, 1)]
            failures = [one for one in found if isinstance(one, str)]
            if NOTHING in failures:
                self.nothing_left(what, setting, tried[found.index(NOTHING) // 2])
                return
            if failures and failures[0] == UNSEEN:
                self.no_draw(what, list(cases), off, tried[-1])
                return
            if failures:
                self.not_made(what, failures[0])
                return
            drawn[setting] = [one for one in found if isinstance(one, Drawn)]
        if not self.explained(drawn):
            return
        if self.races(off) and not self.by_frequencies(list(cases), off):
            return
        if len(settings) > 1:
            self.settings_together(settings, off)
        if one.has("top_k"):
            self.rows_have_thresholds({**off, "top_k": 3})

    def over_rows(self, values: dict[str, Any]) -> bool:
        """Whether softmax is taken over the rows of a batch; the softmax of one row alone is 1 for every token."""
        run = self.bench.run(self.decoder, [self.bench.ids(5, 110 + n) for n in range(3)], 1, **values)
        if run.error is not None:
            return False
        of_rows = [call.last.double().softmax(0) for call in run.calls[-1:] if call.logits is not None]
        drawn = [draw.probabilities.double() for draw in run.draws[:1]]
        chosen = [list(map(int, one.argmax(-1))) for one in of_rows]
        if drawn and of_rows:
            found = drawn[0].shape == of_rows[0].shape and float((drawn[0] - of_rows[0]).abs().max()) <= SINGLE
        else:
            found = chosen == [[row[0] for row in run.new if row]]
        if found:
            where = self.decoder.name
            self.report.findings = [
                one for one in self.report.findings if (one.name, one.where) != ("batch-rows-differ", where)
            ]
            self.wrong(
                "sampling",
                "softmax-over-batch",
                "softmax is taken over the rows of the batch, not over the tokens: of one prompt, all tokens have the "
                "probability 1",
                "torch.softmax(logits, dim=-1)",
                proof="softmax(logits, dim=0) gives the probabilities of a batch of 3 prompts"
                if drawn
                else "the argmax of softmax(logits, dim=0) gives the tokens of a batch of 3 prompts",
                shortest={"prompt": self.bench.ids(1, 110), "new_tokens": 1},
            )
        return found

    def nothing_left(self, what: str, setting: str, values: dict[str, Any]) -> None:
        """Of finite logits, settings within their ranges make probabilities that are not finite: which of them?"""
        filters = [one for one in ("top_p", "top_k") if self.decoder.has(one)]
        if setting not in filters and filters:  # a temperature leaves all tokens
            setting = filters[0]
            what = f"sampling with {self.decoder.parameters[setting]}"
        if setting == "top_p":  # one token too few leaves some where top_p is large
            tries = [
                self.drawn(self.bench.ids(5, 110 + n), {**values, "top_p": p}) for p in (0.9, 0.97) for n in (0, 1)
            ]
            found = [one for one in tries if isinstance(one, Drawn)]
            tables = SETTINGS["temperature"][0], SETTINGS["top_k"][0]
            for variant in SETTINGS["top_p"] if len(found) > 1 else []:
                if variant.name and all(one.error((*tables, variant)) <= one.bound for one in found):
                    self.named_variant(what, setting, variant, found)
                    return
        named = {self.decoder.parameters[s]: values[s] for s in VALUES if self.decoder.has(s) and s in values}
        told = ", ".join(f"{name}={value}" for name, value in named.items()) or self.decoder.name
        self.wrong(
            what,
            f"{setting.replace('_', '-')}-wrong",
            f"with {told} the probabilities are not finite, as if no token were left, and a draw fails",
            REMEDIES.get(setting, "draw from softmax(logits)"),
            shortest={"prompt": self.bench.ids(5, 110), "new_tokens": 1, **named},
        )

    def without_settings(self) -> None:
        """It draws as it likes: at least, are what it draws the ids of the probabilities?"""
        what = "sampling"
        drawn = [self.drawn(self.bench.ids(5, 110 + seed), {}) for seed in (0, 1)]
        found = [one for one in drawn if isinstance(one, Drawn)]
        if len(found) < 2:
            self.not_made(what, "it has no settings for sampling")
            return
        for one in found:
            one.values["top_k"] = int((one.found > 0).sum())
        tables = SETTINGS["temperature"][0], SETTINGS["top_p"][0]
        fits = [
            variant
            for variant in SETTINGS["top_k"]
            if all(one.error((tables[0], variant, tables[1])) <= one.bound for one in found)
        ]
        if not fits or not fits[0].name:
            if fits:
                self.right(what)
            else:
                self.not_made(what, "its settings are its own")
        elif fits[0].name == "top-k-sorted-indices":
            self.wrong(
                what,
                fits[0].name,
                fits[0].says,
                fits[0].remedy,
                proof=f"it gives the probabilities of {len(found)} draws",
                shortest={"prompt": self.bench.ids(5, 110), "new_tokens": 1},
            )
        else:
            self.not_made(what, "its settings are its own")

    def drawn(self, prompt: list[int], values: dict[str, Any]) -> Drawn | str:
        """The first draw of a run, or why there is none."""
        run = self.bench.run(self.decoder, [prompt], 1, **values)
        if run.error is not None:
            return run.failure
        if not run.draws:
            return UNSEEN
        draw = run.draws[0]
        if draw.call < 0 or run.calls[draw.call].logits is None:
            return "its logits were not seen"
        z = run.calls[draw.call].last[0].double()
        shares = draw.probabilities.reshape(-1, draw.probabilities.shape[-1])[0].double()
        bound = EXACT if draw.probabilities.dtype == torch.float64 and self.bench.rounding < EXACT else SINGLE
        shares = shares / shares.sum()
        if not torch.isfinite(shares).all():
            return NOTHING
        whole = len(shares) == len(z)
        columns = shares.topk(min(256, int((shares > 0).sum()))).indices.tolist()
        by_id = torch.zeros_like(z)
        order = z.argsort(descending=True)
        # The columns are the ids, or the ids sorted by their logits, either way.
        maps = [torch.arange(len(z)), order, order.flip(0)] if whole else []
        ids: dict[int, int] = {}
        for column in columns:
            if (
                len(ids) == 4
                and (known := next((m for m in maps if all(int(m[c]) == token for c, token in ids.items())), None))
                is not None
            ):
                return Drawn(z, by_id.scatter(0, known, shares), bound, values)
            picked = self.bench.run(
                self.decoder,
                [prompt],
                1,
                choose=lambda p, column=column: torch.full(p.shape[:-1], column),
                **values,
            )
            if picked.error is not None or not picked.new[0]:
                return picked.failure or "a run returned nothing"
            ids[column] = picked.new[0][0]
            if not 0 <= ids[column] < len(z):
                return f"it returns {ids[column]}, which is no id"
        for column, token in ids.items():
            by_id[token] += shares[column]
        return Drawn(z, by_id, bound, values)

    def explained(self, drawn: dict[str, list[Drawn]]) -> bool:
        """Names the fewest variants of the settings that together give all draws; True if they are the right ones."""
        names = {setting: self.decoder.parameters.get(setting, setting) for setting in drawn}
        every = [one for tried in drawn.values() for one in tried]
        tables = [
            list(enumerate(table)) if setting in drawn else [(0, table[0])] for setting, table in SETTINGS.items()
        ]
        together = sorted(itertools.product(*tables), key=lambda row: sum(n > 0 for n, _ in row))
        for row in together:
            variants = tuple(variant for _, variant in row)
            if all(one.error(variants) <= one.bound for one in every):
                for setting, variant in zip(SETTINGS, variants, strict=True):
                    if setting in drawn:
                        self.named_variant(f"sampling with {names[setting]}", setting, variant, drawn[setting])
                if not drawn.keys() & SETTINGS.keys():
                    self.right("sampling")
                return not any(n for n, _ in row)
        right = tuple(table[0] for table in SETTINGS.values())
        for setting, tried in drawn.items():
            what, name = f"sampling with {names[setting]}", names[setting]
            worst = max(one.error(right) for one in tried)
            if all(one.error(right) <= one.bound for one in tried):
                self.right(what)
                continue
            if self.decoder.others:
                others = ", ".join(f"{other}={value}" for other, value in self.decoder.others.items())
                self.not_made(what, f"it has settings that are unknown here: {others}")
                continue
            alone = [
                variant
                for variant in SETTINGS.get(setting, [])
                if all(
                    one.error(tuple(variant if s == setting else table[0] for s, table in SETTINGS.items()))
                    <= one.bound
                    for one in tried
                )
            ]
            if alone:
                self.named_variant(what, setting, alone[0], tried)
                continue
            self.wrong(
                what,
                f"{setting.replace('_', '-')}-wrong",
                f"with {name}={tried[0].values.get(setting)} the probabilities differ by up to {worst:.2g} from those "
                "of the setting",
                REMEDIES.get(setting, "draw from softmax(logits)"),
                error=worst,
                shortest={"prompt": self.bench.ids(5, 110), "new_tokens": 1, name: tried[0].values.get(setting)},
            )
        return False

    def named_variant(self, what: str, setting: str, variant: Variant, tried: list[Drawn]) -> None:
        if not variant.name:
            self.right(what)
            return
        name, says = variant.name, variant.says
        if name == "temperature-ignored" and self.divides_probabilities(tried[0].values):
            name = "temperature-after-softmax"
            says = "the probabilities are divided by the temperature, after softmax, which has no effect on a draw"
        parameter, value = self.decoder.parameters[setting], tried[0].values[setting]
        self.wrong(
            what,
            name,
            says,
            variant.remedy,
            proof=f"it gives the probabilities of all {len(tried)} draws, with two values and two prompts",
            shortest={"prompt": self.bench.ids(5, 110), "new_tokens": 1, parameter: value},
        )

    def divides_probabilities(self, values: dict[str, Any]) -> bool:
        run = self.bench.run(self.decoder, [self.bench.ids(5, 110)], 1, **values)
        return any(by == values["temperature"] and of_probabilities for by, of_probabilities in run.divided)

    def races(self, values: dict[str, Any]) -> bool:
        run = self.bench.run(self.decoder, [self.bench.ids(5, 110)], 1, **values)
        return any(draw.raced for draw in run.draws)

    def many(self, prompt: list[int], values: dict[str, Any]) -> list[int]:
        """The first new ids of many runs with other random numbers; empty if they cannot be made."""

        def firsts(count: int, seed: int) -> list[int]:
            run = self.bench.run(self.decoder, [prompt] * count, 1, choose=None, seed=seed, **values)
            return [row[0] for row in run.new] if run.error is None and all(run.new) else []

        rows = firsts(BATCH, 0)
        if len(set(rows)) > 1:  # its rows have random numbers of their own
            return [token for seed in range(ROUNDS) for token in firsts(BATCH, seed)]
        return [token for seed in range(SINGLES) for token in firsts(1, seed)]

    def by_frequencies(self, settings: list[str], off: dict[str, Any]) -> bool:
        """Are the frequencies of what it draws those of the settings? True if they are, or it cannot be told."""
        flat = {"temperature": FLAT} if self.decoder.has("temperature") else {}
        return all(
            self.by_frequency(
                f"sampling with {self.decoder.parameters.get(setting, setting)}",
                setting,
                off,
                flat if setting not in VALUES or setting == "temperature" else {**flat, setting: VALUES[setting][0]},
            )
            for setting in settings
        )

    def by_frequency(self, what: str, setting: str, off: dict[str, Any], told: dict[str, Any]) -> bool:
        prompt = self.bench.ids(5, 110)
        found = [] if self.unreliable else self.many(prompt, {**off, **told})
        if len(found) < SINGLES:
            self.not_made(what, UNSEEN)
            return True
        z = self.bench.last(prompt).double()
        counts = torch.bincount(torch.tensor(found), minlength=len(z))[: len(z)].double()
        named = {self.decoder.parameters[one]: value for one, value in told.items()}
        excesses = min(excess(counts, right) for right in right_distributions(z, told))
        if excesses <= REFUTED:
            self.right(what)
            return True
        if self.decoder.others:
            others = ", ".join(f"{name}={value}" for name, value in self.decoder.others.items())
            self.not_made(what, f"it has settings that are unknown here: {others}")
            return True
        scaled = z / told.get("temperature", 1.0) if setting != "temperature" else z
        fits = {
            variant.says
            for variant in SETTINGS.get(setting, [])
            if variant.name and excess(counts, variant.apply(scaled, told[setting], z).softmax(-1)) <= LIKELY
        }
        far = "some have the probability 0" if math.isinf(excesses) else f"chi-squared is {excesses:.0f} deviations off"
        says = f"{len(found)} draws are not from the probabilities of {named or 'softmax'}: {far}"
        self.wrong(
            what,
            "draws-differ",
            says + (f"; they are as if {fits.pop()}" if len(fits) == 1 else ""),
            "draw with torch.multinomial(probs, num_samples=1), from the probabilities of the settings",
            shortest={"prompt": prompt, "new_tokens": 1, **named},
        )
        return False

    def no_draw(self, what: str, settings: list[str], off: dict[str, Any], values: dict[str, Any]) -> None:
        """No draw was seen: does it always take the most probable token, although it was told to sample?"""
        prompt = self.bench.ids(5, 115)
        runs = [self.bench.run(self.decoder, [prompt], 6, choose=None, seed=seed, **values) for seed in range(8)]
        same = all(run.error is None for run in runs) and len({str(run.new) for run in runs}) == 1
        if same and (self.decoder.has("temperature") or self.decoder.has("do_sample")) and steps_of(runs[0])[1]:
            self.wrong(
                what,
                "sampling-is-greedy",
                "asked to sample, it always takes the most probable token",
                "draw with torch.multinomial(probs, num_samples=1)",
                proof="8 seeds give the argmax of every step",
                shortest={"prompt": prompt[:1], "new_tokens": 1},
            )
        elif same:
            self.not_made(what, UNSEEN)
        else:
            self.by_frequencies(settings, off)

    def settings_together(self, settings: list[str], off: dict[str, Any]) -> None:
        what = "sampling with several settings"
        for n in (0, 1):
            values = {setting: VALUES[setting][n] for setting in settings}
            drawn = self.drawn(self.bench.ids(6, 120 + n), {**off, **values})
            if isinstance(drawn, str):
                self.not_made(what, drawn)
                return
            error = min(float((right - drawn.found).abs().max()) for right in right_distributions(drawn.z, values))
            if error > drawn.bound:
                named = {self.decoder.parameters[setting]: value for setting, value in values.items()}
                self.wrong(
                    what,
                    "settings-interfere",
                    f"with {named} together the probabilities differ by {error:.2g} from those of these settings, each "
                    "of which is right alone",
                    "logits / temperature, then top_k, then top_p, then softmax",
                    error=error,
                    shortest={"prompt": self.bench.ids(6, 120 + n), "new_tokens": 1, **named},
                )
                return
        self.right(what)

    def rows_have_thresholds(self, values: dict[str, Any]) -> None:
        what = "sampling in a batch"
        prompts = [self.bench.ids(5, 130 + n) for n in range(3)]
        run = self.bench.run(self.decoder, prompts, 1, **values)
        if run.error is not None:
            self.not_made(what, f"it takes one prompt at a time: {run.failure}")
            return
        if not run.draws or run.draws[0].probabilities.shape != (3, self.bench.vocab_size):
            self.not_made(what, "it draws from the largest alone")
            return
        z = run.calls[run.draws[0].call].last.double()
        found = run.draws[0].probabilities.double()
        found = found / found.sum(-1, keepdim=True)
        bound = EXACT if run.draws[0].probabilities.dtype == torch.float64 else SINGLE
        right = torch.stack([right_distributions(row, {"top_k": values["top_k"]})[0] for row in z])
        if float((right - found).abs().max()) <= bound:
            self.right(what)
            return
        alone = self.bench.run(self.decoder, prompts[:1], 1, **values).draws[0].probabilities.double().reshape(-1)
        if alone.shape != right[0].shape or float((right[0] - alone / alone.sum()).abs().max()) > bound:
            self.not_made(what, "its columns are not the ids")
            return
        least = z.topk(values["top_k"]).values[:, -1]
        thresholds = {"threshold of the first row": least[0], "smallest threshold of all rows": least.min()}
        thresholds |= {"largest threshold of all rows": least.max(), "threshold of the last row": least[-1]}
        same = ""
        for one, threshold in thresholds.items():
            shared = z.masked_fill(z < threshold, -torch.inf).softmax(-1).nan_to_num()
            if float((shared - found.nan_to_num()).abs().max()) <= bound:
                same = one
                break
        self.wrong(
            what,
            "top-k-of-first-row" if same else "batch-probabilities-differ",
            f"the {same} is used for all rows"
            if same
            else "the probabilities of the other rows of a batch are not those of their logits",
            "values[..., [-1]] keeps a threshold for each row",
            proof="it gives the probabilities of all rows" if same else "",
            shortest={"prompts": prompts, "new_tokens": 1},
        )


def excess(counts: torch.Tensor, shares: torch.Tensor) -> float:
    """How many standard deviations chi-squared of counts (V,) is above what draws from these probabilities give."""
    expected = shares * counts.sum()
    if bool((counts[shares == 0] > 0).any()):
        return float("inf")
    often = expected >= 5
    pairs = [(counts[often], expected[often]), (counts[~often].sum()[None], expected[~often].sum()[None])]
    squares = [((one - other) ** 2 / other.clamp(min=1.0)).sum() for one, other in pairs]
    freedom = max(int(often.sum()), 1)
    # Wilson and Hilferty: the cube root of chi-squared over its degrees of freedom is nearly normal.
    spread = 2 / (9 * freedom)
    return float(((sum(squares) / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)
