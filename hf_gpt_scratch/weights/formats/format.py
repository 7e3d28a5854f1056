"""The base class of formats: how a checkpoint is recognised, read and written.

Each file beside this one defines one or two formats; nothing here depends on them. `FORMATS` lists the registered ones.
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
from ...model.book_cfg import TANH_GELU
from ...model.configuration_gpt_scratch import PRESETS, GPTScratchConfig
from ...model.layers import refuse_other_mask
from ...model.modeling_gpt_scratch import GPTScratchForCausalLM, GPTScratchModel, GPTScratchPreTrainedModel
from ...model.weight_map import BASE, LM_HEAD, SCRATCH_PREFIX, Row, rows, without_prefix
from ..checkpoint import Progress, check_files, checked_finite, refuse_special_file
from ..parity import same_bits
from ..tensors import LazyTensor, from_scratch, held, to_scratch, with_qkv_biases

MAX_SHARD_SIZE = "50GB"  # as in `save_pretrained`
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# The rows of tensors that every GPT-2 has.
PLAIN = tuple(row for row in BASE if not re.search(r"cross|\.act\.", row.theirs))
T = TypeVar("T")


class Found:
    """A path whose format is to be recognised; it is read once, however many formats ask.

    Args:
        path: a file or a directory.

    Raises:
        ConversionError: it does not exist, or it is or holds a pipe or a device.
    """

    def __init__(self, path: Path):
        self.path, self.is_directory, self.start = path, path.is_dir(), b""
        self._known: dict[Callable, Any] = {}
        if self.is_directory:
            check_files(path)
            return
        refuse_special_file(path)
        try:
            with path.open("rb") as file:
                self.start = file.read(4)
        except OSError as error:
            raise ConversionError(
                f"{path} cannot be read ({error.strerror}); these formats can be read: {readable()}"
            ) from error

    @property
    def begins(self) -> str:
        """For messages: how the file begins, and that no format begins so."""
        return f"{self.path} begins with {self.start!r}, which is not the beginning of a known format"

    def once(self, read: Callable[[Path], T]) -> T:
        """The result of `read(path)`, computed once."""
        if read not in self._known:
            self._known[read] = read(self.path)
        return self._known[read]


@dataclass(frozen=True)
class Layout:
    """How a program names and lays out GPT-2's tensors.

    Args:
        table: rows of the weight map, with the program's names as `theirs`.
        dropped: pattern of the names of tensors that are not weights.
        stores_tied_head: the file stores the output head even if it is tied to the token embedding.
        stores_qkv_biases: the file stores zeros for the biases that a model without `qkv_bias` does not have.
    """

    table: tuple[Row, ...]
    dropped: str = r"(?!)"
    stores_tied_head: bool = False
    stores_qkv_biases: bool = True

    def named(self, ours: str) -> str:
        """The program's name of the tensor that holds `ours`; `{n}` stands for the layer in both."""
        return next(row.theirs for row in self.table if ours in row.ours)

    @cached_property
    def head(self) -> str | None:
        """The program's name of the output head; None if it has none."""
        return next((row.theirs for row in self.table if row.ours == LM_HEAD.ours), None)

    def count_layers(self, names: Iterable[str]) -> int:
        """The number of layers, from the tensors' names.

        Raises:
            ValueError: there are none, or a number is missing.
        """
        norm = re.escape(self.named("trf_blocks.{n}.norm1.scale")).replace(r"\{n\}", "(0|[1-9][0-9]*)")
        numbers = sorted(int(found[1]) for found in (re.fullmatch(norm, name) for name in names) if found)
        if not numbers or numbers != list(range(len(numbers))):
            raise ValueError(f"got the layers {numbers}, but layers are numbered from 0 without a gap")
        return len(numbers)

    def to_scratch(self, tensors: Mapping[str, LazyTensor], n_layers: int) -> dict[str, LazyTensor]:
        """The program's tensors under the book's names; those without a row are left out."""
        return to_scratch(tensors, rows(n_layers, self.table))

    def from_scratch(self, tensors: Mapping[str, LazyTensor], n_layers: int) -> dict[str, LazyTensor]:
        """The book's tensors under the program's names; the inverse of `to_scratch`."""
        return from_scratch(tensors, rows(n_layers, self.table))


