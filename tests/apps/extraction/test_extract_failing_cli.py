"""A pass that fails, as it is met by commands: a line with upstream's message, no traceback."""

from __future__ import annotations

import sys

import pytest

from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.demo.load import PATH as DEMO
from tests.support.extraction import draw, index_of

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights
pytestmark = pytest.mark.usefixtures("broken_upstream")


@pytest.fixture
def broken_upstream(imported, monkeypatch):
    """Upstream's own patch embedding, with an error for images of 42 × 70."""
    embed = sys.modules["dinov2.layers.patch_embed"].PatchEmbed
    forward = embed.forward

    def raising(self, x):
        if x.shape[2:] == (42, 70):
            raise AssertionError("Input image height 42 is not what I like")
        return forward(self, x)

    monkeypatch.setattr(embed, "forward", raising)


def test_extract_goes_on_and_exits_with_1(tmp_path, capsys):
    for i, size in enumerate([(42, 42), (42, 70), (70, 42)]):
        draw(tmp_path / "in" / f"{i}.png", size, i)
    given = ["extract", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    given += ["--weights", str(DEMO), "--workers", "0"]
    assert main(given) == 1
    assert "3 images, 1 of them unreadable (1 in its pass" in capsys.readouterr().out
    (line,) = index_of(tmp_path / "out", "unreadable.jsonl")
    assert line["path"] == "1.png"
    assert "(AssertionError: Input image height 42 is not what I like)" in line["reason"]


def test_extract_strict_exits_with_2(tmp_path, caplog):
    draw(tmp_path / "in" / "1.png", (42, 70), 1)
    given = ["extract", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--strict"]
    assert main([*given, "--weights", str(DEMO), "--workers", "0"]) == 2
    assert "Input image height 42 is not what I like" in caplog.text


def test_heatmap_draws_the_others(tmp_path, caplog):
    paths = [draw(tmp_path / f"{i}.png", s, i) for i, s in enumerate([(42, 42), (42, 70)])]
    given = ["heatmap", *map(str, paths), "-o", str(tmp_path / "out"), "--weights", str(DEMO)]
    assert main(given) == 1
    assert "AssertionError: Input image height 42 is not what I like" in caplog.text
    assert "--image-size" not in caplog.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0"]


def test_explore_is_an_error_of_ours(tmp_path, caplog):
    path = draw(tmp_path / "1.png", (42, 70), 1)
    out = tmp_path / "page.html"
    assert main(["explore", str(path), "-o", str(out), "--weights", str(DEMO)]) == 2
    assert "AssertionError: Input image height 42 is not what I like" in caplog.text
    assert not out.exists()
