"""Captioned pictures as files: words in an SVG, a frame for each layer, the program's options."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_attn import viz
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.viz.films import palette_for
from dinov2_attn.apps.viz.reading import DEVIATION, MEAN
from dinov2_attn.apps.viz.saving import FRAME_DPI, pixels_of
from dinov2_attn.apps.viz.text import NO_MEANING
from dinov2_attn.apps.weights.models import build
from dinov2_attn.errors import (
    InvalidInputError,
    OutOfRangeError,
    UnavailableError,
    UnwritableOutputError,
)
from dinov2_attn.proof.conformance.synthetic_models import HEAD
from tests.support import upstreams
from tests.support.bright_patch import photograph_of
from tests.support.figure_probes import Drawn, artifacts_at, caption_of, maps_on, photograph_on
from tests.support.tolerances import assert_close, same_bits

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights
pytestmark = pytest.mark.usefixtures("imported")


GRID = (3, 5)
FIREBRICK = (178, 34, 34)


def frames_of(path):
    with Image.open(path) as film:
        found = []
        for frame in range(film.n_frames):
            film.seek(frame)
            found.append((np.array(film.convert("RGB")).astype(int), film.info["duration"]))
        return found


def words_in(path):
    return " ".join(
        word for e in ET.parse(path).iter() if e.tag.endswith("}text") for word in e.itertext()
    )


# One figure


def test_a_png_is_the_figure(tmp_path):
    figure = viz.plot_heads(maps_on(GRID), warning=NO_MEANING)
    viz.save(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        saved = np.array(image.convert("RGB")).astype(int)
    drawn = pixels_of(figure)
    assert np.abs(saved - drawn).max() <= 2
    assert (saved[-3, 3] == FIREBRICK).all()
    plain = pixels_of(viz.plot_heads(maps_on(GRID)))
    assert (plain[-3, 3] == 255).all()


@pytest.mark.parametrize("draw", [viz.plot_heads, viz.plot_layers], ids=["heads", "layers"])
def test_an_svg_holds_the_caption_as_words(tmp_path, draw):
    options = {"name": "a <model> & 'more'", "warning": NO_MEANING}
    figure = draw(maps_on(GRID), artifacts=artifacts_at(GRID, (1, 1)), **options)
    viz.save(figure, tmp_path / "a.svg")
    assert caption_of(figure) in words_in(tmp_path / "a.svg")
    assert "1 artifact token (red frames)" in words_in(tmp_path / "a.svg")
    assert NO_MEANING in words_in(tmp_path / "a.svg")
    viz.save(
        draw(maps_on(GRID), artifacts=artifacts_at(GRID, (1, 1)), **options), tmp_path / "b.svg"
    )
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("name", ["a.jpg", "a", "png", ".png"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(InvalidInputError, match=r"ends in \.png, \.svg or \.pdf"):
        viz.save(viz.plot(maps_on((1, 1))).figure, tmp_path / name)
    with pytest.raises(InvalidInputError, match=r"ends in \.gif, \.webp or \.mp4"):
        viz.animate(maps_on((1, 1)), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_none_is_an_error(tmp_path):
    with pytest.raises(UnwritableOutputError, match=r"(?s)a file that can be written at .*a\.png"):
        viz.save(viz.plot(maps_on((1, 1))).figure, tmp_path / "missing" / "a.png")
    with pytest.raises(UnwritableOutputError, match=r"(?s)a file that can be written at .*a\.gif"):
        viz.animate(maps_on((1, 1)), tmp_path / "missing" / "a.gif")


# Films


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_film_has_a_frame_for_each_layer_on_one_scale(tmp_path, kind):
    maps = maps_on(GRID, layers=5)
    options = {"image": photograph_on(GRID), "warning": NO_MEANING}
    viz.animate(maps, tmp_path / f"a.{kind}", seconds=0.5, **options)
    frames = frames_of(tmp_path / f"a.{kind}")
    assert len(frames) == 5
    for layer, (frame, duration) in enumerate(frames):
        figure = viz.plot_heads(maps, layer=layer, together=True, **options)
        expected = pixels_of(figure, FRAME_DPI).astype(int)
        assert f"layer {layer} " in caption_of(figure)
        assert duration == 500
        height, width = expected.shape[:2]
        difference = np.abs(frame[-height:, :width] - expected)
        # Letters and photographs of a GIF are near and not the same.
        assert difference.mean() < 3 if kind == "gif" else difference.max() == 0
        others = {figure.axes[1].get_ylim() for figure in (figure, _frame(maps, 0, options))}
        assert len(others) == 1
    for (a, _), (b, _) in itertools.pairwise(frames):
        assert np.abs(a - b).max() > 50


@pytest.mark.parametrize("cmap", ["viridis", "inferno", "gray"])
def test_the_colours_of_maps_in_a_gif_are_those_of_the_colour_map(tmp_path, cmap):
    """Also next to a photograph of more colours than a palette has."""
    grid = (16, 16)
    maps = maps_on(grid, layers=3, heads=2)
    ramp = torch.linspace(0, 1, 256, dtype=torch.float64).reshape(grid)
    for layer, weights in enumerate(maps.weights):
        weights[..., 1:] = ramp.roll(layer, 0).flatten()
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    options = {"image": image, "style": viz.Style(cmap=cmap)}
    viz.animate(maps, tmp_path / "a.gif", **options)
    palettes = set()
    with Image.open(tmp_path / "a.gif") as film:
        palettes.add(tuple(film.getpalette()))
    assert len(palettes) == 1
    for layer, (frame, _) in enumerate(frames_of(tmp_path / "a.gif")):
        drawn = Drawn(_frame(maps, layer, options), dpi=FRAME_DPI)
        for cell in (1, 2, 3):
            exact = drawn.middles(cell, grid)
            drawn.pixels, kept = frame[-len(drawn.pixels) :], drawn.pixels
            assert np.abs(drawn.middles(cell, grid) - exact).max() <= 2
            drawn.pixels = kept


@pytest.mark.parametrize("cmap", ["viridis", "inferno", "magma", "plasma", "cividis", "gray"])
def test_a_palette_has_every_colour_of_the_map_and_some_of_the_rest(cmap):
    colours = viz.Style(cmap=cmap).colour_map()
    every = colours(np.arange(256), bytes=True)[None, :, :3]
    noise = np.random.default_rng(0).integers(0, 256, (64, 256, 3), dtype=np.uint8)
    palette = palette_for([every, noise], colours).astype(int)
    assert palette.shape == (256, 3)
    assert np.abs(every[0][:, None].astype(int) - palette).max(axis=2).min(axis=1).max() <= 2
    flat = noise.reshape(-1, 3).astype(int)
    assert np.abs(flat[:, None] - palette).max(axis=2).min(axis=1).mean() < 30


def test_frames_of_the_colour_map_alone_need_no_other_colours():
    colours = viz.Style().colour_map()
    every = colours(np.arange(256), bytes=True)[None, :, :3]
    assert palette_for([every], colours).shape == (256, 3)


def _frame(maps, layer, options):
    return viz.plot_heads(maps, layer=layer, together=True, **options)


def test_frames_are_of_one_size_whatever_the_length_of_their_captions(tmp_path):
    maps = maps_on((1, 1), layers=12, heads=1)  # layer 10 makes a longer line than layer 9
    viz.animate(maps, tmp_path / "a.gif", name="x" * 14)
    assert len(frames_of(tmp_path / "a.gif")) == 12


def test_without_ffmpeg_an_mp4_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="(?s)ffmpeg.*Found none on the PATH.*write a GIF"):
        viz.animate(maps_on(GRID), tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_an_ffmpeg_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\ncat > /dev/null\necho no such encoder >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    with pytest.raises(UnwritableOutputError, match="no such encoder"):
        viz.animate(maps_on(GRID), tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.skipif(
    shutil.which("ffmpeg") is None,
    reason="no ffmpeg here: the same frames are tested as a GIF, and its absence as an error",
)
def test_an_mp4_has_the_frames(tmp_path):
    maps = maps_on(GRID, layers=3)
    viz.animate(maps, tmp_path / "a.mp4", seconds=0.5)
    command = ["ffmpeg", "-loglevel", "error", "-i", str(tmp_path / "a.mp4")]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    expected = [pixels_of(_frame(maps, layer, {}), FRAME_DPI).astype(int) for layer in range(3)]
    tallest = max(expected, key=len)
    height, width = (side + side % 2 for side in tallest.shape[:2])
    frames = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3).astype(int)
    assert len(frames) in range(13, 18)  # 1.5 seconds of ten
    for layer in range(3):
        shown = frames[min(5 * layer + 2, len(frames) - 1)]
        rows, columns = expected[layer].shape[:2]
        assert np.abs(shown[-rows:, :columns] - expected[layer]).mean() < 6


# The program


def heatmap(*arguments):
    return main(["heatmap", *map(str, arguments)])


def pictures_in(folder):
    """The files beside DINO v1's."""
    plain = (
        *("attn-", "mask_", "overlay-mean", "img.png", "attention"),
        *("image.json", "run.json"),
    )
    return {path.name for path in folder.iterdir() if not path.name.startswith(plain)}


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ([], {"heads.png", "overlay.png"}),
        (["--threshold", 0.5], {"heads.png", "overlay.png", "masks.png"}),
        (["--queries", "1,5"], {"heads-1-5.png", "overlay-1-5.png"}),
        (
            ["--queries", "3,6", "cls", "3,6", "--overview", "--format", "svg"],
            {f"{n}{q}.svg" for n in ("heads", "overlay", "layers") for q in ("", "-3-6")},
        ),
        (
            ["--queries", "#17", "--queries", "#-1"],
            {f"{n}-position{q}.png" for n in ("heads", "overlay") for q in (17, -1)},
        ),
    ],
)
def test_files_are_those_that_were_asked_for(image, weights, tmp_path, options, files):
    assert heatmap(image, "-o", tmp_path, "--weights", weights, *options) == 0
    assert pictures_in(tmp_path) == files
    of_cls = not options or "--queries" not in options or "cls" in options
    assert (tmp_path / "attention.npy").exists() == of_cls
    for path in tmp_path.glob("attention*.npy"):
        maps = np.load(path)  # every token looks at the bright patch
        assert np.unravel_index(maps[HEAD].argmax(), (4, 7)) == (1, 5)


