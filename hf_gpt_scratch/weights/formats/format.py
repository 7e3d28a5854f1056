"""What a format is: how a checkpoint is recognised, read and written. Each file beside this one has one, or two twins.

`FORMATS` has those that are registered; nothing here knows any of them.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import ConversionError, some
from ...model.configuration_gpt_scratch import PRESETS, TANH_GELU, GPTScratchConfig
from ...model.modeling_gpt_scratch import GPTScratchForCausalLM, GPTScratchPreTrainedModel
from ...model.weight_map import BASE, LM_HEAD, SCRATCH_PREFIX, Row, rows, without_prefix
from ..checkpoint import Progress, check_files, checked_finite, refuse_no_file
from ..parity import same_bits
from ..tensors import LazyTensor, from_scratch, held, to_scratch, with_qkv_biases

MAX_SHARD_SIZE = "50GB"  # what `save_pretrained` takes too
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# The rows that every GPT-2 has.
PLAIN = tuple(row for row in BASE if not re.search(r"cross|\.act\.", row.theirs))
T = TypeVar("T")


class Found:
    """What lies at a path, looked at once, however many formats ask.

    Args:
        path: a file or a directory.

    Raises:
        ConversionError: it is not there, or a pipe or a device, or a directory that holds one.
    """

    def __init__(self, path: Path):
        self.path, self.is_directory, self.start = path, path.is_dir(), b""
        self._known: dict[Callable, Any] = {}
        if self.is_directory:
            check_files(path)
            return
        refuse_no_file(path)
        try:
            with path.open("rb") as file:
                self.start = file.read(4)
        except OSError as error:
            raise ConversionError(
                f"{path} cannot be read ({error.strerror}); what can be read is {readable()}"
            ) from error

    @property
    def begins(self) -> str:
        """That nobody knows what the file is, for a message."""
        return f"{self.path} begins with {self.start!r}, which no known file does"

    def once(self, read: Callable[[Path], T]) -> T:
        """What `read` makes of the path."""
        if read not in self._known:
            self._known[read] = read(self.path)
        return self._known[read]


@dataclass(frozen=True)
class Layout:
    """How a program names and lays out GPT-2's tensors.

    Args:
        table: rows of the weight map, whose `theirs` is the program's name here.
        dropped: pattern of names that are no weights of the model.
        stores_tied_head: the file has the output head even when it is the token embedding.
        stores_qkv_biases: the file has zeros for the biases that a model without `qkv_bias` does not have.
    """

    table: tuple[Row, ...]
    dropped: str = r"(?!)"
    stores_tied_head: bool = False
    stores_qkv_biases: bool = True

    def named(self, ours: str) -> str:
        """The program's name of the tensor that holds ours; `{n}` stands for the layer in both."""
        return next(row.theirs for row in self.table if ours in row.ours)

    @cached_property
    def head(self) -> str | None:
        """The program's name of the output head, if it has one."""
        return next((row.theirs for row in self.table if row.ours == LM_HEAD.ours), None)

    def count_layers(self, names: Iterable[str]) -> int:
        """How many layers the names have.

        Raises:
            ValueError: a number between them is left out.
        """
        norm = re.escape(self.named("trf_blocks.{n}.norm1.scale")).replace(r"\{n\}", "(0|[1-9][0-9]*)")
        numbers = sorted(int(found[1]) for found in (re.fullmatch(norm, name) for name in names) if found)
        if not numbers or numbers != list(range(len(numbers))):
            raise ValueError(f"got the layers {numbers}, but layers are numbered from 0 without a gap")
        return len(numbers)

    def to_scratch(self, tensors: Mapping[str, LazyTensor], n_layers: int) -> dict[str, LazyTensor]:
        """The program's tensors in the book's names; those that the table does not know are left out."""
        return to_scratch(tensors, rows(n_layers, self.table))

    def from_scratch(self, tensors: Mapping[str, LazyTensor], n_layers: int) -> dict[str, LazyTensor]:
        """The book's tensors as the program has them; the inverse of `to_scratch`."""
        return from_scratch(tensors, rows(n_layers, self.table))


def renamed(names: Callable[[Row], str], transposed: bool, head: Row | None = LM_HEAD) -> tuple[Row, ...]:
    """The rows of a plain GPT-2 under other names.

    Args:
        names: gives a row's name in the other program.
        transposed: matrices are `[in, out]` there, as in GPT-2; otherwise `[out, in]`, as in `nn.Linear`.
        head: the row of the output head, if the program has one.
    """
    plain = (replace(row, theirs=names(row), transposed=row.transposed and transposed) for row in PLAIN)
    return (*plain, *([head] if head else []))