def renamed(names: Callable[[Row], str], transposed: bool, head: Row | None = LM_HEAD) -> tuple[Row, ...]:
    """The rows of a plain GPT-2 under other names.

    Args:
        names: returns a row's name in the other program.
        transposed: matrices are stored `[in, out]`, as in GPT-2; otherwise `[out, in]`, as in `nn.Linear`.
        head: the row of the output head, if the program has one.
    """
    plain = (replace(row, theirs=names(row), transposed=row.transposed and transposed) for row in PLAIN)
    return (*plain, *([head] if head else []))


@dataclass(frozen=True)
class Training:
    """What a file has beside the weights for a training run to go on; nothing of it is checked.

    Args:
        optimizers: the states of optimizers, by the names under which they lie.
        parameters: the shapes of the weights and buffers, in the model's order.
        steps: how many the run has made; None if the file does not say it.
        settings: of the run, as its program saves them.
    """

    optimizers: dict[str, Any]
    parameters: dict[str, torch.Size]
    steps: int | None
    settings: dict[str, Any]


@dataclass
class Source:
    """A checkpoint as it is stored: its tensors under their own names, and its metadata under ours.

    Args:
        notes: what its reader should know, in sentences.
        files: those that are read.
        asks: settings that the file does not store, beside `n_heads`; `answer` takes them.
        tokenizer: makes the one that is inside the file, if there is one.
        training: what lies beside the weights for training to go on.
    """

    format: "Format"
    path: Path
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    asks: tuple[str, ...] = ()
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None
    training: Training | None = None

    def __post_init__(self):
        inside = self.path.iterdir() if self.path.is_dir() else [self.path]
        self.files = self.files or [file for file in inside if file.is_file()]

    def answer(self, **given: Any) -> None:
        """Takes what is known of the file from elsewhere; None is for what is not known.

        Raises:
            ConversionError: the file leaves nothing open there.
        """
        for name, value in given.items():
            if value is not None and name not in self.asks:
                why = f"says {self.metadata[name]!r}" if name in self.metadata else "leaves nothing open there"
                raise ConversionError(f"got {name}={value!r}, but {self.path} {why}; leave {name} out")
            if value is not None:
                self.metadata[name] = value


@dataclass
class Contents:
    """The content of a checkpoint, whatever its format.

    Args:
        name: of the checkpoint, for messages.
        tensors: under the book's names; a tied head is left out.
        dtype: of the model; single tensors may have others.
        kind: our class of the model.
        directory: the directory with the settings for `generate`, if there are any.
    """

    name: str
    config: GPTScratchConfig
    tensors: dict[str, LazyTensor]
    dtype: torch.dtype
    kind: type[GPTScratchPreTrainedModel] = GPTScratchForCausalLM
    directory: Path | None = None

    def check_plain(self, whose: str = "config.json") -> None:
        """Raises ConversionError unless these are the tensors of a language model of this config, all of one dtype.

        Args:
            whose: where the expected shapes come from, for the message.
        """
        check_tensors(self.tensors, plain_tensors(self.config), self.name, whose)


@dataclass(frozen=True)
class Options:
    """Options for writing.

    Args:
        max_shard_size: largest size of a weights file, in bytes or such as "5GB", if the format can have several.
        bias: whether biases are stored, if the format has the choice; None: if there are any.
        tokenizer: stored in the file, if the format has a place for one.
        quantize: what is written beside the weights as they are, if the format can: "int8".
        runs: what is written will be run by the format's program.
    """

    progress: Progress = field(default_factory=Progress)
    max_shard_size: int | str = MAX_SHARD_SIZE
    bias: bool | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    quantize: str | None = None
    runs: bool = False


