"""The book's `generate` as a reader might write it, with two mistakes: `[:, :context_size]` and `<=`."""

import torch


def generate(model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None, eos_id=None):
    for _ in range(max_new_tokens):
        idx_cond = idx[:, :context_size]  # a mistake: the first tokens, not the last
        with torch.no_grad():
            logits = model(idx_cond)[:, -1, :]
        if top_k is not None:
            least = torch.topk(logits, top_k).values[:, -1:]
            logits = logits.masked_fill(logits <= least, -torch.inf)  # a mistake: the k-th is left out, too
        if temperature > 0.0:
            idx_next = torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1)
        else:
            idx_next = torch.argmax(logits, dim=-1, keepdim=True)
        if idx_next == eos_id:
            break
        idx = torch.cat((idx, idx_next), dim=1)
    return idx
