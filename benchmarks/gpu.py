"""Decoding, prefill and training on an NVIDIA GPU: python benchmarks/gpu.py

Decoding is greedy `.generate()` in bf16: a growing cache, a static one, and a static one with the step compiled into
CUDA graphs (`torch.compile(mode="reduce-overhead")`). Its floor is the bytes of the weights and of the cached keys and
values, divided by the bandwidth of a sum or a copy of gigabytes in the same run. Training has nanoGPT's settings: bf16
autocast, fused AdamW, flash attention through sdpa, compiled, clipped gradients, no dropout, 12 sequences of 1024.
Prefill computes the last logits of a batch of prompts, with each kind of attention that is installed.

MFU is computed as in nanoGPT and in PaLM's appendix B, relative to the GPU's datasheet or --peak-tflops, and to what
the product of two large bf16 matrices reaches in the same run. Each table is written when it is done; --quick tests all
of them on a tiny model, also without a GPU, where the exit status is otherwise 2. It is 3 unless ours is as close to
float32 as transformers' GPT-2 (FLOAT64_RATIO, FP32_LOSS) and nothing is compiled after the first calls.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import harness
import torch
import typer
from engines import Transformers, load
from harness import Checkpoint, Only, Output, Quick, Report, Rounds, Size, Timed, timed
from training import dropout_rates
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

from hf_gpt_scratch import GPTScratchForCausalLM
from hf_gpt_scratch.weights.parity import FLOAT64_RATIO, FP32_LOSS, rms_error

# FLOP/s of dense bf16 products in the datasheets; the first name that the GPU's name contains is used.
PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
BFLOAT16 = dict(dtype=torch.bfloat16)
STATIC, GRAPHS = dict(static=True), dict(static=True, compiled=True, mode="reduce-overhead")
DECODE: dict[str, Callable[..., Any]] = {
    f"{name}, bf16{cache}": partial(Transformers, model_class, **BFLOAT16, **options)
    for name, model_class in (("transformers GPT-2", GPT2LMHeadModel), ("ours", GPTScratchForCausalLM))
    for cache, options in (("", {}), (", static cache", STATIC), (", compiled into CUDA graphs", GRAPHS))
}

ATTENTION = {"flex_attention": is_torch_flex_attn_available, "flash_attention_2": is_flash_attn_2_available}
PREFILL: dict[str, Callable[..., Any]] = {
    f"{name}, bf16{how}": partial(Transformers, model_class, **BFLOAT16, **options)
    for name, model_class in (("transformers GPT-2", GPT2LMHeadModel), ("ours", GPTScratchForCausalLM))
    for how, options in (("", {}), (", compiled", dict(compiled=True)))
}
PREFILL |= {
    f"ours, bf16, {kind}": partial(Transformers, GPTScratchForCausalLM, attn_implementation=kind, **BFLOAT16)
    for kind, is_there in ATTENTION.items()  # transformers' GPT-2 has no flex attention
    if torch.cuda.is_available() and is_there()
}


class Step:
    """A model with nanoGPT's training settings; a call trains one step."""

    def __init__(self, model_class, checkpoint, ids, compiled=False):
        rates = dropout_rates(model_class, 0.0)
        self.model = model_class.from_pretrained(checkpoint, attn_implementation="sdpa", **rates).to(ids.device)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.ids = ids  # (B, T)

    @torch.no_grad()
    def loss(self) -> float:
        """The loss of one sequence, in float32."""
        return self.model.eval()(self.ids[:1], labels=self.ids[:1], use_cache=False).loss.item()

    def __call__(self) -> None:
        self.model.train()
        with torch.autocast(self.ids.device.type, torch.bfloat16):
            loss = self.forward(self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


TRAIN: dict[str, Callable[..., Any]] = {
    f"{name}{how}": partial(Step, model_class, compiled=compiled)
    for name, model_class in (("transformers GPT-2", GPT2LMHeadModel), ("ours", GPTScratchForCausalLM))
    for how, compiled in (("", False), (", compiled", True))
}


def finish() -> None:
    """Waits until the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def finished(function: Callable[[], Any]) -> Timed:
    """Times a call until the GPU has finished it."""

    def both():
        output = function()
        finish()
        return output

    finish()
    return timed(both)


def interleaved(rows: dict[str, Callable[[], Any]], rounds: int) -> dict[str, harness.Measured]:
    """`harness.interleaved`, after one call of each row that compiles, and one that records its CUDA graphs."""
    calls = {name: partial(finished, function) for name, function in rows.items()}
    warm_up, measured = harness.interleaved(calls, 1), harness.interleaved(calls, rounds)
    for name, row in measured.items():
        row.first = warm_up[name].first
    return measured


def peak_memory(device: str, function: Callable[[], Any]) -> int | None:
    """The peak of GPU memory in a call, in megabytes, beyond what was allocated before (the weights were)."""
    if device != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - before) // 10**6


def bandwidth(device: str, size: int) -> float:
    """Bytes per second of a sum, which reads, or a copy, which reads and writes: the faster of the two, best of 10."""
    numbers = torch.ones(size // 4, device=device)
    target = torch.empty_like(numbers)
    ways = ((size, numbers.sum), (2 * size, partial(target.copy_, numbers)))
    return max(moved / min(finished(way).seconds for _ in range(10)) for moved, way in ways)


def matmul_rate(device: str, n: int) -> float:
    """FLOP/s of the product of two (n, n) bf16 matrices, best of 10."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / min(finished(partial(torch.mm, a, b)).seconds for _ in range(10))


def datasheet(gpu: str) -> float | None:
    """The peak FLOP/s of the GPU with that name; None if it is not listed."""
    return next((peak for name, peak in PEAKS.items() if name in gpu), None)


def flops_a_token(config: GPT2Config, parameters: int, length: int) -> int:
    """FLOPs per token of a training step, forward and backward: 6 per parameter, and 12·L·E·T for attention.

    Position embeddings do not count, since they only add; token embeddings count once, since they are the head.
    """
    multiplying = parameters - config.n_positions * config.n_embd
    return 6 * multiplying + 12 * config.n_layer * config.n_embd * length


def bytes_a_token(config: GPT2Config, parameters: int, batch: int, cached: float) -> float:
    """Bytes that a bf16 decoding step reads: all weights once, and keys and values of `cached` tokens per sequence."""
    return 2 * (parameters + batch * cached * 2 * config.n_layer * config.n_embd)


@torch.inference_mode()
def decode(report: Report, checkpoint, device: str, only: str, batch: int, prompt: int, new_tokens: int, rounds: int):
    """Adds the table of greedy generation; returns whether ours is as close to float32 as transformers' GPT-2."""
    exact = load(GPT2LMHeadModel, checkpoint).to(device=device)  # type: ignore[call-arg]  # hidden by a decorator
    config, parameters = exact.config, exact.num_parameters()
    ids = harness.random_ids(batch, prompt, config.vocab_size).to(device)
    expected = exact(ids[:1], use_cache=False).logits
    torch._dynamo.reset()
    engines = {name: DECODE[name](checkpoint, device=device) for name in harness.selected(DECODE, only)}
    measured = interleaved(
        {name: partial(engine.generate, ids, new_tokens) for name, engine in engines.items()}, rounds
    )
    reference, *_ = engines
    memory = {name: peak_memory(device, partial(engine.generate, ids, new_tokens)) for name, engine in engines.items()}
    errors = {
        name: rms_error(expected, engine.model(ids[:1], use_cache=False).logits) for name, engine in engines.items()
    }
    rate = bandwidth(device, int(4e9) if device == "cuda" else int(1e6))
    size = bytes_a_token(config, parameters, batch, prompt + new_tokens / 2)
    group, passed = f"decode, batch {batch}, {prompt}+{new_tokens} tokens", True
    for name, row in measured.items():
        same = (row.output == measured[reference].output).all(0)[prompt:].long().cumprod(0).sum().item()
        times = [taken / new_tokens for taken in row.times]
        figures = {
            "first call, s": row.first,
            "of the bandwidth": f"{size / statistics.median(times) / rate:.0%}",
            "peak memory, MB": memory[name],
            "equal ids": f"{same} of {new_tokens}",
            "error against fp32": errors[name],
            "recompilations": row.recompiled,
        }
        passed &= errors[name] <= FLOAT64_RATIO * errors[reference] and not row.recompiled
        report.add(group, name, times, name == reference, **figures)
    floor = f"floor: {size / 1e6:.0f} MB at {rate / 1e9:.0f} GB/s"
    report.rows.append(harness.Row(group, floor, [size / rate], {"of the bandwidth": "100%"}))
    load.cache_clear()
    return passed


@torch.inference_mode()
def prefill(report: Report, checkpoint, device: str, only: str, batch: int, length: int, rounds: int):
    """Adds the table of prefill; returns whether each of ours is as close to float32 as transformers' GPT-2."""
    exact = load(GPT2LMHeadModel, checkpoint).to(device=device)  # type: ignore[call-arg]  # hidden by a decorator
    ids = harness.random_ids(batch, length, exact.config.vocab_size).to(device)
    expected = exact(ids[:1], use_cache=False).logits
    torch._dynamo.reset()
    engines = {name: PREFILL[name](checkpoint, device=device) for name in harness.selected(PREFILL, only)}
    measured = interleaved({name: partial(engine.prefill, ids) for name, engine in engines.items()}, rounds)
    reference, *_ = engines
    group, passed, errors = f"prefill, batch {batch}×{length}", True, {}
    for name, row in measured.items():
        errors[name] = rms_error(expected, engines[name].model(ids[:1], use_cache=False).logits)
        figures = {
            "first call, s": row.first,
            "tokens a second": round(batch * length / statistics.median(row.times)),
            "error against fp32": errors[name],
            "recompilations": row.recompiled,
        }
        passed &= errors[name] <= FLOAT64_RATIO * errors[reference] and not row.recompiled
        report.add(group, name, row.times, name == reference, **figures)
    load.cache_clear()
    return passed


def train(report: Report, checkpoint, device: str, only: str, batch: int, length: int, peak: float | None, rounds: int):
    """Adds the table of training steps; returns whether ours has the loss of transformers' GPT-2."""
    config = GPT2Config.from_pretrained(checkpoint)
    ids = harness.random_ids(batch, length, config.vocab_size).to(device)
    torch._dynamo.reset()
    steps: dict[str, Step] = {}
    losses, memory = {}, {}
    for name in harness.selected(TRAIN, only):
        torch.set_float32_matmul_precision("highest")
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        steps[name] = TRAIN[name](checkpoint, ids)
        losses[name] = steps[name].loss()
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32, as in nanoGPT
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            steps[name]()
            steps[name]()
            memory[name] = torch.cuda.max_memory_allocated() - before
    measured = interleaved(dict(steps), rounds)
    torch.set_float32_matmul_precision("highest")
    product = matmul_rate(device, 8192 if device == "cuda" else 64)
    reference, *_ = steps
    work = batch * length * flops_a_token(config, steps[reference].model.num_parameters(), length)
    group, passed = f"training step, batch {batch}×{length}, products of {product / 1e12:.0f} TFLOP/s", True
    for name, row in measured.items():
        median = statistics.median(row.times)
        error = abs(losses[name] / losses[reference] - 1)
        figures = {
            "first call, s": row.first,
            "tokens a second": round(batch * length / median),
            "MFU": f"{work / median / peak:.1%}" if peak else None,
            "of a product's FLOP/s": f"{work / median / product:.1%}",
            "peak memory, MB": memory[name] // 10**6 if memory else None,
            "relative error of the loss": error,
            "recompilations": row.recompiled,
        }
        passed &= error <= FP32_LOSS and not row.recompiled
        report.add(group, name, row.times, name == reference, **figures)
    return passed


def main(
    size: Size = "124M",
    checkpoint: Checkpoint = None,
    batch: Annotated[int, typer.Option(help="Sequences per training step.")] = 12,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 1024,
    batches: Annotated[str, typer.Option(help="Prompts decoded at once; one table for each number.")] = "1,64",
    prompt: Annotated[int, typer.Option(help="Tokens of each.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Generated for each.")] = 128,
    prompts: Annotated[int, typer.Option(help="Prompts of --length tokens in the table of prefill.")] = 16,
    rounds: Rounds = 5,
    only: Only = "",
    peak_tflops: Annotated[float, typer.Option(help="Of dense bf16 on this GPU; 0: from its datasheet.")] = 0,
    output: Output = harness.RESULTS,
    quick: Quick = False,
) -> None:
    """bf16 decoding with CUDA graphs, and training with nanoGPT's settings, on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not quick:
        typer.echo("gpu.py needs an NVIDIA GPU, and torch finds none here; --quick tests that it runs", err=True)
        sys.exit(2)
    if quick:
        size, rounds, only, batch, length, prompt, new_tokens = "tiny", 2, only or harness.QUICK, 2, 20, 5, 6
        prompts = 2
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none"
    peak = peak_tflops * 1e12 or datasheet(gpu)
    settings = {"GPU": gpu, "peak FLOP/s": peak, "model": checkpoint or size, "rounds": rounds}
    report = Report("gpu", "On a GPU", settings)
    with harness.official_checkpoint(size, checkpoint) as directory:
        tables = [
            *(partial(decode, batch=int(rows), prompt=prompt, new_tokens=new_tokens) for rows in batches.split(",")),
            partial(train, batch=batch, length=length, peak=peak),
            partial(prefill, batch=prompts, length=length),
        ]
        passed = []
        for table in tables:
            passed.append(table(report, directory, device, only, rounds=rounds))
            report.write(output)
    sys.exit(0 if all(passed) else 3)


if __name__ == "__main__":
    typer.run(main)
