"""Shared by all benchmarks: models to measure, interleaved timing, memory of child processes, reports.

A report is results/NAME.json (every single measurement), NAME.md (the table) and NAME.png.
"""

import json
import multiprocessing
import os
import pickle
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from transformers import GPT2Config, GPT2LMHeadModel, set_seed
from transformers import logging as transformers_logging

from hf_gpt_scratch import GPTScratchConfig

RESULTS = Path(__file__).parent / "results"
WORKERS = Path(__file__).parent / "workers.py"
PACKAGES = ("torch", "transformers", "hf-gpt-scratch", "torchao", "ctranslate2", "onnx", "onnxruntime", "xllamacpp")
CPU_CLOCK = "BENCHMARK_CPU_TIME"  # in the environment, for workers.py, too
REFERENCE = "transformers GPT-2, sdpa"
QUICK = "^(?!.*(?:compiled|CTranslate2.*,.*,))"  # the rows of --quick: others take seconds at any size

# The options that the scripts share.
Size = Annotated[str, typer.Option(help="124M, 355M, 774M, 1558M or tiny.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Official checkpoint to measure instead of random weights.")]
Rounds = Annotated[int, typer.Option(help="Measurements of each row, after a warm-up.")]
Threads = Annotated[int, typer.Option(help="Threads of torch and the other engines; 0: all cores, or OMP_NUM_THREADS.")]
CPUTime = Annotated[bool, typer.Option(help="CPU time of one thread, for a machine that others use.")]
Only = Annotated[str, typer.Option(help="Regular expression: the rows to measure besides the reference.")]
Quick = Annotated[bool, typer.Option(help="Tiny model, few measurements: only tests that everything runs.")]
Output = Annotated[Path, typer.Option(help="Where to save the report.")]

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def gpt2_config(size: str) -> GPT2Config:
    """The official config of that size; `tiny` has 2 layers and 512 tokens."""
    if size == "tiny":
        end: dict[str, Any] = dict(bos_token_id=511, eos_token_id=511)
        return GPT2Config(vocab_size=512, n_positions=128, n_embd=64, n_head=4, n_layer=2, **end)
    return GPTScratchConfig.preset(size).to_gpt2()


@contextmanager
def official_checkpoint(size: str, checkpoint: Path | None = None, repeating: bool = False) -> Iterator[Path]:
    """A directory with an official checkpoint: the one given, or seeded random weights, biases and norms.

    With `repeating`, they are so small that the text repeats itself.
    """
    if checkpoint is not None:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as directory:
        set_seed(0)
        model = GPT2LMHeadModel(gpt2_config(size))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                elif not repeating:  # with GPT-2's own initialisation greedy ids repeat one id, whatever the engine
                    parameter.normal_(0, 1.6 * model.config.n_embd**-0.5)
        model.save_pretrained(directory)
        del model
        yield Path(directory)


