# ruff: noqa: E501
"""Decoders that are right, and sabotages of them: a style, what is replaced in its source, and the name to be found."""

from dataclasses import dataclass
from pathlib import Path

STYLES = Path(__file__).parent / "styles"
CLASSES = {
    "book": "GPTModel",
    "layers": "GPTModel",
    "nano": "GPT",
    "returned": "TinyGPT",
    "slots": "Model",
    "fast": "Transformer",
    "beams": "GPT",
    "min": "GPT",
    "llama": "LLM",
}


@dataclass(frozen=True)
class Case:
    """A style with replacements. `names`: the findings that are expected; none if it is right."""

    style: str
    replaced: tuple[tuple[str, str], ...]
    names: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        text = (STYLES / f"{self.style}.py").read_text(encoding="utf-8")
        for old, new in self.replaced:
            assert text.count(old) >= 1, f"{self.style} has no {old!r}"
            text = text.replace(old, new)
        return text

    @property
    def title(self) -> str:
        return f"{self.style}: {'; '.join(new.strip() for _, new in self.replaced)}"[:80]


def wrong(style, name, *replaced):
    pairs = tuple(zip(replaced[::2], replaced[1::2], strict=True))
    return Case(style, pairs, (name,))


def right(style, *replaced):
    return Case(style, tuple(zip(replaced[::2], replaced[1::2], strict=True)))


