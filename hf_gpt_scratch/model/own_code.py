"""A model is saved with the code that it needs, so that it loads where the package is missing.

transformers copies the module of the class, and what that imports relatively. Of a class of one's own, then,
`from hf_gpt_scratch import GPTScratchBlock` becomes `from .modeling_gpt_scratch import GPTScratchBlock` in the copy,
and the files that ship with every model go along. An int8 model's copy imports the quantizer, which goes along, too.
"""

import ast
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .int8 import METHOD

logger = logging.get_logger(__name__)
HERE = Path(__file__).parent
QUANTIZER = "from .int8 import Int8Config  # noqa: E402, F401  # registers the quantizer of these weights"
PACKAGE = __name__.partition(".")[0] if not __name__.startswith("transformers_modules") else None


def own_files(model: PreTrainedModel) -> dict[str, Path]:
    """The user's own files that transformers saves with a model, by their names there.

    None of a model that was loaded with the code beside it: that code is complete, and is saved again as it is.
    """
    found: dict[str, Path] = {}
    for kind in (type(model), type(model.config)):
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if kind.__module__ == "__main__" or kind.__module__.startswith("transformers_modules."):
            continue
        if getattr(kind, "_auto_class", None) and file:
            files = map(Path, [file, *get_relative_import_files(file)])
            found |= {
                path.name: path for path in files if path.suffix == ".py" and path.resolve().parent != HERE.resolve()
            }
    return found


def refuse_own_files(model: PreTrainedModel, folder: str | os.PathLike, push_to_hub: bool) -> None:
    """Before anything is written.

    Raises:
        ValueError: files of the user's own would be replaced by others of their name, or be uploaded alone.
    """
    own = own_files(model)
    if push_to_hub and is_int8(model):
        raise ValueError(
            "got push_to_hub=True, which would upload the code of an int8 model before its quantizer lies beside it; "
            "call model.push_to_hub(repo_id) instead"
        )
    if taken := sorted(own.keys() & {f"{room}.py" for room in (*shipped(), "int8")}):
        raise ValueError(
            f"{', '.join(str(own[name]) for name in taken)} cannot be saved with the model, since a file that is saved "
            "with every model has this name; rename yours"
        )
    if any(path.resolve().parent == Path(folder).resolve() for path in own.values()):
        raise ValueError(f"{folder} is the folder of {', '.join(sorted(own))}; save the model in another one")
    if own and push_to_hub:
        raise ValueError(
            f"got push_to_hub=True, which would upload {', '.join(sorted(own))} before the code that it needs lies "
            "beside it; call model.push_to_hub(repo_id) instead"
        )


def is_int8(model: PreTrainedModel) -> bool:
    """Whether the model is quantized by `int8.py`."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return getattr(config, "quant_method", None) == METHOD


def bring_package(model: PreTrainedModel, folder: Path) -> None:
    """Makes what was saved in `folder` independent of this package, as far as it uses what ships with a model."""
    quantizer = {HERE / "int8.py"} if is_int8(model) else set()
    for name, original in sorted(own_files(model).items()) if PACKAGE else []:
        path = folder / name
        if not path.is_file():  # an adapter was saved, and nothing else
            continue
        source = path.read_text(encoding="utf-8")
        rewritten, needed, left = relative_imports(source)
        if left:
            logger.warning(
                f"{name} imports {', '.join(left)}, which does not ship with a model, so what is saved in {folder} "
                f"loads only where {PACKAGE} is installed"
            )
        if local := local_imports(source, original, type(model).__module__):
            logger.warning(
                f"{name} imports {', '.join(local)}, of which no copy is saved, so what is saved in {folder} loads "
                f"only where they can be imported; import them relatively: from .{local[0].rpartition('.')[2]} import …"
            )
        files = {HERE / f"{room}.py" for room in needed}
        further = {Path(other) for file in files for other in get_relative_import_files(file)} - files
        further |= quantizer if files else set()
        for file in files | further:
            shutil.copyfile(file, folder / file.name)
        if further:
            imports = "".join(f"    from .{file.stem} import *\n" for file in sorted(further))
            rewritten += f"\n# Older versions of transformers fetch only what this file imports.\nif False:\n{imports}"
        if rewritten != source:
            path.write_text(rewritten, encoding="utf-8")
    code = folder / "modeling_gpt_scratch.py"
    if quantizer and code.is_file():
        shutil.copyfile(HERE / "int8.py", folder / "int8.py")
        code.write_text(f"{code.read_text(encoding='utf-8')}\n{QUANTIZER}\n", encoding="utf-8")


def local_imports(source: str, file: Path, module: str) -> list[str]:
    """Modules that lie beside a file, or in the package of its class, and are imported by their absolute names."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    package = module.partition(".")[0] if "." in module else None

    def is_local(name: str) -> bool:
        top = name.partition(".")[0]
        beside = (file.parent / f"{top}.py").is_file() or (file.parent / top / "__init__.py").is_file()
        return top != PACKAGE and (beside or top == package)

    return sorted({name for name in names if is_local(name)})


def relative_imports(source: str) -> tuple[str, set[str], list[str]]:
    """The source with imports of what ships made relative; the modules that it then needs; and what does not ship."""
    lines = source.splitlines(keepends=True)
    needed: set[str] = set()
    left: list[str] = []
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in sorted(nodes, key=lambda node: -node.lineno):
        if isinstance(node, ast.Import):
            left += [alias.name for alias in node.names if alias.name.partition(".")[0] == PACKAGE]
            continue
        if node.level or (node.module or "").partition(".")[0] != PACKAGE:
            continue
        end = node.end_lineno or node.lineno
        before, after = lines[node.lineno - 1][: node.col_offset], lines[end - 1][node.end_col_offset :]
        if before.strip() or (after.strip().removeprefix(";") != "" and not after.strip().startswith("#")):
            left.append(f"{node.module}, on a line with something else")
            continue
        parts: dict[str, list[str]] = {}
        for alias in node.names:
            room = shipped_in(str(node.module), alias.name)
            parts.setdefault(f".{room}" if room else str(node.module), []).append(ast.unparse(alias))
            if room:
                needed.add(room)
            else:
                left.append(f"{node.module}.{alias.name}")
        new = [f"{before}from {module} import {', '.join(names)}\n" for module, names in sorted(parts.items())]
        lines[node.lineno - 1 : end] = new
    return "".join(lines), needed, left


def shipped_in(module: str, name: str) -> str | None:
    """The file of this folder, without its ending, that defines what `from module import name` gives; None if none."""
    value = getattr(import_module(module), name, None)
    for room in shipped() if value is not None else ():
        full_name = f"{__name__.rpartition('.')[0]}.{room}"
        if vars(import_module(full_name)).get(name) is value and getattr(value, "__module__", full_name) == full_name:
            return room
    return None


def shipped() -> list[str]:
    """The files of this folder that are saved with every model, without their ending."""
    model = HERE / "modeling_gpt_scratch.py"
    return [model.stem, *sorted({Path(file).stem for file in get_relative_import_files(model)} - {model.stem})]
