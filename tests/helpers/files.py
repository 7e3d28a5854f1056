"""Files of checkpoints: edited, hashed, and what a conversion has left."""

import hashlib

from safetensors.torch import load_file, save_file


def rewrite(directory, change, name="model.safetensors"):
    tensors = change(load_file(directory / name))
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / name, metadata={"format": "pt"})


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(directory):
    return sorted(path.name for path in directory.parent.iterdir() if path.name.startswith("."))
