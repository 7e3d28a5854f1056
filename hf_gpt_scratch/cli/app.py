"""The command `hf-gpt-scratch`.

Exit status: 0 success, 1 failure, 2 usage error, 3 the models differ, 130 interrupted. Each command imports what it
needs when it runs, so that help and wrong arguments are answered at once.
"""

import io
import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from ..errors import LONGEST_MESSAGE, ConversionError, shortened
from ..version import __version__
from .compare_command import compare
from .doctor import JSON_HELP
from .doctor import doctor as examine
from .generate_command import chat, generate
from .new_command import new
from .status import FAILED, INTERRUPTED
from .verify_receipt_command import verify_receipt_command
from .watch_command import SETTINGS as WATCH_SETTINGS
from .watch_command import watch

# What the help and the check of the arguments need to know of the formats, without importing them.
WRITTEN = ("gpt2", "book", "nanogpt", "gguf", "llmc", "onnx")
MAX_SHARD_SIZE = "50GB"


def written() -> list[str]:
    """The formats of `export`, and those that somebody has added; `convert` writes the native one."""
    formats = sys.modules.get("hf_gpt_scratch.weights.formats")
    known = formats.FORMATS.values() if formats else ()
    added = [format.name for format in known if format.file is not None and format.name != "native"]
    return list(dict.fromkeys([*WRITTEN, *added]))


def _written(name: str) -> str:
    if name not in written():
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(written())}")
    return name