def test_a_patch_is_drawn_by_its_position_too(image, tmp_path):
    """One CLS and no registers: patch (2, 3) of 4 rows and 7 columns is at 1 + 2 · 7 + 3."""
    options = ["--random-weights", "--format", "svg", "--queries", "2,3", "#18"]
    assert heatmap(image, "-o", tmp_path, *options) == 0
    for stem in ("heads", "overlay"):
        words = [words_in(tmp_path / f"{stem}-{name}.svg") for name in ("2-3", "position18")]
        assert "Attention of patch (2, 3)" in words[0]
        assert words[0] == words[1]


def test_registers_are_drawn_one_by_one(tmp_path):
    image = tmp_path / "a.png"
    Image.fromarray(photograph_of((3, 4), (1, 1))).save(image)
    if not upstreams.FIRST.has_registers:
        pytest.skip("the checkout under test has no registers")
    options = ["--random-weights", "--registers", "--queries", "registers", "register:2"]
    assert heatmap(image, "-o", tmp_path / "out", *options) == 0
    expected = {f"{n}-register{k}.png" for n in ("heads", "overlay") for k in (1, 2, 3, 4)}
    assert pictures_in(tmp_path / "out") == expected


def test_layers_are_those_that_are_drawn(image, tmp_path):
    plain = ["--random-weights", "--format", "svg"]
    assert heatmap(image, "-o", tmp_path / "a", *plain, "--layers", "5") == 0
    assert "layer 5" in words_in(tmp_path / "a" / "heads.svg")
    assert heatmap(image, "-o", tmp_path / "b", *plain, "--layers", "0,5", "--overview") == 0
    words = words_in(tmp_path / "b" / "layers.svg")
    assert "layer 5" in words
    assert "layer 11" not in words
    arrays = [np.load(tmp_path / name / "attention.npy") for name in ("a", "b")]
    assert_close(*arrays)
    assert heatmap(image, "-o", tmp_path / "c", *plain) == 0
    assert np.abs(arrays[0] - np.load(tmp_path / "c" / "attention.npy")).max() > 1e-6