SABOTAGES = [
    # The cache: positions, mask, what is in it.
    wrong("layers", "positions-ignore-cache", "torch.arange(self.current_pos, self.current_pos + seq_len, ", "torch.arange(0, seq_len, "),
    wrong("layers", "positions-stand-still", "            self.current_pos += seq_len\n", "            self.current_pos = max(self.current_pos, seq_len)\n"),
    wrong("layers", "mask-not-moved", "self.ptr_current_pos : self.ptr_current_pos + num_tokens_q, :num_tokens_k", ":num_tokens_q, :num_tokens_k"),
    wrong("layers", "cache-not-reset", "            model.reset_kv_cache()\n", ""),
    wrong("layers", "cache-not-reset", "    def reset_kv_cache(self):\n        for blk in self.trf_blocks:\n            blk.att.reset_cache()\n", "    def reset_kv_cache(self):\n"),
    wrong("layers", "cache-loses-tokens", "self.cache_k = torch.cat([self.cache_k, keys_new], dim=1)", "prev_k, self.cache_k = self.cache_k[:, -1:], keys_new; keys_new = torch.cat([prev_k, keys_new], 1)", "self.cache_v = torch.cat([self.cache_v, values_new], dim=1)", "prev_v, self.cache_v = self.cache_v[:, -1:], values_new; values_new = torch.cat([prev_v, values_new], 1)", "keys, values = self.cache_k, self.cache_v\n", "keys, values = keys_new, values_new\n", "self.ptr_current_pos : self.ptr_current_pos + num_tokens_q, :num_tokens_k", "num_tokens_k - num_tokens_q : num_tokens_k, :num_tokens_k"),
    wrong("returned", "cache-overwritten", "        if past is not None:\n            k, v = torch", "        new = k, v\n        if past is not None:\n            k, v = torch", "reshape(b, t, w)), (k, v)", "reshape(b, t, w)), new", "else past_key_values[0][0].size(2)", "else int(self.seen)", "        x = self.wte(ids) + where", "        self.seen = start + ids.size(1)\n        x = self.wte(ids) + where"),
    wrong("layers", "future-leak", "        attn_scores.masked_fill_(mask_bool, -torch.inf)\n", "        if not use_cache:\n            attn_scores.masked_fill_(mask_bool, -torch.inf)\n"),
    wrong("layers", "wrong-tokens-fed", "logits = model(next_idx, use_cache=True)", "logits = model(idx, use_cache=True)"),
    wrong("returned", "positions-ignore-cache", "start = 0 if past_key_values is None else past_key_values[0][0].size(2)", "start = 0"),
    wrong("returned", "positions-off-by-one", "else past_key_values[0][0].size(2)", "else past_key_values[0][0].size(2) + 1"),
    wrong("returned", "positions-off-by-one", "else past_key_values[0][0].size(2)", "else past_key_values[0][0].size(2) - 1"),
    wrong("returned", "mask-not-moved", "[total - t :, :total]", "[:t, :total]"),
    wrong("returned", "cache-ignored", "            presents.append(present)", "            presents.append((present[0][:, :, :0], present[1][:, :, :0]))", "else past_key_values[0][0].size(2)", "else int(self.seen)", "        x = self.wte(ids) + where", "        self.seen = start + ids.size(1)\n        x = self.wte(ids) + where"),
    wrong("returned", "cache-not-extended", "            presents.append(present)", "            presents.append(present if past_key_values is None else past_key_values[n])", "else past_key_values[0][0].size(2)", "else int(self.seen)", "        x = self.wte(ids) + where", "        self.seen = start + ids.size(1)\n        x = self.wte(ids) + where"),
    wrong("slots", "positions-ignore-cache", "self.pos(torch.arange(start, start + T))", "self.pos(torch.arange(T))"),
    wrong("slots", "mask-not-moved", ".tril(diagonal=past)", ".tril()"),
    wrong("slots", "cache-not-reset", "        cache = KVCache(*self.shape)\n        out", "        cache = self.__dict__.setdefault('kept', KVCache(*self.shape))\n        out"),
    wrong("slots", "mask-hides-itself", ".tril(diagonal=past)", ".tril(diagonal=past - (past > 0))"),
    wrong("fast", "positions-ignore-cache", "self.pos(input_pos)", "self.pos(torch.arange(t))"),
    wrong("fast", "positions-stand-still", "        input_pos = input_pos[-1:] + 1\n", "        input_pos = torch.tensor([prompt.shape[1]])\n"),
    # Beyond the context.
    wrong("book", "prompt-cut-wrong-side", "idx[:, -context_size:]", "idx[:, :context_size]"),
    wrong("nano", "prompt-cut-wrong-side", "idx[:, -self.config.block_size :]", "idx[:, : self.config.block_size]"),
    wrong("nano", "window-too-short", "idx if idx.size(1) <= self.config.block_size else idx[:, -self.config.block_size :]", "idx[:, -self.config.block_size + 1 :]"),
    wrong("returned", "cache-past-window", "if past is not None and past[0][0].size(2) >= self.cfg[\"context_length\"]:", "if False:", "self.wpe[start : start + ids.size(1)]", "self.wpe[torch.arange(start, start + ids.size(1)).clamp(max=self.cfg[\"context_length\"] - 1)]"),
    wrong("returned", "cache-past-window", "if past is not None and past[0][0].size(2) >= self.cfg[\"context_length\"]:", "if False:", "self.wpe[start : start + ids.size(1)]", "self.wpe[torch.arange(start, start + ids.size(1)) % self.cfg[\"context_length\"]]"),
    wrong("returned", "prompt-cut-wrong-side", "step_input = input_ids[:, -self.cfg[\"context_length\"] :]\n        finished", "step_input = input_ids[:, : self.cfg[\"context_length\"]]\n        finished"),
    # The choice of the token.
    wrong("book", "greedy-samples", "idx_next = torch.argmax(probas, dim=-1, keepdim=True)", "idx_next = torch.multinomial(probas, 1)"),
    wrong("book", "greedy-samples", "            idx_next = torch.argmax(logits, dim=-1, keepdim=True)", "            idx_next = torch.multinomial(torch.softmax(logits, -1), 1)"),
    wrong("returned", "greedy-samples", "next_id = logits.argmax(-1, keepdim=True)", "next_id = torch.multinomial(logits.softmax(-1), 1)"),
    wrong("book", "wrong-row", "        logits = logits[:, -1, :]\n        probas", "        logits = logits[:, 0, :]\n        probas"),
    wrong("book", "wrong-row", "        logits = logits[:, -1, :]\n        probas", "        logits = logits[:, -2, :]\n        probas"),
    # Sampling.
    wrong("book", "temperature-after-softmax", "logits = logits / temperature\n            probs = torch.softmax(logits, dim=-1)", "probs = torch.softmax(logits, dim=-1) / temperature"),
    wrong("nano", "temperature-multiplied", "logits[:, -1, :] / temperature", "logits[:, -1, :] * temperature"),
    wrong("returned", "temperature-ignored", "logits = logits / temperature", "pass"),
    wrong("nano", "top-k-sorted-indices", "                logits[logits < v[:, [-1]]] = -float(\"Inf\")\n", "                logits = v\n"),
    wrong("nano", "top-k-off-by-one", "logits < v[:, [-1]]", "logits <= v[:, [-1]]"),
    wrong("nano", "top-k-off-by-one", "min(top_k, logits", "min(top_k + 1, logits"),
    wrong("nano", "top-k-of-first-row", "logits < v[:, [-1]]", "logits < v[0, -1]"),
    wrong("nano", "top-k-zeros", "= -float(\"Inf\")", "= 0.0"),
    wrong("nano", "softmax-twice", "logits = logits[:, -1, :] / temperature", "logits = (logits[:, -1, :] / temperature).softmax(-1)"),
    wrong("book", "top-k-sorted-indices", "top_logits, _ = torch.topk(logits, top_k)\n            min_val = top_logits[:, -1]\n            logits = torch.where(logits < min_val, torch.tensor(float(\"-inf\")).to(logits.device), logits)", "logits, order = torch.topk(logits, top_k)"),
    wrong("returned", "top-p-off-by-one", "remove[:, 1:] = remove[:, :-1].clone()\n", "pass\n"),
    wrong("returned", "top-p-sorted-indices", "remove.scatter(1, sorted_idx, remove)", "remove"),
    wrong("slots", "top-p-sorted-indices", "int(order[torch.multinomial(sorted_probs, 1)])", "int(torch.multinomial(sorted_probs, 1))"),
    wrong("slots", "top-p-off-by-one", "before = sorted_probs.cumsum(0) - sorted_probs", "before = sorted_probs.cumsum(0)"),
    wrong("fast", "top-k-off-by-one", "min(top_k, ", "min(top_k - 1, "),
    wrong("fast", "temperature-multiplied", "logits / max(", "logits * max("),
    wrong("slots", "top-p-keeps-tail", "sorted_probs[before >= nucleus] = 0", "sorted_probs[before < nucleus] = 0"),
    wrong("book", "wrong-row", "        logits = logits[:, -1, :]\n", "        logits = logits[:, 0, :]\n"),
    # Ends.
    wrong("returned", "rows-end-together", "finished.all()", "finished.any()"),
    wrong("returned", "row-continues-after-end", "next_id = next_id.masked_fill(finished[:, None], pad_token_id)", "pass"),
    wrong("returned", "end-id-0-ignored", "if eos_token_id is not None", "if eos_token_id"),
    wrong("book", "end-ignored", "if idx_next == eos_id:", "if idx_next is eos_id:"),
    wrong("book", "end-token-lost", "            break\n", "            idx = idx[:, :-1]\n            break\n"),
    wrong("book", "end-token-of-prompt-counted", "if idx_next == eos_id:", "if idx_next == eos_id or (eos_id is not None and (idx == eos_id).any()):"),
    wrong("slots", "end-counted-late", "            if token == stop:\n                break\n", "            if stop is not None and stop in out[len(prompt) : -1]:\n                break\n"),
    wrong("book", "wrong-number-of-tokens", "    for _ in range(max_new_tokens):\n        idx_cond = idx[:, -context_size:]\n        with torch.no_grad():\n            logits = model(idx_cond)\n        logits = logits[:, -1, :]\n        probas", "    for _ in range(max_new_tokens - 1):\n        idx_cond = idx[:, -context_size:]\n        with torch.no_grad():\n            logits = model(idx_cond)\n        logits = logits[:, -1, :]\n        probas"),
    # Batches and padding.
    wrong("returned", "padding-on-wrong-side", "[pad_id] * (longest - len(p)) + list(p)", "list(p) + [pad_id] * (longest - len(p))", "[0] * (longest - len(p)) + [1] * len(p)", "[1] * len(p) + [0] * (longest - len(p))"),
    wrong("returned", "padding-seen", "model.generate(ids, attention_mask=mask, ", "model.generate(ids, "),
    wrong("returned", "positions-count-padding", "            where = self.wpe[pos]\n", "            where = self.wpe[start : start + ids.size(1)]\n"),
    wrong("nano", "first-row-for-all", "idx_next = torch.multinomial(probs, num_samples=1)", "idx_next = torch.multinomial(probs[:1], num_samples=1).expand(idx.size(0), 1)"),
    # Beams.
    wrong("returned", "cache-not-reordered", "past = [(k[parent], v[parent]) for k, v in past]\n        seqs", "seqs"),
    wrong("returned", "cache-not-reordered", "past = [(k[parent], v[parent])", "past = [(k[parent.sort().values], v[parent.sort().values])"),
    wrong("beams", "worst-beams-kept", ", reverse=True)", ")"),
    wrong("beams", "beam-score-not-accumulated", "score + value", "value"),
    wrong("beams", "beam-score-sums-probabilities", "torch.log_softmax(", "torch.softmax("),
    wrong("beams", "beam-score-sums-logits", "torch.log_softmax(model(seq)[0, -1], dim=-1)", "model(seq)[0, -1]"),
    wrong("beams", "beam-score-divided-each-step", "score + value", "(score + value) / (n + 1)"),
    wrong("beams", "beams-ignored", "for score, seq in beams:", "for score, seq in beams[:1]:"),
    wrong("beams", "worst-beam-returned", "beams[0][1]", "beams[-1][1]"),
    wrong("beams", "beams-not-compared", ".topk(num_beams)", ".topk(1 if n else num_beams)"),
    wrong("returned", "beam-score-not-accumulated", "scores[:, None] + logits[:, -1].log_softmax(-1)", "logits[:, -1].log_softmax(-1)"),
    wrong("returned", "beam-sequences-not-reordered", "[seqs[parent], token[:, None]]", "[seqs, token[:, None]]"),
    wrong("returned", "worst-beam-returned", "return seqs[:1]", "return seqs[-1:]"),
    wrong("beams", "beams-differ", "score + value", "0.2 * score + value"),
    # It fails with a cache.
    wrong("returned", "fails", "[total - t :, :total]", "[total - t :, : total - (past is not None)]"),
    # Modes.
    wrong("layers", "dropout-on", "    model.eval()\n", "    model.train()\n"),
]  # fmt: skip

