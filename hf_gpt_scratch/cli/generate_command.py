"""`generate` and `chat`: a model's own text on the terminal, token by token, from whatever `convert` reads."""

import os
import shlex
import sys
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import LONGEST_MESSAGE, ConversionError, shortened
from .status import FAILED

NEW_TOKENS, ANSWER_TOKENS = 20, 256  # of `generate`, as in transformers, and of an answer of `chat`, at most


def _positive(value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise typer.BadParameter(f"{value} is not greater than 0; --greedy takes the likeliest token")
    return value


Model = Annotated[str, typer.Argument(help="Directory or hub id, official or ours, or a file that convert reads.")]
NewTokens = Annotated[int | None, typer.Option(min=1, help="New tokens, at most.")]
Temperature = Annotated[float | None, typer.Option(callback=_positive, help="Sample; below 1 is more certain.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample from the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this probability.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the samples.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")]
Heads = Annotated[int | None, typer.Option(help="Attention heads, for files that do not store them.")]
Activation = Annotated[str | None, typer.Option(help="Activation, for files that do not store it: gelu or gelu_new.")]
LoraScale = Annotated[float | None, typer.Option(help="For the adapters of the book's appendix E, as in convert.")]
Tokenizer = Annotated[str | None, typer.Option(help="As in convert: directory, hub id or meta.pkl; gpt2.")]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    max_new_tokens: NewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    greedy: Greedy = False,
    n_heads: Heads = None,
    activation: Activation = None,
    lora_scale: LoraScale = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Continues a text, token by token; writes nothing to the disk.

    What no option says is as in the model's generation_config.json, so as `model.generate()` does it.
    """
    options = _sampling(temperature, top_k, top_p, greedy)
    source = dict(n_heads=n_heads, activation_function=activation, lora_scale=lora_scale, tokenizer=tokenizer)
    with _failing():
        text = _decoded(sys.stdin.buffer.read()) if prompt == "-" else prompt
        speaker = Speaker(model, source, seed, options)
        ids = speaker.ids(text)
        speaker.say(ids, speaker.room(ids.shape[1], max_new_tokens), skip_prompt=False)


def chat(
    model: Model,
    max_new_tokens: NewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    greedy: Greedy = False,
    n_heads: Heads = None,
    activation: Activation = None,
    lora_scale: LoraScale = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Talks with a model that was finetuned for it, by its tokenizer's chat template; Ctrl-D ends.

    Reads one message a line.
    """
    options = _sampling(temperature, top_k, top_p, greedy)
    source = dict(n_heads=n_heads, activation_function=activation, lora_scale=lora_scale, tokenizer=tokenizer)
    with _failing():
        speaker = Speaker(model, source, seed, options)
        if not speaker.tokenizer.chat_template:
            raise ConversionError(
                f"the tokenizer of {model} has no chat template, so no chat is possible; `examples/instruct.py` "
                "finetunes a model to follow instructions and saves one; for a model that was finetuned elsewhere, "
                f"{_place(model, tokenizer)}"
            )
        messages: list[dict[str, str]] = []
        while (line := _line()) is not None:
            if line.strip():
                messages.append({"role": "user", "content": line})
                messages = speaker.answer(messages, max_new_tokens)


class Speaker:
    """A model and its tokenizer, with the settings of a command.

    Args:
        source: the options of `load_with_tokenizer`.
        options: those of `model.generate`.

    Raises:
        ConversionError: one of them cannot be had.
    """

    def __init__(self, name: str, source: dict[str, Any], seed: int | None, options: dict[str, Any]):
        import transformers

        from ..weights.load import load_with_tokenizer

        transformers.logging.disable_progress_bar()
        self.model: Any
        self.tokenizer: Any
        self.model, self.tokenizer, notes = load_with_tokenizer(name, **source)
        for note in notes:
            Console(stderr=True).print(f"Note: {escape(note)}", soft_wrap=True)
        if seed is not None:
            transformers.set_seed(seed)
        self.options = options

    def ids(self, text: str | list[dict[str, str]]) -> Any:
        """The ids (1, T) of a text, or of messages up to the answer.

        Raises:
            ConversionError: the tokenizer or its chat template does not take them.
        """
        try:
            if isinstance(text, str):
                return self.tokenizer(text, return_tensors="pt", verbose=False).input_ids.long()
            options: dict[str, Any] = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
            return self.tokenizer.apply_chat_template(text, **options).input_ids
        except Exception as error:  # of the tokenizers library and of jinja2
            what = "tokenizer" if isinstance(text, str) else "chat template, or the tokenizer,"
            raise ConversionError(
                f"the model's {what} does not take this text ({type(error).__name__}: {error}); a character may be "
                "missing in its vocabulary"
            ) from error

    def room(self, length: int, asked: int | None, usual: int = NEW_TOKENS) -> int:
        """How many tokens may follow so many.

        Raises:
            ConversionError: the context has no place for them.
        """
        settings, context = self.model.generation_config, self.model.config.context_length
        if length == 0:
            raise ConversionError("the text is empty, and a model continues a text; give one")
        if length >= context:
            raise ConversionError(
                f"the text has {length} tokens, but the model's context_length is {context}, new tokens included; give "
                "a shorter text"
            )
        if asked is not None and length + asked > context:
            raise ConversionError(
                f"the text has {length} tokens and {asked} new ones are asked for, but the model's context_length is "
                f"{context}; give a shorter text, or --max-new-tokens {context - length} at most"
            )
        if asked is None:
            asked = settings.max_new_tokens
        if asked is None and settings.max_length is not None:
            asked = settings.max_length - length
            if asked < 1:
                raise ConversionError(
                    f"the text has {length} tokens, but generation_config.json says max_length={settings.max_length}; "
                    "give --max-new-tokens"
                )
        return min(usual if asked is None else asked, context - length)

    def say(self, ids: Any, new_tokens: int, skip_prompt: bool = True) -> str:
        """Prints what follows the ids (1, T), word by word, or at the end if there are beams, and returns it."""
        import torch
        from transformers import TextStreamer

        settings = self.model.generation_config
        ends = settings.eos_token_id
        pad = next((one for one in (settings.pad_token_id, self.tokenizer.pad_token_id) if one is not None), None)
        if pad is None:  # of one text nothing is padded
            pad = ends[0] if isinstance(ends, list) else ends
        streamed = self.options.get("num_beams", settings.num_beams) in (None, 1)
        streamer = TextStreamer(self.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True) if streamed else None
        try:
            found = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                pad_token_id=pad,
                num_return_sequences=1,
                streamer=streamer,
                **self.options,
            )
        except KeyboardInterrupt:
            print(flush=True)
            raise
        if not streamed:
            shown = found[0, ids.shape[1] :] if skip_prompt else found[0]
            print(self.tokenizer.decode(shown, skip_special_tokens=True), flush=True)
        return self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)

    def answer(self, messages: list[dict[str, str]], asked: int | None) -> list[dict[str, str]]:
        """Answers the last message; returns those that the model saw, and the answer.

        The oldest are left out where they do not fit; a last one that does not fit alone is refused, and dropped.
        """
        errors = Console(stderr=True)
        while True:
            try:
                ids = self.ids(messages)
                new_tokens = self.room(ids.shape[1], asked, ANSWER_TOKENS)
                break
            except ConversionError as error:
                if len(messages) > 1:
                    messages = messages[2:]
                    errors.print("Note: the context is full; the oldest message and its answer are forgotten.")
                    continue
                errors.print(f"[bold red]Not answered:[/] {escape(str(error))}", soft_wrap=True)
                return []
        return [*messages, {"role": "assistant", "content": self.say(ids, new_tokens).strip()}]


