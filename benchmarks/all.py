"""Everything, one after the other, and the tables in README.md: python benchmarks/all.py

Takes about two hours on two cores; --only decode,prefill measures those. Run it on a machine that does nothing else.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
BENCHMARKS = (
    "decode",
    "prefill",
    "training",
    "load",
    "save",
    "import_time",
    "scaling",
    "profile_decode",
    "memory_order",
)


def with_tables(readme: str, results: Path) -> str:
    """The page with every table that there is between its two marks."""
    for name in BENCHMARKS:
        table = results / f"{name}.md"
        if table.exists():
            begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
            before, _, rest = readme.partition(begin)
            after = rest.partition(end)[2]
            readme = f"{before}{begin}\n\n{table.read_text(encoding='utf-8')}\n{end}{after}"
    return readme


def main(
    only: Annotated[str, typer.Option(help="Names separated by commas.")] = ",".join(BENCHMARKS),
    output: Annotated[Path, typer.Option(help="Where the reports go.")] = HERE / "results",
    quick: Annotated[bool, typer.Option(help="Tiny models: shows that all runs, measures nothing.")] = False,
) -> None:
    """Runs the benchmarks, each in its own process, and puts their tables into README.md."""
    failed = []
    for name in only.split(","):
        command = [sys.executable, str(HERE / f"{name}.py"), "--output", str(output), *(["--quick"] if quick else [])]
        print(f"=== {name}", flush=True)
        if subprocess.run(command).returncode:
            failed.append(name)
    if not quick:
        readme = HERE / "README.md"
        readme.write_text(with_tables(readme.read_text(encoding="utf-8"), output), encoding="utf-8")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    typer.run(main)