HEALTHY = [
    *(right(style) for style in CLASSES),
    right("book", "        if idx_next == eos_id:\n            break\n        idx = torch.cat((idx, idx_next), dim=1)", "        idx = torch.cat((idx, idx_next), dim=1)\n        if idx_next == eos_id:\n            break"),
    right("book", "if temperature > 0.0:\n            logits = logits / temperature\n", "if temperature > 0.0:\n            logits = logits.div(temperature)\n            logits = logits - logits.max(dim=-1, keepdim=True).values\n"),
    right("book", "probs = torch.softmax(logits, dim=-1)", "probs = torch.softmax(logits.float(), dim=-1)"),
    right("nano", "probs = F.softmax(logits, dim=-1)\n            idx_next = torch.multinomial(probs, num_samples=1)", "idx_next = torch.distributions.Categorical(logits=logits).sample()[:, None]"),
    right("nano", "logits[logits < v[:, [-1]]] = -float(\"Inf\")\n            probs = F.softmax(logits, dim=-1)\n            idx_next = torch.multinomial(probs, num_samples=1)", "logits[logits < v[:, [-1]]] = -float(\"Inf\")\n            gumbel = -torch.log(-torch.log(torch.rand_like(logits)))\n            idx_next = (logits + gumbel).argmax(-1, keepdim=True)"),
    right("nano", "v, _ = torch.topk(logits, min(top_k, logits.size(-1)))\n                logits[logits < v[:, [-1]]] = -float(\"Inf\")\n            probs = F.softmax(logits, dim=-1)\n            idx_next = torch.multinomial(probs, num_samples=1)", "v, ix = torch.topk(logits, min(top_k, logits.size(-1)))\n                idx_next = ix.gather(-1, torch.multinomial(v.softmax(-1), 1))\n            else:\n                idx_next = torch.multinomial(F.softmax(logits, dim=-1), 1)"),
    right("nano", "idx = torch.cat((idx, idx_next), dim=1)\n        return idx", "idx = torch.cat((idx, idx_next), dim=1)\n        return idx[:, -max_new_tokens:]"),
    right("layers", "        if use_cache:\n            model.reset_kv_cache()\n            logits = model(idx[:, -ctx_len:], use_cache=True)", "        if use_cache:\n            model.reset_kv_cache()\n            for t in range(idx.shape[1]):\n                logits = model(idx[:, t : t + 1], use_cache=True)"),
    right("layers", "                logits = model(next_idx, use_cache=True)", "                if idx.shape[1] > ctx_len:\n                    model.reset_kv_cache()\n                    logits = model(idx[:, -ctx_len:], use_cache=True)\n                else:\n                    logits = model(next_idx, use_cache=True)"),
    right("layers", "                next_idx = logits[:, -1].argmax(dim=-1, keepdim=True)\n                idx = torch.cat([idx, next_idx], dim=1)\n                logits = model(next_idx, use_cache=True)", "                next_idx = logits[:, -1].argmax(dim=-1, keepdim=True)\n                idx = torch.cat([idx, next_idx], dim=1)\n                if idx.shape[1] >= ctx_len:\n                    break\n                logits = model(next_idx, use_cache=True)"),
    right("returned", "top_k=0,", "top_k=50,", "top_p=1.0", "top_p=0.9"),
    right("returned", "pad_token_id=0", "pad_token_id=None", "next_id.masked_fill(finished[:, None], pad_token_id)", "next_id.masked_fill(finished[:, None], eos_token_id if pad_token_id is None else pad_token_id)"),
    right("returned", "                logits = logits / temperature\n", "", "next_id = torch.multinomial(logits.softmax(-1), 1)", "next_id = torch.multinomial((logits / temperature).softmax(-1), 1)"),
    right("returned", "past[0][0].size(2) >= self.cfg[\"context_length\"]:", "past[0][0].size(2) + 1 > self.cfg[\"context_length\"]:"),
    right("slots", "pending = out[-self.max_len // 2 :]", "pending = out[-self.max_len :]"),
    right("slots", "        return out\n", "        return out[len(prompt) :]\n"),
    right("fast", "    q = torch.empty_like(probs).exponential_(1)\n    return torch.argmax(probs / q, dim=-1, keepdim=True)", "    return torch.multinomial(probs, 1)"),
    right("fast", "logits / max(temperature, 1e-5)", "logits * (1 / max(temperature, 1e-5))"),
]  # fmt: skip

