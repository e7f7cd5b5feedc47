"""One input never ends a run: whatever it raises is listed, in time bounded by its header."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import lzma
import os
import struct
import sys
import tarfile
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_attn import extract, viz
from dinov2_attn.apps.extraction import worker
from dinov2_attn.apps.extraction.decode import Decoder, Measurer, Origin, Picture, Refused
from dinov2_attn.apps.extraction.items import Item, list_items
from dinov2_attn.apps.extraction.options import check_options, images_together
from dinov2_attn.apps.viz import opening
from dinov2_attn.apps.viz.decoding import stored_size
from dinov2_attn.apps.viz.reading import reading_for
from dinov2_attn.errors import (
    InvalidInputError,
    UnavailableError,
    UnreadableFileError,
    shown,
)
from tests.support import raw_files
from tests.support.extraction import build, draw, index_of
from tests.support.subprocesses import python
from tests.support.tolerances import assert_same_bits

MB = 2**20
# Reading the sparse ones takes longer than that, and going through the others byte by byte.
SECONDS = 3.0


def sparse(path, size, head=b""):
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


def encoded(kind, mode="RGB", size=(8, 8), **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data=b""):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


PNG = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))


def numpy_header(shape, dtype="<f8"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


NEEDS_TIFFFILE = pytest.mark.skipif(
    importlib.util.find_spec("tifffile") is None, reason="tifffile is not installed"
)


def tiff(width, height, samples, bits=8):
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 200, 277: samples}
    tags |= {278: height, 279: 10**9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)


def gif_with(comments):
    head = encoded("GIF", "P")
    return head[: 13 + 3 * (2 << (head[10] & 7))] + comments + b";"


HOSTILE = {
    "zeros.png": lambda path: sparse(path, 2000 * MB),
    "png and zeros.png": lambda path: sparse(path, 2000 * MB, encoded("PNG")[:20]),
    "zeros.tif": lambda path: sparse(path, 1000 * MB, b"II*\0\x08\0\0\0"),
    "zeros.npy": lambda path: sparse(path, 1000 * MB, b"\x93NUMPY\x02\x00" + b"\xff" * 4),
    "sparse.npy": lambda path: sparse(path, 8000 * MB, numpy_header((10**4, 10**4, 10))),
    "claims.npy": lambda path: path.write_bytes(numpy_header((10**3, 10**3, 10**3))),
    "short.npy": lambda path: path.write_bytes(numpy_header((9000, 9000), "<u2")),
    "zeros.jpg": lambda path: sparse(path, 200 * MB, encoded("JPEG")[:20]),
    "ones.jpg": lambda path: path.write_bytes(encoded("JPEG")[:20] + b"\xff" * 30 * MB),
    "escaped.jpg": lambda path: path.write_bytes(encoded("JPEG")[:20] + b"\xff\0" * 15 * MB),
    "chunks.png": lambda path: path.write_bytes(PNG + chunk(b"abCd") * MB),
    "texts.png": lambda path: path.write_bytes(PNG + chunk(b"tEXt", b"a\0b") * MB),
    "bomb.png": lambda path: path.write_bytes(
        PNG + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50 * MB))) * 9
    ),
    "huge.png": lambda path: path.write_bytes(
        PNG[:16] + struct.pack(">II", 10**6, 10**6) + PNG[24:]
    ),
    "data.png": lambda path: path.write_bytes(PNG + chunk(b"IDAT") * MB),
    "comment.gif": lambda path: path.write_bytes(
        gif_with(b"\x21\xfe" + (b"\xff" + b"x" * 255) * (MB // 8))
    ),
    "comments.gif": lambda path: path.write_bytes(gif_with(b"\x21\xfe\x01x\0" * MB)),
    "many.tif": lambda path: path.write_bytes(tiff(9000, 9000, 200)),
    "large.tif": lambda path: path.write_bytes(tiff(10**5, 10**5, 1)),
    "empty.png": lambda path: path.write_bytes(b""),
    "start.png": lambda path: path.write_bytes(PNG[:8]),
    "text.png": lambda path: path.write_text("no image\n" * 10**6),
    "a\x1b[2J.png": lambda path: path.write_bytes(b"no image"),
}


def in_a_tar(path):
    with tarfile.open(path.with_suffix(".tar"), "w") as tar:
        tar.add(path, "image" + path.suffix)
    with tarfile.open(path.with_suffix(".tar")) as tar:
        member = tar.next()
    place = member.offset_data, member.size
    return Item("in", member.name, str(path.with_suffix(".tar")), place)


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_soon_alone_and_in_a_tar(tmp_path, name):
    path = tmp_path / name
    HOSTILE[name](path)
    items = [Item("in", name, str(path))]
    if path.stat().st_size < 50 * MB:
        items.append(in_a_tar(path))
    for item in items:
        begun = time.process_time()
        found = Decoder(2, 4, None)[(0, item)]
        assert isinstance(found, Refused)
        assert shown(item.path) in found.reason
        assert isinstance(Measurer(2, 4, None)[(0, item)], Refused | tuple)
        assert time.process_time() - begun < SECONDS
    begun = time.process_time()
    with pytest.raises((UnreadableFileError, InvalidInputError)):
        viz.load_image(path, 2)
    assert time.process_time() - begun < SECONDS


@pytest.mark.parametrize("kind", ["qoi", "dds", "ppm"])
def test_what_pillow_decodes_in_python_is_still_decoded(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    path = tmp_path / f"a.{kind}"
    if kind == "ppm":  # of another largest value, which Pillow scales one by one
        path.write_bytes(b"P6 300 300 254\n" + np.minimum(noise, 254).tobytes())
    elif kind == "qoi":
        opaque = np.concatenate([noise, np.full((300, 300, 1), 255, np.uint8)], 2)
        pixels = b"".join(b"\xff" + bytes(pixel) for pixel in opaque.reshape(-1, 4))
        path.write_bytes(b"qoif" + struct.pack(">IIBB", 300, 300, 4, 0) + pixels + bytes(7) + b"\1")
    else:
        Image.fromarray(noise).save(path)
    found = Decoder(2, 300, None)[(0, Item("in", path.name, str(path)))]
    assert isinstance(found, Picture), found


def test_what_is_large_and_right_is_still_decoded(tmp_path):
    """Comments, chunks and pages of usual numbers, of files whose header is looked at first."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    image = Image.fromarray(noise)
    for kind in ("png", "tif", "bmp", "gif", "webp"):
        options = {"comment": "x" * 10**5} if kind == "gif" else {}
        image.save(tmp_path / f"a.{kind}", **options)
    np.save(tmp_path / "a.npy", noise)
    for path in sorted(tmp_path.glob("a.*")):
        for item in (Item("in", path.name, str(path)), in_a_tar(path)):
            found = Decoder(2, 700, None)[(0, item)]
            assert isinstance(found, Picture), found
            assert item.size(None) == (700, 700)
            if path.suffix not in (".gif", ".webp"):
                assert_same_bits(found.pixels, noise)


