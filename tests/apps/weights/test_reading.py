"""What is read of a file, tensor by tensor and name by name, and how a file is refused."""

from __future__ import annotations

import argparse
import collections
import fractions
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from dinov2_attn.apps.weights.reading import read, read_mapping
from dinov2_attn.errors import UnreadableFileError
from tests.support.tolerances import assert_same_bits

ONE, TWO, THREE = torch.ones(1), torch.full((2,), 2.0), torch.full((3,), 3.0)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.pth"


def content_of(file, content):
    torch.save(content, file)
    return read(file)


def nested(depth, innermost):
    for level in reversed(range(depth)):
        innermost = {f"level{level}": innermost}
    return innermost


def assert_refused(file, message):
    with pytest.raises(UnreadableFileError, match=message):
        read(file)


class _Rebuilt:
    """In a file, it is what ``function`` makes of the rest."""

    def __init__(self, function, *rest):
        self._reduced = function, *rest

    def __reduce__(self):
        return self._reduced


# What a file holds


def test_tensors_keep_the_order_of_the_file_and_their_full_names(file):
    content = {"a": {"b": ONE, "c": {"d": TWO}}, "note": "mine", "e": THREE, "f": [ONE]}
    checkpoint = content_of(file, content)
    assert list(checkpoint.tensors) == ["a.b", "a.c.d", "e"]
    assert_same_bits(checkpoint.tensors["a.c.d"], TWO)
    assert checkpoint.others == ("note", "f")
    assert checkpoint.metadata == {}


def test_a_path_may_be_text(file):
    torch.save({"a": ONE}, file)
    assert read(str(file)).path == file


def test_a_mapping_is_named_in_errors():
    checkpoint = read_mapping({"w": ONE, "note": "mine"})
    assert (checkpoint.path, checkpoint.others) == ("the mapping", ("note",))
    with pytest.raises(UnreadableFileError, match=r"Found the mapping, one process's shard"):
        read_mapping({"_flat_param": ONE})


def test_a_repeated_name_is_marked(file):
    checkpoint = content_of(file, {"a.b": ONE, "a": {"b": TWO}})
    assert list(checkpoint.tensors) == ["a.b", "a.b (again)"]
    assert_same_bits(checkpoint.tensors["a.b"], ONE)
    assert_same_bits(checkpoint.tensors["a.b (again)"], TWO)


def test_a_dict_in_two_places_is_read_once(file):
    shared = {"w": ONE}
    checkpoint = content_of(file, {"a": shared, "b": shared, "c": {"w": TWO}})
    assert list(checkpoint.tensors) == ["a.w", "c.w"]
    assert checkpoint.others == ("b",)


def test_dicts_are_read_to_a_depth_of_eight(file):
    eight = ".".join(f"level{i}" for i in range(8))
    assert list(content_of(file, nested(8, ONE)).tensors) == [eight]
    checkpoint = content_of(file, {**nested(9, ONE), "w": TWO})
    assert (list(checkpoint.tensors), checkpoint.others) == (["w"], (eight,))


def test_integer_keys_are_not_names(file):
    checkpoint = content_of(file, {"w": ONE, "state": {0: TWO, "b": TWO}})
    assert (list(checkpoint.tensors), checkpoint.others) == (["w"], ("state",))


def test_attributes_of_an_ordered_dict_do_not_replace_its_items(file):
    """An OrderedDict is saved with its attributes: one may stand in the place of a method."""
    attributes = dict.fromkeys(("items", "keys", "values"), 3)
    content = _Rebuilt(collections.OrderedDict, (), attributes, None, iter([("w", ONE)]))
    assert list(content_of(file, content).tensors) == ["w"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (ONE, "an object of type Tensor"),
        ([ONE], "an object of type list"),
        ({}, "an empty dict"),
        ({1: ONE}, r"a dict of 1\."),
        (dict.fromkeys("abcde"), r"a dict of a, b, c, d, e\."),
        (dict.fromkeys("abcdef"), r"a dict of a, b, c, d, e, …\."),
    ],
)
def test_a_file_without_a_named_tensor_is_described(file, content, found):
    torch.save(content, file)
    assert_refused(file, rf"(?s)names to tensors, .*Found {file}, which holds {found}")