# Beam searches in other conventions, and what is not known to be one.
_PICKED = "return beams[0][1]"
HEALTHY += [
    right("beams", _PICKED, "return max(beams, key=lambda beam: beam[0] / beam[1].shape[1])[1]"),
    right(
        "beams", _PICKED, "return max(beams, key=lambda beam: beam[0] / (beam[1].shape[1] - ids.shape[1]) ** 0.7)[1]"
    ),
    right("beams", _PICKED, "return [seq[0].tolist() for _, seq in beams]"),
    right("beams", _PICKED, "return [(score, seq) for score, seq in beams]"),
    right("beams", _PICKED, "return beams[0][1][:, ids.shape[1] :]"),
    right("beams", "[(0.0, ids)]", "[(1.0, ids)]", "log_softmax(", "softmax(", "score + value", "score * value"),
    right("beams", ".topk(num_beams)", ".sort(descending=True)"),
    right("beams", "log_probs.topk(num_beams)", "log_probs.float().topk(2 * num_beams)"),
    right(
        "beams",
        "values, tokens = log_probs.topk(num_beams)",
        "tokens = torch.multinomial(log_probs.exp(), num_beams); values = log_probs[tokens]",
    ),
    right("beams", "beam_search", "diverse_beam_search", "score + value", "score + value - 2.0 * len(grown)"),
    right(
        "beams",
        "num_beams=3,",
        "num_beams=3, diversity=2.0,",
        "score + value",
        "score + value - diversity * len(grown)",
    ),
]

