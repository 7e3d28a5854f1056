"""A language model with its tokenizer, from a checkpoint of any format, into memory."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConversionError
from ..model.modeling_gpt_scratch import GPTScratchForCausalLM
from .convert import answer, find_checkpoint
from .formats import open_source
from .hub import quiet_transformers
from .tokenizer_files import REMEDY, choose_tokenizer


def load_with_tokenizer(
    name: str,
    *,
    n_heads: int | None = None,
    activation_function: str | None = None,
    lora_scale: float | None = None,
    tokenizer: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """The model, in evaluation mode and the file's dtype, its tokenizer, and what the user should know, in sentences.

    Args:
        name: file, directory or hub id.
        n_heads: for "book" and "mingpt", whose files do not say it; a wrong number cannot be noticed.
        activation_function, lora_scale, tokenizer: as in `convert`.

    Raises:
        ConversionError: one of them cannot be had, or the model is no language model.
    """
    path = find_checkpoint(name, None)
    source = open_source(path)
    answer(source, activation_function, lora_scale)
    contents = source.format.read(source, n_heads)
    if not contents.kind.can_generate():
        raise ConversionError(
            f"{name} holds a {contents.kind.__name__}, which writes no text; take a {GPTScratchForCausalLM.__name__}"
        )
    chosen = choose_tokenizer(tokenizer, source, contents.config.vocab_size)
    if chosen.tokenizer is None:
        told = "".join(f" ({note})" for note in chosen.notes)
        raise ConversionError(f"{name} has no tokenizer, without which it takes no text{told}; {REMEDY}")
    with quiet_transformers():
        if source.format.loads:
            model: PreTrainedModel = contents.kind.from_pretrained(path)
        else:
            contents.check_plain()
            state_dict = {name: tensor.read().clone() for name, tensor in contents.tensors.items()}
            model = GPTScratchForCausalLM.from_book(state_dict, contents.config)
    notes = [note for note in chosen.notes if not note.startswith("left behind")]  # here nothing goes anywhere
    return model.eval(), chosen.tokenizer, [*source.notes, *notes]