@NEEDS_TIFFFILE
def test_a_large_tiff_that_only_tifffile_reads_is_still_decoded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 5), np.uint8)
    path = raw_files.tiff(tmp_path / "a.tif", noise)
    for item in (Item("in", path.name, str(path)), in_a_tar(path)):
        found = Decoder(2, 700, None, reading_for(5))[(0, item)]
        assert isinstance(found, Picture), found
        assert item.size(None) == (700, 700)
        assert_same_bits(found.pixels, noise)


def most_memory(call):
    """Return what ``call`` returns and the most bytes that Python's objects took meanwhile."""
    tracemalloc.start()
    try:
        found = call()
        return found, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


PACKED = {8: zlib.compress, 32946: zlib.compress, 34925: lzma.compress}


@NEEDS_TIFFFILE
@pytest.mark.parametrize("compression", PACKED)
def test_a_tiff_that_unpacks_to_more_than_it_has(tmp_path, compression):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 5), np.uint8)
    pack = PACKED[compression]
    reading = reading_for(5)
    for content in (noise.tobytes(), noise.tobytes() + bytes(200 * MB)):
        path = raw_files.tiff(tmp_path / "a.tif", noise, packed_to=pack(content), t259=compression)
        item = Item("in", path.name, str(path))
        found, memory = most_memory(lambda item=item: Decoder(2, 64, None, reading)[(0, item)])
        assert memory < 30 * MB
        if len(content) == noise.size:
            assert_same_bits(found.pixels, noise)
    assert "a part of 20,480 bytes unpacks to more" in found.reason


