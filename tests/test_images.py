"""Reading photographs: sizes, crops, orientation, colours, and files that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dinov2_attn.errors import InvalidInput, UnreadableFile
from dinov2_attn.show.images import read_photograph


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
        with pytest.raises(InvalidInput, match=rf"found .*{height} × {width} .*--image-size"):
            read_photograph(path, patch_size)
        return
    picture = read_photograph(path, patch_size).picture
    rows, columns = height - height % patch_size, width - width % patch_size
    np.testing.assert_array_equal(picture, pixels[:rows, :columns])


def test_the_tensor_is_the_picture_normalised_as_imagenet(folder):
    photograph = read_photograph(save(folder, noise(28, 42)), 14)
    assert photograph.tensor.dtype == torch.float32
    assert photograph.tensor.shape == (3, 28, 42)
    mean = torch.tensor([0.485, 0.456, 0.406])
    deviation = torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.from_numpy(photograph.picture) / 255 - mean) / deviation
    torch.testing.assert_close(photograph.tensor, expected.permute(2, 0, 1))


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
    picture = read_photograph(save(folder, noise(*shape)), 14, image_size).picture
    assert picture.shape == (*expected, 3)


def test_a_photograph_taken_sideways_is_upright(folder):
    pixels = noise(28, 42)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows run from the top down at the right
    path = save(folder, np.rot90(pixels), exif=exif)
    np.testing.assert_array_equal(read_photograph(path, 14).picture, pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_eight_bit_image_becomes_rgb(folder, mode):
    path = folder / "image.tif"
    Image.fromarray(noise(28, 42)).convert(mode).save(path)
    assert read_photograph(path, 14).picture.shape == (28, 42, 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deeper_images_are_refused_rather_than_clipped(folder, dtype):
    path = save(folder, noise(28, 42)[..., 0].astype(dtype), "deep.tif")
    with pytest.raises(UnreadableFile, match=r"8 bits per channel; found .*mode (I|F).*0…255"):
        read_photograph(path, 14)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tif"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.9])
def test_a_truncated_image_is_unreadable(folder, suffix, part):
    path = save(folder, noise(140, 140), f"whole.{suffix}")
    content = path.read_bytes()
    cut = folder / f"cut.{suffix}"
    cut.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UnreadableFile, match=r"a complete image file; found .*cut.*\. Check"):
        read_photograph(cut, 14)


@pytest.mark.parametrize("name", ["", "absent.png", "text.png"])
def test_what_is_no_image_is_unreadable(folder, name):
    (folder / "text.png").write_text("no pixels here")
    with pytest.raises(UnreadableFile, match=rf"found {folder / name}, which cannot be read"):
        read_photograph(folder / name, 14)