# What is known of these is that they are wrong: their draws are counted, or the batch is asked.
SABOTAGES += [
    wrong("nano", "softmax-over-batch", "probs = F.softmax(logits, dim=-1)", "probs = F.softmax(logits, dim=0)"),
    wrong("book", "softmax-over-batch", "probas = torch.softmax(logits, dim=-1)", "probas = torch.softmax(logits, dim=0)"),
    wrong("nano", "window-too-short", "idx[:, -self.config.block_size :]", "idx[:, -self.config.block_size + 1 :]"),
    wrong("nano", "top-k-of-first-row", "logits < v[:, [-1]]", "logits < v.min()"),
    wrong("fast", "softmax-twice", "return F.softmax(logits, dim=-1)", "return F.softmax(F.softmax(logits, dim=-1), dim=-1)"),
    wrong("fast", "draws-differ", "probs / q", "probs * q"),
    wrong("fast", "draws-differ", ".exponential_(1)", ".uniform_()"),
    wrong("returned", "top-p-off-by-one", "cum = sorted_logits.softmax(-1).cumsum(-1)", "cum = 1 - sorted_logits.softmax(-1).flip(-1).cumsum(-1).flip(-1) + 1e-3"),
    wrong("book", "end-token-of-prompt-counted", "        idx_cond = idx[:, -context_size:]\n        with torch.no_grad():\n            logits = model(idx_cond)\n        logits = logits[:, -1, :]\n        if", "        if eos_id is not None and (idx[:, -1:] == eos_id).all():\n            break\n        idx_cond = idx[:, -context_size:]\n        with torch.no_grad():\n            logits = model(idx_cond)\n        logits = logits[:, -1, :]\n        if", "        if idx_next == eos_id:\n            break\n", ""),
    wrong("min", "dropout-on", "    model.eval()\n", "    model.train()\n"),
    wrong("returned", "cache-ignored", "logits, past = self(step_input, past, attention_mask, use_cache=True)", "logits, past = self(step_input, None, None, use_cache=True)"),
]  # fmt: skip
_DRAW = "idx_next = torch.multinomial(probs, num_samples=1)"
HEALTHY += [
    right("nano", _DRAW, "idx_next = (probs.cumsum(-1) < torch.rand(probs.size(0), 1)).sum(-1, keepdim=True)"),
    right("nano", _DRAW, "import numpy as np; idx_next = torch.tensor([[np.random.choice(len(p), p=p)] for p in (probs / probs.sum(-1, keepdim=True)).numpy()])"),
    right("slots", "            logits = self(torch.tensor([pending]), cache)[0, -1].detach()", "            for n in range(0, len(pending), 5):\n                logits = self(torch.tensor([pending[n : n + 5]]), cache)[0, -1].detach()"),
]  # fmt: skip

