"""``--arch dinov3_…``: a model by its name, from a checkout that the user has."""

from __future__ import annotations

import argparse
import logging

import numpy as np
import pytest
import torch

import dinov2_attn
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.cli.model_options import add_options, load_model
from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.apps.weights import dinov3 as by_name
from dinov2_attn.errors import InvalidInputError, UnavailableError, UnreadableFileError
from tests.support import dinov3
from tests.support.dinov3 import Truth
from tests.support.tolerances import assert_close, assert_same_bits

ARCH = ("--arch", "dinov3_vits16")


def load(*options):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return load_model(parser.parse_args([*map(str, options)]))


@pytest.fixture
def checkout():
    if not dinov3.CHECKOUT:
        pytest.skip("DINOV2_ATTN_DINOV3 names no checkout of DINOv3")
    yield dinov3.CHECKOUT
    dinov2_attn.uninstall()


@pytest.fixture
def saved(checkout, tmp_path):
    """The weights of a small one: the hub's models differ in size alone."""
    by_name.obtain(checkout)
    model = by_name.build("dinov3_vits16")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth", model


def test_the_weights_of_a_file_are_drawn(checkout, saved, tmp_path, caplog):
    file, model = saved
    from PIL import Image

    Image.fromarray(np.zeros((32, 48, 3), np.uint8) + 99).save(tmp_path / "photo.png")
    with caplog.at_level(logging.WARNING):
        loaded = load(*ARCH, "--repo", checkout, "--weights", file)
    assert "Meta's DINOv3 License" in caplog.text
    assert (loaded.name, loaded.random) == ("DINOv3 ViT-S/16, weights.pth", False)
    assert_same_bits(loaded.model.state_dict(), model.state_dict())
    command = ["heatmap", tmp_path / "photo.png", "-o", tmp_path / "out", *ARCH]
    assert main([*map(str, [*command, "--repo", checkout, "--weights", file])]) == 0
    image = load_image(tmp_path / "photo.png", 16).tensor[None]
    with Truth() as truth, torch.no_grad():
        model.forward_features(image)
    expected = truth.weights[-1][0, :, 0, 5:].unflatten(-1, (2, 3))
    found = torch.from_numpy(np.load(tmp_path / "out" / "attention.npy"))
    assert_close(found, expected, within=1e-6)


def test_random_weights_say_so(checkout):
    assert load(*ARCH, "--repo", checkout, "--random-weights").random


def test_weights_are_never_downloaded():
    with pytest.raises(UnavailableError, match=r"(?s)licence.*--weights PATH"):
        load(*ARCH)


@pytest.mark.parametrize("option", [["--patch-size", 16], ["--registers"]], ids=str)
def test_the_name_says_all_of_the_model(option):
    with pytest.raises(InvalidInputError, match="the name tells"):
        load(*ARCH, *option, "--random-weights")


def test_code_is_never_downloaded(tmp_path, monkeypatch):
    with pytest.raises(UnreadableFileError, match="a checkout of DINOv3"):
        load(*ARCH, "--repo", tmp_path, "--random-weights")
    monkeypatch.setitem(__import__("sys").modules, by_name._HUB, None)
    with pytest.raises(UnavailableError, match=r"(?s)not downloaded.*Clone https://github\.com"):
        load(*ARCH, "--random-weights")
