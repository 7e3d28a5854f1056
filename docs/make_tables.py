"""Writes the tables of these pages that come from the code: python docs/make_tables.py"""

import re
from pathlib import Path

from hf_gpt_scratch import GPTScratchConfig
from hf_gpt_scratch.lab.mistakes import mistakes as known_mistakes
from hf_gpt_scratch.model import weight_map

DOCS = Path(__file__).parent
ROOT = DOCS.parent


def mistakes() -> str:
    """The mistakes in a forward pass that the lab knows: name, what the first of that name says, how many there are."""
    lines = ["| mistake | for instance, of GPT-2 124M | tried |", "| --- | --- | --- |"]
    known = known_mistakes(GPTScratchConfig.preset("124M"))
    for name in dict.fromkeys(mistake.name for mistake in known):
        says = [mistake.says for mistake in known if mistake.name == name]
        lines.append(f"| `{name}` | {says[0]} | {len(says)} |")
    return "\n".join(lines)


OURS = ("ours, sdpa", "ours, compiled", "ours, for_decoding")
OTHERS = ("transformers GPT-2, compiled", "CTranslate2, oneDNN", "onnxruntime")
INT8 = ("ours, int8", "ours, int8, compiled", "", "", "CTranslate2, MKL, int8", "")
# What a row says, the table of benchmarks/README.md that it is of, the column, the rows there.
SPEEDS = (
    ("decode, batch 1, 32+64 tokens", "batch 1, 32+64 tokens", "speed", OURS + OTHERS),
    ("decode, batch 2, 32+64 tokens", "batch 2, 32+64 tokens", "speed", OURS + OTHERS),
    ("decode, batch 4, 32+64 tokens", "batch 4, 32+64 tokens", "speed", OURS + OTHERS),
    ("decode, batch 8, 32+64 tokens", "batch 8, 32+64 tokens", "speed", OURS + OTHERS),
    ("decode, batch 1, 928+64 tokens", "batch 1, 928+64 tokens", "speed", OURS + OTHERS),
    ("prefill, 1024 tokens (0.1.0)", "batch 1, 1024 tokens", "speed", OURS + OTHERS),
    ("training step, 4×256 tokens", "batch 4×256", "speed", OURS + OTHERS),
    ("its peak memory (less is better)", "batch 4×256", "memory", OURS + OTHERS),
    ("int8 decode, batch 1 (0.1.0)", "0.1.0: batch 1, 32+64 tokens", "speed", INT8),
)


def measured(table: str, column: str) -> dict[str, float]:
    """A column of one of the benchmarks' tables, by row."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    [lines] = re.findall(rf"^\| {re.escape(table)} \|.*\n(?:\|.*\n)+", text, re.M)
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
    cells = {row[0]: row[header.index(column)].removesuffix("×") for row in rows}
    return {name: float(cell) for name, cell in cells.items() if cell}


def speed() -> str:
    """Ours beside the others, relative to transformers; the best of each row is bold."""
    lines = ["| | ours | ours, compiled | `for_decoding` | transformers, compiled | CTranslate2 | onnxruntime |"]
    lines.append("|" + " --- |" * 7)
    for label, table, column, names in SPEEDS:
        values = [measured(table, column).get(name) for name in names]
        best = (min if column == "memory" else max)(value for value in values if value is not None)
        shown = ["" if value is None else f"**{value:.2f}**" if value == best else f"{value:.2f}" for value in values]
        lines.append(f"| {' | '.join([label, *shown])} |".replace("  |", " |"))
    return "\n".join(lines)


# Page, mark, table: what lies between `<!-- mark -->` and `<!-- end of mark -->` is replaced.
TABLES = {
    "../README.md": {"speed": speed},
    "weights.md": {"weight map": weight_map.markdown},
    "lab.md": {"mistakes": mistakes},
}


def filled(page: str) -> str:
    """The text of a page with its tables as the code has them now."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for mark, table in TABLES[page].items():
        begin, end = f"<!-- {mark}: python docs/make_tables.py -->", f"<!-- end of {mark} -->"
        if len(re.findall(f"{begin}.*?{end}", text, re.S)) != 1:
            raise ValueError(f"{page} must have one {begin} before one {end}")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{table()}\n\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    for name in TABLES:
        (DOCS / name).write_text(filled(name), encoding="utf-8")
