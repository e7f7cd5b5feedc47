"""Figures for papers: final size, letters, colours and captions, in the files themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
import zlib

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from dinov2_attn import viz
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.viz.text import NO_MEANING
from dinov2_attn.errors import InvalidInputError, OutOfRangeError, UnwritableOutputError
from dinov2_attn.proof.conformance.synthetic_models import HEAD
from tests.support.bright_patch import BRIGHT, GRID, photograph_of
from tests.support.figure_probes import artifacts_at, maps_on, photograph_on, words_of
from tests.support.tolerances import assert_close

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights

GRIDS = [(3, 5), (8, 6), (12, 2)]
COLUMNS = ["photo", "mean", 0, 2]
LEAST_POINTS = 6
needs_poppler = pytest.mark.skipif(
    shutil.which("pdftoppm") is None,
    reason="no pdftoppm here (Debian: poppler-utils): letters are measured in the PDF anyway",
)


def maps_and_images(grids=GRIDS, **options):
    maps = [maps_on(grid, seed=seed, **options) for seed, grid in enumerate(grids)]
    return maps, [photograph_on(grid) for grid in grids]


def content_of(path):
    """What a PDF draws, as text of its operators."""
    data = path.read_bytes()
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", data, re.DOTALL)
    texts = []
    for stream in streams:
        try:
            texts.append(zlib.decompress(stream).decode("latin-1"))
        except zlib.error:
            continue
    return "\n".join(text for text in texts if " Tf" in text)


def points_in(path):
    """The size of each piece of text in a PDF, in points on paper."""
    content = content_of(path)
    sizes = [float(size) for size in re.findall(r"/F\S+ ([\d.]+) Tf", content)]
    # Nothing but pure turns and shifts of the page may stand before the letters.
    scales = re.findall(r"([-\d.]+) ([-\d.]+) [-\d.]+ [-\d.]+ [-\d.]+ [-\d.]+ Tm", content)
    assert sizes
    assert all(abs(float(a) ** 2 + float(b) ** 2 - 1) < 1e-3 for a, b in scales)
    return sizes


def rendered(path, dpi=300):
    """A PDF as pdftoppm draws it, (H, W, 3)."""
    command = ["pdftoppm", "-r", str(dpi), "-png", "-singlefile", str(path), str(path)]
    subprocess.run(command, check=True, capture_output=True)
    with Image.open(f"{path}.png") as image:
        return np.array(image.convert("RGB")).astype(int)


def middles(pixels, figure, row, column, grid):
    """The pixels in the middles of the patches of a cell."""
    ax = figure.axes[row]
    corner = ax.images[column].get_extent()
    xs = corner[0] + 0.5 + np.arange(grid[1])
    ys = corner[3] + 0.5 + np.arange(grid[0])
    points = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    inches = ax.transData.transform(points) / figure.dpi
    scale = pixels.shape[1] / figure.get_size_inches()[0]
    x, y = (inches * scale).astype(int).T
    return pixels[len(pixels) - 1 - y, x].reshape(*grid, 3)


# The files


@pytest.mark.parametrize("width", [3.25, 6.75])
@pytest.mark.parametrize("limits", ["each", "robust"])
def test_a_pdf_has_its_final_width_and_letters_of_seven_points(tmp_path, width, limits):
    maps, images = maps_and_images()
    style = viz.Style(limits=limits)
    figure = viz.figure(maps, images, columns=COLUMNS, width=width, style=style, warning=NO_MEANING)
    figure.save(tmp_path / "fig.pdf")
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+)", (tmp_path / "fig.pdf").read_bytes())
    assert float(box[1]) == pytest.approx(72 * width)
    sizes = points_in(tmp_path / "fig.pdf")
    assert min(sizes) >= LEAST_POINTS
    assert set(sizes) == {7.0}
    assert b"/Type3" not in (tmp_path / "fig.pdf").read_bytes()  # journals refuse such fonts


@needs_poppler
@pytest.mark.parametrize(
    ("limits", "cmap"), [("each", "inferno"), ("shared", "viridis"), ((0, 1.5), "gray")]
)
def test_a_pdf_shows_each_patch_in_the_colour_of_its_weight(tmp_path, limits, cmap):
    maps, images = maps_and_images()
    style = viz.Style(limits=limits, cmap=cmap)
    figure = viz.figure(maps, images, columns=COLUMNS, style=style)
    figure.save(tmp_path / "fig.pdf")
    pixels = rendered(tmp_path / "fig.pdf")
    values = [
        np.stack([one.patch_maps()[-1][0, :, 0].numpy().mean(0), *one.patch_maps()[-1][0, ::2, 0]])
        * (1 + grid[0] * grid[1])
        for one, grid in zip(maps, GRIDS, strict=True)
    ]
    highest = max(each.max() for each in values)
    for row, grid in enumerate(GRIDS):
        photo = middles(pixels, figure.figure, row, 0, grid)
        assert np.abs(photo - images[row][7::14, 7::14]).max() <= 6
        for column, map_ in enumerate(values[row], start=1):
            end = {"each": map_.max(), "shared": highest}.get(limits, 1.5)
            colours = matplotlib.colormaps[cmap](np.clip(map_ / end, 0, 1), bytes=True)[..., :3]
            seen = middles(pixels, figure.figure, row, column, grid)
            assert np.abs(seen - colours).max() <= 6, (row, column)


@needs_poppler
def test_the_words_of_a_pdf_are_words_inside_of_it(tmp_path):
    maps, images = maps_and_images()
    figure = viz.figure(maps, images, columns=COLUMNS, warning=NO_MEANING)
    figure.save(tmp_path / "fig.pdf")
    command = ["pdftotext", "-bbox", str(tmp_path / "fig.pdf"), "-"]
    page = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    width, height = map(float, re.search(r'page width="([\d.]+)" height="([\d.]+)"', page).groups())
    pattern = r'<word xMin="(.*?)" yMin="(.*?)" xMax="(.*?)" yMax="(.*?)">(.*?)</word>'
    words = re.findall(pattern, page)
    assert {"photo", "mean", "head", "0", "attention", *NO_MEANING.split()} <= {
        word[-1] for word in words
    }
    for x0, y0, x1, y1, _ in words:
        assert 0 <= float(x0) < float(x1) <= width
        assert 0 <= float(y0) < float(y1) <= height
        assert min(float(y1) - float(y0), float(x1) - float(x0)) > 0


def test_an_svg_has_letters_of_seven_points_and_the_width(tmp_path):
    maps, images = maps_and_images()
    figure = viz.figure(maps, images, columns=COLUMNS, warning=NO_MEANING)
    figure.save(tmp_path / "fig.svg")
    root = ET.parse(tmp_path / "fig.svg").getroot()
    assert root.get("width") == "234pt"
    assert float(root.get("viewBox").split()[2]) == pytest.approx(234)
    texts = [element for element in root.iter() if element.tag.endswith("}text")]
    sizes = [float(re.search(r"([\d.]+)px", text.get("style"))[1]) for text in texts]
    assert len(texts) > 6
    assert set(sizes) == {7.0}
    assert NO_MEANING in " ".join(word for text in texts for word in text.itertext())


def test_a_png_has_600_pixels_per_inch(tmp_path):
    maps, images = maps_and_images()
    figure = viz.figure(maps, images, width=3.25)
    figure.save(tmp_path / "fig.png")
    with Image.open(tmp_path / "fig.png") as image:
        assert image.width == 1950
        assert image.info["dpi"] == pytest.approx((600, 600), abs=1)
        pixels = np.array(image.convert("RGB")).astype(int)
    assert np.abs(middles(pixels, figure.figure, 1, 0, (8, 6)) - images[1][7::14, 7::14]).max() <= 2


@pytest.mark.parametrize("kind", ["pdf", "svg", "png"])
def test_the_caption_is_a_text_next_to_the_figure(tmp_path, kind):
    maps, images = maps_and_images()
    artifacts = [artifacts_at(grid, (0, 1)) for grid in GRIDS]
    figure = viz.figure(
        maps, images, columns=COLUMNS, artifacts=artifacts, name="some model", names=list("abc"),
        warning=NO_MEANING,
    )  # fmt: skip
    figure.save(tmp_path / f"fig.{kind}")
    assert {path.name for path in tmp_path.iterdir()} == {f"fig.{kind}", "fig.txt"}
    caption = (tmp_path / "fig.txt").read_text(encoding="utf-8")
    assert caption == figure.caption + "\n"
    for words in (
        "Attention of CLS, the token that stands for the whole image, in layer 1 (counted from 0).",
        "Model: some model. Rows: a, b, c.",
        "Columns: the image, mean of heads, head 0, head 2.",
        "Colours run from 0 to",
        "1× is what each of 16 to 49 tokens gets if all get the same, 2 % to 6.2 %.",
        "Red frames: 3 artifact tokens, patches whose norm is an outlier. In large models "
        "such patches hold little local information.",
        NO_MEANING,
    ):
        assert words in caption
    assert not any(words in " ".join(words_of(figure.figure)) for words in ("Columns", "model"))


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for kind in ("pdf", "svg"):
        for name in "ab":
            viz.figure(*maps_and_images()).save(tmp_path / f"{name}.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


# What is drawn


@settings(max_examples=6)
@given(
    grids=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
    width=st.floats(2.0, 8.0),
    count=st.integers(1, 4),
    limits=st.sampled_from(["each", "robust", (0, 2000)]),
)
def test_no_letters_leave_the_figure_or_meet(grids, width, count, limits):
    maps, images = maps_and_images(grids)
    columns = ["mean", "photo", 0, 2][:count]
    style = viz.Style(limits=limits)
    figure = viz.figure(maps, images, columns=columns, width=width, style=style).figure
    figure.canvas.draw()
    assert figure.get_size_inches()[0] == pytest.approx(width)
    boxes = [
        text.get_window_extent()
        for text in figure.findobj(Text)
        if text.get_text() and text.get_visible()
    ]
    assert len(boxes) > count
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_a_batch_gives_a_row_for_each_image():
    maps = maps_on((3, 5), batch=2, queries=(0, 1 + 7))
    images = [photograph_on((3, 5), seed=seed) for seed in (0, 1)]
    artifacts = artifacts_at((3, 5), (0, 1), batch=2)
    figure = viz.figure(maps, images, query=(1, 2), layer=0, artifacts=artifacts)
    assert "Attention of patch (1, 2) (row, column; framed in white), in layer 0" in figure.caption
    assert "1 artifact token, a patch" in figure.caption
    for i in (0, 1):
        drawn = figure.figure.axes[i].images[1].get_array()
        assert_close(drawn.data, 16 * maps.patch_maps()[0][i, :, 1].mean(0))
    assert figure._repr_png_().startswith(b"\x89PNG")


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"columns": range(10)}, InvalidInputError, r"(?s)0.32 for each.*3.25 inches for 10 col"),
        ({"columns": ["photo"]}, InvalidInputError, r"a map among the columns.\nFound \['photo'\]"),
        ({"columns": []}, InvalidInputError, "a map among the columns"),
        ({"columns": ["photo", 3]}, OutOfRangeError, "Found 3"),
        ({"columns": ["photograph"]}, OutOfRangeError, "Found 'photograph'"),
        ({"width": 0.5}, InvalidInputError, "a width of 2 to 50 inches"),
        ({"width": float("nan")}, InvalidInputError, "nan inches"),
        ({"names": ["a"]}, InvalidInputError, "3 names.\nFound 1"),
        ({"layer": 5}, OutOfRangeError, "Found 5"),
    ],
)
def test_a_figure_that_cannot_be_is_an_error(options, error, message):
    with pytest.raises(error, match=message):
        viz.figure(*maps_and_images(), **options)


def test_images_must_be_those_of_the_maps():
    maps, images = maps_and_images()
    with pytest.raises(InvalidInputError, match="Found 3 maps, 1 images, 3 artifact"):
        viz.figure(maps, images[0])
    with pytest.raises(InvalidInputError, match="Found 1 maps, 3 images, 1 artifact"):
        viz.figure(maps[0], images)
    with pytest.raises(InvalidInputError, match="Found 3 maps, 3 images, 1 artifact"):
        viz.figure(maps, images, artifacts=[artifacts_at((3, 5))])


def test_a_place_that_is_none_is_an_error(tmp_path):
    figure = viz.figure(*maps_and_images())
    with pytest.raises(UnwritableOutputError, match=r"fig\.pdf"):
        figure.save(tmp_path / "missing" / "fig.pdf")
    with pytest.raises(InvalidInputError, match=r"ends in \.png, \.svg or \.pdf"):
        figure.save(tmp_path / "fig.eps")
    assert not list(tmp_path.iterdir())


# The program


def program(*arguments):
    return main(["figure", *map(str, arguments)])


@pytest.mark.usefixtures("imported")
def test_the_program_draws_images_by_columns(image, weights, tmp_path, capsys):
    other = tmp_path / "tall.png"
    Image.fromarray(photograph_of((7, 4), (5, 1))).save(other)
    options = ["--columns", f"photo,mean,{HEAD}", "--limits", "each", "--cmap", "inferno"]
    path = tmp_path / "fig.svg"
    assert program(image, other, "-o", path, "--weights", weights, "--width", 4, *options) == 0
    assert f"wrote {path}: the figure, 4.00 × " in capsys.readouterr().out
    caption = path.with_suffix(".txt").read_text(encoding="utf-8")
    assert (
        f"Rows: {image.name}, tall.png. Columns: the image, mean of heads, head {HEAD}." in caption
    )
    assert "in layer 11 (counted from 0). Model: ViT-S/14" in caption
    assert "Each map has its own colours, from 0 to its highest patch" in caption
    assert ET.parse(path).getroot().get("width") == "288pt"


@needs_poppler
@pytest.mark.usefixtures("imported")
def test_the_planted_attention_arrives_in_the_figure(image, weights, tmp_path):
    path = tmp_path / "fig.pdf"
    options = ["--columns", f"{HEAD},photo", "--limits", "each"]
    assert program(image, "-o", path, "--weights", weights, *options) == 0
    pixels = rendered(path)
    # Two cells of 1.575 inches, below a line of letters, with a gap of 0.04.
    map_, photo = pixels[48:310, 12:478], pixels[48:310, 496:962]
    yellow = np.argwhere(np.abs(map_ - (253, 231, 36)).max(axis=-1) < 12)
    white = np.argwhere(photo.min(axis=-1) > 250)
    patch = 1.575 * 300 / GRID[1]
    for found in (yellow, white):
        assert len(found) == pytest.approx(patch**2, rel=0.1)
        place = np.add(np.median(found, axis=0), 3) / patch
        assert place == pytest.approx(np.add(BRIGHT, 0.5), abs=0.15)


@pytest.mark.usefixtures("imported")
def test_random_weights_say_so_in_figure_and_caption(image, tmp_path):
    path = tmp_path / "fig.svg"
    assert program(image, "-o", path, "--random-weights", "--layer", "0", "--query", "1,5") == 0
    assert NO_MEANING in path.read_text(encoding="utf-8")
    caption = path.with_suffix(".txt").read_text(encoding="utf-8")
    assert NO_MEANING in caption
    assert "Attention of patch (1, 5) (row, column; framed in white), in layer 0" in caption


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "fig.jpg"], "ends in .pdf, .svg or .png; found 'fig.jpg'. Try fig.pdf"),
        (["-o", "fig.pdf", "--columns", "photo;0"], "Try photo,mean,0,3"),
        (["-o", "fig.pdf", "--columns", "photo,-1"], "found 'photo,-1'"),
        (["-o", "fig.pdf", "--width", "0"], "expected a number above 0"),
        (["-o", "fig.pdf", "--query", "all"], "#POSITION"),
        (["-o", "fig.pdf", "--limits", "8,0"], "LOW from 0 on"),
        ([], "the following arguments are required: -o"),
    ],
)
def test_a_bad_option_is_explained(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        program("x.png", *options)
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--query", "register:1"], "Expected a model with registers"),
        (["--query", "9,9"], "grid of 4 rows and 7 columns"),
        (["--layer", "12"], "Expected blocks between -12 and 11"),
        (["--columns", "photo,6"], "Found 6"),
        (["--width", "1"], "Expected a width of 2 to 50 inches"),
    ],
)
def test_what_cannot_be_drawn_leaves_no_file(image, weights, tmp_path, caplog, options, message):
    path = tmp_path / "fig.pdf"
    assert program(image, "-o", path, "--weights", weights, *options) == 2
    assert message in caplog.text
    assert not list(tmp_path.iterdir())
