"""Models of other than three channels are shown what a file holds, or it is refused in time."""

from __future__ import annotations

import importlib.util
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import dinov2_attn
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.viz.decoding import shown
from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.errors import InvalidInputError, UnreadableFileError
from tests.support import upstreams
from tests.support.extraction import build, index_of, stored
from tests.support.raw_files import tiff
from tests.support.strategies import noise
from tests.support.tolerances import assert_close

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights

NEEDS_TIFFFILE = pytest.mark.skipif(
    importlib.util.find_spec("tifffile") is None, reason="tifffile is not installed"
)


@pytest.fixture
def grafted(first):
    """Upstream itself, grafted for one test: programs install and leave nothing."""
    with dinov2_attn.install(first.package):
        yield first


def values(channels, size=(28, 42)):
    shape = (*size, channels) if channels > 1 else size
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path, **options)
    return path


def tensor_of(path, channels, **options):
    """What a model gets, its values as the file holds them."""
    read = load_image(path, 14, channels=channels, mean=0, std=1, **options)
    assert read.picture.shape == (*read.tensor.shape[1:], 3)
    assert read.picture.dtype == np.uint8
    return np.rint(read.tensor.permute(1, 2, 0).numpy() * 255).astype(int)


def test_grey_is_one_channel(tmp_path):
    grey = values(1)
    found = tensor_of(save(tmp_path / "grey.png", grey), 1)
    assert_close(found[..., 0], grey, within=0)


def test_colours_become_grey_for_one_channel(tmp_path):
    path = save(tmp_path / "colour.png", values(3))
    expected = np.array(Image.open(path).convert("L"))
    assert_close(tensor_of(path, 1)[..., 0], expected, within=0)


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 4), ("CMYK", 4), ("LA", 2)])
@pytest.mark.parametrize("size", [None, 28])
def test_as_many_channels_as_the_model_has_are_kept_as_they_are(tmp_path, mode, channels, size):
    """Alpha is one of them, so that nothing is laid on white, nor weighed by it when resized."""
    pixels = values(channels, (56, 84) if size else (28, 42))
    Image.fromarray(pixels, mode).save(tmp_path / "image.tif")
    expected = pixels
    if size:
        planes = [Image.fromarray(np.ascontiguousarray(pixels[..., i])) for i in range(channels)]
        resized = [plane.resize((42, 28), Image.Resampling.BICUBIC) for plane in planes]
        expected = np.stack(resized, axis=-1)
    found = tensor_of(tmp_path / "image.tif", channels, image_size=size)
    assert_close(found, expected, within=0)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_arrays_have_any_number(tmp_path, channels):
    pixels = values(channels)
    found = tensor_of(save(tmp_path / "image.npy", pixels), channels)
    assert_close(found, pixels.reshape(28, 42, channels), within=0)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_pages_of_a_tiff_may_be_channels(tmp_path, channels):
    planes = (np.ascontiguousarray(values(channels)[..., i]) for i in range(channels))
    pages = [Image.fromarray(plane) for plane in planes]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    assert_close(tensor_of(tmp_path / "stack.tif", channels), values(channels), within=0)


@NEEDS_TIFFFILE
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 5, 8])
def test_channels_of_a_tiff(tmp_path, channels, dtype):
    pixels = values(channels).astype(dtype) * (257 if dtype == np.uint16 else 1)
    found = tensor_of(tiff(tmp_path / "image.tif", pixels), channels)
    assert_close(found, values(channels), within=0)


@pytest.mark.skipif(not NEEDS_TIFFFILE.args[0], reason="tifffile is installed")
@pytest.mark.parametrize("channels", [2, 5])
def test_channels_of_a_tiff_need_a_library(tmp_path, channels):
    path = tiff(tmp_path / "image.tif", values(channels))
    with pytest.raises(UnreadableFileError, match="pip install tifffile"):
        load_image(path, 14, channels=channels)


OTHERS = [(4, 3), (5, 3), (5, 1), (2, 3), (5, 4), (4, 2), (3, 5), (3, 4)]


