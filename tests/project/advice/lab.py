"""What cases are given: a model, images, files and the program."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import dinov2_attn
from dinov2_attn import attention_maps
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.apps.weights.models import Architecture, build_like
from tests.support import extraction
from tests.support.recordings import IMAGES, build
from tests.support.strategies import randomise

TINY = Architecture(
    embed_dim=64,
    depth=2,
    num_heads=1,
    patch_size=2,
    img_size=6,
    in_chans=3,
    registers=0,
    ffn="mlp",
    hidden=128,
    layer_scale=True,
    qkv_bias=True,
    proj_bias=True,
    ffn_bias=True,
)


@dataclass
class Lab:
    """Upstream's classes, grafted, and an empty folder. ``hint`` is of the error just raised."""

    upstream: Any
    folder: Path
    hint: str = ""
    x = IMAGES
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    photograph = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)

    def __post_init__(self):
        """Make a model of 3 blocks with patches of 2 × 2, in float64, and its tokens."""
        self.model = build(self.upstream)
        self.tokens = self.model.prepare_tokens_with_masks(IMAGES)
        self.block = self.model.blocks[0]

    @cached_property
    def small(self):
        """Such a model in float32, for photographs."""
        return extraction.build(self.upstream)

    def maps(self, **asked):
        return attention_maps(self.model, IMAGES, **asked)

    # Files

    def path(self, name):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def written(self, name, content):
        self.path(name).write_bytes(content)
        return self.path(name)

    def array(self, name, values):
        np.save(self.path(name), values)
        return self.path(name)

    @cached_property
    def image(self):
        """A photograph of 4 × 6 pixels."""
        Image.fromarray(self.photograph).save(self.path("photograph.png"))
        return self.path("photograph.png")

    @cached_property
    def frames_of_two_sizes(self):
        """A folder with two images of other sizes."""
        for number, pixels in enumerate((self.photograph, self.photograph[:2])):
            Image.fromarray(pixels).save(self.path(f"frames/{number}.png"))
        return self.path("frames/0.png").parent

    @property
    def frames(self):
        """A folder of which a film is made."""
        return self.frames_of_two_sizes

    def read(self, path, **options):
        return load_image(path, 2, **options)

    def saved(self, content, name="weights.pth"):
        torch.save(content, self.path(name))
        return self.path(name)

    @cached_property
    def weights(self):
        """A checkpoint of ``TINY``."""
        return self.saved(made().state_dict(), "tiny.pth")

    # The program

    def typed(self, *arguments):
        """Run the program; raise the error that it tells, if it tells one."""
        logged = _Logged()
        logging.getLogger("dinov2_attn").addHandler(logged)
        try:
            status = main([str(argument) for argument in arguments])
        finally:
            logging.getLogger("dinov2_attn").removeHandler(logged)
        for error in logged.errors:
            raise error
        assert status == 0

    def heatmap(self, *arguments, weights=None, output="out"):
        """Draw the photograph with the checkpoint ``weights``, or as ``arguments`` say."""
        model = [] if weights is None else ["--weights", weights]
        self.typed("heatmap", self.image, "-o", self.folder / output, *model, *arguments)


class _Logged(logging.Handler):
    def __init__(self):
        super().__init__()
        self.errors = []

    def emit(self, record):
        given = record.args if isinstance(record.args, tuple) else ()
        self.errors += [one for one in given if isinstance(one, dinov2_attn.Dinov2AttnError)]


def made(seed=0, **changes):
    """Build a model like ``TINY``, with ``changes``."""
    return randomise(build_like(replace(TINY, **changes)), seed)


def copied(model):
    return copy.deepcopy(model)
