"""What the README says is what was measured, and its Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import dinov2_attn
from tests.support.extraction import draw
from tests.support.strategies import noise, randomise

ROOT = Path(__file__).parents[2]


def rows(file):
    return [line for line in file.read_text().splitlines() if line.startswith("|")]


def test_the_table_of_costs_is_quoted_from_the_benchmark():
    measured = rows(ROOT / "benchmarks" / "results" / "cost.md")
    section = (
        (ROOT / "README.md").read_text().partition("## What it costs")[2].partition("\n## ")[0]
    )
    quoted = [line for line in section.splitlines() if line.startswith("|")]
    assert len(quoted) > 10
    assert [line for line in quoted if line not in measured] == []


# The others want a network, or the real xFormers: test_nested asks for lists as they do.
BLOCKS = re.findall(
    r"```python\n(.*?)```", (ROOT / "README.md").read_text().partition("## In Python")[2], re.S
)


@pytest.fixture
def names(first, tmp_path, monkeypatch):
    """What the README takes for granted, of real classes: a model, images, a photograph."""
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.chdir(tmp_path)
    transformer = first.cls("DinoVisionTransformer")
    shape = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "num_heads": 6, "depth": 12}
    model = randomise(transformer(**shape, block_chunks=0), 0)
    torch.save({"teacher": model.state_dict()}, "teacher_checkpoint.pth")
    monkeypatch.setattr(torch.hub, "load", lambda *_: model)
    images = noise(2, 3, 70, 126, seed=0)
    return {
        "images": images,
        "tokens": noise(2, 46, 24, seed=1),
        "normed": noise(2, 46, 24, seed=2),
        "photograph": torch.zeros(70, 126, 3, dtype=torch.uint8).numpy(),
        "ax": figure.Figure().add_subplot(),
        "depth_anything": nn.Sequential(model),
    }


def test_its_python_runs_as_it_stands(names):
    first, *others = BLOCKS
    exec(first, names)
    for block in others:
        if "depth_anything" in block or "attention_maps" in block:
            exec(block, names)
    assert names["cls"].shape == (2, 6, 1, 46)
    assert names["maps"].weights[0].shape == (2, 46, 46)


def test_what_it_reads_out_of_an_extraction_is_there(names, tmp_path):
    exec(BLOCKS[0], names)
    draw(tmp_path / "photos" / "a.png", (70, 126), 0)
    dinov2_attn.extract(names["model"], "photos", "out")
    reading, asking = (block for block in BLOCKS if '"out' in block)
    exec(reading, names)
    assert len(reading.partition("\n\n")[2].splitlines()) == 4
    assert names["maps"].shape == (1, 6, 1, 5, 9)
    (tmp_path / "out").rename("before")
    exec(asking, names)
    assert names["maps"][0]["maps"].shape == (12, 1, 16, 16)


def test_each_name_in_it_is_there():
    used = set(re.findall(r"dinov2_attn\.(\w+(?:\.\w+)?)\(", "\n".join(BLOCKS)))
    assert {"install", "viz.plot", "load_checkpoint"} <= used
    for path in used:
        found = dinov2_attn
        for name in path.split("."):
            found = getattr(found, name)
        assert callable(found)