def test_dino_v1s_bare_names_are_of_cls_only(image, tmp_path):
    runs = {"a": [], "b": ["--queries", "2,3", "cls"], "c": ["--queries", "2,3"]}
    for name, options in runs.items():
        always = ["-o", tmp_path / name, "--random-weights", "--threshold", 0.5]
        assert heatmap(image, *always, *options) == 0
    # Rows asked for together are made by another product.
    assert_close(*(np.load(tmp_path / name / "attention.npy") for name in "ab"))
    assert_close(*(np.load(tmp_path / name / "attention-2-3.npy") for name in "bc"))
    cls, patch = (np.load(tmp_path / "b" / f"attention{end}.npy") for end in ("", "-2-3"))
    assert np.abs(cls - patch).max() > 1e-6
    ends = {path.stem.removesuffix("-2-3") for path in (tmp_path / "c").glob("*-2-3.*")}
    assert {"attention", "attn-head0", "attn-mean", "overlay-mean", "mask_th0.5_head5"} < ends
    others = {path.name for path in (tmp_path / "c").iterdir() if "-2-3." not in path.name}
    assert others == {"img.png", "image.json", "run.json"}


def test_the_numbers_of_a_patch_are_its_row(image, tmp_path):
    """Positions and patches name the same row."""
    options = ["--random-weights", "--queries", "2,3", "#18", "1,1"]
    assert heatmap(image, "-o", tmp_path, *options) == 0
    arrays = [np.load(tmp_path / f"attention-{name}.npy") for name in ("2-3", "position18", "1-1")]
    assert_close(*arrays[:2])
    assert np.abs(arrays[0] - arrays[2]).max() > 1e-6
    drawn = [np.array(Image.open(tmp_path / f"attn-head2-{name}.png")) for name in ("2-3", "1-1")]
    assert not same_bits(*drawn)


