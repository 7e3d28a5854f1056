"""A model from your own code: a file, a module of a package or a notebook; its config; and the call that builds it."""

import ast
import copy
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import LabError, few
from ..model.book_cfg import SIZES
from ..model.config_translation import TO_GPT2
from ..model.configuration_gpt_scratch import GPTScratchConfig
from .held import Held

# What others call the sizes; the whole name has to match, in upper case or lower.
SIZE_NAMES = {
    "vocab_size": r"(n|num|d)_?(vocab|tokens?)|vocab(ulary)?(_?(size|len|dim))?|v",
    "context_length": r"(n|d)_?(ctx|positions)|block_?(size|len)|((max|n)_?)?(ctx|context|seq(uence)?|pos(ition)?s?)"
    r"(_?(len(gth)?|size|window|embeddings))?|max_?(seq_?)?len(gth)?|(max_?)?t",
    "emb_dim": r"(n|d)_?(embd?|embed|model|inp)|(emb(d|ed|edding)?|hidden)(_?(dim|size|d|width))?s?"
    r"|model_?(dim|size|d|width)|(dim|width|channels)|num_?hiddens|d|e|k|c",
    "n_heads": r"((n|num)_?)?(attention_?|attn_?)?heads?|n?h",
    "n_layers": r"((n|num)_?)?(hidden_?|trf_?|transformer_?)?(layers?|blocks|blks)|(n|num)_?(block|blk)|depth|n?l|n",
    "drop_rate": r".*drop.*",
    "qkv_bias": r"(qkv_?|use_?|attn_?)?bias(es)?",
    "n_inner": r"(n|d)_?(inner|ff|ffn|mlp|hid(den)?)"
    r"|(ff|ffn|mlp|inner|intermediate|feed_?forward)(_?(embed|dim|size|hidden))+",
    "head_dim": r"(d_?head|head_?(dim|size))",
    "layer_norm_epsilon": r"((layer_?)?(norm|ln)_?)?eps(ilon)?",
    "expansion": r"((ff|ffn|mlp)_?)?(mult(iplier)?|ratio|expansion(_?factor)?)",
    "device": "device",
    "model_type": "model_type",
}
# The part of a nested config in which the sizes are: `cfg.model.n_layer`.
GROUPS = r"model(_?(config|cfg|args|params))?|gpt_?2?|arch(itecture)?|net(work)?|transformer|h?params|hyper_?parameters"


class Settings(dict):
    """A config with the book's access, `cfg["emb_dim"]`, and nanoGPT's, `config.n_embd`, under anybody's names.

    `defaults` are the values that your file gives its own configs, for what is no size.
    """

    defaults: Mapping[str, Any] = {}

    def __missing__(self, name: str) -> Any:
        meant = concept(name)
        if meant is not None and dict.__contains__(self, meant):
            return self[meant]
        if self.defaults.get(name, self) is not self:
            value = self.defaults[name]
            return filled(value, self) if isinstance(value, Mapping) or is_nested(value) else value
        if re.fullmatch(GROUPS, name, re.IGNORECASE):
            return self
        raise KeyError(f"{name}: the cfg has none; add it, --cfg '{{\"{name}\": …}}'")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the cfg has no {name!r}; add it, --cfg '{{\"{name}\": …}}'") from None

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def knows(self, name: str) -> bool:
        """Whether there is a value for this name, which may be another's for a size."""
        return self.get(name, self) is not self


def concept(name: str) -> str | None:
    """The size that a name means, by the book's name or those of `SIZE_NAMES`."""
    if name in SIZE_NAMES:
        return name
    name = re.sub(r"(^|_)(decoder|target|tgt)_", r"\1", name, flags=re.IGNORECASE)
    return next((size for size, names in SIZE_NAMES.items() if re.fullmatch(names, name, re.IGNORECASE)), None)


