"""The ways to generate of the support table, with their settings."""

import torch
from pairs import VOCAB
from transformers import LogitsProcessor, WatermarkingConfig


class OnlyEvenTokens(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores


ROWS = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "sampling with temperature, top-k and top-p": {"do_sample": True, "temperature": 0.7, "top_k": 30, "top_p": 0.9},
    "sampling with min-p and typical-p": {"do_sample": True, "min_p": 0.02, "typical_p": 0.9},
    "beam search": {"num_beams": 4},
    "beam search, several sequences": {"num_beams": 4, "num_return_sequences": 3},
    "beam search, early stopping and length penalty": {"num_beams": 3, "early_stopping": True, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 3, "do_sample": True, "temperature": 1.3},
    "repetition penalty": {"repetition_penalty": 1.8},
    "repetition penalty on the prompt": {"encoder_repetition_penalty": 1.5},
    "sampling with epsilon and eta cut-offs": {"do_sample": True, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
    "beam search, renormalized": {"num_beams": 3, "renormalize_logits": True, "remove_invalid_values": True},
    "sequence bias": {"sequence_bias": [[[5, 6], 2.0], [[7], -3.0]]},
    "growing length penalty": {"exponential_decay_length_penalty": (3, 1.5)},
    "no repeated bigrams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[5], [17], [3, 4]]},
    "suppressed tokens": {"suppress_tokens": list(range(0, VOCAB, 2)), "begin_suppress_tokens": [1, 3]},
    "forced end": {"forced_eos_token_id": 9},
    "minimum length": {"min_new_tokens": 10, "eos_token_id": list(range(100))},
    "stop at any of several tokens": {"eos_token_id": list(range(60))},
    "classifier-free guidance": {"guidance_scale": 1.5},
    "own logits processor": {"logits_processor": [OnlyEvenTokens()]},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "static cache": {"cache_implementation": "static"},
    "offloaded cache": {"cache_implementation": "offloaded"},
    "offloaded static cache": {"cache_implementation": "offloaded_static"},
    "no cache": {"use_cache": False},
    "prefill in chunks": {"prefill_chunk_size": 4},
}