# Candidates with a cache and no generation: the same layers without the functions.
_NO_FUNCTION = ("def generate_text_simple_cached(", "def _unused(")
_NO_METHODS = ("    @torch.inference_mode()\n    def generate(", "    def _unused(", "def beam_search(", "def _beams(", "def generate_batch(", "def _batch(")  # fmt: skip
SABOTAGES += [
    wrong("layers", "positions-ignore-cache", *_NO_FUNCTION, "torch.arange(self.current_pos, self.current_pos + seq_len, ", "torch.arange(0, seq_len, "),
    wrong("layers", "cache-not-reset", *_NO_FUNCTION, "            blk.att.reset_cache()\n        self.current_pos = 0", "            blk.att.reset_cache()"),
    wrong("returned", "mask-not-moved", *_NO_METHODS, "[total - t :, :total]", "[:t, :total]"),
    wrong("returned", "future-leak", *_NO_METHODS, "scores.masked_fill(~keep, -1e9)", "scores if past is None and hidden is None and self.training is False and FLAG else scores.masked_fill(~keep, -1e9)", "presents = []", "presents = []; global FLAG; FLAG = use_cache"),
]  # fmt: skip
HEALTHY += [
    right("layers", *_NO_FUNCTION),
    right("returned", *_NO_METHODS),
    # What empties the cache has another name, or one that does not say it.
    right("layers", *_NO_FUNCTION, "reset_kv_cache", "clear"),
    right("layers", *_NO_FUNCTION, "reset_kv_cache", "begin"),
]
SABOTAGES += [
    # Its steps are of two tokens, and yet with a cache.
    wrong("layers", "wrong-tokens-fed", "logits = model(next_idx, use_cache=True)", "logits = model(idx[:, -2:], use_cache=True)", "reset_kv_cache", "begin"),
]  # fmt: skip

