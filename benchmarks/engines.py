"""The engines that decode.py, prefill.py and scaling.py compare on one official checkpoint.

An engine whose package is not installed is left out, and the tables name it as missing. Engines other than torch run in
processes of their own, without torch (workers.py): in one process, CTranslate2 and torch slow each other down by a
third and more.
Shapes: B batch, T tokens, V vocabulary.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import REFERENCE, Report, Timed, Worker, in_child, selected, timed
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TorchAoConfig,
)
from transformers.pytorch_utils import Conv1D

from hf_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM, Int8Config, for_decoding
from hf_gpt_scratch.weights.checkpoint import Progress
from hf_gpt_scratch.weights.formats.directory import Weights
from hf_gpt_scratch.weights.formats.gguf import GGUF, write_gguf

torch._dynamo.config.recompile_limit = 64  # each compiled row has its own model with the same code


@functools.cache
def load(model_class: type[PreTrainedModel], checkpoint: Path, **options: Any) -> PreTrainedModel:
    """A model from `from_pretrained`; rows with the same options share it."""
    return model_class.from_pretrained(checkpoint, **options).eval()


class Transformers:
    """A Transformers model through plain `.generate()`, greedy.

    Args:
        static: use a static cache instead of a growing one.
        compiled: compile the prefill, and with a static cache the decoding step, with `torch.compile`.
        inductor: options of the compiler.
        mode: the mode in which the decoding step is compiled.
        lookup: guess up to so many tokens at once from the text so far, and check them together; for one sequence.
    """

    backend = "inductor"

    def __init__(
        self,
        model_class,
        checkpoint,
        static=False,
        compiled=False,
        mode="default",
        inductor=None,
        device="cpu",
        lookup=None,
        **options,
    ):
        self.model = self.loaded(model_class, checkpoint, **options).to(device)
        self.static, self.compiled, self.lookup = static, compiled, lookup
        self.how = dict(options=inductor, mode=None) if inductor else dict(mode=mode)
        self.forward = torch.compile(self.model, backend=self.backend, **self.how) if compiled else self.model

    def loaded(self, model_class, checkpoint, **options):
        return load(model_class, checkpoint, **options)

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:  # (B, T)
        return self.forward(ids, use_cache=False, logits_to_keep=1).logits[:, -1]  # (B, V)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:  # (B, T)
        return self.forward(ids, use_cache=False).logits  # (B, T, V)

    def generate(self, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:  # (B, T)
        # The checkpoint's own settings would stop at its end-of-text token.
        settings = GenerationConfig(max_new_tokens=new_tokens, pad_token_id=0, disable_compile=not self.compiled)
        settings.prompt_lookup_num_tokens = self.lookup
        if self.static:
            settings.cache_implementation = "static"
        if self.compiled:
            settings.compile_config = CompileConfig(**self.how, fullgraph=True, backend=self.backend)
            settings.compile_config._compile_all_devices = True  # otherwise transformers compiles only on GPUs
        self.model.generation_config = settings
        return self.model.generate(ids, attention_mask=torch.ones_like(ids))  # (B, T + new_tokens)


class NoCache(Transformers):
    """Computes all tokens again for each new one, like nanoGPT and the book's `generate_text_simple`."""

    def generate(self, ids, new_tokens):
        for _ in range(new_tokens):
            ids = torch.cat((ids, self.prefill(ids).argmax(-1, keepdim=True)), dim=1)
        return ids


class Int8(Transformers):
    """Ours with int8 weights and bfloat16 activations; `left` are the names of layers whose weights stay bfloat16."""

    def loaded(self, model_class, checkpoint, left=(), **options):
        int8 = Int8Config(list(left))
        return model_class.from_pretrained(checkpoint, dtype=torch.bfloat16, quantization_config=int8, **options).eval()


class TorchAoInt8(Transformers):
    """The same with torchao."""

    def loaded(self, model_class, checkpoint, **options):
        from torchao.quantization import Int8WeightOnlyConfig

        int8 = TorchAoConfig(Int8WeightOnlyConfig())
        return model_class.from_pretrained(checkpoint, dtype=torch.bfloat16, quantization_config=int8, **options).eval()


class ForDecoding(Transformers):
    """Ours, frozen and packed."""

    def loaded(self, model_class, checkpoint, **options):
        model: Any = load(model_class, checkpoint, **options)
        return for_decoding(model)


class Foreign:
    """An engine of workers.py; ids and logits are sent as numpy arrays, outside the measured time.

    Args:
        convert: writes the checkpoint in the engine's format, in a process of its own.
        engine: a class of workers.py.
        options: for both.
    """

    def __init__(self, convert, engine, checkpoint, **options):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            in_child(convert, checkpoint, directory, *options.values())
            self.worker = Worker(engine, directory=directory, threads=torch.get_num_threads(), **options)

    def call(self, method, ids, **arguments):
        call = self.worker.call(method, ids=ids.numpy(), **arguments)
        return Timed(call.seconds, torch.from_numpy(call.output))

    def prefill(self, ids):
        return self.call("prefill", ids)

    def logits(self, ids):
        return self.call("logits", ids).output

    def generate(self, ids, new_tokens):
        return self.call("generate", ids, new_tokens=new_tokens)

    def close(self):
        self.worker.close()