def test_captions_say_what_the_program_was_told(image, weights, tmp_path):
    options = ["--log", "--outliers", "none", "--format", "svg", "--queries", "2,3", "--overview"]
    assert heatmap(image, "-o", tmp_path, "--weights", weights, *options) == 0
    for name in ("heads-2-3", "overlay-2-3", "layers-2-3"):
        words = words_in(tmp_path / f"{name}.svg")
        assert "Attention of patch (2, 3)" in words
        assert "ogarithmic colours" in words
        assert "artifact" not in words
        assert "Model: ViT-S/14" in words
        assert NO_MEANING not in words


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ("shared", "Colours run from 0 to"),
        ("each", "Each map has its own colours, from 0 to its highest patch"),
        ("0.5,2", "Colours run from 0.5× to 2× uniform attention"),
    ],
)
def test_limits_are_those_of_the_command(image, weights, tmp_path, limits, words):
    options = ["--format", "svg", "--overview", "--limits", limits, "--cmap", "inferno"]
    assert heatmap(image, "-o", tmp_path, "--weights", weights, *options) == 0
    for name in ("heads", "layers"):
        assert words in words_in(tmp_path / f"{name}.svg")


@pytest.fixture(scope="module")
def long_tokens(tmp_path_factory):
    """Weights whose tokens are as long as their patch is brighter than dark, in every layer."""
    upstreams.FIRST.module("dinov2.models.vision_transformer")
    model = build("vit_small")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        project = model.patch_embed.proj
        project.weight[0] = 1 / project.weight[0].numel()
        dark = (20 / 255 - np.array(MEAN)) / DEVIATION
        project.bias[0] = 0.1 - float(dark.mean())
    path = tmp_path_factory.mktemp("weights") / "long.pth"
    torch.save(model.state_dict(), path)
    return path


