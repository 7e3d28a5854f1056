"""A training script with two mistakes: softmax before cross-entropy, and gradients that are never set to zero."""

import torch
from my_gpt import GPTModel

CFG = {"vocab_size": 27, "context_length": 16, "emb_dim": 32, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1}
TEXT = "i had always thought jack gisburn rather a cheap genius though a good fellow enough "

torch.manual_seed(123)
ids = torch.tensor([max(0, ord(letter) - 96) for letter in TEXT])
model = GPTModel({**CFG, "qkv_bias": False})
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
model.train()
for _ in range(100):
    starts = torch.randint(len(ids) - 16, (8,))
    inputs = torch.stack([ids[start : start + 16] for start in starts])
    targets = torch.stack([ids[start + 1 : start + 17] for start in starts])
    probas = torch.softmax(model(inputs), dim=-1)
    loss = torch.nn.functional.cross_entropy(probas.flatten(0, 1), targets.flatten())
    loss.backward()
    optimizer.step()