@NEEDS_TIFFFILE
def test_a_tiff_with_a_tile_beyond_memory(tmp_path):
    noise = np.zeros((64, 64, 5), np.uint8)
    tile = {"t322": 60000, "t323": 60000, "t324": 8, "t325": 100}
    path = raw_files.tiff(
        tmp_path / "a.tif", noise, packed_to=zlib.compress(bytes(MB)), t259=8, **tile
    )
    found = Decoder(2, 64, None, reading_for(5))[(0, Item("in", path.name, str(path)))]
    assert "at most 1,600,000,000 bytes" in found.reason


@pytest.mark.skipif(importlib.util.find_spec("pydicom") is None, reason="pydicom is not installed")
@pytest.mark.parametrize("implicit", [False, True])
def test_a_dicom_that_unpacks_to_more_than_it_may(tmp_path, monkeypatch, implicit):
    monkeypatch.setattr(opening, "MOST_PIXELS", 10**6)
    for more in (0, 200 * MB):
        (tmp_path / "a.dcm").write_bytes(deflated_dicom(bytes(64 * 64 + more), implicit))
        item = Item("in", "a.dcm", str(tmp_path / "a.dcm"))
        for look in (Decoder(2, 64, None), Measurer(2, 64, None)):
            found, memory = most_memory(lambda item=item, look=look: look[(0, item)])
            assert memory < 30 * MB
            # pydicom itself reads no packed file with such a header.
            assert isinstance(found, Refused) == bool(more or implicit), found
        assert isinstance(looked_at(tmp_path / "a.dcm"), Refused if more or implicit else tuple)


def looked_at(path):
    """Return the size of a file that is not open yet, or that it is refused."""
    try:
        return stored_size(path)
    except (InvalidInputError, UnreadableFileError) as error:
        return Refused(0, None, str(error))


def deflated_dicom(pixels, implicit):
    """Return a grey image of 64 × 64 in the form of DICOM that is packed as a whole."""
    names = [(0x02, 0x02), (0x02, 0x03), (0x02, 0x10)]
    texts = [b"1.2.840.10008.5.1.4.1.1.7\0", b"1.2.3\0", b"1.2.840.10008.1.2.1.99"]
    header = b""
    for (group, element), text in zip(names, texts, strict=True):
        kind = struct.pack("<I", len(text)) if implicit else b"UI" + struct.pack("<H", len(text))
        header += struct.pack("<HH", group, element) + kind + text
    length = struct.pack("<I", 4) if implicit else b"UL" + struct.pack("<H", 4)
    header = struct.pack("<HH", 2, 0) + length + struct.pack("<I", len(header)) + header
    numbers = {0x02: 1, 0x10: 64, 0x11: 64, 0x100: 8, 0x101: 8, 0x102: 7, 0x103: 0}
    elements = {name: b"US\x02\0" + struct.pack("<H", value) for name, value in numbers.items()}
    elements[0x04] = b"CS\x0c\0MONOCHROME2 "
    data = b"".join(struct.pack("<HH", 0x28, name) + elements[name] for name in sorted(elements))
    data += struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, len(pixels)) + pixels
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return bytes(128) + b"DICM" + header + packer.compress(data) + packer.flush()