def test_artifacts_are_said_at_the_end_and_in_the_caption(image, long_tokens, tmp_path, capsys):
    options = ["--weights", long_tokens, "--format", "svg", "--outliers"]
    assert heatmap(image, "-o", tmp_path / "a", *options, "mark") == 0
    said = capsys.readouterr().out
    assert "; 1 of 28 patches with a norm above 0.25 after block 4: (1, 5)" in said
    words = words_in(tmp_path / "a" / "heads.svg")
    assert "1 artifact token (red frames): a patch whose norm is an outlier" in words
    assert "above 0.25 after layer 4. It gets" in words
    # Every token looks everywhere alike here: at one token of 29.
    assert f"It gets {100 / 29:.1f} % of the attention" in words
    assert "Colours run from 0 to 1× uniform attention" in words
    assert heatmap(image, "-o", tmp_path / "b", *options, "clip") == 0
    assert "The limits of the colours ignore" in words_in(tmp_path / "b" / "overlay.svg")
    arrays = [np.load(tmp_path / name / "attention.npy") for name in ("a", "b")]
    assert_close(*arrays)


def test_random_weights_say_so_in_every_kind_of_file(image, tmp_path):
    options = ["--random-weights", "--format", "svg", "--overview", "--threshold", 0.5]
    assert heatmap(image, "-o", tmp_path, *options, "--animate", "gif") == 0
    assert pictures_in(tmp_path) == {
        "heads.svg", "overlay.svg", "masks.svg", "layers.svg", "layers.gif",
    }  # fmt: skip
    for path in tmp_path.glob("*.svg"):
        assert NO_MEANING in words_in(path), path
    frames = frames_of(tmp_path / "layers.gif")
    assert len(frames) == 12
    for frame, _ in frames:
        assert np.abs(frame[-5, 3] - FIREBRICK).max() < 12


def test_a_query_outside_of_an_image_fails_that_image_only(image, weights, tmp_path, caplog):
    Image.fromarray(photograph_of((7, 4), (5, 1))).save(tmp_path / "tall.png")
    images = [image, tmp_path / "tall.png"]
    assert heatmap(*images, "-o", tmp_path / "out", "--weights", weights, "--queries", "5,2") == 1
    assert "Expected a patch in the grid of 4 rows and 7 columns.\nFound (5, 2)" in caplog.text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tall"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--queries", "register:1"], "Expected a model with registers.\nFound register 1"),
        (["--queries", "cls", "registers"], "Found registers of a model without"),
        (["--queries", "patches"], "Found --queries patches, which stands for many"),
        (["--queries", "cls", "all"], "Found --queries all, which stands for many"),
        (["--queries", "#1:3"], "Found --queries #1:3, which stands for many"),
        (["--layers", "0,12"], "Expected blocks between -12 and 11"),
        (["--animate", "mp4"], "Expected the program ffmpeg"),
    ],
)
def test_what_no_image_can_mend_is_said_before_the_first(
    image, weights, tmp_path, caplog, monkeypatch, options, message
):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert heatmap(image, "-o", tmp_path / "out", "--weights", weights, *options) == 2
    assert message in caplog.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--queries", "1"], "all; found '1'. Registers count from 1"),
        (["--queries"], "expected at least one argument"),
        (["--alpha", "0"], "expected a share in (0, 1]"),
        (["--outliers", "hide"], "invalid choice: 'hide'"),
        (["--interpolation", "bicubic"], "invalid choice"),
        (["--format", "jpg"], "invalid choice"),
        (["--animate", "webm"], "invalid choice"),
        (["--cmap", "jet"], "invalid choice: 'jet'"),
        (["--background", "red"], "invalid choice"),
        (["--limits", "all"], "expected robust, shared, each, or LOW,HIGH"),
        (["--limits", "8"], "found '8'. Try 0,8"),
        (["--limits", "8,0"], "LOW from 0 on and below HIGH"),
        (["--limits", "0,inf"], "found '0,inf'"),
    ],
)
def test_a_bad_option_is_explained(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        heatmap("x.png", "-o", tmp_path, *options)
    assert message in capsys.readouterr().err


def test_a_query_is_checked_by_python_too():
    with pytest.raises(OutOfRangeError, match="grid of 3 rows and 5 columns"):
        viz.plot_heads(maps_on(GRID), query=(4, 2))
