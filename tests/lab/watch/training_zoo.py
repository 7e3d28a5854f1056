"""The zoo of training scripts: as people write them, with mistakes, and with harmless changes."""

import contextlib
import io
import tomllib
from pathlib import Path

from hf_gpt_scratch.lab.watch.session import watch_script

HERE = Path(__file__).parent
SCRIPTS = {path.stem: path.read_text(encoding="utf-8") for path in (HERE / "scripts").glob("*.txt")}
ZOO = tomllib.loads((HERE / "mistakes.toml").read_text(encoding="utf-8"))
SABOTAGES, HEALTHY = ZOO["sabotage"], ZOO["healthy"]


def changed(script, changes):
    """The script's text with each old text replaced; it has to be there."""
    text = SCRIPTS[script]
    for old, new in changes:
        assert old in text, f"{script} has no {old!r}"
        text = text.replace(old, new)
    return text


def watched(text, folder, **options):
    """The report on a script with this text."""
    file = Path(folder) / "train.py"
    file.write_text(text, encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        report = watch_script(file, **options)
    assert not [line for line in report.seen if "could not be judged" in line]
    return report