@pytest.mark.parametrize(("model", "image"), [*OTHERS, (1, 5), (3, 5)])
def test_others_are_refused_with_both_numbers(tmp_path, model, image):
    path = save(tmp_path / "image.npy", values(image))
    message = (
        rf"(?s)an image of {model} channels?, as the model takes\.\nFound .*, which has {image}\."
    )
    with pytest.raises(InvalidInputError, match=message):
        load_image(path, 14, channels=model)


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "LA"])
def test_no_channel_is_invented(tmp_path, mode):
    Image.fromarray(values(3)).convert(mode).save(tmp_path / "image.png")
    found = {"RGB": 3, "P": 3, "L": 1, "LA": 2}[mode]
    with pytest.raises(
        InvalidInputError, match=f"(?s)4 channels, as the model takes.*which has {found}"
    ):
        load_image(tmp_path / "image.png", 14, channels=4)


@pytest.mark.parametrize("channels", [3, 5])
def test_channels_first_are_told_how_to_turn(tmp_path, channels):
    path = save(tmp_path / "image.npy", np.moveaxis(values(channels), -1, 0))
    with pytest.raises(InvalidInputError, match=r"(?s)channels last.*transpose\(1, 2, 0\)"):
        load_image(path, 14, channels=channels)
    save(path, np.load(path).transpose(1, 2, 0))
    assert_close(tensor_of(path, channels), values(channels), within=0)


@pytest.mark.parametrize(
    "array",
    [np.array([{}]), np.zeros((2, 2, 2, 2)), np.zeros(3), np.zeros((0, 3)), np.ones((9, 9)) * 1j],
)
def test_arrays_that_are_no_image(tmp_path, array):
    np.save(tmp_path / "image.npy", array)
    with pytest.raises(UnreadableFileError):
        load_image(tmp_path / "image.npy", 1)


def test_an_array_has_the_limit_of_images(tmp_path):
    path = save(tmp_path / "image.npy", values(3))
    with pytest.raises(InvalidInputError, match="at most 1,175 pixels"):
        load_image(path, 14, max_pixels=1175)


def test_what_is_shown_of_each_number():
    for channels in (1, 2):
        pixels = values(channels).reshape(28, 42, channels)
        assert_close(shown(pixels), pixels[..., :1].repeat(3, axis=2), within=0)
    for channels in (3, 4, 5):
        assert_close(shown(values(channels)), values(channels)[..., :3], within=0)


# Without a mean and a deviation of their own


def test_the_default_is_the_average_of_imagenets(tmp_path):
    for channels in (1, 2, 4, 5):
        read = load_image(save(tmp_path / "a.npy", values(channels)), 14, channels=channels)
        assert read.reading.mean == (0.449,) * channels
        assert read.reading.std == (0.226,) * channels
    assert np.mean([0.485, 0.456, 0.406]) == pytest.approx(0.449)
    assert np.mean([0.229, 0.224, 0.225]) == pytest.approx(0.226)


# As it is asked and typed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The path of a model of so many channels."""

    def save(channels):
        path = tmp_path_factory.mktemp("model") / f"{channels}.pth"
        options = {"embed_dim": 64, "num_heads": 1, "patch_size": 14, "img_size": 28}
        model = upstreams.FIRST.cls("DinoVisionTransformer")(
            in_chans=channels, depth=2, block_chunks=0, init_values=1.0, **options
        )
        torch.save(model.state_dict(), path)
        return path

    return save


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("channels", [1, 4, 5])
def test_every_command_shows_the_model_its_channels(tmp_path, channels, checkpoint, caplog):
    path = save(tmp_path / ("i.npy" if channels == 5 else "i.png"), values(channels))
    weights = ["--weights", str(checkpoint(channels))]
    assert main(["heatmap", str(path), "-o", str(tmp_path / "out"), *weights]) == 0
    stated = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    (stated,) = (line for line in stated if "the model takes" in line)
    assert "mean 0.449" in stated
    assert "--mean and --std" in stated
    about = json.loads((tmp_path / "out" / "image.json").read_text())
    assert (about["channels"], about["mean"]) == (channels, [0.449] * channels)
    assert main(["explore", str(path), "-o", str(tmp_path / "page.html"), *weights]) == 0
    (tmp_path / "list").write_text(f"{path.name}\n")
    assert main(["extract", str(tmp_path / "list"), "-o", str(tmp_path / "maps"), *weights]) == 0
    assert len(index_of(tmp_path / "maps")) == 1


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("command", ["heatmap", "explore"])
def test_an_image_of_other_channels_stops_before_anything_is_run(
    tmp_path, image, checkpoint, command, caplog
):
    out = tmp_path / "page.html"
    given = [command, str(image), "-o", str(out), "--weights", str(checkpoint(5))]
    assert main([*given, "--mean", "0.5", "--std", "0.5"]) == (1 if command == "heatmap" else 2)
    assert "an image of 5 channels, as the model takes.\nFound" in caplog.text
    assert "which has 3" in caplog.text
    assert "the model takes 5 channels: " not in caplog.text  # both were given
    assert not out.exists()


