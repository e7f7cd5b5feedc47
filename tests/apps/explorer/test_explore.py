"""``dinov2-attn explore`` as a user meets it: one file, exit status, messages."""

from __future__ import annotations

import numpy as np
import pytest

from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.viz.text import NO_MEANING
from dinov2_attn.proof.conformance.synthetic_models import HEAD
from tests.support.bright_patch import BRIGHT, GRID
from tests.support.pages import Page
from tests.support.subprocesses import python

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights
pytestmark = pytest.mark.usefixtures("imported")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "page.html"


def explore(*arguments):
    return main(["explore", *map(str, arguments)])


def test_the_planted_attention_arrives_on_the_page(image, weights, path, capsys):
    assert explore(image, "-o", path, "--weights", weights) == 0
    page = Page(path)
    assert page.about["grid"] == list(GRID)
    assert [one["layer"] for one in page.about["layers"]] == list(range(12))
    rows = page.layer(11)["each"]
    for query in range(page.tokens):
        patches = rows[HEAD, query][1:].reshape(GRID)
        assert np.unravel_index(patches.argmax(), GRID) == BRIGHT
    assert page.one("title")["text"] == "planted.png · attention"
    assert "ViT-S/14" in path.read_text("utf-8")
    assert not page.all("p", id="warning")
    said = capsys.readouterr().out
    assert f"; {page.size / 1e6:.1f} MB; keeps layers 0–11: all rows of each head\n" in said
    assert f"wrote {path}: " in said
    assert {one.name for one in path.parent.iterdir()} == {"page.html", "page.html.run.json"}


def test_random_weights_say_so_on_the_page(image, path, caplog):
    assert explore(image, "-o", path, "--random-weights", "--layers", "0,11") == 0
    page = Page(path)
    assert page.one("p", id="warning")["text"] == NO_MEANING
    assert [one["layer"] for one in page.about["layers"]] == [0, 11]
    assert "RANDOM WEIGHTS" in caplog.text


def test_what_the_page_has_no_room_for_is_told(image, path, caplog):
    arguments = ["--random-weights", "--max-mb", "0.12", "--image-size", "70", "84"]
    assert explore("-o", path, *arguments, image) == 0
    page = Page(path)
    assert page.size <= 120_000
    assert page.about["grid"] == [5, 6]
    assert page.one("p", id="left-out")["text"] in caplog.text
    assert "Left out to stay below 0.12 MB: layer" in caplog.text


def test_the_mean_of_heads_from_the_last_layer_on(image, path):
    arguments = ["--random-weights", "--heads", "mean", "--layers=-1"]
    assert explore(image, "-o", path, *arguments) == 0
    page = Page(path)
    assert page.about["heads"] == 0
    assert set(page.layer(11)) == {"mean"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random-weights"], "Expected one image.\nFound none.\nName one, or use --example"),
        (["x.png", "--example", "--random-weights"], "Expected one image.\nFound x.png, "),
        (["x.png", "--random-weights"], "an image file.\nFound x.png, which cannot be"),
        (["{}", "--random-weights", "--layers", "12"], "Expected blocks between -12 and 11"),
        (["{}", "--random-weights", "--max-mb", "0.01"], "Raise --max-mb (max_mb) by 0.0"),
    ],
)
def test_a_user_error_is_one_line_and_status_two(arguments, message, image, path, caplog):
    assert explore("-o", path, *(part.format(image) for part in arguments)) == 2
    assert message in caplog.text
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-mb", "0"], "expected a number above 0; found '0'. Try 25."),
        (["--max-mb", "inf"], "expected a number above 0; found 'inf'"),
        (["--layers", "last"], "expected blocks with commas between them, or all; found 'last'"),
        (["--heads", "some"], "invalid choice: 'some'"),
    ],
)
def test_a_bad_argument_is_explained(arguments, message, path, capsys):
    with pytest.raises(SystemExit, match="2"):
        explore("x.png", "-o", path, *arguments)
    assert message in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_reported(image, path, caplog):
    path.parent.parent.mkdir(exist_ok=True)
    path.parent.touch()
    assert explore(image, "-o", path, "--random-weights", "--layers", "0") == 2
    assert f"Expected a folder that can be written at {path.parent}" in caplog.text


@pytest.mark.parametrize(
    "name", ["<script>alert(1)<script>.png", "quote\" ' & 猫.png", "a b\n.png"]
)
def test_whatever_the_image_is_called(name, image, tmp_path, path):
    strange = tmp_path / name
    strange.write_bytes(image.read_bytes())
    assert explore(strange, "-o", path, "--random-weights", "--layers", "11") == 0
    assert Page(path).one("bdi")["text"] == name.replace("\n", r"\n")


def test_help_does_not_wait_for_torch(tmp_path):
    code = """
import sys
from dinov2_attn.apps.cli.main import main
try:
    main(["explore", "--help"])
finally:
    assert "torch" not in sys.modules
"""
    result = python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "--max-mb" in result.stdout