Source = Annotated[str, typer.Argument(help="Directory or hub id of the checkpoint.")]
Target = Annotated[str, typer.Argument(help="Directory to write; it appears only once complete and verified.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Verify = Annotated[bool, typer.Option(help="Compare with the official model before publishing, with both in memory.")]
WeightsOnly = Annotated[bool, typer.Option(help="Compare the weights bit for bit without running a model.")]
ShardSize = Annotated[str, typer.Option(help="Maximum size of a weights file, such as 5GB.")]
Format = Annotated[str, typer.Option(callback=_written, help=f"Whose checkpoint to write: {', '.join(written())}.")]
Heads = Annotated[
    int | None, typer.Option(help="Attention heads, for files that do not store them, such as the book's.")
]
Activation = Annotated[
    str | None, typer.Option(help="Activation, for files that do not store it: gelu (nanoGPT) or gelu_new (tanh).")
]
LoraScale = Annotated[
    float | None, typer.Option(help="For the adapters of the book's appendix E: alpha / rank, or alpha alone.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="Directory, hub id or nanoGPT's meta.pkl; gpt2; none. Otherwise the source's, or GPT-2's by its size."
    ),
]
Optimizer = Annotated[bool, typer.Option(help="Take AdamW's state along, for Trainer to resume from, if there is one.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an existing target.")]
Quantize = Annotated[str | None, typer.Option(help="For onnx: int8 also writes a graph with int8 weights.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of tables.")]
MODEL = "124M, 355M, 774M or 1558M; book for the book's GPT_CONFIG_124M; a directory, hub id or config.json."


def convert(
    source: Annotated[str, typer.Argument(help="Directory, hub id, or another program's checkpoint.")],
    target: Target,
    revision: Revision = None,
    verify: Verify = True,
    weights_only: WeightsOnly = False,
    max_shard_size: ShardSize = MAX_SHARD_SIZE,
    n_heads: Heads = None,
    activation: Activation = None,
    lora_scale: LoraScale = None,
    tokenizer: Tokenizer = None,
    optimizer: Optimizer = True,
    overwrite: Overwrite = False,
) -> None:
    """Converts a GPT-2 checkpoint into the book's layers; the weights stay the same.

    Reads official checkpoints, the files of the book, nanoGPT, minGPT and llm.c, OpenAI's TensorFlow directories and
    GGUF.
    """
    check = _check(verify, weights_only)
    from ..weights import convert as conversion
    from .terminal import convert_and_report

    options: dict[str, Any] = dict(n_heads=n_heads, activation_function=activation, lora_scale=lora_scale)
    options |= dict(tokenizer=tokenizer, optimizer=optimizer, revision=revision, check=check, overwrite=overwrite)
    convert_and_report(conversion.convert, source, target, max_shard_size=max_shard_size, **options)


def export(
    source: Source,
    target: Target,
    format: Format = "gpt2",
    quantize: Quantize = None,
    revision: Revision = None,
    verify: Verify = True,
    weights_only: WeightsOnly = False,
    max_shard_size: ShardSize = MAX_SHARD_SIZE,
    n_heads: Heads = None,
    activation: Activation = None,
    lora_scale: LoraScale = None,
    tokenizer: Tokenizer = None,
    optimizer: Optimizer = True,
    overwrite: Overwrite = False,
) -> None:
    """Converts a GPTScratch checkpoint, or another program's, to an official GPT-2 checkpoint or another format."""
    check = _check(verify, weights_only)
    from ..weights import convert as conversion
    from .terminal import convert_and_report

    options: dict[str, Any] = dict(n_heads=n_heads, activation_function=activation, lora_scale=lora_scale)
    options |= dict(tokenizer=tokenizer, optimizer=optimizer, revision=revision, check=check, overwrite=overwrite)
    options |= dict(format=format, quantize=quantize, max_shard_size=max_shard_size)
    convert_and_report(conversion.export, source, target, **options)


def verify(
    reference: Annotated[str, typer.Argument(help="Directory or hub id of a checkpoint, such as the official one.")],
    candidate: Annotated[str, typer.Argument(help="Directory or hub id of the one to check, official or ours.")],
    as_json: AsJson = False,
) -> None:
    """Compares two checkpoints, official or ours, in float32: weights, logits, greedily generated ids."""
    from .terminal import verify_and_report

    verify_and_report(reference, candidate, as_json)


def explain(
    name: Annotated[str, typer.Argument(help="A parameter, GPT-2's name or the book's, in full or in part: W_key.")],
    model: Annotated[str, typer.Option(help=f"The model whose shapes to show: {MODEL}")] = "124M",
    as_json: AsJson = False,
) -> None:
    """Shows where a parameter comes from and goes to, its role, and its equation."""
    from ..lab.explain import explain as explain_name
    from .inspection_report import explanation

    found = _or_fail(explain_name, name, model)
    if as_json:
        typer.echo(json.dumps([one.to_dict() for one in found], indent=2, ensure_ascii=False))
    else:
        Console().print(*map(explanation, found), sep="\n")


def inspect(model: Annotated[str, typer.Argument(help=MODEL)], as_json: AsJson = False) -> None:
    """Shows a model's modules, shapes, parameters and memory step by step, and explains its operations."""
    from ..lab.inspect import inspect as inspect_model
    from .inspection_report import report

    found = _or_fail(inspect_model, model)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        console = Console()
        console.print(report(found, console.width))


def doctor(as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False) -> None:
    examine(as_json)


doctor.__doc__ = examine.__doc__


# The subcommands; a new one is imported above, in a module that imports no large library, and added here.
COMMANDS = (convert, export, verify, compare, generate, chat, explain, inspect, new, doctor)


class Commands(TyperGroup):
    """Ctrl-C ends every command with status 130, also while it imports libraries."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Interrupted", err=True)
            sys.exit(INTERRUPTED)


app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="GPT-2 in the layers of the book: converted, verified, explained, run."
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-gpt-scratch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show version.")] = False,
) -> None:
    # Characters that the terminal's encoding lacks, as on Windows and in pipes, become question marks.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


for command in COMMANDS:
    app.command()(command)
app.command("verify-receipt")(verify_receipt_command)
app.command(context_settings=WATCH_SETTINGS)(watch)


def _check(verify: bool, weights_only: bool) -> bool | str:
    if weights_only and not verify:
        raise typer.BadParameter("--weights-only and --no-verify exclude each other; give one of them")
    return "weights" if weights_only else verify


def _or_fail(function, *arguments) -> Any:
    from huggingface_hub.errors import StrictDataclassError

    try:
        return function(*arguments)
    except (ValueError, StrictDataclassError, ConversionError) as error:
        Console(stderr=True).print(
            f"[bold red]Failed:[/] {escape(shortened(str(error), LONGEST_MESSAGE))}", soft_wrap=True
        )
        sys.exit(FAILED)


if __name__ == "__main__":
    app()