def book_settings(config: GPTScratchConfig) -> Settings:
    """The config under the book's names, GPT-2's and nanoGPT's."""
    values: dict[str, Any] = {name: getattr(config, name) for name in SIZES}
    theirs = {TO_GPT2.get(name, name): value for name, value in values.items()}
    others = {"block_size": config.context_length, "dropout": config.drop_rate, "bias": True}
    inner = {"n_inner": config.n_inner or 4 * config.emb_dim, "head_dim": config.emb_dim // config.n_heads}
    more = {"layer_norm_epsilon": config.layer_norm_epsilon, "expansion": 4, "device": "cpu", "model_type": None}
    return Settings(values | theirs | others | inner | more, drop_rate=config.drop_rate, qkv_bias=config.qkv_bias)


# Your file


def import_file(file: str, wanted: str = "") -> ModuleType:
    """Executes a Python file, what a name in a notebook needs, or imports a module by its dotted name."""
    path = Path(file).expanduser()
    try:
        if path.suffix not in (".py", ".ipynb"):
            return importlib.import_module(file)
        if not path.is_file():
            raise LabError(f"there is no file {file}; check the path")
        if path.suffix == ".ipynb":
            return from_notebook(path, wanted)
        return from_package(path) if (path.parent / "__init__.py").is_file() else from_path(path)
    except LabError:
        raise
    except (Exception, SystemExit) as error:  # whatever the file raises
        raise LabError(f"{file} does not run: {type(error).__name__}: {error}") from error


def from_path(path: Path) -> ModuleType:
    """A file by itself; if it imports its neighbours by `from .name`, as a module of its folder."""
    known = sys.modules.get(path.stem)
    taken = known is not None and not same_file(known, path)
    # The module keeps the file's name, unless that is a module of somebody else's.
    name = f"{path.stem}_of_{abs(hash(str(path.resolve()))):x}" if taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LabError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    with neighbours(path.parent):
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            if "no known parent package" not in str(error) and "attempted relative import" not in str(error):
                raise
            sys.modules.pop(name, None)
            return from_package(path)
    return module


def from_package(path: Path) -> ModuleType:
    """A module of a package, by the names of the folders that have an `__init__.py`, at least its own."""
    path = path.resolve()
    parts, folder = [path.stem], path.parent
    while (folder / "__init__.py").is_file() or len(parts) == 1:
        parts.insert(0, folder.name)
        folder = folder.parent
    if parts[-1] == "__init__":
        parts.pop()
    with neighbours(folder):
        return importlib.import_module(".".join(parts))


@contextmanager
def neighbours(folder: Path) -> Iterator[None]:
    """A folder's modules can be imported, and of those that are imported already, none of another folder's is taken."""
    folder = folder.resolve()
    for found in folder.iterdir():
        name = found.stem if found.suffix == ".py" else found.name
        known = sys.modules.get(name)
        ours = found.suffix == ".py" or (found.is_dir() and any(found.glob("*.py")))
        if known is not None and ours and is_users(known) and not same_file(known, found):
            for other in [other for other in sys.modules if other == name or other.startswith(f"{name}.")]:
                del sys.modules[other]
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def same_file(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    places = [file] if file else list(getattr(module, "__path__", []))
    paths = {Path(place).resolve() for place in places}
    return bool(paths & {path.resolve(), path.resolve() / "__init__.py"})


def is_users(module: ModuleType) -> bool:
    """Whether a module is neither installed nor Python's own."""
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), None)
    return file is not None and not any(part in file for part in ("site-packages", "dist-packages", sys.base_prefix))


