"""Memory and time of a streamed conversion: python benchmarks/convert.py --preset 124M

Time is against copying the same bytes on the same disk, both until fsync; the two take turns. Memory is the peak of a
process that converts, less that of one that only imports.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import GPT2LMHeadModel

from hf_gpt_scratch import GPTScratchConfig
from hf_gpt_scratch.checkpoint import Checkpoint, Progress, write_safetensors

# The peak is read from /proc: `ru_maxrss` of a child begins with that of its parent.
CHILD = """
import json, re, sys, time, warnings
warnings.simplefilter("ignore")
from hf_gpt_scratch.conversion import gpt2_to_scratch
begin, cpu = time.perf_counter(), time.process_time()
if sys.argv[1:]:
    gpt2_to_scratch(sys.argv[1], sys.argv[2], check=json.loads(sys.argv[3]))
figures = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
[peak] = re.findall(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print(json.dumps({**figures, "peak": int(peak) * 1024}))
"""


def write_source(directory: Path, preset: str) -> None:
    """An official checkpoint with random weights, in float32."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPTScratchConfig.preset(preset).to_gpt2())
    model.save_pretrained(directory, state_dict={})
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    specs = {name: (shape, torch.float32) for name, shape in shapes.items()}
    write_safetensors(directory / "model.safetensors", specs, lambda name: torch.randn(shapes[name]), Progress())


def run_child(*arguments: object) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def copy(source: Path, target: Path) -> float:
    begin = time.perf_counter()
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 22)
        writer.flush()
        os.fsync(writer.fileno())
    return time.perf_counter() - begin


def main(
    preset: Annotated[str, typer.Option(help="124M, 355M, 774M or 1558M.")] = "124M",
    runs: Annotated[int, typer.Option(help="Of each; the medians count.")] = 5,
    weights: Annotated[bool, typer.Option(help='Convert with check="weights" instead of check=False.')] = False,
    directory: Annotated[Path | None, typer.Option(help="A place on the disk to measure.")] = None,
) -> None:
    """Measures a streamed conversion against copying the same bytes."""
    errors = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=directory) as place:
        source, target, copied = (Path(place) / name for name in ("source", "target", "copied"))
        errors.print(f"Writing {preset}")
        write_source(source, preset)
        sizes = [spec.nbytes for spec in Checkpoint(source).specs.values()]
        bare = run_child()["peak"]
        converted, copies = [], []
        for run in range(runs):
            copies.append(copy(source / "model.safetensors", copied))
            copied.unlink()
            converted.append(run_child(source, target, json.dumps("weights" if weights else False)))
            errors.print(
                f"Run {run + 1} of {runs}: copied {copies[-1]:.2f} s, converted {converted[-1]['seconds']:.2f} s"
            )
            shutil.rmtree(target)
    seconds = statistics.median(figures["seconds"] for figures in converted)
    peak = max(figures["peak"] for figures in converted) - bare
    result = {
        "preset": preset,
        "check": "weights" if weights else False,
        "runs": runs,
        "weights_MB": sum(sizes) / 1e6,
        "largest_tensor_MB": max(sizes) / 1e6,
        "peak_MB": peak / 1e6,
        "peak_in_largest_tensors": peak / max(sizes),
        "convert_s": seconds,
        "copy_s": statistics.median(copies),
        "convert_cpu_s": statistics.median(figures["cpu"] for figures in converted),
        "ratio": seconds / statistics.median(copies),
        "all_convert_s": [figures["seconds"] for figures in converted],
        "all_copy_s": copies,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result, indent=2))
    print(
        "\n| preset | weights | largest tensor | peak memory | ÷ largest | conversion | copy | ratio |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        f"| {preset} | {sum(sizes) / 1e6:.0f} MB | {max(sizes) / 1e6:.0f} MB | {peak / 1e6:.0f} MB | "
        f"{peak / max(sizes):.2f} | {seconds:.2f} s | {result['copy_s']:.2f} s | {result['ratio']:.2f} |"
    )


if __name__ == "__main__":
    typer.run(main)
