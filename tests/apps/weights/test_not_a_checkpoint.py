"""Files that are no checkpoint, made by their own programs: what they are, and what to do."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_attn.apps.weights.architecture import infer
from dinov2_attn.apps.weights.checkpoints import load_checkpoint
from dinov2_attn.apps.weights.models import build_like
from dinov2_attn.apps.weights.reading import read
from dinov2_attn.errors import UnreadableFileError
from tests.apps.weights.test_architecture import SMALL
from tests.support import upstreams
from tests.support.strategies import randomise
from tests.support.tolerances import assert_same_bits

STATE = {"w": torch.ones(64, 64)}


@pytest.fixture(scope="module", autouse=True)
def _imported():
    upstreams.FIRST.module("dinov2.models.vision_transformer")


def written(content):
    return lambda path: path.write_bytes(content)


def cut(path, share=0.5, **options):
    torch.save(STATE, path, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def compressed(module):
    def write(path):
        torch.save(STATE, path)
        path.write_bytes(module.compress(path.read_bytes()))

    return write


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.pth", b"x")


def arrays(path):
    with path.open("wb") as file:
        np.savez(file, w=np.ones(3))


def array(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def half_a_safetensors(path):
    pytest.importorskip("safetensors.torch").save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:1000])


def image(kind):
    return lambda path: Image.new("RGB", (4, 4)).save(path, kind)


def exported(path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    with path.open("wb") as file:
        torch.export.save(program, file)


ONNX = b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x9a\x01"

FILES = {
    "page.pth": (written(b"<html>403</html>"), "a web page"),
    "doc.pth": (written(b"\n<!DOCTYPE html><p>no</p>"), "a web page"),
    "error.pth": (written(b"<?xml version='1.0'?><Error/>"), "a web page"),
    "empty.pth": (written(b""), "an empty file"),
    "lfs.bin": (
        written(b"version https://git-lfs.github.com/spec/v1\noid"),
        "a pointer of Git LFS",
    ),
    "m.gguf": (written(b"GGUF" + b"\3" * 64), "a GGUF file"),
    "text.pth": (written(b"403 Forbidden\n"), "text that begins with '403 Forbidden'"),
    "utf8.pth": (written("é".encode() * 600), "text that begins with 'éé"),
    "config.json": (written(json.dumps({"a": 1}).encode()), "a JSON file"),
    "cut.pth": (cut, "a file by torch.save that was cut short"),
    "old.pth": (lambda p: cut(p, _use_new_zipfile_serialization=False), r"does not load \(\w+\)"),
    "half.safetensors": (half_a_safetensors, "a complete safetensors file"),
    "array.npy": (array, "arrays of NumPy"),
    "arrays.npz": (arrays, "arrays of NumPy"),
    "net.onnx": (written(ONNX), "an ONNX graph"),
    "net.pth": (written(ONNX), "an ONNX graph"),
    "keras.h5": (written(b"\x89HDF\r\n\x1a\n" + bytes(64)), "an HDF5 file"),
    "keras.pth": (written(b"\x89HDF\r\n\x1a\n" + bytes(64)), "an HDF5 file"),
    "net.tflite": (written(b"\x1c\0\0\0TFL3" + bytes(64)), "TensorFlow Lite"),
    "flax.msgpack": (written(b"\x81\xa1a\xc0" * 9), "weights of Flax"),
    "photo.pth": (image("PNG"), "an image"),
    "photo.jpg": (image("JPEG"), "an image"),
    "photo.webp": (image("WEBP"), "an image"),
    "w.pth.gz": (compressed(gzip), "a compressed file"),
    "w.pth.bz2": (compressed(bz2), "a compressed file"),
    "w.pth.xz": (compressed(lzma), "a compressed file"),
    "w.zip": (zipped, "a zip archive that torch.save did not write"),
    "module.pth": (lambda p: torch.save(torch.nn.Linear(2, 2), p), r"object of torch\.nn\.modules"),
    "plain.pkl": (lambda p: p.write_bytes(pickle.dumps({"w": 1})), "does not load|holds a dict"),
    "noise.pth": (written(bytes(range(128, 256))), r"does not load \(\w+\)"),
    "program.pt2": (exported, r"a program by torch\.export"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "found"), FILES.values(), ids=FILES)
def test_the_kind_of_file_is_named(tmp_path, make, found, request):
    path = tmp_path / request.node.callspec.id
    make(path)
    with pytest.raises(UnreadableFileError, match=found) as caught:
        read(path)
    said = str(caught.value)
    assert said.count("\n") == 2
    assert not any(word in said for word in ("weights_only", "Weights only", "Re-running"))
    assert caught.value.args[2]


def test_nothing_is_decompressed_to_see_what_a_file_is(tmp_path, monkeypatch):
    """Some eight bytes make the decompressor of LZMA take four gigabytes."""
    path = tmp_path / "weights.pth"
    path.write_bytes(b"\x5d\xff\xff\xff\xff" + b"\xff" * 8 + b"\0" * 100)
    fail = lambda *_, **__: pytest.fail("it was decompressed")  # noqa: E731
    monkeypatch.setattr(lzma, "LZMADecompressor", fail)
    with pytest.raises(UnreadableFileError, match="does not load"):
        read(path)


@pytest.mark.filterwarnings("ignore")
def test_advice_about_torchscript_leads_to_a_file_that_loads(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "t.pt")
    with pytest.raises(
        UnreadableFileError, match=r"torch\.save\(torch\.jit\.load\(PATH\)\.state_dict"
    ):
        read(tmp_path / "t.pt")
    torch.save(torch.jit.load(tmp_path / "t.pt").state_dict(), tmp_path / "n.pth")
    assert set(read(tmp_path / "n.pth").tensors) == {"weight", "bias"}


def test_folders(tmp_path):
    with pytest.raises(UnreadableFileError, match="a directory with no file of weights"):
        read(tmp_path)
    image("PNG")(tmp_path / "a.png")
    with pytest.raises(UnreadableFileError, match="a directory with no file of weights"):
        read(tmp_path)
    torch.save(STATE, tmp_path / "b.pth")
    assert set(read(tmp_path).tensors) == {"w"}
    torch.save(STATE, tmp_path / "c.pth")
    with pytest.raises(UnreadableFileError, match=r"a directory with b\.pth, c\.pth\.\nName the"):
        read(tmp_path)


def test_an_index_without_files(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for content in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\xff"):
        index.write_text(content)
        with pytest.raises(UnreadableFileError, match="which names no files"):
            read(index)


@pytest.mark.filterwarnings("ignore")
def test_the_distributed_format_and_its_conversion(tmp_path):
    """The command that is named is run, and what it writes fills a model."""
    dcp = pytest.importorskip("torch.distributed.checkpoint", reason="this torch has none")
    pytest.importorskip("torch.distributed.checkpoint.format_utils", reason="since torch 2.3")
    model = randomise(build_like(SMALL), 0)
    folder = tmp_path / "a folder"
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder, no_dist=True)
    for path in (folder, folder / "__0_0.distcp", folder / ".metadata"):
        with pytest.raises(UnreadableFileError, match="PyTorch's distributed format") as caught:
            read(path)
        assert "weights_only" not in str(caught.value)
    command = str(caught.value).partition("convert it: ")[2]
    assert command.startswith("python -m torch.distributed.checkpoint.format_utils dcp_to_torch ")
    command = command.replace("python", f"{sys.executable} -W ignore", 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, capture_output=True)
    filled = build_like(infer(read(tmp_path / "NEW.pth")))
    assert load_checkpoint(filled, tmp_path / "NEW.pth") == ()
    for name, tensor in filled.state_dict().items():
        assert_same_bits(tensor, model.state_dict()[name])
