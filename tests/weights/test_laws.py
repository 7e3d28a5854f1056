"""The laws of every conversion, whatever its formats: receipt, verification, nothing lost, nothing left."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from kill import KINDS, write_sources

from hf_gpt_scratch.errors import ConversionError, ParityError
from hf_gpt_scratch.weights import publish
from hf_gpt_scratch.weights.convert import RECEIPT, convert, export, verify_receipt
from hf_gpt_scratch.weights.formats import FORMATS, detect
from hf_gpt_scratch.weights.tensors import held


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


# One of them is quick enough for every day.
WAYS = [kind if kind == "official to ours" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.fixture(params=WAYS)
def way(request, sources, tmp_path):
    """The source of a way from one format to another, and a function that goes it, comparing the weights."""
    function, source, options = KINDS[request.param]
    path = tmp_path / source
    if (sources / source).is_dir():
        shutil.copytree(sources / source, path)
    else:
        path.parent.mkdir()
        shutil.copyfile(sources / source, path)

    def go(target, **more):
        return function(path, target, **{"check": "weights", **options, **more})

    return path, go


def figures(path):
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}


def everything(directory):
    """All files below it, and what is in them."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def target_format(go, source, target):
    """The format that a way ends in."""
    go(target, check=False)
    [name] = {detect(path) for path in (target, *target.iterdir()) if _is_checkpoint(path)}
    return FORMATS[name]


def _is_checkpoint(path):
    try:
        detect(path)
    except ConversionError:
        return False
    return True


def test_the_receipt_has_the_hashes_of_what_was_read_and_of_what_was_written(way, tmp_path):
    source, go = way
    if source.is_dir() and (source / "config.json").exists():
        (source / "picture.png").touch()  # which is not read
    receipt = go(tmp_path / "target")
    assert receipt == json.loads((tmp_path / "target" / RECEIPT).read_text()) == verify_receipt(tmp_path / "target")
    files = receipt["target"]["files"]
    written = [path for path in everything(tmp_path / "target") if path.name != RECEIPT]
    assert files.keys() == {path.relative_to(tmp_path / "target").as_posix() for path in written}
    assert all(found == figures(tmp_path / "target" / name) for name, found in files.items())
    there = receipt["source"]["files"]
    read = {path.name: path for path in (everything(source) if source.is_dir() else [source])}
    assert there.keys() == {name for name in read if not name.endswith((".png", ".md", ".py"))}
    assert all(found == figures(read[name]) for name, found in there.items())
    assert receipt["source"]["name"] == str(source) and receipt["source"]["format"] == detect(source)
    if (card := tmp_path / "target/README.md").exists():
        format = receipt["source"]["format"]
        assert ("an official checkpoint" if format == "gpt2" else f"a `{format}` checkpoint") in card.read_text()
    assert receipt["parity"]["passed"] and receipt["parity"]["weights_equal"]


def test_a_target_that_is_there_is_kept_unless_it_may_be_overwritten(way, tmp_path):
    _, go = way
    target = tmp_path / "target"
    go(target, check=False)
    before = everything(target)
    with pytest.raises(ConversionError, match=r"target exists already.*--overwrite"):
        go(target)
    assert everything(target) == before
    go(target, overwrite=True)
    assert everything(target).keys() == before.keys()
    assert (target / RECEIPT).read_bytes() != before[target / RECEIPT]


def test_what_no_conversion_has_written_is_never_overwritten(way, tmp_path):
    _, go = way
    (tmp_path / "target").mkdir()
    (tmp_path / "target/precious").touch()
    before = everything(tmp_path)
    for overwrite, told in ((False, "exists already"), (True, "no conversion has written it")):
        with pytest.raises(ConversionError, match=told):
            go(tmp_path / "target", overwrite=overwrite)
    assert everything(tmp_path) == before


def test_the_source_is_never_replaced(way):
    source, go = way
    before = everything(source.parent)
    for target in (source if source.is_dir() else source.parent, source.parent):
        with pytest.raises(ConversionError, match="is or contains the source"):
            go(target, overwrite=True)
    assert everything(source.parent) == before


