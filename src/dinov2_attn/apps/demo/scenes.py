"""Synthetic scenes: one target with rings, among shapes with other textures.

A scene depends on its seed only. Random numbers come from ``RandomState``, whose stream NumPy has
frozen. Other machines differ only where a sine is rounded differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

PATCH = 14
Grid = tuple[int, int]
Centre = tuple[float, float]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Random = np.random.RandomState
Choice = TypeVar("Choice")

# An object is about as large as a patch and near the centre of one, so that a map that is off by
# one patch misses it.
RADII = (7.0, 9.0)
JITTER = 3.0
MOST_SHAPES = 9

# Training uses seeds from here on. Smaller seeds are held out.
FIRST_TRAINING_SEED = 1_000_000_000


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, uint8 (H, W, 3), and the mask of the target in it, bool (H, W)."""

    picture: npt.NDArray[np.uint8]
    mask: Mask

    @property
    def grid(self) -> Grid:
        """Height and width in patches."""
        height, width = self.mask.shape
        return height // PATCH, width // PATCH


def draw(seed: int, grid: Grid, *, target: bool = True) -> Scene:
    """Draw a scene of ``grid`` patches ``(h, w)``: the target and up to eight distractors.

    ``seed`` is from 0 to 2**32 - 1, ``h`` and ``w`` at least 1. Without ``target`` one more
    distractor takes its place.
    """
    random = Random(seed)
    picture = _background(random, grid)
    place, *others = _centres(random, grid)
    for centre in others:
        _paint(picture, random, centre, _one_of(random, OUTLINES), _one_of(random, TEXTURES))
    shape = (_disc, _rings) if target else (_one_of(random, OUTLINES), _one_of(random, TEXTURES))
    inside = _paint(picture, random, place, *shape)
    picture += random.uniform(-0.04, 0.04, (*inside.shape, 1))
    return Scene((picture.clip(0, 1) * 255).round().astype(np.uint8), inside)


def _background(random: Random, grid: Grid) -> Floats:
    """Return waves of three lengths, each with its own direction and colour."""
    y, x = np.ogrid[: grid[0] * PATCH, : grid[1] * PATCH]
    waves = []
    for length in (90.0, 30.0, 8.0):
        angle, phase = random.uniform(0, 2 * np.pi, 2)
        waves.append(np.sin(_along(angle, y, x) * (2 * np.pi / length) + phase))
    colours = random.uniform(-0.08, 0.08, (3, 3))
    picture: Floats = random.uniform(0.25, 0.75, 3) + np.stack(waves, axis=-1) @ colours
    return picture


def _centres(random: Random, grid: Grid) -> list[Centre]:
    """Return centres in pixels, each near the centre of a patch, never in adjacent patches."""
    cells: list[tuple[int, int]] = []
    count = random.randint(3, MOST_SHAPES + 1)
    for cell in random.permutation(grid[0] * grid[1]):
        row, column = divmod(int(cell), grid[1])
        if all(max(abs(row - r), abs(column - c)) > 1 for r, c in cells):
            cells.append((row, column))
        if len(cells) == count:
            break
    moved = (np.array(cells) + 0.5) * PATCH + random.uniform(-JITTER, JITTER, (len(cells), 2))
    return [(float(y), float(x)) for y, x in moved]


def _paint(
    picture: Floats,
    random: Random,
    centre: Centre,
    outline: Callable[[Floats, Floats], Floats],
    texture: Callable[[Random, Floats, Floats], Floats],
) -> Mask:
    """Paint a shape in a dark and a light colour, and return which pixels it covers."""
    rows, columns = (slice(max(0, int(c) - PATCH), int(c) + PATCH) for c in centre)
    canvas = picture[rows, columns]
    y, x = np.mgrid[: canvas.shape[0], : canvas.shape[1]] + 0.5
    y, x = y + rows.start - centre[0], x + columns.start - centre[1]
    inside = outline(y, x) < random.uniform(*RADII)
    dark, light = random.uniform(0, 0.4, 3), random.uniform(0.6, 1, 3)
    bright = texture(random, y, x) > 0
    canvas[inside] = np.where(bright[inside][:, None], light, dark)
    covered = np.zeros(picture.shape[:2], dtype=np.bool_)
    covered[rows, columns] = inside
    return covered


def _along(angle: float, y: Floats, x: Floats) -> Floats:
    """Return the coordinate of pixels along the direction ``angle``."""
    distance: Floats = np.cos(angle) * y + np.sin(angle) * x
    return distance


def _one_of(random: Random, choices: Sequence[Choice]) -> Choice:
    return choices[random.randint(len(choices))]


# Outlines: the size at which a shape reaches each pixel. All cover about the area of the disc.


def _disc(y: Floats, x: Floats) -> Floats:
    distance: Floats = np.sqrt(y * y + x * x)
    return distance


def _square(y: Floats, x: Floats) -> Floats:
    reach: Floats = np.maximum(abs(y), abs(x)) * 1.1
    return reach


def _diamond(y: Floats, x: Floats) -> Floats:
    return (abs(y) + abs(x)) * 0.8


# Textures: light where positive. Lengths are in pixels.


def _rings(random: Random, y: Floats, x: Floats) -> Floats:
    rings: Floats = np.cos(_disc(y, x) * (2 * np.pi / random.uniform(5, 6)))
    return rings * _one_of(random, (-1, 1))


def _stripes(random: Random, y: Floats, x: Floats) -> Floats:
    angle, phase = random.uniform(0, 2 * np.pi, 2)
    stripes: Floats = np.sin(_along(angle, y, x) * (2 * np.pi / random.uniform(4, 7)) + phase)
    return stripes


def _checks(random: Random, y: Floats, x: Floats) -> Floats:
    angle, side = random.uniform(0, 2 * np.pi), random.uniform(3, 5)
    one = np.sin(_along(angle, y, x) * (np.pi / side))
    across = np.sin(_along(angle + np.pi / 2, y, x) * (np.pi / side))
    checks: Floats = one * across
    return checks


def _halves(random: Random, y: Floats, x: Floats) -> Floats:
    return _along(random.uniform(0, 2 * np.pi), y, x)


def _speckles(random: Random, y: Floats, x: Floats) -> Floats:
    speckles: Floats = random.uniform(-1, 1, y.shape)
    return speckles


OUTLINES = (_disc, _square, _diamond)
TEXTURES = (_stripes, _checks, _halves, _speckles)
