"""Files that are damaged, odd or malicious: an error of ours, or what they hold; nothing else."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.apps.weights.checkpoints import load_checkpoint
from dinov2_attn.errors import InvalidInputError, UnreadableFileError
from tests.support.tolerances import assert_same_bits

WEIGHT, BIAS = torch.full((2, 3), 2.0), torch.full((2,), 3.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def checkpoints():
    """The same content as torch saves it now and did before 1.6."""
    state = {"weight": WEIGHT, "bias": BIAS}
    return [bytes_of(state), bytes_of(state, _use_new_zipfile_serialization=False)]


@pytest.fixture(scope="module")
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (28, 42, 3), dtype=np.uint8)
    return {suffix: encoded(Image.fromarray(pixels), suffix) for suffix in SUFFIXES}


# Depths and transparencies, where Pillow writes them.
FORMATS = [
    *[("png", mode) for mode in ("I;16", "LA", "P", "RGBA")],
    *[("tiff", mode) for mode in ("I;16", "I", "LA", "P", "RGBA", "CMYK")],
    *[("gif", "P"), ("gif", "RGBA"), ("webp", "RGBA"), ("jpeg", "CMYK"), ("ppm", "I")],
]

SUFFIXES = ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "tga", "pcx", "sgi", "ico")


def bytes_of(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def encoded(image, suffix, **options):
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def film(suffix, mode, frames):
    still = Image.new("L", (28, 42), 7).convert("I").convert(mode)
    if frames == 1 or suffix not in ("png", "tiff", "gif", "webp"):
        return encoded(still, suffix)
    return encoded(still, suffix, save_all=True, append_images=[still] * (frames - 1))


@st.composite
def damages(draw):
    """Some changes to bytes, as numbers, so that failures print well."""
    places = st.floats(0, 1, exclude_max=True)
    change = st.one_of(
        st.tuples(st.just("cut"), places),
        st.tuples(st.just("flip"), places, st.integers(1, 255)),
        st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("repeat"), places, places),
        st.tuples(st.just("drop"), places, places),
        st.tuples(st.just("number"), places, st.sampled_from([0, -1, 2**31 - 1, 2**15])),
    )
    return draw(st.lists(change, min_size=1, max_size=4))


def damaged(content, changes):
    data = bytearray(content)
    for kind, place, *more in changes:
        at = int(place * len(data))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and data:
            data[at] ^= more[0]
        elif kind == "insert":
            data[at:at] = more[0]
        elif kind == "number":
            data[at : at + 4] = struct.pack("<i", more[0])
        elif kind in ("repeat", "drop"):
            at, end = sorted((at, int(more[0] * len(data))))
            data[at:end] = data[at:end] * (2 if kind == "repeat" else 0)
    return bytes(data)


def load(folder, content):
    """Load ``content`` into a layer: true if it is what the file says, false if it was refused.

    Refused, the layer is as it was; either way there is one file in the folder.
    """
    file, layer = folder / "weights.pth", nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    file.write_bytes(content)
    try:
        load_checkpoint(layer, file)
    except UnreadableFileError:
        assert_same_bits(layer.state_dict(), before)
        return False
    finally:
        assert [path.name for path in folder.iterdir()] == [file.name]
        file.unlink()
    return True


# Checkpoints


@given(which=st.integers(0, 1), changes=damages())
def test_a_damaged_checkpoint(folder, checkpoints, which, changes):
    load(folder, damaged(checkpoints[which], changes))


@given(changes=damages())
def test_a_damaged_safetensors_file(folder, changes):
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="not here: test_a_damaged_checkpoint runs on torch's format"
    )
    content = safetensors.save({"weight": WEIGHT, "bias": BIAS}, {"num_heads": "3"})
    assert load(folder, content)
    load(folder, damaged(content, changes))


@given(head=st.integers(0, 1), place=st.floats(0, 1), end=st.floats(0, 1))
def test_two_checkpoints_spliced(folder, checkpoints, head, place, end):
    first, second = checkpoints[head], checkpoints[1 - head]
    load(folder, first[: int(place * len(first))] + second[int(end * len(second)) :])


@given(st.binary(max_size=200), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x05"]))
def test_random_bytes_as_a_checkpoint(folder, content, start):
    assert not load(folder, start + content)


class Runs:
    """Calls ``function`` wherever it is unpickled without care."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "hide",
    [
        lambda code: code,
        lambda code: {"weight": WEIGHT, "bias": BIAS, "more": code},
        lambda code: {"weight": WEIGHT, "bias": [code]},
        lambda code: collections.OrderedDict({"weight": WEIGHT, "bias": BIAS, "x": {"y": code}}),
    ],
)
def test_code_is_not_run_wherever_it_is_hidden(folder, tmp_path, legacy, hide):
    trace = tmp_path / "trace"
    for code in (
        Runs(open, str(trace), "w"),
        Runs(os.mkdir, str(trace)),
        Runs(os.system, f"touch '{trace}'"),
        Runs(exec, f"open({str(trace)!r}, 'w')"),
        Runs(getattr(torch, "save"), 1, str(trace)),  # noqa: B009
        Runs(torch.load, str(trace)),
    ):
        content = bytes_of(hide(code), _use_new_zipfile_serialization=not legacy)
        assert not load(folder, content)
        assert not load(folder, pickle.dumps(hide(code), protocol=2))
        assert not trace.exists()