@dataclass
class Source:
    """A checkpoint as it lies there: tensors in their own names, and what the file tells, in our names.

    Args:
        notes: what its reader should know, in sentences.
        files: those that are read.
        tokenizer: makes the one that is inside the file, if there is one.
    """

    format: "Format"
    path: Path
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None

    def __post_init__(self):
        inside = self.path.iterdir() if self.path.is_dir() else [self.path]
        self.files = self.files or [file for file in inside if file.is_file()]


@dataclass
class Contents:
    """What a checkpoint holds, whatever its format.

    Args:
        name: the checkpoint's, for messages.
        tensors: in the book's names; a tied head is left out.
        dtype: the model's; its tensors may have others.
        kind: our class of the model.
        directory: where the settings for `generate` lie, if it has any.
    """

    name: str
    config: GPTScratchConfig
    tensors: dict[str, LazyTensor]
    dtype: torch.dtype
    kind: type[GPTScratchPreTrainedModel] = GPTScratchForCausalLM
    directory: Path | None = None

    def check_plain(self, whose: str = "config.json") -> None:
        """Raises ConversionError for all but a language model of one dtype, with the tensors of its config.

        Args:
            whose: what says how large they are, for the message.
        """
        check_tensors(self.tensors, plain_tensors(self.config), self.name, whose)


@dataclass(frozen=True)
class Options:
    """How to write.

    Args:
        max_shard_size: largest file of weights, bytes or a string such as "5GB", where there can be several.
        bias: whether biases are stored, where the format has the choice; None: if there are any.
        tokenizer: goes into the file, where the format has a place for one.
    """

    progress: Progress = field(default_factory=Progress)
    max_shard_size: int | str = MAX_SHARD_SIZE
    bias: bool | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


@dataclass(frozen=True)
class Written:
    """What came of writing.

    Args:
        notes: what the reader of the file should know, in sentences.
        hashes: sha256 and size of the files that were hashed on the way, by name.
        tokenizer: class of the tokenizer that went into the file.
    """

    notes: list[str] = field(default_factory=list)
    hashes: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: str | None = None


