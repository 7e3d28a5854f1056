"""Writes the tables of these pages that come from the code: python docs/make_tables.py"""

import re
from pathlib import Path

from hf_gpt_scratch import GPTScratchConfig
from hf_gpt_scratch.lab.mistakes import hypotheses
from hf_gpt_scratch.model import weight_map

DOCS = Path(__file__).parent


def mistakes() -> str:
    """The mistakes in a forward pass that the lab knows: name, what the first of that name says, how many there are."""
    lines = ["| mistake | for instance, of GPT-2 124M | tried |", "| --- | --- | --- |"]
    known = hypotheses(GPTScratchConfig.preset("124M"))
    for name in dict.fromkeys(hypothesis.name for hypothesis in known):
        says = [hypothesis.says for hypothesis in known if hypothesis.name == name]
        lines.append(f"| `{name}` | {says[0]} | {len(says)} |")
    return "\n".join(lines)


# Page, mark, table: what lies between `<!-- mark -->` and `<!-- end of mark -->` is replaced.
TABLES = {
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
