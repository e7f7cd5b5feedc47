"""Names that came from outside are escaped and shortened where errors and warnings show them."""

from __future__ import annotations

import dataclasses
import pickle
import re
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.text import Text
from PIL import Image

import dinov2_attn
from dinov2_attn import load_checkpoint, viz
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.viz.provenance import metadata_for
from dinov2_attn.apps.viz.reading import warn
from dinov2_attn.errors import (
    InvalidInputError,
    SuspiciousRangeWarning,
    UnreadableFileError,
    in_one_line,
    shown_name,
)
from dinov2_attn.proof.verify import report
from dinov2_attn.proof.verify.proof import Proof
from dinov2_attn.proof.verify.sources import Revision
from tests.support import upstreams
from tests.support.recordings import IMAGES, build

# What clears a screen, a change of direction, a return to the start of the line, and no text.
HOSTILE = "a\x1b[2J\u202egpj.\rb\udc80"
ESCAPED = r"a\x1b[2J\u202egpj.\rb\udc80"


def test_an_error_escapes_and_keeps_what_it_was_given():
    error = InvalidInputError("a name", HOSTILE, "Try again.")
    assert str(error) == f"Expected a name.\nFound {ESCAPED}.\nTry again."
    assert ESCAPED in in_one_line(error)
    assert error.found == HOSTILE
    assert pickle.loads(pickle.dumps(error)).found == HOSTILE
    str(error).encode()
    assert len(str(InvalidInputError("a name", "k" * 5_000_000, "Try again."))) < 5000
    assert len(in_one_line(ValueError("k" * 5_000_000))) < 5000


def test_a_name_stays_on_one_line_and_keeps_its_ends():
    assert shown_name("a\nb\u2028c") == r"a\nb\u2028c"
    long = shown_name("k" * 5_000_000 + ".jpg")
    assert len(long) < 300
    assert long.endswith(".jpg")
    error = InvalidInputError("a name", "a\nExpected nothing.", "Try again.")
    assert str(error).split("\n") == [
        "Expected a name.",
        r"Found a\nExpected nothing.",
        "Try again.",
    ]


@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_the_title_inside_a_picture(kind):
    title = metadata_for(kind, {"image": [f"folder/{HOSTILE}\n{'k' * 5000}"]})["Title"]
    assert title.isprintable()
    assert len(title) < 300


def test_a_page_and_a_cell_of_a_notebook(first):
    model = build(first)
    with dinov2_attn.record(model) as maps:
        model(IMAGES)
    page = viz.explore(
        model, IMAGES[:1].sigmoid(), title=f"{HOSTILE}\n{'k' * 5000}"
    ).content.decode()
    title = re.search("<title>(.*?)</title>", page, re.S)[1]
    assert title.isprintable()
    assert len(title) < 300
    named = dataclasses.replace(maps[0], layers=(HOSTILE, "b\nc", "d"))
    for text in (repr(named), named._repr_html_()):
        assert ESCAPED.removesuffix(r"\udc80") in text
        assert "\x1b" not in text


def test_a_file_with_such_a_name(tmp_path):
    with pytest.raises(UnreadableFileError) as caught:
        viz.load_image(tmp_path / HOSTILE, 14)
    assert str(caught.value).isprintable() or str(caught.value).count("\n") == 2
    assert ESCAPED.removesuffix(r"\udc80") in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_keys_of_a_checkpoint_of_megabytes(tmp_path, first):
    model = build(upstreams.FIRST)
    torch.save({HOSTILE[:-1] + "k" * 5_000_000: torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(Exception, match="Expected") as caught:
        load_checkpoint(model, tmp_path / "a.pth")
    assert len(str(caught.value)) < 10_000
    assert "\x1b" not in str(caught.value)


def test_a_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SuspiciousRangeWarning)
        warn(HOSTILE)
    assert str(caught[0].message) == ESCAPED


def test_what_an_extraction_says(tmp_path, first, caplog):
    model = build(first)
    (tmp_path / HOSTILE).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / HOSTILE / "b.png")
    (tmp_path / HOSTILE / f"{HOSTILE}.png").write_bytes(b"no image")
    (tmp_path / HOSTILE / f"c.{HOSTILE}").write_bytes(b"no image")
    out = tmp_path / f"{HOSTILE}.out"
    said = [str(dinov2_attn.extract(model, tmp_path / HOSTILE, out, dry_run=True))]
    said += [str(dinov2_attn.extract(model, tmp_path / HOSTILE, out))]
    for shard in out.glob("shards/*.jsonl"):
        shard.write_text("no JSON")
    with caplog.at_level("WARNING", "dinov2_attn"):
        dinov2_attn.extract(model, tmp_path / HOSTILE, out)
    assert "written again" in caplog.text
    for text in (*said, *caplog.messages):
        assert "\\" in text
        assert text.replace("\n", "").isprintable()


def test_a_name_of_a_target():
    with dinov2_attn.install(f"no_such_{HOSTILE}") as handle:
        for text in (repr(handle), str(dinov2_attn.status())):
            assert r"\x1b[2J" in text
            assert "\x1b" not in text


def test_words_that_the_program_does_not_know(capsys):
    for words in (["doctor", f"--{HOSTILE}"], [HOSTILE], ["heatmap", "a", f"--{'k' * 5_000_000}"]):
        with pytest.raises(SystemExit):
            main(words)
        said = capsys.readouterr().err
        assert "\x1b" not in said
        assert len(said) < 5000


def test_a_report_of_junit_is_xml():
    copy = Revision(f"<{HOSTILE}\0>", "", "dinov2", "", Path, str)
    line = report.Line(copy, {}, Proof(trouble=f"\x1b[31mRed\ufffe\x07 {HOSTILE}"))
    root = ElementTree.fromstring(report.as_junit([line]).encode("utf-8", "backslashreplace"))
    assert root.find("testsuite").get("name") == rf"<{ESCAPED}\x00>"
    assert root.find(".//failure").get("message") == rf"\x1b[31mRed\ufffe\x07 {ESCAPED}".replace(
        r"\r", " "
    )


def test_the_captions_of_pictures_and_figures(first, tmp_path):
    model = build(first)
    maps = dinov2_attn.attention_maps(model, IMAGES[:1], queries="cls")
    image = Image.new("RGB", (12, 8))
    figure = viz.figure(maps, image, name=HOSTILE, names=[HOSTILE], warning=HOSTILE)
    figure.save(tmp_path / "a.svg")
    caption = (tmp_path / "a.txt").read_text(encoding="utf-8")
    assert caption.removesuffix("\n").isprintable()
    assert caption.count(ESCAPED) == 3
    drawn = viz.plot(maps, image=image, name=HOSTILE).figure
    for kind in ("svg", "pdf", "png"):
        viz.save(drawn, tmp_path / f"b.{kind}")
    for name in ("a.svg", "b.svg"):
        ElementTree.parse(tmp_path / name)
    said = "".join(text.get_text() for text in drawn.findobj(Text)).replace("\n", "")
    assert r"\x1b[2J" in said
    assert said.isprintable()
