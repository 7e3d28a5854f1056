"""`hf-gpt-scratch doctor`: shows what is installed and tests it on a tiny model.

The libraries are imported inside the checks, and the checks run in another process, so that a library that is missing,
broken, hangs or kills its process costs one check only.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..version import __version__ as __version__
from ..version import versions

# As in compat.py, which cannot be imported without transformers.
OLDEST_TESTED, NEWEST_TESTED = "5.4.0", "5.24.0"
# The limit for one check; the slowest takes some seconds, or a minute on an overloaded machine.
SECONDS = 300
LONGEST_REASON = 400
JSON_HELP = "Print everything as JSON, for a bug report."
PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"

# tiktoken's copy of GPT-2's vocabulary: file names in its cache, and their sha256.
VOCABULARY = {
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# Without dropout, so that training steps can be compared.
TINY: dict[str, Any] = dict(vocab_size=211, n_positions=64, n_embd=48, n_head=4, n_layer=3, bos_token_id=210)
TINY |= dict(eos_token_id=210, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
GREEDY = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)

# Run in another process, in which this package cannot be imported.
REMOTE = """
import json, sys
sys.modules["hf_gpt_scratch"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
ids, options = torch.tensor(json.loads(sys.argv[2])), json.loads(sys.argv[3])
print("ids", json.dumps(model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()))
"""


class Wrong(Exception):
    """A check failed; the message gives the reason."""


class NotRun(Exception):
    """A check could not be run; the message gives the reason."""


@dataclass(frozen=True)
class Result:
    check: str
    status: str
    reason: str
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    traceback: str | None = None


class Patient:
    """A tiny official model with random weights, biases and norms, and our model converted from it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.facts: dict[str, Any] = {}

    @functools.cached_property
    def official(self):
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(**TINY)).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(0, 0.2 if parameter.ndim > 1 else 0.5, generator=generator)
                if "ln_" in name and name.endswith("weight"):
                    parameter += 1
        return model

    @functools.cached_property
    def converted(self) -> Path:
        from hf_gpt_scratch.weights.convert import gpt2_to_scratch

        self.official.save_pretrained(self.directory / "official")
        gpt2_to_scratch(self.directory / "official", self.directory / "converted", check=False)
        return self.directory / "converted"

    @functools.cached_property
    def ours(self):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.converted)

    @functools.cached_property
    def elsewhere(self) -> subprocess.Popen:
        """A process without this package that loads the converted model and generates."""
        ids, options = json.dumps(self.prompts().tolist()), json.dumps(GREEDY)
        return subprocess.Popen(
            [sys.executable, "-c", REMOTE, str(self.converted), ids, options],
            env={**os.environ, "HF_MODULES_CACHE": str(self.directory / "modules"), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def pair(self):
        """Both models.

        Raises:
            NotRun: they could not be built; the earlier checks show why.
        """
        try:
            return self.official, self.ours
        except Exception as error:
            raise NotRun("the two models could not be built; see the failures above") from error

    def prompts(self, batch: int = 2, length: int = 9):
        import torch

        return torch.randint(210, (batch, length), generator=torch.Generator().manual_seed(1))

    def generated(self, model, ids, mask=None, **options):
        import torch

        mask = torch.ones_like(ids) if mask is None else mask
        return model.generate(ids, attention_mask=mask, **{**GREEDY, **options})


def same_ids(theirs, ours, how: str) -> str:
    """Raises `Wrong` unless the ids are equal."""
    theirs, ours = (ids if isinstance(ids, list) else ids.tolist() for ids in (theirs, ours))
    if theirs == ours:
        return f"{sum(map(len, ours))} ids equal the official model's, {how}"
    there, here = next((a, b) for a, b in zip([*theirs, []], [*ours, []], strict=False) if a != b)
    first = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), min(len(there), len(here)))
    raise Wrong(
        f"{how}, the ids differ from the official model's: position {first} has {here[first : first + 4]} instead of "
        f"{there[first : first + 4]}"
    )


def minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def check_libraries(patient: Patient) -> str:
    """Whether the installed libraries satisfy this package's requirements."""
    try:
        declared = importlib.metadata.requires("hf-gpt-scratch") or []
    except importlib.metadata.PackageNotFoundError:
        raise NotRun(
            "this package runs from its folder without being installed, so its requirements are not recorded"
        ) from None
    from packaging.requirements import Requirement

    wrong, needed = [], 0
    for requirement in map(Requirement, declared):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        needed += 1
        installed = versions((requirement.name,))[requirement.name]
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            wrong.append((requirement, installed or "missing"))
    if wrong:
        what = "; ".join(f"{one.name} {installed}, needed {one.specifier}" for one, installed in wrong)
        raise Wrong(what + "; pip install " + " ".join(f'"{one.name}{one.specifier}"' for one, _ in wrong))
    return f"all {needed} requirements are installed, in suitable versions"


def check_torch(patient: Patient) -> str:
    """Whether torch imports and multiplies matrices correctly; its device and threads."""
    import torch

    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    error = ((a @ b) - (a.double() @ b.double())).abs().max().item()
    if not error < 1e-3:
        raise Wrong(f"torch {torch.__version__} multiplies two 64 × 64 matrices with an error of {error:.1e}")
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda ({torch.cuda.get_device_name()})"
    elif torch.backends.mps.is_available():
        device = "mps"
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    patient.facts["torch"] = {
        "version": torch.__version__,
        "device": device,
        "threads": threads,
        "cpu_capability": capability,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    return f"{torch.__version__}, device {device}, threads {threads}, {capability}"


def check_transformers(patient: Patient) -> str:
    """Whether transformers imports, in a version that this package was tested with."""
    import transformers
    from transformers import GPT2LMHeadModel  # transformers imports its models on first use

    found = transformers.__version__
    patient.facts["transformers"] = {"version": found, "oldest_tested": OLDEST_TESTED, "newest_tested": NEWEST_TESTED}
    if minor(found) < minor(OLDEST_TESTED):
        raise Wrong(f"{found} is older than {OLDEST_TESTED}; pip install --upgrade hf-gpt-scratch transformers")
    recorded = versions(("transformers",))["transformers"]
    if recorded is not None and recorded != found:
        raise Wrong(f"{found} is imported, but {recorded} is installed: there are two copies; check PYTHONPATH")
    if minor(found) > minor(NEWEST_TESTED):
        return f"{found} is newer than {NEWEST_TESTED}, the newest tested version; the checks below test it"
    return f"{found}, within the tested {OLDEST_TESTED} to {NEWEST_TESTED} ({GPT2LMHeadModel.__name__} imports)"


def check_package(patient: Patient) -> str:
    """Whether the package and its command import, and which copy."""
    package = importlib.import_module("hf_gpt_scratch")
    from transformers import AutoConfig

    package.GPTScratchForCausalLM  # noqa: B018 imports the models

    AutoConfig.for_model("gpt_scratch")
    importlib.import_module("hf_gpt_scratch.cli.app")
    try:
        recorded = importlib.metadata.version("hf-gpt-scratch")
    except importlib.metadata.PackageNotFoundError:
        return f"{package.__version__}, from a folder, not installed"
    if recorded != package.__version__:
        raise Wrong(f"{package.__version__} is imported, but {recorded} is installed; run pip install again")
    return f"{package.__version__}, known to transformers' auto classes"


def vocabulary_cache() -> Path:
    """Where tiktoken caches its downloads."""
    named = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    return Path(tempfile.gettempdir(), "data-gym-cache") if named is None else Path(named)


def check_tokenizer(patient: Patient) -> str:
    """Whether GPT-2's vocabulary is cached, intact, and makes the tokenizer."""
    directory = vocabulary_cache()
    files = {name: directory / name for name in VOCABULARY}
    there = [name for name, path in files.items() if path.is_file()]
    patient.facts["tokenizer"] = {"cache": tidy(str(directory)), "cached": len(there) == len(files)}
    if len(there) < len(files):
        raise NotRun(f"GPT-2's vocabulary is not in {directory}; its first use needs the network (TIKTOKEN_CACHE_DIR)")
    for name in there:
        if hashlib.sha256(files[name].read_bytes()).hexdigest() != VOCABULARY[name]:
            raise Wrong(f"{name} in {directory} is damaged; delete it, and it will be downloaded again")
    from hf_gpt_scratch.tokenizer import gpt2_tokenizer

    text, expected = "Every effort moves you", [6109, 3626, 6100, 345]
    if (ids := gpt2_tokenizer()(text).input_ids) != expected:
        raise Wrong(f"{text!r} became {ids}, not {expected}")
    return f"GPT-2's vocabulary is in {directory}, intact"


def check_build(patient: Patient) -> str:
    """Whether the official model can be built and returns finite logits."""
    import torch

    with torch.no_grad():
        logits = patient.official(patient.prompts()).logits
    if not logits.isfinite().all():
        raise Wrong("the official model's logits are not finite")
    return f"an official {type(patient.official).__name__} with {patient.official.num_parameters():,} random parameters"


def check_convert(patient: Patient) -> str:
    """Whether an official checkpoint converts to one of ours, which loads."""
    from hf_gpt_scratch.weights.convert import gpt2_to_scratch

    patient.elsewhere  # noqa: B018 takes as long as all checks before "saved code", so start it now
    receipt = gpt2_to_scratch(patient.directory / "official", patient.directory / "verified")
    return f"{type(patient.ours).__name__}: {receipt['parity']['tensors']} tensors equal bit for bit, logits and ids"


def check_receipt(patient: Patient) -> str:
    """Whether the receipt matches the files, and an extra file is detected."""
    from hf_gpt_scratch.errors import ConversionError
    from hf_gpt_scratch.weights.publish import verify_receipt

    files = len(verify_receipt(patient.converted)["target"]["files"])
    extra = patient.converted / "extra"
    extra.write_text("not in the receipt")
    try:
        verify_receipt(patient.converted)
    except ConversionError:
        return f"{files} files are as the conversion left them; an extra file is detected"
    finally:
        extra.unlink()
    raise Wrong("an extra file, which the receipt does not name, was not detected")


def check_logits(patient: Patient) -> str:
    """Whether both models compute the same logits, also left-padded."""
    from hf_gpt_scratch.weights.parity import FP32_LOGITS, compare_logits

    official, ours = patient.pair
    ids = patient.prompts()
    mask = ids.new_ones(ids.shape)
    mask[0, :4] = 0
    found = {}
    for how, inputs in (("plain", {}), ("left-padded", {"attention_mask": mask, "position_ids": positions(mask)})):
        found[how] = compare_logits(official, ours, ids, **inputs).relative_error
        if not found[how] <= FP32_LOGITS:
            raise Wrong(f"{how}, the logits differ by {found[how]:.1e} of the largest; {FP32_LOGITS:.0e} is allowed")
    return f"relative error {max(found.values()):.1e}, also left-padded (bound {FP32_LOGITS:.0e})"


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def check_generate(patient: Patient) -> str:
    """Greedy ids with a cache."""
    official, ours = patient.pair
    ids = patient.prompts()
    return same_ids(patient.generated(official, ids), patient.generated(ours, ids), "with a cache")


def check_generate_without_cache(patient: Patient) -> str:
    """Greedy ids without a cache, which must equal those with one."""
    official, ours = patient.pair
    ids = patient.prompts()
    how = "without a cache"
    return same_ids(patient.generated(official, ids), patient.generated(ours, ids, use_cache=False), how)


def check_generate_padded(patient: Patient) -> str:
    """Greedy ids of two prompts of different lengths in a batch, and of the shorter one alone."""
    official, ours = patient.pair
    ids = patient.prompts()
    mask = ids.new_ones(ids.shape)
    mask[0, :4] = 0
    batch = patient.generated(ours, ids, mask)
    result = same_ids(patient.generated(official, ids, mask), batch, "left-padded")
    same_ids(patient.generated(ours, ids[:1, 4:])[:, ids.shape[1] - 4 :], batch[:1, ids.shape[1] :], "padded or alone")
    return result


def check_generate_batch(patient: Patient) -> str:
    """Whether continuous batching with paged caches generates the same ids as `generate`."""
    import torch
    import transformers

    official, ours = patient.pair
    if not hasattr(ours, "generate_batch") or not hasattr(transformers, "ContinuousBatchingConfig"):
        raise NotRun(f"transformers {transformers.__version__} has no continuous batching")
    prompts = [patient.prompts(1, length)[0].tolist() for length in (5, 9)]
    # No token has id -1, so no sequence ends early.
    settings = transformers.GenerationConfig(**{**GREEDY, "eos_token_id": -1})

    def answers(model):
        small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
        # A copy: some releases leave the model with another attention function.
        given = copy.deepcopy(model).generate_batch(
            prompts, generation_config=settings, continuous_batching_config=small
        )
        return [answer.generated_tokens for answer in given.values()]

    expected = [
        patient.generated(official, torch.tensor([ids]), eos_token_id=-1)[0, len(ids) :].tolist() for ids in prompts
    ]
    try:
        there = answers(official)
    except Exception as error:
        raise NotRun(f"the official model fails here too: {type(error).__name__}: {error}") from error
    if there != expected:
        raise NotRun("here the official model itself generates different ids in continuous batches than alone")
    return same_ids(expected, answers(ours), "in continuous batches")


def check_train(patient: Patient) -> str:
    """Whether a training step has the official loss, gradients and effect."""
    import torch

    from hf_gpt_scratch.weights.parity import FP32_GRADIENTS, FP32_LOSS, gradient_errors

    models = [copy.deepcopy(model).train() for model in patient.pair]
    ids = patient.prompts(length=24)
    losses: list[list[float]] = []
    for step in range(2):
        found = [model(input_ids=ids, labels=ids).loss for model in models]
        losses.append([loss.item() for loss in found])
        if not abs(losses[step][0] - losses[step][1]) <= FP32_LOSS * 10**step * losses[step][0]:
            raise Wrong(
                f"after {step} steps the loss is {losses[step][1]:.7g}, the official model's {losses[step][0]:.7g}"
            )
        for model, loss in zip(models, found, strict=True):
            model.zero_grad()
            loss.backward()
        if step == 0 and not (largest := max(gradient_errors(*models).values())) <= FP32_GRADIENTS:
            raise Wrong(f"the gradients differ by {largest:.1e}; {FP32_GRADIENTS:.0e} is allowed")
        for model in models:
            torch.optim.SGD(model.parameters(), lr=0.05).step()
    if not losses[1][1] < losses[0][1]:
        raise Wrong(f"the loss went from {losses[0][1]:.4f} to {losses[1][1]:.4f} in one step")
    return f"the official losses, {losses[0][1]:.4f} and {losses[1][1]:.4f} after a step, and gradients"


def check_save(patient: Patient) -> str:
    """Whether a model saved in our format and in the official one loads unchanged."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel

    official, ours = patient.pair
    ours.save_pretrained(patient.directory / "saved")
    ours.save_as_gpt2(patient.directory / "saved as gpt2")
    again = AutoModelForCausalLM.from_pretrained(patient.directory / "saved")
    back = GPT2LMHeadModel.from_pretrained(patient.directory / "saved as gpt2")
    for kind, before, after in (("ours", ours, again), ("official", official, back)):
        weights, loaded = before.state_dict(), after.state_dict()
        if weights.keys() != loaded.keys():
            raise Wrong(f"saved as {kind}, different tensors were loaded: {sorted(weights.keys() ^ loaded.keys())[:5]}")
        if changed := [name for name in weights if not torch.equal(weights[name], loaded[name])]:
            raise Wrong(f"saved as {kind}, {len(changed)} of {len(weights)} tensors changed: {changed[:5]}")
    return f"{len(ours.state_dict())} tensors load bit for bit, and {len(official.state_dict())} as an official model"


def check_remote(patient: Patient) -> str:
    """Whether a saved directory generates the official ids without this package."""
    official, _ = patient.pair
    ids = patient.prompts()
    out, errors = patient.elsewhere.communicate()
    if patient.elsewhere.returncode:
        raise Wrong(last_line(errors) or f"the process {ending(patient.elsewhere.returncode)}")
    there = next(json.loads(line[4:]) for line in out.splitlines() if line.startswith("ids "))
    return same_ids(patient.generated(official, ids), there, "in another process, with the saved code")


Check = Callable[[Patient], str]
CHECKS: dict[str, Check] = {
    "libraries": check_libraries,
    "torch": check_torch,
    "transformers": check_transformers,
    "hf_gpt_scratch": check_package,
    "tokenizer": check_tokenizer,
    "build": check_build,
    "convert": check_convert,
    "receipt": check_receipt,
    "logits": check_logits,
    "generate": check_generate,
    "generate, no cache": check_generate_without_cache,
    "generate, padded": check_generate_padded,
    "generate_batch": check_generate_batch,
    "train": check_train,
    "save and load": check_save,
    "saved code": check_remote,
}


def tidy(text: str) -> str:
    """The text on one line, shortened, without the user's home directory."""
    text = " ".join(text.split()).replace(str(Path.home()), "~")
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def examine(directory: Path, names: list[str] | None = None) -> Iterator[Result | str]:
    """Runs the checks in this process; yields each one's name when it starts and its result when it ends."""
    patient = Patient(directory)
    for name in CHECKS if names is None else names:
        yield name
        began, trace = time.perf_counter(), None
        try:
            status, reason = PASSED, CHECKS[name](patient)
        except NotRun as error:
            status, reason = NOT_RUN, str(error)
        except Wrong as error:
            status, reason = FAILED, str(error)
        except Exception as error:
            status, reason = FAILED, f"{type(error).__name__}: {error}"
            trace = traceback.format_exc().replace(str(Path.home()), "~")
        seconds, facts = round(time.perf_counter() - began, 2), patient.facts
        patient.facts = {}
        yield Result(name, status, tidy(reason), seconds, facts, trace)
    if "elsewhere" in vars(patient):
        with patient.elsewhere as process:
            process.kill()


def work(directory: str, *names: str) -> None:
    """Runs `examine` in the other process; writes a line of JSON for each item that it yields."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the libraries' own output does not belong in the results
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    for one in examine(Path(directory), list(names)):
        out.write(json.dumps(one if isinstance(one, str) else asdict(one)) + "\n")
        out.flush()


# Starts through the module that works even if the package does not import.
WORK = "import sys; from hf_gpt_scratch_command import doctor_module; doctor_module().work(*sys.argv[1:])"


def examine_elsewhere(
    directory: Path, command: tuple[str, ...] = (sys.executable, "-c", WORK)
) -> Iterator[Result | str]:
    """Like `examine`, in another process; if that dies or hangs, only the check it was running fails."""
    left = list(CHECKS)
    while left:
        place = directory / str(len(left))
        place.mkdir()
        with (directory / "errors").open("w+") as errors:
            process = subprocess.Popen(
                [*command, str(place), *left],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            assert process.stdout is not None
            lines: queue.Queue[str | None] = queue.Queue()
            reader = threading.Thread(target=pump, args=(process.stdout, lines), daemon=True)
            reader.start()
            try:
                began = time.perf_counter()
                while left:
                    try:
                        line = lines.get(timeout=SECONDS)
                    except queue.Empty:
                        reason = f"no answer in {SECONDS} seconds"
                        break
                    if line is None:
                        errors.seek(0)
                        reason = f"its process {ending(process.wait())}: {last_line(errors.read())}"
                        break
                    one = json.loads(line)
                    if isinstance(one, str):
                        yield one
                    else:
                        yield Result(**one)
                        left.remove(one["check"])
                else:
                    return
            finally:
                with process:
                    process.kill()
                    reader.join()
        yield Result(left.pop(0), FAILED, tidy(reason), round(time.perf_counter() - began, 2))


def pump(lines, into: queue.Queue) -> None:
    for line in lines:
        into.put(line)
    into.put(None)


def ending(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def system() -> dict[str, Any]:
    """The relevant facts about the machine; nothing that identifies its user."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        models = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        cpu = models[0] if models else cpu
    memory: dict[str, float] = {}
    with contextlib.suppress(OSError):
        figures = dict(re.findall(r"^(MemTotal|MemAvailable):\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.M))
        memory = {name: round(int(kib) / 2**20, 1) for name, kib in figures.items()}
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": platform.platform(),
        "cpu": cpu,
        "cores": usable,
        "memory_gib": memory,
        "environment": {name: os.environ[name] for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE") if name in os.environ},
    }


def doctor(as_json: bool = False) -> None:
    """Shows what is installed and tests it: a tiny model is converted, compared, run, trained and saved.

    Works offline, in half a minute at most. Exit status: 0 no check failed, 1 some did.
    """
    console = Console(stderr=as_json, highlight=False)
    found, machine = versions(), system()
    names = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    memory = machine["memory_gib"].get("MemTotal")
    about = [machine["platform"], machine["cpu"], f"{machine['cores']} cores", *([f"{memory} GiB"] if memory else [])]
    console.print(f"[bold]Versions[/]  {escape(names)}", soft_wrap=True)
    console.print(f"[bold]System[/]    {escape(', '.join(about))}", soft_wrap=True)
    began = time.perf_counter()
    results = examine_and_print(console)
    failed = [one.check for one in results if one.status == FAILED]
    seconds = time.perf_counter() - began
    if failed:
        console.print(
            f"[bold red]{len(failed)} of {len(results)} checks failed[/] in {seconds:.1f} s: {'; '.join(failed)}. "
            "Please include the output of `hf-gpt-scratch doctor --json` in a bug report.",
            soft_wrap=True,
        )
    else:
        passed = sum(one.status == PASSED for one in results)
        console.print(f"[bold green]{passed} checks passed[/], none failed, in {seconds:.1f} s", soft_wrap=True)
    if as_json:
        facts = {name: fact for one in results for name, fact in one.facts.items()}
        checks = [{name: value for name, value in asdict(one).items() if name != "facts"} for one in results]
        report = {"versions": found, "system": machine, **facts, "checks": checks, "passed": not failed}
        print(json.dumps(report, indent=2, ensure_ascii=False))
    sys.exit(1 if failed else 0)


def examine_and_print(console: Console) -> list[Result]:
    """Runs all checks in another process and prints a line for each as it ends."""
    width = max(map(len, CHECKS))
    styles = {PASSED: "green", FAILED: "bold red", NOT_RUN: "yellow"}
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="hf_gpt_scratch.") as place, console.status("Starting") as status:
        for one in examine_elsewhere(Path(place)):
            if isinstance(one, str):
                status.update(f"Checking {one}")
                continue
            results.append(one)
            line = f"[{styles[one.status]}]{one.status:<7}[/]  {one.check:<{width}}  {escape(one.reason)}"
            console.print(line, soft_wrap=True)
    return results


def main(arguments: list[str]) -> None:
    """The command where the library that reads the others' arguments is missing."""
    parser = argparse.ArgumentParser("hf-gpt-scratch doctor", description=doctor.__doc__)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    doctor(parser.parse_args(arguments).json)