def test_folders_and_missing_files_are_refused(tmp_path):
    assert_refused(
        tmp_path,
        rf"at {tmp_path}\.\nFound a directory with no file of weights\.\nName the \.pth",
    )
    assert_refused(tmp_path / "none.pth", r"none\.pth\.\nFound nothing\.")


# What is refused


MEMORY = Path("/proc/self/mem")  # a file to all appearances, of which no byte can be read


@pytest.mark.skipif(not MEMORY.is_file(), reason="Linux's: elsewhere all else is refused")
def test_a_file_that_cannot_be_read_is_refused():
    assert_refused(
        MEMORY, r"(?s)/proc/self/mem, which does not load \(OSError: .*Input/output error\)"
    )


def test_a_compressed_archive_is_not_unpacked(file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    assert_refused(file, r"does not load \(BadZipFile: its entries unpack to 1,000,000 bytes\)")


def test_an_archive_as_large_as_what_it_holds_is_read(file):
    """Of the size that it takes unpacked, to the byte: then it is torch that refuses it."""
    for size in range(1000):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(size))
        if file.stat().st_size == size:
            break
    assert file.stat().st_size == size
    with pytest.raises(UnreadableFileError) as caught:
        read(file)
    assert "unpack" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_is_refused_before_torch_sees_it(file):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    assert_refused(file, r"(?s)Found .*, a TorchScript archive, which holds code\.\nIf you")


def test_a_tar_is_refused_before_torch_unpacks_it(file):
    with tarfile.open(file, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert_refused(file, r"(?s)Found .*, a tar archive, which PyTorch would unpack\.\nUnpack")


# A pickle of a class with an endless name: alone, before what is no code, behind letters that are
# no text, and as a module.
ENDLESS = {
    "class": b"\x80\x02cm\n%s\n.",
    "damaged": b"\x80\x02cm\n%s\n\xff",
    "no text": b"\x80\x02X\x03\0\0\0\xed\xa0\x80cm\n%s\n.",
    "module": b"\x80\x02c%s\nm\n.",
}


@pytest.mark.skipif(
    not hasattr(torch._weights_only_unpickler, "get_globals_in_pkl"),
    reason="this torch does not search its errors: it refuses such a file itself at once",
)
@pytest.mark.parametrize("kind", [*ENDLESS])
@pytest.mark.parametrize("old", [True, False])
def test_a_class_with_an_endless_name_is_refused_before_torch_sees_it(file, kind, old, monkeypatch):
    """PyTorch's own refusal takes a time that grows with the square of the name."""
    content = ENDLESS[kind] % (b"k" * 3_000_000)
    if old:
        starts = [0x1950A86A20F9469CFC6C, 1001, {}]
        file.write_bytes(b"".join(pickle.dumps(one, 2) for one in starts) + content)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("PyTorch saw it"))
    assert_refused(file, "EndlessNameError")


def test_a_long_name_of_a_tensor_is_read(file):
    for old in (True, False):
        torch.save({"k" * 100_000: TWO}, file, _use_new_zipfile_serialization=not old)
        assert_same_bits(read(file).tensors["k" * 100_000], TWO)


def test_the_format_before_1_6_is_read(file):
    torch.save({"w": TWO}, file, _use_new_zipfile_serialization=False)
    assert_same_bits(read(file).tensors["w"], TWO)


