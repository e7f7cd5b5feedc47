"""What an extraction says of its own numbers: axes, preprocessing, entropy, a README."""

from __future__ import annotations

import hashlib
import json
import math
import re

import pytest
import torch
from safetensors import safe_open

from dinov2_attn import extract
from dinov2_attn.apps.extraction.described import METADATA
from tests.support.extraction import build, files_of, index_of, photographs, stored
from tests.support.tolerances import assert_close


@pytest.fixture(scope="module")
def model(grafted):
    return build(grafted)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("images") / "in")


def about_of(folder):
    return json.loads((folder / "extraction.json").read_text())


def metadata_of(path):
    with safe_open(path, "pt") as shard:
        return json.loads(shard.metadata()[METADATA])


@pytest.mark.parametrize("heads", [None, "mean"])
def test_axes_name_the_dimensions(models, images, tmp_path, heads):
    registers = {"num_register_tokens": 2} if models.has_registers else {}
    queries = ["cls", "0,1"]
    extract(build(models, **registers), images, tmp_path, layers=2, queries=queries, heads=heads)
    about = about_of(tmp_path)
    described = about["tensors"]
    tokens = ["cls", "register:1", "register:2"][: 1 + sum(registers.values())]
    assert described["tokens"] == tokens
    lengths = {"layers": 2, "queries": 2, "tokens": len(tokens)}
    assert described["layers"] == [1, 2]
    assert described["queries"] == queries
    assert described["heads"] == ("mean" if heads else [0, 1])
    lengths |= {} if heads else {"heads": 2}
    for entry, maps, prefix in stored(tmp_path):
        here = lengths | dict(zip(("rows", "columns"), entry["grid"], strict=True))
        assert list(maps.shape) == [here[axis] for axis in described["maps"]]
        assert list(prefix.shape) == [here[axis] for axis in described["prefix"]]
        assert str(maps.dtype) == f"torch.{described['dtype']}"


def test_every_shard_says_it_too(model, images, tmp_path):
    extract(model, images, tmp_path, shard_size=5, mean=0.25, image_size=(6, 8))
    about = about_of(tmp_path)
    made = about["preprocessing"]
    assert made["mean"] == [0.25] * 3
    assert made["resize"] == {"to": [6, 8], "interpolation": "bicubic"}
    assert made["crop"] == {"to": "whole patches from the top left", "patch_size": [2, 2]}
    for shard in tmp_path.glob("shards/*.safetensors"):
        said = metadata_of(shard)
        assert said["tensors"] == about["tensors"]
        assert said["preprocessing"] == made
        lines = shard.with_suffix(".jsonl").read_bytes()
        assert said["index"] == hashlib.sha256(lines).hexdigest()


def test_the_entropy_is_that_of_the_weights(model, images, tmp_path):
    extract(model, images, tmp_path, layers=None, queries="patches")
    for entry, maps, prefix in stored(tmp_path):
        weights = torch.cat([prefix, maps.flatten(-2)], -1).double()
        expected = -(weights * weights.log()).sum(-1).mean((1, 2))
        assert_close(torch.tensor(entry["entropy"]), expected.float(), size=10.0)
        assert all(0 < number < math.log(weights.shape[-1]) for number in entry["entropy"])


def test_the_readme_is_true(model, images, tmp_path, monkeypatch):
    """Its code without the package runs, and it names what is there."""
    extract(model, images, tmp_path, name="a `model` | with | ticks\x1b[31m\n# and a headline")
    text = (tmp_path / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    _, maps, _ = list(stored(tmp_path))[-1]
    assert names["maps"].shape == maps.shape
    present = set(files_of(tmp_path))
    for name in re.findall(r"^\| `([^`]*)`", text, re.MULTILINE):
        assert list(tmp_path.glob(name)), name
    assert "README.md" in present
    assert "(layers, heads, queries, rows, columns)" in text
    assert "\x1b" not in text
    assert "\n# and" not in text
    assert "`a 'model' / with / ticks" in text.replace('"', "")
    with_warning = tmp_path / "random"
    extract(model, images, with_warning, random=True)
    assert "**Warning: `random weights" in (with_warning / "README.md").read_text()


def test_a_reader_may_write_into_the_readme(model, images, tmp_path):
    extract(model, images, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    assert extract(model, images, tmp_path).written == 0
    assert (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "README.md").unlink()
    extract(model, images, tmp_path)
    assert (tmp_path / "README.md").exists()


def test_a_folder_of_images_may_lie_beside_its_maps(model, images, tmp_path):
    """The files of an extraction are no images of the next one."""
    extract(model, images, images.parent / "in" / "maps")
    done = extract(model, images, tmp_path)
    assert done.images == len(index_of(tmp_path))
    assert done.passed_over == {}