def _place(model: str, tokenizer: str | None) -> str:
    """Where a chat template can be written for them, as an instruction."""
    file = "write the template of its training as chat_template.jinja"
    directory = model if tokenizer is None else tokenizer
    if os.path.isdir(directory):
        return f"{file} into {directory}, beside the tokenizer's files"
    return (
        f"first `hf-gpt-scratch convert {shlex.quote(model)} DIRECTORY` with the same options, then {file} "
        "into that directory, beside the tokenizer, and chat with the directory"
    )


def _line() -> str | None:
    """A line of the user's; None at the end."""
    if not sys.stdin.isatty():
        line = sys.stdin.buffer.readline()
        return _decoded(line) if line else None
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _decoded(given: bytes) -> str:
    """The text of standard input, whatever the locale, without its last line's end.

    Raises:
        ConversionError: it is not UTF-8.
    """
    try:
        text = given.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(
            f"standard input is not UTF-8: byte {error.start + 1} is 0x{given[error.start]:02x}; convert it, for "
            "example with `iconv -f ENCODING -t UTF-8`"
        ) from error
    return text.replace("\r\n", "\n").removesuffix("\n")


def _sampling(temperature: float | None, top_k: int | None, top_p: float | None, greedy: bool) -> dict[str, Any]:
    """What `model.generate` is to do otherwise than its settings say."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in given.items() if value is not None}
    if greedy and given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise typer.BadParameter(f"--greedy and {names} exclude each other; give one of them")
    if greedy:
        return {"do_sample": False, "num_beams": 1}
    return {"do_sample": True, **given} if given else {}


@contextmanager
def _failing():
    """An error of the user's is one line, and status 1."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except BrokenPipeError:
        raise
    except (ConversionError, StrictDataclassError, ValueError, OSError) as error:
        told = escape(shortened(str(error), LONGEST_MESSAGE))
        Console(stderr=True).print(f"[bold red]Failed:[/] {told}", soft_wrap=True)
        sys.exit(FAILED)
