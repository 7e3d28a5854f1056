"""Starts `hf-gpt-scratch`, and the doctor's checks without the package."""

import importlib
import importlib.util
import sys
from types import ModuleType


def doctor_module() -> ModuleType:
    """`hf_gpt_scratch.cli.doctor`, without running the package's `__init__`; a later import of the package does.

    That would have the import of transformers import our models, too, whose failure is another check's.
    """
    if "hf_gpt_scratch" in sys.modules:
        return importlib.import_module("hf_gpt_scratch.cli.doctor")
    spec = importlib.util.find_spec("hf_gpt_scratch")
    if spec is None or spec.submodule_search_locations is None:
        sys.exit("hf-gpt-scratch is not installed whole: there is no package hf_gpt_scratch; pip install it again")
    bare = sys.modules["hf_gpt_scratch"] = ModuleType("hf_gpt_scratch")
    bare.__path__ = list(spec.submodule_search_locations)
    try:
        return importlib.import_module("hf_gpt_scratch.cli.doctor")
    finally:
        for name in ("hf_gpt_scratch", "hf_gpt_scratch.cli"):
            sys.modules.pop(name, None)


def main() -> None:
    """Runs the command; Ctrl-C ends it with status 130 and without a traceback, also during imports."""
    try:
        _main()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted\n")
        sys.exit(130)


def _main() -> None:
    try:
        try:
            from hf_gpt_scratch.cli.app import app
        except ImportError:
            if sys.argv[1:2] != ["doctor"]:
                raise
            doctor_module().main(sys.argv[2:])  # it needs less than the other commands
        else:
            app()
    except ImportError as error:
        remedy = "`hf-gpt-scratch doctor` says what is missing or does not fit."
        if sys.argv[1:2] == ["doctor"]:
            remedy = "Even `doctor` cannot start without that; pip install hf-gpt-scratch again."
        sys.exit(f"hf-gpt-scratch cannot import what it needs: {error}\n{remedy}")


if __name__ == "__main__":
    main()