@given(name=st.sampled_from(["../escape", "/escape", "archive/../../escape", "a" * 5000, "\n"]))
def test_entries_of_any_name_are_written_nowhere(folder, checkpoints, name):
    buffer = io.BytesIO(checkpoints[0])
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(name, b"out")
    load(folder, buffer.getvalue())
    assert not (folder.parent / "escape").exists()


def test_entries_that_unpack_to_more_than_the_file_are_not_unpacked(folder, checkpoints):
    """torch.save compresses nothing; a file of a few kilobytes had better not fill the memory."""
    buffer, mebibytes = io.BytesIO(), 256
    old = zipfile.ZipFile(io.BytesIO(checkpoints[0]))
    with old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            with new.open(name, "w") as entry:
                entry.write(old.read(name))
                for _ in range(mebibytes if name.endswith("data/0") else 0):
                    entry.write(bytes(2**20))
    assert len(buffer.getvalue()) < 2**20
    before = peak()
    assert not load(folder, buffer.getvalue())
    assert peak() - before < mebibytes * 2**20 / 2


def peak():
    """The most memory this process ever held, in bytes."""
    import resource

    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor


ODD_TENSORS = {
    "sparse": lambda: WEIGHT.to_sparse(),
    "compressed rows": lambda: WEIGHT.to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    "without data": lambda: WEIGHT.to("meta"),
    "complex": lambda: WEIGHT.cfloat(),
    "of a terabyte": lambda: torch.ones(1).expand(2**40),
    "empty": lambda: torch.ones(0, 3),
    "a number": lambda: torch.tensor(1.0),
}
ODD_DTYPES = ("int64", "uint8", "bool", "bits8", "float4_e2m1fn_x2", "float8_e5m2")
try:
    bytes_of(ODD_TENSORS["nested"]())
except Exception:  # torch 2.0 cannot save one, so that no file has one
    del ODD_TENSORS["nested"]
for _name in ODD_DTYPES:
    if hasattr(torch, _name):
        ODD_TENSORS[_name] = lambda name=_name: torch.empty(2, 3, dtype=getattr(torch, name))


@pytest.mark.filterwarnings("ignore")  # PyTorch's: betas, deprecations
@pytest.mark.parametrize("make", ODD_TENSORS.values(), ids=ODD_TENSORS)
def test_a_tensor_that_is_no_plain_matrix_of_real_numbers(folder, make):
    """It would be copied half, without its imaginary part or not at all."""
    assert not load(folder, bytes_of({"bias": BIAS, "weight": make()}))