def from_notebook(path: Path, wanted: str) -> ModuleType:
    """What a name needs of a notebook: the imports and definitions that it uses. For a model, all cells are run.

    Lines for the shell and for IPython are left out.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{path} is no notebook: {type(error).__name__}: {error}") from error
    code = "\n".join(without_magics(source) for source in sources if not source.lstrip().startswith("%%"))
    tree = ast.parse(code, filename=str(path))
    name = wanted.partition(".")[0]
    if any(isinstance(part, ast.ClassDef | ast.FunctionDef) and part.name == name for part in tree.body):
        tree.body = needed(tree.body, name)
    module = ModuleType(f"{path.stem}_notebook")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    with neighbours(path.parent):
        exec(compile(tree, str(path), "exec"), module.__dict__)
    return module


def without_magics(source: str) -> str:
    lines = [re.sub(r"^(\s*)[%!?].*", r"\1pass", line) for line in source.splitlines()]
    return "\n".join(lines)


def needed(statements: list[ast.stmt], name: str) -> list[ast.stmt]:
    """The statements that bind a name, or a name that these use, and so on."""
    bound = [(statement, bindings(statement)) for statement in statements]
    wanted, chosen = [name], set()
    for name in wanted:
        for i, (statement, names) in enumerate(bound):
            if name in names and i not in chosen:
                chosen.add(i)
                used = {part.id for part in ast.walk(statement) if isinstance(part, ast.Name)}
                wanted += [other for other in used if other not in wanted]
    stars = {i for i, (_, names) in enumerate(bound) if "*" in names}
    return [statements[i] for i in sorted(chosen | stars)]


def bindings(statement: ast.stmt) -> set[str]:
    """The names that a statement at the top level binds or changes."""
    names: set[str] = set()
    for part in ast.walk(statement) if not isinstance(statement, ast.ClassDef | ast.FunctionDef) else [statement]:
        if isinstance(part, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(part.name)
        elif isinstance(part, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in part.names}
        elif isinstance(part, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = part.targets if isinstance(part, ast.Assign) else [part.target]
            for target in targets:
                names |= {inner.id for inner in ast.walk(target) if isinstance(inner, ast.Name)}
    return names


def public_model(module: ModuleType | None, attribute: str, file: str) -> Any:
    """The class, function or model of this name, or a class's method, `Name.method`.

    Raises:
        LabError: there is none; the message names the file's classes.
    """
    made: Any = module
    for part in attribute.split("."):
        made = getattr(made, part, None)
    if made is None:
        models = [n for n, value in vars(module).items() if isinstance(value, type) and issubclass(value, nn.Module)]
        raise LabError(f"{file} has no {attribute!r}; its models are {', '.join(models) or 'none'}")
    return made


# Its config


def read_cfg(cfg: Any, module: ModuleType | None) -> Any:
    """A config: what your file calls `cfg`, a mapping, or the mapping that it is the JSON or the JSON file of."""
    if cfg is None or not isinstance(cfg, str):
        return cfg
    named = getattr(module, cfg, None) if cfg.isidentifier() else None
    if named is not None:
        return named
    if cfg.endswith(".json") and not Path(cfg).is_file():
        raise LabError(f"there is no file {cfg}; check the path")
    try:
        values = json.loads(Path(cfg).read_text(encoding="utf-8") if not cfg.lstrip().startswith("{") else cfg)
        return {name: Settings(value) if isinstance(value, dict) else value for name, value in dict(**values).items()}
    except (OSError, ValueError, TypeError) as error:
        raise LabError(
            f"got cfg {cfg!r}, which is neither JSON, nor a JSON file, nor a config in your file ({error})"
        ) from error


def values_of(config: Any) -> dict[str, Any]:
    """The public values of a config: a mapping's, a dataclass's or any object's, its class's own included."""
    if isinstance(config, Mapping):
        return {str(name): value for name, value in config.items()}
    classes = config.__mro__ if isinstance(config, type) else type(config).__mro__
    values: dict[str, Any] = {}
    for owner in reversed(classes):
        values |= {name: value for name, value in vars(owner).items() if not callable(value)}
    values |= {} if isinstance(config, type) else getattr(config, "__dict__", {})
    return {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and not isinstance(value, property | classmethod | staticmethod)
    }


def is_config(name: str, value: Any) -> bool:
    """Whether a value of your file is a config: a mapping or an object, or a class of these, that is called one."""
    called = re.search(r"config|cfg|hparams|args|settings", name, re.IGNORECASE)
    if isinstance(value, type):
        return bool(called) and not issubclass(value, nn.Module)
    return bool(called) and (isinstance(value, Mapping) or (hasattr(value, "__dict__") and not callable(value)))


def own_configs(module: ModuleType | None) -> dict[str, Any]:
    """The configs in your file by name: mappings, objects, and classes that no installed package defines."""
    found = {name: value for name, value in vars(module).items() if is_config(name, value)} if module else {}
    return {name: value for name, value in found.items() if not isinstance(value, type) or is_own(value, module)}


def is_own(value: type, module: ModuleType | None) -> bool:
    """Whether a class is of your file or of a file beside it."""
    home = value.__module__
    return home == getattr(module, "__name__", "") or (home in sys.modules and is_users(sys.modules[home]))


def defaults_of(module: ModuleType | None) -> dict[str, Any]:
    """The values in your file's configs for names that are no sizes, where these have one value only."""
    found: dict[str, list[Any]] = {}
    for value in own_configs(module).values():
        for name, default in values_of(value).items():
            if concept(name) is None and default not in found.setdefault(name, []):
                found[name].append(default)
    return {name: values[0] for name, values in found.items() if len(values) == 1}