def random_ids(batch: int, length: int, vocab_size: int) -> torch.Tensor:
    """Token ids (batch, length), the same on every call."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def use_threads(threads: int, cpu_time: bool = False) -> None:
    """Sets torch's number of threads; 0 keeps its default, the number of cores or OMP_NUM_THREADS.

    With `cpu_time`: one thread, and from now on CPU time is measured, here and in workers.py.
    """
    if cpu_time:
        threads = 1
        os.environ[CPU_CLOCK] = "1"
    if threads:
        torch.set_num_threads(threads)


def now() -> float:
    """Seconds of the clock, or of CPU time after `use_threads(cpu_time=True)`."""
    return time.process_time() if CPU_CLOCK in os.environ else time.perf_counter()


@dataclass
class Measured:
    """Repeated calls of one function: seconds of the first, seconds of the others, output of the last."""

    first: float = 0.0
    times: list[float] = field(default_factory=list)
    output: Any = None
    recompiled: int = 0  # graphs that torch.compile made after the first call


@dataclass
class Timed:
    """The output of a function that measures its own time."""

    seconds: float
    output: Any = None


def timed(function: Callable[..., Any], *arguments: Any) -> Timed:
    """Calls a function; the time that it reports itself takes precedence over the clock."""
    start = now()
    output = function(*arguments)
    taken = now() - start
    return output if isinstance(output, Timed) else Timed(taken, output)


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def interleaved(rows: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Measured]:
    """Calls every function in turn, A B C A B C ..., so that other load on the machine affects all rows alike.

    The first round is a warm-up and is kept separately.
    """
    measured = {name: Measured() for name in rows}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(rows) * (rounds + 1))
        for count in range(rounds + 1):
            for name, function in rows.items():
                progress.update(task, description=name)
                graphs, call, row = compiled_graphs(), timed(function), measured[name]
                row.output = call.output
                if count:
                    row.times.append(call.seconds)
                    row.recompiled += compiled_graphs() - graphs
                else:
                    row.first = call.seconds
                progress.advance(task)
    return measured


def in_child(function: Callable, *arguments: Any) -> Any:
    """The result of `function` in a process of its own, so that its peak memory is its own, too."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class Worker:
    """An engine of workers.py in its process; `call` times its methods there, without the communication.

    Raises:
        ImportError: the engine is not installed, or this machine does not support it.
        RuntimeError: the process failed; the message has its traceback.
    """

    def __init__(self, engine: str, **arguments: Any) -> None:
        # Not with multiprocessing, whose processes import the main script, and torch with it.
        self.process = subprocess.Popen([sys.executable, WORKERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self.call(engine, **arguments)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, **arguments: Any) -> Timed:
        assert self.process.stdin and self.process.stdout
        try:
            pickle.dump((method, arguments), self.process.stdin)
            self.process.stdin.flush()
            seconds, output = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError(f"{method}: the engine's process ended with status {self.process.wait()}") from error
        if isinstance(output, Exception):
            raise output
        return Timed(seconds, output)

    def close(self) -> None:
        """Ends the process, which stops when its input is closed."""
        with suppress(BrokenPipeError):
            self.process.communicate()


def peak_memory() -> int:
    """The peak of this process's memory in bytes, since `Cost` was last entered."""
    if sys.platform == "linux":  # ru_maxrss includes the parent before exec
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Cost:
    """The cost of a `with` block: seconds, and peak memory in bytes above what was in use before."""

    def __enter__(self):
        if sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory now in use
        self.memory = -peak_memory()
        self.seconds = -time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds += time.perf_counter()
        self.memory += peak_memory()


def costs_in_children(
    function: Callable[..., Cost], names: list[str], rounds: int, *arguments: Any
) -> dict[str, list[Cost]]:
    """`function(name, *arguments)`, each in a process of its own, interleaved, after a warm-up round.

    Without rounds: once, in this process, where one row can reuse the memory of another.
    """
    if not rounds:
        return {name: [function(name, *arguments)] for name in names}
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(names) * (rounds + 1))
        for count in range(rounds + 1):
            for name in names:
                progress.update(task, description=name)
                cost = in_child(function, name, *arguments)
                if count:
                    costs[name].append(cost)
                progress.advance(task)
    return costs


def selected(rows: Iterable[str], only: str) -> list[str]:
    """The reference, which is the first row, and the rows whose names match."""
    return [name for i, name in enumerate(rows) if i == 0 or re.search(only, name)]


def must_be_exact(name: str) -> bool:
    """Whether the row is ours and float32, and so must have the reference's ids, logits and loss."""
    return name.startswith("ours") and not re.search("bf16|int8", name)


