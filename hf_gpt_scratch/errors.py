"""The errors of this package: each message names the value, the rule and what helps."""

from collections.abc import Sequence

# What lies in a damaged file can be as long as the file.
LONGEST_MESSAGE = 1500


def shortened(text: str, length: int = 200) -> str:
    """The text, or its beginning and its end."""
    half = length // 2 - 2
    return text if len(text) <= length else f"{text[:half]} … {text[-half:]}"


def some(names: Sequence[object], most: int = 5) -> str:
    """The first of several names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shortened(repr(name)) for name in names[:most]) + more


class GPTScratchError(Exception):
    """What the commands and functions of this package refuse."""

    def __init__(self, message: str):
        super().__init__(shortened(message, LONGEST_MESSAGE))


class ConversionError(GPTScratchError):
    """A checkpoint that cannot be read, converted or published; nothing was left behind."""


class ParityError(GPTScratchError, AssertionError):
    """What was written is not the model that was read."""


class LabError(GPTScratchError):
    """A model that cannot be loaded or compared."""


class UnknownName(GPTScratchError, ValueError):
    """No row of the weight map and no model has this name."""


class UnknownArchitecture(GPTScratchError, ValueError):
    """A model that is neither ours nor the official one."""
