"""Reading photographs: sizes, crops, orientation, colours, and files that are none."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.errors import InvalidInputError, UnreadableFileError
from tests.support.tolerances import assert_close, assert_same_bits


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


def save(folder, pixels, name="image.png", **options):
    Image.fromarray(pixels).save(folder / name, **options)
    return folder / name


@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    patch_size=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_the_crop_keeps_the_top_left_in_whole_patches(folder, height, width, patch_size, seed):
    pixels = noise(height, width, seed)
    path = save(folder, pixels)
    if min(height, width) < patch_size:
        with pytest.raises(
            InvalidInputError, match=rf"(?s)Found .*{height} × {width} .*--image-size"
        ):
            load_image(path, patch_size)
        return
    picture = load_image(path, patch_size).picture
    rows, columns = height - height % patch_size, width - width % patch_size
    assert_same_bits(picture, pixels[:rows, :columns])


def test_the_tensor_is_the_picture_normalised_as_imagenet(folder):
    photograph = load_image(save(folder, noise(28, 42)), 14)
    assert photograph.tensor.dtype == torch.float32
    assert photograph.tensor.shape == (3, 28, 42)
    mean = torch.tensor([0.485, 0.456, 0.406])
    deviation = torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.from_numpy(photograph.picture) / 255 - mean) / deviation
    assert_close(photograph.tensor, expected.permute(2, 0, 1))


@pytest.mark.parametrize(
    ("shape", "image_size", "expected"),
    [
        ((60, 90), None, (56, 84)),  # as it is
        ((60, 90), 30, (28, 42)),  # the short side
        ((90, 60), 30, (42, 28)),
        ((60, 90), 120, (112, 168)),  # enlarged
        ((60, 90), (90, 30), (84, 28)),  # height, then width
        ((1036, 1200), None, (518, 588)),  # no larger than the weights were trained at
        ((100, 1400), None, (98, 1400)),  # a panorama is not enlarged
    ],
)
def test_sizes(folder, shape, image_size, expected):
    picture = load_image(save(folder, noise(*shape)), 14, image_size).picture
    assert picture.shape == (*expected, 3)


def test_a_photograph_taken_sideways_is_upright(folder):
    pixels = noise(28, 42)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows run from the top down at the right
    path = save(folder, np.rot90(pixels), exif=exif)
    assert_same_bits(load_image(path, 14).picture, pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_eight_bit_image_becomes_rgb(folder, mode):
    path = folder / "image.tif"
    Image.fromarray(noise(28, 42)).convert(mode).save(path)
    assert load_image(path, 14).picture.shape == (28, 42, 3)


def test_what_is_transparent_is_white(folder):
    """Below it there may be any colour, black as a rule, which a model would look at."""
    pixels = noise(28, 42)
    alpha = np.full((28, 42, 1), 255, dtype=np.uint8)
    alpha[:, :14] = 0
    seen = np.where(alpha, pixels, 255)
    path = save(folder, np.concatenate([pixels, alpha], axis=2))
    assert_same_bits(load_image(path, 14).picture, seen)
    halves = np.full((28, 28, 2), 128, dtype=np.uint8)
    path = save(folder, halves)
    assert abs(int(load_image(path, 14).picture.mean()) - 191) <= 1


@pytest.mark.parametrize("suffix", ["png", "gif"])
@pytest.mark.parametrize("mode", ["P", "L"])
def test_a_palette_may_have_a_transparent_entry(folder, mode, suffix):
    image = Image.new(mode, (28, 28), 0)
    image.paste(1, (0, 0, 28, 14))
    if mode == "P":
        image.putpalette([200, 0, 0, 0, 200, 0])
    image.save(folder / f"image.{suffix}", transparency=0)
    picture = load_image(folder / f"image.{suffix}", 14).picture
    shown = (0, 200, 0) if mode == "P" else (1, 1, 1)
    assert (picture[14:] == 255).all()
    assert_same_bits(picture[:14], np.full((14, 28, 3), shown, np.uint8))


@pytest.mark.parametrize("suffix", ["png", "tif", "ppm"])
@pytest.mark.parametrize("turned", [False, True])
def test_sixteen_bits_are_scaled_to_eight(folder, suffix, turned):
    """Pillow would clip all that is above 255 to white; PPM and its older versions say mode I."""
    deep = np.arange(28 * 42, dtype=np.uint16).reshape(28, 42) * 55
    deep[0, 0] = 65535
    exif = Image.Exif()
    if turned and suffix != "ppm":
        exif[0x0112] = 3
    path = save(folder, deep, f"deep.{suffix}", **({"exif": exif} if suffix != "ppm" else {}))
    expected = np.rint(deep / 257).astype(np.uint8)
    if turned and suffix != "ppm":
        expected = expected[::-1, ::-1]
    picture = load_image(path, 14).picture
    assert_same_bits(picture, np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_deeper_images_are_refused_rather_than_clipped(folder, dtype):
    path = save(folder, noise(28, 42)[..., 0].astype(dtype), "deep.tif")
    with pytest.raises(
        UnreadableFileError, match=r"(?s)8 or 16 bits.*\.\nFound .* of 32 bits, .*--range 0,255"
    ):
        load_image(path, 14)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_several_frames_the_first_is_taken_and_the_log_says_so(folder, suffix, caplog):
    frames = [Image.new("RGB", (28, 28), colour) for colour in ("red", "lime", "blue")]
    path = folder / f"film.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    caplog.set_level("INFO", "dinov2_attn")
    picture = load_image(path, 14).picture.astype(int)
    assert (abs(picture - [255, 0, 0]) <= 2).all()  # webp is lossy
    assert f"{path} has several frames or pages: the first is taken" in caplog.text


def test_one_frame_is_nothing_to_say(folder, caplog):
    caplog.set_level("INFO", "dinov2_attn")
    for suffix in ("gif", "png", "webp", "tif", "jpg"):
        load_image(save(folder, noise(28, 42), f"still.{suffix}"), 14)
    assert "frames" not in caplog.text


def test_an_image_of_one_pixel_is_too_small_unless_it_is_enlarged(folder):
    path = save(folder, noise(1, 1))
    with pytest.raises(
        InvalidInputError, match=r"(?s)at least one patch, 14 × 14\.\nFound .*of 1 × 1"
    ):
        load_image(path, 14)
    picture = load_image(path, 14, 14).picture
    assert picture.shape == (14, 14, 3)
    assert_same_bits(picture, np.broadcast_to(noise(1, 1), picture.shape))


def header_only(path, width, height):
    """Write what says that it is a PNG of this size, and no pixel."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b""))
    return path


