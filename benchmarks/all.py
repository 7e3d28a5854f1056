"""Runs all benchmarks and updates the tables in README.md: python benchmarks/all.py

Takes about an hour on two cores; --only decode,prefill runs only these two. Use a machine that does nothing else.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
MINUTES = {  # approximate, on two cores
    "decode": 20,
    "prefill": 6,
    "training": 9,
    "quality": 4,
    "load": 4,
    "import_time": 3,
    "scaling": 8,
    "profile_decode": 2,
    "few_rows": 2,
    "gpu": 0,
}
BENCHMARKS = tuple(MINUTES)
ENDED = {0: "done", 2: "cannot run here", 3: "DONE, BUT A CHECK FAILED: see the table for the row"}  # by exit status


def with_tables(readme: str, results: Path) -> str:
    """The page with each table that was measured between its two marks."""
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
    rounds: Annotated[int, typer.Option(help="Measurements of each row; 0: the default of each script.")] = 0,
    output: Annotated[Path, typer.Option(help="Where to save the reports.")] = HERE / "results",
    quick: Annotated[bool, typer.Option(help="Tiny models: only tests that everything runs.")] = False,
) -> None:
    """Runs the benchmarks, each in its own process, and writes their tables into README.md.

    The exit status is 1 if a benchmark broke, 3 if a check failed, otherwise 0.
    """
    names = only.split(",")
    if unknown := set(names) - set(BENCHMARKS):
        raise typer.BadParameter(f"--only {', '.join(sorted(unknown))}: choose from {', '.join(BENCHMARKS)}")
    options = ["--output", str(output), *(["--rounds", str(rounds)] if rounds else []), *(["--quick"] if quick else [])]
    if not quick:
        print(f"About {sum(MINUTES[name] for name in names)} minutes with the scripts' own rounds, on two cores")
    statuses, report = set(), []
    for name in names:
        print(f"=== {name}", flush=True)
        start = time.perf_counter()
        status = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *options]).returncode
        taken = time.perf_counter() - start
        statuses.add(status)
        report.append(f"{name}: {taken / 60:.1f} minutes, {ENDED.get(status, f'BROKE with status {status}')}")
        print(report[-1], flush=True)
    if not quick:
        readme = HERE / "README.md"
        readme.write_text(with_tables(readme.read_text(encoding="utf-8"), output), encoding="utf-8")
    print("===", *report, sep="\n")
    sys.exit(1 if statuses - ENDED.keys() else 3 if 3 in statuses else 0)


if __name__ == "__main__":
    typer.run(main)
