"""Runs Python programs as forks of a process that has imported torch and transformers, which takes seconds each time.

That process, the server, has imported nothing of this package, run no model and started no thread: a program finds
there what it would in a new interpreter, and ends as in one. Not so what an interpreter and the libraries read as they
start: options, PYTHONIOENCODING; and it sees no warning of the libraries' import. Where that or the import itself is
tested, start `sys.executable`. Windows has no forks: there each program has its interpreter.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import types
from contextlib import suppress
from pathlib import Path

LIBRARIES = [
    *("torch", "torch.distributed", "torch.utils.data", "accelerate", "safetensors.torch", "tokenizers", "torchao"),
    "transformers.generation.continuous_batching",
    "transformers.generation.utils",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.gpt2.tokenization_gpt2",
    "transformers.pipelines",
    "transformers.quantizers.auto",
    "transformers.trainer",
]
# What the libraries read as they are imported is the same for all programs, but for HF_MODULES_CACHE.
SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_python(*arguments, cwd=None, env=None):
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`; first a file or `-c`."""
    arguments = list(map(str, arguments))
    env = dict(os.environ if env is None else env) | SETTINGS
    if not hasattr(os, "fork"):
        return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True)
    path = search_path(env.get("PYTHONPATH", ""))
    with tempfile.TemporaryDirectory() as directory:
        files = [str(Path(directory) / name) for name in ("out", "err")]
        print(json.dumps([arguments, str(cwd or Path.cwd()), env, path, files]), file=server().stdin, flush=True)
        status = server().stdout.readline()
        if not status:
            raise RuntimeError(f"the server ended with status {server().wait()}; what it said is above")
        return subprocess.CompletedProcess(arguments, int(status), *(Path(file).read_text() for file in files))


@functools.cache
def server():
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | SETTINGS
    )
    atexit.register(process.communicate)  # which closes its input
    return process


@functools.cache
def search_path(pythonpath):
    """What a new interpreter begins with, behind the program's own folder."""
    command = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    return json.loads(subprocess.check_output(command, env={**os.environ, "PYTHONPATH": pythonpath}))


def serve():
    """Answers each line with a program's exit status; returns in the program's process what it is to run."""
    for name in LIBRARIES:
        with suppress(ImportError):  # another version's
            importlib.import_module(name)
    gc.freeze()  # or every program looks for garbage in all of the libraries
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def become(arguments, cwd, env, path, files):
    """Makes this process the program's; returns its code and its namespace."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for module in list(sys.modules.values()):
        if "HF_MODULES_CACHE" in vars(module) and "HF_MODULES_CACHE" in env:
            module.HF_MODULES_CACHE = env["HF_MODULES_CACHE"]
    for name in ("random", "numpy.random", "torch.random"):
        sys.modules[name].seed()
    program, *rest = arguments
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if program == "-c":
        code, sys.argv, sys.path[:] = rest[0], ["-c", *rest[1:]], ["", *path]
    else:
        code, sys.argv, sys.path[:] = Path(program).read_bytes(), arguments, [str(Path(program).parent), *path]
        main.__file__ = program
    return compile(code, program, "exec"), vars(main)


def run(code, namespace):
    global status
    status = 1
    try:
        exec(code, namespace)
        status = 0
    except SystemExit as end:
        status = 1 if isinstance(end.code, str) else end.code or 0
        raise


def leave():
    """Takes the place of the interpreter's end after all `atexit` handlers: to free what it holds takes 2 s."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    status = 1  # of a program that does not start
    atexit.register(leave)  # the first: it is called last
    run(*become(*serve()))
