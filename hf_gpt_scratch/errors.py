"""The errors of this package. Each message names the value, the rule and the remedy."""

from collections.abc import Sequence

# A value quoted from a damaged file can be as long as the file.
LONGEST_MESSAGE = 1500


def shortened(text: str, length: int = 200) -> str:
    """The text, or its beginning and end if it is longer than `length`."""
    half = length // 2 - 2
    return text if len(text) <= length else f"{text[:half]} … {text[-half:]}"


def few(names: Sequence[str], most: int) -> str:
    """The names, or the first of them and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def some(names: Sequence[object], most: int = 5) -> str:
    """The same for names from files, which are quoted and shortened."""
    return few([shortened(repr(name)) for name in names], most)


class GPTScratchError(Exception):
    """The base class of this package's errors."""

    def __init__(self, message: str):
        super().__init__(shortened(message, LONGEST_MESSAGE))


class ConversionError(GPTScratchError):
    """A checkpoint cannot be read, converted or published; no partial result is left behind."""


class ParityError(GPTScratchError, AssertionError):
    """The model that was written differs from the one that was read."""


class LabError(GPTScratchError):
    """A model cannot be loaded or compared."""


class UnknownName(GPTScratchError, ValueError):
    """The weight map has no such name."""


class UnknownArchitecture(GPTScratchError, ValueError):
    """The model is neither an official GPT-2 nor one of ours."""