def environment() -> dict[str, Any]:
    """The environment on which the figures depend."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    packages: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": ", ".join(sorted(models)) or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "clock": "CPU time" if CPU_CLOCK in os.environ else "time",
        "load": os.getloadavg()[0],  # of the last minute; above the number of threads, other programs were running
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
    }


@dataclass
class Row:
    """One line of a table."""

    group: str  # rows of one group were measured together
    name: str
    times: list[float]  # seconds
    figures: dict[str, Any] = field(default_factory=dict)  # further columns
    reference: bool = False  # the row that the others of its group are compared with

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.times) < 2:
            return self.times[0], self.times[0]
        first, _, third = statistics.quantiles(self.times, n=4, method="inclusive")
        return first, third


@dataclass
class Report:
    """All rows of one benchmark."""

    name: str
    title: str
    settings: dict[str, Any]
    unit: str = "ms"  # of the table; s or ms
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # row: why it was not measured

    def add(self, group: str, name: str, times: list[float], reference: bool = False, **figures: Any) -> None:
        self.rows.append(Row(group, name, times, figures, reference))

    def add_costs(self, group: str, costs: Mapping[str, list[Cost]]) -> None:
        """Rows of `costs_in_children`, with memory as a further column; the first is the reference."""
        memory = {name: statistics.median(cost.memory for cost in row) for name, row in costs.items()}
        first = next(iter(costs))
        comparable = memory[first] > 1e6  # false if the memory was already in use
        for name, row in costs.items():
            figures = {
                "peak memory, MB": round(memory[name] / 1e6),
                "memory": f"{memory[name] / memory[first]:.2f}×" if comparable else "–",
            }
            self.add(group, name, [cost.seconds for cost in row], name == first, **figures)

    def groups(self) -> dict[str, list[Row]]:
        return {
            group: [row for row in self.rows if row.group == group] for group in {row.group: 0 for row in self.rows}
        }

    def speed(self, row: Row) -> float | None:
        """The row's speed relative to the reference of its group."""
        return next((other.median / row.median for other in self.groups()[row.group] if other.reference), None)

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {**asdict(row), "median": row.median, "quartiles": row.quartiles, "speed": self.speed(row)}
            for row in self.rows
        ]
        about = {"name": self.name, "title": self.title, "settings": self.settings, "environment": environment()}
        return {**about, "rows": rows, "missing": self.missing}

    def markdown(self, environment: Mapping[str, Any]) -> str:
        """The tables, followed by the environment."""
        factor = {"s": 1, "ms": 1e3}[self.unit]
        lines = []
        for group, rows in self.groups().items():
            further = list(dict.fromkeys(name for row in rows for name in row.figures))
            lines += [
                "| " + " | ".join([group, f"median, {self.unit}", "quartiles", "speed", *further]) + " |",
                "| --- " * (4 + len(further)) + "|",
            ]
            for row in rows:
                first, third = (f"{factor * quartile:.4g}" for quartile in row.quartiles)
                speed = self.speed(row)
                cells = [
                    row.name,
                    f"{factor * row.median:.4g}",
                    f"{first} to {third}",
                    f"{speed:.2f}×" if speed else "",
                ]
                lines.append("| " + " | ".join(cells + [shown(row.figures.get(name)) for name in further]) + " |")
            lines.append("")
        lines += [f"Not measured: {name} ({reason}).\n" for name, reason in self.missing.items()]
        packages = ", ".join(f"{name} {found}" for name, found in environment["packages"].items() if found)
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines.append(
            f"{'CPU time, measured' if environment.get('clock') == 'CPU time' else 'Measured'} on "
            f"{environment['date'][:10]}: {environment['cpu']}, {environment['threads']} threads on "
            f"{environment['cores']} cores, {environment['capability']}, load {environment['load']:.1f}; {packages}; "
            f"{settings}."
        )
        return "\n".join(lines) + "\n"

    def plot(self, target: Path) -> None:
        """Bars of the medians, with quartiles and speeds; one diagram per group."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        factor = {"s": 1, "ms": 1e3}[self.unit]
        groups = self.groups()
        figure, axes = plt.subplots(
            len(groups),
            figsize=(9, 1.2 * len(groups) + 0.3 * len(self.rows)),
            height_ratios=[2 + len(rows) for rows in groups.values()],
            layout="constrained",
            squeeze=False,
        )
        figure.suptitle(self.title)
        for axis, (group, rows) in zip(axes[:, 0], groups.items(), strict=True):
            for y, row in enumerate(rows):
                median, (first, third) = row.median, row.quartiles
                spread = [[factor * (median - first)], [factor * (third - median)]]
                color = "tab:orange" if row.name.startswith("ours") else "tab:gray"
                axis.barh(y, factor * median, xerr=spread, color=color)
                speed = self.speed(row)
                axis.text(factor * third, y, f"  {speed:.2f}×" if speed else "", va="center", fontsize=8)
            axis.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.1)
            axis.set_xlabel(f"{group}: {self.unit}, median and quartiles")
        figure.savefig(target, dpi=110)
        plt.close(figure)

    def write(self, output: Path) -> None:
        """Writes JSON, markdown and plot, and prints the table."""
        output.mkdir(parents=True, exist_ok=True)
        figures = self.to_dict()
        (output / f"{self.name}.json").write_text(json.dumps(figures, indent=1, default=str) + "\n", encoding="utf-8")
        table = self.markdown(figures["environment"])
        (output / f"{self.name}.md").write_text(table, encoding="utf-8")
        self.plot(output / f"{self.name}.png")
        print(f"{self.title}\n\n{table}")


def shown(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
