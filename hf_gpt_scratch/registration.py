"""Has the models registered with transformers' Auto classes once transformers is imported, without importing it.

The import of `hf_gpt_scratch.model` registers them.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL = f"{__name__.rpartition('.')[0]}.model"


class AfterTransformers(MetaPathFinder):
    """Finds transformers as the other finders do, and registers the models once its module has been run.

    Then none of its submodules is half imported, so ours can import what they need.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            usual = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                usual(module)
                import_module(MODEL)  # if it fails, so does this import, and the next one tries again
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            loader.exec_module = exec_module  # otherwise the loader stays as it is: others ask it for sources and files
        return spec


def register_once_imported() -> None:
    """Registers the models, now if transformers is imported, or else when it is."""
    if "transformers" in sys.modules:
        import_module(MODEL)
    elif not any(isinstance(finder, AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterTransformers())
