"""Arrays given as images are shown right or refused, in every picture that takes one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinov2_attn import viz
from dinov2_attn.apps.explorer.write import write_page
from dinov2_attn.apps.viz.pixels import as_pixels
from dinov2_attn.errors import InvalidInputError
from tests.support.figure_probes import maps_on
from tests.support.tolerances import assert_close

GRID = (2, 3)
RGB = np.random.default_rng(0).integers(0, 256, (28, 42, 3), dtype=np.uint8)
RGB[0, 0], RGB[0, 1] = 0, 255

DRAWS = {
    "plot": lambda image: viz.plot(maps_on(GRID), image=image),
    "heads": lambda image: viz.plot_heads(maps_on(GRID), image=image),
    "masks": lambda image: viz.plot_masks(maps_on(GRID), 0.5, image=image),
}

TAKEN = {
    "uint8": (RGB, RGB),
    "larger integers": (RGB.astype(np.int64), RGB),
    "floats": (RGB / 255, RGB),
    "half floats": ((RGB / 255).astype(np.float16), RGB),
    "a tensor": (torch.from_numpy(RGB), RGB),
    "a tensor with gradients": ((torch.from_numpy(RGB) / 255).requires_grad_(), RGB),
    "grey": (RGB[..., 0], RGB[..., :1].repeat(3, 2)),
    "one channel": (RGB[..., :1], RGB[..., :1].repeat(3, 2)),
    "booleans": (RGB[..., 0] > 99, (RGB[..., :1] > 99).repeat(3, 2) * 255),
}


@pytest.mark.parametrize(("image", "expected"), TAKEN.values(), ids=TAKEN)
def test_what_is_certain_is_shown(image, expected):
    pixels = as_pixels(image)
    white = 1 if pixels.dtype.kind == "f" else 255
    assert_close(pixels / white, expected / 255, within=5e-4)
    for draw in DRAWS.values():
        draw(image)


def test_alpha_is_left_to_matplotlib():
    alpha = np.concatenate([RGB, RGB[..., :1]], axis=2)
    assert_close(as_pixels(alpha), alpha, within=0)


NORMALISED = (RGB / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
REFUSED = {
    "floats of 0…255": (RGB.astype(float), r"(?s)floats of 0…1.*to 255\.\s.*image / 255"),
    "12 bits": (RGB.astype(np.uint16) * 16, r"(?s)integers of 0…255.*to 4080\.\s.*image / 4095"),
    "16 bits": (RGB.astype(np.uint16) * 257, r"(?s)integers of 0…255.*image / 65535"),
    "normalised": (NORMALISED, r"(?s)run from -2\.1.*image \* std \+ mean"),
    "signed": (RGB.astype(int) - 128, r"(?s)integers of 0…255\.\s.*from -128 to 127"),
    "channels first": (
        np.moveaxis(RGB, -1, 0),
        r"(?s)\(3, 28, 42\)\.\s.*image\.transpose\(1, 2, 0\)",
    ),
    "a batch": (RGB[None], r"(?s)\(1, 28, 42, 3\)\.\s.*image\[0\]"),
    "five channels": (RGB[..., [0, 1, 2, 0, 1]], r"shape \(28, 42, 5\)"),
    "nan": (np.where(RGB == 255, np.nan, RGB / 255), r"finite"),
    "infinity": (np.where(RGB == 255, np.inf, RGB / 255), r"finite"),
    "complex numbers": (RGB * 1j, r"numbers\.\nFound complex128"),
    "words": (np.full((28, 42), "a"), r"numbers\.\nFound <U1"),
    "no pixel": (RGB[:0], r"shape \(0, 42, 3\)"),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize(("image", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_certain_is_refused(image, message, draw):
    with pytest.raises(InvalidInputError, match=message):
        draw(image)


@pytest.mark.parametrize("name", ["floats of 0…255", "12 bits", "16 bits", "normalised", "signed"])
def test_the_advice_leads_to_the_image(name):
    image = REFUSED[name][0]
    with pytest.raises(InvalidInputError) as error:
        as_pixels(image)
    for expression in ("image / 255", "image / 4095", "image / 65535", "image * std + mean"):
        if expression in error.value.args[2].replace(" if", " ").split("; or")[0] + " ":
            break
    else:
        expression = "(image - image.min()) / (image.max() - image.min())"
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    found = eval(expression, {"image": image, "mean": mean, "std": std})
    assert_close(as_pixels(found.clip(0, 1)), RGB / 255, within=5e-3)


@pytest.mark.parametrize(
    "picture", [np.zeros((3, 28, 42), np.uint8), np.zeros((28, 42, 4), np.uint8), RGB / 255, RGB[0]]
)
def test_a_page_takes_a_picture_of_whole_patches_only(tmp_path, picture):
    maps = maps_on(GRID, queries=range(7))
    with pytest.raises(InvalidInputError, match=r"uint8 \(H, W, 3\)"):
        write_page(tmp_path / "page.html", picture, maps)
    assert not list(tmp_path.iterdir())