@pytest.mark.parametrize("size", [(10_000, 10_001), (20_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_a_large_image_is_refused_by_its_header(folder, size):
    """There are no pixels in it that could have been decoded."""
    path = header_only(folder / "large.png", *size)
    with pytest.raises(
        InvalidInputError, match=r"(?s)at most 100,000,000 pixels\.\nFound .*--max-pixels N"
    ):
        load_image(path, 14)


def test_the_limit_is_one_of_pixels_and_up_to_the_user(folder):
    path = save(folder, noise(28, 42))
    assert load_image(path, 14, max_pixels=28 * 42).picture.shape == (28, 42, 3)
    for pixels in (1, 28 * 42 // 2 - 1, 28 * 42 - 1):
        with pytest.raises(InvalidInputError, match=f"at most {pixels:,} pixels.\nFound {path} "):
            load_image(path, 14, max_pixels=pixels)


def test_below_the_limit_pillow_neither_warns_nor_refuses(folder):
    """Its own limits are 89 and 179 million; incomplete is all that these files are then."""
    for size in [(10_000, 10_000), (20_000, 30_000)]:
        path = header_only(folder / "large.png", *size)
        with pytest.raises(UnreadableFileError, match="a complete image file"):
            load_image(path, 14, max_pixels=10**9)


def test_the_limit_of_the_process_is_left_alone(folder):
    before = Image.MAX_IMAGE_PIXELS
    path = save(folder, noise(28, 42))
    load_image(path, 14)
    with pytest.raises(InvalidInputError):
        load_image(path, 14, max_pixels=1)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tif"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.9])
def test_a_truncated_image_is_unreadable(folder, suffix, part):
    path = save(folder, noise(140, 140), f"whole.{suffix}")
    content = path.read_bytes()
    cut = folder / f"cut.{suffix}"
    cut.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(
        UnreadableFileError, match=r"(?s)a complete image file\.\nFound .*cut.*\.\nCheck"
    ):
        load_image(cut, 14)


@pytest.mark.parametrize("name", ["", "absent.png", "text.png"])
def test_what_is_no_image_is_unreadable(folder, name):
    (folder / "text.png").write_text("no pixels here")
    with pytest.raises(UnreadableFileError, match=rf"Found {folder / name}, which cannot be read"):
        load_image(folder / name, 14)


@pytest.mark.skipif(os.name != "posix", reason="a program of two lines wants a shell")
def test_postscript_is_not_run(folder, tmp_path, monkeypatch):
    """Pillow goes by the content, and hands it to the Ghostscript that it finds."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\necho run >> {tmp_path}/log\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # where it keeps what it found
    path = folder / "photograph.jpg"
    Image.fromarray(noise(20, 20)).save(path, "EPS")
    with pytest.raises(UnreadableFileError, match=r"photograph\.jpg, which is PostScript"):
        load_image(path, 14)
    assert not (tmp_path / "log").exists()
