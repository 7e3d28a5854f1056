# /// script
# dependencies = ["torch==2.13.0", "transformer-lens==4.3.0", "transformers==5.24.0"]
# ///
"""TransformerLens: its bridge to both directories, with all activations, weights and hooks compared."""

import tempfile
from pathlib import Path

import torch
from checkpoints import PROMPTS, checkpoints, official_ids, row
from transformer_lens.model_bridge import TransformerBridge

import hf_gpt_scratch  # noqa: F401  # registers with TransformerLens

WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "b_Q", "b_K", "b_V", "b_O", "b_in", "b_out")
WEIGHTS += ("W_E", "W_U", "W_pos")
# Hooks that halve what they see; the results' one needs its switch.
HOOKS = ("attn.hook_q", "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "attn.hook_result")
HOOKS += ("ln1.hook_normalized", "mlp.hook_post", "hook_resid_post")


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    same = found.shape == expected.shape and torch.equal(found.isfinite(), expected.isfinite())
    return same and torch.allclose(found[found.isfinite()], expected[expected.isfinite()], rtol=1e-4, atol=1e-5)


def compared(what: str, ours, official, ids: torch.Tensor) -> None:
    with torch.no_grad():
        logits, cache = ours.run_with_cache(ids)
        expected, official_cache = official.run_with_cache(ids)
    same = cache.keys() == official_cache.keys() and all(close(cache[name], official_cache[name]) for name in cache)
    row(f"logits and all {len(cache)} activations, {what}", close(logits, expected) and same)
    row(f"all weights, {what}", all(close(getattr(ours, name), getattr(official, name)) for name in WEIGHTS))
    equal = []
    for one in (ours, official):
        one.set_use_attn_result(True)
    for hook in HOOKS:
        options = dict(fwd_hooks=[(f"blocks.1.{hook}", lambda tensor, hook: tensor / 2)])
        with torch.no_grad():
            found, changed = (one.run_with_hooks(ids, **options) for one in (ours, official))
        equal.append(close(found, changed) and not close(changed, expected))
    row(f"logits under hooks that change queries, scores, patterns, results, {what}", all(equal))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for tied in (True, False):
            kind = "tied" if tied else "untied"
            directories = checkpoints(Path(folder), tied)
            official, ours = (TransformerBridge.boot_transformers(str(one), device="cpu") for one in directories)
            ids = torch.tensor([PROMPTS[1]])
            compared(kind, ours, official, ids)
            found = ours.generate(ids, max_new_tokens=20, do_sample=False, stop_at_eos=False, verbose=False)
            expected = official_ids(directories[0], PROMPTS[1:2])[0][:20]
            row(f"generated ids as by transformers, {kind}", found[0, ids.shape[1] :].tolist() == expected)
            for one in (ours, official):
                one.enable_compatibility_mode()
            compared(f"{kind}, in compatibility mode", ours, official, ids)


if __name__ == "__main__":
    main()