def test_a_disk_that_is_too_full_is_told_before_anything_is_written(way, tmp_path, monkeypatch):
    _, go = way
    before = everything(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConversionError, match=r"has 1\.0 kB free, but the target needs \d+\.\d kB"):
        go(tmp_path / "target")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "anew"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("failed writing file")])
def test_a_disk_that_is_full_at_the_end_leaves_things_as_they_were(way, tmp_path, monkeypatch, old, error):
    source, go = way
    target = tmp_path / "target"
    written = target_format(go, source, target)
    if not old:
        shutil.rmtree(target)
    before = everything(tmp_path)
    save = written.save

    def fail(*arguments):
        save(*arguments)
        raise error  # torch.save says RuntimeError

    monkeypatch.setattr(written, "save", fail)
    with pytest.raises(ConversionError, match=r"failed while writing the target.*is unchanged.*free disk space"):
        go(target, overwrite=True)
    assert everything(tmp_path) == before


def test_an_interruption_leaves_things_as_they_were(way, tmp_path, monkeypatch):
    source, go = way
    written = target_format(go, source, tmp_path / "target")
    before = everything(tmp_path)
    save = written.save

    def interrupted(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(written, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "target", overwrite=True)
    assert everything(tmp_path) == before


def test_what_was_written_wrong_is_not_published(way, tmp_path, monkeypatch):
    """One value of one tensor, by the least that its dtype can tell."""
    source, go = way
    written = target_format(go, source, tmp_path / "target")
    shutil.rmtree(tmp_path / "target")
    write = written.write

    def wrong(contents, *arguments):
        values = contents.tensors["trf_blocks.1.norm1.shift"].read().clone()
        values.view(torch.int32)[3] ^= 1
        contents.tensors |= held({"trf_blocks.1.norm1.shift": values})
        return write(contents, *arguments)

    def taken_for_another(*arguments):
        result = write(*arguments)
        monkeypatch.setattr(written, "matches", lambda found: False)
        return result

    before = everything(tmp_path)
    monkeypatch.setattr(written, "write", wrong)
    with pytest.raises(
        ParityError, match=r"'(.*1\.norm1\.shift|.*h\.1\.ln_1\.bias|.*attn_norm\.bias|.*h1/ln_1/b|ln1b\.1)' is not"
    ):
        go(tmp_path / "target")
    assert everything(tmp_path) == before
    monkeypatch.setattr(written, "write", taken_for_another)
    with pytest.raises((ParityError, ConversionError)):
        go(tmp_path / "target")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("format", [name for name, format in FORMATS.items() if format.file is not None])
def test_there_and_back_is_the_same_file(sources, tmp_path, format):
    native, heads = sources / "native", {"n_heads": 4} if format == "book" else {}
    if format == "native":
        with pytest.raises(ConversionError, match="already has the format 'native'"):
            export(native, tmp_path / "out", format)
        return
    export(native, tmp_path / "out", format, check="weights")
    convert(tmp_path / "out" / FORMATS[format].file, tmp_path / "back", check="weights", **heads)
    assert figures(tmp_path / "back/model.safetensors") == figures(native / "model.safetensors")


def test_every_file_is_on_the_disk_before_the_target_has_its_name(way, tmp_path, monkeypatch):
    """And the directories, too: a name that the disk does not have is no target after a power cut."""
    synced, published = set(), []

    def told(function):
        def wrapper(descriptor):
            synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
            return function(descriptor)

        return wrapper

    rename = publish._rename_without_replacing

    def renamed(path, target):
        published.append(set(synced))
        return rename(path, target)

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, told(getattr(os, name)))
    monkeypatch.setattr(publish, "_rename_without_replacing", renamed)
    _, go = way
    target = tmp_path / "target"
    go(target)
    files = {path.name for path in target.rglob("*")}
    assert published and files <= published[-1]
    assert f".{target.name}.hf_gpt_scratch.incomplete" in published[-1]
    assert tmp_path.name in synced