class Format:
    """A kind of checkpoint. One that is only read has no `file`, and leaves `save` alone.

    Attributes:
        name: as `export` takes it and the receipt says it.
        what: what can be read, for messages.
        layout: its tensors' names.
        file: what it is called within the directory of a target; "" if it is that directory.
        mark: the file by which a directory of this format is known.
        suffixes: of files of this format, for advice; what is told by its content is not told by its name.
        copies: how often the disk must have room for the weights while they are written.
        tokenizer: "beside" the weights, "inside" the file, or nowhere.
        plain: it holds language models alone, all of whose tensors have one dtype.
        loads: `load` gives a model to run.
        has_bias_choice: `Options.bias` is heeded.
    """

    name: str
    what: str
    layout: Layout
    file: str | None = None
    mark: str | None = None
    suffixes: tuple[str, ...] = ()
    copies = 1
    tokenizer: str | None = None
    plain = True
    loads = False
    has_bias_choice = False

    def matches(self, found: Found) -> bool:
        """Whether what lies there is of this format."""
        raise NotImplementedError

    def near(self, found: Found) -> str | None:
        """What is wrong with what no format matches, and the remedy, if this format can tell."""
        return None

    def open(self, found: Found) -> Source:
        """What lies there, no tensor of which is read yet.

        Raises:
            ConversionError: it is damaged.
        """
        raise NotImplementedError

    def read(self, source: Source, n_heads: int | None = None) -> Contents:
        """What a source holds, tensors still to be read; `source.tensors` has those that were used, in their own names.

        Raises:
            ConversionError: no whole, finite GPT-2, or `n_heads` is missing or wrong.
        """
        path, layout, told = source.path, self.layout, source.told
        tensors = source.tensors = {
            name: finite(tensor, name, path)
            for name, tensor in source.tensors.items()
            if not re.fullmatch(layout.dropped, name)
        }
        sizes = self._sizes(source)
        n_layers, emb_dim, n_inner = sizes["n_layers"], sizes["emb_dim"], sizes["n_inner"]
        tied = layout.head not in tensors
        end = 50256 if sizes["vocab_size"] > 50256 else None  # a smaller vocabulary is not GPT-2's
        given: dict[str, Any] = told | sizes
        given |= {"n_heads": heads(source, emb_dim, n_heads), "n_inner": None if n_inner == 4 * emb_dim else n_inner}
        try:
            config = GPTScratchConfig(
                **given,
                qkv_bias=self.has_qkv_bias(tensors),
                tie_word_embeddings=tied,
                bos_token_id=end,
                eos_token_id=end,
            )
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise ConversionError(f"{path} is not usable: {error}") from error
        check_tensors(tensors, self.expected(config, tensors), str(path), "the other tensors' sizes")
        ours = layout.to_scratch(tensors, n_layers)
        if not tied and same_bits(ours["out_head.weight"].read(), ours["tok_emb.weight"].read()):
            config.tie_word_embeddings = True
            del ours["out_head.weight"]
        return Contents(str(path), config, ours, ours["tok_emb.weight"].dtype)

    def _sizes(self, source: Source) -> dict[str, int]:
        """What the tensors' shapes say, where the file does not say otherwise."""
        tensors, path = source.tensors, source.path

        def shape(ours: str) -> torch.Size:
            name = self.layout.named(ours).replace("{n}", "0")
            if name not in tensors:
                raise ConversionError(f"{path} lacks {name!r}; take the whole state dict")
            if len(tensors[name].shape) != 2:
                raise ConversionError(f"{name!r} in {path} has shape {list(tensors[name].shape)}, but it is a matrix")
            return tensors[name].shape

        try:
            n_layers = self.layout.count_layers(tensors)
        except ValueError as error:
            raise ConversionError(f"{path}: {error}; take the whole state dict") from error
        vocab_size, emb_dim = shape("tok_emb.weight")
        sizes = {
            "vocab_size": vocab_size,
            "context_length": shape("pos_emb.weight")[0],
            "emb_dim": emb_dim,
            "n_layers": n_layers,
            "n_inner": shape("trf_blocks.{n}.ff.layers.0.weight").numel() // max(emb_dim, 1),
        }
        for name in sizes.keys() & source.told.keys():
            if source.told[name] != sizes[name]:
                raise ConversionError(
                    f"{path} says {name}={source.told[name]!r}, but its tensors say {sizes[name]}; one is wrong"
                )
        return sizes

    def has_qkv_bias(self, names: Iterable[str]) -> bool:
        """Whether a model with such tensors has biases on query, key and value."""
        return True

    def expected(self, config: GPTScratchConfig, names: Iterable[str]) -> dict[str, LazyTensor]:
        """The tensors, without values, that a model of this config has, in the format's names."""
        return self.layout.from_scratch(plain_tensors(config), config.n_layers)

    def limits(self, config: GPTScratchConfig) -> dict[str, tuple]:
        """The settings that the format cannot express, and the values that it means."""
        return {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "activation_function": TANH_GELU,
            "n_inner": (None, 4 * config.emb_dim),
            "layer_norm_epsilon": (1e-5,),
        }

    def check(self, contents: Contents, options: Options) -> None:
        """Raises ConversionError for what the model does and the format cannot say, before anything is written."""
        if options.bias is not None and not self.has_bias_choice:
            having = ", ".join(repr(name) for name, format in FORMATS.items() if format.has_bias_choice)
            raise ConversionError(
                f"got bias={options.bias} for {self.name!r}, but only {having} has the choice; leave bias out"
            )
        if self.plain:
            contents.check_plain()
        for name, allowed in self.limits(contents.config).items():
            if getattr(contents.config, name) not in allowed:
                raise ConversionError(
                    f"the model has {name}={getattr(contents.config, name)!r}, but {self.name} knows only "
                    f"{' or '.join(map(repr, allowed))} and cannot say otherwise; export to 'gpt2' instead"
                )

    def write(self, contents: Contents, path: Path, options: Options) -> Written:
        """Writes what `check` has let through, one tensor at a time.

        Args:
            path: the file, or the directory.

        Raises:
            ConversionError: the weights cannot be written so.
        """
        tensors, n_layers = contents.tensors, contents.config.n_layers
        if self.layout.stores_tied_head and contents.config.tie_word_embeddings:
            tensors = {**tensors, "out_head.weight": tensors["tok_emb.weight"]}
        if self.layout.stores_qkv_biases:
            tensors = with_qkv_biases(tensors, n_layers)
        return self.save(self.layout.from_scratch(tensors, n_layers), contents, path, options)

    def save(self, tensors: dict[str, LazyTensor], contents: Contents, path: Path, options: Options) -> Written:
        """Writes tensors that have the format's names already; see `write`."""
        raise NotImplementedError

    def load(self, directory: Path, kind: type[GPTScratchPreTrainedModel]) -> PreTrainedModel:
        """The model in a directory of this format, in float32."""
        raise NotImplementedError

    def finish(self, directory: Path, contents: Contents, receipt: Mapping[str, Any], hub_id: str | None) -> None:
        """Adds to what was written what can be told only at the end.

        Args:
            hub_id: where the source lies on the hub, if it does.
        """


FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Makes a format known to all functions and commands.

    Raises:
        ValueError: its name is taken.
    """
    if format.name in FORMATS:
        raise ValueError(f"there is a format {format.name!r} already; choose another name")
    FORMATS[format.name] = format


def readable() -> str:
    """What can be read, for messages."""
    return ", ".join(dict.fromkeys(format.what for format in FORMATS.values()))


def writable(name: str) -> Format:
    """The format of this name.

    Raises:
        ConversionError: there is none, or it is only read.
    """
    known = {format.name: format for format in FORMATS.values() if format.file is not None}
    if name not in known:
        raise ConversionError(f"got format {name!r}, but what can be written is {', '.join(known)}; choose one")
    return known[name]


def finite(tensor: LazyTensor, name: str, path: Path) -> LazyTensor:
    """The same, but an error when a value is NaN or infinite."""
    return replace(tensor, read=lambda: checked_finite(tensor.read(), name, path.name))


def heads(source: Source, emb_dim: int, given: int | None) -> int:
    """The number of attention heads, which no tensor tells.

    Raises:
        ConversionError: nobody says it, or it does not divide `emb_dim`, or two say two numbers.
    """
    told = source.told.get("n_heads")
    if told is not None and given not in (None, told):
        raise ConversionError(f"got n_heads={given}, but {source.path} says {told}; leave n_heads out")
    n_heads = given if told is None else told
    official = {width: heads for width, _, heads in PRESETS.values()}.get(emb_dim)
    advice = (
        f"the official model of emb_dim={emb_dim} has {official}"
        if official
        else "look at the config it was trained with"
    )
    if n_heads is None:
        raise ConversionError(
            f"{source.path} does not tell n_heads, and no tensor does; pass n_heads, in a command --n-heads "
            f"({advice}). A wrong number "
            f"that divides emb_dim={emb_dim} cannot be noticed: the model would load and compute something else"
        )
    if not isinstance(n_heads, int) or isinstance(n_heads, bool) or n_heads < 1 or emb_dim % n_heads:
        raise ConversionError(
            f"got n_heads={n_heads!r}, but it must be a whole number that divides emb_dim={emb_dim}; {advice}"
        )
    return n_heads


def plain_tensors(config: GPTScratchConfig) -> dict[str, LazyTensor]:
    """The tensors of a language model with this config, without values; a tied head is left out."""
    with torch.device("meta"):
        state_dict = without_prefix(GPTScratchForCausalLM(config).state_dict(), SCRATCH_PREFIX)
    if config.tie_word_embeddings:
        state_dict.pop("out_head.weight", None)
    return held(state_dict)


def check_tensors(tensors: Mapping[str, LazyTensor], expected: Mapping[str, LazyTensor], what: str, whose: str) -> None:
    """Compares names and shapes with what is expected, and wants one dtype.

    Args:
        what: where the tensors are, for messages.
        whose: what says how they should be.

    Raises:
        ConversionError: they are otherwise.
    """
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unknown:
        lacks = f"lacks {some(sorted(missing))}" if missing else ""
        has = f"has {some(sorted(unknown))}, which this model does not have" if unknown else ""
        raise ConversionError(
            f"{what} {' and '.join(filter(None, (lacks, has)))}; only the whole state dict of a plain GPT-2 is taken"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ConversionError(
                f"{name!r} of {what} has shape {list(tensor.shape)}, but by {whose} it must be "
                f"{list(expected[name].shape)}; take weights and sizes from the same model"
            )
        if tensor.dtype not in DTYPES:
            raise ConversionError(f"{name!r} of {what} is {tensor.dtype}, but weights are floats of 16 bits or more")
    dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
    if len(dtypes) > 1:
        raise ConversionError(f"{what} mixes {', '.join(dtypes)}, but a checkpoint has one dtype; cast it")