def test_weights_of_a_gpu_are_read_onto_the_cpu(file):
    """The file says where each tensor was, which need not exist here."""
    torch.save({"w": TWO}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            place, theirs = b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0"
            assert (place in content) == name.endswith("data.pkl")
            archive.writestr(name, content.replace(place, theirs))
    assert_same_bits(read(file).tensors["w"], TWO)


def test_only_the_type_of_pytorchs_error_is_shown(file):
    file.write_bytes(b"\x80\2no checkpoint")
    with pytest.raises(UnreadableFileError, match=r"pth, which does not load \(\w+\)") as caught:
        read(file)
    assert "\n" not in caught.value.found
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("call", [fractions.Fraction, os.getcwd])
def test_code_is_named_with_what_to_do_about_it(file, call):
    """PyTorch has other words for the modules that it blocks, such as that of ``os``."""
    torch.save({"w": ONE, "code": _Rebuilt(call, ())}, file)
    assert_refused(
        file,
        rf"\(it holds an object of {call.__module__}\.{call.__name__}, and reading it would run "
        r"code\)\.\nWhere the model was made, save its weights: torch\.save\(model\.state_dict",
    )


def test_options_of_argparse_are_read(file):
    """DINO v1 saves its own along; they are plain data."""
    if not hasattr(torch.serialization, "safe_globals"):
        pytest.skip("before torch 2.5 nothing can be allowed: they are refused")
    torch.save({"w": ONE, "args": argparse.Namespace(lr=1)}, file)
    assert read(file).others == ("args",)


SHARD = r"Found {}, one process's shard of a model under FSDP"


@pytest.mark.parametrize("name", ["_flat_param", "blocks.0._flat_param.a"])
def test_a_flattened_parameter_shows_a_shard(file, name):
    torch.save({"teacher": {name: ONE}, "w": TWO}, file)
    assert_refused(file, SHARD.format(file))


def test_distributed_code_shows_a_shard(file):
    torch.save({"w": ONE, "code": _Rebuilt(torch.distributed.is_available, ())}, file)
    assert_refused(file, SHARD.format(file))


def test_a_tensor_in_shards_is_refused(file, tmp_path, monkeypatch):
    """By PyTorch, or here where a process knows distributed tensors and reads them."""
    distributed = pytest.importorskip(
        "torch.distributed.tensor",
        reason="this torch has none: test_a_shard_is_recognised_by_its_name",
    )
    if not hasattr(distributed, "distribute_tensor"):
        pytest.skip("this torch hides them: test_a_shard_is_recognised_by_its_class")
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo: test_a_shard_is_recognised_by_its_name")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        torch.save({"w": distributed.distribute_tensor(TWO, mesh), "v": ONE}, file)
        assert_refused(file, SHARD.format(file))
    finally:
        torch.distributed.destroy_process_group()


# Safetensors


@pytest.fixture
def library():
    return pytest.importorskip(
        "safetensors.torch", reason="without it: test_safetensors_without_their_library"
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ""])
@pytest.mark.parametrize("metadata", [None, {"num_heads": "3"}])
def test_safetensors_are_known_by_their_content(file, library, suffix, metadata):
    path = file.with_suffix(suffix)
    library.save_file({"a.w": ONE, "b": TWO}, path, metadata)
    checkpoint = read(path)
    assert checkpoint.path == path
    assert_same_bits(checkpoint.tensors["b"], TWO)
    assert (set(checkpoint.tensors), checkpoint.others) == ({"a.w", "b"}, ())
    assert checkpoint.metadata == (metadata or {})


@pytest.mark.usefixtures("library")
def test_the_suffix_safetensors_decides_the_format(file):
    torch.save({"w": ONE}, file)
    path = file.rename(file.with_suffix(".safetensors"))
    assert_refused(
        path, rf"a complete safetensors file\.\nFound {path}, which does not load \(Safe"
    )


@pytest.mark.usefixtures("library")
def test_a_safetensors_header_must_be_shorter_than_its_file(file):
    """Eight bytes say how long it is: one byte less, and the file may be cut short."""
    for length, said in ((100, "a checkpoint by torch.save or by"), (99, "a complete safetensors")):
        file.write_bytes(length.to_bytes(8, "little") + b"{".ljust(92))
        assert_refused(file, f"Expected {said}")


def test_a_path_is_kept_as_it_was_given(file, monkeypatch):
    torch.save({"w": ONE}, file)
    monkeypatch.chdir(file.parent)
    assert read("weights.pth").path == Path("weights.pth")
