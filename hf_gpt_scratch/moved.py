"""Finds 0.1.0's modules in their new places, with a warning: for old imports, and for classes in pickles."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

ROOMS = {
    "model": "configuration_gpt_scratch decoding int8 layers loss modeling_gpt_scratch weight_map",
    "weights": "checkpoint parity publish",
    "lab": "diagnose",
    "cli": "report terminal",
}
# Modules that have been renamed, too.
RENAMED = {
    "conversion": "weights.convert",
    "formats": "weights.convert",
    "gguf_file": "weights.formats.gguf",
    "layouts": "weights.formats.format",
    "lazy": "weights.tensors",
    "parallel": "model.sharded_loading",
    "tf_checkpoint": "weights.formats.tensorflow",
    "torch_files": "weights.formats.torch_file",
}
PACKAGE = __name__.rpartition(".")[0]
MOVED = {f"{PACKAGE}.{name}": f"{PACKAGE}.{room}.{name}" for room, names in ROOMS.items() for name in names.split()}
MOVED |= {f"{PACKAGE}.{name}": f"{PACKAGE}.{new}" for name, new in RENAMED.items()}


class Moved(MetaPathFinder, Loader):
    """Imports a module from its new place under its old name."""

    def find_spec(self, fullname, path=None, target=None):
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(
            f"{spec.name} has moved to {new}; the public names are in {PACKAGE} itself",
            FutureWarning,
            stacklevel=2,
        )
        module = import_module(new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the module's own, instead of the old name's


def keep_old_names() -> None:
    """Makes imports of the old names work."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.append(Moved())
