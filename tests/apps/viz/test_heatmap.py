"""Heatmaps: what is where, in which colour, with which warning, and in which file."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import dinov2_attn
from dinov2_attn._files import atomic_folder
from dinov2_attn.apps.viz.colours import top_mass_mask, upsample, viridis
from dinov2_attn.apps.viz.heatmap import cls_maps, draw, image_files, map_files, write
from dinov2_attn.apps.viz.images import LoadedImage, load_image
from dinov2_attn.apps.viz.text import LEAST_WIDTH, NO_MEANING, with_banner
from dinov2_attn.errors import InvalidInputError, UnwritableOutputError
from dinov2_attn.proof.conformance.synthetic_models import HEAD, look_at_what_is_bright
from tests.support import upstreams
from tests.support.bright_patch import photograph_of
from tests.support.tolerances import assert_close, assert_same_bits

PURPLE, YELLOW = (68, 1, 84), (253, 231, 36)  # the ends of viridis
grids = arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    elements=st.floats(0, 1, width=32, allow_subnormal=False),
)


# Orientation, on real models with a planted attention


@pytest.fixture(scope="module", params=[upstreams.FIRST, upstreams.DEPTH_ANYTHING], ids=str)
def planted(request):
    """The first upstream without registers, and a fork with four of them."""
    upstream = request.param
    registers = {"num_register_tokens": 4} if upstream.has_registers else {}
    build = upstream.module(upstream.model).vit_small
    model = build(patch_size=14, img_size=56, init_values=1.0, block_chunks=0, **registers)
    with dinov2_attn.install(upstream.package):
        yield look_at_what_is_bright(model.eval())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("heatmap")


@given(data=st.data(), height=st.integers(1, 7), width=st.integers(1, 7))
def test_the_map_peaks_where_the_bright_patch_is(planted, folder, data, height, width):
    assume(height != width)
    bright = (data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1)))
    Image.fromarray(photograph_of((height, width), bright)).save(folder / "planted.png")
    photograph = load_image(folder / "planted.png", 14)

    maps = cls_maps(planted, photograph)

    assert maps.shape == (planted.num_heads, height, width)
    assert maps.dtype == np.float32
    assert np.unravel_index(maps[HEAD].argmax(), (height, width)) == bright
    mean = draw(photograph, maps, 14)["attn-mean"]
    yellow = (mean == YELLOW).all(axis=-1)
    assert_same_bits(yellow, (photograph.picture == 255).all(axis=-1))


def test_the_bright_patch_would_be_elsewhere_in_a_transposed_map(planted, folder):
    grid, bright = (4, 7), (1, 5)
    Image.fromarray(photograph_of(grid, bright)).save(folder / "planted.png")
    seen = cls_maps(planted, load_image(folder / "planted.png", 14))[HEAD]
    column_by_column = seen.reshape(7, 4).T
    assert np.unravel_index(column_by_column.argmax(), grid) != bright


def test_a_device_that_cannot_run_the_model_is_an_error_of_ours(planted, folder):
    """As when memory runs out, which a test had better not do."""

    def run_out(*_):
        raise RuntimeError("not enough memory\nand a page of advice")

    Image.fromarray(photograph_of((2, 3), (0, 0))).save(folder / "small.png")
    hook = planted.blocks[0].register_forward_pre_hook(run_out)
    try:
        with pytest.raises(
            InvalidInputError, match=r"28 × 42 \(RuntimeError: not enough memory\)\.\nGive"
        ):
            cls_maps(planted, load_image(folder / "small.png", 14))
    finally:
        hook.remove()


def test_the_numbers_are_attention_not_rescaled(planted, folder):
    Image.fromarray(photograph_of((2, 3), (0, 1))).save(folder / "planted.png")
    photograph = load_image(folder / "planted.png", 14)
    with torch.inference_mode():
        rows = planted.get_last_self_attention(photograph.tensor[None], queries="cls")
    prefix = rows.shape[-1] - 6
    assert_close(cls_maps(planted, photograph).reshape(-1, 6), rows[0, :, 0, prefix:].numpy())


# Colours


@given(grid=grids)
def test_each_map_runs_from_purple_to_yellow(grid):
    assume(np.ptp(grid) > 0)
    colours = viridis(grid)
    assert colours.shape == (*grid.shape, 3)
    assert tuple(colours.reshape(-1, 3)[grid.argmin()]) == PURPLE
    assert tuple(colours.reshape(-1, 3)[grid.argmax()]) == YELLOW


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_a_constant_map_has_the_lowest_colour(value):
    assert (viridis(np.full((2, 3), value, np.float32)) == PURPLE).all()


def test_nan_is_black_and_leaves_the_others_their_colours():
    colours = viridis(np.array([[0.1, np.nan, 0.3]], np.float32))
    assert [tuple(colour) for colour in colours[0]] == [PURPLE, (0, 0, 0), YELLOW]
    assert (viridis(np.full((2, 3), np.nan, np.float32)) == 0).all()


@given(grid=grids, share=st.floats(0.01, 1))
def test_the_mask_is_the_smallest_set_that_holds_the_share(grid, share):
    marked = top_mass_mask(grid, share)
    total = grid.sum(dtype=np.float64)
    assume(total > 0)
    left = grid[~marked].sum(dtype=np.float64)
    assert left <= (1 - share) * total + 1e-9
    assert left + grid[marked].min() > (1 - share) * total - 1e-9
    assert not (~marked).any() or grid[~marked].max() <= grid[marked].min()


def test_the_mask_of_dino_v1():
    grid = np.array([[0.4, 0.1], [0.3, 0.2]], np.float32)
    assert top_mass_mask(grid, 0.6).tolist() == [[True, False], [True, False]]
    assert top_mass_mask(grid, 1.0).all()


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_without_mass_nothing_is_marked(value):
    assert not top_mass_mask(np.full((2, 3), value, np.float32), 0.6).any()


def test_a_cell_covers_exactly_its_patch():
    cells = np.arange(6).reshape(2, 3)
    pixels = upsample(cells, 14)
    assert pixels.shape == (28, 42)
    assert_same_bits(pixels[14:28, 14:28], np.full((14, 14), 4))


# Pictures and their files


@pytest.fixture
def photograph():
    picture = photograph_of((2, 3), (0, 1))
    return LoadedImage(torch.zeros(3, 28, 42), picture)


@pytest.fixture
def maps():
    return np.random.default_rng(0).random((6, 2, 3), dtype=np.float32)


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def names(threshold=None):
    heads = [f"attn-head{j}.png" for j in range(6)]
    masks = [f"mask_th{threshold}_head{j}.png" for j in range(6)] if threshold else []
    return {"attention.npy", "attn-mean.png", "img.png", "overlay-mean.png", *heads, *masks}


@pytest.mark.parametrize("threshold", [None, 0.6])
def test_the_files_have_dino_v1s_names_and_the_images_size(tmp_path, photograph, maps, threshold):
    pictures = draw(photograph, maps, 14, threshold)
    write(tmp_path, {**map_files(maps, pictures), **image_files(photograph)})
    assert set(os.listdir(tmp_path)) == names(threshold)
    assert {pixels(path).shape for path in tmp_path.glob("*.png")} == {(28, 42, 3)}
    assert_same_bits(np.load(tmp_path / "attention.npy"), maps)
    assert_same_bits(pixels(tmp_path / "img.png"), photograph.picture)


def test_the_overlay_is_half_grey_photograph_half_map(photograph, maps):
    pictures = draw(photograph, maps, 14)
    grey = (photograph.picture @ (0.2126, 0.7152, 0.0722))[..., None]
    expected = grey / 2 + pictures["attn-mean"] / 2
    assert np.abs(pictures["overlay-mean"] - expected).max() <= 1


def test_a_mask_keeps_the_colours_of_its_patches_only(photograph, maps):
    picture = np.random.default_rng(0).integers(0, 256, (28, 42, 3), dtype=np.uint8)
    pictures = draw(LoadedImage(photograph.tensor, picture), maps, 14, 0.6)
    for head, grid in enumerate(maps):
        kept = upsample(top_mass_mask(grid, 0.6), 14)
        mask = pictures[f"mask_th0.6_head{head}"]
        assert_same_bits(mask[kept], picture[kept])
        assert not np.ptp(mask[~kept], axis=1).any()  # grey
        assert (
            np.abs(mask[~kept][:, 0] - 0.4 * (picture[~kept] @ (0.2126, 0.7152, 0.0722))).max() <= 1
        )


def test_every_picture_of_a_map_carries_the_warning(tmp_path, photograph, maps):
    pictures = draw(photograph, maps, 14, 0.6)
    files = map_files(maps, pictures, warning=NO_MEANING)
    write(tmp_path, {**files, **image_files(photograph)})
    for path in tmp_path.glob("*.png"):
        height = len(pixels(path))
        assert height == 28 if path.name == "img.png" else height > 28


@given(width=st.integers(1, 1500), height=st.integers(1, 1500))
def test_the_warning_is_whole_and_the_picture_unharmed(width, height):
    picture = Image.new("RGB", (width, height), "blue")
    canvas = np.array(with_banner(picture, NO_MEANING))
    assert (canvas[:height, :width] == (0, 0, 255)).all()
    assert canvas.shape[1] == max(width, LEAST_WIDTH)
    strip = canvas[height:]
    background = strip[0, 0]
    assert (strip == 255).any()
    # Letters that were cut off would touch the border.
    for border in (strip[0], strip[-1], strip[:, 0], strip[:, -1]):
        assert_same_bits(border, np.broadcast_to(background, border.shape))


# All or nothing


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write_new(folder, *names):
    with atomic_folder(folder) as unfinished:
        for name in names:
            (unfinished / name).write_bytes(b"new")


def test_files_appear_together_in_a_folder_that_is_made(tmp_path):
    write_new(tmp_path / "deep" / "er", "a.png", "b.png")
    assert content(tmp_path / "deep" / "er") == {"a.png": b"new", "b.png": b"new"}


def test_files_of_the_same_name_are_replaced_and_others_kept(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    (tmp_path / "notes.txt").write_bytes(b"old")
    write_new(tmp_path, "a.png", "b.png")
    assert content(tmp_path) == {"a.png": b"new", "b.png": b"new", "notes.txt": b"old"}
    assert len(list(tmp_path.iterdir())) == 3


def test_files_are_removed_with_the_move_or_not_at_all(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "c.png").mkdir()
    with (
        pytest.raises(UnwritableOutputError),
        atomic_folder(tmp_path, without=["b.png"]) as unfinished,
    ):
        (unfinished / "c.png").write_bytes(b"new")
    assert content(tmp_path) == {"a.png": b"old", "b.png": b"old"}
    with atomic_folder(tmp_path, without=["b.png", "absent.png"]) as unfinished:
        (unfinished / "d.png").write_bytes(b"new")
    assert content(tmp_path) == {"a.png": b"old", "d.png": b"new"}


def write_one_and_raise(folder, error):
    with atomic_folder(folder) as unfinished:
        (unfinished / "a.png").write_bytes(b"new")
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError()])
def test_an_interruption_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(type(error)):
        write_one_and_raise(tmp_path / "deep" / "er", error)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    full = OSError("No space left on device")
    with pytest.raises(
        UnwritableOutputError, match=rf"(?s)written at {tmp_path}.*No space.*make room"
    ):
        write_one_and_raise(tmp_path / "out", full)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_replaced_brings_the_others_back(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    (tmp_path / "c.png").mkdir()
    with pytest.raises(
        UnwritableOutputError, match=r"(?s)Expected a folder .*c\.png.*Name another"
    ):
        write_new(tmp_path, "a.png", "b.png", "c.png")
    assert content(tmp_path) == {"a.png": b"old"}
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "c.png"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here: a folder is no file either")
def test_a_pipe_is_not_replaced(tmp_path):
    """Nor is a device: root, as in a container, could take /dev/null from everybody."""
    (tmp_path / "a.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "c.png")
    with pytest.raises(UnwritableOutputError, match=r"(?s)not a file.*c\.png"):
        write_new(tmp_path, "a.png", "b.png", "c.png")
    assert (tmp_path / "a.png").is_symlink()
    assert (tmp_path / "c.png").is_fifo()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("below", ["", "deep"])
def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path, below):
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(
        UnwritableOutputError, match=r"(?s)Expected a folder .*\.\nFound NotADirectoryError"
    ):
        write_new(tmp_path / "out" / below, "a.png")
    assert content(tmp_path) == {"out": b"mine"}