@dataclass(frozen=True)
class Written:
    """The result of writing.

    Args:
        notes: sentences that users of the file should know.
        hashes: sha256 and size of the files that were hashed while they were written, by name.
        tokenizer: class of the tokenizer that is stored in the file.
    """

    notes: list[str] = field(default_factory=list)
    hashes: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: str | None = None


class Format:
    """A kind of checkpoint. A read-only format has no `file` and does not implement `save`.

    Attributes:
        name: in `export` and in the receipt.
        what: a description, for messages.
        layout: the names and layout of its tensors.
        file: its file name in the target directory; "" if it is the directory itself.
        mark: the file by which a directory of this format is recognised.
        suffixes: of its files, for hints in messages; the format itself is recognised by content.
        copies: how many copies of the weights must fit on the disk while they are written.
        tokenizer: "beside" the weights, "inside" the file, or None.
        plain: it stores only language models, all of whose tensors have one dtype.
        loads: `load` returns a model that can be run.
        has_bias_choice: `Options.bias` has an effect.
        quantizes: the values of `Options.quantize` that it knows.
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
    quantizes: tuple[str, ...] = ()

    def matches(self, found: Found) -> bool:
        """Whether the path is of this format."""
        raise NotImplementedError

    def near(self, found: Found) -> str | None:
        """For a path that no format matches: what is wrong and the remedy, or None if this format does not know."""
        return None

    def open(self, found: Found) -> Source:
        """The checkpoint at the path; no tensor is read yet.

        Raises:
            ConversionError: it is damaged.
        """
        raise NotImplementedError

    def read(self, source: Source, n_heads: int | None = None) -> Contents:
        """The content of a source, whose tensors are read later; `source.tensors` keeps only those that are used.

        Raises:
            ConversionError: it is not a complete, finite GPT-2, or `n_heads` is missing or wrong.
        """
        path, layout = source.path, self.layout
        for name, tensor in source.tensors.items():
            if re.fullmatch(layout.dropped, name) and name.endswith("attn.bias"):  # 1 where a token may attend
                refuse_mask(name, tensor.read() == 0, path)
        tensors = source.tensors = {
            name: finite(tensor, name, path)
            for name, tensor in source.tensors.items()
            if not re.fullmatch(layout.dropped, name)
        }
        sizes = self._sizes(source)
        n_layers, emb_dim, n_inner = sizes["n_layers"], sizes["emb_dim"], sizes["n_inner"]
        tied = layout.head not in tensors
        end = 50256 if sizes["vocab_size"] > 50256 else None  # a smaller vocabulary is not GPT-2's
        given: dict[str, Any] = source.metadata | sizes
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

    def in_layout(self, tensors: dict[str, LazyTensor], path: Path) -> dict[str, LazyTensor]:
        """Tensors under the names of a file, as they are under those of the layout."""
        return tensors

    def _sizes(self, source: Source) -> dict[str, int]:
        """The sizes, from the tensors' shapes; raises ConversionError if the metadata say otherwise."""
        tensors, path = source.tensors, source.path

        def shape(ours: str) -> torch.Size:
            name = self.layout.named(ours).replace("{n}", "0")
            if name not in tensors:
                raise ConversionError(f"{path} lacks {name!r}; give the complete state dict")
            if len(tensors[name].shape) != 2:
                raise ConversionError(f"{name!r} in {path} has shape {list(tensors[name].shape)}, but must be a matrix")
            return tensors[name].shape

        try:
            n_layers = self.layout.count_layers(tensors)
        except ValueError as error:
            raise ConversionError(f"{path}: {error}; give the complete state dict") from error
        vocab_size, emb_dim = shape("tok_emb.weight")
        sizes = {
            "vocab_size": vocab_size,
            "context_length": shape("pos_emb.weight")[0],
            "emb_dim": emb_dim,
            "n_layers": n_layers,
            "n_inner": shape("trf_blocks.{n}.ff.layers.0.weight").numel() // max(emb_dim, 1),
        }
        for name in sizes.keys() & source.metadata.keys():
            if source.metadata[name] != sizes[name]:
                raise ConversionError(
                    f"{path} says {name}={source.metadata[name]!r}, but its tensors say {sizes[name]}; correct its "
                    "metadata"
                )
        return sizes

    def has_qkv_bias(self, names: Iterable[str]) -> bool:
        """Whether a model with such tensors has biases on query, key and value."""
        return True

    def expected(self, config: GPTScratchConfig, names: Iterable[str]) -> dict[str, LazyTensor]:
        """The tensors of a model of this config, without values, under the format's names."""
        return self.layout.from_scratch(plain_tensors(config), config.n_layers)

    def limits(self, config: GPTScratchConfig) -> dict[str, tuple]:
        """The settings that the format does not store, with the values that it implies."""
        return {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "activation_function": TANH_GELU,
            "n_inner": (None, 4 * config.emb_dim),
            "layer_norm_epsilon": (1e-5,),
        }

    def check(self, contents: Contents, options: Options) -> None:
        """Raises ConversionError, before anything is written, if the format cannot express the model."""
        if options.bias is not None and not self.has_bias_choice:
            having = ", ".join(repr(name) for name, format in FORMATS.items() if format.has_bias_choice)
            raise ConversionError(
                f"got bias={options.bias} for {self.name!r}, but only {having} has the choice; leave bias out"
            )
        if options.quantize not in (None, *self.quantizes):
            known = ", ".join(f"{one!r} for {format.name!r}" for format in FORMATS.values() for one in format.quantizes)
            able = (f"give --format {name}, or " for name, one in FORMATS.items() if options.quantize in one.quantizes)
            raise ConversionError(
                f"got quantize={options.quantize!r} for {self.name!r}, but there is only {known}; {next(able, '')}"
                "leave quantize out"
            )
        if self.plain and not contents.kind.can_generate() and contents.kind is not GPTScratchModel:
            remedy = "keep the native directory" if contents.config.book_classifier else "use the format 'gpt2' instead"
            raise ConversionError(
                f"{contents.name} holds a {contents.kind.__name__}, but {self.name!r} stores language models alone; "
                f"{remedy}"
            )
        if self.plain:
            contents.check_plain()
        for name, allowed in self.limits(contents.config).items():
            if getattr(contents.config, name) not in allowed:
                raise ConversionError(
                    f"the model has {name}={getattr(contents.config, name)!r}, but {self.name} supports only "
                    f"{' or '.join(map(repr, allowed))}; "
                    + ("keep the native directory" if self.name == "gpt2" else "use the format 'gpt2' instead")
                )

    def room(self, contents: Contents, options: Options) -> int:
        """How many bytes must be free on the disk for the weights."""
        return self.copies * sum(tensor.nbytes for tensor in contents.tensors.values())

    def write(self, contents: Contents, path: Path, options: Options) -> Written:
        """Writes contents that `check` has accepted, one tensor at a time.

        Args:
            path: the file, or the directory.

        Raises:
            ConversionError: the weights cannot be written in this format.
        """
        tensors, n_layers = contents.tensors, contents.config.n_layers
        if self.layout.stores_tied_head and contents.config.tie_word_embeddings:
            tensors = {**tensors, "out_head.weight": tensors["tok_emb.weight"]}
        if self.layout.stores_qkv_biases:
            tensors = with_qkv_biases(tensors, n_layers)
        return self.save(self.layout.from_scratch(tensors, n_layers), contents, path, options)

    def save(self, tensors: dict[str, LazyTensor], contents: Contents, path: Path, options: Options) -> Written:
        """Writes tensors that already have the format's names; see `write`."""
        raise NotImplementedError

    def load(self, directory: Path, kind: type[GPTScratchPreTrainedModel]) -> PreTrainedModel:
        """The model in a directory of this format, in float32."""
        raise NotImplementedError

    def run(self, path: Path, contents: Contents, progress: Progress) -> dict[str, Any]:
        """The figures of what the program of this format computes from what was written, if it can be run here.

        Raises:
            ParityError: it is not what the model computes.
        """
        return {}

    def finish(self, directory: Path, contents: Contents, receipt: Mapping[str, Any], hub_id: str | None) -> None:
        """Adds what is known only at the end, such as the model card.

        Args:
            hub_id: of the source, if it is on the hub.
        """


FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Makes a format known to all functions and commands.

    Raises:
        ValueError: its name is taken.
    """
    if format.name in FORMATS:
        raise ValueError(f"there already is a format {format.name!r}; choose another name")
    FORMATS[format.name] = format


def readable() -> str:
    """The formats that can be read, for messages."""
    return ", ".join(dict.fromkeys(format.what for format in FORMATS.values()))


def writable(name: str) -> Format:
    """The format of this name.

    Raises:
        ConversionError: there is none, or it is only read.
    """
    known = {format.name: format for format in FORMATS.values() if format.file is not None}
    if name not in known:
        raise ConversionError(f"got format {name!r}, but it must be one of {', '.join(known)}; choose one of them")
    return known[name]


def finite(tensor: LazyTensor, name: str, path: Path) -> LazyTensor:
    """The tensor, which raises an error when it is read if a value is NaN or infinite."""
    return replace(tensor, read=lambda: checked_finite(tensor.read(), name, path.name))


def refuse_mask(name: str, mask: torch.Tensor, path: Path) -> None:
    """Raises ConversionError for a saved mask, true where a token must not attend, of another model than GPT-2."""
    try:
        refuse_other_mask(name, mask)
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error


def heads(source: Source, emb_dim: int, given: int | None) -> int:
    """The number of attention heads, which no tensor shows.

    Raises:
        ConversionError: it is unknown, does not divide `emb_dim`, or is given and differs from the file's.
    """
    stored = source.metadata.get("n_heads")
    if stored is not None and given not in (None, stored):
        raise ConversionError(f"got n_heads={given}, but {source.path} says {stored}; leave n_heads out")
    n_heads = given if stored is None else stored
    official = {width: heads for width, _, heads in PRESETS.values()}.get(emb_dim)
    advice = (
        f"the official model of emb_dim={emb_dim} has {official}"
        if official
        else "see the config that it was trained with"
    )
    if n_heads is None:
        raise ConversionError(
            f"{source.path} does not store n_heads; pass n_heads, or --n-heads on the command line ({advice}). A wrong "
            f"number that divides emb_dim={emb_dim} cannot be detected: the model would load and compute something else"
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
    """Checks that names and shapes are as expected, and that all dtypes are the same.

    Args:
        what: where the tensors are, for messages.
        whose: where the expected shapes come from.

    Raises:
        ConversionError: they are not.
    """
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unknown:
        lacks = f"lacks {some(sorted(missing))}" if missing else ""
        has = f"has {some(sorted(unknown))}, which this model does not have" if unknown else ""
        raise ConversionError(
            f"{what} {' and '.join(filter(None, (lacks, has)))}; give the complete state dict of a plain GPT-2"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ConversionError(
                f"{name!r} of {what} has shape {list(tensor.shape)}, but according to {whose} it must "
                f"be {list(expected[name].shape)}; use weights and sizes of the same model"
            )
        if tensor.dtype not in DTYPES:
            raise ConversionError(
                f"{name!r} of {what} is {tensor.dtype}, but weights must be floats of 16 bits or more; cast it"
            )
    dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
    if len(dtypes) > 1:
        raise ConversionError(f"{what} mixes {', '.join(dtypes)}, but a checkpoint has one dtype; cast them")
