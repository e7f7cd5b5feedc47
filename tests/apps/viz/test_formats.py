"""What Pillow can open here, and the plug-in that is named where it cannot."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image

from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.apps.viz.opening import plugin_for, readable_suffixes, register_plugins
from dinov2_attn.errors import UnreadableFileError

HEADERS = {
    "heic": (b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf", "pillow-heif", "pillow_heif"),
    "jxl": (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl ", "pillow-jxl-plugin", "pillow_jxl"),
}
NAKED = b"\xff\x0a\x48\x01\x36\x0c"  # a codestream of JPEG XL without a container


@pytest.mark.parametrize("suffix", HEADERS)
@pytest.mark.parametrize("name", ["photo.{}", "photo.jpg"])
@pytest.mark.parametrize("capitals", [False, True])
def test_a_missing_plugin_is_named_by_suffix_and_by_content(tmp_path, suffix, name, capitals):
    header, package, module = HEADERS[suffix]
    if importlib.util.find_spec(module):
        pytest.skip(f"{package} is installed")
    name = name.format(suffix)
    path = tmp_path / (name.upper() if capitals else name)
    path.write_bytes(header)
    with pytest.raises(UnreadableFileError, match=f"(?s)needs a plug-in.*`pip install {package}`"):
        load_image(path, 14)
    assert plugin_for(header) == package
    assert plugin_for(f"a.{suffix}") == plugin_for(tmp_path / f"A.{suffix.upper()}") == package
    assert f".{suffix}" not in readable_suffixes()


def test_a_codestream_is_jpeg_xl_too():
    assert plugin_for(NAKED) == plugin_for("a.jxl")


@pytest.mark.parametrize("suffix", HEADERS)
def test_an_installed_plugin_is_used(tmp_path, suffix):
    pytest.importorskip(HEADERS[suffix][2])
    register_plugins()
    pixels = np.zeros((28, 42, 3), np.uint8)
    pixels[:14, :14] = 255, 0, 0
    Image.fromarray(pixels).save(tmp_path / f"photo.{suffix}", quality=95)
    found = load_image(tmp_path / f"photo.{suffix}", 14).picture.astype(int)
    assert np.abs(found[2:12, 2:12] - (255, 0, 0)).mean() < 10
    assert np.abs(found[18:, 18:]).mean() < 10
    assert plugin_for(f"a.{suffix}") is plugin_for(HEADERS[suffix][0]) is None
    assert f".{suffix}" in readable_suffixes()


@pytest.mark.parametrize("suffix", HEADERS)
def test_a_photograph_that_was_taken_sideways(tmp_path, suffix):
    pytest.importorskip(HEADERS[suffix][2])
    register_plugins()
    pixels = np.zeros((28, 42, 3), np.uint8)
    pixels[:14, :14] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))
    turned.save(tmp_path / f"photo.{suffix}", quality=95, exif=exif.tobytes())
    found = load_image(tmp_path / f"photo.{suffix}", 14).picture
    assert found.shape == (28, 42, 3)
    assert found[:12, :12].min() > 240


def test_what_is_no_image_of_theirs_has_no_plugin(tmp_path):
    assert plugin_for(b"no pixels") is plugin_for(b"") is plugin_for("a.png") is None
    (tmp_path / "a.png").write_bytes(b"no pixels")
    with pytest.raises(UnreadableFileError, match="an image viewer opens it"):
        load_image(tmp_path / "a.png", 14)


def test_suffixes_are_those_of_pixels():
    found = readable_suffixes()
    assert {".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".webp", ".bmp", ".tga"} <= found
    assert not found & {".eps", ".ps", ".pdf", ".h5", ".hdf", ".grib", ".mpg", ".npy", ".txt"}
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in found)