@given(dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64]), whole=st.booleans())
def test_a_checkpoint_of_another_precision_is_taken(folder, dtype, whole):
    """Views, parameters and tensors with attributes are tensors too."""
    weight = WEIGHT if whole else WEIGHT.T.contiguous().T
    bias = nn.Parameter(BIAS.to(dtype))
    assert load(folder, bytes_of({"weight": weight.to(dtype), "bias": bias}))


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary()
keys = st.none() | st.integers() | st.text(max_size=9) | st.tuples(st.integers()) | st.booleans()
nested = st.recursive(
    plain | st.builds(torch.ones, st.integers(0, 3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=9,
)
contents = st.one_of(nested, st.dictionaries(keys, st.just(BIAS), min_size=1, max_size=4))


@given(contents, st.booleans())
def test_a_checkpoint_of_any_content(folder, content, within):
    """Numbers and tuples are keys as well, to Python."""
    if within and isinstance(content, dict):
        content = {"weight": WEIGHT, "bias": BIAS, **content}
    load(folder, bytes_of(content))


@pytest.mark.parametrize("name", ["_metadata", "keys", "values", "copy", "__len__"])
@pytest.mark.parametrize("value", [5, {"": 7}, None])
def test_attributes_of_a_state_dict_are_ignored(folder, name, value):
    """An OrderedDict has attributes, which unpickling restores in front of its methods."""
    state = collections.OrderedDict(weight=WEIGHT, bias=BIAS)
    setattr(state, name, value)
    assert load(folder, bytes_of(state))


@pytest.mark.parametrize("depth", [10, 10_000])
def test_a_deep_checkpoint(folder, depth):
    content = b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."
    assert not load(folder, content)


# Images


def read(folder, content, **options):
    file = folder / "image"
    file.write_bytes(content)
    try:
        photograph = load_image(file, 14, **options)
    except (UnreadableFileError, InvalidInputError):
        return False
    finally:
        assert [path.name for path in folder.iterdir()] == [file.name]
        file.unlink()
    assert photograph.tensor.isfinite().all()
    assert photograph.picture.shape == (*photograph.tensor.shape[1:], 3)
    return True


harmless = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@harmless
@pytest.mark.parametrize(("suffix", "mode"), FORMATS)
@given(changes=damages(), frames=st.integers(1, 3))
def test_a_damaged_image_of_any_depth_and_transparency(folder, suffix, mode, changes, frames):
    read(folder, damaged(film(suffix, mode, frames), changes))


@harmless
@pytest.mark.parametrize(("suffix", "mode"), FORMATS)
def test_an_image_of_any_depth_and_transparency(folder, suffix, mode):
    assert read(folder, film(suffix, mode, 2)) or (suffix, mode) == ("tiff", "I")


@harmless
@pytest.mark.parametrize("suffix", SUFFIXES)
@given(changes=damages(), size=st.sampled_from([None, 14, (28, 14)]))
def test_a_damaged_image(folder, images, suffix, changes, size):
    read(folder, damaged(images[suffix], changes), image_size=size)


@harmless
@given(
    pair=st.tuples(st.sampled_from(SUFFIXES), st.sampled_from(SUFFIXES)),
    place=st.floats(0, 1),
    end=st.floats(0, 1),
)
def test_two_images_spliced(folder, images, pair, place, end):
    first, second = (images[suffix] for suffix in pair)
    read(folder, first[: int(place * len(first))] + second[int(end * len(second)) :])


@harmless
@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 1), (0, 0), (1, 2**31 - 1)])
@pytest.mark.parametrize("suffix", ["png", "gif", "bmp", "tga"])
def test_an_image_that_claims_another_size(folder, images, suffix, size):
    """Memory is taken for pixels that are there, up to what Pillow takes for a photograph."""
    place, form = {"png": (16, ">II"), "gif": (6, "<HH"), "bmp": (18, "<II"), "tga": (12, "<HH")}[
        suffix
    ]
    content = bytearray(images[suffix])
    most = 2**16 - 1 if form == "<HH" else 2**31 - 1
    struct.pack_into(form, content, place, *(min(side, most) for side in size))
    before = peak()
    read(folder, bytes(content))
    assert peak() - before < 2**29


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_checkpoint_of_a_folder(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(UnreadableFileError, match="no file of weights"):
        load_checkpoint(nn.Linear(3, 2), tmp_path)
