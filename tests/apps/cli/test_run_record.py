"""The record of a run: what it says, and that a second run never mixes two images."""

from __future__ import annotations

import hashlib
import json

import pytest
from PIL import Image

from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.viz.provenance import PROGRAM
from tests.support.bright_patch import photograph_of

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights
pytestmark = pytest.mark.usefixtures("imported")


def run(command, *arguments):
    return main([command, *map(str, arguments), "--random-weights", "--image-size", "28", "42"])


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record(path):
    return json.loads(path.read_text())


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "other.png"
    Image.fromarray(photograph_of((3, 3), (2, 2))).save(path)
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_a_record_names_image_model_options_and_every_file(image, out):
    assert run("heatmap", image, "-o", out, "--queries", "cls", "0,1", "--limits", "0,8") == 0
    found = record(out / "run.json")
    assert found["program"] == PROGRAM
    assert found["command"] == "heatmap"
    assert found["images"] == [{"image": str(image), "sha256": digest(image)}]
    assert found["model"] == "ViT-S/14, random weights"
    assert found["options"]["queries"] == ["cls", "0,1"]
    assert found["options"]["limits"] == [0.0, 8.0]
    assert not {"run", "parser", "quiet", "open"} & set(found["options"])
    assert found["files"] == {
        path.name: digest(path) for path in out.iterdir() if path.name != "run.json"
    }


def test_a_second_run_leaves_nothing_of_another_image(image, other, out, capsys):
    more = ["--overview", "--threshold", 0.5, "--queries", "cls", "0,1"]
    assert run("heatmap", image, "-o", out, *more) == 0
    (out / "notes.txt").write_text("mine")
    before = names(out)
    capsys.readouterr()
    assert run("heatmap", other, "-o", out) == 0
    said = capsys.readouterr().out
    assert record(out / "run.json")["images"][0]["sha256"] == digest(other)
    assert names(out) == {*record(out / "run.json")["files"], "run.json", "notes.txt"}
    gone = before - names(out)
    assert {"layers.png", "heads-0-1.png", "mask_th0.5_head0.png", "attention-0-1.npy"} < gone
    assert f"removed {len(gone)} files of the run before from {out}" in said


def test_a_file_that_was_changed_is_not_removed(image, other, out, caplog):
    assert run("heatmap", image, "-o", out, "--overview") == 0
    with (out / "layers.png").open("ab") as file:
        file.write(b"edited")
    before = {path.name: digest(path) for path in out.iterdir()}
    assert run("heatmap", other, "-o", out) == 1
    assert "layers.png, changed since" in caplog.text
    assert {path.name: digest(path) for path in out.iterdir()} == before
    (out / "layers.png").rename(out / "edited.png")
    assert run("heatmap", other, "-o", out) == 0
    assert "edited.png" in names(out)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"files": {"heads.png": "0"}}',
        '{"program": "dinov2-attn 1", "files": {"../mine.txt": "0"}}',
        '{"program": "dinov2-attn 1", "files": {"/etc/passwd": "0"}}',
        '{"program": "dinov2-attn 1", "files": {"..": "0"}}',
        '{"program": "dinov2-attn 1", "files": ["mine.txt"]}',
    ],
)
def test_another_file_of_this_name_is_left_alone(image, out, content, caplog):
    out.mkdir()
    (out.parent / "mine.txt").write_text("mine")
    (out / "run.json").write_text(content)
    assert run("heatmap", image, "-o", out) == 1
    assert f"Expected a record of a run of dinov2-attn at {out / 'run.json'}" in caplog.text
    assert names(out) == {"run.json"}
    assert (out / "run.json").read_text() == content
    assert (out.parent / "mine.txt").exists()


def test_several_images_have_a_record_each(image, other, out):
    assert run("heatmap", image, other, "-o", out) == 0
    for path in (image, other):
        found = record(out / path.stem / "run.json")
        assert found["images"][0]["sha256"] == digest(path)


def test_the_same_run_gives_the_same_bytes(image, tmp_path):
    for name in ("a", "b"):
        assert run("heatmap", image, "-o", tmp_path / name, "--format", "pdf") == 0
    for path in (tmp_path / "a").iterdir():
        assert digest(path) == digest(tmp_path / "b" / path.name), path.name


# Figures and pages


def test_a_figure_in_two_formats_is_one_figure(image, out):
    for name in ("fig.pdf", "fig.svg"):
        assert run("figure", image, "-o", out / name) == 0
    assert names(out) == {"fig.pdf", "fig.svg", "fig.txt", "fig.run.json"}
    assert set(record(out / "fig.run.json")["files"]) == {"fig.pdf", "fig.svg", "fig.txt"}


def test_two_figures_do_not_share_a_caption(image, other, out, caplog):
    assert run("figure", image, "-o", out / "fig.pdf") == 0
    before = {path.name: digest(path) for path in out.iterdir()}
    for again in ([other], [image, "--query", "0,1"]):
        assert run("figure", *again, "-o", out / "fig.svg") == 2
        assert "fig is that of another" in caplog.text
    assert {path.name: digest(path) for path in out.iterdir()} == before
    assert run("figure", other, "-o", out / "fig.pdf") == 0  # which is replaced
    assert record(out / "fig.run.json")["images"][0]["sha256"] == digest(other)


def test_a_page_has_a_record(image, out):
    assert run("explore", image, "-o", out / "page.html") == 0
    found = record(out / "page.html.run.json")
    assert found["images"] == [{"image": str(image), "sha256": digest(image)}]
    assert found["files"] == {"page.html": digest(out / "page.html")}
    (out / "page.html.run.json").write_text("mine")
    assert run("explore", image, "-o", out / "page.html") == 2
    assert (out / "page.html.run.json").read_text() == "mine"


def test_a_page_and_a_figure_may_share_a_name(image, out):
    for command, name in (("explore", "a.html"), ("figure", "a.pdf"), ("explore", "a.html")):
        assert run(command, image, "-o", out / name) == 0
    assert names(out) == {"a.html", "a.html.run.json", "a.pdf", "a.txt", "a.run.json"}


# Inside of pictures


def test_every_png_says_what_it_is(image, out):
    assert run("heatmap", image, "-o", out, "--queries", "0,1", "--layers", "3") == 0
    for path in out.glob("*-0-1.png"):
        with Image.open(path) as picture:
            words = picture.text
        facts = json.loads(words["Description"])
        assert words["Software"] == facts.pop("program") == PROGRAM
        assert words["Title"] == f"Attention, query 0,1, layer 3, {image.name}"
        assert facts == {
            "image": str(image),
            "sha256": digest(image),
            "model": "ViT-S/14, random weights",
            "layer": 3,
            "query": "0,1",
            "warning": "RANDOM WEIGHTS: this map carries no meaning",
        }, path.name


@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_an_svg_and_a_pdf_say_it_too(image, tmp_path, kind):
    path = tmp_path / "ü & <b>.png"
    path.write_bytes(image.read_bytes())
    assert run("figure", path, "-o", tmp_path / f"fig.{kind}") == 0
    content = (tmp_path / f"fig.{kind}").read_bytes()
    assert digest(image).encode() in content
    assert PROGRAM.encode() in content
    assert b"\\u00fc & " in content or b"\\u00fc &amp; " in content or b"\\\\u00fc & " in content