# A forward pass that is told where to start: in its cache, or, as of one without, among its positions.
_ALONE = ("def generate(", "def _unused(", "def sample_top_p(", "def _unused_top_p(")
SABOTAGES += [
    wrong("llama", "wrong-row", "torch.argmax(logits[:, -1], dim=-1)", "torch.argmax(logits[:, 0], dim=-1)"),
    wrong("llama", "top-p-ascending", "torch.sort(probs, dim=-1, descending=True)", "torch.sort(probs, dim=-1)"),
    wrong("llama", "positions-off-by-one", *_ALONE, "torch.arange(s, s + t)", "torch.arange(t) + max(s - 1, 0)"),
]
HEALTHY += [
    right("llama", *_ALONE),
    right("min", "def forward(self, idx, targets=None):", "def forward(self, idx, start=0):", "self.pos_emb[:, :t, :]", "self.pos_emb[:, start : start + t, :]"),
]  # fmt: skip

# Beams whose number is no parameter, one after the other and as rows; and what becomes of beams that end.
_ALWAYS = ("num_beams=3, eos_id=None):\n", "eos_id=None):\n    num_beams = 4\n")
_ENDED = "            if n and eos_id is not None and seq[0, -1] == eos_id:\n                grown.append((score, seq))\n                continue\n"
_SORTED = "beams = sorted(grown, key=lambda beam: beam[0], reverse=True)[:num_beams]"
_ASIDE = (
    _ENDED, "",
    "    beams = [(0.0, ids)]\n", "    beams, done = [(0.0, ids)], []\n",
    _PICKED, "return max([*done, *beams] if len(done) < num_beams else done, key=lambda beam: beam[0] / (beam[1].shape[1] - ids.shape[1]))[1]",
)  # fmt: skip
_TAKEN = "done += [beam for beam in beams if beam[1][0, -1] == eos_id]"
HEALTHY += [
    right("beams", *_ALWAYS),
    right("beams", _SORTED, _SORTED + "\n        if eos_id is not None and all(seq[0, -1] == eos_id for _, seq in beams):\n            break"),
    right("beams", *_ASIDE, _SORTED, f"{_SORTED}\n        {_TAKEN}\n        beams = [beam for beam in beams if beam[1][0, -1] != eos_id]\n        if not beams:\n            break"),
]  # fmt: skip
SABOTAGES += [
    wrong("beams", "worst-beams-kept", *_ALWAYS, ", reverse=True)", ")"),
    wrong("beams", "beam-score-sums-logits", *_ALWAYS, "torch.log_softmax(model(seq)[0, -1], dim=-1)", "model(seq)[0, -1]"),
    wrong("beams", "end-ignored", _ENDED, ""),
    wrong("beams", "ended-beams-dropped", ".topk(num_beams)", ".topk(2 * num_beams)", _SORTED, _SORTED.replace("sorted(grown", "sorted([one for one in grown if int(one[1][0, -1]) != eos_id]")),
    wrong("layers", "logits-not-finite", "attn_scores.masked_fill_(mask_bool, ", "attn_scores.masked_fill_(torch.ones_like(mask_bool), "),
    wrong("beams", "ended-beams-go-on", *_ASIDE, _SORTED, f"{_SORTED}\n        {_TAKEN}"),
]  # fmt: skip
SABOTAGES.append(
    wrong(
        "returned",
        "cache-not-extended",
        *_NO_METHODS,
        "            presents.append(present)",
        "            presents.append(present if past_key_values is None else past_key_values[n])",
    )
)