def filled(template: Any, settings: Settings) -> Any:
    """A config of the same kind, with these sizes and its own other values.

    Args:
        template: a mapping, a config, or a class of configs.
    """
    if isinstance(template, Mapping):
        known = {name: settings[name] for name in template if concept(name) and settings.knows(name)}
        result = Settings({**template, **settings, **known})
        result.defaults = settings.defaults
        return result
    if dataclasses.is_dataclass(template):
        named = {f.name: settings[f.name] for f in dataclasses.fields(template) if f.init and settings.knows(f.name)}
        inner = {f.name: config_in(f, template) for f in dataclasses.fields(template) if f.init}
        named |= {name: filled(value, settings) for name, value in inner.items() if value is not None}
        return template(**named) if isinstance(template, type) else dataclasses.replace(template, **named)
    made = called(template, settings, template.__name__) if isinstance(template, type) else copy.copy(template)
    for name, value in values_of(made).items():
        if is_nested(value):
            setattr(made, name, filled(value, settings))
        elif concept(name) and settings.knows(name):
            try:
                setattr(made, name, settings[name])
            except AttributeError:
                continue  # a property, which follows from the others
    return made


def config_in(field: dataclasses.Field, template: Any) -> Any:
    """The config that a dataclass's field holds: its value, default or class; None if it holds something else."""
    value = None if isinstance(template, type) else getattr(template, field.name)
    if value is None and field.default is not dataclasses.MISSING:
        value = field.default
    if value is None and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    return value if is_nested(value) else field.type if dataclasses.is_dataclass(field.type) else None


def is_nested(value: Any) -> bool:
    """Whether a value in a config is a config: a dataclass or another object of attributes, some of which are sizes."""
    plain = value is None or isinstance(value, type | Mapping | torch.Tensor | nn.Module) or callable(value)
    return not plain and hasattr(value, "__dict__") and any(concept(name) for name in values_of(value))


def outermost(classes: list[type]) -> list[type]:
    """The config classes that are in none of the others."""
    inside = {type(value) for other in classes for value in values_of(other).values()}
    for other in filter(dataclasses.is_dataclass, classes):
        inside |= {type(config_in(field, other)) for field in dataclasses.fields(other)}
        inside |= {field.type for field in dataclasses.fields(other) if isinstance(field.type, type)}
    return [found for found in classes if found not in inside]


# The call


def build(
    make: Callable[..., Any], settings: Settings, source: str, module: ModuleType | None, given: Any
) -> nn.Module:
    """The model: `make(config)` if it takes a config, else `make` with the settings that it names.

    Args:
        given: the config that the user gave, if any.
    """
    try:
        model = called(make, settings, source, module, given)
    except LabError:
        raise
    except Exception as error:  # whatever the class raises
        raise LabError(
            f"{source} cannot be built: {type(error).__name__}: {error}; see --cfg, or write a function without "
            "arguments that returns the model, and name that"
        ) from error
    return model if isinstance(model, nn.Module) else Held(model)