def test_an_extraction_shows_the_model_its_channels(tmp_path, grafted):
    model = build(grafted, in_chans=4).eval()
    path = save(tmp_path / "image.png", values(4, (4, 6)))
    dinov2_attn.extract(model, path, tmp_path / "out", mean=0.5, std=0.5)
    ((_, maps, _),) = stored(tmp_path / "out")
    images = (torch.from_numpy(values(4, (4, 6))).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    expected = dinov2_attn.attention_maps(model, images, 1, queries="cls").patch_maps()[0]
    assert_close(maps, expected)


MODELS = [(5, 4), (5, 3), (3, 1), (3, 4), (1, 3), (1, 5)]


@pytest.mark.parametrize(("model", "images"), MODELS)
def test_a_tensor_of_other_channels_says_both_numbers(grafted, model, images):
    built = build(grafted, in_chans=model).eval()
    batch = noise(2, images, 4, 6, seed=0)
    with pytest.raises(InvalidInputError) as error:
        built.get_last_self_attention(batch)
    expected, found, advice = error.value.args
    assert f"{model} channel" in expected
    assert found.startswith(f"{images}: ")
    assert "Convert to RGB" not in advice
    if "images" in advice and ": " in advice:
        asked = eval(advice.partition(": ")[2].rstrip("."), {"images": batch})
        assert built.get_last_self_attention(asked).shape[0] == 2


INTEGERS = {
    "uint8": (torch.uint8, 255),
    "int64": (torch.int64, 255),
    "int32": (torch.int32, 255),
    "bool": (torch.bool, 1),
    **({"uint16": (torch.uint16, 65535)} if hasattr(torch, "uint16") else {}),
}


@pytest.mark.parametrize("layout", ["batch", "single", "channels last"])
@pytest.mark.parametrize(("dtype", "white"), INTEGERS.values(), ids=INTEGERS)
def test_the_advice_for_integers_leads_to_the_right_map(grafted, dtype, white, layout):
    import torchvision

    model = build(grafted).eval()
    unit = torch.randint(0, white + 1, (1, 3, 4, 6), generator=torch.Generator().manual_seed(0))
    right = torchvision.transforms.functional.normalize(
        unit.float() / white, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    images = unit.to(dtype)
    images = {"batch": images, "single": images[0], "channels last": images.permute(0, 2, 3, 1)}[
        layout
    ]
    with pytest.raises(InvalidInputError, match="floating tensor") as error:
        model.get_last_self_attention(images)
    call = error.value.args[2]
    call = call[call.index("torchvision.") :].rstrip(".")
    scope = {"torchvision": torchvision, "images": images}
    found = model.get_last_self_attention(eval(call, scope))
    assert_close(found, model.get_last_self_attention(right))


def test_nothing_is_said_of_tensors_in_floats(grafted):
    """One image may be of any brightness: nothing can be certain."""
    model = build(grafted).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.get_last_self_attention(noise(1, 3, 4, 6, seed=0) * 255)
