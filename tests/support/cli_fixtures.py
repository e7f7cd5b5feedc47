"""Fixtures for tests of the program: a photograph, and weights that look at what is bright."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from dinov2_attn.apps.weights.models import build
from dinov2_attn.proof.conformance.synthetic_models import look_at_what_is_bright
from tests.support import upstreams
from tests.support.bright_patch import BRIGHT, GRID, photograph_of


@pytest.fixture
def imported(first):
    """Upstream's first commit is imported, and grafts of the program go with it."""
    first.module("dinov2.models.vision_transformer")


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "planted.png"
    Image.fromarray(photograph_of(GRID, BRIGHT)).save(path)
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    upstreams.FIRST.module("dinov2.models.vision_transformer")
    path = tmp_path_factory.mktemp("weights") / "planted.pth"
    torch.save(look_at_what_is_bright(build("vit_small")).state_dict(), path)
    return path