def to_ctranslate2(checkpoint: Path, directory: Path, width: str, mkl: bool) -> None:
    """Writes the checkpoint for CTranslate2, with the ids as tokens.

    Raises:
        ImportError: CTranslate2 is not installed.
    """
    from ctranslate2.converters import TransformersConverter

    vocabulary = {str(i): i for i in range(AutoConfig.from_pretrained(checkpoint).vocab_size)}

    class Numbers:
        unk_token = bos_token = eos_token = str(len(vocabulary) - 1)

        def get_vocab(self):
            return vocabulary

    class Converter(TransformersConverter):
        def load_tokenizer(self, *args, **kwargs):
            return Numbers()

    Converter(str(checkpoint)).convert(str(directory), quantization=width, force=True)


class Step(nn.Module):
    """The official model as a function of ids and cached keys and values, which is what ONNX can express."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask, positions, past):  # past: (layers, 2, B, H, S, D)
        cache = DynamicCache(list(zip(past[:, 0], past[:, 1], strict=True)))
        output = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        layers: Any = cache.layers
        return output.logits[:, -1], torch.stack([torch.stack((layer.keys, layer.values)) for layer in layers])


def to_onnx(checkpoint: Path, directory: Path) -> None:
    """Exports the official model with dynamic batch, length and past.

    Raises:
        ImportError: a package of the exporter or of the engine is not installed.
    """
    import onnxruntime  # noqa: F401  fail before the export, which takes long
    import onnxscript  # noqa: F401  the exporter needs it

    model = load(GPT2LMHeadModel, checkpoint)
    config = model.config
    example = {
        "ids": torch.zeros(2, 4, dtype=torch.long),
        "mask": torch.ones(2, 7, dtype=torch.long),
        "positions": torch.arange(3, 7).expand(2, -1),
        "past": torch.zeros(config.n_layer, 2, 2, config.n_head, 3, config.n_embd // config.n_head),
    }
    free = {"ids": (0, 1), "mask": (0, 1), "positions": (0, 1), "past": (2, 4)}
    torch.onnx.export(
        Step(model).eval(),
        kwargs=example,
        f=directory / "model.onnx",
        dynamo=True,
        verbose=False,
        output_names=["logits", "present"],
        dynamic_shapes={name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in free.items()},
    )


def to_gguf(checkpoint: Path, directory: Path) -> None:
    """Writes the checkpoint for llama.cpp, with a tokenizer that spells the ids, since it returns text.

    Raises:
        ImportError: gguf or llama.cpp's bindings are not installed.
    """
    import gguf  # noqa: F401  needed by write_gguf
    import xllamacpp  # noqa: F401

    weights: Any = Weights(checkpoint, "gpt2")
    config = GPTScratchConfig.from_gpt2(weights.config)
    # A byte-pair tokenizer must have at least one merge.
    vocabulary = {"<": 0, ">": 1, "<>": 2, **{f"<{i}>": i for i in range(3, config.vocab_size)}}
    backend = Tokenizer(BPE(vocabulary, [("<", ">")]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)  # like GPT-2's, otherwise it is not written
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tensors = GGUF.layout.from_scratch(weights.in_our_names(), config.n_layers)
    if notes := write_gguf(tensors, config, directory / "model.gguf", tokenizer, Progress()):
        raise RuntimeError(f"llama.cpp cannot be measured: {'; '.join(notes)}")


class Floor:
    """An approximate lower bound for float32 weights: the time to read them all, or to multiply by them all.

    A token at batch 1 has to read all weights: measured by a sum of as many numbers, and by one-row products with one
    matrix of that size, in either memory order. A prompt has to multiply its tokens by the weights: in either order,
    too, into memory that is already allocated. The fastest counts. For a few tokens at once neither is a bound, and
    this row means nothing.
    """

    def __init__(self, checkpoint):
        model = load(GPT2LMHeadModel, checkpoint)
        width = model.config.n_embd
        numbers = torch.rand(model.num_parameters() // width * width)
        x = torch.rand(1, width)
        self.readings = (
            numbers.sum,
            functools.partial(F.linear, x, numbers.view(-1, width)),  # [out, in]
            functools.partial(F.linear, x, numbers.view(width, -1).t()),  # [in, out]
        )
        # The head's product is only for the prompt's last token.
        self.matrices = [
            module.weight for module in model.get_submodule("transformer").modules() if isinstance(module, Conv1D)
        ]
        self.head = model.lm_head.weight.t()

    def generate(self, ids, new_tokens):
        return Timed(min(timed(repeated, reading, new_tokens).seconds for reading in self.readings))

    @functools.cached_property
    def orders(self):
        """The matrices as in GPT-2, [in, out], and in the other order; made once, for prompts only."""
        return self.matrices, [matrix.t().contiguous().t() for matrix in self.matrices]

    def prefill(self, ids):
        tokens, (last, *_) = ids.numel(), ids.shape
        inputs = {matrix.shape[0]: torch.rand(tokens, matrix.shape[0]) for matrix in self.matrices}
        outputs = {matrix.shape[1]: torch.empty(tokens, matrix.shape[1]) for matrix in self.matrices}

        def products(matrices):
            for matrix in matrices:
                torch.mm(inputs[matrix.shape[0]], matrix, out=outputs[matrix.shape[1]])
            inputs[len(self.head)][:last] @ self.head

        return Timed(min(timed(products, matrices).seconds for matrices in self.orders))


def repeated(function: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        function()


BFLOAT16 = dict(dtype=torch.bfloat16)
STATIC, COMPILED = dict(static=True), dict(static=True, compiled=True)
LOOKUP = dict(lookup=10)
BFLOAT16_HEAD = dict(left=("out_head",))
CPP_WRAPPER = {**COMPILED, "inductor": {"cpp_wrapper": True}}
OURS, THEIRS = (
    functools.partial(Transformers, model_class) for model_class in (GPTScratchForCausalLM, GPT2LMHeadModel)
)
CTRANSLATE2 = functools.partial(Foreign, to_ctranslate2, "CTranslate2")
# In float32 unless the name has another dtype: these change the numbers, and are used only on request.
ENGINES: dict[str, Callable[[Path], Any]] = {
    REFERENCE: THEIRS,
    "transformers GPT-2, eager attention": functools.partial(THEIRS, attn_implementation="eager"),
    "transformers GPT-2, static cache": functools.partial(THEIRS, **STATIC),
    "transformers GPT-2, compiled": functools.partial(THEIRS, **COMPILED),
    "transformers GPT-2, compiled, C++ wrapper": functools.partial(THEIRS, **CPP_WRAPPER),
    "transformers GPT-2, prompt lookup": functools.partial(THEIRS, **LOOKUP),
    "transformers GPT-2, no cache": functools.partial(NoCache, GPT2LMHeadModel),
    "transformers GPT-2, bf16": functools.partial(THEIRS, **BFLOAT16),
    "transformers GPT-2, bf16, compiled": functools.partial(THEIRS, **BFLOAT16, **COMPILED),
    "ours, sdpa": OURS,
    "ours, for_decoding": functools.partial(ForDecoding, GPTScratchForCausalLM),
    "ours, eager attention": functools.partial(OURS, attn_implementation="eager"),
    "ours, static cache": functools.partial(OURS, **STATIC),
    "ours, compiled": functools.partial(OURS, **COMPILED),
    "ours, compiled, C++ wrapper": functools.partial(OURS, **CPP_WRAPPER),
    "ours, prompt lookup": functools.partial(OURS, **LOOKUP),
    "ours, for_decoding, prompt lookup": functools.partial(ForDecoding, GPTScratchForCausalLM, **LOOKUP),
    "ours, no cache": functools.partial(NoCache, GPTScratchForCausalLM),
    "ours, bf16": functools.partial(OURS, **BFLOAT16),
    "ours, bf16, compiled": functools.partial(OURS, **BFLOAT16, **COMPILED),
    "ours, int8": functools.partial(Int8, GPTScratchForCausalLM),
    "ours, int8, compiled": functools.partial(Int8, GPTScratchForCausalLM, **COMPILED),
    "ours, int8, compiled, C++ wrapper": functools.partial(Int8, GPTScratchForCausalLM, **CPP_WRAPPER),
    "ours, int8 but for the head": functools.partial(Int8, GPTScratchForCausalLM, **BFLOAT16_HEAD),
    "ours, int8 but for the head, compiled, C++ wrapper": functools.partial(
        Int8, GPTScratchForCausalLM, **BFLOAT16_HEAD, **CPP_WRAPPER
    ),
    "ours, torchao int8, compiled": functools.partial(TorchAoInt8, GPTScratchForCausalLM, **COMPILED),
    # With the faster one of its two libraries of matrix products for each dtype.
    "CTranslate2, oneDNN": functools.partial(CTRANSLATE2, width="float32", mkl=False),
    "CTranslate2, oneDNN, bf16": functools.partial(CTRANSLATE2, width="bfloat16", mkl=False),
    "CTranslate2, MKL, int8": functools.partial(CTRANSLATE2, width="int8", mkl=True),
    "llama.cpp": functools.partial(Foreign, to_gguf, "LlamaCpp"),
    "onnxruntime": functools.partial(Foreign, to_onnx, "OnnxRuntime"),
    "floor: the weights read once, or the products with them": Floor,
}


@contextmanager
def built(checkpoint: Path, only: str, report: Report) -> Iterator[dict[str, Any]]:
    """The reference and the engines whose names match; those that cannot run here are reported as missing.

    At the end the engines' processes are stopped and the models freed.
    """
    engines: dict[str, Any] = {}
    try:
        for name in selected(ENGINES, only):
            try:
                engines[name] = ENGINES[name](checkpoint)
            except ImportError as error:
                report.missing[name] = str(error)
        yield engines
    finally:
        for engine in engines.values():
            if isinstance(engine, Foreign):
                engine.close()
        load.cache_clear()