def test_the_bound_of_bytes_can_be_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "MOST_PIXELS", 1000)
    np.save(tmp_path / "a.npy", np.zeros((30, 30, 3), np.float64))
    item = Item("in", "a.npy", str(tmp_path / "a.npy"))
    found = Decoder(2, 4, None)[(0, item)]
    assert "at most 16,000 bytes, 16 for each pixel" in found.reason
    assert "--max-pixels" in found.reason
    found = Decoder(2, 4, 1500, reading_for(3, (0, 1)))[(0, item)]
    assert isinstance(found, Picture)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_of_any_origin_are_refused_at_once(first, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    for name in ("pipe.png", "link.png"):
        with pytest.raises(UnreadableFileError, match="a pipe"):
            viz.load_image(tmp_path / name, 2)

    class Paths(list):
        pass

    class Dataset:
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return draw(tmp_path / "good.png", (4, 4), 0) if i else tmp_path / "pipe.png"

    extract(build(first), Dataset(), tmp_path / "out")
    (entry,) = index_of(tmp_path / "out", "unreadable.jsonl")
    assert "it is a pipe" in entry["reason"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_front_of_a_transform_is_listed(first, tmp_path):
    draw(tmp_path / "in" / "b.png", (4, 4), 0)
    os.mkfifo(tmp_path / "in" / "a.png")
    code = """
import sys, torch, dinov2_attn
from tests.support import upstreams, xformers_visibility as xformers
from tests.support.extraction import build
xformers.hide(); upstreams.FIRST.load()
options = dict(transform=lambda image: torch.zeros(3, 4, 4))
dinov2_attn.extract(build(upstreams.FIRST), sys.argv[1] + "/in", sys.argv[1] + "/out", **options)
"""
    done = python("-c", code, tmp_path, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
    (entry,) = index_of(tmp_path / "out", "unreadable.jsonl")
    assert "a pipe" in entry["reason"]


class Panic(BaseException):
    """What pyo3 raises for a panic in Rust."""

    __module__ = "pyo3_runtime"


class Preempted(BaseException):
    """What a handler of a signal may raise, to end a program."""


RAISED = [
    *(MemoryError, RecursionError, SyntaxError, AssertionError, KeyError, StopIteration, Panic),
    *(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), struct.error, zlib.error, EOFError),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    *(OSError(24, "Too many open files"), Image.DecompressionBombError, NotImplementedError),
]


@pytest.mark.parametrize("stage", ["decode", "pass"])
@pytest.mark.parametrize("error", RAISED, ids=repr)
def test_whatever_is_raised_is_listed_and_the_run_goes_on(first, tmp_path, error, stage):
    model = build(first)
    for i in range(5):
        draw(tmp_path / "in" / f"{i}.png", (4 + 2 * (i == 2), 4), i)

    def transform(image):
        if stage == "decode" and image.height == 6:
            raise error
        return torch.zeros(3, image.height, 4)

    def hook(module, args):
        if stage == "pass" and args[0].shape[-2] == 6:
            raise error

    handle = model.register_forward_pre_hook(hook)
    handle_of_parts = model.patch_embed.register_forward_pre_hook(hook)
    done = extract(model, tmp_path / "in", tmp_path / "out", transform=transform, shard_size=2)
    assert (done.images, done.unreadable) == (5, 1)
    (entry,) = index_of(tmp_path / "out", "unreadable.jsonl")
    assert (entry["path"], entry["stage"]) == ("2.png", stage)
    assert type(error).__name__.removeprefix("type") in entry["reason"] or isinstance(error, type)
    again = extract(model, tmp_path / "in", tmp_path / "out", transform=transform, shard_size=2)
    assert (again.seen, again.unreadable) == (0, 1)
    with pytest.raises(UnreadableFileError, match=r"2\.png"):
        extract(
            model,
            tmp_path / "in",
            tmp_path / "strict",
            transform=transform,
            shard_size=2,
            strict=True,
        )
    handle.remove()
    handle_of_parts.remove()


@pytest.mark.parametrize("stage", ["decode", "pass", "dataset"])
@pytest.mark.parametrize("end", [KeyboardInterrupt, Preempted, asyncio.CancelledError])
def test_what_ends_a_program_ends_it(first, tmp_path, end, stage):
    draw(tmp_path / "in" / "a.png", (4, 4), 0)
    model = build(first)

    def stop(*_):
        raise end

    def transform(_):
        return stop() if stage == "decode" else torch.zeros(3, 4, 4)

    class Dataset:
        def __len__(self):
            return 1

        def __getitem__(self, i):
            stop()

    handle = model.register_forward_pre_hook(stop) if stage == "pass" else None
    handle_of_parts = model.patch_embed.register_forward_pre_hook(stop) if handle else None
    source, options = (tmp_path / "in", {"transform": transform})
    if stage == "dataset":
        source, options = Dataset(), {}
    with pytest.raises(end):
        extract(model, source, tmp_path / "out", **options)
    for one in (handle, handle_of_parts):
        if one is not None:
            one.remove()


def test_what_ends_a_program_ends_a_single_image(tmp_path, monkeypatch):
    draw(tmp_path / "a.png", (4, 4), 0)

    def stop(_):
        raise Preempted

    monkeypatch.setattr(Image.Image, "getexif", stop)
    with pytest.raises(Preempted):
        viz.load_image(tmp_path / "a.png", 2)


@pytest.mark.skipif(sys.platform != "linux", reason="memory can be limited on Linux")
def test_images_larger_than_memory_are_listed(tmp_path):
    """In decoding, and in the pass; each again in the next run, and not in between."""
    Image.new("1", (9000, 9000)).save(tmp_path / "b.png")
    np.save(tmp_path / "c.npy", np.zeros((9000, 9000), np.uint16))
    for name in ("a.png", "z.png"):
        draw(tmp_path / name, (28, 28), 0)
    draw(tmp_path / "d.png", (28, 4000), 0)
    code = """
import resource, sys
from pathlib import Path
import torch, dinov2_attn
from tests.support import upstreams, xformers_visibility as xformers
from tests.support.extraction import build
torch.set_num_threads(1)
xformers.hide(); upstreams.FIRST.load()
model = build(upstreams.FIRST)
out, folder = Path(sys.argv[1], "out"), Path(sys.argv[1])
options = dict(image_size=28, queries=None, batch_size=2)
dinov2_attn.extract(model, folder / "a.png", folder / "warm", **options)
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + 200 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
images = sorted(folder.glob("?.*"))
for _ in range(2):
    print(dinov2_attn.extract(model, images, out, **options))
"""
    done = python("-c", code, tmp_path, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
    reasons = {one["path"]: one for one in index_of(tmp_path / "out", "unreadable.jsonl")}
    assert set(reasons) == {"b.png", "c.npy", "d.png"}
    assert [one["stage"] for one in reasons.values()] == ["decode", "decode", "pass"]
    assert all("emory" in one["reason"] or "allocate" in one["reason"] for one in reasons.values())
    assert "this run: 0 images" in done.stdout.splitlines()[-1]


def picture(number, height, width):
    item = Item("in", f"{number}.png", "")
    pixels = np.zeros((height, width, 3), np.uint8)
    return Picture(Origin(number, item, "", (height, width)), pixels)


def test_the_memory_of_a_batch_is_that_of_usual_images(first):
    model = build(first)
    options = check_options(
        model,
        layers=1,
        queries=None,
        heads=None,
        dtype="float32",
        grid=None,
        image_size=8,
        max_pixels=None,
        batch_size=16,
        shard_size=None,
        artifacts=False,
    )
    assert images_together(model, options, (8, 8)) == images_together(model, options, (8, 4)) == 16
    # 17 tokens squared for an image, and 33 squared for one of twice the width.
    assert images_together(model, options, (8, 16)) == 16 * 17**2 // 33**2
    assert images_together(model, options, (8, 8000)) == 1
    buckets = worker.Buckets(16, lambda sides: images_together(model, options, sides))
    sizes = [len(batch) for i in range(9) for batch in buckets.add(picture(i, 8, 16))]
    assert sizes == [4, 4]
    waiting = worker.Buckets(2, lambda sides: 2)
    given = [batch for i in range(20) for batch in waiting.add(picture(i, 2, 2 + 2 * i))]
    assert len(given) == 20 - worker.WAITING * 2 + 1


def test_memory_that_a_shard_lacks_is_our_error(first, tmp_path, monkeypatch):
    draw(tmp_path / "in" / "a.png", (4, 4), 0)

    def write(*_):
        raise MemoryError

    monkeypatch.setattr(worker.shards, "write", write)
    with pytest.raises(UnavailableError, match="--shard-size"):
        extract(build(first), tmp_path / "in", tmp_path / "out")


def test_a_list_is_looked_at_before_all_of_it_is_read(tmp_path):
    sparse(tmp_path / "list", 2000 * MB, b"a.png\n")
    begun = time.process_time()
    with pytest.raises((InvalidInputError, UnreadableFileError)):
        list_items([tmp_path / "list"])
    assert time.process_time() - begun < SECONDS