def called(
    make: Callable[..., Any], settings: Settings, source: str, module: ModuleType | None = None, given: Any = None
) -> Any:
    """What a class or function returns for these settings."""
    accepted = list(inspect.signature(make).parameters.values())
    named = [p for p in accepted if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    required = [p for p in named if p.default is p.empty]
    takes_config = [p for p in (required if len(required) == 1 else []) if concept(p.name) is None or given_alone(p)]
    if not required:
        plain = [p for p in named if isinstance(p.default, type) or not callable(p.default)]
        takes_config = [p for p in plain if is_config(p.name, p.default)]
    if takes_config and module is not None:
        return with_config(make, takes_config[0], settings, module, given)
    unknown = [p.name for p in required if not settings.knows(p.name)]
    if unknown and not takes_config:
        values = ", ".join(f'"{name}": …' for name in unknown)
        raise LabError(f"{source} needs {few(unknown, 5)}, which no size is; give --cfg '{{{values}}}'")
    arguments = {p.name: settings[p.name] for p in named if settings.knows(p.name)}
    letters = {p.name.lower(): p.name for p in named if len(p.name) == 1}
    if {"n", "l"} <= letters.keys() and "t" not in letters:  # N tokens, L layers
        arguments[letters["n"]] = settings["context_length"]
    if any(p.kind is p.VAR_KEYWORD for p in accepted):
        return with_any_names(make, arguments, settings)
    return make(**arguments)


def given_alone(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is annotated with a class, as a config is, and a size is not."""
    annotation = parameter.annotation
    return isinstance(annotation, type) and annotation not in (parameter.empty, int, float, bool, str)


def with_any_names(make: Callable[..., Any], arguments: dict[str, Any], settings: Settings) -> Any:
    """The result of `make(**kwargs)`: with the names in its code, else all of each size, else those of one program."""
    book = {name: settings[name] for name in (*SIZES, "drop_rate", "qkv_bias")}
    gpt2 = {TO_GPT2.get(name, name): settings[name] for name in SIZES}
    nano = {"block_size": settings["context_length"], "dropout": settings["drop_rate"], "bias": True}
    nano |= {name: settings[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    failed: Exception | None = None
    own = {name: settings[name] for name in names_in_code(make) if concept(name) and settings.knows(name)}
    attributes = names_in_code(make, attributes=True)
    read = {name: settings[name] for name in attributes if concept(name) and settings.knows(name)}
    for names in (own, dict(settings), book, nano, gpt2, read, {}):
        try:
            return make(**{**names, **arguments})
        except Exception as error:  # whatever the class raises
            failed = failed or error
    raise failed or TypeError("no names of the sizes are accepted")


def names_in_code(make: Callable[..., Any], *, attributes: bool = False) -> list[str]:
    """The texts in the code of a function, or of a class's constructor: the keys that it reads from `**kwargs`.

    Args:
        attributes: also the names of attributes, of an object that is made from `**kwargs`.
    """
    code = getattr(getattr(make, "__init__", make) if isinstance(make, type) else make, "__code__", None)
    found, names = [code], list[str]()
    for part in found:
        for constant in getattr(part, "co_consts", ()):
            names += [constant] if isinstance(constant, str) else []
            found += [constant] if hasattr(constant, "co_consts") else []
        names += getattr(part, "co_names", ()) if attributes else ()
    return names


def with_config(
    make: Callable[..., Any], parameter: inspect.Parameter, settings: Settings, module: ModuleType, given: Any
) -> Any:
    """The result of `make(config)`, with the first kind of config that it accepts."""
    failed: Exception | None = None
    for config in configs_for(parameter, settings, module, given):
        try:
            return make(config()) if parameter.kind is parameter.POSITIONAL_ONLY else make(**{parameter.name: config()})
        except Exception as error:  # whatever the class raises
            failed = failed or error
    raise failed or TypeError("no config is accepted")


def configs_for(
    parameter: inspect.Parameter, settings: Settings, module: ModuleType, given: Any
) -> list[Callable[[], Any]]:
    """The configs for a parameter: as given, or of its annotation's class or its default's, or the file's, or any."""
    if given is not None and not isinstance(given, Mapping):
        return [lambda: given() if isinstance(given, type) else given]
    annotation = parameter.annotation
    if isinstance(annotation, str):
        annotation = getattr(module, annotation.strip("'\""), None)
    plain = ("builtins", "typing", "collections.abc", "inspect")
    if isinstance(annotation, type) and annotation.__module__ not in plain:
        return [lambda: filled(annotation, settings)]
    if parameter.default is not parameter.empty and parameter.default is not None:
        return [lambda: filled(parameter.default, settings)]
    objects = [value for value in own_configs(module).values() if not isinstance(value, Mapping)]
    classes = outermost([value for value in objects if isinstance(value, type)]) or objects
    own: list[Callable[[], Any]] = [lambda: filled(classes[0], settings)] if len(classes) == 1 else []
    return [*own, lambda: settings]
