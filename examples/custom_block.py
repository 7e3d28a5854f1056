"""A model with blocks of your own, here rotary positions and RMSNorm: python examples/custom_block.py

A config class with the new option, an attention, a block, and a model class that names the block: `block_class`. The
model trains, generates with a cache, and is saved with its code, so that it loads where neither this file nor
`hf_gpt_scratch` is installed. From an official checkpoint it takes the weights that still fit, and names the others.
"""

import importlib
import sys
import tempfile

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_gpt_scratch import CachedAttention, GPTScratchBlock, GPTScratchConfig, GPTScratchForCausalLM


class RotaryConfig(GPTScratchConfig):
    model_type = "gpt_rotary"
    rope_theta: float = 10000.0


def rotate(x, position_ids, theta):
    """Each pair (x_i, x_{i + D/2}) of x (B, H, T, D) turned by position · theta^(-2i/D), as in RoFormer and Llama."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device) / half)
    angles = position_ids[:, None, :, None] * frequencies  # (B, 1, T, D/2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class RotaryAttention(CachedAttention):
    def at_positions(self, heads, position_ids=None, **kwargs):  # of keys before they are cached
        return rotate(heads, position_ids, self.config.rope_theta)


class RotaryBlock(GPTScratchBlock):
    def __init__(self, config: RotaryConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.att = RotaryAttention(config, layer_idx)
        if self.att.head_dim % 2:
            raise ValueError(f"heads have the odd size {self.att.head_dim}, but their halves are rotated")
        self.norm1 = nn.RMSNorm(config.emb_dim, config.layer_norm_epsilon)
        self.norm2 = nn.RMSNorm(config.emb_dim, config.layer_norm_epsilon)


class RotaryForCausalLM(GPTScratchForCausalLM):
    config_class = RotaryConfig
    block_class = RotaryBlock

    def __init__(self, config: RotaryConfig):
        super().__init__(config)
        self.model.pos_emb = nn.Identity()  # no learned positions


AutoConfig.register("gpt_rotary", RotaryConfig, exist_ok=True)
AutoModelForCausalLM.register(RotaryConfig, RotaryForCausalLM, exist_ok=True)


def main() -> None:
    torch.manual_seed(123)
    sizes = RotaryConfig(vocab_size=64, context_length=64, emb_dim=64, n_heads=4, n_layers=2, rope_theta=1000.0)
    sizes.drop_rate, sizes.bos_token_id, sizes.eos_token_id = 0.0, None, None
    model = RotaryForCausalLM(sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(100):  # each token is the one before it plus 3
        batch = (torch.randint(64, (16, 1)) + 3 * torch.arange(32)) % 64
        loss = model.train()(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 33 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    prompt = torch.tensor([[5, 8, 11]])
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0)
    generated = model.eval().generate(prompt, **options)
    print("generated:", generated[0].tolist())
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        loaded = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        equal = torch.equal(loaded(batch).logits, model(batch).logits)
    print("the loaded model gives equal logits:", equal)
    sys.exit(0 if equal and generated[0].tolist() == list(range(5, 38, 3)) else 1)


if __name__ == "__main__":
    importlib.import_module("custom_block").main()  # a class of __main__ has no module that could be saved with it
