"""Registers the models where other libraries look them up, once those are imported, without importing them.

The import of `hf_gpt_scratch.model` registers them with transformers' Auto classes, those of `peft_rows` and
`transformer_lens_rows` with PEFT and TransformerLens.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]
# A module of another library, and ours that is imported when it has been run: the last that the tables there need, and
# before anything reads them.
REGISTERING = {
    "transformers": f"{PACKAGE}.model",
    "peft.utils.constants": f"{PACKAGE}.peft_rows",
    "transformer_lens.factories.architecture_adapter_factory": f"{PACKAGE}.transformer_lens_rows",
}


class After(MetaPathFinder):
    """Finds one module as the other finders do, and imports one of ours once that module has been run.

    Then none of transformers' submodules is half imported, so ours can import what they need.
    """

    def __init__(self, name: str, ours: str):
        self.name, self.ours = name, ours

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            usual = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                usual(module)
                import_module(self.ours)  # if it fails, so does this import, and the next one tries again
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            loader.exec_module = exec_module  # otherwise the loader stays as it is: others ask it for sources and files
        return spec


def register_once_imported() -> None:
    """Registers the models with each library, now if it is imported, or else when it is."""
    waiting = {finder.name for finder in sys.meta_path if isinstance(finder, After)}
    for name, ours in REGISTERING.items():
        if name in sys.modules:
            import_module(ours)
        elif name not in waiting:
            sys.meta_path.insert(0, After(name, ours))
